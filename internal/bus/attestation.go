package bus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// Have is what the receiver of evidence has of a host's logs already: the
// first bytes of each, by kind (report.EventLog and its like), of one boot.
type Have struct {
	Boot    string // boot id
	Offsets map[string]uint64
}

// options gives Have as the a{sv} of Evidence.
func (h Have) options() map[string]dbus.Variant {
	o := map[string]dbus.Variant{}
	if h.Boot != "" {
		o["have_boot"] = dbus.MakeVariant(h.Boot)
	}
	for kind, n := range h.Offsets {
		o["have_"+kind] = dbus.MakeVariant(n)
	}
	return o
}

// HaveOf undoes options; what is not of a kind that is asked for is left out.
func HaveOf(options map[string]dbus.Variant, kinds ...string) Have {
	h := Have{Offsets: map[string]uint64{}}
	h.Boot, _ = options["have_boot"].Value().(string)
	for _, k := range kinds {
		if n, ok := options["have_"+k].Value().(uint64); ok {
			h.Offsets[k] = n
		}
	}
	return h
}

// Attest calls a method of org.virttrust1.Attestation and stores its results in
// out. Errors: as Call's.
func (c *Client) Attest(ctx context.Context, method string, args []any, out ...any) error {
	return c.call(ctx, HostPath, AttestationInterface+"."+method, args, out)
}

// Evidence asks for evidence for a nonce, in CBOR, of at most max bytes. The
// Client is one of DialForDescriptors. Errors: as Call's.
func (c *Client) Evidence(ctx context.Context, nonce []byte, have Have, max int64) ([]byte, error) {
	var fd dbus.UnixFD
	if err := c.Attest(ctx, "Evidence", []any{nonce, have.options()}, &fd); err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "evidence")
	if f == nil {
		return nil, errors.New("Evidence: no descriptor came back")
	}
	defer f.Close()
	return readSealed(f, max)
}

// seals: nobody can change the file afterwards.
const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// Sealed gives a memory file that holds b, and that nobody can change.
func Sealed(name string, b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("creating a memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	_, err = f.WriteAt(b, 0)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("filling a memory file: %w", err), f.Close())
	}
	return f, nil
}

// readSealed reads a memory file that is sealed, wherever its offset is.
func readSealed(f *os.File, max int64) ([]byte, error) {
	got, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil || got&seals != seals {
		return nil, fmt.Errorf("what came back is no sealed memory file: seals %#x, %v", got, err)
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() > max {
		return nil, fmt.Errorf("%d bytes came back, at most %d", st.Size(), max)
	}
	b := make([]byte, st.Size())
	if _, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b, nil
}
