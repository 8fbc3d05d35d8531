package store

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"testing"
	"time"

	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/fleet"
)

func TestHooks(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		var id int64
		b.do(func(ctx context.Context, tx *Tx) (err error) {
			if id, err = tx.AddHook(ctx, fleet.Hook{URL: "https://a", Secret: []byte("s"), Events: []string{"trust"}}); err != nil {
				return err
			}
			_, err = tx.AddHook(ctx, fleet.Hook{URL: "https://b"})
			return err
		})
		hooks := testkit.Must[[]fleet.Hook](t)(b.Hooks(ctx))
		if len(hooks) != 2 || hooks[0].URL != "https://a" || string(hooks[0].Secret) != "s" || !reflect.DeepEqual(hooks[0].Events, []string{"trust"}) || len(hooks[1].Events) != 0 {
			t.Errorf("%+v", hooks)
		}
		enqueue := func(event string, want int) {
			t.Helper()
			b.do(func(ctx context.Context, tx *Tx) error {
				n, err := tx.Enqueue(ctx, event, []byte(`{"x":1}`))
				if n != want {
					t.Errorf("%q goes to %d, want %d", event, n, want)
				}
				return err
			})
		}
		enqueue("trust", 2)
		enqueue("enrolled", 1)
		all := testkit.Must[[]fleet.Delivery](t)(b.Claim(ctx, 10, time.Minute))
		if len(all) != 3 || all[0].Attempts != 1 || string(all[0].Body) != `{"x":1}` {
			t.Fatalf("%+v", all)
		}
		if again := testkit.Must[[]fleet.Delivery](t)(b.Claim(ctx, 10, time.Minute)); len(again) != 0 {
			t.Errorf("claimed twice: %+v", again)
		}
		if err := errors.Join(b.Done(ctx, all[0]), b.Retry(ctx, all[1], "503")); err != nil {
			t.Fatal(err)
		}
		wantErr(t, b.Retry(ctx, all[0], "x"), ErrVersion) // done
		b.clock.pass(Backoff(1) - time.Second)
		if got := testkit.Must[[]fleet.Delivery](t)(b.Claim(ctx, 10, time.Minute)); len(got) != 0 {
			t.Errorf("before its time: %+v", got)
		}
		b.clock.pass(time.Second)
		got := testkit.Must[[]fleet.Delivery](t)(b.Claim(ctx, 10, time.Hour))
		if len(got) != 1 || got[0].ID != all[1].ID || got[0].LastErr != "503" || got[0].Attempts != 2 {
			t.Fatalf("%+v", got)
		}
		b.clock.pass(time.Minute) // the third's lease: who had it died
		third := testkit.Must[[]fleet.Delivery](t)(b.Claim(ctx, 10, time.Minute))
		if len(third) != 1 || third[0].ID != all[2].ID || third[0].Attempts != 2 {
			t.Fatalf("%+v", third)
		}
		wantErr(t, b.Retry(ctx, all[2], "late"), ErrVersion) // and came back

		// Given up, and revived.
		for d := third[0]; ; d = testkit.Must[[]fleet.Delivery](t)(b.Claim(ctx, 1, time.Minute))[0] {
			if err := b.Retry(ctx, d, "no"); err != nil {
				t.Fatal(err)
			}
			if d.Attempts == MaxAttempts {
				break
			}
			b.clock.pass(Backoff(d.Attempts))
			if d.ID != third[0].ID {
				t.Fatal("another one")
			}
			if err := b.Done(ctx, got[0]); err != nil {
				t.Fatal(err)
			}
		}
		dead, _, err := b.DeadLetters(ctx, Page{})
		if err != nil || len(dead) != 1 || !dead[0].Dead || dead[0].LastErr != "no" {
			t.Fatalf("%+v %v", dead, err)
		}
		b.clock.pass(1000 * time.Hour)
		if got := testkit.Must[[]fleet.Delivery](t)(b.Claim(ctx, 10, time.Minute)); len(got) != 0 {
			t.Errorf("a dead letter: %+v", got)
		}
		if waiting, n, err := b.Queued(ctx); err != nil || waiting != 0 || n != 1 {
			t.Errorf("%d %d %v", waiting, n, err)
		}
		b.do(func(ctx context.Context, tx *Tx) error { return tx.Revive(ctx, dead[0].ID) })
		wantErr(t, b.Do(ctx, func(tx *Tx) error { return tx.Revive(ctx, dead[0].ID) }), ErrNotFound)
		if got := testkit.Must[[]fleet.Delivery](t)(b.Claim(ctx, 10, time.Minute)); len(got) != 1 || got[0].Attempts != 1 {
			t.Errorf("revived: %+v", got)
		}
		enqueue("trust", 2)
		b.do(func(ctx context.Context, tx *Tx) error { return tx.DropHook(ctx, id) })
		wantErr(t, b.Do(ctx, func(tx *Tx) error { return tx.DropHook(ctx, id) }), ErrNotFound)
		if waiting, _, err := b.Queued(ctx); err != nil || waiting != 2 {
			t.Errorf("%d wait, %v", waiting, err)
		}
		if d := Backoff(MaxAttempts); d != 8*time.Hour {
			t.Errorf("backoff %v", d)
		}
	})
}

// Replicas claim at the same time: each delivery once.
func TestClaimAmongReplicas(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		replicas := []*Store{b.Store, b.replica(), b.replica()}
		const n = 300
		b.do(func(ctx context.Context, tx *Tx) error {
			if _, err := tx.AddHook(ctx, fleet.Hook{URL: "https://a"}); err != nil {
				return err
			}
			for i := range n {
				if _, err := tx.Enqueue(ctx, "e", fmt.Append(nil, i)); err != nil {
					return err
				}
			}
			return nil
		})
		var mu sync.Mutex
		seen := map[string]int{}
		var wg sync.WaitGroup
		for i := range 9 {
			wg.Go(func() {
				for idle := 0; idle < 3; {
					all, err := replicas[i%3].Claim(t.Context(), 7, time.Hour)
					if err != nil {
						t.Error(err)
						return
					}
					if len(all) == 0 {
						idle++
					}
					mu.Lock()
					for _, d := range all {
						seen[string(d.Body)]++
					}
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if len(seen) != n {
			t.Errorf("%d of %d", len(seen), n)
		}
		for body, times := range seen {
			if times != 1 {
				t.Errorf("%s was given %d times", body, times)
			}
		}
	})
}
