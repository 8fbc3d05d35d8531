package store

import (
	"errors"
	"testing"
)

// A page comes from whoever asks.
func FuzzPage(f *testing.F) {
	f.Add("", 0)
	f.Add(cursor("a", "b"), 10)
	f.Add(cursor("12"), -1)
	f.Add("WyIx", 1<<30)
	f.Fuzz(func(t *testing.T, after string, limit int) {
		p := Page{After: after, Limit: limit}
		if n := p.limit(); n < 1 || n > 1000 {
			t.Errorf("limit %d", n)
		}
		parts, err := p.after(2)
		if err != nil && !errors.Is(err, ErrInvalid) || err == nil && after != "" && len(parts) != 2 {
			t.Errorf("%q: %q, %v", after, parts, err)
		}
		if _, err := p.before(); err != nil && !errors.Is(err, ErrInvalid) {
			t.Error(err)
		}
	})
}

func TestRebind(t *testing.T) {
	d := dialect{numbered: true}
	for range 2 {
		if got := d.rebind("a = ? AND b IN (?, ?)"); got != "a = $1 AND b IN ($2, $3)" {
			t.Error(got)
		}
	}
	if got := sqlite.rebind("a = ?"); got != "a = ?" {
		t.Error(got)
	}
}
