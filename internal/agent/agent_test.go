package agent

import (
	"bytes"
	"context"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/nodeapi"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/vtpm/ekcert"
)

var randReader = cryptorand.Reader

func (m *machine) rounds() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.asked
}

// enrolled gives a machine's agent that is a node.
func enrolled(t *testing.T, m *machine, v *verifier) *Agent {
	t.Helper()
	a := newTestAgent(t, m, "")
	st, err := a.Enrol(t.Context(), v.url(), EnrolOptions{Token: v.token("", time.Hour)})
	if err != nil || st.State != Active {
		t.Fatal(st, err)
	}
	return a
}

// From a host's TPM and a join token to rounds, with a real TPM, whose EK
// certificate is by its manufacturer's CA.
func TestEnrolAndRounds(t *testing.T) {
	m := newMachine(t, "a")
	v := newVerifier(t)
	a := enrolled(t, m, v)
	st := a.Status()
	n := v.node(st.Node)
	if st.Name != "host-a" || n.State != fleet.Active || n.EKTrust != "manufacturer" || n.Serial == "" || n.ApprovedBy != "operator" || n.Problem != "" {
		t.Errorf("%+v", n)
	}
	if !v.audited("node.enrol", n.EKDigest) || !v.audited("node.certificate", n.Serial) {
		t.Error("the audit log does not know")
	}
	if _, err := v.store.CertifierCertificate(t.Context(), n.ID); err != nil || !n.Learns || n.Certified.IsZero() {
		t.Errorf("the certificates were not noted: %+v, %v", n, err)
	}
	// The certifier's chain came along, and is one that virt-trustd takes.
	chain := testkit.Must[[]*x509.Certificate](t)(ekcert.ParseChain(m.chain))
	if err := ekcert.VerifyChain(chain, m.tpm.CertifierPublic(), time.Now()); err != nil || !chain[1].Equal(v.ca.Certificate()) {
		t.Error(err)
	}
	// Both certificates hold the AK, for who has nothing else.
	for _, cert := range []*x509.Certificate{a.certificate().Leaf, chain[0]} {
		if id, err := ca.UntrustedIdentity(cert); err != nil || !bytes.Equal(id.AKPublic, n.AK) || len(n.AK) == 0 {
			t.Errorf("%+v, %v", id, err)
		}
	}
	goes(t, a, "three rounds", func() bool { return m.rounds() >= 3 })
	if s := testkit.Must[store.RoundState](t)(v.store.RoundState(t.Context(), st.Node)); s.Round == 0 {
		t.Errorf("%+v", s)
	}
	r, err := v.store.Result(t.Context(), st.Node)
	if err != nil || r.HostName != "host-a" {
		t.Errorf("%+v, %v", r, err)
	}
	if now := a.Status(); now.State != Active || now.LastTier == "" || now.LastRound.IsZero() || now.LastError != "" && !strings.Contains(now.LastError, "context") {
		t.Errorf("%+v", now)
	}
	// Nothing secret is on the disk.
	err = filepath.WalkDir(a.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte("PRIVATE")) || d.Name() != stateFile {
			t.Errorf("%s: %s", path, b)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// Who is refused, why, and what is to be seen of it.
func TestRefusedEnrolments(t *testing.T) {
	m, other := newMachine(t, "a"), newMachine(t, "b")
	v := newVerifier(t)
	enrol := func(m *machine, o EnrolOptions) error {
		t.Helper()
		_, err := newTestAgent(t, m, "").Enrol(t.Context(), v.url(), o)
		return err
	}
	unknown, _, _ := ca.NewToken(rng{}, v.ca.Pin())
	wantCode(t, enrol(m, EnrolOptions{Token: unknown}), ca.TokenWrong)
	wantCode(t, enrol(m, EnrolOptions{Token: v.token("", -time.Hour)}), ca.TokenExpired)
	wantCode(t, enrol(m, EnrolOptions{Token: v.token("host-z", time.Hour)}), ca.TokenOther)
	wantCode(t, enrol(m, EnrolOptions{Pin: v.ca.Pin().String()}), ca.TokenMissing)
	wantCode(t, enrol(m, EnrolOptions{Token: v.token("", time.Hour), Name: "no name"}), ca.NameBad)
	for _, bad := range []EnrolOptions{{}, {Token: "vtj1.x.y"}, {Pin: "x"}} {
		if err := enrol(m, bad); err == nil || codeOf(err) != "" {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	used := v.token("", time.Hour)
	a := newTestAgent(t, m, "")
	st := testkit.Must[Status](t)(a.Enrol(t.Context(), v.url(), EnrolOptions{Token: used}))
	wantCode(t, enrol(other, EnrolOptions{Token: used}), ca.TokenUsed)
	if !v.audited("node.refuse", string(ca.TokenUsed)) {
		t.Error("a used token that came again is not in the audit log")
	}

	shown := func(what string, code ca.Code) {
		t.Helper()
		if n := v.node(st.Node); !strings.HasPrefix(n.Problem, string(code)+":") || n.State != fleet.Active {
			t.Errorf("%s: %+v", what, n)
		}
		if !v.audited("node.refuse", string(code)) {
			t.Errorf("%s is not in the audit log", what)
		}
	}
	wantCode(t, enrol(other, EnrolOptions{Token: v.token("", time.Hour), Name: "host-a"}), ca.NameTaken)
	shown("another TPM under a known name", ca.NameTaken)
	wantCode(t, enrol(other, EnrolOptions{Token: v.token("", time.Hour), Name: "HOST-a"}), ca.NameTaken)
	wantCode(t, enrol(other, EnrolOptions{Token: v.token("", time.Hour), Name: "host-\u0430"}), ca.NameBad) // a Cyrillic one
	if again := testkit.Must[Status](t)(newTestAgent(t, m, "").Enrol(t.Context(), v.url(), EnrolOptions{Token: v.token("", time.Hour), Name: "Host-A"})); again.Node != st.Node {
		t.Errorf("another node: %+v", again)
	}
	wantCode(t, enrol(m, EnrolOptions{Token: v.token("", time.Hour), Name: "host-x"}), ca.EKKnown)
	shown("a known TPM under another name", ca.EKKnown)
	m.newKeys()
	wantCode(t, enrol(m, EnrolOptions{Token: v.token("", time.Hour)}), ca.AKSwapped)
	shown("a swapped AK", ca.AKSwapped)

	// Revoked, it comes back with no token, with one for any, and then with one that
	// names it.
	v.set(st.Node, fleet.Revoked)
	wantCode(t, enrol(m, EnrolOptions{Pin: v.ca.Pin().String()}), ca.NodeRevoked)
	wantCode(t, enrol(m, EnrolOptions{Token: v.token("", time.Hour)}), ca.NodeRevoked)
	if err := enrol(m, EnrolOptions{Token: v.token("host-a", time.Hour)}); err != nil {
		t.Errorf("the way back: %v", err)
	}
}

// A credential is opened by the TPM that it was made for, once, and in time.
func TestActivation(t *testing.T) {
	m, other := newMachine(t, "a"), newMachine(t, "b")
	v := newVerifier(t)
	c := rawClient(t, v, nil)
	i := testkit.Must[*Identity](t)(m.Identity(t.Context()))
	request := func(i *Identity) nodeapi.EnrolmentRequest {
		secret, _, _ := ca.ParseToken(v.token("", time.Hour))
		return nodeapi.EnrolmentRequest{
			Token: ca.SpellSecret(secret), Name: "host-a", EK: i.EK, EKCertificate: i.EKCertificate, AK: i.AK, Bind: i.Bind, BindAttest: i.BindAttest, BindSignature: i.BindSignature,
			Certifier: i.Certifier, CertifierAttest: i.CertifierAttest, CertifierSignature: i.CertifierSignature,
		}
	}
	begin := func(q nodeapi.EnrolmentRequest) (e nodeapi.EnrolmentChallenge) {
		t.Helper()
		if _, err := c.call(t.Context(), "/v1/enrolments", q, &e); err != nil {
			t.Fatal(err)
		}
		return e
	}
	finish := func(id string, a nodeapi.EnrolmentAnswer) (m nodeapi.Membership, err error) {
		_, err = c.call(t.Context(), "/v1/enrolments/"+id, a, &m)
		return m, err
	}
	key := testkit.Must[*tlsKey](t)(newKey())
	answer := func(m *machine, secret []byte) nodeapi.EnrolmentAnswer {
		attest, sig, err := m.QuoteKey(t.Context(), secret, key.spki)
		if err != nil {
			t.Fatal(err)
		}
		return nodeapi.EnrolmentAnswer{Secret: secret, SPKI: key.spki, Attest: attest, Signature: sig}
	}

	// Another TPM's EK with this one's AK: the credential opens nowhere.
	mixed := request(i)
	oi := testkit.Must[*Identity](t)(other.Identity(t.Context()))
	mixed.EK, mixed.EKCertificate = oi.EK, oi.EKCertificate
	e := begin(mixed)
	for _, host := range []*machine{m, other} {
		if secret, err := host.ActivateCredential(t.Context(), e.IDObject, e.EncryptedSecret); err == nil {
			t.Errorf("%s opens it: %x", host.name, secret)
		}
	}
	_, err := finish(e.ID, answer(m, make([]byte, 32)))
	wantCode(t, err, ca.Activation)
	_, err = finish(e.ID, answer(m, make([]byte, 32)))
	wantCode(t, err, ca.Enrolment) // one guess

	e = begin(request(i))
	secret := testkit.Must[[]byte](t)(m.ActivateCredential(t.Context(), e.IDObject, e.EncryptedSecret))
	_, err = finish(e.ID, answer(other, secret))
	wantCode(t, err, ca.KeyNotQuoted)

	e = begin(request(i))
	secret = testkit.Must[[]byte](t)(m.ActivateCredential(t.Context(), e.IDObject, e.EncryptedSecret))
	v.mu.Lock()
	v.skew = time.Hour
	v.mu.Unlock()
	_, err = finish(e.ID, answer(m, secret))
	wantCode(t, err, ca.Enrolment)
	v.mu.Lock()
	v.skew = 0
	v.mu.Unlock()

	e = begin(request(i))
	secret = testkit.Must[[]byte](t)(m.ActivateCredential(t.Context(), e.IDObject, e.EncryptedSecret))
	member, err := finish(e.ID, answer(m, secret))
	if err != nil || member.State != fleet.Active {
		t.Fatal(member, err)
	}
	// A nonce for a certificate is good once, and for its node.
	var ch nodeapi.Challenge
	if _, err := c.call(t.Context(), "/v1/nodes/"+member.Node+"/challenges", nil, &ch); err != nil {
		t.Fatal(err)
	}
	attest, sig, _ := m.QuoteKey(t.Context(), ch.Nonce, key.spki)
	q := nodeapi.CertificateRequest{Nonce: ch.Nonce, SPKI: key.spki, Attest: attest, Signature: sig}
	var got nodeapi.Membership
	if _, err := c.call(t.Context(), "/v1/nodes/"+member.Node+"/certificates", q, &got); err != nil || got.CertifierChain != "" {
		t.Errorf("%+v, %v", got, err)
	}
	_, err = c.call(t.Context(), "/v1/nodes/"+member.Node+"/certificates", q, &got)
	wantCode(t, err, ca.NonceBad)
	if _, err := c.call(t.Context(), "/v1/nodes/"+member.Node+"/challenges", nil, &ch); err != nil {
		t.Fatal(err)
	}
	q.Nonce = ch.Nonce // and the quote is over the one before
	_, err = c.call(t.Context(), "/v1/nodes/"+member.Node+"/certificates", q, &got)
	wantCode(t, err, ca.KeyNotQuoted)
}

// A TPM without a certificate waits for an operator, who sees its EK's digest; the
// agent asks until it is approved.
func TestPendingApproval(t *testing.T) {
	m := newMachine(t, "c")
	v := newVerifier(t)
	a := newTestAgent(t, m, "")
	st, err := a.Enrol(t.Context(), v.url(), EnrolOptions{Token: v.token("", time.Hour)})
	if err != nil || st.State != Pending {
		t.Fatal(st, err)
	}
	n := v.node(st.Node)
	if n.State != fleet.Pending || n.Problem != string(ca.EKNoCert) || n.EKTrust != "" || n.Serial != "" {
		t.Errorf("%+v", n)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	a.loop(ctx, func() {})
	cancel()
	if st := a.Status(); st.State != Pending || m.rounds() != 0 {
		t.Errorf("%+v, %d rounds", st, m.rounds())
	}
	v.set(st.Node, fleet.Active)
	goes(t, a, "a round", func() bool { return m.rounds() > 0 && a.Status().State == Active })
}

// The Verifier goes and comes back; the agent does; virt-trustd does.
func TestRestarts(t *testing.T) {
	m := newMachine(t, "a")
	v := newVerifier(t)
	a := enrolled(t, m, v)
	node := a.Status().Node
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { a.loop(ctx, func() {}); close(done) }()
	more := func(what string) {
		t.Helper()
		before := a.Status().LastRound
		for range 600 {
			if st := a.Status(); st.LastRound.After(before.Add(time.Millisecond)) && st.State == Active && st.LastError == "" {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Fatalf("%s: %+v", what, a.Status())
	}
	more("at first")
	v.stop()
	for range 500 {
		if a.Status().State == Unreachable {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if st := a.Status(); st.State != Unreachable || st.LastError == "" {
		t.Errorf("%+v", st)
	}
	v.start()
	more("after the Verifier's restart")
	m.mu.Lock()
	m.broken = errAway
	m.mu.Unlock()
	time.Sleep(200 * time.Millisecond)
	m.mu.Lock()
	m.broken = nil
	m.mu.Unlock()
	more("after virt-trustd's")
	cancel()
	<-done

	// A new process knows what the old one knew, but for the TLS key.
	again := newTestAgent(t, m, a.dir)
	goes(t, again, "a round", func() bool { return !again.Status().LastRound.IsZero() })
	if again.Status().Node != node {
		t.Errorf("%+v", again.Status())
	}
	// A new machine with the same TPM and no memory: the pin is enough.
	fresh := newTestAgent(t, m, "")
	st, err := fresh.Enrol(t.Context(), v.url(), EnrolOptions{Pin: v.ca.Pin().String()})
	if err != nil || st.Node != node || st.State != Active {
		t.Errorf("%+v, %v", st, err)
	}
	if err := fresh.Leave(t.Context()); err != nil || fresh.Status().State != NotEnrolled {
		t.Errorf("%+v, %v", fresh.Status(), err)
	}
	if m, err := load(fresh.dir); m != nil || err != nil {
		t.Error(m, err)
	}
}

func TestRevocation(t *testing.T) {
	m := newMachine(t, "a")
	v := newVerifier(t)
	a := enrolled(t, m, v)
	goes(t, a, "a round", func() bool { return m.rounds() > 0 })
	v.set(a.Status().Node, fleet.Revoked)
	goes(t, a, "the refusal", func() bool { return a.Status().State == Refused })
	if st := a.Status(); !strings.Contains(st.LastError, string(ca.NodeRevoked)) {
		t.Errorf("%+v", st)
	}
	before := m.rounds()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	a.loop(ctx, func() {})
	cancel()
	if m.rounds() > before {
		t.Error("it goes on")
	}
}

// A Verifier that was restored from a backup of before the node was enrolled: it
// knows its own certificate, and an operator has the last word.
func TestVerifierFromBackup(t *testing.T) {
	m := newMachine(t, "a")
	v := newVerifier(t)
	v.stop()
	backup := testkit.Must[[]byte](t)(os.ReadFile(filepath.Join(v.dir, "db")))
	v.start()
	a := enrolled(t, m, v)
	node := a.Status().Node
	goes(t, a, "a round", func() bool { return m.rounds() > 0 })
	v.stop()
	for _, f := range []string{"db-wal", "db-shm"} {
		os.Remove(filepath.Join(v.dir, f))
	}
	if err := os.WriteFile(filepath.Join(v.dir, "db"), backup, 0o600); err != nil {
		t.Fatal(err)
	}
	v.start()
	goes(t, a, "asks again", func() bool { return a.Status().State == Pending })
	if n := v.node(node); n.State != fleet.Pending || n.Problem != string(ca.NodeRestored) || n.Learns {
		t.Errorf("%+v", n)
	}
	v.set(node, fleet.Active)
	before := m.rounds()
	goes(t, a, "rounds again", func() bool { return m.rounds() > before+1 })
	if all, _, err := v.store.Values(t.Context(), store.ValueFilter{}, store.Page{}); err != nil || len(all) != 0 {
		t.Errorf("%d values were learned of a node that was here before, %v", len(all), err)
	}
	if a.Status().Node != node {
		t.Errorf("%+v", a.Status())
	}
}

// The agent takes the word of the pinned CA's Verifier alone.
func TestFalseVerifier(t *testing.T) {
	m := newMachine(t, "a")
	v, other := newVerifier(t), newVerifier(t)
	a := newTestAgent(t, m, "")
	if _, err := a.Enrol(t.Context(), other.url(), EnrolOptions{Token: v.token("", time.Hour)}); err == nil || !strings.Contains(err.Error(), "not the Verifier that the join token is from") {
		t.Errorf("%v", err)
	}
	for _, bad := range []string{"http://127.0.0.1:1", "https://", "https://x/y", "https://user@x", "https://x?y", "127.0.0.1:8443", ""} {
		if _, err := a.Enrol(t.Context(), bad, EnrolOptions{Token: v.token("", time.Hour)}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	// A node of the same CA that plays the Verifier.
	node := enrolled(t, m, v)
	cert := *node.certificate()
	cert.Certificate = append(cert.Certificate, v.ca.Certificate().Raw)
	l := testkit.Must[net.Listener](t)(tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}}))
	defer l.Close()
	go http.Serve(l, v.handler)
	if _, err := newTestAgent(t, m, "").Enrol(t.Context(), "https://"+l.Addr().String(), EnrolOptions{Token: v.token("", time.Hour)}); err == nil || codeOf(err) != "" {
		t.Errorf("a node is taken for the Verifier: %v", err)
	}
}

// verifyServer's own rules, past the host name.
func TestVerifyServer(t *testing.T) {
	v := newVerifier(t)
	key := testkit.Must[*tlsKey](t)(newKey())
	server := testkit.Must[*x509.Certificate](t)(v.ca.Server([]string{"verifier.test"}, key.spki, time.Now()))
	old := testkit.Must[*x509.Certificate](t)(v.ca.Server([]string{"verifier.test"}, key.spki, time.Now().Add(-30*24*time.Hour)))
	name := append([]byte{0, 0x0b}, make([]byte, 32)...)
	node := testkit.Must[*x509.Certificate](t)(v.ca.Node(ca.Identity{Node: "11111111-1111-4111-8111-111111111111", Name: "verifier.test", EK: make([]byte, 32), AK: name, Bind: name}, key.spki, time.Now()))
	root := v.ca.Certificate()
	other := newVerifier(t).ca
	foreign := testkit.Must[*x509.Certificate](t)(other.Server([]string{"verifier.test"}, key.spki, time.Now()))
	for name, c := range map[string]struct {
		chain []*x509.Certificate
		host  string
		ok    bool
	}{
		"right":          {[]*x509.Certificate{server, root}, "verifier.test", true},
		"another host":   {[]*x509.Certificate{server, root}, "other.test", false},
		"expired":        {[]*x509.Certificate{old, root}, "verifier.test", false},
		"a node":         {[]*x509.Certificate{node, root}, "verifier.test", false},
		"the CA itself":  {[]*x509.Certificate{root}, "verifier.test", false},
		"without the CA": {[]*x509.Certificate{server}, "verifier.test", false},
		"of another CA":  {[]*x509.Certificate{foreign, other.Certificate()}, "verifier.test", false},
		"beside the CA":  {[]*x509.Certificate{foreign, root}, "verifier.test", false},
		"nothing":        {nil, "verifier.test", false},
	} {
		if _, err := verifyServer(tls.ConnectionState{PeerCertificates: c.chain, ServerName: c.host}, v.ca.Pin()); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A Verifier that is away, or says no to everything, is not asked without end.
func TestPace(t *testing.T) {
	a := &Agent{pace: usualPace, changed: func(Status) {}}
	for a.tries = 1; a.tries < 100; a.tries++ {
		d := a.backoff()
		if d < time.Second || d > time.Minute || a.tries > 7 && d != time.Minute {
			t.Fatalf("try %d: %s", a.tries, d)
		}
		if j := jitter(d); j < d/2 || j > d {
			t.Fatalf("%s of %s", j, d)
		}
	}
	// Nor do those whom it sent away at one moment come back at one moment.
	a.log = logrus.NewEntry(logrus.New())
	a.log.Logger.SetOutput(io.Discard)
	busy := &answerError{Problem: nodeapi.Problem{Code: ca.Failed}, after: 30 * time.Second}
	least, most := time.Hour, time.Duration(0)
	for range 100 {
		a.tries = 0
		wait := a.after(t.Context(), busy)
		least, most = min(least, wait), max(most, wait)
	}
	if least < 30*time.Second || most > time.Minute || most-least < 5*time.Second {
		t.Errorf("sent away for 30 s, nodes come back after %s to %s", least, most)
	}
	for _, c := range []struct {
		seconds float64
		want    time.Duration
	}{{-1, 100 * time.Millisecond}, {0, 100 * time.Millisecond}, {60, time.Minute}, {1e300, time.Hour}} {
		if got := interval(&nodeapi.Round{Interval: c.seconds}); got != c.want {
			t.Errorf("%v: %s", c.seconds, got)
		}
	}
}

func FuzzMembership(f *testing.F) {
	f.Add([]byte(`{"url":"https://v.example:8443","ca":"","node":"11111111-1111-4111-8111-111111111111","name":"a"}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := parseMembership(b); err == nil && (m.ca == nil || !ca.ValidNode(m.Node)) {
			t.Errorf("%+v", m)
		}
	})
}

func FuzzParseURL(f *testing.F) {
	for _, s := range []string{"https://v.example:8443", "https://v.example/", "https://[::1]:1", "http://x", "https://u:p@x", "://"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if u, err := parseURL(s); err == nil && (u.Scheme != "https" || u.Path != "" || u.User != nil || u.RawQuery != "") {
			t.Errorf("%q is %+v", s, u)
		}
	})
}
