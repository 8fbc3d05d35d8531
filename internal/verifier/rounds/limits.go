package rounds

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/ca"
)

const (
	maxJSON      = 64 << 10 // bytes of a request's body in JSON
	maxAddresses = 4096     // that are remembered
	maxRatio     = 64       // of gzip: logs make 3 to 10, a bomb 1000
	freeRatio    = 1 << 20  // bytes that are read before the ratio is looked at
)

// rates bounds what one of many may ask, by any key. When there are too many to
// remember, all are forgotten; a bound for all together stays.
type rates struct {
	mu        sync.Mutex
	perMinute int
	all       *rate.Limiter
	by        map[string]*rate.Limiter
}

func newRates(perMinute int) *rates {
	per := rate.Limit(float64(perMinute) / 60)
	return &rates{perMinute: perMinute, all: rate.NewLimiter(100*per, 100*perMinute), by: map[string]*rate.Limiter{}}
}

func (a *rates) allow(key string, now time.Time) bool {
	_, ok := a.take(key, now)
	return ok
}

// take takes one from the rate of a key, and gives how it is given back, at once.
func (a *rates) take(key string, now time.Time) (back func(), ok bool) {
	a.mu.Lock()
	l := a.by[key]
	if l == nil {
		if len(a.by) >= maxAddresses {
			clear(a.by)
		}
		l = rate.NewLimiter(rate.Limit(float64(a.perMinute)/60), a.perMinute)
		a.by[key] = l
	}
	a.mu.Unlock()
	one := l.ReserveN(now, 1)
	back = func() { one.CancelAt(now) }
	if one.DelayFrom(now) > 0 || !a.all.AllowN(now, 1) {
		back()
		return nil, false
	}
	return back, true
}

// doubtRate is how many times as often an address may ask that has asked too often,
// if each request shows that it is not just anybody's: what that costs to find out is
// bounded too.
const doubtRate = 10

// charge is who pays for a request without a certificate: its address, until it
// shows by whom it is, because many nodes may have one address, and others beside
// them.
type charge struct {
	back func() // to the address
	must bool   // the address has nothing left: it has to show that
}

type chargeKey struct{}

// charged lets a request in: paid by a node, if that shows its certificate, or by its
// address.
func (h *Handler) charged(r *http.Request) (*http.Request, error) {
	now := h.Now()
	if r.TLS != nil {
		if id, err := h.CA.VerifyNode(r.TLS.VerifiedChains, h.now()); err == nil {
			if !h.proven.allow("certificate "+id.Node, now) {
				return nil, tooMany
			}
			return r, nil
		}
	}
	c := &charge{}
	var ok bool
	if c.back, ok = h.anonymous.take(source(r), now); !ok {
		if c.must = true; !h.doubtful.allow(source(r), now) {
			return nil, tooMany
		}
		c.back = func() {}
	}
	return r.WithContext(context.WithValue(r.Context(), chargeKey{}, c)), nil
}

// pays says by whom a request is, as it has shown: a join token that is good, a node
// that is known, a challenge that was given out; "" for nobody. That pays for it,
// unless it has paid too often.
func (h *Handler) pays(r *http.Request, key string) error {
	c, ok := r.Context().Value(chargeKey{}).(*charge)
	switch {
	case !ok:
	case key != "" && h.proven.allow(key, h.Now()):
		c.back()
	case c.must:
		return tooMany
	}
	return nil
}

// budget is bytes that may be held at once.
type budget struct {
	mu   sync.Mutex
	left int64
}

func (b *budget) take(n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n > b.left {
		return false
	}
	b.left -= n
	return true
}

func (b *budget) give(n int64) {
	b.mu.Lock()
	b.left += n
	b.mu.Unlock()
}

// places is how many Evidences are appraised at once. Those who come then wait in
// the order in which they came: when more comes than the processors can do, the
// first are done in time, instead of all of them too late.
type places chan struct{}

// patience is how long Evidence waits for a place, well within the time that an
// agent waits for its answer.
const patience = 15 * time.Second

// take reports errFull after so long without a place, or the context's error.
func (p places) take(ctx context.Context, patience time.Duration) error {
	select {
	case p <- struct{}{}:
		return nil
	default:
	}
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case p <- struct{}{}:
		if err := ctx.Err(); err != nil { // both came at once
			p.give()
			return err
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return errFull
	}
}

func (p places) give() { <-p }

// readJSON reads a body into v. Fields that are not known are left out: an agent
// may be newer.
func readJSON(r *http.Request, v any) error {
	b, err := io.ReadAll(io.LimitReader(r.Body, maxJSON+1))
	switch {
	case err != nil:
		return refuse(ca.Malformed, "the request's body did not come whole")
	case len(b) > maxJSON:
		return refuse(ca.TooLarge, "the request's body is longer than %d bytes", maxJSON)
	case len(b) == 0:
		return nil
	}
	if err := json.Unmarshal(b, v); err != nil {
		return refuse(ca.Malformed, "the request's body: %v", err)
	}
	return nil
}

// counted counts what was read.
type counted struct {
	io.Reader
	n int64
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	c.n += int64(n)
	return n, err
}

var unzippers sync.Pool

// readEvidence reads a body of Evidence, unpacked, within all limits. What it holds
// is taken from the budget, and given back by the caller: held says how much.
func (h *Handler) readEvidence(r *http.Request) (body []byte, held int64, err error) {
	if r.Header.Get("Content-Type") != report.MediaType {
		return nil, 0, refuse(ca.Malformed, "Evidence of type %.80q; %s is taken", r.Header.Get("Content-Type"), report.MediaType)
	}
	if r.ContentLength > report.MaxEvidence {
		return nil, 0, refuse(ca.TooLarge, "Evidence of %d bytes; at most %d are taken", r.ContentLength, report.MaxEvidence)
	}
	packed := &counted{Reader: io.LimitReader(r.Body, report.MaxEvidence+1)}
	var in io.Reader = packed
	zipped := false
	switch e := r.Header.Get("Content-Encoding"); e {
	case "", "identity":
	case "gzip":
		zipped = true
		z, _ := unzippers.Get().(*gzip.Reader)
		if z == nil {
			z = new(gzip.Reader)
		}
		if err := z.Reset(packed); err != nil {
			return nil, 0, refuse(ca.Malformed, "Evidence that is not gzip: %v", err)
		}
		z.Multistream(false)
		defer unzippers.Put(z)
		in = z
	default:
		return nil, 0, refuse(ca.Malformed, "Evidence encoded as %.40q; gzip is taken", e)
	}
	size := int64(64 << 10)
	if !zipped && r.ContentLength > 0 {
		size = r.ContentLength + 1 // room to see the end
	}
	if !h.budget.take(size) {
		return nil, 0, errFull
	}
	held = size
	body = make([]byte, 0, size)
	for {
		n, err := in.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		switch {
		case len(body) > report.MaxEvidence:
			return nil, held, refuse(ca.TooLarge, "Evidence of more than %d bytes", report.MaxEvidence)
		case zipped && len(body) > freeRatio && int64(len(body)) > maxRatio*packed.n:
			return nil, held, refuse(ca.TooLarge, "Evidence that gzip made %d times smaller, which no Evidence is", int64(len(body))/max(packed.n, 1))
		case errors.Is(err, io.EOF):
			return body, held, nil
		case err != nil:
			return nil, held, refuse(ca.Malformed, "the Evidence did not come whole: %v", err)
		}
		if len(body) < cap(body) {
			continue
		}
		// Both, the old and the new, are held for a moment.
		bigger := min(2*int64(cap(body)), report.MaxEvidence+1)
		if !h.budget.take(bigger) {
			return nil, held, errFull
		}
		next := make([]byte, len(body), bigger)
		copy(next, body)
		body = next
		h.budget.give(held)
		held = bigger
	}
}

var errFull = &ca.Refusal{Code: ca.Failed, What: "too much Evidence is at work; try again"}
