package ekcert

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"flag"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/testkit"
)

var update = flag.Bool("update", false, "write the golden files anew")

const vm = "6f1c2d3e-0000-4a5b-8c6d-00000000000c"

var (
	now  = time.Date(2026, 11, 25, 20, 0, 31, 5, time.UTC)
	swap = TPM{Manufacturer: "id:00001014", Version: "id:20191023", Family: "2.0", Revision: 164}
)

// fixed are keys that stay, so that what openssl says of certificates does too.
func fixed(t testing.TB) (certifier *ecdsa.PrivateKey, rsaKey *rsa.PublicKey, eccKey *ecdsa.PublicKey) {
	t.Helper()
	read := func(name string) any {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		k, err := x509.ParsePKCS8PrivateKey(b)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	return read("certifier.p8").(*ecdsa.PrivateKey), &read("rsa.p8").(*rsa.PrivateKey).PublicKey, &read("ecc.p8").(*ecdsa.PrivateKey).PublicKey
}

func request(kind Kind, key crypto.PublicKey) Request {
	return Request{Kind: kind, Key: key, VM: vm, Origin: Manufactured, TPM: swap, Serial: [SerialSize]byte{0xff, 1}, Now: now}
}

// TestGolden holds what openssl reads in certificates of each kind against what
// it read when the profile was written down.
func TestGolden(t *testing.T) {
	openssl := testkit.Need(t, "openssl")
	certifier, rsaKey, eccKey := fixed(t)
	own, err := SelfSigned(certifier, [SerialSize]byte{1}, now)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	c, _ := x509.ParseCertificate(own)
	os.WriteFile(ca, EncodeChain([]*x509.Certificate{c}), 0o600)
	takenIn := request(EK, rsaKey)
	takenIn.Origin = TakenIn
	certificates := map[string][]byte{"certifier": own}
	for name, r := range map[string]Request{
		"ek-rsa": request(EK, rsaKey), "ek-ecc": request(EK, eccKey), "platform": request(Platform, rsaKey), "ak": request(AK, eccKey), "taken-in": takenIn,
	} {
		der, err := Issue(r, certifier)
		if err != nil {
			t.Fatal(name, err)
		}
		certificates[name] = der
		file := filepath.Join(dir, name)
		os.WriteFile(file, der, 0o600)
		if out, err := exec.Command(openssl, "verify", "-x509_strict", "-CAfile", ca, file).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", name, err, out)
		}
		if s, err := UntrustedParse(der); err != nil || s.Kind != r.Kind || s.VM != vm || s.Origin != r.Origin {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
		if !IssuedBy(der, &certifier.PublicKey) || IssuedBy(der, eccKey) {
			t.Errorf("%s: issued by whom?", name)
		}
		t.Logf("%s: %d bytes", name, len(der))
	}
	if IssuedBy(own, &certifier.PublicKey) {
		t.Error("the certifier's own certificate is taken for a vTPM's")
	}
	// ECDSA is random.
	signature := regexp.MustCompile(`(?s)    Signature Algorithm: [^\n]*\n    Signature Value:.*`)
	for name, der := range certificates {
		c := exec.Command(openssl, "x509", "-inform", "der", "-noout", "-text")
		c.Stdin = bytes.NewReader(der)
		out, err := c.Output()
		if err != nil {
			t.Fatal(err)
		}
		out = signature.ReplaceAll(out, nil)
		golden := filepath.Join("testdata", name+".txt")
		if *update {
			os.WriteFile(golden, out, 0o644)
		}
		want, err := os.ReadFile(golden)
		if err != nil || !bytes.Equal(out, want) {
			t.Errorf("%s: %v, openssl says\n%s", name, err, out)
		}
	}
}

// TestDistinct: what a relying party that knows hardware TPMs would look for.
func TestDistinct(t *testing.T) {
	certifier, rsaKey, _ := fixed(t)
	der, err := Issue(request(EK, rsaKey), certifier)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.UnhandledCriticalExtensions) != 0 || len(c.URIs) != 1 || c.URIs[0].String() != "urn:uuid:"+vm {
		t.Errorf("critical %v, URIs %v", c.UnhandledCriticalExtensions, c.URIs)
	}
	if len(c.Policies) != 1 || c.Policies[0].String() != PolicyManufactured || !strings.HasPrefix(PolicyManufactured, "2.25.") {
		t.Errorf("policies %v", c.Policies)
	}
	if !bytes.Contains(der, []byte(Model)) || len(c.Subject.Names) != 0 || bytes.Contains(der, []byte("swtpm")) {
		t.Error("model or subject")
	}
	if c.NotBefore != now.Truncate(time.Minute) || c.NotAfter != noEnd || c.SerialNumber.Sign() <= 0 || c.SerialNumber.BitLen() > 127 {
		t.Errorf("%s to %s, serial %x", c.NotBefore, c.NotAfter, c.SerialNumber)
	}
	own, _ := SelfSigned(certifier, [SerialSize]byte{}, now)
	root, err := x509.ParseCertificate(own)
	if err != nil || root.SerialNumber.Sign() <= 0 {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(root)
	if _, err := c.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, CurrentTime: now}); err != nil {
		t.Error(err)
	}
}

func TestRefused(t *testing.T) {
	certifier, rsaKey, eccKey := fixed(t)
	ed, _, _ := ed25519.GenerateKey(rand.Reader)
	p224, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	for name, change := range map[string]func(*Request){
		"kind":             func(r *Request) { r.Kind = "ca" },
		"VM":               func(r *Request) { r.VM = strings.ToUpper(vm) },
		"VM's text":        func(r *Request) { r.VM = vm + "/../" },
		"origin":           func(r *Request) { r.Origin = "" },
		"family":           func(r *Request) { r.TPM.Family = "1.2" },
		"manufacturer":     func(r *Request) { r.TPM.Manufacturer = "IBM" },
		"version":          func(r *Request) { r.TPM.Version = "id:2019102" },
		"level":            func(r *Request) { r.TPM.Level = -1 },
		"revision":         func(r *Request) { r.TPM.Revision = 1 << 20 },
		"no key":           func(r *Request) { r.Key = nil },
		"RSA 1024":         func(r *Request) { r.Key = &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537} },
		"exponent":         func(r *Request) { r.Key = &rsa.PublicKey{N: rsaKey.N, E: 3} },
		"curve":            func(r *Request) { r.Key = &p224.PublicKey },
		"algorithm":        func(r *Request) { r.Key = ed },
		"RSA AK":           func(r *Request) { r.Kind = AK },
		"platform, no RSA": func(r *Request) { r.Kind, r.Key = Platform, eccKey },
	} {
		r := request(EK, rsaKey)
		change(&r)
		if der, err := Issue(r, certifier); err == nil {
			t.Errorf("%s: a certificate of %d bytes", name, len(der))
		}
	}
	weak, _ := rsa.GenerateKey(rand.Reader, 2048)
	if _, err := Issue(request(EK, rsaKey), weak); err == nil {
		t.Error("an RSA certifier")
	}
	if _, err := SelfSigned(weak, [SerialSize]byte{}, now); err == nil {
		t.Error("an RSA certifier of itself")
	}
}

func TestParseKey(t *testing.T) {
	_, rsaKey, _ := fixed(t)
	der, _ := x509.MarshalPKIXPublicKey(rsaKey)
	if k, err := ParseKey(der); err != nil || !rsaKey.Equal(k) {
		t.Error(k, err)
	}
	type spki struct {
		Algorithm struct{ OID asn1.ObjectIdentifier } // without the NULL
		Key       asn1.BitString
	}
	other, err := asn1.Marshal(spki{struct{ OID asn1.ObjectIdentifier }{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}}, asn1.BitString{Bytes: x509.MarshalPKCS1PublicKey(rsaKey), BitLength: 8 * len(x509.MarshalPKCS1PublicKey(rsaKey))}})
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"empty": nil, "long": make([]byte, MaxPublicKey+1), "more behind": append(bytes.Clone(der), 0), "cut": der[:len(der)-1], "no NULL": other} {
		if _, err := ParseKey(b); err == nil {
			t.Errorf("%s is read", name)
		}
	}
}

// authority is a CA above the certifier.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T, above *authority, change func(*x509.Certificate)) *authority {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(5), Subject: pkix.Name{CommonName: "CA"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, MaxPathLen: -1,
	}
	if above != nil {
		c.Subject.CommonName = "below"
	}
	change(c)
	a := &authority{key: k}
	if above == nil {
		above = &authority{k, c}
	}
	a.cert = above.sign(t, c, &k.PublicKey)
	return a
}

func (a *authority) sign(t *testing.T, c *x509.Certificate, key *ecdsa.PublicKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, key, a.key)
	if err != nil {
		t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestVerifyChain(t *testing.T) {
	certifier, _, other := fixed(t)
	as := func(*x509.Certificate) {}
	root := newAuthority(t, nil, as)
	between := newAuthority(t, root, as)
	leaf := func(a *authority, change func(*x509.Certificate)) *x509.Certificate {
		c, err := IssuerTemplate(&certifier.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(9), now.Add(-time.Minute), now.Add(time.Minute)
		change(c)
		return a.sign(t, c, &certifier.PublicKey)
	}
	own, _ := SelfSigned(certifier, [SerialSize]byte{1}, now)
	self, _ := x509.ParseCertificate(own)
	short := newAuthority(t, nil, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })
	narrow := newAuthority(t, nil, func(c *x509.Certificate) { c.MaxPathLen = 1 })
	belowNarrow := newAuthority(t, narrow, as)
	noSign := newAuthority(t, nil, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature })
	late := newAuthority(t, nil, func(c *x509.Certificate) { c.NotBefore = now.Add(time.Minute) })
	for name, c := range map[string]struct {
		chain []*x509.Certificate
		ok    bool
	}{
		"self-signed":          {[]*x509.Certificate{self}, true},
		"of a CA":              {[]*x509.Certificate{leaf(root, as), root.cert}, true},
		"without the root":     {[]*x509.Certificate{leaf(root, as)}, true},
		"three":                {[]*x509.Certificate{leaf(between, as), between.cert, root.cert}, true},
		"path length 1":        {[]*x509.Certificate{leaf(narrow, as), narrow.cert}, true},
		"none":                 {nil, false},
		"long":                 {[]*x509.Certificate{self, self, self, self, self, self, self, self, self}, false},
		"another above":        {[]*x509.Certificate{leaf(root, as), between.cert}, false},
		"out of order":         {[]*x509.Certificate{root.cert, leaf(root, as)}, false},
		"path length 0 above":  {[]*x509.Certificate{leaf(short, as), short.cert}, false},
		"path length too low":  {[]*x509.Certificate{leaf(belowNarrow, as), belowNarrow.cert, narrow.cert}, false},
		"CA that may not sign": {[]*x509.Certificate{leaf(noSign, as), noSign.cert}, false},
		"CA of the future":     {[]*x509.Certificate{leaf(late, as), late.cert}, false},
		"subject":              {[]*x509.Certificate{leaf(root, func(c *x509.Certificate) { c.Subject.CommonName = "x" }), root.cert}, false},
		"key id":               {[]*x509.Certificate{leaf(root, func(c *x509.Certificate) { c.SubjectKeyId = []byte("x") }), root.cert}, false},
		"no CA":                {[]*x509.Certificate{leaf(root, func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false }), root.cert}, false},
		"any path length":      {[]*x509.Certificate{leaf(root, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = -1, false }), root.cert}, false},
		"path length 1 of it":  {[]*x509.Certificate{leaf(root, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false }), root.cert}, false},
		"not for certificates": {[]*x509.Certificate{leaf(root, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }), root.cert}, false},
		"expired":              {[]*x509.Certificate{leaf(root, func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Second) }), root.cert}, false},
		"critical extension": {[]*x509.Certificate{leaf(root, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}), root.cert}, false},
	} {
		if err := VerifyChain(c.chain, &certifier.PublicKey, now); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
		if err := VerifyChain(c.chain, other, now); err == nil {
			t.Errorf("%s: over another key", name)
		}
		if len(c.chain) > 0 && len(c.chain) <= maxDepth {
			back, err := ParseChain(EncodeChain(c.chain))
			if err != nil || len(back) != len(c.chain) || !back[0].Equal(c.chain[0]) {
				t.Errorf("%s: read back %v", name, err)
			}
		}
	}
	forged := *leaf(root, as)
	forged.Signature = bytes.Clone(forged.Signature)
	forged.Signature[len(forged.Signature)-1] ^= 1
	if err := VerifyChain([]*x509.Certificate{&forged, root.cert}, &certifier.PublicKey, now); err == nil {
		t.Error("a forged signature")
	}
	good := string(EncodeChain([]*x509.Certificate{self}))
	for name, text := range map[string]string{
		"empty": "", "words before": "x\n" + good, "words behind": good + "x", "a key": strings.ReplaceAll(good, "CERTIFICATE", "PRIVATE KEY"),
		"too long": good + strings.Repeat("\n", MaxChain), "too many": strings.Repeat(good, maxDepth+1), "headers": strings.Replace(good, "-----\n", "-----\nA: b\n\n", 1),
		"no certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
	} {
		if _, err := ParseChain([]byte(text)); err == nil {
			t.Errorf("%s: is read", name)
		}
	}
}

func FuzzUntrustedParse(f *testing.F) {
	certifier, rsaKey, eccKey := fixed(f)
	for _, r := range []Request{request(EK, rsaKey), request(EK, eccKey), request(Platform, rsaKey), request(AK, eccKey)} {
		der, err := Issue(r, certifier)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(der)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		s, err := UntrustedParse(der)
		if err == nil && (!uuidPattern.MatchString(s.VM) || s.Kind == "" || s.Origin == "" || s.Key == nil) {
			t.Errorf("%+v", s)
		}
		IssuedBy(der, &certifier.PublicKey)
		if k, err := ParseKey(der); err == nil && k == nil {
			t.Error("no key, and no error")
		}
	})
}

func FuzzParseChain(f *testing.F) {
	certifier, _, _ := fixed(f)
	own, _ := SelfSigned(certifier, [SerialSize]byte{1}, now)
	c, _ := x509.ParseCertificate(own)
	f.Add(EncodeChain([]*x509.Certificate{c}))
	f.Add(EncodeChain([]*x509.Certificate{c, c}))
	f.Fuzz(func(t *testing.T, text []byte) {
		chain, err := ParseChain(text)
		if err != nil {
			return
		}
		if len(chain) == 0 || len(chain) > maxDepth {
			t.Fatalf("%d certificates", len(chain))
		}
		if err := VerifyChain(chain, &certifier.PublicKey, now); err == nil && !chain[0].PublicKey.(*ecdsa.PublicKey).Equal(&certifier.PublicKey) {
			t.Error("over another key")
		}
	})
}
