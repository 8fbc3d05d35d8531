package lab

import (
	"fmt"
	"testing"
	"time"
)

// killHook is a hook of libvirt's that kills someone at one boundary between
// the steps of a VM's life: as 00-lab it comes before virt-trust's hook, as
// 99-lab after it. Each boundary is met once. To kill who waits for virt-trustd
// it stops that one, and lets it go on when the kill is done.
const killHook = `#!/bin/sh
read -r op when victim 2>/dev/null </run/lab-kill || exit 0
case $0 in */00-lab) here=before;; *) here=after;; esac
[ "$2 $here" = "$op $when" ] || exit 0
rm /run/lab-kill
waiting() {
	systemctl kill -s STOP virt-trustd
	setsid sh -c '
		for i in $(seq 300); do
			for p in $(pgrep -x "50-virt-trust|swtpm|swtpm_setup"); do
				[ "$(readlink /proc/$p/exe)" = "$0" ] && break 2
			done
			p=
			sleep 0.01
		done
		sleep 0.2
		[ -n "$p" ] && kill -9 $p && touch /run/lab-killed
		systemctl kill -s CONT virt-trustd' "$1" </dev/null >/dev/null 2>&1 &
}
case $victim in
virt-trustd) systemctl kill -s KILL virt-trustd && touch /run/lab-killed;;
libvirtd) systemctl kill -s KILL --kill-who=main libvirtd && touch /run/lab-killed;;
swtpm) for f in /run/libvirt/qemu/swtpm/*"$1"-swtpm.pid; do kill -9 $(cat $f) && touch /run/lab-killed; done;;
QEMU) kill -9 $(cat /run/libvirt/qemu/"$1".pid) && touch /run/lab-killed;;
hook) waiting /usr/libexec/virt-trust/virt-trust-hook;;
wrapper) waiting /usr/libexec/virt-trust/virt-trust-wrapper;;
esac
exit 0
`

// boundary is one between two steps, and who can be killed there.
type boundary struct {
	op, when string
	victims  []string
}

// boundaries are all that there are in a start and a stop, in order.
var boundaries = []boundary{
	{"prepare", "before", []string{"virt-trustd", "libvirtd", "hook"}},
	{"prepare", "after", []string{"virt-trustd", "libvirtd", "wrapper"}},
	{"start", "before", []string{"virt-trustd", "libvirtd", "swtpm", "hook"}},
	{"start", "after", []string{"virt-trustd", "libvirtd", "swtpm"}},
	{"started", "before", []string{"virt-trustd", "libvirtd", "swtpm", "QEMU", "hook"}},
	{"started", "after", []string{"virt-trustd", "libvirtd", "swtpm", "QEMU"}},
	{"stopped", "before", []string{"virt-trustd", "libvirtd", "hook"}},
	{"stopped", "after", []string{"virt-trustd", "libvirtd"}},
	{"release", "before", []string{"virt-trustd", "libvirtd", "hook"}},
	{"release", "after", []string{"virt-trustd", "libvirtd"}},
}

// TestKills kills -9 each of the programs at each boundary of a first and of a
// warm start and stop. Whatever was killed, the VM starts afterwards, and its
// secret is there at the end of all.
func TestKills(t *testing.T) {
	t.Parallel()
	h := guarded(t, HostOptions{Name: "kills"})
	for _, name := range []string{"00-lab", "99-lab"} {
		h.WriteFile("/etc/libvirt/hooks/qemu.d/"+name, []byte(killHook), 0o755)
	}
	h.Must("systemctl", "restart", "libvirtd")
	cases := 0
	kill := func(t *testing.T, g *Guest, b boundary, victim string) {
		h := h.In(t)
		h.Shell(fmt.Sprintf("rm -f /run/lab-killed; echo %s %s %s >/run/lab-kill", b.op, b.when, victim))
		began := time.Now()
		r := h.Run("virsh", "start", "--paused", g.Name)
		h.TakenUp()
		h.Run("virsh", "destroy", g.Name)
		h.TakenUp()
		g.In(h).WaitState("shut off")
		waitFor(t, "someone was killed", func() bool { return h.Run("test", "-e", "/run/lab-killed").Code == 0 })
		h.Run("rm", "-f", "/run/lab-kill")
		cases++
		name := fmt.Sprintf("%s killed %s %s", victim, b.when, b.op)
		again := h.Run("virsh", "start", "--paused", g.Name)
		t.Logf("%-38s %4.1f s; the start in which it was: exit %d; the next: exit %d", name, time.Since(began).Seconds(), r.Code, again.Code)
		if again.Code != 0 {
			t.Fatalf("%s: the next start: %s\nthe one before: %s", name, again.Stderr, r.Stderr)
		}
		h.Must("virsh", "destroy", g.Name)
	}
	t.Run("first start", func(t *testing.T) {
		for _, b := range boundaries[:4] {
			for _, victim := range b.victims {
				g := h.In(t).NewVM(VM{Name: fmt.Sprintf("first%d", cases), TPM: true, Disk: "qcow2"})
				kill(t, g, b, victim)
			}
		}
	})
	t.Run("warm start and stop", func(t *testing.T) {
		g := sealed(t, h.In(t), VM{Name: "warm", TPM: true, Disk: "qcow2"})
		for _, b := range boundaries {
			for _, victim := range b.victims {
				kill(t, g, b, victim)
			}
		}
		starts(t, g)
		nowhere(t, g)
	})
	figures(t, "killed on a host: %d cases, 0 vTPMs lost, 0 wrongly started, 0 refused without a way back", cases)
}
