package list

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Certificates are read back and copied, and are bounded.
func TestCertificates(t *testing.T) {
	l := New()
	r := &Record{UUID: "3f2c1c1e-0000-4000-8000-000000000000", EKCertificate: make([]byte, MaxCert), AKPublic: make([]byte, MaxPublic), AKCertificate: []byte{1}}
	l.Records[r.UUID] = r
	b, err := l.Encode(key, nonce)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(b, key)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(l, got, asWritten); d != "" {
		t.Error(d)
	}
	c := r.Clone()
	c.EKCertificate[0], c.AKPublic[0], c.AKCertificate[0] = 9, 9, 9
	if r.EKCertificate[0] != 0 || r.AKPublic[0] != 0 || !bytes.Equal(r.AKCertificate, []byte{1}) {
		t.Error("a clone is the same")
	}
	for _, change := range []func(*Record){
		func(r *Record) { r.EKCertificate = make([]byte, MaxCert+1) },
		func(r *Record) { r.AKCertificate = make([]byte, MaxCert+1) },
		func(r *Record) { r.AKPublic = make([]byte, MaxPublic+1) },
	} {
		c := r.Clone()
		change(c)
		l := New()
		l.Records[c.UUID] = c
		b, err := l.Encode(key, nonce)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Decode(b, key); !errors.Is(err, ErrFormat) {
			t.Errorf("out of bounds: %v", err)
		}
	}
}
