package ear

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"virt-trust/internal/appraise"
)

var now = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func aResult() *appraise.Result {
	n, pcr := 3, uint(10)
	return &appraise.Result{
		Node: "node", Received: now, Expires: now.Add(5 * time.Minute), HostName: "host", BootID: "boot",
		Host: appraise.Appraisal{Tier: appraise.Warning, Vector: appraise.Vector{InstanceIdentity: 2, Configuration: 2, Executables: 33}, Reasons: []appraise.Reason{
			{Code: appraise.CodeIMAUnknown, Tier: appraise.Warning, What: "a file", Log: "ima", Entry: &n, PCR: &pcr, Path: "/x<script>", Digest: "sha256:00"},
		}},
		VMs: []appraise.VM{
			{UUID: "u1", Name: "one", Running: true, EK: "ab", Appraisal: appraise.Appraisal{Tier: appraise.Contraindicated, Vector: appraise.Vector{Executables: 96}}},
			{UUID: "u2", Name: "two", Appraisal: appraise.Appraisal{Tier: appraise.None}},
		},
	}
}

func TestSignAndVerify(t *testing.T) {
	before := newKey(t)
	i := &Issuer{Signer: newKey(t), Build: "1.0", Policy: "default", Before: []crypto.PublicKey{before.Public()}}
	set, err := i.KeySet()
	if err != nil {
		t.Fatal(err)
	}
	token, err := i.Sign(aResult(), "")
	if err != nil {
		t.Fatal(err)
	}
	c, err := Verify(token, set, now.Add(4*time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if c.Subject != "node" || c.VerifierID.Developer != "virt-trust" || len(c.Submods) != 3 || c.Submods["vm/u1"].Status != appraise.Contraindicated ||
		c.Submods["host"].Vector.Executables != 33 || *c.Submods["host"].Reasons[0].Entry != 3 || c.Submods["vm/u2"].Status != appraise.None || !*c.Submods["vm/u1"].Running {
		t.Errorf("%+v", c)
	}
	// The words of the draft.
	body, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"eat_profile":"tag:`, `"iat":1795608000`, `"exp":1795608300`, `"ear.verifier-id":{"developer":"virt-trust","build":"1.0"}`, `"ear.status":"warning"`, `"ear.trustworthiness-vector":{"instance-identity":2,"configuration":2,"executables":33}`, `"ear.appraisal-policy-id":"default"`} {
		if !strings.Contains(string(body), want) {
			t.Errorf("%s is not in %s", want, body)
		}
	}
	// One that the key before has signed holds until it expires.
	old := &Issuer{Signer: before}
	if token, err = old.Sign(aResult(), "u1"); err != nil {
		t.Fatal(err)
	}
	if c, err = Verify(token, set, now); err != nil || len(c.Submods) != 2 {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := i.Sign(aResult(), "u3"); !errors.Is(err, ErrNoVM) {
		t.Errorf("no such VM: %v", err)
	}
	if i.Key() == "" || i.Key() == old.Key() {
		t.Error("names of keys")
	}
}

// forge signs anything, with anything.
func forge(t testing.TB, alg jose.SignatureAlgorithm, key any, kid, typ string, claims any) string {
	t.Helper()
	o := &jose.SignerOptions{}
	if typ != "" {
		o = o.WithType(jose.ContentType(typ))
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, o)
	if err != nil {
		t.Fatal(err)
	}
	body, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	j, err := s.Sign(body)
	if err != nil {
		t.Fatal(err)
	}
	token, err := j.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestRefused(t *testing.T) {
	key, other := newKey(t), newKey(t)
	i := &Issuer{Signer: key}
	set, err := i.KeySet()
	if err != nil {
		t.Fatal(err)
	}
	good, err := i.Sign(aResult(), "")
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rk, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	base := map[string]any{}
	body, _ := base64.RawURLEncoding.DecodeString(strings.Split(good, ".")[1])
	if err := json.Unmarshal(body, &base); err != nil {
		t.Fatal(err)
	}
	with := func(name string, v any) map[string]any {
		c := maps.Clone(base)
		c[name] = v
		return c
	}
	es := func(c any) string { return forge(t, jose.ES256, key, i.Key(), "eat+jwt", c) }
	host := func(status string, executables int) map[string]any {
		return map[string]any{"ear.status": status, "ear.trustworthiness-vector": map[string]any{"executables": executables}}
	}
	parts := strings.Split(good, ".")
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"eat+jwt","kid":"`+i.Key()+`"}`)) + "." + parts[1] + "."
	if _, err := Verify(es(base), set, now); err != nil {
		t.Fatalf("what the cases below change: %v", err)
	}
	for name, c := range map[string]struct {
		token string
		at    time.Time
		want  error
	}{
		"nothing":                       {"", now, ErrToken},
		"no algorithm":                  {none, now, ErrToken},
		"HMAC with the public key":      {forge(t, jose.HS256, set[:64], i.Key(), "eat+jwt", base), now, ErrToken},
		"RSA":                           {forge(t, jose.RS256, rk, i.Key(), "eat+jwt", base), now, ErrToken},
		"P-384":                         {forge(t, jose.ES384, p384, i.Key(), "eat+jwt", base), now, ErrToken},
		"another key":                   {forge(t, jose.ES256, other, i.Key(), "eat+jwt", base), now, ErrKey},
		"a key of another name":         {forge(t, jose.ES256, other, "x", "eat+jwt", base), now, ErrKey},
		"a key without a name":          {forge(t, jose.ES256, key, "", "eat+jwt", base), now, ErrKey},
		"another type of token":         {forge(t, jose.ES256, key, i.Key(), "JWT", base), now, ErrToken},
		"no type":                       {forge(t, jose.ES256, key, i.Key(), "", base), now, ErrToken},
		"changed":                       {parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(string(body), "contraindicated", "affirming", 1))) + "." + parts[2], now, ErrKey},
		"expired":                       {good, now.Add(5 * time.Minute), ErrExpired},
		"long expired":                  {good, now.Add(time.Hour), ErrExpired},
		"from the future":               {good, now.Add(-2 * time.Minute), ErrToken},
		"it never holds":                {es(with("exp", now.Unix())), now, ErrExpired},
		"no expiry":                     {es(with("exp", 0)), now, ErrExpired},
		"another profile":               {es(with("eat_profile", "tag:other")), now, ErrToken},
		"nothing of the host":           {es(with("submods", map[string]any{"vm/u1": host("affirming", 2)})), now, ErrToken},
		"a tier better than its claims": {es(with("submods", map[string]any{"host": host("affirming", 96)})), now, ErrToken},
		"and by a little":               {es(with("submods", map[string]any{"host": host("affirming", 32)})), now, ErrToken},
		"negative claims":               {es(with("submods", map[string]any{"host": host("warning", -97)})), now, ErrToken},
		"a VM better than its host":     {es(with("submods", map[string]any{"host": host("warning", 33), "vm/u1": host("affirming", 2)})), now, ErrToken},
		"a VM of a host that is none":   {es(with("submods", map[string]any{"host": host("none", 0), "vm/u1": host("warning", 33)})), now, ErrToken},
	} {
		if got, err := Verify(c.token, set, c.at); !errors.Is(err, c.want) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if c, err := Verify(es(with("submods", map[string]any{"host": host("splendid", 0)})), set, now); err != nil || c.Submods["host"].Status != appraise.None {
		t.Errorf("a tier that is not known: %+v, %v", c, err)
	}
	if _, err := Verify(good, []byte("{}"), now); !errors.Is(err, ErrKey) {
		t.Errorf("no keys: %v", err)
	}
	if _, err := Verify(good, []byte("x"), now); err == nil {
		t.Error("no key set")
	}
	if _, err := (&Issuer{Signer: p384}).Sign(aResult(), ""); err == nil {
		t.Error("signed with P-384")
	}
	if _, err := JWKS(&rk.PublicKey); err == nil {
		t.Error("an RSA key in the set")
	}
}

func FuzzVerify(f *testing.F) {
	i := &Issuer{Signer: newKey(f)}
	set, err := i.KeySet()
	if err != nil {
		f.Fatal(err)
	}
	good, err := i.Sign(aResult(), "")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, string(set))
	f.Add("a.b.c", `{"keys":[]}`)
	f.Fuzz(func(t *testing.T, token, keys string) {
		Verify(token, []byte(keys), now)
		if _, err := Verify(token, set, now); err == nil && token != good && strings.TrimSpace(token) != good {
			// ECDSA signatures are not unique; what was signed is.
			if strings.Join(strings.Split(strings.TrimSpace(token), ".")[:2], ".") != strings.Join(strings.Split(good, ".")[:2], ".") {
				t.Error("forged")
			}
		}
	})
}
