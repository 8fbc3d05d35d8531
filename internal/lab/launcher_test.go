package lab

import (
	"encoding/json"
	"strings"
	"testing"

	"virt-trust/internal/vtpm/reason"
)

// TestLauncher takes the launch chain through a host's life: what runs is
// measured, logged and proven by the TPM; a program that was replaced by hand, or
// revoked, runs no VM; a killed virt-trustd goes on with the log; and whoever
// extends the PCR besides is told of.
func TestLauncher(t *testing.T) {
	h := guarded(t, HostOptions{Name: "launcher"})
	g := sealed(t, h, VM{Name: "chained", TPM: true, Disk: "qcow2"})
	starts(t, g)

	t.Run("the log is in the TPM", func(t *testing.T) {
		h := h.In(t)
		said := h.Must("virt-trust", "launch-log", "--verify")
		if !strings.Contains(said, "replays") {
			t.Errorf("launch-log --verify: %s", said)
		}
		pcr := strings.ToLower(h.Must("tpm2_pcrread", "-T", "swtpm:path="+TPMSocket, "sha256:15"))
		_, pcr, _ = strings.Cut(pcr, "0x")
		pcr = strings.TrimSpace(pcr)
		h.Must("virt-trust", "launch-log", "--tcg", "/root/launch-log")
		events := h.Must("tpm2_eventlog", "/root/launch-log")
		if len(pcr) != 64 || !strings.Contains(said, pcr) || !strings.Contains(events, pcr) {
			t.Errorf("PCR 15 is %s; not in what virt-trust says:\n%s\nor tpm2_eventlog:\n%s", pcr, said, events)
		}
		var vm struct {
			EK string `json:"ek_digest"`
		}
		if err := json.Unmarshal([]byte(h.Must("virt-trust", "show", "--json", g.Name)), &vm); err != nil {
			t.Fatal(err)
		}
		h.Must("virsh", "start", g.Name)
		log := h.Must("virt-trust", "launch-log", "--json")
		for _, want := range []string{`"emulator"`, `"swtpm"`, `"swtpm_setup"`, `"swtpm-library"`, `"firmware"`, `"emulator-module"`, "virt-trust-wrapper", g.UUID, vm.EK} {
			if len(vm.EK) != 64 || !strings.Contains(log, want) {
				t.Errorf("the launch log lacks %s (EK %q):\n%s", want, vm.EK, log)
			}
		}
		h.Must("virsh", "destroy", g.Name)
	})

	for _, program := range []string{"/usr/bin/swtpm", "/usr/bin/qemu-system-x86_64"} {
		t.Run("replaced by hand: "+program, func(t *testing.T) {
			h := h.In(t)
			g := h.Guest(g.VM)
			h.Shell("cp -p " + program + " /root/kept && cp -p " + program + " " + program + ".new && printf x >>" + program + ".new && mv " + program + ".new " + program)
			refused(t, g, reason.LauncherNotApproved)
			r := g.TryStart()
			for _, want := range []string{program, digestOf(h, program), digestOf(h, "/root/kept"), "virt-trust launcher approve " + program} {
				if !strings.Contains(r.Stderr, want) {
					t.Errorf("the refusal does not say %s: %s", want, r.Stderr)
				}
			}
			if program != "/usr/bin/swtpm" { // which goes on with a byte too many
				h.Must("mv", "/root/kept", program)
				starts(t, g)
				return
			}
			h.Must("virt-trust", "launcher", "approve", program)
			starts(t, g)
			h.Must("virt-trust", "launcher", "revoke", program)
			refused(t, g, reason.LauncherNotApproved)
			// As a reinstallation of the package does.
			h.Must("mv", "/root/kept", program)
			starts(t, g)
		})
	}

	t.Run("virt-trustd is killed", func(t *testing.T) {
		h := h.In(t)
		g := h.Guest(g.VM)
		g.Start()
		h.Must("systemctl", "kill", "-s", "KILL", "virt-trustd")
		waitFor(t, "virt-trustd is back", func() bool { return h.Run("virt-trust", "launch-log", "--verify").Code == 0 })
		g.Destroy()
		starts(t, g)
		h.Must("virt-trust", "launch-log", "--verify")
	})

	t.Run("someone else extends the PCR", func(t *testing.T) {
		h := h.In(t)
		g := h.Guest(g.VM)
		h.ExtendPCR(15)
		if r := h.Run("virt-trust", "launch-log", "--verify"); r.Code != 3 || !strings.Contains(r.Stdout, "does-not-replay") {
			t.Errorf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
		starts(t, g) // no vTPM is in danger
		h.Must("systemctl", "restart", "virt-trustd")
		if r := h.Run("virt-trust", "launch-log", "--verify"); r.Code != 3 {
			t.Errorf("after a restart of virt-trustd, exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
		if said := h.Must("virt-trust", "status"); !strings.Contains(said, "does-not-replay") {
			t.Errorf("status: %s", said)
		}
	})
}

// upgrade installs a package's next version, whose program is another one.
const upgrade = `set -e
p=$1 program=$2 d=/root/upgrade/$1
mkdir -p $d/DEBIAN
dpkg -L $p | while read -r f; do
	case $f in /etc/*) continue ;; esac
	if [ -f "$f" ] || [ -L "$f" ]; then cp -a --parents "$f" $d; fi
done
printf x >>$d$program
dpkg-query -W -f 'Package: ${Package}\nVersion: ${Version}+next\nArchitecture: ${Architecture}\nMulti-Arch: foreign\nMaintainer: ${Maintainer}\nDepends: ${Depends}\nDescription: ${binary:Summary}\n' $p >$d/DEBIAN/control
dpkg-deb --root-owner-group -Znone -b $d $d.deb
dpkg -i $d.deb`

// TestPackageUpgrade upgrades swtpm and QEMU: what a package brings is approved
// by itself, and what it replaced is not any more.
func TestPackageUpgrade(t *testing.T) {
	h := guarded(t, HostOptions{Name: "upgrade"})
	g := sealed(t, h, VM{Name: "upgraded", TPM: true, Disk: "qcow2"})
	for _, p := range []struct{ name, program string }{{"swtpm", "/usr/bin/swtpm"}, {"qemu-system-x86", "/usr/bin/qemu-system-x86_64"}} {
		t.Run(p.name, func(t *testing.T) {
			h := h.In(t)
			g := h.Guest(g.VM)
			before := digestOf(h, p.program)
			h.Must("cp", "-p", p.program, "/root/before")
			h.Must("sh", "-c", upgrade, "sh", p.name, p.program)
			if digestOf(h, p.program) == before {
				t.Fatal("the upgrade brought the same program")
			}
			starts(t, g)
			if said := h.Must("virt-trust", "launcher", "list"); !strings.Contains(said, p.name) {
				t.Errorf("launcher list does not name the package:\n%s", said)
			}
			h.Must("virt-trust", "launch-log", "--verify")
			// The version before, put back by hand.
			h.Must("mv", "/root/before", p.program)
			refused(t, g, reason.LauncherNotApproved)
			h.Must("dpkg", "-i", "/root/upgrade/"+p.name+".deb")
			starts(t, g)
		})
	}
}

func digestOf(h *Host, file string) string {
	d, _, _ := strings.Cut(h.Must("sha256sum", file), " ")
	return d
}
