package page

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
)

// Open pages follow what comes in: GET /live is a stream of Server-Sent Events
// (HTML, 9.2), one whenever something changed that a page could show, with a
// mark of the state and nothing else. live.js then fetches its own page anew and
// takes over what differs. However many pages are open, the store is asked once
// an interval, and not at all while none is.
type live struct {
	mu    sync.Mutex
	subs  map[chan string]struct{}
	mark  string
	stop  context.CancelFunc
	every time.Duration // 2 s where 0; tests have less time
}

const (
	liveEvery   = 2 * time.Second
	liveBeat    = 20 * time.Second // a comment, so that dead connections are found
	liveTime    = 10 * time.Minute // then the browser comes again, and is asked who it is
	maxLive     = 500
	liveTimeout = 10 * time.Second // of one write
)

// serveLive is the stream of one page.
func (p *Page) serveLive(w http.ResponseWriter, r *http.Request) {
	if operate.ActorOf(r.Context()).Role < operate.Reader {
		http.Error(w, "log in first", http.StatusUnauthorized)
		return
	}
	c, ok := p.subscribe()
	if !ok {
		w.Header().Set("Retry-After", "60")
		http.Error(w, "too many pages follow already; this one is loaded anew by hand", http.StatusServiceUnavailable)
		return
	}
	defer p.unsubscribe(c)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no")
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Time{}) // nothing more is to be read
	send := func(format string, args ...any) bool {
		// A server without deadlines is a test's recorder, which blocks on nothing.
		_ = rc.SetWriteDeadline(time.Now().Add(liveTimeout))
		if _, err := fmt.Fprintf(w, format, args...); err != nil {
			return false
		}
		return rc.Flush() == nil
	}
	beat, end := time.NewTicker(liveBeat), time.NewTimer(liveTime)
	defer beat.Stop()
	defer end.Stop()
	if !send("retry: 5000\n\n") {
		return
	}
	for ok := true; ok; {
		select {
		case mark := <-c:
			ok = send("event: state\ndata: %s\n\n", mark)
		case <-beat.C:
			ok = send(": still here\n\n")
		case <-end.C:
			return
		case <-r.Context().Done():
			return
		}
	}
}

// subscribe gives a channel on which marks come, the present one at once.
func (p *Page) subscribe() (chan string, bool) {
	l := &p.live
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.subs) >= maxLive {
		return nil, false
	}
	if l.subs == nil {
		l.subs = map[chan string]struct{}{}
	}
	c := make(chan string, 1)
	l.subs[c] = struct{}{}
	if l.mark != "" {
		c <- l.mark
	}
	if l.stop == nil {
		ctx, cancel := context.WithCancel(context.Background())
		l.stop = cancel
		go p.watch(ctx, max(l.every, 0))
	}
	return c, true
}

func (p *Page) unsubscribe(c chan string) {
	l := &p.live
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.subs, c)
	if len(l.subs) == 0 && l.stop != nil {
		l.stop()
		l.stop, l.mark = nil, ""
	}
}

// watch asks the store as long as someone listens. A store that does not answer
// is a change too: the pages then show that.
func (p *Page) watch(ctx context.Context, every time.Duration) {
	if every == 0 {
		every = liveEvery
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		mark, err := p.state(ctx)
		if err != nil {
			mark = "unavailable"
		}
		if ctx.Err() != nil {
			return
		}
		p.publish(ctx, mark)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (p *Page) publish(ctx context.Context, mark string) {
	l := &p.live
	l.mu.Lock()
	defer l.mu.Unlock()
	if ctx.Err() != nil || mark == l.mark {
		return
	}
	l.mark = mark
	for c := range l.subs {
		select {
		case <-c: // one that was not taken yet is old now
		default:
		}
		c <- mark
	}
}

// state is a mark of all that pages show: the newest round and what was done
// last, and how many stand where, which changes as results expire. A round that
// only prolongs the one before changes nothing.
func (p *Page) state(ctx context.Context) (string, error) {
	sum, err := p.Store.Summary(ctx)
	if err != nil {
		return "", err
	}
	rounds, _, err := p.Store.Rounds(ctx, store.RoundFilter{}, store.Page{Limit: 1})
	if err != nil {
		return "", err
	}
	head, err := p.Store.AuditHead(ctx)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	for _, r := range rounds {
		fmt.Fprintln(h, "round", r.ID)
	}
	fmt.Fprintln(h, "audit", head.ID, head.Hash, "problems", sum.Problems)
	counts(h, "nodes", sum.Nodes)
	counts(h, "hosts", sum.ByTier)
	counts(h, "vms", sum.VMs)
	return hex.EncodeToString(h.Sum(nil)[:12]), nil
}

func counts[K ~string | ~int8](w io.Writer, what string, m map[K]int) {
	for _, k := range sortedKeys(m) {
		fmt.Fprintln(w, what, k, m[k])
	}
}

func sortedKeys[K ~string | ~int8, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
