package lab

import (
	"encoding/json"
	"strings"
	"testing"

	"virt-trust/internal/vtpm/reason"
)

// refusedBy wants a command to be refused, with this code.
func refusedBy(t *testing.T, r Result, code reason.Code) {
	t.Helper()
	if r.Code != 3 || !strings.Contains(r.Stderr, "virt-trust: refused: "+string(code)+": ") {
		t.Errorf("exit %d, want a refusal with %s: %s%s", r.Code, code, r.Stdout, r.Stderr)
	}
}

// recoveryState is what virt-trust status says of the recovery key.
func recoveryState(t *testing.T, h *Host) string {
	t.Helper()
	var s struct {
		Key string `json:"recovery_key"`
	}
	if err := json.Unmarshal([]byte(h.Run("virt-trust", "status", "--json").Stdout), &s); err != nil {
		t.Fatal(err)
	}
	return s.Key
}

// TestRecovery has a host go through all that its TPM, its firmware and its
// files can do to it. Each time its guest still unseals its secret.
func TestRecovery(t *testing.T) {
	t.Parallel()
	host := guarded(t, HostOptions{Name: "recovery"})
	g := sealed(t, host.In(t), VM{Name: "guest", TPM: true, Disk: "qcow2"})
	const key = "/root/recovery.key"
	once := "" // a key that was shown, and replaced

	t.Run("made, shown once, confirmed", func(t *testing.T) {
		host := host.In(t)
		if s := recoveryState(t, host); s != "none" {
			t.Errorf("at first: %q", s)
		}
		if log := host.Must("journalctl", "-u", "virt-trustd", "MESSAGE_ID=0563ba3de98c4742a5bbba58da6db90e", "-o", "cat"); !strings.Contains(log, "no recovery key") {
			t.Error("the journal does not remind of it")
		}
		shown := host.Must("virt-trust", "recovery", "new")
		if _, after, found := strings.Cut(shown, "AGE-SECRET-KEY-1"); found {
			once = "AGE-SECRET-KEY-1" + strings.TrimSpace(after)
		} else {
			t.Fatalf("not shown: %s", shown)
		}
		refusedBy(t, host.Run("virt-trust", "recovery", "new"), reason.PolicyForbids)
		t.Log(host.Must("virt-trust", "recovery", "new", "--replace", "--output", key))
		if s := recoveryState(t, host); s != "unconfirmed" {
			t.Errorf("made: %q", s)
		}
		refusedBy(t, host.RunInput(once, "virt-trust", "recovery", "confirm"), reason.KeyNotReleased)
		t.Log(host.Must("virt-trust", "recovery", "confirm", "-i", key), host.Must("virt-trust", "recovery", "show"))
		if s := recoveryState(t, host); s != "confirmed" {
			t.Errorf("confirmed: %q", s)
		}
		if at := host.SearchDisk([]byte(once[20:60])); len(at) > 0 {
			t.Errorf("the key that was shown once is at %v", at)
		}
		if s := host.Must("virt-trust", "show", g.Name); !strings.Contains(s, "wrapped to the recovery key") {
			t.Error(s)
		}
	})
	t.Run("firmware update without approval", func(t *testing.T) {
		host := host.In(t)
		g := g.In(host)
		host.ExtendPCR(0)
		host.Must("systemctl", "restart", "virt-trustd")
		refused(t, g, reason.HostNotApproved)
		refusedBy(t, host.RunInput(once, "virt-trust", "recover"), reason.KeyNotReleased) // the wrong key
		t.Log(host.Shell("virt-trust recover -i " + key + " 2>&1"))
		starts(t, g)
	})
	t.Run("TPM cleared", func(t *testing.T) {
		host := host.In(t)
		g := g.In(host)
		host.ClearTPM()
		host.Must("systemctl", "restart", "virt-trustd")
		refused(t, g, reason.KeyNotReleased)
		refusedBy(t, host.RunInput(once, "virt-trust", "recover"), reason.KeyNotReleased)
		if r := host.RunInput(once[:len(once)-3], "virt-trust", "recover"); r.Code != 1 {
			t.Errorf("a key that is cut off: exit %d, %s%s", r.Code, r.Stdout, r.Stderr)
		}
		refused(t, g, reason.KeyNotReleased)
		t.Log(host.Shell("virt-trust recover -i " + key + " 2>&1"))
		starts(t, g)
	})
	t.Run("board swapped, list lost, shares", func(t *testing.T) {
		host := host.In(t)
		g := g.In(host)
		host.Shell("mkdir -p /root/shares; virt-trust recovery new --replace --shares 3 --threshold 2 --output-dir /root/shares")
		refusedBy(t, host.Run("virt-trust", "recover", "-i", key), reason.KeyNotReleased) // the key before
		host.Shell("systemctl stop virt-trustd; rm /var/lib/virt-trust/vtpm-list")
		host.ReplaceTPM()
		host.Must("systemctl", "start", "virt-trustd")
		refused(t, g, reason.KeyNotReleased)
		if r := host.Run("virt-trust", "recover", "--share", "/root/shares/share-3.txt"); r.Code != 1 || !strings.Contains(r.Stderr, "2 shares of set") {
			t.Errorf("one share: exit %d, %s", r.Code, r.Stderr)
		}
		t.Log(host.Shell("virt-trust recover --share /root/shares/share-3.txt --share /root/shares/share-1.txt 2>&1"))
		starts(t, g)
	})
	t.Run("backup of a VM that runs", func(t *testing.T) {
		host := host.In(t)
		g := g.In(host)
		host.Shell("ssh-keygen -q -t ed25519 -N '' -f /root/id")
		g.Start()
		r := host.Run("sh", "-c", "virt-trust backup guest -r \"$(cat /root/id.pub)\" -o /root/guest.age --pause-for 'virsh domstate guest > /root/then; cp "+g.DiskPath+" /root/then.qcow2'")
		if then := strings.TrimSpace(host.Must("cat", "/root/then")); r.Code != 0 || then != "paused" || g.State() != "running" {
			t.Errorf("exit %d; paused for the command: %q; then: %q; %s%s", r.Code, then, g.State(), r.Stdout, r.Stderr)
		}
		t.Log(r.Stdout)
		unseals(t, g)
		if r := host.Run("sh", "-c", "virt-trust backup guest -r \"$(cat /root/id.pub)\" -o /root/no.age --pause-for false"); r.Code != 1 {
			t.Errorf("a command that fails: exit %d", r.Code)
		}
		waitFor(t, "the VM goes on", func() bool { return g.State() == "running" })
		if r := host.Run("sh", "-c", "virt-trust backup guest -r \"$(cat /root/id.pub)\" -o /root/no.age --pause-for 'systemctl kill -s KILL virt-trustd; sleep 1'"); r.Code != 1 {
			t.Errorf("virt-trustd killed meanwhile: exit %d", r.Code)
		}
		waitFor(t, "the next virt-trustd makes the VM go on", func() bool { return g.State() == "running" })
		unseals(t, g)
		if r := host.Run("test", "-e", "/root/no.age"); r.Code == 0 {
			t.Error("there is a backup without its disk")
		}
		refusedBy(t, host.Run("virt-trust", "restore", "/root/guest.age", "-i", "/root/id", "--replace"), reason.PolicyForbids)
		if got := g.Ask("seal something newer"); got != "sealed something newer" {
			t.Fatal(got)
		}
		g.Destroy()
		// A disk and a vTPM of one instant.
		refusedBy(t, host.Run("virt-trust", "restore", "/root/guest.age", "-i", "/root/id"), reason.VTPMRolledBack)
		host.Must("cp", "/root/then.qcow2", g.DiskPath)
		t.Log(host.Must("virt-trust", "restore", "/root/guest.age", "-i", "/root/id", "--replace"))
		starts(t, g)
	})
	t.Run("nothing but the recovery key", func(t *testing.T) {
		host := host.In(t)
		g := g.In(host)
		host.Must("systemctl", "stop", "virt-trustd")
		host.Must("rm", "-r", "/var/lib/virt-trust")
		host.ReplaceTPM()
		host.Must("systemctl", "start", "virt-trustd")
		refused(t, g, reason.LabelOtherHost)
		t.Log(host.Must("virt-trust", "recover", g.Name, "--share", "/root/shares/share-3.txt", "--share", "/root/shares/share-2.txt"))
		starts(t, g)
	})
	t.Run("without a recovery key", func(t *testing.T) {
		host := host.In(t)
		g := g.In(host)
		host.ReplaceTPM()
		host.Must("systemctl", "restart", "virt-trustd")
		r := g.TryStart()
		if r.Code == 0 || !strings.Contains(r.Stderr, "there is no recovery key") {
			t.Errorf("exit %d, %s", r.Code, r.Stderr)
		}
		refusedBy(t, host.Run("virt-trust", "recover", "-i", key), reason.KeyNotReleased)
		// The list and the vTPM are lost; disk, definition and backups are not.
		host.Shell("systemctl stop virt-trustd; rm -r /var/lib/virt-trust; systemctl start virt-trustd")
		t.Log(host.Must("virt-trust", "restore", "/root/guest.age", "-i", "/root/id", "--replace"))
		starts(t, g)
	})
}
