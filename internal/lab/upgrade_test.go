package lab

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const (
	hookLink = "/etc/libvirt/hooks/qemu.d/50-virt-trust"
	oldHook  = `#!/bin/sh
case "$0" in *.dpkg-*) exit 0 ;; esac
test -x /usr/libexec/virt-trust/virt-trust-hook || exit 0
exec /usr/libexec/virt-trust/virt-trust-hook "$@"
`
	hookCopies = `cd /etc/libvirt/hooks/qemu.d; find . -name '50-virt-trust.*' -printf '%f %m\n' | sort`
)

// oldDeb is a package of 0.2, which was one: $VIRT_TRUST_OLD_DEB, or one that is
// made of what there is now, in 0.2's layout.
func oldDeb(t *testing.T, deb string) string {
	t.Helper()
	if old := os.Getenv("VIRT_TRUST_OLD_DEB"); old != "" {
		return old
	}
	dir := t.TempDir()
	root, cli := filepath.Join(dir, "root"), filepath.Join(dir, "cli")
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	run("dpkg-deb", "-R", deb, root)
	run("dpkg-deb", "-x", beside(deb, "virt-trust-cli"), cli)
	run("cp", "-a", cli+"/.", root)
	run("rm", "-r", root+"/usr/share/doc/virt-trust-cli")
	control, err := os.ReadFile(root + "/DEBIAN/control")
	if err != nil {
		t.Fatal(err)
	}
	text := regexp.MustCompile(`(?m)^Version: .*`).ReplaceAllString(string(control), "Version: 0.2.0")
	text = regexp.MustCompile(`virt-trust-cli \(= [^)]*\), `).ReplaceAllString(text, "")
	if err := os.WriteFile(root+"/DEBIAN/control", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	// The hook was a script, and a conffile.
	run("rm", root+hookLink, root+"/DEBIAN/preinst")
	if err := os.WriteFile(root+hookLink, []byte(oldHook), 0o755); err != nil {
		t.Fatal(err)
	}
	conffiles, err := os.OpenFile(root+"/DEBIAN/conffiles", os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer conffiles.Close()
	if _, err := conffiles.WriteString(hookLink + "\n"); err != nil {
		t.Fatal(err)
	}
	old := filepath.Join(dir, "virt-trust_0.2.0_amd64.deb")
	run("dpkg-deb", "--root-owner-group", "-Znone", "-b", root, old)
	return old
}

// pid is that of a unit's main process.
func (h *Host) pid(unit string) string {
	h.t.Helper()
	pid := strings.TrimSpace(h.Must("systemctl", "show", "-P", "MainPID", unit))
	if pid == "0" {
		h.t.Fatalf("%s does not run", unit)
	}
	return pid
}

// processes are the guest's QEMU and swtpm.
func (g *Guest) processes() string {
	g.h.t.Helper()
	return g.h.Must("pgrep", "-f", "guest="+g.Name+",") + g.h.Must("pgrep", "-f", "swtpm.*"+g.UUID)
}

// TestUpgrade is from 0.2, one package, to what there is now, as README says;
// and from that to the next. VMs run on through it, and start after it, before
// libvirt is restarted too.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	Require(t)
	deb, err := Deb()
	if err != nil {
		t.Fatal(err)
	}
	host := NewHost(t, HostOptions{Name: "old"})
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("virt-trustd's journal:\n%s", host.Run("journalctl", "-u", "virt-trustd", "--no-pager", "-n", "60", "-o", "short-precise").Stdout)
		}
	})
	host.InstallDeb(oldDeb(t, deb))
	host.Must("systemctl", "restart", "libvirtd")
	off := sealed(t, host, VM{Name: "off", TPM: true, Disk: "qcow2"})
	running := sealed(t, host, VM{Name: "running", TPM: true, Disk: "qcow2"})
	running.Start()
	// A hook that the admin has changed, and a copy that dpkg has left. Under such a name
	// it would refuse every VM.
	host.Shell("echo 'case $0 in *.dpkg-*) exit 1 ;; esac' | sed -i '1r /dev/stdin' " + hookLink + " && cp -p " + hookLink + " " + hookLink + ".dpkg-old")

	// undisturbed has something installed while the VM runs.
	undisturbed := func(t *testing.T, restarted []string, install func(h *Host)) {
		t.Helper()
		h := host.In(t)
		g := running.In(h)
		processes, libvirtd, before := g.processes(), h.pid("libvirtd"), map[string]string{}
		for _, unit := range restarted {
			before[unit] = h.pid(unit)
		}
		install(h)
		for _, unit := range restarted {
			if h.pid(unit) == before[unit] {
				t.Errorf("%s was not restarted", unit)
			}
		}
		if h.pid("libvirtd") != libvirtd {
			t.Error("libvirtd was restarted")
		}
		if now := g.processes(); now != processes {
			t.Errorf("the VM's processes were\n%sand are\n%s", processes, now)
		}
		if old := h.Shell("ls -l /proc/[0-9]*/exe 2>/dev/null | grep '/usr/libexec/virt-trust/.*(deleted)' || :"); old != "" {
			t.Errorf("old programs run on:\n%s", old)
		}
		unseals(t, g)
	}

	t.Run("from one package to two", func(t *testing.T) {
		undisturbed(t, []string{"virt-trustd"}, func(h *Host) {
			args := []string{"env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "-o", "Dpkg::Options::=--force-confold"}
			for _, path := range []string{deb, beside(deb, "virt-trust-cli")} {
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				h.WriteFile("/root/dist/"+filepath.Base(path), b, 0o644)
				args = append(args, "/root/dist/"+filepath.Base(path))
			}
			r := h.Run(args...)
			t.Logf("exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
			if r.Code != 0 {
				t.FailNow()
			}
		})
		h := host.In(t)
		t.Log(h.Must("dpkg-query", "-W", "virt-trust*"))
		if owner := h.Must("dpkg", "-S", "/usr/bin/virt-trust"); !strings.HasPrefix(owner, "virt-trust-cli:") {
			t.Error(owner)
		}
		if to, err := os.Readlink(h.Path(hookLink)); err != nil || to != "/usr/libexec/virt-trust/virt-trust-hook" {
			t.Errorf("the hook leads to %q, %v", to, err)
		}
		if out := h.Shell("dpkg -V virt-trust | grep -v ' c /etc/virt-trust/' || :"); out != "" {
			t.Errorf("dpkg -V: %s", out)
		}
		if kept := h.Shell(hookCopies); kept != "50-virt-trust.dpkg-bak 644\n50-virt-trust.dpkg-old 644\n" {
			t.Errorf("of the script are left: %s", kept)
		}
		t.Log(h.Must("virt-trust", "status") + h.Must("virt-trust", "list"))
	})
	t.Run("VMs start before libvirt is restarted, and after", func(t *testing.T) {
		h := host.In(t)
		running.In(h).Destroy()
		for range 2 {
			starts(t, off.In(h))
			starts(t, running.In(h))
			sealed(t, h, VM{Name: "new-" + randomHex(2), TPM: true, Disk: "qcow2"})
			h.Must("systemctl", "restart", "libvirtd")
		}
		h.Must("virt-trust", "check", "--all")
		h.Must("virt-trust", "launch-log", "--verify")
	})
	t.Run("to the next version, with all services", func(t *testing.T) {
		h := host.In(t)
		h.InstallVerifier(deb)
		h.WriteFile("/etc/systemd/system/virt-trust-signer.service.d/lab.conf", []byte("[Service]\nExecStart=\nExecStart=/usr/libexec/virt-trust/virt-trust-signer -tpm "+TPMSocket+"\n"), 0o644)
		h.Must("systemctl", "daemon-reload")
		h.WriteFile("/etc/virt-trust/verifier.toml", []byte(verifierConfig+"[ca]\nkey = \"/run/virt-trust-signer/socket\"\n"), 0o644)
		h.Must("virt-trust-signer", "-tpm", TPMSocket, "init", "Verifier CA") // as virt-trust-signer(8) says
		h.Must("systemctl", "enable", "--now", "virt-trust-signer.socket")
		h.Must("install", "-m", "644", "/var/lib/virt-trust-signer/ca.pem", "/var/lib/virt-trust-verifier/ca.pem")
		h.Must("virt-trust-verifier", "init")
		h.Must("systemctl", "start", "virt-trust-verifier", "virt-trust-agent")
		running.In(h).Start()
		undisturbed(t, []string{"virt-trustd", "virt-trust-agent", "virt-trust-verifier", "virt-trust-signer"}, func(h *Host) {
			h.InstallDeb(deb)
			h.InstallVerifier(deb)
		})
		running.In(h).Destroy()
		starts(t, running.In(h))
	})
}
