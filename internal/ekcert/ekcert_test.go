package ekcert

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/sirupsen/logrus"

	"virt-trust/internal/vtpm/reason"
)

const uuid = "6f1c2d3e-0000-4a5b-8c6d-00000000000c"

// args are what swtpm_setup 0.7.1 was seen to run, for a key and a folder.
func args(kind, key, dir string, more ...string) []string {
	return append([]string{
		"--type", kind, "--ek", key, "--dir", dir, "--logfile", "/var/log/swtpm/libvirt/qemu/vm-swtpm.log", "--vmid", "a:b:" + uuid,
		"--tpm-spec-family", "2.0", "--tpm-spec-level", "0", "--tpm-spec-revision", "164", "--tpm-manufacturer", "id:00001014", "--tpm-model", "swtpm",
		"--tpm-version", "id:20191023", "--tpm2", "--configfile", "/etc/swtpm-localca.conf", "--optsfile", "/etc/swtpm-localca.options",
	}, more...)
}

func point(t testing.TB, c elliptic.Curve) (*ecdsa.PublicKey, string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b, err := k.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	n := (len(b) - 1) / 2
	return &k.PublicKey, fmt.Sprintf("x=%x,y=%x", b[1:1+n], b[1+n:])
}

var modulus = new(big.Int).SetBit(big.NewInt(12345), 2047, 1)

func TestParse(t *testing.T) {
	c, err := Parse(args("ek", hex.EncodeToString(modulus.Bytes()), "/tmp/x"))
	if err != nil {
		t.Fatal(err)
	}
	if k, ok := c.Key.(*rsa.PublicKey); !ok || k.N.Cmp(modulus) != 0 || k.E != 65537 {
		t.Errorf("key %v", c.Key)
	}
	if c.Key = nil; c != (Call{Type: "ek", Dir: "/tmp/x", VM: uuid, Manufacturer: "id:00001014", Version: "id:20191023", Family: "2.0", Revision: 164}) || c.File() != "/tmp/x/ek.cert" {
		t.Errorf("%+v", c)
	}
	k384, p384 := point(t, elliptic.P384())
	k256, p256 := point(t, elliptic.P256())
	for text, want := range map[string]*ecdsa.PublicKey{p384 + ",id=secp384r1": k384, p256: k256, p256 + ",id=secp256r1": k256} {
		if c, err := Parse(args("ek", text, "/tmp/x")); err != nil || !want.Equal(c.Key) {
			t.Errorf("%s: %v, %v", text, c.Key, err)
		}
	}
	if c, err := Parse(args("platform", "abcd", "/tmp/x")); err != nil || c.File() != "/tmp/x/platform.cert" {
		t.Errorf("%+v, %v", c, err)
	}
	for name, a := range map[string][]string{
		"nothing":      nil,
		"type":         args("root", "abcd", "/tmp/x"),
		"no TPM 2":     {"--type", "ek", "--ek", "abcd", "--dir", "/tmp/x"},
		"signing":      args("ek", "abcd", "/tmp/x", "--allow-signing"),
		"folder":       args("ek", "abcd", "tmp"),
		"new option":   args("ek", "abcd", "/tmp/x", "--pq"),
		"words":        args("ek", "abcd", "/tmp/x", "x"),
		"no key":       args("ek", "", "/tmp/x"),
		"zero":         args("ek", "00", "/tmp/x"),
		"sign":         args("ek", "-1", "/tmp/x"),
		"0x":           args("ek", "0x12", "/tmp/x"),
		"long":         args("ek", strings.Repeat("a", maxKey+1), "/tmp/x"),
		"curve":        args("ek", p256+",id=secp521r1", "/tmp/x"),
		"wrong curve":  args("ek", p384, "/tmp/x"),
		"off curve":    args("ek", "x=1,y=1", "/tmp/x"),
		"half a point": args("ek", "x=1", "/tmp/x"),
		"twice":        args("ek", p256+",x=1", "/tmp/x"),
		"more":         args("ek", p256+",z=1", "/tmp/x"),
	} {
		if c, err := Parse(a); err == nil {
			t.Errorf("%s: %+v", name, c)
		}
	}
}

func tool(t *testing.T, dir string, answer []byte, err error) (*Tool, *bytes.Buffer) {
	errs := &bytes.Buffer{}
	log := logrus.New()
	log.Out = io.Discard
	return &Tool{
		Args: args("ek", hex.EncodeToString(modulus.Bytes()), dir), Stderr: errs, Log: log,
		Certify: func(ctx context.Context, kind string, key []byte, options map[string]dbus.Variant) ([]byte, error) {
			k, e := x509.ParsePKIXPublicKey(key)
			if n, ok := k.(*rsa.PublicKey); e != nil || kind != "ek" || !ok || n.N.Cmp(modulus) != 0 || options["uuid"].Value() != uuid || options["revision"].Value() != int32(164) {
				t.Errorf("asked for %s over %x: %v", kind, key, options)
			}
			return answer, err
		},
	}, errs
}

func TestRun(t *testing.T) {
	k, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	run, errs := tool(t, dir, der, nil)
	if status := run.Run(); status != 0 || errs.Len() > 0 {
		t.Fatalf("%d: %s", status, errs)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "ek.cert")); err != nil || !bytes.Equal(b, der) {
		t.Errorf("%x, %v", b, err)
	}
	for want, run := range map[string]func() (*Tool, *bytes.Buffer){
		"virt-trust: refused: tpm-busy: slow; try again\n": func() (*Tool, *bytes.Buffer) {
			return tool(t, t.TempDir(), nil, reason.Refuse(reason.TPMBusy, "try again", "slow"))
		},
		"the vTPM's certificate could not be made: odd": func() (*Tool, *bytes.Buffer) { return tool(t, t.TempDir(), nil, errors.New("odd")) },
		"something else than a certificate":             func() (*Tool, *bytes.Buffer) { return tool(t, t.TempDir(), []byte("no"), nil) },
		"no such file or directory":                     func() (*Tool, *bytes.Buffer) { return tool(t, filepath.Join(dir, "none"), der, nil) },
	} {
		r, errs := run()
		if status := r.Run(); status != 1 || !strings.Contains(errs.String(), want) || strings.Count(errs.String(), "\n") != 1 {
			t.Errorf("%d: %q lacks %q", status, errs, want)
		}
		if _, err := os.Stat(filepath.Join(r.Args[5], "ek.cert")); err == nil {
			t.Error("a file is left")
		}
	}
}

func FuzzParse(f *testing.F) {
	_, p := point(f, elliptic.P384())
	f.Add(strings.Join(args("ek", hex.EncodeToString(modulus.Bytes()), "/tmp/x"), "\x00"))
	f.Add(strings.Join(args("ek", p+",id=secp384r1", "/tmp/x"), "\x00"))
	f.Add("--type\x00platform\x00--ek=x=1,y=2")
	f.Fuzz(func(t *testing.T, line string) {
		c, err := Parse(strings.Split(line, "\x00"))
		if err != nil {
			return
		}
		if !filepath.IsAbs(c.File()) || c.Key == nil {
			t.Errorf("%+v", c)
		}
		if _, ok := c.Key.(*ecdsa.PublicKey); !ok {
			return // how long an RSA key is, virt-trustd judges
		}
		if _, err := x509.MarshalPKIXPublicKey(c.Key); err != nil {
			t.Error(err)
		}
	})
}
