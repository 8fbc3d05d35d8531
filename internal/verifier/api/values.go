package api

import (
	"encoding/json"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
)

// Value is a Reference Value as the API gives it.
type Value struct {
	ID       int64            `json:"id"`
	Subject  string           `json:"subject"` // "" for all
	Kind     fleet.Kind       `json:"kind"`
	Path     string           `json:"path"`
	Digest   string           `json:"digest"`
	Source   string           `json:"source"`
	Detail   string           `json:"detail,omitempty"`
	State    fleet.ValueState `json:"state"`
	By       string           `json:"by"`
	Second   string           `json:"second,omitempty"`
	Time     *time.Time       `json:"time"`
	FourEyes bool             `json:"four_eyes"`
}

func newValue(v fleet.Value) Value {
	return Value{v.ID, v.Subject, v.Kind, v.Path, v.Digest, v.Source, v.Detail, v.State, v.By, v.Second, at(v.Time), v.FourEyes}
}

func (a *API) values(r *request) (any, error) {
	if err := r.query("subject", "kind", "state", "source", "search", "limit", "after"); err != nil {
		return nil, err
	}
	q := r.URL.Query()
	f := store.ValueFilter{Kind: fleet.Kind(q.Get("kind")), State: fleet.ValueState(q.Get("state")), Source: q.Get("source"), Search: q.Get("search")}
	if q.Has("subject") {
		s := q.Get("subject")
		f.Subject = &s
	}
	switch f.State {
	case "", fleet.Proposed, fleet.Approved, fleet.Rejected:
	default:
		return nil, problem(Invalid, "state: %.40q is none of proposed, approved, rejected.", f.State)
	}
	p, err := r.page()
	if err != nil {
		return nil, err
	}
	all, next, err := a.Store.Values(r.Context(), f, p)
	return listOf(all, next, err, newValue)
}

func (a *API) addValues(r *request) (any, error) {
	var b struct {
		Values []appraise.ValueEntry `json:"values"`
	}
	if err := r.body(&b); err != nil {
		return nil, err
	}
	var values []fleet.Value
	for _, v := range b.Values {
		values = append(values, fleet.Value{Subject: v.Subject, Kind: v.Kind, Path: v.Path, Digest: v.Digest})
	}
	return a.Operate.AddValues(r.Context(), r.actor, values)
}

func (a *API) importValues(r *request) (any, error) {
	var b struct {
		Format    string     `json:"format"`
		Content   []byte     `json:"content"`   // base64
		Signature []byte     `json:"signature"` // base64
		Subject   string     `json:"subject"`
		Kind      fleet.Kind `json:"kind"`
		Name      string     `json:"name"`
	}
	if err := r.body(&b); err != nil {
		return nil, err
	}
	return a.Operate.ImportValues(r.Context(), r.actor, operate.Import{
		Format: b.Format, Content: b.Content, Signature: b.Signature, Subject: b.Subject, Kind: b.Kind, Name: b.Name,
	})
}

type ids struct {
	IDs []int64 `json:"ids"`
}

func (a *API) approveValues(r *request) (any, error) {
	var b ids
	if err := r.body(&b); err != nil {
		return nil, err
	}
	return nil, a.Operate.ApproveValues(r.Context(), r.actor, b.IDs...)
}

func (a *API) rejectValues(r *request) (any, error) {
	var b ids
	if err := r.body(&b); err != nil {
		return nil, err
	}
	return nil, a.Operate.RejectValues(r.Context(), r.actor, b.IDs...)
}

// Policy is the appraisal policy, or a proposed one, as the API gives it. Version
// 0 is the one that counts where none was set.
type Policy struct {
	Version  int64           `json:"version"`
	State    string          `json:"state"` // approved, proposed
	By       string          `json:"by,omitempty"`
	Time     *time.Time      `json:"time,omitempty"`
	Document json.RawMessage `json:"document"`
	Next     int64           `json:"next,omitempty"` // what PUT wants to be told as version
}

func newPolicy(s fleet.Setting) Policy {
	state := fleet.Approved
	if s.Name == operate.ProposedSetting {
		state = fleet.Proposed
	}
	return Policy{Version: s.Version, State: string(state), By: s.By, Time: at(s.Time), Document: s.Data}
}

func (a *API) policy(r *request) (any, error) {
	s, next, err := a.Operate.PolicyNow(r.Context(), r.actor)
	if err != nil {
		return nil, err
	}
	p := newPolicy(s)
	p.Next = next
	return p, nil
}

// PolicyVersion is one in the history of the policy, as the API gives it.
type PolicyVersion struct {
	Version int64                   `json:"version"`
	By      string                  `json:"by"`
	Time    *time.Time              `json:"time"`
	Changes []appraise.PolicyChange `json:"changes"`          // from the version before
	Unread  bool                    `json:"unread,omitempty"` // it, or the one before, cannot be read any more
}

func (a *API) policyVersions(r *request) (any, error) {
	if err := r.query("limit", "after"); err != nil {
		return nil, err
	}
	p, err := r.page()
	if err != nil {
		return nil, err
	}
	p.Limit = min(p.Limit, 100) // each has a document
	all, next, err := a.Operate.PolicyVersions(r.Context(), r.actor, p)
	return listOf(all, next, err, func(v operate.PolicyVersion) PolicyVersion {
		return PolicyVersion{v.Version, v.By, at(v.Time), orEmpty(v.Changes), v.Unread}
	})
}

func (a *API) policyVersion(r *request) (any, error) {
	n, err := r.number("version")
	if err != nil {
		return nil, err
	}
	s, err := a.Operate.PolicyVersion(r.Context(), r.actor, n)
	if err != nil {
		return nil, err
	}
	return newPolicy(s), nil
}

func (a *API) checkPolicy(r *request) (any, error) {
	var b struct {
		Document json.RawMessage `json:"document"`
	}
	if err := r.body(&b); err != nil {
		return nil, err
	}
	changes, next, err := a.Operate.CheckPolicy(r.Context(), r.actor, b.Document)
	if err != nil {
		return nil, err
	}
	return struct {
		Changes []appraise.PolicyChange `json:"changes"`
		Next    int64                   `json:"next"`
	}{changes, next}, nil
}

func (a *API) setPolicy(r *request) (any, error) {
	var b struct {
		Version  int64           `json:"version"`
		Document json.RawMessage `json:"document"`
	}
	if err := r.body(&b); err != nil {
		return nil, err
	}
	s, err := a.Operate.SetPolicy(r.Context(), r.actor, b.Document, b.Version)
	if err != nil {
		return nil, err
	}
	return newPolicy(s), nil
}

func (a *API) proposedPolicy(r *request) (any, error) {
	s, err := a.Operate.ProposedPolicy(r.Context(), r.actor)
	if err != nil {
		return nil, err
	}
	return newPolicy(s), nil
}

type version struct {
	Version int64 `json:"version"`
}

func (a *API) approvePolicy(r *request) (any, error) {
	var b version
	if err := r.body(&b); err != nil {
		return nil, err
	}
	s, err := a.Operate.ApprovePolicy(r.Context(), r.actor, b.Version)
	if err != nil {
		return nil, err
	}
	return newPolicy(s), nil
}

func (a *API) rejectPolicy(r *request) (any, error) {
	var b version
	if err := r.body(&b); err != nil {
		return nil, err
	}
	return nil, a.Operate.RejectPolicy(r.Context(), r.actor, b.Version)
}
