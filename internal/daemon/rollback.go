package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
)

// Older lists are told by a counter in the host's TPM. A commit does not wait
// for it: within rollback.window it is raised once for all that was committed
// meanwhile, when no VM's start wants the TPM. What running VMs write goes into
// the list on the same occasion, so that it cannot be taken back either.

func (g *Guard) rollback() liststore.Rollback {
	return liststore.Rollback{
		Counter: tpmCounter{g}, Each: g.cfg.Rollback.Window == 0, PerYear: g.cfg.Rollback.PerYear, Now: g.now, Stirred: g.stirred,
	}
}

// tpmCounter is the TPM's counter, whose failures are refusals.
type tpmCounter struct{ g *Guard }

func (c tpmCounter) Counter(ctx context.Context) (uint64, error) {
	n, err := c.g.tpm.Counter(ctx)
	return n, c.g.tpmRefusal(err)
}

func (c tpmCounter) FirstCount(ctx context.Context) (uint64, error) {
	n, err := c.g.tpm.FirstCount(ctx)
	return n, c.g.tpmRefusal(err)
}

func (c tpmCounter) Count(ctx context.Context, next uint64, urgent bool) (uint64, error) {
	n, err := c.g.tpm.Count(ctx, next, urgent)
	return n, c.g.tpmRefusal(err)
}

// stirred wakes keepRaised.
func (g *Guard) stirred() {
	select {
	case g.stir <- struct{}{}:
	default:
	}
}

// raiseRetry is between two tries of a raise that failed.
const raiseRetry = 10 * time.Second

// keepRaised raises the list's counter as it falls due, until ctx ends.
func (g *Guard) keepRaised(ctx context.Context) {
	var committed, noted time.Time // since when a raise is due; zero: none is
	failing := false
	for {
		wait := time.Duration(-1)
		store := g.peek()
		if store != nil {
			now, pace, window := g.now(), store.Pace(), time.Duration(g.cfg.Rollback.Window)
			committed, noted = from(committed, store.Exposed(), now), from(noted, g.hasNotes(store), now)
			if !committed.IsZero() {
				wait = max(window-now.Sub(committed), pace.Wait(now, false))
			}
			if !noted.IsZero() {
				if w := max(max(window, time.Second)-now.Sub(noted), pace.Wait(now, true)); wait < 0 || w < wait {
					wait = w
				}
			}
		}
		if wait != 0 {
			g.sleep(ctx, wait)
			if ctx.Err() != nil {
				return
			}
			continue
		}
		err := g.raise(ctx, store, false)
		if ctx.Err() != nil {
			return
		}
		committed, noted = time.Time{}, time.Time{} // what is still due had its turn
		if err == nil {
			failing = false
			continue
		}
		if !failing {
			failing = true
			g.log.WithField(journal.ID, journal.NotRaised).WithError(err).Warn("the TPM's counter could not be raised: until it is, an older vTPM list would not be noticed after a power cut")
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(raiseRetry):
		}
	}
}

// from keeps the time at which something began to be so.
func from(since time.Time, is bool, now time.Time) time.Time {
	switch {
	case !is:
		return time.Time{}
	case since.IsZero():
		return now
	}
	return since
}

// sleep waits until something stirs or, unless it is negative, d is over.
func (g *Guard) sleep(ctx context.Context, d time.Duration) {
	var over <-chan time.Time
	if d >= 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		over = t.C
	}
	select {
	case <-ctx.Done():
	case <-over:
	case <-g.stir:
	}
}

// raise makes what was committed, and what running VMs wrote, the newest.
func (g *Guard) raise(ctx context.Context, store *liststore.Store, urgent bool) error {
	for _, s := range g.running() {
		if err := g.checkpoint(store, s); err != nil {
			return err
		}
	}
	return store.Raise(ctx, urgent)
}

// settleCounter is for the end of virt-trustd: nothing is left to the next.
func (g *Guard) settleCounter(ctx context.Context) {
	store := g.peek()
	if store == nil || !store.Exposed() && !g.hasNotes(store) {
		return
	}
	if err := g.raise(ctx, store, true); err != nil {
		g.log.WithField(journal.ID, journal.NotRaised).WithError(err).Warn("the TPM's counter could not be raised before the end")
	}
}

func (g *Guard) running() []*session {
	g.mu.Lock()
	defer g.mu.Unlock()
	var all []*session
	for _, s := range g.sessions {
		all = append(all, s)
	}
	return all
}

// hasNotes reports whether a running VM has written what its record in the
// list does not know.
func (g *Guard) hasNotes(store *liststore.Store) bool {
	for _, s := range g.running() {
		s.mu.Lock()
		r := store.Get(s.uuid)
		news := unlisted(s, r)
		s.mu.Unlock()
		if news {
			return true
		}
	}
	return false
}

// unlisted is called with the session's lock held.
func unlisted(s *session, r *list.Record) bool {
	n := len(s.noted)
	return !s.ended && r != nil && r.Open && (n > 0 && s.noted[n-1].Digest != r.Baseline || s.reverts > 0)
}

// checkpoint takes what a running VM has written into its record. A VM that is
// just being started, stopped or changed is left for the next time.
func (g *Guard) checkpoint(store *liststore.Store, s *session) error {
	unlock, ok := g.tryLock(s.uuid)
	if !ok {
		return nil
	}
	defer unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	r := store.Get(s.uuid)
	if !unlisted(s, r) {
		return nil
	}
	n := r.Clone()
	listed := slices.IndexFunc(s.noted, func(p list.Past) bool { return p.Digest == r.Baseline })
	for _, p := range s.noted[listed+1:] {
		n.SetBaseline(p.Digest, p.Time)
		n.Noted = true
	}
	s.remember(n)
	if err := store.Commit(liststore.Change{Put: n}); err != nil {
		return err
	}
	s.reverts = 0
	return nil
}

// remember takes into a record what its session knows alone. Called with the
// session's lock held.
func (s *session) remember(n *list.Record) {
	if s.tags != nil {
		n.Tag, n.OlderTags = s.tags.Tag, s.tags.OlderTags
	}
	if s.reverts > 0 {
		n.Reverts += s.reverts
		n.Reverted = s.reverted
	}
}

// tagged holds the tags of a running VM's states. Called with the session's
// lock held.
func (s *session) tagged(r *list.Record) *list.Record {
	if s.tags == nil {
		s.tags = &list.Record{Tag: r.Tag, OlderTags: r.OlderTags}
	}
	return s.tags
}

// wentBack looks whether what a VM's vTPM has written now is what a saved image
// held. It reports whether policy forbids that. Called with the session's lock
// held.
func (g *Guard) wentBack(s *session, r *list.Record, tag list.Tag) (forbidden bool) {
	// Before all else swtpm writes what QEMU gives it from an image. Later a guest
	// can make its vTPM hold again what it held before.
	if len(s.noted) > 0 || !s.tagged(r).Had(tag) {
		return false
	}
	if s.unwanted = g.cfg.Policy.Restore == "refuse"; s.unwanted {
		g.log.WithField(journal.VM, s.uuid).WithField(journal.VMName, r.Name).Warn("the vTPM went back with a saved image or a snapshot, which policy.restore forbids: its next start is refused")
		return true
	}
	g.reverted(s, r, "the vTPM went back with a saved image or a snapshot: what it holds now it held before")
	return false
}

// reverted notes that a VM's vTPM was taken back by a saved image, once for a
// start. Called with the session's lock held.
func (g *Guard) reverted(s *session, r *list.Record, what string) {
	if s.reverted > 0 {
		return
	}
	s.reverts, s.reverted = 1, g.unix()
	g.report(s.uuid, r.Name, "restore", noted, reason.VTPMRolledBack, what, journal.Reverted)
	g.stirred()
}

// saved notes, on libvirt's word, that a VM stopped because it was saved.
func (g *Guard) saved(uuid string) error {
	defer g.lock(uuid)()
	g.mu.Lock()
	s := g.sessions[uuid]
	if s != nil {
		s.suspect = false // its image was faster than the word of it
	}
	g.mu.Unlock()
	store := g.peek()
	if s != nil || store == nil {
		return nil
	}
	r := store.Get(uuid)
	if r == nil || r.Open || r.State != list.Stored {
		return nil
	}
	n := r.Clone()
	n.State = list.Suspended
	if err := store.Commit(liststore.Change{Put: n}); err != nil {
		return err
	}
	g.changed(uuid)
	return nil
}

// AcceptList takes an older list, or one that another TPM's counter was for, on
// the admin's word. Each VM is then held against it as ever.
func (g *Guard) AcceptList(ctx context.Context) (what string, err error) {
	if g.peek() != nil {
		return "", reason.Refuse(reason.PolicyForbids, "'virt-trust repair --list' writes it back",
			"virt-trustd still has the newest list in memory: there is nothing to accept")
	}
	_, err = g.List(ctx)
	if err == nil {
		return "", errors.New("the vTPM list is the newest: there is nothing to accept")
	}
	if r := reason.As(err); r == nil || r.Code != reason.ListRolledBack {
		return "", err
	}
	g.openList.Lock()
	defer g.openList.Unlock()
	g.mu.Lock()
	key := g.listKey
	g.mu.Unlock()
	store, err := liststore.Accept(ctx, g.dirs.State, g.dirs.Run, key, g.rollback())
	if err != nil {
		return "", g.listRefusal(err)
	}
	g.opened(store)
	all := store.All()
	what = fmt.Sprintf("an older vTPM list, with %d VMs, was accepted on the admin's word", len(all))
	g.report("", "", "accept", allow, reason.ListRolledBack, what, journal.OlderAccepted)
	for _, r := range all {
		g.changed(r.UUID)
	}
	return what, nil
}

// opened takes a list into use.
func (g *Guard) opened(store *liststore.Store) {
	g.mu.Lock()
	g.store, g.listErr = store, nil
	g.mu.Unlock()
	g.stirred()
}

// raised says on the bus how the counter stands.
func (g *Guard) raised() dict {
	counter, left, within, exposed := uint64(0), uint32(0), time.Duration(g.cfg.Rollback.Window), false
	if store := g.peek(); store != nil {
		pace, now := store.Pace(), g.now()
		counter, left, exposed = store.Counter(), uint32(pace.Left(now)), store.Exposed() || g.hasNotes(store)
		within = max(within, pace.Wait(now, false))
	}
	return dict{
		"ListCounter": dbus.MakeVariant(counter), "RaisesLeft": dbus.MakeVariant(left), "RaisesPerYear": dbus.MakeVariant(uint32(g.cfg.Rollback.PerYear)),
		"RaisedWithin": dbus.MakeVariant(uint64(within.Microseconds())), "RaiseDue": dbus.MakeVariant(exposed),
	}
}
