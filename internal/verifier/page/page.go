// Package page is the Verifier's web page: what is trusted, what is not, why,
// and what to do. It is rendered on the server and works without JavaScript;
// with it, open pages follow what comes in.
//
// All that nodes and guests say is hostile. Markup is html/template's to keep
// out: nothing is ever converted to template.HTML and its like. What deceives
// the eye is text.go's. And the headers allow a browser no script but the one
// that is served here, and that one no markup from strings (Trusted Types).
package page

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"net/http"
	"net/url"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/login"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
)

// Reader is what the page reads; *store.Store.
type Reader interface {
	Summary(ctx context.Context) (fleet.Summary, error)
	Waiting(ctx context.Context) (nodes, values int, err error)
	Nodes(ctx context.Context, f store.NodeFilter, p store.Page) ([]fleet.Status, string, error)
	Status(ctx context.Context, id string) (fleet.Status, error)
	Result(ctx context.Context, node string) (*appraise.Result, error)
	VMs(ctx context.Context, f store.VMFilter, p store.Page) ([]fleet.VM, string, error)
	VMsByEK(ctx context.Context, digests ...string) ([]fleet.VM, error)
	Rounds(ctx context.Context, f store.RoundFilter, p store.Page) ([]fleet.Round, string, error)
	Round(ctx context.Context, id int64) (fleet.Round, error)
	Values(ctx context.Context, f store.ValueFilter, p store.Page) ([]fleet.Value, string, error)
	Tokens(ctx context.Context, p store.Page) ([]fleet.JoinToken, string, error)
	Hooks(ctx context.Context) ([]fleet.Hook, error)
	DeadLetters(ctx context.Context, p store.Page) ([]fleet.Delivery, string, error)
	Queued(ctx context.Context) (waiting, dead int, err error)
	AuditLog(ctx context.Context, f store.AuditFilter, p store.Page) ([]fleet.AuditEntry, string, error)
	AuditHead(ctx context.Context) (fleet.AuditHead, error)
	VerifyAudit(ctx context.Context, noted []fleet.AuditHead, progress func(done int64)) (fleet.AuditHead, error)
}

// Config is what a page is made of.
type Config struct {
	Store    Reader
	Operator Operator
	// Actor says who asks, the zero Actor for nobody; where it is nil, the context
	// does (operate.ActorOf). login.ErrRefused is nobody too.
	Actor func(*http.Request) (operate.Actor, error)
	// OIDC says that /oidc/login is there, to log in at.
	OIDC  bool
	Learn bool // nodes may be learned
	// FourEyes says that changes of Reference Values need a second person.
	FourEyes bool
	// Nodes is the host and port where nodes enrol, "" for where a browser came to;
	// nil is that too.
	Nodes func() string
	// HookEvents are those that a webhook may want: webhook.Events.
	HookEvents []string
	Now        func() time.Time // time.Now
	Log        *logrus.Entry
}

//go:embed assets templates
var files embed.FS

// Page is the handler of everything under "/" that is for people's eyes. Who
// asks stands in the request's context (operate.ActorOf).
type Page struct {
	Config
	mux    *http.ServeMux
	views  map[string]*template.Template
	assets map[string]asset // by name
	live   live
	audit  auditState
}

type asset struct {
	url, kind string
	body      []byte
}

// New makes a page.
func New(c Config) (*Page, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	p := &Page{Config: c, mux: http.NewServeMux(), views: map[string]*template.Template{}, assets: map[string]asset{}}
	if err := p.load(); err != nil {
		return nil, fmt.Errorf("page: %w", err)
	}
	p.routes()
	return p, nil
}

func (p *Page) load() error {
	for name, kind := range map[string]string{"style.css": "text/css; charset=utf-8", "live.js": "text/javascript; charset=utf-8", "icon.svg": "image/svg+xml"} {
		b, err := files.ReadFile("assets/" + name)
		if err != nil {
			return err
		}
		d := sha256.Sum256(b)
		ext := path.Ext(name)
		p.assets[name] = asset{"/assets/" + strings.TrimSuffix(name, ext) + "-" + hex.EncodeToString(d[:6]) + ext, kind, b}
	}
	names, err := fs.Glob(files, "templates/*.html")
	if err != nil {
		return err
	}
	base, err := template.New("").Funcs(p.funcs()).ParseFS(files, "templates/parts/*.html")
	if err != nil {
		return err
	}
	for _, n := range names {
		short := strings.TrimSuffix(path.Base(n), ".html")
		t, err := base.Clone()
		if err != nil {
			return err
		}
		if p.views[short], err = t.ParseFS(files, n); err != nil {
			return err
		}
	}
	return nil
}

// routes: those that show want a reader; those that do say themselves whom they
// want, and operate says it again.
func (p *Page) routes() {
	for _, a := range p.assets {
		p.mux.HandleFunc("GET "+a.url, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", a.kind)
			w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(a.body))
		})
	}
	p.mux.HandleFunc("GET /login", p.loginPage)
	show := func(pattern string, h func(*http.Request) (view, error)) {
		p.mux.HandleFunc("GET "+pattern, p.show(h))
	}
	show("/{$}", p.fleetPage)
	show("/nodes/{node}", p.nodePage)
	show("/nodes/{node}/rounds", p.roundsPage)
	show("/nodes/{node}/rounds/{round}", p.roundPage)
	show("/nodes/{node}/diff", p.diffPage)
	show("/nodes/{node}/vms/{vm}", p.vmPage)
	show("/vms", p.vmsPage)
	show("/approvals", p.approvalsPage)
	show("/values", p.valuesPage)
	show("/policy", p.policyPage)
	show("/tokens", p.tokensPage)
	show("/webhooks", p.hooksPage)
	show("/audit", p.auditPage)
	show("/", func(*http.Request) (view, error) { return view{}, store.ErrNotFound })
	p.mux.HandleFunc("GET /live", p.serveLive)
	p.actions()
}

// policy is the Content-Security-Policy. Forms go to this host alone; "data:" and
// inline styles are nowhere.
const policy = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; " +
	"base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// ServeHTTP answers. Whatever the answer is, its headers are strict.
func (p *Page) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Content-Security-Policy", policy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=(), payment=(), usb=()")
	h.Set("Cache-Control", "no-store")
	protection := http.NewCrossOriginProtection()
	protection.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.fail(w, r, errCrossOrigin)
	}))
	if p.Actor != nil {
		a, err := p.Actor(r)
		if err != nil && !errors.Is(err, login.ErrRefused) {
			p.fail(w, r, fmt.Errorf("finding out who asks: %w", err))
			return
		}
		r = r.WithContext(operate.WithActor(r.Context(), a))
	}
	protection.Handler(p.mux).ServeHTTP(w, r)
}

// view is one page: the template that it is of, and what goes in.
type view struct {
	name  string // of the template
	title string
	data  any
	code  int // of HTTP; 0 is 200
}

// frame is what every template gets.
type frame struct {
	Title   string
	Section string // of the navigation
	Actor   operate.Actor
	Can     can
	Waiting int // that wait for someone
	Path    string
	Now     time.Time
	CSS     string
	JS      string
	Icon    string
	Done    string // what a form did, in words
	D       any
}

// can is what the actor's role lets him do.
type can struct{ Operate, SetPolicy bool }

func canOf(a operate.Actor) can {
	return can{Operate: a.Role >= operate.Operator, SetPolicy: a.Role >= operate.Policy}
}

// show makes a handler for whoever may read; others are led to log in.
func (p *Page) show(h func(*http.Request) (view, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if operate.ActorOf(r.Context()).Role < operate.Reader {
			p.toLogin(w, r)
			return
		}
		v, err := h(r)
		if err != nil {
			p.fail(w, r, err)
			return
		}
		p.write(w, r, v)
	}
}

func (p *Page) toLogin(w http.ResponseWriter, r *http.Request) {
	to := "/login"
	if r.Method == http.MethodGet && r.URL.RequestURI() != "/" {
		to += "?" + url.Values{"next": {r.URL.RequestURI()}}.Encode()
	}
	http.Redirect(w, r, to, http.StatusSeeOther)
}

var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// write renders a view whole before a byte of it goes out: a template that fails
// half way says so, and no half page looks like a short one.
func (p *Page) write(w http.ResponseWriter, r *http.Request, v view) {
	a := operate.ActorOf(r.Context())
	f := frame{
		Title: v.title, Section: v.name, Actor: a, Can: canOf(a), Path: r.URL.RequestURI(), Now: p.Now(),
		CSS: p.assets["style.css"].url, JS: p.assets["live.js"].url, Icon: p.assets["icon.svg"].url, D: v.data,
	}
	if a.Role >= operate.Reader && v.code < 500 {
		if nodes, values, err := p.Store.Waiting(r.Context()); err == nil {
			f.Waiting = nodes + values
			if s, err := p.proposed(r.Context(), a); err == nil && s != nil {
				f.Waiting++
			}
		}
	}
	f.Done = done(r.URL.Query().Get("done"))
	b := buffers.Get().(*bytes.Buffer)
	b.Reset()
	defer func() {
		if b.Cap() < 4<<20 {
			buffers.Put(b)
		}
	}()
	if err := p.views[v.name].ExecuteTemplate(b, "page", f); err != nil {
		p.log(r).WithError(err).Error("a page could not be rendered")
		http.Error(w, "This page could not be rendered; the Verifier's log says why.", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	if v.code != 0 {
		w.WriteHeader(v.code)
	}
	_, _ = w.Write(reveal(b.Bytes())) // who went away is no fault
}

func (p *Page) log(r *http.Request) *logrus.Entry {
	l := p.Config.Log
	if l == nil {
		l = logrus.NewEntry(logrus.StandardLogger())
	}
	return l.WithFields(logrus.Fields{"method": r.Method, "path": r.URL.Path})
}

var (
	errCrossOrigin = errors.New("the request came from another site")
	errForm        = errors.New("the form makes no sense")
)

// failure is an error in words.
type failure struct {
	Code       int
	What, Mend string
}

// fail shows what went wrong. What is not known to be harmless is only logged.
func (p *Page) fail(w http.ResponseWriter, r *http.Request, err error) {
	f := failure{http.StatusInternalServerError, "This could not be done.", "The Verifier's log says why. Nothing was changed."}
	title := "Something went wrong"
	switch {
	case errors.Is(err, store.ErrNotFound), errors.Is(err, operate.ErrNotFound):
		title, f = "Not found", failure{http.StatusNotFound, "There is nothing at this address.", "What was here may have been revoked, decided or kept past its time."}
	case errors.Is(err, store.ErrUnavailable):
		title, f = "The database does not answer", failure{http.StatusServiceUnavailable, "The Verifier cannot reach its database.", "Nothing is taken for trusted meanwhile. Try again in a moment."}
		w.Header().Set("Retry-After", "5")
	case errors.Is(err, errCrossOrigin):
		title, f = "Refused", failure{http.StatusForbidden, "The request came from another site.", "Nothing was changed. Use the form on the page itself."}
	case errors.Is(err, operate.ErrUnauthenticated):
		p.toLogin(w, r)
		return
	case errors.Is(err, operate.ErrForbidden):
		title, f = "Not yours to do", failure{http.StatusForbidden, "Your role may not do this.", "Nothing was changed. Ask someone whose role may."}
	case errors.Is(err, operate.ErrSamePerson), errors.Is(err, store.ErrSamePerson):
		title, f = "A second person is needed", failure{http.StatusConflict, "You proposed this, so someone else has to approve it.", "Nothing was changed."}
	case errors.Is(err, operate.ErrConflict), errors.Is(err, store.ErrConflict), errors.Is(err, store.ErrVersion):
		title, f = "Changed meanwhile", failure{http.StatusConflict, "It is not in the state any more that you saw.", "Go back, load the page anew, and decide again."}
	case errors.Is(err, operate.ErrInvalid), errors.Is(err, store.ErrInvalid), errors.Is(err, errForm):
		title, f = "Not accepted", failure{http.StatusBadRequest, err.Error(), "Nothing was changed. Go back and mend the form."}
	default:
		p.log(r).WithError(err).Error("a request failed")
	}
	p.write(w, r, view{name: "message", title: title, data: f, code: f.Code})
}

// loginPage shows how to log in; package login does it.
func (p *Page) loginPage(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	why := map[string]string{
		"token":       "The token is not valid, or no longer.",
		"oidc":        "The OpenID provider did not let you in.",
		"role":        "You have no role here. Ask who runs this Verifier for one.",
		"unavailable": "Logging in is not possible at this moment. Try again.",
	}[q.Get("failed")]
	if why == "" && q.Has("failed") {
		why = "Logging in failed."
	}
	p.write(w, r, view{name: "login", title: "Log in", data: struct {
		Failed, Next string
		OIDC         bool
	}{why, q.Get("next"), p.OIDC}})
}
