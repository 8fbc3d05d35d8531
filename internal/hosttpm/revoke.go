package hosttpm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"virt-trust/internal/hosttpm/policy"
)

// What a revocation may be refused for.
var (
	ErrUnknownState = errors.New("no approved state has this ID")
	ErrCurrentState = errors.New("the host is in this state now")
)

// revocationFile says how far the last revocation came. Approvals are revoked
// by raising the epoch counter, after all that stay were signed for the new
// epoch:
//
//  1. "signing" with the new epoch is written: from here on no other revocation
//     signs for that epoch, so that what a crash leaves signed is never of use.
//  2. What stays is signed and written. It does not hold yet.
//  3. "raising" is written. From here on the revocation is carried on after a
//     crash, by Settle, which needs no key for it.
//  4. The counter is raised: what was signed before is dead, wherever copies of
//     it lie; what was signed in step 2 holds.
//  5. The files of dead approvals are removed, and "done" is written.
const revocationFile = "revocation.json"

const (
	signing = "signing"
	raising = "raising"
	done    = "done"
)

// revocation is the file.
type revocation struct {
	Version int    `json:"version"`
	Phase   string `json:"phase"`
	Epoch   uint64 `json:"epoch"` // the highest that was ever signed for by a revocation
}

// Revoke withdraws the approvals of states, named by their IDs or by the
// beginnings of them, and gives what was withdrawn. The policy key is needed to
// sign what stays: the host must be in an approved state. The state that it is in
// is revoked only with force: nothing opens the list any more then until a state
// is approved with the policy key from elsewhere, or another approved state is
// booted. A waiver does not outlive a revocation.
func (h *Host) Revoke(ctx context.Context, force bool, ids ...string) ([]*policy.Approved, error) {
	var revoked []*policy.Approved
	err := h.withPolicyKey(ctx, func(c *client, k *keySet, key *ecdsa.PrivateKey) error {
		if err := c.settleRevocation(k); err != nil { // one that a lost connection cut short
			return err
		}
		k = h.keys.Load()
		epoch, err := c.readEpoch(k)
		if err != nil {
			return err
		}
		var stay, gone []*policy.Approved
		matched := map[string]bool{}
		again := false
		for _, a := range k.policies {
			if a.Epoch != epoch || !bytes.Equal(a.EpochName, k.epochName) {
				continue
			}
			again = again || slices.ContainsFunc(revoked, func(r *policy.Approved) bool { return r.ID() == a.ID() })
			named := false
			for _, id := range ids {
				if len(id) >= minID && strings.HasPrefix(a.ID(), id) {
					named, matched[id] = true, true
				}
			}
			if named {
				gone = append(gone, a)
			} else {
				stay = append(stay, a)
			}
		}
		if revoked != nil && !again {
			return nil // it was done before the connection broke
		}
		for _, id := range ids {
			if !matched[id] {
				return fmt.Errorf("%w: %q", ErrUnknownState, id)
			}
		}
		now, err := c.match(k)
		if err != nil {
			return err
		}
		if slices.Contains(gone, now) && !force {
			return ErrCurrentState
		}
		revoked = gone
		return c.raise(k, key, epoch, stay)
	})
	return revoked, err
}

// minID is how many digits of a state's ID name it.
const minID = 4

// raise carries a revocation out.
func (c *client) raise(k *keySet, key *ecdsa.PrivateKey, epoch uint64, stay []*policy.Approved) error {
	s := c.host.store
	last, err := s.revocation()
	if err != nil {
		return err
	}
	r := revocation{Phase: signing, Epoch: max(epoch, last.Epoch) + 1}
	if err := s.saveRevocation(r); err != nil {
		return err
	}
	all := slices.Clone(k.policies)
	for _, a := range slices.Backward(stay) { // newest first in the end
		n, err := approve(key, a.State, r.Epoch, k.epochName, a.Time, a.Note)
		if err != nil {
			return err
		}
		if err := s.addPolicy(n); err != nil {
			return fmt.Errorf("%w: saving an approved policy: %w", ErrFailed, err)
		}
		all = append([]*policy.Approved{n}, all...)
	}
	c.host.setPolicies(k, all)
	r.Phase = raising
	if err := s.saveRevocation(r); err != nil {
		return err
	}
	return c.settleRevocation(c.host.keys.Load())
}

// settleRevocation brings a revocation that was begun to its end, or undoes
// it.
func (c *client) settleRevocation(k *keySet) error {
	s := c.host.store
	r, err := s.revocation()
	if err != nil || r.Phase == done {
		return err
	}
	epoch, err := c.readEpoch(k)
	if err != nil {
		return err
	}
	if r.Phase == raising {
		for ; epoch < r.Epoch; epoch++ {
			if err := c.increment(counter{k.epochIndex, k.epochName}); err != nil {
				return fmt.Errorf("raising the epoch counter: %w", err)
			}
		}
	}
	c.approved = nil
	var stay []*policy.Approved
	for _, a := range k.policies {
		if a.Epoch == epoch {
			stay = append(stay, a)
		} else if err := s.remove(s.policyPath(a)); err != nil {
			return fmt.Errorf("%w: removing a revoked policy: %w", ErrFailed, err)
		}
	}
	c.host.setPolicies(k, stay)
	if w, err := s.waiver(k); err == nil && w != nil && w.Epoch != epoch {
		if err := s.removeWaiver(); err != nil {
			return err
		}
	}
	r.Phase = done
	return s.saveRevocation(r)
}

// Settled is what Settle found to do.
type Settled struct {
	Revocation bool // one was carried on that something had cut short
	Used       *Used
}

// Settle brings to its end what waited for it: a revocation that was cut
// short, a waiver for this boot. It comes before the list key is asked for.
// Without either it asks the TPM nothing.
func (h *Host) Settle(ctx context.Context) (Settled, error) {
	var none Settled
	k, err := h.set()
	if errors.Is(err, ErrNotProvisioned) {
		return none, nil
	}
	if err != nil {
		return none, err
	}
	r, err := h.store.revocation()
	if err != nil {
		return none, err
	}
	w, err := h.store.waiver(k)
	if err != nil {
		return none, err
	}
	if r.Phase == done && w == nil {
		return none, nil
	}
	return do(ctx, h, func(c *client) (s Settled, err error) {
		if s.Revocation = r.Phase != done; s.Revocation {
			if err := c.settleRevocation(h.keys.Load()); err != nil {
				return s, err
			}
		}
		s.Used, err = c.settleWaiver(h.keys.Load())
		return s, err
	})
}

// revocation reads how far the last one came; where there was none, it is
// done.
func (s store) revocation() (revocation, error) {
	r := revocation{Phase: done}
	b, err := readFile(s.dir, revocationFile)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		d := json.NewDecoder(bytes.NewReader(b))
		d.DisallowUnknownFields()
		err = d.Decode(&r)
	}
	if err == nil && (r.Version != setVersion || !slices.Contains([]string{signing, raising, done}, r.Phase)) {
		err = fmt.Errorf("version %d, phase %q", r.Version, r.Phase)
	}
	if err != nil {
		return r, fmt.Errorf("%w: %s: %w", ErrFailed, filepath.Join(s.dir, revocationFile), err)
	}
	return r, nil
}

func (s store) saveRevocation(r revocation) error {
	r.Version = setVersion
	b, err := json.Marshal(r)
	if err == nil {
		err = s.replace(filepath.Join(s.dir, revocationFile), append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("%w: saving how far a revocation came: %w", ErrFailed, err)
	}
	return nil
}
