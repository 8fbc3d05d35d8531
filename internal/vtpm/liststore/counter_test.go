package liststore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"virt-trust/internal/vtpm/list"
)

// fakeCounter is a TPM's counter. A new one begins above every one before it.
type fakeCounter struct {
	mu     sync.Mutex
	now    uint64 // 0: not made
	most   uint64
	skew   uint64 // by which FirstCount is wrong
	counts int
	err    error // of Count
	half   bool  // and it counts all the same
	before func(next uint64)
}

func (c *fakeCounter) Counter(context.Context) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now, nil
}

func (c *fakeCounter) FirstCount(context.Context) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.most++
	return c.most + 1, nil
}

func (c *fakeCounter) Count(_ context.Context, next uint64, _ bool) (uint64, error) {
	if c.before != nil {
		c.before(next)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil && !c.half {
		return 0, c.err
	}
	switch {
	case c.now == 0:
		c.now = c.most + 1 + c.skew
	case c.now < next:
		c.now++
	}
	c.most = max(c.most, c.now)
	c.counts++
	return c.now, c.err
}

func (c *fakeCounter) delete() { c.now = 0 }

func counted(c *fakeCounter) Rollback {
	return Rollback{Counter: c, PerYear: 20_000, Now: time.Now}
}

func openCounted(t testing.TB, dir string, r Rollback) (*Store, error) {
	t.Helper()
	return Open(t.Context(), dir, t.TempDir(), key, r) // the run-time folder of another boot
}

func newCounted(t testing.TB) (*Store, *fakeCounter, string) {
	t.Helper()
	c, dir := &fakeCounter{most: 40}, t.TempDir()
	s, err := openCounted(t, dir, counted(c))
	if err != nil {
		t.Fatal(err)
	}
	return s, c, dir
}

func contents(t testing.TB, dir string) []byte {
	t.Helper()
	b, err := os.ReadFile(Path(dir))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func putBack(t testing.TB, dir string, b []byte) {
	t.Helper()
	if err := os.WriteFile(Path(dir), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func commit(t testing.TB, s *Store, id string) {
	t.Helper()
	if err := s.Commit(put(id)); err != nil {
		t.Fatal(err)
	}
}

func raise(t testing.TB, s *Store) {
	t.Helper()
	if err := s.Raise(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if s.Exposed() {
		t.Fatal("raised, and still exposed")
	}
}

// After a raise every older list is refused, in every later boot.
func TestOlderListsAreDead(t *testing.T) {
	s, c, dir := newCounted(t)
	var older [][]byte
	for i := range 5 {
		older = append(older, contents(t, dir))
		commit(t, s, fmt.Sprint(i))
		older = append(older, contents(t, dir))
		commit(t, s, fmt.Sprint(i, "b"))
		if !s.Exposed() {
			t.Fatal("committed, and not exposed")
		}
		raise(t, s)
	}
	newest := contents(t, dir)
	for i, b := range older {
		putBack(t, dir, b)
		if _, err := openCounted(t, dir, counted(c)); !errors.Is(err, ErrRolledBack) {
			t.Fatalf("list %d of %d: %v", i, len(older), err)
		}
	}
	putBack(t, dir, newest)
	n, err := openCounted(t, dir, counted(c))
	if err != nil || len(n.All()) != 10 {
		t.Fatal(err)
	}
	// A raise that has nothing to do costs nothing.
	raise(t, n)
	before := c.counts
	raise(t, n)
	if c.counts != before {
		t.Fatal("counted for nothing")
	}
}

// Where each commit waits for its raise, the list before it is dead at once.
func TestEach(t *testing.T) {
	c, dir := &fakeCounter{}, t.TempDir()
	r := counted(c)
	r.Each = true
	s, err := openCounted(t, dir, r)
	if err != nil {
		t.Fatal(err)
	}
	older := contents(t, dir)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if err := s.Commit(put(fmt.Sprint(i))); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if s.Exposed() {
		t.Fatal("exposed")
	}
	if err := s.Rewrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := openCounted(t, dir, r); err != nil || len(n.All()) != 8 {
		t.Fatal(err)
	}
	putBack(t, dir, older)
	if _, err := openCounted(t, dir, r); !errors.Is(err, ErrRolledBack) {
		t.Fatal(err)
	}
}

// Power may go before and after every step of every raise: what is then on the
// disk opens, with all that was committed.
func TestRaiseCutOff(t *testing.T) {
	type moment struct {
		file    []byte
		counter *fakeCounter
		want    int
	}
	for _, skew := range []uint64{0, 3} {
		c, dir := &fakeCounter{most: 7, skew: skew}, t.TempDir()
		var moments []moment
		records := 0
		take := func() {
			b, err := os.ReadFile(Path(dir))
			if err != nil {
				t.Fatal(err)
			}
			moments = append(moments, moment{b, &fakeCounter{now: c.now, most: c.most}, records})
		}
		c.before = func(uint64) { take() }
		s, err := openCounted(t, dir, counted(c))
		if err != nil {
			t.Fatal(err)
		}
		take()
		for i := range 3 {
			records++
			commit(t, s, fmt.Sprint(i))
			take()
			raise(t, s)
			take()
		}
		for i, m := range moments {
			d := t.TempDir()
			putBack(t, d, m.file)
			n, err := openCounted(t, d, counted(m.counter))
			if err != nil || len(n.All()) != m.want {
				t.Fatalf("skew %d, moment %d of %d: %v", skew, i, len(moments), err)
			}
			raise(t, n)
			if err := n.Commit(put("x")); err != nil || n.Raise(t.Context(), true) != nil {
				t.Fatal(err)
			}
		}
	}
}

// A TPM that fails, before or after it counted, costs nothing but time.
func TestCounterFails(t *testing.T) {
	for _, half := range []bool{false, true} {
		s, c, dir := newCounted(t)
		older := contents(t, dir)
		c.err, c.half = errors.New("no answer"), half
		commit(t, s, "a")
		if err := s.Raise(t.Context(), false); err == nil || !s.Exposed() {
			t.Fatal(err)
		}
		commit(t, s, "b")
		if err := s.Raise(t.Context(), false); err == nil {
			t.Fatal("no error")
		}
		if !half {
			again := &fakeCounter{now: c.now, most: c.most}
			if n, err := openCounted(t, dir, counted(again)); err != nil || len(n.All()) != 2 {
				t.Fatal(err)
			}
		}
		c.err = nil
		raise(t, s)
		if n, err := openCounted(t, dir, counted(c)); err != nil || len(n.All()) != 2 {
			t.Fatal(err)
		}
		putBack(t, dir, older)
		if _, err := openCounted(t, dir, counted(c)); !errors.Is(err, ErrRolledBack) {
			t.Fatal(err)
		}
	}
}

// A list of the version before is counted from its first opening on.
func TestListOfTheVersionBefore(t *testing.T) {
	c, dir := &fakeCounter{}, t.TempDir()
	s, err := openCounted(t, dir, Rollback{})
	if err != nil {
		t.Fatal(err)
	}
	commit(t, s, "a")
	older := contents(t, dir)
	s, err = openCounted(t, dir, counted(c))
	if err != nil || s.Get("a") == nil || s.Counter() == 0 || s.Counter() != c.now {
		t.Fatal(err)
	}
	putBack(t, dir, older)
	if _, err := openCounted(t, dir, counted(c)); !errors.Is(err, ErrRolledBack) {
		t.Fatal(err)
	}
}

// Whoever deletes everything does not get an empty list.
func TestEverythingDeleted(t *testing.T) {
	_, c, dir := newCounted(t)
	os.Remove(Path(dir))
	os.Remove(filepath.Join(dir, markerName))
	if _, err := openCounted(t, dir, counted(c)); !errors.Is(err, ErrMissing) {
		t.Fatal(err)
	}
}

// A counter that was deleted begins above what it was; one of a TPM that was
// itself put back is behind.
func TestOtherCounter(t *testing.T) {
	s, c, dir := newCounted(t)
	commit(t, s, "a")
	raise(t, s)
	behind := fakeCounter{now: c.now - 2, most: c.most}
	if _, err := openCounted(t, dir, counted(&behind)); !errors.Is(err, ErrCounter) {
		t.Fatal(err)
	}
	c.delete()
	for range 2 {
		if _, err := openCounted(t, dir, counted(c)); !errors.Is(err, ErrCounter) && !errors.Is(err, ErrRolledBack) {
			t.Fatal(err)
		}
	}
	for _, c := range []*fakeCounter{c, &behind} {
		n, err := Accept(t.Context(), dir, t.TempDir(), key, counted(c))
		if err != nil || n.Get("a") == nil {
			t.Fatal(err)
		}
		if n, err = openCounted(t, dir, counted(c)); err != nil || n.Get("a") == nil {
			t.Fatal(err)
		}
	}
}

// The admin's word makes an older list the newest, and what was newer dead.
func TestAccept(t *testing.T) {
	s, c, dir := newCounted(t)
	commit(t, s, "a")
	raise(t, s)
	older := contents(t, dir)
	commit(t, s, "b")
	raise(t, s)
	newer, run := contents(t, dir), t.TempDir()
	putBack(t, dir, older)
	if _, err := Open(t.Context(), dir, run, key, counted(c)); !errors.Is(err, ErrRolledBack) {
		t.Fatal(err)
	}
	n, err := Accept(t.Context(), dir, run, key, counted(c))
	if err != nil || n.Get("a") == nil || n.Get("b") != nil || n.Exposed() {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), dir, run, key, counted(c)); err != nil {
		t.Fatal(err)
	}
	for _, b := range [][]byte{older, newer} {
		putBack(t, dir, b)
		if _, err := openCounted(t, dir, counted(c)); !errors.Is(err, ErrRolledBack) {
			t.Fatal(err)
		}
	}
	os.Remove(Path(dir))
	if _, err := Accept(t.Context(), dir, run, key, counted(c)); !errors.Is(err, ErrMissing) {
		t.Fatal(err)
	}
	n, err = Rebuild(t.Context(), dir, run, key, counted(c), s.All())
	if err != nil || len(n.All()) != 2 {
		t.Fatal(err)
	}
	if _, err := openCounted(t, dir, counted(c)); err != nil {
		t.Fatal(err)
	}
}

// What has been paid for raises outlives the process.
func TestPaceIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, c, dir := newCounted(t)
		left := s.Pace().Left(time.Now())
		for i := range 5 {
			commit(t, s, fmt.Sprint(i))
			raise(t, s)
		}
		s, err := openCounted(t, dir, counted(c))
		if err != nil {
			t.Fatal(err)
		}
		if n := s.Pace().Left(time.Now()); n != left-5 || left != list.Burst-1 {
			t.Fatal(left, n)
		}
	})
}

func TestCommitsWhileRaising(t *testing.T) {
	s, c, dir := newCounted(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 50 {
			if err := s.Raise(context.Background(), false); err != nil {
				t.Error(err)
			}
		}
	}()
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if err := s.Commit(put(fmt.Sprint(i))); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	<-done
	raise(t, s)
	if n, err := openCounted(t, dir, counted(c)); err != nil || len(n.All()) != 20 {
		t.Fatal(err)
	}
}
