package appraise

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"virt-trust/internal/evidence/report"
	"virt-trust/internal/launcher/launchlog"
	"virt-trust/internal/verifier/fleet"
)

// launchLog replays the launch log, or what is new of it, up to the quote, and
// holds the files in it against Reference Values.
func (r *round) launchLog() {
	st := &r.next.Launch
	pcr := r.policy.LaunchPCR
	if p := r.report.Host.LaunchPCR; p != pcr {
		r.hostf(CodeLaunchPCR, Contraindicated, "the host measures launchers to PCR %d, and has to do so to PCR %d", p, pcr)
	}
	want := r.live[pcr]
	l, ok := r.log(report.LaunchLog, st.Size)
	switch {
	case !ok:
		*st = launchState{}
		return
	case want == nil:
		*st = launchState{}
		r.hostf(CodeLaunchMissing, None, "PCR %d of the launch log was not quoted in bank %s", pcr, r.policy.Bank)
		return
	case l == nil || l.Problem != "":
		*st = launchState{}
		if r.launchKnown = zeros(want); !r.launchKnown { // else nothing was measured
			r.hostf(CodeLaunchMissing, None, "there is no launch log: %.200s", missing(l))
		}
		return
	}
	before := *st
	if l.From == 0 {
		*st = launchState{}
	}
	if !r.replayLaunch(st, l, want, before) {
		*st = launchState{}
		return
	}
	r.launchKnown = !l.More || len(l.Data) == 0
	r.launchBoot(st.Boot)
	r.launchFiles(st.Files)
}

func (r *round) replayLaunch(st *launchState, l *report.Log, want []byte, before launchState) bool {
	if len(l.Data) == 0 && st.Boot != nil && bytes.Equal(st.Values[r.policy.Bank], want) {
		return true // nothing is new
	}
	bank := r.policy.Bank
	log := &launchlog.Log{Bank: bank}
	if st.Boot != nil {
		log = launchlog.Resume(launchlog.Log{Bank: bank, Boot: *st.Boot, Entries: st.Entries, Files: slices.Clip(st.Files), Values: map[string][]byte{bank: st.Values[bank]}})
	}
	// Before its first line a log says nothing: then the PCR holds zeros, or the
	// line is not in it yet.
	reached := func() bool {
		return log.Entries == 0 && zeros(want) || log.Entries > 0 && bytes.Equal(log.Values[bank], want)
	}
	lines, _ := launchlog.Split(l.Data)
	size, starts := st.Size, maps.Clone(st.Starts)
	if starts == nil {
		starts = map[string]vmStart{}
	}
	// A log that is sent whole has to go on from what was known of it.
	known := l.From > 0 || before.Entries == 0
	for _, line := range lines {
		if reached() { // what follows was measured after the quote
			break
		}
		starting := log.Starts
		if err := log.Add(line); err != nil {
			r.hostf(CodeLaunchFormat, None, "%v", err)
			return false
		}
		size += uint64(len(line)) + 1
		known = known || size == before.Size && bytes.Equal(log.Values[bank], before.Values[bank])
		if s := log.Last; log.Starts > starting {
			if !isUUID(s.VM) {
				r.hostf(CodeLaunchFormat, None, "a start of %.60q, which is no VM's UUID", s.VM)
				return false
			}
			starts[s.VM] = vmStart{Generation: s.Generation, EK: s.EK, Time: log.Time, Launchers: s.Launchers}
		}
	}
	if !reached() {
		if l.More {
			r.hostf(CodeLogIncomplete, None, "the launch log goes on")
		} else {
			n := r.policy.LaunchPCR
			r.host = append(r.host, Reason{
				Code: CodeLaunchReplay, Tier: Contraindicated, Log: report.LaunchLog, PCR: &n, Digest: hex.EncodeToString(want), Expected: hex.EncodeToString(log.Values[bank]),
				What: fmt.Sprintf("the launch log does not lead to PCR %d: entries were dropped, reordered or changed, or something else was measured there", n),
			})
			return false
		}
	}
	if !known {
		r.hostf(CodeLogChanged, Contraindicated, "the launch log is another one than before in the same boot: what it said then is gone")
	}
	*st = launchState{Size: size, Entries: log.Entries, Files: log.Files, Values: log.Values, Starts: starts}
	if log.Entries > 0 {
		st.Boot = &log.Boot
	}
	return true
}

// launchBoot checks that the log is of this boot and of this life of the PCR. What
// the quote says of resets is hidden by a number that stays the same (quote.Clock):
// the first log tells it, and the later ones have to agree.
func (r *round) launchBoot(b *launchlog.Boot) {
	if b == nil {
		return
	}
	hides := r.quote.Clock.Resets - b.ResetCount
	other := r.next.Hides != nil && *r.next.Hides != hides
	switch {
	case b.ID != r.report.BootID || b.PCR != r.policy.LaunchPCR || other:
		r.hostf(CodeLaunchBoot, Contraindicated, "the launch log is of boot %.40q and TPM reset %d, for PCR %d; the host is in boot %.40q, or after another reset, and names PCR %d",
			b.ID, b.ResetCount, b.PCR, r.report.BootID, r.policy.LaunchPCR)
		return
	case b.Gap != "":
		r.hostf(CodeLaunchGap, Contraindicated, "a part of the launch log is lost, so that a VM may have been started that nobody knows of: %.200s", b.Gap)
	}
	r.next.Hides = &hides
	r.launchBefore(b)
}

// launchBefore looks at what the PCR held when the log began: zeros, or what a
// Reference Value for that PCR says, such as systemd's measurement of the machine id.
// Whoever extends the PCR could else begin a log anew, and hide what was started
// before.
func (r *round) launchBefore(b *launchlog.Boot) {
	was := b.Before[r.policy.Bank]
	path := pcrPath(r.policy.Bank, b.PCR)
	if strings.Trim(was, "0") == "" || slices.Contains(r.values.pcr(ofHost, path), was) {
		return
	}
	if r.learnHost && r.learn(r.in.Node.ID, fleet.HostPCR, path, r.policy.Bank+":"+was) {
		return
	}
	pcr := b.PCR
	r.host = append(r.host, Reason{
		Code: CodeLaunchBefore, Tier: r.policy.UnknownLauncher, Log: report.LaunchLog, PCR: &pcr, Path: path, Digest: r.policy.Bank + ":" + was,
		Expected: expected(r.policy.Bank+":", r.values.pcr(ofHost, path)),
		What:     fmt.Sprintf("PCR %d held something before the launch log began, so that an earlier part of it may be missing", pcr),
	})
}

// launchFiles says of launchers that they are no Reference Values. With Learn, those
// that the host itself approved, at paths of which nothing is known, are taken for
// right in the first good round that has any: a host has its first VM after its
// first round. Not later: a host that was taken over meanwhile approves anything.
func (r *round) launchFiles(files []launchlog.File) {
	r.unknown = map[int]bool{}
	for i := range files {
		f := &files[i]
		if r.launcherKnown(f) {
			continue
		}
		r.unknown[f.N] = true
		n := f.N - 1
		r.host = append(r.host, r.launcherReason(f, minTier(r.policy.UnknownLauncher, Warning), &n))
	}
}

// minTier is the better of two tiers.
func minTier(a, b Tier) Tier {
	if rank(a) < rank(b) {
		return a
	}
	return b
}

func (r *round) launcherReason(f *launchlog.File, t Tier, n *int) Reason {
	if !r.values.hasLauncher() {
		t = None // nothing is known of any
	}
	return Reason{
		Code: CodeLauncherUnknown, Tier: t, Log: report.LaunchLog, Entry: n, Path: f.Path, Digest: "sha256:" + f.SHA256,
		Expected: expected("", r.values.at(ofLauncher, []byte(f.Path))),
		What:     fmt.Sprintf("%.40s %.200s is no Reference Value", f.Role, f.Path),
	}
}

func (r *round) launcherKnown(f *launchlog.File) bool {
	d, err := launchlog.ParseDigest(f.SHA256)
	if err != nil {
		return false
	}
	id, size := identify("sha256")
	var room [256]byte // for nearly all: there is one for each file in each round
	key := append(append(append(room[:0], id), d[:]...), f.Path...)
	if r.values.file(ofLauncher, key, 1+size) {
		return true
	}
	if r.learnLaunchers && f.By != "" && len(r.values.at(ofLauncher, []byte(f.Path))) == 0 &&
		!r.values.has(func(s *subjectValues) bool { return s.rejected[fleet.Launcher][f.Path] }) {
		return r.learn(r.in.Node.ID, fleet.Launcher, f.Path, "sha256:"+f.SHA256)
	}
	return false
}
