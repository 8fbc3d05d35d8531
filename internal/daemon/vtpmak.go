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

// Bounds of the making of an AK. At a vTPM's manufacture libvirt gives swtpm one
// second, of which the wrapper, that waits for it, takes 800 ms; at a later start
// the hook waits, for which libvirt has no bound.
const (
	akLimit = 500 * time.Millisecond
	akLater = 5 * time.Second
)

// makeAK gives a vTPM that swtpm_setup has just made its AK (attestation.vtpm_ak),
// when the wrapper of libvirt's swtpm comes for the keys: nothing has the state
// then, and nothing has booted with it. That it failed keeps no VM from starting:
// its PCRs are read without, and the AK is made up at the next start.
func (g *Guard) makeAK(path string, c *caller) {
	g.mu.Lock()
	gr := g.grants[path]
	if gr == nil || !gr.ak || !gr.redeemed["swtpm_setup"] || gr.redeemed["swtpm"] || gr.setupRuns() || gr.cgroup != c.cgroup || g.now().After(gr.expires) {
		g.mu.Unlock()
		return
	}
	gr.ak = false // once
	keys, err := secret.Take(bytes.Clone(gr.keys.Bytes()))
	g.mu.Unlock()
	if err == nil {
		defer keys.Wipe()
		ctx, cancel := context.WithTimeout(context.Background(), akLimit)
		defer cancel()
		err = g.addAK(ctx, gr, path, keys)
	}
	if err != nil {
		g.log.WithField(journal.VM, gr.uuid).WithError(err).Warn("the new vTPM has no AK: it is made up at the VM's next start")
	}
}

// makeUpAK gives a vTPM its AK that was to get one at its manufacture and did not.
// It is called when the start is open, and what is written is noted.
func (g *Guard) makeUpAK(ctx context.Context, st *start) {
	g.mu.Lock()
	gr, s := g.grants[st.seen.Instance], g.sessions[st.f.UUID]
	g.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, akLater)
	defer cancel()
	s.writes.Store(true) // or nothing would be
	defer s.writes.Store(false)
	log := g.log.WithField(journal.VM, gr.uuid)
	if err := g.addAK(ctx, gr, s.dir, st.keys); err != nil {
		log.WithError(err).Warn("the vTPM still has no AK")
		return
	}
	if _, err := g.settle(s); err != nil {
		log.WithError(err).Warn("making a vTPM's state durable")
	}
}

// addAK has swtpm make an AK on a copy of the state; the new state takes the old
// one's place whole. Where a crash comes between, the vTPM has its AK or has none.
func (g *Guard) addAK(ctx context.Context, gr *grant, path string, keys *secret.Buffer) error {
	seen, err := statedir.Look(path)
	if err != nil {
		return err
	}
	if !seen.Exists() {
		return errors.New("there is no state")
	}
	after, public, err := g.reader(gr.runs).MakeAK(ctx, seen.Name, seen.Data, stateKey(keys))
	if err != nil {
		return err
	}
	if err := statefile.Verify(after, stateKey(keys)); err != nil {
		return fmt.Errorf("what swtpm wrote: %w", err)
	}
	if err := statedir.Replace(path, after, false); err != nil {
		return err
	}
	g.mu.Lock()
	gr.made.ak = public
	g.mu.Unlock()
	return nil
}
