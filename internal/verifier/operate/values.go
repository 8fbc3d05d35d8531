package operate

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/webhook"
)

// The sources of Reference Values that people add; "learned" is the Verifier's.
const (
	FromOperator = "operator" // said so, or approved what a round showed
	FromFile     = "file"
	FromManifest = "manifest"
	FromPackage  = "package"
)

// MaxValues bounds what is added at once, MaxDecisions what is decided at once.
const (
	MaxValues    = store.MaxValues
	MaxDecisions = 1000
)

// Added says what came of Reference Values that someone added.
type Added struct {
	Values int              `json:"values"` // how many they were
	New    int              `json:"new"`    // those that were not known
	State  fleet.ValueState `json:"state"`  // approved; proposed where four eyes are wanted
	// Ignored says how much of a CoRIM no Reference Value was made of, by what it is.
	Ignored map[string]int `json:"ignored,omitempty"`
}

// AddValues adds Reference Values; of each, Subject, Kind, Path, Digest and
// Detail are taken.
func (s *Service) AddValues(ctx context.Context, a Actor, values []fleet.Value) (added Added, err error) {
	err = s.do(ctx, a, Policy, func(tx *store.Tx) error {
		added, err = s.add(ctx, tx, a, "value.add", "", FromOperator, values, nil)
		return err
	})
	return added, err
}

func (s *Service) add(ctx context.Context, tx *store.Tx, a Actor, action, what, source string, values []fleet.Value, ignored map[string]int) (Added, error) {
	added := Added{Values: len(values), State: fleet.Approved, Ignored: ignored}
	if len(values) == 0 && len(ignored) > 0 {
		return added, fmt.Errorf("%w: no Reference Value can be made of what is in it: %v", ErrInvalid, ignored)
	}
	if len(values) == 0 || len(values) > MaxValues {
		return added, fmt.Errorf("%w: %d Reference Values, at least 1 and at most %d", ErrInvalid, len(values), MaxValues)
	}
	if s.FourEyes {
		added.State = fleet.Proposed
	}
	subjects, all := map[string]int{}, make([]fleet.Value, len(values))
	for i, v := range values {
		if err := appraise.CheckValue(v); err != nil {
			return added, fmt.Errorf("%w: value %d: %w", ErrInvalid, i+1, err)
		}
		if len(v.Subject) > 100 || len(v.Detail) > maxText {
			return added, fmt.Errorf("%w: value %d: its subject or detail is too long", ErrInvalid, i+1)
		}
		subjects[v.Subject]++
		all[i] = fleet.Value{
			Subject: v.Subject, Kind: v.Kind, Path: v.Path, Digest: v.Digest, Detail: v.Detail,
			Source: source, State: added.State, By: a.Name, Time: s.Now(), FourEyes: s.FourEyes,
		}
	}
	var err error
	if added.New, err = tx.AddValues(ctx, all); err != nil {
		return added, err
	}
	d := detail{"values": added.Values, "new": added.New, "state": added.State, "source": source}
	if len(ignored) > 0 {
		d["ignored"] = ignored
	}
	// What is more, the store alone has: an entry is bounded.
	if len(subjects) <= 200 {
		d["subjects"] = subjects
	}
	if list := spelt(values); len(values) <= 20 && written(list) <= 64<<10 {
		d["list"] = list
	}
	if err := s.audit(tx, a, action, what, d); err != nil {
		return added, err
	}
	if !s.FourEyes || added.New == 0 {
		return added, nil
	}
	return added, webhook.Queue(ctx, tx, webhook.Proposed(webhook.ProposedData{By: a.Name, Subject: values[0].Subject, Count: added.New, What: "values"}, s.Now()))
}

// written is how long something is as JSON.
func written(v any) int {
	b, err := json.Marshal(v)
	if err != nil {
		return 0 // who writes it says so
	}
	return len(b)
}

// spelt gives values for the audit log.
func spelt(values []fleet.Value) []detail {
	all := []detail{}
	for _, v := range values {
		all = append(all, detail{"subject": v.Subject, "kind": v.Kind, "path": v.Path, "digest": v.Digest})
	}
	return all
}

// ApproveValues approves values that are proposed, all or none of them.
// ErrNotFound, ErrConflict where one is not proposed any more, ErrSamePerson.
func (s *Service) ApproveValues(ctx context.Context, a Actor, ids ...int64) error {
	return s.decide(ctx, a, "value.approve", ids, func(tx *store.Tx, v fleet.Value) error {
		if v.State != fleet.Proposed {
			return fmt.Errorf("%w: value %d is %s", ErrConflict, v.ID, v.State)
		}
		return tx.SetValueState(ctx, v.ID, fleet.Proposed, fleet.Approved, a.Name)
	})
}

// RejectValues rejects values that are proposed, or withdraws approved ones: what
// takes trust away needs no second person.
func (s *Service) RejectValues(ctx context.Context, a Actor, ids ...int64) error {
	return s.decide(ctx, a, "value.reject", ids, func(tx *store.Tx, v fleet.Value) error {
		if v.State == fleet.Rejected {
			return fmt.Errorf("%w: value %d is %s", ErrConflict, v.ID, v.State)
		}
		return tx.SetValueState(ctx, v.ID, v.State, fleet.Rejected, a.Name)
	})
}

func (s *Service) decide(ctx context.Context, a Actor, action string, ids []int64, f func(*store.Tx, fleet.Value) error) error {
	return s.do(ctx, a, Policy, func(tx *store.Tx) error {
		if len(ids) == 0 || len(ids) > MaxDecisions {
			return fmt.Errorf("%w: %d values, at least 1 and at most %d", ErrInvalid, len(ids), MaxDecisions)
		}
		for _, id := range ids {
			v, err := tx.Value(ctx, id)
			if err != nil {
				return err
			}
			if err := f(tx, v); err != nil {
				return err
			}
			if err := s.audit(tx, a, action, strconv.FormatInt(id, 10), detail{"subject": v.Subject, "kind": v.Kind, "path": v.Path, "digest": v.Digest, "by": v.By, "was": v.State}); err != nil {
				return err
			}
		}
		return nil
	})
}
