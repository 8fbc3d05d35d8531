// Package reason holds the stable reason codes of virt-trust and the one form
// in which a refusal is shown. A refusal is a result, not a failure: it says
// what does not belong together and how to mend it. The codes stand in D-Bus
// errors, in JSON, in the journal and in virt-trust(8); none is ever renamed.
package reason

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Code is a stable reason code.
type Code string

// The codes. Their meanings stand in Explain.
const (
	HostNotApproved     Code = "host-not-approved"
	ListRolledBack      Code = "list-rolled-back"
	ListDamaged         Code = "list-damaged"
	VTPMUnknown         Code = "vtpm-unknown"
	VTPMChanged         Code = "vtpm-changed"
	VTPMRolledBack      Code = "vtpm-rolled-back"
	VTPMMissing         Code = "vtpm-missing"
	LabelMissing        Code = "label-missing"
	LabelDamaged        Code = "label-damaged"
	LabelOtherVM        Code = "label-other-vm"
	LabelOtherHost      Code = "label-other-host"
	KeyNotReleased      Code = "key-not-released"
	LauncherNotApproved Code = "launcher-not-approved"
	VMElsewhere         Code = "vm-elsewhere"
	PolicyForbids       Code = "policy-forbids"
	HelperUnreachable   Code = "helper-unreachable"
	TPMBusy             Code = "tpm-busy"
	TPMLockedOut        Code = "tpm-locked-out"
	TPMFailed           Code = "tpm-failed"
)

var explain = map[Code]string{
	HostNotApproved:     "the host is not in a state to which the vTPM list and the vTPM keys are bound",
	ListRolledBack:      "the vTPM list is an older one than virt-trustd wrote last",
	ListDamaged:         "the vTPM list is missing, or is not what virt-trustd wrote",
	VTPMUnknown:         "there is vTPM state that the vTPM list does not know",
	VTPMChanged:         "the vTPM state is not the one that the vTPM list holds",
	VTPMRolledBack:      "the vTPM state is an older copy of this VM's own",
	VTPMMissing:         "the vTPM state that the vTPM list holds is not there",
	LabelMissing:        "the VM's image has no label",
	LabelDamaged:        "the label in the VM's image is not the one that virt-trustd wrote",
	LabelOtherVM:        "the label in the image belongs to another VM",
	LabelOtherHost:      "the label in the image was made for another host",
	KeyNotReleased:      "the vTPM keys are not released for this use",
	LauncherNotApproved: "a program or firmware that would run for this VM is not approved",
	VMElsewhere:         "the VM's vTPM lives on another host",
	PolicyForbids:       "the host's policy does not allow this",
	HelperUnreachable:   "virt-trustd does not answer",
	TPMBusy:             "the host's TPM did not get to this in time",
	TPMLockedOut:        "the host's TPM refuses authorisations for some time (dictionary attack protection)",
	TPMFailed:           "the host's TPM cannot be used",
}

// All returns every code, in the order of virt-trust(8).
func All() []Code {
	return []Code{
		HostNotApproved, ListRolledBack, ListDamaged, VTPMUnknown, VTPMChanged, VTPMRolledBack, VTPMMissing,
		LabelMissing, LabelDamaged, LabelOtherVM, LabelOtherHost, KeyNotReleased, LauncherNotApproved,
		VMElsewhere, PolicyForbids, HelperUnreachable, TPMBusy, TPMLockedOut, TPMFailed,
	}
}

// Explain says in one clause what a code means; "" for a code that is none.
func (c Code) Explain() string { return explain[c] }

// Known reports whether c is one of the codes.
func (c Code) Known() bool { _, ok := explain[c]; return ok }

// Refusal is a decision against an operation. It is an error so that it can be
// returned as one, and it is told from "could not tell" by errors.As.
type Refusal struct {
	Code Code
	What string // what does not belong together, without a full stop
	Mend string // how to mend it, an imperative clause; may be empty
}

// Refuse makes a Refusal.
func Refuse(c Code, mend, format string, args ...any) *Refusal {
	return &Refusal{Code: c, What: fmt.Sprintf(format, args...), Mend: mend}
}

// As returns the Refusal in err's chain, or nil.
func As(err error) *Refusal {
	var r *Refusal
	if errors.As(err, &r) {
		return r
	}
	return nil
}

// Error gives "CODE: what; mend" on one line, without control characters.
func (r *Refusal) Error() string { return string(r.Code) + ": " + r.Text() }

// Text is Error without the code.
func (r *Refusal) Text() string {
	s := r.What
	if s == "" {
		s = r.Code.Explain()
	}
	if r.Mend != "" {
		s += "; " + r.Mend
	}
	return OneLine(s)
}

// Parse takes apart what Error made; ok is false when s does not begin with a
// known code. The whole text comes back as What.
func Parse(s string) (*Refusal, bool) {
	c, rest, found := strings.Cut(s, ": ")
	if !found || !Code(c).Known() {
		return nil, false
	}
	return &Refusal{Code: Code(c), What: rest}, true
}

// OneLine makes s safe for a terminal or a log: every control or invalid
// character becomes a space, and at most 1,000 bytes stay.
func OneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
	if len(s) > 1000 {
		s = strings.ToValidUTF8(s[:1000], "") + "…"
	}
	return s
}
