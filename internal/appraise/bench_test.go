package appraise

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/big"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virt-trust/internal/evidence/eventlog"
	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/evidence/ima"
	"virt-trust/internal/evidence/quote"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/launcher/launchlog"
)

// fleetOfOne is a host with five VMs and a thousand files in its IMA list, known
// to the Verifier.
func fleetOfOne(tb testing.TB) *bench {
	tb.Helper()
	h := forge.NewHost("sha256", bootLog(tb, "uki"), epoch)
	h.MeasureMany(1000)
	b := &bench{t: tb, host: h, policy: DefaultPolicy(), learn: true}
	n := h.Launchers([3]string{"emulator", "/usr/bin/qemu-system-x86_64", "qemu"}, [3]string{"swtpm", "/usr/bin/swtpm", "swtpm"}, [3]string{"firmware", "/usr/share/OVMF/OVMF_CODE.fd", "ovmf"})
	for i := range 5 {
		h.Start(h.AddVM(fmt.Sprint("vm", i)), bootLog(tb, "sd"), n...)
	}
	h.Tick(5 * time.Minute)
	b.round(forge.Options{})
	b.want(Affirming)
	b.learn = false
	h.Tick(time.Minute)
	b.round(forge.Options{}) // with what was learned
	b.want(Affirming)
	h.Tick(time.Minute)
	return b
}

// bare is what any verifier has to do: the same signature, the same hashes.
func bare(b *bench, in Input) func(testing.TB) {
	e, err := report.UntrustedParse(in.Evidence)
	if err != nil {
		b.t.Fatal(err)
	}
	logs := map[string][]byte{}
	for _, l := range e.Logs {
		logs[l.Kind] = l.Data
	}
	var entries [][]byte
	var entry ima.Entry
	for at := 0; at < len(logs[report.IMA]); {
		n, err := entry.Next(logs[report.IMA][at:])
		if err != nil || n == 0 {
			b.t.Fatal(n, err)
		}
		entries, at = append(entries, entry.Data), at+n
	}
	lines, _ := launchlog.Split(logs[report.LaunchLog])
	var events int
	if len(logs[report.EventLog]) > 0 {
		l, err := eventlog.UntrustedParse(logs[report.EventLog])
		if err != nil {
			b.t.Fatal(err)
		}
		for _, e := range l.Events {
			if e.Type != eventlog.NoAction {
				events++
			}
		}
	}
	q, err := quote.UntrustedParse(e.Quote.Attest)
	if err != nil {
		b.t.Fatal(err)
	}
	// TPMT_SIGNATURE: scheme, hash, r, s
	rest := e.Quote.Signature[4:]
	n := int(binary.BigEndian.Uint16(rest))
	r, s := new(big.Int).SetBytes(rest[2:2+n]), new(big.Int).SetBytes(rest[4+n:])
	values := make([]byte, 16*32)
	rep, err := report.UntrustedParseReport(e.Report)
	if err != nil {
		b.t.Fatal(err)
	}
	type signed struct {
		key  *ecdsa.PublicKey
		q    []byte
		r, s *big.Int
		uuid [16]byte
	}
	var vms []signed // quotes of vTPMs
	for _, v := range rep.VMs {
		if v.Quote == nil {
			continue
		}
		o, err := quote.ParsePublic(v.Quote.AK)
		if err != nil {
			b.t.Fatal(err)
		}
		key, err := o.AK()
		if err != nil {
			b.t.Fatal(err)
		}
		rest := v.Quote.Quote.Signature[4:]
		n := int(binary.BigEndian.Uint16(rest))
		vms = append(vms, signed{key, v.Quote.Quote.Attest, new(big.Int).SetBytes(rest[2 : 2+n]), new(big.Int).SetBytes(rest[4+n:]), v.UUID})
	}
	return func(tb testing.TB) {
		d := sha256.Sum256(e.Quote.Attest)
		if !ecdsa.Verify(in.Node.AK, d[:], r, s) {
			tb.Fatal("signature")
		}
		for _, v := range vms {
			d, pcrs, binding := sha256.Sum256(v.q), sha256.Sum256(values), report.VTPMQualifyingData(e.Nonce, v.uuid)
			if !ecdsa.Verify(v.key, d[:], v.r, v.s) || pcrs == d || binding == d {
				tb.Fatal("signature of a vTPM")
			}
		}
		if in.Previous == nil && sha256.Sum256(values[:10*32]) == d { // IMA's first entry is of PCRs 0 to 9
			tb.Fatal("boot aggregate")
		}
		inner := sha256.Sum256(e.Report)
		outer := sha256.Sum256(append(bytes.Clone(e.Nonce), inner[:]...))
		pcrs := sha256.Sum256(values)
		if !bytes.Equal(outer[:], q.Qualifying) || pcrs == outer {
			tb.Fatal("binding")
		}
		var room [64]byte
		extend := func(data []byte) {
			s := sha256.Sum256(data)
			copy(room[32:], s[:])
			v := sha256.Sum256(room[:])
			copy(room[:], v[:])
		}
		for _, d := range entries {
			extend(d)
		}
		for _, d := range lines {
			extend(d)
		}
		for range events { // whose digests are in the log
			v := sha256.Sum256(room[:])
			copy(room[:], v[:])
		}
	}
}

// processorTime is what the process has used, garbage collection included: on a
// machine that does other things too, the clock on the wall tells nothing.
func processorTime(b *testing.B) time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// BenchmarkAppraise tells what an appraisal costs beside the signatures and the
// hashes that nobody can do without: "ratio" is over the bare cost, in processor
// time, measured in turns with it.
func BenchmarkAppraise(b *testing.B) {
	host := fleetOfOne(b)
	values := []*Values{NewValues(host.values)}
	whole := host.input(forge.Options{Have: map[string]uint64{}})
	whole.Previous = nil
	incremental := host.input(forge.Options{})
	for i := range 3 {
		host.host.Measure(fmt.Sprintf("/usr/lib/x86_64-linux-gnu/libexample-%d.so.%d.2.3", i, i%7), fmt.Appendf(nil, "library %d", i))
	}
	grown := host.input(forge.Options{})
	quoted, quotedWhole := host.input(forge.Options{VMQuotes: true}), host.input(forge.Options{VMQuotes: true, Have: map[string]uint64{}})
	quotedWhole.Previous = nil
	for _, c := range []struct {
		name string
		in   Input
	}{{"full", whole}, {"incremental", incremental}, {"incremental-3-new", grown}, {"full-vm-quotes", quotedWhole}, {"incremental-vm-quotes", quoted}} {
		in := c.in
		in.Values = values
		b.Run(c.name, func(b *testing.B) { ratio(b, []Input{in}) })
	}
}

// ratio appraises one after the other, in turns with what each costs at least.
func ratio(b *testing.B, all []Input) {
	var least []func(testing.TB)
	for _, in := range all {
		least = append(least, bare(&bench{t: b}, in))
	}
	b.ReportAllocs()
	var ours, theirs time.Duration
	for i := 0; b.Loop(); i++ {
		t0 := processorTime(b)
		r, _ := Appraise(all[i%len(all)])
		t1 := processorTime(b)
		least[i%len(all)](b)
		theirs += processorTime(b) - t1
		ours += t1 - t0
		if r.Host.Tier != Affirming || len(r.VMs) != 5 {
			b.Fatalf("%v %v", r.Host.Tier, codesOf(r.Host))
		}
	}
	b.ReportMetric(float64(ours)/float64(theirs), "ratio")
	b.ReportMetric(float64(ours.Nanoseconds())/float64(b.N), "appraise-ns/op")
	b.ReportMetric(float64(theirs.Nanoseconds())/float64(b.N), "bare-ns/op")
}
