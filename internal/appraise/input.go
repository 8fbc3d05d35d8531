package appraise

import (
	"crypto/ecdsa"
	"time"

	"virt-trust/internal/evidence/report"
)

// Node is what the Verifier knows of an enrolled host.
type Node struct {
	ID     string
	AK     *ecdsa.PublicKey
	AKName []byte   // nil where only the key is known
	Groups []string // "group:NAME": subjects of Reference Values that are the node's too
}

// Input is all that an appraisal is made of. Nothing in it is changed.
type Input struct {
	Node     Node
	Nonce    []byte    // that the node was given; the caller sees to it that it is taken once
	Expires  time.Time // of the nonce; zero: it does not expire
	Evidence []byte
	Parsed   *Parsed     // what Parse gave of Evidence; nil: it is parsed here
	Previous *Checkpoint // nil in the first round
	Values   []*Values   // of all, and of the node and its VMs; also those that were rejected
	Policy   *Policy
	// Learn: what is new in the first good round of the host, or of a VM, and was not
	// rejected, is taken for right; Learn gives it as Reference Values, which the
	// caller then stores.
	Learn bool
	// Elsewhere are the UUIDs of VMs that other nodes report, too: whose they are is
	// not known, and nothing is learned of them.
	Elsewhere map[string]bool
	Now       time.Time
}

// Parsed is Evidence for which nobody has vouched yet.
type Parsed struct {
	evidence               *report.Evidence
	report                 *report.Report
	badEvidence, badReport error
}

// Parse reads Evidence, for those who have to know before it is appraised of which
// VMs it is.
func Parse(evidence []byte) *Parsed {
	p := parse(evidence)
	if p.badEvidence == nil {
		p.readReport()
	}
	return p
}

func parse(evidence []byte) *Parsed {
	p := &Parsed{}
	p.evidence, p.badEvidence = report.UntrustedParse(evidence)
	return p
}

// readReport reads the report, if that was not done before.
func (p *Parsed) readReport() {
	if p.report == nil && p.badReport == nil {
		p.report, p.badReport = report.UntrustedParseReport(p.evidence.Report)
	}
}

// UntrustedVMs are those of the report; none, where it is no report.
func (p *Parsed) UntrustedVMs() []report.VM {
	if p.report == nil {
		return nil
	}
	return p.report.VMs
}
