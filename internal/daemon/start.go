package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"virt-trust/internal/domain"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/platform/secret"
	"virt-trust/internal/vtpm/lifecycle"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statedir"
	"virt-trust/internal/vtpm/statefile"
)

// session is a VM whose vTPM may be written.
type session struct {
	mu    sync.Mutex
	uuid  string
	dir   string
	keys  *secret.Buffer // nil: libvirt's, or not yet needed after a restart
	noted []list.Past
	ended bool
	state list.State
	// writes: swtpm may have written. Until QEMU has it load its state, only a
	// swtpm_setup may.
	writes atomic.Bool
	// making: a swtpm_setup makes the vTPM, and QEMU has not had it yet. Nothing is
	// noted until then: what is there of the vTPM of a record without baseline and
	// journal was never of use, and may be removed by swtpm_setup or libvirt and
	// made again, also when virt-trustd was started anew meanwhile.
	making atomic.Bool

	tags     *list.Record // the tags as the record shall have them; nil: as it has them
	reverts  uint32       // 1 where the vTPM was taken back, and the record does not say so yet
	reverted int64        // when that was; 0: it was not
	unwanted bool         // it was, which policy.restore forbids: nothing that it writes counts
	// suspect: it was started from a saved image, and was not saved, as far as is
	// known, when it stopped last. Under Guard.mu.
	suspect bool
}

// start is a VM on its way through prepare.
type start struct {
	f     *domain.Facts
	store *liststore.Store
	r     *list.Record
	dir   *statedir.Seen
	seen  lifecycle.Seen
	keys  *secret.Buffer
	d     lifecycle.Decision
	notes []note
	runs  []launcher // what will run for it
}

// note is something that happened on the way, for log and journal.
type note struct {
	event journal.Event // may be empty
	text  string
}

func (g *Guard) policy() lifecycle.Policy {
	return lifecycle.Policy{Adopt: g.cfg.Policy.Adopt, StrictCrashRecovery: g.cfg.Policy.CrashRecovery == "strict"}
}

// decide looks and asks the rules until they have an answer. With dry nothing
// is changed. Where it gives a start without an error, its keys, if there are
// any, are the caller's to wipe.
func (g *Guard) decide(ctx context.Context, f *domain.Facts, p lifecycle.Policy, dry bool) (*start, error) {
	store, err := g.List(ctx)
	if err != nil {
		return nil, err
	}
	st := &start{f: f, store: store, r: store.Get(f.UUID)}
	auth, restored := lifecycle.NotAsked, false
	for range 4 {
		if st.dir, st.seen, err = g.see(ctx, f, st.r, store); err != nil {
			break
		}
		if auth != lifecycle.NotAsked {
			st.seen.State.Auth = authenticate(st.dir, st.keys)
		}
		st.seen.Restored = restored
		st.d = lifecycle.Prepare(st.r, st.seen, p)
		switch st.d.Plan {
		case lifecycle.Authenticate:
			if st.keys == nil {
				if st.keys, err = g.unwrap(ctx, st.r.WrappedKeys); err != nil {
					break
				}
			}
			auth = lifecycle.Authentic // asked anew each time round
			continue
		case lifecycle.RestoreKept:
			st.notes = append(st.notes, note{journal.StateRecovered, st.d.Note})
			if dry {
				return st, nil
			}
			var kept []byte
			if kept, err = g.kept(f.UUID, keptState); err == nil {
				err = statedir.Replace(st.seen.Instance, kept, false)
			}
			if err == nil {
				restored = true
				continue
			}
		}
		break
	}
	if err != nil {
		st.keys.Wipe()
		return nil, err
	}
	if st.d.Note != "" {
		st.notes = append(st.notes, note{journal.StateRecovered, st.d.Note})
	}
	if st.d.Plan == lifecycle.Authenticate || st.d.Plan == lifecycle.RestoreKept {
		st.keys.Wipe()
		return nil, errors.New("the vTPM state changes while it is looked at")
	}
	return st, nil
}

// Prepare decides whether a VM may start and, if so, opens its record and a
// launch grant. An error that is no *reason.Refusal says that nothing could be
// told.
//
// goOn, which may be nil, is called when all is right but for the TPM's word, and
// libvirt may go on: the wrapper and start wait for what becomes of it, and tell.
func (g *Guard) Prepare(ctx context.Context, f *domain.Facts, cgroup string, goOn func()) (err error) {
	defer g.lock(f.UUID)()
	g.mu.Lock()
	restored := g.restore[f.UUID]
	delete(g.restore, f.UUID)
	g.mu.Unlock()
	var ahead *grant // libvirt has gone on with it
	defer func() {
		if ahead != nil {
			g.decided(ahead, err)
		}
	}()
	st, err := g.prepare(ctx, f, func(st *start) {
		// A TPM that is slow gains nothing by it, and libvirt and the wrapper would wait
		// in places where they are not made for it.
		if goOn == nil || ahead != nil || restored || st.d.Plan != lifecycle.Start || st.r.AKDue || !g.quick() {
			return
		}
		if ahead = g.openAhead(st, cgroup); ahead != nil {
			goOn()
		}
	})
	if r := reason.As(err); r != nil && g.cfg.Mode == "audit" && !g.guarded(f.UUID) {
		g.report(f.UUID, f.Name, "prepare", wouldRefuse, r.Code, r.Text(), journal.WouldRefuse)
		st, err = &start{f: f, seen: lifecycle.Seen{Instance: f.StateDir(g.cfg.Swtpm.StateRoot)}, d: lifecycle.Decision{Plan: lifecycle.Pass}}, nil
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			st.keys.Wipe()
		}
	}()
	if st.d.Plan == lifecycle.Pass {
		g.open(st, cgroup)
		return nil
	}
	if err := statedir.Discard(st.dir); err != nil {
		g.log.WithField(journal.VM, f.UUID).WithError(err).Warn("removing what a killed swtpm left")
	}
	suspect := restored && st.r.State != list.Suspended
	if suspect && g.cfg.Policy.Restore == "refuse" {
		err = reason.Refuse(reason.PolicyForbids, "start the VM without the image ('virsh managedsave-remove', then 'virsh start'), or change policy.restore",
			"the saved image is not of the VM's last stop, and policy.restore is refuse")
		return err
	}
	if restored {
		st.notes = append(st.notes, note{text: "started from a saved image"})
	}

	r := lifecycle.Verdict(lifecycle.Opened(st.r, g.bootID, g.unix()), nil, g.unix())
	r.Name = f.Name
	var generation uint64
	if generation, err = g.admit(ctx, f, st.runs); err != nil {
		return err
	}
	r.Launchers = max(r.Launchers, generation)
	if st.r.LabelDigest == r.LabelDigest && !r.LabelDigest.IsZero() && st.seen.Label.Path != "" {
		r.LabelPath = st.seen.Label.Path
	}
	// What was noted stays known also when audit mode starts an older state.
	for _, j := range st.seen.Journal {
		r.SetBaseline(j.Digest, j.Time)
	}
	if st.d.Plan == lifecycle.StartRecovered && st.d.Refusal == nil {
		r.SetBaseline(st.seen.State.Digest, g.unix())
	}
	if st.dir.Digest == r.Baseline && (r.Tag == (list.Tag{}) || r.Baseline != st.r.Baseline) {
		r.SetTag(tagOf(st.dir, st.keys))
	}
	r.AdoptFrom, r.Ephemeral = list.Digest{}, g.ephemeral(f)
	wantsAK := g.cfg.Attestation.VTPMAK && f.TPM.Version == "2.0" && r.KeyOwner == list.Ours && g.launch.ek != nil
	if !st.dir.Exists() {
		r.AKDue = wantsAK
	}
	if st.dir.Exists() {
		if err = g.keepState(r.UUID, st.dir); err != nil {
			return err
		}
	}
	committed := lap(ctx, tookList)
	err = st.store.Commit(liststore.Change{Put: r})
	committed()
	if err != nil {
		return err
	}
	// The journal of another opening is none of this one: it can go, and a
	// crash before it has gone does no harm.
	if err = g.dropJournal(r.UUID); err != nil {
		return err
	}
	st.r = r
	if err = g.openSession(st, suspect); err != nil {
		g.endSession(f.UUID)
		return err
	}
	g.open(st, cgroup)
	if r.AKDue && wantsAK && st.dir.Exists() && !restored { // else the vTPM is the image's
		g.makeUpAK(ctx, st)
	}
	g.mu.Lock()
	delete(g.verdicts, f.UUID)
	g.mu.Unlock()
	for _, n := range st.notes {
		g.report(f.UUID, f.Name, "prepare", noted, "", n.text, n.event)
	}
	g.changed(f.UUID)
	return nil
}

// guarded reports whether a VM needs keys of ours to start, as far as can be
// told without the list.
func (g *Guard) guarded(uuid string) bool {
	if store := g.peek(); store != nil {
		r := store.Get(uuid)
		return r != nil && r.State != list.Released
	}
	_, err := os.Lstat(g.keepDir(uuid))
	return err == nil
}

// prepare carries out whatever must be done before a VM's record is opened.
// ahead is called when only the TPM's word is missing.
func (g *Guard) prepare(ctx context.Context, f *domain.Facts, ahead func(*start)) (*start, error) {
	dir := f.StateDir(g.cfg.Swtpm.StateRoot)
	if used, err := waitUnused(dir); err != nil {
		return nil, err
	} else if used {
		return nil, reason.Refuse(reason.PolicyForbids, "stop the VM, or end that swtpm: 'fuser -v "+dir+"/.lock' names it", "a swtpm is running on this vTPM")
	}
	runs, err := g.launchers(ctx, f)
	if r := reason.As(err); r != nil && r.Code == reason.LauncherNotApproved && g.cfg.Mode == "audit" {
		g.report(f.UUID, f.Name, "prepare", wouldRefuse, r.Code, r.Text(), journal.WouldRefuse)
	} else if err != nil {
		return nil, err
	}
	var notes []note
	for range 4 {
		st, err := g.decide(ctx, f, g.policy(), false)
		if err != nil {
			return nil, err
		}
		if err := g.checkEmulator(st); err != nil {
			r := reason.As(err)
			if r == nil || g.cfg.Mode != "audit" {
				st.keys.Wipe()
				return nil, err
			}
			g.report(f.UUID, f.Name, "prepare", wouldRefuse, r.Code, r.Text(), journal.WouldRefuse)
		}
		if st.d.Plan == lifecycle.Refuse && g.cfg.Mode == "audit" {
			g.report(f.UUID, f.Name, "prepare", wouldRefuse, st.d.Refusal.Code, st.d.Refusal.Text(), journal.WouldRefuse)
			st.notes = append(st.notes, note{text: "audit mode: started although " + st.d.Refusal.Error()})
			if st.r == nil {
				st.d.Plan = lifecycle.Pass
			} else {
				st.d.Plan = lifecycle.StartRecovered
				if !st.seen.State.Exists {
					st.d.Plan = lifecycle.StartFresh
				}
			}
		}
		st.notes = append(notes, st.notes...)
		again, err := g.carryOut(ctx, st, ahead)
		if err != nil {
			st.keys.Wipe()
			return nil, err
		}
		if !again {
			st.runs = runs
			return st, nil
		}
		st.keys.Wipe()
		notes = st.notes
	}
	return nil, errors.New("the VM's label or vTPM state changes while it is looked at")
}

// carryOut does what a plan needs before the grant. again asks to decide anew.
func (g *Guard) carryOut(ctx context.Context, st *start, ahead func(*start)) (again bool, err error) {
	switch st.d.Plan {
	case lifecycle.Pass:
		return false, nil
	case lifecycle.Refuse:
		return false, st.d.Refusal
	case lifecycle.Create:
		return true, g.create(ctx, st, nil)
	case lifecycle.AdoptPlain:
		return true, g.create(ctx, st, st.dir.Data)
	case lifecycle.CreateAnew:
		return true, g.delete(ctx, st.store, st.r, "the transient VM had ended")
	case lifecycle.CreateForeign:
		return true, g.createForeign(ctx, st)
	case lifecycle.FinishAdoption:
		_, err := g.finishAdoption(ctx, st)
		return true, err
	}
	if st.r.KeyOwner == list.Libvirts {
		return false, g.approved(ctx)
	}
	// This is the one RSA decryption of a warm start, and what holds the VM to
	// the state of the host.
	if st.keys == nil {
		ahead(st)
		if st.keys, err = g.unwrap(ctx, st.r.WrappedKeys); err != nil {
			return false, err
		}
	}
	switch st.d.Plan {
	case lifecycle.StartFirstLabel, lifecycle.StartNewLabel:
		r := st.r.Clone()
		if st.d.Plan == lifecycle.StartFirstLabel {
			if r.PendingLabel, err = g.sealLabel(r, st.keys, st.seen.Label.Path); err != nil {
				return false, err
			}
			if err := g.keep(r.UUID, keptLabel, r.PendingLabel); err != nil {
				return false, err
			}
			// A crash between the label and the opening must find it expected.
			if err := st.store.Commit(liststore.Change{Put: r}); err != nil {
				return false, err
			}
		}
		n, why, err := g.writePending(ctx, r, st.seen.Label.Path)
		if err != nil {
			return false, err
		}
		if why != "" {
			st.notes = append(st.notes, note{text: why})
		}
		st.r = n // committed with the opening
	}
	return false, nil
}

// approved asks the TPM, for VMs whose keys are not ours.
func (g *Guard) approved(ctx context.Context) error {
	s, err := g.tpm.Status(ctx)
	if err != nil {
		return g.tpmRefusal(err)
	}
	switch s.State {
	case hosttpm.Ready:
		return nil
	case hosttpm.NotApproved:
		return g.tpmRefusal(&hosttpm.PolicyError{Differing: s.Differing})
	case hosttpm.Cleared:
		return g.tpmRefusal(hosttpm.ErrCleared)
	case hosttpm.LockedOut:
		return g.tpmRefusal(hosttpm.ErrLockedOut)
	}
	return g.tpmRefusal(fmt.Errorf("%w: %s", hosttpm.ErrFailed, s.Problem))
}

func (g *Guard) newRecord(st *start) *list.Record {
	now := g.unix()
	return &list.Record{
		UUID: st.f.UUID, Name: st.f.Name, Instance: st.seen.Instance, State: list.Created, KeyOwner: st.seen.KeyOwner,
		LabelID: newID(), Created: now, Changed: now, BootID: g.bootID,
	}
}

// create makes keys, record and label of a VM. plain is its plain vTPM state,
// which is encrypted in place, or nil. Its steps, each of which a crash may
// follow: the encrypted state is kept; the record holds both digests; the state
// is replaced; the label is written; the record is settled.
func (g *Guard) create(ctx context.Context, st *start, plain []byte) error {
	r := g.newRecord(st)
	keys, err := newKeys()
	if err != nil {
		return err
	}
	defer keys.Wipe()
	if r.WrappedKeys, err = g.tpm.WrapKeys(keys.Bytes()); err != nil {
		return g.tpmRefusal(err)
	}
	// Keys that do not come back, or a host that may not have them, end it here.
	back, err := g.unwrap(ctx, r.WrappedKeys)
	if err != nil {
		return err
	}
	back.Wipe()
	if err := g.wrapRecovery(r, keys); err != nil {
		return err
	}
	if r.PendingLabel, err = g.sealLabel(r, keys, st.seen.Label.Path); err != nil {
		return err
	}
	if err := g.keep(r.UUID, keptLabel, r.PendingLabel); err != nil {
		return err
	}
	if st.seen.Label.Path == "" {
		r.PendingLabel = nil
	}
	if plain != nil {
		if err := g.takeIn(r, st, keys, plain); err != nil {
			return err
		}
	} else if err := st.store.Commit(liststore.Change{Put: r}); err != nil {
		return err
	}
	n, why, err := g.writePending(ctx, r, st.seen.Label.Path)
	if err != nil {
		return err
	}
	if why != "" {
		st.notes = append(st.notes, note{text: why})
	}
	n = n.Clone()
	n.AdoptFrom = list.Digest{}
	if err := st.store.Commit(liststore.Change{Put: n}); err != nil {
		return err
	}
	what := note{journal.VMCreated, "the VM has a new vTPM"}
	if plain != nil {
		what = note{journal.VMAdopted, "the VM's plain vTPM state was encrypted and taken into the list"}
	}
	st.notes = append(st.notes, what)
	return nil
}

// takeIn encrypts a plain state in its place.
func (g *Guard) takeIn(r *list.Record, st *start, keys *secret.Buffer, plain []byte) error {
	iv := make([]byte, statefile.KeySize)
	rand.Read(iv)
	enc, err := statefile.Encrypt(plain, stateKey(keys), iv)
	if err != nil {
		return reason.Refuse(reason.VTPMUnknown, "bring it back from a backup", "the plain vTPM state cannot be taken in: %s", err)
	}
	if err := g.keep(r.UUID, keptState, enc); err != nil {
		return err
	}
	r.State, r.Baseline, r.AdoptFrom = list.Stored, statedir.Digest(st.dir.Name, enc), st.dir.Digest
	if err := st.store.Commit(liststore.Change{Put: r}); err != nil {
		return err
	}
	if err := statedir.Replace(st.seen.Instance, enc, true); err != nil {
		return err
	}
	return statedir.Discard(st.dir)
}

// finishAdoption goes on where takeIn, or the way back of Release, was cut off.
// It gives the record as it is then.
func (g *Guard) finishAdoption(ctx context.Context, st *start) (*list.Record, error) {
	r := st.r.Clone()
	if kept, err := g.kept(r.UUID, keptState); err == nil && statedir.Digest(st.dir.Name, kept) == r.Baseline {
		return r, statedir.Replace(st.seen.Instance, kept, true)
	}
	keys, err := g.unwrap(ctx, r.WrappedKeys)
	if err != nil {
		return nil, err
	}
	defer keys.Wipe()
	return r, g.takeIn(r, st, keys, st.dir.Data)
}

// createForeign takes a VM into the list whose state key is libvirt's.
func (g *Guard) createForeign(ctx context.Context, st *start) error {
	if err := g.approved(ctx); err != nil {
		return err
	}
	r := g.newRecord(st)
	r.LabelID = [16]byte{}
	if st.dir.Exists() {
		r.State, r.Baseline = list.Stored, st.dir.Digest
		if err := g.keep(r.UUID, keptState, st.dir.Data); err != nil {
			return err
		}
	}
	st.notes = append(st.notes, note{journal.VMAdopted, "the VM's vTPM is in the list; its key stays libvirt's"})
	return st.store.Commit(liststore.Change{Put: r})
}

// openSession begins to watch a VM's state.
func (g *Guard) openSession(st *start, suspect bool) error {
	s := &session{uuid: st.f.UUID, dir: st.seen.Instance, state: list.Deploying, keys: st.keys, suspect: suspect}
	g.closeGrant(s.uuid)
	g.endSession(s.uuid) // of a start that libvirt never finished
	g.mu.Lock()
	g.sessions[s.uuid] = s
	g.mu.Unlock()
	if st.dir.Exists() {
		return g.watch.Add(s.dir)
	}
	return nil // libvirt makes the folder later: Redeem watches it
}

// settled is called when swtpm has written a state.
func (g *Guard) settled(dir string) {
	g.mu.Lock()
	var s *session
	for _, o := range g.sessions {
		if o.dir == dir {
			s = o
		}
	}
	g.mu.Unlock()
	if s == nil {
		return
	}
	if _, err := g.settle(s); err != nil {
		g.log.WithField(journal.VM, s.uuid).WithError(err).Warn("making a vTPM's state durable")
	}
}

// settle makes the state of a running VM durable and, where it is a new one,
// notes and keeps it. It reports whether swtpm can have written it.
func (g *Guard) settle(s *session) (sound bool, err error) {
	store := g.peek()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended || store == nil || s.making.Load() {
		return true, nil
	}
	r := store.Get(s.uuid)
	if r == nil || !r.Open {
		return true, nil
	}
	newest := lifecycle.Newest(r, s.noted)
	// What has been noted was made durable before that: no start waits for it.
	if seen, err := statedir.Look(s.dir); err == nil && seen.Exists() && seen.Digest == newest {
		return true, nil
	}
	seen, err := statedir.Settle(s.dir)
	if errors.Is(err, fs.ErrNotExist) && newest.IsZero() {
		return true, nil // libvirt makes it later
	}
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist), err
	}
	if seen.Digest == newest {
		return true, nil
	}
	if !s.writes.Load() && !newest.IsZero() {
		return false, nil
	}
	if s.unwanted || !g.plausible(s, r, seen) {
		return false, nil
	}
	tag := tagOf(seen, s.keys)
	if g.wentBack(s, r, tag) {
		return false, nil
	}
	// Kept before it is noted: what is kept is never behind the journal, so that
	// no crash between the two leaves the newest state without a second copy.
	if err := g.keepState(s.uuid, seen); err != nil {
		return true, fmt.Errorf("keeping it: %w", err)
	}
	if err := g.note(s, r, seen.Digest); err != nil {
		return true, fmt.Errorf("noting it: %w", err)
	}
	s.tagged(r).SetTag(tag)
	return true, nil
}

// unwrapLater bounds the wait for keys of a VM that a virt-trustd before this
// one has started.
const unwrapLater = 5 * time.Second

// plausible tells a write of swtpm from a file that someone else moved there.
// Called with the session's lock held.
func (g *Guard) plausible(s *session, r *list.Record, seen *statedir.Seen) bool {
	log := g.log.WithField(journal.VM, s.uuid).WithField(journal.VMName, r.Name)
	old := lifecycle.Familiar(r, s.noted, seen.Digest) // and something was written after it
	if !old && r.KeyOwner == list.Ours && s.keys == nil {
		ctx, cancel := context.WithTimeout(context.Background(), unwrapLater)
		defer cancel()
		var err error
		if s.keys, err = g.unwrap(ctx, r.WrappedKeys); err != nil {
			// Not noted: when the VM stops, its state is looked at again.
			log.WithError(err).Warn("a vTPM's new state cannot be verified now")
			return false
		}
	}
	if !old && (r.KeyOwner == list.Libvirts || authenticate(seen, s.keys) == lifecycle.Authentic) {
		return true
	}
	log.Warn("the vTPM state was replaced while the VM runs; its next start is refused unless swtpm writes it again")
	return false
}

// settleAll looks at every running VM, after the kernel lost events.
func (g *Guard) settleAll() {
	g.mu.Lock()
	var dirs []string
	for _, s := range g.sessions {
		dirs = append(dirs, s.dir)
	}
	g.mu.Unlock()
	for _, d := range dirs {
		g.settled(d)
	}
}

// Launched ends a start: it is asked between swtpm's start and QEMU's: a swtpm that has not
// redeemed its grant did not come through the wrapper, and has no keys.
func (g *Guard) Launched(f *domain.Facts) (err error) {
	defer g.lock(f.UUID)()
	defer func() {
		if err == nil {
			g.readyEmulator(f.UUID)
		}
	}()
	gr, ok, err := g.redeemed(f)
	if err != nil {
		return err
	}
	g.mu.Lock()
	s := g.sessions[f.UUID]
	g.mu.Unlock()
	if !ok && g.cfg.Mode != "enforce" {
		if s != nil {
			s.writes.Store(true)
			s.making.Store(false)
		}
		return nil
	}
	if !ok {
		return reason.Refuse(reason.KeyNotReleased, "restart libvirtd (or virtqemud), which leaves running VMs alone, and try again; 'journalctl -t virt-trust-wrapper' tells more",
			"libvirt did not start swtpm through virt-trust's wrapper")
	}
	g.closeGrant(f.UUID) // all of it is redeemed
	if s == nil {
		return nil
	}
	// swtpm loads its state when QEMU asks it to, which is after this: whoever
	// exchanged it since prepare was too early. From here on a new vTPM counts.
	made := s.making.Swap(false)
	defer func() {
		if err != nil {
			s.making.Store(made)
		}
	}()
	if sound, err := g.settle(s); !sound && g.cfg.Mode == "enforce" {
		return reason.Refuse(reason.VTPMChanged, "start the VM again", "the vTPM state in %s was replaced while the VM was being started", s.dir)
	} else if err != nil && made && g.cfg.Mode == "enforce" {
		return fmt.Errorf("noting the new vTPM: %w", err)
	} else if err != nil {
		g.log.WithField(journal.VM, s.uuid).WithError(err).Warn("making a vTPM's state durable")
	}
	g.mu.Lock()
	suspect := s.suspect
	s.suspect = false
	g.mu.Unlock()
	if suspect {
		s.mu.Lock()
		g.reverted(s, &list.Record{Name: f.Name}, "the VM was restored from a saved image, and was not saved when it stopped last")
		s.mu.Unlock()
	}
	if err := g.launched(context.Background(), f, gr.runs, gr.made); err != nil {
		r := reason.As(err)
		if g.cfg.Mode == "enforce" || r == nil {
			return err
		}
		g.report(f.UUID, f.Name, "start", wouldRefuse, r.Code, r.Text(), journal.WouldRefuse)
	}
	s.writes.Store(true)
	g.setState(f.UUID, list.Running)
	return nil
}

// ephemeral reports whether libvirt removes a VM's vTPM when the VM stops: it
// does with those that are transient, if they do not ask for the contrary.
func (g *Guard) ephemeral(f *domain.Facts) bool {
	if f.TPM.PersistentState || strings.ContainsRune(f.Name, '/') {
		return false
	}
	if _, err := os.Stat(g.dirs.Domains); err != nil {
		return false
	}
	_, err := os.Lstat(filepath.Join(g.dirs.Domains, f.Name+".xml"))
	return errors.Is(err, fs.ErrNotExist)
}

func (g *Guard) setState(uuid string, st list.State) {
	g.mu.Lock()
	s := g.sessions[uuid]
	if s != nil {
		s.state = st
	}
	g.mu.Unlock()
	if s != nil {
		g.changed(uuid)
	}
}

// stateOf is a record's state as it is now.
func (g *Guard) stateOf(r *list.Record) list.State {
	g.mu.Lock()
	defer g.mu.Unlock()
	if s := g.sessions[r.UUID]; s != nil {
		return s.state
	}
	return r.State
}

// Stopped measures and closes the record of a VM that has stopped.
func (g *Guard) Stopped(ctx context.Context, f *domain.Facts, suspended bool) error {
	defer g.lock(f.UUID)()
	g.closeGrant(f.UUID)
	g.closeEmulator(f.UUID)
	store := g.peek()
	if store == nil {
		return nil // a start that was refused, or a stop that is noted when the list is opened
	}
	r := store.Get(f.UUID)
	if r == nil || r.State == list.Released || !r.Open {
		g.endSession(f.UUID)
		return nil
	}
	if used, err := waitUnused(r.Instance); err != nil || used {
		return errors.Join(err, errors.New("its swtpm still runs; the record stays open"))
	}
	g.mu.Lock()
	watched := g.sessions[f.UUID] != nil
	g.mu.Unlock()
	if e := g.ephemeral(f); e != r.Ephemeral { // undefined or defined while it ran
		r = r.Clone()
		r.Ephemeral = e
	}
	if watched {
		return g.rest(ctx, store, r, suspended)
	}
	// libvirt says so too of a start that was refused: what a crash had left is
	// no better for that.
	entries, err := g.readJournal(r)
	if err != nil {
		return err
	}
	return g.closeAfterCrash(ctx, store, r, entries, suspended)
}

// rest closes a record whose swtpm is gone.
func (g *Guard) rest(ctx context.Context, store *liststore.Store, r *list.Record, suspended bool) error {
	g.mu.Lock()
	s := g.sessions[r.UUID]
	g.mu.Unlock()
	var keys *secret.Buffer
	var entries []list.Past
	if s != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		keys, entries = s.keys, s.noted
	} else {
		var err error
		if entries, err = g.readJournal(r); err != nil {
			return err
		}
	}
	seen, err := statedir.Look(r.Instance)
	if err != nil {
		return err
	}
	if seen.Exists() {
		if seen, err = statedir.Settle(r.Instance); err != nil {
			return err
		}
	}
	if s != nil && s.making.Load() && !seen.Exists() && r.Baseline.IsZero() {
		// swtpm_setup has failed, and what it had made was removed: by itself, or by
		// libvirt with the folder. Nothing was ever in it.
		entries = nil
		if err := g.unkeep(r.UUID, keptState); err != nil {
			return err
		}
	}
	auth := lifecycle.NoKey
	if r.KeyOwner == list.Ours && seen.Exists() && seen.Digest != r.Baseline {
		if keys == nil {
			if keys, err = g.unwrap(ctx, r.WrappedKeys); err != nil {
				return err
			}
			defer keys.Wipe()
		}
		auth = authenticate(seen, keys)
	}
	switch {
	case s == nil:
	case !s.writes.Load() && !lifecycle.Newest(r, entries).IsZero():
		auth = lifecycle.Forged // swtpm has not come to write
	case s.unwanted || auth == lifecycle.Authentic && seen.Digest != lifecycle.Newest(r, entries) && g.wentBack(s, r, tagOf(seen, keys)):
		auth = lifecycle.Forged
	}
	n, note := lifecycle.Rest(r, seen.Digest, auth, entries, suspended, g.unix())
	if s != nil {
		s.remember(n)
	}
	if n.Baseline == seen.Digest && n.Baseline != r.Baseline {
		n.SetTag(tagOf(seen, keys))
	}
	if n.Baseline == seen.Digest && seen.Exists() {
		if err := g.keepState(r.UUID, seen); err != nil {
			return err
		}
	}
	// Now that QEMU is gone, a label that waited can be written.
	if len(n.PendingLabel) > 0 && n.LabelPath != "" {
		m, why, err := g.writePending(ctx, n, n.LabelPath)
		if err != nil || why != "" {
			g.log.WithField(journal.VM, r.UUID).WithError(err).Warn("the label still waits: " + why)
		}
		n = m
	}
	if err := store.Commit(liststore.Change{Put: n}); err != nil {
		return err
	}
	if note != "" {
		g.report(r.UUID, r.Name, "release", noted, reason.VTPMChanged, note, journal.Refused)
	}
	if err := g.dropJournal(r.UUID); err != nil {
		return err
	}
	g.endSessionLocked(s)
	g.changed(r.UUID)
	return nil
}

func (g *Guard) endSession(uuid string) {
	g.mu.Lock()
	s := g.sessions[uuid]
	g.mu.Unlock()
	if s != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
	}
	g.endSessionLocked(s)
}

// endSessionLocked ends a session whose lock is held; nil does nothing.
func (g *Guard) endSessionLocked(s *session) {
	if s == nil {
		return
	}
	g.watch.Remove(s.dir)
	s.keys.Wipe()
	s.keys, s.ended = nil, true
	g.mu.Lock()
	if g.sessions[s.uuid] == s {
		delete(g.sessions, s.uuid)
	}
	g.mu.Unlock()
}

// Restoring notes that the prepare which follows is of a saved image.
func (g *Guard) Restoring(f *domain.Facts) {
	g.mu.Lock()
	g.restore[f.UUID] = true
	g.mu.Unlock()
}

// resume takes up the VMs that a previous virt-trustd left running, and closes
// the records of those that stopped meanwhile.
func (g *Guard) resume(ctx context.Context) error {
	store, err := g.List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range store.All() {
		if r.Open {
			errs = append(errs, g.resumeOne(ctx, store, r.UUID))
		}
	}
	return errors.Join(errs...)
}

func (g *Guard) resumeOne(ctx context.Context, store *liststore.Store, uuid string) error {
	defer g.lock(uuid)()
	r := store.Get(uuid)
	g.mu.Lock()
	s := g.sessions[uuid]
	g.mu.Unlock()
	if r == nil || !r.Open || s != nil {
		return nil
	}
	used, err := statedir.InUse(r.Instance)
	if err != nil {
		return err
	}
	entries, err := g.readJournal(r)
	if err != nil {
		return err
	}
	never := r.Baseline.IsZero() && len(entries) == 0
	if !used && (never || g.justOpened(r)) {
		return nil // it may be starting: `release` tells, or the next start
	}
	if !used {
		return g.closeAfterCrash(ctx, store, r, entries, false)
	}
	s = &session{uuid: uuid, dir: r.Instance, state: list.Running, noted: entries}
	s.writes.Store(true)
	s.making.Store(never)
	if err := g.watch.Add(r.Instance); err != nil {
		return err
	}
	g.mu.Lock()
	g.sessions[uuid] = s
	g.mu.Unlock()
	g.settled(r.Instance)
	g.changed(uuid)
	return nil
}

// justOpened reports whether a VM may be starting: for as long as its grant is good,
// and longer. swtpm takes the lock when QEMU has it load its state, which is after
// `start` has come and the grant has gone: a lock that nobody has tells nothing until
// then.
func (g *Guard) justOpened(r *list.Record) bool {
	// From `start` to swtpm's lock: QEMU may have a terabyte to fill before it. A start
	// that came to nothing stays open for as long, which costs nothing.
	const launch = 10 * time.Minute
	return r.BootID == g.bootID && g.now().Before(time.Unix(r.Changed, 0).Add(g.grantLifetime()+launch))
}

// closeAfterCrash closes the record of a VM that stopped while nobody looked,
// if its state is beyond doubt; else its next start decides.
func (g *Guard) closeAfterCrash(ctx context.Context, store *liststore.Store, r *list.Record, entries []list.Past, suspended bool) error {
	seen, err := statedir.Look(r.Instance)
	if err != nil {
		return err
	}
	s := lifecycle.Seen{
		UUID: r.UUID, Name: r.Name, Instance: r.Instance, KeyOwner: r.KeyOwner, Journal: entries,
		State: lifecycle.StateSeen{Exists: seen.Exists(), Kind: seen.Kind, Digest: seen.Digest, Strange: seen.Strange, Auth: lifecycle.NoKey},
	}
	if r.KeyOwner == list.Ours && seen.Exists() && seen.Digest != r.Baseline {
		keys, err := g.unwrap(ctx, r.WrappedKeys)
		if err != nil {
			return err
		}
		defer keys.Wipe()
		s.State.Auth = authenticate(seen, keys)
	}
	switch d := lifecycle.State(r, s, g.policy()); d.Plan {
	case lifecycle.Start, lifecycle.StartFresh, lifecycle.StartRecovered:
		if d.Note != "" {
			g.report(r.UUID, r.Name, "reconcile", noted, "", d.Note, journal.StateRecovered)
		}
		return g.rest(ctx, store, r, suspended)
	}
	return nil
}

// grantLifetime bounds what lies between prepare and swtpm's start.
func (g *Guard) grantLifetime() time.Duration { return time.Duration(g.cfg.Grant.Lifetime) }
