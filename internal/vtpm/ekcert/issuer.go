package ekcert

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"time"
)

// Bounds of a certifier's chain.
const (
	MaxChain = 64 << 10 // bytes of PEM
	maxDepth = 8        // certificates
)

// Name is the subject of every certificate over a certifier, whoever signs it:
// it follows from the key, so that what the certifier has issued under its own
// certificate chains to a CA's too.
func Name(certifier *ecdsa.PublicKey) (pkix.Name, error) {
	id, err := keyID(certifier)
	if err != nil {
		return pkix.Name{}, err
	}
	return pkix.Name{Organization: []string{"virt-trust"}, CommonName: "vTPM certifier " + hex.EncodeToString(id)}, nil
}

// IssuerTemplate is what a certificate over a certifier says, for a CA to add
// its serial number and validity: subject, key id, and that it may issue for end
// entities alone.
func IssuerTemplate(certifier *ecdsa.PublicKey) (*x509.Certificate, error) {
	id, err := keyID(certifier)
	if err != nil {
		return nil, err
	}
	name, err := Name(certifier)
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		Subject: name, SubjectKeyId: id, KeyUsage: x509.KeyUsageCertSign,
		BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
	}, nil
}

// SelfSigned makes the certificate that a certifier has until a CA gives it one.
func SelfSigned(certifier crypto.Signer, random [SerialSize]byte, now time.Time) ([]byte, error) {
	key, ok := certifier.Public().(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("a certifier with a key of type %T", certifier.Public())
	}
	t, err := IssuerTemplate(key)
	if err != nil {
		return nil, err
	}
	t.SerialNumber, t.NotBefore, t.NotAfter = serial(random), now.UTC().Truncate(time.Minute), noEnd
	return x509.CreateCertificate(nil, t, t, key, certifier)
}

// ParseChain reads certificates in PEM, the certifier's first; nothing else may
// stand there.
func ParseChain(chain []byte) ([]*x509.Certificate, error) {
	if len(chain) > MaxChain {
		return nil, fmt.Errorf("a chain of %d bytes is too long", len(chain))
	}
	var all []*x509.Certificate
	for rest := bytes.TrimSpace(chain); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		if !bytes.HasPrefix(rest, []byte("-----BEGIN ")) {
			return nil, errors.New("not certificates in PEM, one after the other")
		}
		b, after := pem.Decode(rest)
		if b == nil || b.Type != "CERTIFICATE" || len(b.Headers) > 0 {
			return nil, errors.New("not certificates in PEM, one after the other")
		}
		if len(all) == maxDepth {
			return nil, fmt.Errorf("more than %d certificates", maxDepth)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, err
		}
		all, rest = append(all, c), after
	}
	if len(all) == 0 {
		return nil, errors.New("there is no certificate")
	}
	return all, nil
}

// EncodeChain undoes ParseChain.
func EncodeChain(chain []*x509.Certificate) []byte {
	var b []byte
	for _, c := range chain {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return b
}

// IssuedBy reports whether a certificate, in DER, is of this profile and was
// signed by this certifier.
func IssuedBy(der []byte, certifier *ecdsa.PublicKey) bool {
	if _, err := UntrustedParse(der); err != nil {
		return false
	}
	c, err := x509.ParseCertificate(der)
	if err != nil || c.SignatureAlgorithm != x509.ECDSAWithSHA256 {
		return false
	}
	digest := sha256.Sum256(c.RawTBSCertificate)
	return ecdsa.VerifyASN1(certifier, digest[:], c.Signature)
}

// VerifyChain checks that a chain may stand above what the certifier issues: its
// first certificate is over this key, under its Name and key id, and may issue
// for end entities alone; each other one has signed the one before it, and may;
// all are valid now. Whom the last one belongs to is not judged: those judge who
// rely on the chain.
func VerifyChain(chain []*x509.Certificate, certifier *ecdsa.PublicKey, now time.Time) error {
	if len(chain) == 0 || len(chain) > maxDepth {
		return fmt.Errorf("a chain of %d certificates", len(chain))
	}
	want, err := IssuerTemplate(certifier)
	if err != nil {
		return err
	}
	name, err := asn1.Marshal(want.Subject.ToRDNSequence())
	if err != nil {
		return err
	}
	c := chain[0]
	switch k, ok := c.PublicKey.(*ecdsa.PublicKey); {
	case !ok || !k.Equal(certifier):
		return errors.New("the first certificate is over another key than this host's certifier")
	case !bytes.Equal(c.RawSubject, name):
		return fmt.Errorf("the certifier's subject is %q, not %.200q", want.Subject, c.Subject.String())
	case !bytes.Equal(c.SubjectKeyId, want.SubjectKeyId):
		return fmt.Errorf("the certifier's key id is %x, not %.40x", want.SubjectKeyId, c.SubjectKeyId)
	case !c.BasicConstraintsValid || !c.IsCA || c.MaxPathLen != 0 || !c.MaxPathLenZero:
		return errors.New("the certifier's certificate is not that of a CA with the path length 0")
	case c.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("the certifier's certificate is not for signing certificates")
	}
	for i, c := range chain {
		if now.Before(c.NotBefore) || now.After(c.NotAfter) {
			return fmt.Errorf("certificate %d of the chain is valid from %s to %s, and it is %s", i+1,
				c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
		}
		if len(c.UnhandledCriticalExtensions) > 0 {
			return fmt.Errorf("certificate %d of the chain has a critical extension that is not known", i+1)
		}
		above := c
		if i+1 < len(chain) {
			above = chain[i+1]
			// Certificates below it, end entities aside, of which none is self-issued.
			if above.MaxPathLen >= 0 && (above.MaxPathLen > 0 || above.MaxPathLenZero) && above.MaxPathLen < i+1 {
				return fmt.Errorf("certificate %d of the chain has the path length %d", i+2, above.MaxPathLen)
			}
		} else if !bytes.Equal(c.RawIssuer, c.RawSubject) {
			return nil // ends below a root that others know
		}
		if !bytes.Equal(c.RawIssuer, above.RawSubject) {
			return fmt.Errorf("certificate %d of the chain was not issued by the next one", i+1)
		}
		if err := c.CheckSignatureFrom(above); err != nil { // also that it is a CA's
			return fmt.Errorf("certificate %d of the chain: %w", i+1, err)
		}
	}
	return nil
}
