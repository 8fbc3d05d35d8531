package hosttpm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/asn1"
	"encoding/binary"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

// eccArea is the public area of an EK of the ECC template, by its private key:
// the same in each of a fuzzer's processes.
func eccArea(t testing.TB, scalar byte) (*tpm2.TPMTPublic, *ecdsa.PublicKey) {
	t.Helper()
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), append(make([]byte, 31), scalar))
	if err != nil {
		t.Fatal(err)
	}
	b, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	a := tpm2.ECCEKTemplate
	a.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: b[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: b[33:]},
	})
	return &a, &key.PublicKey
}

// FuzzCertificate: whatever an index holds, what comes out of it is its
// beginning, one ASN.1 value, and nothing of it where it is over another key.
func FuzzCertificate(f *testing.F) {
	area, key := eccArea(f, 7)
	other, _ := eccArea(f, 8)
	good := certifyEK(f, key)
	f.Add(good)
	f.Add(append(bytes.Clone(good), 0xFF, 0xFF))
	f.Add(append(bytes.Clone(good), good...))
	f.Add(good[:len(good)-1])
	f.Add([]byte{0x30, 0x84, 0xFF, 0xFF, 0xFF, 0xFF})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := certificateOver(area, b); err == nil {
			var v asn1.RawValue
			if rest, e := asn1.Unmarshal(c, &v); e != nil || len(rest) > 0 || !bytes.HasPrefix(b, c) {
				t.Errorf("%x out of %x", c, b)
			}
		} else if c != nil {
			t.Errorf("%x with an error", c)
		}
		if c, err := certificateOver(other, b); err == nil {
			t.Errorf("over a key that nobody has: %x", c)
		}
	})
}

// FuzzSized: a TPM2B is all of its bytes, or nothing.
func FuzzSized(f *testing.F) {
	f.Add([]byte{0, 1, 7})
	f.Add([]byte{0, 0})
	f.Add([]byte{0, 2, 7})
	f.Add([]byte{0, 1, 7, 7})
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := sized(b)
		if err != nil {
			return
		}
		if len(v) == 0 || !bytes.Equal(append(binary.BigEndian.AppendUint16(nil, uint16(len(v))), v...), b) {
			t.Errorf("%x gives %x", b, v)
		}
	})
}
