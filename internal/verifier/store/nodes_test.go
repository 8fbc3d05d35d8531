package store

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/fleet"
)

func TestNodes(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		n := b.addNode(1)
		n.Version = 1
		if got := testkit.Must[fleet.Node](t)(b.Node(ctx, n.ID)); !reflect.DeepEqual(got, n) {
			t.Errorf("Node:\n%+v, want\n%+v", got, n)
		}
		for what, get := range map[string]func() (fleet.Node, error){
			"name": func() (fleet.Node, error) { return b.NodeByName(ctx, n.Name) },
			"ek":   func() (fleet.Node, error) { return b.NodeByEK(ctx, n.EKDigest) },
			"ak":   func() (fleet.Node, error) { return b.NodeByAK(ctx, n.AKName) },
		} {
			if got := testkit.Must[fleet.Node](t)(get()); got.ID != n.ID {
				t.Errorf("by %s: %q", what, got.ID)
			}
		}
		_, err := b.Node(ctx, "none")
		wantErr(t, err, ErrNotFound)

		for field, change := range map[string]func(other *fleet.Node){
			"name": func(o *fleet.Node) { o.Name = n.Name },
			"ek":   func(o *fleet.Node) { o.EKDigest = n.EKDigest },
			"ak":   func(o *fleet.Node) { o.AKName = n.AKName },
			"id":   func(o *fleet.Node) { o.ID = n.ID },
		} {
			other := testNode(2)
			change(&other)
			err := b.Do(ctx, func(tx *Tx) error { return tx.PutNode(ctx, other) })
			var conflict *ConflictError
			if !errors.As(err, &conflict) || conflict.Field != field || conflict.Node != n.ID || !errors.Is(err, ErrConflict) {
				t.Errorf("a second %s: %v", field, err)
			}
		}

		// Optimistic versions.
		n.Serial, n.Problem = "02", "look at me"
		var v int64
		b.do(func(ctx context.Context, tx *Tx) (err error) { v, err = tx.UpdateNode(ctx, n); return err })
		if got := testkit.Must[fleet.Node](t)(b.Node(ctx, n.ID)); v != 2 || got.Version != 2 || got.Serial != "02" || got.Problem != n.Problem {
			t.Errorf("updated: %d, %+v", v, got)
		}
		update := func(n fleet.Node) error {
			return b.Do(ctx, func(tx *Tx) error { _, err := tx.UpdateNode(ctx, n); return err })
		}
		wantErr(t, update(n), ErrVersion)
		m := b.addNode(2)
		m.Version, m.Name = 1, n.Name
		var conflict *ConflictError
		if err := update(m); !errors.As(err, &conflict) || conflict.Field != "name" || conflict.Node != n.ID {
			t.Errorf("renamed onto another: %v", err)
		}
		wantErr(t, update(testNode(9)), ErrNotFound)

		// Revoked: its name and keys are free, its nonce is gone, and it stays so.
		testkit.Must[RoundState](t)(b.IssueNonce(ctx, n.ID, []byte("nonce"), b.clock.Now().Add(time.Minute)))
		n.Version, n.State, n.RevokedWhy = 2, fleet.Revoked, "sold"
		if err := update(n); err != nil {
			t.Fatal(err)
		}
		if st := testkit.Must[RoundState](t)(b.RoundState(ctx, n.ID)); st.Nonce != nil {
			t.Error("a revoked node has a nonce")
		}
		n.Version, n.State = 3, fleet.Active
		wantErr(t, update(n), ErrInactive)
		again := testNode(3)
		again.Name, again.EKDigest, again.AKName = n.Name, n.EKDigest, n.AKName
		b.do(func(ctx context.Context, tx *Tx) error { return tx.PutNode(ctx, again) })
		if got := testkit.Must[fleet.Node](t)(b.NodeByEK(ctx, n.EKDigest)); got.ID != again.ID {
			t.Errorf("after revocation the EK is of %s", got.ID)
		}
		b.do(func(ctx context.Context, tx *Tx) error { return tx.SetProblem(ctx, again.ID, "two of them") })
		wantErr(t, b.Do(ctx, func(tx *Tx) error { return tx.SetProblem(ctx, "none", "") }), ErrNotFound)

		long := testNode(4)
		long.Name = strings.Repeat("n", 256)
		wantErr(t, b.Do(ctx, func(tx *Tx) error { return tx.PutNode(ctx, long) }), ErrInvalid)
	})
}

// Of many that take one name at one moment on two replicas, one gets it.
func TestOneNameOnce(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		replicas := []*Store{b.Store, b.replica()}
		var won, conflicts atomic.Int32
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				n := testNode(i)
				n.Name = "one"
				err := replicas[i%2].Do(t.Context(), func(tx *Tx) error { return tx.PutNode(t.Context(), n) })
				switch {
				case err == nil:
					won.Add(1)
				case errors.Is(err, ErrConflict):
					conflicts.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 || conflicts.Load() != 19 {
			t.Errorf("%d got it, %d were refused", won.Load(), conflicts.Load())
		}
	})
}

func TestNodePages(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		for i := range 25 {
			n := testNode(i)
			n.Name = fmt.Sprintf("h%02d%%_!", i)
			if i%5 == 0 {
				n.State, n.Problem = fleet.Pending, "new"
			}
			b.do(func(ctx context.Context, tx *Tx) error { return tx.PutNode(ctx, n) })
		}
		var names []string
		pages := 0
		for p := (Page{Limit: 10}); ; {
			all, next, err := b.Nodes(ctx, NodeFilter{}, p)
			if err != nil {
				t.Fatal(err)
			}
			pages++
			for _, s := range all {
				names = append(names, s.Name)
			}
			if p.After = next; next == "" {
				break
			}
		}
		if pages != 3 || len(names) != 25 || names[0] != "h00%_!" || names[24] != "h24%_!" {
			t.Errorf("%d pages: %q", pages, names)
		}
		b.round(b.testResult(testNode(1).ID, 3, appraise.Warning), nil)
		warning := appraise.Warning
		for _, c := range []struct {
			f    NodeFilter
			want int
		}{
			{NodeFilter{State: fleet.Pending}, 5},
			{NodeFilter{Problem: true}, 5},
			{NodeFilter{Search: "H1"}, 10},
			{NodeFilter{Search: "%_!"}, 25},
			{NodeFilter{Search: "0%1"}, 0},
			{NodeFilter{Search: testNode(7).ID}, 1},
			{NodeFilter{Tier: &warning}, 1},
		} {
			all, _, err := b.Nodes(ctx, c.f, Page{})
			if err != nil || len(all) != c.want {
				t.Errorf("%+v: %d, %v; want %d", c.f, len(all), err, c.want)
			}
		}
		for _, bad := range []string{"x", "!!!", cursor("one"), cursor("a", "b", "c")} {
			_, _, err := b.Nodes(ctx, NodeFilter{}, Page{After: bad})
			wantErr(t, err, ErrInvalid)
		}
		_, _, err := b.Rounds(ctx, RoundFilter{}, Page{After: cursor("x")})
		wantErr(t, err, ErrInvalid)
	})
}

func TestTokens(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		now := b.clock.Now()
		for _, tok := range []fleet.JoinToken{
			{Digest: "any", Expires: now.Add(time.Hour), By: "anna"},
			{Digest: "bound", Name: "host1", Expires: now.Add(time.Hour), By: "anna"},
			{Digest: "old", Expires: now, By: "anna"},
			{Digest: "dropped", Expires: now.Add(time.Hour), By: "anna"},
		} {
			b.do(func(ctx context.Context, tx *Tx) error { return tx.AddToken(ctx, tok) })
			wantErr(t, b.Do(ctx, func(tx *Tx) error { return tx.AddToken(ctx, tok) }), ErrConflict)
		}
		b.do(func(ctx context.Context, tx *Tx) error { return tx.DropToken(ctx, "dropped") })
		use := func(digest, name string) error {
			return b.Do(ctx, func(tx *Tx) error { return tx.UseToken(ctx, digest, name, "node") })
		}
		for _, c := range []struct{ digest, name, reason string }{
			{"none", "host1", "unknown"}, {"dropped", "host1", "unknown"}, {"bound", "host2", "other-name"}, {"old", "host1", "expired"},
			{"bound", "host1", ""}, {"bound", "host1", "used"}, {"any", "host9", ""}, {"any", "host9", "used"},
		} {
			err := use(c.digest, c.name)
			var refused *TokenError
			if c.reason == "" && err != nil || c.reason != "" && (!errors.As(err, &refused) || refused.Reason != c.reason || !errors.Is(err, ErrToken)) {
				t.Errorf("%+v: %v", c, err)
			}
		}
		wantErr(t, b.Do(ctx, func(tx *Tx) error { return tx.DropToken(ctx, "any") }), ErrNotFound)
		all, next, err := b.Tokens(ctx, Page{Limit: 2})
		if err != nil || len(all) != 2 || next == "" || all[0].Digest != "old" {
			t.Fatalf("%+v %q %v", all, next, err)
		}
		all, next, err = b.Tokens(ctx, Page{Limit: 2, After: next})
		if err != nil || len(all) != 1 || next != "" || all[0].Digest != "any" || all[0].UsedBy != "node" || all[0].Used.IsZero() {
			t.Fatalf("%+v %q %v", all, next, err)
		}

		// A token whose node could not be added is not used up.
		b.do(func(ctx context.Context, tx *Tx) error {
			return tx.AddToken(ctx, fleet.JoinToken{Digest: "kept", Expires: now.Add(time.Hour)})
		})
		fail := errors.New("no")
		wantErr(t, b.Do(ctx, func(tx *Tx) error {
			if err := tx.UseToken(ctx, "kept", "h", "n"); err != nil {
				return err
			}
			return fail
		}), fail)
		if err := use("kept", "h"); err != nil {
			t.Error(err)
		}
	})
}

func TestTokenOnceAmongReplicas(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		replicas := []*Store{b.Store, b.replica()}
		for round := range 10 {
			digest := fmt.Sprint(round)
			b.do(func(ctx context.Context, tx *Tx) error {
				return tx.AddToken(ctx, fleet.JoinToken{Digest: digest, Expires: b.clock.Now().Add(time.Hour)})
			})
			var used atomic.Int32
			var wg sync.WaitGroup
			for i := range 12 {
				wg.Go(func() {
					err := replicas[i%2].Do(t.Context(), func(tx *Tx) error { return tx.UseToken(t.Context(), digest, "h", fmt.Sprint(i)) })
					if err == nil {
						used.Add(1)
					} else if !errors.Is(err, ErrToken) {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if used.Load() != 1 {
				t.Fatalf("used %d times", used.Load())
			}
		}
	})
}

func TestChallenges(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx, other := t.Context(), b.replica()
		put := func(s *Store, purpose, id, source string) error {
			return s.PutChallenge(ctx, fleet.Challenge{ID: id, Purpose: purpose, Source: source, Data: []byte("data"), Expires: b.clock.Now().Add(time.Minute)})
		}
		if err := put(b.Store, "enrolment", "a", "10.0.0.1"); err != nil {
			t.Fatal(err)
		}
		_, err := b.TakeChallenge(ctx, "certificate", "a")
		wantErr(t, err, ErrNotFound)
		if c := testkit.Must[fleet.Challenge](t)(other.TakeChallenge(ctx, "enrolment", "a")); string(c.Data) != "data" || c.Source != "10.0.0.1" {
			t.Errorf("%+v", c)
		}
		_, err = b.TakeChallenge(ctx, "enrolment", "a")
		wantErr(t, err, ErrNotFound)

		// Three for a source, five for a purpose, whoever asks at one moment.
		var ok, refused atomic.Int32
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				s := []*Store{b.Store, other}[i%2]
				switch err := put(s, "enrolment", fmt.Sprint(i), "10.0.0.1"); {
				case err == nil:
					ok.Add(1)
				case errors.Is(err, ErrLimit):
					refused.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if ok.Load() != 3 || refused.Load() != 17 {
			t.Errorf("%d kept, %d refused", ok.Load(), refused.Load())
		}
		for i, want := range []error{nil, nil, ErrLimit} {
			if err := put(b.Store, "enrolment", fmt.Sprint("x", i), fmt.Sprint("10.0.1.", i)); !errors.Is(err, want) {
				t.Errorf("source %d: %v, want %v", i, err, want)
			}
		}
		if err := put(b.Store, "certificate", "1", "10.0.0.1"); err != nil {
			t.Errorf("another purpose: %v", err)
		}
		wantErr(t, put(b.Store, "certificate", "1", "10.0.0.2"), ErrConflict)
		b.clock.pass(time.Minute)
		_, err = b.TakeChallenge(ctx, "certificate", "1")
		wantErr(t, err, ErrNotFound)
		if err := put(b.Store, "enrolment", "later", "10.0.0.1"); err != nil {
			t.Errorf("when all have expired: %v", err)
		}
	})
}

func TestSessions(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx, now := t.Context(), b.clock.Now()
		v := fleet.Session{Digest: "d", Person: "anna", Role: "operator", Data: []byte("x"), Created: now, Expires: now.Add(time.Hour)}
		if err := b.PutSession(ctx, v); err != nil {
			t.Fatal(err)
		}
		wantErr(t, b.PutSession(ctx, v), ErrConflict)
		if got := testkit.Must[fleet.Session](t)(b.Session(ctx, "d")); !reflect.DeepEqual(got, v) {
			t.Errorf("%+v", got)
		}
		b.clock.pass(time.Hour)
		_, err := b.Session(ctx, "d")
		wantErr(t, err, ErrNotFound)
		v.Expires = now.Add(5 * time.Hour)
		for _, d := range []string{"1", "2", "3"} {
			v.Digest = d
			if err := b.PutSession(ctx, v); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(b.DropSession(ctx, "1"), b.DropSession(ctx, "none")); err != nil {
			t.Fatal(err)
		}
		b.do(func(ctx context.Context, tx *Tx) error {
			n, err := tx.DropSessionsOf(ctx, "anna")
			if n != 3 { // the expired one too
				t.Errorf("%d", n)
			}
			return err
		})
	})
}
