package api

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	ct "virt-trust/internal/appraise/corim/corimtest"
	"virt-trust/internal/launcher/refvalues"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/rounds"
	"virt-trust/internal/verifier/store/storetest"
	"virt-trust/internal/verifier/webhook"
)

// Every route is in the document, with its role, and the other way round.
func TestDocument(t *testing.T) {
	doc := document(t)
	if err := doc.Validate(context.Background()); err != nil {
		t.Fatal(err)
	}
	code := map[string]string{}
	for _, r := range newHouse(t).api.Routes() {
		code[r.Pattern] = r.Role.String()
	}
	for _, p := range rounds.Patterns() {
		code[strings.Replace(p, "/v1/nodes/{id}", "/v1/nodes/{node}", 1)] = "node"
	}
	code["GET "+rounds.CRLPath] = operate.Nobody.String()
	for path, item := range doc.Paths.Map() {
		for method, op := range item.Operations() {
			p := method + " " + path
			if code[p] != op.Extensions["x-role"] {
				t.Errorf("%s: the document says role %v, the code %q", p, op.Extensions["x-role"], code[p])
			}
			delete(code, p)
			if op.OperationID == "" || op.Summary == "" {
				t.Errorf("%s has no id or no summary", p)
			}
		}
	}
	for p := range code {
		t.Errorf("%s is not in the document", p)
	}
}

// fill puts something into a pattern's wildcards.
func fill(pattern string) (method, path string) {
	method, path, _ = strings.Cut(pattern, " ")
	return method, strings.NewReplacer("{node}", nodeID, "{vm}", vmID, "{round}", "1", "{digest}", "0123456789", "{webhook}", "1", "{delivery}", "1", "{version}", "1").Replace(path)
}

// Each route asks for its role, whoever comes; nothing that changes anything is
// open.
func TestRoles(t *testing.T) {
	h := newHouse(t)
	tokens := []string{"", "reader-token", "operator-token", "policy-token"}
	for _, r := range h.api.Routes() {
		method, path := fill(r.Pattern)
		if method != "GET" && r.Role < operate.Operator && r.Pattern != "POST /v1/policy/check" { // which changes nothing
			t.Errorf("%s changes something and is for %s", r.Pattern, r.Role)
		}
		for role, token := range tokens {
			a := h.ask(token, method, path, nil)
			switch {
			case operate.Role(role) >= r.Role:
				if a.code == 401 || a.code == 403 || a.code >= 500 {
					t.Errorf("%s as %q: %d %s", r.Pattern, token, a.code, a.body)
				}
			case token == "":
				if a.code != 401 || a.problem() != Unauthenticated || a.header.Get("WWW-Authenticate") == "" {
					t.Errorf("%s as nobody: %d %s", r.Pattern, a.code, a.body)
				}
			default:
				if a.code != 403 || a.problem() != Forbidden {
					t.Errorf("%s as %q: %d %s", r.Pattern, token, a.code, a.body)
				}
			}
		}
		// A token that is wrong is never nobody's, not even where nobody may.
		if a := h.ask("wrong-token", method, path, nil); a.code != 401 || a.problem() != TokenRefused {
			t.Errorf("%s with a wrong token: %d %s", r.Pattern, a.code, a.body)
		}
	}
	h.want(401, TokenRefused, "", "GET", "/v1/me", nil, "Authorization", "Basic cmVhZGVyLXRva2VuOg==")
	h.want(401, TokenRefused, "", "GET", "/v1/me", nil, "Authorization", "reader-token")
	if p := decode[map[string]string](t, h.want(200, "", "operator-token", "GET", "/v1/me", nil)); p["name"] != "otto" || p["role"] != "operator" {
		t.Error(p)
	}
	h.want(404, NotFound, "policy-token", "GET", "/v1/nothing", nil)
	h.want(404, NotFound, "policy-token", "PATCH", "/v1/nodes", nil)
}

type nodeList struct {
	Items []Node
	Next  string
}

func TestNodes(t *testing.T) {
	h := newHouse(t)
	h.enrol(nodeID, "alpha", fleet.Pending)
	const other = "22222222-2222-3333-4444-555555555555"
	h.enrol(other, "beta", fleet.Active)
	h.round(h.appraised(other, appraise.Affirming, appraise.Warning), "")

	all := decode[nodeList](t, h.want(200, "", "reader-token", "GET", "/v1/nodes?limit=1", nil))
	if len(all.Items) != 1 || all.Items[0].Name != "alpha" || all.Next == "" {
		t.Fatalf("%+v", all)
	}
	all = decode[nodeList](t, h.want(200, "", "reader-token", "GET", "/v1/nodes?limit=1&after="+all.Next, nil))
	if len(all.Items) != 1 || all.Items[0].Name != "beta" || all.Items[0].Tier != appraise.Affirming || all.Items[0].VMs["warning"] != 1 {
		t.Fatalf("%+v", all)
	}
	for query, names := range map[string]string{
		"state=pending": "alpha", "tier=affirming": "beta", "tier=none": "alpha", "search=bet": "beta", "problem=true": "", "state=revoked": "",
	} {
		got := []string{}
		for _, n := range decode[nodeList](t, h.want(200, "", "reader-token", "GET", "/v1/nodes?"+query, nil)).Items {
			got = append(got, n.Name)
		}
		if strings.Join(got, " ") != names {
			t.Errorf("%s: %q, want %q", query, got, names)
		}
	}
	for _, query := range []string{"state=gone", "tier=good", "limit=0", "limit=x", "limit=1001", "stat=pending", "state=pending&state=active", "problem=perhaps"} {
		h.want(400, Invalid, "reader-token", "GET", "/v1/nodes?"+query, nil)
	}
	f := decode[map[string]any](t, h.want(200, "", "reader-token", "GET", "/v1/fleet", nil))
	if fmt.Sprint(f["nodes"].(map[string]any)["pending"]) != "1" || fmt.Sprint(f["vms"].(map[string]any)["warning"]) != "1" {
		t.Error(f)
	}

	h.want(403, Forbidden, "reader-token", "POST", "/v1/nodes/"+nodeID+"/approve", nil)
	n := decode[Node](t, h.want(200, "", "operator-token", "POST", "/v1/nodes/"+nodeID+"/approve", nil))
	if n.State != fleet.Active || n.ApprovedBy != "otto" || n.EKTrust != "admin otto" {
		t.Errorf("%+v", n)
	}
	h.want(409, Conflict, "operator-token", "POST", "/v1/nodes/"+nodeID+"/approve", nil)
	h.want(409, Conflict, "operator-token", "POST", "/v1/nodes/"+nodeID+"/reject", nil)
	h.want(404, NotFound, "operator-token", "POST", "/v1/nodes/none/approve", nil)
	h.want(400, Invalid, "operator-token", "POST", "/v1/nodes/"+nodeID+"/revoke", `{"reason": "misspelt"}`)
	h.want(400, Invalid, "operator-token", "POST", "/v1/nodes/"+nodeID+"/revoke", why{strings.Repeat("x", 1001)})
	h.want(409, Conflict, "operator-token", "POST", "/v1/nodes/"+nodeID+"/dismiss", nil)
	n = decode[Node](t, h.want(200, "", "operator-token", "POST", "/v1/nodes/"+nodeID+"/revoke", why{"sold"}))
	if n.State != fleet.Revoked || n.RevokedWhy != "sold" {
		t.Errorf("%+v", n)
	}
	n = decode[Node](t, h.want(200, "", "reader-token", "GET", "/v1/nodes/"+other, nil))
	if n.Result == nil || n.Result.Host.Tier != appraise.Affirming || len(n.Result.VMs) != 1 {
		t.Errorf("%+v", n)
	}
	h.want(404, NotFound, "reader-token", "GET", "/v1/nodes/none", nil)
	vms := decode[struct{ Items []VM }](t, h.want(200, "", "reader-token", "GET", "/v1/vms?tier=warning", nil)).Items
	if len(vms) != 1 || vms[0].NodeName != "beta" || !vms[0].Running {
		t.Errorf("%+v", vms)
	}
	h.want(400, Invalid, "reader-token", "GET", "/v1/vms?nod=x", nil)
	// All that was done stands in the log, and who did it.
	want := []string{"otto node.revoke", "otto node.approve"}
	var got []string
	for _, e := range decode[struct{ Items []fleet.AuditEntry }](t, h.want(200, "", "reader-token", "GET", "/v1/audit", nil)).Items {
		got = append(got, e.Actor+" "+e.Action)
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	export := h.want(200, "", "reader-token", "GET", "/v1/audit/export", nil)
	head, err := fleet.VerifyExport(strings.NewReader(string(export.body)))
	if err != nil || decode[fleet.AuditHead](t, h.want(200, "", "reader-token", "GET", "/v1/audit/head", nil)) != head {
		t.Errorf("%v %v", head, err)
	}
	if _, err := fleet.VerifyExport(strings.NewReader(strings.Replace(string(export.body), "otto", "olaf", 1))); err == nil {
		t.Error("a log that was changed is right")
	}
}

func TestRounds(t *testing.T) {
	h := newHouse(t)
	h.enrol(nodeID, "alpha", fleet.Active)
	good := h.round(h.appraised(nodeID, appraise.Affirming, appraise.Affirming), "")
	entry, pcr := 3, uint(10)
	bad := h.round(h.appraised(nodeID, appraise.Contraindicated, appraise.Contraindicated,
		appraise.Reason{Code: appraise.CodeIMAUnknown, Tier: appraise.Contraindicated, What: "/usr/bin/evil", Log: "ima", Entry: &entry, PCR: &pcr, Path: "/usr/bin/evil", Digest: strings.Repeat("cd", 32)},
		appraise.Reason{Code: appraise.CodeClockBack, Tier: appraise.Contraindicated, What: "the clock went back"},
	), "the evidence")
	list := decode[struct{ Items []Round }](t, h.want(200, "", "reader-token", "GET", "/v1/nodes/"+nodeID+"/rounds", nil)).Items
	if len(list) != 2 || list[0].ID != bad || list[1].ID != good || list[0].HostTier != "contraindicated" || !slices.Contains(list[0].Codes, appraise.CodeIMAUnknown) {
		t.Fatalf("%+v", list)
	}
	list = decode[struct{ Items []Round }](t, h.want(200, "", "reader-token", "GET", "/v1/nodes/"+nodeID+"/rounds?failed=true&vm="+vmID+"&since=2026-01-01T00:00:00Z", nil)).Items
	if len(list) != 1 || list[0].ID != bad {
		t.Fatalf("%+v", list)
	}
	h.want(400, Invalid, "reader-token", "GET", "/v1/nodes/"+nodeID+"/rounds?since=yesterday", nil)
	h.want(404, NotFound, "reader-token", "GET", "/v1/nodes/none/rounds", nil)

	round := fmt.Sprintf("/v1/rounds/%d", bad)
	r := decode[Round](t, h.want(200, "", "reader-token", "GET", round, nil))
	if r.Evidence != len("the evidence") || len(r.Result) == 0 {
		t.Errorf("%+v", r)
	}
	h.want(403, Forbidden, "operator-token", "GET", round+"/evidence", nil)
	if a := h.want(200, "", "policy-token", "GET", round+"/evidence", nil); string(a.body) != "the evidence" || !strings.Contains(a.header.Get("Content-Disposition"), "attachment") {
		t.Errorf("%s %v", a.body, a.header)
	}
	h.want(404, NotFound, "policy-token", "GET", fmt.Sprintf("/v1/rounds/%d/evidence", good), nil)
	h.want(404, NotFound, "reader-token", "GET", "/v1/rounds/999", nil)
	h.want(404, NotFound, "reader-token", "GET", "/v1/rounds/x", nil)

	differences := decode[struct{ Items []operate.Difference }](t, h.want(200, "", "reader-token", "GET", fmt.Sprintf("%s/diff?from=%d", round, good), nil)).Items
	text := fmt.Sprintf("%+v", differences)
	if !strings.Contains(text, "Before:affirming After:contraindicated") || !strings.Contains(text, "After:/usr/bin/evil") {
		t.Error(text)
	}
	h.want(400, Invalid, "reader-token", "GET", round+"/diff", nil)

	// Approving what it showed: an operator may, and what no value can mend is left.
	h.want(403, Forbidden, "reader-token", "POST", round+"/approve", nil)
	h.want(400, Invalid, "operator-token", "POST", round+"/approve", map[string]any{"reasons": []operate.Ref{{Subject: "host", Reason: 9}}})
	h.want(400, Invalid, "operator-token", "POST", round+"/approve", map[string]any{"reasons": []operate.Ref{{Subject: "host", Reason: 1}}})
	one := decode[operate.Approved](t, h.want(200, "", "operator-token", "POST", round+"/approve", map[string]any{"reasons": []operate.Ref{{Subject: vmID, Reason: 0}}}))
	if one.New != 1 || one.State != fleet.Approved || len(one.Left) != 0 {
		t.Errorf("%+v", one)
	}
	rest := decode[operate.Approved](t, h.want(200, "", "operator-token", "POST", round+"/approve", nil))
	if rest.Values != 2 || rest.New != 1 || len(rest.Left) != 1 || rest.Left[0].Code != appraise.CodeClockBack {
		t.Errorf("%+v", rest)
	}
	values := decode[struct{ Items []Value }](t, h.want(200, "", "reader-token", "GET", "/v1/values?state=approved", nil)).Items
	if len(values) != 2 || values[0].Kind != fleet.HostIMA || values[0].Subject != nodeID || values[1].Kind != fleet.VMPCR || values[1].Subject != vmID || values[1].Path != "sha256:4" {
		t.Errorf("%+v", values)
	}
}

func someValue(path string) appraise.ValueEntry {
	return appraise.ValueEntry{Kind: fleet.HostIMA, Path: path, Digest: "sha256:" + strings.Repeat("12", 32)}
}

func (h *house) values(query string) []Value {
	h.t.Helper()
	return decode[struct{ Items []Value }](h.t, h.want(200, "", "reader-token", "GET", "/v1/values?"+query, nil)).Items
}

func TestValues(t *testing.T) {
	h := newHouse(t)
	body := map[string]any{"values": []appraise.ValueEntry{someValue("/bin/a"), someValue("/bin/b")}}
	h.want(403, Forbidden, "operator-token", "POST", "/v1/values", body)
	if a := decode[operate.Added](t, h.want(200, "", "policy-token", "POST", "/v1/values", body)); a.New != 2 || a.State != fleet.Approved {
		t.Errorf("%+v", a)
	}
	if a := decode[operate.Added](t, h.want(200, "", "policy-token", "POST", "/v1/values", body)); a.New != 0 {
		t.Errorf("%+v", a)
	}
	for _, bad := range []any{
		`{"values": []}`, `{}`, `{"values": [{"kind": "host-ima", "path": "/x", "digest": "md5:00"}]}`, `{"values": [{"kind": "strange", "path": "/x", "digest": "sha256:00"}]}`,
		`{"values": 1}`, `{"values": []} {}`, `nonsense`, `{"valeus": []}`,
	} {
		h.want(400, Invalid, "policy-token", "POST", "/v1/values", bad)
	}
	h.want(400, Invalid, "policy-token", "POST", "/v1/values", `{}`, "Content-Type", "text/plain")
	h.want(413, TooLarge, "policy-token", "POST", "/v1/values", `{"values": "`+strings.Repeat("x", 5<<20)+`"}`)
	h.want(400, Invalid, "reader-token", "GET", "/v1/values?state=lost", nil)
	v := h.values("search=/bin/a&kind=host-ima&subject=&source=operator")
	if len(v) != 1 || v[0].By != "paula" {
		t.Fatalf("%+v", v)
	}
	h.want(403, Forbidden, "operator-token", "POST", "/v1/values/reject", ids{[]int64{v[0].ID}})
	h.want(204, "", "policy-token", "POST", "/v1/values/reject", ids{[]int64{v[0].ID}})
	h.want(409, Conflict, "policy-token", "POST", "/v1/values/reject", ids{[]int64{v[0].ID}})
	h.want(409, Conflict, "policy-token", "POST", "/v1/values/approve", ids{[]int64{v[0].ID}})
	h.want(404, NotFound, "policy-token", "POST", "/v1/values/approve", ids{[]int64{999}})
	h.want(400, Invalid, "policy-token", "POST", "/v1/values/approve", ids{[]int64{}})
	if got := h.values("state=approved"); len(got) != 1 || got[0].Path != "/bin/b" {
		t.Errorf("%+v", got)
	}
}

// With four eyes nothing counts on one person's word.
func TestFourEyes(t *testing.T) {
	h := newHouse(t, func(c *Config) { c.Operate.FourEyes = true })
	a := decode[operate.Added](t, h.want(200, "", "policy-token", "POST", "/v1/values", map[string]any{"values": []appraise.ValueEntry{someValue("/bin/a")}}))
	if a.State != fleet.Proposed || len(h.values("state=approved")) != 0 {
		t.Fatalf("%+v", a)
	}
	v := h.values("state=proposed")
	h.want(409, SamePerson, "policy-token", "POST", "/v1/values/approve", ids{[]int64{v[0].ID}})
	h.want(204, "", "second-token", "POST", "/v1/values/approve", ids{[]int64{v[0].ID}})
	if v = h.values("state=approved"); len(v) != 1 || v[0].By != "paula" || v[0].Second != "peter" {
		t.Fatalf("%+v", v)
	}
	h.want(204, "", "policy-token", "POST", "/v1/values/reject", ids{[]int64{v[0].ID}}) // what takes trust away needs no second

	h.enrol(nodeID, "alpha", fleet.Active)
	bad := h.round(h.appraised(nodeID, appraise.Affirming, appraise.Contraindicated), "e")
	approved := decode[operate.Approved](t, h.want(200, "", "operator-token", "POST", fmt.Sprintf("/v1/rounds/%d/approve", bad), nil))
	if approved.State != fleet.Proposed {
		t.Errorf("%+v", approved)
	}

	document := json.RawMessage(`{"format": "virt-trust-policy-1", "id": "strict"}`)
	set := map[string]any{"version": 1, "document": document}
	h.want(404, NotFound, "reader-token", "GET", "/v1/policy/proposed", nil)
	h.want(200, "", "policy-token", "PUT", "/v1/policy", set)
	if p := decode[Policy](t, h.want(200, "", "reader-token", "GET", "/v1/policy", nil)); p.Version != 0 || p.Next != 2 {
		t.Errorf("it counts already: %+v", p)
	}
	h.want(409, SamePerson, "policy-token", "POST", "/v1/policy/proposed/approve", version{1})
	h.want(409, Conflict, "second-token", "POST", "/v1/policy/proposed/approve", version{2})
	if p := decode[Policy](t, h.want(200, "", "second-token", "POST", "/v1/policy/proposed/approve", version{1})); p.Version != 1 || !strings.Contains(p.By, "paula") || !strings.Contains(p.By, "peter") {
		t.Errorf("%+v", p)
	}
	h.want(404, NotFound, "reader-token", "GET", "/v1/policy/proposed", nil)
	h.want(409, Conflict, "second-token", "POST", "/v1/policy/proposed/approve", version{1})
	if p := decode[Policy](t, h.want(200, "", "reader-token", "GET", "/v1/policy", nil)); p.Next != 3 { // a proposal and its end are versions
		t.Errorf("%+v", p)
	}
	set["version"] = 3
	h.want(200, "", "policy-token", "PUT", "/v1/policy", set)
	h.want(204, "", "policy-token", "POST", "/v1/policy/proposed/reject", version{3})
	if p := decode[Policy](t, h.want(200, "", "reader-token", "GET", "/v1/policy", nil)); p.Version != 1 {
		t.Errorf("%+v", p)
	}
}

func TestPolicy(t *testing.T) {
	h := newHouse(t)
	if p := decode[Policy](t, h.want(200, "", "reader-token", "GET", "/v1/policy", nil)); p.Version != 0 || p.Next != 1 || p.State != "approved" || string(p.Document) != unsetPolicy {
		t.Errorf("%+v", p)
	}
	set := func(version int, document string) map[string]any {
		return map[string]any{"version": version, "document": json.RawMessage(document)}
	}
	good := `{"format":"virt-trust-policy-1","id":"ours"}`
	h.want(403, Forbidden, "operator-token", "PUT", "/v1/policy", set(1, good))
	h.want(200, "", "policy-token", "PUT", "/v1/policy", set(1, good))
	h.want(409, Conflict, "second-token", "PUT", "/v1/policy", set(1, good)) // both had read version 0
	h.want(400, Invalid, "policy-token", "PUT", "/v1/policy", set(2, `{"format":"virt-trust-policy-1","id":"none","pcrs":[]}`))
	h.want(400, Invalid, "policy-token", "PUT", "/v1/policy", set(2, `{"format":"virt-trust-policy-1","id":"x","unknown":1}`))
	if p := decode[Policy](t, h.want(200, "", "reader-token", "GET", "/v1/policy", nil)); p.Version != 1 || p.Next != 2 || p.By != "paula" || string(p.Document) != good {
		t.Errorf("%+v", p)
	}

	// What it would change, for everybody; and what each did.
	type checked struct {
		Changes []appraise.PolicyChange
		Next    int64
	}
	document := func(d string) map[string]any { return map[string]any{"document": json.RawMessage(d)} }
	strict := `{"format": "virt-trust-policy-1", "id": "ours", "ima": {"unknown": "contraindicated"}}`
	if c := decode[checked](t, h.want(200, "", "reader-token", "POST", "/v1/policy/check", document(strict))); c.Next != 2 || !reflect.DeepEqual(c.Changes, []appraise.PolicyChange{{Key: "ima.unknown", Before: "warning", After: "contraindicated"}}) {
		t.Errorf("%+v", c)
	}
	if c := decode[checked](t, h.want(200, "", "reader-token", "POST", "/v1/policy/check", document(good))); len(c.Changes) != 0 {
		t.Errorf("%+v", c)
	}
	h.want(400, Invalid, "reader-token", "POST", "/v1/policy/check", document(`{"format":"virt-trust-policy-1"}`))
	h.want(400, Invalid, "reader-token", "POST", "/v1/policy/check", document(`"`+strings.Repeat("x", appraise.MaxPolicy)+`"`))
	h.want(400, Invalid, "reader-token", "POST", "/v1/policy/check", nil)
	h.want(200, "", "policy-token", "PUT", "/v1/policy", set(2, strict))
	type versions struct {
		Items []PolicyVersion
		Next  string
	}
	all := decode[versions](t, h.want(200, "", "reader-token", "GET", "/v1/policy/versions", nil))
	if len(all.Items) != 2 || all.Items[0].Version != 2 || all.Items[0].By != "paula" || all.Items[0].Changes[0].Key != "ima.unknown" || all.Items[1].Changes[0].Key != "id" {
		t.Errorf("%+v", all)
	}
	one := decode[versions](t, h.want(200, "", "reader-token", "GET", "/v1/policy/versions?limit=1", nil))
	if len(one.Items) != 1 || !reflect.DeepEqual(one.Items[0], all.Items[0]) || one.Next == "" { // the version before is on the next page
		t.Errorf("%+v", one)
	}
	if p := decode[Policy](t, h.want(200, "", "reader-token", "GET", "/v1/policy/versions/1", nil)); p.Version != 1 || string(p.Document) != good {
		t.Errorf("%+v", p)
	}
	h.want(404, NotFound, "reader-token", "GET", "/v1/policy/versions/3", nil)
	h.want(404, NotFound, "reader-token", "GET", "/v1/policy/versions/0", nil)
}

func TestImport(t *testing.T) {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := refvalues.ParseKeys(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	if err != nil {
		t.Fatal(err)
	}
	h := newHouse(t, func(c *Config) { c.Operate.ManifestKeys = keys })
	digest := strings.Repeat("ab", 32)
	in := func(format, content, more string, signed bool) string {
		s := fmt.Sprintf(`{"format": %q, "content": %q`, format, base64.StdEncoding.EncodeToString([]byte(content)))
		if signed {
			s += fmt.Sprintf(`, "signature": %q`, base64.StdEncoding.EncodeToString(ed25519.Sign(key, []byte(content))))
		}
		return s + more + "}"
	}
	sums := digest + "  usr/bin/true\n" + digest + " */usr/bin/false\n"
	h.want(403, Forbidden, "operator-token", "POST", "/v1/values/import", in("sums", sums, `, "name": "coreutils"`, false))
	a := decode[operate.Added](t, h.want(200, "", "policy-token", "POST", "/v1/values/import", in("sums", sums, `, "name": "coreutils"`, false)))
	if a.New != 2 {
		t.Errorf("%+v", a)
	}
	if v := h.values("source=package&search=/usr/bin/true"); len(v) != 1 || v[0].Detail != "coreutils" || v[0].Digest != "sha256:"+digest || v[0].Kind != fleet.HostIMA {
		t.Errorf("%+v", v)
	}
	manifest := func(serial int, paths ...string) string {
		var values []string
		for _, p := range paths {
			values = append(values, fmt.Sprintf(`{"kind":"host-ima","path":%q,"digest":"sha256:%s"}`, p, digest))
		}
		return fmt.Sprintf(`{"format":"virt-trust-values-1","name":"acme","serial":%d,"values":[%s]}`, serial, strings.Join(values, ","))
	}
	h.want(200, "", "policy-token", "POST", "/v1/values/import", in("values", manifest(0, "/opt/unsigned"), "", false))
	h.want(400, Invalid, "policy-token", "POST", "/v1/values/import", in("manifest", manifest(1, "/opt/a"), "", false))
	wrong := strings.Replace(in("manifest", manifest(1, "/opt/a"), "", true), `"signature": "`, `"signature": "AAAA`, 1)
	h.want(400, Invalid, "policy-token", "POST", "/v1/values/import", wrong)
	h.want(200, "", "policy-token", "POST", "/v1/values/import", in("manifest", manifest(7, "/opt/a", "/opt/b"), "", true))
	h.want(409, Conflict, "policy-token", "POST", "/v1/values/import", in("manifest", manifest(7, "/opt/a"), "", true))
	h.want(409, Conflict, "policy-token", "POST", "/v1/values/import", in("manifest", manifest(6, "/opt/c"), "", true))
	// A newer one takes its place: what it does not name counts no more.
	h.want(200, "", "policy-token", "POST", "/v1/values/import", in("manifest", manifest(8, "/opt/b", "/opt/c"), "", true))
	paths := []string{}
	for _, v := range h.values("source=manifest&state=approved") {
		paths = append(paths, v.Path)
	}
	if slices.Sort(paths); !slices.Equal(paths, []string{"/opt/b", "/opt/c"}) {
		t.Errorf("%q", paths)
	}
	launchers := fmt.Sprintf(`{"format":"virt-trust-launchers-1","name":"acme","serial":1,"launchers":[{"path":"/usr/bin/swtpm","sha256":%q}]}`, digest)
	h.want(200, "", "policy-token", "POST", "/v1/values/import", in("launchers", launchers, "", true))
	if v := h.values("kind=launcher"); len(v) != 1 || v[0].Path != "/usr/bin/swtpm" {
		t.Errorf("%+v", v)
	}
	if n := len(h.values("source=manifest&state=approved")); n != 3 {
		t.Errorf("%d values: a manifest of another kind withdrew them", n)
	}
	for _, bad := range []string{
		in("sums", "d41d8cd98f00b204e9800998ecf8427e  /md5", `, "name": "x"`, false), in("sums", digest+"  /a/../b", `, "name": "x"`, false), in("sums", sums, "", false),
		in("sums", sums, `, "name": "x", "kind": "vm-pcr"`, false), in("corim", sums, "", false), in("corim-unsigned", sums, "", false), in("values", "{}", "", false), in("launchers", "{}", "", true),
	} {
		h.want(400, Invalid, "policy-token", "POST", "/v1/values/import", bad)
	}
}

// TestImportCoRIM: each CoMID takes the place of its older self, and for good of
// those that it replaces; what cannot be used is told.
func TestImportCoRIM(t *testing.T) {
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	h := newHouse(t, func(c *Config) { c.Operate.ManifestKeys = []any{key.Public()} })
	send := func(code int, problem, format string, content []byte) operate.Added {
		t.Helper()
		body := fmt.Sprintf(`{"format": %q, "content": %q, "subject": "group:edge"}`, format, base64.StdEncoding.EncodeToString(content))
		a := h.want(code, problem, "policy-token", "POST", "/v1/values/import", body)
		if code != 200 {
			return operate.Added{}
		}
		return decode[operate.Added](t, a)
	}
	comid := func(id string, version int, fields ct.Map, paths ...string) any {
		var all []any
		for _, p := range paths {
			all = append(all, ct.Of(p, make([]byte, 32)))
		}
		return ct.CoMID(id, version, fields, ct.Reference(ct.Map{}, all...))
	}
	signed := func(tags ...any) []byte { return ct.Sign(ct.CoRIM(nil, tags...), key, nil) }
	count := func(want ...string) {
		t.Helper()
		got := []string{}
		for _, v := range h.values("source=manifest&state=approved") {
			got = append(got, v.Detail+" "+v.Path+" "+v.Subject)
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("%q, want %q", got, want)
		}
	}
	send(200, "", "corim", signed(comid("a", 0, nil, "/a", "/both"), comid("b", 5, nil, "/b")))
	count("comid a /a group:edge", "comid a /both group:edge", "comid b /b group:edge")
	send(409, Conflict, "corim", signed(comid("a", 0, nil, "/x")))
	send(409, Conflict, "corim", signed(comid("new", 0, nil, "/x"), comid("b", 4, nil, "/x")))
	send(400, Invalid, "corim", signed(comid("a", 1, nil, "/x"), comid("a", 2, nil, "/x")))
	count("comid a /a group:edge", "comid a /both group:edge", "comid b /b group:edge")
	send(200, "", "corim", signed(comid("a", 1, nil, "/a2", "/both")))
	count("comid a /a2 group:edge", "comid a /both group:edge", "comid b /b group:edge")
	replaces := func(id string) ct.Map { return ct.Map{3: []any{ct.Map{0: id, 1: 1}}} }
	send(200, "", "corim", signed(comid("c", 1, replaces("a"), "/c", "/both")))
	count("comid b /b group:edge", "comid c /both group:edge", "comid c /c group:edge")
	send(409, Conflict, "corim", signed(comid("a", 99, nil, "/a")))
	send(200, "", "corim", signed(comid("c", 2, replaces("a"), "/c")))
	count("comid b /b group:edge", "comid c /c group:edge")

	// What nobody signed is added, and takes nothing away.
	b := ct.CoRIM(nil, comid("b", 6, replaces("c"), "/u"), ct.Tagged(505, []byte{1}))
	if a := send(200, "", "corim-unsigned", b); a.New != 1 || a.Ignored["linked tags"] != 1 || a.Ignored["CoSWID tags"] != 1 {
		t.Errorf("%+v", a)
	}
	if v := h.values("source=file"); len(v) != 1 || v[0].Path != "/u" || v[0].Detail != "comid b" {
		t.Errorf("%+v", v)
	}
	count("comid b /b group:edge", "comid c /c group:edge")
	if a := h.want(200, "", "reader-token", "GET", "/v1/audit/export", nil); !strings.Contains(string(a.body), "CoSWID tags") {
		t.Error("the audit log does not say what was ignored")
	}
	send(400, Invalid, "corim", b)
	send(400, Invalid, "corim-unsigned", signed(comid("d", 1, nil, "/d")))
	send(400, Invalid, "corim", ct.Sign(b, ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32)), nil))
	send(400, Invalid, "corim-unsigned", ct.CoRIM(nil, ct.Tagged(505, []byte{1})))
	expired := ct.CoRIM(ct.Map{4: ct.Map{1: ct.Tagged(1, time.Now().Add(-time.Minute).Unix())}}, comid("e", 1, nil, "/e"))
	send(400, Invalid, "corim", ct.Sign(expired, key, nil))
}

func TestTokens(t *testing.T) {
	h := newHouse(t)
	h.want(403, Forbidden, "reader-token", "POST", "/v1/tokens", nil)
	token := decode[Token](t, h.want(201, "", "operator-token", "POST", "/v1/tokens", `{"name": "alpha", "seconds": 60}`))
	if !strings.HasPrefix(token.Secret, "vtj1.") || token.By != "otto" || token.Expires.Sub(*token.Created) != time.Minute {
		t.Errorf("%+v", token)
	}
	list := h.want(200, "", "operator-token", "GET", "/v1/tokens", nil)
	secret := strings.Split(token.Secret, ".")[1]
	if items := decode[struct{ Items []Token }](t, list).Items; len(items) != 1 || items[0].Digest != token.Digest || strings.Contains(string(list.body), secret) {
		t.Errorf("%s", list.body)
	}
	if a := h.want(200, "", "reader-token", "GET", "/v1/audit/export", nil); strings.Contains(string(a.body), secret) || !strings.Contains(string(a.body), "token.create") {
		t.Errorf("the audit log: %s", a.body)
	}
	for _, bad := range []string{`{"seconds": 0}`, `{"seconds": -1}`, `{"seconds": 99999999}`, `{"seconds": 9223372036854775807}`, `{"name": "a b"}`, `{"nam": "x"}`} {
		h.want(400, Invalid, "operator-token", "POST", "/v1/tokens", bad)
	}
	h.want(400, Invalid, "operator-token", "DELETE", "/v1/tokens/abc", nil)
	h.want(404, NotFound, "operator-token", "DELETE", "/v1/tokens/0123456789", nil)
	h.want(204, "", "operator-token", "DELETE", "/v1/tokens/"+token.Digest[:12], nil)
	h.want(404, NotFound, "operator-token", "DELETE", "/v1/tokens/"+token.Digest, nil)
}

func TestWebhooks(t *testing.T) {
	got := make(chan *http.Request, 1)
	code := 200
	receiver := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got <- r
		w.WriteHeader(code)
	}))
	defer receiver.Close()
	guard := webhook.Guard{Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, AllowHTTP: true}
	h := newHouse(t, func(c *Config) {
		c.Operate.Guard = guard
		c.Operate.Deliver = (&webhook.Sender{Client: guard.Client(), Now: time.Now}).Deliver
	})
	h.want(403, Forbidden, "operator-token", "POST", "/v1/webhooks", map[string]any{"url": receiver.URL})
	hook := decode[Webhook](t, h.want(201, "", "policy-token", "POST", "/v1/webhooks", map[string]any{"url": receiver.URL, "events": []string{webhook.TrustChanged}}))
	if !strings.HasPrefix(hook.Secret, "whsec_") {
		t.Errorf("%+v", hook)
	}
	list := h.want(200, "", "policy-token", "GET", "/v1/webhooks", nil)
	if items := decode[struct{ Items []Webhook }](t, list).Items; len(items) != 1 || items[0].Secret != "" {
		t.Errorf("%s", list.body)
	}
	h.want(204, "", "policy-token", "POST", fmt.Sprintf("/v1/webhooks/%d/test", hook.ID), nil)
	if r := <-got; r.Header.Get("webhook-signature") == "" {
		t.Error("it is not signed")
	}
	code = 500
	h.want(502, ReceiverFailed, "policy-token", "POST", fmt.Sprintf("/v1/webhooks/%d/test", hook.ID), nil)
	<-got
	for _, url := range []string{"ftp://x.example/", "http://10.0.0.1/", "https://user@x.example/", "no url", "https://169.254.169.254/latest"} {
		h.want(400, Invalid, "policy-token", "POST", "/v1/webhooks", map[string]any{"url": url})
	}
	h.want(400, Invalid, "policy-token", "POST", "/v1/webhooks", map[string]any{"url": receiver.URL, "events": []string{"all"}})
	h.want(204, "", "policy-token", "DELETE", fmt.Sprintf("/v1/webhooks/%d", hook.ID), nil)
	h.want(404, NotFound, "policy-token", "DELETE", fmt.Sprintf("/v1/webhooks/%d", hook.ID), nil)
	h.want(404, NotFound, "policy-token", "POST", fmt.Sprintf("/v1/webhooks/%d/test", hook.ID), nil)
	h.want(404, NotFound, "policy-token", "POST", "/v1/deliveries/5/revive", nil)
	h.want(404, NotFound, "policy-token", "POST", "/v1/deliveries/revive", ids{[]int64{5}})
	h.want(400, Invalid, "policy-token", "POST", "/v1/deliveries/revive", ids{[]int64{}})
}

// What a relying party fetches is as the result is now: signed when it changed,
// and none when it has expired.
func TestResults(t *testing.T) {
	h := newHouse(t)
	h.enrol(nodeID, "alpha", fleet.Active)
	path := "/v1/nodes/" + nodeID + "/result"
	h.want(404, NotFound, "reader-token", "GET", path, nil)
	h.want(404, NotFound, "reader-token", "GET", "/v1/vms/"+vmID+"/result", nil)
	h.round(h.appraised(nodeID, appraise.Affirming, appraise.Warning), "")
	h.want(401, Unauthenticated, "", "GET", path, nil)
	a := h.want(200, "", "reader-token", "GET", path, nil)
	if string(a.body) != "k1.affirming." || a.header.Get("Content-Type") != EARType || a.header.Get("ETag") == "" {
		t.Fatalf("%s %v", a.body, a.header)
	}
	if a := h.want(200, "", "reader-token", "GET", "/v1/vms/"+vmID+"/result", nil); string(a.body) != "k1.warning."+vmID {
		t.Fatalf("%s", a.body)
	}
	signed := h.ear.signed
	h.want(304, "", "reader-token", "GET", path, nil, "If-None-Match", a.header.Get("ETag"))
	h.want(200, "", "reader-token", "GET", path, nil, "If-None-Match", `"another"`)
	if h.ear.signed != signed {
		t.Error("a result that is the same was signed again")
	}
	h.ear.mu.Lock()
	h.ear.key = "k2"
	h.ear.mu.Unlock()
	b := h.want(200, "", "reader-token", "GET", path, nil, "If-None-Match", a.header.Get("ETag"))
	if string(b.body) != "k2.affirming." {
		t.Errorf("after the key was changed: %s", b.body)
	}
	if k := h.want(200, "", "", "GET", "/.well-known/jwks.json", nil); !strings.Contains(string(k.body), "k2") {
		t.Errorf("%s", k.body)
	}
	// The same request, a little later than the result holds.
	h.clock.Pass(2 * time.Minute)
	c := h.want(200, "", "reader-token", "GET", path, nil, "If-None-Match", b.header.Get("ETag"))
	if string(c.body) != "k2.none." {
		t.Errorf("an expired result: %s", c.body)
	}
	if c := h.want(200, "", "reader-token", "GET", "/v1/vms/"+vmID+"/result", nil); string(c.body) != "k2.none."+vmID {
		t.Errorf("an expired result: %s", c.body)
	}
	// A new round, and then the node is revoked.
	h.round(h.appraised(nodeID, appraise.Affirming, appraise.Affirming), "")
	if c := h.want(200, "", "reader-token", "GET", path, nil); string(c.body) != "k2.affirming." {
		t.Errorf("%s", c.body)
	}
	// Two nodes say that the VM runs there.
	const other = "22222222-2222-3333-4444-555555555555"
	h.enrol(other, "beta", fleet.Active)
	h.round(h.appraised(other, appraise.Affirming, appraise.Affirming), "")
	if c := h.want(200, "", "reader-token", "GET", "/v1/vms/"+vmID+"/result", nil); string(c.body) != "k2.none."+vmID {
		t.Errorf("on two nodes: %s", c.body)
	}
	h.want(200, "", "operator-token", "POST", "/v1/nodes/"+nodeID+"/revoke", nil)
	if c := h.want(200, "", "reader-token", "GET", path, nil); string(c.body) != "k2.none." {
		t.Errorf("of a revoked node: %s", c.body)
	}
	// What the first one said last holds no more: the VM was started elsewhere when
	// its host had died.
	h.clock.Pass(2 * time.Minute)
	h.round(h.appraised(other, appraise.Affirming, appraise.Affirming), "")
	if c := h.want(200, "", "reader-token", "GET", "/v1/vms/"+vmID+"/result", nil); string(c.body) != "k2.affirming."+vmID {
		t.Errorf("on the host that is left: %s", c.body)
	}
}

// Results are for everybody where the configuration says so; for nodes by their
// certificates always; and nothing else is.
func TestRelyingParties(t *testing.T) {
	h := newHouse(t, func(c *Config) { c.OpenTo = true })
	h.enrol(nodeID, "alpha", fleet.Active)
	h.round(h.appraised(nodeID, appraise.Affirming, appraise.Affirming), "")
	h.want(200, "", "", "GET", "/v1/nodes/"+nodeID+"/result", nil)
	h.want(401, Unauthenticated, "", "GET", "/v1/nodes/"+nodeID, nil)
	h.want(401, TokenRefused, "wrong", "GET", "/v1/nodes/"+nodeID+"/result", nil)

	h = newHouse(t)
	h.enrol(nodeID, "alpha", fleet.Active)
	h.round(h.appraised(nodeID, appraise.Affirming, appraise.Affirming), "")
	h.certificate(&h.server.TLS.Certificates[0])
	active := true
	h.node = func(r *http.Request) (fleet.Node, bool, error) { return fleet.Node{}, active, nil }
	h.want(200, "", "", "GET", "/v1/nodes/"+nodeID+"/result", nil)
	h.want(401, Unauthenticated, "", "GET", "/v1/nodes/"+nodeID, nil)
	active = false
	h.want(401, Unauthenticated, "", "GET", "/v1/nodes/"+nodeID+"/result", nil)
}

func TestRates(t *testing.T) {
	jwts := 0
	h := newHouse(t, func(c *Config) {
		c.Requests, c.Others = 3, 3
		actor := c.Actor
		c.Actor = func(r *http.Request) (operate.Actor, error) {
			if strings.Count(r.Header.Get("Authorization"), ".") == 2 {
				jwts++
			}
			return actor(r)
		}
	})
	for range 3 {
		h.want(200, "", "reader-token", "GET", "/v1/me", nil)
	}
	if a := h.want(429, TooMany, "reader-token", "GET", "/v1/me", nil); a.header.Get("Retry-After") == "" {
		t.Error("it is not said when to try again")
	}
	h.want(200, "", "operator-token", "GET", "/v1/me", nil) // another person
	for range 3 {
		h.want(401, TokenRefused, "a.b.c", "GET", "/v1/me", nil)
	}
	h.want(429, TooMany, "a.b.c", "GET", "/v1/me", nil)
	if jwts != 3 {
		t.Errorf("%d JWTs were looked at, of 3 guesses", jwts)
	}
	h.want(429, TooMany, "guess", "GET", "/v1/me", nil)
	h.want(429, TooMany, "", "GET", "/healthz", nil)
	h.want(200, "", "operator-token", "GET", "/v1/me", nil) // whoever says who he is is not taken for the one who guesses
	h.clock.Pass(time.Minute)
	h.want(200, "", "reader-token", "GET", "/v1/me", nil)
	h.want(200, "", "", "GET", "/healthz", nil)
}

// What others ask at an address does not limit a node behind it, which has a rate of
// its own.
func TestNodeRate(t *testing.T) {
	h := newHouse(t, func(c *Config) { c.Requests, c.Others = 5, 2 })
	h.enrol(nodeID, "alpha", fleet.Active)
	h.round(h.appraised(nodeID, appraise.Affirming, appraise.Affirming), "")
	result := "/v1/nodes/" + nodeID + "/result"
	for range 2 {
		h.want(401, Unauthenticated, "", "GET", result, nil)
	}
	h.want(429, TooMany, "", "GET", result, nil)
	h.certificate(&h.server.TLS.Certificates[0])
	h.node = func(r *http.Request) (fleet.Node, bool, error) { return fleet.Node{ID: nodeID}, true, nil }
	for range 5 {
		h.want(200, "", "", "GET", result, nil)
	}
	h.want(429, TooMany, "", "GET", result, nil)
}

func TestLimitsAreBounded(t *testing.T) {
	l, now := newLimits(1), time.Now()
	l.most = 3
	for i := range 10 {
		l.allow(fmt.Sprint(i), now)
	}
	if len(l.by) != 3 {
		t.Errorf("%d limiters", len(l.by))
	}
	if _, ok := l.allow("another", now); ok {
		t.Error("those beyond the bound share one rate, which is spent")
	}
	if l.of("x", now.Add(3*time.Minute)); len(l.by) > 1 {
		t.Errorf("%d limiters after a while", len(l.by))
	}
}

func TestSource(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.1:99": "192.0.2.1", "[::ffff:192.0.2.1]:99": "192.0.2.1", "[2001:db8:1:2:3:4:5:6]:1": "2001:db8:1:2::/64", "[fe80::1%eth0]:1": "fe80::/64", "@": "unknown",
	} {
		if got := Source(&http.Request{RemoteAddr: addr}); got != want {
			t.Errorf("%s: %s", addr, got)
		}
	}
}

// Without its database the Verifier says so, and says nothing about trust; when
// the database is back, so is all else.
func TestDatabaseGone(t *testing.T) {
	server, err := storetest.New()
	storetest.Need(t, err)
	t.Cleanup(func() {
		if err := server.Remove(); err != nil {
			t.Error(err)
		}
	})
	errs := 0
	h := newHouseOn(t, server.NewDatabase(t), func(c *Config) { c.DatabaseError = func() { errs++ } })
	h.enrol(nodeID, "alpha", fleet.Active)
	h.round(h.appraised(nodeID, appraise.Affirming, appraise.Affirming), "")
	path := "/v1/nodes/" + nodeID + "/result"
	a := h.want(200, "", "reader-token", "GET", path, nil)
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, "/v1/nodes", "/v1/vms/" + vmID + "/result", "/healthz", "/v1/fleet", "/v1/audit/export"} {
		got := h.want(503, Unavailable, "reader-token", "GET", p, nil, "If-None-Match", a.header.Get("ETag"))
		if got.header.Get("Retry-After") == "" || got.header.Get("ETag") != "" {
			t.Errorf("%s: %v", p, got.header)
		}
	}
	h.want(503, Unavailable, "operator-token", "POST", "/v1/tokens", nil)
	if errs == 0 {
		t.Error("nobody counted it")
	}
	if strings.Contains(h.log.String(), "reader-token") {
		t.Error("a token in the log")
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	h.want(304, "", "reader-token", "GET", path, nil, "If-None-Match", a.header.Get("ETag"))
	h.want(201, "", "operator-token", "POST", "/v1/tokens", nil)
}

// A handler that panics is a problem of one request.
func TestPanic(t *testing.T) {
	h := newHouse(t)
	w := httptest.NewRecorder()
	h.api.serve(Route{Role: operate.Nobody, handle: func(*request) (any, error) { panic("oops") }}, w, httptest.NewRequest("GET", "/", nil))
	if w.Code != 500 || strings.Contains(w.Body.String(), "oops") || !strings.Contains(h.log.String(), "oops") {
		t.Errorf("%d %s %s", w.Code, w.Body, h.log)
	}
}
