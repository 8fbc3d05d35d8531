// Package introspect looks into a VM from its host, without its help: so far
// at the PCRs of its vTPM.
//
// # The ways there are
//
// The default is Memory: the PCRs are read where libtpms has them, in swtpm's
// own memory, through /proc/PID/mem. It needs nothing of the VM, of QEMU or of
// libvirt, works on every VM that runs already, takes no part in what the guest
// and its vTPM say to each other, and stops neither. If it fails, a reading is
// missing, with the reason, and nothing else happens.
//
// Package inject has the vTPM itself answer, and quote, between two commands of
// the guest, for which QEMU stands still for about a millisecond. It can do the
// guest harm if something goes wrong in the middle, so it is off unless the
// administrator turns it on. A proxy between QEMU and swtpm was the third way. It
// reads in 0.15 ms without stopping anything; but it has to be there from the
// VM's start, adds 20 µs to each command, and takes the vTPM with it when it
// dies.
//
// # How Memory knows where
//
// The layout of libtpms' variables is nobody's interface. So it is learned, and
// not known: the installed swtpm is run on a throw-away state, random digests are
// extended, and the one place is looked for in which all PCRs of all banks lie
// that the TPM says it has; in the same way the allocation of the banks that are
// active, and the flags of TPM2_Startup. Several runs, with different banks
// active, have to agree on one place (package layout). What is learned is an offset
// to the beginning of libtpms, and is good for that build only, which is told by
// the SHA-256 digest of its code as it lies in memory. So it does not matter what
// a guest has put into its vTPM, nor what its PCRs are.
//
//   - A new build is learned when the first VM runs with it, or at Calibrate: 0.1 s.
//   - A VM that runs with a build that was replaced before it was learned:
//     ErrUnknownBuild. So call Calibrate at the start. What was learned is kept for
//     the next virt-trustd, on a tmpfs.
//   - A libtpms that keeps PCRs in another way, a swtpm with libtpms linked in, or
//     one with threads: ErrUnknownBuild. Never values: the allocation must name all
//     hashes of the build in their order, and each flag must be 0 or 1.
//
// # What a reading is
//
// All PCRs of all active banks at one moment between two commands. That is so
// because swtpm slept from before to after; or, while it works on a long command,
// because it ran for 20 ms and changed none. Reading twice until equal would not
// do: between two banks of one extend, swtpm may wait for a processor for long.
// After a reset there are none until TPM2_Startup (ErrNotStarted).
//
// The process is the one that holds the lock of the VM's state and runs the
// swtpm that is configured; the lock is looked at each time. Its descriptors in
// /proc are of this process, and not of a later one with its number.
//
// Nothing is parsed that a guest could have shaped: digests of a fixed size are
// copied. /proc/PID/maps and the like are the kernel's, and are fuzzed all the
// same. Therefore it is done in virt-trustd, and not in a process of its own.
//
// It needs CAP_SYS_PTRACE (or swtpm's user and kernel.yama.ptrace_scope 0), and
// no system call outside @system-service: process_vm_readv(2) would, and would
// take a number for the process.
//
// A reading is as good as the host that makes it, which is what the host's quote
// over the report, and its measurement list, are for.
package introspect

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"virt-trust/internal/evidence/report"
	"virt-trust/internal/vtpm/statedir"
)

// Target is a running VM.
type Target struct {
	Swtpm    int    // process id of its swtpm, 0 where it is not known
	QEMU     int    // process id of its QEMU, 0 where it is not known
	UUID     string // for messages
	StateDir string // of its vTPM's state: its swtpm is what holds the lock there
}

// Holder gives the process that holds the lock of the VM's state. It must be
// t.Swtpm, where that is given.
func (t Target) Holder() (int, error) {
	if !filepath.IsAbs(t.StateDir) {
		return 0, fmt.Errorf("%w: %q is no state folder", ErrOther, t.StateDir)
	}
	pid, err := statedir.Holder(t.StateDir)
	switch {
	case err != nil:
		return 0, err
	case pid == 0:
		return 0, fmt.Errorf("%w: nobody holds the lock in %s", ErrGone, t.StateDir)
	case pid < 0: // of another pid namespace
		return 0, fmt.Errorf("%w: the lock in %s is held out of sight", ErrOther, t.StateDir)
	case t.Swtpm != 0 && t.Swtpm != pid:
		return 0, fmt.Errorf("%w: process %d holds the lock in %s, not %d", ErrOther, pid, t.StateDir, t.Swtpm)
	}
	return pid, nil
}

// Reader reads the PCRs of a VM's vTPM.
type Reader interface {
	// Read gives all PCRs of each active bank, as they were at one moment. Its
	// errors are those below, or of the context.
	Read(ctx context.Context, t Target) (*report.Reading, error)
}

// Why there is no reading. The text beside them says more.
var (
	// ErrGone: the process has ended.
	ErrGone = errors.New("swtpm has ended")
	// ErrOther: the process is not the swtpm of this VM.
	ErrOther = errors.New("not the swtpm of this VM")
	// ErrUnknownBuild: the VM runs with a libtpms in which the place of the PCRs is
	// not known.
	ErrUnknownBuild = errors.New("unknown build of libtpms")
	// ErrNotStarted: the guest's firmware has not started the vTPM yet, or its
	// state is still on its way here.
	ErrNotStarted = errors.New("the vTPM has not been started")
	// ErrBusy: no moment was found in which the PCRs stood still.
	ErrBusy = errors.New("the vTPM is busy")
	// ErrStopped: somebody has stopped the process.
	ErrStopped = errors.New("stopped by somebody else")
	// ErrForbidden: the kernel does not let this process look into another.
	ErrForbidden = errors.New("looking into processes is forbidden")
)
