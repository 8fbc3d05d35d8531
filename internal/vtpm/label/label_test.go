package label

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var stateKey = bytes.Repeat([]byte{0x5a}, StateKeySize)

func example() Label {
	name := func(b byte) []byte { return append([]byte{0, 0x0b}, bytes.Repeat([]byte{b}, 32)...) }
	return Label{
		ID:         [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16},
		VM:         "6fdb62d8-9d8a-4a52-92c1-fa7a3ec3e5a7",
		Instance:   "/var/lib/libvirt/swtpm/6fdb62d8-9d8a-4a52-92c1-fa7a3ec3e5a7/tpm2",
		Algorithm:  AlgorithmAES256,
		Generation: 42,
		Recipients: []Recipient{{name(1), bytes.Repeat([]byte{0xc1}, 256)}, {name(2), bytes.Repeat([]byte{0xc2}, 256)}},
	}
}

func seal(t testing.TB, l Label) []byte {
	t.Helper()
	p, err := l.Seal(stateKey)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestRoundTrip(t *testing.T) {
	l := example()
	got, err := Verify(seal(t, l), stateKey)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&l, got); diff != "" {
		t.Error(diff)
	}
	if c, ok := got.Recipient(l.Recipients[1].BindKeyName); !ok || c[0] != 0xc2 {
		t.Errorf("%v %x", ok, c)
	}
	if _, ok := got.Recipient([]byte("another host")); ok {
		t.Error("a recipient that is none")
	}
	l.Recipients[0], l.Recipients[1] = l.Recipients[1], l.Recipients[0]
	if !bytes.Equal(seal(t, l), seal(t, example())) {
		t.Error("the payload depends on the order of the recipients")
	}
}

// A payload of version 1 is read for ever.
func TestGolden(t *testing.T) {
	text, err := os.ReadFile("testdata/v1.hex")
	if err != nil {
		t.Fatal(err)
	}
	golden, err := hex.DecodeString(strings.Join(strings.Fields(string(text)), ""))
	if err != nil {
		t.Fatal(err)
	}
	got, err := Verify(golden, stateKey)
	if err != nil {
		t.Fatal(err)
	}
	want := example()
	if diff := cmp.Diff(&want, got); diff != "" {
		t.Error(diff)
	}
	if p := seal(t, want); !bytes.Equal(p, golden) {
		t.Errorf("now sealed as\n%x", p)
	}
}

// With libvirt's default state path and one host an image with clusters of 1 KiB
// still takes a label (qcow2's TestRoom: 440 bytes).
func TestUsualSize(t *testing.T) {
	l := example()
	l.Recipients = l.Recipients[:1]
	if n := len(seal(t, l)); n != 434 {
		t.Errorf("%d bytes", n)
	}
}

// Every bit counts, and so does the key.
func TestTampered(t *testing.T) {
	p := seal(t, example())
	for i := range len(p) * 8 {
		bad := bytes.Clone(p)
		bad[i/8] ^= 1 << (i % 8)
		if _, err := Verify(bad, stateKey); err == nil {
			t.Fatalf("bit %d flipped: not seen", i)
		}
	}
	for n := range len(p) {
		if _, err := Verify(p[:n], stateKey); err == nil {
			t.Fatalf("cut to %d bytes: not seen", n)
		}
	}
	other := bytes.Clone(stateKey)
	other[31] ^= 1
	if _, err := Verify(p, other); !errors.Is(err, ErrMAC) {
		t.Errorf("another key: %v", err)
	}
	if _, err := Verify(p, stateKey[:31]); err == nil || errors.Is(err, ErrMAC) {
		t.Errorf("a short key: %v", err)
	}
	changed := example()
	changed.Generation++
	bad := seal(t, changed)
	copy(bad[len(bad)-macSize:], p[len(p)-macSize:])
	if _, err := Verify(bad, stateKey); !errors.Is(err, ErrMAC) {
		t.Errorf("another generation under the old HMAC: %v", err)
	}
}

func TestUnknownVersion(t *testing.T) {
	p := seal(t, example())
	p[0] = 2
	var v *VersionError
	if _, err := UntrustedParse(p); !errors.As(err, &v) || v.Version != 2 {
		t.Error(err)
	}
}

func TestSealRefuses(t *testing.T) {
	many := make([]Recipient, MaxRecipients+1)
	for i := range many {
		many[i] = Recipient{[]byte{byte(i + 1)}, []byte{1}}
	}
	for name, change := range map[string]func(*Label){
		"UUID upper case":   func(l *Label) { l.VM = strings.ToUpper(l.VM) },
		"UUID without -":    func(l *Label) { l.VM = strings.ReplaceAll(l.VM, "-", "") },
		"UUID empty":        func(l *Label) { l.VM = "" },
		"algorithm":         func(l *Label) { l.Algorithm = "aes-128-cbc" },
		"no instance":       func(l *Label) { l.Instance = "" },
		"instance with NUL": func(l *Label) { l.Instance = "/a\x00b" },
		"instance too long": func(l *Label) { l.Instance = strings.Repeat("a", MaxInstance+1) },
		"no recipient":      func(l *Label) { l.Recipients = nil },
		"too many":          func(l *Label) { l.Recipients = many },
		"twice the same":    func(l *Label) { l.Recipients[1].BindKeyName = l.Recipients[0].BindKeyName },
		"no name":           func(l *Label) { l.Recipients[0].BindKeyName = nil },
		"no ciphertext":     func(l *Label) { l.Recipients[0].Ciphertext = nil },
		"long ciphertext":   func(l *Label) { l.Recipients[0].Ciphertext = make([]byte, MaxCiphertext+1) },
		"too long in all": func(l *Label) {
			l.Recipients = many[:MaxRecipients]
			for i := range l.Recipients {
				l.Recipients[i].Ciphertext = make([]byte, MaxCiphertext)
			}
		},
	} {
		l := example()
		change(&l)
		if _, err := l.Seal(stateKey); err == nil {
			t.Errorf("%s: sealed", name)
		}
	}
	if _, err := example().Seal(stateKey[1:]); err == nil {
		t.Error("a short key: sealed")
	}
}

func TestParseRefuses(t *testing.T) {
	l := example()
	good := seal(t, l)
	count := len(good) - macSize - 2*(1+34+2+256) - 1 // where the number of recipients stands
	if good[count] != 2 {
		t.Fatal("the test is wrong about the layout")
	}
	for name, change := range map[string]func([]byte) []byte{
		"algorithm":           func(p []byte) []byte { p[1] = 2; return p },
		"three recipients":    func(p []byte) []byte { p[count] = 3; return p },
		"one recipient":       func(p []byte) []byte { p[count] = 1; return p },
		"no recipient":        func(p []byte) []byte { p[count] = 0; return p },
		"255 recipients":      func(p []byte) []byte { p[count] = 255; return p },
		"out of order":        func(p []byte) []byte { p[count+4] = 9; return p },
		"instance of 65535":   func(p []byte) []byte { p[42], p[43] = 255, 255; return p },
		"instance of 0":       func(p []byte) []byte { p[42], p[43] = 0, 0; return p },
		"one byte more":       func(p []byte) []byte { return append(p, 0) },
		"nothing":             func([]byte) []byte { return nil },
		"an HMAC and no more": func(p []byte) []byte { return p[len(p)-macSize:] },
		"too long":            func(p []byte) []byte { return append(p, make([]byte, MaxPayload)...) },
	} {
		if _, err := UntrustedParse(change(bytes.Clone(good))); err == nil {
			t.Errorf("%s: parsed", name)
		}
	}
}

func FuzzParse(f *testing.F) {
	good := seal(f, example())
	f.Add(good)
	f.Add(good[:60])
	f.Add([]byte{1})
	one := example()
	one.Recipients = one.Recipients[:1]
	f.Add(seal(f, one))
	f.Fuzz(func(t *testing.T, p []byte) {
		l, err := UntrustedParse(p)
		if err != nil {
			return
		}
		// What parses is the one payload of that label, but for the HMAC.
		again, err := l.Seal(stateKey)
		if err != nil {
			t.Fatalf("parsed, but cannot be sealed: %v", err)
		}
		if body := len(p) - macSize; !bytes.Equal(p[:body], again[:len(again)-macSize]) {
			t.Fatalf("%x\nis sealed as\n%x", p, again)
		}
		if _, err := Verify(again, stateKey); err != nil {
			t.Fatal(err)
		}
	})
}
