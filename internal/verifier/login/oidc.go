package login

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"

	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
)

// OIDC is an OpenID Connect provider (OpenID Connect Core 1.0). It need not
// answer when the Verifier starts.
type OIDC struct {
	Issuer, ClientID, ClientSecret, RedirectURL string
	NameClaim, RolesClaim                       string
	Roles                                       map[operate.Role][]string // values of RolesClaim
	Client                                      *http.Client              // nil: http.DefaultClient with a timeout

	mu       sync.Mutex
	provider *oidc.Provider
	tried    time.Time
}

// What the provider gets for an answer, and how often it is asked while it
// gives none.
const (
	providerTimeout = 10 * time.Second
	providerPause   = 5 * time.Second
	flowTime        = 10 * time.Minute // for the person at the provider's page
)

// ErrUnavailable says that the provider does not answer: nobody was refused.
var ErrUnavailable = errors.New("the OpenID provider does not answer")

// client is bound to the provider's for the whole life of its key set.
func (o *OIDC) client(ctx context.Context) context.Context {
	c := o.Client
	if c == nil {
		c = &http.Client{Timeout: providerTimeout}
	}
	return oidc.ClientContext(ctx, c)
}

func (o *OIDC) discover(ctx context.Context) (*oidc.Provider, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.provider != nil {
		return o.provider, nil
	}
	if time.Since(o.tried) < providerPause {
		return nil, ErrUnavailable
	}
	o.tried = time.Now()
	ctx, cancel := context.WithTimeout(ctx, providerTimeout)
	defer cancel()
	p, err := oidc.NewProvider(o.client(ctx), o.Issuer)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	o.provider = p
	return p, nil
}

// bearer takes a JWT that the provider signed for this client.
func (o *OIDC) bearer(ctx context.Context, raw string) (operate.Actor, error) {
	p, err := o.discover(ctx)
	if err != nil {
		return operate.Actor{}, err
	}
	a, _, err := o.verify(ctx, p, raw)
	return a, err
}

func (o *OIDC) verify(ctx context.Context, p *oidc.Provider, raw string) (operate.Actor, *oidc.IDToken, error) {
	// The key set keeps what it has fetched; the context is for this look alone.
	ctx, cancel := context.WithTimeout(ctx, providerTimeout)
	defer cancel()
	t, err := p.VerifierContext(o.client(context.WithoutCancel(ctx)), &oidc.Config{
		ClientID: o.ClientID, SupportedSigningAlgs: []string{oidc.RS256, oidc.ES256, oidc.PS256, oidc.EdDSA},
	}).Verify(ctx, raw)
	if err != nil {
		return operate.Actor{}, nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	claims := map[string]any{}
	if err := t.Claims(&claims); err != nil {
		return operate.Actor{}, nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	name, _ := claims[o.NameClaim].(string)
	if verified, said := claims["email_verified"].(bool); o.NameClaim == "email" && said && !verified {
		return operate.Actor{}, nil, fmt.Errorf("%w: its e-mail address is not verified", ErrRefused)
	}
	if !operate.ValidName(name) {
		return operate.Actor{}, nil, fmt.Errorf("%w: its claim %q is no name", ErrRefused, o.NameClaim)
	}
	return operate.Actor{Name: name, Role: o.role(claims[o.RolesClaim])}, t, nil
}

// role is the highest that one of the claim's values leads to.
func (o *OIDC) role(claim any) operate.Role {
	var values []string
	switch c := claim.(type) {
	case string:
		values = []string{c}
	case []any:
		for _, v := range c {
			if s, ok := v.(string); ok {
				values = append(values, s)
			}
		}
	}
	best := operate.Nobody
	for role, names := range o.Roles {
		if role > best && slices.ContainsFunc(names, func(n string) bool { return slices.Contains(values, n) }) {
			best = role
		}
	}
	return best
}

// flow is what is kept while the person is at the provider.
type flow struct{ Nonce, Verifier, Next, Browser string }

// flowPurpose is that of the challenges in the store; their ID is the state.
const flowPurpose = "oidc"

func (o *OIDC) oauth(p *oidc.Provider) *oauth2.Config {
	return &oauth2.Config{
		ClientID: o.ClientID, ClientSecret: o.ClientSecret, RedirectURL: o.RedirectURL, Endpoint: p.Endpoint(),
		Scopes: []string{oidc.ScopeOpenID, "profile", "email"},
	}
}

func (l *Login) toProvider(w http.ResponseWriter, r *http.Request) {
	next := local(r.FormValue("next"))
	p, err := l.OIDC.discover(r.Context())
	if err != nil {
		failed(w, r, "unavailable", next)
		return
	}
	// The cookie ties the flow to this browser: nobody is logged in as somebody
	// else by a link that he follows.
	browser, state := rand.Text(), rand.Text()
	f := flow{Nonce: rand.Text(), Verifier: oauth2.GenerateVerifier(), Next: next, Browser: digest(browser)}
	data, err := json.Marshal(f)
	if err == nil {
		err = l.Sessions.PutChallenge(r.Context(), fleet.Challenge{
			ID: state, Purpose: flowPurpose, Source: l.Source(r), Data: data, Expires: l.Now().Add(flowTime),
		})
	}
	if err != nil {
		failed(w, r, "unavailable", next)
		return
	}
	http.SetCookie(w, cookie(flowCookie, browser, int(flowTime/time.Second)))
	http.Redirect(w, r, l.OIDC.oauth(p).AuthCodeURL(state, oidc.Nonce(f.Nonce), oauth2.S256ChallengeOption(f.Verifier)), http.StatusSeeOther)
}

func (l *Login) fromProvider(w http.ResponseWriter, r *http.Request) {
	var f flow
	c, err := r.Cookie(flowCookie)
	if err != nil {
		failed(w, r, "oidc", "/")
		return
	}
	http.SetCookie(w, cookie(flowCookie, "", -1))
	challenge, err := l.Sessions.TakeChallenge(r.Context(), flowPurpose, r.FormValue("state"))
	switch {
	case errors.Is(err, store.ErrUnavailable):
		failed(w, r, "unavailable", "/")
		return
	case err != nil || json.Unmarshal(challenge.Data, &f) != nil || digest(c.Value) != f.Browser:
		failed(w, r, "oidc", "/")
		return
	}
	p, err := l.OIDC.discover(r.Context())
	if err != nil {
		failed(w, r, "unavailable", f.Next)
		return
	}
	ctx, cancel := context.WithTimeout(l.OIDC.client(r.Context()), providerTimeout)
	defer cancel()
	token, err := l.OIDC.oauth(p).Exchange(ctx, r.FormValue("code"), oauth2.VerifierOption(f.Verifier))
	if err != nil {
		failed(w, r, "oidc", f.Next)
		return
	}
	raw, _ := token.Extra("id_token").(string)
	actor, id, err := l.OIDC.verify(ctx, p, raw)
	switch {
	case err != nil || id.Nonce != f.Nonce:
		failed(w, r, "oidc", f.Next)
	case !actor.Known():
		failed(w, r, "role", f.Next)
	default:
		l.start(w, r, actor, nil, f.Next)
	}
}
