// Package login finds out who asks: by a static token, by OpenID Connect, or by
// the session that either led to. It knows nothing of what people may do.
package login

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"time"

	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
)

// Token is a static token as the Verifier knows it.
type Token struct {
	Actor  operate.Actor
	SHA256 [sha256.Size]byte
}

// Sessions is what a *store.Store does for sessions and for people on their way
// to the OpenID provider, so that any replica takes up what another began.
type Sessions interface {
	PutSession(context.Context, fleet.Session) error
	Session(ctx context.Context, digest string) (fleet.Session, error)
	DropSession(ctx context.Context, digest string) error
	PutChallenge(context.Context, fleet.Challenge) error
	TakeChallenge(ctx context.Context, purpose, id string) (fleet.Challenge, error)
}

// Login finds out who asks. It keeps no state but the provider's keys.
type Login struct {
	Tokens      []Token
	OIDC        *OIDC // nil: none
	Sessions    Sessions
	SessionTime time.Duration
	Source      func(*http.Request) string // whom challenges are counted for
	Now         func() time.Time
}

// ErrRefused says that someone named himself and was not believed; it is never
// taken for no name at all.
var ErrRefused = errors.New("the token is not valid, or no longer")

// Actor says who asks: the zero Actor where nobody said so, ErrRefused where
// the token is none of ours, another error where it could not be told. An old
// cookie is as none.
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
	s, err := l.Sessions.Session(r.Context(), digest(c.Value))
	if errors.Is(err, store.ErrNotFound) {
		return operate.Actor{}, nil
	}
	if err != nil {
		return operate.Actor{}, err
	}
	return l.of(s), nil
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

// static looks a digest up. All digests are compared, in constant time, so that
// nothing is told by how long it takes.
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

func digest(secret string) string {
	d := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(d[:])
}

// of gives whose session it is. One that began with a static token, whose digest
// is its data, ends when that is taken out of the configuration.
func (l *Login) of(s fleet.Session) operate.Actor {
	if len(s.Data) == sha256.Size {
		if t := l.static([sha256.Size]byte(s.Data)); t != nil {
			return t.Actor
		}
		return operate.Actor{}
	}
	a := operate.Actor{Name: s.Person}
	if a.Role.UnmarshalText([]byte(s.Role)) != nil {
		return operate.Actor{}
	}
	return a
}

// start begins a session and leads to next.
func (l *Login) start(w http.ResponseWriter, r *http.Request, a operate.Actor, data []byte, next string) {
	secret, now := rand.Text(), l.Now()
	err := l.Sessions.PutSession(r.Context(), fleet.Session{
		Digest: digest(secret), Person: a.Name, Role: a.Role.String(), Data: data, Created: now, Expires: now.Add(l.SessionTime),
	})
	if err != nil {
		failed(w, r, "unavailable", next)
		return
	}
	http.SetCookie(w, cookie(sessionCookie, secret, int(l.SessionTime/time.Second)))
	http.Redirect(w, r, next, http.StatusSeeOther)
}

func cookie(name, value string, age int) *http.Cookie {
	return &http.Cookie{Name: name, Value: value, Path: "/", MaxAge: age, Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode}
}

// Routes are the handlers of the page's login, each by its pattern of
// http.ServeMux:
//
//	POST /login          form: token, next; begins a session and leads to next
//	POST /logout         ends it and leads to /
//	GET  /oidc/login     ?next=; to the OpenID provider, where one is configured
//	GET  /oidc/callback  back from there
//
// Who fails is led to /login?failed=REASON: token, oidc, role, unavailable; with
// next, if there was one.
func (l *Login) Routes() map[string]http.HandlerFunc {
	routes := map[string]http.HandlerFunc{"POST /login": l.login, "POST /logout": l.logout}
	if l.OIDC != nil {
		routes["GET /oidc/login"], routes["GET /oidc/callback"] = l.toProvider, l.fromProvider
	}
	return routes
}

func (l *Login) login(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, 64<<10)
	next := local(r.PostFormValue("next"))
	d := sha256.Sum256([]byte(r.PostFormValue("token")))
	t := l.static(d)
	if t == nil {
		failed(w, r, "token", next)
		return
	}
	l.start(w, r, t.Actor, d[:], next)
}

func (l *Login) logout(w http.ResponseWriter, r *http.Request) {
	if c, err := r.Cookie(sessionCookie); err == nil {
		if err := l.Sessions.DropSession(r.Context(), digest(c.Value)); err != nil {
			http.Error(w, "The session could not be ended; try again.", http.StatusServiceUnavailable)
			return
		}
	}
	http.SetCookie(w, cookie(sessionCookie, "", -1))
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

func failed(w http.ResponseWriter, r *http.Request, why, next string) {
	q := url.Values{"failed": {why}}
	if next != "/" {
		q.Set("next", next)
	}
	http.Redirect(w, r, "/login?"+q.Encode(), http.StatusSeeOther)
}

// local lets a redirect lead to this host alone: a path that no browser takes
// for another host's ("//", "/\").
func local(next string) string {
	if len(next) > 2000 || !strings.HasPrefix(next, "/") || strings.HasPrefix(next, "//") || strings.ContainsAny(next, "\\\r\n\t") {
		return "/"
	}
	return next
}
