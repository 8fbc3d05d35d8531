package page

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
)

// strip is the timeline drawn: one bar a round, oldest first, as high as it is
// bad.
type strip struct {
	Bars  []bar
	Says  string
	Width int
}

type bar struct {
	X, Y, W, H int
	Tier       appraise.Tier
	Says       string
}

// tierIn gives the tier of a round: the host's, or that of one VM.
func tierIn(r fleet.Round, vm string) appraise.Tier {
	name := r.HostTier
	if vm != "" {
		name = r.VMTiers[vm]
	}
	t, _ := tierNamed(name)
	return t
}

func newStrip(rounds []fleet.Round, vm string) strip {
	s := strip{Width: stripRounds * 10}
	counts := map[appraise.Tier]int{}
	// A run of rounds alike is one to the store and as many as they were here.
	var each []fleet.Round
	for _, r := range rounds {
		for range min(max(r.Count, 1), int64(stripRounds-len(each))) {
			each = append(each, r)
		}
	}
	for i, r := range slices.Backward(each) {
		t := tierIn(r, vm)
		counts[t]++
		h := map[appraise.Tier]int{appraise.Affirming: 12, appraise.Warning: 24, appraise.Contraindicated: 40, appraise.None: 32}[t]
		says := fmt.Sprintf("Round %d, %s: %s", r.ID, stamp(r.Received), t)
		if r.Count > 1 {
			says += fmt.Sprintf(", %d times", r.Count)
		}
		s.Bars = append(s.Bars, bar{X: (len(each) - 1 - i) * 10, Y: 42 - h, W: 8, H: h, Tier: t, Says: says})
	}
	var parts []string
	for _, t := range worstFirst {
		if counts[t] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", counts[t], t))
		}
	}
	s.Says = fmt.Sprintf("The last %s, oldest first: %s.", plural(len(each), "round", "rounds"), strings.Join(parts, ", "))
	return s
}

type roundRow struct {
	fleet.Round
	Tier    appraise.Tier
	VMs     []tally // how many stand where
	Changes []changeRow
	More    int // changes that are not shown
	VM      string
}

// changeRow is a change; Whose is the VM's that it is of, "" for the host's.
type changeRow struct{ Kind, Mark, Words, Whose, What string }

func changeRows(cs []appraise.Change, names vmNames) []changeRow {
	out := make([]changeRow, 0, len(cs))
	for _, c := range cs {
		w := changeRow{Kind: c.Kind, Mark: changeMark(c.Kind), Words: changeWords(c.Kind), What: c.What}
		if c.Subject != "host" {
			w.Whose = cmp.Or(names[c.Subject], c.Subject)
		}
		out = append(out, w)
	}
	return out
}

// vmNames are VMs' names by UUID, as far as they are known.
type vmNames map[string]string

func namesIn(results ...*appraise.Result) vmNames {
	names := vmNames{}
	for _, r := range results {
		if r == nil {
			continue
		}
		for _, v := range r.VMs {
			names[v.UUID] = v.Name
		}
	}
	return names
}

// changesOf reads a round's changes; those of one VM, and the host's, where vm is
// not "".
func changesOf(r fleet.Round, vm string, names vmNames) []changeRow {
	var cs []appraise.Change
	if json.Unmarshal(r.Changes, &cs) != nil {
		return nil
	}
	if vm != "" {
		cs = slices.DeleteFunc(cs, func(c appraise.Change) bool { return c.Subject != vm && c.Subject != "host" })
	}
	return changeRows(cs, names)
}

func roundRows(rounds []fleet.Round, vm string, names vmNames) []roundRow {
	const most = 4
	out := make([]roundRow, 0, len(rounds))
	for _, r := range rounds {
		w := roundRow{Round: r, Tier: tierIn(r, vm), VM: vm, Changes: changesOf(r, vm, names)}
		if len(w.Changes) > most {
			w.More = len(w.Changes) - most
			w.Changes = w.Changes[:most]
		}
		by := map[appraise.Tier]int{}
		for _, name := range r.VMTiers {
			t, _ := tierNamed(name)
			by[t]++
		}
		for _, t := range worstFirst {
			if by[t] > 0 {
				w.VMs = append(w.VMs, tally{Tier: t, N: by[t]})
			}
		}
		out = append(out, w)
	}
	return out
}

type roundsView struct {
	Node    fleet.Status
	Rounds  []roundRow
	Strip   strip
	Bad     bool // only those that were not affirming
	VM      string
	Next    string
	Later   bool
	Between [2]int64 // what the form for a comparison begins with
}

func (p *Page) roundsPage(r *http.Request) (view, error) {
	n, err := p.Store.Status(r.Context(), r.PathValue("node"))
	if err != nil {
		return view{}, err
	}
	q := r.URL.Query()
	d := roundsView{Node: n, Bad: q.Get("only") == "bad", VM: q.Get("vm"), Later: q.Get("after") != ""}
	rounds, next, err := p.Store.Rounds(r.Context(), store.RoundFilter{Node: n.ID, VM: d.VM, NotAffirmed: d.Bad}, store.Page{Limit: stripRounds, After: q.Get("after")})
	if err != nil {
		return view{}, err
	}
	res, err := p.result(r, n.ID)
	if err != nil {
		return view{}, err
	}
	d.Rounds, d.Strip = roundRows(rounds, d.VM, namesIn(res)), newStrip(rounds, d.VM)
	if len(rounds) > 1 {
		d.Between = [2]int64{rounds[1].ID, rounds[0].ID}
	}
	v := url.Values{}
	if d.Bad {
		v.Set("only", "bad")
	}
	if d.VM != "" {
		v.Set("vm", d.VM)
	}
	d.Next = nextPage("/nodes/"+n.ID+"/rounds", v, next)
	return view{name: "rounds", title: "Rounds of " + n.Name, data: d}, nil
}

type roundView struct {
	Node     fleet.Status
	Round    roundRow
	Result   *appraise.Result // as it was; nil where none was kept
	Findings []finding
	VMs      []vmRow
	Previous int64
	Evidence int // bytes that were kept
	Approve  []approvable
}

// approvable is a finding of which a Reference Value can be made.
type approvable struct {
	Ref       string // as the form names it
	On        string // "host", or the VM's name
	Value     fleet.Value
	What, Why string
}

// approvables gives them, of the host and all VMs, in the order of the result.
func approvables(node string, res *appraise.Result) []approvable {
	var out []approvable
	take := func(subject, name string, rs []appraise.Reason) {
		for i, r := range rs {
			if v, ok := operate.ValueOf(node, subject, r); ok {
				out = append(out, approvable{subject + ":" + strconv.Itoa(i), name, v, r.What, r.Code})
			}
		}
	}
	take("host", "host", res.Host.Reasons)
	for _, v := range res.VMs {
		take(v.UUID, "VM "+v.Name, v.Reasons)
	}
	return out
}

// round gives one round of this node, as the address names it.
func (p *Page) round(ctx context.Context, node, id string) (fleet.Round, error) {
	n, err := strconv.ParseInt(id, 10, 64)
	if err != nil || n <= 0 {
		return fleet.Round{}, store.ErrNotFound
	}
	r, err := p.Store.Round(ctx, n)
	if err == nil && r.Node != node {
		err = store.ErrNotFound
	}
	return r, err
}

func (p *Page) roundPage(r *http.Request) (view, error) {
	n, err := p.Store.Status(r.Context(), r.PathValue("node"))
	if err != nil {
		return view{}, err
	}
	round, err := p.round(r.Context(), n.ID, r.PathValue("round"))
	if err != nil {
		return view{}, err
	}
	res := resultIn(round)
	d := roundView{Node: n, Result: res, Round: roundRows([]fleet.Round{round}, "", nil)[0], Evidence: len(round.Evidence)}
	d.Round.Changes, d.Round.More = changesOf(round, "", namesIn(res)), 0
	if res != nil {
		d.Findings, d.Approve = findings(d.Result.Host.Reasons), approvables(n.ID, d.Result)
		for _, v := range d.Result.VMs {
			w := vmRow{VM: v}
			if fs := findings(v.Reasons); len(fs) > 0 {
				w.First, w.More = &fs[0], len(fs)-1
			}
			d.VMs = append(d.VMs, w)
		}
		slices.SortStableFunc(d.VMs, func(a, b vmRow) int { return worse(a.Tier, b.Tier) })
	}
	before, err := p.before(r.Context(), n.ID, round.ID, 1)
	if err != nil {
		return view{}, err
	}
	if len(before) > 0 {
		d.Previous = before[0].ID
	}
	return view{name: "round", title: fmt.Sprintf("Round %d of %s", round.ID, n.Name), data: d}, nil
}

func resultIn(r fleet.Round) *appraise.Result {
	var res appraise.Result
	if len(r.Result) == 0 || json.Unmarshal(r.Result, &res) != nil {
		return nil
	}
	return &res
}

// maxWalk bounds how many rounds one page goes through.
const maxWalk = 2000

// before gives at most n rounds of a node that are older than one, newest first.
func (p *Page) before(ctx context.Context, node string, id int64, n int) ([]fleet.Round, error) {
	var out []fleet.Round
	after := ""
	for seen := 0; seen < maxWalk; {
		rounds, next, err := p.Store.Rounds(ctx, store.RoundFilter{Node: node}, store.Page{Limit: 200, After: after})
		if err != nil {
			return nil, err
		}
		for _, r := range rounds {
			if r.ID < id {
				if out = append(out, r); len(out) == n {
					return out, nil
				}
			}
		}
		if seen += len(rounds); next == "" || len(rounds) == 0 {
			break
		}
		after = next
	}
	return out, nil
}

type diffView struct {
	Node     fleet.Status
	From, To roundRow
	Steps    []roundRow // the rounds between that changed something, oldest first
	Cut      bool       // there are more than were gone through
	Kept     bool       // both results were kept, so that Deltas says something
	Deltas   []deltaGroup
	Rounds   []roundRow // to choose others
}

// deltaGroup is what differs in one subject.
type deltaGroup struct {
	Name, Href string
	Gone       bool // there is no page of it any more
	Deltas     []delta
}

// delta is one difference: what it is of, before and after ("" for not there).
type delta struct {
	Name, Before, After string
	Tiers               bool // before and after are tiers
}

// Was and Is are the tiers.
func (d delta) Was() appraise.Tier { t, _ := tierNamed(d.Before); return t }
func (d delta) Is() appraise.Tier  { t, _ := tierNamed(d.After); return t }

func (p *Page) diffPage(r *http.Request) (view, error) {
	ctx, q := r.Context(), r.URL.Query()
	n, err := p.Store.Status(ctx, r.PathValue("node"))
	if err != nil {
		return view{}, err
	}
	from, err := p.round(ctx, n.ID, q.Get("from"))
	if err != nil {
		return view{}, err
	}
	to, err := p.round(ctx, n.ID, q.Get("to"))
	if err != nil {
		return view{}, err
	}
	if from.ID > to.ID {
		from, to = to, from
	}
	d := diffView{Node: n, From: roundRows([]fleet.Round{from}, "", nil)[0], To: roundRows([]fleet.Round{to}, "", nil)[0]}
	between, older, cut, err := p.between(ctx, n.ID, from, to)
	if err != nil {
		return view{}, err
	}
	d.Cut = cut
	a, err := p.stateAt(ctx, from, older)
	if err != nil {
		return view{}, err
	}
	b, err := p.stateAt(ctx, to, slices.Concat(between[min(1, len(between)):], []fleet.Round{from}, older))
	if err != nil {
		return view{}, err
	}
	names := namesIn(a, b)
	for _, b := range slices.Backward(between) {
		w := roundRows([]fleet.Round{b}, "", nil)[0]
		if w.Changes, w.More = changesOf(b, "", names), 0; len(w.Changes) > 0 {
			d.Steps = append(d.Steps, w)
		}
	}
	if a != nil && b != nil {
		d.Kept, d.Deltas = true, grouped(n, operate.Differences(a, b))
	}
	return view{name: "diff", title: fmt.Sprintf("What changed on %s between rounds %d and %d", n.Name, from.ID, to.ID), data: d}, nil
}

// between gives the rounds after from up to and with to, newest first, and some
// that are older than from.
func (p *Page) between(ctx context.Context, node string, from, to fleet.Round) (between, older []fleet.Round, cut bool, err error) {
	after := ""
	for seen := 0; ; {
		rounds, next, err := p.Store.Rounds(ctx, store.RoundFilter{Node: node}, store.Page{Limit: 500, After: after})
		if err != nil {
			return nil, nil, false, err
		}
		for _, r := range rounds {
			switch {
			case r.ID > to.ID:
			case r.ID > from.ID:
				between = append(between, r)
			case r.ID < from.ID:
				older = append(older, r)
			}
		}
		seen += len(rounds)
		switch {
		case next == "" || len(rounds) == 0 || len(older) >= 20:
			return between, older, false, nil
		case seen >= maxWalk:
			return between, older, len(older) == 0, nil
		}
		after = next
	}
}

// stateAt gives the result of a round; where it was not kept, because nothing had
// changed, that of the newest one before it that was.
func (p *Page) stateAt(ctx context.Context, r fleet.Round, before []fleet.Round) (*appraise.Result, error) {
	if res := resultIn(r); res != nil {
		return res, nil
	}
	for _, b := range before[:min(len(before), 20)] {
		full, err := p.Store.Round(ctx, b.ID)
		if err != nil {
			return nil, err
		}
		if res := resultIn(full); res != nil {
			return res, nil
		}
	}
	return nil, nil
}

// grouped gives differences by their subject, in their order.
func grouped(n fleet.Status, ds []operate.Difference) []deltaGroup {
	var out []deltaGroup
	last := ""
	for _, d := range ds {
		if len(out) == 0 || d.Subject != last {
			last = d.Subject
			g := deltaGroup{Name: "Host " + n.Name, Href: "/nodes/" + n.ID}
			if d.Subject != "host" {
				g = deltaGroup{Name: "VM " + cmp.Or(d.Name, d.Subject), Href: "/nodes/" + n.ID + "/vms/" + d.Subject}
			}
			out = append(out, g)
		}
		g := &out[len(out)-1]
		g.Deltas = append(g.Deltas, delta{deltaWords(d), d.Before, d.After, d.Kind == "tier"})
		g.Gone = g.Gone || d.Kind == "vm" && d.After == ""
	}
	return out
}

// deltaWords says what a difference is of.
func deltaWords(d operate.Difference) string {
	switch d.Kind {
	case "pcr":
		return "PCR " + d.What
	case "reason":
		return "finding " + d.What
	case "launcher":
		return "launcher " + d.What
	case "tier":
		return "trust"
	}
	return d.What
}
