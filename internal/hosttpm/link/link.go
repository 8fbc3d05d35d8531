// Package link is a connection to a TPM 2.0: a device node of the kernel, or
// swtpm's data socket, which carries bare commands and responses too. It is
// the one way to a TPM.
package link

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"virt-trust/internal/platform/secret"
)

// What can be wrong with a connection. Every error of this package is one of
// these for errors.Is.
var (
	ErrBusy   = errors.New("the TPM did not get to this in time")
	ErrAbsent = errors.New("there is no TPM")
	ErrFailed = errors.New("the TPM cannot be used")
	// ErrBroken: nothing is known about the command under way.
	ErrBroken = errors.New("connection to the TPM broke")
)

// The frame of commands and responses (TPM 2.0 Part 1, 18).
const (
	HeaderSize  = 10      // tag, size, response code
	MaxResponse = 4 << 10 // of every TPM, and of the kernel's driver
	TagPlain    = 0x8001  // TPM_ST_NO_SESSIONS
	TagSessions = 0x8002  // TPM_ST_SESSIONS
)

const rmPrefix = "tpmrm" // the kernel's resource manager: /dev/tpmrm0

// Managed reports whether path is a device of the kernel's resource manager.
func Managed(path string) bool { return strings.HasPrefix(filepath.Base(path), rmPrefix) }

// Link is one connection to a TPM. It carries one command at a time.
type Link struct {
	Managed bool // a resource manager stands between: what we leave behind is flushed by it

	conn io.ReadWriteCloser
}

// Dial connects to path, and waits for it until ctx is done. Errors: ErrAbsent,
// ErrBusy, ErrFailed.
func Dial(ctx context.Context, path string) (*Link, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, dialError(err)
	}
	if fi.Mode()&fs.ModeSocket != 0 {
		c, err := dialSocket(ctx, path)
		if err != nil {
			return nil, err
		}
		return &Link{conn: c}, nil
	}
	// Not by os.Open: it would put the device into Go's poller, and the driver
	// holds a lock, which poll(2) wants too, for as long as the TPM works on a
	// command: every goroutine of the process would wait for it.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, dialError(&fs.PathError{Op: "open", Path: path, Err: err})
	}
	return &Link{conn: os.NewFile(uintptr(fd), path), Managed: Managed(path)}, nil
}

// dialSocket waits for its turn where swtpm, whose queue is short, has too many
// at its door.
func dialSocket(ctx context.Context, path string) (net.Conn, error) {
	for {
		c, err := new(net.Dialer).DialContext(ctx, "unix", path)
		var timeout net.Error
		switch {
		case err == nil:
			return c, nil
		case errors.Is(err, syscall.EAGAIN):
			if err := Wait(ctx, 2*time.Millisecond); err != nil {
				return nil, err
			}
		case errors.As(err, &timeout) && timeout.Timeout():
			return nil, fmt.Errorf("%w: %w", ErrBusy, err)
		default:
			return nil, dialError(err)
		}
	}
}

func dialError(err error) error {
	for _, e := range []error{fs.ErrNotExist, syscall.ECONNREFUSED, syscall.ENODEV, syscall.ENXIO} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", ErrAbsent, err)
		}
	}
	return fmt.Errorf("%w: %w", ErrFailed, err)
}

// Close gives the connection up, whatever is under way.
func (l *Link) Close() error { return l.conn.Close() }

// Exchange sends one command and gives its response. A command that is not
// answered when ctx is done is abandoned: that closes the link, and abandoned
// is how many such still wait for the TPM. After an error, ErrBusy or ErrBroken,
// the link is unusable.
func (l *Link) Exchange(ctx context.Context, command []byte, abandoned *atomic.Int32) ([]byte, error) {
	type answer struct {
		response []byte
		err      error
	}
	answers := make(chan answer, 1)
	go func() {
		r, err := l.roundTrip(command)
		answers <- answer{r, err}
	}()
	select {
	case a := <-answers:
		return a.response, a.err
	case <-ctx.Done():
	}
	abandoned.Add(1)
	l.conn.Close() // ends a read on a socket; a device has to come back by itself
	go func() {
		secret.Wipe((<-answers).response)
		abandoned.Add(-1)
	}()
	return nil, fmt.Errorf("%w: %w", ErrBusy, ctx.Err())
}

// Send is Exchange for as long as it takes, and repeats for a while what the TPM
// puts off. It makes a Link a transport.TPM of go-tpm, whose own ways to a TPM do
// not bear a signal, as Go's runtime sends them, nor a socket with a queue. After
// ErrBroken the link is unusable; ErrBusy is of a command that was put off too long.
func (l *Link) Send(command []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), putOffLimit)
	defer cancel()
	return Repeat(ctx, func() ([]byte, error) { return l.roundTrip(command) })
}

const (
	maxPause    = 250 * time.Millisecond // between tries of a command that the TPM put off
	putOffLimit = 10 * time.Second
)

// Repeat has a command sent, by try, until the TPM does not put it off: ErrBusy
// where it still does when ctx is done.
func Repeat(ctx context.Context, try func() (response []byte, err error)) ([]byte, error) {
	for pause := time.Millisecond; ; pause = min(2*pause, maxPause) {
		r, err := try()
		if err != nil {
			return nil, err
		}
		rc := tpm2.TPMRC(binary.BigEndian.Uint32(r[6:]))
		if !putOff(rc) {
			return r, nil
		}
		if err := Wait(ctx, pause); err != nil {
			return nil, fmt.Errorf("%w (last response: %w)", err, rc)
		}
	}
}

// putOff tells a command that the TPM did not begin, or will finish when it is
// sent again unchanged (Part 1, 39.4), as at the first use of an algorithm: no
// nonce has moved on.
func putOff(rc tpm2.TPMRC) bool {
	return rc == tpm2.TPMRCRetry || rc == tpm2.TPMRCYielded || rc == tpm2.TPMRCCanceled || rc == tpm2.TPMRCTesting || rc == tpm2.TPMRCNVRate
}

// Wait waits for d, and gives ErrBusy when ctx is done by then.
func Wait(ctx context.Context, d time.Duration) error {
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", ErrBusy, ctx.Err())
	}
	return nil
}

func (l *Link) roundTrip(command []byte) ([]byte, error) {
	if _, err := l.conn.Write(command); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBroken, err)
	}
	// One read takes all that a device has to give; a socket may need more.
	buf := make([]byte, MaxResponse)
	n, err := io.ReadAtLeast(l.conn, buf, HeaderSize)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBroken, err)
	}
	size := int64(binary.BigEndian.Uint32(buf[2:]))
	if tag := binary.BigEndian.Uint16(buf); tag != TagPlain && tag != TagSessions || size < HeaderSize || size > MaxResponse || size < int64(n) {
		return nil, fmt.Errorf("%w: response with tag %#x and size %d", ErrBroken, tag, size)
	}
	if n < int(size) {
		if _, err := io.ReadFull(l.conn, buf[n:size]); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrBroken, err)
		}
	}
	return buf[:size], nil
}
