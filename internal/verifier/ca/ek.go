package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"virt-trust/internal/vtpm/ekcert"
)

// MaxEKCertificate bounds an EK certificate, DER.
const MaxEKCertificate = 8 << 10

// Manufacturers is which EK certificates are a TPM's.
type Manufacturers struct {
	anchors *x509.CertPool
	n       int
	// VTPM takes an EK certificate of a virt-trust vTPM for good where it chains to
	// an anchor: for hosts that are VMs themselves.
	VTPM bool
}

// NewManufacturers makes each of the certificates an anchor: a manufacturer's root,
// or one of its intermediates where an admin trusts that alone.
func NewManufacturers(certs []*x509.Certificate) (*Manufacturers, error) {
	m := &Manufacturers{anchors: x509.NewCertPool()}
	for _, c := range certs {
		if !c.IsCA || !c.BasicConstraintsValid {
			return nil, fmt.Errorf("the certificate of %q is not one of a CA", c.Subject)
		}
		m.anchors.AddCert(plain(c))
		m.n++
	}
	return m, nil
}

var (
	oidSAN           = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidRSAOAEP       = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7}
	vtpmPolicyPrefix = ekcert.PolicyManufactured[:strings.LastIndexByte(ekcert.PolicyManufactured, '.')+1]
)

// plain gives the certificate without what crypto/x509 takes for unknown and
// EK certificates have: a critical SubjectAltName of a directoryName alone (EK
// Credential Profile, 3.2.9).
func plain(c *x509.Certificate) *x509.Certificate {
	d := *c
	d.UnhandledCriticalExtensions = slices.DeleteFunc(slices.Clone(c.UnhandledCriticalExtensions), func(o asn1.ObjectIdentifier) bool { return o.Equal(oidSAN) })
	return &d
}

// EKDigest is how an EK is known: SHA-256 of its SubjectPublicKeyInfo, in
// hexadecimal.
func EKDigest(key crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", err
	}
	d := sha256.Sum256(der)
	return hex.EncodeToString(d[:]), nil
}

// VerifyEK says whether the EK is known to be a TPM's by its certificate, DER,
// empty for none. A Refusal that Doubtful knows leaves it to an operator; any
// other is final.
func (m *Manufacturers) VerifyEK(ek crypto.PublicKey, der []byte, now time.Time) error {
	if len(der) == 0 {
		return refuse(EKNoCert, "the TPM has no EK certificate")
	}
	if len(der) > MaxEKCertificate {
		return refuse(EKCertBad, "the EK certificate has %d bytes", len(der))
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return refuse(EKCertBad, "the EK certificate: %v", err)
	}
	if !m.VTPM && virtual(c) {
		return refuse(EKIsVTPM, "the EK certificate is one of a vTPM, issued by %q", c.Issuer.String())
	}
	switch same, err := certifies(c, ek); {
	case err != nil:
		return refuse(EKCertBad, "the EK certificate: %v", err)
	case !same:
		return refuse(EKOther, "the EK certificate is for another key")
	}
	if c.IsCA || !slices.ContainsFunc(c.UnknownExtKeyUsage, OIDEKCertificate.Equal) {
		return refuse(EKNotEK, "the EK certificate, issued by %q, is not for an EK (tcg-kp-EKCertificate)", c.Issuer.String())
	}
	if now.Before(c.NotBefore) || now.After(c.NotAfter) {
		return refuse(EKExpired, "the EK certificate is good from %s to %s", c.NotBefore.Format(time.DateOnly), c.NotAfter.Format(time.DateOnly))
	}
	// The use was looked at above: those in intermediates are not always right.
	chains, err := plain(c).Verify(x509.VerifyOptions{Roots: m.anchors, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return refuse(EKUnknownRoot, "the EK certificate, issued by %q, does not chain to a configured TPM manufacturer: %v", c.Issuer.String(), err)
	}
	// What a node's certifier signed is a vTPM's, whatever it says, even where
	// somebody made our own CA an anchor.
	for _, chain := range chains {
		for _, above := range chain[1:] {
			if _, err := UntrustedIdentity(above); err == nil && !m.VTPM {
				return refuse(EKIsVTPM, "the EK certificate was issued by a node's certifier")
			}
		}
	}
	return nil
}

// Doubtful tells refusals of an EK that an operator may overrule by approving it.
func Doubtful(code Code) bool {
	return slices.Contains([]Code{EKNoCert, EKCertBad, EKNotEK, EKExpired, EKUnknownRoot}, code)
}

// certifies reports whether the certificate is over the key. Some manufacturers
// name the key's algorithm id-RSAES-OAEP (RFC 4055, 4.1), which crypto/x509 does
// not read.
func certifies(c *x509.Certificate, ek crypto.PublicKey) (bool, error) {
	key := c.PublicKey
	if key == nil {
		var spki struct {
			Algorithm struct {
				OID        asn1.ObjectIdentifier
				Parameters asn1.RawValue `asn1:"optional"`
			}
			Key asn1.BitString
		}
		if _, err := asn1.Unmarshal(c.RawSubjectPublicKeyInfo, &spki); err != nil {
			return false, err
		}
		if !spki.Algorithm.OID.Equal(oidRSAOAEP) {
			return false, fmt.Errorf("it is over a key of algorithm %s", spki.Algorithm.OID)
		}
		k, err := x509.ParsePKCS1PublicKey(spki.Key.RightAlign())
		if err != nil {
			return false, err
		}
		key = k
	}
	switch k := key.(type) {
	case *rsa.PublicKey:
		return k.Equal(ek), nil
	case *ecdsa.PublicKey:
		return k.Equal(ek), nil
	}
	return false, fmt.Errorf("it is over a %T", key)
}

// virtual tells a certificate that virt-trust gave a vTPM: by its policy, its
// model or the VM that it names.
func virtual(c *x509.Certificate) bool {
	for _, p := range c.Policies {
		if strings.HasPrefix(p.String(), vtpmPolicyPrefix) {
			return true
		}
	}
	for _, u := range c.URIs {
		if u.Scheme == "urn" {
			return true
		}
	}
	for _, e := range c.Extensions {
		if e.Id.Equal(oidSAN) && bytes.Contains(e.Value, []byte(ekcert.Model)) {
			return true
		}
	}
	return false
}
