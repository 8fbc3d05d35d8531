package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/sirupsen/logrus"

	contract "virt-trust/dbus"
	"virt-trust/internal/bus"
	"virt-trust/internal/bus/serving"
	"virt-trust/internal/domain"
	"virt-trust/internal/domain/emulator"
	"virt-trust/internal/domain/libvirt"
	"virt-trust/internal/domain/swtpmargs"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/introspect"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/label"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/reason"
)

// Programs are where the package puts what talks to virt-trustd.
type Programs struct {
	Hook     string // /usr/libexec/virt-trust/virt-trust-hook
	Wrapper  string // /usr/libexec/virt-trust/virt-trust-wrapper
	Emulator string // /usr/libexec/virt-trust/virt-trust-emulator
	EKCert   string // /usr/libexec/virt-trust/virt-trust-ekcert
	Link     string // /etc/libvirt/hooks/qemu.d/50-virt-trust, by which libvirt finds Hook
	Removed  string // /run/virt-trust.removed: when the package was removed since boot, if it was
}

// Service offers a Guard on D-Bus (org.virttrust1(5)).
type Service struct {
	g        *Guard
	conn     *dbus.Conn
	programs Programs
	swtpmUID uint32
	qemuUID  uint32
	version  string
	log      *logrus.Entry
	slots    chan struct{} // of libvirt's hooks and wrappers
	others   chan struct{} // of all other callers, who must not keep VMs from starting
	signals  chan func()

	mu      sync.Mutex
	known   map[string]bool // VMs that have an object
	problem string          // the last that kept the list from being opened

	host     *hosttpm.Host
	history  *history
	logs     bootLogs
	statusMu sync.Mutex // held while the TPM is asked
	status   hostStatus
	asking   atomic.Bool // for noticeHost
	wasReady atomic.Bool // the TPM, when it was asked last
	denied   rate
	asked    rate // by the agent

	agent      func() (uid uint32, err error)
	pcrs       introspect.Reader
	quoter     quoter        // may be nil
	collecting chan struct{} // has room for one round of evidence

	working    context.Context // ends with virt-trustd
	conversing sync.Mutex      // held while a conversation goes on
}

// maxCalls bounds the calls that are worked on at once. libvirt's default is
// 20 workers; each can wait in one hook.
const maxCalls = 64

// Deadlines of calls, below those of the callers.
const (
	hookDeadline   = 40 * time.Second
	redeemDeadline = 5 * time.Second
	adminDeadline  = 2 * time.Minute
)

// access says who may call a method. The bus policy says it too; neither
// relies on the other.
type access int

const (
	reader access = iota // whom the bus lets through: root and group virt-trust
	hookOnly
	wrapperOnly
	emulatorOnly
	ekcertOnly
	agentOnly // and root
	polkitAction
)

// serve runs a method's body behind everything that is common to all.
func (s *Service) serve(sender dbus.Sender, method string, who access, limit time.Duration, body func(context.Context, *caller) error) *dbus.Error {
	slots := s.others
	if who == hookOnly || who == wrapperOnly || who == emulatorOnly || who == ekcertOnly {
		slots = s.slots
	}
	err := serving.Call(slots, limit, s.log.WithField("method", method), func(ctx context.Context) error {
		c, err := identify(ctx, s.conn, string(sender))
		if err != nil {
			return err
		}
		if err := s.admit(ctx, c, method, who); err != nil {
			s.deny("", c.exe, method, err)
			return err
		}
		return body(ctx, c)
	})
	switch {
	case err == nil:
		return nil
	case errors.Is(err, serving.ErrFull):
		err = reason.Refuse(reason.TPMBusy, "try again", "%s", err)
	}
	return s.fail(method, err)
}

var errDenied = errors.New("you may not do this")

func (s *Service) admit(ctx context.Context, c *caller, method string, who access) error {
	switch who {
	case hookOnly:
		if c.uid != 0 {
			return errDenied
		}
		if c.exe != s.programs.Hook || !c.byLibvirt() {
			return reason.Refuse(reason.PolicyForbids, "let libvirt call it", "the hook was not called by libvirt")
		}
	case wrapperOnly:
		if c.uid != s.swtpmUID || c.exe != s.programs.Wrapper || c.traced {
			return reason.Refuse(reason.PolicyForbids, "let libvirt start swtpm", "grants are for virt-trust's wrapper, run as libvirt's swtpm user")
		}
	case emulatorOnly:
		if c.uid != s.qemuUID || c.exe != s.programs.Emulator || c.traced {
			return reason.Refuse(reason.PolicyForbids, "let libvirt start QEMU", "this grant is for virt-trust's emulator, run as libvirt's QEMU user")
		}
	case ekcertOnly:
		if c.uid != s.swtpmUID || c.exe != s.programs.EKCert || c.traced {
			return reason.Refuse(reason.PolicyForbids, "let libvirt start the VM", "certificates are for virt-trust-ekcert, run by swtpm_setup as libvirt's swtpm user")
		}
	case agentOnly:
		if uid, err := s.agent(); c.uid != 0 && (err != nil || c.uid != uid) {
			return errDenied
		}
	case polkitAction:
		ok, err := authorized(ctx, s.conn, c, bus.Name+"."+strings.ToLower(method))
		if err != nil {
			s.log.WithError(err).Warn("asking polkit")
		}
		if !ok {
			return errDenied
		}
	}
	return nil
}

func (s *Service) fail(method string, err error) *dbus.Error {
	r := reason.As(err)
	switch {
	case r != nil:
		return dbus.NewError(bus.ErrorRefused, []any{r.Error()})
	case errors.Is(err, errDenied):
		return dbus.NewError(bus.ErrorAccessDenied, []any{fmt.Sprintf("%s: %s; ask an administrator, or see org.virttrust1(5)", method, err)})
	case errors.Is(err, bus.ErrNotFound), errors.Is(err, libvirt.ErrNoDomain):
		return dbus.NewError(bus.ErrorNotFound, []any{reason.OneLine(err.Error())})
	case errors.Is(err, serving.ErrBug): // it is logged
		return dbus.NewError(bus.ErrorFailed, []any{err.Error()})
	}
	s.log.WithField("method", method).WithError(err).Error("could not tell")
	return dbus.NewError(bus.ErrorFailed, []any{reason.OneLine(err.Error())})
}

type dict = map[string]dbus.Variant

func strs(kv ...string) dict {
	d := dict{}
	for i := 0; i < len(kv); i += 2 {
		d[kv[i]] = dbus.MakeVariant(kv[i+1])
	}
	return d
}

func option[T any](options dict, key string) T {
	v, _ := options[key].Value().(T)
	return v
}

// manager is org.virttrust1.Manager.
func (s *Service) manager() map[string]any {
	methods := map[string]any{
		"HandleHook": func(op, sub, extra, doc string, options dict, sender dbus.Sender) (dict, *dbus.Error) {
			result := dict{}
			return result, s.serve(sender, "HandleHook", hookOnly, hookDeadline, func(ctx context.Context, c *caller) error {
				return s.hook(ctx, c, domain.Operation(op), doc, option[string](options, "path"))
			})
		},
		"RedeemGrant": func(program, path string, options dict, sender dbus.Sender) (action string, keys []dbus.Variant, derr *dbus.Error) {
			keys = []dbus.Variant{}
			if program == emulator.Program {
				return "pass", keys, s.redeemEmulator(options, sender)
			}
			derr = s.serve(sender, "RedeemGrant", wrapperOnly, hookDeadline, func(ctx context.Context, c *caller) error {
				if socket := option[string](options, "socket"); socket != "" {
					s.g.expect(program, path, socket, c)
				}
				r, err := s.g.Redeem(program, path, c)
				if err != nil {
					uuid, _ := swtpmargs.UUIDFromStatePath(s.g.cfg.Swtpm.StateRoot, path)
					s.deny(uuid, path, "redeem", err)
					return err
				}
				action = "pass"
				defer func() {
					if r.Certify && option[bool](options, "certificates") { // the wrapper knows of them
						action += "-certify"
					}
				}()
				if r.State != nil {
					action = "keys"
					keys = []dbus.Variant{dbus.MakeVariant(dbus.UnixFD(r.State.Fd())), dbus.MakeVariant(dbus.UnixFD(r.Transfer.Fd()))}
					// The library sends after this returns and does not say when it has.
					time.AfterFunc(redeemDeadline, r.Close)
				}
				return nil
			})
			return action, keys, derr
		},
		"GetVM": func(vm string, sender dbus.Sender) (path dbus.ObjectPath, derr *dbus.Error) {
			path = "/"
			return path, s.serve(sender, "GetVM", reader, adminDeadline, func(context.Context, *caller) error {
				store := s.g.peek()
				if store != nil {
					if r := store.Find(vm); r != nil {
						path = bus.VMPath(r.UUID)
						return nil
					}
				}
				return fmt.Errorf("%w in the vTPM list: %q", bus.ErrNotFound, vm)
			})
		},
		"Check": s.verb("Check", reader, func(ctx context.Context, d libvirt.Domain, f *domain.Facts, options dict) (string, error) {
			return s.g.Check(ctx, f)
		}),
		"Adopt": s.verb("Adopt", polkitAction, func(ctx context.Context, d libvirt.Domain, f *domain.Facts, options dict) (string, error) {
			return s.g.Adopt(ctx, d, f, option[bool](options, "new"))
		}),
		"Release": s.verb("Release", polkitAction, func(ctx context.Context, d libvirt.Domain, f *domain.Facts, options dict) (string, error) {
			return s.g.Release(ctx, d, f)
		}),
		"Accept": func(vm string, options dict, sender dbus.Sender) (dict, *dbus.Error) {
			if vm != "" {
				return s.verb("Accept", polkitAction, func(ctx context.Context, d libvirt.Domain, f *domain.Facts, options dict) (string, error) {
					if !option[bool](options, "rolled-back") {
						return "", errors.New(`nothing to accept was named: the option "rolled-back" is the only one`)
					}
					return s.g.Accept(ctx, d, f)
				})(vm, options, sender)
			}
			result := dict{}
			return result, s.serve(sender, "Accept", polkitAction, adminDeadline, func(ctx context.Context, c *caller) error {
				if !option[bool](options, "list-rolled-back") {
					return errors.New(`nothing to accept was named: without a VM the option "list-rolled-back" is the only one`)
				}
				what, err := s.g.AcceptList(ctx)
				maps.Copy(result, strs("what", what))
				s.deny("", "vTPM list", "accept", err)
				return err
			})
		},
		"Repair": func(vm string, options dict, sender dbus.Sender) (dict, *dbus.Error) {
			if vm != "" {
				return s.verb("Repair", polkitAction, func(ctx context.Context, d libvirt.Domain, f *domain.Facts, options dict) (string, error) {
					return s.g.Repair(ctx, d, f)
				})(vm, options, sender)
			}
			result := dict{}
			return result, s.serve(sender, "Repair", polkitAction, adminDeadline, func(ctx context.Context, c *caller) error {
				what, err := s.g.RepairList(ctx)
				maps.Copy(result, strs("what", what))
				return err
			})
		},
		"Log": func(limit uint32, options dict, sender dbus.Sender) ([]dict, *dbus.Error) {
			all := []dict{}
			derr := s.serve(sender, "Log", reader, adminDeadline, func(context.Context, *caller) error {
				for _, d := range s.g.journal.recent(int(min(limit, maxDecisions))) {
					e := strs("uuid", d.UUID, "name", d.Name, "operation", d.Operation, "verdict", d.Verdict, "reason", string(d.Reason), "what", d.What)
					e["time"] = dbus.MakeVariant(uint64(d.Time))
					all = append(all, e)
				}
				return nil
			})
			return all, derr
		},
		"Launchers":       s.launchers,
		"ApproveLauncher": s.approveLauncher,
		"RevokeLauncher":  s.revokeLauncher,
		"ImportLaunchers": s.importLaunchers,
		"ResetLaunchers":  s.resetLaunchers,
		"LaunchLog":       s.launchLog,
		"CheckLabel": func(payload []byte, options dict, sender dbus.Sender) (dict, *dbus.Error) {
			result := dict{}
			return result, s.serve(sender, "CheckLabel", reader, adminDeadline, func(context.Context, *caller) error {
				maps.Copy(result, s.checkLabel(payload))
				return nil
			})
		},
	}
	maps.Copy(methods, s.recoveryMethods())
	maps.Copy(methods, s.emulatorMethods())
	maps.Copy(methods, s.ekcertMethods())
	return methods
}

// rate bounds how often something is done in a minute.
type rate struct {
	mu   sync.Mutex
	from time.Time
	n    int
}

// over counts, and reports whether it was more often than most.
func (r *rate) over(now time.Time, most int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Sub(r.from) >= time.Minute {
		r.from, r.n = now, 0
	}
	r.n++
	return r.n > most
}

// deny makes known that someone was refused something; name is a VM's, or who or
// what it was about. Whoever asks again and again does not crowd out what else
// is in the log.
func (s *Service) deny(uuid, name, operation string, err error) {
	r := reason.As(err)
	if errors.Is(err, errDenied) {
		r = reason.Refuse(reason.PolicyForbids, "", "%s is for others", operation)
	}
	if r == nil || s.denied.over(time.Now(), 10) {
		return
	}
	s.g.report(uuid, name, operation, refused, r.Code, r.Text(), journal.Refused)
	s.emit(bus.Path, bus.ManagerInterface+".Refused", uuid, name, operation, string(r.Code), r.Text())
}

// verb makes a method that is about one VM, which libvirt knows.
func (s *Service) verb(method string, who access, body func(context.Context, libvirt.Domain, *domain.Facts, dict) (string, error)) func(string, dict, dbus.Sender) (dict, *dbus.Error) {
	return func(vm string, options dict, sender dbus.Sender) (dict, *dbus.Error) {
		result := dict{}
		derr := s.serve(sender, method, who, adminDeadline, func(ctx context.Context, c *caller) error {
			d, err := s.lookup(ctx, vm)
			if err != nil {
				return err
			}
			f, err := domain.Parse([]byte(d.XML))
			if err != nil {
				return err
			}
			maps.Copy(result, strs("uuid", f.UUID, "name", f.Name, "verdict", "start", "reason", "", "mend", ""))
			what, err := body(ctx, d, f, options)
			result["what"] = dbus.MakeVariant(what)
			if method != "Check" {
				s.deny(f.UUID, f.Name, strings.ToLower(method), err)
				return err
			}
			// A dry run's refusal is its answer.
			if r := reason.As(err); r != nil {
				maps.Copy(result, strs("verdict", "refuse", "reason", string(r.Code), "what", r.What, "mend", r.Mend))
				return nil
			}
			return err
		})
		return result, derr
	}
}

func (s *Service) lookup(ctx context.Context, vm string) (libvirt.Domain, error) {
	c, err := s.dial(ctx)
	if err != nil {
		return libvirt.Domain{}, err
	}
	defer c.Close()
	return c.Lookup(ctx, vm)
}

func (s *Service) checkLabel(payload []byte) dict {
	l, err := label.UntrustedParse(payload)
	if err != nil {
		return strs("verdict", "other", "what", err.Error())
	}
	store := s.g.peek()
	if store == nil {
		return strs("verdict", "unknown", "what", "the vTPM list cannot be read now")
	}
	r := store.Get(l.VM)
	switch {
	case r == nil:
		return strs("verdict", "other", "what", "the vTPM list does not know this VM")
	case list.DigestOf(payload) == r.LabelDigest:
		return strs("verdict", "right", "what", "it is the label of VM "+r.Name)
	case slices.Equal(payload, r.PendingLabel):
		return strs("verdict", "right", "what", "it is the new label of VM "+r.Name)
	}
	return strs("verdict", "other", "what", "it is not the label that was written last for VM "+r.Name)
}

// hook handles a libvirt hook event. Only what may refuse gives an error.
func (s *Service) hook(ctx context.Context, c *caller, op domain.Operation, doc, path string) error {
	if op != domain.OpPrepare {
		return s.handle(ctx, c, op, doc, path, nil)
	}
	// It may go on when libvirt has its answer, and longer than this call.
	ahead, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- serving.Call(make(chan struct{}, 1), hookDeadline, s.log.WithField("method", "HandleHook"), func(ctx context.Context) error {
			return s.handle(ctx, c, op, doc, path, func() { close(ahead) })
		})
	}()
	select {
	case err := <-done:
		return err
	case <-ahead:
		return nil
	}
}

// handle is hook. goOn is Prepare's.
func (s *Service) handle(ctx context.Context, c *caller, op domain.Operation, doc, path string, goOn func()) error {
	ctx, took := timed(ctx)
	all := lap(ctx, tookAll)
	f, err := domain.Parse([]byte(doc))
	if err != nil {
		return err
	}
	if f.TPM == nil {
		return nil
	}
	ahead := false
	switch op {
	case domain.OpPrepare:
		ctx = withPath(ctx, path)
		err = s.wrapperInUse(f, path, c.parent)
		switch r := reason.As(err); {
		case err == nil:
			err = s.g.Prepare(ctx, f, c.cgroup, func() { ahead = true; goOn() })
		case r != nil && s.g.cfg.Mode == "audit" && !s.g.guarded(f.UUID):
			// libvirt will run its own swtpm: the VM must stay as it is.
			s.g.report(f.UUID, f.Name, string(op), wouldRefuse, r.Code, r.Text(), journal.WouldRefuse)
			return nil
		}
	case domain.OpStart:
		err = s.g.Launched(f)
	case domain.OpStarted, domain.OpStopped:
		// The hook does not even ask. The grant ended at `start`; and `release`
		// comes when not only swtpm is gone, but QEMU's image free as well.
	case domain.OpRelease:
		err = s.g.Stopped(ctx, f, managedSaveExists(f.Name))
	case domain.OpRestore:
		s.g.Restoring(f)
	case domain.OpReconnect:
		var store, e = s.g.List(ctx)
		if err = e; err == nil {
			err = s.g.resumeOne(ctx, store, f.UUID)
		}
	case domain.OpMigrate:
		err = reason.Refuse(reason.VMElsewhere, "move it while it is off, or run it on its host", "the VM's vTPM lives on the host that it comes from, and cannot be handed over yet")
	}
	all()
	if ahead && err != nil { // start, and the wrapper, will tell
		s.notice(err)
		return err
	}
	if op == domain.OpPrepare || op == domain.OpMigrate || (op == domain.OpStart && err != nil) {
		s.verdict(f, op, err, took)
	}
	return err
}

// verdict makes a decision known.
func (s *Service) verdict(f *domain.Facts, op domain.Operation, err error, took took) {
	s.notice(err)
	r := reason.As(err)
	switch {
	case err == nil:
		s.g.report(f.UUID, f.Name, string(op), allow, "", "", journal.KeysGranted, took.fields())
		return
	case r == nil:
		s.g.report(f.UUID, f.Name, string(op), refused, "", err.Error(), journal.Refused)
		return
	}
	s.g.report(f.UUID, f.Name, string(op), refused, r.Code, r.Text(), journal.Refused)
	s.emit(bus.Path, bus.ManagerInterface+".Refused", f.UUID, f.Name, string(op), string(r.Code), r.Text())
	// The record's last verdict is memory enough: writing the list for a
	// refusal would let refusals wear it.
	s.g.lastRefusal(f.UUID, r)
}

// wrapperInUse refuses a start for which libvirt, the process with this id and
// PATH, would run swtpm itself.
func (s *Service) wrapperInUse(f *domain.Facts, path string, libvirtd int) error {
	if store := s.g.peek(); store != nil {
		if r := store.Get(f.UUID); r != nil && r.State == list.Released {
			return nil
		}
	}
	const mend = "run 'systemctl restart libvirtd' (or virtqemud), which leaves running VMs alone"
	if !wrapperFirst(path, s.programs.Wrapper) {
		return reason.Refuse(reason.PolicyForbids, mend, "libvirt was started without virt-trust's wrapper on its PATH")
	}
	if s.sawRemoval(libvirtd) {
		return reason.Refuse(reason.PolicyForbids, mend, "virt-trust was removed and installed again since libvirt was started, which may know swtpm's own path by now")
	}
	return nil
}

// wrapperFirst reports whether the first swtpm on a PATH is the wrapper.
func wrapperFirst(path, wrapper string) bool {
	for _, dir := range filepath.SplitList(path) {
		p := filepath.Join(dir, "swtpm")
		st, err := os.Stat(p)
		if err != nil || st.Mode()&0o111 == 0 || !st.Mode().IsRegular() {
			continue
		}
		w, err := os.Stat(wrapper)
		return err == nil && os.SameFile(st, w)
	}
	return false
}

// managedSaveExists tells a managed save from a stop.
func managedSaveExists(name string) bool {
	if name == "" || strings.ContainsRune(name, '/') {
		return false
	}
	_, err := os.Lstat(filepath.Join("/var/lib/libvirt/qemu/save", name+".save"))
	return err == nil
}

// report puts a decision into the log and the journal. event may be empty.
func (g *Guard) report(uuid, name, op, verdict string, code reason.Code, what string, event journal.Event, more ...logrus.Fields) {
	what = reason.OneLine(what)
	g.journal.add(Decision{UUID: uuid, Name: name, Operation: op, Verdict: verdict, Reason: code, What: what})
	e := g.log.WithFields(logrus.Fields{journal.VM: uuid, journal.VMName: name, journal.Operation: op, "verdict": verdict})
	for _, f := range more {
		e = e.WithFields(f)
	}
	if code != "" {
		e = e.WithField(journal.Reason, string(code))
	}
	if event != "" {
		e = e.WithField(journal.ID, event)
	}
	switch verdict {
	case refused, wouldRefuse:
		e.Warn(verdict + " " + op + ": " + what)
	case allow:
		e.Info(strings.TrimSuffix(verdict+" "+op+": "+what, ": "))
	default:
		e.Info(what)
	}
}

// --- objects and properties ---

type hostStatus struct {
	at    time.Time
	state dict
}

func (s *Service) properties(path dbus.ObjectPath, iface string) (dict, bool) {
	switch {
	case path == bus.Path && iface == bus.ManagerInterface:
		return s.managerProperties(), true
	case path == bus.HostPath && iface == bus.HostInterface:
		return s.hostProperties(), true
	case path == bus.HostPath && iface == bus.AttestationInterface:
		return dict{}, true
	case strings.HasPrefix(string(path), bus.VMPathPrefix) && iface == bus.VMInterface:
		store := s.g.peek()
		if store == nil {
			return nil, false
		}
		r := store.Get(strings.ReplaceAll(strings.TrimPrefix(string(path), bus.VMPathPrefix), "_", "-"))
		if r == nil {
			return nil, false
		}
		return s.vmProperties(r), true
	}
	return nil, false
}

func (s *Service) managerProperties() dict {
	state, problem, generation, count := s.g.listState()
	logState, logProblem := s.g.launchLogState()
	d := dict{
		"Version": dbus.MakeVariant(s.version), "Mode": dbus.MakeVariant(s.g.cfg.Mode),
		"ListState": dbus.MakeVariant(state), "ListProblem": dbus.MakeVariant(problem),
		"ListGeneration": dbus.MakeVariant(generation), "VMCount": dbus.MakeVariant(uint32(count)),
		"LibvirtState": dbus.MakeVariant(s.libvirtState()), "RecoveryState": dbus.MakeVariant(s.g.recoveryState()),
		"LaunchLogState": dbus.MakeVariant(logState), "LaunchLogProblem": dbus.MakeVariant(logProblem),
	}
	maps.Copy(d, s.g.raised())
	return d
}

func (s *Service) vmProperties(r *list.Record) dict {
	verdict, code, what := s.g.lastVerdict(r)
	labelState := "none"
	switch {
	case len(r.PendingLabel) > 0:
		labelState = "pending"
	case !r.LabelDigest.IsZero():
		labelState = "right"
	}
	recovery := "none"
	if f := s.g.trusted(); f != nil && r.RecoveryTo == f.Recipient {
		recovery = "wrapped"
	}
	d := strs("Recovery", recovery, "UUID", r.UUID, "Name", r.Name, "State", string(s.g.stateOf(r)), "StatePath", r.Instance, "LabelPath", r.LabelPath, "LabelState", labelState,
		"LabelID", labelID(r), "KeyOwner", string(r.KeyOwner), "Baseline", r.Baseline.String(), "EKDigest", r.EKDigest.String(), "LastVerdict", verdict, "LastReason", code, "LastWhat", what)
	d["EKCertificate"] = dbus.MakeVariant(nonNil(r.EKCertificate))
	d["AKPublic"] = dbus.MakeVariant(nonNil(r.AKPublic))
	d["AKCertificate"] = dbus.MakeVariant(nonNil(r.AKCertificate))
	d["EKSharedWith"] = dbus.MakeVariant([]string{})
	if store := s.g.peek(); store != nil {
		d["EKSharedWith"] = dbus.MakeVariant(sharers(store, r))
	}
	for k, v := range map[string]uint64{"Generation": r.Generation, "Created": uint64(r.Created) * 1e6, "Changed": uint64(r.Changed) * 1e6, "Reverted": uint64(r.Reverted) * 1e6} {
		d[k] = dbus.MakeVariant(v)
	}
	d["Reverts"] = dbus.MakeVariant(r.Reverts)
	return d
}

func (s *Service) getProperty(iface, name string, msg dbus.Message) (dbus.Variant, *dbus.Error) {
	all, derr := s.getAll(iface, msg)
	if derr != nil {
		return dbus.Variant{}, derr
	}
	v, ok := all[name]
	if !ok {
		return v, dbus.NewError("org.freedesktop.DBus.Error.UnknownProperty", []any{"there is no property " + name})
	}
	return v, nil
}

func (s *Service) getAll(iface string, msg dbus.Message) (d dict, derr *dbus.Error) {
	sender, _ := msg.Headers[dbus.FieldSender].Value().(string)
	derr = s.serve(dbus.Sender(sender), "GetAll", reader, adminDeadline, func(context.Context, *caller) error {
		var ok bool
		if d, ok = s.properties(pathOf(msg), iface); !ok {
			return fmt.Errorf("%w: no interface %s here", bus.ErrNotFound, iface)
		}
		return nil
	})
	return d, derr
}

func pathOf(msg dbus.Message) dbus.ObjectPath {
	p, _ := msg.Headers[dbus.FieldPath].Value().(dbus.ObjectPath)
	return p
}

func (s *Service) managedObjects(sender dbus.Sender) (map[dbus.ObjectPath]map[string]dict, *dbus.Error) {
	all := map[dbus.ObjectPath]map[string]dict{}
	return all, s.serve(sender, "GetManagedObjects", reader, adminDeadline, func(context.Context, *caller) error {
		all[bus.HostPath] = map[string]dict{bus.HostInterface: s.hostProperties(), bus.AttestationInterface: {}}
		if store := s.g.peek(); store != nil {
			for _, r := range store.All() {
				all[bus.VMPath(r.UUID)] = map[string]dict{bus.VMInterface: s.vmProperties(r)}
			}
		}
		return nil
	})
}

// introspect gives an object's interfaces, as the contract has them, and its
// children.
func (s *Service) introspect(msg dbus.Message) (string, *dbus.Error) {
	p := pathOf(msg)
	of := func(name string) string { return serving.Interface(contract.XML, name) }
	switch {
	case p == "/":
		return serving.Introspection("", "org"), nil
	case p == "/org":
		return serving.Introspection("", "virttrust1"), nil
	case p == bus.Path:
		return serving.Introspection(of(bus.ManagerInterface)+objectManagerXML, "host", "vm"), nil
	case p == bus.HostPath:
		return serving.Introspection(of(bus.HostInterface) + of(bus.AttestationInterface)), nil
	case string(p) == strings.TrimSuffix(bus.VMPathPrefix, "/"):
		var children []string
		if store := s.g.peek(); store != nil {
			for _, r := range store.All() {
				children = append(children, strings.ReplaceAll(r.UUID, "-", "_"))
			}
		}
		return serving.Introspection("", children...), nil
	}
	if _, ok := s.properties(p, bus.VMInterface); !ok {
		return "", dbus.NewError("org.freedesktop.DBus.Error.UnknownObject", []any{"there is no object " + string(p)})
	}
	return serving.Introspection(of(bus.VMInterface)), nil
}

const objectManagerXML = `  <interface name="org.freedesktop.DBus.ObjectManager">
    <method name="GetManagedObjects"><arg name="objects" type="a{oa{sa{sv}}}" direction="out"/></method>
    <signal name="InterfacesAdded"><arg name="path" type="o"/><arg name="interfaces" type="a{sa{sv}}"/></signal>
    <signal name="InterfacesRemoved"><arg name="path" type="o"/><arg name="interfaces" type="as"/></signal>
  </interface>
`

// export puts everything on the bus and takes the name.
func (s *Service) export() error {
	properties := map[string]any{
		"Get":    s.getProperty,
		"GetAll": s.getAll,
		"Set":    serving.ReadOnly,
	}
	err := errors.Join(
		s.conn.ExportMethodTable(s.manager(), bus.Path, bus.ManagerInterface),
		s.conn.ExportMethodTable(s.hostMethods(), bus.HostPath, bus.HostInterface),
		s.conn.ExportMethodTable(s.attestation(), bus.HostPath, bus.AttestationInterface),
		// An object of its own has nothing from the tree above it.
		s.conn.ExportMethodTable(properties, bus.HostPath, "org.freedesktop.DBus.Properties"),
		s.conn.ExportMethodTable(map[string]any{"Introspect": s.introspect}, bus.HostPath, "org.freedesktop.DBus.Introspectable"),
		s.conn.ExportMethodTable(map[string]any{"GetManagedObjects": s.managedObjects}, bus.Path, "org.freedesktop.DBus.ObjectManager"),
		s.conn.ExportSubtreeMethodTable(properties, bus.Path, "org.freedesktop.DBus.Properties"),
		s.conn.ExportSubtreeMethodTable(map[string]any{"Introspect": s.introspect}, bus.Path, "org.freedesktop.DBus.Introspectable"),
		s.conn.ExportSubtreeMethodTable(map[string]any{"Introspect": s.introspect}, "/", "org.freedesktop.DBus.Introspectable"),
	)
	if err != nil {
		return err
	}
	return serving.Claim(s.conn, bus.Name)
}

// emit sends a signal, in order, without making its cause wait.
func (s *Service) emit(path dbus.ObjectPath, name string, args ...any) {
	select {
	case s.signals <- func() {
		if err := s.conn.Emit(path, name, args...); err != nil {
			s.log.WithError(err).Warn("sending a signal")
		}
	}:
	default:
		s.log.Warn("too many signals wait: one is lost")
	}
}

// vmChanged tells of a VM's new, changed or ended record.
func (s *Service) vmChanged(uuid string) {
	store := s.g.peek()
	if store == nil {
		return
	}
	r, path := store.Get(uuid), bus.VMPath(uuid)
	s.mu.Lock()
	was := s.known[uuid]
	if r != nil {
		s.known[uuid] = true
	} else {
		delete(s.known, uuid)
	}
	s.mu.Unlock()
	switch {
	case r != nil && !was:
		s.emit(bus.Path, "org.freedesktop.DBus.ObjectManager.InterfacesAdded", path, map[string]dict{bus.VMInterface: s.vmProperties(r)})
	case r != nil:
		s.emit(path, propertiesChanged, bus.VMInterface, s.vmProperties(r), []string{})
	case was:
		s.emit(bus.Path, "org.freedesktop.DBus.ObjectManager.InterfacesRemoved", path, []string{bus.VMInterface})
	}
	if was != (r != nil) {
		s.emit(bus.Path, propertiesChanged, bus.ManagerInterface, s.managerProperties(), []string{})
	}
}
