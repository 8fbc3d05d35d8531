// Package libvirt is the client of libvirt's QEMU driver: which domains there
// are, what becomes of them, and where a volume lies.
//
// While a hook runs, libvirt holds its domain's lock, and a look-up or a list
// that meets this lock waits for it: who answers a hook must not call a Client.
// ResolveVolume, which reads files, may always be called.
package libvirt

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"

	golibvirt "github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"

	"virt-trust/internal/domain"
)

// daemons are the daemons that drive QEMU, the modular one first, with the
// pid file that each keeps locked while it runs.
var daemons = []struct{ socket, pidFile string }{
	{"/run/libvirt/virtqemud-sock", "/run/virtqemud.pid"},
	{"/run/libvirt/libvirt-sock", "/run/libvirtd.pid"},
}

var (
	// ErrNoDomain says that no domain has this name or UUID.
	ErrNoDomain = errors.New("no such domain")
	// ErrClosed says that the connection is gone; Dial again.
	ErrClosed = errors.New("connection to libvirt is closed")
)

// Client is a connection to libvirt. go-libvirt cannot give up a call, so a
// context that ends during one closes the connection.
type Client struct {
	lv   *golibvirt.Libvirt
	conn net.Conn
}

// Socket finds the socket of the daemon in charge: the configured one, or the
// first that exists. running says whether the daemon runs already: connecting
// to the socket of one that does not makes systemd start it. A configured
// socket that is none of libvirt's own counts as running.
func Socket(configured string) (socket string, running bool, err error) {
	for _, d := range daemons {
		if configured != "" && configured != d.socket {
			continue
		}
		if _, err := os.Stat(d.socket); err == nil {
			return d.socket, locked(d.pidFile), nil
		}
	}
	if configured == "" {
		return "", false, fmt.Errorf("neither libvirtd nor virtqemud has a socket: %w", fs.ErrNotExist)
	}
	_, err = os.Stat(configured)
	return configured, err == nil, err
}

// locked reports whether a process holds the lock on a pid file. libvirt's
// (util/virpidfile.c) is a record lock on its first byte for as long as the
// daemon lives, so that a stale file or a reused number does not deceive.
func locked(pidFile string) bool {
	f, err := os.Open(pidFile)
	if err != nil {
		return false
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
	return unix.FcntlFlock(f.Fd(), unix.F_GETLK, &l) == nil && l.Type != unix.F_UNLCK
}

// Dial connects to the QEMU driver behind a socket ("" finds it), starting
// libvirt if it sleeps; see Socket. libvirtd does not end by its idle timeout
// (--timeout 120) while a client is connected: hold a Client only as long as
// it is needed.
func Dial(ctx context.Context, socket string) (*Client, error) {
	if socket == "" {
		var err error
		if socket, _, err = Socket(""); err != nil {
			return nil, err
		}
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("connecting to libvirt: %w", err)
	}
	c := &Client{lv: golibvirt.New(conn), conn: conn}
	if err := c.do(ctx, func() error { return c.lv.ConnectToURI(golibvirt.QEMUSystem) }); err != nil {
		conn.Close()
		return nil, fmt.Errorf("connecting to libvirt: %w", err)
	}
	return c, nil
}

// Close ends the connection; what runs on it fails with ErrClosed.
func (c *Client) Close() error {
	// Not go-libvirt's Disconnect: it asks the daemon first, without a deadline.
	return c.conn.Close()
}

// do runs a call, and closes the connection when ctx ends before it does.
func (c *Client) do(ctx context.Context, call func() error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	err := call()
	switch expired := !stop(); {
	case err == nil:
		return nil
	case expired:
		return fmt.Errorf("libvirt did not answer: %w", ctx.Err())
	case errors.Is(err, golibvirt.ErrInterrupted), errors.Is(err, unix.EINVAL), errors.Is(err, net.ErrClosed),
		errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
		return fmt.Errorf("%w: %w", ErrClosed, err)
	case golibvirt.IsNotFound(err):
		return ErrNoDomain
	}
	return err
}

// Domain is a domain as libvirt holds it now.
type Domain struct {
	UUID, Name  string
	XML         string // the live XML of an active domain, without secrets
	Active      bool   // runs, or is paused
	Persistent  bool   // defined, so that it outlives its stop
	ManagedSave bool   // has a managed save image
}

// Lookup finds a domain by UUID, or else by name; ErrNoDomain if there is none.
func (c *Client) Lookup(ctx context.Context, nameOrUUID string) (Domain, error) {
	var d Domain
	err := c.do(ctx, func() error {
		ref, err := c.find(nameOrUUID)
		if err != nil {
			return err
		}
		d, err = c.read(ref)
		return err
	})
	if err != nil {
		return Domain{}, fmt.Errorf("looking up domain %.100q: %w", nameOrUUID, err)
	}
	return d, nil
}

func (c *Client) find(nameOrUUID string) (golibvirt.Domain, error) {
	if s := strings.ToLower(nameOrUUID); domain.IsUUID(s) {
		var id golibvirt.UUID
		hex.Decode(id[:], []byte(strings.ReplaceAll(s, "-", "")))
		ref, err := c.lv.DomainLookupByUUID(id)
		if !golibvirt.IsNotFound(err) {
			return ref, err
		}
	}
	return c.lv.DomainLookupByName(nameOrUUID)
}

// read asks for what a Domain holds. The answers are some calls apart; a
// domain that goes away between them is ErrNoDomain.
func (c *Client) read(ref golibvirt.Domain) (Domain, error) {
	d := Domain{UUID: formatUUID(ref.UUID), Name: ref.Name}
	active, err := c.lv.DomainIsActive(ref)
	if err != nil {
		return d, err
	}
	persistent, err := c.lv.DomainIsPersistent(ref)
	if err != nil {
		return d, err
	}
	saved, err := c.lv.DomainHasManagedSaveImage(ref, 0)
	if err != nil {
		return d, err
	}
	d.Active, d.Persistent, d.ManagedSave = active == 1, persistent == 1, saved == 1
	d.XML, err = c.lv.DomainGetXMLDesc(ref, 0)
	return d, err
}

// Pause pauses an active domain. paused is false for one that was not running,
// such as one that its admin had paused.
func (c *Client) Pause(ctx context.Context, uuid string) (paused bool, err error) {
	err = c.do(ctx, func() error {
		ref, err := c.find(uuid)
		if err != nil {
			return err
		}
		state, _, err := c.lv.DomainGetState(ref, 0)
		if err != nil || golibvirt.DomainState(state) != golibvirt.DomainRunning {
			return err
		}
		paused = true
		return c.lv.DomainSuspend(ref)
	})
	if err != nil {
		return false, fmt.Errorf("pausing domain %.100q: %w", uuid, err)
	}
	return paused, nil
}

// Resume makes a paused domain go on; one that is not paused is as it should be.
func (c *Client) Resume(ctx context.Context, uuid string) error {
	err := c.do(ctx, func() error {
		ref, err := c.find(uuid)
		if err != nil {
			return err
		}
		state, _, err := c.lv.DomainGetState(ref, 0)
		if err != nil || golibvirt.DomainState(state) != golibvirt.DomainPaused {
			return err
		}
		return c.lv.DomainResume(ref)
	})
	if err != nil {
		return fmt.Errorf("resuming domain %.100q: %w", uuid, err)
	}
	return nil
}

// Definition gives a persistent domain's XML as its next start has it, without
// secrets; of another, what it runs by.
func (c *Client) Definition(ctx context.Context, uuid string) (xml string, err error) {
	err = c.do(ctx, func() error {
		ref, err := c.find(uuid)
		if err == nil {
			xml, err = c.lv.DomainGetXMLDesc(ref, golibvirt.DomainXMLInactive)
		}
		return err
	})
	if err != nil {
		return "", fmt.Errorf("asking for the definition of %.100q: %w", uuid, err)
	}
	return xml, nil
}

// Redefine changes a persistent domain's definition and then, where it has one,
// the XML in its managed save image. edit is given each as it is, secrets
// included, and gives what it shall be. definition and saved say what was
// changed, also beside an error.
func (c *Client) Redefine(ctx context.Context, uuid string, edit func(xml []byte, saved bool) ([]byte, error)) (definition, saved bool, err error) {
	err = c.do(ctx, func() error {
		ref, err := c.find(uuid)
		if err != nil {
			return err
		}
		change := func(image bool, now string, err error, define func(string) error) (bool, error) {
			if err != nil {
				return false, err
			}
			then, err := edit([]byte(now), image)
			if err != nil || string(then) == now {
				return false, err
			}
			err = define(string(then))
			return err == nil, err
		}
		now, err := c.lv.DomainGetXMLDesc(ref, golibvirt.DomainXMLInactive|golibvirt.DomainXMLSecure)
		if definition, err = change(false, now, err, func(xml string) error {
			_, err := c.lv.DomainDefineXML(xml)
			return err
		}); err != nil {
			return err
		}
		if has, err := c.lv.DomainHasManagedSaveImage(ref, 0); err != nil || has == 0 {
			return err
		}
		now, err = c.lv.DomainManagedSaveGetXMLDesc(ref, golibvirt.DomainXMLSecure)
		saved, err = change(true, now, err, func(xml string) error {
			return c.lv.DomainManagedSaveDefineXML(ref, golibvirt.OptString{xml}, 0)
		})
		return err
	})
	if err != nil {
		return definition, saved, fmt.Errorf("changing the definition of %.100q: %w", uuid, err)
	}
	return definition, saved, nil
}

// List gives every domain, active or not.
func (c *Client) List(ctx context.Context) ([]Domain, error) {
	var list []Domain
	err := c.do(ctx, func() error {
		refs, _, err := c.lv.ConnectListAllDomains(1, 0)
		if err != nil {
			return err
		}
		for _, ref := range refs {
			d, err := c.read(ref)
			if golibvirt.IsNotFound(err) {
				continue
			}
			if err != nil {
				return err
			}
			list = append(list, d)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing domains: %w", err)
	}
	return list, nil
}

// Kind is what became of a domain.
type Kind string

// The kinds of events. Closed is the last: the connection is gone.
const (
	Defined   Kind = "defined" // or redefined
	Undefined Kind = "undefined"
	Renamed   Kind = "renamed" // Name is the new one
	Started   Kind = "started"
	Suspended Kind = "suspended"
	Resumed   Kind = "resumed"
	Stopped   Kind = "stopped"
	Saved     Kind = "saved" // stopped, into an image
	Closed    Kind = "closed"
)

// Event is a change in a domain's life. A transient domain's end is Stopped
// without Undefined.
type Event struct {
	Kind       Kind
	UUID, Name string
}

// Events gives what happens from now on, ending with Closed. It must be read
// until then, and may be called once. When ctx ends the connection is closed:
// go-libvirt can hang when a subscription is cancelled while events arrive.
// List after Events, to miss nothing.
func (c *Client) Events(ctx context.Context) (<-chan Event, error) {
	var raw <-chan golibvirt.DomainEventLifecycleMsg
	err := c.do(ctx, func() (err error) {
		raw, err = c.lv.LifecycleEvents(context.Background())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("subscribing to libvirt's events: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	out := make(chan Event)
	go func() {
		defer close(out)
		defer stop()
		for m := range raw {
			kind, ok := kindOf(m)
			if !ok {
				continue
			}
			select {
			case out <- Event{kind, formatUUID(m.Dom.UUID), m.Dom.Name}:
			case <-ctx.Done(): // the reader may be gone; go-libvirt must not wait for it
			}
		}
		select {
		case out <- Event{Kind: Closed}:
		case <-ctx.Done():
		}
	}()
	return out, nil
}

func kindOf(m golibvirt.DomainEventLifecycleMsg) (Kind, bool) {
	switch golibvirt.DomainEventType(m.Event) {
	case golibvirt.DomainEventDefined:
		if golibvirt.DomainEventDefinedDetailType(m.Detail) == golibvirt.DomainEventDefinedRenamed {
			return Renamed, true
		}
		return Defined, true
	case golibvirt.DomainEventUndefined:
		// A rename is told twice: as the old name's end and the new one's beginning.
		return Undefined, golibvirt.DomainEventUndefinedDetailType(m.Detail) != golibvirt.DomainEventUndefinedRenamed
	case golibvirt.DomainEventStarted:
		return Started, true
	case golibvirt.DomainEventSuspended, golibvirt.DomainEventPmsuspended:
		return Suspended, true
	case golibvirt.DomainEventResumed:
		return Resumed, true
	case golibvirt.DomainEventStopped:
		if golibvirt.DomainEventStoppedDetailType(m.Detail) == golibvirt.DomainEventStoppedSaved {
			return Saved, true
		}
		return Stopped, true
	}
	return "", false // shutdown, crashed: the guest's own doing; stopped follows where it ends
}

func formatUUID(u golibvirt.UUID) string {
	s := hex.EncodeToString(u[:])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}
