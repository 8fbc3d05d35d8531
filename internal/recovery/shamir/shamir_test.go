package shamir

import (
	"bytes"
	"crypto/rand"
	mathrand "math/rand/v2"
	"testing"
)

func TestField(t *testing.T) {
	// FIPS 197, 4.2: {57} · {83} = {c1}, {57} · {13} = {fe}.
	if mul(0x57, 0x83) != 0xc1 || mul(0x57, 0x13) != 0xfe {
		t.Fatal("mul")
	}
	for a := 1; a < 256; a++ {
		if mul(byte(a), inverse(byte(a))) != 1 {
			t.Fatalf("inverse of %d", a)
		}
		for b := range 256 {
			if mul(byte(a), byte(b)) != mul(byte(b), byte(a)) {
				t.Fatalf("%d·%d", a, b)
			}
		}
	}
}

// Every m of n shares, in any order, give the secret; so do more.
func TestEnoughShares(t *testing.T) {
	for range 300 {
		n := 2 + mathrand.IntN(12)
		m := 2 + mathrand.IntN(n-1)
		secret := make([]byte, 1+mathrand.IntN(40))
		rand.Read(secret)
		shares, err := Split(secret, n, m, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		mathrand.Shuffle(n, func(i, j int) { shares[i], shares[j] = shares[j], shares[i] })
		got, err := Combine(shares[:m+mathrand.IntN(n-m+1)])
		if err != nil || !bytes.Equal(got, secret) {
			t.Fatalf("%d of %d: %x, %v, want %x", m, n, got, err, secret)
		}
	}
}

// m-1 shares are as likely for every secret: for a one-byte secret and all
// coefficients, each value of a share comes equally often.
func TestTooFewSharesSayNothing(t *testing.T) {
	for _, secret := range []byte{0, 1, 0xa5} {
		seen := map[byte]int{}
		for c := range 256 {
			shares, err := Split([]byte{secret}, 3, 2, bytes.NewReader([]byte{byte(c)}))
			if err != nil {
				t.Fatal(err)
			}
			seen[shares[1].Data[0]]++
		}
		if len(seen) != 256 {
			t.Errorf("secret %#x: a share has %d values of 256", secret, len(seen))
		}
	}
}

func TestAllPlaces(t *testing.T) {
	secret := []byte("the secret")
	shares, err := Split(secret, MaxShares, MaxShares, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Combine(shares); err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("%x, %v", got, err)
	}
	if got, _ := Combine(shares[1:]); bytes.Equal(got, secret) {
		t.Fatal("one share too few gave the secret")
	}
}

func TestRefused(t *testing.T) {
	for _, c := range []struct{ n, m int }{{1, 1}, {2, 1}, {2, 3}, {256, 2}, {0, 0}} {
		if _, err := Split([]byte{1}, c.n, c.m, rand.Reader); err == nil {
			t.Errorf("%d of %d was split", c.m, c.n)
		}
	}
	if _, err := Split([]byte{1}, 2, 2, bytes.NewReader(nil)); err == nil {
		t.Error("split without randomness")
	}
	if _, err := Split(nil, 2, 2, rand.Reader); err == nil {
		t.Error("split nothing")
	}
	for _, s := range [][]Share{nil, {{1, []byte{1}}}, {{1, []byte{1}}, {1, []byte{2}}}, {{1, []byte{1}}, {2, []byte{1, 2}}}, {{0, []byte{1}}, {2, []byte{1}}}, {{1, nil}, {2, nil}}} {
		if _, err := Combine(s); err == nil {
			t.Errorf("%v was combined", s)
		}
	}
}
