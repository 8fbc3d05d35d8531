// Package ima reads the measurement list of the Linux kernel's Integrity
// Measurement Architecture, as securityfs gives it in binary
// (binary_runtime_measurements), and replays it to a PCR. It is pure.
//
// An entry is: PCR (u32), SHA-1 template digest (20 bytes), length and name of the
// template, length and fields of it; numbers are little-endian on all hosts that
// are known here (security/integrity/ima/ima_fs.c). The template "ima" has
// neither a length nor lengths in it, as the oldest kernels wrote it.
//
// A PCR vouches for an entry's template data alone. The template's name is not
// measured; a list in which it was changed replays all the same, but for the name
// "ima".
package ima

import (
	"bytes"
	"crypto/sha1"
	"encoding/binary"
	"errors"
	"fmt"
)

// Bounds.
const (
	MaxName     = 255     // bytes of a template's name
	MaxTemplate = 4 << 20 // bytes of an entry's fields: an ima-buf entry holds what was measured
	MaxEntries  = 1 << 22 // of a list
	MaxPath     = 4096 + 1
)

// ErrFormat says that bytes are no measurement list.
var ErrFormat = errors.New("not an IMA measurement list")

// ErrReplay says that a list does not lead to the PCR.
var ErrReplay = errors.New("the IMA measurement list does not lead to the PCR")

// Entry is one entry. Its slices are of the list that was parsed.
type Entry struct {
	PCR      uint32
	SHA1     []byte // template digest, as logged
	Template string // "ima-ng", …; what is not known here is kept as it is
	Data     []byte // all fields, as they were measured
	// Of a template that is known: what was measured.
	Algorithm string // of the digest: "sha256"
	Digest    []byte
	Path      []byte // without the NUL
	Signature []byte // security.ima, or a module's: may be empty
	Buffer    []byte // ima-buf
	Known     bool   // the template's fields were read
}

// Violation reports whether a file was written while it was measured: its
// entry has no digest, and the PCR was extended by ones.
func (e *Entry) Violation() bool { return zero(e.SHA1) }

func zero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

const legacy = "ima"

// Next takes the first entry off a list. size is the number of its bytes; 0 where
// the list ends in the middle of an entry, or before it. e is overwritten.
func (e *Entry) Next(list []byte) (size int, err error) {
	if size, err = e.frame(list); size > 0 {
		e.fields()
	}
	return size, err
}

// frame is Next without a look at the fields, which it leaves as they are.
func (e *Entry) frame(list []byte) (size int, err error) {
	const fixed = 4 + sha1.Size + 4
	if len(list) < fixed {
		return 0, nil
	}
	e.PCR, e.SHA1 = binary.LittleEndian.Uint32(list), list[4:4+sha1.Size:4+sha1.Size]
	n := binary.LittleEndian.Uint32(list[4+sha1.Size:])
	if n == 0 || n > MaxName || e.PCR > 23 {
		return 0, fmt.Errorf("%w: PCR %d, template name of %d bytes", ErrFormat, e.PCR, n)
	}
	at := fixed + int(n)
	if len(list) < at {
		return 0, nil
	}
	e.Template = name(list[fixed:at])
	var length int
	if e.Template == legacy {
		// digest (20), length of the path with its NUL (4), path
		if len(list) < at+sha1.Size+4 {
			return 0, nil
		}
		path := binary.LittleEndian.Uint32(list[at+sha1.Size:])
		if path > MaxPath {
			return 0, fmt.Errorf("%w: path of %d bytes", ErrFormat, path)
		}
		length = sha1.Size + 4 + int(path)
	} else {
		if len(list) < at+4 {
			return 0, nil
		}
		l := binary.LittleEndian.Uint32(list[at:])
		if l == 0 || l > MaxTemplate {
			return 0, fmt.Errorf("%w: entry of %d bytes", ErrFormat, l)
		}
		at += 4
		length = int(l)
	}
	if len(list)-at < length {
		return 0, nil
	}
	e.Data = list[at : at+length : at+length]
	return at + length, nil
}

// name is a template's: those that are known are not allocated.
func name(b []byte) string {
	switch string(b) {
	case "ima-ng":
		return "ima-ng"
	case "ima-sig":
		return "ima-sig"
	case "ima-buf":
		return "ima-buf"
	case "ima-modsig":
		return "ima-modsig"
	case "ima-ngv2":
		return "ima-ngv2"
	case "ima-sigv2":
		return "ima-sigv2"
	case legacy:
		return legacy
	}
	return string(b)
}

// fields reads those of the templates that are known
// (Documentation/security/IMA-templates.rst). Data that does not fit leaves the
// entry opaque.
func (e *Entry) fields() {
	e.Algorithm, e.Digest, e.Path, e.Signature, e.Buffer, e.Known = "", nil, nil, nil, nil, false
	if e.Template == legacy {
		e.Algorithm, e.Digest, e.Path, e.Known = "sha1", e.Data[:sha1.Size], withoutNUL(e.Data[sha1.Size+4:]), true
		return
	}
	var want int
	switch e.Template {
	case "ima-ng", "ima-ngv2":
		want = 2
	case "ima-sig", "ima-buf", "ima-sigv2":
		want = 3
	case "ima-modsig":
		want = 5 // d-ng, n-ng, sig, d-modsig, modsig
	default:
		return
	}
	var f [5][]byte
	rest := e.Data
	for i := range want {
		if len(rest) < 4 {
			return
		}
		n := binary.LittleEndian.Uint32(rest)
		if uint64(n) > uint64(len(rest)-4) {
			return
		}
		f[i], rest = rest[4:4+n:4+n], rest[4+n:]
	}
	digest := f[0]
	if e.Template == "ima-ngv2" || e.Template == "ima-sigv2" { // "ima:sha256:" or "verity:sha256:"
		i := bytes.IndexByte(digest, ':')
		if i < 0 {
			return
		}
		digest = digest[i+1:]
	}
	alg, value, ok := algorithmOf(digest)
	if !ok || len(rest) > 0 {
		return
	}
	e.Algorithm, e.Digest = alg, value
	e.Path = withoutNUL(f[1])
	switch {
	case e.Template == "ima-buf":
		e.Buffer = f[2]
	case want >= 3:
		e.Signature = f[2]
	}
	e.Known = true
}

func withoutNUL(b []byte) []byte {
	if n := len(b); n > 0 && b[n-1] == 0 {
		return b[:n-1]
	}
	return b
}

// algorithmOf takes a field "sha256:" NUL digest apart.
func algorithmOf(field []byte) (name string, digest []byte, ok bool) {
	for _, a := range [...]string{"sha256", "sha1", "sha512", "sha384"} { // which are not allocated
		n := len(a)
		if len(field) >= n+2 && string(field[:n]) == a && field[n] == ':' && field[n+1] == 0 {
			return a, field[n+2:], true
		}
	}
	colon := bytes.IndexByte(field, ':')
	if colon < 0 || colon+1 >= len(field) || field[colon+1] != 0 {
		return "", nil, false
	}
	return string(field[:colon]), field[colon+2:], true
}

// Mode says how entries get into a bank that is not SHA-1's: kernels since 5.8
// hash the template data with the bank's own algorithm, older ones fill the SHA-1
// digest up with zeros. It is told by which of them replays, and then stays.
type Mode uint8

// The modes.
const (
	Unknown Mode = iota
	Native
	Padded
)

// Checkpoint is how far a list was replayed. The zero Checkpoint is its
// beginning.
type Checkpoint struct {
	Offset  uint64 `cbor:"1,keyasint"` // bytes
	Entries uint64 `cbor:"2,keyasint"`
	Bank    string `cbor:"3,keyasint"`
	Mode    Mode   `cbor:"4,keyasint"`
	Value   []byte `cbor:"5,keyasint"` // of the PCR; nil at the beginning
}
