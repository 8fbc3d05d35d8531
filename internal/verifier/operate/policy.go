package operate

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/webhook"
)

// The settings in the store that hold the appraisal policy, and one that waits
// for a second person.
const (
	PolicySetting   = "policy"
	ProposedSetting = "policy.proposed"
)

// SetPolicy makes a document the appraisal policy, or proposes it where four
// eyes are wanted. version is one more than that of the newest in that place, so
// that two people do not overwrite each other: ErrConflict.
func (s *Service) SetPolicy(ctx context.Context, a Actor, document []byte, version int64) (set fleet.Setting, err error) {
	name := PolicySetting
	if s.FourEyes {
		name = ProposedSetting
	}
	err = s.do(ctx, a, Policy, func(tx *store.Tx) error {
		if err := s.CheckPolicy(document); err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		set = fleet.Setting{Name: name, Version: version, Data: document, By: a.Name, Time: s.Now()}
		if err := tx.PutSetting(ctx, set); err != nil {
			return err
		}
		if err := s.audit(tx, a, "policy.set", name, documented(version, document)); err != nil {
			return err
		}
		if !s.FourEyes {
			return nil
		}
		return webhook.Queue(ctx, tx, webhook.Proposed(webhook.ProposedData{By: a.Name, Count: 1, What: "policy"}, s.Now()))
	})
	return set, err
}

// documented is what the audit log says of a policy: it may be longer than an entry,
// and is kept with all its versions in the store.
func documented(version int64, document []byte) detail {
	return detail{"version": version, "sha256": fmt.Sprintf("%x", sha256.Sum256(document)), "bytes": len(document)}
}

// ProposedPolicy gives the policy that waits for a second person; ErrNotFound.
func (s *Service) ProposedPolicy(ctx context.Context, a Actor) (fleet.Setting, error) {
	if err := a.need(Reader); err != nil {
		return fleet.Setting{}, err
	}
	p, err := s.Store.Setting(ctx, ProposedSetting)
	if err == nil && len(p.Data) == 0 {
		err = store.ErrNotFound
	}
	return p, told(err)
}

// ApprovePolicy makes the proposed policy of this version the one that counts.
// ErrSamePerson, ErrConflict where it is not the newest proposal.
func (s *Service) ApprovePolicy(ctx context.Context, a Actor, version int64) (set fleet.Setting, err error) {
	err = s.settle(ctx, a, version, func(tx *store.Tx, p fleet.Setting) error {
		if fleet.SamePerson(p.By, a.Name) {
			return ErrSamePerson
		}
		if err := s.CheckPolicy(p.Data); err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		now, err := tx.Setting(ctx, PolicySetting)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		set = fleet.Setting{Name: PolicySetting, Version: now.Version + 1, Data: p.Data, By: p.By + ", " + a.Name, Time: s.Now()}
		if err := tx.PutSetting(ctx, set); err != nil {
			return err
		}
		d := documented(set.Version, p.Data)
		d["proposed"], d["by"] = version, p.By
		return s.audit(tx, a, "policy.approve", PolicySetting, d)
	})
	return set, err
}

// RejectPolicy drops the proposed policy of this version.
func (s *Service) RejectPolicy(ctx context.Context, a Actor, version int64) error {
	return s.settle(ctx, a, version, func(tx *store.Tx, p fleet.Setting) error {
		return s.audit(tx, a, "policy.reject", ProposedSetting, detail{"version": version, "by": p.By})
	})
}

// settle ends a proposal: an empty version follows it.
func (s *Service) settle(ctx context.Context, a Actor, version int64, f func(*store.Tx, fleet.Setting) error) error {
	return s.do(ctx, a, Policy, func(tx *store.Tx) error {
		p, err := tx.Setting(ctx, ProposedSetting)
		switch {
		case err != nil:
			return err
		case p.Version != version || len(p.Data) == 0:
			return fmt.Errorf("%w: version %d is not the proposal that waits", ErrConflict, version)
		}
		if err := f(tx, p); err != nil {
			return err
		}
		return tx.PutSetting(ctx, fleet.Setting{Name: ProposedSetting, Version: version + 1, By: a.Name, Time: s.Now()})
	})
}
