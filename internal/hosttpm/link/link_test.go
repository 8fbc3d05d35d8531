package link

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"virt-trust/internal/testkit"
)

// door is a socket as swtpm has it, whose queue takes few.
func door(t *testing.T) (path string, listener int) {
	t.Helper()
	path = filepath.Join(testkit.Folder(t), "sock")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 1))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return path, fd
}

// A TPM that has too many at its door is waited for, and not for ever.
func TestQueue(t *testing.T) {
	path, listener := door(t)
	for {
		c, err := net.Dial("unix", path)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, path); !errors.Is(err, ErrBusy) {
		t.Errorf("a full queue: %v", err)
	}
	go func() {
		time.Sleep(20 * time.Millisecond)
		if fd, _, err := unix.Accept(listener); err == nil {
			unix.Close(fd)
		}
	}()
	l, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatalf("a queue with a place: %v", err)
	}
	l.Close()
}

func TestAbsent(t *testing.T) {
	path := filepath.Join(testkit.Folder(t), "sock")
	if _, err := Dial(t.Context(), path); !errors.Is(err, ErrAbsent) {
		t.Errorf("no file: %v", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if _, err := Dial(t.Context(), path); !errors.Is(err, ErrAbsent) {
		t.Errorf("nobody at the socket: %v", err)
	}
}

// What the TPM puts off is sent again, the same.
func TestPutOff(t *testing.T) {
	ours, theirs := net.Pipe()
	defer ours.Close()
	command := []byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 1, 0x7b}
	go func() {
		defer theirs.Close()
		got := make([]byte, len(command))
		for _, rc := range []tpm2.TPMRC{tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCCanceled, tpm2.TPMRCTesting, tpm2.TPMRCNVRate, tpm2.TPMRCFailure} {
			if _, err := io.ReadFull(theirs, got); err != nil || !bytes.Equal(got, command) {
				return
			}
			_, _ = theirs.Write(binary.BigEndian.AppendUint32([]byte{0x80, 0x01, 0, 0, 0, 10}, uint32(rc)))
		}
	}()
	r, err := (&Link{conn: ours}).Send(command)
	if err != nil || tpm2.TPMRC(binary.BigEndian.Uint32(r[6:])) != tpm2.TPMRCFailure {
		t.Errorf("%x, %v", r, err)
	}
}

// One that puts everything off is busy, when the time is up.
func TestPutOffTooLong(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	tries := 0
	_, err := Repeat(ctx, func() ([]byte, error) {
		tries++
		return binary.BigEndian.AppendUint32([]byte{0x80, 0x01, 0, 0, 0, 10}, uint32(tpm2.TPMRCTesting)), nil
	})
	if !errors.Is(err, ErrBusy) || !errors.Is(err, tpm2.TPMRCTesting) || tries < 2 {
		t.Errorf("%v after %d tries", err, tries)
	}
}

// What is no response breaks the connection.
func TestResponses(t *testing.T) {
	good := []byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 1, 1}
	for _, c := range []struct {
		name     string
		response []byte
		ok       bool
	}{
		{"whole", good, true},
		{"of another tag", append([]byte{0x81, 0x01}, good[2:]...), false},
		{"shorter than its header", []byte{0x80, 0x01, 0, 0, 0, 9, 0, 0, 1, 1}, false},
		{"longer than any", []byte{0x80, 0x01, 0, 1, 0, 0, 0, 0, 1, 1}, false},
		{"with more behind it", append(good[:10:10], 0), false},
		{"cut off in its header", good[:9], false},
		{"cut off", []byte{0x80, 0x01, 0, 0, 0, 12, 0, 0, 1, 1, 5}, false},
		{"none", nil, false},
	} {
		ours, theirs := net.Pipe()
		go func() {
			_, _ = io.ReadFull(theirs, make([]byte, HeaderSize))
			_, _ = theirs.Write(c.response)
			theirs.Close()
		}()
		r, err := (&Link{conn: ours}).Send(good)
		if c.ok && (err != nil || string(r) != string(c.response)) || !c.ok && !errors.Is(err, ErrBroken) {
			t.Errorf("%s: %x, %v", c.name, r, err)
		}
		ours.Close()
	}
}
