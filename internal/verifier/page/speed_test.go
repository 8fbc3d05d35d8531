package page

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/page/pagetest"
	"virt-trust/internal/verifier/store"
)

// large fills a store with n hosts of three VMs; one host in a hundred has
// something wrong.
func large(t testing.TB, n int) *harness {
	t.Helper()
	h := newHarness(t)
	ctx := context.Background()
	results := make([]appraise.Result, n)
	err := h.Store.Do(ctx, func(tx *store.Tx) error {
		for i := range n {
			node := h.Build.Node(pagetest.ID("large", i), fmt.Sprintf("kvm-%05d.example.net", i), fleet.Active)
			if err := tx.PutNode(ctx, node); err != nil {
				return err
			}
			r := pagetest.Result(node.ID, node.Name)
			for j := range 3 {
				r.VMs = append(r.VMs, appraise.VM{UUID: pagetest.ID("large vm", 10*i+j), Name: fmt.Sprintf("vm-%d-%d", i, j), Running: true, Appraisal: appraise.Appraisal{Tier: appraise.Affirming}})
			}
			if i%100 == 7 {
				bad := appraise.Reason{Code: appraise.CodeVMPCR, Tier: appraise.Contraindicated, What: "PCR 4 is another", PCR: at(uint(4))}
				r.VMs[1].Tier, r.VMs[1].Reasons = bad.Tier, []appraise.Reason{bad}
			}
			r.Received, r.Expires = h.Now(), h.Now().Add(time.Minute)
			results[i] = r
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	work, failed := make(chan *appraise.Result), make(chan error, n)
	var wg sync.WaitGroup
	for range 64 { // the store commits what comes at one time together
		wg.Go(func() {
			for r := range work {
				nonce := []byte("0123456789abcdef" + r.Node)
				if _, err := h.Store.IssueNonce(ctx, r.Node, nonce, h.Now().Add(time.Minute)); err != nil {
					failed <- err
					continue
				}
				if _, err := h.Store.CompleteRound(ctx, store.Completion{Node: r.Node, Nonce: nonce, Result: r}); err != nil {
					failed <- err
				}
			}
		})
	}
	for i := range results {
		work <- &results[i]
	}
	close(work)
	wg.Wait()
	select {
	case err := <-failed:
		t.Fatal(err)
	default:
	}
	return h
}

// counting counts what is asked of a store.
type counting struct {
	Reader
	n atomic.Int64
}

func (c *counting) Summary(ctx context.Context) (fleet.Summary, error) {
	c.n.Add(1)
	return c.Reader.Summary(ctx)
}

func (c *counting) Nodes(ctx context.Context, f store.NodeFilter, p store.Page) ([]fleet.Status, string, error) {
	c.n.Add(1)
	return c.Reader.Nodes(ctx, f, p)
}

func (c *counting) Status(ctx context.Context, id string) (fleet.Status, error) {
	c.n.Add(1)
	return c.Reader.Status(ctx, id)
}

func (c *counting) Result(ctx context.Context, node string) (*appraise.Result, error) {
	c.n.Add(1)
	return c.Reader.Result(ctx, node)
}

func (c *counting) VMs(ctx context.Context, f store.VMFilter, p store.Page) ([]fleet.VM, string, error) {
	c.n.Add(1)
	return c.Reader.VMs(ctx, f, p)
}

// hosts is how many the fleet of TestLargeFleet has: 10,000 where
// VIRT_TRUST_FLEET says so, which takes a minute to fill.
func hosts(t *testing.T) int {
	if s := os.Getenv("VIRT_TRUST_FLEET"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return 1000
}

// TestLargeFleet: however many hosts there are, a page asks the store for a bounded
// number of things and has a bounded size, and it costs little time and memory.
func TestLargeFleet(t *testing.T) {
	begin := time.Now()
	h := large(t, hosts(t))
	t.Logf("filled with %d hosts in %s", hosts(t), time.Since(begin).Round(time.Millisecond))
	c := &counting{Reader: h.Store}
	h.Page.Store = c
	for _, path := range []string{"/", "/?tier=affirming", "/?q=kvm-00999", "/vms", "/vms?tier=contraindicated", "/approvals", "/nodes/" + pagetest.ID("large", 7)} {
		c.n.Store(0)
		h.get(path)
		asked := c.n.Load()
		const n = 5
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		least, size := time.Hour, 0
		for range n {
			start := time.Now()
			size = len(h.get(path))
			least = min(least, time.Since(start))
		}
		runtime.ReadMemStats(&after)
		each := (after.TotalAlloc - before.TotalAlloc) / n
		t.Logf("%-28.28s %6.1f ms, %4d KiB of page, %5d KiB allocated, %d queries", path, float64(least.Microseconds())/1000, size>>10, each>>10, asked)
		// The time is generous: machines do other things meanwhile.
		if asked > 80 || size > 300<<10 || each > 32<<20 || least > 2*time.Second {
			t.Errorf("%s: %d queries, %s, %d bytes, %d allocated", path, asked, least, size, each)
		}
	}
}

func BenchmarkFleetPage(b *testing.B) {
	h := large(b, 10_000)
	b.ReportAllocs()
	for b.Loop() {
		w := httptest.NewRecorder()
		h.Page.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
		if w.Code != http.StatusOK {
			b.Fatal(w.Code)
		}
	}
}
