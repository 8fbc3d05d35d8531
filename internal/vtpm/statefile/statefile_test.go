package statefile

import (
	"bytes"
	"errors"
	"testing"
)

var (
	key   = bytes.Repeat([]byte{7}, KeySize)
	iv    = bytes.Repeat([]byte{9}, KeySize)
	plain = frame(0, part{tagData, []byte("permanent state of a TPM")})
)

func TestRoundTrip(t *testing.T) {
	for _, n := range []int{1, 31, 32, 33, 6000} {
		p := frame(0, part{tagData, bytes.Repeat([]byte{3}, n)})
		e, err := Encrypt(p, key, iv)
		if err != nil {
			t.Fatal(err)
		}
		if Classify(e) != Encrypted || Classify(p) != Plain {
			t.Fatalf("%d bytes: kinds %s, %s", n, Classify(e), Classify(p))
		}
		if bytes.Contains(e, bytes.Repeat([]byte{3}, min(n, 16))) && n >= 16 {
			t.Fatal("plain text in the encrypted file")
		}
		d, err := Decrypt(e, key)
		if err != nil || !bytes.Equal(d, p) {
			t.Fatalf("%d bytes: %v", n, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	e, err := Encrypt(plain, key, iv)
	if err != nil {
		t.Fatal(err)
	}
	other := bytes.Repeat([]byte{8}, KeySize)
	if err := Verify(e, other); !errors.Is(err, ErrMAC) {
		t.Errorf("other key: %v", err)
	}
	if err := Verify(plain, key); !errors.Is(err, ErrKind) {
		t.Errorf("plain state: %v", err)
	}
	if _, err := Encrypt(e, key, iv); !errors.Is(err, ErrKind) {
		t.Errorf("encrypting twice: %v", err)
	}
	for i := range e {
		bad := bytes.Clone(e)
		bad[i] ^= 0x10
		if i == 1 { // the least version that can read it is not authenticated
			continue
		}
		if Verify(bad, key) == nil {
			t.Errorf("flipped byte %d was not seen", i)
		}
	}
	for n := range e {
		if Verify(e[:n], key) == nil || Classify(e[:n]) != Damaged {
			t.Errorf("truncated to %d bytes was not seen", n)
		}
	}
	if Classify(make([]byte, 6000)) != Damaged || Classify(nil) != Damaged || Classify(append(bytes.Clone(plain), 0)) != Damaged {
		t.Error("zeros, nothing or an extended file pass for state")
	}
}

func FuzzParse(f *testing.F) {
	e, _ := Encrypt(plain, key, iv)
	f.Add(e)
	f.Add(plain)
	f.Add([]byte{2, 1, 0, 10, 0, 0, 0, 0, 0, 16, 0, 1, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		k := Classify(b)
		if k == Plain {
			e, err := Encrypt(b, key, iv)
			if err != nil {
				t.Skip()
			}
			if d, err := Decrypt(e, key); err != nil || Classify(d) != Plain {
				t.Fatal("does not come back", err)
			}
		}
		if Verify(b, key) == nil && k != Encrypted {
			t.Fatal("verified, but not encrypted")
		}
	})
}
