package rounds

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/sirupsen/logrus"

	"virt-trust/internal/appraise"
	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/nodeapi"
	"virt-trust/internal/verifier/store"
)

func bootLog(t testing.TB, name string) []byte {
	t.Helper()
	return testkit.Must[[]byte](t)(os.ReadFile("../../evidence/eventlog/testdata/" + name + ".bin"))
}

// bench is a Verifier: real store, real TLS, one CA.
type bench struct {
	t       testing.TB
	dsn     string
	store   *store.Store
	ca      *ca.Authority
	h       *Handler
	server  *http.Server
	address string
	clock   testkit.Clock
	policy  *appraise.Policy
	options func(*Options)
	open    int // challenges that one may have open; 0: 1000
}

func newBench(t testing.TB, options func(*Options)) *bench {
	t.Helper()
	key := testkit.Must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	root := testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(testkit.Must[[]byte](t)(ca.Root(key, rand.Reader, "test CA", time.Now()))))
	b := &bench{t: t, dsn: "sqlite:" + filepath.Join(t.TempDir(), "db"), ca: testkit.Must[*ca.Authority](t)(ca.New(root, key, rand.Reader)), policy: appraise.DefaultPolicy(), options: options}
	b.start()
	t.Cleanup(b.stop)
	return b
}

func (b *bench) start() {
	b.t.Helper()
	b.store = testkit.Must[*store.Store](b.t)(store.Open(context.Background(), b.dsn, store.Options{Now: b.clock.Now, Challenge: store.ChallengeLimits{PerSource: cmp.Or(b.open, 1000), Total: 10_000}}))
	l := logrus.New()
	l.Out = io.Discard
	if testing.Verbose() {
		l.Out = os.Stderr
	}
	o := Options{
		Store: b.store, CA: b.ca, Manufacturers: testkit.Must[*ca.Manufacturers](b.t)(ca.NewManufacturers(nil)), Log: logrus.NewEntry(l), Now: b.clock.Now, Anonymous: 100_000,
		Policy: func(context.Context) (Policy, error) { return Policy{Appraisal: b.policy, Learn: true}, nil },
	}
	if b.options != nil {
		b.options(&o)
	}
	b.h = testkit.Must[*Handler](b.t)(New(o))
	listener := testkit.Must[net.Listener](b.t)(net.Listen("tcp", "127.0.0.1:0"))
	b.address = "https://" + listener.Addr().String()
	b.server = &http.Server{
		Handler: b.h, TLSConfig: TLSConfig(b.ca, []string{"127.0.0.1"}, time.Now), ReadTimeout: 2 * time.Second, ReadHeaderTimeout: time.Second,
		ErrorLog: stdlog.New(io.Discard, "", 0),
	}
	go b.server.ServeTLS(listener, "", "")
}

func (b *bench) stop() {
	if b.server != nil {
		b.server.Close()
		b.store.Close()
		b.server = nil
	}
}

func (b *bench) do(f func(context.Context, *store.Tx) error) {
	b.t.Helper()
	if err := b.store.Do(context.Background(), func(tx *store.Tx) error { return f(context.Background(), tx) }); err != nil {
		b.t.Fatal(err)
	}
}

// client gives an HTTP client with a node's certificate, or none.
func (b *bench) client(cert *tls.Certificate) *http.Client {
	c := &tls.Config{RootCAs: b.ca.Pool()}
	if cert != nil {
		c.Certificates = []tls.Certificate{*cert}
	}
	t := &http.Transport{TLSClientConfig: c, DisableCompression: true}
	b.t.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t, Timeout: 30 * time.Second}
}

// member is a node: a host in software, with a certificate.
type member struct {
	b    *bench
	id   string
	host *forge.Host
	http *http.Client
	cert *tls.Certificate
}

var firstBind = sync.OnceValue(func() []byte {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k.N.Bytes()
})

// join makes a host a node, as an enrolment would.
func (b *bench) join(name string, host *forge.Host) *member {
	b.t.Helper()
	id := testkit.Must[string](b.t)(newID(rand.Reader))
	ek := sha256.Sum256([]byte("EK of host " + name))
	n := fleet.Node{
		ID: id, Name: name, State: fleet.Active, EKDigest: hex.EncodeToString(ek[:]), EKTrust: "manufacturer",
		AK: host.TPM.AK(), AKName: host.TPM.AKName(), BindName: host.TPM.AKName(), Bind: firstBind()[:64], Certifier: certifierArea(b.t), Enrolled: b.clock.Now(), Learns: true,
	}
	b.do(func(ctx context.Context, tx *store.Tx) error { return tx.PutNode(ctx, n) })
	key := testkit.Must[*ecdsa.PrivateKey](b.t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	spki := testkit.Must[[]byte](b.t)(x509.MarshalPKIXPublicKey(key.Public()))
	cert := testkit.Must[*x509.Certificate](b.t)(b.ca.Node(ca.Identity{Node: id, Name: name, EK: ek[:], AK: n.AKName, Bind: n.BindName}, spki, time.Now()))
	m := &member{b: b, id: id, host: host, cert: &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}}
	m.http = b.client(m.cert)
	return m
}

// newHost is a host with VMs of these names that run.
func (b *bench) newHost(vms ...string) *forge.Host {
	h := forge.NewHost("sha256", bootLog(b.t, "uki"), b.clock.Now().Add(-10*time.Minute))
	h.MeasureMany(20)
	n := h.Launchers([3]string{"emulator", "/usr/bin/qemu-system-x86_64", "qemu"}, [3]string{"swtpm", "/usr/bin/swtpm", "swtpm"})
	for _, name := range vms {
		h.Start(h.AddVM(name), bootLog(b.t, "sd"), n...)
	}
	h.Tick(5 * time.Minute)
	h.Now = b.clock.Now()
	return h
}

// answer is what came back.
type answer struct {
	status  int
	body    []byte
	problem nodeapi.Problem
}

func (b *bench) post(c *http.Client, path, kind, encoding string, body []byte) answer {
	b.t.Helper()
	q := testkit.Must[*http.Request](b.t)(http.NewRequest(http.MethodPost, b.address+path, bytes.NewReader(body)))
	q.Header.Set("Content-Type", kind)
	if encoding != "" {
		q.Header.Set("Content-Encoding", encoding)
	}
	r, err := c.Do(q)
	if err != nil {
		return answer{problem: nodeapi.Problem{Detail: err.Error()}}
	}
	defer r.Body.Close()
	a := answer{status: r.StatusCode}
	a.body, _ = io.ReadAll(r.Body)
	if r.Header.Get("Content-Type") == nodeapi.ProblemType {
		if err := json.Unmarshal(a.body, &a.problem); err != nil || a.problem.Status != a.status {
			b.t.Errorf("problem %s: %v", a.body, err)
		}
	}
	return a
}

func (m *member) next() *nodeapi.Round {
	m.b.t.Helper()
	a := m.b.post(m.http, "/v1/nodes/"+m.id+"/rounds", "application/json", "", []byte("{}"))
	var r nodeapi.Round
	if a.status != http.StatusCreated || json.Unmarshal(a.body, &r) != nil {
		m.b.t.Fatalf("no nonce: %d %s", a.status, a.body)
	}
	return &r
}

func (m *member) evidence(r *nodeapi.Round, o forge.Options) []byte {
	o.HaveBoot, o.Have = r.HaveBoot, r.Have
	m.host.Now = m.b.clock.Now()
	m.host.TPM.Clock += 1000
	return m.host.Evidence(r.Nonce, o)
}

func (m *member) send(evidence []byte) answer {
	m.b.t.Helper()
	return m.b.post(m.http, "/v1/nodes/"+m.id+"/evidence", report.MediaType, "", evidence)
}

// round is one that the Verifier takes.
func (m *member) round(o forge.Options) *nodeapi.Outcome {
	m.b.t.Helper()
	return m.outcome(m.send(m.evidence(m.next(), o)))
}

func (m *member) outcome(a answer) *nodeapi.Outcome {
	m.b.t.Helper()
	var out nodeapi.Outcome
	if a.status != http.StatusOK || json.Unmarshal(a.body, &out) != nil {
		m.b.t.Fatalf("%d %s", a.status, a.body)
	}
	return &out
}

// result is what counts now.
func (m *member) result() *appraise.Result {
	m.b.t.Helper()
	return testkit.Must[*appraise.Result](m.b.t)(m.b.store.Result(context.Background(), m.id))
}

func (m *member) vm(name string) appraise.VM {
	m.b.t.Helper()
	r := m.result()
	i := slices.IndexFunc(r.VMs, func(v appraise.VM) bool { return v.Name == name })
	if i < 0 {
		m.b.t.Fatalf("no VM %s in %+v", name, r.VMs)
	}
	return r.VMs[i]
}

func hasCode(rs []appraise.Reason, code string) bool {
	return slices.ContainsFunc(rs, func(r appraise.Reason) bool { return r.Code == code })
}

func (b *bench) want(what string, a answer, status int, code ca.Code) {
	b.t.Helper()
	if a.status != status || a.problem.Code != code {
		b.t.Errorf("%s: %d %s %.300s (%s), want %d %s", what, a.status, a.problem.Code, a.body, a.problem.Detail, status, code)
	}
}

func pack(t testing.TB, b []byte) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	if _, err := z.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func spkiOf(t testing.TB) []byte {
	t.Helper()
	return testkit.Must[[]byte](t)(x509.MarshalPKIXPublicKey(testkit.Must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).Public()))
}

// certifierArea is the public area of a certifier.
func certifierArea(t testing.TB) []byte {
	t.Helper()
	p := testkit.Must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).PublicKey
	return tpm2.Marshal(tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, SignEncrypt: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme:  tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
			CurveID: tpm2.TPMECCNistP256,
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: p.X.FillBytes(make([]byte, 32))}, Y: tpm2.TPM2BECCParameter{Buffer: p.Y.FillBytes(make([]byte, 32))},
		}),
	})
}
