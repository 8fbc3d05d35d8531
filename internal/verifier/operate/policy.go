package operate

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"

	"virt-trust/internal/appraise"
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

// place is where a policy is set: what counts, or what is proposed.
func (s *Service) place() string {
	if s.FourEyes {
		return ProposedSetting
	}
	return PolicySetting
}

func parsePolicy(document []byte) (*appraise.Policy, error) {
	p, err := appraise.ParsePolicy(document)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return p, nil
}

// PolicyNow gives the policy that counts, version 0 where none was set, and the
// version that SetPolicy wants to be told next.
func (s *Service) PolicyNow(ctx context.Context, a Actor) (now fleet.Setting, next int64, err error) {
	if err := a.need(Reader); err != nil {
		return now, 0, err
	}
	newest, err := s.Store.Setting(ctx, s.place())
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return now, 0, told(err)
	}
	now, err = s.version(ctx, 0)
	return now, newest.Version + 1, err
}

// version gives a version of the policy; the newest, or that which counts where
// none was set, for 0.
func (s *Service) version(ctx context.Context, version int64) (fleet.Setting, error) {
	if version > 0 {
		v, err := s.Store.SettingVersion(ctx, PolicySetting, version)
		return v, told(err)
	}
	v, err := s.Store.Setting(ctx, PolicySetting)
	if errors.Is(err, store.ErrNotFound) {
		return s.unset(), nil
	}
	return v, told(err)
}

func (s *Service) unset() fleet.Setting { return fleet.Setting{Name: PolicySetting, Data: s.Unset} }

// PolicyVersion gives one version that counted, 0 for what counts where none was
// set; ErrNotFound.
func (s *Service) PolicyVersion(ctx context.Context, a Actor, version int64) (fleet.Setting, error) {
	if err := a.need(Reader); err != nil {
		return fleet.Setting{}, err
	}
	if version == 0 {
		return s.unset(), nil
	}
	return s.version(ctx, version)
}

// PolicyVersion is one in the history of the policy.
type PolicyVersion struct {
	fleet.Setting
	// Changes are from the version before; Unread says that one of the two is none
	// that this program can read.
	Changes []appraise.PolicyChange
	Unread  bool
}

// PolicyVersions gives the versions that counted, newest first.
func (s *Service) PolicyVersions(ctx context.Context, a Actor, p store.Page) ([]PolicyVersion, string, error) {
	if err := a.need(Reader); err != nil {
		return nil, "", err
	}
	all, next, err := s.Store.SettingVersions(ctx, PolicySetting, p)
	if err != nil || len(all) == 0 {
		return nil, "", told(err)
	}
	before := s.unset()
	if last := all[len(all)-1].Version; last > 1 {
		if before, err = s.version(ctx, last-1); err != nil {
			return nil, "", err
		}
	}
	out := make([]PolicyVersion, len(all))
	for i, v := range all {
		was := before
		if i+1 < len(all) {
			was = all[i+1]
		}
		changes, err := changes(was.Data, v.Data)
		out[i] = PolicyVersion{v, changes, err != nil}
	}
	return out, next, nil
}

func changes(before, after []byte) ([]appraise.PolicyChange, error) {
	was, err := parsePolicy(before)
	if err != nil {
		return nil, err
	}
	is, err := parsePolicy(after)
	if err != nil {
		return nil, err
	}
	return appraise.PolicyChanges(was, is), nil
}

// CheckPolicy says how a document differs from the policy that counts, and what
// SetPolicy wants to be told as version. ErrInvalid where it is no policy.
func (s *Service) CheckPolicy(ctx context.Context, a Actor, document []byte) (changed []appraise.PolicyChange, next int64, err error) {
	now, next, err := s.PolicyNow(ctx, a)
	if err != nil {
		return nil, 0, err
	}
	is, err := parsePolicy(document)
	if err != nil {
		return nil, 0, err
	}
	was, err := appraise.ParsePolicy(now.Data)
	if err != nil { // of another version of this program: anything mends it
		was = appraise.DefaultPolicy()
	}
	return appraise.PolicyChanges(was, is), next, nil
}

// SetPolicy makes a document the appraisal policy, or proposes it where four
// eyes are wanted. version is one more than that of the newest in that place, so
// that two people do not overwrite each other: ErrConflict. White space is not
// kept.
func (s *Service) SetPolicy(ctx context.Context, a Actor, document []byte, version int64) (set fleet.Setting, err error) {
	name := s.place()
	err = s.do(ctx, a, Policy, func(tx *store.Tx) error {
		if _, err := parsePolicy(document); err != nil {
			return err
		}
		var compact bytes.Buffer
		if err := json.Compact(&compact, document); err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		document := compact.Bytes()
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
		if _, err := parsePolicy(p.Data); err != nil {
			return err
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
