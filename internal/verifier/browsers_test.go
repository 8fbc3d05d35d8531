package verifier

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/platform/config"
	"virt-trust/internal/verifier/store/storetest"
)

// public stands for a CA that browsers know.
type public struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	n    int64
}

func newPublic(t *testing.T) *public {
	t.Helper()
	p := &public{t: t}
	p.cert, p.key = p.sign(&x509.Certificate{Subject: pkix.Name{CommonName: "Known Root"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, nil, nil)
	return p
}

func (p *public) sign(c, parent *x509.Certificate, by *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	p.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	p.n++
	c.SerialNumber, c.NotBefore = big.NewInt(p.n), time.Now().Add(-2*time.Hour)
	if c.NotAfter.IsZero() {
		c.NotAfter = time.Now().Add(time.Hour)
	}
	if parent == nil {
		parent, by = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, by)
	if err != nil {
		p.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	return leaf, key
}

// leaf gives a new certificate for these names and its key, both in PEM.
func (p *public) leaf(until time.Time, names ...string) (certificate, key string) {
	p.t.Helper()
	c, k := p.sign(&x509.Certificate{DNSNames: names, NotAfter: until}, p.cert, p.key)
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		p.t.Fatal(err)
	}
	text := func(kind string, b []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	return text("CERTIFICATE", c.Raw) + text("CERTIFICATE", p.cert.Raw), text("PRIVATE KEY", der)
}

// browser knows the public CA and not the Verifier's.
func (p *public) browser(certs ...tls.Certificate) *http.Client {
	pool := x509.NewCertPool()
	pool.AddCert(p.cert)
	return &http.Client{
		Timeout:       20 * time.Second,
		Transport:     &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "localhost", Certificates: certs}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// serial is that of the certificate that a browser is shown.
func (p *public) serial(address string) int64 {
	p.t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(p.cert)
	c, err := tls.Dial("tcp", address, &tls.Config{RootCAs: pool, ServerName: "localhost"})
	if err != nil {
		p.t.Fatal(err)
	}
	defer c.Close()
	return c.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func (s *setting) browsersToo(p *public) {
	s.t.Helper()
	certificate, key := p.leaf(time.Time{}, "localhost")
	s.cfg.Browsers.Certificate, s.cfg.Browsers.Key = s.path("browsers.pem"), s.path("browsers-key.pem")
	write(p.t, s.cfg.Browsers.Certificate, certificate, 0o644)
	write(p.t, s.cfg.Browsers.Key, key, 0o640)
}

// People come by a second way, with a certificate that their browsers know: page,
// login and API are there, and nothing that is for nodes.
func TestBrowsers(t *testing.T) {
	s, p := newSetting(t, storetest.SQLite(t)), newPublic(t)
	s.browsersToo(p)
	v, c := s.start(), p.browser()
	url := "https://" + v.browsers
	if code, header, _ := ask(c, "GET", url+"/", "", ""); code != 303 || header.Get("Strict-Transport-Security") == "" {
		t.Errorf("%d %v", code, header)
	}
	code, header, _ := ask(c, "POST", url+"/login", "", "token="+adminToken, "Content-Type", "application/x-www-form-urlencoded")
	cookie, _, _ := strings.Cut(header.Get("Set-Cookie"), ";")
	if code != 303 || cookie == "" {
		t.Fatalf("%d %v", code, header)
	}
	if code, _, body := ask(c, "GET", url+"/", "", "", "Cookie", cookie); code != 200 || !strings.Contains(body, "paula") {
		t.Errorf("%d %s", code, body)
	}
	if code, _, body := ask(c, "POST", url+"/v1/tokens", "", "{}", "Cookie", cookie, "Origin", "https://evil.example"); code != 403 || !strings.Contains(body, "cross-origin") {
		t.Errorf("%d %s", code, body)
	}
	if code, _, body := ask(c, "GET", url+"/v1/me", adminToken, ""); code != 200 || !strings.Contains(body, "paula") {
		t.Errorf("%d %s", code, body)
	}
	if code, _, body := ask(c, "GET", url+"/metrics", readerToken, ""); code != 200 || !strings.Contains(body, `virt_trust_certificate_expiry_timestamp_seconds{certificate="browsers"}`) {
		t.Errorf("%d %s", code, body)
	}
	// Whom the host is told to go to is where nodes are served.
	if code, _, body := ask(c, "POST", url+"/tokens", "", "hours=1", "Cookie", cookie, "Content-Type", "application/x-www-form-urlencoded"); code != 200 || !strings.Contains(body, "virt-trust enroll https://localhost:"+v.address[strings.LastIndex(v.address, ":")+1:]+"<") {
		t.Errorf("%d %s", code, body)
	}

	// A node is asked for no certificate here, and gets nothing, where the other way
	// knows it.
	h := s.enrol(openStore(t, s.cfg.Database), 1)
	if _, err := h.round(v.url("")); err != nil {
		t.Fatal(err)
	}
	node := p.browser(h.client.Transport.(*http.Transport).TLSClientConfig.Certificates...)
	result := "/v1/nodes/" + h.id + "/result"
	if code, _, body := ask(h.client, "GET", v.url(result), "", ""); code != 200 {
		t.Errorf("%d %s", code, body)
	}
	if code, _, body := ask(node, "GET", url+result, "", ""); code != 401 {
		t.Errorf("%d %s", code, body)
	}
	for _, path := range []string{"/v1/enrolments", "/v1/nodes/" + h.id + "/rounds", "/v1/nodes/" + h.id + "/evidence", "/v1/nodes/" + h.id + "/certificates"} {
		if code, _, body := ask(node, "POST", url+path, "", "{}"); code != 404 || !strings.Contains(body, "not-found") {
			t.Errorf("%s: %d %s", path, code, body)
		}
		if code, _, _ := ask(h.client, "POST", v.url(path), "", "{}"); code == 404 {
			t.Errorf("%s: not there for nodes either", path)
		}
	}
	// Each way has its own certificate, and TLS 1.3 alone.
	if code, _, why := ask(s.client(), "GET", url+"/healthz", "", ""); code != 0 || !strings.Contains(why, "certificate") {
		t.Errorf("%d %s", code, why)
	}
	if code, _, why := ask(c, "GET", v.url("/healthz"), "", ""); code != 0 || !strings.Contains(why, "certificate") {
		t.Errorf("%d %s", code, why)
	}
	if c, err := tls.Dial("tcp", v.browsers, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
		c.Close()
		t.Error("TLS 1.2")
	}

	// A renewal is taken at a reload; half of one is not, and nobody is shut out.
	before := p.serial(v.browsers)
	certificate, key := p.leaf(time.Time{}, "localhost")
	write(t, s.cfg.Browsers.Certificate, certificate, 0o644)
	v.reload <- struct{}{}
	v.reload <- struct{}{} // the one before is done
	if n := p.serial(v.browsers); n != before || !strings.Contains(v.log.String(), "the certificate of before") {
		t.Errorf("%d, was %d: %s", n, before, v.log)
	}
	write(t, s.cfg.Browsers.Key, key, 0o640)
	v.reload <- struct{}{}
	v.reload <- struct{}{}
	if n := p.serial(v.browsers); n == before {
		t.Errorf("%d still: %s", n, v.log)
	}
	if err := v.stop(); err != nil {
		t.Error(err)
	}
	if _, err := tls.Dial("tcp", v.browsers, &tls.Config{InsecureSkipVerify: true}); err == nil {
		t.Error("it serves browsers after its end")
	}
}

// The files are looked at when somebody comes: not each time, and without a reload.
func TestBrowsersRenewal(t *testing.T) {
	s, p := newSetting(t, storetest.SQLite(t)), newPublic(t)
	s.browsersToo(p)
	var said bytes.Buffer
	log := logrus.New()
	log.Out = &said
	pair, err := openPair(s.cfg.Browsers, logrus.NewEntry(log))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	pair.now = func() time.Time { return now }
	serial := func() int64 {
		t.Helper()
		c, err := pair.get(nil)
		if err != nil {
			t.Fatal(err)
		}
		return c.Leaf.SerialNumber.Int64()
	}
	first := serial()
	certificate, key := p.leaf(now.Add(48*time.Hour), "localhost")
	write(t, s.cfg.Browsers.Certificate, certificate, 0o644)
	for range 3 { // the key is not there yet
		now = now.Add(lookTime)
		if n := serial(); n != first {
			t.Errorf("%d, was %d", n, first)
		}
	}
	if n := strings.Count(said.String(), "the certificate of before"); n != 1 {
		t.Errorf("said %d times:\n%s", n, &said)
	}
	write(t, s.cfg.Browsers.Key, key, 0o640)
	now = now.Add(lookTime - time.Second)
	if n := serial(); n != first {
		t.Error("it looks each time")
	}
	now = now.Add(time.Second)
	if n := serial(); n == first || !pair.until().After(now.Add(time.Hour)) {
		t.Errorf("%d until %s", n, pair.until())
	}
	os.Remove(s.cfg.Browsers.Key)
	now = now.Add(lookTime)
	if n := serial(); n == first {
		t.Error("the first again")
	}
	if err := pair.reload(); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Error(err)
	}
}

// What is wrong with the files is said beforehand; what only a browser would not
// like is no reason to leave nodes without a Verifier.
func TestBrowsersCheck(t *testing.T) {
	s, p := newSetting(t, storetest.SQLite(t)), newPublic(t)
	s.browsersToo(p)
	good, key := p.leaf(time.Time{}, "verifier.example")
	old, oldKey := p.leaf(time.Now().Add(-time.Hour), "verifier.example")
	bare, bareKey := p.leaf(time.Time{})
	b := s.cfg.Browsers
	for _, c := range []struct {
		name, certificate, key string
		mode                   os.FileMode
		wrong                  string
	}{
		{"right", good, key, 0o640, ""},
		{"expired", old, oldKey, 0o600, ""},
		{"another's key", good, oldKey, 0o600, "does not match"},
		{"no key", good, "text", 0o600, "failed to find"},
		{"no certificate", "text", key, 0o600, "failed to find"},
		{"no names", bare, bareKey, 0o600, "names no host"},
		{"open key", good, key, 0o644, "is for everybody"},
		{"long", strings.Repeat("x", maxFile+1), key, 0o600, "at most"},
	} {
		write(t, b.Certificate, c.certificate, 0o644)
		write(t, b.Key, c.key, c.mode)
		err := Check(s.cfg)
		if c.wrong == "" && err != nil || c.wrong != "" && (err == nil || !strings.Contains(err.Error(), c.wrong) || !strings.Contains(err.Error(), "the browsers' certificate")) {
			t.Errorf("%s: %v", c.name, err)
		}
		if c.wrong != "" {
			if _, err := open(t.Context(), Options{Config: s.cfg, Log: logrus.NewEntry(logrus.New())}); err == nil || !strings.Contains(err.Error(), c.wrong) {
				t.Errorf("%s: it would start: %v", c.name, err)
			}
		}
	}
	write(t, b.Certificate, old, 0o644)
	os.Remove(b.Key)
	if err := Check(s.cfg); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Error(err)
	}
	write(t, b.Key, oldKey, 0o600)
	s.cfg.OIDC = config.VerifierOIDC{Issuer: "https://id.example", RedirectURL: "https://other.example/oidc/callback"}
	if r := remarks(s.cfg, time.Now()); len(r) != 2 || !strings.Contains(r[0], "expired at") || !strings.Contains(r[1], "leads to other.example") {
		t.Errorf("%q", r)
	}
	if r := remarks(s.cfg, time.Now().Add(-3*time.Hour)); len(r) != 2 || !strings.Contains(r[0], "not good before") {
		t.Errorf("%q", r)
	}
	file, out := s.path("verifier.toml"), bytes.Buffer{}
	write(t, file, fmt.Sprintf("[ca]\ncertificate = %q\nkey = %q\n[results]\nkeys = %q\n[browsers]\ncertificate = %q\nkey = %q\n",
		s.cfg.CA.Certificate, s.cfg.CA.Key, s.cfg.Results.Keys, b.Certificate, b.Key), 0o600)
	if err := Command(t.Context(), Invocation{Args: []string{"check-config"}, Config: file, Stdout: &out}); err != nil || !strings.Contains(out.String(), "warning: the browsers' certificate expired") {
		t.Errorf("%v, %s", err, &out)
	}
	s.cfg.OIDC.RedirectURL = "https://verifier.example:8444/oidc/callback"
	write(t, b.Certificate, good, 0o644)
	write(t, b.Key, key, 0o600)
	if r := remarks(s.cfg, time.Now()); len(r) != 0 {
		t.Errorf("%q", r)
	}
}

// Of systemd's sockets, those that it calls browsers are theirs.
func TestBrowsersSockets(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the program")
	}
	s, p := newSetting(t, storetest.SQLite(t)), newPublic(t)
	s.browsersToo(p)
	v := s.binary("127.0.0.1:0")
	if code, _, body := ask(p.browser(), "GET", "https://"+v.browsers+"/healthz", "", ""); code != 200 {
		t.Errorf("%d %s", code, body)
	}
	if code, _, body := ask(s.client(), "GET", v.url("/healthz"), "", ""); code != 200 {
		t.Errorf("%d %s", code, body)
	}
}
