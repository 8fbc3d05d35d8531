package store

import (
	"context"
	"errors"
	"fmt"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
)

const nodeColumns = `n.id, n.version, n.name, n.state, n.ek_digest, n.ek_certificate, n.ek_trust, n.ak_name, n.ak, n.bind_name, n.bind,
 n.certifier, n.serial, n.enrolled, n.problem, n.approved_by, n.revoked_why, n.agent_address,
 n.learns, n.certified, n.revoked_at, s.received`

const fromNodes = ` FROM nodes n JOIN node_state s ON s.node = n.id`

// tierNow is what a node's newest result says now; its parameter is the time. No
// query gives a tier by another way.
const tierNow = `CASE WHEN n.state = 'active' AND s.expires > ? THEN s.tier ELSE 0 END`

// fresh says that a node's newest result counts; its parameter is the time. Where
// it does tierNow is s.tier, else None: databases know how many such rows there
// are, and do not of tierNow.
const fresh = "(n.state = 'active' AND s.expires > ?)"

func nodeFields(n *fleet.Node) []any {
	return []any{&n.ID, &n.Version, &n.Name, &n.State, &n.EKDigest, &n.EKCertificate, &n.EKTrust, &n.AKName, &n.AK, &n.BindName, &n.Bind,
		&n.Certifier, &n.Serial, at{&n.Enrolled}, &n.Problem, &n.ApprovedBy, &n.RevokedWhy, &n.AgentAddress,
		&n.Learns, at{&n.Certified}, at{&n.RevokedAt}, at{&n.Seen}}
}

func (r reads) node(ctx context.Context, where string, args ...any) (fleet.Node, error) {
	var n fleet.Node
	err := r.one(ctx, "SELECT "+nodeColumns+fromNodes+" WHERE "+where, args, nodeFields(&n)...)
	if err != nil {
		return fleet.Node{}, fmt.Errorf("node: %w", err)
	}
	return n, nil
}

// Node gives the node with this ID; ErrNotFound.
func (r reads) Node(ctx context.Context, id string) (fleet.Node, error) {
	return r.node(ctx, "n.id = ?", id)
}

// NodeByName gives the node that is not revoked with this name; ErrNotFound.
func (r reads) NodeByName(ctx context.Context, name string) (fleet.Node, error) {
	return r.node(ctx, "n.name = ? AND n.state <> 'revoked'", name)
}

// NodeByEK gives the node that is not revoked with this EK digest; ErrNotFound.
func (r reads) NodeByEK(ctx context.Context, digest string) (fleet.Node, error) {
	return r.node(ctx, "n.ek_digest = ? AND n.state <> 'revoked'", digest)
}

// NodeByAK gives the node that is not revoked with this AK; ErrNotFound.
func (r reads) NodeByAK(ctx context.Context, name []byte) (fleet.Node, error) {
	return r.node(ctx, "n.ak_name = ? AND n.state <> 'revoked'", name)
}

// NodeFilter chooses nodes; zero fields choose all.
type NodeFilter struct {
	State   fleet.NodeState
	Tier    *appraise.Tier // what the newest result says now
	Search  string         // part of the name, or the whole ID
	Problem bool           // only those with a problem
}

func (r reads) statuses(ctx context.Context, c conditions, limit int) ([]fleet.Status, error) {
	q := "SELECT " + nodeColumns + ", " + tierNow + `, s.round, s.expires, r.codes, s.vm_none, s.vm_affirming, s.vm_warning, s.vm_contra,
 CASE WHEN n.state = 'active' AND s.expires > ? THEN 1 ELSE 0 END` + fromNodes + " LEFT JOIN rounds r ON r.id = s.round" + c.String() + " ORDER BY n.name, n.id LIMIT ?"
	args := append([]any{r.now(), r.now()}, c.args...)
	return list(ctx, r, q, append(args, limit), func(scan func(...any) error, v *fleet.Status) error {
		var none, affirming, warning, contra int
		var counts bool
		err := scan(append(nodeFields(&v.Node), &v.Tier, &v.Round, at{&v.Expires}, asJSON{&v.Codes}, &none, &affirming, &warning, &contra, &counts)...)
		v.Received = v.Seen
		v.VMs = tiers(counts, none, affirming, warning, contra)
		return err
	})
}

// tiers counts VMs; all are None where the result does not count any more.
func tiers(counts bool, none, affirming, warning, contra int) map[appraise.Tier]int {
	m := map[appraise.Tier]int{}
	if !counts {
		none, affirming, warning, contra = none+affirming+warning+contra, 0, 0, 0
	}
	for t, n := range map[appraise.Tier]int{appraise.None: none, appraise.Affirming: affirming, appraise.Warning: warning, appraise.Contraindicated: contra} {
		if n > 0 {
			m[t] = n
		}
	}
	return m
}

// Nodes gives nodes by name, with what their newest results say now, and where
// the next page begins ("" at the end).
func (r reads) Nodes(ctx context.Context, f NodeFilter, p Page) ([]fleet.Status, string, error) {
	var c conditions
	after, err := p.after(2)
	if err != nil {
		return nil, "", err
	}
	if after != nil {
		c.add("(n.name, n.id) > (?, ?)", after[0], after[1])
	}
	switch f.State {
	case "":
	case fleet.Pending: // of which there is an index
		c.add("n.state = 'pending'")
	default:
		c.add("n.state = ?", f.State)
	}
	if f.Tier != nil {
		if *f.Tier == appraise.None {
			c.add("(s.tier = 0 OR NOT "+fresh+")", r.now())
		} else {
			c.add(fresh+" AND s.tier = ?", r.now(), *f.Tier)
		}
	}
	if f.Search != "" {
		c.contains(r.d, "n.name", "n.id", f.Search)
	}
	if f.Problem {
		c.add("n.problem <> ''")
	}
	all, err := r.statuses(ctx, c, p.limit()+1)
	if err != nil {
		return nil, "", fmt.Errorf("nodes: %w", err)
	}
	all, next := paged(all, p, func(s fleet.Status) string { return cursor(s.Name, s.ID) })
	return all, next, nil
}

// Status gives one node as Nodes does; ErrNotFound.
func (r reads) Status(ctx context.Context, id string) (fleet.Status, error) {
	var c conditions
	c.add("n.id = ?", id)
	all, err := r.statuses(ctx, c, 1)
	if err == nil && len(all) == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return fleet.Status{}, fmt.Errorf("node: %w", err)
	}
	return all[0], nil
}

// Summary counts the fleet.
func (r reads) Summary(ctx context.Context) (fleet.Summary, error) {
	v := fleet.Summary{Nodes: map[fleet.NodeState]int{}, ByTier: map[appraise.Tier]int{}, VMs: map[appraise.Tier]int{}}
	q := "SELECT n.state, " + tierNow + `, CASE WHEN s.expires > ? THEN 1 ELSE 0 END, count(*), sum(CASE WHEN n.problem <> '' THEN 1 ELSE 0 END),
 sum(s.vm_none), sum(s.vm_affirming), sum(s.vm_warning), sum(s.vm_contra)` + fromNodes + " GROUP BY 1, 2, 3"
	now := r.now()
	err := r.each(ctx, q, []any{now, now}, func(scan func(...any) error) error {
		var state fleet.NodeState
		var tier appraise.Tier
		var counts bool
		var n, problems, none, affirming, warning, contra int
		if err := scan(&state, &tier, &counts, &n, &problems, &none, &affirming, &warning, &contra); err != nil {
			return err
		}
		v.Nodes[state] += n
		v.Problems += problems
		if state == fleet.Active {
			v.ByTier[tier] += n
			for t, n := range tiers(counts, none, affirming, warning, contra) {
				v.VMs[t] += n
			}
		}
		return nil
	})
	if err != nil {
		return fleet.Summary{}, fmt.Errorf("counting the fleet: %w", err)
	}
	return v, nil
}

// Waiting counts what waits for someone: nodes that are pending, and Reference
// Values that are proposed; of each at most 100.
func (r reads) Waiting(ctx context.Context) (nodes, values int, err error) {
	err = r.one(ctx, `SELECT (SELECT count(*) FROM (SELECT 1 FROM nodes WHERE state = 'pending' LIMIT 100) n),
 (SELECT count(*) FROM (SELECT 1 FROM reference_values WHERE state = 'proposed' LIMIT 100) v)`, nil, &nodes, &values)
	if err != nil {
		return 0, 0, fmt.Errorf("counting what waits: %w", err)
	}
	return nodes, values, nil
}

// Bounds of what is kept of a node, in bytes.
const (
	maxName = 255
	maxText = 4096
	maxKey  = 16 << 10
)

func checkNode(n fleet.Node) error {
	if n.ID == "" || n.Name == "" || n.EKDigest == "" || len(n.AKName) == 0 {
		return fmt.Errorf("%w: a node has an ID, a name, an EK and an AK", ErrInvalid)
	}
	for _, k := range [][]byte{n.EKCertificate, n.AKName, n.AK, n.BindName, n.Bind, n.Certifier} {
		if len(k) > maxKey {
			return fmt.Errorf("%w: key or certificate of %d bytes", ErrInvalid, len(k))
		}
	}
	return errors.Join(bounded(maxName, n.ID, n.Name, n.EKDigest, n.Serial), bounded(maxText, n.EKTrust, n.Problem, n.ApprovedBy, n.RevokedWhy, n.AgentAddress))
}

// PutNode adds a node. *ConflictError where its name, EK or AK is that of another
// that is not revoked, or its ID is taken.
func (tx *Tx) PutNode(ctx context.Context, n fleet.Node) error {
	if err := checkNode(n); err != nil {
		return err
	}
	added, err := tx.exec(ctx, `INSERT INTO nodes (id, version, name, state, ek_digest, ek_certificate, ek_trust, ak_name, ak, bind_name, bind,
 certifier, serial, enrolled, problem, approved_by, revoked_why, agent_address, learns, certified)
 VALUES (?, 1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING`,
		n.ID, n.Name, n.State, n.EKDigest, n.EKCertificate, n.EKTrust, n.AKName, n.AK, n.BindName, n.Bind,
		n.Certifier, n.Serial, n.Enrolled, n.Problem, n.ApprovedBy, n.RevokedWhy, n.AgentAddress, n.Learns, n.Certified)
	if err == nil && added == 0 {
		err = tx.conflict(ctx, n, true)
	}
	if err == nil {
		_, err = tx.exec(ctx, `INSERT INTO node_state (node, version, nonce_expires, round, received, expires, count, tier,
 vm_none, vm_affirming, vm_warning, vm_contra, noticed) VALUES (?, 0, 0, 0, ?, 0, 0, 0, 0, 0, 0, 0, 0)`, n.ID, n.Seen)
	}
	if err != nil {
		return fmt.Errorf("adding node %q: %w", n.Name, err)
	}
	return nil
}

// conflict says whose what is.
func (r reads) conflict(ctx context.Context, n fleet.Node, added bool) error {
	for _, by := range []struct {
		field, where string
		arg          any
	}{
		{"ek", "n.ek_digest = ? AND n.state <> 'revoked'", n.EKDigest},
		{"ak", "n.ak_name = ? AND n.state <> 'revoked'", n.AKName},
		{"name", "n.name = ? AND n.state <> 'revoked'", n.Name},
		{"id", "n.id = ?", n.ID},
	} {
		other, err := r.node(ctx, by.where, by.arg)
		if errors.Is(err, ErrNotFound) || err == nil && other.ID == n.ID && !added {
			continue
		} else if err != nil {
			return err
		}
		return &ConflictError{Field: by.field, Node: other.ID}
	}
	return errAgain // whoever had it is gone meanwhile
}

// UpdateNode writes all of the node but its EK, AK, bind key, certifier, Enrolled,
// Seen and RevokedAt, which never change this way. n.Version is that of the node as it was
// read: ErrVersion where it changed meanwhile, ErrNotFound, *ConflictError. A node
// that was revoked stays so: ErrInactive. It gives the new version.
func (tx *Tx) UpdateNode(ctx context.Context, n fleet.Node) (int64, error) {
	if err := checkNode(n); err != nil {
		return 0, err
	}
	version, err := tx.updateNode(ctx, n)
	if err != nil {
		return 0, fmt.Errorf("changing node %q: %w", n.Name, err)
	}
	return version, nil
}

func (tx *Tx) updateNode(ctx context.Context, n fleet.Node) (int64, error) {
	old, err := tx.Node(ctx, n.ID)
	switch {
	case err != nil:
		return 0, err
	case old.Version != n.Version:
		return 0, ErrVersion
	case old.State == fleet.Revoked && n.State != fleet.Revoked:
		return 0, ErrInactive
	}
	if old.Name != n.Name {
		// Asked before, for the sake of the answer; the index decides.
		if err := tx.conflict(ctx, n, false); !errors.Is(err, errAgain) {
			return 0, err
		}
	}
	revoked := old.RevokedAt
	if n.State == fleet.Revoked && old.State != fleet.Revoked {
		revoked = tx.now()
	}
	done, err := tx.exec(ctx, `UPDATE nodes SET version = version + 1, name = ?, state = ?, ek_certificate = ?, ek_trust = ?, serial = ?, problem = ?,
 approved_by = ?, revoked_why = ?, agent_address = ?, learns = ?, certified = ?, revoked_at = ? WHERE id = ? AND version = ?`,
		n.Name, n.State, n.EKCertificate, n.EKTrust, n.Serial, n.Problem, n.ApprovedBy, n.RevokedWhy, n.AgentAddress,
		n.Learns, n.Certified, revoked, n.ID, n.Version)
	switch {
	case errors.Is(err, ErrConflict):
		return 0, errAgain // two took one name at one moment: the next try says whose it is
	case err != nil:
		return 0, err
	case done == 0:
		return 0, ErrVersion
	}
	if n.State != fleet.Active {
		if _, err := tx.exec(ctx, "UPDATE node_state SET nonce = NULL WHERE node = ?", n.ID); err != nil {
			return 0, err
		}
	}
	return n.Version + 1, nil
}

// SetProblem notes what an operator should look at, whatever the node's version;
// "" for nothing any more. ErrNotFound.
func (tx *Tx) SetProblem(ctx context.Context, node, problem string) error {
	if err := bounded(maxText, problem); err != nil {
		return err
	}
	n, err := tx.exec(ctx, "UPDATE nodes SET version = version + 1, problem = ? WHERE id = ?", problem, node)
	if err == nil && n == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("noting a problem of node %s: %w", node, err)
	}
	return nil
}
