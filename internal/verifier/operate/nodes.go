package operate

import (
	"context"
	"fmt"

	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

// Approve lets a pending node in. ErrNotFound; ErrConflict where it is not
// pending; ErrSamePerson.
func (s *Service) Approve(ctx context.Context, a Actor, node string) (n fleet.Node, err error) {
	err = s.do(ctx, a, Operator, func(tx *store.Tx) error {
		if n, err = tx.Node(ctx, node); err != nil {
			return err
		}
		if n.State != fleet.Pending {
			return fmt.Errorf("%w: the node is %s, not pending", ErrConflict, n.State)
		}
		if s.FourEyes {
			giver, err := tokenGiver(ctx, tx, n.ID)
			if err != nil {
				return err
			}
			if fleet.SamePerson(giver, a.Name) {
				return fmt.Errorf("%w: the node came with a join token of %s", ErrSamePerson, giver)
			}
		}
		n.State, n.ApprovedBy, n.Problem = fleet.Active, a.Name, ""
		if n.EKTrust != "manufacturer" {
			n.EKTrust = "admin " + a.Name
		}
		if n.Version, err = tx.UpdateNode(ctx, n); err != nil {
			return err
		}
		return s.audit(tx, a, "node.approve", n.ID, detail{"name": n.Name, "ek": n.EKDigest, "ek_trust": n.EKTrust})
	})
	return n, err
}

// tokenGiver says who gave out the join token that a node came with; "" where
// that is not known any more.
func tokenGiver(ctx context.Context, tx *store.Tx, node string) (string, error) {
	for page := (store.Page{Limit: 1000}); ; {
		tokens, next, err := tx.Tokens(ctx, page)
		if err != nil {
			return "", err
		}
		for _, t := range tokens {
			if t.UsedBy == node {
				return t.By, nil
			}
		}
		if page.After = next; next == "" {
			return "", nil
		}
	}
}

// Reject turns a pending node away, Revoke ends an active one, for ever: it can
// be enrolled anew, with a new ID. ErrNotFound; ErrConflict where the node is not
// in that state.
func (s *Service) Reject(ctx context.Context, a Actor, node, why string) (fleet.Node, error) {
	return s.end(ctx, a, node, fleet.Pending, "node.reject", why)
}

// Revoke is Reject for a node that is active.
func (s *Service) Revoke(ctx context.Context, a Actor, node, why string) (fleet.Node, error) {
	return s.end(ctx, a, node, fleet.Active, "node.revoke", why)
}

func (s *Service) end(ctx context.Context, a Actor, node string, from fleet.NodeState, action, why string) (n fleet.Node, err error) {
	err = s.do(ctx, a, Operator, func(tx *store.Tx) error {
		if err := checkText(why); err != nil {
			return err
		}
		if n, err = tx.Node(ctx, node); err != nil {
			return err
		}
		if n.State != from {
			return fmt.Errorf("%w: the node is %s, not %s", ErrConflict, n.State, from)
		}
		n.State, n.RevokedWhy = fleet.Revoked, why
		if n.Version, err = tx.UpdateNode(ctx, n); err != nil {
			return err
		}
		return s.audit(tx, a, action, n.ID, detail{"name": n.Name, "why": why})
	})
	return n, err
}

// Learn says whether what a node, or a VM of its, shows for the first time is
// learned from now on. ErrNotFound; ErrConflict where nothing is learned of any node,
// or it is so already.
func (s *Service) Learn(ctx context.Context, a Actor, node string, on bool) (n fleet.Node, err error) {
	err = s.do(ctx, a, Operator, func(tx *store.Tx) error {
		if on && !s.Learning {
			return fmt.Errorf("%w: nothing is learned here, by policy.reference_values or policy.four_eyes: approve a round of the node instead", ErrConflict)
		}
		if n, err = tx.Node(ctx, node); err != nil {
			return err
		}
		if n.State == fleet.Revoked || n.Learns == on {
			return fmt.Errorf("%w: the node is %s, and %s", ErrConflict, n.State, map[bool]string{true: "learned", false: "not learned"}[n.Learns])
		}
		n.Learns = on
		if n.Version, err = tx.UpdateNode(ctx, n); err != nil {
			return err
		}
		return s.audit(tx, a, "node.learn", n.ID, detail{"name": n.Name, "on": on})
	})
	return n, err
}

// Dismiss says that a node's problem has been looked at. ErrNotFound;
// ErrConflict where it has none.
func (s *Service) Dismiss(ctx context.Context, a Actor, node string) (n fleet.Node, err error) {
	err = s.do(ctx, a, Operator, func(tx *store.Tx) error {
		if n, err = tx.Node(ctx, node); err != nil {
			return err
		}
		if n.Problem == "" {
			return fmt.Errorf("%w: the node has no problem", ErrConflict)
		}
		problem := n.Problem
		n.Problem = ""
		if err := tx.SetProblem(ctx, n.ID, ""); err != nil {
			return err
		}
		return s.audit(tx, a, "node.dismiss", n.ID, detail{"name": n.Name, "problem": problem})
	})
	return n, err
}
