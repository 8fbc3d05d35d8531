package operate

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"time"

	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

// MaxTokenLifetime bounds a join token's.
const MaxTokenLifetime = 30 * 24 * time.Hour

// CreateToken gives out a join token, for one node of this name, "" for any. The
// secret is in the answer and nowhere else.
func (s *Service) CreateToken(ctx context.Context, a Actor, name string, lifetime time.Duration) (secret string, t fleet.JoinToken, err error) {
	err = s.do(ctx, a, Operator, func(tx *store.Tx) error {
		if lifetime <= 0 || lifetime > MaxTokenLifetime {
			return fmt.Errorf("%w: a lifetime of %s, at most %s", ErrInvalid, lifetime, MaxTokenLifetime)
		}
		name = ca.FoldName(name)
		if name != "" && !ca.ValidName(name) {
			return fmt.Errorf("%w: %.80q is no name that a node can have", ErrInvalid, name)
		}
		var digest string
		now := s.Now().UTC().Truncate(time.Microsecond)
		if secret, digest, err = ca.NewToken(rand.Reader, s.Pin); err != nil {
			return err
		}
		t = fleet.JoinToken{Digest: digest, Name: name, By: a.Name, Created: now, Expires: now.Add(lifetime)}
		if err := tx.AddToken(ctx, t); err != nil {
			return err
		}
		return s.audit(tx, a, "token.create", digest, detail{"name": name, "expires": t.Expires})
	})
	if err != nil {
		return "", fleet.JoinToken{}, err
	}
	return secret, t, nil
}

// RevokeToken takes a join token back that was not used, by its digest or the
// beginning of it. ErrNotFound; ErrInvalid where several begin so.
func (s *Service) RevokeToken(ctx context.Context, a Actor, digest string) error {
	return s.do(ctx, a, Operator, func(tx *store.Tx) error {
		if len(digest) < 8 {
			return fmt.Errorf("%w: at least 8 digits of the digest are wanted", ErrInvalid)
		}
		var found []fleet.JoinToken
		for page := (store.Page{Limit: 1000}); ; {
			tokens, next, err := tx.Tokens(ctx, page)
			if err != nil {
				return err
			}
			for _, t := range tokens {
				if strings.HasPrefix(t.Digest, digest) && t.Used.IsZero() {
					found = append(found, t)
				}
			}
			if page.After = next; next == "" {
				break
			}
		}
		switch len(found) {
		case 0:
			return fmt.Errorf("%w: no join token that was not used has this digest", ErrNotFound)
		case 1:
		default:
			return fmt.Errorf("%w: several digests begin so", ErrInvalid)
		}
		if err := tx.DropToken(ctx, found[0].Digest); err != nil {
			return err
		}
		return s.audit(tx, a, "token.revoke", found[0].Digest, detail{"name": found[0].Name, "by": found[0].By})
	})
}
