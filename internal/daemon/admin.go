package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"virt-trust/internal/domain"
	"virt-trust/internal/domain/libvirt"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/platform/secret"
	"virt-trust/internal/recovery"
	"virt-trust/internal/vtpm/imagefile"
	"virt-trust/internal/vtpm/label"
	"virt-trust/internal/vtpm/lifecycle"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statedir"
	"virt-trust/internal/vtpm/statefile"
)

// What an admin asks for by name. Each of these first has libvirt say what the
// VM is, and touches only VMs that are off.

// off refuses what a running VM would be hurt by. Called with the VM's lock
// held: libvirt's word on d is older than a start that has begun since.
func (g *Guard) off(ctx context.Context, d libvirt.Domain, f *domain.Facts) error {
	if d.Active {
		return reason.Refuse(reason.PolicyForbids, "shut it down first", "the VM runs")
	}
	if g.starting(f.UUID) {
		return reason.Refuse(reason.PolicyForbids, "wait a minute", "the VM is being started")
	}
	var r *list.Record
	store := g.peek()
	if store != nil {
		r = store.Get(f.UUID)
	}
	dirs := []string{f.StateDir(g.cfg.Swtpm.StateRoot)}
	if r != nil && r.Instance != dirs[0] {
		dirs = append(dirs, r.Instance)
	}
	for _, dir := range dirs {
		used, err := waitUnused(dir)
		if err != nil {
			return err
		}
		if used {
			return reason.Refuse(reason.PolicyForbids, "end that swtpm first", "a swtpm is running on this vTPM")
		}
	}
	g.mu.Lock()
	unheard := g.sessions[f.UUID] != nil
	g.mu.Unlock()
	if !unheard {
		return nil
	}
	if r == nil || !r.Open {
		g.endSession(f.UUID)
		return nil
	}
	return g.rest(ctx, store, r, d.ManagedSave)
}

// starting reports whether a launch grant of the VM is open; of any VM, for "".
func (g *Guard) starting(uuid string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, gr := range g.grants {
		if (uuid == "" || gr.uuid == uuid) && g.now().Before(gr.expires) {
			return true
		}
	}
	return false
}

// Check says whether the VM would start now: nil, a *reason.Refusal, or an
// error when it cannot be told. note says what a start would do besides.
func (g *Guard) Check(ctx context.Context, f *domain.Facts) (note string, err error) {
	if f.TPM == nil {
		if g.cfg.Policy.RequireVTPM {
			return "", reason.Refuse(reason.PolicyForbids, "give it an emulated TPM", "the VM has no vTPM, and policy.require_vtpm is on")
		}
		return "the VM has no emulated TPM: it starts untouched", nil
	}
	defer g.lock(f.UUID)()
	g.mu.Lock()
	s := g.sessions[f.UUID]
	g.mu.Unlock()
	defer func() {
		if store := g.peek(); store != nil && err == nil {
			if r := store.Get(f.UUID); r != nil {
				note = strings.TrimPrefix(note+"; "+sharedNote(store, r), "; ")
				note = strings.TrimSuffix(note, "; ")
			}
		}
	}()
	if s != nil {
		return "the VM runs", nil
	}
	if _, err := g.launchers(ctx, f); err != nil {
		return "", err
	}
	st, err := g.decide(ctx, f, g.policy(), true)
	if err != nil {
		return "", err
	}
	defer st.keys.Wipe()
	if err := g.checkEmulator(st); err != nil && st.d.Plan != lifecycle.Refuse {
		return "", err
	}
	switch st.d.Plan {
	case lifecycle.Refuse:
		return "", st.d.Refusal
	case lifecycle.Pass:
		return "the VM was released: it starts as under plain libvirt", nil
	case lifecycle.Create:
		note = "the VM gets its vTPM and label at its first start"
	case lifecycle.AdoptPlain:
		note = "the VM's plain vTPM state is encrypted and taken into the list at its next start"
	case lifecycle.StartFirstLabel, lifecycle.StartNewLabel:
		note = "the image gets its label at the next start"
	case lifecycle.CreateForeign:
		note = "the VM's vTPM is taken into the list; its key stays libvirt's"
	}
	if len(st.notes) > 0 {
		note = st.notes[0].text
	}
	if st.r == nil || st.r.KeyOwner == list.Libvirts {
		return note, g.approved(ctx)
	}
	keys, err := g.unwrap(ctx, st.r.WrappedKeys)
	if err != nil {
		return "", err
	}
	keys.Wipe()
	return note, nil
}

// atRest looks at a VM, sees to it that it is off, and has something done about
// it under its lock.
func (g *Guard) atRest(ctx context.Context, d libvirt.Domain, f *domain.Facts, do func(*start) (string, error)) (string, error) {
	if f.TPM == nil {
		return "", errors.New("the VM has no emulated TPM")
	}
	defer g.lock(f.UUID)()
	if err := g.off(ctx, d, f); err != nil {
		return "", err
	}
	store, err := g.List(ctx)
	if err != nil {
		return "", err
	}
	st := &start{f: f, store: store, r: store.Get(f.UUID)}
	if st.dir, st.seen, err = g.see(ctx, f, st.r, store); err != nil {
		return "", err
	}
	return do(st)
}

// known is for what only VMs in the list can have done to them.
func known(st *start) error {
	if st.r == nil || st.r.State == list.Released {
		return reason.Refuse(reason.VTPMUnknown, "'virt-trust adopt' takes it in", "the vTPM list does not know this VM")
	}
	return nil
}

// Adopt takes a VM that is off into the list as it is. fresh gives it a new,
// empty vTPM where its own is lost.
func (g *Guard) Adopt(ctx context.Context, d libvirt.Domain, f *domain.Facts, fresh bool) (what string, err error) {
	return g.atRest(ctx, d, f, func(st *start) (string, error) { return g.adopt(ctx, st, fresh) })
}

func (g *Guard) adopt(ctx context.Context, st *start, fresh bool) (what string, err error) {
	released := st.r != nil && st.r.State == list.Released
	if released {
		st.r = nil
	}
	if len(st.seen.State.Strange) > 0 || st.seen.FolderOf != "" {
		return "", lifecycle.Prepare(st.r, st.seen, g.policy()).Refusal
	}
	if released {
		g.goes(st.f.UUID, "its record as a released VM ended")
		if err := st.store.Commit(liststore.Change{Delete: st.f.UUID}); err != nil {
			return "", err
		}
	}
	switch {
	case st.r == nil && st.seen.KeyOwner == list.Libvirts:
		what, err = "its key stays libvirt's", g.createForeign(ctx, st)
	case st.r == nil:
		what, err = g.adoptUnknown(ctx, st, fresh)
	default:
		what, err = g.adoptKnown(ctx, st, fresh)
	}
	if err != nil {
		return "", err
	}
	g.report(st.f.UUID, st.f.Name, "adopt", allow, "", what, journal.VMAdopted)
	g.changed(st.f.UUID)
	return what, nil
}

func (g *Guard) adoptUnknown(ctx context.Context, st *start, fresh bool) (string, error) {
	l := st.seen.Label
	switch st.seen.State.Kind {
	case statefile.Plain:
		return "the plain vTPM state was encrypted and taken into the list", g.create(ctx, st, st.dir.Data)
	case statefile.Damaged:
		if fresh {
			return g.startOver(ctx, st)
		}
		return "", reason.Refuse(reason.VTPMUnknown, "bring it back from a backup, or give the VM a new, empty vTPM with 'virt-trust adopt --new'",
			"the state in %s is damaged", st.seen.Instance)
	case statefile.Encrypted:
		what, err := g.recoverRecord(ctx, st, nil)
		if fresh && reason.As(err) != nil {
			return g.startOver(ctx, st)
		}
		return what, err
	}
	if l.Present && l.Damaged == "" && l.VM == st.f.UUID && !fresh {
		return "", reason.Refuse(reason.VTPMMissing, "bring it back from a backup, or give the VM a new, empty vTPM with 'virt-trust adopt --new'",
			"the label names a vTPM of this VM, but neither the list nor the disk has it")
	}
	return "the VM has a new vTPM", g.create(ctx, st, nil)
}

// recoverRecord makes the record of an encrypted state again from a label that
// has its keys for this host, or for the recovery key if that is given: the
// image's, or the one kept.
func (g *Guard) recoverRecord(ctx context.Context, st *start, key *recovery.Key) (string, error) {
	var why error = errors.New("there is no label for it")
	for _, payload := range g.labelsFor(st.f.UUID, st.seen.Label.Path) {
		r, keys, err := g.recordFrom(ctx, payload, st.f.UUID, st.f.Name, st.seen.Instance, st.dir, key)
		if err != nil {
			why = err
			continue
		}
		defer keys.Wipe()
		return "the record of the encrypted vTPM state was made again from its label", g.relabel(ctx, st.store, r, keys, st.seen.Label)
	}
	return "", reason.Refuse(reason.KeyNotReleased, "start it on the host that it comes from, or give the VM a new, empty vTPM with 'virt-trust adopt --new'",
		"the encrypted state in %s cannot be taken in: %s", st.seen.Instance, why)
}

// startOver gives a VM a new, empty vTPM in place of one that nothing can be
// done with. What lies there is set aside, not destroyed: its key may come back
// with another TPM.
func (g *Guard) startOver(ctx context.Context, st *start) (string, error) {
	if err := g.approved(ctx); err != nil {
		return "", err
	}
	name, err := g.setAside(fmt.Sprintf("%s.%s", st.f.UUID, st.dir.Name), st.dir.Data)
	if err != nil {
		return "", err
	}
	if err := statedir.Remove(st.seen.Instance); err != nil {
		return "", err
	}
	if st.r != nil {
		if err := g.delete(ctx, st.store, st.r, "a new vTPM was asked for"); err != nil {
			return "", err
		}
		st.r = nil
	}
	st.dir.Data = nil
	return "the VM has a new vTPM; the old state was set aside as " + name, g.create(ctx, st, nil)
}

// setAside keeps what is to be replaced by something else.
func (g *Guard) setAside(what string, data []byte) (name string, err error) {
	aside := filepath.Join(g.dirs.State, "set-aside")
	if err := os.MkdirAll(aside, 0o700); err != nil {
		return "", err
	}
	name = filepath.Join(aside, fmt.Sprintf("%s.%d", what, g.now().UnixNano()))
	return name, liststore.WriteFile(name, data, 0o600)
}

// labelsFor gives the payloads that may hold a VM's keys.
func (g *Guard) labelsFor(uuid, image string) (payloads [][]byte) {
	if image != "" {
		if b, err := imagefile.ReadLabel(image); err == nil {
			payloads = append(payloads, b)
		}
	}
	if b, err := g.kept(uuid, keptLabel); err == nil && len(b) <= label.MaxPayload {
		payloads = append(payloads, b)
	}
	return payloads
}

// recordFrom makes a record from a label and the state that it belongs to. The
// label must have the keys for this host or, if that is given, the recovery key.
// The keys are the caller's to wipe.
func (g *Guard) recordFrom(ctx context.Context, payload []byte, uuid, name, instance string, dir *statedir.Seen, key *recovery.Key) (*list.Record, *secret.Buffer, error) {
	l, err := label.UntrustedParse(payload)
	if err != nil {
		return nil, nil, err
	}
	if l.VM != uuid {
		return nil, nil, fmt.Errorf("the label belongs to VM %s", l.VM)
	}
	wrapped, keys, err := g.keysOf(ctx, l, key)
	if err != nil {
		return nil, nil, err
	}
	if l, err = label.Verify(payload, stateKey(keys)); err == nil && dir.Exists() && authenticate(dir, keys) != lifecycle.Authentic {
		err = errors.New("the state was not written under the label's key")
	}
	if err != nil {
		keys.Wipe()
		return nil, nil, err
	}
	now := g.unix()
	r := &list.Record{
		UUID: uuid, Name: name, Instance: instance, State: list.Stored, KeyOwner: list.Ours, WrappedKeys: wrapped,
		LabelID: l.ID, LabelGeneration: l.Generation, Baseline: dir.Digest, Tag: tagOf(dir, keys), Created: now, Changed: now, BootID: g.bootID,
	}
	if f := g.recovery.Load(); f != nil {
		if file, ok := l.Recipient(f.to.LabelName()); ok {
			r.RecoveryKeys, r.RecoveryTo = file, f.Recipient
		}
	}
	return r, keys, nil
}

// keysOf gives the keys that a label has, and what they are for this host.
func (g *Guard) keysOf(ctx context.Context, l *label.Label, key *recovery.Key) (wrapped []byte, keys *secret.Buffer, err error) {
	wrapped, ok := l.Recipient(g.tpm.BindKeyName())
	if ok {
		keys, err = g.unwrap(ctx, wrapped)
		return wrapped, keys, err
	}
	if key == nil {
		return nil, nil, errors.New("the label was made for another host")
	}
	file, ok := l.Recipient(key.Recipient().LabelName())
	if !ok {
		return nil, nil, errors.New("the label was made for another host and has no part for this recovery key")
	}
	if keys, err = openPair(key, file); err != nil {
		return nil, nil, err
	}
	if wrapped, err = g.tpm.WrapKeys(keys.Bytes()); err != nil {
		keys.Wipe()
		return nil, nil, g.tpmRefusal(err)
	}
	return wrapped, keys, nil
}

// relabel gives a record a new label, in the image if that can carry one.
func (g *Guard) relabel(ctx context.Context, store *liststore.Store, r *list.Record, keys *secret.Buffer, l lifecycle.LabelSeen) error {
	r = r.Clone()
	if err := g.wrapRecovery(r, keys); err != nil {
		return err
	}
	payload, err := g.sealLabel(r, keys, l.Path)
	if err != nil {
		return err
	}
	if err := g.keep(r.UUID, keptLabel, payload); err != nil {
		return err
	}
	// While it waits, what the image carries now is the predecessor.
	r.PendingLabel, r.LabelPath, r.LabelDigest = nil, "", list.Digest{}
	if l.Path != "" {
		r.PendingLabel, r.LabelPath = payload, l.Path
		if l.Present && l.Damaged == "" && l.VM == r.UUID {
			r.LabelDigest = l.Digest
		}
	}
	if err := store.Commit(liststore.Change{Put: r}); err != nil {
		return err
	}
	n, why, err := g.writePending(ctx, r, r.LabelPath)
	if err != nil {
		return err
	}
	if why != "" {
		g.log.WithField(journal.VM, r.UUID).Info("label: " + why)
	}
	return store.Commit(liststore.Change{Put: n})
}

func (g *Guard) adoptKnown(ctx context.Context, st *start, fresh bool) (string, error) {
	s := st.seen
	if st.r.KeyOwner != s.KeyOwner {
		return "", lifecycle.Prepare(st.r, s, g.policy()).Refusal
	}
	if !s.State.Exists && !lifecycle.Newest(st.r, s.Journal).IsZero() {
		if !fresh {
			return "", reason.Refuse(reason.VTPMMissing, "'virt-trust repair' puts the kept state back, 'virt-trust adopt --new' gives the VM a new, empty vTPM",
				"%s has no vTPM state", s.Instance)
		}
		if err := g.delete(ctx, st.store, st.r, "a new vTPM was asked for"); err != nil {
			return "", err
		}
		st.r = nil
		if s.KeyOwner == list.Libvirts {
			return "the VM has a new vTPM", g.createForeign(ctx, st)
		}
		return "the VM has a new vTPM", g.create(ctx, st, nil)
	}
	r := st.r.Clone()
	r.Instance, r.Name, r.Changed = s.Instance, st.f.Name, g.unix()
	if r.KeyOwner == list.Libvirts {
		return "the record follows the VM", st.store.Commit(liststore.Change{Put: r})
	}
	keys, err := g.unwrap(ctx, r.WrappedKeys)
	if err != nil {
		return "", err
	}
	defer keys.Wipe()
	if s.State.Exists {
		s.State.Auth = authenticate(st.dir, keys)
		switch d := lifecycle.State(r, s, g.policy()); d.Plan {
		case lifecycle.Start, lifecycle.StartRecovered:
			r = lifecycle.Settled(r, s.State.Digest, s.Journal, g.unix())
		case lifecycle.FinishAdoption:
			if r, err = g.finishAdoption(ctx, st); err != nil {
				return "", err
			}
		case lifecycle.RestoreKept:
			return "", reason.Refuse(reason.VTPMChanged, "'virt-trust repair' puts the kept state back", "a crash had left the vTPM state unreadable")
		default:
			if fresh && r.KeyOwner == list.Ours {
				return g.startOver(ctx, st)
			}
			return "", d.Refusal
		}
	}
	if err := g.relabel(ctx, st.store, r, keys, s.Label); err != nil {
		return "", err
	}
	return "the VM's image has a new label", g.dropJournal(r.UUID)
}

// Release gives a VM that is off back to plain libvirt. A crash at any step
// leaves a VM that starts guarded, as before.
func (g *Guard) Release(ctx context.Context, d libvirt.Domain, f *domain.Facts) (what string, err error) {
	if f.TPM == nil {
		return "", errors.New("the VM has no emulated TPM")
	}
	defer g.lock(f.UUID)()
	if err := g.off(ctx, d, f); err != nil {
		return "", err
	}
	if d.ManagedSave {
		return "", reason.Refuse(reason.PolicyForbids, "start the VM and shut it down, or 'virsh managedsave-remove' the image",
			"the VM has a managed save image, in which its vTPM is encrypted")
	}
	st, err := g.decide(ctx, f, lifecycle.Policy{}, false)
	if err != nil {
		return "", err
	}
	defer func() { st.keys.Wipe() }()
	switch {
	case st.r == nil && st.d.Plan == lifecycle.Refuse && st.d.Refusal.Code != reason.VTPMUnknown:
		return "", st.d.Refusal
	case st.r == nil && st.seen.State.Exists && st.seen.State.Kind != statefile.Plain && st.seen.KeyOwner == list.Ours:
		return "", st.d.Refusal
	case st.r == nil:
		st.r = g.newRecord(st)
		return g.released(st, "the VM was not guarded; it stays so")
	case st.d.Plan == lifecycle.Pass:
		return "the VM was released before", nil
	case st.d.Plan == lifecycle.Refuse:
		return "", st.d.Refusal
	case st.d.Plan == lifecycle.FinishAdoption:
		if err := g.unlabel(st, st.r.Clone()); err != nil {
			return "", err
		}
		return g.released(st, "the plain vTPM state is there")
	case st.r.KeyOwner == list.Libvirts:
		return g.released(st, "the vTPM's key was libvirt's all the time")
	case !st.seen.State.Exists:
		if err := g.unlabel(st, st.r.Clone()); err != nil {
			return "", err
		}
		return g.released(st, "there was no vTPM state yet")
	}
	if st.keys == nil {
		if st.keys, err = g.unwrap(ctx, st.r.WrappedKeys); err != nil {
			return "", err
		}
	}
	plain, err := statefile.Decrypt(st.dir.Data, stateKey(st.keys))
	if err != nil {
		return "", err
	}
	defer secret.Wipe(plain)
	// From here to the end a start would find the plain state and, by
	// AdoptFrom, take it in again; and would find no label and, by the waiting
	// one, write it.
	if err := g.keepState(st.r.UUID, st.dir); err != nil {
		return "", err
	}
	r := lifecycle.Settled(st.r, st.dir.Digest, st.seen.Journal, g.unix())
	r.AdoptFrom = statedir.Digest(st.dir.Name, plain)
	if err := g.unlabel(st, r); err != nil {
		return "", err
	}
	if err := statedir.Replace(st.seen.Instance, plain, false); err != nil {
		return "", err
	}
	return g.released(st, "plain libvirt starts the VM with its vTPM")
}

// unlabel takes the label out of the image of a VM that is being released,
// whose record becomes r: the label waits in it.
func (g *Guard) unlabel(st *start, r *list.Record) error {
	l := st.seen.Label
	if l.Present {
		payload, err := imagefile.ReadLabel(l.Path)
		if err != nil {
			return err
		}
		r.PendingLabel, r.LabelDigest = payload, list.Digest{}
	}
	if err := st.store.Commit(liststore.Change{Put: r}); err != nil {
		return err
	}
	if l.Path == "" || l.Unsupported != "" {
		return nil
	}
	err := imagefile.RemoveLabel(l.Path, ownLabel(st.f.UUID))
	switch {
	case err == nil, errors.Is(err, imagefile.ErrNoLabel), errors.Is(err, imagefile.ErrKept):
		return nil
	case errors.Is(err, imagefile.ErrInUse):
		return errors.Join(
			reason.Refuse(reason.PolicyForbids, "end what uses it, and release the VM again", "the image %s is in use", l.Path),
			st.store.Commit(liststore.Change{Put: st.r}))
	}
	return err
}

func (g *Guard) released(st *start, what string) (string, error) {
	r := &list.Record{
		UUID: st.r.UUID, Name: st.f.Name, Instance: st.seen.Instance, State: list.Released, KeyOwner: st.r.KeyOwner,
		Created: st.r.Created, Changed: g.unix(), LastVerdict: st.r.LastVerdict,
	}
	g.goes(r.UUID, "released to plain libvirt")
	if err := st.store.Commit(liststore.Change{Put: r}); err != nil {
		return "", err
	}
	if err := g.forget(r.UUID); err != nil {
		return "", err
	}
	g.report(r.UUID, r.Name, "release-vm", allow, "", what, journal.VMReleased)
	g.changed(r.UUID)
	return what, nil
}

// ownLabel agrees to remove labels that name this VM, and damaged ones.
func ownLabel(uuid string) func([]byte) bool {
	return func(payload []byte) bool {
		if payload == nil {
			return true
		}
		l, err := label.UntrustedParse(payload)
		return err != nil || l.VM == uuid
	}
}

// Repair puts back what the list expects of a VM that is off.
func (g *Guard) Repair(ctx context.Context, d libvirt.Domain, f *domain.Facts) (what string, err error) {
	return g.atRest(ctx, d, f, func(st *start) (string, error) { return g.repair(ctx, st) })
}

func (g *Guard) repair(ctx context.Context, st *start) (what string, err error) {
	if err := known(st); err != nil {
		return "", err
	}
	f, store := st.f, st.store
	if filepath.Clean(st.r.Instance) != filepath.Clean(st.seen.Instance) {
		return "", reason.Refuse(reason.VTPMChanged, "put it back, or run 'virt-trust adopt'", "the VM's state folder was %s and is now %s", st.r.Instance, st.seen.Instance)
	}
	l := st.seen.Label
	relabel := l.Path != "" && st.r.KeyOwner == list.Ours && l.Unsupported == "" && (!l.Present || l.Digest != st.r.LabelDigest)
	if relabel && l.Present && l.Damaged == "" && l.VM != f.UUID {
		return "", reason.Refuse(reason.LabelOtherVM, "put the VM's own image back, or run 'virt-trust adopt' if the image is now this VM's",
			"the label in %s belongs to VM %s", l.Path, l.VM)
	}
	var keys *secret.Buffer
	if st.r.KeyOwner == list.Ours {
		if keys, err = g.unwrap(ctx, st.r.WrappedKeys); err != nil {
			return "", err
		}
		defer keys.Wipe()
	}
	// The label first: where the state cannot be put back, its own ways are not
	// to be barred by a label that is wrong too.
	var done []string
	if relabel {
		l.Present = false // what is there now is nobody's predecessor
		if err := g.relabel(ctx, store, st.r, keys, l); err != nil {
			return "", err
		}
		st.r = store.Get(f.UUID)
		done = append(done, "the label was written again")
	}
	if newest := lifecycle.Newest(st.r, st.seen.Journal); st.seen.State.Digest != newest && !newest.IsZero() {
		if err := g.putBack(st, keys); err != nil {
			return "", err
		}
		done = append(done, "the vTPM state was put back")
	}
	if len(done) == 0 {
		what = "there was nothing to repair"
	} else {
		what = done[0]
		for _, s := range done[1:] {
			what += "; " + s
		}
		g.report(f.UUID, f.Name, "repair", allow, "", what, "")
		g.changed(f.UUID)
	}
	return what, nil
}

// putBack puts the kept state in its place, and settles the record on it.
func (g *Guard) putBack(st *start, keys *secret.Buffer) error {
	kept, err := g.kept(st.f.UUID, keptState)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading the kept vTPM state: %w", err)
	}
	if err != nil {
		return reason.Refuse(reason.VTPMMissing, "bring it back from a backup", "the kept vTPM state is gone as well")
	}
	digest := statedir.Digest(st.dir.Name, kept)
	if !lifecycle.Restorable(st.r, st.seen, digest) && !g.unnoted(st, keys, kept, digest) {
		return reason.Refuse(reason.VTPMMissing, "bring it back from a backup", "the kept vTPM state is not the one that the list holds")
	}
	uid, gid, err := lookupUser(g.cfg.Swtpm.User)
	if err != nil {
		return err
	}
	if err := statedir.Make(st.seen.Instance, uid, gid); err != nil {
		return err
	}
	unadopted := st.seen.State.Exists && st.seen.State.Digest == st.r.AdoptFrom
	if err := statedir.Replace(st.seen.Instance, kept, unadopted); err != nil {
		return err
	}
	r := lifecycle.Settled(st.r, digest, st.seen.Journal, g.unix())
	r.SetTag(tagOf(&statedir.Seen{Data: kept}, keys))
	if !st.r.Open {
		r.State = st.r.State // it may be suspended
	}
	if err := st.store.Commit(liststore.Change{Put: r}); err != nil {
		return err
	}
	st.r = r
	return g.dropJournal(r.UUID)
}

// unnoted reports whether a kept state was written in the last instant before
// a crash: it is this VM's, and none that is known.
func (g *Guard) unnoted(st *start, keys *secret.Buffer, kept []byte, digest list.Digest) bool {
	return st.r.Open && !lifecycle.Familiar(st.r, st.seen.Journal, digest) && authenticate(&statedir.Seen{Data: kept}, keys) == lifecycle.Authentic
}

// Accept takes what lies there as right, on the admin's word.
func (g *Guard) Accept(ctx context.Context, d libvirt.Domain, f *domain.Facts) (what string, err error) {
	return g.atRest(ctx, d, f, func(st *start) (string, error) { return g.accept(ctx, st) })
}

func (g *Guard) accept(ctx context.Context, st *start) (what string, err error) {
	if err := known(st); err != nil {
		return "", err
	}
	f, r, s := st.f, st.r, st.seen
	older := lifecycle.OlderLabel(r, s.Label)
	same := s.State.Digest == lifecycle.Newest(r, s.Journal)
	switch {
	case len(s.State.Strange) > 0:
		return "", lifecycle.Prepare(r, s, g.policy()).Refusal
	case !s.State.Exists && !same:
		return "", reason.Refuse(reason.VTPMMissing, "'virt-trust repair' puts the kept state back", "there is no vTPM state to accept")
	case same && !older:
		return "the vTPM state is the one that the list holds", nil
	}
	var keys *secret.Buffer
	if r.KeyOwner == list.Ours {
		if keys, err = g.unwrap(ctx, r.WrappedKeys); err != nil {
			return "", err
		}
		defer keys.Wipe()
	}
	if !same {
		if r.KeyOwner == list.Ours && authenticate(st.dir, keys) != lifecycle.Authentic {
			return "", reason.Refuse(reason.VTPMChanged, "'virt-trust repair' puts the kept state back", "the vTPM state was not written under this VM's key: nothing could load it")
		}
		r = lifecycle.Settled(r, s.State.Digest, s.Journal, g.unix())
		r.SetTag(tagOf(st.dir, keys))
		// The newest is given up when the older one is durable and in the list, not before.
		if _, err := statedir.Settle(r.Instance); err != nil {
			return "", err
		}
		if err := st.store.Commit(liststore.Change{Put: r}); err != nil {
			return "", err
		}
		if err := g.keepState(r.UUID, st.dir); err != nil {
			return "", err
		}
		what = "an older vTPM state was accepted on the admin's word"
	}
	if older {
		if err := g.relabel(ctx, st.store, r, keys, s.Label); err != nil {
			return "", err
		}
		what = strings.TrimPrefix(what+"; an older label was replaced by a new one on the admin's word", "; ")
	}
	g.report(f.UUID, f.Name, "accept", allow, reason.VTPMRolledBack, what, journal.OlderAccepted)
	g.changed(f.UUID)
	if same {
		return what, nil
	}
	return what, g.dropJournal(r.UUID)
}

// RepairList writes the list anew: from memory if it is there, else from the
// labels that are kept and the states that they authenticate.
func (g *Guard) RepairList(ctx context.Context) (what string, err error) {
	if store := g.peek(); store != nil {
		if err := store.Rewrite(); err != nil {
			return "", err
		}
		what = fmt.Sprintf("the vTPM list was written again, with %d VMs", len(store.All()))
		g.report("", "", "repair", allow, reason.ListDamaged, what, journal.ListDamaged)
		return what, nil
	}
	if _, err = g.List(ctx); err == nil {
		return "the vTPM list is readable: there was nothing to repair", nil
	}
	// An older list is worth more than none: by it older states are still told.
	if r := reason.As(err); r == nil || r.Code != reason.ListDamaged {
		return "", err
	}
	return g.rebuildList(ctx, nil)
}

// rebuildList makes the list from what is kept of each VM. key may be nil.
func (g *Guard) rebuildList(ctx context.Context, key *recovery.Key) (what string, err error) {
	g.openList.Lock()
	defer g.openList.Unlock()
	names, err := os.ReadDir(filepath.Join(g.dirs.State, "vtpm"))
	if err != nil {
		return "", err
	}
	var records []*list.Record
	var lost []string
	for _, e := range names {
		r, err := g.rebuildOne(ctx, e.Name(), key)
		if err != nil {
			lost = append(lost, fmt.Sprintf("%s (%s)", e.Name(), err))
			continue
		}
		records = append(records, r)
	}
	// What is written over may be readable one day.
	if b, err := os.ReadFile(liststore.Path(g.dirs.State)); err == nil && len(b) > 0 {
		if _, err := g.setAside("vtpm-list", b); err != nil {
			return "", err
		}
	}
	store, err := liststore.Rebuild(ctx, g.dirs.State, g.dirs.Run, g.key(), g.rollback(), records)
	if err != nil {
		return "", g.tpmRefusal(err)
	}
	g.opened(store)
	what = "the vTPM list was rebuilt from labels, with " + vms(len(records))
	for _, l := range lost {
		what += "; not taken in: " + l
	}
	g.report("", "", "repair", allow, reason.ListDamaged, what, journal.ListDamaged)
	for _, r := range records {
		g.changed(r.UUID)
	}
	return what, nil
}

func (g *Guard) rebuildOne(ctx context.Context, uuid string, key *recovery.Key) (*list.Record, error) {
	payload, err := g.kept(uuid, keptLabel)
	if err != nil {
		return nil, errors.New("no label is kept")
	}
	l, err := label.UntrustedParse(payload)
	if err != nil {
		return nil, err
	}
	dir, err := statedir.Look(l.Instance)
	if err != nil {
		return nil, err
	}
	r, keys, err := g.recordFrom(ctx, payload, uuid, uuid, l.Instance, dir, key)
	defer func() { keys.Wipe() }()
	if kept, e := g.kept(uuid, keptState); e == nil && (err != nil || !dir.Exists()) {
		// Its start is refused then, and 'virt-trust repair' puts the kept one back:
		// without a baseline it would silently get a blank vTPM.
		seen := &statedir.Seen{Dir: l.Instance, Name: dir.Name, Data: kept, Digest: statedir.Digest(dir.Name, kept)}
		keys.Wipe()
		r, keys, err = g.recordFrom(ctx, payload, uuid, uuid, l.Instance, seen, key)
	}
	if err != nil {
		return nil, err
	}
	if r.Baseline.IsZero() {
		r.State = list.Created
	}
	// Where the image is, its label will be found right at the next start: it
	// is the one that is kept, and waits.
	r.PendingLabel = payload
	if _, here := l.Recipient(g.tpm.BindKeyName()); here {
		return r, nil
	}
	r.LabelDigest = list.DigestOf(payload) // until the new one is written
	if err := g.wrapRecovery(r, keys); err != nil {
		return nil, err
	}
	if r.PendingLabel, err = g.sealLabel(r, keys, ""); err != nil {
		return nil, err
	}
	return r, g.keep(uuid, keptLabel, r.PendingLabel)
}

// delete ends a VM's association: the record, what is kept, and the label in
// the image; a signed statement stays.
func (g *Guard) delete(ctx context.Context, store *liststore.Store, r *list.Record, why string) error {
	g.closeGrant(r.UUID)
	g.endSession(r.UUID)
	g.goes(r.UUID, why)
	if err := store.Commit(liststore.Change{Delete: r.UUID}); err != nil {
		return err
	}
	err := g.forget(r.UUID)
	if r.LabelPath != "" {
		e := imagefile.RemoveLabel(r.LabelPath, ownLabel(r.UUID))
		var unsupported *imagefile.UnsupportedError
		switch {
		case e == nil, errors.Is(e, imagefile.ErrNoLabel), errors.Is(e, imagefile.ErrKept), errors.Is(e, fs.ErrNotExist), errors.As(e, &unsupported):
		default:
			g.log.WithField(journal.VM, r.UUID).WithError(e).Warn("the label of a deleted VM stays in its image")
		}
	}
	if e := g.stateDeleted(ctx, r); e != nil {
		err = errors.Join(err, e)
	}
	g.mu.Lock()
	delete(g.verdicts, r.UUID)
	g.mu.Unlock()
	g.report(r.UUID, r.Name, "undefine", noted, "", "the vTPM's record and wrapped keys were erased: "+why, journal.VMDeleted)
	g.changed(r.UUID)
	return err
}

// Statement says that this host deleted a vTPM. Signed is the ECDSA signature
// by the host's certifier over the SHA-256 of the JSON of all before it.
type Statement struct {
	Type     string    `json:"type"` // virt-trust/deletion/v1
	VM       string    `json:"vm"`
	Name     string    `json:"name"`
	Instance string    `json:"instance"`
	Baseline string    `json:"baseline"`
	Time     time.Time `json:"time"`
	BindKey  string    `json:"bind_key"`
	Signed   []byte    `json:"signed,omitempty"`
}

func (g *Guard) stateDeleted(ctx context.Context, r *list.Record) error {
	s := Statement{
		Type: "virt-trust/deletion/v1", VM: r.UUID, Name: r.Name, Instance: r.Instance, Baseline: r.Baseline.String(),
		Time: g.now().UTC().Truncate(time.Second), BindKey: fmt.Sprintf("%x", g.tpm.BindKeyName()),
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if s.Signed, err = g.tpm.Sign(ctx, sha256.Sum256(b)); err != nil {
		return fmt.Errorf("signing the deletion statement: %w", err)
	}
	if b, err = json.Marshal(s); err != nil {
		return err
	}
	dir := filepath.Join(g.dirs.State, "deleted")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return liststore.WriteFile(filepath.Join(dir, fmt.Sprintf("%s.%d.json", r.UUID, s.Time.Unix())), append(b, '\n'), 0o600)
}
