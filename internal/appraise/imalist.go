package appraise

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"virt-trust/internal/evidence/ima"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/fleet"
)

// maxIMAFound findings are kept of a list. MaxAccepted bounds what is kept of
// those that were accepted, in bytes.
const (
	maxIMAFound    = 4096
	maxIMAAccepted = 16 * ima.MaxEntries
)

func zeros(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

// imaList replays the kernel's measurement list, or what is new of it, up to
// the quote, and holds its files against Reference Values and policy. What was not
// right before remains so until Reference Values or policy say otherwise.
func (r *round) imaList() {
	st := &r.next.IMA
	want := r.live[ima.PCR]
	l, ok := r.log(report.IMA, st.At.Offset)
	if !ok {
		*st = imaState{}
		return
	}
	switch {
	case want == nil:
		*st, r.softOnly = imaState{}, true
		if r.policy.IMA.Require {
			r.hostf(CodeIMAMissing, None, "PCR %d was not quoted", ima.PCR)
		}
		return
	case l == nil || l.Problem != "":
		*st, r.softOnly = imaState{}, true
		if r.policy.IMA.Require || !zeros(want) {
			r.hostf(CodeIMAMissing, None, "there is no IMA measurement list: %.200s", missing(l))
		}
		return
	}
	if l.From == 0 {
		*st = imaState{}
	}
	policyChanged := st.At.Entries > 0 && r.prev.Policy != r.next.Policy
	const usual = 128                                                           // bytes of an entry, more or less
	st.Accepted = slices.Grow(slices.Clip(st.Accepted), 16*(len(l.Data)/usual)) // it is the checkpoint's before
	withdrawn := st.At.Entries > 0 && r.revised() && r.reviewIMA(st)
	v := imaVisit{r: r, st: st}
	at, err := st.At.Replay(l.Data, r.policy.Bank, ima.PCR, want, v.entry)
	if errors.Is(err, ima.ErrReplay) && l.More {
		if at, err = st.At.Advance(l.Data, r.policy.Bank, ima.PCR, v.entry); err == nil {
			r.hostf(CodeLogIncomplete, None, "the IMA measurement list goes on: %d entries of it are known", at.Entries)
		}
	}
	if err != nil {
		*st = imaState{}
		if errors.Is(err, ima.ErrFormat) {
			r.hostf(CodeIMAFormat, None, "%v", err)
		} else {
			r.hostf(CodeIMAReplay, Contraindicated, "%v: entries were dropped, reordered or changed", err)
		}
		return
	}
	st.At = at
	r.softOnly = at.Entries <= 1 // the kernel's own first entry
	if r.policy.IMA.Require && at.Entries == 0 {
		r.hostf(CodeIMAMissing, None, "the IMA measurement list is empty")
	}
	r.imaFindings(st)
	if policyChanged {
		r.hostf(CodePolicyChanged, Warning, "the policy has changed: %d files were appraised under the one before, and are asked for again", at.Entries)
	}
	if policyChanged || withdrawn {
		// What the policy before excluded, and which files they are that were
		// accepted, is not kept: the next round brings the list whole.
		*st = imaState{}
	}
}

// reviewIMA holds what was found and accepted before against Reference Values
// that have changed, and says whether something accepted is so no more.
func (r *round) reviewIMA(st *imaState) bool {
	st.Found = slices.DeleteFunc(st.Found, func(f imaFinding) bool {
		if f.Code != "" || f.Violation || len(f.Digest) < 9 {
			return false
		}
		ok := r.values.file(ofIMA, append(bytes.Clone(f.Digest), f.Path...), len(f.Digest))
		if ok {
			st.accept([]byte(f.Path), f.Digest[1:])
		}
		return ok
	})
	withdrawn := 0
	for b := st.Accepted; len(b) >= 16; b = b[16:] {
		if !r.values.marked(binary.BigEndian.Uint64(b)) && !r.values.marked(binary.BigEndian.Uint64(b[8:])) {
			withdrawn++
		}
	}
	if withdrawn > 0 {
		st.Found = append(st.Found, imaFinding{Entry: -1, Code: CodeIMAWithdrawn, What: fmt.Sprintf("%d files were Reference Values when they were measured, and are none any more; which, the next round tells", withdrawn)})
	}
	return withdrawn > 0
}

// imaVisit takes up entries that are new.
type imaVisit struct {
	r   *round
	st  *imaState
	key []byte // of the entry, as in Values
}

func (v *imaVisit) entry(n uint64, e *ima.Entry) {
	r := v.r
	switch {
	case e.PCR != ima.PCR:
		v.found(imaFinding{Entry: int(n), Path: string(e.Path), Code: CodeIMAUnknown, What: fmt.Sprintf("an entry of PCR %d: nothing vouches for it", e.PCR)})
		return
	case !e.Known:
		v.found(imaFinding{Entry: int(n), Code: CodeIMAUnknown, What: fmt.Sprintf("an entry of template %.40q, which is not known", e.Template)})
		return
	case n == 0 && string(e.Path) == "boot_aggregate":
		if !r.bootAggregate(e) {
			v.found(imaFinding{Entry: 0, Path: "boot_aggregate", Code: CodeIMAAggregate, What: "the list's first entry is of another boot"})
		}
		return
	}
	if r.policy.excluded(e.Path) {
		return
	}
	id, size := identify(e.Algorithm)
	if e.Violation() || size == 0 || len(e.Digest) != size {
		f := imaFinding{Entry: int(n), Path: string(e.Path), Violation: e.Violation()}
		if !f.Violation {
			f.Code, f.What = CodeIMAUnknown, fmt.Sprintf("a file with a digest of algorithm %.20q", e.Algorithm)
		}
		v.found(f)
		return
	}
	v.key = append(append(append(v.key[:0], id), e.Digest...), e.Path...)
	ok := r.values.file(ofIMA, v.key, 1+size)
	if !ok && len(r.policy.keys) > 0 && len(e.Signature) > 0 && imaSigned(r.policy.keys, e.Algorithm, e.Digest, e.Signature) {
		return
	}
	if !ok && r.learnHost {
		ok = r.learn(r.in.Node.ID, fleet.HostIMA, string(e.Path), e.Algorithm+":"+hex.EncodeToString(e.Digest))
	}
	if !ok {
		v.found(imaFinding{Entry: int(n), Path: string(e.Path), Digest: bytes.Clone(v.key[:1+size])})
		return
	}
	v.st.accept(e.Path, e.Digest)
}

// accept remembers what a Reference Value accepted.
func (st *imaState) accept(path, digest []byte) {
	if len(st.Accepted) < maxIMAAccepted {
		st.Accepted = binary.BigEndian.AppendUint64(st.Accepted, mark(path, digest))
		st.Accepted = binary.BigEndian.AppendUint64(st.Accepted, mark(nil, digest))
	}
}

func (v *imaVisit) found(f imaFinding) {
	if len(f.Path) > maxPath {
		f.Path = f.Path[:maxPath]
	}
	f.Path = storable(f.Path)
	if len(v.st.Found) >= maxIMAFound {
		v.st.More++
		return
	}
	v.st.Found = append(v.st.Found, f)
}

// bootAggregate checks the kernel's first entry: a hash over PCRs 0 to 7, and with
// kernels since 5.8, where it is not SHA-1, 8 and 9 too
// (ima_calc_boot_aggregate). Those of a bank that was not quoted cannot be
// checked; the PCRs themselves are, by the event log.
func (r *round) bootAggregate(e *ima.Entry) bool {
	h, ok := hashes[e.Algorithm]
	if !ok || e.Algorithm != r.policy.Bank {
		return true
	}
	w := h.New()
	for p := range uint(10) {
		v := r.live[p]
		if v == nil { // it was not quoted
			return true
		}
		w.Write(v)
		if p == 7 && bytes.Equal(w.Sum(nil), e.Digest) {
			return true
		}
	}
	return bytes.Equal(w.Sum(nil), e.Digest)
}

// imaFindings makes findings of what is not accepted.
func (r *round) imaFindings(st *imaState) {
	for i := range st.Found {
		if i == maxReasons {
			r.hostf(CodeIMATooMany, r.policy.IMA.Unknown, "%d more files are no Reference Values", uint64(len(st.Found)-maxReasons)+st.More)
			return
		}
		r.host = append(r.host, r.imaReason(&st.Found[i]))
	}
	if st.More > 0 {
		r.hostf(CodeIMATooMany, r.policy.IMA.Unknown, "%d more files are no Reference Values", st.More)
	}
}

func (r *round) imaReason(f *imaFinding) Reason {
	reason := Reason{Code: f.Code, Tier: r.policy.IMA.Unknown, What: f.What, Log: report.IMA, Path: f.Path}
	if f.Entry >= 0 {
		n, pcr := f.Entry, uint(ima.PCR)
		reason.Entry, reason.PCR = &n, &pcr
	}
	switch {
	case f.Code == CodeIMAAggregate:
		reason.Tier = Contraindicated
	case f.Code != "":
	case f.Violation:
		reason.Code, reason.What = CodeIMAViolation, "a file was written while it was measured: what was read of it is not known"
	default:
		reason.Code, reason.What = CodeIMAUnknown, "a file that is no Reference Value"
		reason.Digest = digestText(f.Digest)
		if want := r.values.at(ofIMA, []byte(f.Path)); len(want) > 0 {
			reason.Code, reason.Tier, reason.What = CodeIMAChanged, r.policy.IMA.Changed, "a file is not what its Reference Values say"
			reason.Expected = expected("", want)
		}
	}
	return reason
}

// digestText writes a digest of Values as "sha256:…".
func digestText(key []byte) string {
	for _, name := range algorithms {
		if id, size := identify(name); len(key) == 1+size && key[0] == id {
			return name + ":" + hex.EncodeToString(key[1:])
		}
	}
	return ""
}
