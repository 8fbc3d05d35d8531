package operate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/webhook"
)

// Service is what people may do. All its fields but FourEyes, Learning and ManifestKeys have to be set;
// it keeps no state.
type Service struct {
	Store *store.Store
	Pin   ca.Pin // of the CA, for join tokens
	// FourEyes says that Reference Values and policy count only when a second
	// person has approved them, and that who gave out a join token does not let the
	// node in that came with it.
	FourEyes     bool
	Learning     bool   // nodes may be learned
	ManifestKeys []any  // of the policy authority, see refvalues.ParseKeys
	Unset        []byte // the policy that counts where none was set, as JSON
	Guard        webhook.Guard
	// Deliver makes one attempt to deliver an event.
	Deliver func(context.Context, fleet.Hook, fleet.Delivery) error
	Now     func() time.Time
}

// do runs f in a transaction, if the actor has the role, and gives the store's
// errors as this package's.
func (s *Service) do(ctx context.Context, a Actor, r Role, f func(*store.Tx) error) error {
	if err := a.need(r); err != nil {
		return err
	}
	return told(s.Store.Do(ctx, f))
}

// told gives an error of the store as one of this package's, which all callers
// tell apart; others, above all store.ErrUnavailable, stay what they are.
func told(err error) error {
	for from, to := range map[error]error{
		store.ErrNotFound: ErrNotFound, store.ErrVersion: ErrConflict, store.ErrConflict: ErrConflict, store.ErrInactive: ErrConflict,
		store.ErrSamePerson: ErrSamePerson, store.ErrInvalid: ErrInvalid,
	} {
		if errors.Is(err, from) && !errors.Is(err, to) {
			return fmt.Errorf("%w: %w", to, err)
		}
	}
	return err
}

// audit appends to the audit log; detail is anything that JSON can say.
func (s *Service) audit(tx *store.Tx, a Actor, action, subject string, detail any) error {
	b, err := json.Marshal(detail)
	if err != nil {
		return err
	}
	tx.Audit(fleet.AuditEntry{Time: s.Now(), Actor: a.Name, Action: action, Subject: subject, Detail: string(b)})
	return nil
}

type detail = map[string]any

// maxText bounds what people write, in bytes.
const maxText = 1000

func checkText(texts ...string) error {
	for _, t := range texts {
		if len(t) > maxText {
			return fmt.Errorf("%w: a text of %d bytes, at most %d", ErrInvalid, len(t), maxText)
		}
	}
	return nil
}
