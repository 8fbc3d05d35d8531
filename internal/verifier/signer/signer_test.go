package signer

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/hosttpm/tpmtest"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/cakey"
)

// TestMain also plays another process, which asks with a request of one byte and
// prints the answer's status.
func TestMain(m *testing.M) {
	sock := os.Getenv("ASK_SIGNER")
	if sock == "" {
		os.Exit(m.Run())
	}
	c, err := net.Dial("unix", sock)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	_ = cakey.WriteMessage(c, []byte{1})
	status := make([]byte, 1)
	if _, err := io.ReadFull(c, status); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Print(status[0])
}

func options(t *testing.T, device string, words io.Writer) Options {
	dir := t.TempDir()
	l := logrus.New()
	l.Out = words
	return Options{Certificate: filepath.Join(dir, "ca.pem"), Key: filepath.Join(dir, "key.pem"), Device: device, UID: uint32(os.Getuid()), Log: logrus.NewEntry(l)}
}

// serve runs a signer and gives its socket.
func serve(t *testing.T, o Options) string {
	t.Helper()
	s := testkit.Must[*Server](t)(Open(o))
	dir := testkit.Folder(t)
	sock := filepath.Join(dir, "signer")
	l := testkit.Must[net.Listener](t)(net.Listen("unix", sock))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return sock
}

func spki(t *testing.T) []byte {
	k := testkit.Must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	return testkit.Must[[]byte](t)(x509.MarshalPKIXPublicKey(k.Public()))
}

var node = ca.Identity{
	Node: "11111111-1111-4111-8111-111111111111", Name: "host-a", EK: make([]byte, 32), AK: append([]byte{0, 11}, make([]byte, 32)...), Bind: append([]byte{0, 11}, make([]byte, 32)...),
}

// A CA whose key is in a TPM: made, used through the socket, and of no use to
// another TPM.
func TestSigner(t *testing.T) {
	device := tpmtest.New(t).Socket
	var words bytes.Buffer
	o := options(t, device, &words)
	if err := Init(o, "test CA", time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := Init(o, "test CA", time.Now()); !errors.Is(err, os.ErrExist) {
		t.Errorf("a CA was overwritten: %v", err)
	}
	key := testkit.Must[[]byte](t)(os.ReadFile(o.Key))
	if st := testkit.Must[os.FileInfo](t)(os.Stat(o.Key)); st.Mode().Perm() != 0o600 || !bytes.Contains(key, []byte("TSS2 PRIVATE KEY")) {
		t.Errorf("%s %s", st.Mode(), key)
	}
	sock := serve(t, o)
	a := testkit.Must[*ca.Authority](t)(cakey.Open(o.Certificate, sock))
	cert := testkit.Must[*x509.Certificate](t)(a.Node(node, spki(t), time.Now()))
	if err := cert.CheckSignatureFrom(a.Certificate()); err != nil {
		t.Error(err)
	}
	list := testkit.Must[*x509.RevocationList](t)(x509.ParseRevocationList(testkit.Must[[]byte](t)(a.CRL(7, []x509.RevocationListEntry{{SerialNumber: cert.SerialNumber, RevocationTime: time.Now()}}, time.Now()))))
	if err := list.CheckSignatureFrom(a.Certificate()); err != nil || !strings.Contains(words.String(), "revocation list 7, with 1 ") {
		t.Errorf("%v %s", err, words.String())
	}
	if !strings.Contains(words.String(), ca.Serial(cert)) || strings.Contains(words.String(), "PRIVATE") {
		t.Errorf("the journal: %s", words.String())
	}
	if out, err := exec.Command("openssl", "verify", "-CAfile", o.Certificate, "-partial_chain", o.Certificate).CombinedOutput(); err != nil {
		t.Errorf("openssl: %s", out)
	}

	other := tpmtest.New(t).Socket
	stolen := o
	stolen.Device = other
	b := testkit.Must[*ca.Authority](t)(cakey.Open(o.Certificate, serve(t, stolen)))
	if c, err := b.Node(node, spki(t), time.Now()); err == nil {
		t.Errorf("another TPM signs: %v", c)
	}
}

// A Verifier that was taken over asks for what no CA gives.
func TestSignerRefuses(t *testing.T) {
	device := tpmtest.New(t).Socket
	o := options(t, device, io.Discard)
	if err := Init(o, "test CA", time.Now()); err != nil {
		t.Fatal(err)
	}
	sock := serve(t, o)
	s := &cakey.Signer{Socket: sock}
	root := testkit.Must[*x509.Certificate](t)(cakey.ReadCertificate(o.Certificate))
	for name, tbs := range map[string][]byte{"garbage": []byte("x"), "a digest": make([]byte, 32), "another CA": root.RawTBSCertificate} {
		if sig, err := s.SignMessage(nil, tbs, nil); err == nil || !strings.Contains(err.Error(), "refuses") {
			t.Errorf("%s: %x, %v", name, sig, err)
		}
	}
	if _, err := s.Sign(nil, make([]byte, 32), nil); err == nil {
		t.Error("a digest was signed")
	}
	if _, err := s.SignMessage(nil, make([]byte, ca.MaxCRL+1), nil); err == nil {
		t.Error("too long")
	}
	// Half a request, and none, keep nobody from the next.
	for range maxConnections - 1 {
		c := testkit.Must[net.Conn](t)(net.Dial("unix", sock))
		defer c.Close()
		c.Write([]byte{0, 0})
	}
	a := testkit.Must[*ca.Authority](t)(cakey.Open(o.Certificate, sock))
	if _, err := a.Node(node, spki(t), time.Now()); err != nil {
		t.Error(err)
	}
}

// Nobody but the Verifier's user is answered.
func TestSignerPeers(t *testing.T) {
	testkit.Root(t) // another user has to ask
	k := testkit.Must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	cert := testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(testkit.Must[[]byte](t)(ca.Root(k, rand.Reader, "x", time.Now()))))
	var words bytes.Buffer
	o := options(t, "", &words)
	o.UID = 1
	s := newServer(cert, k, o)
	dir := testkit.Folder(t)
	sock := filepath.Join(dir, "s")
	l := testkit.Must[net.Listener](t)(net.Listen("unix", sock))
	os.Chmod(sock, 0o777)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	self := filepath.Join(dir, "self") // where every user can run it
	if err := os.WriteFile(self, testkit.Must[[]byte](t)(os.ReadFile(testkit.Must[string](t)(os.Executable()))), 0o755); err != nil {
		t.Fatal(err)
	}
	ask := func(uid uint32) []byte {
		c := exec.Command(self)
		c.Env = []string{"ASK_SIGNER=" + sock}
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: 65534}}
		out, err := c.CombinedOutput()
		t.Logf("user %d: %s, %v", uid, out, err)
		return bytes.TrimSpace(out)
	}
	if got := ask(1); string(got) != "1" {
		t.Errorf("the Verifier: %s", got)
	}
	if got := ask(65534); string(got) == "1" || string(got) == "0" {
		t.Errorf("somebody else: %s", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if !strings.Contains(words.String(), "someone else") {
		t.Errorf("the journal: %s", words.String())
	}
}

func TestLoadRefuses(t *testing.T) {
	device := tpmtest.New(t).Socket
	file := testkit.Must[[]byte](t)(Make(device))
	if _, err := Load(device, file); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{"nothing": nil, "garbage": []byte("x"), "cut": file[:len(file)-40]} {
		if _, err := Load(device, bad); err == nil {
			t.Errorf("%s: loaded", name)
		}
	}
	if _, err := Make(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a key without a TPM")
	}
}

// A CA in a TPM from before there were revocation lists signs them after init.
func TestInitRenews(t *testing.T) {
	o := options(t, tpmtest.New(t).Socket, io.Discard)
	if err := Init(o, "test CA", time.Now()); err != nil {
		t.Fatal(err)
	}
	a := testkit.Must[*ca.Authority](t)(authority(o))
	old := *a.Certificate()
	old.KeyUsage = x509.KeyUsageCertSign
	der := testkit.Must[[]byte](t)(x509.CreateCertificate(rand.Reader, &old, &old, old.PublicKey, a.Key()))
	if err := os.WriteFile(o.Certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := Init(o, "test CA", time.Now()); err != nil {
		t.Fatal(err)
	}
	b := testkit.Must[*ca.Authority](t)(cakey.Open(o.Certificate, serve(t, o)))
	if !b.Lists() || b.Pin() != a.Pin() {
		t.Error("it is another CA, or signs no lists")
	}
	testkit.Must[[]byte](t)(b.CRL(1, nil, time.Now()))
}
