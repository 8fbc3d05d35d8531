package page

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"html"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"virt-trust/internal/appraise"
	"virt-trust/internal/appraise/corim"
	"virt-trust/internal/appraise/corim/corimtest"
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
		"/values/approve": operate.Policy, "/values/reject": operate.Policy, "/policy/approve": operate.Policy, "/policy/reject": operate.Policy, "/policy/check": operate.Policy, "/policy/set": operate.Policy, "/deliveries/revive": operate.Policy,
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
		"no such format": {map[string]string{"file": "x"}, map[string]string{"format": "corin"}},
		"no CoRIM":       {map[string]string{"file": "x"}, map[string]string{"format": "corim-unsigned"}},
		"unsigned":       {map[string]string{"file": "{}"}, map[string]string{"format": "manifest"}},
	} {
		if w := send(c.files, c.fields); w.Code != http.StatusBadRequest {
			t.Errorf("%s: %d", name, w.Code)
		}
	}
	// A CoRIM, with a part that is of no use here.
	profile, sum := corimtest.Map{3: corimtest.Tagged(32, corim.Profile)}, make([]byte, 32)
	c := corimtest.CoRIM(profile, corimtest.CoMID("acme", 1, nil, corimtest.Reference(corimtest.Model("vm"), corimtest.Of(9, sum))), corimtest.Tagged(505, sum))
	w = send(map[string]string{"file": string(c)}, map[string]string{"format": "corim-unsigned", "kind": "host-ima", "subject": "group:edge"})
	if w.Code != http.StatusSeeOther || w.Header().Get("Location") != "/values?done=values-partly" {
		t.Errorf("%d %s %s", w.Code, w.Header().Get("Location"), w.Body)
	}
	if vs := h.values(store.ValueFilter{Kind: fleet.VMPCR}); len(vs) != 1 || vs[0].Subject != "group:edge" || vs[0].Detail != "comid acme" {
		t.Error(vs)
	}
	if body := h.get("/values?done=values-partly"); !strings.Contains(body, "the audit log lists them") {
		t.Error("nothing tells that parts were ignored")
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

// TestPolicy: a policy is checked before it is set, what is wrong in it is said and
// the text kept, and it is proposed; who proposed it does not approve it.
func TestPolicy(t *testing.T) {
	h := newHarness(t)
	s := h.Page.Operator.(*operate.Service)
	if body := h.as(reader).get("/policy"); strings.Contains(body, "<textarea") || !strings.Contains(body, "the one that is built in") || !strings.Contains(body, "None was set yet") {
		t.Error(body)
	}
	h.as(policyA)
	for _, c := range []struct{ text, says string }{
		{"pcrs\r\n<b>", "pcrs\n&lt;b&gt;</textarea>"}, {`{"format":"virt-trust-policy-1","id":"x","pcrs":[]}`, "no PCRs have to be quoted"}, {"", "the policy"},
		{`"` + strings.Repeat("x", appraise.MaxPolicy) + `"`, "too long"},
	} {
		w := h.do("POST", "/policy/check", url.Values{"document": {c.text}})
		if body := w.Body.String(); w.Code != http.StatusBadRequest || !strings.Contains(body, `role="alert"`) || !strings.Contains(body, `aria-invalid="true"`) || !strings.Contains(body, c.says) || strings.Contains(body, `action="/policy/set"`) {
			t.Errorf("%.40s: %d %.3000s", c.text, w.Code, body)
		}
		if w := h.do("POST", "/policy/set", url.Values{"document": {c.text}, "next": {"1"}}); w.Code != http.StatusBadRequest {
			t.Errorf("%.40s: %d", c.text, w.Code)
		}
	}
	if w := h.do("POST", "/policy/check", url.Values{"document": {strings.Repeat("x", maxPolicyForm)}}); w.Code != http.StatusBadRequest {
		t.Error(w.Code)
	}
	text := "{\"format\": \"virt-trust-policy-1\",\r\n\"id\": \"<b>\", \"ima\": {\"excludes\": [\"/a b\"]}}"
	w := h.do("POST", "/policy/check", url.Values{"document": {text}})
	form := regexp.MustCompile(`(?s)name="next" value="(\d+)"><input type="hidden" name="document" value="([^"]*)"`).FindStringSubmatch(w.Body.String())
	if w.Code != http.StatusOK || form == nil || !strings.Contains(w.Body.String(), "Propose this policy") || !strings.Contains(w.Body.String(), "/a b") || strings.Contains(w.Body.String(), "<b>") {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	if _, err := s.ProposedPolicy(context.Background(), reader); !errors.Is(err, operate.ErrNotFound) {
		t.Errorf("checking proposed it: %v", err)
	}
	set := url.Values{"next": {form[1]}, "document": {html.UnescapeString(form[2])}}
	if to := h.post("/policy/set", set); to != "/policy?done=policy-proposed" || !strings.Contains(h.get(to), "counts once another person approves it") {
		t.Error(to)
	}
	if w := h.do("POST", "/policy/set", set); w.Code != http.StatusConflict { // another was proposed meanwhile
		t.Error(w.Code)
	}
	if body := h.get("/"); !strings.Contains(body, `<span class="count">1<span class="vh"> waiting`) {
		t.Error("the proposed policy is not among what waits")
	}
	if body := h.get("/approvals"); !strings.Contains(body, "(you): needs another person") || strings.Contains(body, "Approve the policy") || !strings.Contains(body, "ima.excludes") || strings.Contains(body, "<b>") {
		t.Error(body)
	}
	if w := h.do("POST", "/policy/approve", url.Values{"version": {"1"}}); w.Code != http.StatusConflict {
		t.Error(w.Code)
	}
	if to := h.as(policyB).post("/policy/approve", url.Values{"version": {"1"}}); to != "/approvals?done=policy-approved" {
		t.Error(to)
	}
	now, _, err := s.PolicyNow(context.Background(), reader)
	if want := `{"format":"virt-trust-policy-1","id":"<b>","ima":{"excludes":["/a b"]}}`; err != nil || string(now.Data) != want {
		t.Errorf("%s, %v", now.Data, err)
	}
	w = h.do("POST", "/policy/check", set)
	if !strings.Contains(w.Body.String(), "nothing to set") || strings.Contains(w.Body.String(), `action="/policy/set"`) {
		t.Error(w.Body)
	}

	// Without four eyes; and the history, from which an earlier one is taken up.
	h.Page.FourEyes, s.FourEyes = false, false
	w = h.do("POST", "/policy/check", url.Values{"document": {`{"format":"virt-trust-policy-1","id":"two"}`}})
	if !strings.Contains(w.Body.String(), "Set this policy") || !strings.Contains(w.Body.String(), `name="next" value="2"`) {
		t.Error(w.Body)
	}
	if to := h.post("/policy/set", url.Values{"document": {`{"format":"virt-trust-policy-1","id":"two"}`}, "next": {"2"}}); to != "/policy?done=policy-set" {
		t.Error(to)
	}
	if body := h.get("/policy"); !strings.Contains(body, "version 2, set by") || !strings.Contains(body, `<a href="/policy?version=1">`) || !strings.Contains(body, "/a b <span class=\"muted\">gone") {
		t.Error(body)
	}
	if body := h.get("/policy?version=1"); !strings.Contains(body, "Version 1, which does not count any more") || strings.Count(body, "/a b") < 3 { // shown, in the editor, in the history
		t.Error(body)
	}
	h.get("/policy?version=0")
	for _, v := range []string{"3", "-1", "x", ""} {
		if w := h.do("GET", "/policy?version="+v, nil); w.Code != http.StatusNotFound {
			t.Errorf("version %q: %d", v, w.Code)
		}
	}
}

// What the editor shows of a policy goes through reveal as it is: what is set is
// what was typed.
func TestPolicyTextIsRevealed(t *testing.T) {
	var all strings.Builder
	for r := rune(1); r <= unicode.MaxRune; r++ {
		if utf8.ValidRune(r) && r != '"' && r != '\\' && r >= ' ' {
			all.WriteRune(r)
		}
	}
	text, ok := appraise.PolicyText([]byte(`"` + all.String() + `"`))
	if !ok || string(reveal([]byte(text))) != text {
		t.Error("the editor's text is changed on its way")
	}
}

// TestRevive: what was given up is queued anew, one or all that are shown.
func TestRevive(t *testing.T) {
	h := newFleet(t)
	dead := func() int {
		t.Helper()
		_, n, err := h.Store.Queued(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if body := h.as(operator).get("/webhooks"); !strings.Contains(body, "503 Service Unavailable") || strings.Contains(body, "/deliveries/revive") {
		t.Error(body)
	}
	ids := regexp.MustCompile(`name="id" value="(\d+)"`).FindAllStringSubmatch(h.as(policyA).get("/webhooks"), -1)
	if dead() != 2 || len(ids) != 4 { // each alone, and both
		t.Fatalf("%d, %v", dead(), ids)
	}
	if to := h.post("/deliveries/revive", url.Values{"id": {ids[0][1]}}); to != "/webhooks?done=revived" || dead() != 1 {
		t.Errorf("%s, %d", to, dead())
	}
	if w := h.do("POST", "/deliveries/revive", url.Values{"id": {ids[1][1], "99"}}); w.Code != http.StatusNotFound || dead() != 1 {
		t.Errorf("%d, %d", w.Code, dead())
	}
	for _, id := range []string{"", "x", "-1"} {
		if w := h.do("POST", "/deliveries/revive", url.Values{"id": {id}}); w.Code != http.StatusBadRequest {
			t.Errorf("%q: %d", id, w.Code)
		}
	}
	h.post("/deliveries/revive", url.Values{"id": {ids[1][1]}})
	if body := h.get("/webhooks?done=revived"); dead() != 0 || !strings.Contains(body, "queued anew") || strings.Contains(body, "Given up") || !strings.Contains(body, "2 deliveries wait") {
		t.Error(body)
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
