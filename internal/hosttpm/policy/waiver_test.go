package policy

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/hex"
	"reflect"
	"testing"
	"time"
)

func waiver(t testing.TB, key *ecdsa.PrivateKey) *Waiver {
	t.Helper()
	w := &Waiver{
		After: 7, Until: 15, Use: 3, UseIndex: 0x01500120, UseName: append([]byte{0, 0x0B}, bytes.Repeat([]byte{0xA0}, 32)...),
		Epoch: 5, EpochName: epochName, Time: time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC), Note: "firmware",
	}
	var err error
	if w.Policy, err = w.Digest(); err != nil {
		t.Fatal(err)
	}
	h := AuthorizedHash(w.Policy)
	if w.Signature, err = ecdsa.SignASN1(rand.Reader, key, h[:]); err != nil {
		t.Fatal(err)
	}
	return w
}

func TestWaiver(t *testing.T) {
	key := newKey(t)
	w := waiver(t, key)
	if got := hex.EncodeToString(w.Policy); got != "bc0e10e6b82c1a03981b8500934b2ba6b03039abb5467ccece8526a8db8dcc5d" {
		t.Error("a waiver's digest is not what it was: ", got)
	}
	if err := w.Verify(&key.PublicKey); err != nil {
		t.Fatal(err)
	}
	b, err := w.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ParseWaiver(b); err != nil || !reflect.DeepEqual(got, w) {
		t.Fatalf("ParseWaiver gives %+v, %v", got, err)
	}
	if err := w.Verify(&newKey(t).PublicKey); err == nil {
		t.Error("another key's signature is accepted")
	}
	for name, spoil := range map[string]func(*Waiver){
		"the first boot":         func(w *Waiver) { w.After-- },
		"the last boot":          func(w *Waiver) { w.Until++ },
		"the use":                func(w *Waiver) { w.Use++ },
		"the counter of waivers": func(w *Waiver) { w.UseName = epochName },
		"the epoch":              func(w *Waiver) { w.Epoch++ },
		"the signature":          func(w *Waiver) { w.Signature[20] ^= 1 },
	} {
		w := waiver(t, key)
		spoil(w)
		if err := w.Verify(&key.PublicKey); err == nil {
			t.Errorf("%s can be changed", name)
		}
	}
	w.Until = w.After
	if _, err := w.Marshal(); err == nil {
		t.Error("a waiver for no boot is written")
	}
}

func FuzzParseWaiver(f *testing.F) {
	b, _ := waiver(f, newKey(f)).Marshal()
	f.Add(b)
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		w, err := ParseWaiver(b)
		if err != nil {
			return
		}
		again, err := w.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := ParseWaiver(again); err != nil || !got.Time.Equal(w.Time) {
			t.Fatalf("%+v becomes %+v, %v", w, got, err)
		}
	})
}

func TestID(t *testing.T) {
	if got := state().ID(); got != "1fd2c0c24627feb4" {
		t.Error("a state's ID is not what it was: ", got)
	}
	other := state()
	other.PCRs[7] = make([]byte, 32)
	if other.ID() == state().ID() {
		t.Error("two states have one ID")
	}
}
