package lab

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"virt-trust/internal/vtpm/reason"
)

// guarded boots a host with the package and a libvirtd that knows it.
func guarded(t *testing.T, options HostOptions) *Host {
	t.Helper()
	Require(t)
	deb, err := Deb()
	if err != nil {
		t.Fatal(err)
	}
	options.Deb = deb
	h := NewHost(t, options)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("virt-trustd's journal:\n%s", h.Run("journalctl", "-u", "virt-trustd", "--no-pager", "-n", "60", "-o", "short-precise").Stdout)
		}
	})
	return h
}

// secretOf is what a guest of this name seals in these tests.
func secretOf(g *Guest) string { return "the secret of " + g.Name }

// sealed starts a new VM whose guest seals its secret, and stops it.
func sealed(t *testing.T, h *Host, vm VM) *Guest {
	t.Helper()
	g := h.NewVM(vm)
	g.Start()
	seals(t, g)
	g.Destroy()
	return g
}

func seals(t *testing.T, g *Guest) {
	t.Helper()
	if got := g.Ask("seal " + secretOf(g)); got != "sealed "+secretOf(g) {
		t.Fatalf("%s: %s", g.Name, got)
	}
}

func unseals(t *testing.T, g *Guest) {
	t.Helper()
	if got := g.Ask("unseal"); got != "unsealed "+secretOf(g) {
		t.Errorf("%s: %s", g.Name, got)
	}
}

// starts wants a VM to start with its secret, and stops it.
func starts(t *testing.T, g *Guest) {
	t.Helper()
	g.Start()
	unseals(t, g)
	g.Destroy()
}

// refused wants a start to be refused with one line that has the reason and a
// way to mend it, and nothing to be altered by it.
func refused(t *testing.T, g *Guest, code reason.Code) {
	t.Helper()
	before := fingerprint(g)
	r := g.TryStart()
	if r.Code == 0 {
		t.Errorf("%s has started; it should have been refused for %s", g.Name, code)
		g.Destroy()
		return
	}
	want := fmt.Sprintf("virt-trust: refused: %s: ", code)
	if strings.Count(r.Stderr, "virt-trust: refused: ") != 1 || !strings.Contains(r.Stderr, want) {
		t.Errorf("%s: virsh says\n%s\nwithout exactly one %q", g.Name, r.Stderr, want)
	}
	if state := g.State(); state != "shut off" {
		t.Errorf("%s is %q after a refusal", g.Name, state)
	}
	if after := fingerprint(g); after != before {
		t.Errorf("%s: the refusal altered\n%s\nto\n%s", g.Name, before, after)
	}
	if check := verdict(t, g); check.Verdict != "refuse" || check.Reason != code {
		t.Errorf("virt-trust check %s: %+v, not %s", g.Name, check, code)
	}
}

// verdict is the answer of virt-trust check.
func verdict(t *testing.T, g *Guest) (v struct {
	Verdict string      `json:"verdict"`
	Reason  reason.Code `json:"reason"`
}) {
	t.Helper()
	r := g.h.Run("virt-trust", "check", "--json", g.Name)
	if err := json.Unmarshal([]byte(r.Stdout), &v); err != nil {
		t.Errorf("virt-trust check --json %s: exit %d, %v\n%s%s", g.Name, r.Code, err, r.Stdout, r.Stderr)
	}
	return v
}

// fingerprint is the content and ownership of a VM's vTPM state and image.
func fingerprint(g *Guest) string {
	script := `find "$1" -printf '%p %u %g %m\n' 2>/dev/null | sort; find "$1" -type f -exec sha256sum {} + 2>/dev/null | sort`
	if g.DiskPath != "" {
		script += `; stat -c '%n %U %G %a' "$2"; sha256sum <"$2"`
	}
	return g.h.Run("sh", "-c", script, "sh", "/var/lib/libvirt/swtpm/"+g.UUID, g.DiskPath).Stdout
}

// nowhere wants a guest's secret to be nowhere on the host's disk.
func nowhere(t *testing.T, g *Guest) {
	t.Helper()
	if found := g.h.SearchDisk(Mask(secretOf(g))); len(found) > 0 {
		t.Errorf("the vTPM of %s is in the clear at %q", g.Name, found)
	}
}

// waitFor waits for what takes libvirt or virt-trustd a moment.
func waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	for range 100 {
		if is() {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("not within 10 s: %s", what)
}

// known tells whether a VM is in the vTPM list.
func known(h *Host, g *Guest) bool {
	return strings.Contains(h.Must("virt-trust", "list", "--json"), g.UUID)
}

func TestLife(t *testing.T) {
	t.Parallel()
	host := guarded(t, HostOptions{Name: "life"})

	t.Run("starts, reboots, suspends, saves", func(t *testing.T) {
		h := host.In(t)
		g := h.NewVM(VM{Name: "main", TPM: true, Disk: "qcow2"})
		g.Start()
		seals(t, g)
		ek := g.Ask("ek")
		nowhere(t, g)
		g.Shutdown()

		g.Start()
		unseals(t, g)
		if got := g.Ask("ek"); got != ek {
			t.Errorf("EK after a restart: %s, not %s", got, ek)
		}
		g.Say("reboot")
		g.Expect("VT: ready")
		unseals(t, g)
		h.Must("virsh", "reset", g.Name)
		g.Expect("VT: ready")
		unseals(t, g)
		h.Must("virsh", "suspend", g.Name)
		h.Must("virsh", "resume", g.Name)
		unseals(t, g)
		g.Destroy()

		// The guest's memory has not seen the secret since this start.
		g.Start()
		h.Must("virsh", "managedsave", g.Name)
		nowhere(t, g)
		if r := g.TryStart(); r.Code != 0 {
			t.Fatalf("start from a managed save: %s", r.Stderr)
		}
		unseals(t, g)
		h.Must("virsh", "save", g.Name, "/var/lib/libvirt/images/main.save")
		h.Must("virsh", "restore", "/var/lib/libvirt/images/main.save")
		unseals(t, g)
		if got := g.Ask("ek"); got != ek {
			t.Errorf("EK after a restore: %s, not %s", got, ek)
		}
		g.Destroy()
		h.Must("qemu-img", "check", "-q", g.DiskPath)
		starts(t, g)
	})

	t.Run("ends by force", func(t *testing.T) {
		h := host.In(t)
		g := sealed(t, h, VM{Name: "forced", TPM: true, Disk: "qcow2"})
		for _, end := range []string{
			`kill -9 $(cat /run/libvirt/qemu/forced.pid)`,
			`kill -9 $(cat /run/libvirt/qemu/swtpm/*forced-swtpm.pid); virsh -q destroy forced 2>/dev/null || :`,
		} {
			g.Start()
			h.Shell(end)
			g.WaitState("shut off")
		}
		starts(t, g)
	})

	t.Run("libvirtd and virt-trustd die and restart", func(t *testing.T) {
		h := host.In(t)
		g := sealed(t, h, VM{Name: "lasting", TPM: true, Disk: "qcow2"})
		for _, script := range []string{
			"systemctl restart virt-trustd",
			"systemctl kill -s KILL virt-trustd",
			"systemctl restart libvirtd",
			"systemctl kill -s KILL --kill-who=main libvirtd",
			"systemctl stop virt-trustd", // and D-Bus brings it back
		} {
			g.Start()
			h.Shell(script)
			h.TakenUp()
			if state := g.State(); state != "running" {
				t.Errorf("%s after %s", state, script)
			}
			unseals(t, g)
			g.Ask("churn 3")
			g.Destroy()
			starts(t, g)
		}
	})

	t.Run("undefine, rename", func(t *testing.T) {
		h := host.In(t)
		g := sealed(t, h, VM{Name: "brief", TPM: true, Disk: "qcow2"})
		h.Must("virsh", "domrename", "brief", "renamed")
		g.Name = "renamed"
		if r := h.Run("virsh", "start", "renamed"); r.Code != 0 {
			t.Errorf("renamed: %s", r.Stderr)
		}
		g.Destroy()
		waitFor(t, "the list has the new name", func() bool {
			return strings.Contains(h.Must("virt-trust", "list"), "renamed")
		})
		g.Undefine()
		waitFor(t, "an undefined VM leaves the list", func() bool { return !known(h, g) })

		kept := sealed(t, h, VM{Name: "kept", TPM: true, Disk: "qcow2"})
		kept.Undefine("--keep-tpm")
		h.Must("virsh", "define", kept.xmlPath())
		starts(t, kept)

		// Nobody is connected to a libvirtd that has just been started.
		for range 3 {
			h.Shell("systemctl restart libvirtd; virsh undefine kept --nvram; virsh define " + kept.xmlPath() + "; virsh start kept --paused")
			kept.Destroy()
		}
	})

	t.Run("transient", func(t *testing.T) {
		h := host.In(t)
		g := h.NewVM(VM{Name: "passing", TPM: true, Disk: "qcow2", Transient: true})
		for range 2 {
			g.Start()
			seals(t, g)
			unseals(t, g)
			g.Destroy()
			g.WaitState("")
		}
		g = h.NewVM(VM{Name: "staying", TPM: true, Disk: "qcow2", Transient: true, PersistentState: true})
		g.Start()
		seals(t, g)
		g.Destroy()
		starts(t, g)
		nowhere(t, g)
	})

	for _, vm := range []VM{
		{Name: "raw", TPM: true, Disk: "raw"},
		{Name: "volume", TPM: true, Disk: "volume"},
		{Name: "diskless", TPM: true},
		{Name: "ovmf", TPM: true, Disk: "qcow2", Firmware: "ovmf"},
	} {
		t.Run("a VM like "+vm.Name, func(t *testing.T) {
			g := sealed(t, host.In(t), vm)
			starts(t, g)
			nowhere(t, g)
		})
	}

	t.Run("a TPM 1.2", func(t *testing.T) {
		g := host.In(t).NewVM(VM{Name: "old", TPM: true, TPMVersion: "1.2", Disk: "qcow2"})
		for range 2 {
			if r := g.TryStart(); r.Code != 0 {
				t.Fatal(r.Stderr)
			}
			g.Destroy()
		}
		// Bytes 4 and 5 of swtpm's header are flags: encrypted, with 256 bits.
		if state := g.h.ReadFile("/var/lib/libvirt/swtpm/" + g.UUID + "/tpm1.2/tpm-00.permall"); state[5] != 9 {
			t.Errorf("flags of the state: %#x", state[5])
		}
	})

	t.Run("many at once", func(t *testing.T) {
		h := host.In(t)
		const n = 8
		var guests [n]*Guest
		for i := range guests {
			guests[i] = h.NewVM(VM{Name: fmt.Sprintf("many%d", i), TPM: true, Disk: "qcow2"})
		}
		var wg sync.WaitGroup
		for _, g := range guests {
			wg.Go(func() {
				if r := h.Run("virsh", "start", "--paused", g.Name); r.Code != 0 {
					t.Errorf("%s: %s", g.Name, r.Stderr)
				}
			})
		}
		wg.Wait()
		for _, g := range guests {
			wg.Go(func() { h.Run("virsh", "destroy", g.Name) })
		}
		wg.Wait()
		for _, g := range guests {
			if v := verdict(t, g); v.Verdict != "start" {
				t.Errorf("%s: %+v", g.Name, v)
			}
		}
	})

	t.Run("virt-install", func(t *testing.T) {
		h := host.In(t)
		// virt-manager's defaults for a guest that wants a TPM, without a word of virt-trust.
		r := h.Run("virt-install", "--name", "installed", "--memory", "256", "--virt-type", "qemu", "--cpu", "mode=maximum",
			"--osinfo", "detect=on,require=off", "--tpm", "emulator", "--boot", "uefi", "--disk", "size=1", "--import",
			"--network", "none", "--graphics", "none", "--noautoconsole")
		if r.Code != 0 {
			t.Fatalf("%s%s", r.Stdout, r.Stderr)
		}
		h.Must("virsh", "destroy", "installed")
		if list := h.Must("virt-trust", "list"); !strings.Contains(list, "installed") {
			t.Errorf("not in the list:\n%s", list)
		}
	})
}

// TestWithout shows that VMs without a vTPM need no virt-trustd, and that
// those with one get a prompt answer when it is away.
func TestWithout(t *testing.T) {
	t.Parallel()
	host := guarded(t, HostOptions{Name: "without"})
	h := host.In(t)
	none := h.NewVM(VM{Name: "none", Disk: "qcow2"})
	g := sealed(t, h, VM{Name: "guarded", TPM: true, Disk: "qcow2"})

	for _, away := range []string{
		"systemctl stop virt-trustd && systemctl mask --runtime virt-trustd && systemctl daemon-reload",
		"mv /usr/libexec/virt-trust/virt-trustd /root/",
	} {
		t.Run(away, func(t *testing.T) {
			h := host.In(t)
			h.Shell(away)
			if r := none.TryStart(); r.Code != 0 {
				t.Errorf("a VM without a vTPM: %s", r.Stderr)
			}
			h.Run("virsh", "destroy", "none")
			r := h.Run("virsh", "start", "guarded")
			if r.Code == 0 || !strings.Contains(r.Stderr, "virt-trust: refused: "+string(reason.HelperUnreachable)) {
				t.Errorf("a VM with a vTPM: exit %d, %s", r.Code, r.Stderr)
			}
			if r.Took > 30*time.Second {
				t.Errorf("the refusal took %.1f s", r.Took.Seconds())
			}
		})
	}
	h.Shell("mv /root/virt-trustd /usr/libexec/virt-trust/; systemctl unmask --runtime virt-trustd; systemctl daemon-reload; systemctl reset-failed virt-trustd || :; systemctl start virt-trustd")
	starts(t, g)

	// libvirt takes a hook that is gone for none; the encrypted state must
	// still not load.
	h.Shell("mv /etc/libvirt/hooks/qemu.d/50-virt-trust /root/; systemctl restart libvirtd")
	if r := g.TryStart(); r.Code == 0 {
		t.Errorf("started without the hook")
		g.Destroy()
	}
	h.Shell("mv /root/50-virt-trust /etc/libvirt/hooks/qemu.d/; systemctl restart libvirtd")
	starts(t, g)

	// So it does with a link to a program that is gone, whether or not it has found
	// the hook before.
	h.Shell("mv /usr/libexec/virt-trust/virt-trust-hook /root/")
	for range 2 {
		if r := none.TryStart(); r.Code != 0 {
			t.Errorf("a VM without a vTPM does not start without the hook's program: %s", r.Stderr)
		}
		h.Run("virsh", "destroy", "none")
		if r := g.TryStart(); r.Code == 0 {
			t.Errorf("started without the hook's program")
			g.Destroy()
		}
		if r := h.Run("virt-trust", "status"); !strings.Contains(r.Stdout, "hook-missing") {
			t.Errorf("status: %s", r.Stdout)
		}
		h.Must("systemctl", "restart", "libvirtd")
	}
	h.Shell("mv /root/virt-trust-hook /usr/libexec/virt-trust/; systemctl restart libvirtd")
	starts(t, g)
	// At some events the hook ends before libvirt has written the XML.
	if told := h.Shell("journalctl --no-pager -u libvirtd | grep -iE 'broken pipe|EPIPE' || :"); told != "" {
		t.Errorf("libvirt says: %s", told)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	host := guarded(t, HostOptions{Name: "refusals"})
	h := host.In(t)
	a := sealed(t, h, VM{Name: "alice", TPM: true, Disk: "qcow2"})
	b := sealed(t, h, VM{Name: "bob", TPM: true, Disk: "qcow2"})
	state := a.StateDir() + "/tpm2-00.permall"

	// An older copy of alice's state and image, and then newer ones.
	h.Shell("cp -a " + a.StateDir() + " /root/older; cp -a " + a.DiskPath + " /root/older.qcow2")
	a.Start()
	a.Ask("write something newer")
	a.Destroy()

	for _, c := range []struct {
		what   string
		code   reason.Code
		script string
	}{
		{"edited", reason.VTPMChanged, "printf X | dd of=" + state + " bs=1 seek=100 conv=notrunc status=none"},
		{"truncated", reason.VTPMChanged, "truncate -s 100 " + state},
		{"emptied", reason.VTPMChanged, "truncate -s 0 " + state},
		{"deleted", reason.VTPMMissing, "rm " + state},
		{"deleted with its folder", reason.VTPMMissing, "rm -r " + a.StateDir()},
		{"replaced by another VM's", reason.VTPMChanged, "cp -p " + b.StateDir() + "/tpm2-00.permall " + state},
		{"replaced by an older copy", reason.VTPMRolledBack, "rm -r " + a.StateDir() + "; cp -a /root/older " + a.StateDir()},
		{"with a planted volatile state", reason.VTPMChanged, "cp -p " + state + " " + a.StateDir() + "/tpm2-00.volatilestate"},
	} {
		t.Run("vTPM "+c.what, func(t *testing.T) {
			h, a := host.In(t), a.In(host.In(t))
			h.Shell("rm -rf /root/good; cp -a /var/lib/libvirt/swtpm/" + a.UUID + " /root/good")
			h.Shell(c.script)
			refused(t, a, c.code)
			h.Shell("rm -rf /var/lib/libvirt/swtpm/" + a.UUID + "; cp -a /root/good /var/lib/libvirt/swtpm/" + a.UUID)
			if v := verdict(t, a); v.Verdict != "start" {
				t.Errorf("with the good state back: %+v", v)
			}
			h.Shell(c.script)
			if strings.HasPrefix(c.what, "with a planted") {
				h.Shell("rm " + a.StateDir() + "/tpm2-00.volatilestate") // by hand, as the advice says
			} else if r := h.Run("virt-trust", "repair", a.Name); r.Code != 0 {
				t.Errorf("repair: exit %d, %s", r.Code, r.Stderr)
			}
			if v := verdict(t, a); v.Verdict != "start" {
				t.Errorf("after a repair: %+v", v)
				h.Shell("rm -rf /var/lib/libvirt/swtpm/" + a.UUID + "; cp -a /root/good /var/lib/libvirt/swtpm/" + a.UUID)
			}
		})
	}
	t.Run("the repaired VM has all it had", func(t *testing.T) {
		a := a.In(host.In(t))
		a.Start()
		unseals(t, a)
		if got := a.Ask("read"); got != "read something newer" {
			t.Errorf("%s", got)
		}
		a.Destroy()
	})

	// A conversion carries no header extension, and so no label.
	unlabelled := "qemu-img convert -O qcow2 " + a.DiskPath + " /root/new.qcow2; cat /root/new.qcow2 >" + a.DiskPath
	for _, c := range []struct {
		what   string
		code   reason.Code
		script string
	}{
		{"removed", reason.LabelMissing, unlabelled},
		{"copied from another VM", reason.LabelOtherVM, "cat " + b.DiskPath + " >" + a.DiskPath},
		{"edited", reason.LabelDamaged, `off=$(grep -abo 1RTV ` + a.DiskPath + ` | head -n1 | cut -d: -f1); [ -n "$off" ] || off=$(grep -abo VTR1 ` + a.DiskPath + ` | head -n1 | cut -d: -f1); printf '\377' | dd of=` + a.DiskPath + ` bs=1 seek=$((off+60)) conv=notrunc status=none`},
	} {
		t.Run("label "+c.what, func(t *testing.T) {
			h, a := host.In(t), a.In(host.In(t))
			h.Shell("cp -a " + a.DiskPath + " /root/good.qcow2")
			h.Shell(c.script)
			refused(t, a, c.code)
			h.Shell("cat /root/good.qcow2 >" + a.DiskPath)
			if v := verdict(t, a); v.Verdict != "start" {
				t.Errorf("with the good image back: %+v", v)
			}
			if c.code == reason.LabelOtherVM {
				return // nothing to write a label into
			}
			h.Shell(c.script)
			if r := h.Run("virt-trust", "repair", a.Name); r.Code != 0 {
				t.Errorf("repair: exit %d, %s", r.Code, r.Stderr)
			}
			if v := verdict(t, a); v.Verdict != "start" {
				t.Errorf("after a repair: %+v", v)
				h.Shell("cat /root/good.qcow2 >" + a.DiskPath)
			}
		})
	}

	t.Run("a copy of the VM", func(t *testing.T) {
		h := host.In(t)
		h.Shell("cp -a " + a.DiskPath + " /var/lib/libvirt/images/copy.qcow2")
		copied := h.NewVM(VM{Name: "copy", TPM: true, Disk: "qcow2", DiskPath: "/var/lib/libvirt/images/copy.qcow2"})
		refused(t, copied, reason.LabelOtherVM)
		h.Must("virt-trust", "adopt", "copy")
		copied.Start()
		if got := copied.Ask("unseal"); !strings.HasPrefix(got, "unseal failed") {
			t.Errorf("an adopted copy has the original's vTPM: %s", got)
		}
		copied.Destroy()
		starts(t, a.In(h))
	})

	for what, c := range map[string]struct{ log, said string }{
		"ends at once": {"mkdir", "swtpm ended before it had made its control socket; see its log"},
		"hangs":        {"mkfifo", "swtpm has not made its control socket for 5s; see its log"}, // nobody reads it
	} {
		t.Run("a swtpm that "+what, func(t *testing.T) {
			h, a := host.In(t), a.In(host.In(t))
			log := "/var/log/swtpm/libvirt/qemu/" + a.Name + "-swtpm.log"
			h.Shell("mv " + log + " " + log + ".away && " + c.log + " " + log + " && chown tss " + log)
			r := a.TryStart() // 'virt-trust check' cannot foresee it
			if want := "virt-trust: refused: key-not-released: " + c.said; r.Code == 0 || !strings.Contains(r.Stderr, want) {
				t.Errorf("exit %d, %s", r.Code, r.Stderr)
			}
			h.Shell("rm -d " + log + " && mv " + log + ".away " + log)
			if left := h.Shell("ls /run/libvirt/qemu/swtpm"); strings.Contains(left, ".sock") {
				t.Errorf("left behind: %s", left)
			}
			starts(t, a)
		})
	}

	t.Run("by hand", func(t *testing.T) {
		h, a := host.In(t), a.In(host.In(t))
		wrapper := []string{
			"/usr/libexec/virt-trust/bin/swtpm", "socket", "--ctrl", "type=unixio,path=/tmp/byhand.sock",
			"--tpmstate", "dir=" + a.StateDir() + ",mode=0600", "--terminate", "--tpm2",
		}
		for _, running := range []bool{false, true} {
			if running {
				a.Start()
			}
			r := h.RunAs("tss", append([]string{"timeout", "5"}, wrapper...)...)
			if r.Code != 1 || !strings.Contains(r.Stderr, "virt-trust: refused: "+string(reason.KeyNotReleased)) {
				t.Errorf("wrapper (VM running: %v): exit %d, %q", running, r.Code, r.Stderr)
			}
			before := fingerprint(a)
			r = h.RunInput(h.Must("virsh", "dumpxml", "alice"), "/etc/libvirt/hooks/qemu.d/50-virt-trust", "alice", "prepare", "begin", "-")
			if r.Code != 1 || strings.Count(r.Stderr, "\n") != 1 || r.Stdout != "" {
				t.Errorf("hook (VM running: %v): exit %d, %q, %q", running, r.Code, r.Stdout, r.Stderr)
			}
			r = h.RunInput(h.Must("virsh", "dumpxml", "alice"), "/etc/libvirt/hooks/qemu.d/50-virt-trust", "alice", "unheard-of", "begin", "-")
			if r.Code != 0 || r.Stdout+r.Stderr != "" {
				t.Errorf("hook, unknown operation: exit %d, %q, %q", r.Code, r.Stdout, r.Stderr)
			}
			if after := fingerprint(a); after != before {
				t.Errorf("by hand, the hook altered\n%s\nto\n%s", before, after)
			}
		}
		a.Destroy()
		for _, user := range []string{"nobody", "libvirt-qemu", "tss"} {
			for _, call := range [][]string{
				{"HandleHook", "ssssa{sv}", "prepare", "begin", "-", "<domain/>", "0"},
				{"Release", "sa{sv}", "alice", "0"},
				{"Log", "ua{sv}", "10", "0"},
			} {
				r := h.RunAs(user, append([]string{"busctl", "call", "org.virttrust1", "/org/virttrust1", "org.virttrust1.Manager"}, call...)...)
				if r.Code == 0 || !strings.Contains(r.Stderr, "denied") {
					t.Errorf("%s by %s: exit %d, %s%s", call[0], user, r.Code, r.Stdout, r.Stderr)
				}
			}
		}
		starts(t, a)
	})

	list := "/var/lib/virt-trust/vtpm-list"
	for _, c := range []struct{ what, script string }{
		{"edited", "printf X | dd of=" + list + " bs=1 seek=200 conv=notrunc status=none"},
		{"deleted", "rm " + list},
		{"truncated", "truncate -s 20 " + list},
		{"replaced by an older one", "cp -a /root/older-list " + list},
	} {
		t.Run("list "+c.what, func(t *testing.T) {
			h, a := host.In(t), a.In(host.In(t))
			h.Shell("cp -a " + list + " /root/older-list")
			starts(t, a)
			h.Shell("cp -a " + list + " /root/good-list")
			h.Shell(c.script)
			r := a.TryStart()
			if r.Code == 0 || !strings.Contains(r.Stderr, "virt-trust: refused: list-") {
				t.Errorf("exit %d, %s", r.Code, r.Stderr)
				a.Destroy()
			}
			if r := h.Run("virt-trust", "repair", "--list"); r.Code != 0 {
				t.Errorf("repair --list: exit %d, %s%s", r.Code, r.Stdout, r.Stderr)
				h.Shell("systemctl stop virt-trustd; cp -a /root/good-list " + list + "; systemctl start virt-trustd")
			}
			starts(t, a)
		})
	}
}

// TestHostState is about the host: its PCRs, its TPM, its power.
func TestHostState(t *testing.T) {
	t.Parallel()
	host := guarded(t, HostOptions{Name: "state"})
	g := sealed(t, host.In(t), VM{Name: "guest", TPM: true, Disk: "qcow2"})

	t.Run("reboot", func(t *testing.T) {
		host := host.In(t)
		host.Reboot()
		starts(t, g.In(host))
	})
	t.Run("other PCRs", func(t *testing.T) {
		host := host.In(t)
		g := g.In(host)
		host.ExtendPCR(7)
		host.Must("systemctl", "restart", "virt-trustd")
		refused(t, g, reason.HostNotApproved)
		list := host.Run("virt-trust", "list")
		if !strings.Contains(list.Stdout, g.UUID) {
			t.Errorf("virt-trust list says nothing of what is known without the list: %s%s", list.Stdout, list.Stderr)
		}
		host.Reboot()
		starts(t, g)
	})
	t.Run("a PCR that does not count", func(t *testing.T) {
		host := host.In(t)
		host.ExtendPCR(10)
		host.Must("systemctl", "restart", "virt-trustd")
		starts(t, g.In(host))
	})
	t.Run("the TPM goes and comes back", func(t *testing.T) {
		host := host.In(t)
		g := g.In(host)
		host.StopTPM()
		r := g.TryStart()
		if r.Code == 0 || !strings.Contains(r.Stderr, "virt-trust: refused: tpm-") {
			t.Errorf("without a TPM: exit %d, %s", r.Code, r.Stderr)
			g.Destroy()
		}
		host.StartTPM()
		starts(t, g)
	})
	t.Run("power cuts", func(t *testing.T) {
		host := host.In(t)
		g := g.In(host)
		for range 2 {
			g.Start()
			g.Say("churn 1000")
			time.Sleep(700 * time.Millisecond)
			host.PowerCut()
			starts(t, g)
		}
		g.Start()
		host.PowerCut()
		starts(t, g)
	})
	t.Run("an update that changes PCRs", func(t *testing.T) {
		host := host.In(t)
		g := g.In(host)
		host.Must("virt-trust", "release", "--all")
		host.Shell("systemctl stop virt-trustd && rm -r /var/lib/virt-trust")
		host.ExtendPCR(4)
		host.Must("systemctl", "start", "virt-trustd")
		starts(t, g) // adopted on the way
		if !known(host, g) {
			t.Error("not in the new list")
		}
	})
	t.Run("the image on another host", func(t *testing.T) {
		host := host.In(t)
		other := guarded(t, HostOptions{Name: "other"})
		image := host.ReadFile(g.DiskPath)
		state := host.ReadFile(g.StateDir() + "/tpm2-00.permall")
		other.WriteFile(g.DiskPath, image, 0o644)
		stolen := other.NewVM(g.VM)
		refused(t, stolen, reason.LabelOtherHost)
		other.Shell("install -d -o tss -g tss -m 700 " + g.StateDir())
		other.WriteFile(g.StateDir()+"/tpm2-00.permall", state, 0o600)
		other.Shell("chown -R tss:tss " + g.StateDir())
		if r := stolen.TryStart(); r.Code == 0 || !strings.Contains(r.Stderr, "virt-trust: refused: ") {
			t.Errorf("with its vTPM: exit %d, %s", r.Code, r.Stderr)
		}
	})
	t.Run("TPM cleared", func(t *testing.T) {
		host := host.In(t)
		g := g.In(host)
		host.ClearTPM()
		host.Must("systemctl", "restart", "virt-trustd")
		before := fingerprint(g)
		r := g.TryStart()
		if r.Code == 0 || !strings.Contains(r.Stderr, "virt-trust: refused: ") {
			t.Errorf("exit %d, %s", r.Code, r.Stderr)
			g.Destroy()
		}
		if fingerprint(g) != before {
			t.Errorf("state or image altered")
		}
		// The way back: new keys, and what cannot be read any more is set aside.
		host.Shell("systemctl stop virt-trustd && rm -r /var/lib/virt-trust && systemctl start virt-trustd")
		refused(t, g, reason.LabelOtherHost)
		if r := host.Run("virt-trust", "adopt", g.Name); r.Code != 3 {
			t.Errorf("adoption of what cannot be read: exit %d, %s%s", r.Code, r.Stdout, r.Stderr)
		}
		host.Must("virt-trust", "adopt", "--new", g.Name)
		g.Start()
		seals(t, g)
		g.Destroy()
		starts(t, g)
		if aside := host.Must("ls", "/var/lib/virt-trust/set-aside"); !strings.Contains(aside, g.UUID) {
			t.Errorf("set aside: %q", aside)
		}
	})
}

// TestAdoption takes a host full of plain vTPMs into the list and back.
func TestAdoption(t *testing.T) {
	t.Parallel()
	Require(t)
	deb, err := Deb()
	if err != nil {
		t.Fatal(err)
	}
	host := NewHost(t, HostOptions{Name: "adoption"})
	h := host.In(t)
	var guests []*Guest
	for _, vm := range []VM{
		{Name: "first", TPM: true, Disk: "qcow2"},
		{Name: "second", TPM: true, Disk: "raw"},
		{Name: "running", TPM: true, Disk: "qcow2"},
	} {
		guests = append(guests, sealed(t, h, vm))
	}
	secret := randomUUID()
	h.WriteFile("/root/secret.xml", []byte("<secret ephemeral='no' private='yes'><uuid>"+secret+"</uuid><usage type='vtpm'><name>own</name></usage></secret>"), 0o600)
	h.Must("virsh", "secret-define", "/root/secret.xml")
	h.Must("virsh", "secret-set-value", secret, "--base64", "bGlidmlydCdzIG93biBwYXNzcGhyYXNl")
	own := sealed(t, h, VM{Name: "own", TPM: true, Disk: "qcow2", Secret: secret})
	saved := sealed(t, h, VM{Name: "saved", TPM: true, Disk: "qcow2"})
	saved.Start()
	h.Must("virsh", "managedsave", saved.Name)
	running := guests[2]
	running.Start()

	h.InstallDeb(deb)
	t.Run("a running VM goes on through the installation", func(t *testing.T) {
		h, running := host.In(t), running.In(host.In(t))
		unseals(t, running)
		h.Must("systemctl", "restart", "libvirtd")
		unseals(t, running)
		running.Ask("churn 2")
		running.Destroy()
	})
	t.Run("plain vTPMs keep their secrets", func(t *testing.T) {
		for _, g := range guests {
			g := g.In(host.In(t))
			plain := g.h.ReadFile(g.StateDir() + "/tpm2-00.permall")
			if !bytes.Contains(plain, Mask(secretOf(g))) {
				t.Fatalf("%s was not plain", g.Name)
			}
			starts(t, g)
			if now := g.h.ReadFile(g.StateDir() + "/tpm2-00.permall"); bytes.Contains(now, Mask(secretOf(g))) {
				t.Errorf("%s still is plain", g.Name)
			}
			starts(t, g)
		}
	})
	t.Run("a VM that was saved before goes on", func(t *testing.T) {
		saved := saved.In(host.In(t))
		if r := saved.TryStart(); r.Code != 0 {
			t.Fatal(r.Stderr)
		}
		unseals(t, saved)
		saved.Destroy()
		if now := saved.h.ReadFile(saved.StateDir() + "/tpm2-00.permall"); bytes.Contains(now, Mask(secretOf(saved))) {
			t.Errorf("%s still is plain", saved.Name)
		}
		starts(t, saved)
	})
	t.Run("libvirt's own encryption stays", func(t *testing.T) {
		own := own.In(host.In(t))
		starts(t, own)
		starts(t, own)
		before := own.h.ReadFile(own.StateDir() + "/tpm2-00.permall")
		own.h.Shell("printf X | dd of=" + own.StateDir() + "/tpm2-00.permall bs=1 seek=100 conv=notrunc status=none")
		refused(t, own, reason.VTPMChanged)
		own.h.WriteFile(own.StateDir()+"/tpm2-00.permall", before, 0o600)
		starts(t, own)
	})
	t.Run("removal does not strand vTPMs", func(t *testing.T) {
		h := host.In(t)
		if r := h.Run("dpkg", "--remove", "virt-trust"); r.Code == 0 || !strings.Contains(r.Stdout+r.Stderr, "virt-trust release --all") {
			t.Errorf("dpkg --remove: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
		starts(t, guests[0].In(h))
		h.Must("virt-trust", "release", "--all")
		h.Shell("touch " + hookLink + ".dpkg-bak") // as of a script that the admin had changed
		h.Must("dpkg", "--purge", "virt-trust")
		h.Must("systemctl", "restart", "libvirtd")
		for _, g := range append(guests, own, saved) {
			starts(t, g.In(h))
		}
		for _, path := range []string{"/var/lib/virt-trust", "/etc/virt-trust", "/run/virt-trust", "/usr/libexec/virt-trust", hookLink, hookLink + ".dpkg-bak"} {
			if _, err := os.Lstat(h.Path(path)); err == nil {
				t.Errorf("%s is left after a purge", path)
			}
		}
	})
	t.Run("reinstallation", func(t *testing.T) {
		h := host.In(t)
		h.InstallDeb(deb)
		h.Must("systemctl", "restart", "libvirtd")
		starts(t, guests[0].In(h))
		if !known(h, guests[0]) {
			t.Errorf("not adopted again")
		}
	})
}

// TestMigrationRefused shows that a guarded VM runs on at its source when a
// migration is refused.
func TestMigrationRefused(t *testing.T) {
	t.Parallel()
	Require(t)
	share := t.TempDir()
	if err := os.Chmod(share, 0o777); err != nil {
		t.Fatal(err)
	}
	from := guarded(t, HostOptions{Name: "from", Share: share})
	to := guarded(t, HostOptions{Name: "to", Share: share})
	Link(from, to)
	from.OpenTCP()
	to.OpenTCP()
	g := from.NewVM(VM{Name: "resident", TPM: true, Disk: "qcow2", Shared: true})
	g.Start()
	seals(t, g)
	r := g.Migrate(to)
	if r.Code == 0 || !strings.Contains(r.Stderr, "virt-trust: refused: "+string(reason.VMElsewhere)) {
		t.Errorf("migrate: exit %d, %s", r.Code, r.Stderr)
	}
	unseals(t, g)
	g.Destroy()
	starts(t, g)
}
