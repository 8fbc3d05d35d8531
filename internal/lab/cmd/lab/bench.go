package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
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
		_, took := alternate(s, hosts, guests, *pairs, 0)
		ratio := median(took[1]).Seconds() / median(took[0]).Seconds()
		fmt.Printf("%-44s %8.1f ms %8.1f ms   ratio %.3f\n", title, ms(median(took[0])), ms(median(took[1])), ratio)
		return ratio
	}

	fmt.Printf("\n%-44s %11s %11s\n", fmt.Sprintf("median of %d virsh starts, warm", *pairs), "plain", "guarded")
	starts("control: plain libvirt on both", control)
	b.InstallDeb(deb)
	b.Must("systemctl", "restart", "libvirtd")
	a.Must("systemctl", "restart", "libvirtd")
	guarded := vm("tpm", true)
	starts("VM with a vTPM", guarded)
	starts("VM without a vTPM", vm("none", false))

	firstStarts(s, hosts)
	rest(s, hosts, guarded, *pairs)
	hookTime(b)
	stepTimes(b)
	memory(s, b, *vms)
}

// firstStarts measures starts that make the vTPM, with its certificates by
// swtpm_localca and by the host's TPM.
func firstStarts(s *session, hosts [2]*lab.Host) {
	const runs = 9
	configure := func(ours bool) {
		hosts[1].Shell(fmt.Sprintf(`sed -i '/^\[attestation\]/,$d' /etc/virt-trust/virt-trustd.toml; printf '[attestation]\nek_certificates = %t\n' >>/etc/virt-trust/virt-trustd.toml; systemctl restart virt-trustd`, ours))
	}
	kinds := []string{"plain", "guarded, swtpm_localca", "guarded, the host's TPM"}
	took := make([][]time.Duration, len(kinds))
	for i := range runs {
		for k := range kinds {
			h := hosts[min(k, 1)]
			if k > 0 {
				configure(k == 2)
			}
			g := h.NewVM(lab.VM{Name: fmt.Sprintf("first-%d-%d", i, k), TPM: true, Disk: "qcow2"})
			r := h.Run("virsh", "start", "--paused", g.Name)
			if r.Code != 0 {
				s.Fatalf("virsh start %s: %s", g.Name, r.Stderr)
			}
			took[k] = append(took[k], r.Took)
			h.Must("virsh", "destroy", g.Name)
		}
	}
	fmt.Printf("\nmedian of %d first starts:", runs)
	for k, name := range kinds {
		fmt.Printf(" %s %.0f ms,", name, ms(median(took[k])))
	}
	fmt.Printf(" ratios %.2f and %.2f\n", median(took[1]).Seconds()/median(took[0]).Seconds(), median(took[2]).Seconds()/median(took[0]).Seconds())
}

// alternate starts and destroys one VM on the one and one on the other host,
// in turns and each after a pause, and gives when virsh start began and how long
// it took. The first start of each, which makes its vTPM, does not count.
func alternate(s *session, hosts [2]*lab.Host, guests [2]*lab.Guest, pairs int, pause time.Duration) (began [2][]time.Time, took [2][]time.Duration) {
	for pair := -1; pair < pairs; pair++ {
		for _, i := range []int{0, 1} {
			if pair%2 == 0 {
				i = 1 - i // neither is always the one after the other
			}
			time.Sleep(pause)
			from := time.Now()
			r := hosts[i].Run("virsh", "start", "--paused", guests[i].Name)
			if r.Code != 0 {
				s.Fatalf("virsh start %s: %s", guests[i].Name, r.Stderr)
			}
			if pair >= 0 {
				began[i], took[i] = append(began[i], from), append(took[i], r.Took)
			}
			hosts[i].Must("virsh", "destroy", guests[i].Name)
		}
	}
	return began, took
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

// stepTimes prints how long virt-trustd takes for each call in a VM's warm
// start and end, between the bus's sight of the call and of its answer.
func stepTimes(h *lab.Host) {
	const runs = 10
	before := tpmCommands(h)
	since := strings.TrimSpace(h.Shell("date +%s"))
	h.Shell(fmt.Sprintf(`dbus-monitor --system --profile >/root/bus & bus=$!; sleep 0.3
		for i in $(seq %d); do virsh -q start --paused tpm; virsh -q destroy tpm; done
		sleep 0.3; kill $bus`, runs))
	type call struct{ sender, serial string }
	type open struct {
		step  string
		since float64
	}
	calls := map[call]open{}
	took := map[string][]time.Duration{}
	hooks := []string{"hook prepare", "hook start", "hook release"}
	next := 0
	for line := range strings.Lines(string(h.ReadFile("/root/bus"))) {
		// type, time, serial, sender, destination, then path, interface, member of a call or the serial that an answer is to
		f := strings.Split(strings.TrimSpace(line), "\t")
		if len(f) < 6 {
			continue
		}
		at, _ := strconv.ParseFloat(f[1], 64)
		switch {
		case f[0] == "mc" && len(f) == 8 && f[7] == "HandleHook":
			calls[call{f[3], f[2]}] = open{hooks[next%len(hooks)], at}
			next++
		case f[0] == "mc" && len(f) == 8 && f[7] == "RedeemGrant":
			calls[call{f[3], f[2]}] = open{"wrapper redeems", at}
		case f[0] == "mr" || f[0] == "err":
			if c, ok := calls[call{f[4], f[5]}]; ok {
				took[c.step] = append(took[c.step], time.Duration((at-c.since)*1e9))
				delete(calls, call{f[4], f[5]})
			}
		}
	}
	fmt.Printf("\nvirt-trustd's own time per call, medians of %d warm starts (TPM commands included):\n", runs)
	for _, step := range append([]string{"wrapper redeems"}, hooks...) {
		if d := took[step]; len(d) > 0 {
			fmt.Printf("  %-16s %6.1f ms\n", step, ms(median(d)))
		} else {
			fmt.Printf("  %-16s   not seen\n", step)
		}
	}
	prepareTimes(h, since)

	fmt.Printf("\nTPM commands of a warm start and end (put a real TPM's times in their place):\n")
	after := tpmCommands(h)
	for _, name := range slices.Sorted(maps.Keys(after)) {
		count, total := after[name].count-before[name].count, after[name].total-before[name].total
		if count > 0 {
			fmt.Printf("  %-24s %5.1f times %6.2f ms each\n", name, count/runs, total/count/1000)
		}
	}
}

// rest measures what a warm start takes beyond plain libvirt's and the TPM's own
// time, which is virt-trust's, with a TPM that is about as fast as it can be and
// with ones as slow as discrete ones are.
func rest(s *session, hosts [2]*lab.Host, guests [2]*lab.Guest, pairs int) {
	fmt.Printf("\n%-26s %11s %11s   TPM commands in between, and the rest\n", fmt.Sprintf("warm, %d starts or fewer", pairs), "plain", "guarded")
	for _, c := range []struct {
		by   time.Duration
		runs int
	}{{time.Millisecond, pairs}, {100 * time.Millisecond, min(pairs, 10)}, {700 * time.Millisecond, min(pairs, 9)}} {
		hosts[1].SlowTPM(c.by)
		began, took := alternate(s, hosts, guests, c.runs, 4*c.by) // what a stop has the TPM do is over then
		var busy, without []time.Duration
		commands := 0
		for i, from := range began[1] {
			n, tpm := hosts[1].BusyTPM(from, from.Add(took[1][i]))
			commands += n
			busy, without = append(busy, tpm), append(without, took[1][i]-tpm)
		}
		plain, guarded := took[0], took[1]
		low, high := between(plain, without)
		fmt.Printf("%-26s %8.1f ms %8.1f ms   %.1f commands, %.1f ms; the rest %.1f ms (at most 15; with 95 %% confidence %.0f to %.0f)\n",
			fmt.Sprintf("TPM commands of %v", c.by), ms(median(plain)), ms(median(guarded)),
			float64(commands)/float64(c.runs), ms(median(busy)), ms(median(without)-median(plain)), ms(low), ms(high))
	}
	hosts[1].SlowTPM(0)
}

// between gives the interval in which the difference of two medians lies with
// 95 % confidence, by resampling (bootstrap, percentiles).
func between(a, b []time.Duration) (low, high time.Duration) {
	random := rand.New(rand.NewPCG(1, 2))
	again := func(d []time.Duration) time.Duration {
		r := make([]time.Duration, len(d))
		for i := range r {
			r[i] = d[random.IntN(len(d))]
		}
		return median(r)
	}
	differences := make([]time.Duration, 2000)
	for i := range differences {
		differences[i] = again(b) - again(a)
	}
	slices.Sort(differences)
	return differences[len(differences)*25/1000], differences[len(differences)*975/1000]
}

// prepareTimes prints the parts of prepare, as the journal has them.
func prepareTimes(h *lab.Host, since string) {
	parts := prepareParts(h, since)
	fmt.Printf("\nthe parts of prepare:\n")
	for _, p := range []struct{ name, what string }{
		{"tpm", "TPM: unwrapping the keys"}, {"state", "vTPM state: reading, hashing"}, {"label", "label: reading"},
		{"list", "vTPM list: check, commit"}, {"all", "all"},
	} {
		if d := parts[p.name]; len(d) > 0 {
			fmt.Printf("  %-28s %6.2f ms\n", p.what, ms(median(d)))
		} else {
			fmt.Printf("  %-28s   not seen\n", p.what)
		}
	}
}

// prepareParts are the times of the parts of each prepare since a time.
func prepareParts(h *lab.Host, since string) map[string][]time.Duration {
	parts := map[string][]time.Duration{}
	for line := range strings.Lines(h.Must("journalctl", "-o", "json", "-t", "virt-trustd", "--since", "@"+since, "VIRT_TRUST_OPERATION=prepare")) {
		var entry map[string]any
		if json.Unmarshal([]byte(line), &entry) != nil {
			continue
		}
		for field, value := range entry {
			name, ok := strings.CutPrefix(field, "VIRT_TRUST_TOOK_")
			text, isText := value.(string)
			us, err := strconv.Atoi(text)
			if ok && isText && err == nil {
				name = strings.ToLower(strings.TrimSuffix(name, "_US"))
				parts[name] = append(parts[name], time.Duration(us)*time.Microsecond)
			}
		}
	}
	return parts
}

type commandTime struct{ count, total float64 } // total in microseconds

// tpmCommands reads virt-trustd's counts of TPM commands.
func tpmCommands(h *lab.Host) map[string]commandTime {
	read := func(property string) map[string]float64 {
		var v struct{ Data map[string]float64 }
		out := h.Must("busctl", "--json=short", "get-property", "org.virttrust1", "/org/virttrust1/host", "org.virttrust1.Host", property)
		if err := json.Unmarshal([]byte(out), &v); err != nil {
			return nil
		}
		return v.Data
	}
	time.Sleep(3 * time.Second) // the properties of a host are renewed every other second
	times := read("CommandTimes")
	all := map[string]commandTime{}
	for name, count := range read("CommandCounts") {
		all[name] = commandTime{count, times[name]}
	}
	return all
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
