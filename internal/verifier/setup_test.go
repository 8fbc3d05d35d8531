package verifier

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"virt-trust/internal/platform/config"
	"virt-trust/internal/verifier/cakey"
	"virt-trust/internal/verifier/resultkeys"
	"virt-trust/internal/verifier/store/storetest"
)

// init makes what is missing, changes nothing that is there, and never makes one
// half of a CA.
func TestInit(t *testing.T) {
	s := newSetting(t, storetest.SQLite(t))
	c := s.cfg
	read := func() (all string) {
		for _, f := range []string{c.CA.Certificate, c.CA.Key, c.Results.Keys} {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			all += string(b)
		}
		return all
	}
	before := read()
	for _, f := range []string{c.CA.Key, c.Results.Keys} {
		if fi, err := os.Stat(f); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", f, fi.Mode(), err)
		}
	}
	var out bytes.Buffer
	if err := Init(c, &out); err != nil || read() != before || strings.Contains(out.String(), "made") || !strings.Contains(out.String(), "pin") {
		t.Errorf("%v\n%s", err, &out)
	}
	c.Tokens = nil
	out.Reset()
	if err := Init(c, &out); err != nil || !strings.Contains(out.String(), "Nobody can log in yet") {
		t.Errorf("%v\n%s", err, &out)
	}
	for lost, says := range map[string]string{c.CA.Key: "no key", c.CA.Certificate: "no certificate"} {
		b, err := os.ReadFile(lost)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(lost); err != nil {
			t.Fatal(err)
		}
		if err := Init(c, io.Discard); err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), "backup") {
			t.Errorf("without %s: %v", lost, err)
		}
		if _, err := os.Stat(lost); err == nil {
			t.Errorf("%s was made anew", lost)
		}
		if err := os.WriteFile(lost, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// check-config names each file that is wrong.
func TestCheck(t *testing.T) {
	s := newSetting(t, storetest.SQLite(t))
	if err := Check(s.cfg); err != nil {
		t.Fatal(err)
	}
	put := func(path, text string, mode os.FileMode) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		os.Remove(path)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	wrong := func(says string, change func(c *config.Verifier)) {
		t.Helper()
		c := s.cfg
		change(&c)
		if err := Check(c); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, want %q", err, says)
		}
	}
	wrong("CA's certificate", func(c *config.Verifier) { c.CA.Certificate = s.path("none") })
	wrong("CA's key", func(c *config.Verifier) { c.CA.Key = s.path("none") })
	wrong("do not belong together", func(c *config.Verifier) { c.CA.Key = c.Results.Keys })
	wrong("keys of results", func(c *config.Verifier) { c.Results.Keys = s.path("none") })
	wrong("not a private key", func(c *config.Verifier) { c.Results.Keys = s.path("text"); put(c.Results.Keys, "text", 0o600) })
	wrong("for others too", func(c *config.Verifier) {
		b, _ := os.ReadFile(c.Results.Keys)
		c.Results.Keys = s.path("open")
		put(c.Results.Keys, string(b), 0o644)
	})
	wrong("manifests", func(c *config.Verifier) { c.Policy.ManifestKeys = s.path("text") })
	wrong("bad.pem", func(c *config.Verifier) { put(s.path("roots/bad.pem"), "text", 0o644) })
	put(s.path("roots/bad.pem"), "", 0o644)
	os.Remove(s.path("roots/bad.pem"))
	// A CA's certificate, in both forms; one that is no CA's.
	ca, err := os.ReadFile(s.cfg.CA.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(ca)
	put(s.path("roots/maker.pem"), string(ca), 0o644)
	put(s.path("roots/maker.der"), string(block.Bytes), 0o644)
	put(s.path("roots/README"), "not one", 0o644)
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	put(s.cfg.Policy.ManifestKeys, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), 0o644)
	if err := Check(s.cfg); err != nil {
		t.Error(err)
	}
	wrong("secret", func(c *config.Verifier) {
		c.OIDC.Issuer, c.OIDC.ClientSecretFile = "https://id.example.org", s.path("none")
	})
}

func TestRotate(t *testing.T) {
	s := newSetting(t, storetest.SQLite(t))
	first, err := resultkeys.Read(s.cfg.Results.Keys)
	if err != nil || len(first) != 1 {
		t.Fatal(first, err)
	}
	for range 3 {
		before, err := resultkeys.Read(s.cfg.Results.Keys)
		if err != nil {
			t.Fatal(err)
		}
		if err := Rotate(s.cfg, io.Discard); err != nil {
			t.Fatal(err)
		}
		after, err := resultkeys.Read(s.cfg.Results.Keys)
		if err != nil || len(after) != 2 || !after[1].Equal(before[0]) || after[0].Equal(before[0]) {
			t.Errorf("%d keys, %v", len(after), err)
		}
	}
	if left, _ := filepath.Glob(s.path(".keys-*")); len(left) > 0 {
		t.Errorf("%q is left over", left)
	}
	// A file that cannot be read is not replaced: its keys may be needed.
	if err := os.WriteFile(s.cfg.Results.Keys, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Rotate(s.cfg, io.Discard); err == nil {
		t.Error("a damaged file was replaced")
	}
}

func TestPerson(t *testing.T) {
	var out bytes.Buffer
	if err := NewPerson("alice", "operator", &out); err != nil {
		t.Fatal(err)
	}
	token := regexp.MustCompile(`(?m)^vta1\.[A-Za-z0-9_-]{32}$`).FindString(out.String())
	d := sha256.Sum256([]byte(token))
	_, lines, _ := strings.Cut(out.String(), "[[token]]")
	c, err := config.ParseVerifier([]byte("[[token]]" + lines))
	if err != nil || len(c.Tokens) != 1 || c.Tokens[0] != (config.VerifierToken{Name: "alice", Role: "operator", SHA256: hex.EncodeToString(d[:])}) {
		t.Errorf("%+v, %v\n%s", c.Tokens, err, &out)
	}
	var again bytes.Buffer
	if NewPerson("alice", "operator", &again); again.String() == out.String() {
		t.Error("the same token twice")
	}
	if NewPerson("alice", "admin", io.Discard) == nil || NewPerson("a\nb", "reader", io.Discard) == nil || NewPerson("", "reader", io.Discard) == nil {
		t.Error("a role or a name that there is not")
	}
}

func TestCommand(t *testing.T) {
	s := newSetting(t, storetest.SQLite(t))
	file := s.path("verifier.toml")
	run := func(args ...string) (string, error) {
		var out bytes.Buffer
		err := Command(context.Background(), Invocation{Args: args, Config: file, Stdout: &out, Version: "1.2.3"})
		return out.String(), err
	}
	for _, args := range [][]string{{"start"}, {"serve", "now"}, {"person", "x"}, {"init", "x"}, {"version", "x"}} {
		if _, err := run(args...); !errors.Is(err, ErrUsage) {
			t.Errorf("%q: %v", args, err)
		}
	}
	if out, err := run("version"); err != nil || out != "virt-trust-verifier 1.2.3\n" {
		t.Error(out, err)
	}
	if err := os.WriteFile(file, []byte("lisen = []\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"serve", "init", "check-config", "rotate"} {
		if _, err := run(command); err == nil || !strings.Contains(err.Error(), "line 1: unknown key") {
			t.Errorf("%s: %v", command, err)
		}
	}
}

// A CA from before there were revocation lists signs them after init, and keeps its
// key; a new one is left as it is.
func TestInitRenews(t *testing.T) {
	s := newSetting(t, storetest.SQLite(t))
	a, err := cakey.Open(s.cfg.CA.Certificate, s.cfg.CA.Key)
	if err != nil {
		t.Fatal(err)
	}
	old := *a.Certificate()
	old.KeyUsage, old.ExtraExtensions = x509.KeyUsageCertSign, nil
	der, err := x509.CreateCertificate(rand.Reader, &old, &old, old.PublicKey, a.Key())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.cfg.CA.Certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		t.Fatal(err)
	}
	v := s.start()
	if code, _, body := ask(s.client(), "GET", v.url("/v1/crl"), "", ""); code != 404 || !strings.Contains(body, "no-revocation-list") {
		t.Errorf("%d %s", code, body)
	}
	if err := v.stop(); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := Init(s.cfg, &out); err != nil || !strings.Contains(out.String(), "anew") {
		t.Fatalf("%v %s", err, &out)
	}
	b, err := cakey.Open(s.cfg.CA.Certificate, s.cfg.CA.Key)
	if err != nil || !b.Lists() || b.Pin() != a.Pin() {
		t.Fatalf("%v", err)
	}
	v = s.start()
	if code, h, _ := ask(s.client(), "GET", v.url("/v1/crl"), "", ""); code != 200 || h.Get("Content-Type") != "application/pkix-crl" {
		t.Errorf("%d %v", code, h)
	}
}
