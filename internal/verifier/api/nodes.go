package api

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
)

// Node is a node as the API gives it.
type Node struct {
	ID         string          `json:"id"`
	Name       string          `json:"name"`
	State      fleet.NodeState `json:"state"`
	Tier       appraise.Tier   `json:"tier"`  // of the host, now
	Codes      []string        `json:"codes"` // of all reasons
	Round      int64           `json:"round,omitempty"`
	Received   *time.Time      `json:"received,omitempty"`
	Expires    *time.Time      `json:"expires,omitempty"`
	VMs        map[string]int  `json:"vms"` // how many stand where
	Enrolled   *time.Time      `json:"enrolled,omitempty"`
	Seen       *time.Time      `json:"seen,omitempty"`
	Problem    string          `json:"problem,omitempty"`
	ApprovedBy string          `json:"approved_by,omitempty"`
	RevokedWhy string          `json:"revoked_why,omitempty"`
	EK         string          `json:"ek"`       // SHA-256 of its SubjectPublicKeyInfo
	EKTrust    string          `json:"ek_trust"` // manufacturer, or admin and who that was
	AK         string          `json:"ak"`       // TPM Name
	Serial     string          `json:"serial,omitempty"`
	Learns     bool            `json:"learns"` // what it shows for the first time is learned, where the policy lets it
	// Result is the newest, as it counts now; in the answer about one node.
	Result *appraise.Result `json:"result,omitempty"`
}

// at gives a time that may be none.
func at(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

func orEmpty[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

func newNode(s fleet.Status) Node {
	n := Node{
		ID: s.ID, Name: s.Name, State: s.State, Tier: s.Tier, Codes: orEmpty(s.Codes), Round: s.Round, Received: at(s.Received), Expires: at(s.Expires),
		VMs: map[string]int{}, Enrolled: at(s.Enrolled), Seen: at(s.Seen), Problem: s.Problem, ApprovedBy: s.ApprovedBy, RevokedWhy: s.RevokedWhy,
		EK: s.EKDigest, EKTrust: s.EKTrust, AK: hex.EncodeToString(s.AKName), Serial: s.Serial, Learns: s.Learns,
	}
	for t, k := range s.VMs {
		n.VMs[t.String()] = k
	}
	return n
}

func (a *API) fleet(r *request) (any, error) {
	s, err := a.Store.Summary(r.Context())
	if err != nil {
		return nil, err
	}
	v := struct {
		Nodes    map[fleet.NodeState]int `json:"nodes"`
		Tiers    map[string]int          `json:"tiers"`
		VMs      map[string]int          `json:"vms"`
		Problems int                     `json:"problems"`
	}{s.Nodes, map[string]int{}, map[string]int{}, s.Problems}
	if v.Nodes == nil {
		v.Nodes = map[fleet.NodeState]int{}
	}
	for t, n := range s.ByTier {
		v.Tiers[t.String()] = n
	}
	for t, n := range s.VMs {
		v.VMs[t.String()] = n
	}
	return v, nil
}

func (a *API) nodes(r *request) (any, error) {
	if err := r.query("state", "tier", "search", "problem", "limit", "after"); err != nil {
		return nil, err
	}
	q := r.URL.Query()
	f := store.NodeFilter{State: fleet.NodeState(q.Get("state")), Search: q.Get("search")}
	switch f.State {
	case "", fleet.Pending, fleet.Active, fleet.Revoked:
	default:
		return nil, problem(Invalid, "state: %.40q is none of pending, active, revoked.", f.State)
	}
	var err error
	if f.Tier, err = r.tier(); err != nil {
		return nil, err
	}
	if s := q.Get("problem"); s != "" {
		if f.Problem, err = strconv.ParseBool(s); err != nil {
			return nil, problem(Invalid, "problem: %.20q is neither true nor false.", s)
		}
	}
	p, err := r.page()
	if err != nil {
		return nil, err
	}
	all, next, err := a.Store.Nodes(r.Context(), f, p)
	return listOf(all, next, err, newNode)
}

func (a *API) status(r *request, id string) (Node, error) {
	s, err := a.Store.Status(r.Context(), id)
	if err != nil {
		return Node{}, err
	}
	return newNode(s), nil
}

func (a *API) node(r *request) (any, error) {
	n, err := a.status(r, r.PathValue("node"))
	if err != nil || n.Round == 0 {
		return n, err
	}
	n.Result, err = a.Store.Result(r.Context(), n.ID)
	return n, err
}

// acted answers with the node as it is after something was done to it.
func (a *API) acted(r *request, n fleet.Node, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return a.status(r, n.ID)
}

type why struct {
	Why string `json:"why"`
}

func (a *API) approve(r *request) (any, error) {
	if err := r.body(&struct{}{}); err != nil {
		return nil, err
	}
	n, err := a.Operate.Approve(r.Context(), r.actor, r.PathValue("node"))
	return a.acted(r, n, err)
}

func (a *API) learn(r *request) (any, error) {
	var b struct {
		On bool `json:"on"`
	}
	if err := r.body(&b); err != nil {
		return nil, err
	}
	n, err := a.Operate.Learn(r.Context(), r.actor, r.PathValue("node"), b.On)
	return a.acted(r, n, err)
}

func (a *API) reject(r *request) (any, error) {
	var b why
	if err := r.body(&b); err != nil {
		return nil, err
	}
	n, err := a.Operate.Reject(r.Context(), r.actor, r.PathValue("node"), b.Why)
	return a.acted(r, n, err)
}

func (a *API) revoke(r *request) (any, error) {
	var b why
	if err := r.body(&b); err != nil {
		return nil, err
	}
	n, err := a.Operate.Revoke(r.Context(), r.actor, r.PathValue("node"), b.Why)
	return a.acted(r, n, err)
}

func (a *API) dismiss(r *request) (any, error) {
	if err := r.body(&struct{}{}); err != nil {
		return nil, err
	}
	n, err := a.Operate.Dismiss(r.Context(), r.actor, r.PathValue("node"))
	return a.acted(r, n, err)
}

// VM is a VM as the API gives it.
type VM struct {
	UUID     string        `json:"uuid"`
	Name     string        `json:"name"`
	Node     string        `json:"node"`
	NodeName string        `json:"node_name"`
	Running  bool          `json:"running"`
	Tier     appraise.Tier `json:"tier"` // now
	Expires  *time.Time    `json:"expires,omitempty"`
	Changed  *time.Time    `json:"changed,omitempty"`
	EK       string        `json:"ek,omitempty"`
}

func (a *API) vms(r *request) (any, error) {
	if err := r.query("uuid", "node", "tier", "ek", "search", "limit", "after"); err != nil {
		return nil, err
	}
	q := r.URL.Query()
	f := store.VMFilter{UUID: q.Get("uuid"), Node: q.Get("node"), EK: q.Get("ek"), Search: q.Get("search")}
	var err error
	if f.Tier, err = r.tier(); err != nil {
		return nil, err
	}
	p, err := r.page()
	if err != nil {
		return nil, err
	}
	all, next, err := a.Store.VMs(r.Context(), f, p)
	return listOf(all, next, err, func(v fleet.VM) VM {
		return VM{v.UUID, v.Name, v.Node, v.NodeName, v.Running, v.Tier, at(v.Expires), at(v.Changed), v.EKDigest}
	})
}

// Round is a round, or a run of rounds with the same result, as the API gives it.
type Round struct {
	ID       int64             `json:"id"`
	Node     string            `json:"node"`
	Received *time.Time        `json:"received"`
	Last     *time.Time        `json:"last,omitempty"`
	Count    int64             `json:"count"`
	HostTier string            `json:"host_tier"`
	VMTiers  map[string]string `json:"vm_tiers"`
	Codes    []string          `json:"codes"`
	Changes  json.RawMessage   `json:"changes"`
	// In the answer about one round: its result, and how many bytes of evidence
	// were kept.
	Result   json.RawMessage `json:"result,omitempty"`
	Evidence int             `json:"evidence,omitempty"`
}

func newRound(r fleet.Round) Round {
	v := Round{r.ID, r.Node, at(r.Received), at(r.Last), r.Count, r.HostTier, r.VMTiers, orEmpty(r.Codes), r.Changes, r.Result, len(r.Evidence)}
	if v.VMTiers == nil {
		v.VMTiers = map[string]string{}
	}
	if len(v.Changes) == 0 || string(v.Changes) == "null" {
		v.Changes = json.RawMessage("[]")
	}
	return v
}

func (a *API) rounds(r *request) (any, error) {
	if err := r.query("vm", "failed", "since", "limit", "after"); err != nil {
		return nil, err
	}
	q := r.URL.Query()
	f := store.RoundFilter{Node: r.PathValue("node"), VM: q.Get("vm")}
	var err error
	if s := q.Get("failed"); s != "" {
		if f.NotAffirmed, err = strconv.ParseBool(s); err != nil {
			return nil, problem(Invalid, "failed: %.20q is neither true nor false.", s)
		}
	}
	if s := q.Get("since"); s != "" {
		if f.Since, err = time.Parse(time.RFC3339, s); err != nil {
			return nil, problem(Invalid, "since: %.40q is no time as in RFC 3339.", s)
		}
	}
	p, err := r.page()
	if err != nil {
		return nil, err
	}
	if _, err := a.Store.Node(r.Context(), f.Node); err != nil {
		return nil, err
	}
	all, next, err := a.Store.Rounds(r.Context(), f, p)
	return listOf(all, next, err, newRound)
}

func (a *API) storedRound(r *request) (fleet.Round, error) {
	id, err := r.number("round")
	if err != nil {
		return fleet.Round{}, err
	}
	return a.Store.Round(r.Context(), id)
}

func (a *API) round(r *request) (any, error) {
	round, err := a.storedRound(r)
	if err != nil {
		return nil, err
	}
	return newRound(round), nil
}

func (a *API) evidence(r *request) (any, error) {
	round, err := a.storedRound(r)
	if err != nil {
		return nil, err
	}
	if len(round.Evidence) == 0 {
		return nil, fmt.Errorf("%w: the evidence of this round was not kept", operate.ErrNotFound)
	}
	h := r.w.Header()
	h.Set("Content-Type", report.MediaType)
	h.Set("Content-Disposition", fmt.Sprintf("attachment; filename=\"round-%d.cbor\"", round.ID))
	h.Set("Content-Length", strconv.Itoa(len(round.Evidence)))
	r.w.WriteHeader(http.StatusOK)
	r.w.Write(round.Evidence)
	return answered{}, nil
}

func (a *API) diff(r *request) (any, error) {
	if err := r.query("from"); err != nil {
		return nil, err
	}
	id, err := r.number("round")
	if err != nil {
		return nil, err
	}
	from, err := strconv.ParseInt(r.URL.Query().Get("from"), 10, 64)
	if err != nil {
		return nil, problem(Invalid, "from: the number of a round is wanted.")
	}
	d, err := a.Operate.Diff(r.Context(), r.actor, from, id)
	if err != nil {
		return nil, err
	}
	return list{Items: d}, nil
}

func (a *API) approveRound(r *request) (any, error) {
	id, err := r.number("round")
	if err != nil {
		return nil, err
	}
	var b struct {
		Reasons []operate.Ref `json:"reasons"`
	}
	if err := r.body(&b); err != nil {
		return nil, err
	}
	return a.Operate.ApproveRound(r.Context(), r.actor, id, b.Reasons...)
}
