package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/fleet"
)

func entry(i int) fleet.AuditEntry {
	return fleet.AuditEntry{Actor: "anna", Action: "node.approve", Subject: fmt.Sprint(i), Detail: `{"name":"a\u0000b<&>"}`}
}

func TestAudit(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		var noted []fleet.AuditHead
		for i := range 5 {
			b.do(func(ctx context.Context, tx *Tx) error {
				tx.Audit(entry(2 * i))
				tx.Audit(entry(2*i + 1))
				return nil
			})
			noted = append(noted, testkit.Must[fleet.AuditHead](t)(b.AuditHead(ctx)))
		}
		// What did not happen is not in it.
		wantErr(t, b.Do(ctx, func(tx *Tx) error { tx.Audit(entry(99)); return ErrLimit }), ErrLimit)
		hostile := entry(10)
		hostile.Subject = "nul\x00 bad\xff \u2028 \"quoted\"\n"
		hostile.Time = b.clock.Now().Add(123456789 * time.Nanosecond)
		b.do(func(ctx context.Context, tx *Tx) error { tx.Audit(hostile); return nil })

		var progress int64
		head := testkit.Must[fleet.AuditHead](t)(b.VerifyAudit(ctx, noted, func(n int64) { progress = n }))
		if head.ID != 11 || progress != 11 {
			t.Errorf("head %+v, progress %d", head, progress)
		}
		var out bytes.Buffer
		if h := testkit.Must[fleet.AuditHead](t)(b.ExportAudit(ctx, &out)); h != head {
			t.Errorf("exported to %+v", h)
		}
		if h := testkit.Must[fleet.AuditHead](t)(fleet.VerifyExport(&out, append(noted, head)...)); h != head {
			t.Errorf("verified to %+v", h)
		}
		all, next, err := b.AuditLog(ctx, AuditFilter{Actor: "anna", Action: "node.approve"}, Page{Limit: 3})
		if err != nil || len(all) != 3 || all[0].ID != 11 || next == "" || all[0].Subject != "nul\uFFFD bad\uFFFD \u2028 \"quoted\"\n" {
			t.Errorf("%+v %v", all, err)
		}
		if all, _, err := b.AuditLog(ctx, AuditFilter{Subject: "3"}, Page{}); err != nil || len(all) != 1 || all[0].ID != 4 {
			t.Errorf("%+v %v", all, err)
		}
		long := entry(0)
		long.Detail = strings.Repeat("x", fleet.MaxAuditText)
		wantErr(t, b.Do(ctx, func(tx *Tx) error { tx.Audit(long); return nil }), ErrInvalid)
	})
}

func TestAuditTampered(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		for i := range 6 {
			b.do(func(ctx context.Context, tx *Tx) error { tx.Audit(entry(i)); return nil })
		}
		head := testkit.Must[fleet.AuditHead](t)(b.AuditHead(ctx))
		refused := []string{"UPDATE audit SET actor = 'x' WHERE id = 3", "DELETE FROM audit WHERE id = 6", "UPDATE audit_head SET id = 5", "DELETE FROM audit_head"}
		if b.d.numbered {
			refused = append(refused, "TRUNCATE audit", "TRUNCATE audit_head")
		}
		for _, q := range refused {
			if err := b.raw(q); err == nil || !strings.Contains(err.Error(), "append-only") {
				t.Errorf("%s: %v", q, err)
			}
		}
		if got := testkit.Must[fleet.AuditHead](t)(b.VerifyAudit(ctx, nil, nil)); got != head {
			t.Errorf("%+v", got)
		}
		// Somebody who may do everything takes the triggers away.
		for _, name := range []string{"audit_no_update", "audit_no_delete", "audit_head_forward"} {
			q := "DROP TRIGGER " + name
			if b.d.numbered {
				q = "DROP TRIGGER IF EXISTS " + name + " ON " + map[bool]string{true: "audit_head", false: "audit"}[name == "audit_head_forward"]
			}
			if err := b.raw(q); err != nil {
				t.Fatal(err)
			}
		}
		e3 := entry(2)
		for _, c := range []struct {
			do, undo string
			id       int64
		}{
			{"UPDATE audit SET actor = 'berta' WHERE id = 3", "UPDATE audit SET actor = '" + e3.Actor + "' WHERE id = 3", 3},
			{"UPDATE audit SET time = time + 1 WHERE id = 3", "UPDATE audit SET time = time - 1 WHERE id = 3", 3},
			{"UPDATE audit SET id = 100 WHERE id = 3", "UPDATE audit SET id = 3 WHERE id = 100", 3},
			{"UPDATE audit_head SET id = 7", "UPDATE audit_head SET id = 6", 7},
			{"UPDATE audit_head SET hash = 'x'", "UPDATE audit_head SET hash = '" + head.Hash + "'", 6},
		} {
			if err := b.raw(c.do); err != nil {
				t.Fatal(err)
			}
			_, err := b.VerifyAudit(ctx, nil, nil)
			var broken *fleet.AuditError
			if !errors.As(err, &broken) || broken.ID != c.id {
				t.Errorf("%s: %v", c.do, err)
			}
			if err := b.raw(c.undo); err != nil {
				t.Fatal(err)
			}
		}
		// Cut, and the head set back: only a head noted elsewhere tells.
		five, _, err := b.AuditLog(ctx, AuditFilter{Subject: "4"}, Page{})
		if err != nil {
			t.Fatal(err)
		}
		for _, q := range []string{"DELETE FROM audit WHERE id = 6", "UPDATE audit_head SET id = 5, hash = '" + five[0].Hash + "'"} {
			if err := b.raw(q); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := b.VerifyAudit(ctx, nil, nil); err != nil {
			t.Error(err)
		}
		var broken *fleet.AuditError
		if _, err := b.VerifyAudit(ctx, []fleet.AuditHead{head}, nil); !errors.As(err, &broken) || broken.ID != 6 {
			t.Errorf("cut: %v", err)
		}
	})
}

// Several replicas append at once, beside other work: one chain, no gap, nothing
// lost.
func TestAuditAmongReplicas(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		replicas := []*Store{b.Store, b.replica(), b.replica()}
		const workers, each = 9, 20
		var wg sync.WaitGroup
		for i := range workers {
			wg.Go(func() {
				for j := range each {
					err := replicas[i%3].Do(t.Context(), func(tx *Tx) error {
						tx.Audit(entry(i*each + j))
						tx.Audit(entry(i*each + j))
						return tx.AddToken(t.Context(), fleet.JoinToken{Digest: fmt.Sprint(i, j), Expires: b.clock.Now().Add(time.Hour)})
					})
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		if head := testkit.Must[fleet.AuditHead](t)(b.VerifyAudit(t.Context(), nil, nil)); head.ID != 2*workers*each {
			t.Errorf("%d entries", head.ID)
		}
	})
}
