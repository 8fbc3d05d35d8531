package ek

import (
	"bytes"
	"context"
	"crypto/elliptic"
	"crypto/rand"
	"syscall"
	"testing"
	"time"

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
	if _, again, err := r.MakeAK(context.Background(), stateName, after, key); err != nil || !bytes.Equal(again, public) {
		t.Errorf("a second AK took the first one's place: %v", err)
	}
	other, err := r.load(context.Background(), stateName, before, key, func(t transport.TPM) error {
		template := akTemplate
		template.ObjectAttributes.Restricted = false
		k, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHPlatform, InPublic: tpm2.New2B(template)}.Execute(t)
		if err == nil {
			_, err = tpm2.EvictControl{Auth: tpm2.TPMRHPlatform, ObjectHandle: &tpm2.NamedHandle{Handle: k.ObjectHandle, Name: k.Name}, PersistentHandle: AKHandle}.Execute(t)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, p, err := r.MakeAK(context.Background(), stateName, other, key); err == nil || p != nil {
		t.Error("a key that signs anything is taken for an AK")
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

// BenchmarkMakeAK is what the AK adds to a vTPM's first start. cpu-ms is of the
// swtpm that makes it: no load adds to it.
func BenchmarkMakeAK(b *testing.B) {
	r := reader(b)
	state := manufacture(b)
	cpu := func() (d time.Duration) {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_CHILDREN, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := cpu()
	for b.Loop() {
		if _, _, err := r.MakeAK(context.Background(), stateName, state, nil); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric((cpu()-before).Seconds()*1000/float64(b.N), "cpu-ms/op")
}
