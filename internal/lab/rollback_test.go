package lab

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/reason"
)

// settled waits until the TPM's counter was raised for all that was committed.
func settled(t *testing.T, h *Host) {
	t.Helper()
	waitFor(t, "the counter is raised", func() bool {
		var s struct {
			State string `json:"list_state"`
			Due   bool   `json:"raise_due"`
		}
		err := json.Unmarshal([]byte(h.Run("virt-trust", "status", "--json").Stdout), &s)
		return err == nil && s.State == "readable" && !s.Due
	})
}

// reverts is how often a VM's vTPM went back with a saved image.
func reverts(t *testing.T, g *Guest) int {
	t.Helper()
	settled(t, g.h)
	var vm struct{ Reverts int }
	if err := json.Unmarshal([]byte(g.h.Must("virt-trust", "show", "--json", g.Name)), &vm); err != nil {
		t.Fatal(err)
	}
	return vm.Reverts
}

// logged counts the journal's entries of an event.
func logged(h *Host, e journal.Event) int {
	out := h.Run("journalctl", "-q", "-o", "cat", "--no-pager", "MESSAGE_ID="+string(e)).Stdout
	return strings.Count(out, "\n")
}

// TestRollback puts older copies back, of one thing, of several, and of all
// that lies on the host's disk.
func TestRollback(t *testing.T) {
	t.Parallel()
	host := guarded(t, HostOptions{Name: "rollback"})
	g := sealed(t, host, VM{Name: "vault", TPM: true, Disk: "qcow2"})
	other := sealed(t, host, VM{Name: "other", TPM: true, Disk: "qcow2"})
	copyTo := func(h *Host, dir string) {
		h.Shell(fmt.Sprintf("mkdir %[1]s && cp -a /var/lib/virt-trust %[1]s/ && cp -a /var/lib/libvirt/swtpm %[1]s/", dir))
	}
	const putBack = "rm -rf /var/lib/virt-trust /var/lib/libvirt/swtpm && cp -a %[1]s/virt-trust /var/lib/ && cp -a %[1]s/swtpm /var/lib/libvirt/"

	t.Run("all of /var/lib, across a boot", func(t *testing.T) {
		h := host.In(t)
		g, other := g.In(h), other.In(h)
		settled(t, h)
		copyTo(h, "/root/older")
		g.Start()
		unseals(t, g)
		g.Ask("churn 3")
		g.Destroy()
		settled(t, h)
		h.Shell("systemctl stop libvirtd virt-trustd; " + fmt.Sprintf(putBack, "/root/older"))
		h.Reboot()
		refused(t, g, reason.ListRolledBack)
		refused(t, other, reason.ListRolledBack)
		if r := h.Run("virt-trust", "accept", "vault", "--rolled-back"); r.Code != 3 {
			t.Errorf("accept of a VM: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
		t.Log(h.Must("virt-trust", "accept", "--list-rolled-back"))
		starts(t, g)
		starts(t, other)
		if n := logged(h, journal.OlderAccepted); n != 1 {
			t.Errorf("%d entries in the journal that an older list was accepted", n)
		}
		if log := h.Must("virt-trust", "log"); !strings.Contains(log, "an older vTPM list, with 2 VMs, was accepted") {
			t.Errorf("log:\n%s", log)
		}
	})

	t.Run("state and list, while virt-trustd runs", func(t *testing.T) {
		h := host.In(t)
		g := g.In(h)
		copyTo(h, "/root/pair")
		g.Start()
		g.Ask("churn 3")
		g.Destroy()
		settled(t, h)
		h.Shell("cp -a /root/pair/virt-trust/vtpm-list /var/lib/virt-trust/; cp -a /root/pair/swtpm/. /var/lib/libvirt/swtpm/")
		refused(t, g, reason.ListRolledBack)
		h.Must("virt-trust", "repair", "--list")
		refused(t, g, reason.VTPMRolledBack)
		h.Must("virt-trust", "repair", "vault")
		starts(t, g)
		settled(t, h)
		h.Shell("cp -a /root/pair/swtpm/. /var/lib/libvirt/swtpm/")
		refused(t, g, reason.VTPMRolledBack)
		h.Must("virt-trust", "accept", "vault", "--rolled-back")
		starts(t, g)
	})

	t.Run("what a running VM wrote, by a power cut", func(t *testing.T) {
		h := host.In(t)
		g := g.In(h)
		g.Start()
		settled(t, h)
		copyTo(h, "/root/running")
		g.Ask("churn 3")
		settled(t, h)
		// swtpm has written, and does not write again.
		h.Shell(fmt.Sprintf("systemctl stop virt-trustd; cp -a /root/running/swtpm/. /var/lib/libvirt/swtpm/; rm -rf /var/lib/virt-trust/vtpm/%[1]s; cp -a /root/running/virt-trust/vtpm/%[1]s /var/lib/virt-trust/vtpm/; sync", g.UUID))
		h.PowerCut()
		refused(t, g, reason.VTPMRolledBack)
		h.Must("virt-trust", "accept", "vault", "--rolled-back")
		starts(t, g)
	})

	t.Run("the label, with its image", func(t *testing.T) {
		h := host.In(t)
		g := g.In(h)
		h.Must("cp", "-a", g.DiskPath, "/root/older.qcow2")
		h.Must("virt-trust", "adopt", "vault") // writes a new label
		h.Must("cp", "-a", "/root/older.qcow2", g.DiskPath)
		refused(t, g, reason.VTPMRolledBack)
		h.Must("virt-trust", "accept", "vault", "--rolled-back")
		starts(t, g)
	})

	t.Run("a saved image", func(t *testing.T) {
		h := host.In(t)
		g := g.In(h)
		const a, b = "/var/lib/libvirt/images/a.save", "/var/lib/libvirt/images/b.save"
		g.Start()
		h.Must("virsh", "save", g.Name, a)
		h.Must("virsh", "restore", a)
		unseals(t, g)
		g.Ask("churn 3")
		if n := reverts(t, g); n != 0 {
			t.Errorf("the newest image counts as a revert: %d", n)
		}
		h.Must("virsh", "save", g.Name, b)
		h.Must("virsh", "restore", a)
		unseals(t, g)
		if n := reverts(t, g); n != 1 {
			t.Errorf("an older image: %d reverts", n)
		}
		g.Destroy()
		h.Must("virsh", "restore", b)
		unseals(t, g)
		if n := reverts(t, g); n != 2 {
			t.Errorf("an image, and the VM had been stopped since: %d reverts", n)
		}
		g.Destroy()
		starts(t, g)
		if n := logged(h, journal.Reverted); n != 2 {
			t.Errorf("%d entries in the journal that the vTPM went back", n)
		}
		t.Log(h.Must("virt-trust", "show", "vault"))
		t.Log(h.Must("virt-trust", "status"))
	})
}
