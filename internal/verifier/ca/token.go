package ca

import (
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
)

// A join token is "vtj1.SECRET.PIN": 16 random bytes that let one node in once,
// and the pin of the CA, by which the node knows the Verifier. Both are
// base64url without padding.
const tokenPrefix = "vtj1"

// SecretSize is that of a token's secret.
const SecretSize = 16

// Pin is the SHA-256 of a CA's SubjectPublicKeyInfo. It is no secret.
type Pin [sha256.Size]byte

// PinOf gives the pin of a CA.
func PinOf(cert *x509.Certificate) Pin { return sha256.Sum256(cert.RawSubjectPublicKeyInfo) }

// String spells the pin as tokens do.
func (p Pin) String() string { return base64.RawURLEncoding.EncodeToString(p[:]) }

// ParsePin reads a pin.
func ParsePin(s string) (Pin, error) {
	var p Pin
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != len(p) {
		return p, errors.New("this is no pin of a CA: 43 letters, digits, - and _ are wanted")
	}
	copy(p[:], b)
	return p, nil
}

// Matches reports whether the certificate is of the pinned CA.
func (p Pin) Matches(cert *x509.Certificate) bool {
	have := PinOf(cert)
	return subtle.ConstantTimeCompare(p[:], have[:]) == 1
}

// NewToken makes a join token and the digest by which the store knows it.
func NewToken(random io.Reader, pin Pin) (token, digest string, err error) {
	var secret [SecretSize]byte
	if _, err := io.ReadFull(random, secret[:]); err != nil {
		return "", "", fmt.Errorf("making a join token: %w", err)
	}
	return strings.Join([]string{tokenPrefix, base64.RawURLEncoding.EncodeToString(secret[:]), pin.String()}, "."), TokenDigest(secret[:]), nil
}

// ParseToken takes a join token apart.
func ParseToken(token string) (secret []byte, pin Pin, err error) {
	bad := errors.New("this is no join token: vtj1.….… is wanted, as 'virt-trust fleet token create' prints it")
	parts := strings.Split(token, ".")
	if len(token) > 128 || len(parts) != 3 || parts[0] != tokenPrefix {
		return nil, pin, bad
	}
	if secret, err = ParseSecret(parts[1]); err != nil {
		return nil, pin, bad
	}
	if pin, err = ParsePin(parts[2]); err != nil {
		return nil, pin, bad
	}
	return secret, pin, nil
}

// TokenDigest is how the store knows a token's secret.
func TokenDigest(secret []byte) string {
	d := sha256.Sum256(secret)
	return hex.EncodeToString(d[:])
}

// ParseSecret reads a token's secret alone, as a node gives it to the Verifier.
func ParseSecret(s string) ([]byte, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != SecretSize {
		return nil, errors.New("this is no secret of a join token")
	}
	return b, nil
}

// SpellSecret undoes ParseSecret.
func SpellSecret(secret []byte) string { return base64.RawURLEncoding.EncodeToString(secret) }
