package measure

import (
	"bufio"
	"encoding/hex"
	"io"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// imaList is the kernel's measurement list as text (IMA).
const imaList = "/sys/kernel/security/ima/ascii_runtime_measurements"

// Vouches is what the kernel itself says of a file.
type Vouches struct {
	IMA    bool   // its measurement list has the path with the same digest
	Verity string // "sha256:…", the fs-verity digest: what is read of it is checked by the kernel
}

// Kernel asks the kernel about files, in their order. A kernel without IMA or
// fs-verity vouches for none.
func Kernel(files []File) []Vouches {
	all := make([]Vouches, len(files))
	if f, err := os.Open(imaList); err == nil {
		measured := readIMA(f)
		f.Close()
		for i, x := range files {
			all[i].IMA = measured[imaKey{x.Path, x.SHA256}]
		}
	}
	for i, x := range files {
		if f, err := Open(x.Path); err == nil {
			all[i].Verity = verity(f)
			f.Close()
		}
	}
	return all
}

type imaKey struct {
	path   string
	sha256 [32]byte
}

// readIMA reads lines "PCR TEMPLATE-HASH ima-ng sha256:DIGEST PATH", and those of
// ima-sig, which go on; of other templates and hashes it has no use.
func readIMA(r io.Reader) map[imaKey]bool {
	all := map[imaKey]bool{}
	s := bufio.NewScanner(io.LimitReader(r, 1<<28))
	for s.Scan() {
		f := strings.SplitN(s.Text(), " ", 5)
		if len(f) != 5 || f[2] != "ima-ng" && f[2] != "ima-sig" {
			continue
		}
		d, err := hex.DecodeString(strings.TrimPrefix(f[3], "sha256:"))
		if err != nil || len(d) != 32 {
			continue
		}
		path, _, _ := strings.Cut(f[4], " ")
		all[imaKey{path, [32]byte(d)}] = true
	}
	return all
}

// verity gives a file's fs-verity digest (FS_IOC_MEASURE_VERITY), "" without one.
func verity(f *os.File) string {
	const measure = 0xc0046686 // _IOWR('f', 134, struct fsverity_digest)
	d := struct {
		algorithm, size uint16
		digest          [64]byte
	}{size: 64}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), measure, uintptr(unsafe.Pointer(&d))); errno != 0 || int(d.size) > len(d.digest) {
		return ""
	}
	name := map[uint16]string{1: "sha256", 2: "sha512"}[d.algorithm]
	if name == "" {
		return ""
	}
	return name + ":" + hex.EncodeToString(d.digest[:d.size])
}
