package store

import (
	"context"
	"fmt"
	"testing"
	"time"

	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/fleet"
)

// Certificates are noted until they have expired, those of revoked nodes are
// listed a while longer, and no node has too many.
func TestCertificates(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		n, other := b.addNode(1), b.addNode(2)
		ctx, now := t.Context(), b.clock.Now()
		wantErr(t, func() error { _, err := b.CertifierCertificate(ctx, n.ID); return err }(), ErrNotFound)
		add := func(serial, node string, lifetime time.Duration, data []byte) error {
			return b.Do(ctx, func(tx *Tx) error {
				return tx.AddCertificate(ctx, Certificate{Serial: serial, Node: node, Expires: now.Add(lifetime), Data: data})
			})
		}
		for _, err := range []error{
			add("01", n.ID, time.Hour, nil), add("02", n.ID, 100*time.Hour, []byte("old")), add("03", n.ID, 200*time.Hour, []byte("new")), add("04", other.ID, time.Hour, nil),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		if der := testkit.Must[[]byte](t)(b.CertifierCertificate(ctx, n.ID)); string(der) != "new" {
			t.Errorf("%q", der)
		}
		wantErr(t, add("05", n.ID, 0, make([]byte, maxKey+1)), ErrInvalid)
		if all := testkit.Must[[]Revoked](t)(b.RevokedCertificates(ctx)); len(all) != 0 {
			t.Errorf("%+v", all)
		}
		b.clock.pass(time.Minute)
		b.do(func(ctx context.Context, tx *Tx) error {
			n, err := tx.Node(ctx, n.ID)
			if err != nil {
				return err
			}
			n.State = fleet.Revoked
			_, err = tx.UpdateNode(ctx, n)
			return err
		})
		listed := func(want ...string) {
			t.Helper()
			got := []string{}
			for _, r := range testkit.Must[[]Revoked](t)(b.RevokedCertificates(ctx)) {
				if got = append(got, r.Serial); !r.At.Equal(now.Add(time.Minute)) {
					t.Errorf("%+v", r)
				}
			}
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("%v, want %v", got, want)
			}
		}
		listed("01", "02", "03")
		b.clock.pass(2 * time.Hour)
		listed("01", "02", "03") // expired, and in a list after that
		b.clock.pass(24 * time.Hour)
		listed("02", "03")
		if v := testkit.Must[Removed](t)(b.Expire(ctx, b.clock.Now(), Retention{})); v.Certificates != 2 {
			t.Errorf("%+v", v)
		}
		b.do(func(ctx context.Context, tx *Tx) error {
			for i := range MaxCertificates {
				if err := tx.AddCertificate(ctx, Certificate{Serial: fmt.Sprintf("1%04x", i), Node: other.ID, Expires: b.clock.Now().Add(time.Hour)}); err != nil {
					return err
				}
			}
			return nil
		})
		wantErr(t, add("ff", other.ID, 1000*time.Hour, nil), ErrLimit)
	})
}

// A revocation list's number rises, whoever makes it.
func TestCRLNumber(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		put := func(before, number int64) error {
			return b.Do(ctx, func(tx *Tx) error {
				return tx.PutCRL(ctx, before, CRL{Number: number, Made: b.clock.Now(), Digest: []byte("d"), Data: []byte("crl")})
			})
		}
		if err := put(0, 7); err != nil {
			t.Fatal(err)
		}
		wantErr(t, put(0, 8), ErrVersion)
		wantErr(t, put(7, 7), ErrVersion)
		wantErr(t, put(7, 6), ErrVersion)
		if c := testkit.Must[CRL](t)(b.CRL(ctx)); c.Number != 7 || !c.Made.Equal(b.clock.Now()) || string(c.Data) != "crl" {
			t.Errorf("%+v", c)
		}
	})
}
