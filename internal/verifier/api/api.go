// Package api is the Verifier's HTTP interface for people and relying parties:
// REST under /v1, described by the OpenAPI document that it serves. Errors are
// problem+json with stable codes.
//
// Each route says which role it wants, and the one place that serves all routes
// asks for it before the handler runs; operate asks again for what changes
// something. Nothing that changes anything is open to who has not said who he is.
package api

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
)

// Document is the OpenAPI document.
//
//go:embed openapi.json
var Document []byte

// Config is what an API is made of.
type Config struct {
	Store   *store.Store
	Operate *operate.Service
	Results func() Results                                // as they are signed now
	Actor   func(*http.Request) (operate.Actor, error)    // package login
	Node    func(*http.Request) (fleet.Node, bool, error) // who asks, by mutual TLS: an active node
	Metrics http.Handler
	// DatabaseError, where it is not nil, is told each time that the database did not
	// answer.
	DatabaseError func()
	Version       string
	OpenTo        bool // results are for everybody
	Requests      int  // of one person, a minute
	Others        int  // of one address without identity, a minute
	Now           func() time.Time
	Log           *logrus.Entry
}

// Results makes Attestation Results for relying parties.
type Results interface {
	// Sign gives the EAR of a result, for all of it, or for the one VM with this
	// UUID.
	Sign(r *appraise.Result, vm string) (string, error)
	// KeySet is the JWK Set of those whose results may still hold (RFC 7517).
	KeySet() ([]byte, error)
	// Key tells one signing key from another.
	Key() string
}

// API is the interface. It is good for any number of requests at once.
type API struct {
	Config
	signed  *signed
	persons *limits
	others  *limits
}

// New makes an API.
func New(c Config) *API {
	return &API{Config: c, signed: newSigned(), persons: newLimits(c.Requests), others: newLimits(c.Others)}
}

// Route is one operation.
type Route struct {
	Pattern string       // of http.ServeMux
	Role    operate.Role // the least; Nobody: open
	Relying bool         // also for nodes, and for all if the configuration says so
	MaxBody int64        // in bytes; 0: there is none
	handle  func(*request) (any, error)
}

// request is one on its way.
type request struct {
	*http.Request
	w     http.ResponseWriter
	actor operate.Actor
}

// answered says that a handler has written the answer itself.
type answered struct{}

const smallBody = 64 << 10

// Routes are all operations.
func (a *API) Routes() []Route {
	return []Route{
		{"GET /healthz", operate.Nobody, false, 0, a.health},
		{"GET /openapi.json", operate.Nobody, false, 0, a.document},
		{"GET /.well-known/jwks.json", operate.Nobody, false, 0, a.keys},
		{"GET /metrics", operate.Reader, false, 0, a.metrics},
		{"GET /v1/me", operate.Reader, false, 0, a.me},
		{"GET /v1/fleet", operate.Reader, false, 0, a.fleet},

		{"GET /v1/nodes", operate.Reader, false, 0, a.nodes},
		{"GET /v1/nodes/{node}", operate.Reader, false, 0, a.node},
		{"GET /v1/nodes/{node}/result", operate.Reader, true, 0, a.nodeResult},
		{"GET /v1/nodes/{node}/rounds", operate.Reader, false, 0, a.rounds},
		{"POST /v1/nodes/{node}/approve", operate.Operator, false, smallBody, a.approve},
		{"POST /v1/nodes/{node}/learn", operate.Operator, false, smallBody, a.learn},
		{"POST /v1/nodes/{node}/reject", operate.Operator, false, smallBody, a.reject},
		{"POST /v1/nodes/{node}/revoke", operate.Operator, false, smallBody, a.revoke},
		{"POST /v1/nodes/{node}/dismiss", operate.Operator, false, smallBody, a.dismiss},

		{"GET /v1/vms", operate.Reader, false, 0, a.vms},
		{"GET /v1/vms/{vm}/result", operate.Reader, true, 0, a.vmResult},

		{"GET /v1/rounds/{round}", operate.Reader, false, 0, a.round},
		{"GET /v1/rounds/{round}/evidence", operate.Policy, false, 0, a.evidence},
		{"GET /v1/rounds/{round}/diff", operate.Reader, false, 0, a.diff},
		{"POST /v1/rounds/{round}/approve", operate.Operator, false, smallBody, a.approveRound},

		{"GET /v1/values", operate.Reader, false, 0, a.values},
		{"POST /v1/values", operate.Policy, false, 4 << 20, a.addValues},
		{"POST /v1/values/import", operate.Policy, false, 2 * operate.MaxImport, a.importValues},
		{"POST /v1/values/approve", operate.Policy, false, smallBody, a.approveValues},
		{"POST /v1/values/reject", operate.Policy, false, smallBody, a.rejectValues},

		{"GET /v1/policy", operate.Reader, false, 0, a.policy},
		{"PUT /v1/policy", operate.Policy, false, 2 * appraise.MaxPolicy, a.setPolicy},
		{"POST /v1/policy/check", operate.Reader, false, 2 * appraise.MaxPolicy, a.checkPolicy},
		{"GET /v1/policy/versions", operate.Reader, false, 0, a.policyVersions},
		{"GET /v1/policy/versions/{version}", operate.Reader, false, 0, a.policyVersion},
		{"GET /v1/policy/proposed", operate.Reader, false, 0, a.proposedPolicy},
		{"POST /v1/policy/proposed/approve", operate.Policy, false, smallBody, a.approvePolicy},
		{"POST /v1/policy/proposed/reject", operate.Policy, false, smallBody, a.rejectPolicy},

		{"GET /v1/tokens", operate.Operator, false, 0, a.tokens},
		{"POST /v1/tokens", operate.Operator, false, smallBody, a.createToken},
		{"DELETE /v1/tokens/{digest}", operate.Operator, false, smallBody, a.revokeToken},

		{"GET /v1/webhooks", operate.Policy, false, 0, a.hooks},
		{"POST /v1/webhooks", operate.Policy, false, smallBody, a.addHook},
		{"DELETE /v1/webhooks/{webhook}", operate.Policy, false, smallBody, a.removeHook},
		{"POST /v1/webhooks/{webhook}/test", operate.Policy, false, smallBody, a.testHook},
		{"GET /v1/deliveries", operate.Policy, false, 0, a.deadLetters},
		{"POST /v1/deliveries/revive", operate.Policy, false, smallBody, a.reviveAll},
		{"POST /v1/deliveries/{delivery}/revive", operate.Policy, false, smallBody, a.revive},

		{"GET /v1/audit", operate.Reader, false, 0, a.audit},
		{"GET /v1/audit/export", operate.Reader, false, 0, a.exportAudit},
		{"GET /v1/audit/head", operate.Reader, false, 0, a.auditHead},
	}
}

// Mount puts all routes into a mux. What is under /v1/ and is no route is a
// problem too.
func (a *API) Mount(mux *http.ServeMux) {
	for _, r := range a.Routes() {
		mux.HandleFunc(r.Pattern, func(w http.ResponseWriter, req *http.Request) { a.serve(r, w, req) })
	}
	mux.HandleFunc("/v1/", func(w http.ResponseWriter, req *http.Request) {
		problem(NotFound, "There is nothing at %.100q that takes %.10q.", req.URL.Path, req.Method).write(w)
	})
}

// serve does for every route what each needs.
func (a *API) serve(route Route, w http.ResponseWriter, r *http.Request) {
	defer func() {
		if v := recover(); v != nil {
			if v == http.ErrAbortHandler {
				panic(v)
			}
			a.Log.WithFields(logrus.Fields{"path": r.URL.Path, "panic": fmt.Sprint(v), "stack": string(debug.Stack())}).Error("a request made the Verifier panic")
			problem(Failed, "It was logged.").write(w)
		}
	}()
	h := w.Header()
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
	h.Set("Cache-Control", "no-store")
	if err := a.try(route, w, r); err != nil {
		a.fail(w, r, err)
	}
}

func (a *API) try(route Route, w http.ResponseWriter, r *http.Request) error {
	actor, err := a.admit(route, r)
	if err != nil {
		return err
	}
	r.Body = http.MaxBytesReader(w, r.Body, route.MaxBody)
	v, err := route.handle(&request{r.WithContext(operate.WithActor(r.Context(), actor)), w, actor})
	if err != nil {
		return err
	}
	switch v := v.(type) {
	case answered:
		return nil
	case nil:
		w.WriteHeader(http.StatusNoContent)
		return nil
	case created:
		return writeJSON(w, http.StatusCreated, v.v)
	default:
		return writeJSON(w, http.StatusOK, v)
	}
}

// created is the answer of what makes something.
type created struct{ v any }

// person says who asks, within the rates of people and of addresses.
func (a *API) person(r *http.Request) (operate.Actor, error) {
	now, source := a.Now(), Source(r)
	if len(r.Header["Authorization"])+len(r.Cookies()) == 0 && r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		// A node is not limited by what others ask at its address.
		n, ok, err := a.Node(r)
		if err != nil {
			return operate.Actor{}, err
		}
		if ok {
			if wait, ok := a.persons.allow("node "+n.ID, now); !ok {
				return operate.Actor{}, tooMany(wait)
			}
			return operate.Actor{}, nil
		}
	}
	if a.others.spent(source, now) && !cheap(r) {
		return operate.Actor{}, tooMany(time.Second)
	}
	actor, err := a.Actor(r)
	if err != nil || !actor.Known() {
		if wait, ok := a.others.allow(source, now); !ok {
			return operate.Actor{}, tooMany(wait)
		}
		return operate.Actor{}, err
	}
	if wait, ok := a.persons.allow(actor.Name, now); !ok {
		return operate.Actor{}, tooMany(wait)
	}
	return actor, nil
}

// cheap says whether it costs nothing to find out who asks: a static token or a
// session is looked up, which goes on where an address has used up its guesses. A
// JWT costs a signature check, and perhaps a question to the OpenID provider.
func cheap(r *http.Request) bool {
	if h := r.Header.Get("Authorization"); h != "" {
		return strings.Count(h, ".") < 2
	}
	return len(r.Cookies()) > 0
}

// Person gives a handler that is no route of the API, the page's, requests that
// know who asks (operate.ActorOf), within the same rates.
func (a *API) Person(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		actor, err := a.person(r)
		if err != nil {
			a.fail(w, r, err)
			return
		}
		h.ServeHTTP(w, r.WithContext(operate.WithActor(r.Context(), actor)))
	})
}

// fail answers with a problem, and logs what an operator has to know.
func (a *API) fail(w http.ResponseWriter, r *http.Request, err error) {
	p, ours := problemOf(err)
	if ours {
		a.Log.WithError(err).WithFields(logrus.Fields{"path": r.URL.Path, "code": p.Code}).Warn("a request failed")
		if errors.Is(err, store.ErrUnavailable) && a.DatabaseError != nil {
			a.DatabaseError()
		}
	}
	p.write(w)
}

// admit says who asks, and whether he may.
func (a *API) admit(route Route, r *http.Request) (operate.Actor, error) {
	actor, err := a.person(r)
	if err != nil {
		return operate.Actor{}, err
	}
	switch {
	case actor.Role >= route.Role || route.Relying && a.OpenTo:
		return actor, nil
	case route.Relying && !actor.Known() && r.TLS != nil && len(r.TLS.PeerCertificates) > 0:
		if _, ok, err := a.Node(r); err != nil || ok {
			return actor, err
		}
	case actor.Known():
		return operate.Actor{}, fmt.Errorf("%w: it takes the role %s", operate.ErrForbidden, route.Role)
	}
	return operate.Actor{}, operate.ErrUnauthenticated
}

func tooMany(wait time.Duration) *Problem {
	p := problem(TooMany, "Slow down.")
	p.retry = max(wait, time.Second)
	return p
}

func writeJSON(w http.ResponseWriter, code int, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	w.Write(append(b, '\n')) // who asked may be gone
	return nil
}

// body reads the request's JSON; an empty body is the zero value.
func (r *request) body(v any) error {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	if len(b) == 0 {
		return nil
	}
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		return problem(Invalid, "The body is not application/json.")
	}
	d := json.NewDecoder(strings.NewReader(string(b)))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return problem(Invalid, "The body: %v.", err)
	}
	if d.More() {
		return problem(Invalid, "The body: something follows the JSON.")
	}
	return nil
}

// page reads limit and after.
func (r *request) page() (store.Page, error) {
	p := store.Page{Limit: 100, After: r.URL.Query().Get("after")}
	if s := r.URL.Query().Get("limit"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > 1000 {
			return p, problem(Invalid, "limit: %.20q is not between 1 and 1000.", s)
		}
		p.Limit = n
	}
	return p, nil
}

// query checks that only these parameters are there, each once: one that is
// misspelt would otherwise choose everything.
func (r *request) query(known ...string) error {
	for k, v := range r.URL.Query() {
		ok := false
		for _, name := range known {
			ok = ok || k == name
		}
		if !ok || len(v) > 1 {
			return problem(Invalid, "There is no parameter %.40q here, or it is there twice.", k)
		}
	}
	return nil
}

func (r *request) tier() (*appraise.Tier, error) {
	s := r.URL.Query().Get("tier")
	if s == "" {
		return nil, nil
	}
	var t appraise.Tier
	if err := t.UnmarshalText([]byte(s)); err != nil || t.String() != s {
		return nil, problem(Invalid, "tier: %.40q is none of affirming, warning, contraindicated, none.", s)
	}
	return &t, nil
}

func (r *request) number(name string) (int64, error) {
	n, err := strconv.ParseInt(r.PathValue(name), 10, 64)
	if err != nil || n < 1 {
		return 0, problem(NotFound, "%.40q is no number of a %s.", r.PathValue(name), name)
	}
	return n, nil
}

// list is a page of answers.
type list struct {
	Items any    `json:"items"`
	Next  string `json:"next,omitempty"` // ?after= of the next page
}

func listOf[From, To any](from []From, next string, err error, f func(From) To) (any, error) {
	if err != nil {
		return nil, err
	}
	items := make([]To, 0, len(from))
	for _, v := range from {
		items = append(items, f(v))
	}
	return list{items, next}, nil
}

// etag answers 304 where the client has this already.
func (r *request) etag(parts ...string) bool {
	d := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	tag := `"` + hex.EncodeToString(d[:16]) + `"`
	r.w.Header().Set("ETag", tag)
	r.w.Header().Set("Cache-Control", "no-cache")
	for _, t := range strings.Split(r.Header.Get("If-None-Match"), ",") {
		if t = strings.TrimPrefix(strings.TrimSpace(t), "W/"); t == tag || t == "*" {
			r.w.WriteHeader(http.StatusNotModified)
			return true
		}
	}
	return false
}

func (a *API) health(r *request) (any, error) {
	ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second)
	defer cancel()
	if err := a.Store.Ping(ctx); err != nil {
		return nil, errors.Join(store.ErrUnavailable, err)
	}
	return struct {
		Status  string `json:"status"`
		Version string `json:"version"`
	}{"ok", a.Version}, nil
}

func (a *API) document(r *request) (any, error) {
	if r.etag(string(Document)) {
		return answered{}, nil
	}
	r.w.Header().Set("Content-Type", "application/json")
	r.w.Write(Document)
	return answered{}, nil
}

func (a *API) metrics(r *request) (any, error) {
	a.Metrics.ServeHTTP(r.w, r.Request)
	return answered{}, nil
}

func (a *API) me(r *request) (any, error) {
	return struct {
		Name string       `json:"name"`
		Role operate.Role `json:"role"`
	}{r.actor.Name, r.actor.Role}, nil
}
