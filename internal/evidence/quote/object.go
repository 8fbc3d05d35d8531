package quote

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"io"

	"github.com/google/go-tpm/tpm2"
)

// MaxPublic bounds a TPMT_PUBLIC, in bytes.
const MaxPublic = 1024

// Object is a public area (12.2.4, TPMT_PUBLIC).
type Object struct {
	Name []byte           // Part 1, 16: nameAlg ‖ H(area)
	Key  crypto.PublicKey // *rsa.PublicKey or *ecdsa.PublicKey
	area *tpm2.TPMTPublic
}

// ParsePublic reads a TPMT_PUBLIC of an RSA or ECC key. Whether the key is of
// some kind, and in some TPM, is another question. Errors: ErrFormat.
func ParsePublic(b []byte) (o *Object, err error) {
	defer caught(&err)
	if len(b) > MaxPublic {
		return nil, fmt.Errorf("%w: public area of %d bytes", ErrFormat, len(b))
	}
	area, err := tpm2.Unmarshal[tpm2.TPMTPublic](b)
	if err != nil {
		return nil, fmt.Errorf("%w: public area: %w", ErrFormat, err)
	}
	if !bytes.Equal(tpm2.Marshal(*area), b) {
		return nil, fmt.Errorf("%w: public area that something follows, or with bits that are reserved", ErrFormat)
	}
	if area.NameAlg != tpm2.TPMAlgSHA256 && area.NameAlg != tpm2.TPMAlgSHA384 && area.NameAlg != tpm2.TPMAlgSHA512 {
		return nil, fmt.Errorf("%w: Name of algorithm %#x", ErrFormat, uint16(area.NameAlg))
	}
	o = &Object{area: area}
	switch area.Type {
	case tpm2.TPMAlgRSA:
		o.Key, err = rsaKey(area)
	case tpm2.TPMAlgECC:
		o.Key, err = eccKey(area)
	default:
		err = fmt.Errorf("object of type %#x", uint16(area.Type))
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	name, err := tpm2.ObjectName(area)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	o.Name = name.Buffer
	return o, nil
}

// caught makes an error of a panic: go-tpm's unions panic where two fields of
// an area disagree.
func caught(err *error) {
	if r := recover(); r != nil {
		*err = fmt.Errorf("%w: %v", ErrFormat, r)
	}
}

func rsaKey(area *tpm2.TPMTPublic) (*rsa.PublicKey, error) {
	parms, err := area.Parameters.RSADetail()
	if err != nil {
		return nil, err
	}
	n, err := area.Unique.RSA()
	if err != nil {
		return nil, err
	}
	key, err := tpm2.RSAPub(parms, n)
	if err != nil {
		return nil, err
	}
	if key.N.BitLen() != int(parms.KeyBits) || key.N.BitLen() < 2048 || key.N.BitLen() > 4096 || key.E < 3 || key.E%2 == 0 || key.N.Bit(0) == 0 {
		return nil, fmt.Errorf("RSA key of %d bits with exponent %d", key.N.BitLen(), key.E)
	}
	return key, nil
}

func eccKey(area *tpm2.TPMTPublic) (*ecdsa.PublicKey, error) {
	parms, err := area.Parameters.ECCDetail()
	if err != nil {
		return nil, err
	}
	point, err := area.Unique.ECC()
	if err != nil {
		return nil, err
	}
	if _, err := tpm2.ECDHPub(parms, point); err != nil { // the point is on the curve
		return nil, err
	}
	return tpm2.ECDSAPub(parms, point)
}

// SPKI is the digest of the key as SubjectPublicKeyInfo in DER: SHA-256.
func (o *Object) SPKI() (d [sha256.Size]byte, err error) {
	der, err := x509.MarshalPKIXPublicKey(o.Key)
	if err != nil {
		return d, err
	}
	return sha256.Sum256(der), nil
}

// inTPM are the attributes of every key that was made in a TPM and never leaves
// it (8.3.3).
func (o *Object) inTPM() bool {
	a := o.area.ObjectAttributes
	return a.FixedTPM && a.FixedParent && a.SensitiveDataOrigin && !a.EncryptedDuplication && !a.STClear
}

func (o *Object) kind(ok bool, what string) error {
	if ok {
		return nil
	}
	return fmt.Errorf("%w: no %s", ErrKind, what)
}

// AK gives the key of an attestation key: restricted signing, ECDSA P-256 with
// SHA-256, made in its TPM for good. What it signs that begins with
// TPM_GENERATED, the TPM made. Errors: ErrKind.
func (o *Object) AK() (*ecdsa.PublicKey, error) {
	a := o.area.ObjectAttributes
	key, signs := o.signs()
	return key, o.kind(signs && o.inTPM() && a.Restricted, "attestation key: restricted, ECDSA P-256, SHA-256, fixedTPM")
}

// Certifier gives the key of a certifier: as an AK, but free to sign what it is
// given. Errors: ErrKind.
func (o *Object) Certifier() (*ecdsa.PublicKey, error) {
	a := o.area.ObjectAttributes
	key, signs := o.signs()
	return key, o.kind(signs && o.inTPM() && !a.Restricted, "certifier: ECDSA P-256, SHA-256, fixedTPM, not restricted")
}

// signs: a key of the one scheme that does nothing but sign.
func (o *Object) signs() (*ecdsa.PublicKey, bool) {
	key, ok := o.Key.(*ecdsa.PublicKey)
	a := o.area.ObjectAttributes
	if !ok || key.Curve != elliptic.P256() || o.area.NameAlg != tpm2.TPMAlgSHA256 || !a.SignEncrypt || a.Decrypt || a.X509Sign {
		return nil, false
	}
	parms, err := o.area.Parameters.ECCDetail()
	if err != nil || parms.Scheme.Scheme != tpm2.TPMAlgECDSA {
		return nil, false
	}
	scheme, err := parms.Scheme.Details.ECDSA()
	if err != nil || scheme.HashAlg != tpm2.TPMAlgSHA256 {
		return nil, false
	}
	return key, true
}

// Bind gives a bind key and its authPolicy: RSA of at least 2048 bits, decrypts
// with OAEP and SHA-256 and does nothing else, cannot leave its TPM, and is used
// by policy alone. The admin role (8.3.3.6) may be authorised as it likes: with
// fixedTPM and fixedParent all that it can do is certify the key. Errors:
// ErrKind.
func (o *Object) Bind() (key *rsa.PublicKey, authPolicy []byte, err error) {
	a := o.area.ObjectAttributes
	key, ok := o.Key.(*rsa.PublicKey)
	ok = ok && o.inTPM() && o.area.NameAlg == tpm2.TPMAlgSHA256 && a.Decrypt && !a.SignEncrypt && !a.Restricted && !a.UserWithAuth &&
		len(o.area.AuthPolicy.Buffer) == sha256.Size
	if ok {
		parms, err := o.area.Parameters.RSADetail()
		ok = err == nil && parms.Scheme.Scheme == tpm2.TPMAlgOAEP
		if ok {
			scheme, err := parms.Scheme.Details.OAEP()
			ok = err == nil && scheme.HashAlg == tpm2.TPMAlgSHA256
		}
	}
	if !ok {
		return nil, nil, o.kind(false, "bind key: RSA, OAEP with SHA-256, decrypt only, fixedTPM, used by policy alone")
	}
	return key, o.area.AuthPolicy.Buffer, nil
}

// EK checks that the object is an endorsement key: restricted decryption, made
// in its TPM for good, AES for what it protects (EK Credential Profile, B.3, B.4).
// Errors: ErrKind.
func (o *Object) EK() error {
	a := o.area.ObjectAttributes
	symmetric, ok := o.symmetric()
	return o.kind(ok && o.inTPM() && a.Restricted && a.Decrypt && !a.SignEncrypt && symmetric.Algorithm == tpm2.TPMAlgAES, "endorsement key: restricted decryption, fixedTPM, AES in CFB")
}

func (o *Object) symmetric() (s tpm2.TPMTSymDefObject, ok bool) {
	if o.area.Type == tpm2.TPMAlgRSA {
		parms, err := o.area.Parameters.RSADetail()
		if err != nil {
			return s, false
		}
		s = parms.Symmetric
	} else {
		parms, err := o.area.Parameters.ECCDetail()
		if err != nil {
			return s, false
		}
		s = parms.Symmetric
	}
	if s.Algorithm != tpm2.TPMAlgAES {
		return s, false
	}
	mode, err := s.Mode.AES()
	if err != nil || *mode != tpm2.TPMAlgCFB {
		return s, false
	}
	bits, err := s.KeyBits.AES()
	return s, err == nil && (*bits == 128 || *bits == 256)
}

// MakeCredential protects a secret, of at most 32 bytes, so that only the TPM with
// this EK tells it, and only if it holds an object of that Name (TPM2_MakeCredential:
// Part 1, 24.5; B.10.4 and C.6.4 for the seed). The results are a TPM2B_ID_OBJECT and a
// TPM2B_ENCRYPTED_SECRET, as TPM2_ActivateCredential takes them. random is read
// for the seed.
func MakeCredential(random io.Reader, ek *Object, name, secret []byte) (idObject, encryptedSecret []byte, err error) {
	defer caught(&err)
	if err := ek.EK(); err != nil {
		return nil, nil, err
	}
	if len(secret) == 0 || len(secret) > sha256.Size || len(name) < 2+sha256.Size {
		return nil, nil, fmt.Errorf("%w: secret of %d bytes for a Name of %d", ErrFormat, len(secret), len(name))
	}
	key, err := tpm2.ImportEncapsulationKey(ek.area)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrKind, err)
	}
	id, encrypted, err := tpm2.CreateCredential(random, key, name, secret)
	if err != nil {
		return nil, nil, fmt.Errorf("make credential: %w", err)
	}
	return sized(id), sized(encrypted), nil
}
