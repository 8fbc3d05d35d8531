// Package statedir looks into, measures and replaces the folders in which
// swtpm keeps a vTPM. The folder belongs to the swtpm user, who is not
// trusted: nothing in it is followed, and sizes are bounded.
package statedir

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/statefile"
)

// Seen is a state folder as found.
type Seen struct {
	Dir     string
	Name    string // of the state file: tpm2-00.permall, or tpm-00.permall for a TPM 1.2
	Data    []byte // nil: there is no state file
	Kind    statefile.Kind
	Digest  list.Digest // see Digest; zero without a state file
	Strange []string    // files that a vTPM at rest does not have
	Torn    []string    // files that were being written when their writer was killed
}

// Exists reports whether there is a state file.
func (s *Seen) Exists() bool { return s.Data != nil }

// Digest is the canonical digest of a folder that holds just this state file:
// SHA-256 over name, 0, length (u64, big-endian) and content.
func Digest(name string, data []byte) list.Digest {
	h := sha256.New()
	h.Write(append([]byte(name), 0))
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(data))))
	h.Write(data)
	return list.Digest(h.Sum(nil))
}

// StateFile names the state file that libvirt's layout puts into dir.
func StateFile(dir string) string {
	if filepath.Base(dir) == "tpm1.2" {
		return "tpm-00.permall"
	}
	return "tpm2-00.permall"
}

const (
	lockName = ".lock"           // swtpm's
	tempName = ".virt-trust.new" // what Replace writes before it renames
)

// torn names what swtpm, or Replace, was writing when it was killed. It is not
// loaded, but may hold a vTPM in the clear.
func torn(name string) bool { return strings.HasPrefix(name, "TMP") || name == tempName }

func open(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	return os.NewFile(uintptr(fd), dir), nil
}

func openAt(dir *os.File, name string) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: filepath.Join(dir.Name(), name), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(dir.Name(), name)), nil
}

func read(f *os.File) ([]byte, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", f.Name())
	}
	b, err := io.ReadAll(io.LimitReader(f, statefile.MaxSize+1))
	if err != nil {
		return nil, err
	}
	if len(b) > statefile.MaxSize {
		return nil, fmt.Errorf("%s is larger than any vTPM state", f.Name())
	}
	if b == nil {
		b = []byte{}
	}
	return b, nil
}

// Look reads the folder. A folder that does not exist is one without state.
func Look(dir string) (*Seen, error) {
	s := &Seen{Dir: dir, Name: StateFile(dir)}
	d, err := open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(100)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	slices.Sort(names)
	for _, n := range names {
		switch {
		case n == s.Name || n == lockName:
		case torn(n):
			s.Torn = append(s.Torn, n)
		default:
			s.Strange = append(s.Strange, n)
		}
	}
	f, err := openAt(d, s.Name)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if errors.Is(err, unix.ELOOP) {
		s.Strange = append(s.Strange, s.Name+" (a link)")
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if s.Data, err = read(f); err != nil {
		return nil, err
	}
	s.Kind, s.Digest = statefile.Classify(s.Data), Digest(s.Name, s.Data)
	return s, nil
}

// Settle makes the state that was just written durable, as swtpm does not:
// file and folder are synced. It gives what lies there now.
func Settle(dir string) (*Seen, error) {
	s := &Seen{Dir: dir, Name: StateFile(dir)}
	d, err := open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	f, err := openAt(d, s.Name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if s.Data, err = read(f); err != nil {
		return nil, err
	}
	s.Kind, s.Digest = statefile.Classify(s.Data), Digest(s.Name, s.Data)
	return s, errors.Join(f.Sync(), d.Sync())
}

// Replace puts data in the place of the state file, whole or not at all, with
// the owner and mode of the old one or else of the folder. What it replaced is
// overwritten with zeros when shred is set: it was plain.
func Replace(dir string, data []byte, shred bool) error {
	d, err := open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	name := StateFile(dir)
	st, err := d.Stat()
	if err != nil {
		return err
	}
	mode := uint32(0o600)
	var old *os.File
	if fd, err := unix.Openat(int(d.Fd()), name, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
		old = os.NewFile(uintptr(fd), name)
		defer old.Close()
		if st, err = old.Stat(); err != nil {
			return err
		}
		mode = uint32(st.Mode().Perm())
	}
	owner := st.Sys().(*unixStat)

	if err := unix.Unlinkat(int(d.Fd()), tempName, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	fd, err := unix.Openat(int(d.Fd()), tempName, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	if err != nil {
		return &fs.PathError{Op: "create", Path: filepath.Join(dir, tempName), Err: err}
	}
	f := os.NewFile(uintptr(fd), tempName)
	_, err = f.Write(data)
	err = errors.Join(err, unix.Fchmod(fd, mode), unix.Fchown(fd, int(owner.Uid), int(owner.Gid)), f.Sync(), f.Close())
	if err == nil {
		err = unix.Renameat(int(d.Fd()), tempName, int(d.Fd()), name)
	}
	if err != nil {
		unix.Unlinkat(int(d.Fd()), tempName, 0)
		return fmt.Errorf("replacing %s: %w", filepath.Join(dir, name), err)
	}
	if err := d.Sync(); err != nil {
		return err
	}
	if shred && old != nil {
		if err := overwrite(old); err != nil {
			return fmt.Errorf("overwriting the plain state: %w", err)
		}
	}
	return nil
}

// Make makes a state folder that is missing, as libvirt does (qemu_tpm.c): the
// folder itself is the swtpm user's alone, the one above it is for all to pass
// through. Folders above these two must exist. One that is there stays as it is.
func Make(dir string, uid, gid int) error {
	above, name := filepath.Split(filepath.Clean(dir))
	above = filepath.Clean(above)
	follow := 0
	err := unix.Mkdir(above, 0o711)
	if err == nil {
		follow = unix.O_NOFOLLOW
	} else if !errors.Is(err, fs.ErrExist) {
		return &fs.PathError{Op: "mkdir", Path: above, Err: err}
	}
	fd, err := unix.Open(above, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|follow, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: above, Err: err}
	}
	a := os.NewFile(uintptr(fd), above)
	defer a.Close()
	if follow != 0 { // ours, and made under a umask
		if err := unix.Fchmod(fd, 0o711); err != nil {
			return &fs.PathError{Op: "chmod", Path: above, Err: err}
		}
	}
	err = unix.Mkdirat(fd, name, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "mkdir", Path: dir, Err: err}
	}
	d, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(d)
	if err := errors.Join(unix.Fchown(d, uid, gid), unix.Fchmod(d, 0o700)); err != nil {
		return &fs.PathError{Op: "chown", Path: dir, Err: err}
	}
	return a.Sync()
}

// Discard deletes the torn files of a folder that no swtpm uses, and overwrites
// them before.
func Discard(s *Seen) error {
	if len(s.Torn) == 0 {
		return nil
	}
	d, err := open(s.Dir)
	if err != nil {
		return err
	}
	defer d.Close()
	var errs []error
	for _, n := range s.Torn {
		fd, err := unix.Openat(int(d.Fd()), n, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err := unix.Unlinkat(int(d.Fd()), n, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, &fs.PathError{Op: "unlink", Path: filepath.Join(s.Dir, n), Err: err})
		}
		if err != nil {
			continue // not a file
		}
		f := os.NewFile(uintptr(fd), n)
		errs = append(errs, overwrite(f), f.Close())
	}
	return errors.Join(append(errs, d.Sync())...)
}

// Remove deletes the state file, for a vTPM that starts anew.
func Remove(dir string) error {
	d, err := open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Unlinkat(int(d.Fd()), StateFile(dir), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return d.Sync()
}

// overwrite is what a file system allows: blocks that it has copied elsewhere
// keep the old content, which virt-trust(1) says under "adopt".
func overwrite(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() || st.Size() > statefile.MaxSize || st.Sys().(*unixStat).Nlink > 0 {
		return nil // no vTPM state; or someone keeps a hard link: it is theirs
	}
	if _, err := f.WriteAt(make([]byte, st.Size()), 0); err != nil {
		return err
	}
	return f.Sync()
}

// InUse reports whether a swtpm holds the folder's lock.
func InUse(dir string) (bool, error) {
	pid, err := Holder(dir)
	return pid != 0, err
}

// Holder gives the process that holds the folder's lock, 0 for none, and -1 for
// one of another pid namespace.
func Holder(dir string) (pid int, err error) {
	d, err := open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer d.Close()
	fd, err := unix.Openat(int(d.Fd()), lockName, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_GETLK, &l); err != nil {
		return 0, err
	}
	if l.Type == unix.F_UNLCK {
		return 0, nil
	}
	if l.Pid <= 0 {
		return -1, nil
	}
	return int(l.Pid), nil
}
