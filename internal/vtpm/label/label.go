// Package label holds the payload of a label: what a VM's image says about the
// vTPM that belongs to it, and the vTPM keys wrapped to the hosts that may use
// them. Pure: bytes and values in, values and errors out.
//
// Version 1, integers big-endian:
//
//	 1  version, 1
//	 1  algorithm of the state at rest, 1 = aes-256-cbc
//	16  label id
//	16  UUID of the VM
//	 8  generation
//	 2  length of the instance name, then the name
//	 1  number of recipients, then for each, in ascending order of their names:
//	       1  length of the bind key's TPM Name, then the Name
//	       2  length of the OAEP ciphertext, then the ciphertext
//	32  HMAC-SHA256 over all before it
//
// One recipient may be the host's recovery key instead of a host. Its name, of
// 34 bytes too, begins with two zero bytes, as no TPM Name does, and its
// ciphertext is an age file.
//
// The HMAC's key is derived from the VM's state key, so that only who can
// unwrap a ciphertext can tell whether the label is right, or make another.
package label

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The bounds of a payload. With one recipient and libvirt's default state path
// it has 434 bytes.
const (
	MaxPayload     = 4096 // bytes
	MaxInstance    = 1024 // bytes
	MaxRecipients  = 8
	MaxBindKeyName = 66  // bytes: nameAlg and a SHA-512 digest (TPM 2.0 Part 1, 16)
	MaxCiphertext  = 512 // bytes: RSA-4096

	StateKeySize    = 32 // bytes
	AlgorithmAES256 = "aes-256-cbc"
)

const (
	version         = 1
	algorithmAES256 = 1
	macSize         = sha256.Size
	macKeyInfo      = "virt-trust/label/hmac/v1"
)

// ErrMAC says that the payload was not sealed with this state key, or was
// changed since.
var ErrMAC = errors.New("the label is not the one that was sealed with this VM's state key")

// VersionError says that the label is of a version that this program does not
// know.
type VersionError struct{ Version byte }

func (e *VersionError) Error() string {
	return fmt.Sprintf("the label is of version %d, which this version of virt-trust does not know", e.Version)
}

// Label is what a payload says.
type Label struct {
	ID         [16]byte
	VM         string // UUID in libvirt's spelling: lower case, with hyphens
	Instance   string // the vTPM: its state path
	Algorithm  string // of the state at rest: "aes-256-cbc"
	Recipients []Recipient
	Generation uint64
}

// Recipient is a host that may use the vTPM, or the recovery key.
type Recipient struct {
	BindKeyName []byte // TPM Name of the host's bind key
	Ciphertext  []byte // the vTPM keys, RSA-OAEP to that key
}

// Recipient gives the ciphertext for a bind key.
func (l *Label) Recipient(bindKeyName []byte) ([]byte, bool) {
	for _, r := range l.Recipients {
		if bytes.Equal(r.BindKeyName, bindKeyName) {
			return r.Ciphertext, true
		}
	}
	return nil, false
}

// Seal gives the payload. The same label and key always give the same bytes.
func (l Label) Seal(stateKey []byte) ([]byte, error) {
	vm, err := parseUUID(l.VM)
	if err != nil {
		return nil, err
	}
	if l.Algorithm != AlgorithmAES256 {
		return nil, fmt.Errorf("label: unknown algorithm %q", l.Algorithm)
	}
	if err := checkInstance(l.Instance); err != nil {
		return nil, err
	}
	recipients := slices.Clone(l.Recipients)
	slices.SortFunc(recipients, func(a, b Recipient) int { return bytes.Compare(a.BindKeyName, b.BindKeyName) })
	if err := checkRecipients(recipients); err != nil {
		return nil, err
	}

	p := []byte{version, algorithmAES256}
	p = append(p, l.ID[:]...)
	p = append(p, vm[:]...)
	p = binary.BigEndian.AppendUint64(p, l.Generation)
	p = binary.BigEndian.AppendUint16(p, uint16(len(l.Instance)))
	p = append(p, l.Instance...)
	p = append(p, byte(len(recipients)))
	for _, r := range recipients {
		p = append(p, byte(len(r.BindKeyName)))
		p = append(p, r.BindKeyName...)
		p = binary.BigEndian.AppendUint16(p, uint16(len(r.Ciphertext)))
		p = append(p, r.Ciphertext...)
	}
	mac, err := macOf(p, stateKey)
	if err != nil {
		return nil, err
	}
	if len(p)+len(mac) > MaxPayload {
		return nil, fmt.Errorf("label: %d bytes, at most %d are possible", len(p)+len(mac), MaxPayload)
	}
	return append(p, mac...), nil
}

// UntrustedParse reads a payload without knowing whether it is genuine: whom
// to ask for the key stands in it. Errors: *VersionError, others for a payload
// that is none.
func UntrustedParse(payload []byte) (*Label, error) {
	if len(payload) < 1+macSize || len(payload) > MaxPayload {
		return nil, fmt.Errorf("label: a payload of %d bytes", len(payload))
	}
	if v := payload[0]; v != version {
		return nil, &VersionError{v}
	}
	r := reader{rest: payload[1 : len(payload)-macSize]}
	algorithm := r.uint8()
	l := &Label{Algorithm: AlgorithmAES256}
	copy(l.ID[:], r.bytes(len(l.ID)))
	l.VM = formatUUID(r.bytes(16))
	l.Generation = r.uint64()
	l.Instance = string(r.bytes(int(r.uint16())))
	n := int(r.uint8())
	for i := 0; i < min(n, MaxRecipients) && !r.short; i++ {
		name := bytes.Clone(r.bytes(int(r.uint8())))
		ciphertext := bytes.Clone(r.bytes(int(r.uint16())))
		l.Recipients = append(l.Recipients, Recipient{name, ciphertext})
	}
	switch {
	case r.short:
		return nil, errors.New("label: the payload is cut short")
	case n > MaxRecipients:
		return nil, fmt.Errorf("label: %d recipients, at most %d are possible", n, MaxRecipients)
	case len(r.rest) > 0:
		return nil, fmt.Errorf("label: %d bytes too many", len(r.rest))
	case algorithm != algorithmAES256:
		return nil, fmt.Errorf("label: unknown algorithm %d", algorithm)
	}
	if err := checkInstance(l.Instance); err != nil {
		return nil, err
	}
	if err := checkRecipients(l.Recipients); err != nil {
		return nil, err
	}
	return l, nil
}

// Verify reads a payload and checks that it was sealed with this state key.
// Errors: those of UntrustedParse, and ErrMAC.
func Verify(payload, stateKey []byte) (*Label, error) {
	l, err := UntrustedParse(payload)
	if err != nil {
		return nil, err
	}
	body := payload[:len(payload)-macSize]
	want, err := macOf(body, stateKey)
	if err != nil {
		return nil, err
	}
	if !hmac.Equal(want, payload[len(body):]) {
		return nil, ErrMAC
	}
	return l, nil
}

func macOf(body, stateKey []byte) ([]byte, error) {
	if len(stateKey) != StateKeySize {
		return nil, fmt.Errorf("label: a state key of %d bytes, not %d", len(stateKey), StateKeySize)
	}
	key, err := hkdf.Key(sha256.New, stateKey, nil, macKeyInfo, sha256.Size)
	if err != nil {
		return nil, fmt.Errorf("label: deriving the HMAC's key: %w", err)
	}
	defer clear(key)
	m := hmac.New(sha256.New, key)
	m.Write(body)
	return m.Sum(nil), nil
}

func checkInstance(s string) error {
	if s == "" || len(s) > MaxInstance || strings.ContainsRune(s, 0) {
		return fmt.Errorf("label: an instance name of %d bytes is empty, too long or holds a NUL", len(s))
	}
	return nil
}

// checkRecipients demands ascending names, which also rules out doubles and
// makes the payload of a label unique.
func checkRecipients(rs []Recipient) error {
	if len(rs) == 0 || len(rs) > MaxRecipients {
		return fmt.Errorf("label: %d recipients, 1 to %d are possible", len(rs), MaxRecipients)
	}
	for i, r := range rs {
		switch {
		case len(r.BindKeyName) == 0 || len(r.BindKeyName) > MaxBindKeyName:
			return fmt.Errorf("label: a bind key name of %d bytes", len(r.BindKeyName))
		case len(r.Ciphertext) == 0 || len(r.Ciphertext) > MaxCiphertext:
			return fmt.Errorf("label: a ciphertext of %d bytes", len(r.Ciphertext))
		case i > 0 && bytes.Compare(rs[i-1].BindKeyName, r.BindKeyName) >= 0:
			return errors.New("label: recipients twice or out of order")
		}
	}
	return nil
}

func parseUUID(s string) (u [16]byte, err error) {
	digits, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(digits) != len(u) || formatUUID(digits) != s {
		return u, fmt.Errorf("label: %q is not a UUID in libvirt's spelling", s)
	}
	return [16]byte(digits), nil
}

func formatUUID(u []byte) string {
	if len(u) != 16 {
		return ""
	}
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// reader takes bytes off the front; once there are too few it gives zeros and
// remembers.
type reader struct {
	rest  []byte
	short bool
}

func (r *reader) bytes(n int) []byte {
	if r.short || n > len(r.rest) {
		r.short = true
		return nil
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

func (r *reader) uint(n int) (v uint64) {
	for _, b := range r.bytes(n) {
		v = v<<8 | uint64(b)
	}
	return v
}

func (r *reader) uint8() uint8   { return uint8(r.uint(1)) }
func (r *reader) uint16() uint16 { return uint16(r.uint(2)) }
func (r *reader) uint64() uint64 { return r.uint(8) }
