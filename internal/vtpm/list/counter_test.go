package list

import (
	"math"
	"testing"
	"time"
)

func TestJudge(t *testing.T) {
	for _, tt := range []struct {
		list, counter uint64
		want          Standing
	}{
		{7, 7, Current},
		{8, 7, Cut},
		{6, 7, Older},
		{0, 7, Older}, // a list from before the counter
		{9, 7, Ahead},
		{math.MaxUint64, 0, Ahead},
		{0, math.MaxUint64, Older},
	} {
		if got := Judge(tt.list, tt.counter); got != tt.want {
			t.Errorf("%d at %d: %d, want %d", tt.list, tt.counter, got, tt.want)
		}
	}
}

// However hard a host or a guest tries, a year has no more raises than it may.
func TestPaceOfAYear(t *testing.T) {
	for _, guest := range []bool{false, true} {
		start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		p, now, n := Pace{PerYear: 20_000}, start, 0
		for now.Before(start.Add(Year)) {
			if w := p.Wait(now, guest); w > 0 {
				now = now.Add(w)
				continue
			}
			p = p.Raised(now)
			n++
			now = now.Add(time.Second) // virt-trustd is started anew each time: Paid is all that it knows
			p = Pace{PerYear: 20_000, Paid: p.Paid}
		}
		if n > 20_000+Burst || n < 19_990 {
			t.Errorf("%d raises in a year (guest: %v)", n, guest)
		}
	}
}

func TestPace(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	p := Pace{PerYear: 20_000}
	if p.Left(now) != Burst || p.Wait(now, false) != 0 || p.Wait(now, true) != 0 {
		t.Fatal(p.Left(now))
	}
	// A guest that writes all the time leaves the host its half.
	for p.Wait(now, true) == 0 {
		p = p.Raised(now)
	}
	if left := p.Left(now); left != Burst/2 || p.Wait(now, false) != 0 {
		t.Fatal(left)
	}
	for p.Wait(now, false) == 0 {
		p = p.Raised(now)
	}
	if p.Left(now) != 0 || p.Wait(now, false) != p.each() {
		t.Fatal(p.Left(now), p.Wait(now, false))
	}
	// A clock that is put back, or a list that claims anything, stops nothing for longer.
	p.Paid = math.MaxInt64
	for _, now := range []time.Time{now, now.AddDate(-30, 0, 0)} {
		if w := p.Wait(now, false); w != p.each() {
			t.Error(w)
		}
	}
	p.Paid = math.MinInt64
	if p.Left(now) != Burst {
		t.Error(p.Left(now))
	}
}
