package rounds

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

// The first round is learned, those after it are held against it, logs come in
// pieces, and what changes is told.
func TestRounds(t *testing.T) {
	b := newBench(t, nil)
	b.do(func(ctx context.Context, tx *store.Tx) error {
		_, err := tx.AddHook(ctx, fleet.Hook{URL: "https://hook.example", Secret: make([]byte, 32), Created: b.clock.Now()})
		return err
	})
	m := b.join("host-a", b.newHost("one", "two"))
	o := m.round(forge.Options{})
	if o.Tier != appraise.Affirming || o.Next == nil || o.Next.HaveBoot != m.host.BootID || o.Next.Have["ima"] != uint64(len(m.host.IMA)) {
		t.Fatalf("%+v %+v", o, o.Next)
	}
	if left := time.Until(o.Next.Expires); left < time.Minute || o.Next.Interval < 54 || o.Next.Interval > 60 {
		t.Errorf("nonce for %s, interval %v", left, o.Next.Interval)
	}
	// One request a round from here on.
	m.host.Measure("/usr/bin/evil", []byte("evil"))
	o = m.outcome(m.send(m.evidence(o.Next, forge.Options{})))
	if o.Tier != appraise.Warning || len(o.Codes) == 0 {
		t.Errorf("%+v", o)
	}
	waiting, _, err := b.store.Queued(context.Background())
	if err != nil || waiting == 0 {
		t.Errorf("%d events, %v", waiting, err)
	}
	o = m.outcome(m.send(m.evidence(o.Next, forge.Options{})))
	if again, _, _ := b.store.Queued(context.Background()); again != waiting {
		t.Errorf("%d events for no change", again-waiting)
	}
	if r := m.result(); r.Host.Tier != appraise.Warning || m.vm("one").Tier != appraise.Warning {
		t.Errorf("%+v", r)
	}
	// A restart of the Verifier between nonce and Evidence is nothing.
	evidence := m.evidence(o.Next, forge.Options{})
	b.stop()
	b.start()
	m.http = b.client(m.cert)
	o = m.outcome(m.send(evidence))
	if o.Tier != appraise.Warning {
		t.Errorf("%+v", o)
	}
	if again, _, _ := b.store.Queued(context.Background()); again != waiting {
		t.Errorf("%d events for a restart", again-waiting)
	}
}

// Replayed, relayed, delayed, forged: none of it changes a result for the better,
// and each says why.
func TestEvidenceAttacks(t *testing.T) {
	b := newBench(t, nil)
	a, other := b.join("host-a", b.newHost("one")), b.join("host-b", b.newHost("two"))
	first := a.evidence(a.next(), forge.Options{})
	if o := a.outcome(a.send(first)); o.Tier != appraise.Affirming {
		t.Fatalf("%+v", o)
	}
	other.round(forge.Options{})

	path := "/v1/nodes/" + a.id + "/evidence"
	kind := "application/vnd.virt-trust.evidence+cbor"
	b.want("unauthenticated", b.post(b.client(nil), path, kind, "", first), http.StatusUnauthorized, ca.NoCertificate)
	b.want("another node's certificate", b.post(other.http, path, kind, "", first), http.StatusForbidden, ca.OtherNode)
	b.want("another node's rounds", b.post(other.http, "/v1/nodes/"+a.id+"/rounds", "application/json", "", nil), http.StatusForbidden, ca.OtherNode)

	// Replayed while another nonce is outstanding: the round is lost, and says so.
	if o := a.outcome(a.send(first)); o.Tier != appraise.Contraindicated || !contains(o.Codes, appraise.CodeNonce) {
		t.Errorf("replay: %+v", o)
	}
	if r := a.result(); r.Host.Tier != appraise.Contraindicated || a.vm1Tier(t) != appraise.Contraindicated {
		t.Errorf("replay: %+v", r)
	}
	if o := a.round(forge.Options{}); o.Tier != appraise.Affirming {
		t.Errorf("after a replay: %+v", o)
	}

	// Relayed: A's Evidence for B's nonce, sent by B.
	r := other.next()
	if o := other.outcome(other.send(a.evidence(r, forge.Options{}))); o.Tier != appraise.Contraindicated || !contains(o.Codes, appraise.CodeSignature) {
		t.Errorf("relay: %+v", o)
	}

	// Delayed: the nonce has had its time.
	r = a.next()
	late := a.evidence(r, forge.Options{})
	b.clock.Pass(10 * time.Minute)
	b.want("delayed", a.send(late), http.StatusConflict, ca.NonceBad)
	if got := a.result(); got.Host.Tier != appraise.None {
		t.Errorf("a result outlives its time: %+v", got)
	}
	b.clock.Pass(-10 * time.Minute)

	// Two at once: no more than one of them is a round.
	r = a.next()
	twice := a.evidence(r, forge.Options{})
	done := make(chan answer, 2)
	for range 2 {
		go func() { done <- a.send(twice) }()
	}
	good := 0
	for range 2 {
		switch x := <-done; {
		case x.status == http.StatusOK:
			var out = a.outcome(x)
			if out.Tier == appraise.Affirming {
				good++
			}
		case x.problem.Code != ca.Busy && x.problem.Code != ca.NonceBad:
			t.Errorf("%+v", x)
		}
	}
	if good != 1 {
		t.Errorf("%d of two were rounds", good)
	}

	for name, c := range map[string]struct {
		o    forge.Options
		code string
	}{
		"over no PCRs": {forge.Options{NoPCRs: true}, appraise.CodeNoPCRs},
	} {
		if o := a.round(c.o); o.Tier != appraise.Contraindicated || !contains(o.Codes, c.code) {
			t.Errorf("%s: %+v", name, o)
		}
	}
}

func (m *member) vm1Tier(t *testing.T) appraise.Tier {
	t.Helper()
	return m.result().VMs[0].Tier
}

func contains(all []string, s string) bool {
	for _, x := range all {
		if x == s {
			return true
		}
	}
	return false
}

// What is too long, too slow or no Evidence at all ends in None, or in nothing.
func TestHostileBodies(t *testing.T) {
	b := newBench(t, func(o *Options) { o.InFlight = 200 << 20 })
	m := b.join("host-a", b.newHost("one"))
	m.round(forge.Options{})
	path := "/v1/nodes/" + m.id + "/evidence"
	good := func() []byte { return m.evidence(m.next(), forge.Options{}) }

	if o := m.outcome(b.post(m.http, path, report.MediaType, "gzip", pack(t, good()))); o.Tier != appraise.Affirming {
		t.Fatalf("gzip: %+v", o)
	}
	bomb := pack(t, make([]byte, 96<<20))
	for name, c := range map[string]struct {
		kind, encoding string
		body           []byte
		status         int
		code           ca.Code
	}{
		"bomb":           {report.MediaType, "gzip", bomb, http.StatusRequestEntityTooLarge, ca.TooLarge},
		"not gzip":       {report.MediaType, "gzip", good(), http.StatusBadRequest, ca.Malformed},
		"cut gzip":       {report.MediaType, "gzip", pack(t, good())[:200], http.StatusBadRequest, ca.Malformed},
		"other encoding": {report.MediaType, "br", good(), http.StatusBadRequest, ca.Malformed},
		"other type":     {"application/cbor", "", good(), http.StatusBadRequest, ca.Malformed},
		"too long":       {report.MediaType, "", make([]byte, report.MaxEvidence+1), http.StatusRequestEntityTooLarge, ca.TooLarge},
	} {
		m.next()
		b.want(name, b.post(m.http, path, c.kind, c.encoding, c.body), c.status, c.code)
		r := m.result()
		if r.Host.Tier != appraise.None || len(r.VMs) != 1 || r.VMs[0].Tier != appraise.None {
			t.Errorf("%s: after it %+v", name, r)
		}
		if o := m.round(forge.Options{}); o.Tier != appraise.Affirming {
			t.Errorf("%s: the next round is %+v", name, o)
		}
	}
	for name, body := range map[string][]byte{"nothing": {}, "garbage": []byte("garbage"), "CBOR": {0xa0}} {
		m.next()
		if o := m.outcome(m.send(body)); o.Tier == appraise.Affirming || !contains(o.Codes, appraise.CodeFormat) && !contains(o.Codes, appraise.CodeNoEvidence) {
			t.Errorf("%s: %+v", name, o)
		}
	}
	if b.h.budget.left != 200<<20 {
		t.Errorf("%d bytes of the budget are lost", 200<<20-b.h.budget.left)
	}
	// Many at once do not take more memory than there is.
	b.h.budget.left = 1 << 10
	m.next()
	b.want("no memory", m.send(good()), http.StatusServiceUnavailable, ca.Failed)
	b.h.budget.left = 200 << 20
	if o := m.round(forge.Options{}); o.Tier != appraise.Affirming {
		t.Errorf("after that: %+v", o)
	}
	// Garbage for every address does nothing but fail.
	for _, path := range []string{"/v1/enrolments", "/v1/enrolments/x", "/v1/nodes/x/challenges", "/v1/nodes/" + m.id + "/certificates", "/v1/nodes/%00/certificates"} {
		for _, body := range []string{"", "{", "null", "[]", `{"name":1}`, `{"ek":"!"}`, strings.Repeat("x", maxJSON+1), `{"name":"` + strings.Repeat("a", 1000) + `"}`} {
			if a := b.post(b.client(nil), path, "application/json", "", []byte(body)); a.status/100 != 4 {
				t.Errorf("%s %.20q: %d %s", path, body, a.status, a.body)
			}
		}
	}
}

// More Evidence than can be appraised waits in its order; what waits in vain, or is
// no longer waited for, has cost the node nothing.
func TestPlaces(t *testing.T) {
	b := newBench(t, func(o *Options) { o.AtOnce = 1 })
	m := b.join("host-a", b.newHost("one"))
	m.round(forge.Options{})
	evidence := m.evidence(m.next(), forge.Options{})

	if err := b.h.places.take(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if err := b.h.places.take(t.Context(), time.Millisecond); err != errFull {
		t.Errorf("without a place: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	r := testkit.Must[*http.Request](t)(http.NewRequestWithContext(ctx, http.MethodPost, b.address+"/v1/nodes/"+m.id+"/evidence", bytes.NewReader(evidence)))
	r.Header.Set("Content-Type", report.MediaType)
	if _, err := m.http.Do(r); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a node that waits for a place: %v", err)
	}
	if before := m.result(); before.Host.Tier != appraise.Affirming {
		t.Errorf("who went away is %s", before.Host.Tier)
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, busy := b.h.busy.Load(m.id); !busy { // the Verifier has seen that it has gone
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the Verifier goes on with a request whose sender has gone")
		}
	}
	time.AfterFunc(100*time.Millisecond, b.h.places.give)
	if o := m.outcome(m.send(evidence)); o.Tier != appraise.Affirming {
		t.Errorf("the same Evidence, with a place: %+v", o)
	}
}

// A client that sends a byte now and then is cut off, and others do not wait for
// it.
func TestSlowConnections(t *testing.T) {
	b := newBench(t, nil)
	m := b.join("host-a", b.newHost("one"))
	m.round(forge.Options{})
	other := b.join("host-b", b.newHost("two"))
	r := m.next()
	evidence := m.evidence(r, forge.Options{})
	conn := testkit.Must[*tls.Conn](t)(tls.Dial("tcp", b.address[len("https://"):], &tls.Config{RootCAs: b.ca.Pool(), Certificates: []tls.Certificate{*m.cert}}))
	defer conn.Close()
	fmt.Fprintf(conn, "POST /v1/nodes/%s/evidence HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n", m.id, report.MediaType, len(evidence))
	conn.Write(evidence[:100])
	began := time.Now()
	if o := other.round(forge.Options{}); o.Tier != appraise.Affirming || time.Since(began) > time.Second {
		t.Errorf("%+v after %s", o, time.Since(began))
	}
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	io.Copy(io.Discard, conn)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("cut off after %s", took)
	}
	if o := m.round(forge.Options{}); o.Tier != appraise.Affirming {
		t.Errorf("%+v", o)
	}
	for range 200 {
		c := testkit.Must[net.Conn](t)(net.Dial("tcp", b.address[len("https://"):]))
		defer c.Close()
	}
	if o := m.round(forge.Options{}); o.Tier != appraise.Affirming {
		t.Errorf("among idle connections: %+v", o)
	}
}

// Two VMs with one vTPM, on one host or on two; and one VM in two places.
func TestSharedVTPM(t *testing.T) {
	b := newBench(t, nil)
	one, two := b.newHost("vm"), b.newHost("other")
	two.VMs[0].EK = one.VMs[0].EK
	a, c := b.join("host-a", one), b.join("host-b", two)
	a.round(forge.Options{})
	c.round(forge.Options{})
	a.round(forge.Options{})
	for _, x := range []struct {
		m    *member
		name string
	}{{a, "vm"}, {c, "other"}} {
		if v := x.m.vm(x.name); v.Tier != appraise.Contraindicated || !hasCode(v.Reasons, appraise.CodeVMSharedEK) {
			t.Errorf("%s: %+v", x.name, v)
		}
		if h := x.m.result().Host; h.Tier != appraise.Affirming {
			t.Errorf("the host is not to blame: %+v", h)
		}
	}
}

func TestVMRunsTwice(t *testing.T) {
	b := newBench(t, nil)
	one := b.newHost("vm")
	a := b.join("host-a", one)
	a.round(forge.Options{})
	a.round(forge.Options{})
	// It moves: for a moment both have it, as far as the Verifier has heard.
	two := b.newHost("vm")
	c := b.join("host-b", two)
	c.round(forge.Options{})
	if v := c.vm("vm"); hasCode(v.Reasons, CodeTwice) {
		t.Errorf("a VM that moves: %+v", v)
	}
	one.Stop(one.VMs[0])
	a.round(forge.Options{})
	c.round(forge.Options{})
	if v := c.vm("vm"); hasCode(v.Reasons, CodeTwice) || v.Tier != appraise.Affirming {
		t.Errorf("a VM that has moved: %+v", v)
	}
	// And now it really does.
	one.Start(one.VMs[0], bootLog(t, "sd"), one.VMs[0].Used...)
	one.Tick(5 * time.Minute)
	b.clock.Pass(5 * time.Minute)
	for range 3 {
		a.round(forge.Options{})
		c.round(forge.Options{})
	}
	for _, m := range []*member{a, c} {
		if v := m.vm("vm"); v.Tier != appraise.Contraindicated || !hasCode(v.Reasons, CodeTwice) {
			t.Errorf("a VM in two places: %+v", v)
		}
	}
}

// A name that two nodes give to VMs of their own is nobody's to teach, and both are
// told of; so is a VM that comes up elsewhere without its vTPM.
func TestVMElsewhere(t *testing.T) {
	b := newBench(t, nil)
	one, two := b.newHost("vm"), b.newHost()
	squat := two.AddVM("mine")
	squat.UUID = one.VMs[0].UUID
	c := b.join("host-b", two)
	c.round(forge.Options{}) // it does not run, and teaches nothing
	a := b.join("host-a", one)
	for range 2 {
		a.round(forge.Options{})
		if v := a.vm("vm"); v.Tier != appraise.None || !hasCode(v.Reasons, CodeElsewhere) || !hasCode(v.Reasons, appraise.CodeVMNoValues) {
			t.Errorf("%+v", v.Appraisal)
		}
	}
	c.round(forge.Options{})
	if v := c.vm("mine"); !hasCode(v.Reasons, CodeElsewhere) {
		t.Errorf("%+v", v.Appraisal)
	}
	if all, _, err := b.store.Values(t.Context(), store.ValueFilter{Kind: fleet.VMPCR}, store.Page{}); err != nil || len(all) != 0 {
		t.Errorf("%d values, %v", len(all), err)
	}
	// Once the other has given the name up, it is learned.
	two.Delete(squat)
	c.round(forge.Options{})
	a.round(forge.Options{})
	if v := a.vm("vm"); v.Tier != appraise.Affirming {
		t.Errorf("%+v", v.Appraisal)
	}
	// Two that run, with two vTPMs.
	two.VMs = append(two.VMs, squat)
	n := two.Launchers([3]string{"emulator", "/usr/bin/qemu-system-x86_64", "qemu"})
	two.Start(squat, bootLog(t, "sd"), n...)
	two.Tick(5 * time.Minute)
	b.clock.Pass(5 * time.Minute)
	for range 3 {
		c.round(forge.Options{})
		a.round(forge.Options{})
	}
	for m, name := range map[*member]string{a: "vm", c: "mine"} {
		if v := m.vm(name); v.Tier != appraise.Contraindicated || !hasCode(v.Reasons, CodeTwice) {
			t.Errorf("%+v", v.Appraisal)
		}
	}
	page := string(testkit.Must[[]byte](t)(os.ReadFile("../../../packaging/man/virt-trust-verifier-appraisal.7")))
	for _, code := range []string{CodeTwice, CodeElsewhere, CodeMoved} {
		if !strings.Contains(page, ".It Ql "+code+"\n") {
			t.Errorf("%s is not in virt-trust-verifier-appraisal(7)", code)
		}
	}
	// And one that is gone here, and new there with another vTPM.
	two.Delete(squat)
	c.round(forge.Options{})
	a.round(forge.Options{})
	one.Delete(one.VMs[0])
	a.round(forge.Options{})
	two.VMs = append(two.VMs, squat)
	two.Start(squat, bootLog(t, "sd"), n...)
	two.Tick(5 * time.Minute)
	b.clock.Pass(5 * time.Minute)
	c.round(forge.Options{})
	if v := c.vm("mine"); v.Tier != appraise.Warning || !hasCode(v.Reasons, CodeMoved) {
		t.Errorf("%+v", v.Appraisal)
	}
	c.round(forge.Options{})
	if v := c.vm("mine"); v.Tier != appraise.Affirming {
		t.Errorf("%+v", v.Appraisal)
	}
}

// A node that is revoked has no rounds from the next request on, over a connection
// that stands.
func TestRevoked(t *testing.T) {
	b := newBench(t, nil)
	m := b.join("host-a", b.newHost("one"))
	r := m.round(forge.Options{}).Next
	set := func(s fleet.NodeState) {
		b.do(func(ctx context.Context, tx *store.Tx) error {
			n, err := tx.Node(ctx, m.id)
			if err != nil {
				return err
			}
			n.State = s
			_, err = tx.UpdateNode(ctx, n)
			return err
		})
	}
	set(fleet.Revoked)
	b.want("evidence", m.send(m.evidence(r, forge.Options{})), http.StatusForbidden, ca.NodeRevoked)
	b.want("rounds", b.post(m.http, "/v1/nodes/"+m.id+"/rounds", "application/json", "", nil), http.StatusForbidden, ca.NodeRevoked)
	b.want("challenges", b.post(m.http, "/v1/nodes/"+m.id+"/challenges", "application/json", "", nil), http.StatusForbidden, ca.NodeRevoked)
	if got := m.result(); got.Host.Tier != appraise.None {
		t.Errorf("%+v", got)
	}
	unknown := "11111111-1111-4111-8111-111111111111"
	b.want("unknown", b.post(m.http, "/v1/nodes/"+unknown+"/challenges", "application/json", "", nil), http.StatusGone, ca.NodeUnknown)
}

// The database goes away and comes back: nothing is made up meanwhile.
func TestStoreAway(t *testing.T) {
	b := newBench(t, nil)
	m := b.join("host-a", b.newHost("one"))
	r := m.round(forge.Options{}).Next
	b.store.Close()
	if a := m.send(m.evidence(r, forge.Options{})); a.status < 500 {
		t.Errorf("%d %s", a.status, a.body)
	}
	b.stop()
	b.start()
	m.http = b.client(m.cert)
	if o := m.outcome(m.send(m.evidence(r, forge.Options{}))); o.Tier != appraise.Affirming {
		t.Errorf("%+v", o)
	}
}

func TestRates(t *testing.T) {
	a := newRates(3)
	now := time.Now()
	allowed := func(remote string, at time.Time) (n int) {
		for range 10 {
			if a.allow(source(&http.Request{RemoteAddr: remote}), at) {
				n++
			}
		}
		return n
	}
	if n := allowed("192.0.2.1:1", now); n != 3 {
		t.Errorf("%d", n)
	}
	if n := allowed("192.0.2.1:2", now); n != 0 {
		t.Errorf("another port: %d", n)
	}
	if n := allowed("[::ffff:192.0.2.1]:2", now); n != 0 {
		t.Errorf("another spelling: %d", n)
	}
	if n := allowed("192.0.2.2:1", now); n != 3 {
		t.Errorf("another address: %d", n)
	}
	allowed("[2001:db8::1]:1", now)
	if n := allowed("[2001:db8::2]:1", now); n != 0 {
		t.Errorf("another of a /64: %d", n)
	}
	if n := allowed("192.0.2.1:1", now.Add(time.Minute)); n != 3 {
		t.Errorf("a minute later: %d", n)
	}
	for range 10 {
		back, ok := a.take("who gives it back", now)
		if !ok {
			t.Fatal("given back, and gone")
		}
		back()
	}
	for i := range 10_000 {
		a.allow(fmt.Sprintf("10.0.%d.%d", i/250, i%250), now)
	}
	if len(a.by) > maxAddresses {
		t.Errorf("%d addresses", len(a.by))
	}
}

// Behind one address are nodes, and somebody who asks all the time: whoever shows a
// certificate, a join token or that he is a node at all goes on.
func TestOneAddress(t *testing.T) {
	b := newBench(t, func(o *Options) { o.Anonymous = 12 })
	m, other := b.join("host-a", b.newHost()), b.join("host-b", b.newHost())
	secret, digest, err := ca.NewToken(rand.Reader, b.ca.Pin())
	if err != nil {
		t.Fatal(err)
	}
	b.do(func(ctx context.Context, tx *store.Tx) error {
		return tx.AddToken(ctx, fleet.JoinToken{Digest: digest, Expires: b.clock.Now().Add(time.Hour)})
	})
	bytes, _, err := ca.ParseToken(secret)
	if err != nil {
		t.Fatal(err)
	}
	anybody, kind := b.client(nil), "application/json"
	begin := func(token string) answer {
		return b.post(anybody, "/v1/enrolments", kind, "", fmt.Appendf(nil, `{"name": "x", "token": %q}`, token))
	}
	for range 12 {
		b.want("nobody", begin(""), http.StatusBadRequest, ca.EKUnparsable)
	}
	b.want("nobody, too often", begin(""), http.StatusTooManyRequests, ca.TooMany)
	b.want("a token of nobody's", begin(ca.SpellSecret(make([]byte, ca.SecretSize))), http.StatusTooManyRequests, ca.TooMany)
	challenges := "/challenges"
	unknown := "11111111-1111-4111-8111-111111111111"
	b.want("no node", b.post(anybody, "/v1/nodes/"+unknown+challenges, kind, "", nil), http.StatusGone, ca.NodeUnknown)
	// Each of these pays for itself, and no more than it may.
	for range 12 {
		b.want("a good token", begin(ca.SpellSecret(bytes)), http.StatusBadRequest, ca.EKUnparsable)
		if a := b.post(anybody, "/v1/nodes/"+m.id+challenges, kind, "", nil); a.status != http.StatusCreated {
			t.Errorf("a node that was started anew: %d %s", a.status, a.body)
		}
	}
	b.want("a good token, too often", begin(ca.SpellSecret(bytes)), http.StatusTooManyRequests, ca.TooMany)
	b.want("a node, too often", b.post(anybody, "/v1/nodes/"+m.id+challenges, kind, "", nil), http.StatusTooManyRequests, ca.TooMany)
	for range 12 {
		if a := b.post(m.http, "/v1/nodes/"+m.id+challenges, kind, "", nil); a.status != http.StatusCreated {
			t.Errorf("a node with its certificate: %d %s", a.status, a.body)
		}
		if a := b.post(m.http, "/v1/nodes/"+m.id+"/rounds", kind, "", nil); a.status != http.StatusCreated {
			t.Errorf("its rounds: %d %s", a.status, a.body)
		}
	}
	if a := b.post(anybody, "/v1/nodes/"+other.id+challenges, kind, "", nil); a.status != http.StatusCreated {
		t.Errorf("another node: %d %s", a.status, a.body)
	}
	// What it costs to find that out is bounded.
	last := answer{}
	for range doubtRate * 12 {
		last = b.post(anybody, "/v1/nodes/"+unknown+challenges, kind, "", nil)
	}
	b.want("no node, all the time", last, http.StatusTooManyRequests, ca.TooMany)
}

// Open challenges are counted for each node, not for the address that many have.
func TestOpenChallenges(t *testing.T) {
	b := newBench(t, nil)
	b.stop()
	b.open = 2
	b.start()
	m, other := b.join("host-a", b.newHost()), b.join("host-b", b.newHost())
	ask := func(m *member) answer {
		return b.post(b.client(nil), "/v1/nodes/"+m.id+"/challenges", "application/json", "", nil)
	}
	for range 2 {
		if a := ask(m); a.status != http.StatusCreated {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
	b.want("too many of one node", ask(m), http.StatusTooManyRequests, ca.TooMany)
	if a := ask(other); a.status != http.StatusCreated {
		t.Errorf("another node: %d %s", a.status, a.body)
	}
}
