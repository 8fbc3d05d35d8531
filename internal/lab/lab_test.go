package lab

import (
	"os"
	"strings"
	"testing"
)

// TestPlainLibvirt shows that a host does what scenarios rest on: real
// libvirt, a guest that keeps a secret in its vTPM, and a search of the disk
// that finds what plain libvirt leaves there in the clear.
func TestPlainLibvirt(t *testing.T) {
	Require(t)
	h := NewHost(t, HostOptions{Name: "plain"})

	t.Run("the host's TPM", func(t *testing.T) {
		h := h.In(t)
		read := func() string {
			return h.Must("tpm2_pcrread", "-T", "swtpm:path="+TPMSocket, "sha256:7")
		}
		before := read()
		h.ExtendPCR(7)
		if read() == before {
			t.Errorf("PCR 7 is as before: %s", before)
		}
		h.RestartTPM()
		if after := read(); after != before {
			t.Errorf("PCR 7 after a restart: %s, not %s", after, before)
		}
	})

	t.Run("a guest's secret", func(t *testing.T) {
		h := h.In(t)
		g := h.NewVM(VM{Name: "sealer", TPM: true, Disk: "qcow2"})
		g.Start()
		const secret = "the guest's own secret"
		if got := g.Ask("seal " + secret); got != "sealed "+secret {
			t.Fatalf("seal: %s", got)
		}
		ek := g.Ask("ek")
		g.Shutdown()
		g.Start()
		if got := g.Ask("unseal"); got != "unsealed "+secret {
			t.Errorf("unseal after a restart: %s", got)
		}
		if got := g.Ask("ek"); got != ek {
			t.Errorf("EK after a restart: %s, not %s", got, ek)
		}
		if got := g.Ask("extend 12"); got != "extended 12" {
			t.Errorf("extend: %s", got)
		}
		if got := g.Ask("unseal"); !strings.HasPrefix(got, "unseal failed") {
			t.Errorf("unseal with other PCRs: %s", got)
		}
		g.Say("reboot")
		g.Expect("VT: ready")
		if got := g.Ask("unseal"); got != "unsealed "+secret {
			t.Errorf("unseal after a reboot: %s", got)
		}
		g.Destroy()
		found := h.SearchDisk(Mask(secret))
		if len(found) < 2 || found[0] != g.StateDir()+"/tpm2-00.permall" {
			t.Errorf("plain libvirt leaves the vTPM in the clear; found only at %q", found)
		}
		if found := h.SearchDisk([]byte(randomHex(16))); len(found) > 0 {
			t.Errorf("found what is nowhere: %q", found)
		}
	})
}

// TestHosts shows what several hosts, their reboots and power cuts are worth.
func TestHosts(t *testing.T) {
	Require(t)
	share := t.TempDir()
	if err := os.Chmod(share, 0o777); err != nil {
		t.Fatal(err)
	}
	a := NewHost(t, HostOptions{Name: "a", Share: share})
	b := NewHost(t, HostOptions{Name: "b", Share: share})

	t.Run("migration", func(t *testing.T) {
		a, b := a.In(t), b.In(t)
		Link(a, b)
		a.OpenTCP()
		b.OpenTCP()
		g := a.NewVM(VM{Name: "traveller", TPM: true, Disk: "qcow2", Shared: true})
		g.Start()
		g.Ask("seal the traveller's")
		if r := g.Migrate(b); r.Code != 0 {
			t.Fatalf("migrate: %s", r.Stderr)
		}
		if state := g.State(); state != "" {
			t.Errorf("still %s at its source", state)
		}
		there := g.In(b)
		if got := there.Ask("unseal"); got != "unsealed the traveller's" {
			t.Errorf("at the destination: %s", got)
		}
		there.Destroy()
	})

	t.Run("reboot", func(t *testing.T) {
		a := a.In(t)
		id := a.Must("cat", "/etc/machine-id", "/proc/sys/kernel/hostname")
		a.Shell("echo kept >/root/kept; echo lost >/run/lost")
		a.ExtendPCR(4)
		pcr := a.Must("tpm2_pcrread", "-T", "swtpm:path="+TPMSocket, "sha256:4")
		a.Reboot()
		t.Logf("reboot in %.1f s", a.BootTime.Seconds())
		if now := a.Must("cat", "/etc/machine-id", "/proc/sys/kernel/hostname"); now != id {
			t.Errorf("another host: %s, not %s", now, id)
		}
		a.Shell("test -e /root/kept; test ! -e /run/lost")
		if now := a.Must("tpm2_pcrread", "-T", "swtpm:path="+TPMSocket, "sha256:4"); now == pcr {
			t.Errorf("PCR 4 survived: %s", now)
		}
	})

	t.Run("power cut", func(t *testing.T) {
		a := a.In(t)
		a.Shell("echo kept >/root/synced; sync; echo lost >/root/unsynced")
		a.PowerCut()
		t.Logf("up again in %.1f s", a.BootTime.Seconds())
		a.Must("grep", "-q", "kept", "/root/synced")
		if r := a.Run("grep", "-q", "lost", "/root/unsynced"); r.Code == 0 {
			t.Errorf("what was not synced is there")
		}
	})
}
