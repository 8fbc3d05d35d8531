package page

import (
	"bytes"
	"context"
	"fmt"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/page/pagetest"
	"virt-trust/internal/verifier/store"
)

func (h *harness) state(node string) fleet.NodeState {
	h.t.Helper()
	s, err := h.Store.Status(context.Background(), node)
	if err != nil {
		h.t.Fatal(err)
	}
	return s.State
}

func (h *harness) values(f store.ValueFilter) []fleet.Value {
	h.t.Helper()
	vs, _, err := h.Store.Values(context.Background(), f, store.Page{})
	if err != nil {
		h.t.Fatal(err)
	}
	return vs
}

// TestRoles posts every form as everyone: who may not is refused before the form
// is read, and nothing is done.
func TestRoles(t *testing.T) {
	h := newFleet(t)
	round := h.newest(pagetest.Odd)
	for path, need := range map[string]operate.Role{
		"/nodes/" + pagetest.Waiting + "/approve": operate.Operator, "/nodes/" + pagetest.Waiting + "/reject": operate.Operator,
		"/nodes/" + pagetest.Good + "/revoke": operate.Operator, "/nodes/" + pagetest.Claimed + "/dismiss": operate.Operator, "/nodes/" + pagetest.Claimed + "/learn": operate.Operator,
		"/nodes/" + pagetest.Odd + "/rounds/" + round + "/approve": operate.Operator, "/values/add": operate.Policy, "/values/import": operate.Policy,
		"/values/approve": operate.Policy, "/values/reject": operate.Policy, "/policy/approve": operate.Policy, "/policy/reject": operate.Policy,
		"/tokens": operate.Operator, "/tokens/revoke": operate.Operator, "/webhooks": operate.Policy, "/webhooks/1/remove": operate.Policy, "/webhooks/1/test": operate.Policy,
	} {
		for _, a := range []operate.Actor{{}, reader, operator} {
			if a.Role >= need {
				continue
			}
			w := h.as(a).do("POST", path, url.Values{"why": {"x"}, "id": {"1"}})
			want := http.StatusForbidden
			if !a.Known() {
				want = http.StatusSeeOther
			}
			if w.Code != want {
				t.Errorf("%s as %s: %d", path, a.Role, w.Code)
			}
		}
	}
	if h.state(pagetest.Waiting) != fleet.Pending || h.state(pagetest.Good) != fleet.Active {
		t.Error("something was done")
	}
}

func TestCrossOrigin(t *testing.T) {
	h := newFleet(t).as(operator)
	r := httptest.NewRequest("POST", "/nodes/"+pagetest.Waiting+"/approve", nil)
	r.Header.Set("Sec-Fetch-Site", "cross-site")
	w := httptest.NewRecorder()
	h.Page.ServeHTTP(w, r)
	if w.Code != http.StatusForbidden || h.state(pagetest.Waiting) != fleet.Pending {
		t.Errorf("%d, %s", w.Code, h.state(pagetest.Waiting))
	}
	r = httptest.NewRequest("POST", "https://verifier.example/nodes/"+pagetest.Waiting+"/approve", nil)
	r.Header.Set("Origin", "https://evil.example")
	w = httptest.NewRecorder()
	if h.Page.ServeHTTP(w, r); w.Code != http.StatusForbidden {
		t.Error(w.Code)
	}
}

func TestNodes(t *testing.T) {
	h := newFleet(t).as(operator)
	if !strings.Contains(h.get("/approvals"), "kvm-21.example.net") {
		t.Fatal("it does not wait")
	}
	to := h.post("/nodes/"+pagetest.Waiting+"/approve", url.Values{"back": {"/approvals"}})
	if to != "/approvals?done=node-approved" || h.state(pagetest.Waiting) != fleet.Active {
		t.Error(to, h.state(pagetest.Waiting))
	}
	if !strings.Contains(h.get(to), "was let in") {
		t.Error("the page does not say what was done")
	}
	if w := h.do("POST", "/nodes/"+pagetest.Waiting+"/approve", url.Values{}); w.Code != http.StatusConflict {
		t.Errorf("twice: %d", w.Code)
	}
	to = h.post("/nodes/"+pagetest.Good+"/revoke", url.Values{"why": {"<b>sold</b>"}, "back": {"//evil.example"}})
	if to != "/nodes/"+pagetest.Good+"?done=node-revoked" || h.state(pagetest.Good) != fleet.Revoked {
		t.Error(to)
	}
	if body := h.get(to); !strings.Contains(body, "&lt;b&gt;sold") || strings.Contains(body, "tier big affirming") {
		t.Error("a revoked node's page")
	}
	h.post("/nodes/"+pagetest.Claimed+"/learn", url.Values{})
	if n, err := h.Store.Status(context.Background(), pagetest.Claimed); err != nil || !n.Learns {
		t.Errorf("%+v %v", n.Node, err)
	}
	h.post("/nodes/"+pagetest.Claimed+"/dismiss", url.Values{})
	if strings.Contains(h.get("/nodes/"+pagetest.Claimed), "Identity in doubt") {
		t.Error("the problem was not put aside")
	}
	if w := h.do("POST", "/nodes/nothing/approve", url.Values{}); w.Code != http.StatusNotFound {
		t.Error(w.Code)
	}
	body := h.get("/audit")
	for _, want := range []string{"The chain is whole", "node.approve", "oskar"} {
		if !strings.Contains(body, want) {
			t.Errorf("the audit log lacks %q", want)
		}
	}
}

// TestFourEyes: a change on a host is proposed by one, cannot be approved by the
// same person, says so, and counts once another approved it.
func TestFourEyes(t *testing.T) {
	h := newFleet(t).as(policyA)
	round := h.newest(pagetest.BadHost)
	path := "/nodes/" + pagetest.BadHost + "/rounds/" + round
	if body := h.get(path); !strings.Contains(body, `value="host:0"`) {
		t.Fatal(body)
	}
	if w := h.do("POST", path+"/approve", url.Values{}); w.Code != http.StatusBadRequest {
		t.Errorf("nothing ticked: %d", w.Code)
	}
	if w := h.do("POST", path+"/approve", url.Values{"ref": {"host:99"}}); w.Code != http.StatusBadRequest {
		t.Errorf("a finding that is none: %d", w.Code)
	}
	if to := h.post(path+"/approve", url.Values{"ref": {"host:0"}}); to != path+"?done=values-proposed" {
		t.Fatal(to)
	}
	subject := pagetest.BadHost
	vs := h.values(store.ValueFilter{Subject: &subject, State: fleet.Proposed})
	if len(vs) != 1 || vs[0].By != "alice" || vs[0].Kind != fleet.HostEvent {
		t.Fatal(vs)
	}
	if !strings.Contains(h.get("/approvals"), "yours, needs another person") {
		t.Error("alice is not told that another is needed")
	}
	form := url.Values{"id": {fmt.Sprint(vs[0].ID)}, "back": {"/approvals"}}
	w := h.do("POST", "/values/approve", form)
	if w.Code != http.StatusConflict || !strings.Contains(w.Body.String(), "second person") {
		t.Errorf("by the same person: %d", w.Code)
	}
	if to := h.as(policyB).post("/values/approve", form); to != "/approvals?done=values-approved" {
		t.Error(to)
	}
	vs = h.values(store.ValueFilter{Subject: &subject, State: fleet.Approved})
	if len(vs) != 1 || vs[0].Second != "bob" {
		t.Fatal(vs)
	}
	if !strings.Contains(h.get("/values?subject="+subject), "by alice and bob") {
		t.Error("the list does not name both")
	}
	if to := h.post("/values/reject", url.Values{"id": {fmt.Sprint(vs[0].ID)}}); to != "/values?done=values-rejected" {
		t.Error(to)
	}
}

// TestApprovalsShowVMs: a host that is affirming itself, with a VM that is not.
func TestApprovalsShowVMs(t *testing.T) {
	h := newFleet(t)
	if !strings.Contains(h.get("/approvals"), "/nodes/"+pagetest.BadVM+"/rounds/"+h.newest(pagetest.BadVM)) {
		t.Error("the VM's host is not listed")
	}
}

func TestImport(t *testing.T) {
	h := newHarness(t)
	send := func(files, fields map[string]string) *httptest.ResponseRecorder {
		var b bytes.Buffer
		m := multipart.NewWriter(&b)
		for k, v := range fields {
			_ = m.WriteField(k, v)
		}
		for k, v := range files {
			f, _ := m.CreateFormFile(k, k)
			_, _ = f.Write([]byte(v))
		}
		_ = m.Close()
		r := httptest.NewRequest("POST", "/values/import", &b)
		r.Header.Set("Content-Type", m.FormDataContentType())
		w := httptest.NewRecorder()
		h.Page.ServeHTTP(w, r)
		return w
	}
	sums := pagetest.Digest("a") + "  /usr/bin/a\n" + pagetest.Digest("b") + "  /usr/bin/b\n"
	w := send(map[string]string{"file": sums}, map[string]string{"format": "sums", "kind": "host-ima", "name": "acme"})
	if w.Code != http.StatusSeeOther || w.Header().Get("Location") != "/values?done=values-proposed" {
		t.Fatalf("%d %s %s", w.Code, w.Header().Get("Location"), w.Body)
	}
	if vs := h.values(store.ValueFilter{}); len(vs) != 2 || vs[0].State != fleet.Proposed {
		t.Error(vs)
	}
	w = send(nil, map[string]string{"format": "sums", "kind": "host-ima", "name": "acme", "content": sums})
	if w.Header().Get("Location") != "/values?done=values-known" {
		t.Error("the same again, pasted:", w.Code, w.Header().Get("Location"))
	}
	for name, c := range map[string]struct{ files, fields map[string]string }{
		"nothing":        {nil, map[string]string{"format": "sums", "name": "x"}},
		"no sums":        {map[string]string{"file": "rubbish"}, map[string]string{"format": "sums", "name": "x"}},
		"no such format": {map[string]string{"file": "x"}, map[string]string{"format": "corim"}},
		"unsigned":       {map[string]string{"file": "{}"}, map[string]string{"format": "manifest"}},
	} {
		if w := send(c.files, c.fields); w.Code != http.StatusBadRequest {
			t.Errorf("%s: %d", name, w.Code)
		}
	}
	one := url.Values{"kind": {"host-ima"}, "path": {"/usr/bin/c"}, "digest": {"sha256:" + pagetest.Digest("c")}}
	if to := h.post("/values/add", one); to != "/values?done=values-proposed" {
		t.Error(to)
	}
	one.Set("digest", "no digest")
	if w := h.do("POST", "/values/add", one); w.Code != http.StatusBadRequest {
		t.Error(w.Code)
	}
	r := httptest.NewRequest("POST", "/tokens", strings.NewReader("name="+strings.Repeat("x", maxForm)))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	rec := httptest.NewRecorder()
	if h.Page.ServeHTTP(rec, r); rec.Code != http.StatusBadRequest {
		t.Errorf("a form that is too large: %d", rec.Code)
	}
}

// TestTokenShownOnce: the answer has it, no list and no address does.
func TestTokenShownOnce(t *testing.T) {
	h := newHarness(t).as(operator)
	w := h.do("POST", "/tokens", url.Values{"name": {"kvm-99"}, "hours": {"24"}})
	body := w.Body.String()
	i := strings.Index(body, "vtj1.")
	if w.Code != http.StatusOK || i < 0 || w.Header().Get("Cache-Control") != "no-store" {
		t.Fatalf("%d %s", w.Code, body)
	}
	token := body[i : i+strings.IndexByte(body[i:], '<')]
	list := h.get("/tokens")
	if strings.Contains(list, token) || !strings.Contains(list, "kvm-99") {
		t.Error("the list")
	}
	ts, _, err := h.Store.Tokens(context.Background(), store.Page{})
	if err != nil || len(ts) != 1 {
		t.Fatal(ts, err)
	}
	if to := h.post("/tokens/revoke", url.Values{"digest": {ts[0].Digest}}); to != "/tokens?done=token-revoked" {
		t.Error(to)
	}
	for _, hours := range []string{"0", "-1", "x", "100000"} {
		if w := h.do("POST", "/tokens", url.Values{"hours": {hours}}); w.Code != http.StatusBadRequest {
			t.Errorf("%s hours: %d", hours, w.Code)
		}
	}
	if h.Log.Len() > 0 {
		t.Error(h.Log.String())
	}
}

func TestHooks(t *testing.T) {
	h := newHarness(t)
	w := h.do("POST", "/webhooks", url.Values{"url": {"https://example.com/x"}, "event": {"trust.changed"}})
	if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), "whsec_") {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	if body := h.get("/webhooks"); strings.Contains(body, "whsec_") || !strings.Contains(body, "example.com") {
		t.Error("the list")
	}
	hooks, err := h.Store.Hooks(context.Background())
	if err != nil || len(hooks) != 1 {
		t.Fatal(hooks, err)
	}
	id := fmt.Sprint(hooks[0].ID)
	if to := h.post("/webhooks/"+id+"/test", url.Values{}); to != "/webhooks?done=hook-test-failed" {
		t.Error(to)
	}
	if to := h.post("/webhooks/"+id+"/remove", url.Values{}); to != "/webhooks?done=hook-removed" {
		t.Error(to)
	}
	if w := h.do("POST", "/webhooks/"+id+"/remove", url.Values{}); w.Code != http.StatusNotFound {
		t.Error(w.Code)
	}
	if w := h.do("POST", "/webhooks", url.Values{"url": {"http://127.0.0.1/"}}); w.Code < 400 {
		t.Errorf("a webhook into this machine: %d", w.Code)
	}
}

// TestPolicy: a proposed policy is shown, not to be approved by who proposed it.
func TestPolicy(t *testing.T) {
	h := newHarness(t)
	s := h.Page.Operator.(*operate.Service)
	if _, err := s.SetPolicy(context.Background(), policyA, []byte(`{"x": "<b>"}`), 1); err != nil {
		t.Fatal(err)
	}
	if body := h.get("/approvals"); !strings.Contains(body, "(you): needs another person") || strings.Contains(body, "Approve the policy") || !strings.Contains(body, "&lt;b&gt;") {
		t.Error(body)
	}
	if w := h.do("POST", "/policy/approve", url.Values{"version": {"1"}}); w.Code != http.StatusConflict {
		t.Error(w.Code)
	}
	if to := h.as(policyB).post("/policy/approve", url.Values{"version": {"1"}}); to != "/approvals?done=policy-approved" {
		t.Error(to)
	}
}

// TestAuditBroken: a log that was changed behind the Verifier's back is shown so.
func TestAuditBroken(t *testing.T) {
	h := newFleet(t)
	h.Page.Store = forged{h.Store}
	if body := h.get("/audit"); !strings.Contains(body, "The chain is broken at entry 3") || strings.Contains(body, "is whole") {
		t.Error(body)
	}
}

type forged struct{ Reader }

func (forged) VerifyAudit(context.Context, []fleet.AuditHead, func(int64)) (fleet.AuditHead, error) {
	return fleet.AuditHead{}, fmt.Errorf("audit: %w", &fleet.AuditError{ID: 3, Why: "another hash"})
}
