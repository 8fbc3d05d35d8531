package hosttpm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"virt-trust/internal/hosttpm/policy"
	"virt-trust/internal/platform/secret"
)

// maxApproved states are enough for every kernel that a host keeps, and leave
// room below maxPolicies for the same ones signed for the next epoch.
const maxApproved = 100

// ErrTooMany is for an approval that would be one too many.
var ErrTooMany = fmt.Errorf("%d host states are approved already", maxApproved)

// PCRs reads the PCRs that Config names, as they are now.
func (h *Host) PCRs(ctx context.Context) (policy.State, error) {
	return do(ctx, h, func(c *client) (policy.State, error) { return c.readPCRs(h.cfg.Bank, h.cfg.PCRs) })
}

// Approve adds states to the approved ones. The policy key is itself bound to
// them: the host must be in one that is approved already.
func (h *Host) Approve(ctx context.Context, note string, states ...policy.State) error {
	return h.withPolicyKey(ctx, func(c *client, k *keySet, key *ecdsa.PrivateKey) error {
		return c.approve(k, key, note, states...)
	})
}

// ApproveWith is Approve with the policy key's private half from elsewhere, 32
// bytes, which stay the caller's: the host need not be in an approved state.
func (h *Host) ApproveWith(ctx context.Context, policyKey []byte, note string, states ...policy.State) error {
	k, err := h.set()
	if err != nil {
		return err
	}
	key, err := parsePolicyKey(k, policyKey)
	if err != nil {
		return err
	}
	_, err = do(ctx, h, func(c *client) (struct{}, error) {
		return struct{}{}, c.approve(h.keys.Load(), key, note, states...)
	})
	return err
}

// withPolicyKey unseals the policy key for the length of use, which runs in the
// TPM's goroutine, and again where the connection broke under it.
func (h *Host) withPolicyKey(ctx context.Context, use func(*client, *keySet, *ecdsa.PrivateKey) error) error {
	if _, err := h.set(); err != nil {
		return err
	}
	_, err := do(ctx, h, func(c *client) (struct{}, error) {
		k := h.keys.Load()
		scalar, err := c.unseal(k, k.policyKey)
		if err != nil {
			return struct{}{}, err
		}
		defer secret.Wipe(scalar)
		key, err := parsePolicyKey(k, scalar)
		if err != nil {
			return struct{}{}, err
		}
		return struct{}{}, use(c, k, key)
	})
	return err
}

func parsePolicyKey(k *keySet, scalar []byte) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), scalar)
	if err != nil || !key.PublicKey.Equal(k.policyPublic) {
		return nil, fmt.Errorf("%w: the policy key is not the one of the policy", ErrFailed)
	}
	return key, nil
}

// approve signs states for the present epoch and takes them into the key set.
func (c *client) approve(k *keySet, key *ecdsa.PrivateKey, note string, states ...policy.State) error {
	epoch, err := c.readEpoch(k)
	if err != nil {
		return err
	}
	now := time.Now()
	kept := slices.Clone(k.policies)
	var made []*policy.Approved
	for _, s := range states {
		a, err := approve(key, s, epoch, k.epochName, now, note)
		if err != nil {
			return err
		}
		same := func(o *policy.Approved) bool { return bytes.Equal(o.Policy, a.Policy) }
		kept, made = slices.DeleteFunc(kept, same), append(slices.DeleteFunc(made, same), a)
	}
	live := len(made)
	for _, a := range kept {
		if a.Epoch == epoch {
			live++
		}
	}
	if live > maxApproved {
		return ErrTooMany
	}
	for _, a := range made {
		if err := c.host.store.addPolicy(a); err != nil {
			return fmt.Errorf("%w: saving an approved policy: %w", ErrFailed, err)
		}
	}
	c.host.setPolicies(k, append(made, kept...))
	return nil
}

// setPolicies replaces the approved policies of the key set that is used.
func (h *Host) setPolicies(k *keySet, all []*policy.Approved) {
	n := *k
	n.policies = all
	h.keys.Store(&n)
}

// approve signs a state with the policy key.
func approve(key *ecdsa.PrivateKey, s policy.State, epoch uint64, epochName []byte, now time.Time, note string) (*policy.Approved, error) {
	digest, err := policy.Digest(s, epoch, epochName)
	if err != nil {
		return nil, err
	}
	sig, err := signPolicy(key, digest)
	if err != nil {
		return nil, err
	}
	return &policy.Approved{
		State: s, Epoch: epoch, EpochName: epochName, Policy: digest, Signature: sig,
		Time: now.UTC().Truncate(time.Second), Note: note,
	}, nil
}

func signPolicy(key *ecdsa.PrivateKey, digest []byte) ([]byte, error) {
	h := policy.AuthorizedHash(digest)
	return ecdsa.SignASN1(rand.Reader, key, h[:])
}

// States is what is approved, and how the host stands to it.
type States struct {
	Now      policy.State       // the PCRs that Config names or that an approved state looks at
	Approved []*policy.Approved // those that hold, newest first
	Match    *policy.Approved   // the one that the host is in, or nil
	Nearest  *policy.Approved   // where Match is nil: one that differs in the fewest PCRs, or nil
}

// States asks the TPM.
func (h *Host) States(ctx context.Context) (*States, error) {
	if _, err := h.set(); err != nil {
		return nil, err
	}
	return do(ctx, h, func(c *client) (*States, error) {
		k := h.keys.Load()
		epoch, err := c.readEpoch(k)
		if err != nil {
			return nil, err
		}
		s := &States{}
		indexes := slices.Clone(h.cfg.PCRs)
		for _, a := range k.policies {
			if a.Epoch == epoch && bytes.Equal(a.EpochName, k.epochName) {
				s.Approved = append(s.Approved, a)
				if a.Bank == h.cfg.Bank {
					indexes = append(indexes, a.Indexes()...)
				}
			}
		}
		slices.Sort(indexes)
		if s.Now, err = c.readPCRs(h.cfg.Bank, slices.Compact(indexes)); err != nil {
			return nil, err
		}
		if s.Match, err = c.match(k); err != nil && !errors.Is(err, ErrPolicy) {
			return nil, err
		}
		for _, a := range s.Approved {
			if s.Match == nil && (s.Nearest == nil || len(a.Differing(s.Now)) < len(s.Nearest.Differing(s.Now))) {
				s.Nearest = a
			}
		}
		return s, nil
	})
}
