// Package ekcert is the profile of the certificates that a host gives its
// vTPMs: of their endorsement keys, of the platform that a VM is, and of the AK
// that a vTPM may get at its manufacture. The host's certifier, a key in its
// TPM, signs them. The package is pure: keys, serial numbers and times come from
// the caller; what signs is a crypto.Signer.
//
// The profile, after the TCG EK Credential Profile 2.3 for TPM Family 2.0:
//
//	version, serial    v3; 127 bits, random
//	issuer             the certifier's name: see Name
//	validity           from the minute of issue; to 9999-12-31T23:59:59Z, which says
//	                   that nobody knows an end (RFC 5280, 4.1.2.5): a key in a TPM
//	                   does not wear out
//	subject            empty: a VM's name changes, and nothing vouches for it
//	subject key        EK: RSA 2048 or 3072, or ECC P-256 or P-384
//	authorityKeyId     leftmost 160 bits of SHA-256 of the key (RFC 7093, 2 (1)),
//	subjectKeyId       so that a new certificate over the same certifier takes the
//	                   place of an older one
//	keyUsage           critical; RSA EK and platform: keyEncipherment; ECC EK:
//	                   keyAgreement; AK: digitalSignature
//	basicConstraints   critical; no CA
//	extKeyUsage        EK: tcg-kp-EKCertificate; platform:
//	                   tcg-kp-PlatformAttributeCertificate; AK: tcg-kp-AIKCertificate
//	subjectAltName     critical, since the subject is empty; a directoryName with
//	                   tcg-at-tpmManufacturer and tcg-at-tpmVersion as swtpm gives
//	                   them, tcg-at-tpmModel "virt-trust vTPM", for the platform its
//	                   manufacturer, model and version too; and the URI
//	                   urn:uuid:UUID of the VM
//	subjectDirectoryAttributes  EK: tPMSpecification
//	certificatePolicies  PolicyManufactured or PolicyTakenIn
//
// A vTPM is told from a hardware TPM by its policy, its model, the urn:uuid, and
// by its chain, which ends at the certifier or at a Verifier's CA and never at a
// TPM manufacturer's root. A name constraint could not say as much: there is none
// for directory attributes.
package ekcert

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"regexp"
	"strings"
	"time"
)

// MaxCertificate is what an NV index of a vTPM holds, in bytes of DER (libtpms,
// MAX_NV_INDEX_SIZE).
const MaxCertificate = 2048

// MaxPublicKey bounds a SubjectPublicKeyInfo in DER: RSA 3072 takes 422 bytes.
const MaxPublicKey = 1024

// SerialSize is that of a serial number, in bytes.
const SerialSize = 16

// Kind is what a certificate is about.
type Kind string

// The kinds; EK and Platform are swtpm_setup's words.
const (
	EK       Kind = "ek"
	Platform Kind = "platform"
	AK       Kind = "ak"
)

// Origin says what stands behind a certificate. It becomes the policy.
type Origin string

// The origins.
const (
	// Manufactured: the vTPM was made on this host, for this VM, under keys that
	// the host's TPM holds; its EK has never been readable at rest.
	Manufactured Origin = "manufactured"
	// TakenIn: the vTPM was there before, in the clear, and an admin has had a
	// certificate made for it. Others may have its keys.
	TakenIn Origin = "taken-in"
)

// Policies under 2.25.UUID (X.667, 7), with a UUID of our own.
const (
	policyArc          = "2.25.4682018360689031638891459905816600515"
	PolicyManufactured = policyArc + ".1"
	PolicyTakenIn      = policyArc + ".2"
)

// Model is tcg-at-tpmModel of all vTPMs.
const Model = "virt-trust vTPM"

// TPM is what swtpm says of itself, and what libtpms implements.
type TPM struct {
	Manufacturer string // "id:" and 8 hexadecimal digits: TPM_PT_MANUFACTURER
	Version      string // "id:" and 8 hexadecimal digits: the firmware's
	Family       string // of the specification: "2.0"
	Level        int
	Revision     int // times 100: 164
}

// Request is what a certificate shall say.
type Request struct {
	Kind   Kind
	Key    crypto.PublicKey // *rsa.PublicKey or *ecdsa.PublicKey
	VM     string           // its UUID
	Origin Origin
	TPM    TPM
	Serial [SerialSize]byte // random
	Now    time.Time
}

var (
	oidSAN          = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidAttributes   = asn1.ObjectIdentifier{2, 5, 29, 9}
	oidManufacturer = asn1.ObjectIdentifier{2, 23, 133, 2, 1}  // tcg-at-tpmManufacturer
	oidModel        = asn1.ObjectIdentifier{2, 23, 133, 2, 2}  // tcg-at-tpmModel
	oidVersion      = asn1.ObjectIdentifier{2, 23, 133, 2, 3}  // tcg-at-tpmVersion
	oidSpec         = asn1.ObjectIdentifier{2, 23, 133, 2, 16} // tcg-at-tpmSpecification

	// Platform Certificate Profile 1.1, 3.2.7
	oidPlatformManufacturer = asn1.ObjectIdentifier{2, 23, 133, 5, 1, 1}
	oidPlatformModel        = asn1.ObjectIdentifier{2, 23, 133, 5, 1, 4}
	oidPlatformVersion      = asn1.ObjectIdentifier{2, 23, 133, 5, 1, 5}
)

// usages are the extended ones of each kind (TCG OID registry, tcg-kp).
var usages = map[Kind]asn1.ObjectIdentifier{
	EK:       {2, 23, 133, 8, 1},
	Platform: {2, 23, 133, 8, 2},
	AK:       {2, 23, 133, 8, 3},
}

var (
	idPattern   = regexp.MustCompile(`^id:[0-9A-Fa-f]{8}$`)
	uuidPattern = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
)

// check says what is wrong with a request, which comes from swtpm's user.
func (r Request) check() error {
	switch {
	case usages[r.Kind] == nil:
		return fmt.Errorf("there are no certificates of the kind %.20q", r.Kind)
	case !uuidPattern.MatchString(r.VM):
		return fmt.Errorf("%.60q is not the UUID of a VM", r.VM)
	case r.Origin != Manufactured && r.Origin != TakenIn:
		return fmt.Errorf("the origin %.20q is not known", r.Origin)
	case r.TPM.Family != "2.0":
		return fmt.Errorf("a TPM of family %.20q gets no certificate; only 2.0 does", r.TPM.Family)
	case !idPattern.MatchString(r.TPM.Manufacturer) || !idPattern.MatchString(r.TPM.Version):
		return fmt.Errorf("manufacturer %.20q or version %.20q of the TPM is not \"id:\" and eight hexadecimal digits", r.TPM.Manufacturer, r.TPM.Version)
	case r.TPM.Level < 0 || r.TPM.Level > 1<<16 || r.TPM.Revision < 0 || r.TPM.Revision > 1<<16:
		return fmt.Errorf("level %d or revision %d of the TPM's specification is out of range", r.TPM.Level, r.TPM.Revision)
	}
	return checkKey(r.Kind, r.Key)
}

func checkKey(kind Kind, key crypto.PublicKey) error {
	switch k := key.(type) {
	case *rsa.PublicKey:
		if n := k.N.BitLen(); kind == AK || n != 2048 && n != 3072 || k.E != 65537 {
			return fmt.Errorf("an RSA key of %d bits with the exponent %d is no %s", n, k.E, kind)
		}
	case *ecdsa.PublicKey:
		if kind == Platform || k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return fmt.Errorf("a key on %s is no %s", k.Curve.Params().Name, kind)
		}
	default:
		return fmt.Errorf("a key of type %T is no %s", key, kind)
	}
	return nil
}

// ParseKey reads a SubjectPublicKeyInfo in DER, at most MaxPublicKey bytes, in
// the one encoding that it has.
func ParseKey(spki []byte) (crypto.PublicKey, error) {
	if len(spki) > MaxPublicKey {
		return nil, fmt.Errorf("a public key of %d bytes is too long", len(spki))
	}
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, err
	}
	if again, err := x509.MarshalPKIXPublicKey(key); err != nil || !bytes.Equal(again, spki) {
		return nil, errors.New("a public key in another than its one encoding")
	}
	return key, nil
}

// Issue makes a certificate in DER. What it says of its issuer follows from the
// certifier's key, whichever certificate that has at the time.
func Issue(r Request, certifier crypto.Signer) ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	key, ok := certifier.Public().(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("a certifier with a key of type %T", certifier.Public())
	}
	issuer, err := IssuerTemplate(key)
	if err != nil {
		return nil, err
	}
	id, err := keyID(r.Key)
	if err != nil {
		return nil, err
	}
	san, err := r.altName()
	if err != nil {
		return nil, err
	}
	policy, err := x509.ParseOID(map[Origin]string{Manufactured: PolicyManufactured, TakenIn: PolicyTakenIn}[r.Origin])
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: serial(r.Serial), NotBefore: r.Now.UTC().Truncate(time.Minute), NotAfter: noEnd,
		KeyUsage: r.keyUsage(), UnknownExtKeyUsage: []asn1.ObjectIdentifier{usages[r.Kind]},
		BasicConstraintsValid: true, SubjectKeyId: id, Policies: []x509.OID{policy},
		ExtraExtensions: []pkix.Extension{san},
	}
	if r.Kind == EK {
		spec, err := r.specification()
		if err != nil {
			return nil, err
		}
		t.ExtraExtensions = append(t.ExtraExtensions, spec)
	}
	der, err := x509.CreateCertificate(nil, t, issuer, r.Key, certifier)
	if err != nil {
		return nil, err
	}
	if len(der) > MaxCertificate {
		return nil, fmt.Errorf("the certificate has %d bytes, at most %d fit into a vTPM", len(der), MaxCertificate)
	}
	return der, nil
}

// noEnd is GeneralizedTime 99991231235959Z.
var noEnd = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

func serial(b [SerialSize]byte) *big.Int {
	b[0] &= 0x7f
	n := new(big.Int).SetBytes(b[:])
	if n.Sign() == 0 {
		n.SetInt64(1) // RFC 5280, 4.1.2.2: positive
	}
	return n
}

func (r Request) keyUsage() x509.KeyUsage {
	if r.Kind == AK {
		return x509.KeyUsageDigitalSignature
	}
	if _, ok := r.Key.(*ecdsa.PublicKey); ok {
		return x509.KeyUsageKeyAgreement
	}
	return x509.KeyUsageKeyEncipherment
}

// keyID is RFC 7093, 2 (1), which crypto/x509 takes too for a CA without one.
func keyID(key crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, err
	}
	var spki struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &spki); err != nil {
		return nil, err
	}
	h := sha256.Sum256(spki.Key.RightAlign())
	return h[:20], nil
}

// altName is the SubjectAltName: GeneralName's [4] directoryName, and [6] URI.
func (r Request) altName() (pkix.Extension, error) {
	type utf8 struct {
		Type  asn1.ObjectIdentifier
		Value string `asn1:"utf8"`
	}
	type set []utf8
	names := []asn1.RawValue{}
	add := func(oid asn1.ObjectIdentifier, v string) error {
		der, err := asn1.MarshalWithParams(set{{oid, v}}, "set")
		names = append(names, asn1.RawValue{FullBytes: der})
		return err
	}
	err := errors.Join(add(oidManufacturer, "id:"+strings.ToUpper(r.TPM.Manufacturer[3:])), add(oidModel, Model), add(oidVersion, "id:"+strings.ToUpper(r.TPM.Version[3:])))
	if r.Kind == Platform {
		err = errors.Join(err, add(oidPlatformManufacturer, "virt-trust"), add(oidPlatformModel, "KVM virtual machine"), add(oidPlatformVersion, "1"))
	}
	if err != nil {
		return pkix.Extension{}, err
	}
	directory, err := asn1.Marshal(names)
	if err != nil {
		return pkix.Extension{}, err
	}
	der, err := asn1.Marshal([]asn1.RawValue{
		// A Name is a CHOICE, so that [4] is explicit (X.680, 31.2.7).
		{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: directory},
		{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte("urn:uuid:" + r.VM)},
	})
	return pkix.Extension{Id: oidSAN, Critical: true, Value: der}, err
}

// specification is SubjectDirectoryAttributes with tPMSpecification (EK
// Credential Profile, 3.2.10).
func (r Request) specification() (pkix.Extension, error) {
	type spec struct {
		Family          string `asn1:"utf8"`
		Level, Revision int
	}
	der, err := asn1.Marshal([]struct {
		Type   asn1.ObjectIdentifier
		Values []spec `asn1:"set"`
	}{{oidSpec, []spec{{r.TPM.Family, r.TPM.Level, r.TPM.Revision}}}})
	return pkix.Extension{Id: oidAttributes, Value: der}, err
}

// Said is what a certificate of this profile says of its vTPM.
type Said struct {
	Kind   Kind
	VM     string
	Origin Origin
	Key    crypto.PublicKey
	KeyID  string // SHA-256 of the key as SubjectPublicKeyInfo, in hexadecimal
	Issuer string
	Serial string // hexadecimal
	From   time.Time
}

// UntrustedParse reads a certificate of this profile. Its signature is not
// looked at.
func UntrustedParse(der []byte) (Said, error) {
	if len(der) > MaxCertificate {
		return Said{}, fmt.Errorf("a certificate of %d bytes is too long", len(der))
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return Said{}, err
	}
	spki := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	s := Said{Key: c.PublicKey, KeyID: hex.EncodeToString(spki[:]), Issuer: c.Issuer.String(), Serial: c.SerialNumber.Text(16), From: c.NotBefore}
	for kind, usage := range usages {
		if len(c.UnknownExtKeyUsage) == 1 && len(c.ExtKeyUsage) == 0 && c.UnknownExtKeyUsage[0].Equal(usage) {
			s.Kind = kind
		}
	}
	for _, p := range c.Policies {
		switch p.String() {
		case PolicyManufactured:
			s.Origin = Manufactured
		case PolicyTakenIn:
			s.Origin = TakenIn
		}
	}
	if len(c.URIs) == 1 {
		s.VM = vmOf(c.URIs[0])
	}
	if s.Kind == "" || s.Origin == "" || s.VM == "" || c.IsCA {
		return Said{}, errors.New("not a certificate of a vTPM")
	}
	return s, checkKey(s.Kind, s.Key)
}

func vmOf(u *url.URL) string {
	if rest, ok := strings.CutPrefix(u.String(), "urn:uuid:"); ok && uuidPattern.MatchString(rest) {
		return rest
	}
	return ""
}
