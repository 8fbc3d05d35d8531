// Package listen is what servers that face the network have in common.
package listen

import (
	"fmt"
	stdlog "log"
	"net"
	"sync"

	"github.com/sirupsen/logrus"
)

// limited bounds the connections that are open at once: more wait in the
// kernel's queue, until a timeout has ended idle ones.
type limited struct {
	net.Listener
	slots  chan struct{}
	closed chan struct{}
	once   sync.Once
}

// Limit gives a listener whose open connections each take one of the slots,
// which several listeners may share.
func Limit(l net.Listener, slots chan struct{}) net.Listener {
	return &limited{Listener: l, slots: slots, closed: make(chan struct{})}
}

func (l *limited) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &slot{Conn: c, free: sync.OnceFunc(func() { <-l.slots })}, nil
}

func (l *limited) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

type slot struct {
	net.Conn
	free func()
}

func (s *slot) Close() error {
	err := s.Conn.Close()
	s.free()
	return err
}

// Quiet gives an http.Server its ErrorLog: what that says of connections anybody
// can cause, so that it is for debugging alone.
func Quiet(log *logrus.Entry) *stdlog.Logger { return stdlog.New(connections{log}, "", 0) }

type connections struct{ log *logrus.Entry }

func (c connections) Write(b []byte) (int, error) {
	c.log.WithField("said", fmt.Sprintf("%q", b)).Debug("a connection failed")
	return len(b), nil
}
