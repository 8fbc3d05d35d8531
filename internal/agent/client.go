package agent

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/nodeapi"
)

const (
	maxAnswer   = 1 << 20
	requestTime = 2 * time.Minute
)

// parseURL reads the address of a Verifier.
func parseURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%.200q is no URL", s)
	case u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return nil, fmt.Errorf("%.200q is not the URL of a Verifier: https://HOST:PORT is", s)
	case u.Path != "" && u.Path != "/":
		return nil, fmt.Errorf("%.200q has a path: https://HOST:PORT is enough", s)
	}
	u.Path = ""
	return u, nil
}

// answerError is a refusal of the Verifier.
type answerError struct {
	nodeapi.Problem
	after time.Duration // until it may be asked again; 0 where it does not say
}

func (e *answerError) Error() string {
	if e.Detail == "" {
		return fmt.Sprintf("the Verifier refuses: %s", e.Code)
	}
	return fmt.Sprintf("the Verifier refuses: %s: %.500q", e.Code, e.Detail)
}

func codeOf(err error) ca.Code {
	var e *answerError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// client speaks to one Verifier. It takes the word of one CA alone, known by its
// certificate or, before enrolment, by its pin.
type client struct {
	url  *url.URL
	http *http.Client
	ca   atomic.Pointer[x509.Certificate] // the pinned one, once the Verifier has shown it
}

func newClient(u *url.URL, pin ca.Pin, cert *tls.Certificate) *client {
	c := &client{url: u}
	t := &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: u.Hostname(),
		// verify does what Go would, and more: the CA is not in any list.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			root, err := verifyServer(s, pin)
			if err == nil {
				c.ca.Store(root)
			}
			return err
		},
	}
	if cert != nil {
		t.Certificates = []tls.Certificate{*cert}
	}
	c.http = &http.Client{
		Timeout: requestTime,
		Transport: &http.Transport{
			TLSClientConfig: t, Proxy: nil, DisableCompression: true, MaxIdleConns: 1, MaxConnsPerHost: 2, IdleConnTimeout: 3 * time.Minute,
			TLSHandshakeTimeout: 20 * time.Second, ResponseHeaderTimeout: requestTime, ExpectContinueTimeout: 5 * time.Second,
			MaxResponseHeaderBytes: 64 << 10,
		},
		// A Verifier sends nobody anywhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c
}

// verifyServer checks that a server is a Verifier of the CA with this pin, and
// gives the CA's certificate. A node's certificate is no Verifier's, although the
// same CA signed it.
func verifyServer(s tls.ConnectionState, pin ca.Pin) (*x509.Certificate, error) {
	var root *x509.Certificate
	for _, c := range s.PeerCertificates {
		if pin.Matches(c) {
			root = c
		}
	}
	if root == nil || len(s.PeerCertificates) < 2 {
		return nil, errors.New("the server is not the Verifier that the join token is from: its CA has another key")
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	leaf := s.PeerCertificates[0]
	chains, err := leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: s.ServerName, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	if err != nil {
		return nil, fmt.Errorf("the Verifier's certificate: %w", err)
	}
	if _, err := ca.UntrustedIdentity(leaf); err == nil || len(chains[0]) != 2 {
		return nil, errors.New("the server has the certificate of a node, not of the Verifier")
	}
	return root, nil
}

func (c *client) close() { c.http.CloseIdleConnections() }

// call posts in as JSON and reads the answer into out. Errors: *answerError where
// the Verifier answered and refused.
func (c *client) call(ctx context.Context, path string, in, out any) (status int, err error) {
	body := []byte("{}")
	if in != nil {
		if body, err = json.Marshal(in); err != nil {
			return 0, err
		}
	}
	return c.post(ctx, path, "application/json", "", body, out)
}

// sendEvidence posts Evidence, packed.
func (c *client) sendEvidence(ctx context.Context, node string, evidence []byte, out *nodeapi.Outcome) error {
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if err != nil {
		return err
	}
	if _, err := z.Write(evidence); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	_, err = c.post(ctx, "/v1/nodes/"+node+"/evidence", report.MediaType, "gzip", b.Bytes(), out)
	return err
}

func (c *client) post(ctx context.Context, path, mediaType, encoding string, body []byte, out any) (int, error) {
	u := *c.url
	u.Path = path
	q, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	q.Header.Set("Content-Type", mediaType)
	q.Header.Set("User-Agent", "virt-trust-agent")
	if encoding != "" {
		q.Header.Set("Content-Encoding", encoding)
	}
	if len(body) > 64<<10 {
		q.Header.Set("Expect", "100-continue") // it may not be wanted
	}
	r, err := c.http.Do(q)
	if err != nil {
		return 0, err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(io.LimitReader(r.Body, maxAnswer+1))
	if err != nil {
		return 0, fmt.Errorf("the Verifier's answer did not come whole: %w", err)
	}
	if len(b) > maxAnswer {
		return 0, fmt.Errorf("the Verifier's answer is longer than %d bytes", maxAnswer)
	}
	if r.StatusCode/100 != 2 {
		e := &answerError{}
		if r.Header.Get("Content-Type") != nodeapi.ProblemType || json.Unmarshal(b, &e.Problem) != nil {
			return 0, fmt.Errorf("the Verifier answers %s", r.Status)
		}
		if s, err := strconv.Atoi(r.Header.Get("Retry-After")); err == nil && s > 0 && s <= 3600 {
			e.after = time.Duration(s) * time.Second
		}
		return r.StatusCode, e
	}
	if err := json.Unmarshal(b, out); err != nil {
		return 0, fmt.Errorf("the Verifier's answer: %w", err)
	}
	return r.StatusCode, nil
}
