package appraise

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"virt-trust/internal/evidence/quote"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/fleet"
)

// round is one appraisal.
type round struct {
	in     *Input
	policy *compiled
	prev   *Checkpoint // may be nil
	next   *Checkpoint

	evidence *report.Evidence
	report   *report.Report
	quote    quote.Quote
	live     report.Values // PCRs of the policy's bank, as quoted
	sameBoot bool          // as that of prev
	values   view          // for the host

	host      []Reason
	softOnly  bool // Executables is vouched for up to the boot alone: there is no IMA list
	learnHost bool
	again     bool // the logs are wanted whole in the next round, which is then learned
	// learnLaunchers: the first good round in which the host had any is this one.
	learnLaunchers bool
	// launchKnown: the launch log was replayed, or there is nothing that it could say.
	launchKnown bool
	unknown     map[int]bool  // launchers that are no Reference Values, by number
	learned     []fleet.Value // of the host
	vmLearned   []fleet.Value
	once        map[[4]string]bool // what is in these two
	vms         []VM
	shared      struct { // launchers of the VM before
		numbers []int
		files   []Launcher
	}
}

// Appraise holds the Evidence of a round against what is known. The Checkpoint
// is what the next round begins with: a new one, or Previous where nothing could
// be verified. It never panics, and never gives a tier better than what the
// Evidence of this round shows.
func Appraise(in Input) (Result, *Checkpoint) {
	result, next, _ := Round(in)
	return result, next
}

// Learn gives the Reference Values that an appraisal with Learn takes for
// right, as Round does.
func Learn(in Input) []fleet.Value {
	if !in.Learn {
		return nil
	}
	_, _, learned := Round(in)
	return learned
}

// Round is Appraise, and gives the Reference Values that were learned: the host's
// (subject: node ID) and its VMs' (subject: UUID), approved. The caller stores
// them before the next round.
func Round(in Input) (result Result, next *Checkpoint, learned []fleet.Value) {
	defer func() {
		if p := recover(); p != nil { // of a library that was fed something: nothing is known
			r := &round{in: &in, prev: in.Previous}
			r.hostf(CodeInternal, None, "the appraisal failed: %v", p)
			result, next, learned = r.result(), in.Previous, nil
		}
	}()
	r := &round{in: &in, prev: in.Previous}
	if in.Policy == nil {
		r.hostf(CodeInternal, None, "there is no appraisal policy")
		return r.result(), in.Previous, nil
	}
	r.policy = in.Policy.compile()
	if !r.verify() {
		return r.result(), in.Previous, nil
	}
	r.begin()
	r.clock()
	r.standing()
	r.eventLog()
	r.imaList()
	r.launchLog()
	r.hostPCRs()
	r.reportedVMs()
	result = r.result()
	r.conclude(&result)
	result.Changes = Diff(in.Previous, r.next, r.policy.Policy)
	return result, r.next, slices.Concat(r.learned, r.vmLearned)
}

// hostf notes a finding about the host.
func (r *round) hostf(code string, t Tier, format string, args ...any) {
	r.host = append(r.host, Reason{Code: code, Tier: t, What: fmt.Sprintf(format, args...)})
}

// verify says whether the Evidence is this node's, of this round, and whole.
func (r *round) verify() bool {
	in := r.in
	if len(in.Evidence) == 0 {
		r.hostf(CodeNoEvidence, None, "there is no Evidence")
		return false
	}
	p := in.Parsed
	if p == nil {
		p = parse(in.Evidence)
	}
	if p.badEvidence != nil {
		r.hostf(CodeFormat, None, "%v", p.badEvidence)
		return false
	}
	e := p.evidence
	r.evidence = e
	if len(in.Nonce) < 16 || !bytes.Equal(e.Nonce, in.Nonce) {
		r.hostf(CodeNonce, Contraindicated, "the Evidence answers another nonce: replayed, or relayed")
		return false
	}
	if !in.Expires.IsZero() && in.Now.After(in.Expires) {
		r.hostf(CodeNonceLate, None, "the Evidence came %s after its nonce had expired", in.Now.Sub(in.Expires).Round(time.Second))
		return false
	}
	q, err := quote.Verify(e.Quote.Attest, e.Quote.Signature, in.Node.AK, report.QualifyingData(e.Nonce, e.Report))
	switch {
	case errors.Is(err, quote.ErrSignature):
		r.hostf(CodeSignature, Contraindicated, "the quote is not signed by the AK of this node: %v", err)
	case errors.Is(err, quote.ErrQualifying):
		r.hostf(CodeQualifying, Contraindicated, "the quote is of another nonce or of another report")
	case err != nil:
		r.hostf(CodeQuote, None, "%v", err)
	}
	if err != nil {
		return false
	}
	r.quote = q
	if p.readReport(); p.badReport != nil {
		r.hostf(CodeFormat, None, "%v", p.badReport)
		return false
	}
	r.report = p.report
	if in.Node.AKName != nil && !bytes.Equal(r.report.AK, in.Node.AKName) {
		r.hostf(CodeAKName, Contraindicated, "the report names another AK, %x", r.report.AK)
		return false
	}
	return r.verifyPCRs()
}

func (r *round) verifyPCRs() bool {
	err := r.quote.Covers(r.policy.Bank, r.policy.PCRs)
	if err != nil {
		code := CodePCRsMissing
		switch {
		case errors.Is(err, quote.ErrNoPCRs):
			code = CodeNoPCRs
		case errors.Is(err, quote.ErrBank):
			code = CodeBank
		}
		r.hostf(code, Contraindicated, "%v", err)
		return false
	}
	if err := r.quote.Check(r.evidence.PCRs.Value); err != nil {
		r.hostf(CodePCRValues, Contraindicated, "%v", err)
		return false
	}
	for _, p := range r.quote.PCRs(r.policy.Bank) { // nothing vouches for another one
		r.live[p] = r.evidence.PCRs.Value(r.policy.Bank, p)
	}
	return true
}

// begin takes up where the round before left, as far as it was the same boot.
func (r *round) begin() {
	n := r.prev.clone()
	r.next = n
	r.sameBoot = r.prev != nil && r.prev.BootID == r.report.BootID && r.prev.Resets == r.quote.Clock.Resets
	if !r.sameBoot || n.PCRs.Bank != r.policy.Bank { // logs are replayed in one bank
		n.Events, n.IMA, n.Launch = eventState{}, imaState{}, launchState{}
	}
	n.BootID, n.Received = r.report.BootID, r.in.Now.Unix()
	n.Clock, n.Resets, n.Restarts = r.quote.Clock.Milliseconds, r.quote.Clock.Resets, r.quote.Clock.Restarts
	n.PCRs = packPCRs(r.policy.Bank, &r.live, everyPCR, n.PCRs)
	r.values = r.in.view(append([]string{"", r.in.Node.ID}, r.in.Node.Groups...)...)
	n.Values, n.Policy = r.values.revision(), r.policy.revision
	own := r.in.view(r.in.Node.ID)
	r.learnLaunchers = r.in.Learn && !n.Launchers && !own.hasLauncher() && !own.rejected(fleet.Launcher)
	r.learnHost = r.in.Learn && !n.Learned && !own.hasHost(pcrPath(r.policy.Bank, r.policy.LaunchPCR)) && !own.rejected(fleet.HostEvent, fleet.HostPCR, fleet.HostIMA)
	// A part of a log was appraised while the host was not to be learned.
	r.again = r.learnHost && r.sameBoot && (n.Events.Size > 0 || n.IMA.At.Offset > 0)
	r.learnHost = r.learnHost && !r.again
}

// clock tells reboots from replays and from TPMs that were reset behind the
// kernel's back.
func (r *round) clock() {
	c := r.quote.Clock
	if p := r.prev; p != nil {
		sameBoot := p.BootID == r.report.BootID
		// Of the counters the differences count: see quote.Clock.
		resets, restarts := int32(c.Resets-p.Resets), int32(c.Restarts-p.Restarts)
		switch {
		case resets < 0:
			r.hostf(CodeClockBack, Contraindicated, "the TPM counts %d resets less than before: old Evidence, or an old TPM", -int64(resets))
		case resets == 0 && (restarts < 0 || c.Milliseconds < p.Clock):
			r.hostf(CodeClockBack, Contraindicated, "the TPM's clock is at %d ms, with %d more restarts, and was at %d ms: old Evidence, or an old TPM", c.Milliseconds, restarts, p.Clock)
		case c.Milliseconds < p.Clock && c.Safe:
			r.hostf(CodeClockBack, Contraindicated, "the TPM's clock went back from %d ms to %d ms, and it says that it did not", p.Clock, c.Milliseconds)
		}
		switch {
		case resets > 0 && sameBoot:
			r.hostf(CodeResets, Contraindicated, "the TPM was reset while the kernel ran on: its PCRs have lost what was measured")
		case resets == 0 && !sameBoot:
			r.hostf(CodeResets, Contraindicated, "another kernel runs, and the TPM was not reset: it was not measured as a boot is")
		}
	}
	if skew := r.in.Now.Sub(time.UnixMicro(r.report.Time)); skew.Abs() > time.Duration(r.policy.MaxSkew) {
		r.hostf(CodeClockSkew, Warning, "the host's clock and the Verifier's differ by %s", skew.Round(time.Second))
	}
}

// standing is what virt-trustd says of itself.
func (r *round) standing() {
	switch s := r.report.Host.ListState; s {
	case "readable", "empty":
	case "sealed", "damaged", "rolled-back":
		r.hostf(CodeListState, Contraindicated, "the vTPM list is %s", s)
	default:
		r.hostf(CodeListState, None, "the vTPM list is in a state that is not known: %.40q", s)
	}
	switch m := r.report.Host.Mode; m {
	case "enforce":
	case "audit":
		r.hostf(CodeMode, r.policy.AuditMode, "virt-trustd is in mode audit: it refuses nothing")
	default:
		r.hostf(CodeMode, None, "virt-trustd is in a mode that is not known: %.40q", m)
	}
}

// log gives a log of the host, and from where on it is new: ok is false, with a
// finding, where it cannot be taken up.
func (r *round) log(kind string, have uint64) (l *report.Log, ok bool) {
	for i := range r.evidence.Logs {
		if r.evidence.Logs[i].Kind == kind {
			l = &r.evidence.Logs[i]
		}
	}
	if l == nil {
		return nil, true
	}
	if l.From != 0 && l.From != have {
		r.hostf(CodeLogIncomplete, None, "the %s begins at byte %d, and %d bytes are known", kind, l.From, have)
		return l, false
	}
	return l, true
}

// missing says why a log is not there.
func missing(l *report.Log) string {
	if l != nil && l.Problem != "" {
		return l.Problem
	}
	return "it was not sent"
}

// rank orders tiers, the worst highest: what is known to be bad is worse than
// what is not known.
func rank(t Tier) int {
	switch t {
	case Affirming:
		return 0
	case Warning:
		return 1
	case Contraindicated:
		return 3
	}
	return 2
}

// worst is the tier of all findings.
func worst(reasons []Reason) Tier {
	t := Affirming
	for _, r := range reasons {
		if rank(r.Tier) > rank(t) {
			t = r.Tier
		}
	}
	return t
}

// maxReasons of one subject are given.
const maxReasons = 256

// settle sorts findings, and leaves out those without consequence, and what no
// database takes.
func settle(reasons []Reason) []Reason {
	reasons = slices.DeleteFunc(reasons, func(r Reason) bool { return r.Tier == Affirming })
	for i := range reasons {
		r := &reasons[i]
		r.What, r.Path = storable(r.What), storable(r.Path)
	}
	slices.SortStableFunc(reasons, func(a, b Reason) int { return cmp.Compare(rank(b.Tier), rank(a.Tier)) })
	if n := len(reasons); n > maxReasons {
		reasons = append(reasons[:maxReasons:maxReasons], Reason{Code: CodeTooMany, Tier: reasons[maxReasons].Tier, What: fmt.Sprintf("%d more findings", n-maxReasons)})
	}
	return reasons
}

func storable(s string) string {
	if utf8.ValidString(s) && strings.IndexByte(s, 0) < 0 {
		return s
	}
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}

// result is what came of it. Where the Evidence could not be verified, VMs that
// are known are None too.
func (r *round) result() Result {
	in := r.in
	res := Result{Node: in.Node.ID, Received: in.Now, Expires: in.Now}
	if in.Policy != nil {
		res.Expires = in.Now.Add(time.Duration(in.Policy.MaxAge))
	}
	res.Host = appraisal(r.host, r.softOnly, nil)
	if r.next != nil {
		h := r.report.Host
		res.HostName, res.Software, res.Kernel, res.BootID, res.PCRs = h.Name, h.Software, h.Kernel, r.report.BootID, PCRs{packed: r.next.PCRs}
	} else if r.prev != nil {
		for uuid, v := range r.prev.VMs {
			r.vms = append(r.vms, VM{UUID: uuid, Name: v.Name, Running: v.Running})
		}
		slices.SortFunc(r.vms, func(a, b VM) int { return cmp.Compare(a.UUID, b.UUID) })
	}
	res.VMs = r.vms
	if res.VMs == nil {
		res.VMs = []VM{}
	}
	for i := range res.VMs {
		v := &res.VMs[i]
		v.Appraisal = appraisal(v.Reasons, r.softOnly, &res.Host)
	}
	return res
}

// conclude notes what came of it for the next round.
func (r *round) conclude(res *Result) {
	n := r.next
	n.Host = res.Host.Tier
	good := rank(n.Host) <= rank(Warning)
	if r.learnHost && good {
		n.Learned = true
	}
	if good && len(n.Launch.Files) > 0 {
		n.Launchers = true
	}
	if r.again {
		n.Events, n.IMA = eventState{}, imaState{}
	}
	if !good { // nothing is learned of a host that is not right, and not of its VMs
		r.learned, r.vmLearned = nil, nil
		if r.learnHost { // and the next round begins anew
			n.Events, n.IMA = eventState{}, imaState{}
		}
	}
	for _, v := range res.VMs {
		s, ok := n.VMs[v.UUID]
		if !ok {
			continue
		}
		s.Tier = v.Tier
		if !good && r.learnsVM(v.UUID) {
			s.Learned = false
		}
		n.VMs[v.UUID] = s
	}
}

// learn takes something for right that is new, unless it cannot be stored.
func (r *round) learn(subject string, kind fleet.Kind, path, digest string) bool {
	v := fleet.Value{Subject: subject, Kind: kind, Path: path, Digest: digest, Source: "learned", State: fleet.Approved, Time: r.in.Now}
	if CheckValue(v) != nil {
		return false
	}
	key := [4]string{subject, string(kind), path, digest}
	if r.once[key] { // a thing that was measured twice
		return true
	}
	if r.once == nil {
		r.once = map[[4]string]bool{}
	}
	r.once[key] = true
	if kind == fleet.VMPCR {
		r.vmLearned = append(r.vmLearned, v)
	} else {
		r.learned = append(r.learned, v)
	}
	return true
}
