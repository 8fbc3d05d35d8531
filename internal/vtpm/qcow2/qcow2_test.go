package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	s := sketch{version: 3, bits: 16, name: "base.qcow2", extensions: []Extension{
		{Type: 0xe2792aca, Data: []byte("qcow2")}, {Type: LabelType, Data: []byte("label")}, {Type: 0x12345678, Data: nil},
	}}
	h := mustParse(t, s.bytes())
	if h.Version != 3 || h.ClusterSize != 65536 || h.Length != 112 || h.BackingName != "base.qcow2" || len(h.Extensions) != 3 {
		t.Errorf("%+v", h)
	}
	if e := h.Extensions[0]; e.Type != 0xe2792aca || string(e.Data) != "qcow2" || e.Offset != 112 {
		t.Errorf("%+v", e)
	}
	if l, err := h.Label(); err != nil || string(l) != "label" {
		t.Errorf("%q, %v", l, err)
	}
}

func TestLabelDamaged(t *testing.T) {
	long := make([]byte, MaxPayload+1)
	for name, extensions := range map[string][]Extension{
		"two":      {{Type: LabelType, Data: []byte("a")}, {Type: LabelType, Data: []byte("b")}},
		"empty":    {{Type: LabelType}},
		"too long": {{Type: LabelType, Data: long}},
	} {
		h := mustParse(t, sketch{version: 3, bits: 16, extensions: extensions}.bytes())
		if _, err := h.Label(); !errors.Is(err, ErrLabelDamaged) {
			t.Errorf("%s: %v", name, err)
		}
		plan, err := h.SetLabel([]byte("good"))
		if err != nil {
			t.Fatal(err)
		}
		clean(t, name, h, plan.Apply(h.first), []byte("good"))
		if plan, err = h.RemoveLabel(); err != nil {
			t.Fatal(err)
		}
		clean(t, name, h, plan.Apply(h.first), nil)
	}
}

// What is refused, by Parse or by SetLabel, and a part of the reason.
func TestRefused(t *testing.T) {
	be := binary.BigEndian
	put32 := func(at int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { be.PutUint32(b[at:], v); return b }
	}
	put64 := func(at int, v uint64) func([]byte) []byte {
		return func(b []byte) []byte { be.PutUint64(b[at:], v); return b }
	}
	for _, c := range []struct {
		name, reason string
		edit         func([]byte) []byte
	}{
		{"empty", "not a qcow2", func([]byte) []byte { return nil }},
		{"raw", "not a qcow2", put32(0, 0)},
		{"qcow", "unknown version 1", put32(4, 1)},
		{"version 4", "unknown version 4", put32(4, 4)},
		{"version -1", "unknown version 4294967295", put32(4, 1<<32-1)},
		{"cluster_bits 8", "clusters are of 2^8", put32(clusterBitsAt, 8)},
		{"cluster_bits 22", "clusters are of 2^22", put32(clusterBitsAt, 22)},
		{"cluster_bits 64", "clusters are of 2^64", put32(clusterBitsAt, 64)},
		{"short", "cut short", func(b []byte) []byte { return b[:4096] }},
		{"header_length 100", "its own length", put32(lengthAt, 100)},
		{"header_length 105", "its own length", put32(lengthAt, 105)},
		{"header_length huge", "its own length", put32(lengthAt, 1<<31)},
		{"name before extensions", "backing file name", put64(backingOffsetAt, 50)},
		{"name beyond cluster", "backing file name", put64(backingOffsetAt, 65536)},
		{"name beyond window", "first 32768 bytes", put64(backingOffsetAt, 40000)},
		{"name offset huge", "backing file name", put64(backingOffsetAt, 1<<64-1)},
		{"name too long", "backing file name", put32(backingSizeAt, 1024)},
		{"extension too long", "does not fit", put32(116, 65536)},
		{"extension huge", "does not fit", put32(116, 1<<32-1)},
		{"incompatible", "incompatible bits 0x20", put64(incompatibleAt, 1<<5)},
		{"corrupt", "corrupt", put64(incompatibleAt, Corrupt)},
		{"autoclear", "autoclear bits 0x4", put64(autoclearAt, 1<<2)},
		{"encryption", "encrypted", put32(cryptMethodAt, 3)},
		{"L1 table in the header", "a table", put64(l1OffsetAt, 0)},
		{"refcounts in the header", "a table", put64(refcountsAt, 512)},
		{"snapshots in the header", "a table", put32(snapshotsAt, 1)},
	} {
		s := sketch{version: 3, bits: 16, name: "base", extensions: []Extension{{Type: 0xe2792aca, Data: []byte("qcow2")}}}
		h, err := Parse(c.edit(s.bytes()))
		if err == nil {
			_, err = h.SetLabel([]byte("label"))
		}
		var u *UnsupportedError
		if !errors.As(err, &u) || !strings.Contains(u.Reason, c.reason) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	// Extensions that only the name ends, too far behind for an end marker to
	// come with the switch to a new place of the name.
	s := sketch{version: 3, bits: 16, name: "base", noEnd: true, extensions: []Extension{{Type: featureTableType, Data: make([]byte, 392)}}}
	var u *UnsupportedError
	if _, err := mustParse(t, s.bytes()).SetLabel([]byte("label")); !errors.As(err, &u) || !strings.Contains(u.Reason, "no end marker") {
		t.Errorf("no end marker: %v", err)
	}
	for _, bits := range []uint64{Dirty, ExternalData, Compression, ExtendedL2} {
		h := mustParse(t, put64(incompatibleAt, bits)(sketch{version: 3, bits: 16}.bytes()))
		if _, err := h.SetLabel([]byte("label")); err != nil {
			t.Errorf("incompatible bits %#x: %v", bits, err)
		}
	}
}

func TestLabelSizes(t *testing.T) {
	h := mustParse(t, sketch{version: 3, bits: 16}.bytes())
	for n, ok := range map[int]bool{0: false, 1: true, MaxPayload: true, MaxPayload + 1: false} {
		if _, err := h.SetLabel(make([]byte, n)); (err == nil) != ok {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

// Room is the largest label that an image of each cluster size takes, with the
// extensions that qemu-img makes. README and man pages give these numbers.
func TestRoom(t *testing.T) {
	room := func(s sketch) (n int) {
		h := mustParse(t, s.bytes())
		for n < MaxPayload {
			if _, err := h.SetLabel(make([]byte, n+1)); err != nil {
				break
			}
			n++
		}
		return n
	}
	features := Extension{Type: featureTableType, Data: make([]byte, 384)}
	format := Extension{Type: 0xe2792aca, Data: []byte("qcow2")}
	for _, c := range []struct{ bits, alone, backed int }{
		{9, 184, 0},
		{10, 440, 0},
		{11, 952, 0},
		{12, 1976, 1456},
		{13, 3728, 3208},
		{14, 4096, 4096},
		{15, 4096, 4096},
		{16, 4096, 4096},
		{21, 4096, 4096},
	} {
		alone := sketch{version: 3, bits: c.bits}
		backed := sketch{version: 3, bits: c.bits, name: strings.Repeat("b", 1023), extensions: []Extension{format}}
		if c.bits > 12 {
			alone.extensions = []Extension{features}
			backed.extensions = append(backed.extensions, features)
		}
		if n := room(alone); n != c.alone {
			t.Errorf("clusters of %d bytes: %d bytes", 1<<c.bits, n)
		}
		if c.bits < 11 {
			continue // the name alone does not fit
		}
		if n := room(backed); n != c.backed {
			t.Errorf("clusters of %d bytes with the longest backing name: %d bytes", 1<<c.bits, n)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte{}, []byte("label"))
	for _, s := range append(sketches(nil), sketches(filled(40, 1))...) {
		if s.bits <= 11 {
			f.Add(s.bytes(), filled(s.bits*3, 5))
		} else {
			f.Add(bytes.TrimRight(s.bytes(), "\x00"), filled(s.bits*40, 5))
		}
	}
	f.Add(sketch{version: 3, bits: 10, extensions: []Extension{{Type: LabelType, Data: filled(200, 1)}, {Type: skipType, Data: filled(200, 2)}}}.bytes(), filled(200, 5))
	f.Add(sketch{version: 3, bits: 11, extensions: []Extension{{Type: skipType, Data: filled(200, 1)}, {Type: LabelType, Data: filled(200, 2)}, {Type: 7}}}.bytes(), filled(200, 5))
	f.Fuzz(func(t *testing.T, first, payload []byte) {
		if len(first) < Window { // so that headers of any cluster size are met
			first = append(bytes.Clone(first), make([]byte, Window-len(first))...)
		}
		before, err := Parse(first)
		if err != nil {
			return
		}
		old, err := before.Label()
		unknown := err != nil && !errors.Is(err, ErrNoLabel)
		if plan, err := before.RemoveLabel(); err == nil {
			clean(t, "removed", before, plan.Apply(before.first), nil)
		}
		plan, err := before.SetLabel(payload)
		if err != nil {
			return
		}
		clean(t, "set", before, plan.Apply(before.first), payload)
		if unknown {
			return
		}
		n := 0
		tears(before.first, plan, rand.New(rand.NewPCG(1, 2)), func(group int, torn []byte) {
			if n++; n > 50 {
				return
			}
			h, err := others(before, torn)
			if err == nil {
				err = oneOf(h, old, payload)
			}
			if err != nil {
				t.Fatalf("torn in group %d: %v", group, err)
			}
		})
	})
}
