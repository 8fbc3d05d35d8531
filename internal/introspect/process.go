package introspect

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"virt-trust/internal/introspect/layout"
)

// process is one that is looked into. Its descriptors are of this process and
// of no other that gets its number: those of /proc by the kernel's struct pid,
// that of its memory by the address space, so that exec ends it, too.
type process struct {
	pid    int
	dir    int // /proc/PID
	status *os.File
	stat   *os.File
	mem    *os.File
	lib    *layout.Library
	build  [sha256.Size]byte // SHA-256 of libtpms' code, as it lies in memory
}

// open gets at a process, of which nothing is known yet.
func open(pid int) (p *process, err error) {
	p = &process{pid: pid, dir: -1}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if p.dir, err = unix.Open(filepath.Join("/proc", strconv.Itoa(pid)), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return p, procError(err)
	}
	for name, f := range map[string]**os.File{"status": &p.status, "stat": &p.stat, "mem": &p.mem} {
		if *f, err = p.file(name); err != nil {
			return p, err
		}
	}
	return p, nil
}

// file opens a file of /proc/PID.
func (p *process) file(name string) (*os.File, error) {
	fd, err := unix.Openat(p.dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, procError(&fs.PathError{Op: "open", Path: fmt.Sprintf("/proc/%d/%s", p.pid, name), Err: err})
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (p *process) close() {
	for _, f := range []*os.File{p.status, p.stat, p.mem} {
		if f != nil {
			f.Close()
		}
	}
	p.closeDir()
}

// closeDir ends the first part of a process's life here, after which its
// descriptors may be used, and closed, by several at once.
func (p *process) closeDir() {
	if p.dir >= 0 {
		unix.Close(p.dir)
		p.dir = -1
	}
}

// procError says what an error of /proc means.
func procError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ESRCH), errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %w", ErrGone, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %w (virt-trustd needs CAP_SYS_PTRACE, and kernel.yama.ptrace_scope below 3)", ErrForbidden, err)
	}
	return err
}

// executable gives the path of the program, also of one that was replaced by an
// upgrade.
func (p *process) executable() (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(p.dir, "exe", b)
	return strings.TrimSuffix(string(b[:max(n, 0)]), " (deleted)"), procError(err)
}

// locate finds libtpms in the process, and tells which build it is.
func (p *process) locate() error {
	f, err := p.file("maps")
	if err != nil {
		return err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, layout.MaxMaps+1))
	if err != nil {
		return procError(err)
	}
	if len(text) == 0 {
		return fmt.Errorf("%w: it has no memory", ErrGone)
	}
	if p.lib, err = layout.ParseMaps(text, "libtpms"); err != nil {
		return fmt.Errorf("%w: process %d: %w", ErrUnknownBuild, p.pid, err)
	}
	// The code itself says where the variables are, and is the same in every
	// process: no part of it is relocated.
	h := sha256.New()
	for _, t := range p.lib.Text {
		b := make([]byte, t.Len())
		if err := p.read(b, t.Start); err != nil {
			return err
		}
		h.Write(b)
	}
	h.Sum(p.build[:0])
	return nil
}

// read fills b from the process's memory.
func (p *process) read(b []byte, at uint64) error {
	n, err := p.mem.ReadAt(b, int64(at))
	switch {
	case n == len(b):
		return nil
	case n == 0 && errors.Is(err, io.EOF): // no address space: it ended, or became another program
		return ErrGone
	}
	return procError(fmt.Errorf("reading %d bytes of process %d: %w", len(b), p.pid, err))
}

// parts reads several.
func (p *process) parts(spans []layout.Span) ([][]byte, error) {
	var parts [][]byte
	for _, s := range spans {
		b := make([]byte, s.Len())
		if err := p.read(b, s.Start); err != nil {
			return nil, err
		}
		parts = append(parts, b)
	}
	return parts, nil
}

// data gives libtpms' variables.
func (p *process) data() ([]byte, error) {
	b := make([]byte, p.lib.Data.Len())
	return b, p.read(b, p.lib.Data.Start)
}

// moment is what tells whether a process ran between two looks at it.
type moment struct {
	state   byte // of proc(5)
	threads int
	slept   uint64 // how often it went to sleep
}

func (p *process) now() (m moment, err error) {
	var buf [4096]byte
	n, err := p.status.ReadAt(buf[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return m, procError(err)
	}
	if n == len(buf) {
		return m, fmt.Errorf("/proc/%d/status is too long", p.pid)
	}
	return parseStatus(buf[:n])
}

// parseStatus reads /proc/PID/status.
func parseStatus(b []byte) (m moment, err error) {
	field := func(name string) []byte {
		_, after, _ := bytes.Cut(b, []byte("\n"+name+":\t"))
		value, _, _ := bytes.Cut(after, []byte("\n"))
		return value
	}
	state := field("State")
	threads, err1 := strconv.Atoi(string(field("Threads")))
	slept, err2 := strconv.ParseUint(string(field("voluntary_ctxt_switches")), 10, 64)
	if err := errors.Join(err1, err2); err != nil || len(state) == 0 {
		return m, fmt.Errorf("/proc/PID/status is not as in proc(5): %v", err)
	}
	return moment{state: state[0], threads: threads, slept: slept}, nil
}

// cpu gives the time for which the process ran, in ticks of 10 ms.
func (p *process) cpu() (uint64, error) {
	var buf [1024]byte
	n, err := p.stat.ReadAt(buf[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, procError(err)
	}
	return parseCPU(buf[:n])
}

// parseCPU reads utime and stime, the 14th and 15th field of /proc/PID/stat.
func parseCPU(b []byte) (uint64, error) {
	// The second field is the program's name in parentheses, and may hold some.
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) < 13 {
		return 0, errors.New("/proc/PID/stat is not as in proc(5)")
	}
	u, err1 := strconv.ParseUint(string(f[11]), 10, 64)
	s, err2 := strconv.ParseUint(string(f[12]), 10, 64)
	return u + s, errors.Join(err1, err2)
}

const (
	patience = 2 * time.Second // for a moment in which the PCRs stand still
	// A command changes PCRs bank by bank, between which there are microseconds of
	// computing. Three ticks are 20 ms at the least, whenever the kernel counts.
	settledTicks = 3
)

// settled has read called at a moment when no command was changing
// PCRs: one at which the process slept from before to after; or, for a process
// that keeps running, one since which it ran for a while and changed nothing.
func (p *process) settled(ctx context.Context, read func() ([][]byte, error)) ([][]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, ErrBusy)
	defer cancel()
	var last [][]byte
	var since uint64
	var stopped bool
	for pause := 50 * time.Microsecond; ; pause = min(2*pause, 2*time.Millisecond) {
		before, err := p.now()
		if err != nil {
			return nil, err
		}
		b, err := read()
		if err != nil {
			return nil, err
		}
		after, err := p.now()
		if err != nil {
			return nil, err
		}
		switch {
		case before.threads != 1 || after.threads != 1:
			return nil, fmt.Errorf("%w: its swtpm has %d threads", ErrUnknownBuild, after.threads)
		case after.state == 'Z' || after.state == 'X':
			return nil, ErrGone
		case before == after && after.state == 'S':
			return b, nil
		}
		stopped = after.state == 'T' || after.state == 't'
		ran, err := p.cpu()
		if err != nil {
			return nil, err
		}
		if last == nil || !slices.EqualFunc(b, last, bytes.Equal) {
			last, since = b, ran
		} else if ran-since >= settledTicks {
			return b, nil
		}
		select {
		case <-ctx.Done():
			if err := context.Cause(ctx); !errors.Is(err, ErrBusy) {
				return nil, err
			}
			if stopped {
				return nil, fmt.Errorf("swtpm, process %d: %w", p.pid, ErrStopped)
			}
			return nil, ErrBusy
		case <-time.After(pause):
		}
	}
}
