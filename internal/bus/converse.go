package bus

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"virt-trust/internal/vtpm/reason"
)

// Line is what virt-trustd says in a conversation, one JSON object a line. Done,
// Refused or Failed is the last. The caller, for its part, sends bytes as they
// are, a recovery key or a backup, and shuts its side down.
type Line struct {
	Say     string            `json:"say,omitempty"`     // progress, for people
	Data    []byte            `json:"data,omitempty"`    // the next piece of what was asked for
	Hold    bool              `json:"hold,omitempty"`    // the VM is paused until the caller shuts its side down
	Done    map[string]string `json:"done,omitempty"`    // as a method's a{sv} of strings
	Refused string            `json:"refused,omitempty"` // as ErrorRefused
	Failed  string            `json:"failed,omitempty"`  // as ErrorFailed
}

// maxLine bounds a line: data comes in pieces.
const maxLine = 1 << 20

// Converse calls a method that answers with a socket, sends input on it unless
// it is nil, and gives each line but the last to hear. The input's side is shut
// down after it; without input, when hear has answered a Hold. Errors: as Call's.
func (c *Client) Converse(ctx context.Context, method string, args []any, input []byte, hear func(Line) error) (map[string]string, error) {
	var fd dbus.UnixFD
	call := c.conn.Object(Name, Path).CallWithContext(ctx, ManagerInterface+"."+method, dbus.FlagAllowInteractiveAuthorization, args...)
	if call.Err != nil {
		return nil, MapError(call.Err)
	}
	if err := call.Store(&fd); err != nil {
		return nil, err
	}
	unix.CloseOnExec(int(fd))
	f := os.NewFile(uintptr(fd), "conversation")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return nil, fmt.Errorf("%s: no socket came back: %w", method, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("%s: no socket came back", method)
	}
	if input != nil {
		socket.Write(input) // where that fails, the answer says why
		socket.CloseWrite()
	}
	s := bufio.NewScanner(socket)
	s.Buffer(nil, maxLine)
	for s.Scan() {
		var l Line
		if err := json.Unmarshal(s.Bytes(), &l); err != nil {
			return nil, fmt.Errorf("%s: virt-trustd speaks another language: %w", method, err)
		}
		switch {
		case l.Refused != "":
			if r, ok := reason.Parse(reason.OneLine(l.Refused)); ok {
				return nil, r
			}
			return nil, errors.New(reason.OneLine(l.Refused))
		case l.Failed != "":
			return nil, errors.New(reason.OneLine(l.Failed))
		case l.Done != nil:
			return l.Done, nil
		}
		if err := hear(l); err != nil {
			return nil, err
		}
		if l.Hold {
			socket.CloseWrite()
		}
	}
	if ctx.Err() != nil {
		return nil, Unreachable("it did not answer in time")
	}
	if err := s.Err(); err != nil && !errors.Is(err, io.EOF) {
		return nil, Unreachable(err.Error())
	}
	return nil, Unreachable("it ended before this was done")
}
