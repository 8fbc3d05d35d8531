package rounds

import (
	"crypto/x509"
	"encoding/pem"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

// given gives the member's certificates as its agent would get them.
func (m *member) given() (node, certifier *x509.Certificate) {
	m.b.t.Helper()
	n := testkit.Must[fleet.Node](m.b.t)(m.b.store.Node(m.b.t.Context(), m.id))
	id := ca.Identity{Node: n.ID, Name: n.Name, EK: make([]byte, 32), AK: n.AKName, Bind: n.BindName}
	node = testkit.Must[*x509.Certificate](m.b.t)(m.b.ca.Node(id, spkiOf(m.b.t), m.b.clock.Now()))
	given := []store.Certificate{{Serial: ca.Serial(node), Node: n.ID, Expires: node.NotAfter}}
	certifier, fresh, err := m.b.h.certifier(m.b.t.Context(), n, id)
	if err != nil {
		m.b.t.Fatal(err)
	}
	if fresh {
		given = append(given, store.Certificate{Serial: ca.Serial(certifier), Node: n.ID, Expires: certifier.NotAfter, Data: certifier.Raw})
	}
	if err := m.b.h.noteCertificates(m.b.t.Context(), n, node, given); err != nil {
		m.b.t.Fatal(err)
	}
	return node, certifier
}

func (b *bench) crl() (*x509.RevocationList, *http.Response) {
	b.t.Helper()
	r, err := b.client(nil).Get(b.address + CRLPath)
	if err != nil {
		b.t.Fatal(err)
	}
	defer r.Body.Close()
	der, _ := io.ReadAll(r.Body)
	if r.StatusCode != http.StatusOK {
		b.t.Fatalf("%d %s", r.StatusCode, der)
	}
	return testkit.Must[*x509.RevocationList](b.t)(x509.ParseRevocationList(der)), r
}

// openssl says whether a certificate is good, with a look at the list.
func (b *bench) openssl(l *x509.RevocationList, c *x509.Certificate) (string, bool) {
	b.t.Helper()
	dir := b.t.TempDir()
	for name, block := range map[string]*pem.Block{
		"ca": {Type: "CERTIFICATE", Bytes: b.ca.Certificate().Raw}, "crl": {Type: "X509 CRL", Bytes: l.Raw}, "cert": {Type: "CERTIFICATE", Bytes: c.Raw},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			b.t.Fatal(err)
		}
	}
	out, err := exec.Command("openssl", "verify", "-crl_check", "-CAfile", filepath.Join(dir, "ca"), "-CRLfile", filepath.Join(dir, "crl"), filepath.Join(dir, "cert")).CombinedOutput()
	return string(out), err == nil
}

// Who knows nothing but the CA learns that a node was revoked: of its own
// certificate, and of that which signs for its vTPMs.
func TestCRL(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	b := newBench(t, nil)
	b.ca.Points = []string{"http://crl.example/ca.crl"}
	a, other := b.join("host-a", b.newHost()), b.join("host-b", b.newHost())
	node, certifier := a.given()
	again, same := a.given()
	if !same.Equal(certifier) || again.Equal(node) {
		t.Error("a certifier gets a new certificate each time")
	}
	_, spared := other.given()
	if got := certifier.CRLDistributionPoints; len(got) != 1 || got[0] != b.ca.Points[0] {
		t.Errorf("%q", got)
	}
	first, r := b.crl()
	if len(first.RevokedCertificateEntries) != 0 || r.Header.Get("Content-Type") != "application/pkix-crl" || !strings.Contains(r.Header.Get("Cache-Control"), "max-age") {
		t.Errorf("%+v %v", first, r.Header)
	}
	if left := first.NextUpdate.Sub(b.clock.Now()); left < 12*time.Hour || left > ca.CRLLifetime {
		t.Errorf("good for %s", left)
	}
	for _, c := range []*x509.Certificate{node, certifier} {
		if out, ok := b.openssl(first, c); !ok {
			t.Errorf("before: %s", out)
		}
	}
	if same, _ := b.crl(); same.Number.Cmp(first.Number) != 0 {
		t.Error("a new list for nothing")
	}
	a.change(func(n *fleet.Node) { n.State = fleet.Revoked })
	b.clock.Pass(crlLook)
	second, _ := b.crl()
	if len(second.RevokedCertificateEntries) != 3 || second.Number.Cmp(first.Number) <= 0 {
		t.Errorf("%d in list %d after %d", len(second.RevokedCertificateEntries), second.Number, first.Number)
	}
	for _, c := range []*x509.Certificate{node, again, certifier} {
		if out, ok := b.openssl(second, c); ok || !strings.Contains(out, "revoked") {
			t.Errorf("after: %s", out)
		}
	}
	if out, ok := b.openssl(second, spared); !ok {
		t.Errorf("another node's: %s", out)
	}
	// A replica gives the same one; a restart too; and a new one long before the last
	// has ended.
	if l, _ := b.replica().crl(); l.Number.Cmp(second.Number) != 0 {
		t.Errorf("another replica: list %d, not %d", l.Number, second.Number)
	}
	b.clock.Pass(crlAge)
	if l, _ := b.crl(); l.Number.Cmp(second.Number) <= 0 {
		t.Errorf("after %s: list %d", crlAge, l.Number)
	}
}

// Nobody fetches the list so often that others cannot.
func TestCRLLimit(t *testing.T) {
	b := newBench(t, func(o *Options) { o.Anonymous = 3 })
	c := b.client(nil)
	last := 0
	for range 5 {
		r, err := c.Get(b.address + CRLPath)
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		last = r.StatusCode
	}
	if last != http.StatusTooManyRequests {
		t.Errorf("%d", last)
	}
}
