package daemon

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	sddaemon "github.com/coreos/go-systemd/v22/daemon"
	"github.com/godbus/dbus/v5"
	"github.com/sirupsen/logrus"

	"virt-trust/internal/bus"
	"virt-trust/internal/domain/libvirt"
	"virt-trust/internal/domain/swtpmargs"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statedir"
)

// Options are what main knows.
type Options struct {
	Config   config.Config
	Dirs     Dirs
	Programs Programs
	Version  string
	Log      *logrus.Entry
}

// Run is virt-trustd: it serves until ctx ends.
func Run(ctx context.Context, o Options) error {
	tpm, err := hosttpm.Open(hosttpm.Config{
		Device: o.Config.TPM.Device, Dir: filepath.Join(o.Dirs.State, "tpm"), PCRs: o.Config.TPM.PCRs, Bank: o.Config.TPM.Bank,
		Timeout: time.Duration(o.Config.TPM.Timeout),
	})
	if err != nil {
		return err
	}
	defer tpm.Close()
	uid, gid, err := lookupUser(o.Config.Swtpm.User)
	if err != nil {
		return fmt.Errorf("swtpm.user: %w", err)
	}
	qemuUID, _, err := lookupUser(o.Config.QEMU.User)
	if err != nil {
		o.Log.WithError(err).Warn("qemu.user: no VM starts under virt-trust's emulator")
		qemuUID = nobody
	}
	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		return fmt.Errorf("connecting to the system bus: %w", err)
	}
	defer conn.Close()

	s := newService(conn, o, uint32(uid), uint32(qemuUID), tpm)
	s.working = ctx
	if s.g, err = NewGuard(o.Config, o.Dirs, tpm, o.Log, s.vmChanged); err != nil {
		return err
	}
	defer s.g.Close()
	s.g.before = s.settleHost
	if err := s.g.chain(o.Programs, uid, gid); err != nil {
		return err
	}
	s.lookInto(uid, gid)
	// The list is opened before calls come in, if the TPM lets it be.
	s.openList(ctx)
	if err := s.export(); err != nil {
		return err
	}
	_, _ = sddaemon.SdNotify(false, sddaemon.SdNotifyReady)
	defer sddaemon.SdNotify(false, sddaemon.SdNotifyStopping)

	go s.sendSignals(ctx)
	go s.watchLibvirt(ctx)
	go s.watchRemovals(ctx)
	go s.keepUp(ctx)
	go s.endPauses()
	go s.watchdog(ctx, 5*time.Second)
	go s.g.keepRaised(ctx)
	select {
	case <-ctx.Done():
		s.g.awaitStarts(patience)
		s.drain()
		last, cancel := context.WithTimeout(context.Background(), lastRaise)
		defer cancel()
		s.g.settleCounter(last)
		return nil
	case <-conn.Context().Done():
		return errors.New("the system bus closed the connection")
	}
}

// nobody is no user's number.
const nobody = 1<<32 - 1

func newService(conn *dbus.Conn, o Options, swtpmUID, qemuUID uint32, tpm *hosttpm.Host) *Service {
	return &Service{
		conn: conn, programs: o.Programs, swtpmUID: swtpmUID, qemuUID: qemuUID, version: o.Version, log: o.Log,
		slots: make(chan struct{}, maxCalls), others: make(chan struct{}, maxCalls), signals: make(chan func(), 1024),
		collecting: make(chan struct{}, 1), agent: agentUID, pcrs: notRead{},
		known: map[string]bool{}, host: tpm, working: context.Background(),
		history: &history{path: filepath.Join(o.Dirs.State, "host-history.jsonl")}, logs: bootLogs{filepath.Join(o.Dirs.State, "event-logs")},
	}
}

// patience bounds each of the waits for what libvirt has under way when
// virt-trustd ends: a VM that is just starting should start.
const patience = 10 * time.Second

// drain lets the hooks and wrappers that are under way come to their end.
func (s *Service) drain() {
	late := time.After(patience)
	for range cap(s.slots) {
		select {
		case s.slots <- struct{}{}:
		case <-late:
			return
		}
	}
}

// lastRaise bounds the raise with which virt-trustd ends.
const lastRaise = 10 * time.Second

func (s *Service) sendSignals(ctx context.Context) {
	for {
		select {
		case send := <-s.signals:
			send()
		case <-ctx.Done():
			return
		}
	}
}

// openLimit is below the unit's TimeoutStartSec.
const openLimit = 150 * time.Second

// openList opens the list and takes up running VMs; what fails is tried again.
func (s *Service) openList(ctx context.Context) {
	limit := min(time.Duration(s.g.cfg.TPM.Timeout), openLimit)
	if s.g.tpm.BindKeyName() == nil {
		limit = openLimit // keys are to be made
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	before := s.g.peek()
	err := s.g.resume(ctx)
	s.noticeHost()
	if store := s.g.peek(); before == nil && store != nil {
		for _, r := range store.All() {
			s.vmChanged(r.UUID)
		}
		s.emit(bus.Path, propertiesChanged, bus.ManagerInterface, s.managerProperties(), []string{})
		s.log.WithField("generation", store.Generation()).Infof("the vTPM list is open, with %d VMs", len(store.All()))
		if _, err := s.g.certifierChain(ctx); err != nil {
			s.log.WithError(err).Warn("the certifier has no certificate yet: those of vTPMs have nothing above them")
		}
		if err := s.keepEventLog(ctx); err != nil {
			s.log.WithError(err).Info("this boot's event log is not kept: virt-trust host dry-run will not tell events from it")
		}
	}
	s.mu.Lock()
	same := err == nil || s.problem == err.Error()
	s.problem = ""
	if err != nil {
		s.problem = err.Error()
	}
	s.mu.Unlock()
	if same {
		return
	}
	e := s.log.WithError(err)
	if r := reason.As(err); r != nil {
		e = e.WithField(journal.Reason, string(r.Code))
		switch r.Code {
		case reason.HostNotApproved, reason.KeyNotReleased:
			e = e.WithField(journal.ID, journal.HostNotApproved)
		case reason.TPMFailed, reason.TPMBusy, reason.TPMLockedOut:
			e = e.WithField(journal.ID, journal.TPMAway)
		case reason.ListDamaged, reason.ListRolledBack:
			e = e.WithField(journal.ID, journal.ListDamaged)
		}
	}
	e.Error("VMs with a vTPM cannot start: the vTPM list is not open, or running VMs could not be taken up")
}

// keepUp does what time asks for: another try at the list, and the records of
// starts that libvirt never finished.
func (s *Service) keepUp(ctx context.Context) {
	const pace = 5 * time.Second
	const day = int(24 * time.Hour / pace)
	s.g.remind()
	t := time.NewTicker(pace)
	defer t.Stop()
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if s.g.peek() != nil {
			s.g.checkSoon(ctx)
		}
		if s.g.peek() == nil {
			s.openList(ctx)
			if s.g.peek() != nil {
				s.log.WithField(journal.ID, journal.TPMBack).Info("the host's TPM released the list key again")
			}
		} else if n%12 == 0 {
			s.g.sweep(ctx)
		}
		if n%120 == 1 {
			if err := s.g.keepRecovery(ctx); err != nil {
				s.log.WithError(err).Warn("wrapping to the recovery key")
			}
		}
		if n%day == 0 {
			s.g.remind()
		}
	}
}

// watchdog tells systemd that the locks through which every call goes come
// back; they are never held across anything slow. A TPM or a file system that
// hangs is no reason to be started anew.
func (s *Service) watchdog(ctx context.Context, pace time.Duration) {
	t := time.NewTicker(pace)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		s.g.mu.Lock()
		s.g.mu.Unlock() //nolint:staticcheck // to take it is the test
		s.mu.Lock()
		s.mu.Unlock() //nolint:staticcheck // as above
		if store := s.g.peek(); store != nil {
			store.Generation()
		}
		_, _ = sddaemon.SdNotify(false, sddaemon.SdNotifyWatchdog)
	}
}

// sweep closes records of starts that libvirt gave up without a word.
func (g *Guard) sweep(ctx context.Context) {
	store := g.peek()
	if store == nil {
		return
	}
	g.mu.Lock()
	sessions := slices.Collect(maps.Keys(g.sessions))
	unwatched := []*list.Record{}
	for _, r := range store.All() {
		if r.Open && g.sessions[r.UUID] == nil {
			unwatched = append(unwatched, r)
		}
	}
	g.mu.Unlock()
	for _, r := range unwatched {
		if err := g.resumeOne(ctx, store, r.UUID); err != nil {
			g.log.WithField(journal.VM, r.UUID).WithError(err).Warn("taking up a running VM")
		}
	}
	for _, id := range sessions {
		func() {
			defer g.lock(id)()
			r := store.Get(id)
			if r == nil || !r.Open {
				g.endSession(id)
				return
			}
			if used, err := statedir.InUse(r.Instance); used || err != nil || g.justOpened(r) {
				return
			}
			g.closeGrant(id)
			if err := g.rest(ctx, store, r, false); err != nil {
				g.log.WithField(journal.VM, id).WithError(err).Warn("closing the record of a VM that stopped unseen")
			}
		}()
	}
}

// watchLibvirt follows libvirt's events while VMs of ours run, and looks at
// what libvirt has whenever it was started anew or a vTPM's folder came or went.
// It never makes a sleeping libvirtd start, nor keeps one without VMs awake: that
// ends by itself when nobody has been connected for two minutes.
func (s *Service) watchLibvirt(ctx context.Context) {
	seen := ""
	for ctx.Err() == nil {
		socket, running, err := libvirt.Socket(s.g.cfg.Libvirt.Socket)
		now := s.libvirtSigns()
		if err == nil && running && s.g.peek() != nil && (now != seen || s.g.anyRuns()) {
			if err := s.followLibvirt(ctx, socket); err != nil && ctx.Err() == nil {
				s.log.WithError(err).Debug("following libvirt's events")
			} else {
				seen = now
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(2 * time.Second):
		}
	}
}

// libvirtSigns changes when libvirt was started, or made or removed a vTPM.
func (s *Service) libvirtSigns() string {
	signs := ""
	for _, f := range []string{"/run/virtqemud.pid", "/run/libvirtd.pid", s.g.cfg.Swtpm.StateRoot} {
		if st, err := os.Stat(f); err == nil {
			signs += st.ModTime().String() + " "
		}
	}
	return signs
}

// anyRuns reports whether a VM's vTPM may be written.
func (g *Guard) anyRuns() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.sessions) > 0
}

// libvirtIdle is how long events are awaited when no VM runs.
const libvirtIdle = 20 * time.Second

func (s *Service) followLibvirt(ctx context.Context, socket string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c, err := libvirt.Dial(ctx, socket)
	if err != nil {
		return err
	}
	defer c.Close()
	events, err := c.Events(ctx)
	if err != nil {
		return err
	}
	if err := s.reconcile(ctx, c); err != nil {
		return err
	}
	idle := time.NewTicker(libvirtIdle)
	defer idle.Stop()
	for {
		var e libvirt.Event
		select {
		case <-idle.C:
			if !s.g.anyRuns() {
				return nil
			}
			continue
		case e = <-events:
			idle.Reset(libvirtIdle)
		}
		switch e.Kind {
		case libvirt.Suspended:
			s.g.setState(e.UUID, list.Suspended)
		case libvirt.Resumed:
			s.g.setState(e.UUID, list.Running)
		case libvirt.Undefined:
			// libvirt removes the state before it says so; --keep-tpm keeps it.
			s.ended(ctx, e.UUID, "the VM was undefined")
		case libvirt.Renamed, libvirt.Defined:
			s.renamed(e.UUID, e.Name)
		case libvirt.Saved:
			if err := s.g.saved(e.UUID); err != nil {
				s.log.WithField(journal.VM, e.UUID).WithError(err).Warn("noting that a VM was saved")
			}
			fallthrough
		case libvirt.Stopped:
			// A transient VM's state goes with it, and nothing says so.
			id := e.UUID
			time.AfterFunc(time.Second, func() { s.goneWithItsDomain(ctx, id) })
		case libvirt.Closed, "": // "" of a channel that was closed
			return nil
		}
	}
}

// reconcile holds the list against the domains that libvirt has.
func (s *Service) reconcile(ctx context.Context, c *libvirt.Client) error {
	store := s.g.peek()
	if store == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	domains, err := c.List(ctx)
	if err != nil {
		return err
	}
	has := map[string]bool{}
	for _, d := range domains {
		has[d.UUID] = true
		s.renamed(d.UUID, d.Name)
	}
	if len(domains) == 0 && len(store.All()) > 1 {
		// Keys that are erased do not come back. A libvirt that knows no VM at all
		// has more likely lost its own folder.
		s.log.Warn("libvirt has no VM at all: the records of the vTPM list are left as they are")
		return nil
	}
	for _, r := range store.All() {
		if !has[r.UUID] {
			s.ended(ctx, r.UUID, "libvirt does not have the VM any more")
		}
	}
	return nil
}

func (s *Service) goneWithItsDomain(ctx context.Context, uuid string) {
	store := s.g.peek()
	if store == nil || store.Get(uuid) == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if _, err := s.lookup(ctx, uuid); errors.Is(err, libvirt.ErrNoDomain) {
		s.ended(ctx, uuid, "the transient VM has ended")
	}
}

// ended deletes the record of a VM that libvirt no longer has, unless its
// state was kept.
func (s *Service) ended(ctx context.Context, uuid, why string) {
	g := s.g
	defer g.lock(uuid)()
	store := g.peek()
	if store == nil {
		return
	}
	r := store.Get(uuid)
	if r == nil {
		return
	}
	if g.starting(uuid) {
		return // it was defined anew meanwhile
	}
	if used, err := statedir.InUse(r.Instance); used || err != nil {
		return // it runs on, as a transient VM
	}
	if seen, err := statedir.Look(r.Instance); err != nil || seen.Exists() {
		return // kept, with --keep-tpm or persistent_state
	}
	if !g.mounted(r.Instance) {
		return // its keys must be there when it comes back
	}
	if err := g.delete(ctx, store, r, why); err != nil {
		s.log.WithField(journal.VM, uuid).WithError(err).Error("deleting a vTPM's record")
	}
}

// mounted tells a vTPM's folder that was deleted from one whose file system is
// not there.
func (g *Guard) mounted(instance string) bool {
	above := g.cfg.Swtpm.StateRoot
	if _, ok := swtpmargs.UUIDFromStatePath(above, instance); !ok {
		above = filepath.Dir(instance)
	}
	_, err := os.Stat(above)
	return err == nil
}

func (s *Service) renamed(uuid, name string) {
	g := s.g
	store := g.peek()
	if store == nil || name == "" {
		return
	}
	if r := store.Get(uuid); r == nil || r.Name == name {
		return
	}
	defer g.lock(uuid)()
	r := store.Get(uuid)
	if r == nil || r.Name == name {
		return
	}
	n := r.Clone()
	n.Name, n.Changed = name, g.unix()
	if err := store.Commit(liststore.Change{Put: n}); err != nil {
		s.log.WithField(journal.VM, uuid).WithError(err).Error("noting a VM's new name")
		return
	}
	g.changed(uuid)
}

// listState says how the list is, for the bus.
func (g *Guard) listState() (state, problem string, generation uint64, count int) {
	g.mu.Lock()
	store, err := g.store, g.listErr
	g.mu.Unlock()
	if store != nil {
		generation, count = store.Generation(), len(store.All())
	} else if h, _, e := liststore.UntrustedHeader(g.dirs.State); e == nil {
		generation = h.Generation
	}
	switch r := reason.As(err); {
	case err == nil && store != nil && count == 0:
		return "empty", "", generation, count
	case err == nil && store != nil:
		return "readable", "", generation, count
	case err == nil:
		return "sealed", "the vTPM list has not been opened yet", generation, count
	case r != nil && r.Code == reason.ListDamaged:
		return "damaged", r.Error(), generation, count
	case r != nil && r.Code == reason.ListRolledBack:
		return "rolled-back", r.Error(), generation, count
	}
	return "sealed", reason.OneLine(err.Error()), generation, count
}

// lastRefusal and lastVerdict keep a VM's last verdict between two openings of
// its record, in memory: refusals must not be able to wear the list.
func (g *Guard) lastRefusal(uuid string, r *reason.Refusal) {
	store := g.peek()
	if store == nil || store.Get(uuid) == nil {
		return // of VMs without a record there could be any number
	}
	g.mu.Lock()
	g.verdicts[uuid] = r
	g.mu.Unlock()
	g.changed(uuid)
}

func (g *Guard) lastVerdict(r *list.Record) (verdict, code, what string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if v := g.verdicts[r.UUID]; v != nil {
		return refused, string(v.Code), v.Text()
	}
	return r.LastVerdict, r.LastReason, r.LastWhat
}

// statusAge is how long an answer of the TPM counts as present.
const statusAge = 2 * time.Second

// hostProperties are the TPM's, and what virt-trustd can tell without it.
func (s *Service) hostProperties() dict {
	d := maps.Clone(s.tpmProperties())
	d["CertifierChain"] = dbus.MakeVariant(s.g.chainText())
	return d
}

// tpmProperties asks the TPM, but not more often than it changes.
func (s *Service) tpmProperties() dict {
	s.statusMu.Lock()
	defer s.statusMu.Unlock()
	if s.status.state != nil && time.Since(s.status.at) < statusAge {
		return s.status.state
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	st, err := s.host.Status(ctx)
	if err != nil {
		st = hosttpm.Status{State: hosttpm.Failed, Problem: err.Error()}
	}
	c := s.g.cfg.TPM
	selection, differing := []uint32{}, []uint32{}
	for _, p := range c.PCRs {
		selection = append(selection, uint32(p))
	}
	for _, p := range st.Differing {
		differing = append(differing, uint32(p))
	}
	d := strs("State", st.State, "Problem", st.Problem, "Device", c.Device, "Manufacturer", st.Manufacturer, "PCRBank", c.Bank,
		"BindKeyName", hexName(s.host.BindKeyName()), "BindKeyPublic", "", "AKName", hexName(s.host.AKName()), "AKPublic", "")
	if k := s.host.BindKeyPublic(); k != nil {
		d["BindKeyPublic"] = dbus.MakeVariant(publicPEM(k))
	}
	if k := s.host.AKPublic(); k != nil {
		d["AKPublic"] = dbus.MakeVariant(publicPEM(k))
	}
	counts, times := map[string]uint64{}, map[string]uint64{}
	for name, t := range s.host.Timings() {
		counts[name], times[name] = uint64(t.Count), uint64(t.Total.Microseconds())
	}
	d["CommandCounts"], d["CommandTimes"] = dbus.MakeVariant(counts), dbus.MakeVariant(times)
	d["NextBoot"] = dbus.MakeVariant(uint64(0))
	if w, err := s.host.Waiver(); err == nil && w != nil {
		d["NextBoot"] = dbus.MakeVariant(uint64(w.Time.UnixMicro()))
	}
	d["PCRSelection"], d["DifferingPCRs"] = dbus.MakeVariant(selection), dbus.MakeVariant(differing)
	s.announceHost(d)
	s.status = hostStatus{time.Now(), d}
	return d
}

func hexName(b []byte) string { return fmt.Sprintf("%x", b) }

func publicPEM(key any) string {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return ""
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

// libvirtState says whether libvirt uses hook and wrapper: a daemon that was
// started before the package was installed does not.
func (s *Service) libvirtState() string {
	// A link that leads nowhere is none to libvirt, too.
	if _, err := os.Stat(s.programs.Link); errors.Is(err, fs.ErrNotExist) {
		return "hook-missing"
	}
	for _, f := range []string{"/run/virtqemud.pid", "/run/libvirtd.pid"} {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			continue
		}
		env, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "environ"))
		if err != nil {
			continue // it does not run, and will have the drop-in when it does
		}
		for _, v := range bytes.Split(env, []byte{0}) {
			if path, ok := bytes.CutPrefix(v, []byte("PATH=")); ok && !wrapperFirst(string(path), s.programs.Wrapper) {
				return "restart-needed"
			}
		}
		if s.sawRemoval(pid) {
			return "restart-needed"
		}
	}
	return "active"
}

// sawRemoval reports whether a process was there when the package was removed.
// libvirt then looks for swtpm anew, finds the system's, and stays with that.
func (s *Service) sawRemoval(pid int) bool {
	mark, err := os.Stat(s.programs.Removed)
	if err != nil {
		return false
	}
	started, err := startOf(pid)
	return err == nil && started.Before(mark.ModTime())
}

// lookupUser resolves a user's numbers.
func lookupUser(name string) (uid, gid int, err error) {
	u, err := user.Lookup(name)
	if err != nil {
		return 0, 0, err
	}
	uid, err = strconv.Atoi(u.Uid)
	if err != nil {
		return 0, 0, err
	}
	gid, err = strconv.Atoi(u.Gid)
	return uid, gid, err
}
