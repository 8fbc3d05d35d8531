// Package introspect looks into a VM from its host, without its help: so far
// at the PCRs of its vTPM.
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
