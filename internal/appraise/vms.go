package appraise

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"virt-trust/internal/evidence/quote"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/vtpm/list"
)

// uuidText is a UUID as libvirt writes it.
func uuidText(u [16]byte) string {
	h := hex.EncodeToString(u[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// isUUID reports whether s is spelt as uuidText spells it.
func isUUID(s string) bool {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	return err == nil && len(b) == 16 && uuidText([16]byte(b)) == s
}

// reportedVMs appraises each VM of the report, and those that the report hides.
func (r *round) reportedVMs() {
	n := len(r.report.VMs)
	states, byEK := make(map[string]vmState, n), make(map[string]int, n)
	r.vms = make([]VM, 0, n)
	for i := range r.report.VMs {
		v := &r.report.VMs[i]
		vm, st := r.vm(v)
		states[vm.UUID] = st
		r.vms = append(r.vms, vm)
		if first, there := byEK[vm.EK]; !there {
			byEK[vm.EK] = i
		} else if vm.EK != "" {
			r.shareEK(i, first)
			r.shareEK(first, i)
		}
	}
	r.hiddenVMs(states)
	r.next.VMs = states
}

// shareEK: VM i has the endorsement key of another one, which is said once.
func (r *round) shareEK(i, other int) {
	v := &r.vms[i]
	if !slices.ContainsFunc(v.Reasons, func(x Reason) bool { return x.Code == CodeVMSharedEK }) {
		v.Reasons = append(v.Reasons, Reason{Code: CodeVMSharedEK, Tier: Contraindicated, What: fmt.Sprintf("its vTPM has the endorsement key of VM %s as well: one was copied", r.vms[other].UUID)})
	}
}

// learnsVM: the VM's first good round is this one.
func (r *round) learnsVM(uuid string) bool {
	if own := r.in.view(uuid); !r.in.Learn || r.in.Elsewhere[uuid] || own.hasVM() || own.rejected(fleet.VMPCR) {
		return false
	}
	return r.prev == nil || !r.prev.VMs[uuid].Learned
}

func (r *round) vm(v *report.VM) (VM, vmState) {
	uuid := uuidText(v.UUID)
	vm := VM{UUID: uuid, Name: v.Name, Running: v.Running, EK: hex.EncodeToString(v.EK), EKCertificate: v.EKCertificate}
	var before vmState
	if r.prev != nil {
		before = r.prev.VMs[uuid]
	}
	st := vmState{Name: v.Name, EK: v.EK, Learned: before.Learned, Running: v.Running}
	say := func(code string, t Tier, format string, args ...any) {
		vm.Reasons = append(vm.Reasons, Reason{Code: code, Tier: t, What: fmt.Sprintf(format, args...)})
	}
	start, started := r.next.Launch.Starts[uuid]
	if started {
		st.Start, vm.Started = start, start.Time
		vm.Launchers = r.launchers(start)
	}
	if len(before.EK) > 0 && len(v.EK) > 0 && !bytes.Equal(before.EK, v.EK) {
		say(CodeVMEK, Warning, "it has another vTPM than in the round before")
	}
	if !v.Running {
		say(CodeVMNotRunning, None, "it does not run: there is nothing to appraise")
		return vm, st
	}
	r.vmStart(v, start, started, say)
	vm.Reasons = append(vm.Reasons, r.vmLaunchers(start)...)
	r.vmPCRs(v, &vm, &st, before, start, say)
	return vm, st
}

type sayer func(code string, t Tier, format string, args ...any)

// vmStart holds a VM that runs against the launch log and its record.
func (r *round) vmStart(v *report.VM, start vmStart, started bool, say sayer) {
	switch {
	case !r.launchKnown:
		say(CodeLaunchMissing, None, "whether and how it was started is not known: the launch log was not replayed")
	case !started:
		say(CodeVMNotStarted, Contraindicated, "it is reported to run, and was not started in this boot as far as the launch log says")
	case start.Generation != v.Generation:
		say(CodeVMGeneration, Contraindicated, "its record is of generation %d, its start in the launch log of %d", v.Generation, start.Generation)
	}
	if started && start.EK != "" && len(v.EK) > 0 && !isHex(start.EK, v.EK) {
		say(CodeVMEK, Contraindicated, "its vTPM is not the one with which it was started")
	}
	switch list.State(v.State) {
	case list.Running, list.Deploying, list.Snapshotting, list.HandingOver, list.Suspended, list.Incoming:
	default:
		say(CodeVMState, Contraindicated, "it runs, and its record is %.40q", v.State)
	}
	if v.Verdict == "refuse" {
		say(CodeVMVerdict, Warning, "it runs although it was refused: %.60s", v.Reason)
	}
}

// launchers are the files that a VM was started with. VMs mostly have the same, and
// then share them.
func (r *round) launchers(s vmStart) []Launcher {
	if r.shared.files != nil && slices.Equal(r.shared.numbers, s.Launchers) {
		return r.shared.files
	}
	all := make([]Launcher, 0, len(s.Launchers))
	for _, n := range s.Launchers {
		if n >= 1 && n <= len(r.next.Launch.Files) {
			f := &r.next.Launch.Files[n-1]
			all = append(all, Launcher{Role: storable(f.Role), Path: storable(f.Path), SHA256: f.SHA256, By: storable(f.By)})
		}
	}
	r.shared.numbers, r.shared.files = s.Launchers, slices.Clip(all)
	return r.shared.files
}

func (r *round) vmLaunchers(s vmStart) (all []Reason) {
	if len(r.unknown) == 0 {
		return nil
	}
	for _, n := range s.Launchers {
		if r.unknown[n] {
			i := n - 1
			all = append(all, r.launcherReason(&r.next.Launch.Files[i], r.policy.UnknownLauncher, &i))
		}
	}
	return all
}

// vmPCRs holds a VM's PCRs against its Reference Values, and its vTPM's quote
// against both.
func (r *round) vmPCRs(v *report.VM, vm *VM, st *vmState, before vmState, start vmStart, say sayer) {
	bank := r.policy.VMBank
	var live *report.Values
	if v.PCRs != nil {
		live = v.PCRs.Banks.Values(bank)
	}
	problem := v.Problem
	if problem == "" {
		problem = "the report has none of bank " + bank
	}
	if live == nil {
		say(CodeVMPCRsMissing, None, "its PCRs were not read: %.200s", problem)
		return
	}
	if age := time.Duration(r.report.Time-v.PCRs.Time) * time.Microsecond; age.Abs() > time.Duration(r.policy.MaxAge) {
		say(CodeVMPCRsMissing, None, "its PCRs were read %s before the report", age.Round(time.Second))
		return
	}
	st.PCRs = packPCRs(bank, live, everyPCR, before.PCRs)
	vm.PCRs = PCRs{packed: st.PCRs}
	r.vmQuote(v, say)
	starting := start.Time != 0 && r.report.Time/1e6-start.Time < int64(time.Duration(r.policy.Starting).Seconds()) && r.report.Time/1e6 >= start.Time
	values := r.in.view("", vm.UUID)
	learn := r.learnsVM(vm.UUID)
	var unknown, missing []uint
	for _, p := range r.policy.VMPCRs {
		if st.PCRs.at(p) == nil {
			missing = append(missing, p)
			continue
		}
		path := pcrPath(bank, p)
		want := values.pcr(ofVM, path)
		switch {
		case st.PCRs.is(p, want):
		case len(want) == 0:
			unknown = append(unknown, p)
		default:
			t, code := Contraindicated, CodeVMPCR
			if starting {
				t, code = Warning, CodeVMStarting
			}
			n := p
			vm.Reasons = append(vm.Reasons, Reason{
				Code: code, Tier: t, PCR: &n, Path: path, Digest: bank + ":" + st.PCRs.hex(p), Expected: expected(bank+":", want),
				What: fmt.Sprintf("PCR %d is not what its Reference Values say%s", p, map[bool]string{true: "; it was started a moment ago", false: ""}[starting]),
			})
		}
	}
	switch {
	case missing != nil:
		say(CodeVMPCRsMissing, None, "PCRs %v were not read", missing)
	case unknown == nil:
	case learn && starting:
		say(CodeVMStarting, Warning, "it was started a moment ago: its PCRs are learned when it has booted")
	case learn && rank(worst(vm.Reasons)) <= rank(Warning):
		for _, p := range unknown {
			r.learn(vm.UUID, fleet.VMPCR, pcrPath(bank, p), bank+":"+st.PCRs.hex(p))
		}
		st.Learned = true
	case learn: // it is not right in another respect
	default:
		say(CodeVMNoValues, None, "there are no Reference Values for its PCRs %v", unknown)
	}
}

// vmQuote checks the quote by the AK in the vTPM, where there is one, against
// what the host read.
func (r *round) vmQuote(v *report.VM, say sayer) {
	if v.Quote == nil {
		if r.policy.RequireVMQuote {
			say(CodeVMQuote, None, "its vTPM did not quote")
		}
		return
	}
	ak, err := quote.ParseAK(v.Quote.AK)
	switch {
	case errors.Is(err, quote.ErrKind):
		say(CodeVMQuote, Contraindicated, "the AK in its vTPM: %v", err)
		return
	case err != nil:
		say(CodeVMQuote, None, "the AK in its vTPM: %v", err)
		return
	}
	q, err := quote.Verify(v.Quote.Quote.Attest, v.Quote.Quote.Signature, ak, report.VTPMQualifyingData(r.evidence.Nonce, v.UUID))
	if err == nil {
		err = q.Covers(r.policy.VMBank, r.policy.VMPCRs)
	}
	if err != nil {
		say(CodeVMQuote, Contraindicated, "the quote of its vTPM: %v", err)
		return
	}
	if err := q.Check(v.PCRs.Banks.Value); err != nil {
		say(CodeVMReading, Contraindicated, "its vTPM quotes other PCRs than the host has read of it")
	}
}

// hiddenVMs are VMs that were started in this boot, or reported in it before,
// about which the report is silent though nobody deleted them. A start that came
// after the report was made is none.
func (r *round) hiddenVMs(states map[string]vmState) {
	gone := map[string]bool{}
	for _, d := range r.report.Deleted {
		gone[uuidText(d.UUID)] = true
	}
	hidden := map[string]string{}
	hide := func(uuid, name string) {
		if _, reported := states[uuid]; !reported && !gone[uuid] {
			hidden[uuid] = name
		}
	}
	for uuid, s := range r.next.Launch.Starts {
		if s.Time < r.report.Time/1e6-1 {
			hide(uuid, "")
		}
	}
	if r.sameBoot {
		for uuid, v := range r.prev.VMs {
			hide(uuid, v.Name)
		}
	}
	for _, uuid := range slices.Sorted(maps.Keys(hidden)) {
		reason := Reason{Code: CodeVMHidden, Tier: Contraindicated, What: "it was started, or reported, in this boot, and the report is silent about it"}
		if s := r.report.Host.ListState; s != "readable" && s != "empty" { // which is said of the host
			reason = Reason{Code: CodeListState, Tier: None, What: "the vTPM list was not read, so that nothing is known of it"}
		} else {
			r.hostf(CodeVMHidden, Contraindicated, "VM %.40s: %s", uuid, reason.What)
		}
		vm := VM{UUID: uuid, Name: hidden[uuid], Appraisal: Appraisal{Reasons: []Reason{reason}}}
		if s, ok := r.next.Launch.Starts[uuid]; ok {
			vm.Started, vm.Launchers = s.Time, r.launchers(s)
		}
		r.vms = append(r.vms, vm)
		// It stays known until it is deleted, or the host boots anew.
		before := vmState{Name: hidden[uuid]}
		if r.prev != nil {
			if p, ok := r.prev.VMs[uuid]; ok {
				before = p
			}
		}
		states[uuid] = before
	}
	slices.SortFunc(r.vms, func(a, b VM) int { return cmp.Compare(a.UUID, b.UUID) })
}
