package ima

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
)

// PCR is where IMA measures to, unless the kernel was configured otherwise.
const PCR = 10

// bank is a PCR bank's algorithm: sum puts the digest of data into out, which has
// room for it, and gives it.
type bank struct {
	size int
	sum  func(out, data []byte) []byte
}

var banks = map[string]bank{
	"sha1":   {sha1.Size, func(out, data []byte) []byte { d := sha1.Sum(data); return append(out[:0], d[:]...) }},
	"sha256": {sha256.Size, func(out, data []byte) []byte { d := sha256.Sum256(data); return append(out[:0], d[:]...) }},
	"sha384": {sha512.Size384, func(out, data []byte) []byte { d := sha512.Sum384(data); return append(out[:0], d[:]...) }},
	"sha512": {sha512.Size, func(out, data []byte) []byte { d := sha512.Sum512(data); return append(out[:0], d[:]...) }},
}

// legacyName is how long the path is that is hashed of the template "ima"
// (TCG_EVENT_NAME_LEN_MAX + 1).
const legacyName = 256

// measured is what was hashed of an entry: its fields as they stand in the list,
// but for the template "ima", whose path is filled up with zeros.
func (e *Entry) measured(buf []byte) ([]byte, error) {
	if e.Template != legacy {
		return e.Data, nil
	}
	path := e.Data[sha1.Size+4:]
	if len(path) >= legacyName {
		return nil, fmt.Errorf("%w: path of %d bytes in the template ima", ErrFormat, len(path))
	}
	buf = append(append(buf[:0], e.Data[:sha1.Size]...), path...)
	return append(buf, make([]byte, sha1.Size+legacyName-len(buf))...), nil
}

// chain is one replay.
type chain struct {
	bank   bank
	mode   Mode
	room   [2 * sha512.Size]byte // begins with the value of the PCR
	digest [sha512.Size]byte
	legacy [sha1.Size + legacyName]byte
}

func newChain(b bank, m Mode, value []byte) *chain {
	c := &chain{bank: b, mode: m}
	copy(c.room[:], value)
	return c
}

func (c *chain) value() []byte { return c.room[:c.bank.size] }

// extend adds an entry.
func (c *chain) extend(e *Entry) error {
	if c.mode == Native && c.bank.size == sha256.Size && e.Template != legacy && !e.Violation() { // nearly always
		d := sha256.Sum256(e.Data)
		copy(c.room[sha256.Size:], d[:])
		d = sha256.Sum256(c.room[:2*sha256.Size])
		copy(c.room[:], d[:])
		return nil
	}
	d := c.digest[:c.bank.size]
	switch {
	case e.Violation():
		for i := range d {
			d[i] = 0xff
		}
		if c.mode == Padded {
			clear(d[sha1.Size:])
		}
	default:
		data, err := e.measured(c.legacy[:])
		if err != nil {
			return err
		}
		if c.mode == Native {
			d = c.bank.sum(d, data)
			break
		}
		// The PCR vouches for the SHA-1 digest alone, which has to be the data's.
		if s := sha1.Sum(data); !bytes.Equal(s[:], e.SHA1) {
			return fmt.Errorf("%w: the digest of %.80q is not that of its data", ErrReplay, e.Path)
		}
		clear(d[copy(d, e.SHA1):])
	}
	c.bank.sum(c.value(), append(c.value(), d...)) // which is read before it is overwritten
	return nil
}

// find gives how many bytes and entries of a list lead to want: the shortest
// such prefix, since the hashes of a longer one cannot come back to it.
func (c *chain) find(list, want []byte, pcr uint32, room uint64) (size int, entries uint64, err error) {
	var e Entry
	for !bytes.Equal(c.value(), want) {
		n, err := e.frame(list[size:])
		if err != nil {
			return 0, 0, fmt.Errorf("entry %d: %w", entries, err)
		}
		if n == 0 {
			return 0, 0, ErrReplay
		}
		if entries == room {
			return 0, 0, fmt.Errorf("%w: more than %d entries", ErrFormat, uint64(MaxEntries))
		}
		if e.PCR == pcr {
			if err := c.extend(&e); err != nil {
				return 0, 0, err
			}
		}
		size, entries = size+n, entries+1
	}
	return size, entries, nil
}

// Replay replays what of a list follows after the checkpoint, up to the entry
// with which PCR pcr of a bank holds want; what lies beyond was measured after the
// PCR was read, and is left for the next time. visit, where it is not nil, is given
// each of these entries, with its number in the whole list, and may not keep it.
// An entry of another PCR is given too: want does not vouch for it, nor for the
// data of a violation. Errors: ErrReplay; ErrFormat. With an error the checkpoint
// stays as it was.
func (c Checkpoint) Replay(list []byte, bankName string, pcr uint32, want []byte, visit func(n uint64, e *Entry)) (Checkpoint, error) {
	b, ok := banks[bankName]
	if !ok || len(want) != b.size {
		return c, fmt.Errorf("%w: value of %d bytes for bank %.20q", ErrReplay, len(want), bankName)
	}
	start := c
	if start.Value == nil {
		start = Checkpoint{Bank: bankName, Value: make([]byte, b.size)}
	}
	if start.Bank != bankName || len(start.Value) != b.size || start.Mode > Padded || start.Entries > MaxEntries {
		return c, fmt.Errorf("%w: it was replayed to bank %.20q before", ErrReplay, start.Bank)
	}
	modes := []Mode{start.Mode}
	if start.Mode == Unknown {
		if modes = []Mode{Native, Padded}; bankName == "sha1" {
			modes = []Mode{Padded} // which checks the digests that were logged, and has nothing to pad
		}
	}
	var first error
	for _, m := range modes {
		ch := newChain(b, m, start.Value)
		size, entries, err := ch.find(list, want, pcr, MaxEntries-start.Entries)
		if err != nil {
			if first == nil {
				first = err
			}
			continue
		}
		next := Checkpoint{
			Offset: start.Offset + uint64(size), Entries: start.Entries + entries,
			Bank: bankName, Mode: start.Mode, Value: bytes.Clone(ch.value()),
		}
		if entries > 0 {
			next.Mode = m
		}
		if visit != nil {
			var e Entry
			for at, n := 0, start.Entries; at < size; n++ {
				used, err := e.Next(list[at:size])
				if err != nil || used == 0 {
					return c, fmt.Errorf("%w: entry %d", ErrFormat, n)
				}
				visit(n, &e)
				at += used
			}
		}
		return next, nil
	}
	return c, first
}

// Advance replays all whole entries of a part of a list in the middle, of which
// the PCR says nothing yet: a later Replay that succeeds vouches for them as well,
// and one that fails for nothing. Errors: ErrReplay, ErrFormat.
func (c Checkpoint) Advance(list []byte, bankName string, pcr uint32, visit func(n uint64, e *Entry)) (Checkpoint, error) {
	b, ok := banks[bankName]
	next := c
	if next.Value == nil {
		next = Checkpoint{Bank: bankName, Value: make([]byte, b.size)}
	}
	if next.Mode == Unknown {
		if next.Mode = Native; bankName == "sha1" {
			next.Mode = Padded
		}
	}
	if !ok || next.Bank != bankName || len(next.Value) != b.size || next.Mode > Padded {
		return c, fmt.Errorf("%w: bank %.20q", ErrReplay, bankName)
	}
	ch := newChain(b, next.Mode, next.Value)
	var e Entry
	for at := 0; ; {
		n, err := e.Next(list[at:])
		if err != nil || next.Entries >= MaxEntries {
			return c, fmt.Errorf("%w: entry %d", ErrFormat, next.Entries)
		}
		if n == 0 {
			next.Value = bytes.Clone(ch.value())
			return next, nil
		}
		if e.PCR == pcr {
			if err := ch.extend(&e); err != nil {
				return c, err
			}
		}
		visit(next.Entries, &e)
		at, next.Offset, next.Entries = at+n, next.Offset+uint64(n), next.Entries+1
	}
}
