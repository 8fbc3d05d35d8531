package hosttpm

import (
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
)

func count(t testing.TB, h *Host, next, want uint64) {
	t.Helper()
	if v, err := h.Count(t.Context(), next, false); err != nil || v != want {
		t.Fatalf("Count gives %d, %v, want %d", v, err, want)
	}
}

func value(t testing.TB, h *Host) uint64 {
	t.Helper()
	v, err := h.Counter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestListCounter(t *testing.T) {
	t.Parallel()
	e, dir, other := startMade(t)
	h := open(t, e.Socket, dir)
	if v := value(t, h); v != 0 {
		t.Fatal(v)
	}
	first, err := h.FirstCount(t.Context())
	if err != nil || first == 0 || value(t, h) != 0 {
		t.Fatal(first, err)
	}
	count(t, h, first, first)
	count(t, h, first+1, first+1)
	before := h.Timings()
	count(t, h, first+2, first+2)
	for name, v := range h.Timings() {
		if n := v.Count - before[name].Count; n > 0 && (name != "NV_Increment" || n > 1) {
			t.Errorf("a raise sends %d %s", n, name)
		}
	}
	if v := value(t, h); v != first+2 {
		t.Fatal(v)
	}
	// What was counted is not counted again.
	h.counter.Store(nil)
	count(t, h, first+2, first+2)
	// Another process, another boot.
	h.Close()
	e.Reset()
	h = open(t, e.Socket, dir)
	if v := value(t, h); v != first+2 {
		t.Fatal(v)
	}
	// Other keys in the same TPM have a counter of their own.
	o := open(t, e.Socket, other)
	if v := value(t, o); v != 0 {
		t.Fatal(v)
	}
	next, err := o.FirstCount(t.Context())
	if err != nil || next == 0 {
		t.Fatal(next, err)
	}
	count(t, o, next, next)
	if v := value(t, h); v != first+2 {
		t.Fatal(v)
	}
}

// A counter that whoever has the owner's authorisation deletes, and even makes
// again, is never as low as it was.
func TestListCounterNeverGoesBack(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	first, err := h.FirstCount(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(3) {
		count(t, h, first+i, first+i)
	}
	p := h.counter.Load()
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	h.Close()
	tpm := e.Open()
	if _, err := (tpm2.NVUndefineSpace{AuthHandle: owner, NVIndex: counter{p.index, p.name}.handle()}).Execute(tpm); err != nil {
		t.Fatal(err)
	}
	again := open(t, e.Socket, dir)
	if v := value(t, again); v != 0 {
		t.Fatal(v)
	}
	if v, err := again.Count(t.Context(), first+1, false); err != nil || v <= first+2 {
		t.Fatalf("it is at %d, and was at %d: %v", v, first+2, err)
	}
}

// A connection that is cut before or after the TPM counted: it counts once.
func TestListCounterCountsOnce(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	p := startProxy(t, e)
	h := open(t, p.sock, dir)
	first, err := h.FirstCount(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	count(t, h, first, first)
	next := first
	for _, counted := range []bool{false, true} {
		next++
		cut := false
		p.set(func(x *proxied) error {
			if x.cc == tpm2.TPMCCNVIncrement && !cut {
				cut = true
				if counted {
					x.tpm(x.command)
				}
				return errCut
			}
			return nil
		})
		count(t, h, next, next)
		p.set(nil)
		if !cut {
			t.Fatal("nothing was cut")
		}
		if v := value(t, h); v != next {
			t.Fatalf("it is at %d, want %d", v, next)
		}
	}
}

// A raise waits while anything else is in the queue.
func TestListCounterGivesWay(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	first, err := h.FirstCount(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	count(t, h, first, first)
	release := make(chan struct{})
	var order []string
	busy := make(chan struct{})
	go do(t.Context(), h, func(*client) (struct{}, error) { close(busy); <-release; return struct{}{}, nil })
	<-busy
	raised := make(chan struct{})
	go func() {
		defer close(raised)
		count(t, h, first+1, first+1)
	}()
	time.Sleep(20 * time.Millisecond)
	done := make(chan struct{}, 3)
	for range 3 {
		go func() {
			do(t.Context(), h, func(*client) (struct{}, error) {
				order = append(order, "start")
				if h.Timings()["NV_Increment"].Count > 2 { // the probe's, and the first
					order = append(order, "after the raise")
				}
				return struct{}{}, nil
			})
			done <- struct{}{}
		}()
	}
	for len(h.queue) < 3 {
		time.Sleep(time.Millisecond)
	}
	close(release)
	for range 3 {
		<-done
	}
	<-raised
	if len(order) != 3 {
		t.Fatal(order)
	}
}

// What another program has put into our range is left alone.
func TestListCounterAmongOthers(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	tpm := e.Open()
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	define := func(index tpm2.TPMHandle) {
		t.Helper()
		n := counterTemplate(index)
		if _, err := (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(n)}).Execute(tpm); err != nil {
			t.Fatal(err)
		}
	}
	define(firstListIndex)
	define(firstListIndex + 2)
	define(lastListIndex + 1)
	h := open(t, e.Socket, dir)
	first, err := h.FirstCount(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	count(t, h, first, first)
	if p := h.counter.Load(); p.index != firstListIndex+1 {
		t.Errorf("it is at %#x", uint32(p.index))
	}
	h.counter.Store(nil)
	count(t, h, first+1, first+1)
	if v := value(t, h); v != first+1 {
		t.Error(v)
	}
}
