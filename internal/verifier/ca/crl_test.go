package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"testing"
	"time"

	"virt-trust/internal/testkit"
)

// A revocation list is the CA's, says what it should, and is within its limits.
func TestCRL(t *testing.T) {
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		a, _ := newAuthority(t, curve)
		a.Points = []string{"http://crl.example/ca.crl"}
		key := newKey(t)
		gone := testkit.Must[*x509.Certificate](t)(a.Certifier(identity(), spkiOf(t, key.Public()), now))
		if got := gone.CRLDistributionPoints; len(got) != 1 || got[0] != a.Points[0] {
			t.Errorf("%q", got)
		}
		l := testkit.Must[*x509.RevocationList](t)(x509.ParseRevocationList(testkit.Must[[]byte](t)(a.CRL(42, []x509.RevocationListEntry{{SerialNumber: gone.SerialNumber, RevocationTime: now}}, now))))
		if err := l.CheckSignatureFrom(a.cert); err != nil {
			t.Error(err)
		}
		if l.Number.Int64() != 42 || !l.NextUpdate.Equal(now.Add(CRLLifetime)) || !l.ThisUpdate.Before(now) || len(l.RevokedCertificateEntries) != 1 || l.RevokedCertificateEntries[0].SerialNumber.Cmp(gone.SerialNumber) != 0 {
			t.Errorf("%+v", l)
		}
		if err := CheckTBS(a.cert, l.RawTBSRevocationList, now); err != nil {
			t.Error(err)
		}
	}
}

func TestCheckCRLRefuses(t *testing.T) {
	a, key := newAuthority(t, elliptic.P256())
	other, otherKey := newAuthority(t, elliptic.P256())
	tbs := func(a *Authority, key *ecdsa.PrivateKey, f func(*x509.RevocationList)) []byte {
		t.Helper()
		l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: now, NextUpdate: now.Add(time.Hour)}
		f(l)
		r := &recorder{PrivateKey: key}
		testkit.Must[[]byte](t)(x509.CreateRevocationList(rand.Reader, l, a.cert, r))
		return r.tbs
	}
	many := make([]x509.RevocationListEntry, 40_000)
	for i := range many {
		many[i] = x509.RevocationListEntry{SerialNumber: new(big.Int).Lsh(big.NewInt(int64(i)+1), 110), RevocationTime: now}
	}
	if err := CheckTBS(a.cert, tbs(a, key, func(*x509.RevocationList) {}), now); err != nil {
		t.Fatalf("what has to pass does not: %v", err)
	}
	good := tbs(a, key, func(*x509.RevocationList) {})
	for name, in := range map[string][]byte{
		"another CA's": tbs(other, otherKey, func(*x509.RevocationList) {}),
		"for a month":  tbs(a, key, func(l *x509.RevocationList) { l.NextUpdate = now.Add(30 * 24 * time.Hour) }),
		"of tomorrow": tbs(a, key, func(l *x509.RevocationList) {
			l.ThisUpdate, l.NextUpdate = now.Add(20*time.Hour), now.Add(24*time.Hour)
		}),
		"number 0": tbs(a, key, func(l *x509.RevocationList) { l.Number = big.NewInt(0) }),
		"for some certificates alone": tbs(a, key, func(l *x509.RevocationList) {
			l.ExtraExtensions = []pkix.Extension{{Id: []int{2, 5, 29, 28}, Critical: true, Value: []byte{0x30, 0}}}
		}),
		"an entry that says more": tbs(a, key, func(l *x509.RevocationList) {
			l.RevokedCertificateEntries = []x509.RevocationListEntry{{SerialNumber: big.NewInt(1), RevocationTime: now, ReasonCode: 8}}
		}),
		"too long":              tbs(a, key, func(l *x509.RevocationList) { l.RevokedCertificateEntries = many }),
		"followed by something": append(bytes.Clone(good), 0),
		"half":                  good[:len(good)/2],
	} {
		if err := CheckTBS(a.cert, in, now); err == nil {
			t.Errorf("%s: would be signed", name)
		}
	}
}

// A CA of before there were revocation lists is made anew, and is the same to who
// knows it.
func TestRenew(t *testing.T) {
	key := newKey(t)
	tmpl := testkit.Must[*x509.Certificate](t)(rootTemplate(key.Public(), rand.Reader, now.AddDate(-1, 0, 0)))
	tmpl.KeyUsage, tmpl.Subject = x509.KeyUsageCertSign, pkix.Name{CommonName: "old CA"}
	old := testkit.Must[*Authority](t)(New(testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(testkit.Must[[]byte](t)(x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)))), key, rand.Reader))
	if old.Lists() {
		t.Error("it signs lists")
	}
	if der, err := old.CRL(1, nil, now); err == nil {
		t.Errorf("%x", der)
	}
	cert := testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(testkit.Must[[]byte](t)(Renew(old, now))))
	fresh := testkit.Must[*Authority](t)(New(cert, key, rand.Reader))
	if !fresh.Lists() || fresh.Pin() != old.Pin() || !bytes.Equal(cert.RawSubject, old.cert.RawSubject) || !bytes.Equal(cert.SubjectKeyId, old.cert.SubjectKeyId) {
		t.Errorf("%+v", cert)
	}
	testkit.Must[[]byte](t)(fresh.CRL(1, nil, now))
	given := testkit.Must[*x509.Certificate](t)(old.Node(identity(), spkiOf(t, newKey(t).Public()), now))
	chains := testkit.Must[[][]*x509.Certificate](t)(given.Verify(x509.VerifyOptions{Roots: fresh.Pool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, CurrentTime: now}))
	if id, err := fresh.VerifyNode(chains, now); err != nil || id.Node != identity().Node {
		t.Errorf("a certificate of before: %+v %v", id, err)
	}
}
