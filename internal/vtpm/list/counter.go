package list

import "time"

// An older list file is as well sealed as the newest. What tells them apart
// is a counter in the host's TPM, which only goes up. Each list carries the
// counter's value. To raise is to write the list with the value that comes next,
// durably, and then to count up: from that moment every older file is dead.

// Standing is how a list stands to the counter.
type Standing int

// The standings.
const (
	Current Standing = iota // written since the last raise
	Cut                     // a raise was cut off between file and counter: count up
	Older                   // there was a raise after it
	Ahead                   // the counter has gone back, or is another one
)

// Judge holds the value that a list carries against the counter's.
func Judge(list, counter uint64) Standing {
	switch {
	case list == counter:
		return Current
	case list < counter:
		return Older
	case list-counter == 1:
		return Cut
	}
	return Ahead
}

// Year is the one that Pace counts by.
const Year = 365 * 24 * time.Hour

// Burst is how many raises may come before their time.
const Burst = 200

// Pace bounds how often the counter is raised: a TPM's memory wears. In the
// long run there are no more than PerYear raises a year; Burst of them may be
// drawn in advance, so that a host with few of them never waits. All of it is one
// number, the time up to which raises are paid for, which the list carries: a
// restart gives nothing away.
type Pace struct {
	PerYear int // at least 1
	Paid    int64
}

func (p Pace) each() time.Duration { return Year / time.Duration(p.PerYear) }

// Wait is how long the next raise has to wait. A raise for a write of a running
// VM, of which a guest can make any number, leaves half of what may be drawn in
// advance to those that the host's own doings cause.
func (p Pace) Wait(now time.Time, guest bool) time.Duration {
	ahead := Burst
	if guest {
		ahead /= 2
	}
	limit := time.Duration(ahead) * p.each()
	return max(0, p.paid(now).Add(p.each()).Sub(now.Add(limit)))
}

// Left is how many raises may come at once.
func (p Pace) Left(now time.Time) int {
	return int((Burst*p.each() - max(0, p.paid(now).Sub(now))) / p.each())
}

// Raised pays for one raise.
func (p Pace) Raised(now time.Time) Pace {
	at := p.paid(now)
	if at.Before(now) {
		at = now
	}
	p.Paid = at.Add(p.each()).UnixMilli()
	return p
}

// paid is Paid, or the latest that it can be where the clock was put back.
func (p Pace) paid(now time.Time) time.Time {
	latest := now.Add(Burst * p.each())
	if at := time.UnixMilli(p.Paid); at.Before(latest) {
		return at
	}
	return latest
}
