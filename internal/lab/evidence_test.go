package lab

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"testing"

	"virt-trust/internal/evidence/eventlog"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/launcher/launchlog"
)

// measuredHost is a host whose firmware, boot loader and kernel have measured
// what they ran.
func measuredHost(t *testing.T, name string, more ...func(path func(string) string) error) *Host {
	t.Helper()
	l := realBoot(t, smallImage(t), []byte("initrd"))
	h := guarded(t, HostOptions{Name: name, Setup: func(path func(string) string) error {
		for name, text := range map[string]string{
			bootLogPath: string(l.Marshal()), bootPCRsPath: measured(t, l),
			"/etc/systemd/system/hostboot.service": bootService,
			"/etc/virt-trust/virt-trustd.toml":     AttestationConfig,
		} {
			if err := os.WriteFile(path(name), []byte(text), 0o644); err != nil {
				return err
			}
		}
		for _, f := range more {
			if err := f(path); err != nil {
				return err
			}
		}
		return os.Symlink("../hostboot.service", path("/etc/systemd/system/multi-user.target.wants/hostboot.service"))
	}})
	return h
}

// smallImage is the kernel that helpers gives.
func smallImage(t *testing.T) []byte {
	t.Helper()
	kernel, _, _, err := helpers()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(kernel)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// take has a host give evidence for a nonce, and reads it.
func take(t *testing.T, h *Host, nonce []byte) (*report.Evidence, *report.Report) {
	t.Helper()
	h.Must("virt-trust", "evidence", "--nonce", hex.EncodeToString(nonce), "-o", "/root/evidence.cbor")
	e, err := report.UntrustedParse(h.ReadFile("/root/evidence.cbor"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := report.UntrustedParseReport(e.Report)
	if err != nil {
		t.Fatal(err)
	}
	return e, r
}

// checkedByTools has tpm2_checkquote, which knows nothing of virt-trust, verify
// the quote.
func checkedByTools(t *testing.T, h *Host, e *report.Evidence) {
	t.Helper()
	ak := h.Must("busctl", "--json=short", "get-property", "org.virttrust1", "/org/virttrust1/host", "org.virttrust1.Host", "AKPublic")
	_, pem, _ := strings.Cut(ak, `"data":"`)
	pem, _, _ = strings.Cut(pem, `"`)
	h.WriteFile("/root/ak.pem", []byte(strings.ReplaceAll(pem, `\n`, "\n")), 0o600)
	h.WriteFile("/root/attest", e.Quote.Attest, 0o600)
	h.WriteFile("/root/signature", e.Quote.Signature, 0o600)
	check := func(q [32]byte) Result {
		return h.Run("tpm2_checkquote", "-u", "/root/ak.pem", "-m", "/root/attest", "-s", "/root/signature", "-g", "sha256", "-q", hex.EncodeToString(q[:]))
	}
	q := report.QualifyingData(e.Nonce, e.Report)
	if r := check(q); r.Code != 0 {
		t.Errorf("tpm2_checkquote: %s%s", r.Stdout, r.Stderr)
	}
	q[31] ^= 1
	if r := check(q); r.Code == 0 {
		t.Error("tpm2_checkquote takes another nonce")
	}
	// The values are those of the quote: TPMS_QUOTE_INFO ends with their digest.
	all := sha256.New()
	last := uint(0)
	for i, v := range e.PCRs[0].Values.All() {
		all.Write(v)
		last = i
	}
	if last != 15 || !bytes.HasSuffix(e.Quote.Attest, all.Sum(nil)) {
		t.Error("the values are not those that were quoted")
	}
}

// logIn gives a log of evidence.
func logIn(t *testing.T, e *report.Evidence, kind string) []byte {
	t.Helper()
	for _, l := range e.Logs {
		if l.Kind == kind {
			if l.Problem != "" {
				t.Errorf("log %s: %s", kind, l.Problem)
			}
			return l.Data
		}
	}
	t.Fatalf("there is no log %s", kind)
	return nil
}

// replayList gives what PCR 10 of the bank SHA-256 is after a measurement list.
func replayList(b []byte) []byte {
	pcr := make([]byte, 32)
	for len(b) > 28 {
		n := 28 + int(binary.LittleEndian.Uint32(b[24:]))
		size := int(binary.LittleEndian.Uint32(b[n:]))
		d := sha256.Sum256(b[n+4 : n+4+size])
		next := sha256.Sum256(append(pcr, d[:]...))
		pcr, b = next[:], b[n+4+size:]
	}
	return pcr
}

// guestAgrees wants the PCRs that the host has read to be those that the guest
// reads itself.
func guestAgrees(t *testing.T, g *Guest, r *report.Reading) {
	t.Helper()
	want := fmt.Sprintf("pcrs %x", sha256.Sum256([]byte(words(*r))))
	said := ""
	for range 5 { // see the guest's pcrs
		if said = g.Ask("pcrs"); said == want {
			return
		}
	}
	t.Errorf("the host reads %s, of which the digest is %s; the guest's own is %s", words(*r), want, said)
}

// TestEvidence: a host with a guarded VM gives evidence, which tools and replays
// find right; the VM's PCRs are those that the guest itself reads; and what
// happens to VMs is told.
func TestEvidence(t *testing.T) {
	t.Parallel()
	Require(t)
	h := measuredHost(t, "evidence")
	h.Measure(Executed("/usr/bin/qemu-system-x86_64", []byte("qemu")), Executed("/usr/bin/swtpm", []byte("swtpm")))
	g := h.NewVM(VM{Name: "proven", TPM: true, Disk: "qcow2"})
	other := h.NewVM(VM{Name: "other", TPM: true, Disk: "qcow2"})
	g.Start()
	other.Start()
	other.Destroy()

	nonce := sha256.Sum256([]byte("the Verifier's"))
	e, r := take(t, h, nonce[:])
	checkedByTools(t, h, e)
	values := e.PCRs[0].Values
	boot, err := eventlog.UntrustedParse(logIn(t, e, report.EventLog))
	if err != nil {
		t.Fatal(err)
	}
	replayed, err := boot.Replay("sha256")
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint(10) {
		if !bytes.Equal(values[i], replayed[i]) {
			t.Errorf("the event log does not lead to PCR %d", i)
		}
	}
	if !bytes.Equal(replayList(logIn(t, e, report.IMA)), values[10]) || bytes.Equal(values[10], make([]byte, 32)) {
		t.Error("the kernel's list does not lead to PCR 10")
	}
	launch, err := launchlog.Parse(logIn(t, e, report.LaunchLog))
	if err != nil || !bytes.Equal(launch.Values["sha256"], values[15]) {
		t.Errorf("the launch log does not lead to PCR 15: %v", err)
	}
	if r.Host.Name != "evidence" || r.Host.ListState != "readable" || r.Host.LaunchLog != "replays" || len(r.VMs) != 2 {
		t.Fatalf("the host is %+v with %d VMs", r.Host, len(r.VMs))
	}
	byName := map[string]report.VM{}
	for _, v := range r.VMs {
		byName[v.Name] = v
	}
	v := byName["proven"]
	if !v.Running || v.State != "running" || v.Verdict != "allow" || len(v.EK) != sha256.Size {
		t.Errorf("the VM that runs is %+v", v)
	}
	// The certificate in the report is the one in the vTPM, and over the key in the
	// report.
	cert, err := x509.ParseCertificate(v.EKCertificate)
	if err != nil {
		t.Fatal(err)
	}
	if d := sha256.Sum256(cert.RawSubjectPublicKeyInfo); !bytes.Equal(d[:], v.EK) {
		t.Errorf("its endorsement key is %x, and that of its certificate %x", v.EK, d)
	}
	if own, want := g.Ask("ekcert"), fmt.Sprintf("ekcert %x ", sha256.Sum256(v.EKCertificate)); !strings.HasPrefix(own, want) {
		t.Errorf("its endorsement key's certificate is %s, the guest says %s", want, own)
	}
	if byName["other"].Running || byName["other"].State != "stored" || byName["other"].PCRs != nil {
		t.Errorf("the VM that was stopped is %+v", byName["other"])
	}
	if v.PCRs == nil {
		t.Fatalf("the PCRs of the vTPM were not read: %s", v.Problem)
	}
	guestAgrees(t, g, v.PCRs)

	// A guest that measures something, a VM that goes, and a virt-trustd that is
	// started anew.
	g.Ask("extend 12")
	other.Undefine()
	waitFor(t, "the record is deleted", func() bool { return !known(h, other) })
	h.Must("systemctl", "restart", "virt-trustd")
	h.TakenUp()
	h.Measure(Executed("/usr/bin/new", nil))
	e, later := take(t, h, nonce[:16])
	checkedByTools(t, h, e)
	if !bytes.Equal(replayList(logIn(t, e, report.IMA)), e.PCRs[0].Values[10]) {
		t.Error("the kernel's list, longer now, does not lead to PCR 10")
	}
	if len(later.VMs) != 1 || len(later.Deleted) != 1 || later.Deleted[0].UUID != byName["other"].UUID {
		t.Errorf("%d VMs, deleted %+v", len(later.VMs), later.Deleted)
	}
	if p := later.VMs[0].PCRs; p == nil || bytes.Equal(p.Banks[0].Values[12], v.PCRs.Banks[0].Values[12]) || !bytes.Equal(p.Banks[0].Values[7], v.PCRs.Banks[0].Values[7]) {
		t.Errorf("the vTPM is the same after PCR 12 was extended: %s", later.VMs[0].Problem)
	}

	guestAgrees(t, g, later.VMs[0].PCRs)

	// Who is neither root nor the agent gets none.
	if r := h.RunAs("nobody", "virt-trust", "evidence"); r.Code == 0 || len(r.Stdout) > 0 || !strings.Contains(r.Stderr, "evidence is for root") {
		t.Errorf("nobody gets evidence: exit %d, %s", r.Code, r.Stderr)
	}
	g.Destroy()
}
