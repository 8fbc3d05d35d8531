package cakey

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/ca"
)

func spki(t *testing.T) []byte {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "key.pem")
	if _, err := Open(cert, key); err == nil || !strings.Contains(err.Error(), "init") {
		t.Errorf("%v", err)
	}
	if err := Init(cert, key, "test", time.Now()); err != nil {
		t.Fatal(err)
	}
	for file, mode := range map[string]os.FileMode{cert: 0o644, key: 0o600} {
		if st, err := os.Stat(file); err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", file, st.Mode(), err)
		}
	}
	a, err := Open(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	// A copy of both is the same CA: it has nothing else to remember.
	again, err := Open(cert, key)
	if err != nil || again.Pin() != a.Pin() {
		t.Error(err)
	}
	if _, err := a.Server([]string{"x"}, spki(t), time.Now()); err != nil {
		t.Error(err)
	}
	was, _ := os.ReadFile(key)
	if err := Init(cert, key, "test", time.Now()); !errors.Is(err, os.ErrExist) {
		t.Errorf("a CA was overwritten: %v", err)
	}
	if now, _ := os.ReadFile(key); !bytes.Equal(was, now) {
		t.Error("the key changed")
	}
	// A key without its certificate is no reason to make another.
	if err := Init(filepath.Join(dir, "other.pem"), key, "test", time.Now()); !errors.Is(err, os.ErrExist) {
		t.Errorf("%v", err)
	}

	other := t.TempDir()
	if err := Init(filepath.Join(other, "ca.pem"), filepath.Join(other, "key.pem"), "test", time.Now()); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(dir, "open.pem")
	garbage := filepath.Join(dir, "garbage.pem")
	long := filepath.Join(dir, "long.pem")
	for name, b := range map[string][]byte{open: was, garbage: []byte("x"), long: append(was, make([]byte, maxFile)...)} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(open, 0o640); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string][2]string{
		"another's key":   {cert, filepath.Join(other, "key.pem")},
		"open to others":  {cert, open},
		"no key":          {cert, garbage},
		"a long key":      {cert, long},
		"a folder":        {cert, dir},
		"nothing":         {cert, filepath.Join(dir, "none")},
		"no certificate":  {garbage, key},
		"key for it":      {key, key},
		"certificate key": {cert, cert},
	} {
		if _, err := Open(c[0], c[1]); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
}

// A signer that is away, or speaks nonsense, is an error, and never a certificate.
func TestSignerThatIsNone(t *testing.T) {
	dir := testkit.Folder(t)
	cert := filepath.Join(dir, "ca.pem")
	if err := Init(cert, filepath.Join(dir, "key.pem"), "test", time.Now()); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	a, err := Open(cert, sock)
	if err != nil {
		t.Fatal(err)
	}
	message := func(status byte, b []byte) []byte {
		var out bytes.Buffer
		out.WriteByte(status)
		_ = WriteMessage(&out, b)
		return out.Bytes()
	}
	answers := map[string][]byte{
		"nothing": {}, "a status": {Signed}, "a wrong signature": message(Signed, make([]byte, 70)), "an empty one": message(Signed, nil),
		"a long one": message(Signed, make([]byte, maxAnswer+1)), "a refusal": message(Refused, []byte("no\n")), "a failure": message(Failed, []byte("no")), "half": message(Signed, make([]byte, 70))[:20],
	}
	for name, b := range answers {
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			_, _ = ReadMessage(c, ca.MaxCRL)
			_, _ = c.Write(b)
		}()
		if c, err := a.Server([]string{"x"}, spki(t), time.Now()); err == nil {
			t.Errorf("%s: %v", name, c.Subject)
		}
	}
	l.Close()
	if _, err := a.Server([]string{"x"}, spki(t), time.Now()); err == nil || !strings.Contains(err.Error(), "virt-trust-signer") {
		t.Errorf("%v", err)
	}
}

func FuzzReadMessage(f *testing.F) {
	var b bytes.Buffer
	_ = WriteMessage(&b, []byte("message"))
	f.Add(b.Bytes())
	f.Add([]byte{255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ReadMessage(bytes.NewReader(b), 100)
		if err == nil && (len(m) == 0 || len(m) > 100) || err != nil && errors.Is(err, io.EOF) && len(b) > 3 {
			t.Errorf("%d bytes, %v", len(m), err)
		}
	})
}
