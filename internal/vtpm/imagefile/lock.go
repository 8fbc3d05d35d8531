package imagefile

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// QEMU keeps its users of an image apart by locks on single bytes of the file
// (block/file-posix.c): who uses permission i holds a shared lock on byte 100+i,
// who does not let others use it holds one on byte 200+i, and each then looks
// whether anybody else holds a byte that rules out its own. The permissions are
// consistent read, write, write unchanged, resize and, before QEMU 7.0, graph
// modification.
const (
	usedBase     = 100
	unsharedBase = 200
	permissions  = 5
)

// lock locks an image as a QEMU does that uses every permission and shares
// none: it fails with ErrInUse when any other user has the image open, and while
// it is held no other can open it.
func lock(f *os.File) error {
	for _, base := range []int64{usedBase, unsharedBase} {
		l := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: base, Len: permissions}
		err := fcntl(f, unix.F_OFD_SETLK, &l)
		if err != nil {
			unlock(f)
		}
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return ErrInUse
		} else if err != nil {
			return fmt.Errorf("locking the image: %w", err)
		}
	}
	if err := alone(f); err != nil {
		unlock(f)
		return err
	}
	return nil
}

// alone looks whether anybody else holds one of the bytes.
func alone(f *os.File) error {
	for _, base := range []int64{usedBase, unsharedBase} {
		// Would an exclusive lock be granted? Our own locks do not count.
		l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: base, Len: permissions}
		if err := fcntl(f, unix.F_OFD_GETLK, &l); err != nil {
			return fmt.Errorf("looking for locks on the image: %w", err)
		}
		if l.Type != unix.F_UNLCK {
			return ErrInUse
		}
	}
	return nil
}

// unlock gives the locks back. Closing the file alone would not do so at once
// when this process is just forking: the child holds the file until it execs.
func unlock(f *os.File) {
	l := unix.Flock_t{Type: unix.F_UNLCK, Whence: io.SeekStart, Start: usedBase, Len: unsharedBase + permissions - usedBase}
	fcntl(f, unix.F_OFD_SETLK, &l)
}

func fcntl(f *os.File, cmd int, l *unix.Flock_t) error {
	for {
		if err := unix.FcntlFlock(f.Fd(), cmd, l); err != unix.EINTR {
			return err
		}
	}
}
