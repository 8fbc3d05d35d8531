package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"virt-trust/internal/platform/journal"
	"virt-trust/internal/platform/secret"
	"virt-trust/internal/vtpm/statedir"
	"virt-trust/internal/vtpm/statefile"
)

// akLimit bounds the making of an AK: libvirt gives swtpm one second, of which
// the wrapper, that waits for it, takes 800 ms. It takes some 25 ms.
const akLimit = 500 * time.Millisecond

// makeAK gives a vTPM that swtpm_setup has just made its AK (attestation.vtpm_ak),
// when the wrapper of libvirt's swtpm comes for the keys: nothing has the state
// then, and nothing has booted with it. swtpm works on a copy; the new state
// takes the old one's place whole, and is noted like any that swtpm writes. Where
// a crash comes between, the vTPM has its AK or has none. That it failed keeps no
// VM from starting: its PCRs are read without.
func (g *Guard) makeAK(path string, c *caller) {
	g.mu.Lock()
	gr := g.grants[path]
	if gr == nil || !gr.ak || !gr.redeemed["swtpm_setup"] || gr.redeemed["swtpm"] || gr.setupRuns() || gr.cgroup != c.cgroup || g.now().After(gr.expires) {
		g.mu.Unlock()
		return
	}
	gr.ak = false // once
	reader, uuid := g.reader(gr.runs), gr.uuid
	key, err := secret.Take(bytes.Clone(stateKey(gr.keys)))
	g.mu.Unlock()
	var public []byte
	if err == nil {
		public, err = func() ([]byte, error) {
			defer key.Wipe()
			ctx, cancel := context.WithTimeout(context.Background(), akLimit)
			defer cancel()
			seen, err := statedir.Look(path)
			if err != nil {
				return nil, err
			}
			if !seen.Exists() {
				return nil, errors.New("swtpm_setup has left no state")
			}
			after, public, err := reader.MakeAK(ctx, seen.Name, seen.Data, key.Bytes())
			if err != nil {
				return nil, err
			}
			if err := statefile.Verify(after, key.Bytes()); err != nil {
				return nil, fmt.Errorf("what swtpm wrote: %w", err)
			}
			return public, statedir.Replace(path, after, false)
		}()
	}
	if err != nil {
		g.log.WithField(journal.VM, uuid).WithError(err).Warn("the new vTPM has no AK")
		return
	}
	g.settled(path)
	g.mu.Lock()
	gr.made.ak = public
	g.mu.Unlock()
}
