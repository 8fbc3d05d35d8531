package tss2

import (
	"bytes"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"virt-trust/internal/testkit"
)

func sample() *Key {
	return &Key{
		Type: Sealed, EmptyAuth: true, Description: "virt-trust list key", Parent: 0x81000001,
		Public: []byte{0, 3, 1, 2, 3}, Private: []byte{0, 1, 9},
		Policy: []Command{{0x17F, []byte{1, 2}}},
	}
}

// The bytes of a file that was written once can be read for ever.
const golden = `-----BEGIN TSS2 PRIVATE KEY-----
MEsGBmeBBQoBBaADAQH/oRIwEDAOoAQCAgF/oQYEBAECAwSkFQwTdmlydC10cnVz
dCBsaXN0IGtleQIFAIEAAAEEBQADAQIDBAMAAQk=
-----END TSS2 PRIVATE KEY-----
`

func TestRoundTrip(t *testing.T) {
	for _, k := range []*Key{
		sample(),
		{Type: Loadable, Parent: 0x40000001, RSAParent: true, Public: []byte{0, 1, 1}, Private: []byte{0, 1, 1}},
	} {
		b, err := k.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		got, err := Parse(b)
		if err != nil || !reflect.DeepEqual(got, k) {
			t.Fatalf("Parse gives %+v, %v, want %+v", got, err, k)
		}
	}
}

func TestGolden(t *testing.T) {
	k, err := Parse([]byte(golden))
	if err != nil {
		t.Fatal(err)
	}
	want := sample()
	want.Policy[0].Data = []byte{1, 2, 3, 4}
	if !reflect.DeepEqual(k, want) {
		t.Fatalf("got %+v", k)
	}
	if b, err := k.Marshal(); err != nil || string(b) != golden {
		t.Fatalf("Marshal gives %s, %v", b, err)
	}
}

// OpenSSL sees the structure that the draft describes.
func TestOpenSSL(t *testing.T) {
	testkit.Need(t, "openssl")
	b, err := sample().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key.pem")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("openssl", "asn1parse", "-in", path).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{"OBJECT            :2.23.133.10.1.5", "cont [ 0 ]", "BOOLEAN           :255", "UTF8STRING        :virt-trust list key", "INTEGER           :81000001", "OCTET STRING      [HEX DUMP]:0003010203"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

func TestRefused(t *testing.T) {
	for name, spoil := range map[string]func(*Key){
		"importable key":     func(k *Key) { k.Type = []int{2, 23, 133, 10, 1, 4} },
		"empty public":       func(k *Key) { k.Public = nil },
		"size of public":     func(k *Key) { k.Public = []byte{0, 9, 1} },
		"size of private":    func(k *Key) { k.Private = []byte{0, 1, 1, 1} },
		"large public":       func(k *Key) { k.Public = append([]byte{0x10, 0}, make([]byte, 0x1000)...) },
		"many commands":      func(k *Key) { k.Policy = make([]Command, maxPolicy+1) },
		"long command":       func(k *Key) { k.Policy[0].Data = make([]byte, maxPolicyBytes+1) },
		"long description":   func(k *Key) { k.Description = strings.Repeat("x", maxDescription+1) },
		"control characters": func(k *Key) { k.Description = "\x1b[2J" },
	} {
		k := sample()
		spoil(k)
		if b, err := k.Marshal(); err == nil {
			t.Errorf("%s: Marshal gives %s", name, b)
		}
	}
	whole, _ := sample().Marshal()
	block, _ := pem.Decode(whole)
	again := func(typ string, der []byte, headers map[string]string) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der, Headers: headers})
	}
	secretField := bytes.Replace(block.Bytes, []byte{0xA4, 0x15}, []byte{0xA2, 0x15}, 1) // [4] to [2]
	for name, b := range map[string][]byte{
		"nothing":       nil,
		"other PEM":     again("PRIVATE KEY", block.Bytes, nil),
		"headers":       again(PEMType, block.Bytes, map[string]string{"A": "b"}),
		"trailing DER":  again(PEMType, append(bytes.Clone(block.Bytes), 0), nil),
		"trailing text": append(bytes.Clone(whole), "x\n"...),
		"two keys":      append(bytes.Clone(whole), whole...),
		"cut":           again(PEMType, block.Bytes[:len(block.Bytes)-1], nil),
		"unknown field": again(PEMType, secretField, nil),
		"too long":      append(bytes.Clone(whole), make([]byte, MaxFile)...),
	} {
		if k, err := Parse(b); err == nil {
			t.Errorf("%s: Parse gives %+v", name, k)
		}
	}
}

func FuzzParse(f *testing.F) {
	b, _ := sample().Marshal()
	block, _ := pem.Decode(b)
	f.Add(block.Bytes)
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, der []byte) {
		Parse(der) // as a whole file
		k, err := Parse(pem.EncodeToMemory(&pem.Block{Type: PEMType, Bytes: der}))
		if err != nil {
			return
		}
		b, err := k.Marshal()
		if err != nil {
			t.Fatalf("what Parse took cannot be written: %v", err)
		}
		again, err := Parse(b)
		if err != nil || !reflect.DeepEqual(again, k) {
			t.Fatalf("read %+v, wrote it, read %+v, %v", k, again, err)
		}
	})
}
