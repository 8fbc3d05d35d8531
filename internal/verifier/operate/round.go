package operate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"virt-trust/internal/appraise"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/ca"
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
	if err := a.need(Operator); err != nil {
		return done, err
	}
	// What is kept of a round never changes: it is looked at outside the transaction.
	values, left, err := s.shown(ctx, round, refs)
	if err != nil {
		return done, err
	}
	err = s.do(ctx, a, Operator, func(tx *store.Tx) error {
		done = Approved{Left: left}
		done.Added, err = s.add(ctx, tx, a, "round.approve", strconv.FormatInt(round, 10), FromOperator, values, nil)
		return err
	})
	return done, err
}

// shown gives the Reference Values that the reasons of a round lacked, and the
// reasons of which none can be made.
func (s *Service) shown(ctx context.Context, round int64, refs []Ref) (values []fleet.Value, left []appraise.Reason, err error) {
	r, err := s.Store.Round(ctx, round)
	if err != nil {
		return nil, nil, told(err)
	}
	res, err := resultOf(r)
	if err != nil {
		return nil, nil, err
	}
	left = []appraise.Reason{}
	found, bare := 0, map[string]appraise.Reason{} // subjects without any values
	take := func(subject string, reasons []appraise.Reason) {
		for i, reason := range reasons {
			if len(refs) > 0 && !slices.Contains(refs, Ref{subject, i}) {
				continue
			}
			found++
			v, ok := ValueOf(r.Node, subject, reason)
			switch {
			case ok:
				values = append(values, v)
			case reason.Code == appraise.CodeHostNoValues || reason.Code == appraise.CodeVMNoValues:
				bare[subject] = reason
			default:
				left = append(left, reason)
			}
		}
	}
	take("host", res.Host.Reasons)
	for _, v := range res.VMs {
		take(v.UUID, v.Reasons)
	}
	if found < len(refs) {
		return nil, nil, fmt.Errorf("%w: the round has no such reason", ErrInvalid)
	}
	if len(bare) > 0 {
		all, err := s.relearn(ctx, r)
		if err != nil {
			return nil, nil, err
		}
		for subject, reason := range bare {
			of := slices.DeleteFunc(slices.Clone(all), func(v fleet.Value) bool {
				return v.Subject != subject && (subject != "host" || v.Subject != r.Node)
			})
			if len(of) == 0 {
				left = append(left, reason)
			}
			values = append(values, of...)
		}
	}
	if len(values) == 0 {
		return nil, nil, fmt.Errorf("%w: the round shows nothing that a Reference Value could be made of; where logs are sent in parts, the first round of a boot has them whole", ErrInvalid)
	}
	for i := range values {
		values[i].Detail = fmt.Sprintf("round %d", r.ID)
	}
	return values, left, nil
}

// relearn appraises the evidence that was kept of a round again, as if it were a
// first one that is learned from, and gives what is learned. It was fresh when it
// came: that is not asked again.
func (s *Service) relearn(ctx context.Context, r fleet.Round) ([]fleet.Value, error) {
	e, err := report.UntrustedParse(r.Evidence)
	if err != nil {
		return nil, nil // it was not kept, or is none
	}
	n, err := s.Store.Node(ctx, r.Node)
	if err != nil {
		return nil, told(err)
	}
	ak, err := ca.AKOf(n.AK)
	if err != nil {
		return nil, err
	}
	policy := appraise.DefaultPolicy()
	switch set, err := s.Store.Setting(ctx, PolicySetting); {
	case err == nil:
		if policy, err = appraise.ParsePolicy(set.Data); err != nil {
			return nil, err
		}
	case !errors.Is(err, store.ErrNotFound):
		return nil, err
	}
	return appraise.Learn(appraise.Input{
		Node: appraise.Node{ID: n.ID, AK: ak, AKName: n.AKName}, Nonce: e.Nonce, Evidence: r.Evidence, Policy: policy, Learn: true, Now: r.Received,
	}), nil
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
	case appraise.CodeHostPCR, appraise.CodeLaunchBefore:
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
