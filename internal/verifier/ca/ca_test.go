package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/ekcert"
)

var now = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	return testkit.Must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
}

func spkiOf(t testing.TB, key any) []byte {
	t.Helper()
	return testkit.Must[[]byte](t)(x509.MarshalPKIXPublicKey(key))
}

func newAuthority(t testing.TB, curve elliptic.Curve) (*Authority, *ecdsa.PrivateKey) {
	t.Helper()
	key := testkit.Must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(curve, rand.Reader))
	cert := testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(testkit.Must[[]byte](t)(Root(key, rand.Reader, "test CA", now))))
	return testkit.Must[*Authority](t)(New(cert, key, rand.Reader)), key
}

func identity() Identity {
	name := append([]byte{0, 0x0b}, make([]byte, 32)...)
	return Identity{Node: "6f1c4c0e-3a51-4b7e-9d7a-0a7f4a0f9f10", Name: "host-a.example", EK: bytes.Repeat([]byte{7}, 32), AK: name, Bind: name}
}

// What the CA gives is good, says what it should, and is within its own limits.
func TestCertificates(t *testing.T) {
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		a, _ := newAuthority(t, curve)
		key := newKey(t)
		id := identity()
		node := testkit.Must[*x509.Certificate](t)(a.Node(id, spkiOf(t, key.Public()), now))
		certifier := testkit.Must[*x509.Certificate](t)(a.Certifier(id, spkiOf(t, key.Public()), now))
		server := testkit.Must[*x509.Certificate](t)(a.Server([]string{"verifier.example", "192.0.2.1", "2001:db8::1"}, spkiOf(t, key.Public()), now))
		for _, c := range []*x509.Certificate{node, certifier, server} {
			if err := CheckTBS(a.cert, c.RawTBSCertificate, now); err != nil {
				t.Errorf("%s: %v", c.Subject, err)
			}
			if Describe(c.RawTBSCertificate) == "nothing" || c.SerialNumber.BitLen() < 120 || len(c.UnhandledCriticalExtensions) > 0 {
				t.Errorf("%s: %+v", Describe(c.RawTBSCertificate), c)
			}
		}
		got, err := UntrustedIdentity(node)
		if err != nil || got.Node != id.Node || got.Name != id.Name || !bytes.Equal(got.EK, id.EK) || !bytes.Equal(got.AK, id.AK) || !bytes.Equal(got.Bind, id.Bind) {
			t.Errorf("%+v, %v", got, err)
		}
		verify := func(c *x509.Certificate, name string, use x509.ExtKeyUsage, at time.Time) error {
			_, err := c.Verify(x509.VerifyOptions{Roots: a.Pool(), DNSName: name, KeyUsages: []x509.ExtKeyUsage{use}, CurrentTime: at})
			return err
		}
		if err := errors.Join(verify(node, "", x509.ExtKeyUsageClientAuth, now), verify(server, "192.0.2.1", x509.ExtKeyUsageServerAuth, now),
			verify(server, "verifier.example", x509.ExtKeyUsageServerAuth, now)); err != nil {
			t.Error(err)
		}
		// A node is no Verifier, nor is the Verifier a node.
		for _, name := range []string{"host-a.example", "verifier.example"} {
			if verify(node, name, x509.ExtKeyUsageServerAuth, now) == nil {
				t.Errorf("a node can be %s", name)
			}
		}
		if verify(server, "", x509.ExtKeyUsageClientAuth, now) == nil || verify(node, "", x509.ExtKeyUsageClientAuth, now.Add(25*time.Hour)) == nil {
			t.Error("good for too much, or too long")
		}
		if err := ekcert.VerifyChain([]*x509.Certificate{certifier, a.cert}, &key.PublicKey, now); err != nil {
			t.Errorf("virt-trustd would not take the certifier's chain: %v", err)
		}
	}
}

// A vTPM's EK certificate by a node's certifier chains to the CA, and to no TLS.
func TestVTPMChains(t *testing.T) {
	a, _ := newAuthority(t, elliptic.P256())
	certifier, ek := newKey(t), newKey(t)
	above := testkit.Must[*x509.Certificate](t)(a.Certifier(identity(), spkiOf(t, certifier.Public()), now))
	der := testkit.Must[[]byte](t)(ekcert.Issue(ekcert.Request{
		Kind: ekcert.EK, Key: ek.Public(), VM: identity().Node, Origin: ekcert.Manufactured, Now: now, Serial: [16]byte{1},
		TPM: ekcert.TPM{Manufacturer: "id:00001014", Version: "id:20191023", Family: "2.0", Revision: 164},
	}, certifier))
	leaf := testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(der))
	between := x509.NewCertPool()
	between.AddCert(above)
	use := func(u x509.ExtKeyUsage) error {
		_, err := plain(leaf).Verify(x509.VerifyOptions{Roots: a.Pool(), Intermediates: between, KeyUsages: []x509.ExtKeyUsage{u}, CurrentTime: now})
		return err
	}
	if err := use(x509.ExtKeyUsageAny); err != nil {
		t.Error(err)
	}
	if use(x509.ExtKeyUsageClientAuth) == nil || use(x509.ExtKeyUsageServerAuth) == nil {
		t.Error("a vTPM's certificate is good for TLS")
	}
	// And even where somebody makes our own CA an anchor, no vTPM is a hardware TPM.
	m := testkit.Must[*Manufacturers](t)(NewManufacturers([]*x509.Certificate{a.cert, above}))
	if r := AsRefusal(m.VerifyEK(ek.Public(), der, now)); r == nil || r.Code != EKIsVTPM {
		t.Errorf("%v", r)
	}
	m.VTPM = true
	if err := m.VerifyEK(ek.Public(), der, now); err != nil {
		t.Errorf("configured, and refused: %v", err)
	}
}

// recorder is a signer that tells what it was given.
type recorder struct {
	*ecdsa.PrivateKey
	tbs []byte
}

func (r *recorder) SignMessage(random io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	r.tbs = message
	d := sha256.Sum256(message)
	return r.PrivateKey.Sign(random, d[:], crypto.SHA256)
}

func TestCheckTBSRefuses(t *testing.T) {
	a, key := newAuthority(t, elliptic.P256())
	other, otherKey := newAuthority(t, elliptic.P256())
	ext := testkit.Must[pkix.Extension](t)(identity().extension())
	subject := newKey(t)
	node := func() *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(0).Lsh(big.NewInt(1), 100), Subject: pkix.Name{CommonName: "host-a"}, URIs: []*url.URL{nodeURI(identity().Node)},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
			ExtraExtensions: []pkix.Extension{ext}, BasicConstraintsValid: true, NotBefore: now, NotAfter: now.Add(24 * time.Hour),
		}
	}
	server := func() *x509.Certificate {
		c := node()
		c.URIs, c.ExtraExtensions, c.DNSNames, c.ExtKeyUsage = nil, nil, []string{"v.example"}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		return c
	}
	certifier := func() *x509.Certificate {
		c := testkit.Must[*x509.Certificate](t)(ekcert.IssuerTemplate(&subject.PublicKey))
		c.SerialNumber, c.NotBefore, c.NotAfter, c.UnknownExtKeyUsage = node().SerialNumber, now, now.Add(24*time.Hour), slices.Clone(certifierUses)
		c.ExtraExtensions = []pkix.Extension{ext}
		return c
	}
	tbs := func(c *x509.Certificate, parent *x509.Certificate, key *ecdsa.PrivateKey, pub any) []byte {
		t.Helper()
		r := &recorder{PrivateKey: key}
		if _, err := x509.CreateCertificate(rand.Reader, c, parent, pub, r); err != nil {
			t.Fatal(err)
		}
		return r.tbs
	}
	for _, c := range []*x509.Certificate{node(), server(), certifier()} {
		if err := CheckTBS(a.cert, tbs(c, a.cert, key, subject.Public()), now); err != nil {
			t.Fatalf("what has to pass does not: %v", err)
		}
	}
	weak := testkit.Must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 1024))
	p521 := testkit.Must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))
	change := func(c *x509.Certificate, f func(*x509.Certificate)) []byte {
		f(c)
		return tbs(c, a.cert, key, subject.Public())
	}
	for name, in := range map[string][]byte{
		"nothing":               {},
		"garbage":               []byte("garbage"),
		"a digest":              make([]byte, 32),
		"of another CA":         tbs(node(), other.cert, otherKey, subject.Public()),
		"for another CA":        mixed(t, a, other, node(), key, subject),
		"followed by something": append(tbs(node(), a.cert, key, subject.Public()), 0),
		"weak RSA":              tbs(node(), a.cert, key, weak.Public()),
		"P-521":                 tbs(node(), a.cert, key, p521.Public()),
		"the CA's own key":      tbs(node(), a.cert, key, key.Public()),
		"the CA's own name":     change(node(), func(c *x509.Certificate) { c.RawSubject = a.cert.RawSubject }),
		"a serial of 32 bits":   change(node(), func(c *x509.Certificate) { c.SerialNumber = big.NewInt(1 << 31) }),
		"without constraints":   change(node(), func(c *x509.Certificate) { c.BasicConstraintsValid = false }),
		"node for two days":     change(node(), func(c *x509.Certificate) { c.NotAfter = now.Add(48 * time.Hour) }),
		"node in the future":    change(node(), func(c *x509.Certificate) { c.NotBefore, c.NotAfter = now.Add(20*time.Hour), now.Add(44*time.Hour) }),
		"node with a DNS name":  change(node(), func(c *x509.Certificate) { c.DNSNames = []string{"verifier.example"} }),
		"node with an address":  change(node(), func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(192, 0, 2, 1)} }),
		"node with mail":        change(node(), func(c *x509.Certificate) { c.EmailAddresses = []string{"a@example.org"} }),
		"node of two minds":     change(node(), func(c *x509.Certificate) { c.URIs = []*url.URL{nodeURI("00000000-0000-4000-8000-000000000000")} }),
		"node for code":         change(node(), func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageCodeSigning) }),
		"node without identity": change(node(), func(c *x509.Certificate) { c.ExtraExtensions = nil }),
		"node with another":     change(node(), func(c *x509.Certificate) { c.ExtraExtensions[0].Value = []byte{0x30, 0} }),
		"node that signs":       change(node(), func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }),
		"critical extension": change(node(), func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oidArc, Critical: true, Value: []byte{5, 0}})
		}),
		"node that is a CA":       change(node(), func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign }),
		"server without a name":   change(server(), func(c *x509.Certificate) { c.DNSNames = nil }),
		"server for a month":      change(server(), func(c *x509.Certificate) { c.NotAfter = now.Add(31 * 24 * time.Hour) }),
		"server that is a client": change(server(), func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth) }),
		"certifier, path length":  change(certifier(), func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false }),
		"certifier, any use":      change(certifier(), func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil }),
		"certifier for TLS":       change(certifier(), func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }),
		"certifier, CRLs":         change(certifier(), func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }),
		"certifier of nobody":     change(certifier(), func(c *x509.Certificate) { c.ExtraExtensions = nil }),
		"certifier for ten years": change(certifier(), func(c *x509.Certificate) { c.NotAfter = now.Add(3650 * 24 * time.Hour) }),
		"with a policy": change(node(), func(c *x509.Certificate) {
			c.Policies = []x509.OID{testkit.Must[x509.OID](t)(x509.ParseOID(ekcert.PolicyManufactured))}
		}),
		"too long": change(server(), func(c *x509.Certificate) {
			for range 500 {
				c.DNSNames = append(c.DNSNames, "a-name-that-is-long.example.org")
			}
		}),
		"two revocation lists": change(node(), func(c *x509.Certificate) { c.CRLDistributionPoints = []string{"http://a.example", "http://b.example"} }),
	} {
		if err := CheckTBS(a.cert, in, now); err == nil {
			t.Errorf("%s: would be signed", name)
		}
		if _, err := (&checked{a: a, now: now}).SignMessage(rand.Reader, in, crypto.SHA256); err == nil {
			t.Errorf("%s: was signed", name)
		}
	}
	if _, err := (&checked{a: a, now: now}).Sign(rand.Reader, make([]byte, 32), crypto.SHA256); err == nil {
		t.Error("the CA signs a digest")
	}
}

// mixed is a certificate of one CA's name with the key id of another.
func mixed(t *testing.T, a, other *Authority, c *x509.Certificate, key *ecdsa.PrivateKey, subject *ecdsa.PrivateKey) []byte {
	t.Helper()
	parent := *a.cert
	parent.SubjectKeyId = other.cert.SubjectKeyId
	r := &recorder{PrivateKey: key}
	testkit.Must[[]byte](t)(x509.CreateCertificate(rand.Reader, c, &parent, subject.Public(), r))
	return r.tbs
}

func TestVerifyNode(t *testing.T) {
	a, _ := newAuthority(t, elliptic.P256())
	other, _ := newAuthority(t, elliptic.P256())
	key, certifier := newKey(t), newKey(t)
	node := testkit.Must[*x509.Certificate](t)(a.Node(identity(), spkiOf(t, key.Public()), now))
	chains := func(c *x509.Certificate, roots *Authority, more ...*x509.Certificate) [][]*x509.Certificate {
		between := x509.NewCertPool()
		for _, m := range more {
			between.AddCert(m)
		}
		got, _ := c.Verify(x509.VerifyOptions{Roots: roots.Pool(), Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, CurrentTime: now})
		return got
	}
	if id, err := a.VerifyNode(chains(node, a), now); err != nil || id.Node != identity().Node {
		t.Error(id, err)
	}
	// A compromised host signs with its certifier that it is another node.
	above := testkit.Must[*x509.Certificate](t)(a.Certifier(identity(), spkiOf(t, certifier.Public()), now))
	victim := identity()
	victim.Node = "11111111-1111-4111-8111-111111111111"
	ext := testkit.Must[pkix.Extension](t)(victim.extension())
	forged := testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(testkit.Must[[]byte](t)(x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: now, NotAfter: now.Add(time.Hour), ExtraExtensions: []pkix.Extension{ext}, URIs: []*url.URL{nodeURI(victim.Node)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, above, key.Public(), certifier))))
	for name, c := range map[string]struct {
		chains [][]*x509.Certificate
		at     time.Time
		code   Code
	}{
		"none":             {nil, now, NoCertificate},
		"by a certifier":   {chains(forged, a, above), now, NoCertificate},
		"of another CA":    {chains(testkit.Must[*x509.Certificate](t)(other.Node(identity(), spkiOf(t, key.Public()), now)), other), now, NoCertificate},
		"a server's":       {chains(testkit.Must[*x509.Certificate](t)(a.Server([]string{"x"}, spkiOf(t, key.Public()), now)), a), now, CertificateNo},
		"a certifier's":    {chains(above, a), now, CertificateNo},
		"expired meantime": {chains(node, a), now.Add(25 * time.Hour), CertificateNo},
		"clock went back":  {chains(node, a), now.Add(-time.Hour), CertificateNo},
	} {
		if _, err := a.VerifyNode(c.chains, c.at); AsRefusal(err) == nil || AsRefusal(err).Code != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	if len(chains(forged, a, above)) == 0 {
		t.Error("the forged chain is not even one: the test says nothing")
	}
	// TLS does not take it either: the certifier's uses are narrower.
	if _, err := forged.Verify(x509.VerifyOptions{Roots: a.Pool(), Intermediates: pool(above), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, CurrentTime: now}); err == nil {
		t.Error("TLS takes a node's certificate by a certifier")
	}
}

func pool(cs ...*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range cs {
		p.AddCert(c)
	}
	return p
}

func TestNewRefuses(t *testing.T) {
	a, key := newAuthority(t, elliptic.P256())
	_, otherKey := newAuthority(t, elliptic.P256())
	if _, err := New(a.cert, otherKey, rand.Reader); err == nil {
		t.Error("a key of another CA")
	}
	leaf := testkit.Must[*x509.Certificate](t)(a.Server([]string{"x"}, spkiOf(t, otherKey.Public()), now))
	if _, err := New(leaf, otherKey, rand.Reader); err == nil {
		t.Error("a certificate that is no CA's")
	}
	if _, err := a.Server(nil, spkiOf(t, key.Public()), now); err == nil {
		t.Error("a Verifier without a name")
	}
	if _, err := a.Node(Identity{}, spkiOf(t, otherKey.Public()), now); err == nil {
		t.Error("a node without identity")
	}
	if _, err := a.Node(identity(), []byte("x"), now); AsRefusal(err) == nil || AsRefusal(err).Code != Malformed {
		t.Error(err)
	}
	bad := testkit.Must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))
	if _, err := Root(bad, rand.Reader, "x", now); err == nil {
		t.Error("a CA with P-521")
	}
}

func TestTokens(t *testing.T) {
	a, _ := newAuthority(t, elliptic.P256())
	token, digest, err := NewToken(rand.Reader, a.Pin())
	if err != nil {
		t.Fatal(err)
	}
	secret, pin, err := ParseToken(token)
	if err != nil || pin != a.Pin() || TokenDigest(secret) != digest || !pin.Matches(a.cert) {
		t.Error(secret, pin, err)
	}
	if again, err := ParseSecret(SpellSecret(secret)); err != nil || !bytes.Equal(again, secret) {
		t.Error(again, err)
	}
	other, _ := newAuthority(t, elliptic.P256())
	if pin.Matches(other.cert) {
		t.Error("the pin is any CA's")
	}
	parts := strings.Split(token, ".")
	for _, bad := range []string{
		"", "vtj1", "vtj1..", token + ".x", token + "=", " " + token, "vtj2." + parts[1] + "." + parts[2], "vtj1." + parts[2] + "." + parts[1],
		"vtj1." + parts[1] + "." + parts[2][:42], "vtj1." + parts[1][:21] + "." + parts[2], strings.Repeat("a", 1000), "vtj1." + parts[1] + "A." + parts[2],
		// Not the one spelling: bits that nobody reads.
		"vtj1." + parts[1][:21] + "_" + "." + parts[2][:42] + "_",
	} {
		if _, _, err := ParseToken(bad); err == nil {
			t.Errorf("%q is a token", bad)
		}
	}
}

func TestIdentityBounds(t *testing.T) {
	for name, f := range map[string]func(*Identity){
		"node":       func(i *Identity) { i.Node = "6F1C4C0E-3a51-4b7e-9d7a-0a7f4a0f9f10" },
		"node empty": func(i *Identity) { i.Node = "" },
		"name":       func(i *Identity) { i.Name = "a\nb" },
		"name empty": func(i *Identity) { i.Name = "" },
		"long name":  func(i *Identity) { i.Name = strings.Repeat("a", 254) },
		"ek":         func(i *Identity) { i.EK = nil },
		"ak":         func(i *Identity) { i.AK = make([]byte, 67) },
		"bind":       func(i *Identity) { i.Bind = make([]byte, 3) },
	} {
		i := identity()
		f(&i)
		if _, err := i.extension(); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	for _, bad := range []string{"-a", "a-", ".a", "a b", "a/b", "<b>", "ä", "a\x00", "../x"} {
		if ValidName(bad) {
			t.Errorf("%q is a name", bad)
		}
	}
	for _, good := range []string{"a", "host-1.example.org", "Host_2", "192.0.2.1"} {
		if !ValidName(good) {
			t.Errorf("%q is no name", good)
		}
	}
}

// The AK itself goes along with its Name; who does not know it yet reads on as ever,
// and a certificate from before lacks it.
func TestIdentityHoldsAK(t *testing.T) {
	tpm := forge.NewTPM()
	i := identity()
	i.AK, i.AKPublic = tpm.AKName(), tpm.AK()
	read := func(i Identity) (Identity, []byte) {
		t.Helper()
		ext, err := i.extension()
		if err != nil {
			t.Fatal(err)
		}
		got, err := UntrustedIdentity(&x509.Certificate{Extensions: []pkix.Extension{ext}})
		if err != nil {
			t.Fatal(err)
		}
		return got, ext.Value
	}
	got, der := read(i)
	if !bytes.Equal(got.AKPublic, tpm.AK()) || !bytes.Equal(got.AK, i.AK) {
		t.Errorf("%+v", got)
	}
	var old struct {
		Version      int
		Node, Name   string `asn1:"utf8"`
		EK, AK, Bind []byte
	}
	if rest, err := asn1.Unmarshal(der, &old); err != nil || len(rest) > 0 || old.Node != i.Node || !bytes.Equal(old.AK, i.AK) {
		t.Errorf("%+v, %v", old, err)
	}
	if got, _ := read(identity()); got.AKPublic != nil {
		t.Errorf("%+v", got)
	}
	for name, area := range map[string][]byte{"another": forge.NewTPM().AK(), "cut": tpm.AK()[:20], "empty": {}} {
		i.AKPublic = area
		if _, err := i.extension(); err == nil {
			t.Errorf("%s AK: taken", name)
		}
	}
}

func FuzzCheckTBS(f *testing.F) {
	a, _ := newAuthority(f, elliptic.P256())
	key := newKey(f)
	for _, c := range []*x509.Certificate{
		testkit.Must[*x509.Certificate](f)(a.Node(identity(), spkiOf(f, key.Public()), now)),
		testkit.Must[*x509.Certificate](f)(a.Certifier(identity(), spkiOf(f, key.Public()), now)),
		testkit.Must[*x509.Certificate](f)(a.Server([]string{"x"}, spkiOf(f, key.Public()), now)),
	} {
		f.Add(c.RawTBSCertificate)
	}
	f.Add(testkit.Must[*x509.RevocationList](f)(x509.ParseRevocationList(testkit.Must[[]byte](f)(a.CRL(1, nil, now)))).RawTBSRevocationList)
	f.Fuzz(func(t *testing.T, b []byte) {
		if CheckTBS(a.cert, b, now) != nil {
			return
		}
		// What would be signed reads as what it was taken for, and is nothing worse.
		wrapped, list, err := sealWithNothing(b)
		if err != nil {
			t.Fatal(err)
		}
		if list {
			if l := testkit.Must[*x509.RevocationList](t)(x509.ParseRevocationList(wrapped)); l.NextUpdate.After(now.Add(CRLLifetime + 2*maxSkew)) {
				t.Errorf("%+v", l)
			}
			return
		}
		c := testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(wrapped))
		if c.IsCA && (!c.MaxPathLenZero || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny)) || c.NotAfter.After(now.Add(CertifierLifetime+2*maxSkew)) {
			t.Errorf("%+v", c)
		}
	})
}

func FuzzParseToken(f *testing.F) {
	a, _ := newAuthority(f, elliptic.P256())
	token, _, err := NewToken(rand.Reader, a.Pin())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(token)
	f.Add("vtj1..")
	f.Fuzz(func(t *testing.T, s string) {
		secret, pin, err := ParseToken(s)
		if err == nil && "vtj1."+SpellSecret(secret)+"."+pin.String() != s {
			t.Errorf("%q has a second spelling", s)
		}
	})
}

func FuzzIdentity(f *testing.F) {
	ext := testkit.Must[pkix.Extension](f)(identity().extension())
	f.Add(ext.Value)
	tpm, with := forge.NewTPM(), identity()
	with.AK, with.AKPublic = tpm.AKName(), tpm.AK()
	if ext, err := with.extension(); err == nil {
		f.Add(ext.Value)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		i, err := UntrustedIdentity(&x509.Certificate{Extensions: []pkix.Extension{{Id: OIDNode, Value: b}}})
		if err == nil {
			if _, err := i.extension(); err != nil {
				t.Errorf("read and not written: %v", err)
			}
		}
	})
}
