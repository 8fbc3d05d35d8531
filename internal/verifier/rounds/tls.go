package rounds

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	"virt-trust/internal/verifier/ca"
)

// TLSConfig is for a server that takes nodes' certificates and asks nobody else
// for one: TLS 1.3, the Verifier's own certificate by its CA. names are those by
// which it is reached.
func TLSConfig(a *ca.Authority, names []string, now func() time.Time) *tls.Config {
	c := &serverCertificate{ca: a, names: names, now: now}
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		ClientAuth:     tls.VerifyClientCertIfGiven,
		ClientCAs:      a.Pool(),
		GetCertificate: c.get,
		Time:           now,
		// A resumed session does not ask again whether the certificate is still good.
		SessionTicketsDisabled: true,
	}
}

// serverCertificate is the Verifier's own: made when it is first asked for, and
// anew when a third of its time is left. Its key is in memory alone.
type serverCertificate struct {
	ca    *ca.Authority
	names []string
	now   func() time.Time

	mu   sync.Mutex
	cert *tls.Certificate
}

func (s *serverCertificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if s.cert != nil {
		l := s.cert.Leaf
		if now.After(l.NotBefore) && now.Before(l.NotAfter.Add(-ca.ServerLifetime/3)) {
			return s.cert, nil
		}
	}
	c, err := s.issue(now)
	if err != nil {
		if s.cert != nil && now.Before(s.cert.Leaf.NotAfter) {
			return s.cert, nil // it is good for a while yet; the next one tries again
		}
		return nil, fmt.Errorf("the Verifier's TLS certificate: %w", err)
	}
	s.cert = c
	return c, nil
}

func (s *serverCertificate) issue(now time.Time) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	leaf, err := s.ca.Server(s.names, spki, now)
	if err != nil {
		return nil, err
	}
	// The CA's own goes along: agents know it by its pin.
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw, s.ca.Certificate().Raw}, PrivateKey: key, Leaf: leaf}, nil
}
