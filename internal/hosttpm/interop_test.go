package hosttpm

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/testkit"
)

// tpm2-tools load the bind key from its file as it is, find it to be the key
// that we say it is, and cannot use it without the host's policy.
func TestToolsLoadBindKey(t *testing.T) {
	t.Parallel()
	for _, p := range []string{"tpm2_load", "tpm2_readpublic", "tpm2_rsadecrypt", "tpm2_flushcontext", "openssl"} {
		testkit.Need(t, p)
	}
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	ct := wrapped(t, h)
	tmp := testkit.Folder(t)
	key := filepath.Join(dir, keysDir, "bind.pem")
	tool := func(name string, args ...string) (string, error) {
		cmd := exec.Command(name, args...)
		cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI=swtpm:path="+e.Socket)
		cmd.WaitDelay = time.Second
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := tool("openssl", "asn1parse", "-in", key); err != nil {
		t.Fatal(out, err)
	}
	ctx, pub, in := filepath.Join(tmp, "ctx"), filepath.Join(tmp, "pub"), filepath.Join(tmp, "in")
	if out, err := tool("tpm2_load", "-r", key, "-c", ctx); err != nil {
		t.Fatal("tpm2_load: ", out, err)
	}
	tool("tpm2_flushcontext", "-t")
	if out, err := tool("tpm2_readpublic", "-c", ctx, "-f", "pem", "-o", pub); err != nil {
		t.Fatal("tpm2_readpublic: ", out, err)
	}
	b, err := os.ReadFile(pub)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	got, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil || !h.BindKeyPublic().Equal(got) {
		t.Fatal("tpm2-tools see another key: ", err)
	}
	if err := os.WriteFile(in, ct, 0o600); err != nil {
		t.Fatal(err)
	}
	tool("tpm2_flushcontext", "-t")
	out, err := tool("tpm2_rsadecrypt", "-c", ctx, "-s", "null", "-l", "virt-trust/label/v1", in)
	if err == nil || bytes.Contains([]byte(out), bytes.Repeat([]byte{0x55}, 8)) {
		t.Fatal("the bind key decrypts without the host's policy: ", out)
	}
	if !strings.Contains(strings.ToLower(out), "0x12f") { // TPM_RC_AUTH_UNAVAILABLE
		t.Error("it was refused for another reason: ", out)
	}
}
