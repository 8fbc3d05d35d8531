package hosttpm

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

	"golang.org/x/sys/unix"

	"virt-trust/internal/platform/secret"
)

const (
	headerSize   = 10      // tag, size, response code (Part 1, 18)
	maxResponse  = 4 << 10 // of every TPM, and of the kernel's driver
	tagPlain     = 0x8001  // TPM_ST_NO_SESSIONS
	tagSessions  = 0x8002  // TPM_ST_SESSIONS
	rmPrefix     = "tpmrm" // the kernel's resource manager: /dev/tpmrm0
	maxAbandoned = 4
)

// link is one connection to a TPM: a device node, or swtpm's data socket, which
// carries bare TPM commands and responses too.
type link struct {
	conn    io.ReadWriteCloser
	managed bool // a resource manager stands between: what we leave behind is flushed by it
}

// dial connects to path. A TPM that is not there is ErrAbsent.
func dial(ctx context.Context, path string) (*link, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, dialError(err)
	}
	if fi.Mode()&fs.ModeSocket != 0 {
		c, err := dialSocket(ctx, path)
		if err != nil {
			return nil, err
		}
		return &link{conn: c}, nil
	}
	// Not by os.Open: it would put the device into Go's poller, and the driver
	// holds a lock, which poll(2) wants too, for as long as the TPM works on a
	// command: every goroutine of the process would wait for it.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, dialError(&fs.PathError{Op: "open", Path: path, Err: err})
	}
	return &link{conn: os.NewFile(uintptr(fd), path), managed: strings.HasPrefix(filepath.Base(path), rmPrefix)}, nil
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
			if err := wait(ctx, 2*time.Millisecond); err != nil {
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

// exchange sends one command and gives its response. A command that is not
// answered when ctx is done is abandoned: that closes the link, and abandoned
// is how many such still wait for the TPM. After an error the link is unusable.
func (l *link) exchange(ctx context.Context, command []byte, abandoned *atomic.Int32) ([]byte, error) {
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

func (l *link) roundTrip(command []byte) ([]byte, error) {
	if _, err := l.conn.Write(command); err != nil {
		return nil, fmt.Errorf("%w: %w", errLink, err)
	}
	// One read takes all that a device has to give; a socket may need more.
	buf := make([]byte, maxResponse)
	n, err := io.ReadAtLeast(l.conn, buf, headerSize)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errLink, err)
	}
	size := int64(binary.BigEndian.Uint32(buf[2:]))
	if tag := binary.BigEndian.Uint16(buf); tag != tagPlain && tag != tagSessions || size < headerSize || size > maxResponse || size < int64(n) {
		return nil, fmt.Errorf("%w: response with tag %#x and size %d", errLink, tag, size)
	}
	if n < int(size) {
		if _, err := io.ReadFull(l.conn, buf[n:size]); err != nil {
			return nil, fmt.Errorf("%w: %w", errLink, err)
		}
	}
	return buf[:size], nil
}
