// Package login finds out who asks: by a static token, by OpenID Connect, or by
// the session cookie that either led to. It knows nothing of what people may do.
package login

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"virt-trust/internal/verifier/operate"
)

// Token is a static token as the Verifier knows it.
type Token struct {
	Actor  operate.Actor
	SHA256 [sha256.Size]byte
}

// Login finds out who asks.
type Login struct {
	Tokens      []Token
	OIDC        *OIDC // nil: none
	SessionTime time.Duration
	Now         func() time.Time

	seal cipher.AEAD
}

// SessionKeySize is that of the key under which cookies are sealed.
const SessionKeySize = 32

// New makes a Login. sessionKey has SessionKeySize bytes, the same in all
// replicas.
func New(l Login, sessionKey []byte) (*Login, error) {
	if len(sessionKey) != SessionKeySize {
		return nil, fmt.Errorf("the session key has %d bytes, not %d", len(sessionKey), SessionKeySize)
	}
	block, err := aes.NewCipher(sessionKey)
	if err != nil {
		return nil, err
	}
	if l.seal, err = cipher.NewGCM(block); err != nil {
		return nil, err
	}
	if l.Now == nil {
		l.Now = time.Now
	}
	return &l, nil
}

// ErrRefused says that someone named himself and was not believed; it is never
// taken for no name at all.
var ErrRefused = errors.New("the token is not valid, or no longer")

// Actor says who asks: the zero Actor where nobody said so, ErrRefused where
// the token or cookie is none of ours, another error where it could not be told.
func (l *Login) Actor(r *http.Request) (operate.Actor, error) {
	if header := r.Header.Values("Authorization"); len(header) > 0 {
		scheme, token, _ := strings.Cut(header[0], " ")
		if len(header) > 1 || !strings.EqualFold(scheme, "Bearer") || token == "" {
			return operate.Actor{}, ErrRefused
		}
		return l.bearer(r.Context(), token)
	}
	c, err := r.Cookie(sessionCookie)
	if err != nil {
		return operate.Actor{}, nil
	}
	s, err := l.session(c.Value)
	if err != nil {
		return operate.Actor{}, nil // an old cookie: as if logged out
	}
	return s, nil
}

func (l *Login) bearer(ctx context.Context, token string) (operate.Actor, error) {
	if t := l.static(sha256.Sum256([]byte(token))); t != nil {
		return t.Actor, nil
	}
	if l.OIDC != nil && strings.Count(token, ".") == 2 {
		return l.OIDC.bearer(ctx, token)
	}
	return operate.Actor{}, ErrRefused
}

// static looks a digest up. Digests are compared, in constant time, and all of
// them, so that nothing is told by how long it takes.
func (l *Login) static(digest [sha256.Size]byte) *Token {
	var found *Token
	for i := range l.Tokens {
		if subtle.ConstantTimeCompare(l.Tokens[i].SHA256[:], digest[:]) == 1 {
			found = &l.Tokens[i]
		}
	}
	return found
}

// Cookies have the prefix __Host-: browsers take them over TLS from this host
// alone, and send them to no other.
const (
	sessionCookie = "__Host-virt-trust"
	flowCookie    = "__Host-virt-trust-login"
)

// session is what is sealed in the cookie. Of a static token the digest is
// kept, so that the session ends when the token is taken out.
type session struct {
	Actor   operate.Actor
	Token   string `json:",omitempty"`
	Expires int64
}

func (l *Login) session(value string) (operate.Actor, error) {
	var s session
	if err := l.open(sessionCookie, value, &s); err != nil {
		return operate.Actor{}, err
	}
	if l.Now().Unix() >= s.Expires {
		return operate.Actor{}, errors.New("the session is over")
	}
	if s.Token == "" {
		return s.Actor, nil
	}
	b, err := hex.DecodeString(s.Token)
	if err != nil || len(b) != sha256.Size {
		return operate.Actor{}, errors.New("no digest")
	}
	t := l.static([sha256.Size]byte(b))
	if t == nil {
		return operate.Actor{}, errors.New("the token was taken out")
	}
	return t.Actor, nil
}

func (l *Login) start(w http.ResponseWriter, s session) error {
	s.Expires = l.Now().Add(l.SessionTime).Unix()
	return l.set(w, sessionCookie, s, l.SessionTime)
}

// set seals v into a cookie, bound to the cookie's name.
func (l *Login) set(w http.ResponseWriter, name string, v any, age time.Duration) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	nonce := make([]byte, l.seal.NonceSize())
	rand.Read(nonce) // never fails
	sealed := l.seal.Seal(nonce, nonce, b, []byte(name))
	http.SetCookie(w, cookie(name, base64.RawURLEncoding.EncodeToString(sealed), int(age/time.Second)))
	return nil
}

func (l *Login) open(name, value string, v any) error {
	b, err := base64.RawURLEncoding.DecodeString(value)
	if err != nil || len(b) < l.seal.NonceSize() {
		return errors.New("no cookie of ours")
	}
	n := l.seal.NonceSize()
	if b, err = l.seal.Open(nil, b[:n], b[n:], []byte(name)); err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

func cookie(name, value string, age int) *http.Cookie {
	return &http.Cookie{Name: name, Value: value, Path: "/", MaxAge: age, Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode}
}

// Routes are the handlers of the page's login, each by its pattern of
// http.ServeMux:
//
//	POST /login          form: token, next; sets the session and leads to next
//	POST /logout         ends it and leads to /
//	GET  /oidc/login     ?next=; to the OpenID provider, where one is configured
//	GET  /oidc/callback  back from there
//
// Who fails is led to /login?failed=REASON: token, oidc, role, unavailable.
func (l *Login) Routes() map[string]http.HandlerFunc {
	routes := map[string]http.HandlerFunc{"POST /login": l.login, "POST /logout": l.logout}
	if l.OIDC != nil {
		routes["GET /oidc/login"], routes["GET /oidc/callback"] = l.toProvider, l.fromProvider
	}
	return routes
}

func (l *Login) login(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, 64<<10)
	digest := sha256.Sum256([]byte(r.PostFormValue("token")))
	if l.static(digest) == nil {
		failed(w, r, "token")
		return
	}
	if err := l.start(w, session{Token: hex.EncodeToString(digest[:])}); err != nil {
		failed(w, r, "unavailable")
		return
	}
	http.Redirect(w, r, local(r.PostFormValue("next")), http.StatusSeeOther)
}

func (l *Login) logout(w http.ResponseWriter, r *http.Request) {
	http.SetCookie(w, cookie(sessionCookie, "", -1))
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

func failed(w http.ResponseWriter, r *http.Request, why string) {
	http.Redirect(w, r, "/login?failed="+why, http.StatusSeeOther)
}

// local lets a redirect lead to this host alone: a path that no browser takes
// for another host's ("//", "/\").
func local(next string) string {
	if len(next) > 2000 || !strings.HasPrefix(next, "/") || strings.HasPrefix(next, "//") || strings.ContainsAny(next, "\\\r\n\t") {
		return "/"
	}
	return next
}
