package rounds

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"runtime/debug"
	"slices"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/nodeapi"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/webhook"
)

// Reasons of VMs that only who knows several nodes can give.
const (
	CodeTwice     = "vm-runs-twice" // two nodes have it running
	CodeElsewhere = "vm-elsewhere"  // another node has one of this UUID, with another vTPM
	CodeMoved     = "vm-moved"      // another node had one of this UUID, with another vTPM
)

// completeTime bounds an appraisal and its transaction.
const completeTime = 30 * time.Second

// nonceTime is how long a nonce is good: the node holds it for an interval, and
// then its TPM may be slow.
func (h *Handler) nonceTime() time.Duration { return h.Interval + max(h.Interval/2, 30*time.Second) }

// next makes a nonce. Nodes that were started together drift apart: the interval is
// up to a tenth shorter.
func (h *Handler) next(c *appraise.Checkpoint) (*nodeapi.Round, error) {
	r := &nodeapi.Round{Nonce: make([]byte, report.NonceSize), Expires: h.now().Add(h.nonceTime())}
	if err := h.random(r.Nonce); err != nil {
		return nil, err
	}
	r.Interval = h.Interval.Seconds() * (1 - mathrand.Float64()/10)
	r.HaveBoot, r.Have = c.Have()
	return r, nil
}

func (h *Handler) round(r *http.Request, id ca.Identity) (int, any, error) {
	ctx := r.Context()
	state, err := h.Store.RoundState(ctx, id.Node)
	if err != nil {
		return 0, nil, h.standing(ctx, id.Node, err)
	}
	c, err := appraise.DecodeCheckpoint(state.Checkpoint)
	if err != nil {
		c = nil
	}
	next, err := h.next(c)
	if err != nil {
		return 0, nil, err
	}
	if _, err := h.Store.IssueNonce(ctx, id.Node, next.Nonce, next.Expires); err != nil {
		return 0, nil, h.standing(ctx, id.Node, err)
	}
	return http.StatusCreated, next, nil
}

// standing says to a node why it has no rounds.
func (h *Handler) standing(ctx context.Context, id string, err error) error {
	if !errors.Is(err, store.ErrInactive) && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	n, nerr := h.node(ctx, id)
	switch {
	case nerr != nil:
		return nerr
	case n.State == fleet.Pending:
		return &ca.Refusal{Code: ca.NodePending, What: "an operator has not approved the node yet", Node: id}
	}
	return err
}

func (h *Handler) evidence(r *http.Request, id ca.Identity) (int, any, error) {
	if _, twice := h.busy.LoadOrStore(id.Node, true); twice {
		return 0, nil, refuse(ca.Busy, "Evidence of this node is being appraised")
	}
	defer h.busy.Delete(id.Node)
	began := time.Now()
	ctx := r.Context()
	n, state, err := h.nodes.get(ctx, h.Store, id.Node)
	if err != nil {
		return 0, nil, h.standing(ctx, id.Node, err)
	}
	if n.State != fleet.Active {
		return 0, nil, h.standing(ctx, id.Node, store.ErrInactive)
	}
	if state.Nonce == nil || h.now().After(state.Expires) {
		return 0, nil, refuse(ca.NonceBad, "no nonce is outstanding: Evidence replayed, or too late")
	}
	if n.Node, err = h.older(ctx, n.Node, r.TLS.VerifiedChains[0][0]); err != nil {
		return 0, nil, h.standing(ctx, id.Node, err)
	}
	body, held, readErr := h.readEvidence(r)
	defer func() { h.budget.give(held) }()
	if readErr == errFull || readErr != nil && ctx.Err() != nil {
		return 0, nil, readErr
	}
	if err := h.places.take(ctx, patience); err != nil {
		return 0, nil, err
	}
	defer h.places.give()
	// From here on there is a result, whatever happens, also when the node has gone
	// meanwhile: None, if nothing better.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), completeTime)
	defer cancel()
	outcome, err := h.complete(ctx, n, state, body, readErr)
	tier := appraise.None
	if err == nil {
		tier = outcome.Tier
	}
	h.Observe.Round(tier, len(body), time.Since(began), err)
	switch {
	case errors.Is(err, store.ErrNonce):
		return 0, nil, refuse(ca.NonceBad, "the nonce was used meanwhile")
	case err != nil:
		return 0, nil, h.standing(ctx, id.Node, err)
	case readErr != nil:
		return 0, nil, readErr
	}
	return http.StatusOK, outcome, nil
}

// older finds out that the store is older than a node's certificate, which this CA
// gave and the store does not know: it was brought back from a backup. What the node
// shows then for the first time it may have shown before, and otherwise: it is not
// learned.
func (h *Handler) older(ctx context.Context, n fleet.Node, cert *x509.Certificate) (fleet.Node, error) {
	if n.Certified.IsZero() || !cert.NotBefore.After(n.Certified) {
		return n, nil
	}
	err := h.Store.Do(ctx, func(tx *store.Tx) (err error) {
		if n, err = tx.Node(ctx, n.ID); err != nil {
			return err
		}
		n.Learns, n.Certified = false, cert.NotBefore
		n.Problem = string(ca.NodeRestored) + ": the Verifier's database is older than the node's certificate: nothing of the node is learned from now on"
		if n.Version, err = tx.UpdateNode(ctx, n); err != nil {
			return err
		}
		now := h.now()
		tx.Audit(fleet.AuditEntry{Time: now, Actor: "verifier", Action: "node.restored", Subject: n.ID, Detail: detail("name", n.Name, "serial", ca.Serial(cert))})
		return webhook.Queue(ctx, tx, webhook.Problem(n, string(ca.NodeRestored), now))
	})
	return n, err
}

// complete appraises the Evidence and stores what came of it, with all that
// follows, in one transaction.
func (h *Handler) complete(ctx context.Context, n *node, state store.RoundState, body []byte, readErr error) (*nodeapi.Outcome, error) {
	a := h.appraise(ctx, n, state, body, readErr)
	next, err := h.next(a.checkpoint)
	if err != nil {
		return nil, err
	}
	c := store.Completion{
		Node: n.ID, Nonce: state.Nonce, Checkpoint: a.encoded, Result: &a.result, Evidence: body,
		Next: next.Nonce, NextExpires: next.Expires,
	}
	before := n.last
	changed := state.Round == 0 || !before.same(&a.result, state)
	err = h.Store.Do(ctx, func(tx *store.Tx) error {
		var previous *appraise.Result
		if changed && state.Round != 0 {
			var err error
			if previous, err = tx.PreviousResult(ctx, n.ID); err != nil && !errors.Is(err, store.ErrNotFound) {
				return err
			}
			if previous != nil && a.result.Received.After(previous.Expires) {
				lapsed(previous)
			}
		}
		if len(a.learned) > 0 {
			added, err := tx.AddValues(ctx, a.learned)
			if err != nil {
				return err
			}
			tx.Audit(fleet.AuditEntry{Time: a.result.Received, Actor: "verifier", Action: "values.learn", Subject: n.ID, Detail: detail("values", fmt.Sprint(added))})
		}
		if _, err := tx.CompleteRound(ctx, c); err != nil {
			return err
		}
		if !changed {
			return nil
		}
		for _, e := range webhook.TrustChanges(n.Node, previous, &a.result, a.result.Received) {
			if err := webhook.Queue(ctx, tx, e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	n.last = summarize(&a.result, state.Version+1)
	h.nodes.keep(n)
	return &nodeapi.Outcome{Tier: a.result.Host.Tier, Codes: codes(&a.result), Next: next}, nil
}

// appraised is what an appraisal gives.
type appraised struct {
	result     appraise.Result
	checkpoint *appraise.Checkpoint
	encoded    []byte
	learned    []fleet.Value
}

// appraise never fails: what cannot be appraised is None, and leaves the
// checkpoint as it was.
func (h *Handler) appraise(ctx context.Context, n *node, state store.RoundState, body []byte, readErr error) (a appraised) {
	now := h.now()
	none := func(code, what string) {
		a = appraised{result: nothing(n, state, code, what, now, now.Add(h.nonceTime())), encoded: state.Checkpoint}
	}
	defer func() {
		if p := recover(); p != nil {
			h.Log.WithField("node", n.ID).WithField("stack", string(debug.Stack())).Errorf("panic in an appraisal: %v", p)
			none(appraise.CodeInternal, "the Verifier failed over this Evidence")
		}
		if a.checkpoint == nil && len(a.encoded) > 0 {
			a.checkpoint, _ = appraise.DecodeCheckpoint(a.encoded)
		}
	}()
	if readErr != nil {
		none(appraise.CodeFormat, readErr.Error())
		return a
	}
	policy, err := h.Policy(ctx)
	if err != nil {
		none(appraise.CodeInternal, "the Verifier has no policy that it can use")
		h.Log.WithError(err).Error("the appraisal policy")
		return a
	}
	previous, damaged := appraise.DecodeCheckpoint(state.Checkpoint)
	parsed := appraise.Parse(body)
	vms, keys := untrustedVMs(parsed)
	values, err := h.nodes.values(ctx, h.Store, n, vms)
	learn := policy.Learn && n.Learns && damaged == nil
	if err == nil && learn && previous == nil {
		// A checkpoint that was lost is no first round: what was learned once is not
		// learned again.
		var version int64
		version, err = h.Store.ValuesVersion(ctx, n.ID)
		learn = version == 0
	}
	var others []fleet.VM
	if err == nil {
		others, err = h.others(ctx, n, keys)
	}
	if err != nil {
		none(appraise.CodeInternal, "the Reference Values could not be read")
		h.Log.WithError(err).Error("reading Reference Values")
		return a
	}
	in := appraise.Input{
		Node:  appraise.Node{ID: n.ID, AK: n.ak, AKName: n.AKName},
		Nonce: state.Nonce, Expires: state.Expires, Evidence: body, Parsed: parsed, Previous: previous, Values: values, Policy: policy.Appraisal,
		Learn: learn, Elsewhere: map[string]bool{}, Now: now,
	}
	for _, o := range others {
		if o.Node != n.ID {
			in.Elsewhere[o.UUID] = true
		}
	}
	a.result, a.checkpoint, a.learned = appraise.Round(in)
	if n := len(a.learned); n > store.MaxValues {
		none(appraise.CodeInternal, fmt.Sprintf("there are %d Reference Values to learn, at most %d are learned: import those of its packages", n, store.MaxValues))
		return a
	}
	if a.checkpoint != nil {
		if a.encoded, err = a.checkpoint.Encode(); err != nil || len(a.encoded) > store.MaxCheckpoint {
			h.Log.WithField("node", n.ID).WithField("bytes", len(a.encoded)).WithError(err).Warn("the node's logs are appraised anew in each round: what is kept of them is too long")
			a.encoded, a.checkpoint = nil, nil
		}
	}
	if err := h.across(ctx, n, &a.result, others); err != nil {
		none(appraise.CodeInternal, "the other nodes' VMs could not be compared")
		h.Log.WithError(err).Error("comparing VMs of several nodes")
	}
	return a
}

// nothing is the result of a round that showed nothing: None for the host, and for
// the VMs that it had.
func nothing(n *node, state store.RoundState, code, what string, now, expires time.Time) appraise.Result {
	previous, err := appraise.DecodeCheckpoint(state.Checkpoint)
	if err != nil {
		previous = nil
	}
	r, _ := appraise.Appraise(appraise.Input{Node: appraise.Node{ID: n.ID, AK: n.ak, AKName: n.AKName}, Nonce: state.Nonce, Previous: previous, Policy: appraise.DefaultPolicy(), Now: now})
	r.Expires = expires
	r.Host = appraise.Appraisal{Tier: appraise.None, Reasons: []appraise.Reason{{Code: code, Tier: appraise.None, What: what}}}
	for i := range r.VMs {
		r.VMs[i].Appraisal = appraise.Appraisal{Tier: appraise.None, Reasons: []appraise.Reason{{Code: appraise.CodeHost, Tier: appraise.None, What: "nothing is known of its host"}}}
	}
	return r
}

// untrustedVMs gives UUIDs, and them with their EKs' digests, out of a report that
// nobody has vouched for yet.
func untrustedVMs(p *appraise.Parsed) (uuids []string, keys []store.VMKey) {
	vms := p.UntrustedVMs()
	for i := range vms {
		v := &vms[i]
		uuid := spell(v.UUID)
		uuids = append(uuids, uuid)
		keys = append(keys, store.VMKey{UUID: uuid, EK: hex.EncodeToString(v.EK)})
	}
	return uuids, keys
}

func spell(u [16]byte) string {
	d := hex.EncodeToString(u[:])
	return d[:8] + "-" + d[8:12] + "-" + d[12:16] + "-" + d[16:20] + "-" + d[20:]
}

// maxAsked bounds a question for VMs of other nodes.
const maxAsked = 500

// others gives the VMs of other nodes, or of this one under other names, that have the
// same UUIDs or EKs.
func (h *Handler) others(ctx context.Context, n *node, vms []store.VMKey) (all []fleet.VM, err error) {
	for batch := range slices.Chunk(vms, maxAsked) {
		some, err := h.Store.Others(ctx, n.ID, batch)
		if err != nil {
			return nil, err
		}
		all = append(all, some...)
	}
	return all, nil
}

// across holds the VMs against those of other nodes: two VMs with one EK share a
// vTPM, a VM runs in one place only, and takes its vTPM along when it moves.
func (h *Handler) across(ctx context.Context, n *node, r *appraise.Result, others []fleet.VM) error {
	var fresh []string
	for i := range r.VMs {
		v := &r.VMs[i]
		if _, known := n.last.tiers[v.UUID]; !known {
			fresh = append(fresh, v.UUID)
		}
		for j := range others {
			switch o := &others[j]; {
			case o.UUID != v.UUID && v.EK != "" && o.EKDigest == v.EK:
				add(v, appraise.Reason{Code: appraise.CodeVMSharedEK, Tier: appraise.Contraindicated,
					What: fmt.Sprintf("VM %s of node %q has the same vTPM", o.UUID, o.NodeName), Digest: v.EK})
			case o.UUID != v.UUID || o.Node == n.ID:
			case v.Running && o.Running && n.last.runs(v.UUID) && o.Expires.After(n.last.expires):
				// Both have said so after both had: while a VM moves, the one that it left has
				// not spoken again yet.
				add(v, appraise.Reason{Code: CodeTwice, Tier: appraise.Contraindicated,
					What: fmt.Sprintf("node %q has this VM running, too", o.NodeName), Digest: v.EK})
			case another(v.EK, o.EKDigest):
				add(v, appraise.Reason{Code: CodeElsewhere, Tier: appraise.Warning,
					What: fmt.Sprintf("node %q has a VM of this UUID, too, with another vTPM", o.NodeName), Digest: v.EK, Expected: o.EKDigest})
			}
		}
	}
	for batch := range slices.Chunk(fresh, maxAsked) {
		left, err := h.Store.LeftVMs(ctx, n.ID, batch)
		if err != nil {
			return err
		}
		for _, o := range left {
			i := slices.IndexFunc(r.VMs, func(v appraise.VM) bool { return v.UUID == o.UUID })
			if v := &r.VMs[i]; another(v.EK, o.EKDigest) {
				add(v, appraise.Reason{Code: CodeMoved, Tier: appraise.Warning,
					What: fmt.Sprintf("node %q had a VM of this UUID, with another vTPM, until %s", o.NodeName, o.Changed.Format(time.RFC3339)), Digest: v.EK, Expected: o.EKDigest})
			}
		}
	}
	return nil
}

// another says whether two EKs, where both are known, are not the same.
func another(a, b string) bool { return a != "" && b != "" && a != b }

// add puts a reason to a VM's others.
func add(v *appraise.VM, r appraise.Reason) {
	if slices.ContainsFunc(v.Reasons, func(x appraise.Reason) bool { return x.Code == r.Code && x.What == r.What }) {
		return
	}
	if v.Tier != appraise.None { // which nothing makes worse
		v.Tier = max(v.Tier, r.Tier)
		v.Vector.InstanceIdentity = int8(r.Tier)
	}
	v.Reasons = append(v.Reasons, r)
	slices.SortStableFunc(v.Reasons, func(a, b appraise.Reason) int { return cmp.Compare(b.Tier, a.Tier) })
}

// lapsed makes of a result that has expired what it counts for.
func lapsed(r *appraise.Result) {
	r.Host.Tier = appraise.None
	for i := range r.VMs {
		r.VMs[i].Tier = appraise.None
	}
}

func codes(r *appraise.Result) []string {
	all := []string{}
	for _, x := range r.Host.Reasons {
		all = append(all, x.Code)
	}
	for i := range r.VMs {
		for _, x := range r.VMs[i].Reasons {
			all = append(all, x.Code)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}
