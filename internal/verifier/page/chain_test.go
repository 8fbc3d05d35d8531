package page

import (
	"math/rand/v2"
	"strings"
	"testing"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/page/pagetest"
)

func at[T any](v T) *T { return &v }

// good is a host with one VM, both as they should be.
func good() (fleet.Status, *appraise.Result) {
	res := pagetest.Result(pagetest.Good, "kvm", pagetest.VM(pagetest.GoodVM, "vm"))
	return fleet.Status{Node: fleet.Node{ID: pagetest.Good, Name: "kvm", State: fleet.Active, EKTrust: "manufacturer", AKName: []byte{0, 11, 1}}, Tier: appraise.Affirming}, &res
}

func TestChainHolds(t *testing.T) {
	n, res := good()
	c := newChain(n, res, &res.VMs[0])
	for _, l := range c.Links {
		if l.Tier != appraise.Affirming || l.Word != "affirming" || l.Detail == "" {
			t.Errorf("%s: %s, %q, %q", l.ID, l.Tier, l.Word, l.Detail)
		}
	}
	if !strings.Contains(c.Summary(), "All 12 links are affirmed") {
		t.Error(c.Summary())
	}
}

// TestChainBreaks: each reason breaks the chain at its own link, and nothing
// after that is vouched for; what is before stays.
func TestChainBreaks(t *testing.T) {
	for name, c := range map[string]struct {
		host, vm *appraise.Reason
		link     int
	}{
		"another AK":          {host: &appraise.Reason{Code: appraise.CodeSignature}, link: linkTPM},
		"clock":               {host: &appraise.Reason{Code: appraise.CodeClockBack}, link: linkTPM},
		"firmware":            {host: &appraise.Reason{Code: appraise.CodeEventUnknown, Log: "tcg-event-log", PCR: at(uint(0))}, link: linkFirmware},
		"secure boot off":     {host: &appraise.Reason{Code: appraise.CodeEventUnknown, Log: "tcg-event-log", PCR: at(uint(7))}, link: linkFirmware},
		"event log":           {host: &appraise.Reason{Code: appraise.CodeEventLogReplay, Log: "tcg-event-log"}, link: linkFirmware},
		"shim":                {host: &appraise.Reason{Code: appraise.CodeEventUnknown, Log: "tcg-event-log", PCR: at(uint(4))}, link: linkLoader},
		"kernel":              {host: &appraise.Reason{Code: appraise.CodeHostPCR, PCR: at(uint(9))}, link: linkKernel},
		"a file":              {host: &appraise.Reason{Code: appraise.CodeIMAUnknown, Log: "ima", PCR: at(uint(10))}, link: linkDaemon},
		"launch log":          {host: &appraise.Reason{Code: appraise.CodeLaunchReplay, Log: "launch-log", PCR: at(uint(15))}, link: linkDaemon},
		"another VM's":        {host: &appraise.Reason{Code: appraise.CodeLauncherUnknown, Log: "launch-log", Path: "/opt/qemu"}, link: linkDaemon},
		"its QEMU":            {host: &appraise.Reason{Code: appraise.CodeLauncherUnknown, Log: "launch-log", Path: "/usr/bin/qemu-system-x86_64"}, link: linkQEMU},
		"its QEMU, at the VM": {vm: &appraise.Reason{Code: appraise.CodeLauncherUnknown, Log: "launch-log", Path: "/usr/bin/qemu-system-x86_64"}, link: linkQEMU},
		"its swtpm":           {vm: &appraise.Reason{Code: appraise.CodeLauncherUnknown, Path: "/usr/bin/swtpm"}, link: linkSwtpm},
		"its firmware":        {vm: &appraise.Reason{Code: appraise.CodeLauncherUnknown, Path: "/usr/share/OVMF/OVMF_CODE_4M.ms.fd"}, link: linkImage},
		"shared vTPM":         {vm: &appraise.Reason{Code: appraise.CodeVMSharedEK}, link: linkVTPM},
		"guest firmware":      {vm: &appraise.Reason{Code: appraise.CodeVMPCR, PCR: at(uint(0))}, link: linkGuestFirmware},
		"guest loader":        {vm: &appraise.Reason{Code: appraise.CodeVMPCR, PCR: at(uint(4))}, link: linkGuestLoader},
		"guest kernel":        {vm: &appraise.Reason{Code: appraise.CodeVMPCR, PCR: at(uint(9))}, link: linkGuestKernel},
		"guest PCR 10":        {vm: &appraise.Reason{Code: appraise.CodeVMPCR, PCR: at(uint(10))}, link: linkGuestKernel},
	} {
		n, res := good()
		v := &res.VMs[0]
		for _, r := range []*appraise.Reason{c.host, c.vm} {
			if r != nil {
				r.Tier = appraise.Contraindicated
			}
		}
		v.Tier = appraise.Contraindicated
		if c.host != nil {
			res.Host.Tier, res.Host.Reasons = appraise.Contraindicated, []appraise.Reason{*c.host}
			v.Reasons = []appraise.Reason{{Code: appraise.CodeHost, Tier: appraise.Contraindicated}}
		} else {
			v.Reasons = []appraise.Reason{*c.vm}
		}
		ch := newChain(n, res, v)
		for i, l := range ch.Links {
			want := "affirming"
			beside := i >= linkSwtpm && i <= linkQEMU && c.link >= linkSwtpm && c.link <= linkQEMU
			switch {
			case i == c.link:
				want = "contraindicated"
			case i > c.link && !beside:
				want = "not vouched for"
			}
			if l.Word != want {
				t.Errorf("%s: %s is %q, want %q", name, l.ID, l.Word, want)
			}
		}
		if !strings.Contains(ch.Summary(), parts[c.link].title) {
			t.Errorf("%s: %s", name, ch.Summary())
		}
	}
}

func TestChainNotRunning(t *testing.T) {
	n, res := good()
	v := &res.VMs[0]
	v.Running, v.Tier, v.PCRs, v.Reasons = false, appraise.None, appraise.PCRs{}, []appraise.Reason{{Code: appraise.CodeVMNotRunning}}
	c := newChain(n, res, v)
	for i, l := range c.Links {
		if i >= linkSwtpm && l.Tier != appraise.None || i < linkSwtpm && l.Tier != appraise.Affirming {
			t.Errorf("%s: %s", l.ID, l.Tier)
		}
	}
}

// TestChainNeverBetter: whatever the reasons are, no link is affirmed or in
// warning behind one that is broken, none is affirmed where its subject could not
// be appraised, and where the VM is not affirmed some link is not.
func TestChainNeverBetter(t *testing.T) {
	all := codes(t)
	r := rand.New(rand.NewPCG(1, 2))
	tiers := []appraise.Tier{appraise.Warning, appraise.Contraindicated, appraise.None}
	reasons := func() (out []appraise.Reason, worst appraise.Tier) {
		worst = appraise.Affirming
		for range r.IntN(4) {
			x := appraise.Reason{Code: all[r.IntN(len(all))], Tier: tiers[r.IntN(3)], Log: []string{"", "ima", "launch-log", "tcg-event-log"}[r.IntN(4)]}
			if r.IntN(2) == 0 {
				x.PCR = at(uint(r.IntN(24)))
			}
			if worse(x.Tier, worst) < 0 {
				worst = x.Tier
			}
			out = append(out, x)
		}
		return out, worst
	}
	for range 1000 {
		n, res := good()
		v := &res.VMs[0]
		res.Host.Reasons, res.Host.Tier = reasons()
		v.Reasons, v.Tier = reasons()
		if worse(res.Host.Tier, v.Tier) < 0 {
			v.Tier = res.Host.Tier
		}
		v.Running = r.IntN(5) > 0
		c := newChain(n, res, v)
		broken, affirmed := false, true
		for i, l := range c.Links {
			up := l.Tier == appraise.Affirming || l.Tier == appraise.Warning
			if broken && up && !(i >= linkSwtpm && i <= linkQEMU) && len(l.Findings) == 0 {
				t.Fatalf("%s is %s behind something broken", l.ID, l.Tier)
			}
			if i < linkSwtpm && res.Host.Tier == appraise.None && l.Tier == appraise.Affirming || i >= linkSwtpm && v.Tier == appraise.None && l.Tier == appraise.Affirming {
				t.Fatalf("%s is affirmed, and its subject could not be appraised", l.ID)
			}
			broken = broken || !up
			affirmed = affirmed && l.Tier == appraise.Affirming
		}
		// A reason "host" without one of the host's is a contradiction that real
		// results do not have.
		own := len(res.Host.Reasons) > 0
		for _, x := range v.Reasons {
			own = own || !inherited(x.Code)
		}
		if affirmed && own {
			t.Fatalf("all links are affirmed: %+v %+v", res.Host.Reasons, v.Reasons)
		}
		for _, d := range []drawing{c.Wide(), c.Narrow()} {
			for _, b := range append(d.Boxes, d.Verdict) {
				if b.X < 0 || b.Y < 0 || b.X+b.W > d.Width || b.Y+b.H > d.Height {
					t.Fatalf("%s: a box outside of the picture: %+v in %dx%d", d.Class, b, d.Width, d.Height)
				}
			}
			if len(d.Boxes) != numLinks {
				t.Fatal(len(d.Boxes))
			}
		}
	}
}
