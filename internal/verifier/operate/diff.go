package operate

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
)

// Difference is one between two rounds. Before and After are texts for people;
// one of them is empty where something is new or gone.
type Difference struct {
	Subject string `json:"subject"` // "host", or a VM's UUID
	Name    string `json:"name,omitempty"`
	Kind    string `json:"kind"` // tier, reason, pcr, launcher, vm, boot, kernel, software, ek
	What    string `json:"what"`
	Before  string `json:"before,omitempty"`
	After   string `json:"after,omitempty"`
}

// Diff says what differs between two rounds of one node. ErrInvalid where they
// are of two; ErrNotFound where one is not there, or its result was not kept.
func (s *Service) Diff(ctx context.Context, a Actor, before, after int64) ([]Difference, error) {
	if err := a.need(Reader); err != nil {
		return nil, err
	}
	was, err := s.round(ctx, before)
	if err != nil {
		return nil, err
	}
	is, err := s.round(ctx, after)
	if err != nil {
		return nil, err
	}
	if was.Node != is.Node {
		return nil, fmt.Errorf("%w: rounds %d and %d are of two nodes", ErrInvalid, before, after)
	}
	return Differences(was, is), nil
}

func (s *Service) round(ctx context.Context, id int64) (*appraise.Result, error) {
	r, err := s.Store.Round(ctx, id)
	if err != nil {
		return nil, told(err)
	}
	return resultOf(r)
}

func resultOf(r fleet.Round) (*appraise.Result, error) {
	if len(r.Result) == 0 {
		return nil, fmt.Errorf("%w: the result of round %d was not kept", ErrNotFound, r.ID)
	}
	res := &appraise.Result{}
	if err := json.Unmarshal(r.Result, res); err != nil {
		return nil, fmt.Errorf("round %d: %w", r.ID, err)
	}
	return res, nil
}

// Differences compares two results of one node: host first, then VMs by UUID.
func Differences(was, is *appraise.Result) []Difference {
	d := &differ{subject: "host", all: []Difference{}}
	d.text("boot", "boot", was.BootID, is.BootID)
	d.text("kernel", "kernel", was.Kernel, is.Kernel)
	d.text("software", "virt-trust", was.Software, is.Software)
	d.appraisals(was.Host, is.Host)
	d.maps("pcr", was.PCRs.Texts(), is.PCRs.Texts())

	byUUID := func(r *appraise.Result) map[string]appraise.VM {
		m := map[string]appraise.VM{}
		for _, v := range r.VMs {
			m[v.UUID] = v
		}
		return m
	}
	before, after := byUUID(was), byUUID(is)
	all := maps.Clone(before)
	maps.Copy(all, after)
	for _, uuid := range slices.Sorted(maps.Keys(all)) {
		b, had := before[uuid]
		v, has := after[uuid]
		d.subject, d.name = uuid, cmp.Or(v.Name, b.Name)
		d.text("vm", "VM", state(b, had), state(v, has))
		if had && has {
			d.text("vm", "name", b.Name, v.Name)
		}
		d.appraisals(b.Appraisal, v.Appraisal)
		if had && has {
			d.text("ek", "endorsement key", b.EK, v.EK)
			d.maps("pcr", b.PCRs.Texts(), v.PCRs.Texts())
			d.maps("launcher", launchers(b), launchers(v))
		}
	}
	return d.all
}

func state(v appraise.VM, there bool) string {
	switch {
	case !there:
		return ""
	case v.Running:
		return "running"
	}
	return "not running"
}

func launchers(v appraise.VM) map[string]string {
	m := map[string]string{}
	for _, l := range v.Launchers {
		m[l.Role+" "+l.Path] = l.SHA256
	}
	return m
}

type differ struct {
	subject, name string
	all           []Difference
}

func (d *differ) text(kind, what, before, after string) {
	if before != after {
		d.all = append(d.all, Difference{d.subject, d.name, kind, what, before, after})
	}
}

func (d *differ) maps(kind string, before, after map[string]string) {
	all := maps.Clone(before)
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, after)
	for _, k := range slices.Sorted(maps.Keys(all)) {
		d.text(kind, k, before[k], after[k])
	}
}

func (d *differ) appraisals(before, after appraise.Appraisal) {
	d.text("tier", "tier", before.Tier.String(), after.Tier.String())
	key := func(r appraise.Reason) string {
		b, _ := json.Marshal(r) // a struct of texts and numbers
		return string(b)
	}
	had, has := map[string]bool{}, map[string]bool{}
	for _, r := range before.Reasons {
		had[key(r)] = true
	}
	for _, r := range after.Reasons {
		has[key(r)] = true
		if !had[key(r)] {
			d.text("reason", r.Code, "", cmp.Or(r.What, r.Code))
		}
	}
	for _, r := range before.Reasons {
		if !has[key(r)] {
			d.text("reason", r.Code, cmp.Or(r.What, r.Code), "")
		}
	}
}
