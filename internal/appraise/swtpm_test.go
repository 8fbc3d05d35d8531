package appraise

import (
	"bytes"
	"crypto/sha256"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"virt-trust/internal/evidence/eventlog"
	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/evidence/ima"
	"virt-trust/internal/evidence/quote"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/hosttpm/tpmtest"
	"virt-trust/internal/launcher/launchlog"
)

// realHost is a host whose PCRs are in swtpm, and which that quotes.
type realHost struct {
	t    testing.TB
	tpm  transport.TPM
	key  tpm2.NamedHandle
	ak   *quote.Object
	host *forge.Host
	// what of the logs is in the PCRs
	ima, launch int
}

func (r *realHost) extend(pcr uint, digest []byte) {
	r.t.Helper()
	if _, err := (tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: digest}}},
	}).Execute(r.tpm); err != nil {
		r.t.Fatal(err)
	}
}

// catchUp measures what is new in the logs.
func (r *realHost) catchUp() {
	var e ima.Entry
	for r.ima < len(r.host.IMA) {
		n, err := e.Next(r.host.IMA[r.ima:])
		if err != nil || n == 0 {
			r.t.Fatal(n, err)
		}
		d := sha256.Sum256(e.Data)
		r.extend(ima.PCR, d[:])
		r.ima += n
	}
	lines, _ := launchlog.Split(r.host.Launch[r.launch:])
	for _, line := range lines {
		d := sha256.Sum256(line)
		r.extend(forge.LaunchPCR, d[:])
		r.launch += len(line) + 1
	}
}

func (r *realHost) input(b *bench) Input {
	in := b.input(forge.Options{
		Report: func(rep *report.Report) { rep.AK = r.ak.Name },
		Evidence: func(e *report.Evidence, _ *forge.Host) {
			q := report.QualifyingData(e.Nonce, e.Report)
			a, err := tpm2.Quote{
				SignHandle:     tpm2.AuthHandle{Handle: r.key.Handle, Name: r.key.Name, Auth: tpm2.PasswordAuth(nil)},
				QualifyingData: tpm2.TPM2BData{Buffer: q[:]}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
				PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0xff, 0xff, 0}}}},
			}.Execute(r.tpm)
			if err != nil {
				r.t.Fatal(err)
			}
			e.Quote = report.Quote{Attest: a.Quoted.Bytes(), Signature: tpm2.Marshal(a.Signature)}
		},
	})
	key, err := r.ak.AK()
	if err != nil {
		r.t.Fatal(err)
	}
	in.Node.AK, in.Node.AKName = key, r.ak.Name
	return in
}

// Evidence that a real TPM quoted: its PCRs got all that the logs say, through
// TPM2_PCR_Extend.
func TestRealTPM(t *testing.T) {
	b := newBench(t)
	r := &realHost{t: t, tpm: tpmtest.New(t).Open(), host: b.host}
	template, err := tpm2.Unmarshal[tpm2.TPMTPublic](b.host.TPM.AK())
	if err != nil {
		t.Fatal(err)
	}
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
	made, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}, InPublic: tpm2.New2B(*template)}.Execute(r.tpm)
	if err != nil {
		t.Fatal(err)
	}
	area, err := made.OutPublic.Contents()
	if err != nil {
		t.Fatal(err)
	}
	if r.ak, err = quote.ParsePublic(tpm2.Marshal(*area)); err != nil {
		t.Fatal(err)
	}
	r.key = tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name}
	log, err := eventlog.UntrustedParse(b.host.EventLog)
	if err != nil {
		t.Fatal(err)
	}
	if log, err = log.Bank("sha256"); err != nil {
		t.Fatal(err)
	}
	for _, e := range log.Events {
		if e.Type != eventlog.NoAction {
			r.extend(uint(e.PCR), e.Digests[0])
		}
	}
	// The launch log says which life of the PCRs it is of.
	b.host.Launch = bytes.Replace(b.host.Launch, []byte(`"reset_count":7`), []byte(`"reset_count":1`), 1)
	b.host.TPM.Resets = 1
	b.host.TPM.PCRs["sha256"][forge.LaunchPCR] = make([]byte, 32)
	lines, _ := launchlog.Split(b.host.Launch)
	for _, line := range lines {
		d := sha256.Sum256(line)
		b.host.TPM.Extend("sha256", forge.LaunchPCR, d[:])
	}
	r.catchUp()

	b.appraise(r.input(b))
	b.want(Affirming)
	b.wantVM("one", Affirming)
	b.host.Measure("/tmp/x", []byte("x"))
	r.catchUp()
	b.host.Tick(time.Minute)
	b.appraise(r.input(b))
	b.want(Warning, CodeIMAUnknown)

	// What the TPM has measured, and the log keeps back, is missed.
	b.host.Measure("/tmp/evil", []byte("evil"))
	r.catchUp()
	b.host.IMA = b.host.IMA[:b.state.IMA.At.Offset]
	in := r.input(b)
	b.appraise(in)
	b.want(Contraindicated, CodeIMAReplay)
	in.Nonce = b.nonce()
	b.appraise(in)
	b.want(Contraindicated, CodeNonce)
}
