package lab

import (
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// layer writes into a host's writable layer before it is mounted.
type layer string

// dir makes a folder with the mode and owner that the machine's has, since
// the upper layer's are the ones that count.
func (l layer) dir(path string) error {
	if path == "/" {
		return nil
	}
	if err := l.dir(filepath.Dir(path)); err != nil {
		return err
	}
	err := os.Mkdir(string(l)+path, 0o755)
	if os.IsExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if st, err := os.Stat(path); err == nil {
		sys := st.Sys().(*syscall.Stat_t)
		if err := os.Chown(string(l)+path, int(sys.Uid), int(sys.Gid)); err != nil {
			return err
		}
		return os.Chmod(string(l)+path, st.Mode().Perm())
	}
	return nil
}

// empty makes a folder that hides the machine's.
func (l layer) empty(path string) error {
	if err := l.dir(path); err != nil {
		return err
	}
	return unix.Setxattr(string(l)+path, "trusted.overlay.opaque", []byte("y"), 0)
}

// skeleton is empty, but for the folders below, which stay, each empty.
func (l layer) skeleton(path string) error {
	err := filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		return l.empty(p)
	})
	if err != nil {
		return err
	}
	return l.empty(path)
}

// file writes a file.
func (l layer) file(path, text string, perm fs.FileMode) error {
	if err := l.dir(filepath.Dir(path)); err != nil {
		return err
	}
	if err := os.WriteFile(string(l)+path, []byte(text), perm); err != nil {
		return err
	}
	return os.Chmod(string(l)+path, perm)
}

// link makes a symbolic link.
func (l layer) link(target, path string) error {
	if err := l.dir(filepath.Dir(path)); err != nil {
		return err
	}
	return os.Symlink(target, string(l)+path)
}

// enabled are the units that a host starts; all others that the machine has
// enabled stay off. They are those that Debian's libvirt enables, without
// libvirt-guests, which would hold up a reboot for its guests' sake.
var enabled = map[string]string{
	"libvirtd.service":      "multi-user.target.wants",
	"libvirtd.socket":       "sockets.target.wants",
	"libvirtd-ro.socket":    "sockets.target.wants",
	"libvirtd-admin.socket": "sockets.target.wants",
	"virtlogd.socket":       "sockets.target.wants",
	"virtlockd.socket":      "sockets.target.wants",
}

// TPMSocket is where a host's TPM listens: commands and responses as on a
// TPM's device node. ".ctrl" is swtpm's control channel, where tpm2-tools
// want it.
const TPMSocket = "/run/hosttpm.sock"

const (
	labDir     = "/var/lib/virt-trust-lab" // the lab's own files on a host
	tpmState   = "/var/lib/hosttpm"
	tpmService = `[Unit]
Description=Software TPM of this test host
DefaultDependencies=no
After=systemd-tmpfiles-setup.service
Before=libvirtd.service virtqemud.service virt-trustd.service

[Service]
ExecStart=/usr/bin/swtpm socket --tpm2 --tpmstate dir=` + tpmState + ` \
  --server type=unixio,path=/run/hosttpm.swtpm --ctrl type=unixio,path=` + TPMSocket + `.ctrl \
  --flags not-need-init,startup-clear

[Install]
WantedBy=multi-user.target
`
	// swtpm serves one client at a time; the lab's multiplexer lets a test
	// extend a PCR while virt-trustd is connected.
	tpmMuxService = `[Unit]
Description=Many clients for this test host's TPM
DefaultDependencies=no
After=hosttpm.service
BindsTo=hosttpm.service
Before=libvirtd.service virtqemud.service virt-trustd.service

[Service]
Type=notify
ExecStart=` + labDir + `/tpmmux ` + TPMSocket + ` /run/hosttpm.swtpm
ExecStopPost=/bin/rm -f ` + TPMSocket + `

[Install]
WantedBy=multi-user.target
`
)

// setup writes what makes the overlay of the machine a host of its own.
func (m *machine) setup() error {
	l := layer(m.upper())
	for _, step := range []func() error{
		func() error { return m.setupIdentity(l) },
		func() error { return m.setupUnits(l) },
		func() error { return m.setupLibvirt(l) },
		func() error { return m.setupHelpers(l) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	if m.opts.Setup != nil {
		return m.opts.Setup(func(path string) string {
			l.dir(filepath.Dir(path))
			return string(l) + path
		})
	}
	return nil
}

func (m *machine) setupIdentity(l layer) error {
	for path, text := range map[string]string{
		"/etc/machine-id": randomHex(16) + "\n",
		"/etc/hostname":   m.opts.Name + "\n",
		"/etc/hosts":      "127.0.0.1 localhost\n127.0.1.1 " + m.opts.Name + "\n",
		"/etc/fstab":      "",
	} {
		if err := l.file(path, text, 0o644); err != nil {
			return err
		}
	}
	// A machine that is a container image may forbid packages to start services.
	if err := l.file("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 0\n", 0o755); err != nil {
		return err
	}
	for _, path := range []string{
		"/root", "/home", "/srv", "/tmp", "/var/tmp", "/var/log/journal", "/var/log/libvirt", "/var/lib/machines",
		"/var/lib/systemd", "/var/lib/virt-trust", "/etc/virt-trust", labDir,
	} {
		if err := l.empty(path); err != nil {
			return err
		}
	}
	for _, path := range []string{"/tmp", "/var/tmp"} {
		if err := os.Chmod(string(l)+path, 0o777|fs.ModeSticky); err != nil {
			return err
		}
	}
	return nil
}

func (m *machine) setupUnits(l layer) error {
	rcs, _ := filepath.Glob("/etc/rc?.d")
	for _, path := range append(rcs, "/etc/systemd/system") {
		if err := l.empty(path); err != nil {
			return err
		}
	}
	for unit, target := range enabled {
		if err := l.link("/lib/systemd/system/"+unit, "/etc/systemd/system/"+target+"/"+unit); err != nil {
			return err
		}
	}
	// A login on the console, and the file systems of a real disk: not here.
	for _, unit := range []string{"console-getty.service", "getty.target", "systemd-remount-fs.service", "systemd-logind.service"} {
		if err := l.link("/dev/null", "/etc/systemd/system/"+unit); err != nil {
			return err
		}
	}
	if m.opts.NoTPM {
		return nil
	}
	if err := l.dir(tpmState); err != nil {
		return err
	}
	for unit, text := range map[string]string{"hosttpm.service": tpmService, "hosttpm-mux.service": tpmMuxService} {
		if err := l.file("/etc/systemd/system/"+unit, text, 0o644); err != nil {
			return err
		}
		if err := l.link("../"+unit, "/etc/systemd/system/multi-user.target.wants/"+unit); err != nil {
			return err
		}
	}
	return nil
}

func (m *machine) setupLibvirt(l layer) error {
	for _, path := range []string{"/var/lib/libvirt", "/var/cache/libvirt"} {
		if err := l.skeleton(path); err != nil {
			return err
		}
	}
	for _, path := range []string{
		"/var/lib/libvirt/swtpm", "/etc/libvirt/qemu", "/etc/libvirt/storage", "/etc/libvirt/secrets", "/etc/libvirt/hooks",
		"/etc/systemd/system/libvirtd.service.d", "/etc/systemd/system/virtqemud.service.d", "/var/lib/swtpm-localca",
	} {
		if err := l.empty(path); err != nil {
			return err
		}
	}
	if err := os.Chmod(string(l)+"/var/lib/libvirt/swtpm", 0o711); err != nil {
		return err
	}
	// What Debian's swtpm-tools leaves after installation.
	tss, err := user.Lookup("tss")
	if err != nil {
		return err
	}
	uid, _ := strconv.Atoi(tss.Uid)
	if err := os.Chown(string(l)+"/var/lib/swtpm-localca", uid, 0); err != nil {
		return err
	}
	if err := os.Chmod(string(l)+"/var/lib/swtpm-localca", 0o750); err != nil {
		return err
	}
	// There is no cgroup for libvirt to put device rules in.
	qemu := "cgroup_controllers = [ ]\n"
	if b, _ := os.ReadFile("/sys/module/apparmor/parameters/enabled"); !strings.HasPrefix(string(b), "Y") {
		qemu += "security_driver = \"none\"\n"
	}
	if err := l.file("/etc/libvirt/qemu.conf", qemu, 0o600); err != nil {
		return err
	}
	// Two hosts with one UUID do not migrate to each other. The machine's own
	// libvirtd.conf may name drivers and sockets of its own.
	return l.file("/etc/libvirt/libvirtd.conf", fmt.Sprintf("host_uuid = %q\nauth_tcp = \"none\"\n", randomUUID()), 0o644)
}

// setupHelpers puts the guests' kernel and initramfs and the TPM multiplexer
// where the host finds them.
func (m *machine) setupHelpers(l layer) error {
	kernel, initrd, mux, err := helpers()
	if err != nil {
		return err
	}
	for path, from := range map[string]string{"/vmlinuz": kernel, "/initrd": initrd, "/tpmmux": mux} {
		b, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		if err := l.file(labDir+path, string(b), 0o755); err != nil {
			return err
		}
	}
	if err := l.dir(labDir + "/console"); err != nil {
		return err
	}
	return nil
}
