package appraise

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"

	"virt-trust/internal/evidence/eventlog"
)

// maxChanges of one kind are told.
const maxChanges = 64

// Diff says what is different between two rounds of a node, for people: of its
// boot event by event, of what IMA found, of launchers and of VMs. was may be nil.
func Diff(was, now *Checkpoint, p *Policy) []Change {
	if was == nil || now == nil || p == nil {
		return nil
	}
	d := &differ{}
	if was.BootID != now.BootID {
		d.add("host", "reboot", "the host was booted anew")
	}
	d.events(was, now, p)
	if was.Host != now.Host {
		d.add("host", "tier", "%s, was %s", now.Host, was.Host)
	}
	d.files(was, now)
	all, gone := make([]string, 0, len(now.VMs)), []string{}
	for uuid := range now.VMs {
		all = append(all, uuid)
	}
	for uuid := range was.VMs {
		if _, there := now.VMs[uuid]; !there {
			gone = append(gone, uuid)
		}
	}
	slices.Sort(all)
	for _, uuid := range all {
		b, known := was.VMs[uuid]
		d.vm(uuid, b, now.VMs[uuid], known, p)
	}
	slices.Sort(gone)
	for _, uuid := range gone {
		d.add(uuid, "vm-gone", "VM %.80q is not there any more", was.VMs[uuid].Name)
	}
	return d.all
}

var allPCRs = func() (all []uint) {
	for p := range uint(numPCRs) {
		all = append(all, p)
	}
	return all
}()

type differ struct {
	all    []Change
	counts map[string]int
}

func (d *differ) add(subject, kind, format string, args ...any) {
	if d.counts == nil {
		d.counts = map[string]int{}
	}
	if d.counts[kind]++; d.counts[kind] > maxChanges {
		return
	}
	d.all = append(d.all, Change{Subject: subject, Kind: kind, What: fmt.Sprintf(format, args...)})
}

// events are those of the boot, in the words of its log.
func (d *differ) events(was, now *Checkpoint, p *Policy) {
	if bytes.Equal(was.Events.Packed, now.Events.Packed) || was.Events.Bank != now.Events.Bank {
		if len(was.Events.Packed) == 0 {
			d.pcrs("host", &was.PCRs, &now.PCRs, p.Bank, p.Events)
		}
		return
	}
	a, errA := eventlog.UntrustedParse(unpack(was.Events.Packed))
	b, errB := eventlog.UntrustedParse(unpack(now.Events.Packed))
	if errA != nil || errB != nil {
		return
	}
	changes, err := eventlog.Diff(a, b, now.Events.Bank, p.Events)
	if err != nil {
		return
	}
	for _, c := range changes {
		d.add("host", "event", "PCR %d: %s", c.PCR, c.What)
	}
}

func (d *differ) pcrs(subject string, was, now *pcrs, bank string, some []uint) {
	if was.same(now) || was.Bank != bank || now.Bank != bank {
		return
	}
	for _, p := range some {
		if a, b := was.at(p), now.at(p); a != nil && b != nil && !bytes.Equal(a, b) {
			d.add(subject, "pcr", "PCR %d changed from %x… to %x…", p, a[:8], b[:8])
		}
	}
}

func (d *differ) files(was, now *Checkpoint) {
	known := map[int]bool{}
	if was.BootID == now.BootID {
		for _, f := range was.IMA.Found {
			known[f.Entry] = true
		}
	}
	for _, f := range now.IMA.Found {
		if !known[f.Entry] {
			d.add("host", "ima-entry", "%.300q is no Reference Value", cmp.Or(f.Path, f.What))
		}
	}
	if slices.Equal(was.Launch.Files, now.Launch.Files) {
		return
	}
	old := map[string]string{}
	for _, f := range was.Launch.Files {
		old[f.Path] = f.SHA256
	}
	for _, f := range now.Launch.Files {
		switch before := old[f.Path]; {
		case before == f.SHA256:
		case before == "":
			d.add("host", "launcher", "%s %.200s is new", f.Role, f.Path)
		default:
			d.add("host", "launcher", "%s %.200s changed from %.16s… to %.16s…", f.Role, f.Path, before, f.SHA256)
		}
	}
}

func (d *differ) vm(uuid string, was, now vmState, known bool, p *Policy) {
	switch {
	case !known:
		d.add(uuid, "vm-new", "VM %.80q is new", now.Name)
	case now.Start.Time != 0 && (now.Start.Generation != was.Start.Generation || now.Start.Time != was.Start.Time):
		d.add(uuid, "vm-started", "VM %.80q was started", now.Name)
	case was.Running && !now.Running:
		d.add(uuid, "vm-stopped", "VM %.80q does not run any more", now.Name)
	}
	if !known {
		return
	}
	if was.Tier != now.Tier {
		d.add(uuid, "tier", "%s, was %s", now.Tier, was.Tier)
	}
	d.pcrs(uuid, &was.PCRs, &now.PCRs, p.VMBank, allPCRs)
}
