package appraise

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
)

// Digest tells a result from another one of the same node, but for its times and
// changes: most rounds have the result of the round before, which is then not
// written out. It is over all fields, each with its length.
func (r *Result) Digest() [sha256.Size]byte {
	d := &digester{b: make([]byte, 0, 1024*(1+len(r.VMs)))}
	d.text("virt-trust/result/1", r.Node, r.HostName, r.Software, r.Kernel, r.BootID)
	d.appraisal(&r.Host)
	d.pcrs(&r.PCRs)
	d.number(int64(len(r.VMs)))
	for i := range r.VMs {
		v := &r.VMs[i]
		d.text(v.UUID, v.Name, v.EK, string(v.EKCertificate))
		d.truth(v.Running)
		d.number(v.Started)
		d.appraisal(&v.Appraisal)
		d.pcrs(&v.PCRs)
		d.number(int64(len(v.Launchers)))
		for _, l := range v.Launchers {
			d.text(l.Role, l.Path, l.SHA256, l.By)
		}
	}
	return sha256.Sum256(d.b)
}

type digester struct{ b []byte }

func (d *digester) number(n int64) { d.b = binary.BigEndian.AppendUint64(d.b, uint64(n)) }

func (d *digester) truth(v bool) {
	if v {
		d.b = append(d.b, 1)
	} else {
		d.b = append(d.b, 0)
	}
}

func (d *digester) text(all ...string) {
	for _, s := range all {
		d.number(int64(len(s)))
		d.b = append(d.b, s...)
	}
}

func (d *digester) appraisal(a *Appraisal) {
	d.number(int64(a.Tier))
	v := &a.Vector
	for _, c := range []int8{v.InstanceIdentity, v.Configuration, v.Executables, v.FileSystem, v.Hardware, v.RuntimeOpaque, v.StorageOpaque, v.SourcedData} {
		d.b = append(d.b, byte(c))
	}
	d.number(int64(len(a.Reasons)))
	for i := range a.Reasons {
		r := &a.Reasons[i]
		d.text(r.Code, r.What, r.Log, r.Path, r.Digest, r.Expected)
		d.number(int64(r.Tier))
		if d.truth(r.Entry != nil); r.Entry != nil {
			d.number(int64(*r.Entry))
		}
		if d.truth(r.PCR != nil); r.PCR != nil {
			d.number(int64(*r.PCR))
		}
	}
}

func (d *digester) pcrs(p *PCRs) {
	d.text(p.packed.Bank, string(p.packed.Values))
	d.number(int64(p.packed.Which))
	d.number(int64(len(p.texts)))
	for _, k := range slices.Sorted(maps.Keys(p.texts)) {
		d.text(k, p.texts[k])
	}
}
