// Package eventlog reads the event log in which firmware, boot loader and
// kernel write down what they measured into the PCRs: it replays it, says in
// words what an event is, holds two logs against each other, and works out the
// log of a boot with some files replaced. A log is hostile until it replays to the
// PCRs of a TPM, and its words remain the words of whoever wrote them: a PCR
// vouches for an event's digest, and for its data only where they hash to it.
//
// Formats are those of the TCG PC Client Platform Firmware Profile (PFP) 1.06,
// clauses 10.2 (crypto-agile) and 10.1 (SHA-1 alone).
package eventlog

import (
	"bytes"
	"crypto"
	_ "crypto/sha1" // the hashes below
	_ "crypto/sha256"
	_ "crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// Limits of a log that is read. A server with a long list of forbidden
// signatures has some 100 KB and 200 events.
const (
	MaxSize   = 4 << 20
	maxEvents = 8192
	maxData   = 1 << 20
	maxAlgs   = 16
	maxDigest = 64
	numPCRs   = 24
)

// EventType is what kind of event it is (PFP, 10.4.1).
type EventType uint32

// The types that this package knows something of.
const (
	NoAction            EventType = 0x03
	Separator           EventType = 0x04
	EventTag            EventType = 0x06
	CRTMContents        EventType = 0x07
	CRTMVersion         EventType = 0x08
	Microcode           EventType = 0x09
	IPL                 EventType = 0x0D
	VariableConfig      EventType = 0x80000001
	VariableBoot        EventType = 0x80000002
	BootApplication     EventType = 0x80000003
	BootDriver          EventType = 0x80000004
	RuntimeDriver       EventType = 0x80000005
	GPT                 EventType = 0x80000006
	Action              EventType = 0x80000007
	FirmwareBlob        EventType = 0x80000008
	HandoffTables       EventType = 0x80000009
	FirmwareBlob2       EventType = 0x8000000A
	HandoffTables2      EventType = 0x8000000B
	VariableBoot2       EventType = 0x8000000C
	GPT2                EventType = 0x8000000D
	HCRTM               EventType = 0x80000010
	VariableAuthority   EventType = 0x800000E0
	specSignature                 = "Spec ID Event03\x00"
	localitySignature             = "StartupLocality\x00"
	legacyDigestSize              = 20
	tcgSHA1             uint16    = 0x0004
	platformClassClient           = 0
)

// Algorithm is a digest that a log has of each event.
type Algorithm struct {
	ID   uint16 // TPM_ALG_ID
	Size int
}

// Event is one measurement. Digests are in the order of the log's Algorithms;
// one that the event lacks is nil.
type Event struct {
	PCR     uint32
	Type    EventType
	Digests [][]byte
	Data    []byte
}

// Log is an event log.
type Log struct {
	Algorithms []Algorithm
	Legacy     bool // SHA-1 alone, without a header
	Events     []Event
}

// bankOf gives the algorithm of a PCR bank.
func bankOf(bank string) (id uint16, h crypto.Hash, ok bool) {
	switch bank {
	case "sha1":
		return tcgSHA1, crypto.SHA1, true
	case "sha256":
		return 0x000B, crypto.SHA256, true
	case "sha384":
		return 0x000C, crypto.SHA384, true
	}
	return 0, 0, false
}

// reader takes numbers and bytes off the front of what is left.
type reader struct {
	b      []byte
	failed bool
}

func (r *reader) take(n int) []byte {
	if n < 0 || n > len(r.b) {
		r.failed, r.b = true, nil
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) u8() uint8 {
	if v := r.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if v := r.take(2); v != nil {
		return binary.LittleEndian.Uint16(v)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if v := r.take(4); v != nil {
		return binary.LittleEndian.Uint32(v)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if v := r.take(8); v != nil {
		return binary.LittleEndian.Uint64(v)
	}
	return 0
}

var errShort = errors.New("event log ends in the middle of an event")

// UntrustedParse reads a log of either format. It checks shapes and bounds;
// what the log says is true only as far as it replays.
func UntrustedParse(b []byte) (*Log, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("event log of %d bytes, at most %d", len(b), MaxSize)
	}
	r := &reader{b: b}
	first, err := r.legacyEvent()
	if err != nil {
		return nil, err
	}
	l := &Log{Legacy: true, Algorithms: []Algorithm{{tcgSHA1, legacyDigestSize}}}
	next := r.legacyEvent
	if first.Type == NoAction && bytes.HasPrefix(first.Data, []byte(specSignature)) {
		if l.Algorithms, err = specAlgorithms(first.Data); err != nil {
			return nil, err
		}
		l.Legacy = false
		first.Digests = nil
		next = func() (Event, error) { return r.event(l.Algorithms) }
	}
	const usual = 128 // bytes of an event, or some more
	l.Events = append(make([]Event, 0, min(1+len(b)/usual, maxEvents)), first)
	for len(r.b) > 0 && !padding(r.b) {
		if len(l.Events) == maxEvents {
			return nil, fmt.Errorf("event log of more than %d events", maxEvents)
		}
		e, err := next()
		if err != nil {
			return nil, fmt.Errorf("event %d: %w", len(l.Events), err)
		}
		if e.PCR >= numPCRs && e.Type != NoAction {
			return nil, fmt.Errorf("event %d is of PCR %d, which there is not", len(l.Events), e.PCR)
		}
		l.Events = append(l.Events, e)
	}
	return l, nil
}

// padding is what may follow a log in a table of firmware.
func padding(b []byte) bool {
	return len(bytes.Trim(b, "\x00")) == 0 || len(bytes.Trim(b, "\xff")) == 0
}

// legacyEvent reads a TCG_PCClientPCREvent (PFP, 10.1).
func (r *reader) legacyEvent() (Event, error) {
	e := Event{PCR: r.u32(), Type: EventType(r.u32()), Digests: [][]byte{r.take(legacyDigestSize)}}
	return r.data(e)
}

// event reads a TCG_PCR_EVENT2 (PFP, 10.2.1).
func (r *reader) event(algs []Algorithm) (Event, error) {
	e := Event{PCR: r.u32(), Type: EventType(r.u32()), Digests: make([][]byte, len(algs))}
	n := r.u32()
	if n > maxAlgs {
		return e, fmt.Errorf("%d digests", n)
	}
	for range n {
		id := r.u16()
		if r.failed {
			return e, errShort
		}
		i := slices.IndexFunc(algs, func(a Algorithm) bool { return a.ID == id })
		if i < 0 {
			return e, fmt.Errorf("digest of algorithm %#x, which the log's header does not name", id)
		}
		if e.Digests[i] != nil {
			return e, fmt.Errorf("two digests of algorithm %#x", id)
		}
		e.Digests[i] = r.take(algs[i].Size)
	}
	return r.data(e)
}

func (r *reader) data(e Event) (Event, error) {
	size := r.u32()
	if !r.failed && size > maxData {
		return e, fmt.Errorf("%d bytes of data", size)
	}
	e.Data = r.take(int(size))
	if r.failed {
		return e, errShort
	}
	return e, nil
}

// specAlgorithms reads a TCG_EfiSpecIDEvent (PFP, 10.4.5.1).
func specAlgorithms(data []byte) ([]Algorithm, error) {
	r := &reader{b: data[len(specSignature):]}
	r.u32()   // platformClass
	r.take(4) // versions, uintnSize
	n := r.u32()
	if n == 0 || n > maxAlgs {
		return nil, fmt.Errorf("event log with %d digest algorithms", n)
	}
	var algs []Algorithm
	for range n {
		a := Algorithm{r.u16(), int(r.u16())}
		if a.Size == 0 || a.Size > maxDigest || slices.ContainsFunc(algs, func(o Algorithm) bool { return o.ID == a.ID }) {
			return nil, fmt.Errorf("event log with digests of algorithm %#x and %d bytes", a.ID, a.Size)
		}
		algs = append(algs, a)
	}
	r.take(int(r.u8()))
	if r.failed {
		return nil, errors.New("event log whose header is cut off")
	}
	return algs, nil
}

// Marshal writes the log in its format.
func (l *Log) Marshal() []byte {
	size := 0
	for i := range l.Events {
		size += 16 + len(l.Algorithms)*(2+maxDigest) + len(l.Events[i].Data)
	}
	b := make([]byte, 0, size)
	u32 := func(v int) { b = binary.LittleEndian.AppendUint32(b, uint32(v)) }
	for i, e := range l.Events {
		b = binary.LittleEndian.AppendUint32(b, e.PCR)
		b = binary.LittleEndian.AppendUint32(b, uint32(e.Type))
		switch {
		case !l.Legacy && i == 0:
			b = append(b, make([]byte, legacyDigestSize)...)
		case l.Legacy:
			b = append(b, e.Digests[0]...)
		default:
			n := 0
			for _, d := range e.Digests {
				if d != nil {
					n++
				}
			}
			u32(n)
			for j, d := range e.Digests {
				if d != nil {
					b = append(binary.LittleEndian.AppendUint16(b, l.Algorithms[j].ID), d...)
				}
			}
		}
		u32(len(e.Data))
		b = append(b, e.Data...)
	}
	return b
}

// Bank gives the log with the digests of one PCR bank alone.
func (l *Log) Bank(bank string) (*Log, error) {
	i, _, err := l.index(bank)
	if err != nil {
		return nil, err
	}
	if l.Legacy {
		return l, nil
	}
	a := l.Algorithms[i]
	out := &Log{Algorithms: []Algorithm{a}, Events: make([]Event, 0, len(l.Events))}
	for n, e := range l.Events {
		if n == 0 {
			e.Data = specEvent(a)
		} else {
			e.Digests = slices.Clip(e.Digests[i : i+1])
		}
		out.Events = append(out.Events, e)
	}
	return out, nil
}

// specEvent is the header of a log of one algorithm.
func specEvent(a Algorithm) []byte {
	b := append([]byte(specSignature), 0, 0, 0, platformClassClient, 0, 2, 0, 2) // version 2.0, 64 bits
	b = binary.LittleEndian.AppendUint32(b, 1)
	b = binary.LittleEndian.AppendUint16(b, a.ID)
	b = binary.LittleEndian.AppendUint16(b, uint16(a.Size))
	return append(b, 0)
}

// New is a log of one bank without events.
func New(bank string) (*Log, error) {
	id, h, ok := bankOf(bank)
	if !ok {
		return nil, fmt.Errorf("there is no PCR bank %q", bank)
	}
	a := Algorithm{id, h.Size()}
	return &Log{Algorithms: []Algorithm{a}, Events: []Event{{Type: NoAction, Data: specEvent(a)}}}, nil
}

func (l *Log) index(bank string) (int, crypto.Hash, error) {
	id, h, ok := bankOf(bank)
	i := slices.IndexFunc(l.Algorithms, func(a Algorithm) bool { return a.ID == id && a.Size == h.Size() })
	if !ok || i < 0 {
		return 0, 0, fmt.Errorf("the event log has no digests of bank %s", bank)
	}
	return i, h, nil
}

// measured tells an event that was extended from one that only informs.
func (e *Event) measured() bool { return e.Type != NoAction }

// Replay gives the PCRs that the log leads to, 0 to 15 and 23, each: those that a
// boot begins with zeros. PCR 0 begins with the locality from which the TPM was
// started (PFP, 10.4.5.3).
func (l *Log) Replay(bank string) (map[uint][]byte, error) {
	i, h, err := l.index(bank)
	if err != nil {
		return nil, err
	}
	pcrs := map[uint][]byte{23: make([]byte, h.Size())}
	for p := range uint(16) {
		pcrs[p] = make([]byte, h.Size())
	}
	begun := false
	w := h.New()
	for n := range l.Events {
		e := &l.Events[n]
		if e.Type == NoAction {
			if loc, ok := bytes.CutPrefix(e.Data, []byte(localitySignature)); ok && len(loc) == 1 {
				if begun || loc[0] > 4 {
					return nil, fmt.Errorf("event %d sets PCR 0 anew", n)
				}
				pcrs[0][h.Size()-1], begun = loc[0], true
			}
			continue
		}
		begun = begun || e.PCR == 0
		v, ok := pcrs[uint(e.PCR)]
		if !ok {
			continue
		}
		if e.Digests[i] == nil {
			return nil, fmt.Errorf("event %d has no digest of bank %s", n, bank)
		}
		w.Reset()
		w.Write(v)
		w.Write(e.Digests[i])
		w.Sum(v[:0])
	}
	return pcrs, nil
}
