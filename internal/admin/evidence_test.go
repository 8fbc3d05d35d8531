package admin

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/vtpm/reason"
)

// someEvidence is evidence of a VM with a hostile name.
func someEvidence(t *testing.T, nonce []byte) []byte {
	t.Helper()
	digest := sha256.Sum256(nil)
	r := &report.Report{
		Version: report.Version, AK: []byte{0, 11, 1}, BootID: "boot", Time: 1700000000000000,
		Host: report.Host{Name: "host", Software: "1", Mode: "enforce", ListState: "readable", ListGeneration: 4, ListCounter: 9, LaunchPCR: 15, LaunchLog: "replays", Kernel: "6.1"},
		VMs: []report.VM{{
			UUID: [16]byte{1}, Name: "a\x1b[2Jb", State: "running", Running: true, Generation: 3, EK: digest[:], Verdict: "allow",
			PCRs: &report.Reading{Reader: "swtpm-memory", Time: 1, Banks: []report.Bank{{Algorithm: "sha256", Values: report.Values{7: digest[:]}}}},
		}},
		Deleted: []report.Deleted{{UUID: [16]byte{2}, Time: 1700000000000000, Why: "the VM was undefined"}},
	}
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	e := &report.Evidence{
		Version: report.Version, Nonce: nonce, Report: b, Quote: report.Quote{Attest: []byte{0xFF}, Signature: []byte{0x18}},
		PCRs: []report.Bank{{Algorithm: "sha256", Values: report.Values{0: digest[:]}}},
		Logs: []report.Log{{Kind: report.IMA, Problem: "the kernel keeps none"}, {Kind: report.LaunchLog, Data: []byte("x")}},
	}
	if b, err = e.Encode(); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestEvidence(t *testing.T) {
	var nonces [][]byte
	var refuse *reason.Refusal
	loose := false
	f := newFake()
	f.attestation = map[string]any{
		"Evidence": func(nonce []byte, o options) (dbus.UnixFD, *dbus.Error) {
			if refuse != nil {
				return -1, dbus.NewError(bus.ErrorRefused, []any{refuse.Error()})
			}
			nonces = append(nonces, nonce)
			b := someEvidence(t, nonce)
			if loose { // a file that somebody may change
				file, err := os.CreateTemp(t.TempDir(), "")
				if err != nil {
					return -1, dbus.MakeFailedError(err)
				}
				file.Write(b)
				return dbus.UnixFD(file.Fd()), nil
			}
			file, err := bus.Sealed("evidence", b)
			if err != nil {
				return -1, dbus.MakeFailedError(err)
			}
			return dbus.UnixFD(file.Fd()), nil
		},
	}
	f.serve(t, startBus(t))
	nonce := strings.Repeat("5a", 32)
	stdout, stderr, code := run(t, "evidence", "--nonce", nonce)
	if want := someEvidence(t, bytes.Repeat([]byte{0x5a}, 32)); code != 0 || stderr != "" || stdout != string(want) {
		t.Fatalf("exit %d, %d bytes, %s", code, len(stdout), stderr)
	}
	out := filepath.Join(t.TempDir(), "e")
	if stdout, stderr, code := run(t, "evidence", "-o", out); code != 0 || stdout != "" || stderr != "" {
		t.Fatalf("exit %d, %q, %s", code, stdout, stderr)
	}
	run(t, "evidence", "-o", out)
	if n := len(nonces); n != 3 || bytes.Equal(nonces[1], nonces[2]) || len(nonces[1]) != 32 {
		t.Errorf("nonces %x", nonces)
	}
	if b, err := os.ReadFile(out); err != nil || !bytes.Equal(b, someEvidence(t, nonces[2])) {
		t.Errorf("%d bytes in the file, %v", len(b), err)
	}
	if all, _ := os.ReadDir(filepath.Dir(out)); len(all) != 1 {
		t.Errorf("left behind: %v", all)
	}
	stdout, _, code = run(t, "evidence", "--json", "--nonce", nonce)
	e := decode[Evidence](t, stdout)
	if code != 0 || strings.Contains(stdout, "\x1b") || e.Nonce != nonce || e.Host.LaunchLog != "replays" || e.PCRs[0].Values[0] == "" || e.Logs[0].Problem == "" || e.Logs[1].Bytes != 1 {
		t.Errorf("exit %d: %s", code, stdout)
	}
	if vm := e.VMs[0]; vm.UUID != "01000000-0000-0000-0000-000000000000" || vm.PCRs[0].Values[7] != hex.EncodeToString(sha256.New().Sum(nil)) || vm.Reader != "swtpm-memory" || e.Deleted[0].Why != "the VM was undefined" {
		t.Errorf("%+v, %+v", vm, e.Deleted)
	}

	for _, bad := range []string{"zz", "00", strings.Repeat("00", 65)} {
		if _, stderr, code := run(t, "evidence", "--nonce", bad); code != ExitUsage || !strings.Contains(stderr, "--nonce") {
			t.Errorf("nonce %q: exit %d, %s", bad, code, stderr)
		}
	}
	if _, stderr, code := run(t, "evidence", "-o", filepath.Join(out, "x")); code != ExitFailed || stderr == "" {
		t.Errorf("a file that cannot be: exit %d, %s", code, stderr)
	}
	loose = true
	if _, stderr, code := run(t, "evidence"); code != ExitFailed || !strings.Contains(stderr, "sealed") {
		t.Errorf("a file that is not sealed: exit %d, %s", code, stderr)
	}
	refuse = reason.Refuse(reason.TPMFailed, "look", "there is no TPM")
	if _, stderr, code := run(t, "evidence"); code != ExitRefused || !strings.Contains(stderr, "tpm-failed") {
		t.Errorf("refused: exit %d, %s", code, stderr)
	}
}
