// Package wrap is the body of virt-trust-emulator, see Emulator, and of
// virt-trust-wrapper, which stands before swtpm and swtpm_setup on libvirt's
// PATH, fetches the vTPM's keys from virt-trustd and becomes the real program,
// by exec: libvirt's pid file, its lock and its inherited descriptors belong to
// this process. What holds here:
//
//   - a probe (--print-capabilities, --version) becomes the real program at once;
//   - argv[0], the environment and every inherited descriptor stay as they are;
//   - without a grant there is one line on stderr, which libvirt shows for
//     swtpm_setup and swtpm, and the exit status 1;
//   - keys pass as descriptors, and this process neither reads them nor can
//     have its descriptors looked at meanwhile.
//
// The bus address may come from the environment, as in package hook: to speak
// to another bus gets the swtpm user keys that fit nothing.
package wrap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"virt-trust/internal/bus"
	"virt-trust/internal/domain/swtpmargs"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/reason"
)

// defaultRoot is where libvirt keeps vTPMs unless the domain XML says otherwise.
const defaultRoot = "/var/lib/libvirt/swtpm"

// keyDigits is the length of a key in its descriptor: 32 bytes in hexadecimal.
const keyDigits = 64

// Wrapper is one run. Every field must be set.
type Wrapper struct {
	Args      []string // argv, argv[0] included
	Env       []string
	Path      string // $PATH
	Self      string // a path of this executable, as /proc/self/exe
	Stderr    io.Writer
	Log       *logrus.Logger
	CertsTool string // virt-trust-ekcert
	Starts    string // where virt-trustd has a file, by the VM's UUID, for each start that it guards
	// Redeem asks virt-trustd for the vTPM's keys: "keys" with two descriptors,
	// or "pass"; "keys-certify" or "pass-certify" to a swtpm_setup whose vTPM gets
	// its certificates from virt-trustd.
	Redeem func(ctx context.Context, call swtpmargs.Call) (action string, keys []int, err error)
}

// Run becomes the real program, or gives the exit status.
func (w *Wrapper) Run() (status int) {
	program := ""
	if len(w.Args) > 0 {
		program = filepath.Base(w.Args[0])
	}
	call := swtpmargs.Parse(program, w.Args)
	defer func() {
		if p := recover(); p != nil {
			status = w.refuse(call, reason.Refuse(reason.KeyNotReleased, "", "internal error: %v", p))
		}
	}()
	if program != swtpmargs.Swtpm && program != swtpmargs.SwtpmSetup {
		fmt.Fprintf(w.Stderr, "virt-trust: this wrapper runs under the names swtpm and swtpm_setup, not as %.100q\n", program)
		return 1
	}
	real, err := find(program, w.Path, w.Self)
	if err != nil {
		fmt.Fprintf(w.Stderr, "virt-trust: %v\n", err)
		return 127
	}
	argv := w.Args
	if !call.Probe {
		if argv, err = w.redeem(call); err != nil {
			return w.refuse(call, err)
		}
	}
	err = syscall.Exec(real, argv, w.Env)
	fmt.Fprintf(w.Stderr, "virt-trust: running %s: %v\n", real, err)
	return 126
}

// limit is how long virt-trustd may take: libvirt gives swtpm one second to
// make its control socket appear (qemuTPMEmulatorStart). Where that is announced
// it is the event start that waits.
func limit(program string, announced bool) time.Duration {
	switch {
	case announced:
		return 40 * time.Second
	case program == swtpmargs.Swtpm:
		return 800 * time.Millisecond
	}
	return 10 * time.Second
}

// redeem gives the command line to run.
func (w *Wrapper) redeem(call swtpmargs.Call) (argv []string, err error) {
	announced := w.announce(call)
	if announced {
		defer func() {
			if err != nil {
				os.Remove(call.Socket)
			}
		}()
	}
	// Undone by exec. virt-trustd looks at this process as root with
	// CAP_SYS_PTRACE, which this does not hinder; other processes of the swtpm
	// user could otherwise open its descriptors in /proc.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("hiding this process: %w", err)
	}
	type answer struct {
		action string
		keys   []int
		err    error
	}
	within := limit(call.Program, announced)
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	answers := make(chan answer, 1)
	go func() {
		var a answer
		defer func() {
			if p := recover(); p != nil {
				a.err = fmt.Errorf("internal error: %v", p)
			}
			answers <- a
		}()
		a.action, a.keys, a.err = w.Redeem(ctx, call)
	}()
	var a answer
	select {
	case a = <-answers:
	case <-time.After(within + within/20): // a connection that hangs has no deadline of its own
		a.err = bus.Unreachable("no answer within " + within.String())
	}
	if r := reason.As(a.err); r != nil && r.Code == reason.HelperUnreachable {
		if _, ours := swtpmargs.UUIDFromStatePath(defaultRoot, call.StatePath); !ours {
			return w.Args, nil // somebody else's vTPM, which needs no virt-trust
		}
	}
	if a.err != nil {
		return nil, a.err
	}
	action, certify := strings.CutSuffix(a.action, "-certify")
	if certify && call.Program == swtpmargs.SwtpmSetup {
		if call, err = w.withCertsTool(call); err != nil {
			return nil, fmt.Errorf("the configuration of swtpm_setup: %w", err)
		}
	}
	switch {
	case action == "pass" && len(a.keys) == 0:
		return call.Argv(), nil
	case action == "keys" && len(a.keys) == 2:
		state, err := inherit(call, a.keys[0])
		if err != nil {
			return nil, fmt.Errorf("state key: %w", err)
		}
		transfer, err := inherit(call, a.keys[1])
		if err != nil {
			return nil, fmt.Errorf("transfer key: %w", err)
		}
		return call.WithKeys(state, transfer), nil
	}
	return nil, fmt.Errorf("virt-trustd answered %.32q with %d descriptors, which is not known", a.action, len(a.keys))
}

// announce makes the name of swtpm's control socket appear before swtpm replaces
// it by the socket. libvirt looks for it 1, 3, 7 and 15 ms after it has started
// this program (qemuTPMEmulatorStart), and so would wait up to as long again as
// swtpm takes to begin. That QEMU does not come too early is virt-trustd's to
// see to, at the event start of a VM that it guards. Where the name cannot be
// made, libvirt waits as it does without this.
func (w *Wrapper) announce(call swtpmargs.Call) bool {
	id, ours := swtpmargs.UUIDFromStatePath(defaultRoot, call.StatePath)
	if !ours || call.Socket == "" {
		return false
	}
	if _, err := os.Lstat(filepath.Join(w.Starts, id)); err != nil {
		return false
	}
	f, err := os.OpenFile(call.Socket, os.O_CREATE|os.O_EXCL|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return false
	}
	f.Close()
	return true
}

// withCertsTool has swtpm_setup run our tool for certificates, and otherwise
// what the admin's configuration says: its copy in memory takes its place. It
// names the tool by its path; the program that becomes swtpm_setup reads it as
// the user that it runs as.
func (w *Wrapper) withCertsTool(call swtpmargs.Call) (swtpmargs.Call, error) {
	var conf []byte
	for _, name := range call.ConfigFiles(w.Env) {
		f, err := os.Open(name)
		if err != nil && call.Config == "" {
			continue // it looks at the next one, too
		}
		if err != nil {
			return call, err
		}
		conf, err = io.ReadAll(io.LimitReader(f, swtpmargs.MaxConfig+1))
		f.Close()
		if err == nil && len(conf) > swtpmargs.MaxConfig {
			err = fmt.Errorf("%s: more than %d bytes", name, swtpmargs.MaxConfig)
		}
		if err != nil {
			return call, err
		}
		break
	}
	fd, err := unix.MemfdCreate("swtpm_setup.conf", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return call, err
	}
	f := os.NewFile(uintptr(fd), "swtpm_setup.conf")
	defer f.Close()
	if _, err := f.WriteAt(swtpmargs.WithCertsTool(conf, w.CertsTool), 0); err != nil {
		return call, err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return call, err
	}
	n, err := handDown(call, fd)
	if err != nil {
		return call, err
	}
	return call.WithConfig(fmt.Sprintf("/proc/self/fd/%d", n)), nil
}

// inherit makes a key's descriptor one that the real program gets, on a number
// that its command line does not name. swtpm takes the key by a single read.
func inherit(call swtpmargs.Call, key int) (int, error) {
	const seals = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW
	if s, err := unix.FcntlInt(uintptr(key), unix.F_GET_SEALS, 0); err != nil || s&seals != seals {
		return -1, errors.New("not in sealed memory")
	}
	var st unix.Stat_t
	if err := unix.Fstat(key, &st); err != nil || st.Size != keyDigits {
		return -1, fmt.Errorf("not %d digits", keyDigits)
	}
	if _, err := unix.Seek(key, 0, io.SeekStart); err != nil {
		return -1, err
	}
	return handDown(call, key)
}

// handDown makes a descriptor one that the real program gets, on a number that
// its command line does not name.
func handDown(call swtpmargs.Call, file int) (int, error) {
	for from := 3; ; {
		fd, err := unix.FcntlInt(uintptr(file), unix.F_DUPFD, from)
		if err != nil {
			return -1, err
		}
		if !call.Mentions(fd) {
			return fd, nil
		}
		unix.Close(fd)
		from = fd + 1
	}
}

// Redeem asks virt-trustd on the system bus.
func Redeem(ctx context.Context, call swtpmargs.Call) (string, []int, error) {
	c, err := bus.DialForDescriptors(ctx)
	if err != nil {
		return "", nil, bus.Unreachable(err.Error())
	}
	// The connection ends with ctx; its descriptor would not survive exec either.
	var action string
	var fds []dbus.Variant
	options := map[string]any{}
	if call.Program == swtpmargs.SwtpmSetup {
		options["certificates"] = true // this wrapper knows what "certify" means
	} else if call.Socket != "" {
		options["socket"] = call.Socket // which virt-trustd waits for
	}
	err = c.Call(ctx, "RedeemGrant", []any{call.Program, call.StatePath, options}, &action, &fds)
	keys := make([]int, len(fds))
	for i, v := range fds {
		fd, ok := v.Value().(dbus.UnixFD)
		if !ok {
			return "", nil, fmt.Errorf("virt-trustd answered with %s instead of a descriptor", v.Signature())
		}
		keys[i] = int(fd)
	}
	return action, keys, err
}

// refuse shows and logs what keeps the program from running. libvirt shows
// stderr for what it starts itself; for the swtpm that swtpm_setup starts only
// the journal is left.
func (w *Wrapper) refuse(call swtpmargs.Call, err error) int {
	uuid, _ := swtpmargs.UUIDFromStatePath(defaultRoot, call.StatePath)
	r := reason.As(err)
	if r == nil {
		r = reason.Refuse(reason.KeyNotReleased, "see 'journalctl -t virt-trustd -t virt-trust-wrapper'",
			"the vTPM keys could not be had: %v", err)
	}
	w.Log.WithFields(logrus.Fields{
		journal.ID: journal.Refused, journal.Reason: r.Code, journal.VM: uuid,
		journal.Operation: call.Program, "state_path": call.StatePath,
	}).Warn("refused: " + r.Text())
	fmt.Fprintf(w.Stderr, "virt-trust: refused: %s\n", r.Error())
	return 1
}

// find looks for the real program on path and then in /usr/bin, passing over
// everything that is this executable under whatever name.
func find(program, path, self string) (string, error) {
	me, err := os.Stat(self)
	if err != nil {
		return "", fmt.Errorf("looking at this program itself: %w", err)
	}
	for _, dir := range append(filepath.SplitList(path), "/usr/bin") {
		if !filepath.IsAbs(dir) {
			continue
		}
		p := filepath.Join(dir, program)
		st, err := os.Stat(p)
		if err != nil || !st.Mode().IsRegular() || st.Mode()&0o111 == 0 || os.SameFile(st, me) {
			continue
		}
		return p, nil
	}
	return "", fmt.Errorf("there is no %s besides this wrapper on PATH (%.500q) or in /usr/bin", program, path)
}
