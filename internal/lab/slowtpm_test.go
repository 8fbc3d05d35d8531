package lab

import (
	"strings"
	"testing"
	"time"

	"virt-trust/internal/vtpm/reason"
)

// TestSlowTPM: a TPM as slow as discrete ones, one that does not answer, and
// one in dictionary attack lockout do not stall libvirt: a start succeeds, or
// is refused within the hook's deadline, and nobody else waits for it.
func TestSlowTPM(t *testing.T) {
	t.Parallel()
	host := guarded(t, HostOptions{Name: "slow"})
	g := sealed(t, host, VM{Name: "slow", TPM: true, Disk: "qcow2"})

	t.Run("700 ms for each command", func(t *testing.T) {
		h := host.In(t)
		h.SlowTPM(700 * time.Millisecond)
		defer h.SlowTPM(0)
		fresh := h.NewVM(VM{Name: "fresh", TPM: true, Disk: "qcow2"})
		for _, g := range []*Guest{g, fresh, fresh} {
			r := h.Run("virsh", "start", "--paused", g.Name)
			t.Logf("%s: %.1f s", g.Name, r.Took.Seconds())
			if r.Code != 0 || r.Took > 45*time.Second {
				t.Errorf("%s: after %v: %s", g.Name, r.Took, r.Stderr)
			}
			h.Run("virsh", "destroy", g.Name)
		}
	})

	t.Run("no answer", func(t *testing.T) {
		h := host.In(t)
		h.Shell(`cd /etc/virt-trust; cp -a virt-trustd.toml /root/; sed -i '/^\[tpm\]/a timeout = "6s"' virt-trustd.toml; systemctl restart virt-trustd`)
		none := h.NewVM(VM{Name: "none"})
		h.SlowTPM(4 * time.Second)
		defer h.SlowTPM(0)
		refusal := make(chan Result)
		go func() { refusal <- h.Run("virsh", "start", "--paused", g.Name) }()
		time.Sleep(time.Second)
		// Meanwhile other VMs go on. (What asks about this one, as virsh list does
		// of all, waits: libvirt holds a VM's lock while it waits for a hook.)
		for _, command := range [][]string{{"start", "--paused", none.Name}, {"domstate", none.Name}, {"destroy", none.Name}} {
			if r := h.Run(append([]string{"virsh"}, command...)...); r.Code != 0 || r.Took > 3*time.Second {
				t.Errorf("virsh %v took %v: %s", command, r.Took, r.Stderr)
			}
		}
		r := <-refusal
		t.Logf("refused after %.1f s", r.Took.Seconds())
		if r.Code == 0 || !strings.Contains(r.Stderr, "virt-trust: refused: "+string(reason.TPMBusy)) || r.Took > 15*time.Second {
			t.Errorf("after %v, exit %d: %s", r.Took, r.Code, r.Stderr)
		}
		h.SlowTPM(0)
		starts(t, g.In(h))
		h.Shell("cp -a /root/virt-trustd.toml /etc/virt-trust/; systemctl restart virt-trustd")
	})

	t.Run("dictionary attack lockout", func(t *testing.T) {
		h := host.In(t)
		tpm := "-T swtpm:path=" + TPMSocket
		h.Shell(`tpm2_dictionarylockout ` + tpm + ` -s -n 1 -t 1000 -l 1000
			tpm2_createprimary ` + tpm + ` -Q -C o -p right -c /root/p.ctx; tpm2_flushcontext ` + tpm + ` -t || :
			! tpm2_create ` + tpm + ` -Q -C /root/p.ctx -P wrong -u /root/u -r /root/r 2>/root/first; tpm2_flushcontext ` + tpm + ` -t || :
			! tpm2_create ` + tpm + ` -Q -C /root/p.ctx -P right -u /root/u -r /root/r 2>/root/second; tpm2_flushcontext ` + tpm + ` -t || :`)
		if words := string(h.ReadFile("/root/second")); !strings.Contains(words, "0x921") && !strings.Contains(words, "lockout") {
			t.Fatalf("the TPM is not in lockout: %s", words)
		}
		// What virt-trust's keys need is exempt (noDA): the VM starts all the same.
		began := time.Now()
		starts(t, g.In(h))
		t.Logf("in lockout it started and unsealed in %v", time.Since(began))
		h.Shell(`tpm2_dictionarylockout ` + tpm + ` -c`)
	})
}
