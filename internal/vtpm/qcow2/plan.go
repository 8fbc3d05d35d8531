package qcow2

import (
	"bytes"
	"encoding/binary"
	"slices"
)

// Write puts Data at Offset of the image, inside its first cluster.
type Write struct {
	Offset int
	Data   []byte
}

// Plan is a change of an image's start, as groups of writes. Each group must be
// on the disk before the next one begins; inside a group order does not matter.
//
// When power fails at any point, whichever sectors of the group under way have
// reached the disk, the image has the old label or the new one (or none where
// there was, or will be, none) and all else that it had. For this a group either
// writes only what nothing points to yet, or is one write inside one 512-byte
// sector, which disks write as a whole.
type Plan [][]Write

// Apply gives first, the start of an image, as it is after the plan.
func (p Plan) Apply(first []byte) []byte {
	out := bytes.Clone(first)
	for _, group := range p {
		for _, w := range group {
			copy(out[w.Offset:], w.Data)
		}
	}
	return out
}

const sectorSize = 512

// SetLabel plans to give the image a label, in place of one that it may have.
// Errors: *UnsupportedError.
func (h *Header) SetLabel(payload []byte) (Plan, error) {
	if len(payload) == 0 || len(payload) > MaxPayload {
		return nil, unsupported("", "a label of %d bytes is not possible", len(payload))
	}
	if err := h.mayWrite(); err != nil {
		return nil, err
	}
	if !h.HasRoom(len(payload)) {
		return nil, h.noRoom(len(payload))
	}
	return h.rewrite(payload)
}

// RemoveLabel plans to take every label out of the image. Errors: ErrNoLabel,
// *UnsupportedError.
func (h *Header) RemoveLabel() (Plan, error) {
	if !slices.ContainsFunc(h.Extensions, ours) {
		return nil, ErrNoLabel
	}
	if err := h.mayWrite(); err != nil {
		return nil, err
	}
	return h.rewrite(nil)
}

func ours(e Extension) bool { return e.Type == LabelType || e.Type == skipType }

// mayWrite says why an image may not be written to, whatever is to be written.
func (h *Header) mayWrite() error {
	be := binary.BigEndian
	switch {
	case h.Incompatible&^knownIncompatible != 0:
		return unsupported("", "it uses qcow2 features that are not known here (incompatible bits %#x)", h.Incompatible&^knownIncompatible)
	case h.Autoclear&^knownAutoclear != 0:
		// They would have to be cleared, and with them the feature.
		return unsupported("", "it uses qcow2 features that are not known here (autoclear bits %#x)", h.Autoclear&^knownAutoclear)
	case h.Incompatible&Corrupt != 0:
		return unsupported("run `qemu-img check -r all` on it", "it is marked as corrupt")
	case h.CryptMethod > 2:
		return unsupported("", "it is encrypted in an unknown way (%d)", h.CryptMethod)
	}
	// Nothing but the header may be in the first cluster.
	for _, at := range []int{l1OffsetAt, refcountsAt, snapshotTableAt} {
		used := true
		switch at {
		case l1OffsetAt:
			used = be.Uint32(h.first[l1SizeAt:]) > 0
		case snapshotTableAt:
			used = be.Uint32(h.first[snapshotsAt:]) > 0
		}
		if offset := be.Uint64(h.first[at:]); used && (offset == 0 || offset%uint64(h.ClusterSize) != 0) {
			return unsupported("run `qemu-img check` on it", "its header is damaged: a table is said to be at %d", offset)
		}
	}
	return nil
}

// HasRoom says whether a label of n bytes fits, so that one of its size can
// replace it and QEMU can go on rewriting the header.
func (h *Header) HasRoom(n int) bool {
	// Where the first cluster does not hold everything, QEMU fails. It writes a
	// header of 112 bytes (also when it makes a version 3 image of a version 2
	// one) and, if clusters are above 4 KiB, a feature name table of its own.
	const (
		headerLength = 112
		featureTable = wordSize + 12*48 // QEMU 10 has 8 entries
	)
	others := max(h.Length, headerLength)
	if h.ClusterSize > 4096 {
		others += featureTable
	}
	for _, e := range h.Extensions {
		if !ours(e) && !(e.Type == featureTableType && h.ClusterSize > 4096) {
			others += e.size()
		}
	}
	// To replace the label takes a second tail of the chain and, beyond that and
	// beyond the name's present place, the name. At other times this is room for
	// QEMU: persistent bitmaps take 32 bytes of it.
	name, tail := len(h.BackingName), wordSize+align(n)+wordSize
	return align(others+tail+max(tail, name))+name <= len(h.first)
}

func (h *Header) noRoom(n int) error {
	return unsupported("copy it with `qemu-img convert -O qcow2`, which makes clusters of 64 KiB",
		"its first cluster, of %d bytes, has no room for a label of %d bytes that can be replaced safely", h.ClusterSize, n)
}

// rewrite replaces the tail of the chain of extensions: all from our first
// extension on, or else the end marker alone. The new tail holds what others
// have there, the label if there is to be one, and an end marker.
//
// After a power cut it also finds our extension to be skipped, where it has put
// it or, behind the label, where QEMU has.
func (h *Header) rewrite(payload []byte) (Plan, error) {
	if last := len(h.Extensions) - 1; last >= 0 && h.Extensions[last].Type == skipType {
		cut := Plan{{{h.Extensions[last].Offset, word(0, 0)}}}
		shorter, err := Parse(cut.Apply(h.first))
		if err != nil {
			return nil, err
		}
		plan, err := shorter.rewrite(payload)
		return append(cut, plan...), err
	}

	at, skipped := h.end, 0
	if i := slices.IndexFunc(h.Extensions, ours); i >= 0 {
		at = h.Extensions[i].Offset
		if h.Extensions[i].Type == skipType {
			skipped = h.Extensions[i].size()
		}
	}
	var tail []byte
	for _, e := range h.Extensions {
		if e.Offset >= at && !ours(e) {
			tail = append(tail, h.first[e.Offset:min(e.Offset+e.size(), len(h.first))]...)
		}
	}
	if payload != nil {
		tail = append(tail, word(LabelType, len(payload))...)
		tail = append(tail, payload...)
		tail = append(tail, make([]byte, align(len(payload))-len(payload))...)
	}
	tail = append(tail, word(0, 0)...)

	now := h.end + wordSize // end of what is there
	if bytes.Equal(tail, h.first[at:min(now, len(h.first))]) {
		return h.wiped(nil, now, h.backingOffset), nil
	}

	// Room: the new tail, and where it replaces something that counts, a second
	// copy of it beyond the old one.
	second := at
	if at != h.end && len(tail) > max(wordSize, skipped) {
		second = max(now, at+len(tail))
	}
	plan, nameAt := Plan(nil), h.backingOffset
	if len(tail) > wordSize {
		var err error
		if plan, nameAt, err = h.clear(second+len(tail), len(payload)); err != nil {
			return nil, err
		}
	}

	if second != at {
		plan = append(plan,
			[]Write{{second, tail}},
			// The new tail counts from here on: what was ours becomes one
			// extension to be skipped that reaches up to it. Its data does not
			// matter, so the new tail can be built there once more.
			[]Write{{at, word(skipType, second-at-wordSize)}},
		)
	}
	if len(tail) > wordSize {
		plan = append(plan, []Write{{at + wordSize, tail[wordSize:]}})
	}
	plan = append(plan, []Write{{at, tail[:wordSize]}})
	return h.wiped(plan, at+len(tail), nameAt), nil
}

// clear plans to move the backing file name out of the way of what is to be
// written, up to need, for a label of n bytes. It returns where the name then is.
func (h *Header) clear(need, n int) (plan Plan, nameAt int, err error) {
	limit := len(h.first)
	if h.backingOffset == 0 || h.hasEnd && h.backingOffset >= need {
		if need > limit || !h.hasEnd {
			return nil, 0, h.noRoom(n)
		}
		return nil, h.backingOffset, nil
	}
	// The copy may not touch the name, and the switch must be one sector.
	nameAt = align(max(need, h.backingOffset+len(h.BackingName)))
	if nameAt+len(h.BackingName) > limit {
		return nil, 0, h.noRoom(n)
	}
	sector := bytes.Clone(h.first[backingOffsetAt:backingSizeAt])
	if !h.hasEnd {
		// The name itself ended the chain, as in images of QEMU before 0.11,
		// where it follows the header. The marker must come with the switch.
		if h.end+wordSize > sectorSize {
			return nil, 0, unsupported("", "its header extensions have no end marker")
		}
		sector = bytes.Clone(h.first[backingOffsetAt : h.end+wordSize])
		copy(sector[h.end-backingOffsetAt:], word(0, 0))
	}
	binary.BigEndian.PutUint64(sector, uint64(nameAt))
	return Plan{{{nameAt, []byte(h.BackingName)}}, {{backingOffsetAt, sector}}}, nameAt, nil
}

// wiped adds to a plan that what it leaves behind between the chain's end and
// the name, and after the name, is zeroed: nothing else may be stored there,
// and old labels hold wrapped keys.
func (h *Header) wiped(plan Plan, end, nameAt int) Plan {
	after := plan.Apply(h.first)
	var wipe []Write
	zero := func(from, to int) {
		if from >= to {
			return
		}
		dirty := bytes.TrimRight(after[from:to], "\x00")
		if clean := len(dirty) - len(bytes.TrimLeft(dirty, "\x00")); len(dirty) > 0 {
			wipe = append(wipe, Write{from + clean, make([]byte, len(dirty)-clean)})
		}
	}
	if nameAt == 0 {
		zero(end, len(after))
	} else {
		zero(end, nameAt)
		zero(nameAt+len(h.BackingName), len(after))
	}
	if len(wipe) > 0 {
		plan = append(plan, wipe)
	}
	return plan
}

// word is an extension's head.
func word(kind uint32, size int) []byte {
	w := binary.BigEndian.AppendUint32(nil, kind)
	return binary.BigEndian.AppendUint32(w, uint32(size))
}
