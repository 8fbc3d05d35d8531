package statedir

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// unixStat is what os.FileInfo.Sys holds on Linux.
type unixStat = syscall.Stat_t

// Watcher tells of state files that swtpm has renamed into their place.
type Watcher struct {
	f  *os.File
	fd int // of f, whose Fd would make it block
	mu sync.Mutex
	wd map[int32]string // nil when closed: the number fd may be another file's then
}

// NewWatcher starts a watcher. settled is called, from one goroutine, with a
// folder after one or more of its state files were written; overflow when the
// kernel lost count, after which any folder may have been written.
func NewWatcher(settled func(dir string), overflow func()) (*Watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	w := &Watcher{f: os.NewFile(uintptr(fd), "inotify"), fd: fd, wd: map[int32]string{}}
	go w.run(settled, overflow)
	return w, nil
}

// Add watches a folder. To add it twice does nothing.
func (w *Watcher) Add(dir string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.wd == nil {
		return fmt.Errorf("watching %s: %w", dir, os.ErrClosed)
	}
	wd, err := unix.InotifyAddWatch(w.fd, dir, unix.IN_MOVED_TO|unix.IN_ONLYDIR|unix.IN_DONT_FOLLOW)
	if err != nil {
		return fmt.Errorf("watching %s: %w", dir, err)
	}
	w.wd[int32(wd)] = dir
	return nil
}

// Remove stops watching a folder.
func (w *Watcher) Remove(dir string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for wd, d := range w.wd {
		if d == dir {
			// An error means that the folder is gone, and the watch with it.
			_, _ = unix.InotifyRmWatch(w.fd, uint32(wd))
			delete(w.wd, wd)
		}
	}
}

// Close ends the watcher.
func (w *Watcher) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wd = nil
	return w.f.Close()
}

func (w *Watcher) run(settled func(string), overflow func()) {
	buf := make([]byte, 64<<10)
	for {
		n, err := w.f.Read(buf)
		if err != nil {
			return
		}
		dirs, lost := map[string]bool{}, false
		for _, e := range parseEvents(buf[:n]) {
			lost = lost || e.mask&unix.IN_Q_OVERFLOW != 0
			w.mu.Lock()
			dir, ok := w.wd[e.wd]
			if e.mask&unix.IN_IGNORED != 0 {
				delete(w.wd, e.wd)
			}
			w.mu.Unlock()
			if ok && e.name == StateFile(dir) {
				dirs[dir] = true
			}
		}
		for dir := range dirs {
			settled(dir)
		}
		if lost {
			overflow()
		}
	}
}

// Removals calls removed with the name of each folder that is removed from dir,
// until ctx ends or dir is gone itself. Removals that the kernel lost count of
// are not told.
func Removals(ctx context.Context, dir string, removed func(name string)) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer f.Close()
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_DELETE|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_ONLYDIR); err != nil {
		return fmt.Errorf("watching %s: %w", dir, err)
	}
	defer context.AfterFunc(ctx, func() { f.Close() })()
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		if err != nil {
			return fmt.Errorf("watching %s: %w", dir, err)
		}
		for _, e := range parseEvents(buf[:n]) {
			switch {
			case e.mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_IGNORED) != 0:
				return fmt.Errorf("%s is gone", dir)
			case e.mask&unix.IN_DELETE != 0 && e.mask&unix.IN_ISDIR != 0:
				removed(e.name)
			}
		}
	}
}

// event is one of inotify(7)'s.
type event struct {
	wd   int32
	mask uint32
	name string
}

func parseEvents(b []byte) (all []event) {
	for len(b) >= unix.SizeofInotifyEvent {
		size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
		if size > len(b) {
			break
		}
		all = append(all, event{
			int32(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:]), string(trimNUL(b[unix.SizeofInotifyEvent:size])),
		})
		b = b[size:]
	}
	return all
}

func trimNUL(b []byte) []byte {
	for i, c := range b {
		if c == 0 {
			return b[:i]
		}
	}
	return b
}
