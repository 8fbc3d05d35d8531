package daemon

import (
	"context"
	"time"

	"github.com/sirupsen/logrus"
)

// took is how long the steps of one hook event took. The journal entry of a
// start carries it, as VIRT_TRUST_TOOK_<STEP>_US.
type took map[string]time.Duration

// The steps.
const (
	tookTPM       = "tpm"       // commands of the TPM, and the wait for it
	tookState     = "state"     // reading and hashing the vTPM's state
	tookLabel     = "label"     // reading and writing the label
	tookList      = "list"      // checking and committing the vTPM list
	tookLaunchers = "launchers" // finding and measuring what will run
	tookAll       = "all"
)

type tookKey struct{}

// timed gives a context whose steps are timed.
func timed(ctx context.Context) (context.Context, took) {
	t := took{}
	return context.WithValue(ctx, tookKey{}, t), t
}

// lap times a step of the event that ctx belongs to, which one goroutine
// works on: defer lap(ctx, name)().
func lap(ctx context.Context, name string) (end func()) {
	t, ok := ctx.Value(tookKey{}).(took)
	if !ok {
		return func() {}
	}
	start := time.Now()
	return func() { t[name] += time.Since(start) }
}

func (t took) fields() logrus.Fields {
	f := logrus.Fields{}
	for name, d := range t {
		f["took_"+name+"_us"] = d.Microseconds()
	}
	return f
}
