package store

import (
	"context"
	"fmt"

	"virt-trust/internal/verifier/fleet"
)

// PutSession keeps a session; ErrConflict where there is one with that digest.
func (s *Store) PutSession(ctx context.Context, v fleet.Session) error {
	if v.Digest == "" || v.Expires.IsZero() || len(v.Data) > maxKey {
		return fmt.Errorf("%w: session", ErrInvalid)
	}
	if err := bounded(maxText, v.Digest, v.Person, v.Role); err != nil {
		return err
	}
	err := s.Do(ctx, func(tx *Tx) error {
		n, err := tx.exec(ctx, "INSERT INTO sessions (digest, person, role, data, created, expires) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
			v.Digest, v.Person, v.Role, v.Data, v.Created, v.Expires)
		if err == nil && n == 0 {
			err = ErrConflict
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("keeping a session: %w", err)
	}
	return nil
}

// Session gives a session; ErrNotFound also where it has expired.
func (r reads) Session(ctx context.Context, digest string) (fleet.Session, error) {
	v := fleet.Session{Digest: digest}
	err := r.one(ctx, "SELECT person, role, data, created, expires FROM sessions WHERE digest = ? AND expires > ?", []any{digest, r.now()},
		&v.Person, &v.Role, &v.Data, at{&v.Created}, at{&v.Expires})
	if err != nil {
		return fleet.Session{}, fmt.Errorf("session: %w", err)
	}
	return v, nil
}

// DropSession ends a session; no error where there is none.
func (s *Store) DropSession(ctx context.Context, digest string) error {
	err := s.Do(ctx, func(tx *Tx) error {
		_, err := tx.exec(ctx, "DELETE FROM sessions WHERE digest = ?", digest)
		return err
	})
	if err != nil {
		return fmt.Errorf("ending a session: %w", err)
	}
	return nil
}

// DropSessionsOf ends all of a person's and gives how many they were.
func (tx *Tx) DropSessionsOf(ctx context.Context, person string) (int, error) {
	n, err := tx.exec(ctx, "DELETE FROM sessions WHERE person = ?", person)
	if err != nil {
		return 0, fmt.Errorf("ending the sessions of %q: %w", person, err)
	}
	return int(n), nil
}
