package operate

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"virt-trust/internal/appraise"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

// Ref names one reason of a round: of "host" or a VM's UUID, counted from 0.
type Ref struct {
	Subject string `json:"subject"`
	Reason  int    `json:"reason"`
}

// Approved says what came of approving what a round showed.
type Approved struct {
	Added
	// Left are reasons of which no Reference Value can be made: they have to be
	// mended on the host.
	Left []appraise.Reason `json:"left"`
}

// ApproveRound makes Reference Values of what a round showed and no Reference
// Value has: of the reasons that are named, or of all where none is. It takes
// what was kept of that very round, not what the node shows meanwhile.
// ErrNotFound, ErrInvalid where nothing can be made of any.
func (s *Service) ApproveRound(ctx context.Context, a Actor, round int64, refs ...Ref) (done Approved, err error) {
	err = s.do(ctx, a, Operator, func(tx *store.Tx) error {
		r, err := tx.Round(ctx, round)
		if err != nil {
			return err
		}
		res, err := resultOf(r)
		if err != nil {
			return err
		}
		var values []fleet.Value
		done = Approved{Left: []appraise.Reason{}}
		found := 0
		take := func(subject, name string, reasons []appraise.Reason) {
			for i, reason := range reasons {
				if len(refs) > 0 && !slices.Contains(refs, Ref{subject, i}) {
					continue
				}
				found++
				if v, ok := ValueOf(r.Node, subject, reason); ok {
					v.Detail = fmt.Sprintf("round %d", r.ID)
					values = append(values, v)
				} else {
					done.Left = append(done.Left, reason)
				}
			}
		}
		take("host", "", res.Host.Reasons)
		for _, v := range res.VMs {
			take(v.UUID, v.Name, v.Reasons)
		}
		switch {
		case found < len(refs):
			return fmt.Errorf("%w: the round has no such reason", ErrInvalid)
		case len(values) == 0:
			return fmt.Errorf("%w: the round shows nothing that a Reference Value could be made of", ErrInvalid)
		}
		done.Added, err = s.add(ctx, tx, a, "round.approve", strconv.FormatInt(r.ID, 10), FromOperator, values)
		return err
	})
	return done, err
}

// ValueOf makes the Reference Value that a finding lacked: false where there is
// none, because what was found is wrong whatever Reference Values say. subject is
// "host", or a VM's UUID.
func ValueOf(node, subject string, r appraise.Reason) (fleet.Value, bool) {
	v := fleet.Value{Subject: subject, Path: r.Path, Digest: named(r.Digest)}
	if subject == "host" {
		v.Subject = node
	}
	switch r.Code {
	case appraise.CodeEventUnknown:
		v.Kind = fleet.HostEvent
	case appraise.CodeIMAUnknown, appraise.CodeIMAChanged, appraise.CodeIMAWithdrawn:
		v.Kind = fleet.HostIMA
	case appraise.CodeLauncherUnknown:
		// What runs VMs is the host's, whichever VM it was found at.
		v.Kind, v.Subject = fleet.Launcher, node
	case appraise.CodeHostPCR:
		v.Kind = fleet.HostPCR
	case appraise.CodeVMPCR:
		v.Kind = fleet.VMPCR
	default:
		return v, false
	}
	if v.Kind == fleet.HostPCR || v.Kind == fleet.VMPCR { // the path is "bank:index"
		bank, _, _ := strings.Cut(r.Path, ":")
		_, digits, _ := strings.Cut(v.Digest, ":")
		v.Digest = bank + ":" + digits
	}
	if r.Log != "" && r.Log != report.EventLog && r.Log != report.IMA && r.Log != report.LaunchLog {
		return v, false
	}
	return v, appraise.CheckValue(v) == nil
}

// named puts the algorithm before a digest that lacks it.
func named(digest string) string {
	if alg, ok := digestNames[len(digest)]; ok {
		return alg + ":" + digest
	}
	return digest
}
