// Package secret keeps key material out of swap, core dumps and other
// processes: buffers in locked pages of their own, and sealed memory files
// that hand a key to a program by descriptor.
//
// What Go's garbage collected heap or a library saw of a key can be wiped only
// where the slice is still known; Wipe does that much.
package secret

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// KeySize is the size of a key that HexMemfd takes, in bytes.
const KeySize = 32

// Wipe overwrites b with zeros.
func Wipe(b []byte) {
	clear(b)
	runtime.KeepAlive(b) // the stores must not be dropped as dead
}

// Buffer is a secret in pages of its own, which are locked into memory and left
// out of core dumps and of forked children. It is not safe for concurrent use.
type Buffer struct {
	pages []byte
	n     int
}

// New gives a Buffer of n zero bytes. It fails where RLIMIT_MEMLOCK is used up:
// a secret that may be swapped out is not kept at all.
func New(n int) (*Buffer, error) {
	if n <= 0 || n > 1<<20 {
		return nil, fmt.Errorf("secret of %d bytes", n)
	}
	page := os.Getpagesize()
	pages, err := unix.Mmap(-1, 0, (n+page-1)/page*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("mapping memory for a secret: %w", err)
	}
	b := &Buffer{pages: pages, n: n}
	if err := unix.Mlock(pages); err != nil {
		return nil, errors.Join(fmt.Errorf("locking memory for a secret: %w", err), b.Wipe())
	}
	for _, advice := range []int{unix.MADV_DONTDUMP, unix.MADV_DONTFORK} {
		if err := unix.Madvise(pages, advice); err != nil {
			return nil, errors.Join(fmt.Errorf("keeping a secret's memory private: %w", err), b.Wipe())
		}
	}
	return b, nil
}

// Take moves b into a new Buffer: b is wiped, also when Take fails.
func Take(b []byte) (*Buffer, error) {
	defer Wipe(b)
	s, err := New(len(b))
	if err != nil {
		return nil, err
	}
	copy(s.pages, b)
	return s, nil
}

// Bytes is the secret itself, nil after Wipe. It must not be used after Wipe:
// the memory is gone then.
func (b *Buffer) Bytes() []byte {
	if b == nil || b.pages == nil {
		return nil
	}
	return b.pages[:b.n:b.n]
}

// Wipe overwrites the secret and gives its memory back. It may be called on a
// nil Buffer, and more than once.
func (b *Buffer) Wipe() error {
	if b == nil || b.pages == nil {
		return nil
	}
	Wipe(b.pages)
	err := unix.Munmap(b.pages) // unlocks too
	b.pages, b.n = nil, 0
	return err
}

// seals: nobody, ourselves included, can change the file afterwards.
const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// HexMemfd gives a sealed memory file that holds key, KeySize bytes, as 64
// lower-case hexadecimal digits, and whose offset is 0. It is whole before
// anyone else can see it: swtpm reads a key with one read(2) and takes a short
// one for a shorter key. The pages of a memory file, unlike a Buffer's, may be
// swapped out.
func HexMemfd(name string, key []byte) (*os.File, error) {
	if len(key) != KeySize {
		return nil, fmt.Errorf("key of %d bytes, want %d", len(key), KeySize)
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("creating a memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	digits := make([]byte, hex.EncodedLen(len(key)))
	hex.Encode(digits, key)
	_, err = f.WriteAt(digits, 0) // leaves the offset at 0
	Wipe(digits)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("filling a memory file: %w", err), f.Close())
	}
	return f, nil
}
