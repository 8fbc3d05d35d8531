package lab

import (
	"strings"
	"testing"

	"virt-trust/internal/vtpm/reason"
)

// holdHook is a hook of the host's own, which libvirt runs after virt-trust's:
// what it starts at `prepare` runs in libvirtd's cgroup while a launch grant is
// open.
const holdHook = `#!/bin/sh
[ "$2" = prepare ] && [ -x /root/meanwhile ] || exit 0
/root/meanwhile >/root/meanwhile.out 2>&1
exit 0
`

// TestGrants shows what a launch grant is not good for, with the installed
// wrapper as swtpm's user, where libvirt itself would run it.
func TestGrants(t *testing.T) {
	t.Parallel()
	host := guarded(t, HostOptions{Name: "grants"})
	h := host.In(t)
	a := sealed(t, h, VM{Name: "alice", TPM: true, Disk: "qcow2"})
	b := sealed(t, h, VM{Name: "bob", TPM: true, Disk: "qcow2"})
	h.WriteFile("/etc/libvirt/hooks/qemu.d/60-hold", []byte(holdHook), 0o755)

	// The wrapper, as libvirt calls it for a VM; its swtpm would wait for ever.
	wrapper := func(g *Guest) string {
		return "timeout 2 /usr/libexec/virt-trust/bin/swtpm socket --ctrl type=unixio,path=/tmp/other.sock --tpmstate dir=" +
			g.StateDir() + ",mode=0600 --terminate --tpm2"
	}
	asSwtpm := func(g *Guest) string { return "setpriv --reuid tss --regid tss --clear-groups " + wrapper(g) }

	for _, c := range []struct {
		what, meanwhile string
		said            string // of the refusal, by the wrapper in meanwhile or by virsh
		starts          bool   // the VM, although someone was refused
	}{
		{"late", "sleep 1.5", "the grant for this start has expired", false},
		{"twice", asSwtpm(a), "the grant for this start was redeemed before", false},
		{"for another VM", asSwtpm(b), "no start of this VM is under way", true},
	} {
		t.Run(c.what, func(t *testing.T) {
			h := host.In(t)
			a, b := a.In(h), b.In(h)
			if c.what == "late" {
				h.Shell("cp -a /etc/virt-trust/virt-trustd.toml /root/; printf '\n[grant]\nlifetime = \"1s\"\n' >>/etc/virt-trust/virt-trustd.toml; systemctl restart virt-trustd")
				defer h.Shell("cp -a /root/virt-trustd.toml /etc/virt-trust/; systemctl restart virt-trustd")
			}
			h.WriteFile("/root/meanwhile", []byte("#!/bin/sh\n"+c.meanwhile+"\n"), 0o755)
			before := fingerprint(a) + fingerprint(b)
			r := a.TryStart()
			h.Must("rm", "/root/meanwhile")
			told := r.Stderr
			if c.starts {
				told = string(h.ReadFile("/root/meanwhile.out"))
			}
			if want := "virt-trust: refused: " + string(reason.KeyNotReleased) + ": " + c.said; strings.Count(told, "virt-trust: refused: ") != 1 || !strings.Contains(told, want) {
				t.Errorf("told %q without exactly one %q", told, want)
			}
			if started := r.Code == 0; started != c.starts {
				t.Fatalf("started: %v; %s", started, r.Stderr)
			}
			if log := h.Must("virt-trust", "log"); !strings.Contains(log, c.said) {
				t.Errorf("not in the log:\n%s", log)
			}
			if c.starts {
				a.Expect("VT: ready")
				unseals(t, a)
				a.Destroy()
			} else if after := fingerprint(a) + fingerprint(b); after != before {
				t.Errorf("altered\n%s\nto\n%s", before, after)
			}
		})
	}
	t.Run("from elsewhere", func(t *testing.T) {
		h := host.In(t)
		a := a.In(h)
		h.WriteFile("/root/meanwhile", []byte("#!/bin/sh\ntouch /root/held\nfor i in $(seq 100); do [ -e /root/go ] && exit; sleep 0.1; done\n"), 0o755)
		started := make(chan Result, 1)
		go func() { started <- a.TryStart() }()
		h.Shell("until [ -e /root/held ]; do sleep 0.05; done")
		r := h.RunAs("tss", strings.Fields(wrapper(a))...)
		h.Shell("touch /root/go; rm /root/meanwhile")
		if want := "virt-trust: refused: " + string(reason.KeyNotReleased) + ": the wrapper was not called by libvirt"; r.Code != 1 || !strings.Contains(r.Stderr, want) {
			t.Errorf("exit %d, %q without %q", r.Code, r.Stderr, want)
		}
		if r := <-started; r.Code != 0 {
			t.Fatal(r.Stderr)
		}
		a.Expect("VT: ready")
		unseals(t, a)
		a.Destroy()
	})
	// Nothing of it is left.
	starts(t, a)
	starts(t, b)
}
