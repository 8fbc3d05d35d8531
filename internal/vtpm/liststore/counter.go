package liststore

import (
	"context"
	"fmt"
	"time"

	"virt-trust/internal/vtpm/list"
)

// A list is the newest while the counter stands at the value that it carries.
// Commits carry the value on; a raise writes the list with the next one and then
// counts up. What was written between two raises could be exchanged for one
// another: that is the window, which ends with the next raise.
//
// Of a raise that is cut off in between the counter is one behind, and Open
// counts. A first list carries the value at which the counter will begin, so
// that the same holds for it.

// Counter is a number that is not on the disk and only goes up.
type Counter interface {
	// Counter gives the number, 0 where it was not made yet.
	Counter(ctx context.Context) (uint64, error)
	// FirstCount foretells, as a rule rightly, what it will be when it is made.
	FirstCount(ctx context.Context) (uint64, error)
	// Count brings it to next, or makes it, and gives what it is then. Asked again
	// after an error it counts once.
	Count(ctx context.Context, next uint64, urgent bool) (uint64, error)
}

// Rollback says how older lists are told from the newest.
type Rollback struct {
	Counter Counter // nil: by the run-time folder alone, as in tests
	Each    bool    // every commit waits for its raise
	PerYear int     // see list.Pace
	Now     func() time.Time
	Stirred func() // called, without locks, when something may be to be raised
}

// counterNow asks for the counter, if there is one.
func (s *Store) counterNow(ctx context.Context) (uint64, error) {
	if s.rollback.Counter == nil {
		return 0, nil
	}
	return s.rollback.Counter.Counter(ctx)
}

// judge holds the list that was read against the counter.
func (s *Store) judge(ctx context.Context) error {
	if s.rollback.Counter == nil {
		return nil
	}
	n, err := s.counterNow(ctx)
	if err != nil {
		return err
	}
	have := s.cur.Counter
	if n == 0 && have == 0 {
		return s.rebase(ctx) // a list of the version before
	}
	made := n == 0
	if made { // cut off before it was, or deleted by someone
		if n, err = s.rollback.Counter.Count(ctx, have, true); err != nil {
			return err
		}
	}
	s.counted, s.files = n, 2 // nobody knows what was written since the last raise
	switch list.Judge(have, n) {
	case list.Current:
		return nil
	case list.Cut:
		return s.count(ctx, true)
	case list.Older:
		if made {
			return fmt.Errorf("%w: it was deleted, and begins at %d, where the list has %d", ErrCounter, n, have)
		}
		return fmt.Errorf("%w: the counter of the host's TPM stood at %d when it was written, and stands at %d", ErrRolledBack, have, n)
	}
	return fmt.Errorf("%w: it stands at %d, where the list has %d", ErrCounter, n, have)
}

// rebase writes the list in memory as the newest, at the counter as it is.
func (s *Store) rebase(ctx context.Context) error {
	if s.rollback.Counter == nil {
		return s.commit(nil, false)
	}
	n, err := s.counterNow(ctx)
	if err != nil {
		return err
	}
	first := uint64(0)
	if n == 0 {
		if first, err = s.rollback.Counter.FirstCount(ctx); err != nil {
			return err
		}
		n = first - 1
	}
	l := *s.cur
	l.Counter = n
	s.cur, s.counted = &l, n
	if err := s.commit(nil, true); err != nil {
		return err
	}
	return s.count(ctx, true)
}

// carry gives a list that is about to be written its value of the counter.
func (s *Store) carry(l *list.List, raise bool) {
	if s.rollback.Counter == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l.Counter = max(l.Counter, s.counted)
	if raise && l.Counter == s.counted {
		l.Counter++
		l.Paid = list.Pace{PerYear: s.rollback.PerYear, Paid: l.Paid}.Raised(s.rollback.Now()).Paid
	}
}

// count brings the counter to what the list carries.
func (s *Store) count(ctx context.Context, urgent bool) error {
	if s.rollback.Counter == nil {
		return nil
	}
	s.raise.Lock()
	defer s.raise.Unlock()
	return s.countLocked(ctx, urgent)
}

func (s *Store) countLocked(ctx context.Context, urgent bool) error {
	for {
		s.mu.Lock()
		next, counted := s.cur.Counter, s.counted
		s.mu.Unlock()
		if next == counted {
			return nil
		}
		n, err := s.rollback.Counter.Count(ctx, next, urgent)
		if err != nil {
			return err
		}
		if n < next {
			return fmt.Errorf("%w: it stands at %d, where the list has %d", ErrCounter, n, next)
		}
		s.mu.Lock()
		s.counted = n
		s.mu.Unlock()
		if n == next {
			return nil
		}
		// It began higher than foretold, or someone else counted: the list follows.
		if err := s.enter(nil, false); err != nil {
			return err
		}
	}
}

// Raise makes changes durable and every list before this one an older one. It
// does nothing where there are no changes and the list on disk is the only one
// of its kind.
func (s *Store) Raise(ctx context.Context, urgent bool, changes ...Change) error {
	if s.rollback.Counter == nil {
		return s.enter(changes, false)
	}
	s.raise.Lock()
	defer s.raise.Unlock()
	if err := s.countLocked(ctx, urgent); err != nil {
		return err
	}
	if len(changes) == 0 && !s.Exposed() {
		return nil
	}
	if err := s.enter(changes, true); err != nil {
		return err
	}
	return s.countLocked(ctx, urgent)
}

// Exposed reports whether an older list than the one on disk would be taken
// for the newest.
func (s *Store) Exposed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rollback.Counter != nil && (s.files > 1 || s.cur.Counter != s.counted)
}

// Counter is the value of the TPM's counter that the list carries.
func (s *Store) Counter() uint64 { return s.list().Counter }

// Pace is what has been paid for raises.
func (s *Store) Pace() list.Pace {
	return list.Pace{PerYear: s.rollback.PerYear, Paid: s.list().Paid}
}
