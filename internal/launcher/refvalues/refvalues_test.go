package refvalues

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"virt-trust/internal/testkit"
)

func digest(s string) Digest { return sha256.Sum256([]byte(s)) }

var (
	all  = Policy{FirstUse: true, Package: true, Manifest: true}
	tofu = Policy{FirstUse: true}
)

const path = "/usr/bin/swtpm"

func found(s string) Found { return Found{path, digest(s)} }

func TestAppraise(t *testing.T) {
	now := int64(1)
	set := func(do ...func(*Set) error) *Set {
		s := (&Set{}).Next()
		for _, f := range do {
			if err := f(s); err != nil {
				t.Fatal(err)
			}
		}
		return s
	}
	learn := func(v string, src Source) func(*Set) error {
		return func(s *Set) error { return s.Learn(found(v), src, "", now) }
	}
	approve := func(v string) func(*Set) error { return func(s *Set) error { return s.Approve(found(v), now) } }
	revoke := func(v string) func(*Set) error { return func(s *Set) error { return s.Revoke(digest(v), path, now) } }
	anywhere := func(s *Set) error {
		return s.Import(&SignedManifest{Name: "m", Serial: 1, Launchers: []ManifestLauncher{{SHA256: digest("a").String()}}}, now)
	}
	a := digest("a")
	for name, c := range map[string]struct {
		set   *Set
		p     Policy
		vouch Vouch
		want  Verdict
	}{
		"first use":                        {set(), tofu, NotAsked, Verdict{Source: FirstUse, Learn: true}},
		"first use asks packages":          {set(), all, NotAsked, Verdict{Ask: true}},
		"first use, no package":            {set(), all, Unowned, Verdict{Source: FirstUse, Learn: true}},
		"first use, package altered":       {set(), all, Different, Verdict{Altered: true}},
		"package vouches":                  {set(), all, Same, Verdict{Source: Package, Learn: true}},
		"nobody may approve":               {set(), Policy{}, NotAsked, Verdict{}},
		"known":                            {set(learn("b", FirstUse)), all, NotAsked, Verdict{Source: FirstUse}},
		"changed":                          {set(learn("a", FirstUse)), tofu, NotAsked, Verdict{Expected: &a}},
		"changed, package vouches":         {set(learn("a", FirstUse)), all, Same, Verdict{Source: Package, Learn: true}},
		"changed, package does not":        {set(learn("a", Package)), all, Different, Verdict{Altered: true, Expected: &a}},
		"changed, no package":              {set(learn("a", FirstUse)), all, Unowned, Verdict{Expected: &a}},
		"upgraded, the old one comes back": {set(learn("b", Package), learn("a", Package)), all, Different, Verdict{Altered: true, Expected: &a}},
		"upgraded and downgraded":          {set(learn("b", Package), learn("a", Package)), all, Same, Verdict{Source: Package, Learn: true}},
		"admin's survives an upgrade":      {set(approve("b"), learn("a", Package)), all, NotAsked, Verdict{Source: Admin}},
		"approved by the admin":            {set(learn("a", FirstUse), approve("b")), tofu, NotAsked, Verdict{Source: Admin}},
		"revoked":                          {set(learn("b", FirstUse), revoke("b")), all, NotAsked, Verdict{Revoked: true}},
		"revoked unseen":                   {set(revoke("b")), all, NotAsked, Verdict{Revoked: true}},
		"revoked beats the package":        {set(revoke("b")), all, Same, Verdict{Revoked: true}},
		"revoked beats an other approval":  {set(approve("b"), revoke("b"), learn("b", Package)), all, NotAsked, Verdict{Revoked: true}},
		"revoked and approved anew":        {set(learn("b", FirstUse), revoke("b"), approve("b")), all, NotAsked, Verdict{Source: Admin}},
		"all of a path is revoked":         {set(learn("a", FirstUse), revoke("a")), tofu, NotAsked, Verdict{}},
		"source no longer counts":          {set(learn("b", FirstUse)), Policy{Manifest: true}, NotAsked, Verdict{}},
		"manifest, wherever":               {set(anywhere), Policy{Manifest: true}, NotAsked, Verdict{}},
	} {
		if got := c.set.Appraise(found("b"), c.p, c.vouch); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, not %+v", name, got, c.want)
		}
	}
	if got := set(anywhere).Appraise(Found{"/elsewhere", a}, Policy{Manifest: true}, NotAsked); got.Source != Manifest {
		t.Errorf("a manifest's file without a path: %+v", got)
	}
	if got := set(learn("a", FirstUse)).Appraise(Found{"/elsewhere", a}, tofu, NotAsked); !got.Learn {
		t.Errorf("a digest approved elsewhere: %+v", got)
	}
}

func TestImport(t *testing.T) {
	m := func(serial uint64, revoked []string, launchers ...string) *SignedManifest {
		m := &SignedManifest{Name: "m", Serial: serial, Revoked: revoked}
		for _, l := range launchers {
			m.Launchers = append(m.Launchers, ManifestLauncher{Path: path, SHA256: digest(l).String()})
		}
		return m
	}
	p := Policy{Manifest: true}
	ok := func(s *Set, v string) bool { return s.Appraise(found(v), p, NotAsked).Source == Manifest }
	s := (&Set{}).Next()
	if err := s.Import(m(2, nil, "a", "b"), 1); err != nil || !ok(s, "a") || !ok(s, "b") {
		t.Fatalf("%v: %+v", err, s)
	}
	for _, serial := range []uint64{1, 2} {
		if err := s.Import(m(serial, nil, "c"), 1); !errors.Is(err, ErrOlder) {
			t.Errorf("serial %d after 2: %v", serial, err)
		}
	}
	if err := s.Import(m(3, []string{digest("a").String()}, "b"), 1); err != nil || ok(s, "a") || !ok(s, "b") {
		t.Errorf("%v: %+v", err, s)
	}
	if err := s.Import(m(4, nil, "a"), 1); err != nil || ok(s, "a") || ok(s, "b") {
		t.Errorf("what was revoked is not, or what is no longer named still counts: %v %+v", err, s)
	}
}

func TestFull(t *testing.T) {
	s := &Set{}
	for i := range MaxValues {
		s.Values = append(s.Values, Value{Digest: digest(fmt.Sprint(i)), Source: FirstUse, State: Approved})
	}
	if err := s.Approve(found("x"), 1); err == nil {
		t.Error("no end")
	}
	s.Values[7].State = Superseded
	if err := s.Approve(found("x"), 1); err != nil || len(s.Values) != MaxValues {
		t.Errorf("%v, %d values", err, len(s.Values))
	}
}

func TestFile(t *testing.T) {
	key := bytes.Repeat([]byte{1}, 32)
	s := (&Set{Generation: 8}).Next()
	if err := errors.Join(s.Learn(found("a"), Package, "swtpm 1", 5), s.Revoke(digest("b"), "", 6), s.Import(&SignedManifest{Name: "m", Serial: 3}, 7)); err != nil {
		t.Fatal(err)
	}
	b, err := s.Encode(key)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(b, key)
	if err != nil || !reflect.DeepEqual(got, s) || got.Generation != 9 {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := Decode(b, bytes.Repeat([]byte{2}, 32)); !errors.Is(err, ErrKey) {
		t.Errorf("with another key: %v", err)
	}
	for i := range b {
		c := bytes.Clone(b)
		c[i] ^= 4
		if _, err := Decode(c, key); err == nil {
			t.Fatalf("byte %d altered", i)
		}
	}
}

// TestManifest verifies what openssl signed.
func TestManifest(t *testing.T) {
	openssl := testkit.Need(t, "openssl")
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(openssl, args...).CombinedOutput(); err != nil {
			t.Fatalf("openssl %q: %v: %s", args, err, out)
		}
	}
	read := func(name string) []byte {
		t.Helper()
		b, err := os.ReadFile(in(name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	text := fmt.Sprintf(`{"format": %q, "name": "acme", "serial": 1, "launchers": [{"path": %q, "sha256": %q}]}`, ManifestFormat, path, digest("a"))
	if err := os.WriteFile(in("m"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, kind := range [][]string{{"-algorithm", "ed25519"}, {"-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"}} {
		run(append([]string{"genpkey", "-out", in("key")}, kind...)...)
		run("pkey", "-in", in("key"), "-pubout", "-out", in("pub"))
		if kind[1] == "EC" {
			run("dgst", "-sha256", "-sign", in("key"), "-out", in("sig"), in("m"))
		} else {
			run("pkeyutl", "-sign", "-rawin", "-inkey", in("key"), "-in", in("m"), "-out", in("sig"))
		}
		keys, err := ParseKeys(read("pub"))
		if err != nil || len(keys) != 1 {
			t.Fatalf("%d keys, %v", len(keys), err)
		}
		for _, sig := range [][]byte{read("sig"), []byte(base64.StdEncoding.EncodeToString(read("sig")) + "\n")} {
			m, err := VerifyManifest([]byte(text), sig, keys)
			if err != nil || m.Name != "acme" || len(m.Launchers) != 1 {
				t.Errorf("%s: %+v, %v", kind[1], m, err)
			}
			if _, err := VerifyManifest([]byte(text+" "), sig, keys); !errors.Is(err, ErrSignature) {
				t.Errorf("%s: another text: %v", kind[1], err)
			}
			if _, err := VerifyManifest([]byte(text), sig, nil); !errors.Is(err, ErrSignature) {
				t.Errorf("%s: no keys: %v", kind[1], err)
			}
		}
	}
	run("genpkey", "-algorithm", "RSA", "-out", in("key"))
	run("pkey", "-in", in("key"), "-pubout", "-out", in("pub"))
	if _, err := ParseKeys(read("pub")); err == nil {
		t.Error("an RSA key")
	}
	for name, bad := range map[string]string{
		"unknown key": strings.Replace(text, "serial", "seriel", 1), "format": strings.Replace(text, "-1", "-2", 1), "no name": strings.Replace(text, "acme", "", 1),
		"relative path": strings.Replace(text, path, "swtpm", 1), "digest": strings.Replace(text, digest("a").String(), "abc", 1), "two": text + text,
	} {
		if _, err := UntrustedManifest([]byte(bad)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func FuzzFile(f *testing.F) {
	s := (&Set{}).Next()
	_ = s.Learn(found("a"), FirstUse, "", 1)
	key := make([]byte, 32)
	b, _ := s.Encode(key)
	f.Add(b[headerSize:])
	f.Add([]byte{0xa1, 0x02, 0x80})
	f.Fuzz(func(t *testing.T, body []byte) {
		s, err := untrusted(body)
		if err != nil {
			return
		}
		s.Appraise(found("a"), all, Unowned)
		b, err := s.Encode(key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Decode(b, key); err != nil {
			t.Errorf("what was read cannot be read again: %v", err)
		}
	})
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(fmt.Sprintf(`{"format": %q, "name": "acme", "serial": 1, "launchers": [{"path": %q, "sha256": %q}], "revoked": [%[3]q]}`, ManifestFormat, path, digest("a"))))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := UntrustedManifest(b)
		if err != nil {
			return
		}
		if err := (&Set{}).Next().Import(m, 1); err != nil {
			t.Error(err)
		}
	})
}

func FuzzKeys(f *testing.F) {
	f.Add([]byte("-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = ParseKeys(b) })
}
