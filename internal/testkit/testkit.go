// Package testkit is what tests of many packages need.
package testkit

import (
	"os"
	"os/exec"
	"sync/atomic"
	"testing"
	"time"
)

// Missing ends a test that lacks something: on a laptop it is skipped, in CI,
// which has to have all, it fails.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// Need gives the path of the first of the programs; Missing, if one is not there.
func Need(t testing.TB, programs ...string) (path string) {
	t.Helper()
	for i, p := range programs {
		found, err := exec.LookPath(p)
		if err != nil {
			Missing(t, "%v", err)
		}
		if i == 0 {
			path = found
		}
	}
	return path
}

// Root is for tests that only root can do.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, "must run as root")
	}
}

// Must gives what f gave: Must[T](t)(f()). An error ends the test.
func Must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// Folder is a temporary folder that every user may enter, with a name that is short
// enough for a socket's path and has nothing in it that an option could not take.
func Folder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vt-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Clock is the machine's, and ahead of it by what a test has let pass. It is for
// many goroutines.
type Clock struct{ ahead atomic.Int64 }

// Now is the time.
func (c *Clock) Now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

// Pass lets time pass; a negative one sets the clock back.
func (c *Clock) Pass(d time.Duration) { c.ahead.Add(int64(d)) }
