package verifier

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/verifier/api"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/cakey"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/login"
	"virt-trust/internal/verifier/metrics"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/page"
	"virt-trust/internal/verifier/rounds"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/webhook"
)

// verifier is what Run puts together.
type verifier struct {
	store   *store.Store
	metrics *metrics.Metrics
	results *results
	login   *logins
	sender  *webhook.Sender
	tls     *tls.Config
	handler http.Handler // for everybody

	browsers *pair        // nil where there is no way in for browsers
	people   http.Handler // what is there: all but what nodes come for
	nodesAt  net.Addr     // where nodes come
}

func open(ctx context.Context, o Options) (*verifier, error) {
	cfg := o.Config
	authority, err := cakey.Open(cfg.CA.Certificate, cfg.CA.Key)
	if err != nil {
		return nil, err
	}
	if cfg.CA.CRLURL != "" {
		authority.Points = []string{cfg.CA.CRLURL}
	}
	makers, err := manufacturers(cfg.Enrolment.ManufacturerRoots)
	if err != nil {
		return nil, err
	}
	manifests, err := manifestKeys(cfg.Policy.ManifestKeys)
	if err != nil {
		return nil, err
	}
	own, err := names(cfg)
	if err != nil {
		return nil, err
	}
	v := &verifier{tls: rounds.TLSConfig(authority, own, time.Now)}
	if _, err := v.tls.GetCertificate(nil); err != nil {
		return nil, err
	}
	if cfg.Browsers.Certificate != "" {
		if v.browsers, err = openPair(cfg.Browsers, o.Log); err != nil {
			return nil, err
		}
	}
	if v.results, err = newResults(cfg.Results.Keys, o.Version); err != nil {
		return nil, err
	}
	if v.store, err = store.Open(ctx, cfg.Database, store.Options{}); err != nil {
		return nil, err
	}
	if err := v.compose(o, authority, makers, manifests); err != nil {
		return nil, errors.Join(err, v.store.Close())
	}
	return v, nil
}

func (v *verifier) compose(o Options, authority *ca.Authority, makers *ca.Manufacturers, manifests []any) error {
	cfg := o.Config
	own, err := names(cfg)
	if err != nil {
		return err
	}
	v.metrics = metrics.New(metrics.Options{
		Version: o.Version, Fleet: v.store, CAUntil: authority.Certificate().NotAfter,
		Server: func() (time.Time, bool) {
			c, err := v.tls.GetCertificate(nil)
			if err != nil {
				return time.Time{}, false
			}
			return c.Leaf.NotAfter, true
		},
		Browsers: func() (time.Time, bool) {
			if v.browsers == nil {
				return time.Time{}, false
			}
			return v.browsers.until(), true
		},
	})
	if v.login, err = newLogins(cfg, v.store); err != nil {
		return err
	}
	guard := webhook.Guard{AllowHTTP: cfg.Webhooks.AllowHTTP}
	for _, n := range cfg.Webhooks.AllowNetworks {
		p, err := netip.ParsePrefix(n)
		if err != nil {
			return err
		}
		guard.Allow = append(guard.Allow, p)
	}
	v.sender = &webhook.Sender{Queue: v.store, Client: guard.Client(), Now: time.Now, Log: o.Log, Observe: v.metrics.Delivered}
	policy := &policies{store: v.store, learn: learns(cfg), unset: defaultPolicy(cfg)}

	nodes, err := rounds.New(rounds.Options{
		Store: v.store, CA: authority, Manufacturers: makers, Policy: policy.get, Rules: admission(cfg),
		Log: o.Log, Interval: time.Duration(cfg.Rounds.Interval), Anonymous: cfg.Limits.Anonymous, Observe: v.metrics,
	})
	if err != nil {
		return err
	}
	service := &operate.Service{
		Store: v.store, Pin: authority.Pin(), FourEyes: cfg.Policy.FourEyes, Learning: learns(cfg), ManifestKeys: manifests,
		Unset: policy.document(), Guard: guard, Deliver: v.sender.Deliver, Now: time.Now,
	}
	people := api.New(api.Config{
		Store: v.store, Operate: service, Results: func() api.Results { return v.results.Load() }, Actor: v.login.actor,
		Node: func(r *http.Request) (fleet.Node, bool, error) {
			id, err := authority.VerifyNode(r.TLS.VerifiedChains, time.Now())
			if err != nil {
				return fleet.Node{}, false, nil // the certificate of somebody else
			}
			n, err := v.store.Node(r.Context(), id.Node)
			if errors.Is(err, store.ErrNotFound) {
				return n, false, nil
			}
			return n, err == nil && n.State == fleet.Active, err
		},
		Metrics: v.metrics.Handler(), DatabaseError: v.metrics.DatabaseError, Version: o.Version, OpenTo: cfg.Results.Access == "open",
		Requests: cfg.Limits.Requests, Others: cfg.Limits.Anonymous, Now: time.Now, Log: o.Log,
	})
	mux := http.NewServeMux()
	people.Mount(mux)
	for pattern := range v.login.routes() {
		mux.Handle(pattern, people.Person(v.login.serve(pattern)))
	}
	web, err := page.New(page.Config{
		Store: v.store, Operator: service, OIDC: cfg.OIDC.Issuer != "", FourEyes: cfg.Policy.FourEyes, Learn: learns(cfg), HookEvents: webhook.Events(), Log: o.Log,
		Nodes: func() string { return v.enrolAt(own[0]) },
	})
	if err != nil {
		return err
	}
	mux.Handle("/", people.Person(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/live" {
			// What follows is no request any more: its reader sends nothing, and is not slow.
			if err := http.NewResponseController(w).SetReadDeadline(time.Time{}); err != nil {
				o.Log.WithError(err).Warn("a live page ends with the time for its request")
			}
		}
		web.ServeHTTP(w, r)
	})))
	all := http.NewServeMux()
	for _, p := range rounds.Patterns() {
		all.Handle(p, nodes)
	}
	all.Handle("/", mux)
	v.handler, v.people = protect(all), protect(mux)
	return nil
}

// enrolAt is the host and port where nodes enrol, where that is not where people
// come.
func (v *verifier) enrolAt(name string) string {
	if a, ok := v.nodesAt.(*net.TCPAddr); ok && v.browsers != nil {
		return net.JoinHostPort(name, strconv.Itoa(a.Port))
	}
	return ""
}

// learns: with four eyes nothing is, since nobody has looked.
func learns(cfg config.Verifier) bool {
	return cfg.Policy.ReferenceValues == "learn" && !cfg.Policy.FourEyes
}

// admission: with four eyes a token alone, which one person gives out, lets nobody in.
func admission(cfg config.Verifier) ca.Rules {
	return ca.Rules{Operator: cfg.Enrolment.Approval == "operator" || cfg.Policy.FourEyes}
}

// protect does for every answer what browsers have to be told, and refuses what
// another site's page makes a browser send with somebody's cookie.
func protect(h http.Handler) http.Handler {
	p := http.NewCrossOriginProtection()
	p.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { api.DenyCrossOrigin(w) }))
	h = p.Handler(h)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Strict-Transport-Security", "max-age=31536000")
		h.ServeHTTP(w, r)
	})
}

// defaultPolicy is the one that counts where none was set: results live as long
// as the configuration says.
func defaultPolicy(cfg config.Verifier) *appraise.Policy {
	p := appraise.DefaultPolicy()
	p.MaxAge = appraise.Seconds(cfg.Rounds.Lifetime)
	return p
}

// policies gives the policy that counts. It looks into the database every
// policyTime: rounds are more.
type policies struct {
	store *store.Store
	learn bool
	unset *appraise.Policy

	mu      sync.Mutex
	looked  time.Time
	version int64
	now     *appraise.Policy
}

const policyTime = 2 * time.Second

func (p *policies) get(ctx context.Context) (rounds.Policy, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.now != nil && time.Since(p.looked) < policyTime {
		return rounds.Policy{Appraisal: p.now, Learn: p.learn}, nil
	}
	s, err := p.store.Setting(ctx, operate.PolicySetting)
	switch {
	case errors.Is(err, store.ErrNotFound):
		p.now, p.version = p.unset, 0
	case err != nil:
		return rounds.Policy{}, err // not the one of a moment ago
	case p.now == nil || s.Version != p.version:
		parsed, err := appraise.ParsePolicy(s.Data)
		if err != nil {
			return rounds.Policy{}, fmt.Errorf("policy, version %d: %w", s.Version, err)
		}
		p.now, p.version = parsed, s.Version
	}
	p.looked = time.Now()
	return rounds.Policy{Appraisal: p.now, Learn: p.learn}, nil
}

// document is the policy that counts where none was set, as JSON.
func (p *policies) document() []byte {
	b, err := json.Marshal(p.unset)
	if err != nil {
		return []byte("{}") // a struct of plain fields: no error
	}
	return b
}

// logins is who may log in, which a reload changes.
type logins struct {
	now atomic.Pointer[login.Login]
	db  *store.Store
}

func newLogins(cfg config.Verifier, db *store.Store) (*logins, error) {
	l := &logins{db: db}
	return l, l.set(cfg)
}

func (l *logins) set(cfg config.Verifier) error {
	n := &login.Login{Sessions: l.db, SessionTime: time.Duration(cfg.People.SessionTime), Source: api.Source, Now: time.Now}
	for _, t := range cfg.Tokens {
		a := operate.Actor{Name: cmp.Or(t.Person, t.Name)}
		if err := a.Role.UnmarshalText([]byte(t.Role)); err != nil {
			return err
		}
		b, err := hex.DecodeString(t.SHA256)
		if err != nil || len(b) != sha256.Size {
			return fmt.Errorf("token of %q: no SHA-256 digest", t.Name)
		}
		n.Tokens = append(n.Tokens, login.Token{Actor: a, SHA256: [sha256.Size]byte(b)})
	}
	if o := cfg.OIDC; o.Issuer != "" {
		s, err := secret(o)
		if err != nil {
			return err
		}
		n.OIDC = &login.OIDC{
			Issuer: o.Issuer, ClientID: o.ClientID, ClientSecret: s, RedirectURL: o.RedirectURL, NameClaim: o.NameClaim, RolesClaim: o.RolesClaim,
			Roles: map[operate.Role][]string{operate.Reader: o.Reader, operate.Operator: o.Operator, operate.Policy: o.Policy},
		}
	}
	l.now.Store(n)
	return nil
}

func (l *logins) actor(r *http.Request) (operate.Actor, error) { return l.now.Load().Actor(r) }

func (l *logins) routes() map[string]http.HandlerFunc { return l.now.Load().Routes() }

// serve serves one of the routes as it is now.
func (l *logins) serve(pattern string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		h, ok := l.routes()[pattern]
		if !ok {
			http.NotFound(w, r)
			return
		}
		h(w, r)
	}
}
