package hosttpm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"virt-trust/internal/hosttpm/link"

	"golang.org/x/sys/unix"
)

// A character device is spoken to with one write and one read for a command,
// which block: a pseudo terminal in raw mode does that too.
func TestDevice(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	fd := int(master.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	device := fmt.Sprintf("/dev/pts/%d", n)
	slave, err := os.OpenFile(device, os.O_RDWR|unix.O_NOCTTY, 0) // held open: the last close hangs up
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	raw, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	raw.Iflag, raw.Oflag, raw.Lflag = 0, 0, 0
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(int(slave.Fd()), unix.TCSETS, raw); err != nil {
		t.Fatal(err)
	}
	tpm, err := net.Dial("unix", e.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer tpm.Close()
	silent := make(chan bool, 1)
	go io.Copy(master, tpm)
	go func() {
		for {
			b := make([]byte, link.MaxResponse)
			n, err := master.Read(b)
			if err != nil {
				return
			}
			select {
			case <-silent:
				continue
			default:
			}
			tpm.Write(b[:n])
		}
	}()
	h := open(t, device, dir)
	works(t, h)
	silent <- true // one command is lost
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := h.UnsealListKey(ctx); !errors.Is(err, ErrBusy) || time.Since(began) > time.Second {
		t.Fatalf("a silent device gives %v after %v", err, time.Since(began))
	}
}
