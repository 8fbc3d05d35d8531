package store

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"

	"virt-trust/internal/verifier/fleet"
)

// AddToken adds a join token; ErrConflict where there is one with that digest.
func (tx *Tx) AddToken(ctx context.Context, t fleet.JoinToken) error {
	if t.Digest == "" || t.Expires.IsZero() {
		return fmt.Errorf("%w: a join token has a digest and an end", ErrInvalid)
	}
	if err := bounded(maxName, t.Digest, t.Name, t.By); err != nil {
		return err
	}
	if t.Created.IsZero() {
		t.Created = tx.now()
	}
	n, err := tx.exec(ctx, "INSERT INTO tokens (digest, name, expires, added_by, created, used, used_by) VALUES (?, ?, ?, ?, ?, 0, '') ON CONFLICT DO NOTHING",
		t.Digest, t.Name, t.Expires, t.By, t.Created)
	if err == nil && n == 0 {
		err = ErrConflict
	}
	if err != nil {
		return fmt.Errorf("adding a join token: %w", err)
	}
	return nil
}

// UseToken uses up the token for a node of this name and ID: exactly once,
// whoever else tries. *TokenError says why not.
func (tx *Tx) UseToken(ctx context.Context, digest, name, node string) error {
	now := tx.now()
	n, err := tx.exec(ctx, "UPDATE tokens SET used = ?, used_by = ? WHERE digest = ? AND used = 0 AND expires > ? AND (name = '' OR name = ?)",
		now, node, digest, now, name)
	if err != nil {
		return fmt.Errorf("using a join token: %w", err)
	}
	if n == 1 {
		return nil
	}
	var t fleet.JoinToken
	err = tx.one(ctx, "SELECT name, expires, used FROM tokens WHERE digest = ?", []any{digest}, &t.Name, at{&t.Expires}, at{&t.Used})
	switch {
	case errors.Is(err, ErrNotFound):
		return &TokenError{"unknown"}
	case err != nil:
		return fmt.Errorf("using a join token: %w", err)
	case !t.Used.IsZero():
		return &TokenError{"used"}
	case !t.Expires.After(now):
		return &TokenError{"expired"}
	}
	return &TokenError{"other-name"}
}

// Token gives one join token; ErrNotFound.
func (r reads) Token(ctx context.Context, digest string) (fleet.JoinToken, error) {
	var t fleet.JoinToken
	err := r.one(ctx, "SELECT digest, name, expires, added_by, created, used, used_by FROM tokens WHERE digest = ?", []any{digest},
		&t.Digest, &t.Name, at{&t.Expires}, &t.By, at{&t.Created}, at{&t.Used}, &t.UsedBy)
	if err != nil {
		return fleet.JoinToken{}, fmt.Errorf("join token: %w", err)
	}
	return t, nil
}

// DropToken removes a token that was not used; ErrNotFound.
func (tx *Tx) DropToken(ctx context.Context, digest string) error {
	n, err := tx.exec(ctx, "DELETE FROM tokens WHERE digest = ? AND used = 0", digest)
	if err == nil && n == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("removing a join token: %w", err)
	}
	return nil
}

// Tokens gives join tokens, newest first.
func (r reads) Tokens(ctx context.Context, p Page) ([]fleet.JoinToken, string, error) {
	var c conditions
	after, err := p.after(2)
	if err != nil {
		return nil, "", err
	}
	if after != nil {
		created, err := strconv.ParseInt(after[0], 10, 64)
		if err != nil {
			return nil, "", fmt.Errorf("%w: that is no page", ErrInvalid)
		}
		c.add("(created, digest) < (?, ?)", created, after[1])
	}
	all, err := list(ctx, r, "SELECT digest, name, expires, added_by, created, used, used_by FROM tokens"+c.String()+" ORDER BY created DESC, digest DESC LIMIT ?",
		append(c.args, p.limit()+1), func(scan func(...any) error, t *fleet.JoinToken) error {
			return scan(&t.Digest, &t.Name, at{&t.Expires}, &t.By, at{&t.Created}, at{&t.Used}, &t.UsedBy)
		})
	if err != nil {
		return nil, "", fmt.Errorf("join tokens: %w", err)
	}
	all, next := paged(all, p, func(t fleet.JoinToken) string { return cursor(strconv.FormatInt(micros(t.Created), 10), t.Digest) })
	return all, next, nil
}

// maxChallenge bounds what is kept with a challenge, in bytes.
const maxChallenge = 32 << 10

// PutChallenge keeps a challenge until it is taken or expires. ErrLimit where
// its source, or its purpose altogether, has too many (Options.Challenge).
func (s *Store) PutChallenge(ctx context.Context, c fleet.Challenge) error {
	if c.ID == "" || len(c.Data) > maxChallenge {
		return fmt.Errorf("%w: challenge", ErrInvalid)
	}
	if err := bounded(maxName, c.ID, c.Purpose, c.Source); err != nil {
		return err
	}
	err := s.Do(ctx, func(tx *Tx) error {
		if tx.d.numbered {
			// Counting and adding is one step: one after the other, for each purpose.
			h := sha256.Sum256([]byte("challenge\x00" + c.Purpose))
			if _, err := tx.exec(ctx, "SELECT pg_advisory_xact_lock(?)", int64(binary.BigEndian.Uint64(h[:]))); err != nil {
				return err
			}
		}
		if _, err := tx.exec(ctx, "DELETE FROM challenges WHERE expires <= ?", tx.now()); err != nil {
			return err
		}
		var ofSource, all int
		if err := tx.one(ctx, "SELECT count(*) FROM challenges WHERE purpose = ? AND source = ?", []any{c.Purpose, c.Source}, &ofSource); err != nil {
			return err
		}
		if err := tx.one(ctx, "SELECT count(*) FROM challenges WHERE purpose = ?", []any{c.Purpose}, &all); err != nil {
			return err
		}
		if ofSource >= s.challenge.PerSource || all >= s.challenge.Total {
			return ErrLimit
		}
		n, err := tx.exec(ctx, "INSERT INTO challenges (purpose, id, source, expires, data) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
			c.Purpose, c.ID, c.Source, c.Expires, c.Data)
		if err == nil && n == 0 {
			err = ErrConflict
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("keeping a challenge: %w", err)
	}
	return nil
}

// TakeChallenge gives the challenge and forgets it: once, among all replicas.
// ErrNotFound also where it has expired.
func (s *Store) TakeChallenge(ctx context.Context, purpose, id string) (fleet.Challenge, error) {
	var c fleet.Challenge
	err := s.Do(ctx, func(tx *Tx) error {
		c = fleet.Challenge{ID: id, Purpose: purpose}
		return tx.one(ctx, "DELETE FROM challenges WHERE purpose = ? AND id = ? AND expires > ? RETURNING source, expires, data",
			[]any{purpose, id, tx.now()}, &c.Source, at{&c.Expires}, &c.Data)
	})
	if err != nil {
		return fleet.Challenge{}, fmt.Errorf("challenge: %w", err)
	}
	return c, nil
}
