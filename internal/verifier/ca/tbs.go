package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Bounds of what the CA signs.
const (
	MaxTBS  = 8 << 10   // of a certificate
	MaxCRL  = 1 << 20   // more than 25,000 certificates
	maxSkew = time.Hour // between the clocks of the Verifier and of who holds its key
	slack   = time.Minute
)

// CheckTBS says whether the CA whose certificate is root signs these bytes: a
// TBSCertificate of a node, a certifier or the Verifier, or a revocation list, each
// within its limits, and in the encoding that it has when it is read. Who holds the
// key asks it too (virt-trust-signer): a Verifier that was taken over gets no
// certificate that outlives its day, and no second CA.
func CheckTBS(root *x509.Certificate, tbs []byte, now time.Time) error {
	if len(tbs) > MaxCRL {
		return fmt.Errorf("%d bytes to be signed, at most %d", len(tbs), MaxCRL)
	}
	wrapped, list, err := sealWithNothing(tbs)
	if err != nil {
		return err
	}
	if list {
		l, err := x509.ParseRevocationList(wrapped)
		if err != nil {
			return fmt.Errorf("what is to be signed is no revocation list: %w", err)
		}
		return checkCRL(root, l, tbs, now)
	}
	if len(tbs) > MaxTBS {
		return fmt.Errorf("a certificate of %d bytes, at most %d", len(tbs), MaxTBS)
	}
	c, err := x509.ParseCertificate(wrapped)
	if err != nil {
		return fmt.Errorf("what is to be signed is no certificate: %w", err)
	}
	return checkCertificate(root, c, tbs, now)
}

// sealWithNothing makes a certificate, or a revocation list, with an empty signature
// out of what is to be signed, so that it can be read (RFC 5280, 4.1 and 5.1).
func sealWithNothing(tbs []byte) (sealed []byte, list bool, err error) {
	bad := errors.New("what is to be signed is no DER of a certificate or revocation list")
	in := cryptobyte.String(tbs)
	var body, algorithm cryptobyte.String
	if !in.ReadASN1(&body, cbasn1.SEQUENCE) || !in.Empty() {
		return nil, false, bad
	}
	// Of a certificate: version, serial number, signature algorithm; of a list without
	// the number, and the version is no field of its own.
	list = body.PeekASN1Tag(cbasn1.INTEGER)
	if !list && !body.SkipASN1(cbasn1.Tag(0).Constructed().ContextSpecific()) || !body.SkipASN1(cbasn1.INTEGER) || !body.ReadASN1Element(&algorithm, cbasn1.SEQUENCE) {
		return nil, false, bad
	}
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes(algorithm)
		b.AddASN1BitString([]byte{0})
	})
	sealed, err = b.Bytes()
	return sealed, list, err
}

func checkCertificate(root, c *x509.Certificate, tbs []byte, now time.Time) error {
	alg, err := algorithm(root.PublicKey)
	switch {
	case err != nil:
		return err
	case !bytes.Equal(c.RawTBSCertificate, tbs):
		return errors.New("a certificate that reads otherwise than it is written")
	case !bytes.Equal(c.RawIssuer, root.RawSubject) || !bytes.Equal(c.AuthorityKeyId, root.SubjectKeyId) || c.SignatureAlgorithm != alg:
		return errors.New("a certificate of another CA")
	case bytes.Equal(c.RawSubject, root.RawSubject) || bytes.Equal(c.RawSubjectPublicKeyInfo, root.RawSubjectPublicKeyInfo):
		return errors.New("a second certificate of the CA itself")
	case c.SerialNumber.Sign() <= 0 || c.SerialNumber.BitLen() < 64:
		return errors.New("a serial number that can be guessed")
	case !c.BasicConstraintsValid:
		return errors.New("a certificate that does not say whether it is a CA's")
	case len(c.UnhandledCriticalExtensions) > 0 || len(c.Policies) > 0:
		return errors.New("a certificate with extensions that this CA never gives")
	case len(c.EmailAddresses) > 0:
		return errors.New("a certificate of people")
	case len(c.CRLDistributionPoints) > 1:
		return errors.New("a certificate with more than one revocation list")
	}
	if err := strongEnough(c.PublicKey); err != nil {
		return err
	}
	kind, err := kindOf(c)
	if err != nil {
		return err
	}
	if c.NotBefore.After(now.Add(maxSkew)) || c.NotAfter.Sub(c.NotBefore) > kind.lifetime+backdate+slack || c.NotAfter.After(now.Add(kind.lifetime+maxSkew)) {
		return fmt.Errorf("a certificate of %s that is good for too long: from %s to %s", kind.what, c.NotBefore.Format(time.RFC3339), c.NotAfter.Format(time.RFC3339))
	}
	return nil
}

type kind struct {
	what     string
	lifetime time.Duration
}

// kindOf tells the three certificates apart, each by all that it has to have.
func kindOf(c *x509.Certificate) (kind, error) {
	id, idErr := UntrustedIdentity(c)
	names := len(c.DNSNames) + len(c.IPAddresses)
	known := slices.Clone(c.ExtKeyUsage)
	slices.Sort(known)
	switch {
	case c.IsCA:
		if idErr != nil || names+len(c.URIs) > 0 || len(known) > 0 || !c.MaxPathLenZero || c.KeyUsage != x509.KeyUsageCertSign ||
			!slices.EqualFunc(c.UnknownExtKeyUsage, certifierUses, asn1.ObjectIdentifier.Equal) {
			return kind{}, errors.New("a CA certificate that is not one of a node's certifier")
		}
		return kind{"a certifier", CertifierLifetime}, nil
	case c.KeyUsage != x509.KeyUsageDigitalSignature || len(c.UnknownExtKeyUsage) > 0:
		return kind{}, errors.New("a certificate with uses that this CA never gives")
	case idErr == nil:
		if names > 0 || len(c.URIs) != 1 || c.URIs[0].String() != nodeURI(id.Node).String() ||
			!slices.Equal(known, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) {
			return kind{}, errors.New("a node's certificate with names or uses that nodes do not have")
		}
		return kind{"a node", NodeLifetime}, nil
	case errors.Is(idErr, errNoIdentity):
		if names == 0 || len(c.URIs) > 0 || !slices.Equal(known, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}) {
			return kind{}, errors.New("a certificate that is neither a node's nor a Verifier's")
		}
		return kind{"the Verifier", ServerLifetime}, nil
	}
	return kind{}, idErr
}

// Describe says in a few words what is signed, for logs.
func Describe(tbs []byte) string {
	wrapped, list, err := sealWithNothing(tbs)
	if err != nil {
		return "nothing"
	}
	if list {
		l, err := x509.ParseRevocationList(wrapped)
		if err != nil {
			return "nothing"
		}
		return fmt.Sprintf("revocation list %s, with %d certificates", l.Number, len(l.RevokedCertificateEntries))
	}
	c, err := x509.ParseCertificate(wrapped)
	if err != nil {
		return "nothing"
	}
	k, err := kindOf(c)
	if err != nil {
		return "nothing"
	}
	return fmt.Sprintf("certificate %s of %s: %q", Serial(c), k.what, c.Subject.CommonName)
}
