package inject

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"virt-trust/internal/introspect"
)

// eventStop is PTRACE_EVENT_STOP of ptrace(2), which x/sys does not have.
const eventStop = 128

// held are the threads of a process that has been stopped by ptrace(2), each
// with the signal that it was about to get, 0 for none.
//
// A tracer's stop, and not SIGSTOP, for three reasons. The kernel lets all go on
// when the tracer ends, however it ends: nothing has to watch over it. It adds
// nothing up with other stops: a process that an administrator has stopped stays
// so, one that a debugger has is refused to us, and a SIGSTOP or SIGCONT that
// comes meanwhile takes effect after us. And it needs no right to send signals.
type held map[int]unix.Signal

// errSlow: a thread did not stop in time. It may have waited for a disk, or for a
// processor.
var errSlow = errors.New("does not stop")

// hold stops all threads of a process within limit. It must be called, as must
// release, on one thread of the operating system, the tracer.
func hold(pid int, limit time.Duration) (h held, err error) {
	h = held{}
	defer func() {
		if err != nil {
			if e := h.release(); e != nil {
				err = e
			}
		}
	}()
	deadline := time.Now().Add(limit)
	for {
		fresh := false
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return h, fmt.Errorf("%w: %w", introspect.ErrGone, err)
		}
		for _, e := range threads {
			tid, err := strconv.Atoi(e.Name())
			if _, ok := h[tid]; err != nil || ok {
				continue
			}
			if err := unix.PtraceSeize(tid); errors.Is(err, unix.ESRCH) {
				continue // it has ended
			} else if err != nil {
				return h, seizeError(pid, err)
			}
			fresh = true
			h[tid] = 0
			if err := unix.PtraceInterrupt(tid); err != nil && !errors.Is(err, unix.ESRCH) {
				return h, err
			}
		}
		if !fresh {
			return h, nil // a thread that runs could have made another; none runs
		}
		for tid := range h {
			if err := h.wait(pid, tid, deadline); err != nil {
				return h, err
			}
		}
	}
}

func seizeError(pid int, err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: process %d is traced already, or tracing is not allowed (CAP_SYS_PTRACE, kernel.yama.ptrace_scope below 3): %w", introspect.ErrForbidden, pid, err)
	}
	return fmt.Errorf("seizing process %d: %w", pid, err)
}

// wait waits until a seized thread has stopped, or has ended.
func (h held) wait(pid, tid int, deadline time.Time) error {
	if h[tid] < 0 {
		return nil
	}
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(tid, &ws, unix.WALL|unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECHILD), err == nil && got == tid && (ws.Exited() || ws.Signaled()):
			delete(h, tid)
			return nil
		case err != nil:
			return err
		case got == tid && ws.Stopped():
			event, sig := int(ws>>16), ws.StopSignal()
			switch {
			case event == eventStop && sig != unix.SIGTRAP:
				h[tid] = stopped // and stays so when it is let go
				return fmt.Errorf("process %d: %w", pid, introspect.ErrStopped)
			case event == eventStop:
				h[tid] = stopped
			default:
				h[tid] = stopped - unix.Signal(sig) // it gets it when it goes on
			}
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w: thread %d of process %d", errSlow, tid, pid)
		}
		sleep(20 * time.Microsecond)
	}
}

// stopped marks a thread that has stopped; below it is the signal to give.
const stopped unix.Signal = -1

// release lets all threads go on. Only one that has stopped can be let go: one
// that was too slow to is waited for, while the others run already. One that does
// not stop even then is let go by the kernel, when this process ends, and
// release says so.
func (h held) release() error {
	for tid := range h {
		h.detach(tid)
	}
	deadline := time.Now().Add(slowLimit)
	for tid := range h {
		for h[tid] == 0 {
			if err := h.wait(0, tid, deadline); err != nil && !errors.Is(err, introspect.ErrStopped) {
				return fmt.Errorf("%w: %w", introspect.ErrBusy, err)
			}
			if _, ok := h[tid]; !ok {
				break
			}
		}
		h.detach(tid)
	}
	return nil
}

// detach lets a thread go on if it has stopped.
func (h held) detach(tid int) {
	s, ok := h[tid]
	if !ok || s == 0 {
		return
	}
	sig := unix.Signal(0)
	if s < stopped {
		sig = stopped - s
	}
	unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_DETACH, uintptr(tid), 0, uintptr(sig), 0, 0)
	delete(h, tid)
}

// sleep is without Go's timers, which take longer.
func sleep(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	unix.Nanosleep(&ts, nil)
}
