// Package ca is the Verifier's certificate authority: who becomes a node, and
// which certificates are given. It holds the rules; the key is a crypto.Signer
// that is handed in (package cakey). It is pure.
//
// Revocation is a node's state in the store, which the Verifier looks at with each
// request. Others, who check a node's certificate or a vTPM's, have a revocation list.
//
// There is one level: the CA's key signs nodes' and the Verifier's own TLS
// certificates, and one CA certificate for each node's certifier, the key in the
// node's TPM that signs the EK certificates of its vTPMs. The CA has no state
// beside key and certificate: serial numbers are random, and what was given to
// whom stands in the store.
package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"virt-trust/internal/vtpm/ekcert"
)

// Lifetimes. A certificate begins backdate before it was given, for clocks that
// differ.
const (
	NodeLifetime      = 24 * time.Hour
	ServerLifetime    = 7 * 24 * time.Hour
	CertifierLifetime = 366 * 24 * time.Hour
	RootLifetime      = 20 * 366 * 24 * time.Hour
	backdate          = 10 * time.Minute
)

// Authority is the CA.
type Authority struct {
	cert   *x509.Certificate
	key    crypto.Signer // a crypto.MessageSigner, it may be
	random io.Reader
	// Points are the URLs of the revocation list that stand in certificates.
	Points []string
}

// New puts a CA together. key has to be the certificate's. Where it is a
// crypto.MessageSigner, whole certificates are given to it.
func New(cert *x509.Certificate, key crypto.Signer, random io.Reader) (*Authority, error) {
	if _, err := algorithm(cert.PublicKey); err != nil {
		return nil, fmt.Errorf("the CA's certificate: %w", err)
	}
	pub, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || !pub.Equal(key.Public()) {
		return nil, errors.New("the CA's key and certificate do not belong together")
	}
	if !cert.IsCA || !cert.BasicConstraintsValid || cert.KeyUsage&x509.KeyUsageCertSign == 0 || len(cert.SubjectKeyId) == 0 {
		return nil, errors.New("the CA's certificate is not one of a CA that signs certificates")
	}
	return &Authority{cert: cert, key: key, random: random}, nil
}

// Certificate is the CA's own.
func (a *Authority) Certificate() *x509.Certificate { return a.cert }

// Key is the CA's, for who holds it.
func (a *Authority) Key() crypto.Signer { return a.key }

// Pin is what nodes know the CA by.
func (a *Authority) Pin() Pin { return PinOf(a.cert) }

// Pool holds the CA alone.
func (a *Authority) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

func algorithm(key crypto.PublicKey) (x509.SignatureAlgorithm, error) {
	if k, ok := key.(*ecdsa.PublicKey); ok {
		switch k.Curve {
		case elliptic.P256():
			return x509.ECDSAWithSHA256, nil
		case elliptic.P384():
			return x509.ECDSAWithSHA384, nil
		}
	}
	return 0, errors.New("its key is neither ECDSA P-256 nor P-384")
}

// Root makes the CA's own certificate, DER.
func Root(key crypto.Signer, random io.Reader, name string, now time.Time) ([]byte, error) {
	t, err := rootTemplate(key.Public(), random, now)
	if err != nil {
		return nil, err
	}
	t.Subject = pkix.Name{CommonName: name, SerialNumber: hex.EncodeToString(t.SerialNumber.Bytes()[:4])}
	return x509.CreateCertificate(random, t, t, key.Public(), key)
}

func rootTemplate(key crypto.PublicKey, random io.Reader, now time.Time) (*x509.Certificate, error) {
	alg, err := algorithm(key)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial(random)
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber: serial, SignatureAlgorithm: alg, NotBefore: now.Add(-backdate), NotAfter: now.Add(RootLifetime),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: 1,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, nil
}

// newSerial gives 127 random bits (RFC 5280, 4.1.2.2: at most 20 octets,
// positive), the highest of them set, so that none is short.
func newSerial(random io.Reader) (*big.Int, error) {
	b := make([]byte, 16)
	if _, err := io.ReadFull(random, b); err != nil {
		return nil, fmt.Errorf("making a serial number: %w", err)
	}
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b), nil
}

// Serial spells a serial number as fleet.Node.Serial does.
func Serial(c *x509.Certificate) string { return hex.EncodeToString(c.SerialNumber.Bytes()) }

// Node gives the certificate over a node's TLS key, from its
// SubjectPublicKeyInfo.
func (a *Authority) Node(id Identity, spki []byte, now time.Time) (*x509.Certificate, error) {
	ext, err := id.extension()
	if err != nil {
		return nil, err
	}
	return a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: id.Name, OrganizationalUnit: []string{"virt-trust node"}},
		URIs:    []*url.URL{nodeURI(id.Node)},
		// No name that a TLS client looks for: a node is no Verifier.
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		ExtraExtensions: []pkix.Extension{ext}, CRLDistributionPoints: a.Points,
	}, spki, now, NodeLifetime)
}

func nodeURI(id string) *url.URL { return &url.URL{Scheme: "urn", Opaque: "uuid:" + id} }

// Certifier gives the CA certificate over a node's certifier: for certificates of
// vTPMs alone, directly under it. Subject and key id are those of package ekcert,
// so that what the certifier signed before chains to it too.
func (a *Authority) Certifier(id Identity, spki []byte, now time.Time) (*x509.Certificate, error) {
	ext, err := id.extension()
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, refuse(Malformed, "the certifier: %v", err)
	}
	k, ok := key.(*ecdsa.PublicKey)
	if !ok {
		return nil, refuse(CertifierBad, "the certifier is a %T", key)
	}
	t, err := ekcert.IssuerTemplate(k)
	if err != nil {
		return nil, err
	}
	t.UnknownExtKeyUsage = slices.Clone(certifierUses)
	t.ExtraExtensions, t.CRLDistributionPoints = append(t.ExtraExtensions, ext), a.Points
	return a.issue(t, spki, now, CertifierLifetime)
}

// Still says whether a certificate of a certifier is as Certifier would give it now,
// and good for a third of its time yet.
func (a *Authority) Still(c *x509.Certificate, id Identity, spki []byte, now time.Time) bool {
	ext, err := id.extension()
	return err == nil && c.IsCA && bytes.Equal(c.RawSubjectPublicKeyInfo, spki) && slices.Equal(c.CRLDistributionPoints, a.Points) &&
		slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(OIDNode) && bytes.Equal(e.Value, ext.Value) }) &&
		c.CheckSignatureFrom(a.cert) == nil && now.After(c.NotBefore) && now.Before(c.NotAfter.Add(-CertifierLifetime/3))
}

// Server gives a TLS certificate of the Verifier itself, for host names and
// addresses.
func (a *Authority) Server(names []string, spki []byte, now time.Time) (*x509.Certificate, error) {
	if len(names) == 0 {
		return nil, errors.New("the Verifier has no name: set those by which nodes and people reach it")
	}
	t := &x509.Certificate{
		Subject:  pkix.Name{CommonName: "virt-trust Verifier"},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, n := range names {
		if ip, err := netip.ParseAddr(n); err == nil {
			t.IPAddresses = append(t.IPAddresses, ip.AsSlice())
		} else {
			t.DNSNames = append(t.DNSNames, n)
		}
	}
	return a.issue(t, spki, now, ServerLifetime)
}

func (a *Authority) issue(t *x509.Certificate, spki []byte, now time.Time, lifetime time.Duration) (*x509.Certificate, error) {
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, refuse(Malformed, "the public key: %v", err)
	}
	t.BasicConstraintsValid = true
	t.NotBefore, t.NotAfter = now.Add(-backdate), now.Add(lifetime)
	if t.NotAfter.After(a.cert.NotAfter) {
		t.NotAfter = a.cert.NotAfter
	}
	if t.SignatureAlgorithm, err = algorithm(a.cert.PublicKey); err != nil {
		return nil, err
	}
	if t.SerialNumber, err = newSerial(a.random); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(a.random, t, a.cert, key, &checked{a: a, now: now})
	if err != nil {
		return nil, fmt.Errorf("signing a certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

// checked is the CA's key behind its rules.
type checked struct {
	a   *Authority
	now time.Time
}

func (c *checked) Public() crypto.PublicKey { return c.a.cert.PublicKey }

// Sign is there because a crypto.MessageSigner has it; crypto/x509 prefers
// SignMessage.
func (*checked) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("the CA signs whole certificates and lists, no digests")
}

// SignMessage signs a TBSCertificate or TBSCertList that the rules allow.
func (c *checked) SignMessage(random io.Reader, tbs []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := CheckTBS(c.a.cert, tbs, c.now); err != nil {
		return nil, err
	}
	return crypto.SignMessage(c.a.key, random, tbs, opts)
}

// VerifyNode gives the Identity of a node out of the chains that TLS verified
// against Pool, good at now. Whether the node is revoked is the store's to say.
// Errors are Refusals.
//
// What a certifier signed is no node's: a node's certificate comes from the root
// without anything between.
func (a *Authority) VerifyNode(chains [][]*x509.Certificate, now time.Time) (Identity, error) {
	for _, chain := range chains {
		if len(chain) != 2 || !chain[1].Equal(a.cert) {
			continue
		}
		id, err := nodeIn(chain[0])
		if err == nil && (now.Before(chain[0].NotBefore) || now.After(chain[0].NotAfter)) {
			// A connection may outlive the certificate that it began with.
			err = refuse(CertificateNo, "the certificate is good from %s to %s", chain[0].NotBefore.Format(time.RFC3339), chain[0].NotAfter.Format(time.RFC3339))
		}
		return id, err
	}
	return Identity{}, refuse(NoCertificate, "a node's certificate is needed, by this Verifier's CA itself")
}

// verifyAnyTime is VerifyNode for a certificate outside of TLS, which may have
// expired.
func (a *Authority) verifyAnyTime(cert *x509.Certificate) (Identity, error) {
	if !bytes.Equal(cert.RawIssuer, a.cert.RawSubject) {
		return Identity{}, refuse(CertificateNo, "the certificate is not by this Verifier's CA")
	}
	if err := cert.CheckSignatureFrom(a.cert); err != nil {
		return Identity{}, refuse(CertificateNo, "the certificate is not by this Verifier's CA: %v", err)
	}
	return nodeIn(cert)
}

func nodeIn(cert *x509.Certificate) (Identity, error) {
	if cert.IsCA || !slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		return Identity{}, refuse(CertificateNo, "the certificate is not one of a node")
	}
	id, err := UntrustedIdentity(cert)
	if err != nil {
		return Identity{}, refuse(CertificateNo, "the certificate is not one of a node: %v", err)
	}
	return id, nil
}

// strongEnough bounds the keys that get a certificate.
func strongEnough(key any) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n >= 2048 && n <= 4096 {
			return nil
		}
	}
	return errors.New("the key is neither ECDSA P-256 or P-384 nor RSA of 2048 to 4096 bits")
}
