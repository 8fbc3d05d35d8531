package daemon

import (
	"os"
	"testing"
	"time"
)

func TestStartOf(t *testing.T) {
	started, err := startOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	// btime is whole seconds.
	if age := time.Since(started); age < -2*time.Second || age > 10*time.Minute {
		t.Fatalf("this test started %s ago", age)
	}
	if _, err := startOf(-1); err == nil {
		t.Fatal("a process that is none has started")
	}
}
