package page

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
)

type policyView struct {
	Now      fleet.Setting // that counts; version 0 where none was set
	Proposed *fleet.Setting
	Shown    int64 // the version that is shown; that which counts, or an earlier one
	Document string
	Next     int64 // what has to be told when one is set
	History  []operate.PolicyVersion
	More     string // address of the next page of the history
	Later    bool
	FourEyes bool

	Text    string // in the editor
	Checked bool   // Text was, and Wrong or Changes came of it
	Wrong   string
	Changes []appraise.PolicyChange
}

// says is a policy for people to read and to change. What is no JSON stays as it
// was typed, but for the line ends of a form.
func says(document []byte) string {
	text, ok := appraise.PolicyText(document)
	if !ok {
		return strings.ReplaceAll(string(document), "\r\n", "\n")
	}
	return text
}

// policyPage shows the policy that counts, or ?version=, and the versions before.
func (p *Page) policyPage(r *http.Request) (view, error) {
	ctx, a, q := r.Context(), operate.ActorOf(r.Context()), r.URL.Query()
	d, err := p.policyNow(ctx, a)
	if err != nil {
		return view{}, err
	}
	if q.Has("version") {
		if d.Shown, err = strconv.ParseInt(q.Get("version"), 10, 64); err != nil || d.Shown < 0 {
			return view{}, store.ErrNotFound
		}
		v, err := p.Operator.PolicyVersion(ctx, a, d.Shown)
		if err != nil {
			return view{}, err
		}
		d.Document = says(v.Data)
	}
	d.Text = d.Document
	if d.Proposed, err = p.proposed(ctx, a); err != nil {
		return view{}, err
	}
	var next string
	if d.History, next, err = p.Operator.PolicyVersions(ctx, a, store.Page{Limit: 20, After: q.Get("after")}); err != nil {
		return view{}, err
	}
	d.More, d.Later = nextPage("/policy", url.Values{}, next), q.Get("after") != ""
	return view{name: "policy", title: "Policy", data: d}, nil
}

func (p *Page) policyNow(ctx context.Context, a operate.Actor) (policyView, error) {
	now, next, err := p.Operator.PolicyNow(ctx, a)
	return policyView{Now: now, Shown: now.Version, Document: says(now.Data), Next: next, FourEyes: p.FourEyes}, err
}

// proposed gives the policy that waits for a second person, nil for none.
func (p *Page) proposed(ctx context.Context, a operate.Actor) (*fleet.Setting, error) {
	s, err := p.Operator.ProposedPolicy(ctx, a)
	if errors.Is(err, operate.ErrNotFound) {
		return nil, nil
	}
	return &s, err
}

// maxPolicyForm bounds a form with a policy in it.
const maxPolicyForm = 2*appraise.MaxPolicy + maxForm

// checkPolicy answers with what the policy in the form would change, or with what
// is wrong in it, and with the editor: nothing is set.
func (p *Page) checkPolicy(r *http.Request, a operate.Actor) (string, *view, error) {
	text := r.PostFormValue("document")
	d, err := p.policyNow(r.Context(), a)
	if err != nil {
		return "", nil, err
	}
	d.Text, d.Checked = says([]byte(text)), true
	v := &view{name: "policy", title: "What the policy would change", data: &d}
	d.Changes, d.Next, err = p.Operator.CheckPolicy(r.Context(), a, []byte(text))
	if errors.Is(err, operate.ErrInvalid) {
		d.Wrong, v.title, v.code = err.Error(), "This is no policy", http.StatusBadRequest
		return "", v, nil
	}
	return "", v, err
}

// setPolicy sets what was checked, if nobody set or proposed another meanwhile.
func (p *Page) setPolicy(r *http.Request, a operate.Actor) (string, *view, error) {
	next, err := numbers(r.PostForm["next"])
	if err != nil {
		return "", nil, err
	}
	set, err := p.Operator.SetPolicy(r.Context(), a, []byte(r.PostFormValue("document")), next[0])
	if err != nil {
		return "", nil, fmt.Errorf("setting the policy: %w", err)
	}
	if set.Name == operate.ProposedSetting {
		return "/policy?done=policy-proposed", nil, nil
	}
	return "/policy?done=policy-set", nil, nil
}
