package page

import (
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"net/http"
	"slices"
	"strings"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

const stripRounds = 60

type nodeView struct {
	Node     fleet.Status
	Note     string           // why there is no tier
	Result   *appraise.Result // nil before the first round
	Findings []finding
	Claims   []claim
	PCRs     []pcrValue
	VMs      []vmRow
	Strip    strip
	Rounds   []roundRow
	EK       []fact // of its certificate
	MayLearn bool   // nodes may be learned here
}

type vmRow struct {
	appraise.VM
	First *finding // the worst that is its own
	More  int
}

// result gives a node's newest result, or nil before the first.
func (p *Page) result(r *http.Request, node string) (*appraise.Result, error) {
	res, err := p.Store.Result(r.Context(), node)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	return res, err
}

func (p *Page) nodePage(r *http.Request) (view, error) {
	n, err := p.Store.Status(r.Context(), r.PathValue("node"))
	if err != nil {
		return view{}, err
	}
	d := nodeView{Node: n, Note: noTier(n, p), EK: certificate(n.EKCertificate), MayLearn: p.Learn}
	if d.Result, err = p.result(r, n.ID); err != nil {
		return view{}, err
	}
	if res := d.Result; res != nil {
		d.Findings, d.Claims, d.PCRs = findings(res.Host.Reasons), claims(res.Host.Vector), pcrs(res.PCRs.Texts(), res.Host.Reasons)
		for _, v := range res.VMs {
			w := vmRow{VM: v}
			for _, f := range findings(v.Reasons) {
				switch {
				case f.Inherit:
				case w.First == nil:
					w.First = &f
				default:
					w.More++
				}
			}
			d.VMs = append(d.VMs, w)
		}
		slices.SortStableFunc(d.VMs, func(a, b vmRow) int { return worse(a.Tier, b.Tier) })
	}
	rounds, _, err := p.Store.Rounds(r.Context(), store.RoundFilter{Node: n.ID}, store.Page{Limit: stripRounds})
	if err != nil {
		return view{}, err
	}
	d.Strip = newStrip(rounds, "")
	d.Rounds = roundRows(rounds[:min(len(rounds), 10)], "", namesIn(d.Result))
	return view{name: "node", title: n.Name, data: d}, nil
}

type vmView struct {
	Node     fleet.Status
	Note     string
	Result   *appraise.Result
	VM       appraise.VM
	Chain    *chain
	Findings []finding
	Claims   []claim
	PCRs     []pcrValue
	EK       []fact
	Strip    strip
	Rounds   []roundRow
	Others   []fleet.VM // the same VM, on other hosts
	Shared   []fleet.VM // other VMs with its EK
}

func (p *Page) vmPage(r *http.Request) (view, error) {
	ctx, id := r.Context(), r.PathValue("vm")
	n, err := p.Store.Status(ctx, r.PathValue("node"))
	if err != nil {
		return view{}, err
	}
	res, err := p.Store.Result(ctx, n.ID)
	if err != nil {
		return view{}, err
	}
	i := slices.IndexFunc(res.VMs, func(v appraise.VM) bool { return v.UUID == id })
	if i < 0 {
		return view{}, store.ErrNotFound
	}
	vm := res.VMs[i]
	d := vmView{Node: n, Note: noTier(n, p), Result: res, VM: vm, Chain: newChain(n, res, &vm),
		Findings: findings(vm.Reasons), Claims: claims(vm.Vector), PCRs: pcrs(vm.PCRs.Texts(), vm.Reasons), EK: certificate(vm.EKCertificate)}
	rounds, _, err := p.Store.Rounds(ctx, store.RoundFilter{Node: n.ID, VM: id}, store.Page{Limit: stripRounds})
	if err != nil {
		return view{}, err
	}
	d.Strip = newStrip(rounds, id)
	d.Rounds = roundRows(rounds[:min(len(rounds), 10)], id, namesIn(res))
	same, _, err := p.Store.VMs(ctx, store.VMFilter{UUID: id}, store.Page{Limit: 10})
	if err != nil {
		return view{}, err
	}
	d.Others = slices.DeleteFunc(same, func(v fleet.VM) bool { return v.Node == n.ID })
	if vm.EK != "" {
		shared, err := p.Store.VMsByEK(ctx, vm.EK)
		if err != nil {
			return view{}, err
		}
		d.Shared = slices.DeleteFunc(shared, func(v fleet.VM) bool { return v.UUID == id })
	}
	return view{name: "vm", title: vm.Name, data: d}, nil
}

// Running says it in words.
func (v vmView) Running() string {
	if v.VM.Running {
		return "running"
	}
	return "not running"
}

// certificate gives what a certificate says, unchecked: the appraisal checked
// what there is to check. Nil where it is none.
func certificate(der []byte) []fact {
	if len(der) == 0 {
		return nil
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return []fact{{"Certificate", "cannot be read: " + err.Error()}}
	}
	out := []fact{
		{"Issuer", c.Issuer.String()}, {"Subject", c.Subject.String()}, {"Serial number", c.SerialNumber.Text(16)},
		{"Good from", stamp(c.NotBefore)}, {"Good until", stamp(c.NotAfter)},
	}
	// The TPM's maker, model and version stand in the alternative name: TCG EK
	// Credential Profile, 3.2.9.
	for _, e := range c.Extensions {
		if e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) {
			if s := tpmNames(e.Value); s != "" {
				out = append(out, fact{"TPM", s})
			}
		}
	}
	return slices.DeleteFunc(out, func(f fact) bool { return strings.TrimSpace(f.Value) == "" })
}

// tpmNames reads the directoryName of a subjectAltName: manufacturer, model,
// version.
func tpmNames(der []byte) string {
	var names []asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &names); err != nil || len(rest) > 0 {
		return ""
	}
	var out []string
	for _, n := range names {
		if n.Class != asn1.ClassContextSpecific || n.Tag != 4 {
			continue
		}
		var sets []asn1.RawValue
		if _, err := asn1.Unmarshal(n.Bytes, &sets); err != nil {
			continue
		}
		for _, s := range sets {
			for rest := s.Bytes; len(rest) > 0; {
				var a struct {
					Type  asn1.ObjectIdentifier
					Value asn1.RawValue
				}
				var err error
				if rest, err = asn1.Unmarshal(rest, &a); err != nil {
					break
				}
				out = append(out, string(a.Value.Bytes))
			}
		}
	}
	return strings.Join(out, ", ")
}
