// Package introspect looks into a VM from its host, without its help: so far
// at the PCRs of its vTPM.
package introspect

import (
	"context"
	"errors"

	"virt-trust/internal/evidence/report"
)

// Target is a running VM.
type Target struct {
	Swtpm int    // process id of its swtpm
	QEMU  int    // process id of its QEMU, 0 where it is not known
	UUID  string // of the VM: the swtpm must hold the lock of this VM's state
	// StateDir is the folder of the vTPM's state, of which the swtpm must hold the
	// lock.
	StateDir string
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
