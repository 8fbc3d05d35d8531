package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"virt-trust/internal/verifier/fleet"
)

// Bounds of webhooks.
const (
	MaxHooks = 100
	maxBody  = 1 << 20
	maxEvent = 255
)

// AddHook adds a webhook and gives its ID. ErrLimit where there are MaxHooks.
func (tx *Tx) AddHook(ctx context.Context, h fleet.Hook) (int64, error) {
	if h.URL == "" || len(h.Secret) > maxText || len(h.Events) > 100 {
		return 0, fmt.Errorf("%w: webhook", ErrInvalid)
	}
	if err := errors.Join(bounded(maxText, h.URL), bounded(maxEvent, h.Events...)); err != nil {
		return 0, err
	}
	if h.Created.IsZero() {
		h.Created = tx.now()
	}
	if h.Events == nil {
		h.Events = []string{}
	}
	var id, n int64
	err := tx.one(ctx, "SELECT count(*) FROM hooks", nil, &n)
	if err == nil && n >= MaxHooks {
		err = ErrLimit
	}
	if err == nil {
		err = tx.one(ctx, "INSERT INTO hooks (url, secret, events, created) VALUES (?, ?, ?, ?) RETURNING id",
			[]any{h.URL, h.Secret, jsonStrings(h.Events), h.Created}, &id)
	}
	if err != nil {
		return 0, fmt.Errorf("adding a webhook: %w", err)
	}
	return id, nil
}

// DropHook removes a webhook and what waits for it; ErrNotFound.
func (tx *Tx) DropHook(ctx context.Context, id int64) error {
	n, err := tx.exec(ctx, "DELETE FROM hooks WHERE id = ?", id)
	if err == nil && n == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("removing webhook %d: %w", id, err)
	}
	return nil
}

// Hooks gives all webhooks by ID, secrets included.
func (r reads) Hooks(ctx context.Context) ([]fleet.Hook, error) {
	all, err := list(ctx, r, "SELECT id, url, secret, events, created FROM hooks ORDER BY id", nil, func(scan func(...any) error, h *fleet.Hook) error {
		return scan(&h.ID, &h.URL, &h.Secret, asJSON{&h.Events}, at{&h.Created})
	})
	if err != nil {
		return nil, fmt.Errorf("webhooks: %w", err)
	}
	return all, nil
}

// Enqueue puts an event into the queue of each webhook that wants it (whose
// Events name it, or are empty) and gives how many do.
func (tx *Tx) Enqueue(ctx context.Context, event string, body []byte) (int, error) {
	if len(body) > maxBody || len(event) > maxEvent {
		return 0, fmt.Errorf("%w: event of %d bytes", ErrInvalid, len(body))
	}
	hooks, err := tx.Hooks(ctx)
	if err != nil {
		return 0, err
	}
	n, now := 0, tx.now()
	for _, h := range hooks {
		if len(h.Events) > 0 && !slices.Contains(h.Events, event) {
			continue
		}
		_, err := tx.exec(ctx, "INSERT INTO deliveries (hook, event, body, attempts, due, last_err, created, dead) VALUES (?, ?, ?, 0, ?, '', ?, 0)",
			h.ID, event, body, now, now)
		if errors.Is(err, ErrNotFound) {
			err = errAgain // removed meanwhile
		}
		if err != nil {
			return 0, fmt.Errorf("queueing %q for webhook %d: %w", event, h.ID, err)
		}
		n++
	}
	return n, nil
}

const deliveryColumns = "id, hook, event, body, attempts, due, last_err, created, dead"

func readDelivery(scan func(...any) error, d *fleet.Delivery) error {
	return scan(&d.ID, &d.Hook, &d.Event, &d.Body, &d.Attempts, at{&d.Next}, &d.LastErr, at{&d.Created}, &d.Dead)
}

// Claim gives at most n deliveries that are due, for the caller alone until lease
// has passed; Attempts counts this one. No order is kept. Each is given at least
// once until it is Done or given up: who receives may see one twice.
func (s *Store) Claim(ctx context.Context, n int, lease time.Duration) ([]fleet.Delivery, error) {
	var all []fleet.Delivery
	// Most times there is nothing; a question does not write.
	var due int
	err := s.one(ctx, "SELECT count(*) FROM (SELECT 1 FROM deliveries WHERE dead = 0 AND due <= ? LIMIT 1) AS d", []any{s.now()}, &due)
	if err == nil && due > 0 {
		err = s.Do(ctx, func(tx *Tx) error {
			now := tx.now()
			all, err = list(ctx, tx.reads, "UPDATE deliveries SET due = ?, attempts = attempts + 1 WHERE id IN (SELECT id FROM deliveries WHERE dead = 0 AND due <= ? ORDER BY due LIMIT ?"+
				tx.d.skipLocked+") RETURNING "+deliveryColumns, []any{now.Add(lease), now, n}, readDelivery)
			return err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("claiming deliveries: %w", err)
	}
	return all, nil
}

// Done removes a delivery that arrived.
func (s *Store) Done(ctx context.Context, d fleet.Delivery) error {
	err := s.Do(ctx, func(tx *Tx) error {
		_, err := tx.exec(ctx, "DELETE FROM deliveries WHERE id = ?", d.ID)
		return err
	})
	if err != nil {
		return fmt.Errorf("delivery %d: %w", d.ID, err)
	}
	return nil
}

// MaxAttempts is how often a delivery is tried: over about four days.
const MaxAttempts = 20

// Backoff is how long to wait after so many attempts: 10 s, twice as long each
// time, at most 8 hours.
func Backoff(attempts int) time.Duration {
	return min(10*time.Second<<min(max(attempts-1, 0), 20), 8*time.Hour)
}

// Retry puts a delivery that did not arrive back, to be tried after Backoff of
// its attempts, or gives it up after MaxAttempts. ErrVersion where the lease
// passed and another has it.
func (s *Store) Retry(ctx context.Context, d fleet.Delivery, why string) error {
	if len(why) > maxText {
		why = why[:maxText]
	}
	err := s.Do(ctx, func(tx *Tx) error {
		n, err := tx.exec(ctx, "UPDATE deliveries SET due = ?, last_err = ?, dead = ? WHERE id = ? AND attempts = ? AND dead = 0",
			tx.now().Add(Backoff(d.Attempts)), why, d.Attempts >= MaxAttempts, d.ID, d.Attempts)
		if err == nil && n == 0 {
			err = ErrVersion
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("delivery %d: %w", d.ID, err)
	}
	return nil
}

// DeadLetters gives deliveries that were given up, newest first.
func (r reads) DeadLetters(ctx context.Context, p Page) ([]fleet.Delivery, string, error) {
	before, err := p.before()
	if err != nil {
		return nil, "", err
	}
	all, err := list(ctx, r, "SELECT "+deliveryColumns+" FROM deliveries WHERE dead = 1 AND id < ? ORDER BY id DESC LIMIT ?", []any{before, p.limit() + 1}, readDelivery)
	if err != nil {
		return nil, "", fmt.Errorf("dead letters: %w", err)
	}
	all, next := paged(all, p, func(d fleet.Delivery) string { return cursor(strconv.FormatInt(d.ID, 10)) })
	return all, next, nil
}

// Revive queues a dead letter anew; ErrNotFound.
func (tx *Tx) Revive(ctx context.Context, id int64) error {
	n, err := tx.exec(ctx, "UPDATE deliveries SET dead = 0, attempts = 0, due = ? WHERE id = ? AND dead = 1", tx.now(), id)
	if err == nil && n == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("dead letter %d: %w", id, err)
	}
	return nil
}

// Queued counts the deliveries that wait and those that were given up.
func (r reads) Queued(ctx context.Context) (waiting, dead int, err error) {
	err = r.one(ctx, "SELECT (SELECT count(*) FROM deliveries WHERE dead = 0), (SELECT count(*) FROM deliveries WHERE dead = 1)", nil, &waiting, &dead)
	if err != nil {
		return 0, 0, fmt.Errorf("counting deliveries: %w", err)
	}
	return waiting, dead, nil
}
