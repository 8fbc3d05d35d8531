package verifier

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/cakey"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/nodeapi"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/store/storetest"
)

func TestMain(m *testing.M) { os.Exit(storetest.Main(m)) }

// setting is a folder with all that Verifiers of one fleet share.
type setting struct {
	t   testing.TB
	dir string
	cfg config.Verifier
}

const adminToken, readerToken = "token-of-an-admin", "token-of-a-reader"

func newSetting(t testing.TB, dsn string) *setting {
	t.Helper()
	s := &setting{t: t, dir: t.TempDir(), cfg: config.DefaultVerifier()}
	c := &s.cfg
	c.Names, c.Database = []string{"localhost"}, dsn
	c.CA = config.VerifierCA{Certificate: s.path("ca.pem"), Key: s.path("ca-key.pem")}
	c.Results.Keys, c.Policy.ManifestKeys, c.Enrolment.ManufacturerRoots = s.path("keys.pem"), s.path("manifest-keys.pem"), s.path("roots")
	c.Tokens = []config.VerifierToken{{Name: "paula", Role: "policy", SHA256: digestOf(adminToken)}, {Name: "rita", Role: "reader", SHA256: digestOf(readerToken)}}
	c.Limits.Requests, c.Limits.Anonymous = 1_000_000, 1_000_000
	if err := Init(*c, io.Discard); err != nil {
		t.Fatal(err)
	}
	return s
}

func digestOf(token string) string {
	d := sha256.Sum256([]byte(token))
	return hex.EncodeToString(d[:])
}

func (s *setting) path(name string) string { return filepath.Join(s.dir, name) }

// running is one Verifier.
type running struct {
	*setting
	address  string
	browsers string // where there is a certificate for them
	log      *safe
	reload   chan struct{}
	stop     func() error
}

// safe is a buffer for many.
type safe struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safe) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *safe) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func (s *setting) start() *running {
	s.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	r := &running{setting: s, address: l.Addr().String(), log: &safe{}, reload: make(chan struct{})}
	log := logrus.New()
	log.Out = r.log
	var browsers []net.Listener
	if s.cfg.Browsers.Certificate != "" {
		b, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			s.t.Fatal(err)
		}
		browsers, r.browsers = []net.Listener{b}, b.Addr().String()
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended, ready := make(chan error, 1), make(chan struct{})
	go func() {
		ended <- Run(ctx, Options{
			Config: s.cfg, Version: "test", Log: logrus.NewEntry(log), Listeners: []net.Listener{l}, Browsers: browsers, Ready: func() { close(ready) },
			Reload: r.reload, Load: func() (config.Verifier, error) { return s.cfg, nil },
		})
	}()
	r.stop = sync.OnceValue(func() error {
		cancel()
		return <-ended
	})
	select {
	case <-ready:
	case err := <-ended:
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := r.stop(); err != nil {
			s.t.Errorf("%v\n%s", err, r.log)
		}
	})
	return r
}

func (s *setting) pool() *x509.CertPool {
	pem, err := os.ReadFile(s.cfg.CA.Certificate)
	if err != nil {
		s.t.Fatal(err)
	}
	p := x509.NewCertPool()
	p.AppendCertsFromPEM(pem)
	return p
}

// client makes one that knows the CA, with a certificate of its own or none.
func (s *setting) client(certs ...tls.Certificate) *http.Client {
	return &http.Client{
		Timeout:       20 * time.Second,
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.pool(), ServerName: "localhost", Certificates: certs}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// ask sends a request and gives status, header and body; 0 where there was no
// answer.
func ask(c *http.Client, method, url, token, body string, headers ...string) (int, http.Header, string) {
	r, err := http.NewRequest(method, url, bytes.NewReader([]byte(body)))
	if err != nil {
		return 0, nil, err.Error()
	}
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := c.Do(r)
	if err != nil {
		return 0, nil, err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, nil, err.Error()
	}
	return resp.StatusCode, resp.Header, string(b)
}

func (r *running) url(path string) string { return "https://" + r.address + path }

// host is a node that is enrolled, whose evidence is right.
type host struct {
	*forge.Host
	id     string
	client *http.Client
	next   *nodeapi.Round
}

// enrol puts a node into the database, as an enrolment would, and gives its host a
// certificate.
func (s *setting) enrol(db *store.Store, n int) *host {
	s.t.Helper()
	log, err := os.ReadFile("../evidence/eventlog/testdata/uki.bin")
	if err != nil {
		s.t.Fatal(err)
	}
	h := &host{Host: forge.NewHost("sha256", log, time.Now().Add(-10*time.Minute)), id: fmt.Sprintf("00000000-0000-4000-8000-%012d", n)}
	h.MeasureMany(20)
	files := h.Launchers([3]string{"emulator", "/usr/bin/qemu-system-x86_64", "qemu"}, [3]string{"swtpm", "/usr/bin/swtpm", "swtpm"})
	h.Start(h.AddVM("web"), log, files...)
	h.Tick(time.Until(h.Now) * -1)
	authority, err := cakey.Open(s.cfg.CA.Certificate, s.cfg.CA.Key)
	if err != nil {
		s.t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		s.t.Fatal(err)
	}
	name, d := fmt.Sprintf("host-%d", n), sha256.Sum256([]byte(h.id))
	leaf, err := authority.Node(ca.Identity{Node: h.id, Name: name, EK: d[:], AK: h.TPM.AKName(), Bind: h.TPM.AKName()}, spki, time.Now())
	if err != nil {
		s.t.Fatal(err)
	}
	err = db.Do(context.Background(), func(tx *store.Tx) error {
		return tx.PutNode(context.Background(), fleet.Node{
			ID: h.id, Name: name, State: fleet.Active, EKDigest: hex.EncodeToString(d[:]), EKTrust: "manufacturer", Learns: true, AK: h.TPM.AK(), AKName: h.TPM.AKName(),
			BindName: h.TPM.AKName(), Bind: h.TPM.AK(), Certifier: h.TPM.AK(), Enrolled: time.Now(),
		})
	})
	if err != nil {
		s.t.Fatal(err)
	}
	h.client = s.client(tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key})
	return h
}

// round is one of the host with a Verifier at url: the tier, or an error. A
// nonce that the Verifier does not take any more is asked for anew.
func (h *host) round(url string) (string, error) {
	if h.next == nil {
		code, _, body := ask(h.client, "POST", url+"/v1/nodes/"+h.id+"/rounds", "", "")
		if code/100 != 2 {
			return "", fmt.Errorf("rounds: %d %s", code, body)
		}
		h.next = &nodeapi.Round{}
		if err := json.Unmarshal([]byte(body), h.next); err != nil {
			return "", err
		}
	}
	h.Tick(time.Since(h.Now))
	evidence := h.Evidence(h.next.Nonce, forge.Options{HaveBoot: h.next.HaveBoot, Have: h.next.Have})
	h.next = nil
	code, _, body := ask(h.client, "POST", url+"/v1/nodes/"+h.id+"/evidence", "", string(evidence), "Content-Type", report.MediaType)
	if code != 200 {
		return "", fmt.Errorf("evidence: %d %s", code, body)
	}
	var o struct {
		Tier string
		Next *nodeapi.Round
	}
	if err := json.Unmarshal([]byte(body), &o); err != nil {
		return "", err
	}
	h.next = o.Next
	return o.Tier, nil
}

func openStore(t testing.TB, dsn string) *store.Store {
	t.Helper()
	db, err := store.Open(context.Background(), dsn, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}
