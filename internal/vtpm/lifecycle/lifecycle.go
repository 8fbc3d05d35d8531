// Package lifecycle holds the rules by which a VM's vTPM, its label and its
// record belong together. It is pure: what was seen goes in, a decision and
// the record as it shall become come out. The bodies do what a decision says.
//
// Prepare is asked first with what can be seen without keys. Where that does
// not suffice its plan is Authenticate: unwrap the keys, hold the state
// against them, and ask again.
package lifecycle

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statefile"
)

// Policy is what the host's configuration says about starts.
type Policy struct {
	Adopt               bool // take in plain vTPMs
	StrictCrashRecovery bool // state that the journal does not know needs the admin's word
}

// Auth says whether the state was written under the VM's state key.
type Auth string

// The answers. NotAsked is the zero value.
const (
	NotAsked  Auth = ""
	Authentic Auth = "authentic"
	Forged    Auth = "forged"
	// NoKey: the key is libvirt's, so that only swtpm can tell.
	NoKey Auth = "no-key"
)

// StateSeen is a state folder as it lies on disk.
type StateSeen struct {
	Exists  bool           // there is a state file
	Kind    statefile.Kind // of the state file
	Digest  list.Digest    // canonical digest of the folder
	Strange []string       // files that a vTPM at rest does not have
	Auth    Auth
	OtherVM string // name of the VM whose baseline this is, if it is another's
}

// LabelSeen is the label in the VM's image.
type LabelSeen struct {
	Path        string // the image that should carry it; "" for a VM without one
	Unsupported string // why this image cannot carry a label
	Present     bool
	Damaged     string      // why the payload is no label, or ""
	Digest      list.Digest // of the payload
	VM          string      // the UUID that the label names
	ID          [16]byte
	Generation  uint64
	ThisHost    bool // the label has our bind key among its recipients
}

// Seen is everything that a decision about a start rests on.
type Seen struct {
	UUID, Name, Instance string
	KeyOwner             list.KeyOwner
	State                StateSeen
	Label                LabelSeen
	// Kept is the digest of the last good state that virt-trustd kept, if any.
	Kept list.Digest
	// Journal has the state's digests noted since the record was opened.
	Journal []list.Past
	// Restored: RestoreKept was carried out just now.
	Restored bool
	// FolderOf is the name of another VM whose record has this state folder.
	FolderOf string
}

// Plan is what a start needs.
type Plan string

// The plans of Prepare.
const (
	Start           Plan = "start"           // all is right: grant
	Authenticate    Plan = "authenticate"    // ask again with State.Auth
	Create          Plan = "create"          // a new VM: keys, label, record
	CreateForeign   Plan = "create-foreign"  // a VM whose state key is libvirt's: record only
	AdoptPlain      Plan = "adopt"           // encrypt the plain state in place, then as Create
	FinishAdoption  Plan = "finish-adoption" // an adoption was cut short: the plain state is still there
	RestoreKept     Plan = "restore-kept"    // after a crash: put the kept state back, then ask again
	StartRecovered  Plan = "start-recovered" // after a crash: the state is newer than the list, and authentic
	StartFresh      Plan = "start-fresh"     // known, but has never had any state: libvirt makes it
	CreateAnew      Plan = "create-anew"     // a transient VM's vTPM went with it: as Create, in place of the old record
	StartNewLabel   Plan = "start-new-label" // all is right, and the image can take the label that waits
	StartFirstLabel Plan = "start-label"     // the VM has an image that can carry a label only now
	Pass            Plan = "pass"            // released: none of ours
	Refuse          Plan = "refuse"          // see Refusal
)

// Decision is Prepare's answer.
type Decision struct {
	Plan    Plan
	Refusal *reason.Refusal // for Refuse
	Note    string          // for the log: what was recovered and why
}

func refuse(c reason.Code, mend, format string, args ...any) Decision {
	return Decision{Plan: Refuse, Refusal: reason.Refuse(c, mend, format, args...)}
}

func cmd(verb, vm string, flags ...string) string {
	return strings.Join(append([]string{"'virt-trust " + verb, shellName(vm)}, flags...), " ") + "'"
}

// shellName quotes a VM's name where a shell would need it.
func shellName(s string) string {
	for _, c := range s {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.+:@", c) {
			return `"` + strings.NewReplacer(`"`, `\"`, `$`, `\$`, "`", "\\`", `\`, `\\`).Replace(s) + `"`
		}
	}
	return s
}

// Prepare decides whether a VM may start. r is nil for a VM that the list does
// not know.
func Prepare(r *list.Record, s Seen, p Policy) Decision {
	if r != nil && r.State == list.Released {
		return Decision{Plan: Pass}
	}
	if len(s.State.Strange) > 0 {
		return refuse(reason.VTPMChanged, "move them away from "+s.Instance,
			"the state folder holds files that a vTPM at rest does not have: %s", strings.Join(s.State.Strange, ", "))
	}
	if r == nil {
		return prepareUnknown(s, p)
	}
	if s.FolderOf != "" {
		return sharedFolder(s)
	}
	if r.State == list.HandingOver || r.State == list.Incoming {
		return refuse(reason.VMElsewhere, "wait until the handover is settled", "the vTPM is on its way between two hosts")
	}
	if r.KeyOwner != s.KeyOwner {
		return keyOwnerChanged(r, s)
	}
	relabel, d := labelRight(r, s)
	if d.Plan == Refuse {
		return d
	}
	d = State(r, s, p)
	if d.Plan == Start && relabel != "" {
		d.Plan = relabel
	}
	return d
}

func sharedFolder(s Seen) Decision {
	return refuse(reason.VTPMChanged, "give the VM a state folder of its own", "the state folder %s is that of VM %s", s.Instance, s.FolderOf)
}

func prepareUnknown(s Seen, p Policy) Decision {
	if s.FolderOf != "" {
		return sharedFolder(s)
	}
	l := s.Label
	switch adopt := cmd("adopt", s.Name); {
	case !l.Present:
	case l.Damaged != "":
		return refuse(reason.LabelDamaged, "look at it with 'virt-trust label show', then "+adopt+" writes a new one",
			"the label in %s is damaged (%s), and the vTPM list does not know this VM", l.Path, l.Damaged)
	case l.VM != s.UUID:
		return refuse(reason.LabelOtherVM, "if the image is a wanted copy, "+adopt+" makes it this VM's",
			"the label in %s belongs to VM %s", l.Path, l.VM)
	case !l.ThisHost:
		return refuse(reason.LabelOtherHost, "start the VM on its own host, or give it a new vTPM here with "+cmd("adopt", s.Name, "--new"),
			"the label in %s was made for another host", l.Path)
	case !s.State.Exists:
		return refuse(reason.VTPMMissing, "bring "+s.Instance+" back from a backup and run "+adopt+", or give the VM a new, empty vTPM with "+cmd("adopt", s.Name, "--new"),
			"the label in %s names a vTPM of this VM, but neither the list nor the disk has it", l.Path)
	case s.State.Kind == statefile.Plain:
		return refuse(reason.VTPMChanged, adopt+" takes what is there",
			"the label in %s names an encrypted vTPM, but the state in %s is plain and the list does not know the VM", l.Path, s.Instance)
	}
	switch {
	case s.KeyOwner == list.Libvirts:
		return Decision{Plan: CreateForeign}
	case !s.State.Exists:
		return Decision{Plan: Create}
	case s.State.Kind == statefile.Plain && p.Adopt:
		return Decision{Plan: AdoptPlain}
	case s.State.Kind == statefile.Plain:
		return refuse(reason.VTPMUnknown, "run "+cmd("adopt", s.Name), "policy.adopt is off, and the vTPM list does not know the state in %s", s.Instance)
	case s.State.Kind == statefile.Damaged:
		return refuse(reason.VTPMUnknown, "bring it back from a backup, or remove the folder to give the VM a new, empty vTPM",
			"the state in %s is damaged", s.Instance)
	}
	return refuse(reason.VTPMUnknown, "if it is this VM's own, run "+cmd("adopt", s.Name)+"; otherwise move it away",
		"the state in %s is encrypted, and the vTPM list does not know it", s.Instance)
}

func keyOwnerChanged(r *list.Record, s Seen) Decision {
	if s.KeyOwner == list.Libvirts {
		return refuse(reason.PolicyForbids, "remove <encryption>, or run "+cmd("release", s.Name)+" first",
			"the VM's <tpm> now has an <encryption> secret, but its vTPM is encrypted by virt-trust")
	}
	return refuse(reason.PolicyForbids, "put <encryption> back, or run "+cmd("release", s.Name)+" first",
		"the VM's <tpm> had an <encryption> secret and has none any more")
}

// labelRight holds the label against the record. It gives the plan that
// brings a label up to date, if one is due.
func labelRight(r *list.Record, s Seen) (Plan, Decision) {
	l := s.Label
	adopt := "or " + cmd("adopt", s.Name) + " if the change was meant"
	repair := cmd("repair", s.Name) + " writes the label again, "
	expects := !r.LabelDigest.IsZero()
	pending := len(r.PendingLabel) > 0

	switch {
	case r.KeyOwner == list.Libvirts && !l.Present:
		return "", Decision{}
	case l.Path == "" && expects && !pending:
		return "", refuse(reason.LabelMissing, "attach "+r.LabelPath+" again, "+adopt,
			"the VM has no disk any more that carries its label, which was in %s", r.LabelPath)
	case l.Path == "" || (!l.Present && l.Unsupported != "" && !expects):
		return "", Decision{}
	case l.Present && l.Damaged != "":
		return "", refuse(reason.LabelDamaged, repair+adopt, "the label in %s is damaged: %s", l.Path, l.Damaged)
	case l.Present && l.VM != s.UUID:
		return "", refuse(reason.LabelOtherVM, "put the VM's own image back, "+adopt, "the label in %s belongs to VM %s", l.Path, l.VM)
	case l.Present && l.Digest == r.LabelDigest:
		if pending {
			return StartNewLabel, Decision{}
		}
		return "", Decision{}
	case l.Present && pending && l.Digest == list.DigestOf(r.PendingLabel):
		return StartNewLabel, Decision{} // written, and cut off before it was noted
	case !l.Present && !expects && pending:
		return StartNewLabel, Decision{}
	case !l.Present && !expects:
		return StartFirstLabel, Decision{}
	case !l.Present && l.Unsupported != "":
		return "", refuse(reason.LabelMissing, "put "+r.LabelPath+" back, "+adopt, "%s cannot carry the VM's label: %s", l.Path, l.Unsupported)
	case !l.Present:
		return "", refuse(reason.LabelMissing, repair+adopt, "%s has no label", l.Path)
	case !l.ThisHost:
		return "", refuse(reason.LabelOtherHost, repair+adopt, "the label in %s was made for another host", l.Path)
	case OlderLabel(r, l):
		return "", refuse(reason.VTPMRolledBack, repair+"as does "+cmd("accept", s.Name, "--rolled-back")+" after a wanted restore of the image",
			"the label in %s is an older one of this VM", l.Path)
	}
	return "", refuse(reason.LabelDamaged, repair+adopt, "the label in %s is not the one that was written last", l.Path)
}

// OlderLabel reports whether a label is one that the VM had before, as an older
// copy of its image has.
func OlderLabel(r *list.Record, l LabelSeen) bool {
	return l.Present && l.Damaged == "" && l.VM == r.UUID && l.ID == r.LabelID && l.Digest != r.LabelDigest && l.Generation < r.LabelGeneration
}

// State decides about the state alone.
func State(r *list.Record, s Seen, p Policy) Decision {
	st := s.State
	keep := ""
	if !s.Kept.IsZero() {
		keep = cmd("repair", s.Name) + " puts the kept state back"
	}
	backup := "bring " + s.Instance + " back from a backup"
	never := r.Baseline.IsZero() && len(s.Journal) == 0
	switch {
	case never:
		keep = "remove it: the VM has never run with it, and gets a new one"
	case keep == "":
		keep = backup
	}

	switch {
	case filepath.Clean(r.Instance) != filepath.Clean(s.Instance):
		return refuse(reason.VTPMChanged, "put it back, or run "+cmd("adopt", s.Name),
			"the VM's state folder was %s and is now %s", r.Instance, s.Instance)
	case !r.AdoptFrom.IsZero() && st.Exists && st.Kind == statefile.Plain && st.Digest == r.AdoptFrom:
		return Decision{Plan: FinishAdoption, Note: "an adoption had been cut short"}
	case st.Exists && st.Digest == r.Baseline && len(s.Journal) == 0:
		return Decision{Plan: Start}
	case s.Restored && current(r, s, st.Digest):
		return Decision{Plan: StartRecovered}
	case !st.Exists && never:
		return Decision{Plan: StartFresh}
	case !st.Exists && r.Ephemeral:
		return Decision{Plan: CreateAnew}
	case !st.Exists:
		return refuse(reason.VTPMMissing, keep+", or "+cmd("adopt", s.Name, "--new")+" gives the VM a new, empty vTPM", "%s has no vTPM state", s.Instance)
	case st.OtherVM != "":
		return refuse(reason.VTPMChanged, keep, "the vTPM state is that of VM %s", st.OtherVM)
	case st.Kind == statefile.Damaged && r.Open && !s.Kept.IsZero() && (current(r, s, s.Kept) || !Familiar(r, s.Journal, s.Kept)):
		// One that is kept and not noted is authenticated when it is back.
		return Decision{Plan: RestoreKept, Note: "a crash had left the state file unreadable; the state kept before it was put back"}
	case st.Kind == statefile.Damaged && never:
		return refuse(reason.VTPMChanged, keep, "the vTPM state in %s was not made to its end", s.Instance)
	case st.Kind == statefile.Damaged:
		return refuse(reason.VTPMChanged, keep, "the vTPM state is damaged: swtpm would not load it")
	case st.Kind == statefile.Plain && r.KeyOwner == list.Ours:
		return refuse(reason.VTPMChanged, keep, "the vTPM state was replaced by a plain one")
	}

	accept := keep + ", or " + cmd("accept", s.Name, "--rolled-back") + " takes this one"
	past, old := r.Past(st.Digest)
	switch {
	case old && past.Time == 0:
		return refuse(reason.VTPMRolledBack, accept, "the vTPM state is an older one of this VM")
	case old:
		return refuse(reason.VTPMRolledBack, accept, "the vTPM state is an older one of this VM, in use until %s", time.Unix(past.Time, 0).UTC().Format(time.RFC3339))
	}
	for i, j := range s.Journal {
		switch last := i == len(s.Journal)-1; {
		case j.Digest == st.Digest && last:
			return Decision{Plan: StartRecovered, Note: "the state is the last that was noted before a crash"}
		case j.Digest == st.Digest:
			return refuse(reason.VTPMRolledBack, accept, "the vTPM state is an older one of this VM, written at %s", time.Unix(j.Time, 0).UTC().Format(time.RFC3339))
		}
	}
	switch {
	case st.Digest == r.Baseline:
		// What was noted had been made durable before: a crash does not undo it.
		return refuse(reason.VTPMRolledBack, accept, "the vTPM state is the one from before the VM's last run, which has written newer ones")
	case st.Auth == NotAsked:
		return Decision{Plan: Authenticate}
	case st.Auth == Forged:
		return refuse(reason.VTPMChanged, keep, "the vTPM state was not written under this VM's key")
	case st.Auth == NoKey && !r.Open:
		return refuse(reason.VTPMChanged, keep+", or "+cmd("accept", s.Name, "--rolled-back")+" takes this one", "the vTPM state is not the one that was measured last")
	case !r.Open:
		return refuse(reason.VTPMRolledBack, accept, "the vTPM state is this VM's, but not its newest")
	case p.StrictCrashRecovery && !never: // else there was no other that this one could be instead of
		return refuse(reason.VTPMRolledBack, accept, "after a crash the vTPM state is one that was not noted, and policy.crash_recovery is strict")
	}
	return Decision{Plan: StartRecovered, Note: "the state was written in the last instant before a crash"}
}

// current reports whether d is the newest state that is known of an open record.
func current(r *list.Record, s Seen, d list.Digest) bool {
	if n := len(s.Journal); n > 0 {
		// The last write may be the one that was lost: the last but one is right too.
		return d == s.Journal[n-1].Digest || (n > 1 && d == s.Journal[n-2].Digest) || (n == 1 && d == r.Baseline)
	}
	return d == r.Baseline
}

// Familiar reports whether d is a state that the list, or a journal, knows.
func Familiar(r *list.Record, journal []list.Past, d list.Digest) bool {
	_, past := r.Past(d)
	return past || d == r.Baseline || slices.ContainsFunc(journal, func(p list.Past) bool { return p.Digest == d })
}

// Rest gives the record of a VM that has stopped. digest is that of its state
// folder (zero: there is no state), auth whether it was written under the VM's
// key. A state that is an old one, or nobody's, does not become the baseline:
// what was noted last stays it, and the next start says so. note is for the
// log, "" where all is well.
func Rest(r *list.Record, digest list.Digest, auth Auth, journal []list.Past, suspended bool, now int64) (n *list.Record, note string) {
	n = r.Clone()
	n.Open, n.Noted, n.AdoptFrom = false, false, list.Digest{}
	n.State = list.Stored
	if suspended {
		n.State = list.Suspended
	}
	n.Changed = now

	// Asked of the record as it was: what was noted since drops the oldest of
	// its history.
	old := Familiar(r, journal, digest)
	for _, j := range journal {
		n.SetBaseline(j.Digest, j.Time)
	}
	switch {
	case digest == Newest(r, journal):
	case digest.IsZero():
		note = "the vTPM state has gone"
	case old:
		note = "the vTPM state was replaced by an older one while the VM ran"
	case auth == Forged:
		note = "the vTPM state was replaced while the VM ran"
	default:
		n.SetBaseline(digest, now)
	}
	if n.Baseline.IsZero() {
		n.State = list.Created
	}
	return n, note
}

// Settled gives the record of a VM that is off and whose state is to be the one
// with this digest. What was noted while it ran is past then.
func Settled(r *list.Record, digest list.Digest, journal []list.Past, now int64) *list.Record {
	n := r.Clone()
	n.Open, n.Noted, n.AdoptFrom, n.State, n.Changed = false, false, list.Digest{}, list.Stored, now
	for _, j := range journal {
		n.SetBaseline(j.Digest, j.Time)
	}
	n.SetBaseline(digest, now)
	return n
}

// Newest is the digest of the newest state that is known of a VM.
func Newest(r *list.Record, journal []list.Past) list.Digest {
	if n := len(journal); n > 0 {
		return journal[n-1].Digest
	}
	return r.Baseline
}

// Restorable reports whether kept, a state's digest, may be put back: it is
// the newest that is known, or the last but one where the very last was noted
// but not kept any more when the power went.
func Restorable(r *list.Record, s Seen, kept list.Digest) bool {
	return !kept.IsZero() && current(r, s, kept)
}

// Opened gives the record of a VM that is about to run.
func Opened(r *list.Record, bootID string, now int64) *list.Record {
	n := r.Clone()
	n.Open, n.Noted, n.State, n.BootID = true, false, list.Deploying, bootID
	n.Generation++
	n.Changed = now
	return n
}

// Verdict notes a decision in the record.
func Verdict(r *list.Record, ref *reason.Refusal, now int64) *list.Record {
	n := r.Clone()
	n.LastVerdict, n.LastReason, n.LastWhat = "allow", "", ""
	if ref != nil {
		n.LastVerdict, n.LastReason, n.LastWhat = "refuse", string(ref.Code), ref.Text()
	}
	n.Changed = now
	return n
}

// String shows what was seen of a state, for logs.
func (s StateSeen) String() string {
	if !s.Exists {
		return "none"
	}
	return fmt.Sprintf("%s %s", s.Kind, s.Digest)
}
