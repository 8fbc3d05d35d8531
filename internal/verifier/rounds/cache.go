package rounds

import (
	"context"
	"crypto/ecdsa"
	"slices"
	"sync"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

// node is a node with what is remembered of it between rounds: nothing that the
// store does not have. One request at a time has it.
type node struct {
	fleet.Node
	ak   *ecdsa.PublicKey
	last summary

	subjects []string // of own
	version  int64    // of own, in the store
	own      *appraise.Values
	size     int // of own
}

// summary is what the next round is compared with.
type summary struct {
	version int64                    // store.RoundState.Version of it
	tiers   map[string]appraise.Tier // by "host", or a VM's UUID
	running map[string]bool
	expires time.Time
}

func summarize(r *appraise.Result, version int64) summary {
	s := summary{version: version, tiers: map[string]appraise.Tier{"host": r.Host.Tier}, running: map[string]bool{}, expires: r.Expires}
	for i := range r.VMs {
		v := &r.VMs[i]
		s.tiers[v.UUID] = v.Tier
		if v.Running {
			s.running[v.UUID] = true
		}
	}
	return s
}

// runs reports whether the round before had the VM running.
func (s *summary) runs(vm string) bool { return s.running[vm] }

// same reports whether a result has the tiers of the one before, which has not
// expired meanwhile and is the newest.
func (s *summary) same(r *appraise.Result, state store.RoundState) bool {
	if s.version != state.Version || r.Received.After(s.expires) || len(s.tiers) != len(r.VMs)+1 || s.tiers["host"] != r.Host.Tier {
		return false
	}
	for i := range r.VMs {
		if t, ok := s.tiers[r.VMs[i].UUID]; !ok || t != r.VMs[i].Tier {
			return false
		}
	}
	return true
}

// Bounds of what is remembered, nodes and Reference Values of their own: of a
// fleet that is larger, some are read from the store in each round.
const (
	maxNodes  = 20_000
	maxValues = 1_000_000
)

// nodes is the cache.
type nodes struct {
	mu sync.Mutex
	by map[string]*node
	n  int // Reference Values in by

	fleetVersion int64 // of the values for all
	fleetValues  *appraise.Values
}

// get gives a node and where it stands. What may change is read anew.
func (c *nodes) get(ctx context.Context, s *store.Store, id string) (*node, store.RoundState, error) {
	state, err := s.RoundState(ctx, id)
	if err != nil {
		return nil, state, err
	}
	row, err := s.Node(ctx, id)
	if err != nil {
		return nil, state, err
	}
	c.mu.Lock()
	n := c.drop(id) // it is the caller's until keep
	c.mu.Unlock()
	if n == nil {
		n = &node{}
	}
	if n.ak == nil || !slices.Equal(n.AK, row.AK) {
		if n.ak, err = ca.AKOf(row.AK); err != nil {
			return nil, state, err
		}
	}
	n.Node = row
	if n.last.version != state.Version && state.Round != 0 {
		// Another replica was there, or this one was started anew.
		r, err := s.PreviousResult(ctx, id)
		if err != nil {
			return nil, state, err
		}
		n.last = summarize(r, state.Version)
	}
	return n, state, nil
}

func (c *nodes) keep(n *node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.by == nil {
		c.by = map[string]*node{}
	}
	c.drop(n.ID)
	for id := range c.by { // in no order
		if len(c.by) < maxNodes && c.n+n.size <= maxValues {
			break
		}
		c.drop(id)
	}
	c.by[n.ID] = n
	c.n += n.size
}

func (c *nodes) drop(id string) *node {
	n := c.by[id]
	if n != nil {
		delete(c.by, id)
		c.n -= n.size
	}
	return n
}

// values gives the Reference Values for a node and its VMs, those for all first.
func (c *nodes) values(ctx context.Context, s *store.Store, n *node, vms []string) ([]*appraise.Values, error) {
	common, err := c.common(ctx, s)
	if err != nil {
		return nil, err
	}
	subjects := append([]string{n.ID}, vms...)
	version, err := s.ValuesVersion(ctx, subjects...)
	if err != nil {
		return nil, err
	}
	if n.own == nil || n.version != version || !slices.Equal(n.subjects, subjects) {
		all, err := s.ValuesFor(ctx, subjects...)
		if err != nil {
			return nil, err
		}
		n.own, n.version, n.subjects, n.size = appraise.NewValues(all), version, subjects, len(all)
	}
	return []*appraise.Values{common, n.own}, nil
}

func (c *nodes) common(ctx context.Context, s *store.Store) (*appraise.Values, error) {
	version, err := s.ValuesVersion(ctx, "")
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	if c.fleetValues != nil && c.fleetVersion == version {
		defer c.mu.Unlock()
		return c.fleetValues, nil
	}
	c.mu.Unlock()
	all, err := s.ValuesFor(ctx, "")
	if err != nil {
		return nil, err
	}
	v := appraise.NewValues(all)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fleetVersion, c.fleetValues = version, v
	return v, nil
}
