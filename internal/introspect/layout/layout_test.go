package layout

import (
	"bytes"
	"encoding/binary"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"virt-trust/internal/evidence/report"
)

const (
	every  = 1<<PCRs - 1
	offset = 0x1000 // of a sample's memory
	where  = 5000   // of the PCRs in it
	chosen = 12004  // of the allocation
	flag   = 12100  // of its start
)

// debian is the layout of libtpms 0.9.2 in Debian 12, moved.
func debian() *Layout {
	return &Layout{
		Stride: 164, Allocation: offset + chosen, Hashes: []uint16{4, 0xb, 0xc, 0xd},
		Banks:   []Bank{{4, offset + where}, {0xb, offset + where + 20}, {0xc, offset + where + 52}, {0xd, offset + where + 100}},
		Started: []uint64{offset + flag},
	}
}

// fake makes a sample in which the banks of the bits in active have random PCRs.
func fake(l *Layout, active uint, seed uint64) Sample {
	r := rand.NewChaCha8([32]byte{byte(seed), 1})
	s := Sample{Offset: offset, Started: true, Memory: make([]byte, 1<<15), Values: map[uint16][PCRs][]byte{}}
	r.Read(s.Memory[1<<14:])
	for i, h := range l.Hashes {
		b := BankSelection{Hash: h}
		if active>>i&1 != 0 {
			b.Select = every
		}
		s.Active = append(s.Active, b)
	}
	for i, b := range l.Banks {
		if active>>i&1 == 0 {
			continue
		}
		var v [PCRs][]byte
		for pcr := range v {
			at := b.First - offset + uint64(pcr)*l.Stride
			v[pcr] = s.Memory[at : at+uint64(Size(b.Hash))]
			r.Read(v[pcr])
			if pcr >= 17 && pcr <= 22 {
				copy(v[pcr], bytes.Repeat([]byte{0xff}, 64))
			}
			v[pcr] = bytes.Clone(v[pcr])
		}
		s.Values[b.Hash] = v
	}
	copy(s.Memory[l.Allocation-offset:], s.Active.inMemory())
	for _, f := range l.Started {
		binary.NativeEndian.PutUint32(s.Memory[f-offset:], 1)
	}
	return s
}

// samples are three of a TPM that was started, and one before.
func samples(l *Layout) []Sample {
	s := []Sample{fake(l, 0b1111, 1), fake(l, 0b0101, 2), fake(l, 0b1010, 3), fake(l, 0b1111, 4)}
	s[3].Started, s[3].Active, s[3].Values = false, nil, nil
	for _, f := range l.Started {
		clear(s[3].Memory[f-offset:][:4])
	}
	return s
}

// parts are what there is to read in a sample.
func parts(l *Layout, s Sample) (p [][]byte) {
	for _, span := range l.Spans() {
		p = append(p, s.Memory[span.Start-offset:span.End-offset])
	}
	return p
}

func TestLearn(t *testing.T) {
	other := &Layout{ // SHA-1 last, a hash without a name, and room between the PCRs
		Stride: 256, Allocation: offset + chosen, Hashes: []uint16{0xb, 0xc, 0xd, 4, 0x12},
		Banks:   []Bank{{0xb, offset + where}, {0xc, offset + where + 32}, {0xd, offset + where + 80}, {4, offset + where + 200}},
		Started: []uint64{offset + flag, offset + flag + 8},
	}
	for name, l := range map[string]*Layout{"Debian": debian(), "another": other} {
		s := samples(l)
		got, err := Learn(s)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for i, s := range s {
			banks, err := got.Read(parts(got, s))
			if !s.Started {
				if !errors.Is(err, ErrNotStarted) {
					t.Errorf("%s, before the start: %v, %v", name, banks, err)
				}
				continue
			}
			if err != nil || len(banks) != len(s.Values) {
				t.Fatalf("%s, sample %d: %d banks, %v", name, i, len(banks), err)
			}
			for h, v := range s.Values {
				i := slices.IndexFunc(banks, func(b report.Bank) bool { return b.Algorithm == known[h].name })
				for pcr, want := range v {
					if !bytes.Equal(banks[i].Values[uint(pcr)], want) {
						t.Errorf("%s: PCR %d of bank %#x is wrong", name, pcr, h)
					}
				}
			}
		}
	}
}

// What was saved elsewhere, or sent, is in memory too. Where a second place fits
// everything that is known, or none does, nothing is believed.
func TestLearnRefuses(t *testing.T) {
	copyOf := func(s *Sample, from, n, to int) { copy(s.Memory[to:], s.Memory[from:from+n]) }
	tests := map[string]func(s []Sample) []Sample{
		"two arrays": func(s []Sample) []Sample {
			for i := range s {
				copyOf(&s[i], where, 24*164, 20000)
			}
			return s
		},
		"two allocations": func(s []Sample) []Sample {
			for i := range s {
				copyOf(&s[i], chosen, 28, 24000)
			}
			return s
		},
		"no array":       func(s []Sample) []Sample { s[1].Memory[where+23*164] ^= 1; return s },
		"no allocation":  func(s []Sample) []Sample { s[2].Memory[chosen+7] ^= 1; return s },
		"moved":          func(s []Sample) []Sample { s[0].Offset++; return s },
		"one sample":     func(s []Sample) []Sample { return s[:1] },
		"a bank once":    func(s []Sample) []Sample { return s[:2] },
		"another build":  func(s []Sample) []Sample { s[1].Active = s[1].Active[:3]; return s },
		"no memory":      func(s []Sample) []Sample { s[0].Memory = nil; return s },
		"empty PCRs":     func(s []Sample) []Sample { s[0].Values[4] = [PCRs][]byte{}; return s },
		"a bank far off": func(s []Sample) []Sample { return samples(farOff()) },
	}
	for name, spoil := range tests {
		if l, err := Learn(spoil(samples(debian()))); !errors.Is(err, ErrShape) {
			t.Errorf("%s: %+v, %v", name, l, err)
		}
	}
	// A copy in one sample is what happens.
	s := samples(debian())
	copyOf(&s[0], where, 24*164, 20000)
	copyOf(&s[1], chosen, 28, 24000)
	if l, err := Learn(s); err != nil || l.Allocation != offset+chosen {
		t.Errorf("stale copies: %+v, %v", l, err)
	}
}

// farOff has a bank farther from the others than a PCR is long.
func farOff() *Layout {
	l := debian()
	l.Banks[3].First += 3 * 1024
	return l
}

func TestRead(t *testing.T) {
	l := debian()
	s := fake(l, 0b1111, 7)
	p := parts(l, s)
	with := func(active Selection) ([]report.Bank, error) { return l.Read([][]byte{p[0], active.inMemory(), p[2]}) }

	n := func(b report.Bank) int { return len(maps.Collect(b.Values.All())) }
	banks, err := with(Selection{{4, 0}, {0xb, every}, {0xc, 0}, {0xd, 0b110}})
	if err != nil || len(banks) != 2 || banks[0].Algorithm != "sha256" || n(banks[0]) != 24 || n(banks[1]) != 2 || banks[1].Values[1] == nil {
		t.Errorf("%v, %v", banks, err)
	}
	for name, c := range map[string]struct {
		active Selection
		want   error
	}{
		"no bank":      {Selection{{4, 0}, {0xb, 0}, {0xc, 0}, {0xd, 0}}, ErrShape},
		"other order":  {Selection{{0xb, every}, {4, 0}, {0xc, 0}, {0xd, 0}}, ErrShape},
		"another hash": {Selection{{4, 0}, {0xb, every}, {0xc, 0}, {0x12, 0}}, ErrShape},
	} {
		if banks, err := with(c.active); !errors.Is(err, c.want) || banks != nil {
			t.Errorf("%s: %v, %v", name, banks, err)
		}
	}
	one, two := []byte{0, 0, 0, 0}, []byte{0, 0, 0, 0}
	binary.NativeEndian.PutUint32(two, 2)
	for name, c := range map[string]struct {
		parts [][]byte
		want  error
	}{
		"before the start": {[][]byte{p[0], p[1], one}, ErrNotStarted},
		"no flag":          {[][]byte{p[0], p[1], two}, ErrShape},
		"no allocation":    {[][]byte{p[0], make([]byte, len(p[1])), p[2]}, ErrShape},
		"short":            {[][]byte{p[0][1:], p[1], p[2]}, ErrShape},
		"long":             {[][]byte{p[0], append(bytes.Clone(p[1]), 0), p[2]}, ErrShape},
		"fewer":            {p[:2], ErrShape},
		"more":             {append(slices.Clone(p), one), ErrShape},
		"empty":            {nil, ErrShape},
	} {
		if banks, err := l.Read(c.parts); !errors.Is(err, c.want) || banks != nil {
			t.Errorf("%s: %v, %v", name, banks, err)
		}
	}
	l.Started = append(l.Started, 0)
	if _, err := l.Read([][]byte{p[0], p[1], p[2], make([]byte, 4)}); err != nil {
		t.Errorf("a flag that is clear for another reason: %v", err)
	}
}

func TestCheck(t *testing.T) {
	if err := debian().Check(); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Layout){
		"stride":     func(l *Layout) { l.Stride = 0 },
		"far":        func(l *Layout) { l.Banks[0].First = 1 << 60 },
		"allocation": func(l *Layout) { l.Allocation = 1 << 60 },
		"no hashes":  func(l *Layout) { l.Hashes = nil },
		"no banks":   func(l *Layout) { l.Banks = nil },
		"twice":      func(l *Layout) { l.Banks[1] = l.Banks[0] },
		"overlap":    func(l *Layout) { l.Banks[1].First-- },
		"unknown":    func(l *Layout) { l.Banks[0].Hash = 0x12 },
		"not named":  func(l *Layout) { l.Hashes = l.Hashes[1:] },
		"too long":   func(l *Layout) { l.Stride-- },
		"no flags":   func(l *Layout) { l.Started = nil },
		"many flags": func(l *Layout) { l.Started = make([]uint64, maxFlags+1) },
		"far flag":   func(l *Layout) { l.Started[0] = 1 << 60 },
	} {
		l := debian()
		if spoil(l); l.Check() == nil {
			t.Errorf("%s: %+v passes", name, *l)
		}
	}
}

// FuzzRead holds that nothing in a process's memory makes more of it than
// digests of the right size.
func FuzzRead(f *testing.F) {
	l := debian()
	f.Add(Selection{{4, every}, {0xb, every}, {0xc, 0}, {0xd, 5}}.inMemory(), []byte{1, 0, 0, 0})
	f.Add(make([]byte, 28), []byte{0, 0, 0, 0})
	pcrs := make([]byte, PCRs*l.Stride)
	f.Fuzz(func(t *testing.T, allocation, flag []byte) {
		banks, err := l.Read([][]byte{pcrs, allocation, flag})
		if (err == nil) == (len(banks) == 0) {
			t.Fatal(banks, err)
		}
		for _, b := range banks {
			for i, v := range b.Values.All() {
				if !slices.ContainsFunc(l.Hashes, func(h uint16) bool { return known[h].name == b.Algorithm && Size(h) == len(v) }) {
					t.Fatal(b.Algorithm, i, v)
				}
			}
		}
	})
}
