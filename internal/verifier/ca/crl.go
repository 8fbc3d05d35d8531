package ca

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"
)

// CRLLifetime is how long a revocation list is good: who misses the next ones finds out
// within a day, and a Verifier may be away that long.
const CRLLifetime = 24 * time.Hour

// Lists says whether the CA's certificate lets it sign revocation lists: those of CAs
// that were made before there were any do not. See Renew.
func (a *Authority) Lists() bool { return a.cert.KeyUsage&x509.KeyUsageCRLSign != 0 }

// CRL gives a revocation list (RFC 5280, 5), DER.
func (a *Authority) CRL(number int64, revoked []x509.RevocationListEntry, now time.Time) ([]byte, error) {
	alg, err := algorithm(a.cert.PublicKey)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateRevocationList(a.random, &x509.RevocationList{
		SignatureAlgorithm: alg, Number: big.NewInt(number), RevokedCertificateEntries: revoked,
		ThisUpdate: now.Add(-backdate), NextUpdate: now.Add(CRLLifetime),
	}, a.cert, &checked{a: a, now: now})
	if err != nil {
		return nil, fmt.Errorf("signing a revocation list: %w", err)
	}
	return der, nil
}

func checkCRL(root *x509.Certificate, l *x509.RevocationList, tbs []byte, now time.Time) error {
	alg, err := algorithm(root.PublicKey)
	switch {
	case err != nil:
		return err
	case !bytes.Equal(l.RawTBSRevocationList, tbs):
		return errors.New("a revocation list that reads otherwise than it is written")
	case !bytes.Equal(l.RawIssuer, root.RawSubject) || !bytes.Equal(l.AuthorityKeyId, root.SubjectKeyId) || l.SignatureAlgorithm != alg:
		return errors.New("a revocation list of another CA")
	case l.Number == nil || l.Number.Sign() <= 0 || len(l.Extensions) != 2: // it, and whose key
		return errors.New("a revocation list with other extensions than this CA's")
	case slices.ContainsFunc(l.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool { return len(e.Extensions) > 0 }):
		return errors.New("a revocation list that says more of a certificate than this CA's")
	case l.ThisUpdate.After(now.Add(maxSkew)) || l.NextUpdate.After(now.Add(CRLLifetime+maxSkew)):
		return fmt.Errorf("a revocation list that is good for too long: from %s to %s", l.ThisUpdate.Format(time.RFC3339), l.NextUpdate.Format(time.RFC3339))
	}
	return nil
}

// Renew makes the certificate of a CA anew, DER, with the same name and key: whoever
// knows the CA by either, as nodes do, knows it still.
func Renew(a *Authority, now time.Time) ([]byte, error) {
	t, err := rootTemplate(a.cert.PublicKey, a.random, now)
	if err != nil {
		return nil, err
	}
	t.RawSubject, t.SubjectKeyId = a.cert.RawSubject, a.cert.SubjectKeyId
	return x509.CreateCertificate(a.random, t, t, a.cert.PublicKey, a.key)
}
