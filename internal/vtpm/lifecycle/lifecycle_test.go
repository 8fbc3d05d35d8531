package lifecycle

import (
	"strings"
	"testing"

	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statefile"
)

const (
	uuid  = "3f2c1c1e-0000-4000-8000-000000000001"
	other = "3f2c1c1e-0000-4000-8000-000000000002"
)

var (
	base, older, newer, labelD, pending = list.Digest{1}, list.Digest{2}, list.Digest{3}, list.Digest{4}, []byte("pending label")
)

func known() *list.Record {
	return &list.Record{
		UUID: uuid, Name: "vm", Instance: "/s/tpm2", State: list.Stored, KeyOwner: list.Ours,
		LabelPath: "/i", LabelDigest: labelD, Baseline: base, History: []list.Past{{Digest: older, Time: 5}},
	}
}

func atRest() Seen {
	return Seen{
		UUID: uuid, Name: "vm", Instance: "/s/tpm2", KeyOwner: list.Ours,
		State: StateSeen{Exists: true, Kind: statefile.Encrypted, Digest: base},
		Label: LabelSeen{Path: "/i", Present: true, Digest: labelD, VM: uuid, ThisHost: true},
		Kept:  base,
	}
}

func TestPrepare(t *testing.T) {
	adopt := Policy{Adopt: true}
	tests := []struct {
		name   string
		record func(*list.Record) *list.Record // nil: the VM is unknown
		seen   func(*Seen)
		policy Policy
		plan   Plan
		code   reason.Code
	}{
		{"warm start", same, func(s *Seen) {}, adopt, Start, ""},

		{"new VM", nil, func(s *Seen) { s.State, s.Label = StateSeen{}, LabelSeen{Path: "/i"} }, adopt, Create, ""},
		{"new VM without qcow2", nil, func(s *Seen) { s.State, s.Label = StateSeen{}, LabelSeen{} }, adopt, Create, ""},
		{"plain state", nil, func(s *Seen) { s.State.Kind, s.Label = statefile.Plain, LabelSeen{Path: "/i"} }, adopt, AdoptPlain, ""},
		{"plain state, no adoption", nil, func(s *Seen) { s.State.Kind, s.Label = statefile.Plain, LabelSeen{Path: "/i"} }, Policy{}, Refuse, reason.VTPMUnknown},
		{"unknown encrypted state", nil, func(s *Seen) { s.Label = LabelSeen{Path: "/i"} }, adopt, Refuse, reason.VTPMUnknown},
		{"unknown damaged state", nil, func(s *Seen) { s.State.Kind, s.Label = statefile.Damaged, LabelSeen{Path: "/i"} }, adopt, Refuse, reason.VTPMUnknown},
		{"unknown state with its label", nil, func(s *Seen) {}, adopt, Refuse, reason.VTPMUnknown},
		{"unknown plain state under a label", nil, func(s *Seen) { s.State.Kind = statefile.Plain }, adopt, Refuse, reason.VTPMChanged},
		{"copied image, new VM", nil, func(s *Seen) { s.State, s.Label.VM = StateSeen{}, other }, adopt, Refuse, reason.LabelOtherVM},
		{"copied image, other host", nil, func(s *Seen) { s.State, s.Label.ThisHost = StateSeen{}, false }, adopt, Refuse, reason.LabelOtherHost},
		{"label of a lost vTPM", nil, func(s *Seen) { s.State = StateSeen{} }, adopt, Refuse, reason.VTPMMissing},
		{"damaged label, new VM", nil, func(s *Seen) { s.State, s.Label.Damaged = StateSeen{}, "cut off" }, adopt, Refuse, reason.LabelDamaged},
		{"libvirt's secret", nil, func(s *Seen) { s.KeyOwner, s.Label.Present = list.Libvirts, false }, adopt, CreateForeign, ""},

		{"edited", same, func(s *Seen) { s.State.Digest = newer }, adopt, Authenticate, ""},
		{"edited, asked", same, func(s *Seen) { s.State.Digest, s.State.Auth = newer, Forged }, adopt, Refuse, reason.VTPMChanged},
		{"truncated", same, func(s *Seen) { s.State.Digest, s.State.Kind = newer, statefile.Damaged }, adopt, Refuse, reason.VTPMChanged},
		{"deleted", same, func(s *Seen) { s.State = StateSeen{} }, adopt, Refuse, reason.VTPMMissing},
		{"gone with its transient VM", func(r *list.Record) *list.Record { r.Ephemeral = true; return r }, func(s *Seen) { s.State = StateSeen{} }, adopt, CreateAnew, ""},
		{"a transient VM's, edited", func(r *list.Record) *list.Record { r.Ephemeral = true; return r }, func(s *Seen) { s.State.Digest, s.State.Auth = newer, Forged }, adopt, Refuse, reason.VTPMChanged},
		{"another VM's", same, func(s *Seen) { s.State.Digest, s.State.OtherVM = newer, "b" }, adopt, Refuse, reason.VTPMChanged},
		{"replaced by a plain one", same, func(s *Seen) { s.State.Digest, s.State.Kind = newer, statefile.Plain }, adopt, Refuse, reason.VTPMChanged},
		{"older copy", same, func(s *Seen) { s.State.Digest = older }, adopt, Refuse, reason.VTPMRolledBack},
		{"much older copy", same, func(s *Seen) { s.State.Digest, s.State.Auth = newer, Authentic }, adopt, Refuse, reason.VTPMRolledBack},
		{"planted volatilestate", same, func(s *Seen) { s.State.Strange = []string{"tpm2-00.volatilestate"} }, adopt, Refuse, reason.VTPMChanged},
		{"other folder", same, func(s *Seen) { s.Instance = "/t/tpm2" }, adopt, Refuse, reason.VTPMChanged},

		{"crash, one write ahead", open, func(s *Seen) { s.State.Digest, s.State.Auth = newer, Authentic }, adopt, StartRecovered, ""},
		{"crash, one write ahead, strict", open, func(s *Seen) { s.State.Digest, s.State.Auth = newer, Authentic }, Policy{StrictCrashRecovery: true}, Refuse, reason.VTPMRolledBack},
		{"crash, noted", open, func(s *Seen) { s.State.Digest, s.Journal = newer, []list.Past{{Digest: newer}} }, Policy{StrictCrashRecovery: true}, StartRecovered, ""},
		{"crash, last but one", open, func(s *Seen) { s.State.Digest, s.Journal = newer, []list.Past{{Digest: newer}, {Digest: labelD}} }, adopt, Refuse, reason.VTPMRolledBack},
		{"crash used to roll back to the run's beginning", open, func(s *Seen) { s.Journal = []list.Past{{Digest: newer}} }, adopt, Refuse, reason.VTPMRolledBack},
		{"crash, last but one was kept and put back", open, func(s *Seen) {
			s.State.Digest, s.Journal, s.Restored = newer, []list.Past{{Digest: newer}, {Digest: labelD}}, true
		}, adopt, StartRecovered, ""},
		{"crash, beginning was kept and put back", open, func(s *Seen) { s.Journal, s.Restored = []list.Past{{Digest: newer}}, true }, adopt, StartRecovered, ""},
		{"another VM's folder", same, func(s *Seen) { s.FolderOf = "b" }, adopt, Refuse, reason.VTPMChanged},
		{"another VM's folder, new VM", nil, func(s *Seen) { s.State, s.Label, s.FolderOf = StateSeen{}, LabelSeen{}, "b" }, adopt, Refuse, reason.VTPMChanged},
		{"first start cut short while swtpm wrote", first, func(s *Seen) { s.State.Kind, s.Kept = statefile.Damaged, list.Digest{} }, adopt, Refuse, reason.VTPMChanged},
		{"crash used to roll back", open, func(s *Seen) { s.State.Digest = older }, adopt, Refuse, reason.VTPMRolledBack},
		{"crash used to forge", open, func(s *Seen) { s.State.Digest, s.State.Auth = newer, Forged }, adopt, Refuse, reason.VTPMChanged},
		{"power cut left zeros", open, func(s *Seen) { s.State.Kind, s.State.Digest = statefile.Damaged, newer }, adopt, RestoreKept, ""},
		{"power cut left zeros, kept is old", open, func(s *Seen) { s.State.Kind, s.State.Digest, s.Kept = statefile.Damaged, newer, older }, adopt, Refuse, reason.VTPMChanged},
		{"power cut left zeros, kept was not noted yet", open, func(s *Seen) {
			s.State.Kind, s.State.Digest, s.Kept, s.Journal = statefile.Damaged, newer, list.Digest{9}, []list.Past{{Digest: list.Digest{8}}}
		}, adopt, RestoreKept, ""},
		{"what was kept and not noted is authenticated", open, func(s *Seen) {
			s.State.Digest, s.Kept, s.Journal, s.Restored = list.Digest{9}, list.Digest{9}, []list.Past{{Digest: list.Digest{8}}}, true
		}, adopt, Authenticate, ""},
		{"zeros without a crash", same, func(s *Seen) { s.State.Kind, s.State.Digest = statefile.Damaged, newer }, adopt, Refuse, reason.VTPMChanged},
		{"first start cut short", first, func(s *Seen) { s.State, s.Kept = StateSeen{}, list.Digest{} }, adopt, StartFresh, ""},
		{"first start cut short after manufacture", first, func(s *Seen) { s.State.Auth = Authentic }, adopt, StartRecovered, ""},
		{"first start cut short after manufacture, strict", first, func(s *Seen) { s.State.Auth = Authentic }, Policy{StrictCrashRecovery: true}, StartRecovered, ""},
		{"first start, someone else's state", first, func(s *Seen) { s.State.Auth = Forged }, adopt, Refuse, reason.VTPMChanged},
		{"adoption cut short", adopting, func(s *Seen) { s.State.Kind, s.State.Digest = statefile.Plain, newer }, adopt, FinishAdoption, ""},
		{"adoption cut short at its end", adopting, func(s *Seen) {}, adopt, Start, ""},
		{"adoption cut short, other plain state", adopting, func(s *Seen) { s.State.Kind, s.State.Digest = statefile.Plain, older }, adopt, Refuse, reason.VTPMChanged},

		{"label removed", same, func(s *Seen) { s.Label.Present = false }, adopt, Refuse, reason.LabelMissing},
		{"label edited", same, func(s *Seen) { s.Label.Digest = newer }, adopt, Refuse, reason.LabelDamaged},
		{"label garbage", same, func(s *Seen) { s.Label.Digest, s.Label.Damaged = newer, "x" }, adopt, Refuse, reason.LabelDamaged},
		{"label of another VM", same, func(s *Seen) { s.Label.Digest, s.Label.VM = newer, other }, adopt, Refuse, reason.LabelOtherVM},
		{"label of another host", same, func(s *Seen) { s.Label.Digest, s.Label.ThisHost = newer, false }, adopt, Refuse, reason.LabelOtherHost},
		{"disk is gone", same, func(s *Seen) { s.Label = LabelSeen{} }, adopt, Refuse, reason.LabelMissing},
		{"disk takes no labels", same, func(s *Seen) { s.Label = LabelSeen{Path: "/j", Unsupported: "version 2"} }, adopt, Refuse, reason.LabelMissing},

		{"label waits", waiting, func(s *Seen) {}, adopt, StartNewLabel, ""},
		{"waiting label was written", waiting, func(s *Seen) { s.Label.Digest = list.DigestOf(pending) }, adopt, StartNewLabel, ""},
		{"waiting label is no excuse", waiting, func(s *Seen) { s.Label.Digest = newer }, adopt, Refuse, reason.LabelDamaged},
		{"first label waits", func(r *list.Record) *list.Record { r.LabelDigest = list.Digest{}; return waiting(r) }, func(s *Seen) { s.Label.Present = false }, adopt, StartNewLabel, ""},
		{"raw disk became qcow2", noLabel, func(s *Seen) { s.Label.Present = false }, adopt, StartFirstLabel, ""},
		{"raw disk", noLabel, func(s *Seen) { s.Label = LabelSeen{} }, adopt, Start, ""},
		{"raw disk became another VM's", noLabel, func(s *Seen) { s.Label.VM = other }, adopt, Refuse, reason.LabelOtherVM},

		{"secret added", same, func(s *Seen) { s.KeyOwner = list.Libvirts }, adopt, Refuse, reason.PolicyForbids},
		{"secret removed", foreign, func(s *Seen) {}, adopt, Refuse, reason.PolicyForbids},
		{"libvirt's secret, warm", foreign, func(s *Seen) { s.KeyOwner, s.Label.Present = list.Libvirts, false }, adopt, Start, ""},
		{"libvirt's secret, changed", foreign, func(s *Seen) {
			s.KeyOwner, s.Label.Present, s.State.Digest, s.State.Auth = list.Libvirts, false, newer, NoKey
		}, adopt, Refuse, reason.VTPMChanged},
		{"libvirt's secret, crash", func(r *list.Record) *list.Record { return open(foreign(r)) }, func(s *Seen) {
			s.KeyOwner, s.Label.Present, s.State.Digest, s.State.Auth = list.Libvirts, false, newer, NoKey
		}, adopt, StartRecovered, ""},
		{"released", func(r *list.Record) *list.Record { r.State = list.Released; return r }, func(s *Seen) { s.State.Kind, s.Label.Present = statefile.Plain, false }, Policy{}, Pass, ""},
		{"on its way", func(r *list.Record) *list.Record { r.State = list.HandingOver; return r }, func(s *Seen) {}, adopt, Refuse, reason.VMElsewhere},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var r *list.Record
			if tt.record != nil {
				r = tt.record(known())
			}
			s := atRest()
			tt.seen(&s)
			d := Prepare(r, s, tt.policy)
			code := reason.Code("")
			if d.Refusal != nil {
				code = d.Refusal.Code
			}
			if d.Plan != tt.plan || code != tt.code {
				t.Fatalf("%s %s (%v), want %s %s", d.Plan, code, d.Refusal, tt.plan, tt.code)
			}
			if d.Refusal != nil && d.Refusal.Mend == "" {
				t.Error("a refusal without a way back")
			}
			if d.Plan != Refuse && d.Refusal != nil {
				t.Error("a refusal beside a plan")
			}
		})
	}
}

func same(r *list.Record) *list.Record  { return r }
func open(r *list.Record) *list.Record  { r.Open, r.State = true, list.Running; return r }
func first(r *list.Record) *list.Record { r.Baseline = list.Digest{}; r.History = nil; return open(r) }
func adopting(r *list.Record) *list.Record {
	r.AdoptFrom = newer
	return r
}
func waiting(r *list.Record) *list.Record { r.PendingLabel = pending; return r }
func noLabel(r *list.Record) *list.Record { r.LabelDigest, r.LabelPath = list.Digest{}, ""; return r }
func foreign(r *list.Record) *list.Record {
	r = noLabel(r)
	r.KeyOwner = list.Libvirts
	return r
}

func TestRest(t *testing.T) {
	tests := []struct {
		name     string
		digest   list.Digest
		auth     Auth
		journal  []list.Past
		baseline list.Digest
		noted    bool
	}{
		{"nothing written", base, Authentic, nil, base, false},
		{"written", newer, Authentic, nil, newer, false},
		{"written and noted", newer, Authentic, []list.Past{{Digest: newer, Time: 9}}, newer, false},
		{"one more than noted", list.Digest{9}, Authentic, []list.Past{{Digest: newer, Time: 9}}, list.Digest{9}, false},
		{"rolled back while running", older, Authentic, nil, base, true},
		{"rolled back to the start of this run", base, Authentic, []list.Past{{Digest: newer, Time: 9}}, newer, true},
		{"forged while running", list.Digest{9}, Forged, []list.Past{{Digest: newer, Time: 9}}, newer, true},
		{"gone", list.Digest{}, NotAsked, nil, base, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n, note := Rest(open(known()), tt.digest, tt.auth, tt.journal, false, 100)
			if n.Baseline != tt.baseline || (note != "") != tt.noted || n.Open || n.State != list.Stored {
				t.Fatalf("baseline %s, note %q, open %v, state %s", n.Baseline, note, n.Open, n.State)
			}
			// What rests so starts again, unless it was tampered with: then it is refused.
			s := atRest()
			s.State.Digest, s.State.Auth, s.State.Exists = tt.digest, tt.auth, !tt.digest.IsZero()
			if d := Prepare(n, s, Policy{}); (d.Plan == Start) == tt.noted {
				t.Fatalf("the next start: %s %v", d.Plan, d.Refusal)
			}
		})
	}
}

// What was noted while a VM ran drops the oldest of its history: which of them
// was put in the state's place is asked before.
func TestRestForgetsNothingTooEarly(t *testing.T) {
	r := open(known())
	var journal []list.Past
	for i := range list.MaxHistory {
		journal = append(journal, list.Past{Digest: list.Digest{100, byte(i)}, Time: 9})
	}
	for _, digest := range []list.Digest{older, base, journal[0].Digest} {
		if n, note := Rest(r, digest, Authentic, journal, false, 100); n.Baseline != journal[len(journal)-1].Digest || note == "" {
			t.Errorf("%s, which is an old one, became the baseline", digest)
		}
	}
}

// A VM that has never run has nothing to be brought back.
func TestWayBackOfAVMThatNeverRan(t *testing.T) {
	for _, kind := range []statefile.Kind{statefile.Plain, statefile.Encrypted, statefile.Damaged} {
		s := atRest()
		s.State.Kind, s.State.Digest, s.State.Auth, s.Kept = kind, newer, Forged, list.Digest{}
		if d := Prepare(first(known()), s, Policy{}); d.Refusal == nil || !strings.HasPrefix(d.Refusal.Mend, "remove it: ") {
			t.Errorf("%s: %v", kind, d.Refusal)
		}
	}
}

func TestShellName(t *testing.T) {
	if got := shellName("vm-1.x"); got != "vm-1.x" {
		t.Error(got)
	}
	if got := shellName("my $(vm)"); !strings.HasPrefix(got, `"my \$(vm)`) {
		t.Error(got)
	}
}
