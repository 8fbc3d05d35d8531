package page

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/login"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/page/pagetest"
	"virt-trust/internal/verifier/store"
)

// paths are all pages of the fleet of pagetest.
func (h *harness) paths() []string {
	bad := "/nodes/" + pagetest.BadVM
	return []string{
		"/", "/?q=kvm-0&tier=affirming", "/?state=revoked", "/?problem=1", "/vms", "/vms?tier=contraindicated", bad, "/nodes/" + pagetest.BadHost, "/nodes/" + pagetest.Odd,
		"/nodes/" + pagetest.Silent, "/nodes/" + pagetest.Waiting, "/nodes/" + pagetest.Claimed, "/nodes/" + pagetest.Revoked, bad + "/vms/" + pagetest.Vault,
		bad + "/rounds", bad + "/rounds?only=bad", bad + "/rounds?vm=" + pagetest.Vault, bad + "/rounds/" + h.newest(pagetest.BadVM), h.diffPath(pagetest.BadVM),
		"/approvals", "/values", "/values?kind=host-ima&state=proposed&source=file", "/values?subject=" + pagetest.Good, "/tokens", "/webhooks", "/audit",
		"/policy", "/policy?version=1",
	}
}

func TestEveryPageForEveryRole(t *testing.T) {
	h := newFleet(t)
	forms := map[operate.Role]int{}
	for _, path := range h.paths() {
		for _, a := range []operate.Actor{reader, operator, policyA} {
			body := h.as(a).get(path)
			for _, want := range []string{"<h1>", `id="main"`, `class="skip"`, "<title>", a.Name + "</span>, " + a.Role.String()} {
				if !strings.Contains(body, want) {
					t.Errorf("%s for %s lacks %q", path, a.Role, want)
				}
			}
			if strings.Contains(body, "ZgotmplZ") || strings.Contains(body, "<no value>") || strings.Contains(body, "%!") {
				t.Errorf("%s for %s: a template failed quietly", path, a.Role)
			}
			forms[a.Role] += strings.Count(body, `method="post"`) - 1 // that to log out
		}
		h.as(operate.Actor{})
		if w := h.do("GET", path, nil); w.Code != http.StatusSeeOther || !strings.HasPrefix(w.Header().Get("Location"), "/login") {
			t.Errorf("%s for nobody: %d to %q", path, w.Code, w.Header().Get("Location"))
		}
	}
	if forms[operate.Reader] != 0 {
		t.Errorf("a reader is shown %d forms", forms[operate.Reader])
	}
	if forms[operate.Operator] <= forms[operate.Reader] || forms[operate.Policy] <= forms[operate.Operator] {
		t.Errorf("forms by role: %v", forms)
	}
	if h.Log.Len() > 0 {
		t.Error(h.Log.String())
	}
}

func TestReaderGetsNoButton(t *testing.T) {
	h := newFleet(t).as(reader)
	for _, path := range h.paths() {
		body := h.get(path)
		body = strings.ReplaceAll(body, "<button>Log out</button>", "")
		body = regexp.MustCompile(`<button>(Filter|What changed\?)</button>`).ReplaceAllString(body, "")
		if strings.Contains(body, "<button") || strings.Contains(body, `type="checkbox"`) {
			t.Errorf("%s has a button or a box for a reader", path)
		}
	}
}

func TestHeaders(t *testing.T) {
	h := newFleet(t)
	for _, path := range append(h.paths(), "/nodes/nothing", "/login", h.Page.assets["live.js"].url) {
		got := h.do("GET", path, nil).Header()
		for k, want := range map[string]string{
			"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY", "Content-Security-Policy": policy,
		} {
			if got.Get(k) != want {
				t.Errorf("%s: %s: %q", path, k, got.Get(k))
			}
		}
	}
	for _, want := range []string{"default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "script-src 'self'", "require-trusted-types-for 'script'"} {
		if !strings.Contains(policy, want) {
			t.Errorf("the policy lacks %s", want)
		}
	}
	if strings.Contains(policy, "unsafe") || strings.Contains(policy, "data:") || strings.Contains(policy, "http") {
		t.Error(policy)
	}
}

// TestNoOutsideNorInline: nothing is fetched from elsewhere, and nothing stands
// inline that the policy would forbid.
func TestNoOutsideNorInline(t *testing.T) {
	h := newFleet(t)
	bad := regexp.MustCompile(`(?i)<style|\sstyle=|\son[a-z]+=|<script(?: [^>]*)?>[^<]|(?:src|href|action)="(?:https?:)?//|javascript:`)
	for _, path := range h.paths() {
		if m := bad.FindString(h.get(path)); m != "" {
			t.Errorf("%s: %q", path, m)
		}
	}
	for name, a := range h.Page.assets {
		if bytes.Contains(bytes.ReplaceAll(a.body, []byte("http://www.w3.org/2000/svg"), nil), []byte("://")) {
			t.Errorf("%s names another host", name)
		}
	}
}

func TestEmptyFleet(t *testing.T) {
	h := newHarness(t)
	if body := h.get("/"); !strings.Contains(body, "No host is enrolled yet") {
		t.Error(body)
	}
	for _, path := range []string{"/vms", "/approvals", "/values", "/policy", "/tokens", "/webhooks", "/audit"} {
		h.get(path)
	}
}

func TestFleetSaysWhatIsWorstFirst(t *testing.T) {
	h := newFleet(t)
	body := h.get("/")
	first := body[strings.Index(body, `id="first"`):strings.Index(body, `id="h-hosts"`)]
	last := -1
	for _, want := range []string{"kvm-03.example.net", "event-unknown", "vault-04", "result-expired", "ima-unknown", "launcher-unknown"} {
		i := strings.Index(first, want)
		if i <= last {
			t.Fatalf("%q is not where it belongs:\n%s", want, first)
		}
		last = i
	}
	if strings.Contains(first, "files-07") {
		t.Error("a VM that is only as bad as its host stands beside its host")
	}
}

// TestExpired: what was affirmed is none a moment after its result expired, on
// every page, and says so.
func TestExpired(t *testing.T) {
	h := newFleet(t)
	vm := "/nodes/" + pagetest.Good + "/vms/" + pagetest.GoodVM
	if body := h.get(vm); !strings.Contains(body, `tier big affirming`) {
		t.Fatal("it was not affirmed to begin with")
	}
	h.pass(4 * time.Minute)
	for _, path := range []string{vm, "/nodes/" + pagetest.Good, "/", "/vms", "/?q=kvm-01"} {
		body := h.get(path)
		body = regexp.MustCompile(`(?s)<section[^>]* id="rounds".*?</section>|<ul class="legend".*?</ul>|<ul class="tally">.*?</ul>|<select.*?</select>`).ReplaceAllString(body, "")
		if strings.Contains(body, `class="tier affirming`) || strings.Contains(body, `tier big affirming`) || strings.Contains(body, `<a class="affirming"`) || strings.Contains(body, `class="sign affirming`) {
			t.Errorf("%s: something is still affirmed", path)
		}
		if path != "/vms" && !strings.Contains(body, "result expired") && !strings.Contains(body, store.CodeExpired) {
			t.Errorf("%s does not say that it expired", path)
		}
	}
	if !strings.Contains(h.get("/"), "<b>0</b> affirming") {
		t.Error("the count still has something affirmed")
	}
}

func TestNotFound(t *testing.T) {
	h := newFleet(t)
	bad := "/nodes/" + pagetest.BadVM
	other := h.newest(pagetest.Good)
	for _, path := range []string{
		"/nodes/x", "/nodes/x/rounds", "/nodes/x/vms/y", bad + "/vms/y", bad + "/rounds/0", bad + "/rounds/x", bad + "/rounds/" + other, bad + "/diff?from=1&to=" + other,
		bad + "/diff", "/nowhere", "/assets/style.css", "/nodes/" + pagetest.Good + "/vms/" + pagetest.Vault,
	} {
		if w := h.do("GET", path, nil); w.Code != http.StatusNotFound || !strings.Contains(w.Body.String(), "Not found") {
			t.Errorf("%s: %d", path, w.Code)
		}
	}
}

// TestNothingWrongIsNotAllGood: a VM that could not be appraised is never covered
// by "every VM is affirmed".
func TestNothingWrongIsNotAllGood(t *testing.T) {
	h := newHarness(t)
	if err := h.Build.Put(t.Context(), h.Build.Node(pagetest.Good, "kvm-01", fleet.Active)); err != nil {
		t.Fatal(err)
	}
	v := pagetest.VM(pagetest.GoodVM, "vm")
	if _, err := h.Build.Round(t.Context(), pagetest.Result(pagetest.Good, "kvm-01", v), h.Now()); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(h.get("/"), "Every host and VM is affirmed") {
		t.Error("all is good, and the page does not say so")
	}
	v.Tier, v.Running, v.Reasons = appraise.None, false, []appraise.Reason{{Code: appraise.CodeVMNotRunning}}
	if _, err := h.Build.Round(t.Context(), pagetest.Result(pagetest.Good, "kvm-01", v), h.Now()); err != nil {
		t.Fatal(err)
	}
	if body := h.get("/"); strings.Contains(body, "is affirmed") || !strings.Contains(body, "could be appraised") {
		t.Error("a VM without a result is taken for affirmed")
	}
}

func TestFilterAndPages(t *testing.T) {
	h := newHarness(t)
	ctx := context.Background()
	for i := range 120 {
		n := h.Build.Node(pagetest.ID("page", i), "h"+strings.Repeat("x", i%3)+string(rune('a'+i/26))+string(rune('a'+i%26)), fleet.Active)
		if err := h.Build.Put(ctx, n); err != nil {
			t.Fatal(err)
		}
	}
	seen, path := map[string]bool{}, "/?q=h"
	link := regexp.MustCompile(`<a href="/nodes/([0-9a-f-]{36})"><bdi`)
	next := regexp.MustCompile(`<a class="button" href="([^"]*)">Next page`)
	pages := 0
	for path != "" {
		body := h.get(path)
		hosts := body[strings.Index(body, `id="h-hosts"`):]
		for _, m := range link.FindAllStringSubmatch(hosts, -1) {
			if seen[m[1]] {
				t.Errorf("%s twice", m[1])
			}
			seen[m[1]] = true
		}
		path = ""
		if m := next.FindStringSubmatch(body); m != nil {
			path = strings.ReplaceAll(m[1], "&amp;", "&")
		}
		pages++
	}
	if len(seen) != 120 || pages != 3 {
		t.Errorf("%d hosts on %d pages", len(seen), pages)
	}
	if body := h.get("/?q=hxx"); strings.Count(body, `<th scope="row">`) != 40 {
		t.Errorf("%d hosts are like hxx", strings.Count(body, `<th scope="row">`))
	}
	if w := h.do("GET", "/?after=rubbish", nil); w.Code != http.StatusBadRequest {
		t.Errorf("a page that is none: %d", w.Code)
	}
}

func TestLogin(t *testing.T) {
	h := newHarness(t).as(operate.Actor{})
	for _, why := range []string{"token", "oidc", "role", "unavailable", "<b>"} {
		body := h.get("/login?failed=" + url.QueryEscape(why) + "&next=" + url.QueryEscape("/nodes/x?a=b"))
		if !strings.Contains(body, `role="alert"`) || strings.Contains(body, "<b>\"") || !strings.Contains(body, `value="/nodes/x?a=b"`) {
			t.Errorf("%s: %s", why, body)
		}
		if strings.Contains(body, "/approvals") {
			t.Error("who is not logged in is shown the navigation")
		}
	}
	w := h.do("GET", "/nodes/x?y=1", nil)
	if w.Header().Get("Location") != "/login?next="+url.QueryEscape("/nodes/x?y=1") {
		t.Error(w.Header().Get("Location"))
	}
}

func TestActorErrors(t *testing.T) {
	h := newHarness(t)
	for err, code := range map[error]int{login.ErrRefused: http.StatusSeeOther, store.ErrUnavailable: http.StatusServiceUnavailable, errors.New("odd"): http.StatusInternalServerError} {
		h.Page.Actor = func(*http.Request) (operate.Actor, error) { return operate.Actor{}, err }
		if w := h.do("GET", "/", nil); w.Code != code || strings.Contains(w.Body.String(), "odd") {
			t.Errorf("%v: %d", err, w.Code)
		}
	}
}

// TestDatabaseGone: no page shows anything as trusted, each says why, and asks to
// come again.
func TestDatabaseGone(t *testing.T) {
	h := newFleet(t)
	paths := h.paths()
	h.Page.Store, h.Page.Operator = gone{h.Store}, goneOperator{h.Page.Operator}
	for _, path := range paths {
		w := h.do("GET", path, nil)
		if w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" || strings.Contains(w.Body.String(), "affirming") {
			t.Errorf("%s: %d", path, w.Code)
		}
	}
}

// gone is a store whose database does not answer. TestDatabaseGone alone uses it:
// a real one cannot be made to fail at will in every query.
type gone struct{ Reader }

type goneOperator struct{ Operator }

func (goneOperator) PolicyNow(context.Context, operate.Actor) (fleet.Setting, int64, error) {
	return fleet.Setting{}, 0, store.ErrUnavailable
}

func (gone) Summary(context.Context) (fleet.Summary, error) {
	return fleet.Summary{}, store.ErrUnavailable
}
func (gone) Status(context.Context, string) (fleet.Status, error) {
	return fleet.Status{}, store.ErrUnavailable
}
func (gone) Nodes(context.Context, store.NodeFilter, store.Page) ([]fleet.Status, string, error) {
	return nil, "", store.ErrUnavailable
}
func (gone) VMs(context.Context, store.VMFilter, store.Page) ([]fleet.VM, string, error) {
	return nil, "", store.ErrUnavailable
}
func (gone) Values(context.Context, store.ValueFilter, store.Page) ([]fleet.Value, string, error) {
	return nil, "", store.ErrUnavailable
}
func (gone) Tokens(context.Context, store.Page) ([]fleet.JoinToken, string, error) {
	return nil, "", store.ErrUnavailable
}
func (gone) Hooks(context.Context) ([]fleet.Hook, error) { return nil, store.ErrUnavailable }
func (gone) AuditLog(context.Context, store.AuditFilter, store.Page) ([]fleet.AuditEntry, string, error) {
	return nil, "", store.ErrUnavailable
}

// TestHostile: what hosts and guests call things is text wherever it stands.
func TestHostile(t *testing.T) {
	h := newHarness(t)
	node, vm := h.hostile()
	rounds := h.roundsOf(node)
	round := rounds[0]
	for _, path := range []string{"/", "/vms", "/nodes/" + node, "/nodes/" + node + "/vms/" + vm, "/nodes/" + node + "/rounds", "/approvals", "/values", "/policy", "/policy?version=1", "/webhooks", "/audit", "/?q=" + url.QueryEscape(payload),
		"/nodes/" + node + "/rounds/" + h.newest(node), "/vms?q=" + url.QueryEscape(payload), "/values?q=" + url.QueryEscape(payload) + "&subject=" + url.QueryEscape(payload),
		"/nodes/" + node + "/rounds?vm=" + url.QueryEscape(payload), h.diffPath(node)} {
		body := h.get(path)
		for _, never := range []string{"<img src=x", "<script>alert", "<svg/onload", "\u202e", "\u200b", "\x1b", "javascript:alert(1)\""} {
			if strings.Contains(body, never) {
				t.Errorf("%s has %q", path, never)
			}
		}
	}
	w := h.do("POST", "/policy/check", url.Values{"document": {"{" + payload}})
	if body := w.Body.String(); w.Code != http.StatusBadRequest || strings.Contains(body, "<img src=x") || strings.Contains(body, "\u202e") {
		t.Error(body)
	}
	body := h.get("/nodes/" + node + "/vms/" + vm)
	for _, want := range []string{"⟨U+202E⟩", "&lt;script&gt;", "<details class=\"long\">", strings.Repeat("A", 3000)} {
		if !strings.Contains(body, want) {
			t.Errorf("the VM's page lacks %.40q", want)
		}
	}
	if round.HostTier != "contraindicated" {
		t.Error(round.HostTier)
	}
}

// payload tries to leave text, attribute, SVG, title, script and address.
const payload = "\"'></textarea></pre><img src=x onerror=alert(1)></title></svg><script>alert(2)</script><svg/onload=alert(3)>{{.}}${1}\u202egnp.exe\u200b\x1b[31m"

// hostile adds a node whose every text is the payload, and gives it and its VM.
func (h *harness) hostile() (node, vm string) {
	h.t.Helper()
	ctx := context.Background()
	node, vm = pagetest.ID("hostile", 1), pagetest.ID("hostile", 2)
	n := h.Build.Node(node, "evil.example.net", fleet.Active)
	n.Problem, n.EKTrust, n.AgentAddress, n.ApprovedBy = payload, payload, "javascript:alert(1)", payload
	if err := h.Build.Put(ctx, n); err != nil {
		h.t.Fatal(err)
	}
	zero := uint(4)
	long := "javascript:alert(4)//" + payload + strings.Repeat("A", 3000)
	r := appraise.Reason{Code: appraise.CodeVMPCR, Tier: appraise.Contraindicated, What: payload, Log: payload, Entry: new(int), PCR: &zero, Path: long, Digest: payload, Expected: payload}
	v := pagetest.VM(vm, payload)
	v.Tier, v.Reasons, v.PCRs = appraise.Contraindicated, []appraise.Reason{r}, appraise.NewPCRs(map[string]string{"sha256:0": payload, payload: payload})
	v.Launchers, v.EKCertificate, v.EK = []appraise.Launcher{{Role: payload, Path: long, SHA256: payload, By: payload}}, []byte("no DER <script>"), payload
	w := pagetest.VM(pagetest.ID("hostile", 3), payload)
	res := pagetest.Result(node, payload, w)
	if _, err := h.Build.Round(ctx, res, h.Now().Add(-time.Minute)); err != nil {
		h.t.Fatal(err)
	}
	host := r
	host.Code = payload
	ima := r
	ima.Code, ima.Log = appraise.CodeIMAUnknown, "ima"
	res = pagetest.Result(node, payload, v, w)
	res.Kernel, res.Software, res.BootID, res.PCRs = payload, payload, payload, appraise.NewPCRs(map[string]string{"sha256:4": payload})
	res.Host.Tier, res.Host.Reasons = appraise.Contraindicated, []appraise.Reason{host, ima}
	res.Changes = []appraise.Change{{Subject: "host", Kind: payload, What: long}, {Subject: vm, Kind: "pcr", What: payload}, {Subject: payload, Kind: "tier", What: payload}}
	if _, err := h.Build.Round(ctx, res, h.Now()); err != nil {
		h.t.Fatal(err)
	}
	err := h.Store.Do(ctx, func(tx *store.Tx) error {
		tx.Audit(fleet.AuditEntry{Actor: payload, Action: payload, Subject: payload, Detail: `{"` + "x" + `": "<script>alert(5)</script>"}`})
		for i, name := range []string{operate.PolicySetting, operate.PolicySetting, operate.ProposedSetting} {
			d, err := json.Marshal(map[string]any{"format": appraise.PolicyFormat, "id": payload[:100-i], "ima": map[string]any{"excludes": []string{"/" + payload, fmt.Sprint("/", i, long)}}})
			if err != nil {
				return err
			}
			if err := tx.PutSetting(ctx, fleet.Setting{Name: name, Version: []int64{1, 2, 1}[i], By: payload, Data: bytes.ReplaceAll(d, []byte(`\u202e`), []byte("\u202e"))}); err != nil {
				return err
			}
		}
		if _, err := tx.AddHook(ctx, fleet.Hook{URL: payload, Events: []string{payload}}); err != nil {
			return err
		}
		if _, err := tx.Enqueue(ctx, payload, []byte("{}")); err != nil {
			return err
		}
		_, err := tx.AddValues(ctx, []fleet.Value{{Subject: vm, Kind: fleet.VMPCR, Path: long, Digest: "sha256:" + strings.Repeat("0", 64), Source: "file", Detail: payload, State: fleet.Proposed, By: payload, FourEyes: true}})
		return err
	})
	if err := errors.Join(err, h.Build.GiveUp(ctx, payload)); err != nil {
		h.t.Fatal(err)
	}
	return node, vm
}

func TestAssets(t *testing.T) {
	h := newHarness(t).as(operate.Actor{}) // the style is for whoever logs in too
	for name, a := range h.Page.assets {
		w := h.do("GET", a.url, nil)
		if w.Code != http.StatusOK || w.Body.Len() != len(a.body) || !strings.Contains(w.Header().Get("Cache-Control"), "immutable") || w.Header().Get("Content-Type") != a.kind {
			t.Errorf("%s: %d, %v", name, w.Code, w.Header())
		}
	}
}

func TestHead(t *testing.T) {
	h := newFleet(t)
	srv := httptest.NewServer(h.Page)
	defer srv.Close()
	r, err := http.Head(srv.URL + "/")
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatal(r, err)
	}
	_ = r.Body.Close()
}
