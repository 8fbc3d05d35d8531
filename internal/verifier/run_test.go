package verifier

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"virt-trust/internal/appraise/ear"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/resultkeys"
	"virt-trust/internal/verifier/store/storetest"
	"virt-trust/internal/verifier/webhook"
)

func TestServes(t *testing.T) {
	s := newSetting(t, storetest.SQLite(t))
	v := s.start()
	c := s.client()
	for path, want := range map[string]string{"/healthz": `"ok"`, "/openapi.json": `"openapi"`, "/.well-known/jwks.json": `"ES256"`} {
		code, header, body := ask(c, "GET", v.url(path), "", "")
		if code != 200 || !strings.Contains(body, want) || header.Get("Strict-Transport-Security") == "" {
			t.Errorf("%s: %d %v %s", path, code, header, body)
		}
	}
	if code, _, body := ask(c, "GET", v.url("/v1/me"), adminToken, ""); code != 200 || !strings.Contains(body, "paula") {
		t.Errorf("%d %s", code, body)
	}
	code, _, body := ask(c, "GET", v.url("/metrics"), readerToken, "")
	if code != 200 || !strings.Contains(body, "virt_trust_database_up 1") || !strings.Contains(body, `virt_trust_certificate_expiry_timestamp_seconds{certificate="server"}`) {
		t.Errorf("%d %s", code, body)
	}
	// The page leads to its login, and that begins a session.
	if code, header, _ := ask(c, "GET", v.url("/"), "", ""); code != 303 || !strings.HasPrefix(header.Get("Location"), "/login") {
		t.Errorf("%d %v", code, header)
	}
	code, header, _ := ask(c, "POST", v.url("/login"), "", "token="+readerToken, "Content-Type", "application/x-www-form-urlencoded")
	cookie, _, _ := strings.Cut(header.Get("Set-Cookie"), ";")
	if code != 303 || cookie == "" {
		t.Fatalf("%d %v", code, header)
	}
	if code, _, body := ask(c, "GET", v.url("/"), "", "", "Cookie", cookie); code != 200 || !strings.Contains(body, "rita") {
		t.Errorf("%d %s", code, body)
	}
	// Another site's page cannot use it.
	if code, _, body := ask(c, "POST", v.url("/logout"), "", "", "Cookie", cookie, "Sec-Fetch-Site", "cross-site"); code != 403 {
		t.Errorf("%d %s", code, body)
	}
	if code, _, body := ask(c, "POST", v.url("/v1/tokens"), "", "", "Cookie", cookie, "Origin", "https://evil.example"); code != 403 || !strings.Contains(body, "cross-origin") {
		t.Errorf("%d %s", code, body)
	}

	// TLS 1.3, HTTP/1.1, and nothing else; a client's certificate by another CA is
	// none.
	old := &tls.Config{RootCAs: s.pool(), ServerName: "localhost", MaxVersion: tls.VersionTLS12}
	if c, err := tls.Dial("tcp", v.address, old); err == nil {
		c.Close()
		t.Error("TLS 1.2 was taken")
	}
	conn, err := tls.Dial("tcp", v.address, &tls.Config{RootCAs: s.pool(), ServerName: "localhost", NextProtos: []string{"h2", "http/1.1"}})
	if err != nil || conn.ConnectionState().NegotiatedProtocol != "http/1.1" {
		t.Errorf("%v %+v", err, conn.ConnectionState())
	}
	conn.Close()
	if code, _, body := ask(http.DefaultClient, "GET", "http://"+v.address+"/healthz", "", ""); code != 400 {
		t.Errorf("without TLS: %d %s", code, body)
	}
	if code, _, _ := ask(c, "GET", v.url("/healthz"), "", "", "X-Long", strings.Repeat("x", 2*maxHeader)); code != 431 {
		t.Errorf("a header without end: %d", code)
	}
	if code, _, body := ask(c, "POST", v.url("/v1/enrolments"), "", `{}`); code/100 != 4 || !strings.Contains(body, `"code"`) {
		t.Errorf("%d %s", code, body)
	}
	if err := v.stop(); err != nil {
		t.Error(err)
	}
	if strings.Contains(v.log.String(), adminToken) || strings.Contains(v.log.String(), readerToken) {
		t.Error("a token in the log")
	}
}

// A node's round, from its evidence to what a relying party fetches.
func TestRound(t *testing.T) {
	s := newSetting(t, storetest.SQLite(t))
	v := s.start()
	h := s.enrol(openStore(t, s.cfg.Database), 1)
	if tier, err := h.round(v.url("")); err != nil || tier != "affirming" {
		t.Fatalf("%s %v", tier, err)
	}
	c := s.client()
	if code, _, body := ask(c, "GET", v.url("/v1/nodes/"+h.id), readerToken, ""); code != 200 || !strings.Contains(body, `"tier":"affirming"`) {
		t.Errorf("%d %s", code, body)
	}
	// A relying party, and the node itself, fetch what was signed.
	_, _, jwks := ask(c, "GET", v.url("/.well-known/jwks.json"), "", "")
	for _, path := range []string{"/v1/nodes/" + h.id + "/result", "/v1/vms/" + h.VMs[0].UUIDText() + "/result"} {
		code, header, token := ask(c, "GET", v.url(path), readerToken, "")
		claims, err := ear.Verify(token, []byte(jwks), time.Now())
		if code != 200 || header.Get("Content-Type") != ear.MediaType || err != nil {
			t.Fatalf("%s: %d %s %v", path, code, token, err)
		}
		if len(claims.Submods) != 2 {
			t.Errorf("%s: %+v", path, claims)
		}
		if code, _, own := ask(h.client, "GET", v.url(path), "", ""); code != 200 || own != token {
			t.Errorf("as the node: %d %s", code, own)
		}
		if code, _, _ := ask(c, "GET", v.url(path), "", ""); code != 401 {
			t.Errorf("as nobody: %d", code)
		}
	}
	h.Measure("/usr/bin/evil", []byte("evil"))
	if tier, err := h.round(v.url("")); err != nil || tier != "warning" {
		t.Fatalf("%s %v", tier, err)
	}
	// What it showed is approved, and the next round is right again.
	code, _, body := ask(c, "GET", v.url("/v1/nodes/"+h.id+"/rounds?failed=true"), readerToken, "")
	var list struct{ Items []struct{ ID int64 } }
	if err := json.Unmarshal([]byte(body), &list); err != nil || len(list.Items) != 1 {
		t.Fatalf("%d %s", code, body)
	}
	if code, _, body := ask(c, "POST", v.url(fmt.Sprintf("/v1/rounds/%d/approve", list.Items[0].ID)), adminToken, "{}"); code != 200 || !strings.Contains(body, `"new":1`) {
		t.Fatalf("%d %s", code, body)
	}
	if tier, err := h.round(v.url("")); err != nil || tier != "affirming" {
		t.Errorf("%s %v", tier, err)
	}
	// A policy that is set counts.
	strict := `{"version": 1, "document": {"format": "virt-trust-policy-1", "id": "strict", "ima": {"unknown": "contraindicated", "changed": "contraindicated"}}}`
	if code, _, body := ask(c, "PUT", v.url("/v1/policy"), adminToken, strict); code != 200 {
		t.Fatalf("%d %s", code, body)
	}
	time.Sleep(policyTime)
	h.Measure("/usr/bin/evil2", []byte("evil2"))
	for range 2 { // another policy has all logs asked for again
		if tier, err := h.round(v.url("")); err != nil {
			t.Errorf("%s %v", tier, err)
		} else if tier == "contraindicated" {
			return
		}
	}
	t.Error("the policy that was set does not count")
}

// Where nothing is learned by itself, somebody approves the first round, and what
// it showed counts.
func TestStrict(t *testing.T) {
	s := newSetting(t, storetest.SQLite(t))
	s.cfg.Policy.ReferenceValues = "strict"
	testStrict(t, s)
}

// With four eyes nothing is learned either, nobody lets himself in, and who wrote the
// configuration is told.
func TestFourEyes(t *testing.T) {
	s := newSetting(t, storetest.SQLite(t))
	s.cfg.Policy.FourEyes = true
	v := s.start()
	h := s.enrol(openStore(t, s.cfg.Database), 1)
	for range 2 {
		if tier, err := h.round(v.url("")); err != nil || tier != "none" {
			t.Fatalf("%s %v", tier, err)
		}
	}
	if code, _, body := ask(s.client(), "POST", v.url("/v1/nodes/"+h.id+"/learn"), adminToken, `{"on": false}`); code != 200 || !strings.Contains(body, `"learns":false`) {
		t.Errorf("%d %s", code, body)
	}
	if code, _, body := ask(s.client(), "POST", v.url("/v1/nodes/"+h.id+"/learn"), adminToken, `{"on": true}`); code != 409 || !strings.Contains(body, "four_eyes") {
		t.Errorf("%d %s", code, body)
	}
	if all := cautions(s.cfg); len(all) != 2 || !strings.Contains(v.log.String(), "nothing is learned") {
		t.Errorf("%q", all)
	}
	if rules := admission(s.cfg); !rules.Operator {
		t.Error("a manufacturer's certificate lets a node in")
	}
	s.cfg.Policy.ReferenceValues, s.cfg.Enrolment.Approval = "strict", "operator"
	if all := cautions(s.cfg); len(all) != 0 {
		t.Errorf("%q", all)
	}
}

func testStrict(t *testing.T, s *setting) {
	t.Helper()
	v := s.start()
	h := s.enrol(openStore(t, s.cfg.Database), 1)
	if tier, err := h.round(v.url("")); err != nil || tier != "none" {
		t.Fatalf("%s %v", tier, err)
	}
	c := s.client()
	_, _, body := ask(c, "GET", v.url("/v1/nodes/"+h.id+"/rounds"), readerToken, "")
	var list struct{ Items []struct{ ID int64 } }
	if err := json.Unmarshal([]byte(body), &list); err != nil || len(list.Items) != 1 {
		t.Fatal(body)
	}
	code, _, body := ask(c, "POST", v.url(fmt.Sprintf("/v1/rounds/%d/approve", list.Items[0].ID)), adminToken, "{}")
	if code != 200 || strings.Contains(body, "no-values") {
		t.Fatalf("%d %s", code, body)
	}
	tier := ""
	for range 3 {
		var err error
		if tier, err = h.round(v.url("")); err != nil {
			t.Fatal(err)
		}
	}
	if tier != "affirming" {
		_, _, body := ask(c, "GET", v.url("/v1/nodes/"+h.id), readerToken, "")
		t.Errorf("%s: %s", tier, body)
	}
	if _, _, body := ask(c, "GET", v.url("/v1/vms"), readerToken, ""); !strings.Contains(body, `"tier":"affirming"`) {
		t.Error(body)
	}
}

// Tokens and keys change without a restart.
func TestReload(t *testing.T) {
	s := newSetting(t, storetest.SQLite(t))
	v := s.start()
	c := s.client()
	_, _, before := ask(c, "GET", v.url("/.well-known/jwks.json"), "", "")
	keys, err := resultkeys.Read(s.cfg.Results.Keys)
	if err != nil {
		t.Fatal(err)
	}
	old, err := ear.KeyID(&keys[0].PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := Rotate(s.cfg, io.Discard); err != nil {
		t.Fatal(err)
	}
	s.cfg.Tokens = []config.VerifierToken{{Name: "laptop", Person: "nina", Role: "reader", SHA256: digestOf("another token")}}
	v.reload <- struct{}{}
	v.reload <- struct{}{} // the one before is done
	if code, _, body := ask(c, "GET", v.url("/v1/me"), "another token", ""); code != 200 || !strings.Contains(body, `"nina"`) {
		t.Fatalf("%d %s", code, body)
	}
	if code, _, _ := ask(c, "GET", v.url("/v1/me"), adminToken, ""); code != 401 {
		t.Errorf("a token that was taken out: %d", code)
	}
	_, _, after := ask(c, "GET", v.url("/.well-known/jwks.json"), "", "")
	if after == before || !strings.Contains(after, old) || strings.Count(after, `"kid"`) != 2 {
		t.Errorf("%s", after)
	}
	if err := os.WriteFile(s.cfg.Results.Keys, []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	v.reload <- struct{}{}
	v.reload <- struct{}{} // the one before is done
	if _, _, again := ask(c, "GET", v.url("/.well-known/jwks.json"), "", ""); again != after || !strings.Contains(v.log.String(), "all stays as it was") {
		t.Errorf("%s\n%s", again, v.log)
	}
}

// connections opens n connections that do nothing, in parallel.
func connections(t *testing.T, address string, n int) []net.Conn {
	t.Helper()
	all := make([]net.Conn, n)
	var wg sync.WaitGroup
	var failed atomic.Int64
	for part := range 20 {
		wg.Go(func() {
			for i := part; i < n; i += 20 {
				c, err := net.DialTimeout("tcp", address, 30*time.Second)
				if err != nil {
					failed.Add(1)
					continue
				}
				all[i] = c
			}
		})
	}
	wg.Wait()
	if failed.Load() > 0 {
		t.Fatalf("%d of %d connections failed", failed.Load(), n)
	}
	t.Cleanup(func() {
		for _, c := range all {
			c.Close()
		}
	})
	return all
}

// Ten thousand connections that say nothing cost a node nothing, and end. The
// Verifier is a process of its own, so that its memory is.
func TestIdle(t *testing.T) {
	if testing.Short() {
		t.Skip("ten thousand sockets")
	}
	var lim syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil || lim.Cur < 12_000 {
		testkit.Missing(t, "only %d files may be open", lim.Cur)
	}
	s := newSetting(t, storetest.SQLite(t))
	s.cfg.Limits.HeaderTimeout = config.Duration(15 * time.Second)
	v := s.binary("127.0.0.1:0")
	h := s.enrol(openStore(t, s.cfg.Database), 1)
	if _, err := h.round(v.url("")); err != nil {
		t.Fatal(err)
	}
	before := v.memory()
	idle := connections(t, v.address, 10_000)
	opened := time.Now()
	var slowest time.Duration
	for range 20 {
		began := time.Now()
		h.client.CloseIdleConnections() // a new connection each
		if tier, err := h.round(v.url("")); err != nil || tier != "affirming" {
			t.Fatalf("%s %v", tier, err)
		}
		slowest = max(slowest, time.Since(began))
	}
	if slowest > 3*time.Second {
		t.Errorf("a round took %s", slowest)
	}
	t.Logf("figures: 10000 idle connections: the slowest of 20 rounds took %s; memory %d kB, before %d kB", slowest, v.memory(), before)
	// Every one of them is ended by the Verifier.
	for i, c := range idle {
		c.SetReadDeadline(opened.Add(45 * time.Second))
		if _, err := io.Copy(io.Discard, c); err != nil && !strings.Contains(err.Error(), "reset") {
			t.Fatalf("connection %d is open after %s: %v", i, time.Since(opened), err)
		}
	}
	if took := time.Since(opened); took < 10*time.Second {
		t.Errorf("they ended after %s: not by the timeout", took)
	}
}

// Whoever sends a byte now and then is ended too, in TLS, header and body.
func TestSlow(t *testing.T) {
	s := newSetting(t, storetest.SQLite(t))
	s.cfg.Limits.HeaderTimeout, s.cfg.Limits.BodyTimeout, s.cfg.Limits.IdleTimeout = config.Duration(time.Second), config.Duration(2*time.Second), config.Duration(time.Second)
	v := s.start()
	for name, c := range map[string]struct {
		first string
		tls   bool
	}{
		"TLS":    {"\x16\x03\x01", false},
		"header": {"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-", true},
		"body":   {"POST /v1/enrolments HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 10000\r\n\r\n", true},
		"idle":   {"", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn, err := net.Dial("tcp", v.address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if c.tls {
				conn = tls.Client(conn, &tls.Config{RootCAs: s.pool(), ServerName: "localhost"})
			}
			began := time.Now()
			if _, err := io.WriteString(conn, c.first); err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				io.Copy(io.Discard, conn)
			}()
			for {
				select {
				case <-ended:
					if took := time.Since(began); took > 8*time.Second {
						t.Errorf("it took %s", took)
					}
					return
				case <-time.After(200 * time.Millisecond):
					if c.first != "" {
						io.WriteString(conn, "1")
					}
					if time.Since(began) > 20*time.Second {
						t.Fatal("it goes on for ever")
					}
				}
			}
		})
	}
}

// No more connections are open than are allowed; the next waits its turn.
func TestConnectionLimit(t *testing.T) {
	s := newSetting(t, storetest.SQLite(t))
	s.cfg.Limits.Connections, s.cfg.Limits.HeaderTimeout = 10, config.Duration(2*time.Second)
	v := s.start()
	connections(t, v.address, 10)
	began := time.Now()
	if code, _, body := ask(s.client(), "GET", v.url("/healthz"), "", ""); code != 200 {
		t.Fatalf("%d %s", code, body)
	}
	if took := time.Since(began); took < time.Second {
		t.Errorf("it came in after %s, with 10 of 10 connections open", took)
	}
}

// A request that is on its way when the Verifier is stopped is answered.
func TestGraceful(t *testing.T) {
	s := newSetting(t, storetest.SQLite(t))
	v := s.start()
	conn, err := tls.Dial("tcp", v.address, &tls.Config{RootCAs: s.pool(), ServerName: "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, "POST /v1/tokens HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "+adminToken+"\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{")
	time.Sleep(200 * time.Millisecond)
	stopped := make(chan error, 1)
	go func() { stopped <- v.stop() }()
	time.Sleep(300 * time.Millisecond)
	if c, err := net.Dial("tcp", v.address); err == nil {
		c.Close()
		t.Error("new connections are taken still")
	}
	io.WriteString(conn, "}")
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != 201 {
		t.Fatalf("%v %+v", err, resp)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// Two Verifiers over one PostgreSQL, behind a balancer that alternates: what one
// begins the other goes on with, and what has to happen once does.
func TestReplicas(t *testing.T) {
	s := newSetting(t, storetest.Postgres(t))
	var mu sync.Mutex
	events := map[string]int{}
	receiver := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		var e struct {
			Type string
			Data struct{ Subject, From, To, Tier string }
		}
		json.Unmarshal(b, &e)
		mu.Lock()
		defer mu.Unlock()
		subject := e.Data.Subject
		if len(subject) > 10 {
			subject = "vm"
		}
		events[strings.Join([]string{e.Type, subject, e.Data.From, e.Data.To, e.Data.Tier}, " ")]++
	}))
	defer receiver.Close()
	s.cfg.Webhooks = config.VerifierWebhooks{AllowNetworks: []string{"127.0.0.0/8"}, AllowHTTP: true}
	s.cfg.Rounds = config.VerifierRounds{Interval: config.Duration(time.Second), Lifetime: config.Duration(4 * time.Second)}
	both := []*running{s.start(), s.start()}
	n := 0
	turn := func() string {
		n++
		return "https://" + both[n%2].address
	}
	c := s.client()
	h := s.enrol(openStore(t, s.cfg.Database), 1)
	for range 10 {
		if tier, err := h.round(turn()); err != nil || tier != "affirming" {
			t.Fatalf("%s %v", tier, err)
		}
	}
	// A nonce is good once, whoever is asked.
	spent := *h.next
	if tier, err := h.round(turn()); err != nil || tier != "affirming" {
		t.Fatalf("%s %v", tier, err)
	}
	next := h.next
	h.next = &spent
	if tier, err := h.round(turn()); err == nil && tier != "contraindicated" {
		t.Errorf("a spent nonce: %s", tier)
	}
	h.next = next
	if tier, err := h.round(turn()); err == nil && tier == "affirming" {
		t.Error("the nonce that was outstanding when the spent one came is good still")
	}
	h.next = nil
	if tier, err := h.round(turn()); err != nil || tier != "affirming" {
		t.Fatalf("%s %v", tier, err)
	}
	if code, _, body := ask(c, "POST", turn()+"/v1/webhooks", adminToken, fmt.Sprintf(`{"url": %q, "events": [%q, %q]}`, receiver.URL, webhook.TrustChanged, webhook.ResultExpired)); code != 201 {
		t.Fatalf("%d %s", code, body)
	}

	_, header, _ := ask(c, "POST", turn()+"/login", "", "token="+readerToken, "Content-Type", "application/x-www-form-urlencoded")
	cookie, _, _ := strings.Cut(header.Get("Set-Cookie"), ";")
	for range 4 {
		if code, _, body := ask(c, "GET", turn()+"/v1/me", "", "", "Cookie", cookie); code != 200 {
			t.Errorf("%d %s", code, body)
		}
	}
	if code, _, _ := ask(c, "POST", turn()+"/logout", "", "", "Cookie", cookie); code != 303 {
		t.Errorf("%d", code)
	}
	if code, _, body := ask(c, "GET", turn()+"/v1/me", "", "", "Cookie", cookie); code != 401 {
		t.Errorf("%d %s", code, body)
	}

	// The result expires once, whoever sees it; and the next round tells so.
	deadline := time.Now().Add(20 * time.Second)
	want := map[string]int{
		"trust.changed host none affirming ": 1, "trust.changed vm none affirming ": 1,
		"result.expired    affirming": 1, "trust.changed host affirming none ": 1, "trust.changed vm affirming none ": 1,
	}
	until := func(n int) {
		for done := false; !done && time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
			mu.Lock()
			done = len(events) >= n
			mu.Unlock()
		}
	}
	until(3)
	for _, v := range both {
		code, _, body := ask(c, "GET", v.url("/v1/nodes/"+h.id), readerToken, "")
		if code != 200 || !strings.Contains(body, `"tier":"none"`) {
			t.Errorf("%d %s", code, body)
		}
	}
	if tier, err := h.round(turn()); err != nil || tier != "affirming" {
		t.Fatalf("%s %v", tier, err)
	}
	until(len(want))
	time.Sleep(2 * time.Second) // for one too many
	mu.Lock()
	defer mu.Unlock()
	if fmt.Sprint(events) != fmt.Sprint(want) {
		t.Errorf("%v, want %v", events, want)
	}
	if _, _, body := ask(c, "GET", both[0].url("/v1/audit/head"), readerToken, ""); !strings.Contains(body, `"hash"`) {
		t.Error(body)
	}
}

// While the database is away there is no answer about trust, and when it is back
// all goes on.
func TestDatabaseGoneAndBack(t *testing.T) {
	server, err := storetest.New()
	storetest.Need(t, err)
	t.Cleanup(func() {
		if err := server.Remove(); err != nil {
			t.Error(err)
		}
	})
	s := newSetting(t, server.NewDatabase(t))
	v := s.start()
	h := s.enrol(openStore(t, s.cfg.Database), 1)
	if tier, err := h.round(v.url("")); err != nil || tier != "affirming" {
		t.Fatalf("%s %v", tier, err)
	}
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	c := s.client()
	for _, path := range []string{"/healthz", "/v1/nodes/" + h.id, "/v1/nodes/" + h.id + "/result", "/v1/fleet"} {
		code, header, body := ask(c, "GET", v.url(path), readerToken, "")
		if code != 503 || header.Get("Retry-After") == "" || !strings.Contains(body, `"unavailable"`) || strings.Contains(body, "affirming") {
			t.Errorf("%s: %d %v %s", path, code, header, body)
		}
	}
	if code, _, body := ask(c, "GET", v.url("/metrics"), readerToken, ""); code != 200 || !strings.Contains(body, "virt_trust_database_up 0") || strings.Contains(body, "virt_trust_node_tiers{") {
		t.Errorf("%d %s", code, body)
	}
	if tier, err := h.round(v.url("")); err == nil {
		t.Errorf("a round without a database: %s", tier)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		tier, err := h.round(v.url(""))
		if err == nil && tier == "affirming" {
			break
		}
		h.next = nil
		if time.Now().After(deadline) {
			t.Fatalf("%s %v", tier, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	if code, _, body := ask(c, "GET", v.url("/v1/nodes/"+h.id), readerToken, ""); code != 200 || !strings.Contains(body, `"tier":"affirming"`) {
		t.Errorf("%d %s", code, body)
	}
}

// process is a Verifier in a process of its own.
type process struct {
	*setting
	address, browsers string
	cmd               *exec.Cmd
	out               *safe
}

var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "virt-trust-verifier-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "virt-trust-verifier")
	out, err := exec.Command("go", "build", "-o", path, "../../helper/virt-trust-verifier").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

// binary starts the real program, at an address that it has had or a new one.
func (s *setting) binary(address string) *process {
	s.t.Helper()
	path, err := program()
	if err != nil {
		s.t.Fatal(err)
	}
	l, err := net.Listen("tcp", address) // as systemd does: the port is there before the program
	if err != nil {
		s.t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	p := &process{setting: s, address: l.Addr().String(), out: &safe{}}
	files, fdnames := []*os.File{f}, "virt-trust-verifier.socket"
	file := s.path("verifier.toml")
	text := fmt.Sprintf("names = [\"localhost\"]\ndatabase = %q\n[ca]\ncertificate = %q\nkey = %q\n[results]\nkeys = %q\n[limits]\nrequests = 1000000\nanonymous = 1000000\nheader_timeout = %q\n",
		s.cfg.Database, s.cfg.CA.Certificate, s.cfg.CA.Key, s.cfg.Results.Keys, time.Duration(s.cfg.Limits.HeaderTimeout))
	for _, token := range s.cfg.Tokens {
		text += fmt.Sprintf("[[token]]\nname = %q\nrole = %q\nsha256 = %q\n", token.Name, token.Role, token.SHA256)
	}
	if b := s.cfg.Browsers; b.Certificate != "" {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			s.t.Fatal(err)
		}
		defer l.Close()
		f, err := l.(*net.TCPListener).File()
		if err != nil {
			s.t.Fatal(err)
		}
		defer f.Close()
		p.browsers = l.Addr().String()
		files, fdnames = []*os.File{f, files[0]}, browsersName+":"+fdnames
		text += fmt.Sprintf("[browsers]\ncertificate = %q\nkey = %q\n", b.Certificate, b.Key)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	// The shell sets LISTEN_PID to what becomes the program (sd_listen_fds(3)).
	p.cmd = exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0" --config "$1" serve`, path, file)
	p.cmd.Env = append(os.Environ(), fmt.Sprint("LISTEN_FDS=", len(files)), "LISTEN_FDNAMES="+fdnames)
	p.cmd.ExtraFiles = files
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig is the thread's
	defer runtime.UnlockOSThread()
	if err := p.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(p.kill)
	c := s.client()
	deadline := time.Now().Add(20 * time.Second)
	for {
		if code, _, _ := ask(c, "GET", "https://"+p.address+"/healthz", "", ""); code == 200 {
			return p
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("it does not serve: %s", p.out)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (p *process) url(path string) string { return "https://" + p.address + path }

func (p *process) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

// memory is what the process has resident, in kB.
func (p *process) memory() (kB int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		if rest, ok := bytes.CutPrefix(line, []byte("VmRSS:")); ok {
			fmt.Sscan(string(rest), &kB)
		}
	}
	return kB
}

// The program is killed at any moment of rounds and of what people do: whatever
// it has answered is there when it is back, and the nodes go on by themselves.
func TestKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and kills the program")
	}
	s := newSetting(t, storetest.SQLite(t))
	p := s.binary("127.0.0.1:0")
	db := openStore(t, s.cfg.Database)
	hosts := []*host{s.enrol(db, 1), s.enrol(db, 2), s.enrol(db, 3)}
	address := p.url("")

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	acknowledged := make([]atomic.Int64, len(hosts))
	bad := make(chan string, 100)
	for i, h := range hosts {
		wg.Go(func() {
			for ctx.Err() == nil {
				switch tier, err := h.round(address); {
				case err != nil:
					h.next = nil
					time.Sleep(10 * time.Millisecond)
				case tier != "affirming":
					select {
					case bad <- fmt.Sprintf("host %d: %s", i, tier):
					default:
					}
				default:
					acknowledged[i].Add(1)
				}
			}
		})
	}
	var mu sync.Mutex
	var tokens []string
	wg.Go(func() {
		c := s.client()
		for ctx.Err() == nil {
			code, _, body := ask(c, "POST", address+"/v1/tokens", adminToken, `{}`)
			var v struct{ Digest string }
			if code == 201 && json.Unmarshal([]byte(body), &v) == nil {
				mu.Lock()
				tokens = append(tokens, v.Digest)
				mu.Unlock()
			}
			time.Sleep(2 * time.Millisecond)
		}
	})
	for i := range 6 {
		time.Sleep(time.Duration(150+83*i) * time.Millisecond)
		p.kill()
		p = s.binary(p.address)
	}
	before := make([]int64, len(hosts))
	for i := range hosts {
		before[i] = acknowledged[i].Load()
	}
	time.Sleep(time.Second)
	cancel()
	wg.Wait()
	close(bad)
	for b := range bad {
		t.Error(b)
	}
	c := s.client()
	for i, h := range hosts {
		if acknowledged[i].Load() <= before[i] {
			t.Errorf("host %d has no rounds any more", i)
		}
		code, _, body := ask(c, "GET", address+"/v1/nodes/"+h.id+"/rounds?limit=1000", readerToken, "")
		var list struct {
			Items []struct {
				Count    int64
				HostTier string `json:"host_tier"`
			}
		}
		if err := json.Unmarshal([]byte(body), &list); err != nil {
			t.Fatalf("%d %s", code, body)
		}
		var kept int64
		for _, r := range list.Items {
			kept += r.Count
		}
		if kept < acknowledged[i].Load() {
			t.Errorf("host %d: %d rounds were acknowledged, %d are there", i, acknowledged[i].Load(), kept)
		}
	}
	known := map[string]bool{}
	for after := ""; ; {
		_, _, body := ask(c, "GET", address+"/v1/tokens?limit=1000&after="+after, adminToken, "")
		var list struct {
			Items []struct{ Digest string }
			Next  string
		}
		if err := json.Unmarshal([]byte(body), &list); err != nil {
			t.Fatal(body)
		}
		for _, item := range list.Items {
			known[item.Digest] = true
		}
		if after = list.Next; after == "" {
			break
		}
	}
	for _, d := range tokens {
		if !known[d] {
			t.Errorf("token %s was acknowledged, and is lost", d)
		}
	}
	if _, err := db.VerifyAudit(t.Context(), nil, nil); err != nil {
		t.Error(err)
	}
	t.Logf("figures: 6 kills; %d rounds and %d join tokens acknowledged, none lost", acknowledged[0].Load()+acknowledged[1].Load()+acknowledged[2].Load(), len(tokens))
	// And it stops in order.
	p.cmd.Process.Signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, p.out)
	}
}
