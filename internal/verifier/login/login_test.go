package login

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/store/storetest"
)

// provider is a small, honest OpenID provider: discovery, code flow with PKCE
// (RFC 7636, S256 alone), and a key set. Who comes is who it was told.
type provider struct {
	*httptest.Server
	t      *testing.T
	client struct{ id, secret string }

	mu     sync.Mutex
	key    *ecdsa.PrivateKey
	kid    string
	codes  map[string]url.Values // of authorization requests
	claims map[string]any        // of whoever comes
	change func(claims map[string]any)
	asked  int
}

func newProvider(t *testing.T) *provider {
	t.Helper()
	p := &provider{t: t, codes: map[string]url.Values{}}
	p.client.id, p.client.secret = "virt-trust", "the client's secret"
	p.rotate("k1")
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		p.asked++
		p.mu.Unlock()
		json.NewEncoder(w).Encode(map[string]any{
			"issuer": p.URL, "authorization_endpoint": p.URL + "/authorize", "token_endpoint": p.URL + "/token", "jwks_uri": p.URL + "/keys",
			"response_types_supported": []string{"code"}, "subject_types_supported": []string{"public"}, "id_token_signing_alg_values_supported": []string{"ES256"},
		})
	})
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		defer p.mu.Unlock()
		json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: p.key.Public(), KeyID: p.kid, Algorithm: "ES256", Use: "sig"}}})
	})
	mux.HandleFunc("GET /authorize", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if q.Get("response_type") != "code" || q.Get("client_id") != p.client.id || q.Get("code_challenge_method") != "S256" || len(q.Get("code_challenge")) != 43 ||
			!strings.Contains(q.Get("scope"), "openid") || q.Get("state") == "" || q.Get("nonce") == "" {
			http.Error(w, "bad request", http.StatusBadRequest)
			return
		}
		code := rand.Text()
		p.mu.Lock()
		p.codes[code] = q
		p.mu.Unlock()
		http.Redirect(w, r, q.Get("redirect_uri")+"?"+url.Values{"code": {code}, "state": {q.Get("state")}}.Encode(), http.StatusFound)
	})
	mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		q := p.codes[r.PostFormValue("code")]
		delete(p.codes, r.PostFormValue("code"))
		p.mu.Unlock()
		verifier := sha256.Sum256([]byte(r.PostFormValue("code_verifier")))
		id, secret, ok := r.BasicAuth()
		if !ok {
			id, secret = r.PostFormValue("client_id"), r.PostFormValue("client_secret")
		} else {
			id, _ = url.QueryUnescape(id)
			secret, _ = url.QueryUnescape(secret)
		}
		if q == nil || base64.RawURLEncoding.EncodeToString(verifier[:]) != q.Get("code_challenge") || r.PostFormValue("redirect_uri") != q.Get("redirect_uri") || id != p.client.id || secret != p.client.secret {
			w.WriteHeader(http.StatusBadRequest)
			json.NewEncoder(w).Encode(map[string]string{"error": "invalid_grant"})
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]any{"access_token": rand.Text(), "token_type": "Bearer", "expires_in": 300, "id_token": p.token(map[string]any{"nonce": q.Get("nonce")})})
	})
	p.Server = httptest.NewTLSServer(mux)
	t.Cleanup(p.Close)
	return p
}

func (p *provider) rotate(kid string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kid = kid
	var err error
	if p.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		p.t.Fatal(err)
	}
}

// token gives an ID token of who comes, with more claims.
func (p *provider) token(more map[string]any) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	claims := map[string]any{"iss": p.URL, "aud": p.client.id, "sub": "4711", "iat": time.Now().Unix(), "exp": time.Now().Add(time.Minute).Unix()}
	for _, from := range []map[string]any{p.claims, more} {
		for k, v := range from {
			claims[k] = v
		}
	}
	if p.change != nil {
		p.change(claims)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: p.key, KeyID: p.kid}}, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	s, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

// site is a Verifier's login, over TLS, with one page that says who asks.
type site struct {
	*httptest.Server
	login *Login
	db    *store.Store
	ahead time.Duration
}

func newSite(t *testing.T, p *provider) *site {
	t.Helper()
	s := &site{}
	var err error
	now := func() time.Time { return time.Now().Add(s.ahead) }
	if s.db, err = store.Open(t.Context(), storetest.SQLite(t), store.Options{Now: now}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.db.Close() })
	s.login = &Login{
		Tokens:      []Token{{operate.Actor{Name: "paula", Role: operate.Policy}, sha256.Sum256([]byte("secret"))}, {operate.Actor{Name: "rita", Role: operate.Reader}, sha256.Sum256([]byte("other"))}},
		Sessions:    s.db,
		SessionTime: time.Hour, Source: func(*http.Request) string { return "here" }, Now: now,
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /", func(w http.ResponseWriter, r *http.Request) {
		a, err := s.login.Actor(r)
		fmt.Fprintf(w, "%s %s", a.Name, a.Role)
		if err != nil {
			fmt.Fprintf(w, " %v", err)
		}
	})
	s.Server = httptest.NewTLSServer(mux)
	t.Cleanup(s.Close)
	if p != nil {
		s.login.OIDC = &OIDC{
			Issuer: p.URL, ClientID: p.client.id, ClientSecret: p.client.secret, RedirectURL: s.URL + "/oidc/callback", NameClaim: "email", RolesClaim: "groups",
			Roles: map[operate.Role][]string{operate.Reader: {"staff"}, operate.Operator: {"ops"}, operate.Policy: {"security", "root"}}, Client: p.Client(),
		}
	}
	for pattern, h := range s.login.Routes() {
		mux.HandleFunc(pattern, h)
	}
	return s
}

// browser is a client that keeps cookies, of one person, and follows redirects
// where it is told to.
type browser struct {
	t       *testing.T
	cookies map[string]string // by host and name
	client  *http.Client
}

func newBrowser(t *testing.T, s *site) *browser {
	c := s.Client()
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	// Both are by httptest's one CA.
	return &browser{t, map[string]string{}, c}
}

func (b *browser) do(method, address, form string) *http.Response {
	b.t.Helper()
	r, err := http.NewRequest(method, address, strings.NewReader(form))
	if err != nil {
		b.t.Fatal(err)
	}
	if form != "" {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	for key, value := range b.cookies {
		if host, name, _ := strings.Cut(key, " "); host == r.URL.Host {
			r.AddCookie(&http.Cookie{Name: name, Value: value})
		}
	}
	resp, err := b.client.Do(r)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, c := range resp.Cookies() {
		if !c.Secure || !c.HttpOnly || c.SameSite != http.SameSiteLaxMode || c.Path != "/" || c.Domain != "" || !strings.HasPrefix(c.Name, "__Host-") {
			b.t.Errorf("cookie %s", c)
		}
		if key := r.URL.Host + " " + c.Name; c.MaxAge < 0 {
			delete(b.cookies, key)
		} else {
			b.cookies[key] = c.Value
		}
	}
	return resp
}

// follow goes where redirects lead, at most n of them, and gives the last address.
func (b *browser) follow(method, address, form string, n int) string {
	b.t.Helper()
	for range n {
		resp := b.do(method, address, form)
		resp.Body.Close()
		to, err := resp.Location()
		if err != nil {
			return address
		}
		method, address, form = "GET", to.String(), ""
	}
	return address
}

func (b *browser) who(s *site) string {
	b.t.Helper()
	resp := b.do("GET", s.URL+"/", "")
	defer resp.Body.Close()
	var who [200]byte
	n, _ := resp.Body.Read(who[:])
	return string(who[:n])
}

func TestStaticTokens(t *testing.T) {
	s := newSite(t, nil)
	for _, c := range []struct {
		header []string
		want   operate.Actor
		err    error
	}{
		{nil, operate.Actor{}, nil},
		{[]string{"Bearer secret"}, operate.Actor{Name: "paula", Role: operate.Policy}, nil},
		{[]string{"bearer other"}, operate.Actor{Name: "rita", Role: operate.Reader}, nil},
		{[]string{"Bearer secre"}, operate.Actor{}, ErrRefused},
		{[]string{"Bearer secret "}, operate.Actor{}, ErrRefused},
		{[]string{"Bearer "}, operate.Actor{}, ErrRefused},
		{[]string{""}, operate.Actor{}, ErrRefused},
		{[]string{"Basic secret"}, operate.Actor{}, ErrRefused},
		{[]string{"Bearer secret", "Bearer other"}, operate.Actor{}, ErrRefused},
		{[]string{"Bearer a.b.c"}, operate.Actor{}, ErrRefused},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header["Authorization"] = c.header
		if c.header == nil {
			delete(r.Header, "Authorization")
		}
		if a, err := s.login.Actor(r); a != c.want || !errors.Is(err, c.err) {
			t.Errorf("%q: %+v, %v", c.header, a, err)
		}
	}
}

// A session begins with a token, and ends by logging out, by time, and with the
// token.
func TestSessions(t *testing.T) {
	s := newSite(t, nil)
	b := newBrowser(t, s)
	if to := b.follow("POST", s.URL+"/login", "token=wrong&next=/nodes/x", 1); to != s.URL+"/login?failed=token&next=%2Fnodes%2Fx" {
		t.Error(to)
	}
	if to := b.follow("POST", s.URL+"/login", "token=secret&next=/nodes/x", 1); to != s.URL+"/nodes/x" {
		t.Error(to)
	}
	if who := b.who(s); who != "paula policy" {
		t.Error(who)
	}
	for _, next := range []string{"//evil.example", "https://evil.example", "/\\evil.example", "/%09/evil.example", "", "nodes", "/a%0d%0aSet-Cookie:x", strings.Repeat("/x", 2000)} {
		if to := newBrowser(t, s).follow("POST", s.URL+"/login", "token=secret&next="+next, 1); to != s.URL+"/" {
			t.Errorf("%q leads to %s", next, to)
		}
	}
	// What the browser has is not what the database has.
	if b.cookies[s.Listener.Addr().String()+" "+sessionCookie] == "" {
		t.Fatal(b.cookies)
	}
	stolen := &browser{t, map[string]string{s.Listener.Addr().String() + " " + sessionCookie: digest(b.cookies[s.Listener.Addr().String()+" "+sessionCookie])}, b.client}
	if who := stolen.who(s); who != " nobody" {
		t.Errorf("a digest out of the database logs in: %s", who)
	}
	old := b.cookies[s.Listener.Addr().String()+" "+sessionCookie]
	b.follow("POST", s.URL+"/logout", "", 1)
	if who := b.who(s); who != " nobody" {
		t.Error(who)
	}
	b.cookies[s.Listener.Addr().String()+" "+sessionCookie] = old
	if who := b.who(s); who != " nobody" {
		t.Errorf("a session goes on after it was ended: %s", who)
	}
	b.follow("POST", s.URL+"/login", "token=secret", 1)
	tokens := s.login.Tokens
	s.login.Tokens = tokens[1:]
	if who := b.who(s); who != " nobody" {
		t.Errorf("a session goes on without its token: %s", who)
	}
	s.login.Tokens = tokens
	s.ahead = 2 * time.Hour
	if who := b.who(s); who != " nobody" {
		t.Errorf("a session goes on for ever: %s", who)
	}
}

func TestOIDC(t *testing.T) {
	p := newProvider(t)
	s := newSite(t, p)
	login := func() (string, *browser) {
		b := newBrowser(t, s)
		return b.follow("GET", s.URL+"/oidc/login?next=/vms", "", 3), b
	}
	p.claims = map[string]any{"email": "olga@example.org", "email_verified": true, "groups": []string{"staff", "ops"}}
	to, b := login()
	if to != s.URL+"/vms" || b.who(s) != "olga@example.org operator" {
		t.Fatalf("%s, %s", to, b.who(s))
	}
	// Each claim that is missing or wrong, and each attack.
	for name, c := range map[string]struct {
		change func(map[string]any)
		failed string
	}{
		"no group":       {func(c map[string]any) { c["groups"] = []string{"guests"} }, "role"},
		"no claim":       {func(c map[string]any) { delete(c, "groups") }, "role"},
		"no name":        {func(c map[string]any) { delete(c, "email") }, "oidc"},
		"not verified":   {func(c map[string]any) { c["email_verified"] = false }, "oidc"},
		"strange name":   {func(c map[string]any) { c["email"] = "a\nb" }, "oidc"},
		"other audience": {func(c map[string]any) { c["aud"] = "another" }, "oidc"},
		"other issuer":   {func(c map[string]any) { c["iss"] = "https://evil.example" }, "oidc"},
		"expired":        {func(c map[string]any) { c["exp"] = time.Now().Add(-time.Hour).Unix() }, "oidc"},
		"other nonce":    {func(c map[string]any) { c["nonce"] = "another" }, "oidc"},
	} {
		p.mu.Lock()
		p.change = c.change
		p.mu.Unlock()
		if to, b := login(); to != s.URL+"/login?failed="+c.failed+"&next=%2Fvms" || b.who(s) != " nobody" {
			t.Errorf("%s: %s, %s", name, to, b.who(s))
		}
	}
	p.change = nil
	// The provider has a new key.
	p.rotate("k2")
	if to, _ := login(); to != s.URL+"/vms" {
		t.Error(to)
	}
	// Another browser comes back from the provider: a link that was sent to a victim.
	b = newBrowser(t, s)
	callback := b.follow("GET", s.URL+"/oidc/login", "", 2)
	if to := newBrowser(t, s).follow("GET", callback, "", 1); !strings.Contains(to, "failed=oidc") {
		t.Errorf("login as another: %s", to)
	}
	victim := newBrowser(t, s)
	victim.follow("GET", s.URL+"/oidc/login", "", 1)
	if to := victim.follow("GET", callback, "", 1); !strings.Contains(to, "failed=oidc") {
		t.Errorf("login as another: %s", to)
	}
	// The same way back twice.
	b = newBrowser(t, s)
	callback = b.follow("GET", s.URL+"/oidc/login", "", 2)
	cookies := map[string]string{}
	for k, v := range b.cookies {
		cookies[k] = v
	}
	if to := b.follow("GET", callback, "", 1); to != s.URL+"/" {
		t.Error(to)
	}
	b.cookies = cookies
	if to := b.follow("GET", callback, "", 1); !strings.Contains(to, "failed=oidc") {
		t.Errorf("the way back twice: %s", to)
	}
	// Too late.
	b = newBrowser(t, s)
	callback = b.follow("GET", s.URL+"/oidc/login", "", 2)
	s.ahead = flowTime + time.Second
	if to := b.follow("GET", callback, "", 1); !strings.Contains(to, "failed=oidc") {
		t.Errorf("too late: %s", to)
	}
}

// A program brings the provider's token itself.
func TestOIDCBearer(t *testing.T) {
	p := newProvider(t)
	s := newSite(t, p)
	p.claims = map[string]any{"email": "ci@example.org", "groups": "security"}
	ask := func(token string) (operate.Actor, error) {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Authorization", "Bearer "+token)
		return s.login.Actor(r)
	}
	if a, err := ask(p.token(nil)); err != nil || a != (operate.Actor{Name: "ci@example.org", Role: operate.Policy}) {
		t.Errorf("%+v, %v", a, err)
	}
	if a, err := ask(p.token(map[string]any{"groups": []string{"none"}})); err != nil || a.Role != operate.Nobody || a.Known() {
		t.Errorf("%+v, %v", a, err)
	}
	// Forged: without a signature, or with the public key as an HMAC's (RFC 8725, 2.1).
	parts := strings.Split(p.token(nil), ".")
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`))
	pub, err := (&jose.JSONWebKey{Key: p.key.Public()}).Thumbprint(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	mac, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: pub}, nil)
	if err != nil {
		t.Fatal(err)
	}
	confused, err := jwt.Signed(mac).Claims(map[string]any{"iss": p.URL, "aud": p.client.id, "exp": time.Now().Add(time.Hour).Unix(), "email": "x", "groups": "root"}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	for name, token := range map[string]string{
		"other signature": parts[0] + "." + parts[1] + "." + base64.RawURLEncoding.EncodeToString(make([]byte, 64)),
		"none":            none + "." + parts[1] + ".", "HMAC": confused, "nothing": "..", "other audience": p.token(map[string]any{"aud": "another"}),
		"expired": p.token(map[string]any{"exp": time.Now().Add(-time.Hour).Unix()}),
	} {
		if a, err := ask(token); !errors.Is(err, ErrRefused) || a.Known() {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
}

// A provider that is away refuses nobody, and is not asked all the time.
func TestProviderAway(t *testing.T) {
	p := newProvider(t)
	s := newSite(t, p)
	token := p.token(map[string]any{"email": "x@example.org", "groups": "ops"})
	issuer := p.URL
	s.login.OIDC.Issuer = "https://127.0.0.1:1"
	ask := func() error {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Authorization", "Bearer "+token)
		_, err := s.login.Actor(r)
		return err
	}
	if err := ask(); !errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
	b := newBrowser(t, s)
	if to := b.follow("GET", s.URL+"/oidc/login", "", 1); to != s.URL+"/login?failed=unavailable" {
		t.Error(to)
	}
	// Static tokens work on.
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("Authorization", "Bearer secret")
	if a, err := s.login.Actor(r); err != nil || a.Name != "paula" {
		t.Errorf("%+v, %v", a, err)
	}
	s.login.OIDC.Issuer = issuer
	if err := ask(); !errors.Is(err, ErrUnavailable) || p.asked != 0 {
		t.Errorf("it was asked again at once: %v", err)
	}
	s.login.OIDC.tried = time.Time{}
	if err := ask(); err != nil {
		t.Error(err)
	}
}
