package ek

import (
	"bytes"
	"context"
	"crypto/elliptic"
	"crypto/rand"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"virt-trust/internal/vtpm/statefile"
)

// TestMakeAK: the AK is in the state that comes back, under the same key, and
// nothing else is another; the state that was given has none.
func TestMakeAK(t *testing.T) {
	r := reader(t)
	key, iv := make([]byte, statefile.KeySize), make([]byte, statefile.KeySize)
	rand.Read(key)
	rand.Read(iv)
	before, err := statefile.Encrypt(manufacture(t), key, iv)
	if err != nil {
		t.Fatal(err)
	}
	given := bytes.Clone(before)
	after, public, err := r.MakeAK(context.Background(), stateName, before, key)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(given, before) || statefile.Verify(after, key) != nil || bytes.Equal(after, before) {
		t.Error("the state that was given, or that came back")
	}
	k, err := ParseAK(public)
	if err != nil || k.Curve != elliptic.P256() {
		t.Fatal(k, err)
	}
	read := func(state []byte) (found []byte, err error) {
		_, err = r.load(context.Background(), stateName, state, key, func(t transport.TPM) error {
			p, err := tpm2.ReadPublic{ObjectHandle: AKHandle}.Execute(t)
			if err == nil {
				found = p.OutPublic.Bytes()
			}
			return err
		})
		return found, err
	}
	if found, err := read(after); err != nil || !bytes.Equal(found, public) {
		t.Errorf("in the state: %x, %v; it was %x", found, err, public)
	}
	if found, err := read(before); err == nil {
		t.Errorf("in the state of before: %x", found)
	}
	a, err1 := r.PublicKey(context.Background(), stateName, before, key)
	b, err2 := r.PublicKey(context.Background(), stateName, after, key)
	if err1 != nil || err2 != nil || !bytes.Equal(a, b) {
		t.Error("another EK", err1, err2)
	}
	if _, _, err := r.MakeAK(context.Background(), stateName, after, key); err == nil {
		t.Error("a second AK took the first one's place")
	}
	key[0] ^= 1
	if _, _, err := r.MakeAK(context.Background(), stateName, before, key); err == nil {
		t.Error("under another key")
	}
}

func TestIdentity(t *testing.T) {
	r := reader(t)
	state := manufacture(t)
	id, err := r.Identity(context.Background(), stateName, state, nil)
	if err != nil {
		t.Fatal(err)
	}
	want, err := r.PublicKey(context.Background(), stateName, state, nil)
	if err != nil || !bytes.Equal(id.EK, want) || id.Family != "2.0" || id.Manufacturer != "id:49424D00" || len(id.Version) != 11 || id.Revision < 100 {
		t.Errorf("%+v, %v", id, err)
	}
}

// FuzzParseAK reads what a record holds.
func FuzzParseAK(f *testing.F) {
	f.Add(tpm2.Marshal(akTemplate))
	f.Fuzz(func(t *testing.T, b []byte) {
		if k, err := ParseAK(b); err == nil && k == nil {
			t.Error("no key, and no error")
		}
	})
}
