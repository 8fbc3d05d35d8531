package api

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"
	"github.com/sirupsen/logrus"

	"virt-trust/internal/appraise"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/login"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/store/storetest"
	"virt-trust/internal/verifier/webhook"
)

const unsetPolicy = `{"format":"virt-trust-policy-1","id":"default"}`

// house is an API over a database of its own, served over TLS.
type house struct {
	t      *testing.T
	api    *API
	db     *store.Store
	server *httptest.Server
	client *http.Client
	router routers.Router
	ear    *fakeEAR
	log    *bytes.Buffer
	clock  *testkit.Clock
	node   func(*http.Request) (fleet.Node, bool, error)
}

// fakeEAR stands for package ear: what it signs is told apart by what went in.
type fakeEAR struct {
	mu     sync.Mutex
	key    string
	signed int
}

func (f *fakeEAR) Sign(r *appraise.Result, vm string) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.signed++
	t := r.Host.Tier
	for _, v := range r.VMs {
		if v.UUID == vm {
			t = v.Tier
		}
	}
	return fmt.Sprintf("%s.%s.%s", f.key, t, vm), nil
}

func (f *fakeEAR) KeySet() ([]byte, error) {
	return []byte(`{"keys":[{"kid":"` + f.Key() + `"}]}`), nil
}

func (f *fakeEAR) Key() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.key
}

// The people, by their tokens.
var people = map[string]operate.Actor{
	"reader-token": {Name: "rita", Role: operate.Reader}, "operator-token": {Name: "otto", Role: operate.Operator},
	"policy-token": {Name: "paula", Role: operate.Policy}, "second-token": {Name: "peter", Role: operate.Policy},
}

func newHouse(t *testing.T, change ...func(*Config)) *house {
	t.Helper()
	return newHouseOn(t, storetest.SQLite(t), change...)
}

func newHouseOn(t *testing.T, dsn string, change ...func(*Config)) *house {
	t.Helper()
	h := &house{t: t, ear: &fakeEAR{key: "k1"}, log: &bytes.Buffer{}, clock: &testkit.Clock{}}
	var err error
	h.db, err = store.Open(t.Context(), dsn, store.Options{Now: h.clock.Now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.db.Close() })
	l := &login.Login{Sessions: h.db, SessionTime: time.Hour, Source: Source, Now: h.clock.Now}
	for token, a := range people {
		l.Tokens = append(l.Tokens, login.Token{Actor: a, SHA256: sha256.Sum256([]byte(token))})
	}
	logger := logrus.New()
	logger.Out = &locked{w: h.log}
	log := logrus.NewEntry(logger)
	guard := webhook.Guard{}
	sender := &webhook.Sender{Queue: h.db, Client: guard.Client(), Now: h.clock.Now, Log: log}
	cfg := Config{
		Store: h.db, Results: func() Results { return h.ear }, Actor: l.Actor,
		Node: func(r *http.Request) (fleet.Node, bool, error) {
			if h.node == nil {
				return fleet.Node{}, false, nil
			}
			return h.node(r)
		},
		Metrics: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			io.WriteString(w, "metrics")
		}),
		Version: "test", Requests: 100_000, Others: 100_000, Now: h.clock.Now, Log: log,
		Operate: &operate.Service{
			Store: h.db, Guard: guard, Deliver: sender.Deliver, Now: h.clock.Now,
			Unset: []byte(unsetPolicy),
		},
	}
	for _, f := range change {
		f(&cfg)
	}
	h.api = New(cfg)
	mux := http.NewServeMux()
	h.api.Mount(mux)
	h.server = httptest.NewUnstartedServer(mux)
	h.server.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	h.server.StartTLS()
	t.Cleanup(h.server.Close)
	h.client = h.server.Client()
	h.client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	doc := document(t)
	doc.Servers = openapi3.Servers{{URL: h.server.URL}}
	if h.router, err = gorillamux.NewRouter(doc); err != nil {
		t.Fatal(err)
	}
	return h
}

type locked struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *locked) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

func document(t *testing.T) *openapi3.T {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromData(Document)
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

func init() {
	// Bodies of these types are text to the document.
	for _, t := range []string{EARType, "application/jsonl", "application/vnd.virt-trust.evidence+cbor", "text/plain"} {
		openapi3filter.RegisterBodyDecoder(t, func(r io.Reader, _ http.Header, _ *openapi3.SchemaRef, _ openapi3filter.EncodingFn) (any, error) {
			b, err := io.ReadAll(r)
			return string(b), err
		})
	}
	openapi3filter.RegisterBodyDecoder("application/jwk-set+json", openapi3filter.JSONBodyDecoder)
	openapi3filter.RegisterBodyDecoder("application/problem+json", openapi3filter.JSONBodyDecoder)
}

// answer is a response, read.
type answer struct {
	code   int
	header http.Header
	body   []byte
}

func (a answer) problem() string {
	var p Problem
	json.Unmarshal(a.body, &p)
	return p.Code
}

func decode[T any](t *testing.T, a answer) T {
	t.Helper()
	var v T
	if err := json.Unmarshal(a.body, &v); err != nil {
		t.Fatalf("%v: %s", err, a.body)
	}
	return v
}

// ask sends a request and holds it, if it was accepted, and the answer in any
// case against the OpenAPI document. body is JSON, or anything that becomes it.
func (h *house) ask(token, method, path string, body any, headers ...string) answer {
	h.t.Helper()
	var in []byte
	switch b := body.(type) {
	case nil:
	case string:
		in = []byte(b)
	default:
		var err error
		if in, err = json.Marshal(b); err != nil {
			h.t.Fatal(err)
		}
	}
	r, err := http.NewRequestWithContext(context.Background(), method, h.server.URL+path, bytes.NewReader(in))
	if err != nil {
		h.t.Fatal(err)
	}
	if len(in) > 0 {
		r.Header.Set("Content-Type", "application/json")
	}
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := h.client.Do(r)
	if err != nil {
		h.t.Fatal(err)
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	if err != nil {
		h.t.Fatal(err)
	}
	a := answer{resp.StatusCode, resp.Header, out}
	h.hold(r, in, a)
	return a
}

func (h *house) hold(r *http.Request, in []byte, a answer) {
	h.t.Helper()
	route, params, err := h.router.FindRoute(r)
	if err != nil {
		if a.code != http.StatusNotFound {
			h.t.Errorf("%s %s: %v, and the answer was %d", r.Method, r.URL.Path, err, a.code)
		}
		return
	}
	input := &openapi3filter.RequestValidationInput{
		Request: r, PathParams: params, Route: route,
		Options: &openapi3filter.Options{AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, IncludeResponseStatus: true, MultiError: true},
	}
	if a.code < 300 {
		r.Body = io.NopCloser(bytes.NewReader(in))
		if err := openapi3filter.ValidateRequest(context.Background(), input); err != nil {
			h.t.Errorf("%s %s was accepted, and is not as the document says: %v", r.Method, r.URL, err)
		}
	}
	err = openapi3filter.ValidateResponse(context.Background(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: input, Status: a.code, Header: a.header, Body: io.NopCloser(bytes.NewReader(a.body)), Options: input.Options,
	})
	if err != nil {
		h.t.Errorf("%s %s: the answer %d is not as the document says: %v\n%s", r.Method, r.URL, a.code, err, a.body)
	}
}

// want asks and wants a code, and of an error its stable code.
func (h *house) want(code int, problem, token, method, path string, body any, headers ...string) answer {
	h.t.Helper()
	a := h.ask(token, method, path, body, headers...)
	if a.code != code || a.problem() != problem && code >= 400 {
		h.t.Fatalf("%s %s as %s: %d %s, want %d %s", method, path, token, a.code, a.body, code, problem)
	}
	if code >= 400 && a.header.Get("Content-Type") != "application/problem+json" {
		h.t.Errorf("an error of type %s", a.header.Get("Content-Type"))
	}
	return a
}

const (
	nodeID = "11111111-2222-3333-4444-555555555555"
	vmID   = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
)

func (h *house) do(f func(tx *store.Tx) error) {
	h.t.Helper()
	if err := h.db.Do(context.Background(), f); err != nil {
		h.t.Fatal(err)
	}
}

// enrol puts a node into the store.
func (h *house) enrol(id, name string, state fleet.NodeState) {
	h.t.Helper()
	d := sha256.Sum256([]byte(id))
	n := fleet.Node{
		ID: id, Name: name, State: state, EKDigest: fmt.Sprintf("%x", d), AKName: d[:], AK: []byte("ak " + id), BindName: d[:], Bind: []byte("bind"), Certifier: []byte("certifier"),
		EKTrust: "", Enrolled: h.clock.Now(),
	}
	h.do(func(tx *store.Tx) error { return tx.PutNode(context.Background(), n) })
}

// appraised is a result of the node with one VM.
func (h *house) appraised(node string, host, vm appraise.Tier, reasons ...appraise.Reason) *appraise.Result {
	now := h.clock.Now()
	r := &appraise.Result{
		Node: node, Received: now, Expires: now.Add(time.Minute), BootID: "boot", Kernel: "6.1",
		Host: appraise.Appraisal{Tier: host, Reasons: reasons},
		VMs:  []appraise.VM{{UUID: vmID, Name: "web", Running: true, Appraisal: appraise.Appraisal{Tier: vm, Reasons: []appraise.Reason{}}}},
	}
	if vm != appraise.Affirming {
		r.VMs[0].Reasons = []appraise.Reason{{Code: appraise.CodeVMPCR, Tier: vm, What: "PCR 4 is another", Path: "sha256:4", Digest: strings.Repeat("ab", 32)}}
	}
	return r
}

// round puts a round with this result into the store.
func (h *house) round(r *appraise.Result, evidence string) int64 {
	h.t.Helper()
	nonce := []byte(fmt.Sprintf("nonce-%d-of-32-bytes-and-no-more--", time.Now().UnixNano()))[:32]
	if _, err := h.db.IssueNonce(context.Background(), r.Node, nonce, h.clock.Now().Add(time.Minute)); err != nil {
		h.t.Fatal(err)
	}
	id, err := h.db.CompleteRound(context.Background(), store.Completion{Node: r.Node, Nonce: nonce, Result: r, Evidence: []byte(evidence)})
	if err != nil {
		h.t.Fatal(err)
	}
	return id
}

// certificate lets the client show any certificate.
func (h *house) certificate(c *tls.Certificate) {
	t := h.client.Transport.(*http.Transport).Clone()
	t.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c, nil }
	h.client.Transport = t
}
