package admin

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/ekcert"
)

// certified gives a certifier's chain in PEM, and certificates for web's vTPM.
func certified(t *testing.T) (chain string, ek, ak []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	own, err := ekcert.SelfSigned(key, [ekcert.SerialSize]byte{1}, now)
	if err != nil {
		t.Fatal(err)
	}
	vtpm, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	r := ekcert.Request{
		Kind: ekcert.EK, Key: vtpm.Public(), VM: web, Origin: ekcert.Manufactured, Serial: [ekcert.SerialSize]byte{2}, Now: now,
		TPM: ekcert.TPM{Manufacturer: "id:00001014", Version: "id:20191023", Family: "2.0", Revision: 164},
	}
	if ek, err = ekcert.Issue(r, key); err != nil {
		t.Fatal(err)
	}
	r.Kind, r.Key = ekcert.AK, key.Public()
	if ak, err = ekcert.Issue(r, key); err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: own})), ek, ak
}

func TestEK(t *testing.T) {
	chain, ek, ak := certified(t)
	f := serve(t, func(f *fake) {
		f.host["CertifierChain"] = chain
		f.vms[0]["EKCertificate"], f.vms[0]["AKCertificate"], f.vms[0]["EKDigest"] = ek, ak, "ab"
		f.vms[0]["EKSharedWith"], f.vms[1]["EKSharedWith"] = []string{bad}, []string{web}
		f.vms[1]["EKCertificate"] = ek
	})
	stdout, stderr, code := run(t, "ek", "web")
	if code != ExitDone || stderr != "" || !strings.Contains(stdout, "Verified:     yes") || !strings.Contains(stdout, "manufactured") || !strings.Contains(stdout, "Shared with:  "+bad) {
		t.Errorf("exit %d, %q:\n%s", code, stderr, stdout)
	}
	js, _, _ := run(t, "ek", "web", "--json")
	if e := decode[EK](t, js); e.UUID != web || e.Origin != "manufactured" || !e.Verified || e.Chain != chain || !strings.Contains(e.Certificate, "BEGIN CERTIFICATE") {
		t.Errorf("%+v", e)
	}
	if stdout, _, code = run(t, "ek", "web", "--der"); code != ExitDone || stdout != string(ek) {
		t.Errorf("--der: exit %d, %d bytes", code, len(stdout))
	}
	// What is printed is what openssl takes.
	openssl := testkit.Need(t, "openssl")
	for _, args := range [][]string{{"ek", "web", "--pem"}, {"ek", "web", "--ak", "--pem"}} {
		dir := t.TempDir()
		leaf, _, _ := run(t, args...)
		above, _, _ := run(t, "ek", "--chain")
		os.WriteFile(filepath.Join(dir, "leaf"), []byte(leaf), 0o600)
		os.WriteFile(filepath.Join(dir, "chain"), []byte(above), 0o600)
		if out, err := exec.Command(openssl, "verify", "-CAfile", filepath.Join(dir, "chain"), filepath.Join(dir, "leaf")).CombinedOutput(); err != nil {
			t.Errorf("%v: %v: %s", args, err, out)
		}
	}
	if stdout, _, _ = run(t, "ek", "web", "--pem", "--chain"); strings.Count(stdout, "BEGIN CERTIFICATE") != 2 {
		t.Errorf("--pem --chain: %s", stdout)
	}
	// Another VM's certificate is not taken for one's own.
	if _, stderr, code = run(t, "ek", bad); code != ExitFailed || !strings.Contains(stderr, "is that of the VM "+web) {
		t.Errorf("exit %d, %q", code, stderr)
	}
	if _, stderr, code = run(t, "ek", "web", "--issue"); code != ExitDone || !strings.Contains(stderr, "issueekcertificate done") {
		t.Errorf("--issue: exit %d, %q", code, stderr)
	}
	if stdout, _, _ = run(t, "list"); !strings.Contains(stdout, "copies of one another") || !strings.Contains(stdout, "web ("+web+") and "+bad) {
		t.Errorf("list:\n%s", stdout)
	}
	if stdout, _, _ = run(t, "show", "web"); !strings.Contains(stdout, "EK certificate:  manufactured") || !strings.Contains(stdout, "Same EK as:      "+bad) {
		t.Errorf("show:\n%s", stdout)
	}

	// By another host's certifier, or one that has gone.
	other, _, _ := certified(t)
	f.host["CertifierChain"] = other
	if stdout, _, code = run(t, "ek", "web"); code != ExitDone || !strings.Contains(stdout, "Verified:     no") {
		t.Errorf("exit %d:\n%s", code, stdout)
	}
	f.host["CertifierChain"] = "\x1b[31m" + chain
	if _, stderr, code = run(t, "ek", "web"); code != ExitFailed || strings.Contains(stderr, "\x1b") {
		t.Errorf("exit %d, %q", code, stderr)
	}
	f.host["CertifierChain"] = ""
	if _, stderr, code = run(t, "ek", "--chain"); code != ExitFailed || !strings.Contains(stderr, "no certificate yet") {
		t.Errorf("exit %d, %q", code, stderr)
	}
	f.vms[0]["EKCertificate"], f.vms[0]["AKCertificate"] = []byte{}, []byte("rubbish")
	if _, stderr, code = run(t, "ek", "web"); code != ExitFailed || !strings.Contains(stderr, "virt-trust ek web --issue") {
		t.Errorf("exit %d, %q", code, stderr)
	}
	if _, _, code = run(t, "ek", "web", "--ak"); code != ExitFailed {
		t.Errorf("rubbish: exit %d", code)
	}
	for _, args := range [][]string{{"ek"}, {"ek", "a", "b"}, {"ek", "--chain", "--der"}, {"ek", "web", "--pem", "--der"}, {"ek", "web", "--ak", "--issue"}} {
		if _, _, code := run(t, args...); code != ExitUsage {
			t.Errorf("%v: exit %d", args, code)
		}
	}
	if _, err := x509.ParseCertificate(bytes.Clone(ek)); err != nil {
		t.Fatal(err)
	}
}
