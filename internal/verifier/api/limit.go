package api

import (
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// limits are rates by key: a person, an address. A limiter that is full again is
// forgotten, so that there are never more than those of the last minute, and
// never more than most: beyond that all keys share one.
type limits struct {
	perMinute int
	most      int

	mu    sync.Mutex
	by    map[string]*rate.Limiter
	rest  *rate.Limiter
	swept time.Time
}

const mostKeys = 100_000

func newLimits(perMinute int) *limits {
	l := &limits{perMinute: perMinute, most: mostKeys, by: map[string]*rate.Limiter{}}
	l.rest = l.limiter()
	return l
}

func (l *limits) limiter() *rate.Limiter {
	return rate.NewLimiter(rate.Limit(float64(l.perMinute)/60), l.perMinute)
}

func (l *limits) of(key string, now time.Time) *rate.Limiter {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.swept) > time.Minute {
		l.swept = now
		for k, r := range l.by {
			if r.TokensAt(now) >= float64(l.perMinute) {
				delete(l.by, k)
			}
		}
	}
	r := l.by[key]
	if r == nil {
		if len(l.by) >= l.most {
			return l.rest
		}
		r = l.limiter()
		l.by[key] = r
	}
	return r
}

// allow takes one from the key's rate, or says how long to wait.
func (l *limits) allow(key string, now time.Time) (time.Duration, bool) {
	r := l.of(key, now).ReserveN(now, 1)
	if wait := r.DelayFrom(now); wait > 0 {
		r.CancelAt(now)
		return wait, false
	}
	return 0, true
}

// spent says whether the key's rate is used up, and takes nothing.
func (l *limits) spent(key string, now time.Time) bool { return l.of(key, now).TokensAt(now) < 1 }

// Source is whom a request is counted for that has no identity: its address; of
// IPv6 its network, because who has one address there has 2^64.
func Source(r *http.Request) string {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return "unknown"
	}
	a := ap.Addr().Unmap().WithZone("")
	if a.Is4() {
		return a.String()
	}
	p, _ := a.Prefix(64) // of an IPv6 address: no error
	return p.String()
}
