package store

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store/storetest"
)

func TestMain(m *testing.M) { os.Exit(storetest.Main(m)) }

// both runs a test against both databases: what it is given makes one more
// replica on one and the same database.
func both(t *testing.T, f func(t *testing.T, b *bench)) {
	t.Helper()
	for name, dsn := range map[string]func(testing.TB) string{"sqlite": storetest.SQLite, "postgres": storetest.Postgres} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := &bench{t: t, dsn: dsn(t), clock: &clock{now: time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)}}
			b.Store = b.replica()
			f(t, b)
		})
	}
}

type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

type bench struct {
	*Store
	t     *testing.T
	dsn   string
	clock *clock
}

func (b *bench) replica() *Store {
	b.t.Helper()
	s, err := Open(b.t.Context(), b.dsn, Options{Now: b.clock.Now, MaxConns: 4, Challenge: ChallengeLimits{PerSource: 3, Total: 5}})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			b.t.Error(err)
		}
	})
	return s
}

// raw runs SQL as somebody would who has got at the database.
func (b *bench) raw(q string) error {
	b.t.Helper()
	driver, dsn := "pgx", b.dsn
	if path, ok := strings.CutPrefix(dsn, "sqlite:"); ok {
		driver, dsn = "sqlite", sqliteDSN(path)
	}
	db, err := sql.Open(driver, dsn)
	if err != nil {
		b.t.Fatal(err)
	}
	defer db.Close()
	_, err = db.ExecContext(b.t.Context(), q)
	return err
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

func (b *bench) do(f func(ctx context.Context, tx *Tx) error) {
	b.t.Helper()
	if err := b.Do(b.t.Context(), func(tx *Tx) error { return f(b.t.Context(), tx) }); err != nil {
		b.t.Fatal(err)
	}
}

func testNode(i int) fleet.Node {
	return fleet.Node{
		ID: fmt.Sprintf("00000000-0000-4000-8000-%012d", i), Name: fmt.Sprintf("host%d", i), State: fleet.Active,
		EKDigest: fmt.Sprintf("%064x", i), EKTrust: "manufacturer", AKName: fmt.Appendf(nil, "ak%d", i), AK: []byte("ak"),
		BindName: []byte("bindname"), Bind: []byte("bind"), Certifier: []byte("certifier"), Serial: "01", Enrolled: time.Date(2026, 10, 1, 1, 2, 3, 4000, time.UTC),
	}
}

func (b *bench) addNode(i int) fleet.Node {
	b.t.Helper()
	n := testNode(i)
	b.do(func(ctx context.Context, tx *Tx) error { return tx.PutNode(ctx, n) })
	return n
}

// testResult is of a host with some VMs, all of one tier.
func (b *bench) testResult(node string, vms int, tier appraise.Tier) *appraise.Result {
	now := b.clock.Now()
	r := &appraise.Result{Node: node, Received: now, Expires: now.Add(2 * time.Minute), Host: appraise.Appraisal{Tier: tier}, HostName: "h", PCRs: appraise.NewPCRs(map[string]string{"sha256:0": "00"})}
	if tier != appraise.Affirming {
		r.Host.Reasons = []appraise.Reason{{Code: "pcr-mismatch", Tier: tier, What: "PCR 0"}}
	}
	for i := range vms {
		r.VMs = append(r.VMs, appraise.VM{UUID: fmt.Sprintf("%s/%d", node, i), Name: fmt.Sprintf("vm\x00%d", i), Running: true, Appraisal: appraise.Appraisal{Tier: tier}, EK: fmt.Sprintf("ek-%s-%d", node, i)})
	}
	return r
}

// round does one whole round.
func (b *bench) round(r *appraise.Result, evidence []byte) int64 {
	b.t.Helper()
	nonce := fmt.Appendf(nil, "nonce %s", time.Now())
	testkit.Must[RoundState](b.t)(b.IssueNonce(b.t.Context(), r.Node, nonce, b.clock.Now().Add(time.Minute)))
	return testkit.Must[int64](b.t)(b.CompleteRound(b.t.Context(), Completion{Node: r.Node, Nonce: nonce, Checkpoint: []byte("checkpoint"), Result: r, Evidence: evidence}))
}

// random gives bytes that cannot be compressed.
func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}
