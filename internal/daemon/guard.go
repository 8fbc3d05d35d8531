// Package daemon is the body of virt-trustd. Guard does what the rules of
// package lifecycle decide; service.go offers it on D-Bus.
package daemon

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"virt-trust/internal/domain"
	"virt-trust/internal/domain/libvirt"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/hosttpm/policy"
	"virt-trust/internal/launcher/launchlog"
	"virt-trust/internal/launcher/measure"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/platform/secret"
	"virt-trust/internal/vtpm/imagefile"
	"virt-trust/internal/vtpm/label"
	"virt-trust/internal/vtpm/lifecycle"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statedir"
	"virt-trust/internal/vtpm/statefile"
)

// TPM is what Guard asks of the host's TPM.
type TPM interface {
	Provision(ctx context.Context) error
	Status(ctx context.Context) (hosttpm.Status, error)
	UnsealListKey(ctx context.Context) ([]byte, error)
	WrapKeys(secret []byte) ([]byte, error)
	UnwrapKeys(ctx context.Context, ciphertext []byte) ([]byte, error)
	BindKeyName() []byte
	Sign(ctx context.Context, digest [32]byte) ([]byte, error) // with the certifier
	CertifierPublic() *ecdsa.PublicKey
	liststore.Counter

	// For recovery.
	PolicyKeyName() []byte
	WithSecrets(ctx context.Context, use func(listKey, policyKey []byte) error) error
	PCRs(ctx context.Context) (policy.State, error)
	ApproveWith(ctx context.Context, policyKey []byte, note string, states ...policy.State) error
	Reprovision(ctx context.Context, listKey []byte) error
	ReadPCR(ctx context.Context, index uint) (hosttpm.PCR, error)
	ExtendPCR(ctx context.Context, e hosttpm.Extension) error
}

// Dirs are where virt-trustd keeps its things.
type Dirs struct {
	State string // /var/lib/virt-trust
	Run   string // /run/virt-trust
	// Domains is where libvirt keeps the definitions of persistent VMs:
	// /etc/libvirt/qemu. A hook cannot ask libvirt, which waits for it.
	Domains string
}

// Guard ties vTPMs to their host and their VMs.
type Guard struct {
	cfg     config.Config
	dirs    Dirs
	tpm     TPM
	log     *logrus.Entry
	journal *decisions
	watch   *statedir.Watcher
	launch  launch
	gone    *gone

	certifier certifier

	now    func() time.Time
	bootID string
	stir   chan struct{} // see keepRaised

	openList sync.Mutex // held while the list is being opened
	adopting sync.Mutex // held while a VM's emulator is changed

	recovering sync.Mutex // held while what is wrapped to the recovery key changes
	recovery   atomic.Pointer[recoveryFile]

	mu        sync.Mutex
	store     *liststore.Store
	listKey   []byte
	listErr   error // why there is no store
	vms       map[string]*vmLock
	grants    map[string]*grant          // by state path
	emulators map[string]*emulatorGrant  // by UUID
	sessions  map[string]*session        // by UUID
	restore   map[string]bool            // UUIDs whose next prepare follows a restore
	verdicts  map[string]*reason.Refusal // last refusals of VMs in the list, see lastRefusal

	unwrapTook atomic.Int64 // nanoseconds, the last time

	before  func(context.Context) // what waits for the TPM before the list key is asked for; may be nil
	changed func(uuid string)     // tells the bus that a VM's properties changed
}

// NewGuard makes a Guard. changed is called when something of a VM changed.
func NewGuard(cfg config.Config, dirs Dirs, tpm TPM, log *logrus.Entry, changed func(uuid string)) (*Guard, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("reading the boot id: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(dirs.State, "vtpm"), 0o700); err != nil {
		return nil, err
	}
	g := &Guard{
		cfg: cfg, dirs: dirs, tpm: tpm, log: log, now: time.Now, stir: make(chan struct{}, 1), bootID: strings.TrimSpace(string(boot)),
		vms: map[string]*vmLock{}, grants: map[string]*grant{}, emulators: map[string]*emulatorGrant{}, sessions: map[string]*session{}, restore: map[string]bool{}, verdicts: map[string]*reason.Refusal{}, changed: changed,
	}
	g.launch.measurer, g.launch.log.standing = &measure.Measurer{}, launchlog.NotChecked
	if g.journal, err = openDecisions(filepath.Join(dirs.State, "decisions.jsonl")); err != nil {
		return nil, err
	}
	if err := clearStarts(dirs.Run); err != nil {
		log.WithError(err).Warn("starts cannot be announced to the wrapper, and take longer")
	}
	if g.gone, err = openGone(dirs.Run); err != nil {
		log.WithError(err).Warn("which VMs were deleted since boot is not known any more")
	}
	if err := g.loadRecovery(); err != nil { // VMs do not depend on it
		log.WithField(journal.ID, journal.RecoveryMissing).WithError(err).Error("the recovery key's file cannot be read")
	}
	if g.watch, err = statedir.NewWatcher(g.settled, g.settleAll); err != nil {
		return nil, err
	}
	return g, nil
}

// Close ends the Guard. Running VMs are found again by the next one.
func (g *Guard) Close() error {
	err := g.watch.Close()
	g.mu.Lock()
	for dir, gr := range g.grants {
		gr.close()
		delete(g.grants, dir)
	}
	var running []*session
	for _, s := range g.sessions {
		running = append(running, s)
	}
	g.mu.Unlock()
	for _, s := range running {
		s.mu.Lock()
		g.endSessionLocked(s)
		s.mu.Unlock()
	}
	g.launch.mu.Lock()
	g.launch.log.close()
	g.launch.mu.Unlock()
	return errors.Join(err, g.journal.Close())
}

// vmLock is there as long as anyone holds it or waits for it.
type vmLock struct {
	sync.Mutex
	users int // under Guard.mu
}

// lock serializes what is done about one VM.
func (g *Guard) lock(uuid string) (unlock func()) {
	g.mu.Lock()
	m := g.vms[uuid]
	if m == nil {
		m = &vmLock{}
		g.vms[uuid] = m
	}
	m.users++
	g.mu.Unlock()
	m.Lock()
	return func() { g.unlock(uuid, m) }
}

// tryLock is lock for whoever will not wait.
func (g *Guard) tryLock(uuid string) (unlock func(), ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.vms[uuid] != nil {
		return nil, false
	}
	m := &vmLock{users: 1}
	m.Lock()
	g.vms[uuid] = m
	return func() { g.unlock(uuid, m) }, true
}

func (g *Guard) unlock(uuid string, m *vmLock) {
	m.Unlock()
	g.mu.Lock()
	defer g.mu.Unlock()
	if m.users--; m.users == 0 {
		delete(g.vms, uuid)
	}
}

func (g *Guard) unix() int64 { return g.now().Unix() }

const bootAsItWas = "'virt-trust host dry-run' says what changed; boot the host as it was, or see virt-trust-reasons(7)"

// tpmRefusal turns what the TPM said into a refusal; an error that is no
// statement about the host stays as it is.
func (g *Guard) tpmRefusal(err error) error {
	var pe *hosttpm.PolicyError
	switch {
	case errors.As(err, &pe) && len(pe.Differing) > 0:
		return reason.Refuse(reason.HostNotApproved, bootAsItWas, "PCR %s of the host's TPM differ from the approved state", pcrs(pe.Differing))
	case errors.Is(err, hosttpm.ErrPolicy):
		return reason.Refuse(reason.HostNotApproved, bootAsItWas, "%s", err)
	case errors.Is(err, hosttpm.ErrCleared):
		return reason.Refuse(reason.KeyNotReleased, g.wayBack(),
			"the host's TPM was cleared or replaced, and the keys of this host died with it")
	case errors.Is(err, hosttpm.ErrCiphertext):
		return reason.Refuse(reason.KeyNotReleased, "see virt-trust-reasons(7)", "the wrapped vTPM keys were not made for this host")
	case errors.Is(err, hosttpm.ErrBusy), errors.Is(err, context.DeadlineExceeded):
		return reason.Refuse(reason.TPMBusy, "try again", "%s", err)
	case errors.Is(err, hosttpm.ErrLockedOut):
		return reason.Refuse(reason.TPMLockedOut, "wait, or reset it with tpm2_dictionarylockout", "%s", err)
	case errors.Is(err, hosttpm.ErrAbsent), errors.Is(err, hosttpm.ErrFailed), errors.Is(err, hosttpm.ErrNotProvisioned):
		return reason.Refuse(reason.TPMFailed, "see 'virt-trust status' and check "+g.cfg.TPM.Device, "%s", err)
	}
	return err
}

func pcrs(p []uint) string {
	return strings.Trim(strings.Join(strings.Fields(fmt.Sprint(p)), ", "), "[]")
}

// List opens the vTPM list, or gives the one that is open after seeing to it
// that the file is still what was written last.
func (g *Guard) List(ctx context.Context) (*liststore.Store, error) {
	defer lap(ctx, tookList)()
	g.openList.Lock()
	defer g.openList.Unlock()
	g.mu.Lock()
	store := g.store
	g.mu.Unlock()
	if store == nil {
		var err error
		if store, err = g.tryOpen(ctx); err != nil {
			err = g.listRefusal(err)
			g.mu.Lock()
			g.listErr = err
			g.mu.Unlock()
			return nil, err
		}
	}
	err := g.listRefusal(store.Check())
	g.mu.Lock()
	fresh := g.store == nil
	g.store, g.listErr = store, err
	g.mu.Unlock()
	if fresh {
		g.stirred()
	}
	if err != nil {
		return nil, err
	}
	return store, nil
}

func (g *Guard) tryOpen(ctx context.Context) (*liststore.Store, error) {
	if g.tpm.BindKeyName() == nil {
		if err := g.keysLost(); err != nil {
			return nil, err
		}
		if err := g.tpm.Provision(ctx); err != nil {
			return nil, g.tpmRefusal(err)
		}
	}
	if g.before != nil {
		g.before(ctx)
	}
	key, err := g.tpm.UnsealListKey(ctx)
	if err != nil {
		return nil, g.tpmRefusal(err)
	}
	g.mu.Lock()
	g.listKey = key
	g.mu.Unlock()
	return liststore.Open(ctx, g.dirs.State, g.dirs.Run, key, g.rollback())
}

func (g *Guard) listRefusal(err error) error {
	path := liststore.Path(g.dirs.State)
	const mend = "'virt-trust repair --list' writes it anew"
	switch {
	case errors.Is(err, liststore.ErrMissing):
		return reason.Refuse(reason.ListDamaged, mend, "the vTPM list %s is missing", path)
	case errors.Is(err, liststore.ErrRolledBack):
		mend := mend
		if g.peek() == nil {
			mend = "put the newest one back, or 'virt-trust accept --list-rolled-back' takes this one"
		}
		return reason.Refuse(reason.ListRolledBack, mend, "%s was replaced: %s", path, err)
	case errors.Is(err, liststore.ErrCounter):
		return reason.Refuse(reason.ListRolledBack, "if that was you, 'virt-trust accept --list-rolled-back' takes the list as it is",
			"whether %s is the newest cannot be told: %s", path, err)
	case errors.Is(err, liststore.ErrDamaged):
		return reason.Refuse(reason.ListDamaged, mend, "%s: %s", path, err)
	}
	return err
}

// peek gives the list if it is open, without asking anyone.
func (g *Guard) peek() *liststore.Store {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.store
}

// newKeys makes a VM's two keys.
func newKeys() (*secret.Buffer, error) {
	b := make([]byte, 2*secret.KeySize)
	rand.Read(b)
	return secret.Take(b)
}

func stateKey(keys *secret.Buffer) []byte    { return keys.Bytes()[:secret.KeySize] }
func transferKey(keys *secret.Buffer) []byte { return keys.Bytes()[secret.KeySize:] }

// unwrap asks the TPM for a VM's keys.
func (g *Guard) unwrap(ctx context.Context, wrapped []byte) (*secret.Buffer, error) {
	unwrapped, began := lap(ctx, tookTPM), time.Now()
	b, err := g.tpm.UnwrapKeys(ctx, wrapped)
	unwrapped()
	g.unwrapTook.Store(int64(time.Since(began)))
	if err != nil {
		return nil, g.tpmRefusal(err)
	}
	if len(b) != 2*secret.KeySize {
		secret.Wipe(b)
		return nil, reason.Refuse(reason.KeyNotReleased, "see virt-trust-reasons(7)", "what the TPM unwrapped is no pair of vTPM keys")
	}
	return secret.Take(b)
}

// quick reports whether the TPM was, when keys were unwrapped last.
func (g *Guard) quick() bool {
	took := time.Duration(g.unwrapTook.Load())
	return took > 0 && took < quickUnwrap
}

// quickUnwrap is well below the second for which libvirt waits for swtpm.
const quickUnwrap = 300 * time.Millisecond

// imagePath is where the disk that carries the label lies, or "".
func imagePath(f *domain.Facts) (string, error) {
	d := f.LabelDisk()
	if d == nil {
		return "", nil
	}
	if d.Type != "volume" {
		return d.Path, nil
	}
	return libvirt.ResolveVolume(d.Pool, d.Volume)
}

// see looks at all that a decision about this VM rests on.
func (g *Guard) see(ctx context.Context, f *domain.Facts, r *list.Record, store *liststore.Store) (*statedir.Seen, lifecycle.Seen, error) {
	s := lifecycle.Seen{UUID: f.UUID, Name: f.Name, Instance: f.StateDir(g.cfg.Swtpm.StateRoot), KeyOwner: list.Ours}
	if f.TPM.SecretUUID != "" {
		s.KeyOwner = list.Libvirts
	}
	if f.TPM.StateIsFile {
		return nil, s, reason.Refuse(reason.PolicyForbids, "use a state directory: <source type='dir'>", "a vTPM whose state is a single file is not guarded")
	}
	looked := lap(ctx, tookState)
	dir, err := statedir.Look(s.Instance)
	looked()
	if err != nil {
		return nil, s, fmt.Errorf("looking at the vTPM state: %w", err)
	}
	s.State = lifecycle.StateSeen{Exists: dir.Exists(), Kind: dir.Kind, Digest: dir.Digest, Strange: dir.Strange}
	if r == nil || dir.Digest != r.Baseline || r.Instance != s.Instance {
		for _, o := range store.All() {
			if o.UUID == f.UUID || o.State == list.Released {
				continue
			}
			if s.State.Exists && o.Baseline == dir.Digest {
				s.State.OtherVM = o.Name
			}
			if o.Instance == s.Instance {
				s.FolderOf = o.Name
			}
		}
	}
	if s.State.Exists && s.KeyOwner == list.Libvirts {
		s.State.Auth = lifecycle.NoKey
	}
	read := lap(ctx, tookLabel)
	s.Label, err = g.seeLabel(f)
	read()
	if err != nil {
		return nil, s, err
	}
	if r != nil {
		s.Kept = g.keptDigest(f.UUID, dir.Name)
		if r.Open {
			if s.Journal, err = g.readJournal(r); err != nil {
				return nil, s, err
			}
		}
	}
	return dir, s, nil
}

func (g *Guard) seeLabel(f *domain.Facts) (lifecycle.LabelSeen, error) {
	path, err := imagePath(f)
	if err != nil || path == "" {
		if err != nil { // a pool that has no paths: there is nowhere to put a label
			return lifecycle.LabelSeen{Unsupported: err.Error()}, nil
		}
		return lifecycle.LabelSeen{}, nil
	}
	return g.readLabel(path)
}

func (g *Guard) readLabel(path string) (lifecycle.LabelSeen, error) {
	l := lifecycle.LabelSeen{Path: path}
	payload, err := imagefile.ReadLabel(path)
	var unsupported *imagefile.UnsupportedError
	switch {
	case err == nil:
	case errors.Is(err, imagefile.ErrNoLabel):
		return l, nil
	case errors.Is(err, imagefile.ErrLabelDamaged):
		l.Present, l.Damaged = true, err.Error()
		return l, nil
	case errors.As(err, &unsupported):
		l.Unsupported = unsupported.Error()
		return l, nil
	case closedToUs(err):
		l.Unsupported = "virt-trustd may not open it"
		return l, nil
	case errors.Is(err, os.ErrNotExist):
		// libvirt itself says this better, and can be told to drop such a disk.
		l.Unsupported = "the image does not exist"
		return l, nil
	default:
		return l, fmt.Errorf("reading the label of %s: %w", path, err)
	}
	l.Present, l.Digest = true, list.DigestOf(payload)
	parsed, err := label.UntrustedParse(payload)
	if err != nil {
		l.Damaged = err.Error()
		return l, nil
	}
	l.VM, l.ID, l.Generation = parsed.VM, parsed.ID, parsed.Generation
	_, l.ThisHost = parsed.Recipient(g.tpm.BindKeyName())
	return l, nil
}

// closedToUs tells an image that root may not touch, such as one on an NFS
// server that squashes root, from one that cannot be read now.
func closedToUs(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS)
}

// sealLabel makes a new label for a record, which notes its generation. The
// image at path, "" for none, gets one without the recovery key if it has no
// room for that.
func (g *Guard) sealLabel(r *list.Record, keys *secret.Buffer, path string) ([]byte, error) {
	r.LabelGeneration = max(uint64(g.now().UnixNano()), r.LabelGeneration+1)
	l := label.Label{
		ID: r.LabelID, VM: r.UUID, Instance: r.Instance, Algorithm: label.AlgorithmAES256,
		Recipients: g.recipients(r), Generation: r.LabelGeneration,
	}
	payload, err := l.Seal(stateKey(keys))
	if len(l.Recipients) > 1 && (err != nil || !roomFor(path, len(payload))) {
		l.Recipients = l.Recipients[:1]
		payload, err = l.Seal(stateKey(keys))
	}
	return payload, err
}

// writePending writes a record's waiting label to its image. It gives the
// record as it is then, which the caller commits, and what kept the label from
// being written, if anything did.
func (g *Guard) writePending(ctx context.Context, r *list.Record, path string) (*list.Record, string, error) {
	if len(r.PendingLabel) == 0 || path == "" {
		return r, "", nil
	}
	defer lap(ctx, tookLabel)()
	n := r.Clone()
	err := imagefile.WriteLabel(path, r.PendingLabel)
	var unsupported *imagefile.UnsupportedError
	switch {
	case err == nil:
		n.LabelPath, n.LabelDigest, n.PendingLabel = path, list.DigestOf(r.PendingLabel), nil
		return n, "", nil
	case errors.Is(err, imagefile.ErrInUse):
		n.LabelPath = path
		return n, "the image is in use; the label is written when it is free", nil
	case errors.As(err, &unsupported):
		n.LabelPath, n.PendingLabel = "", nil
		return n, "the image cannot carry a label: " + unsupported.Error(), nil
	case closedToUs(err):
		n.LabelPath, n.PendingLabel = "", nil
		return n, "the image cannot carry a label: virt-trustd may not write it", nil
	case errors.Is(err, os.ErrNotExist):
		return r, "the image does not exist", nil
	}
	return r, "", fmt.Errorf("writing the label to %s: %w", path, err)
}

// authenticate asks whether a state was written under the keys.
func authenticate(dir *statedir.Seen, keys *secret.Buffer) lifecycle.Auth {
	if keys == nil {
		return lifecycle.NoKey
	}
	if statefile.Verify(dir.Data, stateKey(keys)) == nil {
		return lifecycle.Authentic
	}
	return lifecycle.Forged
}

// tagOf gives the tag of an encrypted state, zero where it cannot be told.
func tagOf(dir *statedir.Seen, keys *secret.Buffer) list.Tag {
	if keys == nil || !dir.Exists() {
		return list.Tag{}
	}
	plain, err := statefile.Decrypt(dir.Data, stateKey(keys))
	if err != nil {
		return list.Tag{}
	}
	defer secret.Wipe(plain)
	return list.TagOf(plain)
}

func newID() (id [16]byte) { rand.Read(id[:]); return id }

// labelID shows a label's id.
func labelID(r *list.Record) string {
	if r.LabelID == [16]byte{} {
		return ""
	}
	return hex.EncodeToString(r.LabelID[:])
}

// waitUnused gives a swtpm that is ending the time to do so.
func waitUnused(dir string) (used bool, err error) {
	for range 50 {
		if used, err = statedir.InUse(dir); !used || err != nil {
			return used, err
		}
		time.Sleep(20 * time.Millisecond)
	}
	return used, err
}
