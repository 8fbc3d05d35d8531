// Package shamir splits a secret among several people, so that any m of n of
// them have it together and any m-1 have nothing (A. Shamir, How to share a
// secret, 1979): each byte is the value at 0 of a random polynomial of degree
// m-1 over GF(256), a share has the values at one other place.
//
// The field is that of AES, x^8+x^4+x^3+x+1. Its arithmetic here has neither
// tables nor branches on secrets. Pure: randomness comes from the caller.
package shamir

import (
	"errors"
	"fmt"
	"io"
)

// MaxShares is how many places but 0 the field has.
const MaxShares = 255

// Share is one person's part.
type Share struct {
	Index byte // 1 to 255: the place of the values
	Data  []byte
}

// Split makes n shares of a secret, of which any m give it back:
// 2 ≤ m ≤ n ≤ MaxShares.
func Split(secret []byte, n, m int, random io.Reader) ([]Share, error) {
	switch {
	case len(secret) == 0:
		return nil, errors.New("there is nothing to split")
	case m < 2 || n < m || n > MaxShares:
		return nil, fmt.Errorf("%d of %d shares: at least 2 of them, at most all, and no more than %d", m, n, MaxShares)
	}
	// m-1 random coefficients for each byte, the highest first.
	coefficients := make([]byte, (m-1)*len(secret))
	defer clear(coefficients)
	if _, err := io.ReadFull(random, coefficients); err != nil {
		return nil, err
	}
	shares := make([]Share, n)
	for s := range shares {
		x := byte(s + 1)
		data := make([]byte, len(secret))
		for c := range m - 1 {
			for i := range data {
				data[i] = mul(data[i], x) ^ coefficients[c*len(secret)+i]
			}
		}
		for i := range data {
			data[i] = mul(data[i], x) ^ secret[i]
		}
		shares[s] = Share{x, data}
	}
	return shares, nil
}

// Combine gives the secret that shares of it were split from. With too few, or
// with a wrong one among them, it gives bytes that mean nothing: the caller
// must be able to tell.
func Combine(shares []Share) ([]byte, error) {
	if len(shares) < 2 || len(shares) > MaxShares {
		return nil, fmt.Errorf("%d shares", len(shares))
	}
	secret := make([]byte, len(shares[0].Data))
	for i, a := range shares {
		if a.Index == 0 || len(a.Data) != len(secret) || len(secret) == 0 {
			return nil, errors.New("shares that do not belong together")
		}
		// Lagrange's basis polynomial of this place, at 0.
		weight := byte(1)
		for j, b := range shares {
			if i == j {
				continue
			}
			if a.Index == b.Index {
				return nil, fmt.Errorf("share %d is there twice", a.Index)
			}
			weight = mul(weight, mul(b.Index, inverse(a.Index^b.Index)))
		}
		for k := range secret {
			secret[k] ^= mul(a.Data[k], weight)
		}
	}
	return secret, nil
}

// mul multiplies in GF(256).
func mul(a, b byte) (p byte) {
	for range 8 {
		p ^= a & -(b & 1)
		a = a<<1 ^ 0x1b&-(a>>7)
		b >>= 1
	}
	return p
}

// inverse is a^254, which is 1/a for a ≠ 0.
func inverse(a byte) byte {
	r := byte(1)
	for range 7 { // 254 = 2+4+…+128
		a = mul(a, a)
		r = mul(r, a)
	}
	return r
}
