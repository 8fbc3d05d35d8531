package page

import (
	"bufio"
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/page/pagetest"
)

// follow opens the stream and gives its marks.
func follow(t *testing.T, ctx context.Context, url string) (*http.Response, <-chan string) {
	t.Helper()
	r, err := http.NewRequestWithContext(ctx, "GET", url+"/live", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = res.Body.Close() })
	c := make(chan string, 10)
	go func() {
		defer close(c)
		for s := bufio.NewScanner(res.Body); s.Scan(); {
			if d, ok := strings.CutPrefix(s.Text(), "data: "); ok {
				c <- d
			}
		}
	}()
	return res, c
}

func next(t *testing.T, c <-chan string) string {
	t.Helper()
	select {
	case m, ok := <-c:
		if !ok {
			t.Fatal("the stream ended")
		}
		return m
	case <-time.After(10 * time.Second):
		t.Fatal("no event came")
	}
	return ""
}

func TestLive(t *testing.T) {
	h := newFleet(t)
	h.Page.live.every = 20 * time.Millisecond
	srv := httptest.NewServer(h.Page)
	t.Cleanup(srv.Close)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	res, marks := follow(t, ctx, srv.URL)
	if got := res.Header.Get("Content-Type"); got != "text/event-stream" {
		t.Error(got)
	}
	seen := map[string]bool{next(t, marks): true}
	_, second := follow(t, ctx, srv.URL)
	if m := next(t, second); !seen[m] {
		t.Errorf("the second page begins with another mark, %s", m)
	}
	step := func(what string, f func()) {
		t.Helper()
		f()
		m := next(t, marks)
		if seen[m] {
			t.Errorf("%s: an old mark", what)
		}
		seen[m] = true
		if n := next(t, second); n != m {
			t.Errorf("%s: the second page got another mark", what)
		}
	}
	step("a round with something new", func() {
		r := pagetest.Result(pagetest.Good, "kvm-01", pagetest.VM(pagetest.GoodVM, "renamed"))
		r.Host.Tier = appraise.Warning
		if _, err := h.Build.Round(t.Context(), r, h.Now()); err != nil {
			t.Fatal(err)
		}
	})
	step("a decision", func() { h.as(operator).post("/nodes/"+pagetest.Waiting+"/approve", nil) })
	step("results that expire", func() { h.pass(5 * time.Minute) })
	cancel()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		h.Page.live.mu.Lock()
		n, stopped := len(h.Page.live.subs), h.Page.live.stop == nil
		h.Page.live.mu.Unlock()
		if n == 0 && stopped {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d still follow; stopped %v", n, stopped)
		}
	}
}

func TestLiveBounds(t *testing.T) {
	h := newHarness(t)
	if w := h.as(operate.Actor{}).do("GET", "/live", nil); w.Code != http.StatusUnauthorized {
		t.Errorf("nobody: %d", w.Code)
	}
	var all []chan string
	for range maxLive {
		c, ok := h.Page.subscribe()
		if !ok {
			t.Fatal(len(all))
		}
		all = append(all, c)
	}
	if w := h.as(reader).do("GET", "/live", nil); w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" {
		t.Errorf("one too many: %d", w.Code)
	}
	for _, c := range all {
		h.Page.unsubscribe(c)
	}
	if h.Page.live.stop != nil {
		t.Error("the store is asked though nobody follows")
	}
}
