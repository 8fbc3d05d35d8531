// Package qcow2 reads the header of a qcow2 image and plans how a label is put
// into it, after QEMU's docs/interop/qcow2.txt. Pure: bytes in, bytes out.
//
// A label is a header extension of type "VTR1". QEMU keeps extensions that it
// does not know when it rewrites the header.
package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

const (
	// LabelType is the type of the label's header extension, "VTR1".
	LabelType = 0x56545231
	// MaxPayload is the most bytes that a label may have.
	MaxPayload = 4096
	// Window is how much of an image's start is looked at, and written to.
	// libvirt reads 33,280 bytes and must find extensions and backing file
	// name in them, whatever the cluster size.
	Window = 32 << 10

	// skipType, "VTR0", is an extension to be skipped that stands where the
	// label was while it is being replaced (plan.go).
	skipType         = 0x56545230
	featureTableType = 0x6803f857

	v2Length       = 72
	minV3Length    = 104
	maxBackingName = 1023
	wordSize       = 8 // of an extension's head, and what all of them are aligned to

	// Where header fields stand.
	backingOffsetAt = 8
	backingSizeAt   = 16
	clusterBitsAt   = 20
	cryptMethodAt   = 32
	l1SizeAt        = 36
	l1OffsetAt      = 40
	refcountsAt     = 48
	snapshotsAt     = 60
	snapshotTableAt = 64
	incompatibleAt  = 72
	compatibleAt    = 80
	autoclearAt     = 88
	lengthAt        = 100
)

// Bits of Header.Incompatible.
const (
	Dirty        = 1 << 0
	Corrupt      = 1 << 1
	ExternalData = 1 << 2
	Compression  = 1 << 3
	ExtendedL2   = 1 << 4

	knownIncompatible = Dirty | Corrupt | ExternalData | Compression | ExtendedL2
	knownAutoclear    = 1<<0 | 1<<1 // bitmaps, raw external data
)

var (
	// ErrNoLabel says that the image has no label.
	ErrNoLabel = errors.New("the image has no label")
	// ErrLabelDamaged says that the image has label extensions which were not
	// written like this: several, an empty one, one that is too long.
	ErrLabelDamaged = errors.New("the image's label is doubled, empty or too long")
)

// UnsupportedError says why an image cannot carry a label.
type UnsupportedError struct {
	Reason string // a clause about the image: "its …", "it …"
	Mend   string // what to do, an imperative clause; may be empty
}

func (e *UnsupportedError) Error() string {
	if e.Mend == "" {
		return "the image cannot carry a label: " + e.Reason
	}
	return "the image cannot carry a label: " + e.Reason + "; " + e.Mend
}

func unsupported(mend, format string, args ...any) error {
	return &UnsupportedError{fmt.Sprintf(format, args...), mend}
}

// Header is what the start of an image says.
type Header struct {
	Version                             int // 2 or 3
	ClusterSize                         int // bytes
	Length                              int // bytes of the header without its extensions
	CryptMethod                         uint32
	Incompatible, Compatible, Autoclear uint64      // feature bits; 0 in version 2
	Extensions                          []Extension // without the end marker
	BackingName                         string      // as stored; "" if there is none

	first         []byte // the image's first min(ClusterSize, Window) bytes
	backingOffset int    // 0: no backing file
	end           int    // where the end marker is, or would be
	hasEnd        bool
}

// Extension is a header extension.
type Extension struct {
	Type   uint32
	Data   []byte
	Offset int // of its head; its data follows 8 bytes later
}

// size is what an extension takes, head and padding included.
func (e Extension) size() int { return wordSize + align(len(e.Data)) }

func align(n int) int { return (n + wordSize - 1) &^ (wordSize - 1) }

// Parse reads the start of an image, of which first holds at least the first
// cluster or Window bytes. Its only error is *UnsupportedError.
func Parse(first []byte) (*Header, error) {
	be := binary.BigEndian
	if len(first) < v2Length || string(first[:4]) != "QFI\xfb" {
		return nil, unsupported("", "it is not a qcow2 image")
	}
	h := &Header{Version: int(be.Uint32(first[4:])), Length: v2Length, CryptMethod: be.Uint32(first[cryptMethodAt:])}
	if h.Version != 2 && h.Version != 3 {
		return nil, unsupported("", "it is a qcow2 image of the unknown version %d", be.Uint32(first[4:]))
	}
	bits := be.Uint32(first[clusterBitsAt:])
	if bits < 9 || bits > 21 {
		return nil, unsupported("", "its clusters are of 2^%d bytes, which QEMU does not support", bits)
	}
	h.ClusterSize = 1 << bits
	limit := min(h.ClusterSize, Window)
	if len(first) < limit {
		return nil, unsupported("", "it is cut short in its header")
	}
	h.first = bytes.Clone(first[:limit])
	first = h.first

	if h.Version == 3 {
		h.Incompatible = be.Uint64(first[incompatibleAt:])
		h.Compatible = be.Uint64(first[compatibleAt:])
		h.Autoclear = be.Uint64(first[autoclearAt:])
		n := be.Uint32(first[lengthAt:])
		if n < minV3Length || n%wordSize != 0 || n > uint32(limit) {
			return nil, unsupported("", "its header is damaged: it gives its own length as %d bytes", n)
		}
		h.Length = int(n)
	}

	// Extensions end at the backing file name or with the cluster, if no end
	// marker comes before.
	extensionsEnd := h.ClusterSize
	if offset := be.Uint64(first[backingOffsetAt:]); offset != 0 {
		size := be.Uint32(first[backingSizeAt:])
		if offset < uint64(h.Length) || offset > uint64(h.ClusterSize) || size > maxBackingName ||
			offset+uint64(size) > uint64(h.ClusterSize) {
			return nil, unsupported("", "its header is damaged: the backing file name is said to be at %d, with %d bytes", offset, size)
		}
		if offset+uint64(size) > uint64(limit) {
			return nil, unsupported("", "its backing file name stands beyond the first %d bytes", Window)
		}
		h.backingOffset = int(offset)
		h.BackingName = string(first[offset : offset+uint64(size)])
		extensionsEnd = h.backingOffset
	}
	if err := h.parseExtensions(extensionsEnd); err != nil {
		return nil, err
	}
	return h, nil
}

// parseExtensions walks the chain as QEMU does, up to but not including end.
func (h *Header) parseExtensions(end int) error {
	be := binary.BigEndian
	offset := h.Length
	for offset < end {
		data := offset + wordSize
		if data > len(h.first) || data > end {
			return unsupported("", "its header is damaged: an extension at %d does not fit", offset)
		}
		kind, size := be.Uint32(h.first[offset:]), be.Uint32(h.first[offset+4:])
		if uint64(size) > uint64(min(end, len(h.first))-data) {
			return unsupported("", "its header is damaged: an extension at %d, type %#08x, of %d bytes does not fit", offset, kind, size)
		}
		if kind == 0 {
			h.end, h.hasEnd = offset, true
			return nil
		}
		h.Extensions = append(h.Extensions, Extension{kind, h.first[data : data+int(size)], offset})
		offset = data + align(int(size))
	}
	h.end = offset
	return nil
}

// Label gives the payload of the image's label. Errors: ErrNoLabel,
// ErrLabelDamaged.
func (h *Header) Label() ([]byte, error) {
	var payload []byte
	n := 0
	for _, e := range h.Extensions {
		if e.Type == LabelType {
			payload = e.Data
			n++
		}
	}
	switch {
	case n == 0:
		return nil, ErrNoLabel
	case n > 1 || len(payload) == 0 || len(payload) > MaxPayload:
		return nil, ErrLabelDamaged
	}
	return bytes.Clone(payload), nil
}
