// Package operate is what people may do to the fleet: let nodes in and throw
// them out, approve what a round has shown, import Reference Values, set policy,
// give out join tokens, direct webhooks. API, page and command all come through
// here, so that each rule stands in one place: who may (role), whether a second
// person must agree (four eyes), and that what was done stands in the audit log,
// written in the same transaction.
package operate

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode"
)

// Role is what someone may do; each includes those before it.
type Role int

// The roles. Nobody is the zero Role: whoever has not said who he is.
const (
	Nobody   Role = iota
	Reader        // looks
	Operator      // lets nodes in and out, approves what happens to them, gives out join tokens
	Policy        // changes Reference Values, policy and webhooks, reads kept evidence
)

var roleNames = []string{"nobody", "reader", "operator", "policy"}

// String is the role's name.
func (r Role) String() string {
	if r < 0 || int(r) >= len(roleNames) {
		return roleNames[Nobody]
	}
	return roleNames[r]
}

// MarshalText gives the role's name.
func (r Role) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads a role's name; an unknown one is an error.
func (r *Role) UnmarshalText(b []byte) error {
	for i, name := range roleNames {
		if i > 0 && name == string(b) {
			*r = Role(i)
			return nil
		}
	}
	return fmt.Errorf("%.20q is no role: reader, operator, policy", b)
}

// Actor is a person, or a program with a token, that asks for something. The
// name stands in the audit log, and two actors are two people when their names
// differ (fleet.SamePerson).
type Actor struct {
	Name string
	Role Role
}

// Known says whether someone has said who he is.
func (a Actor) Known() bool { return a.Name != "" && a.Role > Nobody }

// ValidName says whether a name can stand in the audit log as a person's.
func ValidName(name string) bool {
	return name != "" && len(name) <= 200 && !strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsGraphic(r) })
}

type actorKey struct{}

// WithActor gives a context that knows who asks.
func WithActor(ctx context.Context, a Actor) context.Context {
	return context.WithValue(ctx, actorKey{}, a)
}

// ActorOf gives who asks; the zero Actor, who may nothing, if nobody knows.
func ActorOf(ctx context.Context) Actor {
	a, _ := ctx.Value(actorKey{}).(Actor)
	return a
}

// The errors that callers tell apart. Others mean that it could not be done.
var (
	ErrUnauthenticated = errors.New("log in first")
	ErrForbidden       = errors.New("your role may not do this")
	ErrNotFound        = errors.New("there is none")
	ErrConflict        = errors.New("not in its present state")
	ErrInvalid         = errors.New("it makes no sense")
	ErrSamePerson      = errors.New("a second person has to approve: not the one who proposed it")
)

// need lets an actor of at least a role pass.
func (a Actor) need(r Role) error {
	switch {
	case !a.Known():
		return ErrUnauthenticated
	case a.Role < r:
		return fmt.Errorf("%w: it takes the role %s, and %s has %s", ErrForbidden, r, a.Name, a.Role)
	}
	return nil
}
