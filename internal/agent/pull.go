package agent

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"

	"virt-trust/internal/bus"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/platform/listen"
)

// EvidenceRequest is the body of POST /v1/evidence: a third party's nonce of 16 to
// 64 bytes. The answer is Evidence for it, whole.
type EvidenceRequest struct {
	Nonce []byte `json:"nonce"`
}

const maxPullBody = 4 << 10

// puller is the API for third parties. Who has the right client certificate or
// token may ask; all together no more often than the TPM should be bothered.
type puller struct {
	host   Host
	tokens [][]byte // SHA-256
	mutual bool
	limit  *rate.Limiter
	slot   chan struct{}
	bounds pullBounds
	log    *logrus.Entry
}

// pullBounds are what one who asks can hold, and for how long. Each time ends one
// kind of slow client: header counts from the connection's start, TLS included,
// body to the end of the request, answer from when there is one.
type pullBounds struct {
	connections                int
	header, body, answer, idle time.Duration
}

var usualBounds = pullBounds{connections: 64, header: 5 * time.Second, body: 10 * time.Second, answer: 30 * time.Second, idle: 10 * time.Second}

// evidenceTime bounds the wait for virt-trustd.
const evidenceTime = 2 * time.Minute

func newPuller(c config.AgentPull, host Host, log *logrus.Entry) (*puller, error) {
	p := &puller{
		host: host, mutual: c.ClientCA != "", log: log, slot: make(chan struct{}, 1), bounds: usualBounds,
		limit: rate.NewLimiter(rate.Limit(float64(c.PerMinute)/60), max(c.PerMinute/4, 1)),
	}
	for _, t := range c.Tokens {
		d, err := hex.DecodeString(t)
		if err != nil {
			return nil, err
		}
		p.tokens = append(p.tokens, d)
	}
	if !p.mutual && len(p.tokens) == 0 {
		return nil, errors.New("pull: with neither a client CA nor tokens nobody may ask")
	}
	return p, nil
}

// servePull listens until ctx ends.
func servePull(ctx context.Context, c config.AgentPull, a *Agent, log *logrus.Entry) error {
	p, err := newPuller(c, a.host, log)
	if err != nil {
		return err
	}
	return p.serve(ctx, c, a)
}

func (p *puller) serve(ctx context.Context, c config.AgentPull, a *Agent) error {
	t, err := pullTLS(c, a.certificate)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return fmt.Errorf("pull.listen: %w", err)
	}
	server := p.server(t)
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.ServeTLS(listen.Limit(l, make(chan struct{}, p.bounds.connections)), "", ""); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("pull API: %w", err)
	}
	return nil
}

// pullTLS: the certificate is the configured one, else the node's, of which those
// who ask know the CA and the URN of the node.
func pullTLS(c config.AgentPull, node func() *tls.Certificate) (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true}
	if c.Certificate != "" {
		own, err := tls.LoadX509KeyPair(c.Certificate, c.Key)
		if err != nil {
			return nil, fmt.Errorf("pull.certificate: %w", err)
		}
		t.Certificates = []tls.Certificate{own}
	} else {
		t.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if cert := node(); cert != nil {
				return cert, nil
			}
			return nil, errors.New("the node has no certificate yet")
		}
	}
	if c.ClientCA != "" {
		b, err := os.ReadFile(c.ClientCA)
		if err != nil {
			return nil, fmt.Errorf("pull.client_ca: %w", err)
		}
		t.ClientCAs = x509.NewCertPool()
		if !t.ClientCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("pull.client_ca: no certificates in %s", c.ClientCA)
		}
		t.ClientAuth = tls.VerifyClientCertIfGiven
	}
	return t, nil
}

// server speaks HTTP/1.1 alone: a connection has one request at a time.
func (p *puller) server(t *tls.Config) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/evidence", p.evidence)
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	return &http.Server{
		Handler: mux, TLSConfig: t, Protocols: &protocols, MaxHeaderBytes: 16 << 10,
		ReadHeaderTimeout: p.bounds.header, ReadTimeout: p.bounds.body, WriteTimeout: p.bounds.body + evidenceTime + p.bounds.answer, IdleTimeout: p.bounds.idle,
		ErrorLog: listen.Quiet(p.log),
	}
}

func (p *puller) may(r *http.Request) bool {
	if p.mutual && r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		return true
	}
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok || len(token) < 16 {
		return false
	}
	d := sha256.Sum256([]byte(token))
	found := 0
	for _, t := range p.tokens {
		found |= subtle.ConstantTimeCompare(t, d[:])
	}
	return found == 1
}

func (p *puller) evidence(w http.ResponseWriter, r *http.Request) {
	log := p.log.WithField("remote", r.RemoteAddr)
	if !p.may(r) {
		http.Error(w, "a client certificate or a token is needed", http.StatusUnauthorized)
		return
	}
	var q EvidenceRequest
	b, err := io.ReadAll(io.LimitReader(r.Body, maxPullBody+1))
	if err != nil || len(b) > maxPullBody || json.Unmarshal(b, &q) != nil || len(q.Nonce) < 16 || len(q.Nonce) > 64 {
		http.Error(w, "a nonce of 16 to 64 bytes is wanted", http.StatusBadRequest)
		return
	}
	select {
	case p.slot <- struct{}{}:
		defer func() { <-p.slot }()
	default:
		w.Header().Set("Retry-After", "5")
		http.Error(w, "somebody else is being answered", http.StatusTooManyRequests)
		return
	}
	if !p.limit.Allow() {
		w.Header().Set("Retry-After", "30")
		http.Error(w, "asked too often", http.StatusTooManyRequests)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), evidenceTime)
	defer cancel()
	evidence, err := p.host.Evidence(ctx, q.Nonce, bus.Have{})
	if err != nil {
		log.WithError(err).Warn("no evidence for a third party")
		http.Error(w, "virt-trustd gives no evidence", http.StatusServiceUnavailable)
		return
	}
	log.Info("evidence for a third party")
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(p.bounds.answer)) // others wait
	w.Header().Set("Content-Type", report.MediaType)
	_, _ = w.Write(evidence)
}
