package wrap

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"virt-trust/internal/bus"
	"virt-trust/internal/domain/emulator"
	"virt-trust/internal/domain/qemuargs"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/reason"
)

// Emulator is one run of virt-trust-emulator, which stands before QEMU for the
// VMs that name it as their <emulator>. For a VM with a vTPM it opens the real
// QEMU, hashes what is behind the descriptor, asks virt-trustd whether that may
// run in this start, and executes the descriptor. All else, libvirt's probes
// and VMs without a vTPM, becomes the real QEMU at once. Every field must be set.
type Emulator struct {
	Args    []string // argv, argv[0] included
	Env     []string
	RealDir string // where the real ones are
	Links   string // see emulator.Links
	Self    string // a path of this executable, as /proc/self/exe
	Stderr  io.Writer
	Log     *logrus.Logger
	// Redeem asks virt-trustd: nil lets the VM start.
	Redeem func(ctx context.Context, uuid string, sha256 [sha256.Size]byte) error
}

// emulatorLimit is how long virt-trustd may take. libvirt waits for QEMU's
// monitor for 30 s and more.
const emulatorLimit = 10 * time.Second

// Run becomes the real emulator, or gives the exit status.
func (e *Emulator) Run() (status int) {
	name := ""
	if len(e.Args) > 0 {
		name = filepath.Base(e.Args[0])
	}
	call := qemuargs.Parse(e.Args)
	defer func() {
		if p := recover(); p != nil {
			status = e.refuse(call, reason.Refuse(reason.LauncherNotApproved, "", "internal error: %v", p))
		}
	}()
	if !strings.HasPrefix(name, "qemu-system-") {
		fmt.Fprintf(e.Stderr, "virt-trust: this program runs under the names of QEMU's emulators, not as %.100q\n", name)
		return 1
	}
	real := filepath.Join(e.RealDir, name)
	f, err := e.open(real)
	if err != nil {
		fmt.Fprintf(e.Stderr, "virt-trust: %v\n", err)
		return 127
	}
	if call.VTPM {
		if err := e.redeem(call, real, f); err != nil {
			return e.refuse(call, err)
		}
		real = e.pathOf(name, f)
	}
	err = syscall.Exec(real, e.Args, e.Env)
	fmt.Fprintf(e.Stderr, "virt-trust: running %s: %v\n", f.Name(), err)
	return 126
}

// open opens the real emulator, which must be no script: what a script runs is
// none of what was hashed.
func (e *Emulator) open(real string) (*os.File, error) {
	f, err := os.Open(real)
	if err != nil {
		return nil, fmt.Errorf("looking for the real emulator: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	me, err := os.Stat(e.Self)
	if err != nil {
		return nil, fmt.Errorf("looking at this program itself: %w", err)
	}
	magic := make([]byte, 4)
	if _, err := f.ReadAt(magic, 0); err != nil || !st.Mode().IsRegular() || !bytes.Equal(magic, []byte("\x7fELF")) || os.SameFile(st, me) {
		return nil, fmt.Errorf("%s is not the program QEMU", real)
	}
	return f, nil
}

// redeem asks for leave to run what is behind f.
func (e *Emulator) redeem(call qemuargs.Call, real string, f *os.File) error {
	if call.UUID == "" {
		return reason.Refuse(reason.PolicyForbids, "start the VM with libvirt", "the command line does not say whose vTPM it is for")
	}
	// Undone by exec. Nobody else of QEMU's user shall have this process do something else.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("hiding this process: %w", err)
	}
	changed, digest, err := hash(f)
	if err != nil {
		return fmt.Errorf("reading %s: %w", real, err)
	}

	ctx, cancel := context.WithTimeout(context.Background(), emulatorLimit)
	defer cancel()
	answer := make(chan error, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				answer <- fmt.Errorf("internal error: %v", p)
			}
		}()
		answer <- e.Redeem(ctx, call.UUID, digest)
	}()
	select {
	case err = <-answer:
	case <-time.After(emulatorLimit + emulatorLimit/20): // a connection that hangs has no deadline of its own
		err = bus.Unreachable("no answer within " + emulatorLimit.String())
	}
	if err != nil {
		return err
	}
	// Who writes into the very file that is open leaves a trace in its ctime; so
	// does an upgrade, which takes its name away.
	var now unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &now); err != nil {
		return err
	}
	if now.Ctim == changed {
		return nil
	}
	_, again, err := hash(f)
	if err != nil {
		return fmt.Errorf("reading %s: %w", real, err)
	}
	if again != digest {
		return reason.Refuse(reason.LauncherNotApproved, "start the VM again", "%s (SHA-256 %s) was altered while the VM was being started", real, hex.EncodeToString(digest[:]))
	}
	return nil
}

// hash gives a file's digest, and what its ctime was before.
func hash(f *os.File) (changed unix.Timespec, digest [sha256.Size]byte, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return changed, digest, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return changed, digest, err
	}
	h := sha256.New()
	_, err = io.CopyBuffer(h, struct{ io.Reader }{f}, make([]byte, 1<<20))
	return st.Ctim, [sha256.Size]byte(h.Sum(nil)), err
}

// pathOf gives a path by which the very descriptor is executed: one that ends in
// the emulator's name, which the kernel makes the process's. Where the number
// is taken or the link is not there, the process is called by a number.
func (e *Emulator) pathOf(name string, f *os.File) string {
	link := filepath.Join(e.Links, name)
	to, err := os.Readlink(link)
	if _, taken := unix.FcntlInt(emulator.FD, unix.F_GETFD, 0); err == nil && to == descriptor(emulator.FD) && errors.Is(taken, unix.EBADF) &&
		unix.Dup3(int(f.Fd()), emulator.FD, unix.O_CLOEXEC) == nil {
		return link
	}
	return descriptor(int(f.Fd()))
}

func descriptor(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// RedeemEmulator asks virt-trustd on the system bus.
func RedeemEmulator(ctx context.Context, uuid string, digest [sha256.Size]byte) error {
	c, err := bus.Dial(ctx)
	if err != nil {
		return bus.Unreachable(err.Error())
	}
	// The connection ends with ctx; its descriptor would not survive exec either.
	options := map[string]any{"uuid": uuid, "sha256": digest[:]}
	return c.Call(ctx, "RedeemGrant", []any{emulator.Program, "", options})
}

// refuse shows, on QEMU's stderr, which libvirt shows in turn, what keeps the VM
// from starting.
func (e *Emulator) refuse(call qemuargs.Call, err error) int {
	r := reason.As(err)
	switch {
	case errors.Is(err, bus.ErrAccessDenied):
		r = reason.Refuse(reason.PolicyForbids, "see virt-trust-wrapper(8), or take the VM off it with 'virt-trust emulator restore'",
			"QEMU runs as a user that may not ask virt-trustd")
	case r == nil:
		r = reason.Refuse(reason.LauncherNotApproved, "see 'journalctl -t virt-trustd -t virt-trust-emulator'",
			"it could not be told whether this emulator may run: %v", err)
	}
	e.Log.WithFields(logrus.Fields{
		journal.ID: journal.Refused, journal.Reason: r.Code, journal.VM: call.UUID, journal.Operation: emulator.Program,
	}).Warn("refused: " + r.Text())
	fmt.Fprintf(e.Stderr, "virt-trust: refused: %s\n", r.Error())
	return 1
}
