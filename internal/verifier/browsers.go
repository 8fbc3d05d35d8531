package verifier

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/platform/config"
)

// pair is a certificate and its key in two files, which something else renews: an
// ACME client, an administrator. They are looked at when a browser comes, and at a
// reload, and taken once they belong together: whoever replaces them does one after
// the other.
type pair struct {
	certificate, key string
	log              *logrus.Entry
	now              func() time.Time

	mu     sync.Mutex
	looked time.Time
	files  [2]os.FileInfo // as they were when now was read
	cert   *tls.Certificate
	said   string // the error that was logged last
}

// lookTime is how long the files are not looked at again.
const lookTime = 5 * time.Second

// openPair reads the pair for the first time.
func openPair(b config.VerifierBrowsers, log *logrus.Entry) (*pair, error) {
	p := &pair{certificate: b.Certificate, key: b.Key, log: log, now: time.Now}
	return p, p.load()
}

// config is for a server that browsers come to: it asks nobody for a certificate.
func (p *pair) config() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: p.get}
}

func (p *pair) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := p.now(); now.Sub(p.looked) >= lookTime || now.Before(p.looked) {
		p.look()
	}
	return p.cert, nil
}

// until is when the certificate ends.
func (p *pair) until() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cert.Leaf.NotAfter
}

// reload looks at the files now. What is wrong with them leaves the pair as it was.
func (p *pair) reload() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.look()
}

// look reads files that changed. The error is logged, each once.
func (p *pair) look() error {
	p.looked = p.now()
	err := p.load()
	switch {
	case err == nil:
		p.said = ""
	case err.Error() != p.said:
		p.said = err.Error()
		p.log.WithError(err).Error("browsers are shown the certificate of before")
	}
	return err
}

func (p *pair) load() error {
	var files [2]os.FileInfo
	for i, name := range []string{p.certificate, p.key} {
		var err error
		if files[i], err = os.Stat(name); err != nil {
			return fmt.Errorf("the browsers' certificate: %w", err)
		}
	}
	if same(files[0], p.files[0]) && same(files[1], p.files[1]) {
		return nil
	}
	cert, err := readPair(p.certificate, p.key)
	if err != nil {
		return err
	}
	p.cert, p.files = cert, files
	l := p.log.WithField("certificate", p.certificate).WithField("until", cert.Leaf.NotAfter.UTC().Format(time.RFC3339))
	if p.now().After(cert.Leaf.NotAfter) {
		l.Warn("the browsers' certificate has expired")
	} else {
		l.Info("the browsers' certificate")
	}
	return nil
}

func same(a, b os.FileInfo) bool {
	return b != nil && os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}

// readPair reads a certificate with its chain, and the key that belongs to it.
func readPair(certificate, key string) (*tls.Certificate, error) {
	fail := func(err error) (*tls.Certificate, error) {
		return nil, fmt.Errorf("the browsers' certificate: %w", err)
	}
	chain, err := readFile(certificate)
	if err != nil {
		return fail(err)
	}
	fi, err := os.Stat(key)
	if err != nil {
		return fail(err)
	}
	if fi.Mode().Perm()&0o007 != 0 {
		return fail(fmt.Errorf("%s is for everybody: chmod 640", key))
	}
	secret, err := readFile(key)
	if err != nil {
		return fail(err)
	}
	pair, err := tls.X509KeyPair(chain, secret)
	if err != nil {
		return fail(fmt.Errorf("%s with %s: %w", certificate, key, err))
	}
	if len(pair.Leaf.DNSNames) == 0 && len(pair.Leaf.IPAddresses) == 0 {
		return fail(fmt.Errorf("%s names no host, so that no browser would take it", certificate))
	}
	return &pair, nil
}

// remarks is what a browser would not like of its certificate, though the Verifier
// runs with it.
func remarks(cfg config.Verifier, now time.Time) (all []string) {
	if cfg.Browsers.Certificate == "" {
		return nil
	}
	pair, err := readPair(cfg.Browsers.Certificate, cfg.Browsers.Key)
	if err != nil {
		return nil // Check says so
	}
	leaf := pair.Leaf
	switch {
	case now.After(leaf.NotAfter):
		all = append(all, "the browsers' certificate expired at "+leaf.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(leaf.NotBefore):
		all = append(all, "the browsers' certificate is not good before "+leaf.NotBefore.UTC().Format(time.RFC3339))
	}
	if issuer, err := x509.ParseCertificate(pair.Certificate[len(pair.Certificate)-1]); err == nil && len(pair.Certificate) == 1 && leaf.CheckSignatureFrom(issuer) == nil {
		all = append(all, "the browsers' certificate is signed by itself")
	}
	if u, err := url.Parse(cfg.OIDC.RedirectURL); cfg.OIDC.Issuer != "" && err == nil {
		if err := leaf.VerifyHostname(u.Hostname()); errors.As(err, new(x509.HostnameError)) {
			all = append(all, "the OpenID provider leads to "+u.Hostname()+", which the browsers' certificate does not name")
		}
	}
	return all
}
