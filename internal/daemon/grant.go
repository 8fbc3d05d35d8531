package daemon

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"virt-trust/internal/platform/poll"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"virt-trust/internal/domain"
	"virt-trust/internal/domain/swtpmargs"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/platform/secret"
	"virt-trust/internal/vtpm/lifecycle"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statedir"
)

// grant is a launch grant: what prepare opens and the wrapper redeems, once
// for each program; and swtpm_setup once more, after it has made a vTPM, for the
// PCR banks that the VM's definition names (<active_pcr_banks>).
type grant struct {
	uuid     string
	pass     bool           // no keys are ours to give
	keys     *secret.Buffer // the session's; a session ends after its grant
	cgroup   string         // of the hook, and so of libvirt: whoever redeems is in it
	expires  time.Time
	redeemed map[string]bool
	banks    bool // swtpm_setup was redeemed for the second time
	runs     []launcher
	had      bool // a vTPM, at prepare: swtpm_setup makes none in its place
	setup    int  // descriptor of the process that redeemed as swtpm_setup, or -1
	setupPID int  // its number, while setupRuns
	socket   *socket
	// announced is the file by which the wrapper knows of this start, "" if it does not.
	announced string
	refused   error // what swtpm's wrapper was told instead of getting the keys
	// opening is closed when it is known what becomes of a grant that libvirt goes
	// ahead with; nil from then on.
	opening chan struct{}
	certify bool // a vTPM that is made gets certificates
	ak      bool // and an AK, which it has not got yet
	made    manufacture
}

// open opens a grant after prepare, in place of one that is open still; the one
// that libvirt went ahead with becomes it.
func (g *Guard) open(st *start, cgroup string) {
	g.mu.Lock()
	gr := g.grants[st.seen.Instance]
	if gr == nil || gr.opening == nil {
		gr = g.newGrant(st, cgroup)
	}
	gr.expires, gr.runs = g.now().Add(g.grantLifetime()), st.runs
	gr.had = st.dir != nil && st.dir.Exists()
	gr.pass = st.d.Plan == lifecycle.Pass || st.r.KeyOwner == list.Libvirts
	fresh := !gr.had && st.d.Plan != lifecycle.Pass && st.f.TPM.Version == "2.0"
	gr.certify = fresh && g.cfg.Attestation.EKCertificates
	gr.ak = fresh && st.r.AKDue
	if !gr.pass {
		gr.keys = st.keys
	}
	if gr.announced == "" {
		g.announce(gr)
	}
	g.mu.Unlock()
	g.openEmulator(st, cgroup)
}

// newGrant puts a grant that gives nothing yet in the place of the one that is
// there. Called with g.mu held.
func (g *Guard) newGrant(st *start, cgroup string) *grant {
	if old := g.grants[st.seen.Instance]; old != nil {
		old.close()
	}
	gr := &grant{uuid: st.f.UUID, cgroup: cgroup, expires: g.now().Add(g.grantLifetime()), redeemed: map[string]bool{}, setup: -1}
	g.grants[st.seen.Instance] = gr
	return gr
}

// openAhead makes a grant that libvirt may go ahead with, and that open opens; nil
// if libvirt may not.
func (g *Guard) openAhead(st *start, cgroup string) *grant {
	g.mu.Lock()
	defer g.mu.Unlock()
	gr := g.newGrant(st, cgroup)
	if g.announce(gr); gr.announced == "" {
		return nil
	}
	gr.opening = make(chan struct{})
	return gr
}

// decided ends the wait for a grant that libvirt went ahead with.
func (g *Guard) decided(gr *grant, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	gr.refused = err
	close(gr.opening)
	gr.opening = nil
}

// awaitOpening waits until it is known what becomes of a grant.
func (g *Guard) awaitOpening(path string) {
	g.mu.Lock()
	var opening chan struct{}
	if gr := g.grants[path]; gr != nil {
		opening = gr.opening
	}
	g.mu.Unlock()
	if opening == nil {
		return
	}
	select {
	case <-opening:
	case <-time.After(hookDeadline):
	}
}

// awaitStarts waits until no grant is open, but no longer than limit: whoever comes
// for the keys of a VM that is just starting finds none at the next virt-trustd.
func (g *Guard) awaitStarts(limit time.Duration) {
	for end := time.Now().Add(limit); g.starting("") && time.Now().Before(end); {
		time.Sleep(20 * time.Millisecond)
	}
}

// closeGrant ends a VM's grant, but for the one that is just being opened.
func (g *Guard) closeGrant(uuid string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for dir, gr := range g.grants {
		if gr.uuid == uuid && gr.opening == nil {
			gr.close()
			delete(g.grants, dir)
		}
	}
}

// setupRuns reports whether the swtpm_setup that redeemed is still there.
func (gr *grant) setupRuns() bool {
	if gr.setup < 0 {
		return false
	}
	n, err := poll.Now(unix.PollFd{Fd: int32(gr.setup), Events: unix.POLLIN})
	return err == nil && n == 0
}

func (gr *grant) close() {
	gr.closeSetup()
	gr.socket.close()
	gr.socket = nil
	if gr.announced != "" {
		os.Remove(gr.announced)
	}
}

func (gr *grant) closeSetup() {
	if gr.setup >= 0 {
		unix.Close(gr.setup)
	}
	gr.setup = -1
}

// announce tells the wrapper, by a file with the VM's UUID, that start will wait
// for swtpm's control socket, so that its name may be there before it. Without
// the file the start takes some milliseconds more.
func (g *Guard) announce(gr *grant) {
	if gr.pass || g.cfg.Mode != "enforce" {
		return // start lets it go on, redeemed or not
	}
	path := filepath.Join(g.dirs.Run, startsDir, gr.uuid)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		g.log.WithField(journal.VM, gr.uuid).WithError(err).Debug("announcing the start to the wrapper")
		return
	}
	gr.announced = path
}

// startsDir has the starts that are announced; what a virt-trustd before this
// one has announced, nobody waits for.
const startsDir = "starts"

func clearStarts(run string) error {
	dir := filepath.Join(run, startsDir)
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	return os.Chmod(dir, 0o711) // whatever the umask: swtpm's user looks into it
}

// socket is the control socket that swtpm will make.
type socket struct {
	path  string
	swtpm int // descriptor of its process
}

// How long start waits for a wrapper that has begun, and for swtpm. libvirt
// gives both together one second.
const (
	wrapperLimit = 3 * time.Second
	socketLimit  = 5 * time.Second
)

// expect notes the control socket of the swtpm that is about to redeem its grant.
func (g *Guard) expect(program, statePath, path string, c *caller) {
	if program != swtpmargs.Swtpm || !filepath.IsAbs(path) || len(path) > maxStatePath {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	gr := g.grants[filepath.Clean(statePath)]
	if gr == nil || gr.cgroup != c.cgroup || gr.redeemed[program] || gr.socket != nil || gr.setupRuns() {
		return
	}
	if process, err := unix.PidfdOpen(c.pid, 0); err == nil {
		gr.socket = &socket{path, process}
	}
}

// redeemed reports whether the swtpm of a VM's start has what it needs. Where
// libvirt may have gone on before its wrapper had asked, it waits for that; gr is
// the grant, nil if there is none.
func (g *Guard) redeemed(f *domain.Facts) (gr *grant, ok bool, err error) {
	for end := time.Now().Add(wrapperLimit); ; time.Sleep(time.Millisecond / 5) {
		g.mu.Lock()
		gr = g.grants[f.StateDir(g.cfg.Swtpm.StateRoot)]
		if gr == nil || gr.uuid != f.UUID {
			g.mu.Unlock()
			return nil, false, nil
		}
		ok = gr.pass || gr.redeemed[swtpmargs.Swtpm]
		var control *socket
		if ok {
			control, gr.socket = gr.socket, nil
		}
		waits, refused := gr.announced != "", gr.refused
		g.mu.Unlock()
		switch {
		case ok:
			err = control.await()
			control.close()
			if err != nil {
				// Of two that came for the keys the second may be libvirt's, and just hear no.
				time.Sleep(100 * time.Millisecond)
				g.mu.Lock()
				defer g.mu.Unlock()
				err = cmp.Or(gr.refused, err)
			}
			return gr, true, err
		case waits && refused != nil:
			return gr, false, refused
		case !waits || time.Now().After(end):
			return gr, false, nil
		}
	}
}

func (s *socket) close() {
	if s != nil {
		unix.Close(s.swtpm)
	}
}

// await waits until swtpm has made the socket.
func (s *socket) await() error {
	if s == nil {
		return nil
	}
	for end := time.Now().Add(socketLimit); ; time.Sleep(time.Millisecond / 5) {
		ended, err := poll.Now(unix.PollFd{Fd: int32(s.swtpm), Events: unix.POLLIN})
		// In this order: a swtpm that has made it, and ended, is no more awaited.
		if st, err := os.Lstat(s.path); err == nil && st.Mode().Type() == os.ModeSocket {
			return nil
		}
		switch {
		case err != nil:
			return fmt.Errorf("looking at swtpm: %w", err)
		case ended > 0:
			return reason.Refuse(reason.KeyNotReleased, "see its log in /var/log/swtpm/libvirt/qemu", "swtpm ended before it had made its control socket")
		case time.Now().After(end):
			return reason.Refuse(reason.KeyNotReleased, "see its log in /var/log/swtpm/libvirt/qemu", "swtpm has not made its control socket for %v", socketLimit)
		}
	}
}

// Redemption is what a wrapper gets: descriptors to close when they are sent,
// or none if it shall run its program as it was called.
type Redemption struct {
	State, Transfer *os.File
	Certify         bool // swtpm_setup gets its certificates from CertifyEK
}

// Close closes the descriptors.
func (r *Redemption) Close() {
	for _, f := range []*os.File{r.State, r.Transfer} {
		if f != nil {
			f.Close()
		}
	}
}

// Redeem gives a wrapper the keys of the VM whose state path this is.
func (g *Guard) Redeem(program, path string, c *caller) (r *Redemption, err error) {
	if program != "swtpm" && program != "swtpm_setup" {
		return nil, reason.Refuse(reason.PolicyForbids, "", "there are no grants for the program %q", program)
	}
	if len(path) > maxStatePath {
		return nil, reason.Refuse(reason.PolicyForbids, "use a shorter one", "a state path of %d bytes is too long", len(path))
	}
	path = filepath.Clean(path)
	g.awaitOpening(path)
	if err := g.watchFirst(path); err != nil {
		return nil, err
	}
	empty := false
	if program == "swtpm" {
		g.makeAK(path, c)
	}
	if program == "swtpm_setup" {
		seen, err := statedir.Look(path)
		empty = err != nil || !seen.Exists()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	gr := g.grants[path]
	if gr == nil {
		return g.withoutGrant(path)
	}
	defer func() {
		if err != nil && program == swtpmargs.Swtpm && gr.cgroup == c.cgroup {
			gr.refused = err
		}
	}()
	who := logrus.Fields{journal.VM: gr.uuid, "program": program}
	again := gr.redeemed[program]
	switch {
	case program == "swtpm" && gr.setupRuns():
		// swtpm_setup's own, to which it hands the key itself. libvirt's comes
		// after swtpm_setup has ended. (Its parent tells nothing: glib forks twice.)
		return &Redemption{}, nil
	case gr.refused != nil:
		return nil, gr.refused
	case !gr.pass && gr.keys == nil: // it was never decided
		return nil, g.noKeys("it is not known whether the VM may start", "start the VM again; 'journalctl -u virt-trustd' tells more")
	case g.now().After(gr.expires):
		return nil, g.noKeys("the grant for this start has expired", "start the VM again")
	case gr.cgroup != c.cgroup:
		return nil, g.noKeys("the wrapper was not called by libvirt", "start the VM with libvirt")
	case again && !(program == "swtpm_setup" && gr.made.fresh && !empty && !gr.banks && !gr.setupRuns() && !gr.redeemed["swtpm"]):
		return nil, g.noKeys("the grant for this start was redeemed before", "start the VM again")
	case empty && gr.had:
		return nil, reason.Refuse(reason.VTPMMissing, "'virt-trust repair' puts the kept state back", "the vTPM state in %s was removed while the VM was being started", path)
	}
	r = &Redemption{}
	if !gr.pass {
		if r.State, err = secret.HexMemfd("vtpm-state-key", stateKey(gr.keys)); err != nil {
			return nil, err
		}
		if r.Transfer, err = secret.HexMemfd("vtpm-transfer-key", transferKey(gr.keys)); err != nil {
			r.Close()
			return nil, err
		}
	}
	gr.redeemed[program] = true
	if program == "swtpm_setup" {
		gr.closeSetup()
		gr.banks = again
		gr.made.fresh = !gr.had
		r.Certify = gr.certify && !again
		if s := g.sessions[gr.uuid]; s != nil {
			s.writes.Store(true)
			s.making.Store(!gr.had)
		}
		if gr.setup, err = unix.PidfdOpen(c.pid, 0); err != nil {
			r.Close()
			return nil, g.noKeys("the wrapper has ended", "start the VM again")
		}
		gr.setupPID = c.pid
	}
	g.log.WithFields(who).Debug("vTPM keys granted")
	return r, nil
}

// maxStatePath bounds, in bytes, what a wrapper may ask for.
const maxStatePath = 4096

// watchFirst sees to it that what swtpm writes in a folder is noted: libvirt
// has made the folder by now. A file system may hang, and so g.mu is not held.
func (g *Guard) watchFirst(path string) error {
	g.mu.Lock()
	gr := g.grants[path]
	watched := gr != nil && g.sessions[gr.uuid] != nil
	g.mu.Unlock()
	if !watched {
		return nil
	}
	return g.watch.Add(path)
}

func (g *Guard) noKeys(what, mend string) error {
	return reason.Refuse(reason.KeyNotReleased, mend, "%s", what)
}

// withoutGrant answers for a path that no start is under way for. What is
// ours, by the list or by libvirt's layout, gets nothing; the rest is not our
// business. Called with g.mu held.
func (g *Guard) withoutGrant(path string) (*Redemption, error) {
	_, ours := swtpmargs.UUIDFromStatePath(g.cfg.Swtpm.StateRoot, path)
	if g.store != nil && !ours {
		for _, r := range g.store.All() {
			if r.Instance == path && r.State != list.Released {
				ours = true
			}
		}
	}
	if ours {
		return nil, g.noKeys("no start of this VM is under way", "start the VM with libvirt; if that says this, 'virt-trust status' shows whether the hook is in its place")
	}
	return &Redemption{}, nil
}
