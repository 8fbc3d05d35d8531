package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/appraise"
	"virt-trust/internal/bus"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/hosttpm/tpmtest"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/cakey"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/rounds"
	"virt-trust/internal/verifier/store"
)

// foundry made three TPMs, each with an EK certificate by one manufacturer
// (swtpm_setup's own local CA) and with a host's keys. Tests work on copies.
var foundry struct {
	once sync.Once
	dir  string
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if foundry.dir != "" {
		os.RemoveAll(foundry.dir)
	}
	os.Exit(code)
}

const setupConf = `create_certs_tool = %[2]s
create_certs_tool_config = %[1]s/ca.conf
create_certs_tool_options = %[1]s/ca.options
`

const caConf = `statedir = %[1]s/ca
signingkey = %[1]s/ca/signkey.pem
issuercert = %[1]s/ca/issuercert.pem
certserial = %[1]s/ca/certserial
`

func manufacture(dir string) error {
	tool, err := exec.LookPath("swtpm_localca")
	if err != nil {
		return err
	}
	for name, text := range map[string]string{
		"setup.conf": fmt.Sprintf(setupConf, dir, tool), "ca.conf": fmt.Sprintf(caConf, dir),
		"ca.options": "--platform-manufacturer Test\n--platform-version 1\n--platform-model Model\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "ca"), 0o700); err != nil {
		return err
	}
	for _, name := range []string{"a", "b", "c"} {
		state := filepath.Join(dir, name, "tpm")
		if err := os.MkdirAll(state, 0o700); err != nil {
			return err
		}
		args := []string{"--tpm2", "--tpm-state", state, "--create-ek-cert", "--config", filepath.Join(dir, "setup.conf"), "--not-overwrite"}
		if name == "c" { // a TPM without a certificate
			args = []string{"--tpm2", "--tpm-state", state, "--config", filepath.Join(dir, "setup.conf"), "--not-overwrite"}
		}
		if out, err := exec.Command("swtpm_setup", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
	}
	return nil
}

// machine is a host: a TPM with keys, and what its virt-trustd would say.
type machine struct {
	t     testing.TB
	dir   string
	name  string
	swtpm *tpmtest.TPM
	tpm   *hosttpm.Host

	mu     sync.Mutex
	report *report.Report // nil for a plain one
	broken error          // virt-trustd is away
	chain  []byte         // of the certifier
	asked  int            // for evidence
	have   bus.Have       // of the last
	change func(*report.Evidence)
}

// newMachine gives a copy of TPM "a", "b" or "c".
func newMachine(t testing.TB, which string) *machine {
	t.Helper()
	testkit.Need(t, "swtpm", "swtpm_setup", "swtpm_localca")
	foundry.once.Do(func() {
		if foundry.dir, foundry.err = os.MkdirTemp("", "vtf"); foundry.err == nil {
			foundry.err = manufacture(foundry.dir)
		}
		for _, name := range []string{"a", "b", "c"} {
			if foundry.err == nil {
				m := &machine{t: t, dir: filepath.Join(foundry.dir, name), name: name}
				m.start()
				foundry.err = m.tpm.Provision(t.Context())
				m.stop()
			}
		}
	})
	if foundry.err != nil {
		t.Fatal(foundry.err)
	}
	dir := testkit.Folder(t)
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(foundry.dir, which))); err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, dir: dir, name: "host-" + which}
	m.start()
	t.Cleanup(m.stop)
	return m
}

func (m *machine) start() {
	m.t.Helper()
	if m.swtpm == nil {
		m.swtpm = tpmtest.In(m.t, filepath.Join(m.dir, "tpm"))
	} else {
		m.swtpm.Start()
	}
	m.openTPM("keys")
}

func (m *machine) openTPM(keys string) {
	m.t.Helper()
	m.tpm = testkit.Must[*hosttpm.Host](m.t)(hosttpm.Open(hosttpm.Config{Device: m.swtpm.Socket, Dir: filepath.Join(m.dir, keys), PCRs: []uint{0, 7}, Bank: "sha256"}))
}

func (m *machine) stop() {
	m.tpm.Close()
	m.swtpm.Stop()
}

// newKeys has the TPM make other keys, as after virt-trust was installed anew.
func (m *machine) newKeys() {
	m.t.Helper()
	m.tpm.Close()
	m.openTPM("keys2")
	if err := m.tpm.Provision(m.t.Context()); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) trouble() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.broken
}

func (m *machine) Identity(ctx context.Context) (*Identity, error) {
	if err := m.trouble(); err != nil {
		return nil, err
	}
	id, err := m.tpm.Identity(ctx)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	i := &Identity{
		EK: id.EK, EKCertificate: id.EKCertificate, AK: id.AK, Bind: id.Bind, Certifier: id.Certifier,
		BindAttest: id.BindAttest, BindSignature: id.BindSignature, CertifierAttest: id.CertifierAttest, CertifierSignature: id.CertifierSignature,
		HostName: m.name,
	}
	if b, _ := pem.Decode(m.chain); b != nil {
		i.CertifierCertificate = b.Bytes
	}
	return i, nil
}

func (m *machine) ActivateCredential(ctx context.Context, idObject, encryptedSecret []byte) ([]byte, error) {
	return m.tpm.ActivateCredential(ctx, idObject, encryptedSecret)
}

var quoted = []uint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}

func (m *machine) QuoteKey(ctx context.Context, nonce, spki []byte) (attest, signature []byte, err error) {
	q, err := m.tpm.Quote(ctx, ca.NodeKeyQualifyingData(nonce, spki), "sha256", quoted)
	if err != nil {
		return nil, nil, err
	}
	return q.Attest, q.Signature, nil
}

func (m *machine) SetCertifierCertificate(_ context.Context, chain []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.chain = chain
	return nil
}

func (m *machine) Evidence(ctx context.Context, nonce []byte, have bus.Have) ([]byte, error) {
	if err := m.trouble(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	m.asked++
	m.have = have
	r := m.report
	change := m.change
	m.mu.Unlock()
	if r == nil {
		r = &report.Report{
			Version: report.Version, BootID: "1c1a2b3c-0000-4000-8000-000000000001",
			Host: report.Host{Name: m.name, Software: "test", Mode: "enforce", ListState: "readable", LaunchPCR: 15, LaunchLog: "replays", Kernel: "6.1"},
		}
	}
	r.AK, r.Time = m.tpm.AKName(), time.Now().UnixMicro()
	b, err := r.Encode()
	if err != nil {
		return nil, err
	}
	q, err := m.tpm.Quote(ctx, report.QualifyingData(nonce, b), "sha256", quoted)
	if err != nil {
		return nil, err
	}
	e := &report.Evidence{
		Version: report.Version, Nonce: nonce, Report: b, Quote: report.Quote{Attest: q.Attest, Signature: q.Signature},
		PCRs: []report.Bank{{Algorithm: "sha256", Values: report.ValuesOf(q.State.PCRs)}}, Logs: []report.Log{{Kind: report.EventLog, Problem: "none here"}},
	}
	if change != nil {
		change(e)
	}
	return e.Encode()
}

// verifier is a Verifier with a real store and a real TLS server.
type verifier struct {
	t       testing.TB
	dir     string
	db      string
	store   *store.Store
	ca      *ca.Authority
	handler *rounds.Handler
	server  *http.Server
	address string
	rules   ca.Rules
	roots   []*x509.Certificate
	log     *logrus.Entry

	mu   sync.Mutex
	skew time.Duration // of its clock
}

func newVerifier(t testing.TB) *verifier {
	t.Helper()
	v := &verifier{t: t, dir: testkit.Folder(t), log: quiet()}
	v.db = "sqlite:" + filepath.Join(v.dir, "db")
	if err := cakey.Init(filepath.Join(v.dir, "ca.pem"), filepath.Join(v.dir, "key.pem"), "test CA", time.Now()); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(foundry.dir, "ca", "swtpm-localca-rootca-cert.pem")); err == nil {
		block, _ := pem.Decode(b)
		v.roots = append(v.roots, testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(block.Bytes)))
	}
	if b, err := os.ReadFile(filepath.Join(foundry.dir, "ca", "issuercert.pem")); err == nil {
		block, _ := pem.Decode(b)
		v.roots = append(v.roots, testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(block.Bytes)))
	}
	v.start()
	t.Cleanup(v.stop)
	return v
}

func quiet() *logrus.Entry {
	l := logrus.New()
	l.Out = io.Discard
	if testing.Verbose() {
		l.Out = os.Stderr
		l.Level = logrus.InfoLevel
	}
	return logrus.NewEntry(l)
}

func (v *verifier) now() time.Time {
	v.mu.Lock()
	defer v.mu.Unlock()
	return time.Now().Add(v.skew)
}

// start brings the Verifier up, at the address that it had.
func (v *verifier) start() {
	v.t.Helper()
	v.store = testkit.Must[*store.Store](v.t)(store.Open(context.Background(), v.db, store.Options{Now: v.now, Challenge: store.ChallengeLimits{PerSource: 1000, Total: 10000}}))
	v.ca = testkit.Must[*ca.Authority](v.t)(cakey.Open(filepath.Join(v.dir, "ca.pem"), filepath.Join(v.dir, "key.pem")))
	policy := appraise.DefaultPolicy()
	v.handler = testkit.Must[*rounds.Handler](v.t)(rounds.New(rounds.Options{
		Store: v.store, CA: v.ca, Manufacturers: testkit.Must[*ca.Manufacturers](v.t)(ca.NewManufacturers(v.roots)), Rules: v.rules, Log: v.log,
		Policy: func(context.Context) (rounds.Policy, error) {
			return rounds.Policy{Appraisal: policy, Learn: true}, nil
		},
		Interval: time.Second, Anonymous: 100_000, Now: v.now,
	}))
	at := v.address
	if at == "" {
		at = "127.0.0.1:0"
	}
	var l net.Listener
	var err error
	for range 200 { // the port may not be free at once
		if l, err = net.Listen("tcp", at); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		v.t.Fatal(err)
	}
	v.address = l.Addr().String()
	v.server = &http.Server{
		Handler: v.handler, TLSConfig: rounds.TLSConfig(v.ca, []string{"127.0.0.1", "verifier.test"}, time.Now),
		ReadTimeout: 3 * time.Second, ErrorLog: stdlog.New(io.Discard, "", 0),
	}
	go v.server.ServeTLS(l, "", "")
}

func (v *verifier) stop() {
	if v.server != nil {
		v.server.Close()
		v.store.Close()
		v.server = nil
	}
}

func (v *verifier) url() string { return "https://" + v.address }

func (v *verifier) do(f func(ctx context.Context, tx *store.Tx) error) {
	v.t.Helper()
	if err := v.store.Do(context.Background(), func(tx *store.Tx) error { return f(context.Background(), tx) }); err != nil {
		v.t.Fatal(err)
	}
}

// token makes a join token; name is "" for any node.
func (v *verifier) token(name string, expires time.Duration) string {
	v.t.Helper()
	token, digest, err := ca.NewToken(rng{}, v.ca.Pin())
	if err != nil {
		v.t.Fatal(err)
	}
	v.do(func(ctx context.Context, tx *store.Tx) error {
		return tx.AddToken(ctx, fleet.JoinToken{Digest: digest, Name: name, Expires: v.now().Add(expires), By: "operator", Created: v.now()})
	})
	return token
}

func (v *verifier) node(id string) fleet.Node {
	v.t.Helper()
	return testkit.Must[fleet.Node](v.t)(v.store.Node(context.Background(), id))
}

// set changes a node as an operator would.
func (v *verifier) set(id string, state fleet.NodeState) {
	v.t.Helper()
	v.do(func(ctx context.Context, tx *store.Tx) error {
		n, err := tx.Node(ctx, id)
		if err != nil {
			return err
		}
		n.State = state
		_, err = tx.UpdateNode(ctx, n)
		return err
	})
}

// audited reports whether the audit log has an action with a word in its detail.
func (v *verifier) audited(action, word string) bool {
	v.t.Helper()
	all, _, err := v.store.AuditLog(context.Background(), store.AuditFilter{}, store.Page{Limit: 1000})
	if err != nil {
		v.t.Fatal(err)
	}
	return slices.ContainsFunc(all, func(e fleet.AuditEntry) bool { return e.Action == action && strings.Contains(e.Detail, word) })
}

var hasty = pace{least: 10 * time.Millisecond, most: 50 * time.Millisecond, approval: 20 * time.Millisecond, refused: 50 * time.Millisecond}

// newTestAgent makes the agent of a machine; dir is "" for a new one.
func newTestAgent(t testing.TB, m *machine, dir string) *Agent {
	t.Helper()
	if dir == "" {
		dir = testkit.Folder(t)
	}
	return testkit.Must[*Agent](t)(newAgent(dir, m, quiet(), hasty))
}

// goes has the loop run until the condition holds.
func goes(t testing.TB, a *Agent, what string, until func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	done := make(chan struct{})
	go func() { a.loop(ctx, func() {}); close(done) }()
	defer func() { cancel(); <-done }()
	for ctx.Err() == nil {
		if until() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("%s: never; %+v", what, a.Status())
}

func wantCode(t testing.TB, err error, code ca.Code) {
	t.Helper()
	if got := codeOf(err); got != code {
		t.Errorf("code %q (%v), want %q", got, err, code)
	}
}

// rawClient speaks to the Verifier past the agent, with a certificate or none.
func rawClient(t testing.TB, v *verifier, cert *tls.Certificate) *client {
	t.Helper()
	c := newClient(testkit.Must[*url.URL](t)(parseURL(v.url())), v.ca.Pin(), cert)
	t.Cleanup(c.close)
	return c
}

type rng struct{}

func (rng) Read(b []byte) (int, error) { return io.ReadFull(randReader, b) }

var errAway = errors.New("virt-trustd is away")

var _ http.Handler = (*rounds.Handler)(nil)
