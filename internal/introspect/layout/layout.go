// Package layout knows how libtpms keeps its PCRs in memory, and learns where.
// It is pure.
//
// libtpms has (Global.h, the same from 0.7 to 0.10)
//
//	typedef struct { BYTE sha1Pcr[20]; BYTE sha256Pcr[32]; … } PCR;
//	EXTERN PCR s_pcrs[IMPLEMENTATION_PCR];
//
// with a member for each hash that it was built with, and the banks that are
// active now in gp.pcrAllocated, a TPML_PCR_SELECTION (TPM 2.0 Part 2, 10.9.7):
//
//	struct { UINT32 count; struct { UINT16 hash; BYTE sizeofSelect; BYTE pcrSelect[3]; } pcrSelections[]; }
//
// There are copies of both elsewhere: what is saved, what becomes active at the
// next reset, what was last sent. None of it is taken for granted here. Where
// the PCRs are is learned from memory in which their values are known, and
// random; all that is assumed is that the PCRs of a bank lie in an array, and
// those of all banks in the same. In the same way the flags are learned that are
// 1 from TPM2_Startup to the next reset (g_initialized is one), before which
// what lies in the PCRs is of the VM's last boot.
package layout

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"virt-trust/internal/evidence/report"
)

// PCRs is how many there are (PC Client Platform TPM Profile, 4.6.1).
const PCRs = 24

var (
	// ErrShape: memory does not look as libtpms' does.
	ErrShape = errors.New("not as libtpms")
	// ErrNotStarted: there was no TPM2_Startup since the last reset.
	ErrNotStarted = errors.New("not started")
)

// Selection is an allocation of PCRs (TPML_PCR_SELECTION), in its order.
type Selection []BankSelection

// BankSelection is that of a bank; bit i of Select is PCR i.
type BankSelection struct {
	Hash   uint16 // TPM_ALG_ID
	Select uint32
}

// Layout is where things are, relative to the library's base.
type Layout struct {
	Stride     uint64   `json:"stride"` // from one PCR to the next
	Allocation uint64   `json:"allocation"`
	Hashes     []uint16 `json:"hashes"` // TPM_ALG_ID, all that the allocation names
	Banks      []Bank   `json:"banks"`
	Started    []uint64 `json:"started"` // flags
}

// Bank is where a bank's PCR 0 is.
type Bank struct {
	Hash  uint16 `json:"hash"`
	First uint64 `json:"first"`
}

// hash is what is known of a hash algorithm.
type hash struct {
	name string // in report.Bank
	size uint64
}

// known are the banks that evidence has a name for (TPM 2.0 Part 2, 6.3).
var known = map[uint16]hash{4: {"sha1", 20}, 0xb: {"sha256", 32}, 0xc: {"sha384", 48}, 0xd: {"sha512", 64}}

// Known reports whether evidence has a name for a bank.
func Known(alg uint16) bool { return known[alg].size != 0 }

// Size is that of a known hash's digest in bytes.
func Size(alg uint16) int { return int(known[alg].size) }

// Bounds of what is believed.
const (
	maxHashes = 16
	maxStride = 1024
	maxOffset = maxLibrary
	maxFlags  = 8
	flagLen   = 4 // a BOOL of libtpms is an int
)

// Check reports a layout that cannot be.
func (l *Layout) Check() error {
	ok := l.Stride > 0 && l.Stride <= maxStride && l.Allocation < maxOffset && len(l.Hashes) > 0 && len(l.Hashes) <= maxHashes &&
		len(l.Banks) > 0 && len(l.Banks) <= len(known) && len(l.Started) > 0 && len(l.Started) <= maxFlags &&
		slices.Max(l.Started) < maxOffset
	if ok {
		seen := map[uint16]bool{}
		first := slices.MinFunc(l.Banks, byFirst).First
		for _, b := range l.Banks {
			ok = ok && known[b.Hash].size != 0 && !seen[b.Hash] && slices.Contains(l.Hashes, b.Hash) &&
				b.First < maxOffset && b.First-first+known[b.Hash].size <= l.Stride
			seen[b.Hash] = true
		}
		sorted := slices.SortedFunc(slices.Values(l.Banks), byFirst)
		for i := range len(sorted) - 1 {
			ok = ok && sorted[i].First+known[sorted[i].Hash].size <= sorted[i+1].First
		}
	}
	if !ok {
		return fmt.Errorf("%w: %+v", ErrShape, *l)
	}
	return nil
}

func byFirst(a, b Bank) int {
	switch {
	case a.First < b.First:
		return -1
	case a.First > b.First:
		return 1
	}
	return 0
}

// Spans are what has to be read, relative to the library's base.
func (l *Layout) Spans() []Span {
	first := l.first()
	all := []Span{{first, first + PCRs*l.Stride}, {l.Allocation, l.Allocation + allocationLen(len(l.Hashes))}}
	for _, f := range l.Started {
		all = append(all, Span{f, f + flagLen})
	}
	return all
}

func (l *Layout) first() uint64 { return slices.MinFunc(l.Banks, byFirst).First }

func allocationLen(n int) uint64 { return 4 + 6*uint64(n) }

// Read takes the PCRs of the active banks out of what is in Spans. A bank that
// evidence has no name for is left out.
func (l *Layout) Read(parts [][]byte) ([]report.Bank, error) {
	if !slices.EqualFunc(parts, l.Spans(), func(p []byte, s Span) bool { return uint64(len(p)) == s.Len() }) {
		return nil, fmt.Errorf("%w: %d parts", ErrShape, len(parts))
	}
	pcrs, allocation, flags := parts[0], parts[1], parts[2:]
	// Those that only happen to be set by every start may be clear for another
	// reason; all are clear before it.
	started := false
	for _, f := range flags {
		v := binary.NativeEndian.Uint32(f)
		if v > 1 {
			return nil, fmt.Errorf("%w: a flag of %#x", ErrShape, v)
		}
		started = started || v == 1
	}
	if !started {
		return nil, ErrNotStarted
	}
	sel, err := parseSelection(allocation, l.Hashes)
	if err != nil {
		return nil, err
	}
	var banks []report.Bank
	for _, s := range sel {
		i := slices.IndexFunc(l.Banks, func(b Bank) bool { return b.Hash == s.Hash })
		if i < 0 || s.Select == 0 {
			continue
		}
		h := known[s.Hash]
		var values report.Values
		for pcr := range uint64(PCRs) {
			if s.Select>>pcr&1 != 0 {
				at := l.Banks[i].First - l.first() + pcr*l.Stride
				values[pcr] = bytes.Clone(pcrs[at : at+h.size])
			}
		}
		banks = append(banks, report.Bank{Algorithm: h.name, Values: values})
	}
	if len(banks) == 0 {
		return nil, fmt.Errorf("%w: no bank of PCRs is active", ErrShape)
	}
	return banks, nil
}

// parseSelection reads a TPML_PCR_SELECTION as it lies in memory. It names all
// hashes of the build, in their order.
func parseSelection(b []byte, hashes []uint16) (Selection, error) {
	count := binary.NativeEndian.Uint32(b)
	if int64(count) != int64(len(hashes)) {
		return nil, fmt.Errorf("%w: %d banks", ErrShape, count)
	}
	sel := make(Selection, len(hashes))
	for i, h := range hashes {
		e := b[4+6*i:]
		if binary.NativeEndian.Uint16(e) != h || e[2] != 3 {
			return nil, fmt.Errorf("%w: bank %#x of %d bytes", ErrShape, binary.NativeEndian.Uint16(e), e[2])
		}
		sel[i] = BankSelection{Hash: h, Select: uint32(e[3]) | uint32(e[4])<<8 | uint32(e[5])<<16}
	}
	return sel, nil
}

func (s Selection) inMemory() []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(len(s)))
	for _, e := range s {
		b = binary.NativeEndian.AppendUint16(b, e.Hash)
		b = append(b, 3, byte(e.Select), byte(e.Select>>8), byte(e.Select>>16))
	}
	return b
}

// Sample is memory of which is known what the PCRs are, or that there was no
// TPM2_Startup since the reset.
type Sample struct {
	Offset  uint64 // of Memory, from the library's base
	Memory  []byte
	Started bool // without it, nothing below is known
	Active  Selection
	// Values are those of all PCRs of each active bank that is known. Those of
	// PCR 0 and 1 must be random.
	Values map[uint16][PCRs][]byte
}

// array is an array of PCRs.
type array struct{ first, stride uint64 }

// Learn finds what fits all samples. A place that fits must be the only one.
func Learn(samples []Sample) (*Layout, error) {
	l := &Layout{}
	arrays := map[uint16]map[array]int{}
	times := map[uint16]int{}
	places := map[uint64]int{}
	started := 0
	for _, s := range samples {
		if !s.Started {
			continue
		}
		started++
		var hashes []uint16
		for _, e := range s.Active {
			hashes = append(hashes, e.Hash)
		}
		if started == 1 {
			l.Hashes = hashes
		}
		if !slices.Equal(l.Hashes, hashes) {
			return nil, fmt.Errorf("%w: banks %#x and %#x", ErrShape, l.Hashes, hashes)
		}
		for at := range all(s.Memory, s.Active.inMemory()) {
			places[s.Offset+at]++
		}
		for h, v := range s.Values {
			times[h]++
			if arrays[h] == nil {
				arrays[h] = map[array]int{}
			}
			for a := range find(s.Memory, v) {
				arrays[h][array{s.Offset + a.first, a.stride}]++
			}
		}
	}
	if started < 2 {
		return nil, fmt.Errorf("%w: %d samples", ErrShape, started)
	}
	var err error
	if l.Allocation, err = only(places, started); err != nil {
		return nil, fmt.Errorf("the active banks: %w", err)
	}
	for _, h := range l.Hashes {
		if known[h].size == 0 {
			continue
		}
		if times[h] < 2 {
			return nil, fmt.Errorf("%w: bank %#x was sampled %d times", ErrShape, h, times[h])
		}
		a, err := only(arrays[h], times[h])
		if err != nil {
			return nil, fmt.Errorf("the PCRs of bank %#x: %w", h, err)
		}
		if l.Stride != 0 && l.Stride != a.stride {
			return nil, fmt.Errorf("%w: PCRs %d and %d bytes apart", ErrShape, l.Stride, a.stride)
		}
		l.Stride = a.stride
		l.Banks = append(l.Banks, Bank{Hash: h, First: a.first})
	}
	if l.Started, err = flags(samples); err != nil {
		return nil, err
	}
	return l, l.Check()
}

// flags finds those that are 1 in samples of a started TPM, and 0 in others.
func flags(samples []Sample) ([]uint64, error) {
	var fit []uint64
	var begun, clear bool
	for _, s := range samples {
		want := uint32(0)
		if s.Started {
			want = 1
		}
		clear = clear || !s.Started
		is := func(at uint64) bool {
			at -= s.Offset
			return at <= uint64(len(s.Memory)) && uint64(len(s.Memory))-at >= flagLen && binary.NativeEndian.Uint32(s.Memory[at:]) == want
		}
		if begun {
			fit = slices.DeleteFunc(fit, func(at uint64) bool { return !is(at) })
			continue
		}
		begun = true
		for at := (s.Offset + flagLen - 1) &^ (flagLen - 1); at-s.Offset+flagLen <= uint64(len(s.Memory)); at += flagLen {
			if is(at) {
				fit = append(fit, at)
			}
		}
	}
	if !clear || len(fit) == 0 || len(fit) > maxFlags {
		return nil, fmt.Errorf("%w: %d places fit a flag of its start", ErrShape, len(fit))
	}
	return fit, nil
}

// only gives the one key that was seen n times.
func only[K comparable](seen map[K]int, n int) (k K, err error) {
	maps.DeleteFunc(seen, func(_ K, times int) bool { return times != n })
	if len(seen) != 1 {
		return k, fmt.Errorf("%w: %d places fit", ErrShape, len(seen))
	}
	for k = range seen {
	}
	return k, nil
}

// find gives the arrays in which the values lie.
func find(memory []byte, values [PCRs][]byte) map[array]bool {
	found := map[array]bool{}
	if len(values[0]) == 0 || len(values[1]) == 0 {
		return found
	}
	for zero := range all(memory, values[0]) {
		end := min(uint64(len(memory)), zero+maxStride+uint64(len(values[1])))
		for d := range all(memory[zero+1:end], values[1]) {
			if a := (array{zero, d + 1}); a.holds(memory, values) {
				found[a] = true
			}
		}
	}
	return found
}

func (a array) holds(memory []byte, values [PCRs][]byte) bool {
	for i, v := range values {
		at := a.first + uint64(i)*a.stride
		if at+uint64(len(v)) > uint64(len(memory)) || !bytes.Equal(memory[at:at+uint64(len(v))], v) {
			return false
		}
	}
	return true
}

// all gives where want is in b, overlaps included.
func all(b, want []byte) func(yield func(uint64) bool) {
	return func(yield func(uint64) bool) {
		for at := 0; ; at++ {
			i := bytes.Index(b[at:], want)
			if i < 0 || !yield(uint64(at+i)) {
				return
			}
			at += i
		}
	}
}
