package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
)

// CodeExpired is the reason in a result that has expired, CodeInactive in that of
// a node that is not active.
const (
	CodeExpired  = "result-expired"
	CodeInactive = "node-not-active"
)

// Result gives the node's newest result as it counts now: once it has expired, or
// the node is not active, every tier in it is None, every vector empty, and the
// first reason says so. ErrNotFound before the first round.
func (r reads) Result(ctx context.Context, node string) (*appraise.Result, error) {
	res, state, err := r.result(ctx, node)
	if err != nil {
		return nil, fmt.Errorf("result of node %s: %w", node, err)
	}
	switch {
	case state != fleet.Active:
		void(res, appraise.Reason{Code: CodeInactive, What: "the node is " + string(state)})
	case !res.Expires.After(r.now()):
		void(res, appraise.Reason{Code: CodeExpired, What: "nothing came since " + res.Received.Format(time.RFC3339) + "; the result was good until " + res.Expires.Format(time.RFC3339)})
	}
	return res, nil
}

// PreviousResult gives the node's newest result as it was received, to compare
// the next one with: it says nothing about now. ErrNotFound before the first
// round.
func (r reads) PreviousResult(ctx context.Context, node string) (*appraise.Result, error) {
	res, _, err := r.result(ctx, node)
	if err != nil {
		return nil, fmt.Errorf("result of node %s: %w", node, err)
	}
	return res, nil
}

func (r reads) result(ctx context.Context, node string) (*appraise.Result, fleet.NodeState, error) {
	var state fleet.NodeState
	var received, expires time.Time
	var result, changes []byte
	err := r.one(ctx, `SELECT n.state, s.received, s.expires, r.result, r.changes`+fromNodes+` JOIN rounds r ON r.id = s.round WHERE n.id = ?`, []any{node},
		&state, at{&received}, at{&expires}, &result, &changes)
	if err != nil {
		return nil, "", err
	}
	res := &appraise.Result{}
	for _, part := range []struct {
		packed []byte
		v      any
	}{{result, res}, {changes, &res.Changes}} {
		b, err := unpack(part.packed, maxResult)
		if err == nil && len(b) > 0 {
			err = json.Unmarshal(b, part.v)
		}
		if err != nil {
			return nil, "", errors.Join(errors.New("the result that was kept cannot be read"), err)
		}
	}
	res.Received, res.Expires = received, expires
	return res, state, nil
}

// void takes all trust out of a result.
func void(res *appraise.Result, why appraise.Reason) {
	why.Tier = appraise.None
	none := func(a *appraise.Appraisal) {
		a.Tier, a.Vector = appraise.None, appraise.Vector{}
		for i := range a.Reasons {
			a.Reasons[i].Tier = appraise.None
		}
		a.Reasons = append([]appraise.Reason{why}, a.Reasons...)
	}
	none(&res.Host)
	for i := range res.VMs {
		none(&res.VMs[i].Appraisal)
	}
}

// VMFilter chooses VMs; zero fields choose all.
type VMFilter struct {
	UUID   string
	Node   string
	Tier   *appraise.Tier // what the newest result says now
	EK     string         // digest
	Search string         // part of the name, or the whole UUID
}

const (
	joinVMs = " JOIN nodes n ON n.id = v.node JOIN node_state s ON s.node = v.node"
	fromVMs = " FROM vms v" + joinVMs
)

// vmTierNow is tierNow of a VM.
const vmTierNow = `CASE WHEN n.state = 'active' AND s.expires > ? THEN v.tier ELSE 0 END`

const vmColumns = "v.uuid, v.node, n.name, v.name, v.running, v.ek_digest, s.expires, v.changed, " + vmTierNow

func readVM(scan func(...any) error, v *fleet.VM) error {
	return scan(&v.UUID, &v.Node, &v.NodeName, &v.Name, &v.Running, &v.EKDigest, at{&v.Expires}, at{&v.Changed}, &v.Tier)
}

// VMs gives VMs by UUID and node.
func (r reads) VMs(ctx context.Context, f VMFilter, p Page) ([]fleet.VM, string, error) {
	all, err := r.vms(ctx, f, p)
	if err != nil {
		return nil, "", fmt.Errorf("VMs: %w", err)
	}
	all, next := paged(all, p, func(v fleet.VM) string { return cursor(v.UUID, v.Node) })
	return all, next, nil
}

func (r reads) vms(ctx context.Context, f VMFilter, p Page) ([]fleet.VM, error) {
	var c conditions
	after, err := p.after(2)
	if err != nil {
		return nil, err
	}
	if after != nil {
		c.add("(v.uuid, v.node) > (?, ?)", after[0], after[1])
	}
	if f.UUID != "" {
		c.add("v.uuid = ?", f.UUID)
	}
	if f.Node != "" {
		c.add("v.node = ?", f.Node)
	}
	if f.EK != "" {
		c.add("v.ek_digest = ?", f.EK)
	}
	if f.Search != "" {
		c.contains(r.d, "v.name", "v.uuid", f.Search)
	}
	query := func(c conditions) (string, []any) {
		return "SELECT " + vmColumns + fromVMs + c.String() + " ORDER BY v.uuid, v.node LIMIT ?", slices.Concat([]any{r.now()}, c.args, []any{p.limit() + 1})
	}
	if f.Tier == nil {
		q, args := query(c)
		if f.Search != "" { // an index has all that is looked at; the rest is fetched for what was found
			q = "SELECT " + vmColumns + " FROM (SELECT v.uuid, v.node FROM vms v" + c.String() + " ORDER BY v.uuid, v.node LIMIT ?) f JOIN vms v ON v.uuid = f.uuid AND v.node = f.node" +
				joinVMs + " ORDER BY v.uuid, v.node"
		}
		return list(ctx, r, q, args, readVM)
	}
	// What vmTierNow says, in terms that an index has: a tier is that of the row, of a
	// node whose result counts; None is that too, and all rows of other nodes.
	narrow := f.UUID+f.Node+f.EK == ""
	if *f.Tier != appraise.None {
		c.add("v.tier = ?", *f.Tier)
		if err := r.ofNodes(ctx, &c, fresh, narrow); err != nil {
			return nil, err
		}
		q, args := query(c)
		return list(ctx, r, q, args, readVM)
	}
	stale := conditions{slices.Clone(c.where), slices.Clone(c.args)}
	c.add("v.tier = ?", appraise.None)
	stale.add("v.tier <> ?", appraise.None)
	if err := r.ofNodes(ctx, &stale, "NOT "+fresh, narrow); err != nil {
		return nil, err
	}
	q1, args1 := query(c)
	q2, args2 := query(stale)
	return list(ctx, r, "SELECT * FROM ("+q1+") a UNION ALL SELECT * FROM ("+q2+") b ORDER BY 1, 2 LIMIT ?", slices.Concat(args1, args2, []any{p.limit() + 1}), readVM)
}

// few is how many nodes are so few that their VMs are looked up by them.
const few = 200

// ofNodes wants VMs of nodes for which cond holds; its parameter is the time. Where
// these are few among very many, a look at all VMs in their order would find a page
// of theirs late: they are named.
func (r reads) ofNodes(ctx context.Context, c *conditions, cond string, narrow bool) error {
	c.add(cond, r.now())
	if !narrow {
		return nil
	}
	ids, err := list(ctx, r, "SELECT n.id"+fromNodes+" WHERE "+cond+" LIMIT ?", []any{r.now(), few + 1}, func(scan func(...any) error, v *string) error { return scan(v) })
	if err == nil && len(ids) <= few {
		c.add("v.node IN "+r.d.inJSON, jsonStrings(ids))
	}
	return err
}

// VMsByEK gives the VMs, of any node that is not revoked, whose EK digest is one
// of these: two UUIDs with one EK share a vTPM. By EK, UUID, node; at most 1000.
func (r reads) VMsByEK(ctx context.Context, digests ...string) ([]fleet.VM, error) {
	// An empty digest is that of a VM whose EK is not known.
	all, err := list(ctx, r, "SELECT "+vmColumns+fromVMs+" WHERE n.state <> 'revoked' AND v.ek_digest <> '' AND v.ek_digest IN "+r.d.inJSON+
		" ORDER BY v.ek_digest, v.uuid, v.node LIMIT 1000", []any{r.now(), jsonStrings(digests)}, readVM)
	if err != nil {
		return nil, fmt.Errorf("VMs by EK: %w", err)
	}
	return all, nil
}

// VMKey is a VM with its EK's digest, as its node says; "" where that is not known.
type VMKey struct{ UUID, EK string }

// Others gives the VMs, of any node that is not revoked, that have the EK of one of
// these, but for the VMs themselves, as this node has them; and those with the UUID of
// one of these that other nodes have. At most 1000, and normally nothing.
func (r reads) Others(ctx context.Context, node string, vms []VMKey) ([]fleet.VM, error) {
	var digests, own, uuids []string
	for _, v := range vms {
		uuids = append(uuids, v.UUID)
		if v.EK != "" {
			digests, own = append(digests, v.EK), append(own, v.EK+"/"+v.UUID)
		}
	}
	const these = "SELECT " + vmColumns + fromVMs + " WHERE n.state <> 'revoked' AND "
	all, err := list(ctx, r, these+"v.ek_digest <> '' AND v.ek_digest IN "+r.d.inJSON+" AND NOT (v.node = ? AND v.ek_digest || '/' || v.uuid IN "+r.d.inJSON+
		") UNION "+these+"v.node <> ? AND v.uuid IN "+r.d.inJSON+" ORDER BY 1, 2 LIMIT 1000",
		[]any{r.now(), jsonStrings(digests), node, jsonStrings(own), r.now(), node, jsonStrings(uuids)}, readVM)
	if err != nil {
		return nil, fmt.Errorf("VMs of other nodes: %w", err)
	}
	return all, nil
}

// LeftVMs gives the VMs with these UUIDs that another node was the last to have, as
// they were there, and Changed as the time since when it has them no more. Only VMs of
// which there are, or were, Reference Values are remembered so.
func (r reads) LeftVMs(ctx context.Context, node string, uuids []string) ([]fleet.VM, error) {
	all, err := list(ctx, r, "SELECT l.uuid, l.node, n.name, l.ek_digest, l.gone FROM vm_left l JOIN nodes n ON n.id = l.node WHERE l.node <> ? AND l.uuid IN "+r.d.inJSON,
		[]any{node, jsonStrings(uuids)}, func(scan func(...any) error, v *fleet.VM) error {
			return scan(&v.UUID, &v.Node, &v.NodeName, &v.EKDigest, at{&v.Changed})
		})
	if err != nil {
		return nil, fmt.Errorf("VMs that left: %w", err)
	}
	return all, nil
}

// SharedEKs gives the EK digests that more than one UUID has, on nodes that are
// not revoked; at most 1000.
func (r reads) SharedEKs(ctx context.Context) ([]string, error) {
	all, err := list(ctx, r, `SELECT v.ek_digest FROM vms v JOIN nodes n ON n.id = v.node WHERE n.state <> 'revoked' AND v.ek_digest <> ''
 GROUP BY v.ek_digest HAVING count(DISTINCT v.uuid) > 1 ORDER BY 1 LIMIT 1000`, nil, func(scan func(...any) error, v *string) error { return scan(v) })
	if err != nil {
		return nil, fmt.Errorf("shared EKs: %w", err)
	}
	return all, nil
}

func jsonStrings(all []string) string {
	clean := make([]string, len(all))
	for i, s := range all {
		clean[i] = fleet.CleanText(s)
	}
	return string(toJSON(clean))
}

// Expired is a node whose result expired before another came.
type Expired struct {
	Node, Name string
	Tier       appraise.Tier // what it was
	Expires    time.Time
}

// TakeExpired gives active nodes whose results have expired and of which that was
// not given before: each expiry exactly once among all replicas, if the
// transaction commits.
func (tx *Tx) TakeExpired(ctx context.Context, limit int) ([]Expired, error) {
	all, err := list(ctx, tx.reads, `UPDATE node_state SET noticed = 1 WHERE node IN (SELECT s.node FROM node_state s WHERE s.round > 0 AND s.noticed = 0
 AND s.expires <= ? AND EXISTS (SELECT 1 FROM nodes n WHERE n.id = s.node AND n.state = 'active') ORDER BY s.node LIMIT ?`+tx.d.skipLocked+`)
 RETURNING node, (SELECT name FROM nodes WHERE id = node), tier, expires`, []any{tx.now(), limit}, func(scan func(...any) error, v *Expired) error {
		return scan(&v.Node, &v.Name, &v.Tier, at{&v.Expires})
	})
	if err != nil {
		return nil, fmt.Errorf("results that expired: %w", err)
	}
	return all, nil
}
