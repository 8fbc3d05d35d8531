package ek

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/statefile"
)

const stateName = "tpm2-00.permall"

// PublicKey is the EK alone, and Digest what a record has of it.
func (r Reader) PublicKey(ctx context.Context, name string, state, stateKey []byte) ([]byte, error) {
	id, err := r.Identity(ctx, name, state, stateKey)
	return id.EK, err
}

func (r Reader) Digest(ctx context.Context, name string, state, stateKey []byte) ([sha256.Size]byte, error) {
	der, err := r.PublicKey(ctx, name, state, stateKey)
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	return sha256.Sum256(der), nil
}

func reader(t testing.TB) Reader {
	t.Helper()
	r := Reader{Swtpm: testkit.Need(t, "swtpm"), Dir: testkit.Folder(t), UID: os.Getuid(), GID: os.Getgid()}
	if u, err := user.Lookup("tss"); err == nil && os.Geteuid() == 0 {
		r.UID, _ = strconv.Atoi(u.Uid)
		r.GID, _ = strconv.Atoi(u.Gid)
	}
	return r
}

// manufacture makes a vTPM, and gives its state.
func manufacture(t testing.TB) (state []byte) {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command(testkit.Need(t, "swtpm_setup"), "--tpm2", "--tpm-state", dir, "--overwrite", "--createek").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	state, err := os.ReadFile(filepath.Join(dir, stateName))
	if err != nil {
		t.Fatal(err)
	}
	return state
}

func TestDigest(t *testing.T) {
	r := reader(t)
	state := manufacture(t)
	plain, err := r.Digest(context.Background(), stateName, state, nil)
	if err != nil {
		t.Fatal(err)
	}
	key, iv := make([]byte, statefile.KeySize), make([]byte, statefile.KeySize)
	rand.Read(key)
	rand.Read(iv)
	encrypted, err := statefile.Encrypt(state, key, iv)
	if err != nil {
		t.Fatal(err)
	}
	got, err := r.Digest(context.Background(), stateName, encrypted, key)
	if err != nil || got != plain {
		t.Errorf("%x, %v; of the plain state %x", got, err, plain)
	}
	key[0] ^= 1
	if got, err := r.Digest(context.Background(), stateName, encrypted, key); err == nil {
		t.Errorf("with another key: %x", got)
	}
	if got, err := r.Digest(context.Background(), "../"+stateName, state, nil); err == nil {
		t.Errorf("with a path: %x", got)
	}
	if left, _ := os.ReadDir(r.Dir); len(left) > 0 {
		t.Errorf("%v stays", left)
	}
	other := manufacture(t)
	if got, err := r.Digest(context.Background(), stateName, other, nil); err != nil || got == plain {
		t.Errorf("another vTPM: %x, %v", got, err)
	}
}

// TestCertificate holds the digest against the certificate that swtpm's CA makes.
func TestCertificate(t *testing.T) {
	r := reader(t)
	dir := t.TempDir()
	out, err := exec.Command(testkit.Need(t, "swtpm_setup"), "--tpm2", "--tpm-state", dir, "--createek", "--create-ek-cert", "--write-ek-cert-files", dir).CombinedOutput()
	if err != nil {
		testkit.Missing(t, "swtpm's CA is not set up here: %v: %s", err, out)
	}
	certs, _ := filepath.Glob(filepath.Join(dir, "ek-rsa2048.crt"))
	if len(certs) != 1 {
		t.Fatal("no certificate was written")
	}
	spki, err := exec.Command("sh", "-c", `openssl x509 -inform der -in "$1" -noout -pubkey | openssl pkey -pubin -outform der | sha256sum`, "sh", certs[0]).Output()
	if err != nil {
		t.Fatal(err)
	}
	state, err := os.ReadFile(filepath.Join(dir, stateName))
	if err != nil {
		t.Fatal(err)
	}
	got, err := r.Digest(context.Background(), stateName, state, nil)
	if err != nil || !strings.HasPrefix(string(spki), hex.EncodeToString(got[:])) {
		t.Errorf("%x, %v; of the certificate %s", got, err, spki)
	}
}

// TestEvicted takes the key away from its handle, or puts another in its place,
// as a guest can: the digest stays the vTPM's own.
func TestEvicted(t *testing.T) {
	r := reader(t)
	with := manufacture(t)
	want, err := r.Digest(context.Background(), stateName, with, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, script := range map[string]string{
		"evicted":  `tpm2_evictcontrol -c 0x81010001`,
		"replaced": `tpm2_evictcontrol -c 0x81010001 && tpm2_createprimary -C o -G rsa2048 -c p.ctx && tpm2_evictcontrol -c p.ctx 0x81010001`,
		// the EK's own template, in another hierarchy
		"disguised": `tpm2_evictcontrol -c 0x81010001 && tpm2_createprimary -C o -G rsa2048:aes128cfb -g sha256 -a 'fixedtpm|fixedparent|sensitivedataorigin|adminwithpolicy|restricted|decrypt' -L policy -c p.ctx && tpm2_evictcontrol -c p.ctx 0x81010001`,
	} {
		testkit.Need(t, "tpm2_evictcontrol")
		dir := t.TempDir()
		policy, _ := hex.DecodeString("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
		os.WriteFile(filepath.Join(dir, "policy"), policy, 0o600)
		os.WriteFile(filepath.Join(dir, stateName), with, 0o600)
		c := exec.Command("sh", "-c", `swtpm socket --tpm2 --tpmstate dir=. --server type=unixio,path=s --ctrl type=unixio,path=s.ctrl --flags not-need-init,startup-clear &
			export TPM2TOOLS_TCTI=swtpm:path=s
			until [ -S s.ctrl ]; do sleep 0.02; done
			( `+script+` ); r=$?; kill %1 2>/dev/null || kill $!; wait; exit $r`)
		c.Dir = dir
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
		state, err := os.ReadFile(filepath.Join(dir, stateName))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := r.Digest(context.Background(), stateName, state, nil); err != nil || got != want {
			t.Errorf("%s: %x, %v; it was %x", name, got, err, want)
		}
	}
}
