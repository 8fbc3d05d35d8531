package lab

import (
	"os"
	"strings"
	"testing"

	"virt-trust/internal/domain/emulator"
	"virt-trust/internal/vtpm/reason"
)

// TestEmulator starts VMs under virt-trust's emulator, and takes them off it.
func TestEmulator(t *testing.T) {
	t.Parallel()
	host := guarded(t, HostOptions{Name: "emulator"})
	h := host.In(t)
	const qemu = "qemu-system-x86_64"
	real, ours := emulator.Real(qemu), emulator.Dir+"/"+qemu
	g := sealed(t, h, VM{Name: "measured", TPM: true, Disk: "qcow2"})
	none := h.NewVM(VM{Name: "none", Devices: "<emulator>" + ours + "</emulator>"})
	before := h.Must("virsh", "dumpxml", "--inactive", "--security-info", g.Name)

	t.Run("libvirt's probes", func(t *testing.T) {
		h := host.In(t)
		plain := h.Must("virsh", "domcapabilities", "--emulatorbin", real, "--machine", "q35", "--virttype", "qemu")
		under := h.Must("virsh", "domcapabilities", "--emulatorbin", ours, "--machine", "q35", "--virttype", "qemu")
		if strings.ReplaceAll(under, ours, real) != plain || !strings.Contains(plain, real) {
			t.Errorf("domcapabilities differ:\n%s\n%s", plain, under)
		}
		// What libvirt learned of each, all of it, but for the file's own times.
		files := strings.Fields(h.Shell("grep -lE '<emulator>(" + real + "|" + ours + ")<' /var/cache/libvirt/qemu/capabilities/*.xml"))
		var learned []string
		for _, f := range files {
			text := strings.ReplaceAll(string(h.ReadFile(f)), ours, real)
			var kept []string
			for line := range strings.Lines(text) {
				if !strings.Contains(line, "<qemuctime>") {
					kept = append(kept, line)
				}
			}
			learned = append(learned, strings.Join(kept, ""))
		}
		if len(learned) != 2 || learned[0] != learned[1] {
			t.Errorf("what libvirt has learned differs: %q", files)
		}
		if a, b := h.Must(real, "--version"), h.Must(ours, "--version"); a != b {
			t.Errorf("%q, %q", a, b)
		}
		if strings.Contains(h.Must("virsh", "capabilities"), emulator.Dir) {
			t.Error("libvirt has found it by itself")
		}
	})

	t.Run("adopted", func(t *testing.T) {
		h := host.In(t)
		g := g.In(h)
		g.Start()
		h.Must("virt-trust", "emulator", "adopt", g.Name)
		if xml := h.Must("virsh", "dumpxml", g.Name); !strings.Contains(xml, "<emulator>"+real+"<") {
			t.Error("the running VM was changed")
		}
		unseals(t, g)
		g.Destroy()
		if now := h.Must("virsh", "dumpxml", "--inactive", "--security-info", g.Name); strings.ReplaceAll(now, ours, real) != before || now == before {
			t.Errorf("more than the emulator was changed:\n%s\n%s", before, now)
		}
		g.Start()
		unseals(t, g)
		pid := strings.TrimSpace(h.Must("cat", "/run/libvirt/qemu/measured.pid"))
		for of, want := range map[string]string{
			"readlink /proc/" + pid + "/exe":                     real,
			"cat /proc/" + pid + "/comm":                         qemu[:15],
			"tr '\\0' '\\n' </proc/" + pid + "/cmdline | sed 1q": ours,
			"stat -c %U /proc/" + pid:                            "libvirt-qemu",
		} {
			if got := strings.TrimSpace(h.Shell(of)); got != want {
				t.Errorf("%s: %q, want %q", of, got, want)
			}
		}
		if fds := h.Shell("ls -l /proc/" + pid + "/fd"); strings.Contains(fds, qemu) || strings.Contains(fds, "virt-trust") {
			t.Errorf("descriptors have leaked:\n%s", fds)
		}
		g.Say("reboot")
		g.Expect("VT: ready")
		unseals(t, g)
		h.Must("systemctl", "restart", "libvirtd")
		waitFor(t, "virsh answers", func() bool { return h.Run("virsh", "list").Code == 0 })
		h.Must("virsh", "save", g.Name, "/var/lib/libvirt/images/measured.save")
		h.Must("virsh", "restore", "/var/lib/libvirt/images/measured.save")
		unseals(t, g)
		h.Must("virsh", "managedsave", g.Name)
		if r := g.TryStart(); r.Code != 0 {
			t.Fatal(r.Stderr)
		}
		unseals(t, g)
		g.Destroy()
	})

	byHand := []string{ours, "-machine", "none", "-display", "none", "-S", "-uuid", g.UUID,
		"-chardev", "socket,id=c,path=/nowhere", "-tpmdev", "emulator,id=t,chardev=c"}
	t.Run("by hand", func(t *testing.T) {
		h := host.In(t)
		for _, user := range []string{"libvirt-qemu", "nobody", "root"} {
			r := h.RunAs(user, byHand...)
			if r.Code != 1 || strings.Count(r.Stderr, "\n") != 1 || !strings.HasPrefix(r.Stderr, "virt-trust: refused: policy-forbids: ") {
				t.Errorf("as %s: exit %d, %s%s", user, r.Code, r.Stdout, r.Stderr)
			}
		}
	})

	t.Run("another QEMU", func(t *testing.T) {
		h := host.In(t)
		g := g.In(h)
		// It is replaced when its digest has been taken for this start: at the
		// hook that comes right before.
		h.WriteFile("/etc/libvirt/hooks/qemu.d/60-swap", []byte("#!/bin/sh\n[ \"$1 $2\" != 'measured start' ] || { cp "+real+" /root/other && printf X >>/root/other && mv /root/other "+real+"; }\n"), 0o755)
		h.Must("cp", "-a", real, "/root/real")
		r := g.TryStart()
		if r.Code == 0 || !strings.Contains(r.Stderr, "virt-trust: refused: "+string(reason.LauncherNotApproved)+": "+real) {
			t.Errorf("exit %d, %s", r.Code, r.Stderr)
		}
		h.Shell("rm /etc/libvirt/hooks/qemu.d/60-swap; cp -a /root/real " + real)
		starts(t, g)
	})

	t.Run("without virt-trustd", func(t *testing.T) {
		h := host.In(t)
		h.Shell("systemctl stop virt-trustd && systemctl mask --runtime virt-trustd")
		if r := none.TryStart(); r.Code != 0 {
			t.Errorf("a VM without a vTPM: %s", r.Stderr)
		}
		h.Must("virsh", "destroy", "none")
		if r := h.RunAs("libvirt-qemu", byHand...); r.Code != 1 || !strings.Contains(r.Stderr, string(reason.HelperUnreachable)) {
			t.Errorf("by hand: exit %d, %s", r.Code, r.Stderr)
		}
		h.Shell("systemctl unmask --runtime virt-trustd; systemctl start virt-trustd")
	})

	t.Run("required", func(t *testing.T) {
		h := host.In(t)
		other := h.NewVM(VM{Name: "other", TPM: true})
		h.Shell("cp -a /etc/virt-trust/virt-trustd.toml /root/; printf '\n[emulator]\nrequire = true\n' >>/etc/virt-trust/virt-trustd.toml; systemctl restart virt-trustd")
		refused(t, other, reason.PolicyForbids)
		h.Must("virt-trust", "emulator", "adopt", "--all")
		if r := other.TryStart(); r.Code != 0 {
			t.Error(r.Stderr)
		}
		h.Must("virsh", "managedsave", other.Name)
		h.Shell("cp -a /root/virt-trustd.toml /etc/virt-trust/; systemctl restart virt-trustd")
		h.Must("virt-trust", "emulator", "restore", other.Name)
		if r := other.TryStart(); r.Code != 0 {
			t.Errorf("from its managed save: %s", r.Stderr)
		}
		if xml := h.Must("virsh", "dumpxml", other.Name); !strings.Contains(xml, "<emulator>"+real+"<") {
			t.Error("the managed save image names another")
		}
		other.Destroy()
		h.Must("virt-trust", "emulator", "adopt", other.Name)
	})

	t.Run("removal", func(t *testing.T) {
		h := host.In(t)
		h.Must("virt-trust", "release", "--all")
		g := g.In(h)
		g.Start() // plain libvirt's vTPM, under virt-trust's emulator
		unseals(t, g)
		if r := h.Run("dpkg", "--remove", "virt-trust"); r.Code == 0 || !strings.Contains(r.Stdout+r.Stderr, "not removed") {
			t.Errorf("while a VM runs under it: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
		unseals(t, g)
		g.Destroy()
		h.Must("virt-trust", "emulator", "adopt", g.Name)
		h.Must("dpkg", "--purge", "virt-trust")
		h.Must("systemctl", "restart", "libvirtd")
		if now := h.Must("virsh", "dumpxml", "--inactive", "--security-info", g.Name); now != before {
			t.Errorf("not as it was:\n%s\n%s", before, now)
		}
		if left := h.Run("grep", "-rl", emulator.Dir, "/etc/libvirt/qemu"); strings.TrimSpace(left.Stdout) != "" {
			t.Errorf("left: %s", left.Stdout)
		}
		starts(t, g)
		if _, err := os.Stat(h.Path(emulator.Dir)); err == nil {
			t.Error("the emulator is left")
		}
	})
}
