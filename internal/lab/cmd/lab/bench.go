package main

import (
	"flag"
	"fmt"
	"slices"
	"strings"
	"time"

	"virt-trust/internal/lab"
)

// bench measures what virt-trust costs, as ratios.
//
// Guarded and plain starts are of two hosts, booted from the same overlay on
// this machine and alternating, the other one idle. Bypassing the hook on a
// single host would take a restart of libvirtd (it caches whether a hook
// exists and where swtpm is) between each two starts, and so measure cold
// caches. That two hosts are alike is not taken on trust: before the package is
// installed on one, the same alternation gives the control ratio, which tells
// how much of a difference is noise. VMs start paused, so that a guest does not
// take the processor from the next measurement; every hook is called all the
// same.
func bench(s *session, args []string) {
	flags := flag.NewFlagSet("bench", flag.ExitOnError)
	pairs := flags.Int("pairs", 20, "pairs of starts")
	vms := flags.Int("vms", 200, "VMs that virt-trustd knows when its memory is measured")
	flags.Parse(args)

	deb := s.deb()
	a := lab.NewHost(s, lab.HostOptions{Name: "plain"})
	b := lab.NewHost(s, lab.HostOptions{Name: "guarded"})
	hosts := [2]*lab.Host{a, b}
	vm := func(name string, tpm bool) [2]*lab.Guest {
		return [2]*lab.Guest{
			a.NewVM(lab.VM{Name: name, TPM: tpm, Disk: "qcow2"}),
			b.NewVM(lab.VM{Name: name, TPM: tpm, Disk: "qcow2"}),
		}
	}
	control := vm("control", true)
	starts := func(title string, guests [2]*lab.Guest) float64 {
		took := alternate(s, hosts, guests, *pairs)
		ratio := median(took[1]).Seconds() / median(took[0]).Seconds()
		fmt.Printf("%-44s %8.1f ms %8.1f ms   ratio %.3f\n", title, ms(median(took[0])), ms(median(took[1])), ratio)
		return ratio
	}

	fmt.Printf("\n%-44s %11s %11s\n", fmt.Sprintf("median of %d virsh starts, warm", *pairs), "plain", "guarded")
	starts("control: plain libvirt on both", control)
	b.InstallDeb(deb)
	b.Must("systemctl", "restart", "libvirtd")
	a.Must("systemctl", "restart", "libvirtd")
	starts("VM with a vTPM", vm("tpm", true))
	starts("VM without a vTPM", vm("none", false))

	hookTime(b)
	stepTimes(b)
	memory(s, b, *vms)
}

// alternate starts and destroys one VM on the one and one on the other host,
// in turns, and gives how long virsh start took. The first start of each, which
// makes its vTPM, does not count.
func alternate(s *session, hosts [2]*lab.Host, guests [2]*lab.Guest, pairs int) (took [2][]time.Duration) {
	for pair := -1; pair < pairs; pair++ {
		for _, i := range []int{0, 1} {
			if pair%2 == 0 {
				i = 1 - i // neither is always the one after the other
			}
			r := hosts[i].Run("virsh", "start", "--paused", guests[i].Name)
			if r.Code != 0 {
				s.Fatalf("virsh start %s: %s", guests[i].Name, r.Stderr)
			}
			if pair >= 0 {
				took[i] = append(took[i], r.Took)
			}
			hosts[i].Must("virsh", "destroy", guests[i].Name)
		}
	}
	return took
}

// hookTime measures the hook's process for a VM without a vTPM, which libvirt
// waits for five times per life of a VM.
func hookTime(h *lab.Host) {
	const runs = 200
	h.Shell("virsh dumpxml none >/root/none.xml")
	loop := func(command string) time.Duration {
		out := h.Shell(fmt.Sprintf(`s=$(date +%%s%%N); i=0; while [ $i -lt %d ]; do %s </root/none.xml; i=$((i+1)); done; e=$(date +%%s%%N); echo $((e-s))`, runs, command))
		var ns int64
		fmt.Sscan(out, &ns)
		return time.Duration(ns / runs)
	}
	nothing := loop("/bin/true")
	hook := loop("/etc/libvirt/hooks/qemu.d/50-virt-trust none prepare begin -")
	fmt.Printf("\nhook process, VM without a vTPM: %.2f ms (at most 6; /bin/true takes %.2f)\n", ms(hook), ms(nothing))
}

// stepTimes prints where virt-trustd's own time goes, as its journal has it.
func stepTimes(h *lab.Host) {
	// The daemon notes its steps at debug level, or with a field of their own;
	// whatever it says of them is shown as it is.
	out := h.Run("journalctl", "-u", "virt-trustd", "-o", "cat", "--no-pager", "-g", "step").Stdout
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) == 1 && lines[0] == "" {
		fmt.Println("steps: virt-trustd's journal names none")
		return
	}
	fmt.Println("steps of the last start:")
	for _, line := range lines[max(0, len(lines)-10):] {
		fmt.Println("  " + line)
	}
}

// memory prints what virt-trustd holds with many VMs in its list.
func memory(s *session, h *lab.Host, vms int) {
	resident := func() string {
		return strings.TrimSpace(h.Shell(`sed -n 's/^VmRSS: *//p' /proc/$(systemctl show -P MainPID virt-trustd)/status`))
	}
	few := resident()
	start := time.Now()
	for i := range vms {
		g := h.NewVM(lab.VM{Name: fmt.Sprintf("many-%03d", i), TPM: true})
		if r := h.Run("virsh", "start", "--paused", g.Name); r.Code != 0 {
			s.Fatalf("virsh start %s: %s", g.Name, r.Stderr)
		}
		h.Must("virsh", "destroy", g.Name)
	}
	fmt.Printf("virt-trustd resident: %s with 2 VMs, %s with %d more (at most 30 MiB); made in %.0f s\n",
		few, resident(), vms, time.Since(start).Seconds())
}

func median(d []time.Duration) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[len(d)/2]
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
