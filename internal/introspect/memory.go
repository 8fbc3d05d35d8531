package introspect

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"time"

	"virt-trust/internal/evidence/report"
	"virt-trust/internal/introspect/layout"
)

// FromMemory is what a Memory's readings are called.
const FromMemory = "swtpm-memory"

// Config says how a Memory learns where libtpms keeps the PCRs.
type Config struct {
	Swtpm    string // the real program: VMs run it, and it is run on a throw-away state to learn
	Dir      string // for that state and for what was learned: on a tmpfs, root's
	UID, GID int    // of swtpm's user
}

// Memory reads PCRs out of the memory of swtpm. It is safe for concurrent use.
type Memory struct {
	cfg Config

	mu    sync.Mutex
	known map[string]*process // by state folder

	learning  sync.Mutex // held while the installed swtpm is run
	learned   time.Time
	installed [sha256.Size]byte
	lessons   lessons
}

// NewMemory makes a Memory. It holds descriptors of the processes that it has
// read until Close, or until they have ended.
func NewMemory(c Config) *Memory {
	m := &Memory{cfg: c, known: map[string]*process{}}
	m.lessons.file = filepath.Join(c.Dir, "libtpms-layouts.json")
	return m
}

// Close lets all processes go.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.known {
		p.close()
	}
	clear(m.known)
	return nil
}

// Read implements Reader.
func (m *Memory) Read(ctx context.Context, t Target) (*report.Reading, error) {
	r, err := m.read(ctx, t)
	if errors.Is(err, ErrGone) { // the one that was known; there may be another
		r, err = m.read(ctx, t)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the PCRs of VM %s: %w", t.UUID, err)
	}
	return r, nil
}

func (m *Memory) read(ctx context.Context, t Target) (*report.Reading, error) {
	p, err := m.process(t)
	if err != nil {
		return nil, err
	}
	l, err := m.layout(ctx, p.build)
	if err != nil {
		return nil, err
	}
	r, err := p.pcrs(ctx, l)
	if errors.Is(err, fs.ErrClosed) { // by another Read, which found it gone
		err = fmt.Errorf("%w: %w", ErrGone, err)
	}
	if errors.Is(err, ErrGone) {
		m.forget(t.StateDir, p)
	}
	return r, err
}

// process gives the swtpm that holds the lock of the VM's state.
func (m *Memory) process(t Target) (*process, error) {
	pid, err := t.Holder()
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	p := m.known[t.StateDir]
	m.mu.Unlock()
	if p != nil && p.pid == pid {
		return p, nil
	}
	if p, err = m.attach(t, pid); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for dir, old := range m.known {
		if _, err := old.now(); dir == t.StateDir || errors.Is(err, ErrGone) {
			old.close()
			delete(m.known, dir)
		}
	}
	m.known[t.StateDir] = p
	return p, nil
}

func (m *Memory) forget(dir string, p *process) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.known[dir] == p {
		delete(m.known, dir)
	}
	p.close()
}

// attach gets at a process that holds the lock of the VM's state, and finds
// libtpms in it.
func (m *Memory) attach(t Target, pid int) (*process, error) {
	p, err := open(pid)
	if err != nil {
		return nil, err
	}
	if err = m.check(t, p); err == nil {
		err = p.locate()
	}
	if err != nil {
		p.close()
		return nil, err
	}
	p.closeDir()
	return p, nil
}

// check tells whether an opened process is the VM's swtpm. The lock is looked at
// once more: had the number gone to another process before that was opened, it
// would not have it.
func (m *Memory) check(t Target, p *process) error {
	again, err := t.Holder()
	if err != nil {
		return err
	}
	exe, err := p.executable()
	if err != nil {
		return err
	}
	want, err := filepath.EvalSymlinks(m.cfg.Swtpm)
	if err != nil {
		return err
	}
	if again != p.pid || exe != want {
		return fmt.Errorf("%w: process %d is %q", ErrOther, p.pid, exe)
	}
	return nil
}

// pcrs reads the PCRs.
func (p *process) pcrs(ctx context.Context, l *layout.Layout) (*report.Reading, error) {
	spans := l.Spans()
	for i := range spans {
		s := &spans[i]
		if s.Start, s.End = s.Start+p.lib.Base, s.End+p.lib.Base; !p.lib.Data.Holds(*s) {
			return nil, fmt.Errorf("%w: its variables are elsewhere", ErrUnknownBuild)
		}
	}
	var at time.Time
	parts, err := p.settled(ctx, func() ([][]byte, error) {
		at = time.Now()
		return p.parts(spans)
	})
	if err != nil {
		return nil, err
	}
	banks, err := l.Read(parts)
	switch {
	case errors.Is(err, layout.ErrNotStarted):
		return nil, ErrNotStarted
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrUnknownBuild, err)
	}
	return &report.Reading{Reader: FromMemory, Time: at.UnixMicro(), Banks: banks}, nil
}
