// Package pagetest fills a store with a fleet that has one of everything that the
// page can show, for tests and for pictures of it.
package pagetest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"math/big"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

// The nodes by what is to be seen of them.
var (
	Good     = ID("node", 1)
	BadVM    = ID("node", 4) // its VM Vault booted another kernel
	BadHost  = ID("node", 7) // another boot loader
	Odd      = ID("node", 9) // a file that nobody knows
	Silent   = ID("node", 11)
	Waiting  = ID("node", 21)
	Claimed  = ID("node", 3) // someone else says to be it
	Revoked  = ID("node", 22)
	Vault    = ID("vm", 4_02)
	GoodVM   = ID("vm", 1_01)
	Launched = ID("vm", 4_03) // by a QEMU that nobody approved
)

// ID makes a UUID that is the same every time.
func ID(kind string, n int) string {
	d := sha256.Sum256(fmt.Appendf(nil, "%s %d", kind, n))
	d[6], d[8] = d[6]&0x0f|0x40, d[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", d[:4], d[4:6], d[6:8], d[8:10], d[10:16])
}

// Digest is one that is the same every time for a text.
func Digest(of string) string {
	d := sha256.Sum256([]byte(of))
	return hex.EncodeToString(d[:])
}

// Builder fills a store as of its clock.
type Builder struct {
	Store    *store.Store
	Now      func() time.Time
	Interval time.Duration // between rounds; a minute where 0
	n        int
}

// Node gives a node with keys of its own.
func (b *Builder) Node(id, name string, state fleet.NodeState) fleet.Node {
	key := sha256.Sum256([]byte("ak " + id))
	bind := sha256.Sum256([]byte("bind " + id))
	return fleet.Node{
		ID: id, Name: name, State: state, EKDigest: Digest("ek " + id), EKTrust: "manufacturer", AKName: append([]byte{0, 11}, key[:]...), AK: key[:],
		BindName: append([]byte{0, 11}, bind[:]...), Bind: bind[:], Certifier: bind[:], Serial: Digest("serial " + id)[:32],
		Enrolled: b.Now().Add(-40 * 24 * time.Hour), ApprovedBy: "alice",
	}
}

// Put adds a node.
func (b *Builder) Put(ctx context.Context, n fleet.Node) error {
	return b.Store.Do(ctx, func(tx *store.Tx) error {
		tx.Audit(fleet.AuditEntry{Time: n.Enrolled, Actor: "alice", Action: "node.approve", Subject: n.ID, Detail: fmt.Sprintf(`{"name": %q, "ek": %q}`, n.Name, n.EKDigest)})
		return tx.PutNode(ctx, n)
	})
}

// Round completes a round as of at: what res says, with times put in. evidence
// is kept where the store wants it.
func (b *Builder) Round(ctx context.Context, res appraise.Result, at time.Time) (int64, error) {
	b.n++
	nonce := sha256.Sum256(fmt.Appendf(nil, "nonce %d", b.n))
	if _, err := b.Store.IssueNonce(ctx, res.Node, nonce[:], b.Now().Add(time.Minute)); err != nil {
		return 0, err
	}
	res.Received, res.Expires = at, at.Add(3*time.Minute)
	var evidence []byte
	if res.Host.Tier != appraise.Affirming {
		evidence = []byte("evidence that was kept")
	}
	return b.Store.CompleteRound(ctx, store.Completion{Node: res.Node, Nonce: nonce[:], Result: &res, Evidence: evidence})
}

var affirmed = appraise.Vector{InstanceIdentity: 2, Configuration: 2, Executables: 2, Hardware: 2}

// PCRs are 0 to 15 of a state that name stands for.
func PCRs(name string) map[string]string {
	m := map[string]string{}
	for i := range 16 {
		m[fmt.Sprintf("sha256:%d", i)] = Digest(fmt.Sprintf("%s %d", name, i))
	}
	return m
}

// VM gives one that is as it should be.
func VM(id, name string) appraise.VM {
	return appraise.VM{
		UUID: id, Name: name, Running: true, Appraisal: appraise.Appraisal{Tier: appraise.Affirming, Vector: affirmed},
		EK: Digest("ek " + id), EKCertificate: ekCertificate(id), PCRs: appraise.NewPCRs(PCRs("debian guest")), Started: 1_800_000_000,
		Launchers: []appraise.Launcher{
			{Role: "emulator", Path: "/usr/bin/qemu-system-x86_64", SHA256: Digest("qemu"), By: "package qemu-system-x86 1:7.2+dfsg-7+deb12u16"},
			{Role: "firmware", Path: "/usr/share/OVMF/OVMF_CODE_4M.ms.fd", SHA256: Digest("ovmf"), By: "package ovmf 2022.11-6+deb12u2"},
			{Role: "nvram-template", Path: "/usr/share/OVMF/OVMF_VARS_4M.ms.fd", SHA256: Digest("ovmf vars"), By: "package ovmf 2022.11-6+deb12u2"},
			{Role: "swtpm", Path: "/usr/bin/swtpm", SHA256: Digest("swtpm"), By: "package swtpm 0.7.1-1.3"},
			{Role: "swtpm-library", Path: "/usr/lib/x86_64-linux-gnu/libtpms.so.0.9.2", SHA256: Digest("libtpms"), By: "package libtpms0 0.9.2-3.1+deb12u1"},
		},
	}
}

// Result gives one of a node that is as it should be.
func Result(node, name string, vms ...appraise.VM) appraise.Result {
	return appraise.Result{
		Node: node, Host: appraise.Appraisal{Tier: appraise.Affirming, Vector: affirmed}, VMs: vms, PCRs: appraise.NewPCRs(PCRs("debian host")), HostName: name,
		Software: "0.3.0", Kernel: "6.1.0-39-amd64", BootID: ID("boot "+node, 1),
	}
}

var names = []string{"web", "db", "vault", "build", "mail", "git", "proxy", "cache", "dns", "ci", "files", "wiki"}

// Fleet fills the store with twenty hosts, of which some want attention.
func (b *Builder) Fleet(ctx context.Context) error {
	step := b.Interval
	if step == 0 {
		step = time.Minute
	}
	for i := 1; i <= 20; i++ {
		id := ID("node", i)
		n := b.Node(id, fmt.Sprintf("kvm-%02d.example.net", i), fleet.Active)
		if i%5 == 0 {
			n.EKTrust = "admin alice"
		} else {
			n.EKCertificate = ekCertificate(id)
		}
		if id == Claimed {
			n.Problem = "enrolment from 192.0.2.66 under this name with another TPM (EK " + Digest("other")[:16] + "…) was refused"
		}
		if err := b.Put(ctx, n); err != nil {
			return err
		}
		var vms []appraise.VM
		for j := 1; j <= 3+i%3; j++ {
			vms = append(vms, VM(ID("vm", i*100+j), fmt.Sprintf("%s-%02d", names[(i*3+j)%len(names)], i)))
		}
		res := Result(id, n.Name, vms...)
		start := b.Now().Add(-20 * step)
		res.Changes = []appraise.Change{{Subject: "host", Kind: "reboot", What: "first round"}}
		if _, err := b.Round(ctx, res, start); err != nil {
			return err
		}
		last := b.Now().Add(-time.Duration(i) * time.Second)
		if id == Silent {
			last = b.Now().Add(-14 * time.Minute)
		}
		res.Changes = nil
		for at := start.Add(step); at.Before(last.Add(-6 * step)); at = at.Add(step) {
			if _, err := b.Round(ctx, res, at); err != nil {
				return err
			}
		}
		if err := b.mischief(ctx, id, res, last, step); err != nil {
			return err
		}
	}
	for _, n := range []fleet.Node{b.Node(Waiting, "kvm-21.example.net", fleet.Pending), b.Node(Revoked, "kvm-old.example.net", fleet.Revoked)} {
		n.ApprovedBy, n.Enrolled = "", b.Now().Add(-12*time.Minute)
		n.EKCertificate = ekCertificate(n.ID)
		if n.State == fleet.Revoked {
			n.RevokedWhy = "mainboard replaced, ticket 4711"
		}
		if err := b.Put(ctx, n); err != nil {
			return err
		}
	}
	return b.papers(ctx)
}

func at[T any](v T) *T { return &v }

// mischief is what the last rounds of a node show.
func (b *Builder) mischief(ctx context.Context, id string, res appraise.Result, last time.Time, step time.Duration) error {
	worsen := func(a *appraise.Appraisal, rs ...appraise.Reason) {
		a.Tier, a.Reasons = rs[0].Tier, rs
	}
	vms := append([]appraise.VM(nil), res.VMs...)
	later := func() {} // what two rounds later comes to that
	switch id {
	case BadVM:
		res.Changes = []appraise.Change{
			{Subject: Vault, Kind: "vm-started", What: "started anew"},
			{Subject: Vault, Kind: "pcr", What: "sha256:4 is another"},
			{Subject: Vault, Kind: "tier", What: "affirming, now contraindicated"},
		}
		v := &vms[1]
		pcrs := PCRs("debian guest")
		v.PCRs = appraise.NewPCRs(pcrs)
		pcrs["sha256:9"], pcrs["sha256:4"] = Digest("evil initrd"), Digest("evil loader")
		v.Vector.Executables, v.Vector.Configuration = 33, 2
		worsen(&v.Appraisal,
			appraise.Reason{Code: appraise.CodeVMPCR, Tier: appraise.Contraindicated, What: "PCR 4 of the vTPM is not what its Reference Values say: another boot loader ran", PCR: at(uint(4)), Path: "sha256:4", Digest: pcrs["sha256:4"], Expected: Digest("debian guest 4")},
			appraise.Reason{Code: appraise.CodeVMPCR, Tier: appraise.Contraindicated, What: "PCR 9 of the vTPM is not what its Reference Values say: another kernel or initrd ran", PCR: at(uint(9)), Path: "sha256:9", Digest: pcrs["sha256:9"], Expected: Digest("debian guest 9")})
		later = func() {
			v := &vms[2]
			v.Launchers = append([]appraise.Launcher(nil), v.Launchers...)
			v.Launchers[0].SHA256, v.Launchers[0].By = Digest("other qemu"), ""
			res.Changes = []appraise.Change{{Subject: v.UUID, Kind: "launcher", What: "emulator /usr/bin/qemu-system-x86_64 is another"}}
			worsen(&v.Appraisal, appraise.Reason{Code: appraise.CodeLauncherUnknown, Tier: appraise.Warning, What: "QEMU ran in a version that no Reference Value has", Log: report.LaunchLog, Entry: at(17), Path: "/usr/bin/qemu-system-x86_64", Digest: Digest("other qemu")})
		}
	case BadHost:
		pcrs := PCRs("debian host")
		pcrs["sha256:4"] = Digest("other shim")
		res.BootID, res.PCRs = ID("boot", 99), appraise.NewPCRs(pcrs)
		res.Host.Vector.Executables = 96
		res.Changes = []appraise.Change{
			{Subject: "host", Kind: "reboot", What: "the host was started anew"},
			{Subject: "host", Kind: "event", What: "new: PCR 4, EV_EFI_BOOT_SERVICES_APPLICATION, \\EFI\\debian\\shimx64.efi"},
			{Subject: "host", Kind: "event", What: "gone: PCR 4, EV_EFI_BOOT_SERVICES_APPLICATION, \\EFI\\debian\\shimx64.efi"},
			{Subject: "host", Kind: "tier", What: "affirming, now contraindicated"},
		}
		worsen(&res.Host, appraise.Reason{Code: appraise.CodeEventUnknown, Tier: appraise.Contraindicated, What: "a boot loader ran that no Reference Value has", Log: report.EventLog, Entry: at(23), PCR: at(uint(4)),
			Path: `4/EV_EFI_BOOT_SERVICES_APPLICATION/\EFI\debian\shimx64.efi`, Digest: Digest("evil shim")})
		for i := range vms {
			worsen(&vms[i].Appraisal, appraise.Reason{Code: appraise.CodeHost, Tier: appraise.Contraindicated, What: "its host is contraindicated"})
		}
	case Odd:
		res.Host.Vector.Executables = 33
		res.Changes = []appraise.Change{{Subject: "host", Kind: "ima-entry", What: "/usr/local/bin/backup-now, sha256:" + Digest("backup")[:16]}, {Subject: "host", Kind: "tier", What: "affirming, now warning"}}
		worsen(&res.Host, appraise.Reason{Code: appraise.CodeIMAUnknown, Tier: appraise.Warning, What: "a file ran that no Reference Value has", Log: report.IMA, Entry: at(1041), PCR: at(uint(10)), Path: "/usr/local/bin/backup-now", Digest: Digest("backup")})
		for i := range vms {
			worsen(&vms[i].Appraisal, appraise.Reason{Code: appraise.CodeHost, Tier: appraise.Warning, What: "its host is in warning"})
		}
	}
	res.VMs = vms
	for i := 4; i >= 0; i-- {
		if i == 2 {
			later()
		}
		if _, err := b.Round(ctx, res, last.Add(-time.Duration(i)*step)); err != nil {
			return err
		}
		res.Changes = nil
	}
	return nil
}

// papers adds Reference Values, tokens, webhooks with what they did not take, and
// policies.
func (b *Builder) papers(ctx context.Context) error {
	err := b.Store.Do(ctx, func(tx *store.Tx) error {
		now := b.Now()
		vs := []fleet.Value{
			{Kind: fleet.HostIMA, Path: "/usr/bin/bash", Digest: "sha256:" + Digest("bash"), Source: "package", Detail: "bash 5.2.15-2+b8", State: fleet.Approved, By: "alice", Time: now.Add(-30 * 24 * time.Hour)},
			{Kind: fleet.Launcher, Path: "/usr/bin/qemu-system-x86_64", Digest: "sha256:" + Digest("qemu"), Source: "manifest", Detail: "acme-2026", State: fleet.Approved, By: "alice", Time: now.Add(-20 * 24 * time.Hour)},
			{Subject: Good, Kind: fleet.HostEvent, Path: `4/EV_EFI_BOOT_SERVICES_APPLICATION/\EFI\debian\shimx64.efi`, Digest: "sha256:" + Digest("shim"), Source: "learned", State: fleet.Approved, By: "verifier", Time: now.Add(-19 * 24 * time.Hour)},
			{Subject: GoodVM, Kind: fleet.VMPCR, Path: "sha256:4", Digest: "sha256:" + Digest("debian guest 4"), Source: "learned", State: fleet.Approved, By: "verifier", Time: now.Add(-19 * 24 * time.Hour)},
			{Subject: Odd, Kind: fleet.HostIMA, Path: "/usr/local/bin/backup-now", Digest: "sha256:" + Digest("backup"), Source: "operator", Detail: "round 61", State: fleet.Proposed, By: "alice", FourEyes: true, Time: now.Add(-3 * time.Minute)},
			{Kind: fleet.HostIMA, Path: "/opt/acme/agent", Digest: "sha256:" + Digest("agent"), Source: "file", Detail: "acme agent 4.2", State: fleet.Proposed, By: "bob", FourEyes: true, Time: now.Add(-2 * time.Minute)},
		}
		if _, err := tx.AddValues(ctx, vs); err != nil {
			return err
		}
		tx.Audit(fleet.AuditEntry{Time: now.Add(-3 * time.Minute), Actor: "alice", Action: "round.approve", Subject: "61", Detail: `{"values": 1, "new": 1, "state": "proposed"}`})
		for i, t := range []fleet.JoinToken{
			{Name: "kvm-21.example.net", Expires: now.Add(20 * time.Hour), By: "alice", Created: now.Add(-4 * time.Hour)},
			{Expires: now.Add(-time.Hour), By: "bob", Created: now.Add(-25 * time.Hour)},
		} {
			t.Digest = Digest(fmt.Sprint("token ", i))
			if err := tx.AddToken(ctx, t); err != nil {
				return err
			}
		}
		_, err := tx.AddHook(ctx, fleet.Hook{URL: "https://alerts.example.net/virt-trust", Secret: []byte("0123456789abcdef0123456789abcdef"), Events: []string{"trust.changed", "result.expired"}, Created: now.Add(-9 * 24 * time.Hour)})
		if err != nil {
			return err
		}
		if _, err := tx.Enqueue(ctx, "trust.changed", []byte("{}")); err != nil {
			return err
		}
		if _, err := tx.Enqueue(ctx, "result.expired", []byte("{}")); err != nil {
			return err
		}
		for _, s := range []fleet.Setting{
			{Name: "policy", Version: 1, By: "alice, bob", Time: now.Add(-11 * 24 * time.Hour), Data: []byte(`{"format":"virt-trust-policy-1","id":"acme","ima":{"require":true,"excludes":["/var/tmp/*"]}}`)},
			{Name: "policy", Version: 2, By: "bob, alice", Time: now.Add(-2 * 24 * time.Hour), Data: []byte(`{"format":"virt-trust-policy-1","id":"acme","ima":{"require":true,"excludes":["/var/tmp/*","/var/lib/build/*"]},"audit_mode":"contraindicated"}`)},
			{Name: "policy.proposed", Version: 1, By: "bob", Time: now.Add(-40 * time.Minute), Data: []byte(`{"format":"virt-trust-policy-1","id":"acme","ima":{"require":true,"excludes":["/var/tmp/*"]},"audit_mode":"contraindicated","max_age":150}`)},
		} {
			if err := tx.PutSetting(ctx, s); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return b.GiveUp(ctx, "the receiver answered 503 Service Unavailable")
}

// GiveUp makes dead letters of all deliveries that wait.
func (b *Builder) GiveUp(ctx context.Context, why string) error {
	for range store.MaxAttempts {
		due, err := b.Store.Claim(ctx, 100, 0)
		if err != nil {
			return err
		}
		for _, d := range due {
			if d.Attempts == store.MaxAttempts {
				if err := b.Store.Retry(ctx, d, why); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// ekCertificate makes one as a TPM's maker, or a node's certifier, would.
func ekCertificate(id string) []byte {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err) // the machine has no randomness
	}
	ca := &x509.Certificate{Subject: pkix.Name{CommonName: "virt-trust certifier of kvm-04", Organization: []string{"Example"}}}
	oid := func(last int) asn1.ObjectIdentifier { return asn1.ObjectIdentifier{2, 23, 133, 2, last} }
	san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: must(asn1.Marshal(pkix.RDNSequence{
		{{Type: oid(1), Value: "id:57544300"}, {Type: oid(2), Value: "virt-trust vTPM"}, {Type: oid(3), Value: "id:20240125"}}}))}})
	if err != nil {
		panic(err)
	}
	return must(x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes([]byte(id[:8])), Subject: pkix.Name{CommonName: id}, NotBefore: time.Unix(1_790_000_000, 0), NotAfter: time.Unix(2_100_000_000, 0),
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: san}},
	}, ca, &key.PublicKey, key))
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
