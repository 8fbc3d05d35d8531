package refvalues

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// MaxManifest bounds a manifest, in bytes; MaxSignature its signature.
const (
	MaxManifest  = 4 << 20
	MaxSignature = 1024
)

// ManifestFormat is what a manifest must name.
const ManifestFormat = "virt-trust-launchers-1"

// SignedManifest is a list of Reference Values that someone signed:
//
//	{"format": "virt-trust-launchers-1", "name": "acme", "serial": 7,
//	 "launchers": [{"path": "/usr/bin/swtpm", "sha256": "…"}], "revoked": ["…"]}
//
// The signature is over the file's bytes, beside it, raw or in base64: Ed25519,
// or ECDSA over SHA-256 in ASN.1, as `openssl pkeyutl -sign -rawin` makes them.
// A manifest takes the place of the one of its name that has a lower serial.
type SignedManifest struct {
	Format    string             `json:"format"`
	Name      string             `json:"name"`
	Serial    uint64             `json:"serial"`
	Launchers []ManifestLauncher `json:"launchers"`
	Revoked   []string           `json:"revoked"` // SHA-256 digests
}

// ManifestLauncher is one approved file; without a path, wherever it lies.
type ManifestLauncher struct {
	Path   string `json:"path"`
	SHA256 string `json:"sha256"`
}

// ErrSignature says that none of the keys signed the manifest.
var ErrSignature = errors.New("no configured key made this signature")

// ParseKeys reads public keys, one or more PEM blocks "PUBLIC KEY": Ed25519 or
// ECDSA.
func ParseKeys(b []byte) (keys []any, err error) {
	for len(bytes.TrimSpace(b)) > 0 {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil || block.Type != "PUBLIC KEY" {
			return nil, errors.New("not a public key in PEM")
		}
		k, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, err
		}
		switch k.(type) {
		case ed25519.PublicKey, *ecdsa.PublicKey:
			keys = append(keys, k)
		default:
			return nil, fmt.Errorf("a %T does not sign manifests; Ed25519 and ECDSA do", k)
		}
	}
	return keys, nil
}

// VerifyManifest gives the manifest that one of the keys signed.
func VerifyManifest(manifest, signature []byte, keys []any) (*SignedManifest, error) {
	if len(manifest) > MaxManifest || len(signature) > MaxSignature {
		return nil, errors.New("the manifest or its signature is too long")
	}
	if err := VerifySignature(manifest, signature, keys); err != nil {
		return nil, err
	}
	return UntrustedManifest(manifest)
}

// VerifySignature checks that one of the keys made a detached signature, raw or
// in base64, over the bytes of a file.
func VerifySignature(file, signature []byte, keys []any) error {
	if len(signature) > MaxSignature {
		return fmt.Errorf("%w: it is too long", ErrSignature)
	}
	sigs := [][]byte{signature}
	if b, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(string(signature)), "")); err == nil {
		sigs = append(sigs, b)
	}
	digest := sha256.Sum256(file)
	signed := slices.ContainsFunc(keys, func(key any) bool {
		return slices.ContainsFunc(sigs, func(sig []byte) bool {
			switch k := key.(type) {
			case ed25519.PublicKey:
				return ed25519.Verify(k, file, sig)
			case *ecdsa.PublicKey:
				return ecdsa.VerifyASN1(k, digest[:], sig)
			}
			return false
		})
	})
	if !signed {
		return ErrSignature
	}
	return nil
}

// UntrustedManifest reads a manifest without a look at who signed it.
func UntrustedManifest(b []byte) (*SignedManifest, error) {
	if len(b) > MaxManifest {
		return nil, errors.New("the manifest is too long")
	}
	m := &SignedManifest{}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(m); err != nil {
		return nil, fmt.Errorf("the manifest: %w", err)
	}
	if d.More() {
		return nil, errors.New("the manifest: something follows it")
	}
	if m.Format != ManifestFormat {
		return nil, fmt.Errorf("the manifest: its format is %.40q, not %q", m.Format, ManifestFormat)
	}
	if m.Name == "" || len(m.Name) > 100 || strings.ContainsFunc(m.Name, func(r rune) bool { return !unicode.IsGraphic(r) }) {
		return nil, errors.New("the manifest has no name, or a strange one")
	}
	if len(m.Launchers)+len(m.Revoked) > MaxValues {
		return nil, errors.New("the manifest names too many files")
	}
	for _, l := range m.Launchers {
		if _, err := ParseDigest(l.SHA256); err != nil {
			return nil, err
		}
		if l.Path != "" && !strings.HasPrefix(l.Path, "/") || len(l.Path) > MaxPath {
			return nil, fmt.Errorf("the manifest: %.80q is no absolute path", l.Path)
		}
	}
	for _, r := range m.Revoked {
		if _, err := ParseDigest(r); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// ParseDigest reads a SHA-256 digest in hexadecimal.
func ParseDigest(s string) (d Digest, err error) {
	if len(s) != 2*len(d) {
		return d, fmt.Errorf("%.80q is no SHA-256 digest", s)
	}
	for i, r := range []byte(strings.ToLower(s)) {
		n := strings.IndexByte("0123456789abcdef", r)
		if n < 0 {
			return Digest{}, fmt.Errorf("%.80q is no SHA-256 digest", s)
		}
		d[i/2] = d[i/2]<<4 | byte(n)
	}
	return d, nil
}

// ErrOlder says that a newer manifest of this name was imported before.
var ErrOlder = errors.New("a manifest of this name and a higher or the same serial was imported before")

// Import takes a manifest's values in place of those of its predecessor. What
// it revokes stays revoked also when a later one is silent about it.
func (s *Set) Import(m *SignedManifest, now int64) error {
	if last, known := s.Serials[m.Name]; known && m.Serial <= last {
		return fmt.Errorf("%w (%d)", ErrOlder, last)
	}
	s.Values = slices.DeleteFunc(s.Values, func(v Value) bool {
		return v.Source == Manifest && v.Detail == m.Name && v.State == Approved
	})
	for _, l := range m.Launchers {
		d, err := ParseDigest(l.SHA256)
		if err != nil {
			return err
		}
		if err := s.put(Value{Digest: d, Path: l.Path, Source: Manifest, State: Approved, Detail: m.Name, Time: now}); err != nil {
			return err
		}
	}
	for _, r := range m.Revoked {
		d, err := ParseDigest(r)
		if err != nil {
			return err
		}
		if err := s.Revoke(d, "", now); err != nil {
			return err
		}
	}
	if len(s.Serials) >= MaxValues {
		return errFull
	}
	s.Serials[m.Name] = m.Serial
	return nil
}
