package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"virt-trust/internal/domain"
	"virt-trust/internal/domain/libvirt"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/platform/secret"
	"virt-trust/internal/recovery"
	"virt-trust/internal/vtpm/lifecycle"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statedir"
	"virt-trust/internal/vtpm/statefile"
)

// Backup gives a VM's vTPM, encrypted to an admin's public keys. The VM is off,
// or has been paused by the caller.
func (g *Guard) Backup(ctx context.Context, d libvirt.Domain, f *domain.Facts, to []string) (sealed []byte, err error) {
	if f.TPM == nil {
		return nil, errors.New("the VM has no emulated TPM")
	}
	defer g.lock(f.UUID)()
	store, err := g.List(ctx)
	if err != nil {
		return nil, err
	}
	r := store.Get(f.UUID)
	if err := known(&start{r: r}); err != nil {
		return nil, err
	}
	var seen *statedir.Seen
	if d.Active {
		seen, err = g.pausedState(r)
	} else {
		seen, err = g.restingState(ctx, f)
	}
	if err != nil {
		return nil, err
	}
	b := recovery.Backup{
		UUID: f.UUID, Name: f.Name, Time: g.now().UTC().Truncate(time.Second), Running: d.Active,
		Encrypted: r.KeyOwner == list.Libvirts, Baseline: seen.Digest.String(), File: seen.Name, State: seen.Data,
	}
	if r.KeyOwner == list.Ours {
		keys, err := g.unwrap(ctx, r.WrappedKeys)
		if err != nil {
			return nil, err
		}
		defer keys.Wipe()
		if b.State, err = statefile.Decrypt(seen.Data, stateKey(keys)); err != nil {
			return nil, reason.Refuse(reason.VTPMChanged, "'virt-trust check' says more", "the vTPM state is not this VM's: %s", err)
		}
		defer secret.Wipe(b.State)
	}
	archive, err := b.Archive()
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(archive)
	if sealed, err = recovery.Seal(archive, to); err != nil {
		return nil, err
	}
	g.report(f.UUID, f.Name, "backup", allow, "", "the vTPM was given out, encrypted to "+strings.Join(to, ", "), journal.BackedUp)
	return sealed, nil
}

// settleTime is how long a command that swtpm was at when its VM was paused may
// go on to change the state. One that takes longer has not been answered: to the
// VM and its disk it has not happened.
const settleTime = 2 * time.Second

// pausedState gives the state of a VM that was paused, once it is at rest.
func (g *Guard) pausedState(r *list.Record) (*statedir.Seen, error) {
	const pause = 100 * time.Millisecond
	seen, err := statedir.Settle(r.Instance)
	for began := time.Now(); err == nil && time.Since(began) < settleTime; {
		time.Sleep(pause)
		var again *statedir.Seen
		if again, err = statedir.Settle(r.Instance); err == nil && again.Digest == seen.Digest {
			return again, nil
		}
		seen = again
	}
	return seen, err
}

// restingState gives the state of a VM that is off, if the VM would start with it.
func (g *Guard) restingState(ctx context.Context, f *domain.Facts) (*statedir.Seen, error) {
	if used, err := waitUnused(f.StateDir(g.cfg.Swtpm.StateRoot)); err != nil || used {
		return nil, errors.Join(err, reason.Refuse(reason.PolicyForbids, "try again when the VM runs or is off", "a swtpm is running on this vTPM"))
	}
	st, err := g.decide(ctx, f, g.policy(), true)
	if err != nil {
		return nil, err
	}
	defer st.keys.Wipe()
	switch {
	case st.d.Plan == lifecycle.Refuse:
		return nil, st.d.Refusal
	case !st.dir.Exists() || st.d.Plan == lifecycle.FinishAdoption || st.d.Plan == lifecycle.RestoreKept:
		return nil, reason.Refuse(reason.VTPMMissing, "start it once", "the VM has no vTPM state at rest")
	}
	return st.dir, nil
}

// Restore gives a VM that is off the vTPM of a backup. A state that is newer, or
// may be, is replaced only on the admin's word; it is set aside.
func (g *Guard) Restore(ctx context.Context, d libvirt.Domain, f *domain.Facts, b *recovery.Backup, replace bool) (what string, err error) {
	if b.UUID != f.UUID {
		return "", reason.Refuse(reason.PolicyForbids, "define a VM with that UUID", "the backup is that of VM %s (%s)", b.Name, b.UUID)
	}
	if d.ManagedSave {
		return "", reason.Refuse(reason.PolicyForbids, "'virsh managedsave-remove' the image, or start the VM and shut it down",
			"the VM has a managed save image, which goes with the vTPM that it has")
	}
	return g.atRest(ctx, d, f, func(st *start) (string, error) { return g.putInto(ctx, st, b, replace) })
}

func (g *Guard) putInto(ctx context.Context, st *start, b *recovery.Backup, replace bool) (what string, err error) {
	f := st.f
	kind := statefile.Classify(b.State)
	switch {
	case b.File != statedir.StateFile(st.seen.Instance):
		return "", reason.Refuse(reason.VTPMChanged, "give the VM a vTPM of the backup's version", "the backup's vTPM is of another TPM version than the VM's")
	case b.Encrypted != (st.seen.KeyOwner == list.Libvirts):
		return "", reason.Refuse(reason.PolicyForbids, "define the VM with the <encryption> that it had, or none", "the backup's state and the VM's <tpm> differ in whose key it is")
	case b.Encrypted && kind != statefile.Encrypted, !b.Encrypted && kind != statefile.Plain:
		return "", reason.Refuse(reason.VTPMChanged, "take another backup", "the backup's state is none that swtpm would load")
	}
	if st.r != nil && st.r.State == list.Released {
		st.r = nil
	}
	same := st.r != nil && st.r.Baseline.String() == b.Baseline && st.seen.State.Digest == st.r.Baseline
	lost := !st.seen.State.Exists
	switch {
	case same:
		return "the VM has this vTPM", nil
	case replace:
	case st.r != nil && st.r.Baseline.String() != b.Baseline:
		return "", reason.Refuse(reason.VTPMRolledBack, "'virt-trust restore --replace' takes it all the same",
			"the VM's vTPM has been written since the backup of %s", b.Time.Format(time.RFC3339))
	case !lost:
		return "", reason.Refuse(reason.VTPMUnknown, "'virt-trust restore --replace' sets it aside", "the VM has a vTPM state in %s", st.seen.Instance)
	}
	if len(st.seen.State.Strange) > 0 || st.seen.FolderOf != "" {
		return "", lifecycle.Prepare(st.r, st.seen, g.policy()).Refusal
	}
	aside := ""
	if !lost {
		name, err := g.setAside(fmt.Sprintf("%s.%s", f.UUID, st.dir.Name), st.dir.Data)
		if err != nil {
			return "", err
		}
		aside = "; the state that was there was set aside as " + name
	}
	uid, gid, err := lookupUser(g.cfg.Swtpm.User)
	if err != nil {
		return "", err
	}
	if err := statedir.Make(st.seen.Instance, uid, gid); err != nil {
		return "", err
	}
	if st.r == nil {
		err = g.putIntoUnknown(ctx, st, b)
	} else {
		err = g.putIntoKnown(ctx, st, b)
	}
	if err != nil {
		return "", err
	}
	what = fmt.Sprintf("the vTPM is that of the backup of %s%s", b.Time.Format(time.RFC3339), aside)
	g.report(f.UUID, f.Name, "restore", allow, reason.VTPMRolledBack, what, journal.Restored)
	g.changed(f.UUID)
	return what, nil
}

// putIntoUnknown takes a backup in as if it were a vTPM of plain libvirt's.
func (g *Guard) putIntoUnknown(ctx context.Context, st *start, b *recovery.Backup) error {
	if old := st.store.Get(st.f.UUID); old != nil { // released
		g.goes(st.f.UUID, "its record as a released VM ended")
		if err := st.store.Commit(liststore.Change{Delete: st.f.UUID}); err != nil {
			return err
		}
	}
	if b.Encrypted {
		if err := statedir.Replace(st.seen.Instance, b.State, true); err != nil {
			return err
		}
		st.dir.Data, st.dir.Digest = b.State, statedir.Digest(st.dir.Name, b.State)
		return g.createForeign(ctx, st)
	}
	return g.create(ctx, st, b.State)
}

// putIntoKnown replaces the state of a VM in the list, under its keys. Cut off,
// the start says so, and 'repair' or another restore goes on.
func (g *Guard) putIntoKnown(ctx context.Context, st *start, b *recovery.Backup) error {
	data := b.State
	if !b.Encrypted {
		keys, err := g.unwrap(ctx, st.r.WrappedKeys)
		if err != nil {
			return err
		}
		defer keys.Wipe()
		iv := make([]byte, statefile.KeySize)
		rand.Read(iv)
		if data, err = statefile.Encrypt(b.State, stateKey(keys), iv); err != nil {
			return err
		}
	}
	if err := g.keep(st.f.UUID, keptState, data); err != nil {
		return err
	}
	n := lifecycle.Settled(st.r, statedir.Digest(st.dir.Name, data), st.seen.Journal, g.unix())
	if err := st.store.Commit(liststore.Change{Put: n}); err != nil {
		return err
	}
	if err := statedir.Replace(st.seen.Instance, data, false); err != nil {
		return err
	}
	return g.dropJournal(st.f.UUID)
}

// pauseLimit is how long a VM is kept paused for what its admin does meanwhile.
const pauseLimit = 10 * time.Minute

// A VM that was paused for a backup has a mark in the run-time folder until it
// goes on: a virt-trustd that ended meanwhile is followed by one that sees to it.
func (g *Guard) pauseMark(uuid string) string {
	return filepath.Join(g.dirs.Run, "paused-"+uuid)
}

// pause pauses a VM, if it is not, and gives what makes it go on.
func (s *Service) pause(ctx context.Context, uuid string) (resume func() error, err error) {
	mark := s.g.pauseMark(uuid)
	if err := os.WriteFile(mark, nil, 0o600); err != nil {
		return nil, err
	}
	paused := false
	err = s.withLibvirt(ctx, func(c *libvirt.Client) (err error) {
		paused, err = c.Pause(ctx, uuid)
		return err
	})
	if err != nil || !paused {
		return func() error { return nil }, errors.Join(err, os.Remove(mark))
	}
	return func() error { return s.goOnRunning(uuid) }, nil
}

// goOnRunning ends a pause.
func (s *Service) goOnRunning(uuid string) error {
	// Not the pausing call's context: it must come to this whatever ended that.
	ctx, cancel := context.WithTimeout(context.Background(), adminDeadline)
	defer cancel()
	err := s.withLibvirt(ctx, func(c *libvirt.Client) error { return c.Resume(ctx, uuid) })
	if err != nil && !errors.Is(err, libvirt.ErrNoDomain) {
		return fmt.Errorf("VM %s is paused and could not be made to go on; 'virsh resume %s' does: %w", uuid, uuid, err)
	}
	return os.Remove(s.g.pauseMark(uuid))
}

// endPauses makes VMs go on that the virt-trustd before this one had paused.
func (s *Service) endPauses() {
	marks, _ := filepath.Glob(s.g.pauseMark("*"))
	for _, m := range marks {
		uuid := strings.TrimPrefix(filepath.Base(m), "paused-")
		if err := s.goOnRunning(uuid); err != nil {
			s.log.WithField(journal.VM, uuid).WithError(err).Error("ending a pause for a backup")
		}
	}
}

func (s *Service) withLibvirt(ctx context.Context, f func(*libvirt.Client) error) error {
	socket, _, err := libvirt.Socket(s.g.cfg.Libvirt.Socket)
	if err != nil {
		return err
	}
	c, err := libvirt.Dial(ctx, socket)
	if err != nil {
		return err
	}
	defer c.Close()
	return f(c)
}
