package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store/storetest"
)

// step is one round with its audit entry, in two transactions.
func step(ctx context.Context, s *Store, node string, i int) error {
	nonce := fmt.Appendf(nil, "nonce %d", i)
	now := time.Now()
	if _, err := s.IssueNonce(ctx, node, nonce, now.Add(time.Hour)); err != nil {
		return err
	}
	return s.Do(ctx, func(tx *Tx) error {
		tx.Audit(fleet.AuditEntry{Actor: node, Action: "round", Subject: fmt.Sprint(i)})
		r := &appraise.Result{Node: node, Received: now, Expires: now.Add(time.Hour), HostName: fmt.Sprint(i), Host: appraise.Appraisal{Tier: appraise.Warning}}
		_, err := tx.CompleteRound(ctx, Completion{Node: node, Nonce: nonce, Checkpoint: nonce, Result: r, Evidence: []byte("e")})
		return err
	})
}

// confirmed checks that round i, which was answered, is there with its audit
// entry, that its nonce is used up, and that the chain is whole.
func confirmed(t *testing.T, s *Store, node string, i int) {
	t.Helper()
	ctx := t.Context()
	res := testkit.Must[*appraise.Result](t)(s.PreviousResult(ctx, node))
	var got int
	if _, err := fmt.Sscan(res.HostName, &got); err != nil || got < i || got > i+1 {
		t.Errorf("node %s: round %s is the newest, %d was confirmed", node, res.HostName, i)
	}
	_, err := s.CompleteRound(ctx, Completion{Node: node, Nonce: fmt.Appendf(nil, "nonce %d", i), Result: res})
	wantErr(t, err, ErrNonce)
	if log, _, err := s.AuditLog(ctx, AuditFilter{Actor: node, Subject: fmt.Sprint(i)}, Page{}); err != nil || len(log) != 1 {
		t.Errorf("node %s: %d audit entries of round %d, %v", node, len(log), i, err)
	}
	rounds, _, err := s.Rounds(ctx, RoundFilter{Node: node}, Page{Limit: 1000})
	if err != nil || len(rounds) != got+1 {
		t.Errorf("node %s: %d rounds and the newest is %d, %v", node, len(rounds), got, err)
	}
}

func addNodes(t *testing.T, s *Store, n int) {
	t.Helper()
	err := s.Do(t.Context(), func(tx *Tx) error {
		for i := range n {
			if err := tx.PutNode(t.Context(), testNode(i)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// PostgreSQL is killed in the middle of rounds and comes back: what was confirmed
// is there, nothing is there by half, and the Store works again by itself.
func TestPostgresKilled(t *testing.T) {
	server, err := storetest.New()
	storetest.Need(t, err)
	t.Cleanup(func() {
		if err := server.Remove(); err != nil {
			t.Error(err)
		}
	})
	s := testkit.Must[*Store](t)(Open(t.Context(), server.NewDatabase(t), Options{}))
	defer s.Close()
	const nodes = 6
	addNodes(t, s, nodes)
	done := [nodes]int{}
	for life := range 2 {
		var enough atomic.Int32
		var wg sync.WaitGroup
		for n := range nodes {
			wg.Go(func() {
				for {
					err := step(t.Context(), s, testNode(n).ID, done[n])
					if err != nil {
						if !errors.Is(err, ErrUnavailable) {
							t.Errorf("the database is gone, and that is %v", err)
						}
						return
					}
					done[n]++
					enough.Add(1)
				}
			})
		}
		for enough.Load() < 60 {
			time.Sleep(time.Millisecond)
		}
		if err := server.Kill(); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		wantErr(t, s.Ping(t.Context()), ErrUnavailable)
		_, err := s.Result(t.Context(), testNode(0).ID)
		wantErr(t, err, ErrUnavailable)
		if err := server.Start(); err != nil {
			t.Fatal(err)
		}
		for n := range nodes {
			confirmed(t, s, testNode(n).ID, done[n]-1)
			// The one that was under way may have been committed.
			rounds, _, err := s.Rounds(t.Context(), RoundFilter{Node: testNode(n).ID}, Page{Limit: 1000})
			if err != nil {
				t.Fatal(err)
			}
			done[n] = len(rounds)
		}
		head := testkit.Must[fleet.AuditHead](t)(s.VerifyAudit(t.Context(), nil, nil))
		sum := 0
		for _, d := range done {
			sum += d
		}
		if int(head.ID) != sum {
			t.Errorf("life %d: %d audit entries of %d rounds", life, head.ID, sum)
		}
	}
}

const childEnv = "VIRT_TRUST_STORE_CHILD"

// The process that writes to SQLite is killed in the middle.
func TestSQLiteKilled(t *testing.T) {
	if path := os.Getenv(childEnv); path != "" {
		s := testkit.Must[*Store](t)(Open(t.Context(), "sqlite:"+path, Options{}))
		for i := 0; ; i++ {
			if err := step(t.Context(), s, testNode(0).ID, i); err != nil {
				t.Fatal(err)
			}
			fmt.Printf("done %d\n", i)
		}
	}
	path := filepath.Join(t.TempDir(), "verifier.db")
	s := testkit.Must[*Store](t)(Open(t.Context(), "sqlite:"+path, Options{}))
	addNodes(t, s, 1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(os.Args[0], "-test.run=^TestSQLiteKilled$")
	c.Env, c.WaitDelay = append(os.Environ(), childEnv+"="+path), time.Second
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out := testkit.Must[interface{ Read([]byte) (int, error) }](t)(c.StdoutPipe())
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	last := -1
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if n, err := fmt.Sscanf(lines.Text(), "done %d", &last); n != 1 || err != nil {
			t.Errorf("child: %s", lines.Text())
		}
		if last == 50 {
			if err := c.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := c.Wait(); err == nil || last < 50 {
		t.Fatalf("the child ended after round %d: %v", last, err)
	}
	s = testkit.Must[*Store](t)(Open(t.Context(), "sqlite:"+path, Options{}))
	defer s.Close()
	confirmed(t, s, testNode(0).ID, last)
	testkit.Must[fleet.AuditHead](t)(s.VerifyAudit(t.Context(), nil, nil))
}

// The disk is full: ErrUnavailable, nothing by half, reading goes on; and once
// there is room all goes on.
func TestSQLiteDiskFull(t *testing.T) {
	testkit.Root(t) // for a small file system
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=6m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 2<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	b := newBench(t, "sqlite:"+filepath.Join(dir, "verifier.db"))
	s := testkit.Must[*Store](t)(Open(t.Context(), b.dsn, Options{Now: b.clock.Now}))
	defer s.Close()
	b.Store = s
	n, m := b.addNode(1), b.addNode(2)
	var err error
	nonces := 0
	for ; err == nil; nonces++ {
		if nonces > 1000 {
			t.Fatal("the disk does not get full")
		}
		b.clock.pass(time.Second)
		nonce := fmt.Appendf(nil, "nonce %d", nonces)
		if _, err = s.IssueNonce(t.Context(), n.ID, nonce, b.clock.Now().Add(time.Hour)); err == nil {
			err = s.Do(t.Context(), func(tx *Tx) error {
				tx.Audit(fleet.AuditEntry{Actor: "a", Action: "b"})
				_, err := tx.CompleteRound(t.Context(), Completion{Node: n.ID, Nonce: nonce, Checkpoint: random(50_000), Result: b.testResult(n.ID, 1, appraise.Warning), Evidence: random(100_000)})
				return err
			})
		}
	}
	wantErr(t, err, ErrUnavailable)
	if !strings.Contains(err.Error(), "full") {
		t.Errorf("it does not say why: %v", err)
	}
	rounds, _, err := s.Rounds(t.Context(), RoundFilter{}, Page{Limit: 1000})
	if err != nil || len(rounds) != nonces-1 {
		t.Errorf("%d rounds of %d, %v", len(rounds), nonces-1, err)
	}
	if head := testkit.Must[fleet.AuditHead](t)(s.VerifyAudit(t.Context(), nil, nil)); int(head.ID) != len(rounds) {
		t.Errorf("%d audit entries of %d rounds", head.ID, len(rounds))
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	b.round(b.testResult(m.ID, 1, appraise.Affirming), nil)
	if v := testkit.Must[Removed](t)(s.Expire(t.Context(), b.clock.Now(), Retention{EvidenceBytes: 1})); v.Evidence != int64(len(rounds)) {
		t.Errorf("%+v", v)
	}
}

// One that fails, or panics, does not harm those that are committed with it.
func TestBatch(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		var wg sync.WaitGroup
		var panics atomic.Int32
		fail := errors.New("no")
		for i := range 60 {
			wg.Go(func() {
				defer func() {
					if p := recover(); p != nil {
						panics.Add(1)
					}
				}()
				err := b.Do(t.Context(), func(tx *Tx) error {
					if err := tx.AddToken(t.Context(), fleet.JoinToken{Digest: fmt.Sprint(i), Expires: b.clock.Now().Add(time.Hour)}); err != nil {
						return err
					}
					tx.Audit(fleet.AuditEntry{Subject: fmt.Sprint(i)})
					switch i % 3 {
					case 1:
						return fail
					case 2:
						panic(i)
					}
					return nil
				})
				if want := map[int]error{1: fail}[i%3]; !errors.Is(err, want) {
					t.Errorf("%d: %v", i, err)
				}
			})
		}
		wg.Wait()
		if all, _, err := b.Tokens(t.Context(), Page{Limit: 1000}); err != nil || len(all) != 20 || panics.Load() != 20 {
			t.Errorf("%d tokens, %d panics, %v", len(all), panics.Load(), err)
		}
		if head := testkit.Must[fleet.AuditHead](t)(b.VerifyAudit(t.Context(), nil, nil)); head.ID != 20 {
			t.Errorf("%d audit entries", head.ID)
		}
	})
}

func TestContexts(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := b.Node(ctx, "x")
		wantErr(t, err, ErrUnavailable)
		wantErr(t, err, context.Canceled)
		wantErr(t, b.Do(ctx, func(*Tx) error { t.Error("ran"); return nil }), context.Canceled)
		s := testkit.Must[*Store](t)(Open(t.Context(), b.dsn, Options{}))
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		wantErr(t, s.Do(t.Context(), func(*Tx) error { return nil }), ErrUnavailable)
		wantErr(t, s.Ping(t.Context()), ErrUnavailable)
	})
}

// Another process holds SQLite's lock for too long.
func TestSQLiteLocked(t *testing.T) {
	b := newBench(t, storetest.SQLite(t))
	b.Store = b.replica()
	other := b.replica()
	held, release := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		err := other.Do(t.Context(), func(*Tx) error { close(held); <-release; return nil })
		if err != nil {
			t.Error(err)
		}
	})
	<-held
	start := time.Now()
	err := b.Do(t.Context(), func(*Tx) error { return nil })
	wantErr(t, err, ErrUnavailable)
	if waited := time.Since(start); waited < sqliteBusy/2 {
		t.Errorf("gave up after %v", waited)
	}
	close(release)
	wg.Wait()
	if err := b.Do(t.Context(), func(*Tx) error { return nil }); err != nil {
		t.Error(err)
	}
}
