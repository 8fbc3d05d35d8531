package forge

import (
	"crypto/sha1"
	"encoding/binary"
	"strings"
)

// IMAEntry is an entry of an IMA measurement list.
type IMAEntry struct {
	Template  string // "" is ima-ng
	Path      string
	Algorithm string // "" is sha256
	Digest    []byte
	Extra     []byte // signature, or buffer
	Violation bool
}

// field is a template's field with its length.
func field(b []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(nil, uint32(len(b))), b...)
}

// Data is what is measured of it.
func (e IMAEntry) Data() []byte {
	alg := e.Algorithm
	if alg == "" {
		alg = "sha256"
	}
	digest := e.Digest
	if e.Violation {
		digest = make([]byte, len(digest))
	}
	if e.Template == "ima" {
		return append(append([]byte{}, digest...), field([]byte(e.Path))...)
	}
	b := append(field(append([]byte(alg+":\x00"), digest...)), field([]byte(e.Path+"\x00"))...)
	if e.Template == "ima-sig" || e.Template == "ima-buf" {
		b = append(b, field(e.Extra)...)
	}
	return b
}

// Marshal gives the entry's bytes, for a PCR.
func (e IMAEntry) Marshal(pcr uint32) []byte {
	name := e.Template
	if name == "" {
		name = "ima-ng"
	}
	digest := sha1.Sum(e.hashed())
	if e.Violation {
		clear(digest[:])
	}
	b := append(binary.LittleEndian.AppendUint32(nil, pcr), digest[:]...)
	b = append(b, field([]byte(name))...)
	if name == "ima" {
		return append(b, e.Data()...)
	}
	return append(b, field(e.Data())...)
}

func (e IMAEntry) hashed() []byte {
	if e.Template != "ima" {
		return e.Data()
	}
	return append(append([]byte{}, e.Digest...), []byte(e.Path+strings.Repeat("\x00", 256-len(e.Path)))...)
}

// Measure appends the entry to a list and extends the TPM's PCR 10 by it, as
// kernels since 5.8 do.
func (t *TPM) Measure(list []byte, e IMAEntry) []byte {
	for bank := range t.PCRs {
		h := Hashes[bank].New()
		h.Write(e.hashed())
		d := h.Sum(nil)
		if e.Violation {
			for i := range d {
				d[i] = 0xff
			}
		}
		t.Extend(bank, 10, d)
	}
	return append(list, e.Marshal(10)...)
}
