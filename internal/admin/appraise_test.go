package admin

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/appraise/ear"
	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/verifier/ca"
)

// kept is a host whose Evidence lies in files.
type kept struct {
	t     *testing.T
	dir   string
	host  *forge.Host
	nonce []byte
}

func keep(t *testing.T) *kept {
	t.Helper()
	log, err := os.ReadFile("../evidence/eventlog/testdata/uki.bin")
	if err != nil {
		t.Fatal(err)
	}
	h := forge.NewHost("sha256", log, time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC))
	n := h.Launchers([3]string{"swtpm", "/usr/bin/swtpm", "swtpm"})
	h.Start(h.AddVM("web\x1b[2J"), log, n...)
	h.MeasureMany(3)
	h.Tick(time.Hour)
	k := &kept{t, t.TempDir(), h, bytes.Repeat([]byte{1}, 32)}
	k.write("ak", h.TPM.AK())
	return k
}

func (k *kept) write(name string, b []byte) string {
	k.t.Helper()
	path := filepath.Join(k.dir, name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		k.t.Fatal(err)
	}
	return path
}

func (k *kept) evidence(name string, o forge.Options) string {
	k.t.Helper()
	k.host.Tick(time.Minute)
	return k.write(name, k.host.Evidence(k.nonce, o))
}

func (k *kept) path(name string) string { return filepath.Join(k.dir, name) }

func TestAppraise(t *testing.T) {
	k := keep(t)
	first := k.evidence("first", forge.Options{})
	nonce := hex.EncodeToString(k.nonce)
	stdout, stderr, code := run(t, "appraise", first, "--ak", k.path("ak"))
	if code != ExitNotAppraised || !strings.Contains(stdout, "Host: none") || !strings.Contains(stdout, "host-no-values") || !strings.Contains(stderr, "--nonce") {
		t.Errorf("without Reference Values: exit %d:\n%s%s", code, stdout, stderr)
	}
	stdout, stderr, code = run(t, "appraise", first, "--ak", k.path("ak"), "--nonce", nonce, "--learn", k.path("values"))
	if code != ExitDone || stderr != "" || !strings.Contains(stdout, "Host: affirming") || strings.Contains(stdout, "\x1b") {
		t.Errorf("learned: exit %d:\n%s%s", code, stdout, stderr)
	}
	second := k.evidence("second", forge.Options{})
	known := []string{"--ak", k.path("ak"), "--nonce", nonce, "--reference", k.path("values")}
	with := func(args ...string) []string { return append(append([]string{"appraise"}, known...), args...) }
	if stdout, _, code = run(t, with(second)...); code != ExitDone {
		t.Errorf("exit %d:\n%s", code, stdout)
	}
	k.host.Measure("/tmp/x", []byte("x"))
	k.host.VMs[0].TPM.Extend("sha256", 4, make([]byte, 32))
	bad := k.evidence("bad", forge.Options{})
	stdout, _, code = run(t, with(first, bad)...)
	for _, want := range []string{"Host: warning", "ima-unknown", "/tmp/x", "entry 4 of ima", "running): contraindicated", "vm-pcr-other: PCR 4", "expected ", "Changed: "} {
		if !strings.Contains(stdout, want) {
			t.Errorf("%q is not in\n%s", want, stdout)
		}
	}
	if code != ExitRefused {
		t.Errorf("exit %d", code)
	}
	stdout, _, code = run(t, with("--json", bad)...)
	if r := decode[appraise.Result](t, stdout); code != ExitRefused || r.Host.Tier != appraise.Warning || r.VMs[0].Tier != appraise.Contraindicated {
		t.Errorf("exit %d, %+v", code, r)
	}
	if stdout, _, code = run(t, "appraise", second, "--ak", k.path("ak"), "--nonce", strings.Repeat("00", 32)); code != ExitRefused || !strings.Contains(stdout, "nonce-wrong") {
		t.Errorf("another nonce: exit %d\n%s", code, stdout)
	}
	other := k.write("other", forge.NewTPM().AK())
	if stdout, _, code = run(t, "appraise", second, "--ak", other); code != ExitRefused || !strings.Contains(stdout, "quote-signature") {
		t.Errorf("another AK: exit %d\n%s", code, stdout)
	}
	der, err := x509.MarshalPKIXPublicKey(&k.host.TPM.Key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	ak := k.host.TPM.AK()
	for name, b := range map[string][]byte{
		"PEM": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), "TPM2B": append([]byte{0, byte(len(ak))}, ak...),
	} {
		known[1] = k.write(name, b)
		if _, _, code = run(t, with(second)...); code != ExitDone {
			t.Errorf("AK as %s: exit %d", name, code)
		}
	}
}

// A node's certificate, and its certifier's, stand for its AK: whose they are is
// the CA's to say.
func TestAppraiseByCertificate(t *testing.T) {
	k := keep(t)
	evidence := k.evidence("evidence", forge.Options{})
	made := k.host.Now
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	text := func(der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}) }
	authority := func(name string) *ca.Authority {
		t.Helper()
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := ca.Root(key, rand.Reader, name, made.Add(-30*24*time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		a, err := ca.New(cert, key, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		k.write(name, text(der))
		return a
	}
	ours := authority("ca")
	authority("other-ca")
	const node = "11111111-1111-4111-8111-111111111111"
	id := ca.Identity{Node: node, Name: "alpha", EK: make([]byte, 32), AK: k.host.TPM.AKName(), Bind: k.host.TPM.AKName(), AKPublic: k.host.TPM.AK()}
	issue := func(name string, f func(ca.Identity, []byte, time.Time) (*x509.Certificate, error), id ca.Identity, at time.Time) []byte {
		t.Helper()
		c, err := f(id, spki, at)
		if err != nil {
			t.Fatal(err)
		}
		k.write(name, text(c.Raw))
		return c.Raw
	}
	der := issue("node", ours.Node, id, made)
	k.write("node.der", der)
	issue("certifier", ours.Certifier, id, made)
	issue("expired", ours.Node, id, made.Add(-3*24*time.Hour))
	bare := id
	bare.AKPublic = nil
	issue("bare", ours.Node, bare, made)
	stranger := forge.NewTPM()
	strange := id
	strange.AK, strange.AKPublic = stranger.AKName(), stranger.AK()
	issue("strange", ours.Node, strange, made)

	nonce := hex.EncodeToString(k.nonce)
	ask := func(args ...string) (string, string, int) {
		return run(t, append([]string{"appraise", evidence, "--nonce", nonce, "--learn", k.path("learned")}, args...)...)
	}
	for _, name := range []string{"node", "node.der", "certifier"} {
		stdout, stderr, code := ask("--ak", k.path(name), "--ca", k.path("ca"))
		if code != ExitDone || stderr != "" || !strings.Contains(stdout, "Host: affirming") || !strings.Contains(stdout, node) {
			t.Errorf("%s: exit %d\n%s%s", name, code, stdout, stderr)
		}
	}
	if _, stderr, code := ask("--ak", k.path("node")); code != ExitDone || !strings.Contains(stderr, "without --ca") {
		t.Errorf("without a CA: exit %d, %s", code, stderr)
	}
	if stdout, _, code := ask("--ak", k.path("strange"), "--ca", k.path("ca")); code != ExitRefused || !strings.Contains(stdout, "quote-signature") {
		t.Errorf("another node's: exit %d, %s", code, stdout)
	}
	for _, c := range []struct {
		code int
		says string
		args []string
	}{
		{ExitNotAppraised, "unknown authority", []string{"--ak", k.path("node"), "--ca", k.path("other-ca")}},
		{ExitNotAppraised, "expired", []string{"--ak", k.path("expired"), "--ca", k.path("ca")}},
		{ExitNotAppraised, "does not hold it", []string{"--ak", k.path("bare"), "--ca", k.path("ca")}},
		{ExitNotAppraised, "certificate of no node", []string{"--ak", k.path("ca"), "--ca", k.path("ca")}},
		{ExitNotAppraised, "no certificate in PEM", []string{"--ak", k.path("node"), "--ca", k.path("ak")}},
		{ExitNotAppraised, `and --node is "other"`, []string{"--ak", k.path("node"), "--node", "other"}},
		{ExitUsage, "--ca goes with a certificate", []string{"--ak", k.path("ak"), "--ca", k.path("ca")}},
	} {
		if stdout, stderr, code := ask(c.args...); code != c.code || !strings.Contains(stderr, c.says) || stdout != "" {
			t.Errorf("%q: exit %d, want %d and %q\n%s%s", c.args, code, c.code, c.says, stdout, stderr)
		}
	}
}

func TestAppraiseSigned(t *testing.T) {
	k := keep(t)
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	k.write("keys", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	file := k.evidence("e", forge.Options{})
	policy := []byte(`{"format": "virt-trust-policy-1", "id": "strict", "ima": {"unknown": "contraindicated"}}`)
	k.write("policy", policy)
	args := []string{"appraise", file, "--ak", k.path("ak"), "--policy", k.path("policy"), "--keys", k.path("keys"), "--learn", k.path("values")}
	if _, stderr, code := run(t, args...); code != ExitNotAppraised || !strings.Contains(stderr, "policy.sig") {
		t.Errorf("no signature: exit %d: %s", code, stderr)
	}
	k.write("policy.sig", ed25519.Sign(key, []byte("other")))
	if _, stderr, code := run(t, args...); code != ExitNotAppraised || !strings.Contains(stderr, "no configured key made this signature") {
		t.Errorf("another's signature: exit %d: %s", code, stderr)
	}
	k.write("policy.sig", ed25519.Sign(key, policy))
	if _, stderr, code := run(t, args...); code != ExitDone {
		t.Errorf("exit %d: %s", code, stderr)
	}
	k.host.Measure("/tmp/x", []byte("x"))
	values, err := os.ReadFile(k.path("values"))
	if err != nil {
		t.Fatal(err)
	}
	k.write("values.sig", ed25519.Sign(key, values))
	later := k.evidence("later", forge.Options{})
	args = []string{"appraise", later, "--ak", k.path("ak"), "--policy", k.path("policy"), "--keys", k.path("keys"), "--reference", k.path("values")}
	if stdout, _, code := run(t, args...); code != ExitRefused || !strings.Contains(stdout, "contraindicated: ima-unknown") {
		t.Errorf("exit %d: %s", code, stdout)
	}
	k.write("values", append(values, '\n'))
	if _, _, code := run(t, args...); code != ExitNotAppraised {
		t.Errorf("changed values: exit %d", code)
	}
}

func TestAppraiseRefuses(t *testing.T) {
	k := keep(t)
	file, garbage := k.evidence("e", forge.Options{}), k.write("garbage", []byte("garbage"))
	for name, c := range map[string]struct {
		args []string
		code int
		want string
	}{
		"nothing":         {nil, ExitUsage, "--ak"},
		"no AK":           {[]string{file}, ExitUsage, "--ak"},
		"a result alone":  {[]string{"--result", file}, ExitUsage, "--jwks"},
		"both":            {[]string{file, "--result", file, "--jwks", file}, ExitUsage, "--jwks"},
		"no such file":    {[]string{"/nowhere", "--ak", k.path("ak")}, ExitNotAppraised, "/nowhere"},
		"no Evidence":     {[]string{garbage, "--ak", k.path("ak")}, ExitNotAppraised, "not evidence"},
		"no such AK":      {[]string{file, "--ak", garbage}, ExitNotAppraised, "--ak"},
		"no nonce":        {[]string{file, "--ak", k.path("ak"), "--nonce", "x"}, ExitUsage, "--nonce"},
		"no policy":       {[]string{file, "--ak", k.path("ak"), "--policy", garbage}, ExitNotAppraised, "policy"},
		"no values":       {[]string{file, "--ak", k.path("ak"), "--reference", garbage}, ExitNotAppraised, "Reference Values"},
		"no keys":         {[]string{file, "--ak", k.path("ak"), "--keys", garbage}, ExitNotAppraised, "--keys"},
		"no such result":  {[]string{"--result", garbage, "--jwks", garbage}, ExitNotAppraised, "not an Attestation Result"},
		"no such key set": {[]string{"--result", garbage, "--jwks", "/nowhere"}, ExitNotAppraised, "/nowhere"},
	} {
		if stdout, stderr, code := run(t, append([]string{"appraise"}, c.args...)...); code != c.code || !strings.Contains(stderr, c.want) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: exit %d: %s%s", name, code, stdout, stderr)
		}
	}
}

func TestCheckResult(t *testing.T) {
	k := keep(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	issuer := &ear.Issuer{Signer: key, Build: "1"}
	set, err := issuer.KeySet()
	if err != nil {
		t.Fatal(err)
	}
	k.write("jwks", set)
	check := func(host, vm appraise.Tier, expires time.Duration, args ...string) (string, string, int) {
		t.Helper()
		now := time.Now()
		token, err := issuer.Sign(&appraise.Result{
			Node: "n", Received: now.Add(-time.Minute), Expires: now.Add(expires),
			Host: appraise.Appraisal{Tier: host, Reasons: []appraise.Reason{{Code: "c", Tier: host, What: "bad\x1b[2J"}}},
			VMs:  []appraise.VM{{UUID: "u", Name: "web", Running: true, Appraisal: appraise.Appraisal{Tier: vm}}},
		}, "")
		if err != nil {
			t.Fatal(err)
		}
		return run(t, append([]string{"appraise", "--result", k.write("jwt", []byte(token+"\n")), "--jwks", k.path("jwks")}, args...)...)
	}
	if stdout, _, code := check(appraise.Affirming, appraise.Affirming, time.Minute); code != ExitDone || !strings.Contains(stdout, "host: affirming") || !strings.Contains(stdout, "vm/u web: affirming") || strings.Contains(stdout, "\x1b") {
		t.Errorf("exit %d:\n%s", code, stdout)
	}
	if stdout, _, code := check(appraise.Warning, appraise.Contraindicated, time.Minute); code != ExitRefused {
		t.Errorf("exit %d:\n%s", code, stdout)
	}
	if stdout, _, code := check(appraise.None, appraise.None, time.Minute); code != ExitNotAppraised {
		t.Errorf("exit %d:\n%s", code, stdout)
	}
	if stdout, stderr, code := check(appraise.Affirming, appraise.Affirming, -time.Second); code != ExitNotAppraised || !strings.Contains(stderr, "expired") || stdout != "" {
		t.Errorf("expired: exit %d:\n%s%s", code, stdout, stderr)
	}
	stdout, _, _ := check(appraise.Affirming, appraise.Affirming, time.Minute, "--json")
	if c := decode[ear.Claims](t, stdout); c.Subject != "n" {
		t.Errorf("%+v", c)
	}
	if !json.Valid([]byte(stdout)) {
		t.Error(stdout)
	}
}
