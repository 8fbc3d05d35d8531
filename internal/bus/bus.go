// Package bus names what virt-trust says on D-Bus (org.virttrust1(5)) and holds
// the client side that the hook, the wrapper and the virt-trust command share.
package bus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/vtpm/reason"
)

// The contract's names.
const (
	Name         = "org.virttrust1"
	Path         = dbus.ObjectPath("/org/virttrust1")
	HostPath     = dbus.ObjectPath("/org/virttrust1/host")
	VMPathPrefix = "/org/virttrust1/vm/"

	ManagerInterface     = "org.virttrust1.Manager"
	HostInterface        = "org.virttrust1.Host"
	AttestationInterface = "org.virttrust1.Attestation"
	VMInterface          = "org.virttrust1.VM"

	// ErrorRefused carries a refusal: "REASON-CODE: what; how to mend".
	ErrorRefused = "org.virttrust1.Error.Refused"
	// ErrorNotFound says that no VM has this name or UUID.
	ErrorNotFound = "org.virttrust1.Error.NotFound"
	// ErrorFailed carries every "could not tell".
	ErrorFailed = "org.virttrust1.Error.Failed"
	// ErrorAccessDenied is D-Bus's own.
	ErrorAccessDenied = "org.freedesktop.DBus.Error.AccessDenied"
)

// VMPath gives the object path of a VM from its UUID in the usual spelling.
func VMPath(uuid string) dbus.ObjectPath {
	return dbus.ObjectPath(VMPathPrefix + strings.ReplaceAll(uuid, "-", "_"))
}

// ErrNotFound and ErrAccessDenied stand for the errors of the same names.
var (
	ErrNotFound     = errors.New("no such VM")
	ErrAccessDenied = errors.New("access denied")
)

// Client calls virt-trustd.
type Client struct{ conn *dbus.Conn }

// Dial connects to the system bus. It does not start virt-trustd; the first
// call does. The connection takes no descriptors: godbus 5.2.4 panics at an
// array of them, which anybody can send in a signal, and a hook that dies at
// `reconnect` has its VM killed by libvirt.
func Dial(ctx context.Context) (*Client, error) {
	network, address := systemBus()
	if network == "" {
		return dial(dbus.ConnectSystemBus(dbus.WithContext(ctx)))
	}
	socket, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err != nil {
		return dial(nil, err)
	}
	// Behind this interface godbus does not see a unix socket.
	conn, err := dbus.NewConn(struct{ io.ReadWriteCloser }{socket}, dbus.WithContext(ctx))
	if err != nil {
		socket.Close()
		return dial(nil, err)
	}
	if err = conn.Auth(nil); err == nil {
		err = conn.Hello()
	}
	if err != nil {
		conn.Close()
	}
	return dial(conn, err)
}

// DialForDescriptors is Dial for those that a call gives descriptors.
func DialForDescriptors(ctx context.Context) (*Client, error) {
	return dial(dbus.ConnectSystemBus(dbus.WithContext(ctx)))
}

func dial(conn *dbus.Conn, err error) (*Client, error) {
	if err != nil {
		return nil, fmt.Errorf("connecting to the system bus: %w", err)
	}
	return &Client{conn}, nil
}

// systemBus gives the system bus's socket, "" for an address of another kind.
func systemBus() (network, path string) {
	a := os.Getenv("DBUS_SYSTEM_BUS_ADDRESS")
	if a == "" {
		return "unix", "/run/dbus/system_bus_socket"
	}
	path, ok := strings.CutPrefix(a, "unix:path=")
	if !ok || strings.ContainsAny(path, ",;%") {
		return "", ""
	}
	return "unix", path
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Conn is the connection itself, for signals and properties.
func (c *Client) Conn() *dbus.Conn { return c.conn }

// Call calls a method of the Manager and stores its results in out. Errors:
// *reason.Refusal for a refusal, also for helper-unreachable when virt-trustd
// cannot be reached or started; ErrNotFound; ErrAccessDenied; others as they are.
func (c *Client) Call(ctx context.Context, method string, args []any, out ...any) error {
	return c.call(ctx, Path, ManagerInterface+"."+method, args, out)
}

func (c *Client) call(ctx context.Context, path dbus.ObjectPath, method string, args, out []any) error {
	call := c.conn.Object(Name, path).CallWithContext(ctx, method, 0, args...)
	if call.Err != nil {
		if ctx.Err() != nil { // which also closes a connection that was dialled with it
			return Unreachable("it did not answer in time")
		}
		return MapError(call.Err)
	}
	if len(out) == 0 {
		return nil
	}
	return call.Store(out...)
}

// MapError turns a D-Bus error into this project's errors.
func MapError(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return Unreachable("it did not answer in time")
	}
	var e dbus.Error
	if !errors.As(err, &e) {
		var pe *dbus.Error
		if !errors.As(err, &pe) {
			if errors.Is(err, dbus.ErrClosed) || errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) {
				return Unreachable("the connection was closed")
			}
			return err
		}
		e = *pe
	}
	text := e.Name
	if len(e.Body) > 0 {
		if s, ok := e.Body[0].(string); ok {
			text = reason.OneLine(s)
		}
	}
	switch {
	case e.Name == ErrorRefused:
		if r, ok := reason.Parse(text); ok {
			return r
		}
	case e.Name == ErrorNotFound:
		return fmt.Errorf("%w: %s", ErrNotFound, text)
	case e.Name == ErrorAccessDenied:
		return fmt.Errorf("%w: %s", ErrAccessDenied, text)
	case e.Name == "org.freedesktop.DBus.Error.ServiceUnknown",
		e.Name == "org.freedesktop.DBus.Error.NameHasNoOwner",
		e.Name == "org.freedesktop.DBus.Error.NoReply",
		e.Name == "org.freedesktop.DBus.Error.Timeout",
		e.Name == "org.freedesktop.DBus.Error.TimedOut",
		e.Name == "org.freedesktop.DBus.Error.Disconnected",
		strings.HasPrefix(e.Name, "org.freedesktop.DBus.Error.Spawn"),
		strings.HasPrefix(e.Name, "org.freedesktop.systemd1."):
		return Unreachable(text)
	}
	return errors.New(text)
}

// Unreachable is the refusal for a virt-trustd that does not answer.
func Unreachable(why string) *reason.Refusal {
	return reason.Refuse(reason.HelperUnreachable, "see 'systemctl status virt-trustd' and start it",
		"virt-trustd cannot be reached: %s", why)
}
