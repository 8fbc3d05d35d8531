package lab

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// unpacked is where install-packages.sh puts a kernel for guests when the
// machine has none installed.
const unpacked = "/var/cache/virt-trust-lab"

// guestKernel finds Debian's cloud kernel: a small one with the TPM drivers
// built in. It gives the kernel and the folder of its modules.
func guestKernel() (vmlinuz, modules string, err error) {
	for _, root := range []string{"/", unpacked} {
		kernels, _ := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*-cloud-*"))
		for i := len(kernels) - 1; i >= 0; i-- {
			modules := filepath.Join(root, "lib/modules", strings.TrimPrefix(filepath.Base(kernels[i]), "vmlinuz-"))
			if _, err := os.Stat(modules); err == nil {
				return kernels[i], modules, nil
			}
		}
	}
	return "", "", fmt.Errorf("no cloud kernel in /boot or %s/boot: run internal/lab/install-packages.sh", unpacked)
}

// helpers builds what guests and hosts run, once per process.
var helpers = func() func() (kernel, initrd, mux string, err error) {
	var once sync.Once
	var kernel, initrd, mux string
	var err error
	return func() (string, string, string, error) {
		once.Do(func() { kernel, initrd, mux, err = buildHelpers() })
		return kernel, initrd, mux, err
	}
}()

func buildHelpers() (kernel, initrd, mux string, err error) {
	work, err := workDir()
	if err != nil {
		return "", "", "", err
	}
	kernel, modules, err := guestKernel()
	if err != nil {
		return "", "", "", err
	}
	mux = filepath.Join(work, "tpmmux")
	if err := build("tpmmux", mux); err != nil {
		return "", "", "", err
	}
	initPath := filepath.Join(work, "init")
	if err := build("guest", initPath); err != nil {
		return "", "", "", err
	}
	init, err := os.ReadFile(initPath)
	if err != nil {
		return "", "", "", err
	}
	var c cpio
	for _, d := range []string{"dev", "proc", "sys", "modules"} {
		c.add(d, 0o040755, nil)
	}
	c.add("init", 0o100755, init)
	// The power button, for virsh shutdown.
	for _, module := range []string{"drivers/input/evdev.ko", "drivers/acpi/button.ko"} {
		b, err := os.ReadFile(filepath.Join(modules, "kernel", module))
		if err != nil {
			return "", "", "", err
		}
		c.add("modules/"+filepath.Base(module), 0o100644, b)
	}
	initrd = filepath.Join(work, "initrd")
	mine := fmt.Sprintf("%s.%d", initrd, os.Getpid())
	if err := os.WriteFile(mine, c.bytes(), 0o644); err != nil {
		return "", "", "", err
	}
	return kernel, initrd, mux, os.Rename(mine, initrd)
}

// cpio is an archive in the "newc" format, the one that Linux takes as its
// initramfs (Documentation/driver-api/early-userspace/buffer-format.rst).
type cpio struct {
	buf   bytes.Buffer
	inode int
}

func (c *cpio) add(name string, mode uint32, data []byte) {
	c.inode++
	links := 1
	if mode&0o040000 != 0 {
		links = 2
	}
	fmt.Fprintf(&c.buf, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		c.inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	c.buf.WriteString(name + "\x00")
	c.pad()
	c.buf.Write(data)
	c.pad()
}

func (c *cpio) pad() {
	for c.buf.Len()%4 != 0 {
		c.buf.WriteByte(0)
	}
}

func (c *cpio) bytes() []byte {
	c.inode = -1 // the trailer's is 0
	c.add("TRAILER!!!", 0, nil)
	return c.buf.Bytes()
}
