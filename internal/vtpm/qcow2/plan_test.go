package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// sketch is an image's start to be made.
type sketch struct {
	version, bits int
	length        int // of the header; 0: 72 or 112
	extensions    []Extension
	noEnd         bool // the name follows at once, without an end marker
	name          string
	gap           int // bytes between the end marker and the name
	garbage       bool
}

func (s sketch) bytes() []byte {
	be := binary.BigEndian
	cluster := 1 << s.bits
	b := make([]byte, min(cluster, Window))
	copy(b, "QFI\xfb")
	be.PutUint32(b[4:], uint32(s.version))
	be.PutUint32(b[clusterBitsAt:], uint32(s.bits))
	be.PutUint64(b[24:], 1<<30)
	be.PutUint32(b[l1SizeAt:], 1)
	be.PutUint64(b[l1OffsetAt:], uint64(3*cluster))
	be.PutUint64(b[refcountsAt:], uint64(cluster))
	be.PutUint32(b[56:], 1)
	at := v2Length
	if s.version == 3 {
		at = 112
		if s.length != 0 {
			at = s.length
		}
		be.PutUint32(b[96:], 4)
		be.PutUint32(b[lengthAt:], uint32(at))
	}
	for _, e := range s.extensions {
		copy(b[at:], word(e.Type, len(e.Data)))
		copy(b[at+wordSize:], e.Data)
		at += e.size()
	}
	if !s.noEnd {
		at += wordSize
	}
	at += s.gap
	if s.name != "" {
		be.PutUint64(b[backingOffsetAt:], uint64(at))
		be.PutUint32(b[backingSizeAt:], uint32(len(s.name)))
		copy(b[at:], s.name)
		at += len(s.name)
	}
	if s.garbage {
		for i := at; i < len(b); i++ {
			b[i] = 0xee
		}
	}
	return b
}

// filled gives n bytes that differ from their neighbours, so that nothing that
// is lost or moved goes unseen.
func filled(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7) ^ byte(i>>8) ^ seed | 1
	}
	return b
}

func mustParse(t *testing.T, first []byte) *Header {
	t.Helper()
	h, err := Parse(first)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// others says whether an image has all that before had, labels apart.
func others(before *Header, first []byte) (*Header, error) {
	h, err := Parse(first)
	if err != nil {
		return nil, err
	}
	theirs := func(h *Header) []Extension { return slices.DeleteFunc(slices.Clone(h.Extensions), ours) }
	same := slices.EqualFunc(theirs(before), theirs(h), func(a, b Extension) bool { return a.Type == b.Type && bytes.Equal(a.Data, b.Data) })
	switch {
	case !same:
		return nil, errors.New("another extension is lost or changed")
	case h.BackingName != before.BackingName:
		return nil, errors.New("the backing file name is lost or changed")
	case (h.backingOffset == 0) != (before.backingOffset == 0):
		return nil, errors.New("the backing file is lost")
	case !bytes.Equal(h.first[:backingOffsetAt], before.first[:backingOffsetAt]),
		!bytes.Equal(h.first[backingSizeAt:h.Length], before.first[backingSizeAt:before.Length]):
		return nil, errors.New("the header is changed")
	}
	return h, nil
}

// oneOf says whether an image's label is among those given; nil is none.
func oneOf(h *Header, labels ...[]byte) error {
	got, err := h.Label()
	if err != nil && !errors.Is(err, ErrNoLabel) {
		return err
	}
	for _, l := range labels {
		if bytes.Equal(got, l) && (got == nil) == (l == nil) {
			return nil
		}
	}
	return fmt.Errorf("a label that is neither the old one nor the new one: %d bytes", len(got))
}

// tears gives every image that a power cut can leave: the groups before one are
// there, and of its sectors any. Above six sectors not all of the subsets are
// tried, but all beginnings, all ends, each sector alone, each missing, and some.
func tears(first []byte, p Plan, r *rand.Rand, yield func(group int, torn []byte)) {
	state := bytes.Clone(first)
	for g, group := range p {
		next := Plan{group}.Apply(state)
		var changed []int // sectors
		for at := 0; at < len(state); at += sectorSize {
			if !bytes.Equal(state[at:at+sectorSize], next[at:at+sectorSize]) {
				changed = append(changed, at)
			}
		}
		try := func(written func(i int) bool) {
			torn := bytes.Clone(state)
			for i, at := range changed {
				if written(i) {
					copy(torn[at:at+sectorSize], next[at:])
				}
			}
			yield(g, torn)
		}
		if n := len(changed); n <= 6 {
			for subset := range 1 << n {
				try(func(i int) bool { return subset>>i&1 == 1 })
			}
		} else {
			for k := range n + 1 {
				try(func(i int) bool { return i < k })
				try(func(i int) bool { return i >= k })
				try(func(i int) bool { return i == k })
				try(func(i int) bool { return i != k })
			}
			for range 20 {
				try(func(int) bool { return r.IntN(2) == 0 })
			}
		}
		state = next
	}
}

// sketches gives images with and without a label (old) in them.
func sketches(old []byte) []sketch {
	var out []sketch
	other := func(kind uint32, n int) Extension { return Extension{Type: kind, Data: filled(n, byte(kind))} }
	for _, bits := range []int{9, 10, 11, 12, 13, 21} {
		for _, version := range []int{2, 3} {
			for _, name := range []string{"", "b", string(filled(300, 3)), string(filled(1023, 4))} {
				for shape := range 6 {
					s := sketch{version: version, bits: bits, name: name}
					var before, after []Extension
					switch shape {
					case 1:
						before = []Extension{other(0xe2792aca, 5), other(featureTableType, 384)}
					case 2:
						before, after = []Extension{other(0xe2792aca, 5)}, []Extension{other(0x11111111, 100), other(0x22222222, 0)}
					case 3:
						s.length, s.garbage = 104, true
					case 4:
						s.gap = 13 // the name is not aligned
					case 5:
						if name == "" || old != nil {
							continue
						}
						s.noEnd = true
					}
					s.extensions = before
					if old != nil {
						s.extensions = append(s.extensions, Extension{Type: LabelType, Data: old})
					}
					s.extensions = append(s.extensions, after...)
					used := 128 + s.gap + len(name)
					for _, e := range s.extensions {
						used += e.size()
					}
					if used <= 1<<bits {
						out = append(out, s)
					}
				}
			}
		}
	}
	return out
}

func TestPowerCuts(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	sizes := []int{0, 1, 40, 440, 441, 1500, MaxPayload}
	planned, refused, states := 0, 0, 0
	for _, oldSize := range sizes {
		old := filled(oldSize, 0x50)
		if oldSize == 0 {
			old = nil
		}
		for _, s := range sketches(old) {
			first := s.bytes()
			before := mustParse(t, first)
			if err := oneOf(before, old); err != nil {
				t.Fatal(err)
			}
			for _, newSize := range sizes {
				if len(first) > 2048 && r.IntN(12) != 0 || len(first) > 1024 && r.IntN(4) != 0 {
					continue
				}
				label := filled(newSize, 0xa0)
				plan, err := before.SetLabel(label)
				if newSize == 0 {
					label = nil
					if plan, err = before.RemoveLabel(); errors.Is(err, ErrNoLabel) && old == nil {
						continue
					}
				}
				if err != nil {
					var u *UnsupportedError
					if !errors.As(err, &u) {
						t.Fatal(err)
					}
					refused++
					continue
				}
				planned++
				what := func(group int) string {
					return fmt.Sprintf("version %d, clusters 2^%d, %d extensions, name %d, gap %d, no end %v, label %d -> %d, power cut in group %d of %d",
						s.version, s.bits, len(s.extensions), len(s.name), s.gap, s.noEnd, oldSize, newSize, group, len(plan))
				}
				tears(first, plan, r, func(group int, torn []byte) {
					states++
					h, err := others(before, torn)
					if err == nil {
						err = oneOf(h, old, label)
					}
					if err != nil {
						t.Fatalf("%s: %v", what(group), err)
					}
					if states%29 == 0 {
						settles(t, what(group), before, h, label, r)
					}
				})
				end := plan.Apply(first)
				clean(t, what(len(plan)), before, end, label)
			}
		}
	}
	if planned < 400 || refused == 0 {
		t.Errorf("%d plans, %d refusals: the cases miss their point", planned, refused)
	}
	t.Logf("%d plans, %d refusals, %d torn images", planned, refused, states)
}

// settles shows that a torn image takes the label as the whole one would have,
// and that a second power cut meanwhile does no harm either.
func settles(t *testing.T, what string, before, torn *Header, label []byte, r *rand.Rand) {
	t.Helper()
	had, err := torn.Label()
	if err != nil {
		had = nil
	}
	plan, err := torn.SetLabel(label)
	if label == nil {
		if plan, err = torn.RemoveLabel(); errors.Is(err, ErrNoLabel) {
			return
		}
	}
	if err != nil {
		t.Fatalf("%s: then: %v", what, err)
	}
	tears(torn.first, plan, r, func(group int, again []byte) {
		if group > 3 || r.IntN(4) != 0 {
			return
		}
		h, err := others(before, again)
		if err == nil {
			err = oneOf(h, had, label)
		}
		if err != nil {
			t.Fatalf("%s: and again in group %d: %v", what, group, err)
		}
	})
	clean(t, what, before, plan.Apply(torn.first), label)
}

// clean demands that the image has the label, nothing else of ours, and zeros
// where nothing may be stored.
func clean(t *testing.T, what string, before *Header, first, label []byte) {
	t.Helper()
	h, err := others(before, first)
	if err == nil {
		err = oneOf(h, label)
	}
	if err != nil {
		t.Fatalf("%s: in the end: %v", what, err)
	}
	if n := len(slices.DeleteFunc(slices.Clone(h.Extensions), func(e Extension) bool { return !ours(e) })); n > 1 {
		t.Fatalf("%s: in the end %d extensions are ours", what, n)
	}
	if !h.hasEnd {
		t.Fatalf("%s: no end marker", what)
	}
	rest := bytes.Clone(first[h.end:])
	if h.backingOffset != 0 {
		clear(rest[h.backingOffset-h.end:][:len(h.BackingName)])
	}
	if len(bytes.Trim(rest, "\x00")) > 0 {
		t.Fatalf("%s: something is left behind", what)
	}
}

// After a power cut QEMU may open the image first. It puts extensions that it
// does not know into the opposite order, so that what was to be skipped stands
// behind the label, in the way of the next one where room is tight.
func TestPowerCutThenQEMU(t *testing.T) {
	old, label := filled(440, 0x50), filled(440, 0xa0)
	first := sketch{version: 3, bits: 10, extensions: []Extension{{Type: LabelType, Data: old}}}.bytes()
	plan, err := mustParse(t, first).SetLabel(label)
	if err != nil {
		t.Fatal(err)
	}
	cut := mustParse(t, plan[:2].Apply(first))
	if len(cut.Extensions) != 2 || cut.Extensions[0].Type != skipType || cut.Extensions[1].Type != LabelType {
		t.Fatalf("not what the test rests on: %+v", cut.Extensions)
	}
	slices.Reverse(cut.Extensions)
	h := mustParse(t, sketch{version: 3, bits: 10, extensions: cut.Extensions}.bytes())
	if err := oneOf(h, label); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	settles(t, "replaced", h, h, old, r)
	settles(t, "the same", h, h, label, r)
	settles(t, "removed", h, h, nil, r)
}

// TestPowerCuts must see a plan that is not safe.
func TestPowerCutsAreSeen(t *testing.T) {
	old, label := filled(440, 0x50), filled(440, 0xa0)
	s := sketch{version: 3, bits: 16, name: string(filled(300, 3)), extensions: []Extension{{Type: LabelType, Data: old}}}
	first := s.bytes()
	before := mustParse(t, first)
	plan, err := before.SetLabel(label)
	if err != nil {
		t.Fatal(err)
	}
	for g := 1; g < len(plan)-1; g++ { // two groups without a barrier between them
		merged := slices.Clone(plan[:g-1])
		merged = append(merged, slices.Concat(plan[g-1], plan[g]))
		merged = append(merged, plan[g+1:]...)
		seen := false
		tears(first, merged, rand.New(rand.NewPCG(1, 2)), func(_ int, torn []byte) {
			h, err := others(before, torn)
			if err == nil {
				err = oneOf(h, old, label)
			}
			seen = seen || err != nil
		})
		if !seen {
			t.Errorf("groups %d and %d together: no harm seen", g-1, g)
		}
	}
}

func TestSwitchesAreOneSector(t *testing.T) {
	for _, s := range sketches(filled(440, 1)) {
		plan, err := mustParse(t, s.bytes()).SetLabel(filled(440, 2))
		if err != nil {
			continue
		}
		h := mustParse(t, s.bytes())
		for _, group := range plan {
			for _, w := range group {
				live := w.Offset < h.Length || len(w.Data) == wordSize
				if live && (len(group) != 1 || w.Offset/sectorSize != (w.Offset+len(w.Data)-1)/sectorSize) {
					t.Errorf("a write of %d bytes at %d is not atomic", len(w.Data), w.Offset)
				}
			}
		}
	}
}
