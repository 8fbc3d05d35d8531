package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"virt-trust/internal/bus"
	"virt-trust/internal/platform/secret"
	"virt-trust/internal/vtpm/reason"
)

// conversation is a socket between a caller and what a method does for it, for
// secrets, which have no place in a message that the bus daemon copies, and for
// work that takes long. The caller gets its end as the method's result; nobody
// sends virt-trustd descriptors. See bus.Converse for what is said.
type conversation struct{ conn *net.UnixConn }

// inputLimit is how long what a caller has to say may take.
const inputLimit = 30 * time.Second

// newConversation gives both ends.
func newConversation() (ours *conversation, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a socket: %w", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "conversation")
	f := os.NewFile(uintptr(fds[0]), "conversation")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return &conversation{c.(*net.UnixConn)}, theirs, nil
}

// input reads all that the caller says, up to max bytes.
func (c *conversation) input(max int) (*secret.Buffer, error) {
	if err := c.conn.SetReadDeadline(time.Now().Add(inputLimit)); err != nil {
		return nil, err
	}
	b, err := secret.New(max)
	if err != nil {
		return nil, err
	}
	n := 0
	for n < max && err == nil {
		var m int
		m, err = c.conn.Read(b.Bytes()[n:])
		n += m
	}
	if !errors.Is(err, io.EOF) || n == 0 {
		b.Wipe()
		if err == nil {
			err = fmt.Errorf("more than %d bytes", max)
		}
		return nil, fmt.Errorf("reading what the caller has to say: %w", err)
	}
	whole, err := secret.New(n)
	if err == nil {
		copy(whole.Bytes(), b.Bytes())
	}
	return whole, errors.Join(err, b.Wipe())
}

// gone waits until the caller has closed its end, or ctx ends.
func (c *conversation) gone(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { c.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	c.conn.SetReadDeadline(time.Time{})
	io.Copy(io.Discard, c.conn)
}

// tell sends one line. A caller that does not read it, or has gone, does not
// stop what is done for it.
func (c *conversation) tell(l bus.Line) {
	b, err := json.Marshal(l)
	if err != nil {
		return
	}
	c.conn.SetWriteDeadline(time.Now().Add(inputLimit))
	c.conn.Write(append(b, '\n'))
}

func (c *conversation) say(text string) { c.tell(bus.Line{Say: reason.OneLine(text)}) }

// converse makes a method that answers with a socket on which its body goes on.
// One is under way at a time.
func (s *Service) converse(sender dbus.Sender, method string, body func(context.Context, *conversation) (map[string]string, error)) (dbus.UnixFD, *dbus.Error) {
	var fd dbus.UnixFD
	derr := s.serve(sender, method, polkitAction, adminDeadline, func(_ context.Context, c *caller) error {
		if !s.conversing.TryLock() {
			return reason.Refuse(reason.PolicyForbids, "wait for its end", "another recovery, backup or restore is under way")
		}
		ours, theirs, err := newConversation()
		if err != nil {
			s.conversing.Unlock()
			return err
		}
		// The library sends after this returns and does not say when it has.
		time.AfterFunc(redeemDeadline, func() { theirs.Close() })
		fd = dbus.UnixFD(theirs.Fd())
		go s.goOn(method, ours, body)
		return nil
	})
	if derr != nil {
		// A result is sent beside no error; a descriptor must be one all the same.
		return -1, derr
	}
	return fd, nil
}

func (s *Service) goOn(method string, c *conversation, body func(context.Context, *conversation) (map[string]string, error)) {
	defer c.conn.Close()
	last := s.lastLine(method, c, body)
	s.conversing.Unlock() // who has heard the end can begin anew
	c.tell(last)
}

func (s *Service) lastLine(method string, c *conversation, body func(context.Context, *conversation) (map[string]string, error)) (last bus.Line) {
	defer func() {
		if p := recover(); p != nil {
			s.log.WithField("method", method).WithField("stack", string(debug.Stack())).Errorf("panic: %v", p)
			last = bus.Line{Failed: "virt-trustd has a bug here: see its journal"}
		}
	}()
	done, err := body(s.working, c)
	switch r := reason.As(err); {
	case r != nil:
		s.deny(done["uuid"], done["name"], strings.ToLower(method), err)
		return bus.Line{Refused: r.Error()}
	case err != nil:
		s.log.WithField("method", method).WithError(err).Error("could not tell")
		return bus.Line{Failed: reason.OneLine(err.Error())}
	}
	return bus.Line{Done: done}
}
