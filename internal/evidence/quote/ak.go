package quote

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
)

// The public area of an AK but for its attributes, authPolicy and point
// (12.2.4): ECC with Names by SHA-256; no symmetric algorithm, ECDSA with SHA-256,
// NIST P-256, no KDF.
var (
	akHead = []byte{0x00, 0x23, 0x00, 0x0b}
	akTail = []byte{0x00, 0x10, 0x00, 0x18, 0x00, 0x0b, 0x00, 0x03, 0x00, 0x10}
)

// Attributes (8.3.2).
const (
	fixedTPM            = 1 << 1
	fixedParent         = 1 << 4
	sensitiveDataOrigin = 1 << 5
	userWithAuth        = 1 << 6
	adminWithPolicy     = 1 << 7
	noDA                = 1 << 10
	restricted          = 1 << 16
	sign                = 1 << 18

	akMust = fixedTPM | fixedParent | sensitiveDataOrigin | restricted | sign
	akMay  = fixedTPM | fixedParent | sensitiveDataOrigin | restricted | sign | userWithAuth | adminWithPolicy | noDA
)

// ParseAK is ParsePublic and AK for where there are many: it reads the one form
// that an AK has, without go-tpm's reflection, and leaves all others to it.
func ParseAK(area []byte) (*ecdsa.PublicKey, error) {
	if key := parseAK(area); key != nil {
		return key, nil
	}
	o, err := ParsePublic(area)
	if err != nil {
		return nil, err
	}
	return o.AK()
}

func parseAK(area []byte) *ecdsa.PublicKey {
	r := reader{b: area}
	head, attributes, policy, tail, x, y := r.take(4), uint32(r.number(4)), r.buffer(), r.take(len(akTail)), r.buffer(), r.buffer()
	if r.failed || len(r.b) > 0 || !bytes.Equal(head, akHead) || !bytes.Equal(tail, akTail) || len(policy) > 0 || len(x) != 32 || len(y) != 32 ||
		attributes&akMust != akMust || attributes&^akMay != 0 {
		return nil
	}
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), append(append([]byte{4}, x...), y...))
	if err != nil {
		return nil
	}
	return key
}
