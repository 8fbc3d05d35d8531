// Package measure finds the files that will really run for a VM, and hashes
// them. What it finds:
//
//   - the emulator that the domain XML names, with links resolved; where that is
//     virt-trust's own, the real one that it stands for as well;
//   - the emulator's modules, which it loads as it needs them: the shared
//     objects in the folder "qemu" under the library folders of its prefix
//     (/usr/lib/x86_64-linux-gnu/qemu, /usr/lib64/qemu, /usr/lib/qemu);
//   - the firmware's code image and NVRAM template, see firmware.go;
//   - the real swtpm and swtpm_setup, as virt-trust's wrapper finds them, and the
//     libtpms and libswtpm that the dynamic loader gives them;
//   - virt-trust's own programs that stand in the chain.
//
// What it leaves out: the C library and the other libraries of the distribution,
// option ROMs, and a VM's own kernel for direct boot.
package measure

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"virt-trust/internal/domain"
	"virt-trust/internal/domain/emulator"
)

// Roles of files.
const (
	Emulator     = "emulator"
	Module       = "emulator-module"
	FirmwareCode = "firmware"
	Template     = "nvram-template"
	Swtpm        = "swtpm"
	SwtpmSetup   = "swtpm_setup"
	Library      = "swtpm-library"
	Own          = "virt-trust"
)

// maxSize bounds a file that is hashed, in bytes.
const maxSize = 1 << 30

// Target is a file that will run: its role, and its path without links.
type Target struct{ Role, Path string }

// File is a measured target.
type File struct {
	Target
	SHA256 [sha256.Size]byte
	id     id
}

// id changes when a file does. A content that is altered in place alters ctime,
// which nobody can set.
type id struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

func idOf(st *unix.Stat_t) id {
	return id{uint64(st.Dev), st.Ino, st.Size, st.Mtim, st.Ctim}
}

// Measurer measures, and remembers what it has hashed. Its methods are safe for
// concurrent use.
type Measurer struct {
	Wrapper string   // virt-trust's wrapper, which stands before other programs
	Own     []string // virt-trust's programs that are measured themselves
	// Descriptors are the folders of firmware descriptors; a later one's file
	// hides an earlier one's of the same name. nil: QEMU's.
	Descriptors []string
	LoaderCache string // of the dynamic loader; "": /etc/ld.so.cache

	mu        sync.Mutex
	digests   map[id][sha256.Size]byte
	libraries map[string]needed // by program
}

// Targets gives what will run for a VM, sorted by path. path is libvirt's PATH.
func (m *Measurer) Targets(f *domain.Facts, path string) ([]Target, error) {
	var all []Target
	add := func(role, file string) error {
		real, err := filepath.EvalSymlinks(file)
		if err != nil {
			return fmt.Errorf("looking for the %s: %w", role, err)
		}
		all = append(all, Target{role, real})
		return nil
	}
	if f.Emulator == "" {
		return nil, errors.New("the domain XML names no emulator")
	}
	runs := f.Emulator
	if name, ours := emulator.Ours(runs); ours {
		runs = emulator.Real(name)
	}
	if err := add(Emulator, runs); err != nil {
		return nil, err
	}
	for _, o := range modules(all[0].Path) {
		all = append(all, Target{Module, o})
	}
	code, template, err := m.firmware(f.Firmware)
	if err != nil {
		return nil, err
	}
	if code != "" {
		err = add(FirmwareCode, code)
	}
	if template != "" {
		err = errors.Join(err, add(Template, template))
	}
	for _, program := range []string{Swtpm, SwtpmSetup} {
		p, e := m.real(program, path)
		if err = errors.Join(err, e); err != nil {
			return nil, err
		}
		if err = add(program, p); err != nil {
			return nil, err
		}
		libs, e := m.swtpmLibraries(all[len(all)-1].Path)
		if e != nil {
			return nil, fmt.Errorf("looking for the libraries of %s: %w", p, e)
		}
		for _, l := range libs {
			all = append(all, Target{Library, l})
		}
	}
	for _, o := range m.Own {
		if err = errors.Join(err, add(Own, o)); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	slices.SortFunc(all, func(a, b Target) int { return strings.Compare(a.Path, b.Path) })
	return slices.CompactFunc(all, func(a, b Target) bool { return a.Path == b.Path }), nil
}

// real finds a program behind the wrapper as the wrapper itself does: on
// libvirt's PATH, then in /usr/bin.
func (m *Measurer) real(program, path string) (string, error) {
	for _, dir := range append(filepath.SplitList(path), "/usr/bin") {
		if !filepath.IsAbs(dir) {
			continue
		}
		p := filepath.Join(dir, program)
		st, err := os.Stat(p)
		if err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 && !same(p, m.Wrapper) {
			return p, nil
		}
	}
	return "", fmt.Errorf("there is no %s on libvirt's PATH (%.500q) or in /usr/bin", program, path)
}

// Program finds a real program on a PATH, as virt-trust's wrapper does.
func (m *Measurer) Program(name, path string) (string, error) { return m.real(name, path) }

func same(a, b string) bool {
	if b == "" {
		return false
	}
	x, err := os.Stat(a)
	y, err2 := os.Stat(b)
	return err == nil && err2 == nil && os.SameFile(x, y)
}

// modules gives the shared objects in an emulator's own folders.
func modules(emulator string) (all []string) {
	prefix := filepath.Dir(filepath.Dir(emulator))
	triplet := map[string]string{"amd64": "x86_64", "arm64": "aarch64", "ppc64le": "powerpc64le", "riscv64": "riscv64", "s390x": "s390x"}[runtime.GOARCH] + "-linux-gnu"
	for _, lib := range []string{"lib/" + triplet, "lib64", "lib"} {
		dir, err := filepath.EvalSymlinks(filepath.Join(prefix, lib, "qemu"))
		if err != nil {
			continue
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range entries {
			if !strings.HasSuffix(e.Name(), ".so") {
				continue
			}
			p := filepath.Join(dir, e.Name())
			if e.Type()&fs.ModeSymlink != 0 {
				if p, err = filepath.EvalSymlinks(p); err != nil {
					continue
				}
			}
			all = append(all, p)
		}
	}
	return all
}

// Measure gives the digests of targets, from memory where a file is as it was
// when it was hashed.
func (m *Measurer) Measure(targets []Target) ([]File, error) {
	files := make([]File, len(targets))
	for i, t := range targets {
		f, err := m.measure(t)
		if err != nil {
			return nil, fmt.Errorf("measuring the %s %s: %w", t.Role, t.Path, err)
		}
		files[i] = f
	}
	return files, nil
}

func (m *Measurer) measure(t Target) (File, error) {
	var st unix.Stat_t
	if err := unix.Lstat(t.Path, &st); err != nil {
		return File{}, err
	}
	m.mu.Lock()
	d, known := m.digests[idOf(&st)]
	m.mu.Unlock()
	if known && st.Mode&unix.S_IFMT == unix.S_IFREG {
		return File{t, d, idOf(&st)}, nil
	}
	return m.hash(t)
}

// maxDigests is when the memory of digests is begun anew.
const maxDigests = 1 << 14

// settled is how old a change must be for a file's next one to show in its
// ctime, which has the resolution of the kernel's tick.
const settled = 100 * time.Millisecond

// hash reads a file, and holds what the kernel says of it before against what
// it says after.
func (m *Measurer) hash(t Target) (File, error) {
	f, err := Open(t.Path)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	for range 3 {
		var before, after unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &before); err != nil {
			return File{}, err
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return File{}, err
		}
		h := sha256.New()
		if _, err := io.Copy(h, io.LimitReader(f, maxSize)); err != nil {
			return File{}, err
		}
		if err := unix.Fstat(int(f.Fd()), &after); err != nil {
			return File{}, err
		}
		if idOf(&before) != idOf(&after) {
			continue
		}
		d := [sha256.Size]byte(h.Sum(nil))
		if time.Since(time.Unix(after.Ctim.Unix())) > settled {
			m.mu.Lock()
			if m.digests == nil || len(m.digests) >= maxDigests {
				m.digests = map[id][sha256.Size]byte{}
			}
			m.digests[idOf(&after)] = d
			m.mu.Unlock()
		}
		return File{t, d, idOf(&after)}, nil
	}
	return File{}, errors.New("it changes while it is read")
}

// Open opens a regular file that is no link, for reading.
func Open(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && (!st.Mode().IsRegular() || st.Size() > maxSize) {
		err = errors.New("it is no regular file, or larger than a gigabyte")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Unchanged reports whether a measured file is still the same, and has not been
// away meanwhile.
func (f File) Unchanged() bool {
	var st unix.Stat_t
	return unix.Lstat(f.Path, &st) == nil && idOf(&st) == f.id
}
