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
	"syscall"
	"time"
)

const (
	headerSize  = 10      // tag, size, response code (Part 1, 18)
	maxResponse = 4 << 10 // TPM2_MAX_COMMAND/RESPONSE_SIZE of every TPM and of the kernel's driver
	tagPlain    = 0x8001  // TPM_ST_NO_SESSIONS
	tagSessions = 0x8002  // TPM_ST_SESSIONS
	longAgo     = 1       // a deadline in the past, in Unix seconds
	rmPrefix    = "tpmrm" // the kernel's resource manager: /dev/tpmrm0
)

// link is one connection to a TPM: a device node, or swtpm's data socket, which
// carries bare TPM commands and responses too.
type link struct {
	conn interface {
		io.ReadWriteCloser
		SetDeadline(time.Time) error
	}
	managed bool // a resource manager stands between: what we leave behind is flushed by it
}

// dial connects to path. A TPM that is not there is ErrAbsent.
func dial(ctx context.Context, path string) (*link, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, dialError(err)
	}
	if fi.Mode()&fs.ModeSocket != 0 {
		c, err := new(net.Dialer).DialContext(ctx, "unix", path)
		if err != nil {
			return nil, dialError(err)
		}
		return &link{conn: c}, nil
	}
	// The driver can be polled, so that Go's deadlines work on it.
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, dialError(err)
	}
	return &link{conn: f, managed: strings.HasPrefix(filepath.Base(path), rmPrefix)}, nil
}

func dialError(err error) error {
	for _, e := range []error{fs.ErrNotExist, syscall.ECONNREFUSED, syscall.ENODEV, syscall.ENXIO} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", ErrAbsent, err)
		}
	}
	return fmt.Errorf("%w: %w", ErrFailed, err)
}

// exchange sends one command and reads its response, until ctx is done. After
// an error the link is unusable.
func (l *link) exchange(ctx context.Context, command []byte) ([]byte, error) {
	if err := l.conn.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("%w: %w", errLink, err)
	}
	stop := context.AfterFunc(ctx, func() { l.conn.SetDeadline(time.Unix(longAgo, 0)) })
	defer stop()
	if _, err := l.conn.Write(command); err != nil {
		return nil, linkError(ctx, err)
	}
	// One read takes all that a device has to give; a socket may need more.
	buf := make([]byte, maxResponse)
	n, err := io.ReadAtLeast(l.conn, buf, headerSize)
	if err != nil {
		return nil, linkError(ctx, err)
	}
	size := int64(binary.BigEndian.Uint32(buf[2:]))
	if tag := binary.BigEndian.Uint16(buf); tag != tagPlain && tag != tagSessions || size < headerSize || size > maxResponse || size < int64(n) {
		return nil, fmt.Errorf("%w: %w: response with tag %#x and size %d", errLink, ErrFailed, tag, size)
	}
	if n < int(size) {
		if _, err := io.ReadFull(l.conn, buf[n:size]); err != nil {
			return nil, linkError(ctx, err)
		}
	}
	return buf[:size], nil
}

func linkError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", ErrBusy, ctx.Err())
	}
	return fmt.Errorf("%w: %w", errLink, err)
}

// close gives the connection up. A driver waits in close for a TPM that is
// still at work, so that it is not waited for.
func (l *link) close() {
	if _, ok := l.conn.(*os.File); ok {
		go l.conn.Close()
		return
	}
	l.conn.Close()
}
