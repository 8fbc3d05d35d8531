package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"virt-trust/internal/evidence/report"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/ca"
)

const token = "a-token-of-some-length"

// pullAPI is the pull API of a machine, open for who has the token, and for the
// nodes of its Verifier.
type pullAPI struct {
	t       testing.TB
	address string
	tls     *tls.Config // of a client
}

func openPull(t testing.TB, v *verifier, a *Agent, b pullBounds) *pullAPI {
	t.Helper()
	digest := sha256.Sum256([]byte(token))
	clientCA := filepath.Join(testkit.Folder(t), "ca.pem")
	if err := os.WriteFile(clientCA, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: v.ca.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	probe := testkit.Must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	address := probe.Addr().String()
	probe.Close()
	c := config.AgentPull{Listen: address, ClientCA: clientCA, Tokens: []string{hex.EncodeToString(digest[:])}, PerMinute: 12}
	p := testkit.Must[*puller](t)(newPuller(c, a.host, quiet()))
	p.bounds = b
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.serve(ctx, c, a) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return &pullAPI{t, address, &tls.Config{RootCAs: v.ca.Pool(), InsecureSkipVerify: true, VerifyConnection: func(s tls.ConnectionState) error {
		id, err := ca.UntrustedIdentity(s.PeerCertificates[0])
		if err == nil && id.Node != a.Status().Node {
			err = errors.New("another node")
		}
		return err
	}}}
}

// ask asks until there is an answer.
func (s *pullAPI) ask(certs []tls.Certificate, bearer string, body []byte) (int, []byte) {
	s.t.Helper()
	tc := s.tls.Clone()
	tc.Certificates = certs
	c := http.Client{Transport: &http.Transport{TLSClientConfig: tc, DisableKeepAlives: true}, Timeout: 10 * time.Second}
	for i := 0; ; i++ {
		q := testkit.Must[*http.Request](s.t)(http.NewRequest(http.MethodPost, "https://"+s.address+"/v1/evidence", bytes.NewReader(body)))
		if bearer != "" {
			q.Header.Set("Authorization", "Bearer "+bearer)
		}
		r, err := c.Do(q)
		if err != nil && i < 100 {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if err != nil {
			s.t.Fatal(err)
		}
		defer r.Body.Close()
		return r.StatusCode, testkit.Must[[]byte](s.t)(io.ReadAll(r.Body))
	}
}

// Third parties ask with a nonce of theirs, if they may.
func TestPull(t *testing.T) {
	m := newMachine(t, "a")
	v := newVerifier(t)
	a := enrolled(t, m, v)
	s := openPull(t, v, a, usualBounds)
	nonce := bytes.Repeat([]byte{9}, 32)
	body := testkit.Must[[]byte](t)(json.Marshal(EvidenceRequest{nonce}))
	for name, c := range map[string]struct {
		bearer string
		body   []byte
		want   int
	}{
		"nobody":      {"", body, http.StatusUnauthorized},
		"wrong token": {"another-token-of-some-length", body, http.StatusUnauthorized},
		"short token": {"a", body, http.StatusUnauthorized},
		"right token": {token, body, http.StatusOK},
	} {
		if got, b := s.ask(nil, c.bearer, c.body); got != c.want {
			t.Errorf("%s: %d %s", name, got, b)
		}
	}
	before := m.rounds()
	status, b := s.ask([]tls.Certificate{*a.certificate()}, "", body)
	if status != http.StatusOK {
		t.Fatalf("mutual TLS: %d %s", status, b)
	}
	e, err := report.UntrustedParse(b)
	if err != nil || !bytes.Equal(e.Nonce, nonce) || m.rounds() != before+1 || m.have.Boot != "" {
		t.Errorf("%v", err)
	}
	for name, bad := range map[string][]byte{"nothing": nil, "short": []byte(`{"nonce":"AAAA"}`), "long": bytes.Repeat([]byte("x"), 8<<10)} {
		got, b := s.ask(nil, token, bad)
		if got != http.StatusBadRequest && got != http.StatusTooManyRequests {
			t.Errorf("%s: %d %s", name, got, b)
		}
	}
	for range 20 {
		if status, _ = s.ask(nil, token, body); status == http.StatusTooManyRequests {
			break
		}
	}
	if status != http.StatusTooManyRequests {
		t.Error("the TPM may be asked without end")
	}
}

// connect makes n connections, each of which has sent what is said: nothing at
// all, or something in TLS.
func (s *pullAPI) connect(n int, inTLS bool, said string) (all []net.Conn) {
	s.t.Helper()
	for range n {
		c := testkit.Must[net.Conn](s.t)(net.Dial("tcp", s.address))
		s.t.Cleanup(func() { c.Close() })
		if inTLS {
			c = tls.Client(c, s.tls)
			if _, err := io.WriteString(c, said); err != nil {
				s.t.Fatal(err)
			}
		}
		all = append(all, c)
	}
	return all
}

// Those who say nothing, and those who are slow, hold no more than is for them,
// and not for long; neither keeps the rounds of the agent's own Verifier from
// going on.
func TestPullIsBounded(t *testing.T) {
	m := newMachine(t, "a")
	v := newVerifier(t)
	a := enrolled(t, m, v)
	b := pullBounds{connections: 8, header: 400 * time.Millisecond, body: 2 * time.Second, answer: time.Second, idle: time.Second}
	s := openPull(t, v, a, b)
	body := testkit.Must[[]byte](t)(json.Marshal(EvidenceRequest{bytes.Repeat([]byte{9}, 32)}))
	s.ask(nil, "", body) // it listens

	// Each kind of slow client, whose connection is ended.
	for _, said := range []string{"", "POST /v1/evidence HTTP/1.1\r\nHost: x\r\nX-", "POST /v1/evidence HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + token + "\r\nContent-Length: 100\r\n\r\n{"} {
		for _, c := range s.connect(2, true, said) {
			c.SetReadDeadline(time.Now().Add(20 * time.Second))
			if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%q: %v", said, err)
			}
		}
	}

	idle := s.connect(b.connections, false, "")
	one := s.connect(1, false, "")[0]
	one.SetDeadline(time.Now().Add(b.header / 2))
	if err := tls.Client(one, s.tls).Handshake(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one connection more than there may be: %v", err)
	}
	for _, c := range idle {
		c.Close()
	}
	s.connect(20*b.connections, false, "")
	before := m.rounds()
	goes(t, a, "three rounds beside idle connections", func() bool { return m.rounds() >= before+3 })
	if got, said := s.ask(nil, token, body); got != http.StatusOK {
		t.Errorf("after them: %d %s", got, said)
	}
}

func TestPullNeedsSomebody(t *testing.T) {
	if _, err := newPuller(config.AgentPull{Listen: "x", PerMinute: 1}, nil, quiet()); err == nil {
		t.Error("anybody may ask")
	}
	if _, err := pullTLS(config.AgentPull{ClientCA: filepath.Join(testkit.Folder(t), "none")}, nil); err == nil {
		t.Error("a client CA that is not there")
	}
	c := testkit.Must[*tls.Config](t)(pullTLS(config.AgentPull{}, func() *tls.Certificate { return nil }))
	if _, err := c.GetCertificate(nil); err == nil {
		t.Error("a node without a certificate")
	}
}
