package policy

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"reflect"
	"strings"
	"testing"
	"time"
)

var epochName = append([]byte{0, 0x0B}, bytes.Repeat([]byte{0xE0}, 32)...)

func state() State {
	return State{Bank: "sha256", PCRs: map[uint][]byte{0: make([]byte, 32), 7: bytes.Repeat([]byte{7}, 32), 14: bytes.Repeat([]byte{14}, 32)}}
}

func approved(t testing.TB, key *ecdsa.PrivateKey) *Approved {
	t.Helper()
	d, err := Digest(state(), 3, epochName)
	if err != nil {
		t.Fatal(err)
	}
	h := AuthorizedHash(d)
	sig, err := ecdsa.SignASN1(rand.Reader, key, h[:])
	if err != nil {
		t.Fatal(err)
	}
	return &Approved{
		State: state(), Epoch: 3, EpochName: epochName, Policy: d, Signature: sig,
		Time: time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC), Note: "first provisioning",
	}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// That these are what a TPM computes is tested with a TPM, in hosttpm; here,
// that they stay what they are: keys on many disks are bound to them.
func TestDigestStays(t *testing.T) {
	d, err := Digest(state(), 3, epochName)
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(d); got != "13c80d7763d37c8623ee713c0eebb56b8ee1a7b9128bef5e3d6697a98a626191" {
		t.Error("Digest gives ", got)
	}
	if got := hex.EncodeToString(Authorize(epochName)); got != "cabd02b75d20717a8ff5fb8c9f147ccfa40a40c709d7d71aa0f16e289bbe951a" {
		t.Error("Authorize gives ", got)
	}
}

func TestVerify(t *testing.T) {
	key := newKey(t)
	a := approved(t, key)
	if err := a.Verify(&key.PublicKey); err != nil {
		t.Fatal(err)
	}
	b, err := a.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseApproved(b)
	if err != nil || !reflect.DeepEqual(got, a) {
		t.Fatalf("ParseApproved gives %+v, %v", got, err)
	}
	if err := a.Verify(&newKey(t).PublicKey); err == nil {
		t.Error("another key's signature is accepted")
	}
	for name, spoil := range map[string]func(*Approved){
		"a PCR's value":    func(a *Approved) { a.PCRs[7] = make([]byte, 32) },
		"one PCR fewer":    func(a *Approved) { delete(a.PCRs, 7) },
		"the epoch":        func(a *Approved) { a.Epoch++ },
		"the counter":      func(a *Approved) { a.EpochName = append([]byte{0, 0x0B}, make([]byte, 32)...) },
		"the digest":       func(a *Approved) { a.Policy = make([]byte, 32) },
		"the signature":    func(a *Approved) { a.Signature[20] ^= 1 },
		"the index of one": func(a *Approved) { a.PCRs[8] = a.PCRs[7]; delete(a.PCRs, 7) },
	} {
		a := approved(t, key)
		spoil(a)
		if err := a.Verify(&key.PublicKey); err == nil {
			t.Errorf("%s can be changed", name)
		}
	}
}

func TestShapes(t *testing.T) {
	key := newKey(t)
	good, err := approved(t, key).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]string{
		"nothing":        "",
		"not JSON":       "x",
		"more after it":  string(good) + "{}",
		"unknown field":  strings.Replace(string(good), `"bank"`, `"more": 1, "bank"`, 1),
		"other version":  strings.Replace(string(good), `"version": 1`, `"version": 2`, 1),
		"bank":           strings.Replace(string(good), `"sha256"`, `"sha1"`, 1),
		"size of values": strings.Replace(string(good), `"sha256"`, `"sha384"`, 1),
		"PCR 24":         strings.Replace(string(good), `"14"`, `"24"`, 1),
		"PCR 07":         strings.Replace(string(good), `"7"`, `"07"`, 1),
		"PCR -1":         strings.Replace(string(good), `"7"`, `"-1"`, 1),
		"hex":            strings.Replace(string(good), `"0707`, `"zz07`, 1),
		"no PCRs":        `{"version":1,"bank":"sha256","pcrs":{},"epoch":0,"epoch_name":"","policy":"","signature":"","time":"2024-05-06T07:08:09Z","note":""}`,
		"too long":       string(good) + strings.Repeat(" ", maxFile),
	} {
		if a, err := ParseApproved([]byte(b)); err == nil {
			t.Errorf("%s: ParseApproved gives %+v", name, a)
		}
	}
}

func TestDiffering(t *testing.T) {
	s, now := state(), state()
	if d := s.Differing(now); d != nil {
		t.Errorf("a state differs from itself in %v", d)
	}
	now.PCRs[14] = make([]byte, 32)
	delete(now.PCRs, 0)
	now.PCRs[3] = make([]byte, 32) // not asked for
	if d := s.Differing(now); !reflect.DeepEqual(d, []uint{0, 14}) {
		t.Errorf("differing are %v", d)
	}
	now.Bank = "sha384"
	if d := s.Differing(now); len(d) != 3 {
		t.Errorf("of another bank differing are %v", d)
	}
}

func FuzzParseApproved(f *testing.F) {
	b, err := approved(f, newKey(f)).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := ParseApproved(b)
		if err != nil {
			return
		}
		w, err := a.Marshal()
		if err != nil {
			t.Fatalf("what ParseApproved took cannot be written: %v", err)
		}
		again, err := ParseApproved(w)
		if err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		if !reflect.DeepEqual(again.State, a.State) || again.Epoch != a.Epoch || !bytes.Equal(again.Policy, a.Policy) {
			t.Fatalf("read %+v, wrote it, read %+v", a, again)
		}
	})
}
