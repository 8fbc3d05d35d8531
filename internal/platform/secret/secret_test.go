package secret

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestBuffer(t *testing.T) {
	from := []byte("0123456789abcdef")
	b, err := Take(from)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(from, make([]byte, 16)) {
		t.Error("the source still holds the secret")
	}
	if string(b.Bytes()) != "0123456789abcdef" || cap(b.Bytes()) != 16 {
		t.Errorf("holds %q", b.Bytes())
	}
	flags := vmFlags(t, fmt.Sprintf("%x-", addr(b.pages)))
	for _, want := range []string{"lo", "dd", "dc"} { // locked, not dumped, not copied on fork
		if !strings.Contains(flags, " "+want) {
			t.Errorf("its pages lack %q: %s", want, flags)
		}
	}
	if err := b.Wipe(); err != nil {
		t.Error(err)
	}
	if b.Bytes() != nil || b.Wipe() != nil || (*Buffer)(nil).Wipe() != nil {
		t.Error("a wiped buffer is not empty")
	}
	for _, n := range []int{-1, 0, 2 << 20} {
		if _, err := New(n); err == nil {
			t.Errorf("New(%d) gives a buffer", n)
		}
	}
}

// vmFlags gives the kernel's flags of the mapping that begins at start.
func vmFlags(t *testing.T, start string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut("\n"+string(b), "\n"+start)
	if !ok {
		t.Fatal("no mapping of its own")
	}
	_, rest, _ = strings.Cut(rest, "VmFlags:")
	flags, _, _ := strings.Cut(rest, "\n")
	return flags
}

func TestHexMemfd(t *testing.T) {
	key := bytes.Repeat([]byte{0x0A, 0xF1}, 16)
	f, err := HexMemfd("state-key", key)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := strings.Repeat("0af1", 16)
	b, err := io.ReadAll(f) // from offset 0
	if err != nil || string(b) != want {
		t.Fatalf("holds %q, %v", b, err)
	}
	got, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil || got&seals != seals {
		t.Errorf("seals are %#x, %v", got, err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); err == nil {
		t.Error("it can be written")
	}
	if err := f.Truncate(1); err == nil {
		t.Error("it can be cut")
	}
	if err := f.Truncate(100); err == nil {
		t.Error("it can grow")
	}
	if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Error("children inherit it")
	}
	for _, n := range []int{0, 16, 31, 33, 64} {
		if _, err := HexMemfd("x", make([]byte, n)); err == nil {
			t.Errorf("a key of %d bytes is taken", n)
		}
	}
}

func addr(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }
