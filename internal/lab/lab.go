// Package lab boots test hosts on this machine: a systemd-nspawn container
// over an overlay of the machine's root, with real systemd, D-Bus, polkit and
// libvirtd, a software TPM as the host's TPM, and guests that use their vTPM.
//
// A host's whole writable disk is one ext4 image, so that a test can search
// every block that was ever written (Host.SearchDisk) and cut the power
// (Host.PowerCut). Nothing of the machine itself is altered: mounts live in a
// mount namespace of the host's own and end with it, and its processes are
// killed when the process that booted it dies.
package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// T is what the lab needs of a test. testing.TB is one; a command brings its
// own, whose Fatalf does not return either.
type T interface {
	Helper()
	Name() string
	Logf(format string, args ...any)
	Fatalf(format string, args ...any)
	Cleanup(func())
	Failed() bool
}

// Enabled is the environment variable that asks for the lab: `make test` sets
// it, so that a plain `go test ./...` needs neither root nor minutes.
const Enabled = "VIRT_TRUST_LAB"

// Require skips a test unless the lab is asked for, and fails it when the lab
// is asked for but cannot work here.
func Require(t testing.TB) {
	t.Helper()
	if os.Getenv(Enabled) == "" {
		t.Skipf("the lab runs with %s=1 (make test)", Enabled)
	}
	if err := usable(); err != nil {
		t.Fatalf("lab: %v", err)
	}
}

// tools are the programs without which no host boots; install-packages.sh
// knows the packages that bring them.
var tools = []string{
	"systemd-nspawn", "nsenter", "mkfs.ext4", "ip",
	"libvirtd", "virsh", "qemu-system-x86_64", "qemu-img", "swtpm", "swtpm_setup",
	"tpm2_pcrextend", "dbus-daemon", "dpkg",
}

var usable = sync.OnceValue(func() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("test hosts need root")
	}
	var missing []string
	for _, tool := range tools {
		if _, err := lookPath(tool); err != nil {
			missing = append(missing, tool)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("missing %s: run internal/lab/install-packages.sh", strings.Join(missing, ", "))
	}
	if _, _, err := guestKernel(); err != nil {
		return err
	}
	return nil
})

// lookPath finds a program also where a plain user's PATH does not look.
func lookPath(tool string) (string, error) {
	if p, err := exec.LookPath(tool); err == nil {
		return p, nil
	}
	return exec.LookPath(filepath.Join("/usr/sbin", tool))
}

// ModuleRoot is the folder of go.mod.
func ModuleRoot() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}

// Deb is $VIRT_TRUST_DEB, or the newest package in dist/, or an error that says
// how to get one.
func Deb() (string, error) {
	if deb := os.Getenv("VIRT_TRUST_DEB"); deb != "" {
		return deb, nil
	}
	debs, err := filepath.Glob(filepath.Join(ModuleRoot(), "dist", "virt-trust_*.deb"))
	if err != nil {
		return "", err
	}
	newest, when := "", int64(0)
	for _, deb := range debs {
		if fi, err := os.Stat(deb); err == nil && fi.ModTime().UnixNano() > when {
			newest, when = deb, fi.ModTime().UnixNano()
		}
	}
	if newest == "" {
		return "", fmt.Errorf("no dist/virt-trust_*.deb: run make deb")
	}
	return newest, nil
}

// workDir holds everything that hosts write: $VIRT_TRUST_LAB_DIR, or a folder
// of the temporary directory. The first call in a process removes what killed
// runs have left there.
var workDir = sync.OnceValues(func() (string, error) {
	dir := os.Getenv("VIRT_TRUST_LAB_DIR")
	if dir == "" {
		dir = filepath.Join(os.TempDir(), "virt-trust-lab")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	hosts, err := filepath.Glob(filepath.Join(dir, "host-*"))
	if err != nil {
		return "", err
	}
	for _, host := range hosts {
		lock, err := os.OpenFile(filepath.Join(host, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			continue
		}
		// A run that lives holds its hosts' locks.
		if syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
			removeCgroups(filepath.Base(host))
			os.RemoveAll(host)
		}
		lock.Close()
	}
	return dir, nil
})

// build compiles one of the lab's static helpers to path. Another run may do
// so at the same time: the file appears whole.
func build(pkg, path string) error {
	mine := fmt.Sprintf("%s.%d", path, os.Getpid())
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", mine, "./internal/lab/"+pkg)
	cmd.Dir = ModuleRoot()
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build internal/lab/%s: %w\n%s", pkg, err, out)
	}
	return os.Rename(mine, path)
}
