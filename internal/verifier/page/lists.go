package page

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
)

type valuesView struct {
	Values             []valueRow
	Q, Kind, State     string
	Source, Subject    string
	HasSubject         bool
	Kinds              []fleet.Kind
	States             []fleet.ValueState
	Sources            []string
	Next               string
	Later              bool
	FourEyes, Filtered bool
}

func (p *Page) valuesPage(r *http.Request) (view, error) {
	q := r.URL.Query()
	d := valuesView{
		Q: q.Get("q"), Kind: q.Get("kind"), State: q.Get("state"), Source: q.Get("source"), Subject: q.Get("subject"), HasSubject: q.Has("subject"),
		Kinds:   []fleet.Kind{fleet.HostEvent, fleet.HostPCR, fleet.HostIMA, fleet.Launcher, fleet.VMPCR},
		States:  []fleet.ValueState{fleet.Approved, fleet.Proposed, fleet.Rejected},
		Sources: []string{"learned", operate.FromOperator, operate.FromFile, operate.FromManifest, operate.FromPackage},
		Later:   q.Get("after") != "", FourEyes: p.FourEyes,
	}
	d.Filtered = d.Q+d.Kind+d.State+d.Source != "" || d.HasSubject
	f := store.ValueFilter{Kind: fleet.Kind(d.Kind), State: fleet.ValueState(d.State), Source: d.Source, Search: d.Q}
	v := url.Values{}
	for k, s := range map[string]string{"q": d.Q, "kind": d.Kind, "state": d.State, "source": d.Source} {
		if s != "" {
			v.Set(k, s)
		}
	}
	if d.HasSubject {
		f.Subject = &d.Subject
		v.Set("subject", d.Subject)
	}
	vs, next, err := p.Store.Values(r.Context(), f, store.Page{Limit: 100, After: q.Get("after")})
	if err != nil {
		return view{}, err
	}
	d.Values, d.Next = p.valueRows(r.Context(), vs, operate.ActorOf(r.Context())), nextPage("/values", v, next)
	return view{name: "values", title: "Reference Values", data: d}, nil
}

type tokensView struct {
	Tokens []fleet.JoinToken
	Next   string
	Later  bool
	Now    time.Time
}

func (p *Page) tokensPage(r *http.Request) (view, error) {
	after := r.URL.Query().Get("after")
	ts, next, err := p.Store.Tokens(r.Context(), store.Page{Limit: 100, After: after})
	if err != nil {
		return view{}, err
	}
	return view{name: "tokens", title: "Join tokens", data: tokensView{ts, nextPage("/tokens", url.Values{}, next), after != "", p.Now()}}, nil
}

// State says whether a join token is still good.
func (v tokensView) State(t fleet.JoinToken) string {
	switch {
	case !t.Used.IsZero():
		return "used"
	case !v.Now.Before(t.Expires):
		return "expired"
	}
	return "good"
}

type hooksView struct {
	Hooks         []fleet.Hook
	Waiting, Dead int
	Letters       []letter
	Next          string
	Later         bool
	Events        []string
}

// letter is a delivery that was given up.
type letter struct {
	fleet.Delivery
	URL string // of its webhook
}

func (p *Page) hooksPage(r *http.Request) (view, error) {
	ctx := r.Context()
	d := hooksView{Events: p.HookEvents}
	var err error
	if d.Hooks, err = p.Store.Hooks(ctx); err != nil {
		return view{}, err
	}
	for i := range d.Hooks {
		d.Hooks[i].Secret = nil
	}
	if d.Waiting, d.Dead, err = p.Store.Queued(ctx); err != nil {
		return view{}, err
	}
	if d.Dead > 0 {
		after := r.URL.Query().Get("after")
		letters, next, err := p.Store.DeadLetters(ctx, store.Page{Limit: rowsPerPage, After: after})
		if err != nil {
			return view{}, err
		}
		for _, l := range letters {
			w := letter{Delivery: l}
			if i := slices.IndexFunc(d.Hooks, func(h fleet.Hook) bool { return h.ID == l.Hook }); i >= 0 {
				w.URL = d.Hooks[i].URL
			}
			d.Letters = append(d.Letters, w)
		}
		d.Next, d.Later = nextPage("/webhooks", url.Values{}, next), after != ""
	}
	return view{name: "webhooks", title: "Webhooks", data: d}, nil
}

type auditView struct {
	Entries []auditRow
	Next    string
	Later   bool
	Check   auditCheck
}

type auditRow struct {
	fleet.AuditEntry
	Facts []fact
}

func (p *Page) auditPage(r *http.Request) (view, error) {
	after := r.URL.Query().Get("after")
	es, next, err := p.Store.AuditLog(r.Context(), store.AuditFilter{}, store.Page{Limit: 100, After: after})
	if err != nil {
		return view{}, err
	}
	d := auditView{Next: nextPage("/audit", url.Values{}, next), Later: after != ""}
	for _, e := range es {
		d.Entries = append(d.Entries, auditRow{e, detailFacts(e.Detail)})
	}
	if d.Check, err = p.checkAudit(r.Context()); err != nil {
		return view{}, err
	}
	return view{name: "audit", title: "Audit log", data: d}, nil
}

// detailFacts gives an entry's detail in the order in which it is written; one
// that is no object stays as it is.
func detailFacts(detail string) []fact {
	var m map[string]json.RawMessage
	if detail == "" || json.Unmarshal([]byte(detail), &m) != nil {
		return []fact{{"", detail}}
	}
	var out []fact
	for _, k := range sortedKeys(m) {
		var s string
		if json.Unmarshal(m[k], &s) != nil {
			s = string(m[k])
		}
		if s != "" && s != "null" {
			out = append(out, fact{k, s})
		}
	}
	return out
}

// auditCheck is what going over the whole audit log came to.
type auditCheck struct {
	Head   fleet.AuditHead
	At     time.Time
	Broken *fleet.AuditError
	Long   bool // it took too long to be done for a page
}

// auditState keeps the last check: going over the whole log is not done for each
// who looks.
type auditState struct {
	sync.Mutex
	last auditCheck
}

const (
	auditEvery = time.Minute
	auditTime  = 5 * time.Second
)

func (p *Page) checkAudit(ctx context.Context) (auditCheck, error) {
	p.audit.Lock()
	defer p.audit.Unlock()
	if last := p.audit.last; !last.At.IsZero() && p.Now().Sub(last.At) < auditEvery {
		return last, nil
	}
	short, cancel := context.WithTimeout(ctx, auditTime)
	defer cancel()
	c := auditCheck{At: p.Now()}
	var err error
	c.Head, err = p.Store.VerifyAudit(short, nil, nil)
	switch {
	case errors.As(err, &c.Broken):
	case errors.Is(err, context.DeadlineExceeded) || short.Err() != nil && ctx.Err() == nil:
		if c.Head, err = p.Store.AuditHead(ctx); err != nil {
			return auditCheck{}, fmt.Errorf("reading the end of the audit log: %w", err)
		}
		c.Long = true
	case err != nil:
		return auditCheck{}, fmt.Errorf("checking the audit log: %w", err)
	}
	p.audit.last = c
	return c, nil
}
