package introspect

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"sync"
	"time"

	"virt-trust/internal/introspect/layout"
	"virt-trust/internal/vtpm/liststore"
)

// lessons are the layouts that were learned, by build. They are kept in a file
// for the VMs that run with a libtpms that is no longer installed. It lies in
// memory: no VM outlives a boot of its host, and what lies on a disk could be
// changed while the host is off.
type lessons struct {
	file string

	mu  sync.Mutex
	all map[string]*layout.Layout // by build, in hex
}

const (
	maxLessons     = 32
	maxLessonsFile = 1 << 16
)

func (l *lessons) get(build [sha256.Size]byte) *layout.Layout {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.load()
	return l.all[hex.EncodeToString(build[:])]
}

// load reads the file once. What is damaged is learned again.
func (l *lessons) load() {
	if l.all != nil {
		return
	}
	l.all = map[string]*layout.Layout{}
	f, err := os.Open(l.file)
	if err != nil {
		return
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxLessonsFile))
	all := map[string]*layout.Layout{}
	if err != nil || json.Unmarshal(b, &all) != nil {
		return
	}
	maps.DeleteFunc(all, func(_ string, one *layout.Layout) bool { return one == nil || one.Check() != nil })
	l.all = all
}

func (l *lessons) put(build [sha256.Size]byte, one *layout.Layout) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.load()
	if len(l.all) >= maxLessons {
		clear(l.all)
	}
	l.all[hex.EncodeToString(build[:])] = one
	b, err := json.Marshal(l.all)
	if err != nil {
		return err
	}
	return liststore.WriteFile(l.file, append(b, '\n'), 0o600)
}

// again is how soon the installed swtpm is run again for a VM whose libtpms is
// another one.
const again = time.Minute

// layout gives that of a build; where it is not known, the installed one is
// learned, which it may be.
func (m *Memory) layout(ctx context.Context, build [sha256.Size]byte) (*layout.Layout, error) {
	if l := m.lessons.get(build); l != nil {
		return l, nil
	}
	m.learning.Lock()
	defer m.learning.Unlock()
	if l := m.lessons.get(build); l != nil {
		return l, nil
	}
	if m.learned.IsZero() || time.Since(m.learned) > again {
		if err := m.calibrate(ctx); err != nil {
			return nil, err
		}
	}
	if l := m.lessons.get(build); l != nil {
		return l, nil
	}
	return nil, fmt.Errorf("%w: its code has the SHA-256 digest %x, and that of the installed one is %x: libtpms was changed under the VM; stop and start it, or migrate it",
		ErrUnknownBuild, build, m.installed)
}

// Calibrate learns where the libtpms that is installed now keeps the PCRs. Read
// does it, too, where that is not known; doing it at the start, and after an
// upgrade before VMs run with it and it is replaced in turn, leaves no VM with a
// build that can no longer be learned.
func (m *Memory) Calibrate(ctx context.Context) error {
	m.learning.Lock()
	defer m.learning.Unlock()
	return m.calibrate(ctx)
}

func (m *Memory) calibrate(ctx context.Context) error {
	build, l, err := m.learn(ctx)
	if err != nil {
		return fmt.Errorf("learning where %s keeps the PCRs: %w", m.cfg.Swtpm, err)
	}
	m.learned, m.installed = time.Now(), build
	return m.lessons.put(build, l)
}
