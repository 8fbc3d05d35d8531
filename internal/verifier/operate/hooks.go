package operate

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/webhook"
)

// maxHooks bounds the webhooks.
const maxHooks = 100

// AddHook directs events, all where none is named, to a URL. The answer has the
// secret that signs them: it is not shown again.
func (s *Service) AddHook(ctx context.Context, a Actor, url string, events []string) (h fleet.Hook, err error) {
	err = s.do(ctx, a, Policy, func(tx *store.Tx) error {
		if err := s.Guard.URL(url); err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		for _, e := range events {
			if !slices.Contains(webhook.Events(), e) {
				return fmt.Errorf("%w: %.40q is none of the events %s", ErrInvalid, e, strings.Join(webhook.Events(), ", "))
			}
		}
		if hooks, err := tx.Hooks(ctx); err != nil || len(hooks) >= maxHooks {
			return cmpErr(err, fmt.Errorf("%w: there are %d webhooks, at most %d", ErrConflict, len(hooks), maxHooks))
		}
		// Each that there is, not none: an event that a later version adds is not
		// sent to who did not ask for it.
		if len(events) == 0 {
			events = webhook.Events()
		}
		h = fleet.Hook{URL: url, Events: slices.Compact(slices.Sorted(slices.Values(events))), Secret: make([]byte, webhook.SecretSize), Created: s.Now()}
		rand.Read(h.Secret) // never fails
		if h.ID, err = tx.AddHook(ctx, h); err != nil {
			return err
		}
		return s.audit(tx, a, "webhook.add", strconv.FormatInt(h.ID, 10), detail{"url": url, "events": h.Events})
	})
	if err != nil {
		return fleet.Hook{}, err
	}
	return h, nil
}

func cmpErr(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// RemoveHook removes a webhook with all that waits for it. ErrNotFound.
func (s *Service) RemoveHook(ctx context.Context, a Actor, id int64) error {
	return s.do(ctx, a, Policy, func(tx *store.Tx) error {
		if err := tx.DropHook(ctx, id); err != nil {
			return err
		}
		return s.audit(tx, a, "webhook.remove", strconv.FormatInt(id, 10), detail{})
	})
}

// Hooks gives all webhooks, without their secrets.
func (s *Service) Hooks(ctx context.Context, a Actor) ([]fleet.Hook, error) {
	if err := a.need(Policy); err != nil {
		return nil, err
	}
	hooks, err := s.Store.Hooks(ctx)
	for i := range hooks {
		hooks[i].Secret = nil
	}
	return hooks, told(err)
}

// TestHook sends the event test to a webhook at once, and once: an error that is
// none of this package's or of the store's is the receiver's.
func (s *Service) TestHook(ctx context.Context, a Actor, id int64) error {
	if err := a.need(Policy); err != nil {
		return err
	}
	hooks, err := s.Store.Hooks(ctx)
	if err != nil {
		return told(err)
	}
	i := slices.IndexFunc(hooks, func(h fleet.Hook) bool { return h.ID == id })
	if i < 0 {
		return fmt.Errorf("%w: no webhook %d", ErrNotFound, id)
	}
	if err := s.do(ctx, a, Policy, func(tx *store.Tx) error {
		return s.audit(tx, a, "webhook.test", strconv.FormatInt(id, 10), detail{})
	}); err != nil {
		return err
	}
	body, err := json.Marshal(webhook.Event{Type: webhook.Test, Time: s.Now(), Data: detail{"by": a.Name}})
	if err != nil {
		return err
	}
	return s.Deliver(ctx, hooks[i], fleet.Delivery{Hook: id, Event: webhook.Test, Body: body})
}

// Revive queues deliveries anew that were given up, all or none of them.
// ErrNotFound.
func (s *Service) Revive(ctx context.Context, a Actor, deliveries ...int64) error {
	return s.do(ctx, a, Policy, func(tx *store.Tx) error {
		if len(deliveries) == 0 || len(deliveries) > MaxDecisions {
			return fmt.Errorf("%w: %d deliveries, at least 1 and at most %d", ErrInvalid, len(deliveries), MaxDecisions)
		}
		for _, id := range deliveries {
			if err := tx.Revive(ctx, id); err != nil {
				return err
			}
			if err := s.audit(tx, a, "delivery.revive", strconv.FormatInt(id, 10), detail{}); err != nil {
				return err
			}
		}
		return nil
	})
}

// DeadLetters gives deliveries that were given up, newest first.
func (s *Service) DeadLetters(ctx context.Context, a Actor, p store.Page) ([]fleet.Delivery, string, error) {
	if err := a.need(Policy); err != nil {
		return nil, "", err
	}
	all, next, err := s.Store.DeadLetters(ctx, p)
	return all, next, told(err)
}
