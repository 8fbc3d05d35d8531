package inject

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"virt-trust/internal/platform/poll"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"virt-trust/internal/introspect"
)

// channel is the data channel between a QEMU and its swtpm: a pair of unix
// sockets that QEMU makes, of which it hands one over. Both ends are duplicates:
// they are closed as soon as the exchange is over, or swtpm would not see QEMU
// end. Their flags are QEMU's and swtpm's too and are not touched.
type channel struct {
	qemu, swtpm int // process ids
	near, far   int // descriptors of QEMU's end, and of swtpm's
	pidfd       int // of QEMU

	end   time.Time    // when QEMU is let go, whatever is under way
	letGo func() error // does it
}

// find finds the channel of a swtpm. QEMU is told by the credentials that its
// sockets carry: the maker of a pair is in both.
func find(swtpm int) (c *channel, err error) {
	c = &channel{swtpm: swtpm, near: -1, far: -1, pidfd: -1}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	p, err := unix.PidfdOpen(swtpm, 0)
	if err != nil {
		return c, pidError(err)
	}
	defer unix.Close(p)
	if c.far, c.qemu, err = pair(p, swtpm, func(maker int) bool { return maker != swtpm }); err != nil {
		return c, fmt.Errorf("swtpm: %w", err)
	}
	if c.pidfd, err = unix.PidfdOpen(c.qemu, 0); err != nil {
		return c, pidError(err)
	}
	if c.near, _, err = pair(c.pidfd, c.qemu, func(maker int) bool { return maker == c.qemu }); err != nil {
		return c, fmt.Errorf("QEMU: %w", err)
	}
	// Had QEMU ended, and another process got its number before that was opened,
	// swtpm's end would have nobody at the other.
	return c, c.connected()
}

func pidError(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("%w: %w", introspect.ErrGone, err)
	}
	return err
}

func (c *channel) close() {
	for _, fd := range []*int{&c.near, &c.far, &c.pidfd} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}

func (c *channel) connected() error {
	if n, err := poll.Now(unix.PollFd{Fd: int32(c.far)}, unix.PollFd{Fd: int32(c.near)}); err != nil || n != 0 {
		return fmt.Errorf("%w: the channel is closed (%v)", introspect.ErrGone, err)
	}
	return nil
}

// pair gives the one unix stream socket of a process that is an end of a pair
// by the right maker: without a name, and its peer without one.
// Where there is none, the process may be about to end: its descriptors go before
// it is seen to have ended.
func pair(pidfd, pid int, right func(maker int) bool) (fd, maker int, err error) {
	for deadline := time.Now().Add(endLimit); ; sleep(pause) {
		if fd, maker, err = onePair(pidfd, pid, right); !errors.Is(err, errNone) {
			return fd, maker, err
		}
		if n, err := poll.Now(unix.PollFd{Fd: int32(pidfd), Events: unix.POLLIN}); err != nil {
			return -1, 0, err
		} else if n != 0 {
			return -1, 0, fmt.Errorf("%w: process %d", introspect.ErrGone, pid)
		}
		if time.Now().After(deadline) {
			return fd, maker, err
		}
	}
}

var errNone = fmt.Errorf("%w: there is no pair of sockets", ErrChannel)

func onePair(pidfd, pid int, right func(maker int) bool) (fd, maker int, err error) {
	fd = -1
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fd, 0, fmt.Errorf("%w: %w", introspect.ErrGone, err)
	}
	n := 0
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		theirs, err2 := strconv.Atoi(e.Name())
		if err != nil || err2 != nil || !strings.HasPrefix(link, "socket:") {
			continue
		}
		dup, err := unix.PidfdGetfd(pidfd, theirs, 0)
		switch {
		case errors.Is(err, unix.EBADF): // closed meanwhile
			continue
		case errors.Is(err, unix.EPERM):
			return fd, 0, fmt.Errorf("%w: pidfd_getfd: %w", introspect.ErrForbidden, err)
		case err != nil:
			return fd, 0, pidError(err)
		}
		m, ok := nameless(dup)
		if !ok || !right(m) {
			unix.Close(dup)
			continue
		}
		if n++; n > 1 {
			unix.Close(dup)
			continue
		}
		fd, maker = dup, m
	}
	if n == 0 {
		return -1, 0, fmt.Errorf("%w in process %d", errNone, pid)
	}
	if n != 1 {
		if fd >= 0 {
			unix.Close(fd)
		}
		return -1, 0, fmt.Errorf("%w: process %d has %d pairs of sockets, not one", ErrChannel, pid, n)
	}
	return fd, maker, nil
}

// nameless reports whether a socket is an end of a connected pair, and who made
// it.
func nameless(fd int) (maker int, ok bool) {
	typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || typ != unix.SOCK_STREAM {
		return 0, false
	}
	for _, name := range []func(int) (unix.Sockaddr, error){unix.Getsockname, unix.Getpeername} {
		a, err := name(fd)
		u, is := a.(*unix.SockaddrUnix)
		if err != nil || !is || u.Name != "" && u.Name != "@" { // as x/sys has no name
			return 0, false
		}
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || cred.Pid <= 0 {
		return 0, false
	}
	return int(cred.Pid), true
}

// idle reports whether nothing is under way: no command that swtpm has not read,
// no answer that QEMU has not, and swtpm waits for work. QEMU must be held.
func (c *channel) idle() (bool, error) {
	for _, fd := range []int{c.far, c.near} {
		n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
		if err != nil || n != 0 {
			return false, err
		}
	}
	for _, look := range []func() (bool, error){c.sleeps, c.waits} {
		if ok, err := look(); !ok || err != nil {
			return false, err
		}
	}
	// What it was doing when the queues were looked at, it may have done since.
	for _, fd := range []int{c.far, c.near} {
		n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
		if err != nil || n != 0 {
			return false, err
		}
	}
	return true, nil
}

// sleeps reports whether swtpm sleeps, and was not stopped.
func (c *channel) sleeps() (bool, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.swtpm))
	if err != nil {
		return false, fmt.Errorf("%w: %w", introspect.ErrGone, err)
	}
	// The second field is the program's name in parentheses, and may hold some.
	return bytes.HasPrefix(b[bytes.LastIndexByte(b, ')')+1:], []byte(" S ")), nil
}

// waits reports whether swtpm is in the call in which it waits for work.
func (c *channel) waits() (bool, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", c.swtpm))
	if err != nil {
		return false, fmt.Errorf("%w: %w", introspect.ErrGone, err)
	}
	number, _, _ := strings.Cut(string(b), " ")
	n, err := strconv.Atoi(number)
	return err == nil && slices.Contains(polls[runtime.GOARCH], n), nil // else "running", or another call
}

// polls are the numbers of poll(2) and ppoll(2), in which swtpm waits.
var polls = map[string][]int{"amd64": {7, 271}, "arm64": {73}, "riscv64": {73}, "ppc64le": {167, 281}, "s390x": {168, 302}}

// maxCommand is what swtpm takes, and gives.
const maxCommand = 4096

// errLate: swtpm was slower than a VM may be held.
var errLate = fmt.Errorf("%w: swtpm does not answer within %v", introspect.ErrBusy, holdLimit)

// begins reports whether there is time for a command. What was put aside of the
// guest's goes back up to the end.
func (c *channel) begins(command []byte) bool {
	end := c.end
	if len(command) < 10 || tpm2.TPMCC(binary.BigEndian.Uint32(command[6:])) != tpm2.TPMCCContextLoad {
		end = end.Add(-backLimit)
	}
	return time.Now().Before(end)
}

// Send has swtpm do a command and gives its answer (transport.TPM). Nothing is
// sent unless all of it can be. Once it is, the answer must be awaited, or QEMU
// would take it for that of its next command: where it is late, QEMU goes on
// meanwhile, and only a guest that uses its vTPM in just that time may get it.
func (c *channel) Send(command []byte) ([]byte, error) {
	if len(command) > maxCommand {
		return nil, fmt.Errorf("a command of %d bytes", len(command))
	}
	if !c.begins(command) {
		return nil, errLate
	}
	n, err := unix.SendmsgN(c.near, command, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", introspect.ErrGone, err)
	}
	if n != len(command) {
		return nil, fmt.Errorf("%w: swtpm took %d bytes of %d", ErrLost, n, len(command))
	}
	deadline, late := c.end, false
	answer := make([]byte, 0, maxCommand)
	const header = 10
	for want := header; len(answer) < want; {
		ms := time.Until(deadline).Milliseconds()
		p := []unix.PollFd{{Fd: int32(c.near), Events: unix.POLLIN}}
		got, err := unix.Poll(p, int(max(ms, 0)))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil && got == 0 && !late:
			late, deadline = true, time.Now().Add(answerLimit)
			_ = c.letGo() // what it could not do is tried again at the end
			continue
		case err != nil || got == 0:
			return nil, fmt.Errorf("%w: no answer within %v (%v)", ErrLost, answerLimit, err)
		}
		n, _, err := unix.Recvfrom(c.near, answer[len(answer):want], unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			return nil, fmt.Errorf("%w: %w", introspect.ErrGone, err)
		case n == 0:
			return nil, fmt.Errorf("%w: it closed the channel", introspect.ErrGone)
		}
		answer = answer[:len(answer)+n]
		if len(answer) == header {
			size := binary.BigEndian.Uint32(answer[2:])
			if size < header || size > maxCommand {
				return nil, fmt.Errorf("%w: an answer of %d bytes", ErrLost, size)
			}
			want = int(size)
		}
	}
	if late {
		return nil, errLate
	}
	return answer, nil
}
