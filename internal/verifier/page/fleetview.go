package page

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

const (
	rowsPerPage  = 50
	maxAttention = 8
)

// tally is how many stand at one tier, and where that lies in the bar of 1,000.
type tally struct {
	Tier appraise.Tier
	N    int
	X, W int
	Href string
}

func tallies(by map[appraise.Tier]int, base string) []tally {
	total := 0
	for _, n := range by {
		total += n
	}
	x := 0
	var out []tally
	for _, t := range worstFirst {
		k := tally{Tier: t, N: by[t], X: x, Href: base + "tier=" + t.String()}
		if total > 0 && k.N > 0 {
			k.W = max(6, k.N*1000/total) // one bad host in 10,000 is seen
		}
		x += k.W
		out = append(out, k)
	}
	if x > 1000 { // the largest gives what the smallest were given
		i := 0
		for j := range out {
			if out[j].W > out[i].W {
				i = j
			}
		}
		over := x - 1000
		out[i].W -= over
		for j := i + 1; j < len(out); j++ {
			out[j].X -= over
		}
	}
	return out
}

// attention is something that someone should look at.
type attention struct {
	Tier       appraise.Tier
	Kind, Name string
	On         string // of a VM: its host
	Href       string
	Code, What string
	Do         string
	More       int // further findings
}

// row is a host in the table.
type row struct {
	fleet.Status
	Counts []tally // of its VMs, without those of which there are none
	All    int
	Worst  appraise.Tier
	VM     *fleet.VM // one that stands there
	Note   string    // why there is no tier
}

type filter struct {
	Q, Tier, State string
	Problem        bool
}

func (f filter) values() url.Values {
	v := url.Values{}
	for k, s := range map[string]string{"q": f.Q, "tier": f.Tier, "state": f.State} {
		if s != "" {
			v.Set(k, s)
		}
	}
	if f.Problem {
		v.Set("problem", "1")
	}
	return v
}

// Any says whether anything is filtered.
func (f filter) Any() bool { return f != filter{} }

type fleetView struct {
	Hosts, VMs         int
	HostTally, VMTally []tally
	First              []attention
	Filter             filter
	Rows               []row
	Next               string // address of the next page
	Later              bool   // not the first page
	Pending, Revoked   int
	Problems           int
	Empty              bool // there is no node at all
	AllGood            bool // no active host and no VM of one is anything but affirmed
}

func filterOf(r *http.Request) filter {
	q := r.URL.Query()
	f := filter{Q: q.Get("q"), State: q.Get("state"), Problem: q.Get("problem") == "1"}
	if len(f.Q) > 300 {
		f.Q = f.Q[:300]
	}
	if t := q.Get("tier"); t != "" {
		if tier, ok := tierNamed(t); ok {
			f.Tier = tier.String()
		}
	}
	switch fleet.NodeState(f.State) {
	case fleet.Pending, fleet.Active, fleet.Revoked:
	default:
		f.State = ""
	}
	return f
}

func tierNamed(s string) (appraise.Tier, bool) {
	for _, t := range worstFirst {
		if t.String() == s {
			return t, true
		}
	}
	return appraise.None, false
}

func (f filter) nodes() store.NodeFilter {
	n := store.NodeFilter{State: fleet.NodeState(f.State), Search: f.Q, Problem: f.Problem}
	if t, ok := tierNamed(f.Tier); ok {
		n.Tier = &t
		if n.State == "" {
			n.State = fleet.Active // the others are none for another reason
		}
	}
	return n
}

func (p *Page) fleetPage(r *http.Request) (view, error) {
	ctx := r.Context()
	sum, err := p.Store.Summary(ctx)
	if err != nil {
		return view{}, err
	}
	d := fleetView{
		HostTally: tallies(sum.ByTier, "/?"), VMTally: tallies(sum.VMs, "/vms?"), Filter: filterOf(r),
		Pending: sum.Nodes[fleet.Pending], Revoked: sum.Nodes[fleet.Revoked], Problems: sum.Problems,
		Later: r.URL.Query().Get("after") != "",
	}
	for _, t := range d.HostTally {
		d.Hosts += t.N
	}
	for _, t := range d.VMTally {
		d.VMs += t.N
	}
	d.AllGood = sum.ByTier[appraise.Affirming] == d.Hosts && sum.VMs[appraise.Affirming] == d.VMs && d.Hosts > 0
	d.Empty = sum.Nodes[fleet.Pending]+sum.Nodes[fleet.Active]+sum.Nodes[fleet.Revoked] == 0
	if !d.Filter.Any() && !d.Later {
		if d.First, err = p.attention(ctx, sum); err != nil {
			return view{}, err
		}
	}
	nodes, next, err := p.Store.Nodes(ctx, d.Filter.nodes(), store.Page{Limit: rowsPerPage, After: r.URL.Query().Get("after")})
	if err != nil {
		return view{}, err
	}
	if d.Rows, err = p.rows(ctx, nodes); err != nil {
		return view{}, err
	}
	d.Next = nextPage("/", d.Filter.values(), next)
	return view{name: "fleet", title: "Fleet", data: d}, nil
}

func nextPage(path string, v url.Values, next string) string {
	if next == "" {
		return ""
	}
	v.Set("after", next)
	return path + "?" + v.Encode()
}

func (p *Page) rows(ctx context.Context, nodes []fleet.Status) ([]row, error) {
	out := make([]row, 0, len(nodes))
	for _, n := range nodes {
		w := row{Status: n, Worst: appraise.Affirming, Note: noTier(n, p)}
		for _, t := range worstFirst {
			if k := n.VMs[t]; k > 0 {
				w.Counts = append(w.Counts, tally{Tier: t, N: k})
				w.All += k
			}
		}
		if len(w.Counts) > 0 {
			w.Worst = w.Counts[0].Tier
		}
		// Where all is none because the host's result is, no VM is worse than another.
		if w.Worst != appraise.Affirming && !(w.Worst == appraise.None && n.Tier == appraise.None) {
			vms, _, err := p.Store.VMs(ctx, store.VMFilter{Node: n.ID, Tier: &w.Worst}, store.Page{Limit: 1})
			if err != nil {
				return nil, err
			}
			if len(vms) > 0 {
				w.VM = &vms[0]
			}
		}
		out = append(out, w)
	}
	return out, nil
}

// noTier says why a node has no tier.
func noTier(n fleet.Status, p *Page) string {
	switch {
	case n.State == fleet.Pending:
		return "waits for approval"
	case n.State == fleet.Revoked:
		return "revoked"
	case n.Round == 0:
		return "no round yet"
	case !n.Expires.IsZero() && !p.Now().Before(n.Expires):
		return "result expired"
	}
	return ""
}

// attention gathers what to look at first: nodes that someone else claims, what
// is contraindicated, what could not be appraised, then warnings. VMs that are
// only as bad as their host are left to the host.
func (p *Page) attention(ctx context.Context, sum fleet.Summary) ([]attention, error) {
	var out []attention
	results := map[string]*appraise.Result{}
	result := func(node string) (*appraise.Result, error) {
		if r, ok := results[node]; ok {
			return r, nil
		}
		r, err := p.Store.Result(ctx, node)
		if errors.Is(err, store.ErrNotFound) {
			r, err = nil, nil
		}
		results[node] = r
		return r, err
	}
	host := map[string]appraise.Tier{}
	if sum.Problems > 0 {
		nodes, _, err := p.Store.Nodes(ctx, store.NodeFilter{Problem: true}, store.Page{Limit: maxAttention})
		if err != nil {
			return nil, err
		}
		for _, n := range nodes {
			if n.State == fleet.Revoked {
				continue
			}
			out = append(out, attention{Tier: appraise.Contraindicated, Kind: "Identity", Name: n.Name, Href: "/nodes/" + n.ID, What: n.Problem,
				Do: "Find out which machine is the right one. Revoke the node where it was taken over."})
		}
	}
	for _, t := range []appraise.Tier{appraise.Contraindicated, appraise.None, appraise.Warning} {
		if sum.ByTier[t] > 0 {
			nodes, _, err := p.Store.Nodes(ctx, store.NodeFilter{State: fleet.Active, Tier: &t}, store.Page{Limit: maxAttention})
			if err != nil {
				return nil, err
			}
			for _, n := range nodes {
				host[n.ID] = t
				if len(out) >= maxAttention {
					continue
				}
				a := attention{Tier: t, Kind: "Host", Name: n.Name, Href: "/nodes/" + n.ID, What: noTier(n, p)}
				r, err := result(n.ID)
				if err != nil {
					return nil, err
				}
				if r != nil {
					a.reason(r.Host.Reasons)
				}
				out = append(out, a)
			}
		}
		if t == appraise.None || sum.VMs[t] == 0 || len(out) >= maxAttention {
			continue
		}
		vms, _, err := p.Store.VMs(ctx, store.VMFilter{Tier: &t}, store.Page{Limit: 4 * maxAttention})
		if err != nil {
			return nil, err
		}
		for _, v := range vms {
			if len(out) >= maxAttention {
				break
			}
			r, err := result(v.Node)
			if err != nil {
				return nil, err
			}
			if r == nil || r.Host.Tier == t {
				continue
			}
			i := slices.IndexFunc(r.VMs, func(m appraise.VM) bool { return m.UUID == v.UUID })
			if i < 0 {
				continue
			}
			a := attention{Tier: t, Kind: "VM", Name: v.Name, On: v.NodeName, Href: "/nodes/" + v.Node + "/vms/" + v.UUID}
			a.reason(r.VMs[i].Reasons)
			out = append(out, a)
		}
	}
	slices.SortStableFunc(out, func(a, b attention) int {
		return cmp.Or(worse(a.Tier, b.Tier), cmp.Compare(rank(a.Kind), rank(b.Kind)))
	})
	return out[:min(len(out), maxAttention)], nil
}

func rank(kind string) int { return slices.Index([]string{"Identity", "Host", "VM"}, kind) }

func (a *attention) reason(rs []appraise.Reason) {
	if len(rs) == 0 {
		return
	}
	a.Code, a.What, a.Do, a.More = rs[0].Code, rs[0].What, adviceFor(rs[0].Code), len(rs)-1
}

type vmsView struct {
	Filter filter
	VMs    []fleet.VM
	Next   string
	Later  bool
}

func (p *Page) vmsPage(r *http.Request) (view, error) {
	f := filterOf(r)
	f.State, f.Problem = "", false
	q := store.VMFilter{Search: f.Q}
	if t, ok := tierNamed(f.Tier); ok {
		q.Tier = &t
	}
	after := r.URL.Query().Get("after")
	vms, next, err := p.Store.VMs(r.Context(), q, store.Page{Limit: rowsPerPage, After: after})
	if err != nil {
		return view{}, err
	}
	return view{name: "vms", title: "VMs", data: vmsView{f, vms, nextPage("/vms", f.values(), next), after != ""}}, nil
}
