package operate

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/store/storetest"
	"virt-trust/internal/verifier/webhook"
)

var (
	rita  = Actor{"rita", Reader}
	otto  = Actor{"otto", Operator}
	paula = Actor{"paula", Policy}
	peter = Actor{"peter", Policy}
)

func newService(t *testing.T) *Service {
	t.Helper()
	db, err := store.Open(t.Context(), storetest.SQLite(t), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return &Service{
		Store: db, Now: time.Now, Pin: ca.Pin{1}, Unset: []byte(`{"format":"virt-trust-policy-1","id":"default"}`),
		Deliver: func(context.Context, fleet.Hook, fleet.Delivery) error { return nil },
	}
}

func (s *Service) node(t *testing.T, id string, state fleet.NodeState) {
	t.Helper()
	err := s.Store.Do(t.Context(), func(tx *store.Tx) error {
		return tx.PutNode(t.Context(), fleet.Node{ID: id, Name: "n-" + id, State: state, EKDigest: id, AKName: []byte(id), AK: []byte(id), Bind: []byte(id), BindName: []byte(id), Certifier: []byte(id), Enrolled: time.Now()})
	})
	if err != nil {
		t.Fatal(err)
	}
}

func value(path string) fleet.Value {
	return fleet.Value{Kind: fleet.HostIMA, Path: path, Digest: "sha256:" + strings.Repeat("ab", 32)}
}

// actions are what stands in the audit log, newest first.
func (s *Service) actions(t *testing.T) (all []string) {
	t.Helper()
	entries, _, err := s.Store.AuditLog(t.Context(), store.AuditFilter{}, store.Page{Limit: 1000})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !json.Valid([]byte(e.Detail)) {
			t.Errorf("%s: %s", e.Action, e.Detail)
		}
		all = append(all, e.Actor+" "+e.Action)
	}
	return all
}

// Each operation asks for its role, whoever calls it, and what was refused changes
// nothing and leaves no entry.
func TestRoles(t *testing.T) {
	s := newService(t)
	s.FourEyes = true
	s.node(t, "a", fleet.Pending)
	ctx := t.Context()
	for name, c := range map[string]struct {
		least Role
		do    func(a Actor) error
	}{
		"Approve":        {Operator, func(a Actor) error { _, err := s.Approve(ctx, a, "a"); return err }},
		"Reject":         {Operator, func(a Actor) error { _, err := s.Reject(ctx, a, "a", ""); return err }},
		"Learn":          {Operator, func(a Actor) error { _, err := s.Learn(ctx, a, "a", false); return err }},
		"Revoke":         {Operator, func(a Actor) error { _, err := s.Revoke(ctx, a, "a", ""); return err }},
		"Dismiss":        {Operator, func(a Actor) error { _, err := s.Dismiss(ctx, a, "a"); return err }},
		"CreateToken":    {Operator, func(a Actor) error { _, _, err := s.CreateToken(ctx, a, "", time.Hour); return err }},
		"RevokeToken":    {Operator, func(a Actor) error { return s.RevokeToken(ctx, a, "0123456789") }},
		"ApproveRound":   {Operator, func(a Actor) error { _, err := s.ApproveRound(ctx, a, 1); return err }},
		"AddValues":      {Policy, func(a Actor) error { _, err := s.AddValues(ctx, a, []fleet.Value{value("/a")}); return err }},
		"ImportValues":   {Policy, func(a Actor) error { _, err := s.ImportValues(ctx, a, Import{}); return err }},
		"ApproveValues":  {Policy, func(a Actor) error { return s.ApproveValues(ctx, a, 1) }},
		"RejectValues":   {Policy, func(a Actor) error { return s.RejectValues(ctx, a, 1) }},
		"SetPolicy":      {Policy, func(a Actor) error { _, err := s.SetPolicy(ctx, a, nil, 1); return err }},
		"ApprovePolicy":  {Policy, func(a Actor) error { _, err := s.ApprovePolicy(ctx, a, 1); return err }},
		"RejectPolicy":   {Policy, func(a Actor) error { return s.RejectPolicy(ctx, a, 1) }},
		"AddHook":        {Policy, func(a Actor) error { _, err := s.AddHook(ctx, a, "https://x.example", nil); return err }},
		"RemoveHook":     {Policy, func(a Actor) error { return s.RemoveHook(ctx, a, 1) }},
		"TestHook":       {Policy, func(a Actor) error { return s.TestHook(ctx, a, 1) }},
		"Hooks":          {Policy, func(a Actor) error { _, err := s.Hooks(ctx, a); return err }},
		"Revive":         {Policy, func(a Actor) error { return s.Revive(ctx, a, 1) }},
		"DeadLetters":    {Policy, func(a Actor) error { _, _, err := s.DeadLetters(ctx, a, store.Page{}); return err }},
		"PolicyNow":      {Reader, func(a Actor) error { _, _, err := s.PolicyNow(ctx, a); return err }},
		"PolicyVersion":  {Reader, func(a Actor) error { _, err := s.PolicyVersion(ctx, a, 1); return err }},
		"PolicyVersions": {Reader, func(a Actor) error { _, _, err := s.PolicyVersions(ctx, a, store.Page{}); return err }},
		"CheckPolicy":    {Reader, func(a Actor) error { _, _, err := s.CheckPolicy(ctx, a, nil); return err }},
		"ProposedPolicy": {Reader, func(a Actor) error { _, err := s.ProposedPolicy(ctx, a); return err }},
		"Diff":           {Reader, func(a Actor) error { _, err := s.Diff(ctx, a, 1, 2); return err }},
	} {
		for _, a := range []Actor{{}, {Name: "nobody"}, {Role: Policy}, rita, otto} {
			if a.Known() && a.Role >= c.least {
				continue
			}
			want := ErrForbidden
			if !a.Known() {
				want = ErrUnauthenticated
			}
			if err := c.do(a); !errors.Is(err, want) {
				t.Errorf("%s as %+v: %v, want %v", name, a, err, want)
			}
		}
	}
	if log := s.actions(t); len(log) != 0 {
		t.Errorf("%q", log)
	}
}

// Whether a node is learned is somebody's decision, which is written down.
func TestLearn(t *testing.T) {
	s := newService(t)
	s.node(t, "a", fleet.Active)
	if _, err := s.Learn(t.Context(), otto, "a", true); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "approve a round") {
		t.Errorf("where nothing is learned: %v", err)
	}
	s.Learning = true
	for _, on := range []bool{true, false} {
		n, err := s.Learn(t.Context(), otto, "a", on)
		if err != nil || n.Learns != on {
			t.Errorf("%+v %v", n, err)
		}
		if _, err := s.Learn(t.Context(), otto, "a", on); !errors.Is(err, ErrConflict) {
			t.Errorf("twice: %v", err)
		}
	}
	if _, err := s.Learn(t.Context(), otto, "b", true); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	if got := s.actions(t); !slices.Equal(got, []string{"otto node.learn", "otto node.learn"}) {
		t.Errorf("%q", got)
	}
}

// Who gave out a join token does not let in the node that came with it, where
// four eyes are wanted.
func TestFourEyesForNodes(t *testing.T) {
	s := newService(t)
	s.FourEyes = true
	ctx := t.Context()
	if _, named, err := s.CreateToken(ctx, otto, "HV-01.Example", time.Hour); err != nil || named.Name != "hv-01.example" {
		t.Errorf("%+v %v", named, err)
	}
	_, token, err := s.CreateToken(ctx, otto, "", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	s.node(t, "a", fleet.Pending)
	if err := s.Store.Do(ctx, func(tx *store.Tx) error { return tx.UseToken(ctx, token.Digest, "n-a", "a") }); err != nil {
		t.Fatal(err)
	}
	for _, a := range []Actor{otto, {"OTTO", Operator}} {
		if _, err := s.Approve(ctx, a, "a"); !errors.Is(err, ErrSamePerson) {
			t.Errorf("%v", err)
		}
	}
	if n, err := s.Approve(ctx, paula, "a"); err != nil || n.State != fleet.Active || n.ApprovedBy != "paula" {
		t.Errorf("%+v %v", n, err)
	}
	s.node(t, "b", fleet.Pending) // with a token that nobody remembers
	if _, err := s.Approve(ctx, otto, "b"); err != nil {
		t.Errorf("%v", err)
	}
	if log := s.actions(t); !slices.Equal(log, []string{"otto node.approve", "paula node.approve", "otto token.create", "otto token.create"}) {
		t.Errorf("%q", log)
	}
}

// A proposal tells those who wait for it.
func TestProposedEvent(t *testing.T) {
	s := newService(t)
	s.FourEyes = true
	ctx := t.Context()
	if _, err := s.AddHook(ctx, paula, "https://hooks.example.org/", []string{webhook.ValueProposed}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.AddValues(ctx, paula, []fleet.Value{value("/a"), value("/b")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.AddValues(ctx, paula, []fleet.Value{value("/a")}); err != nil { // nothing new
		t.Fatal(err)
	}
	due, err := s.Store.Claim(ctx, 10, time.Minute)
	if err != nil || len(due) != 1 || !strings.Contains(string(due[0].Body), `"by":"paula"`) || !strings.Contains(string(due[0].Body), `"count":2`) {
		t.Errorf("%v %+v", err, due)
	}
}

// What fails half way leaves nothing: neither values nor an entry.
func TestAllOrNothing(t *testing.T) {
	s := newService(t)
	ctx := t.Context()
	if _, err := s.AddValues(ctx, paula, []fleet.Value{value("/a"), {Kind: fleet.HostIMA, Digest: "md5:x"}}); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
	s.FourEyes = true
	if _, err := s.AddValues(ctx, paula, []fleet.Value{value("/a")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.AddValues(ctx, peter, []fleet.Value{value("/b")}); err != nil {
		t.Fatal(err)
	}
	all, _, err := s.Store.Values(ctx, store.ValueFilter{}, store.Page{})
	if err != nil || len(all) != 2 {
		t.Fatalf("%+v %v", all, err)
	}
	// One of the two is peter's own.
	if err := s.ApproveValues(ctx, peter, all[1].ID, all[0].ID); !errors.Is(err, ErrSamePerson) {
		t.Error(err)
	}
	if all, _, _ := s.Store.Values(ctx, store.ValueFilter{State: fleet.Approved}, store.Page{}); len(all) != 0 {
		t.Errorf("%+v", all)
	}
	if log := s.actions(t); !slices.Equal(log, []string{"peter value.add", "paula value.add"}) {
		t.Errorf("%q", log)
	}
}

func TestValueOf(t *testing.T) {
	d := strings.Repeat("ab", 32)
	for name, c := range map[string]struct {
		subject string
		reason  appraise.Reason
		want    fleet.Value
		ok      bool
	}{
		"event":    {"host", appraise.Reason{Code: appraise.CodeEventUnknown, Log: "tcg-event-log", Path: "4/EV_EFI_BOOT_SERVICES_APPLICATION/shim", Digest: d}, fleet.Value{Subject: "n", Kind: fleet.HostEvent, Path: "4/EV_EFI_BOOT_SERVICES_APPLICATION/shim", Digest: "sha256:" + d}, true},
		"file":     {"host", appraise.Reason{Code: appraise.CodeIMAChanged, Log: "ima", Path: "/bin/x", Digest: "sha1:" + d[:40]}, fleet.Value{Subject: "n", Kind: fleet.HostIMA, Path: "/bin/x", Digest: "sha1:" + d[:40]}, true},
		"launcher": {"vm", appraise.Reason{Code: appraise.CodeLauncherUnknown, Log: "launch-log", Path: "/bin/qemu", Digest: d}, fleet.Value{Subject: "n", Kind: fleet.Launcher, Path: "/bin/qemu", Digest: "sha256:" + d}, true},
		"VM's PCR": {"vm", appraise.Reason{Code: appraise.CodeVMPCR, Path: "sha256:4", Digest: d}, fleet.Value{Subject: "vm", Kind: fleet.VMPCR, Path: "sha256:4", Digest: "sha256:" + d}, true},
		"PCR":      {"host", appraise.Reason{Code: appraise.CodeHostPCR, Path: "sha384:4", Digest: strings.Repeat("ab", 48)}, fleet.Value{Subject: "n", Kind: fleet.HostPCR, Path: "sha384:4", Digest: "sha384:" + strings.Repeat("ab", 48)}, true},
		"before": {"host", appraise.Reason{Code: appraise.CodeLaunchBefore, Log: "launch-log", Path: "sha256:15", Digest: "sha256:" + d},
			fleet.Value{Subject: "n", Kind: fleet.HostPCR, Path: "sha256:15", Digest: "sha256:" + d}, true},
		"signature": {"host", appraise.Reason{Code: appraise.CodeSignature}, fleet.Value{}, false},
		"no digest": {"host", appraise.Reason{Code: appraise.CodeIMAUnknown, Path: "/bin/x"}, fleet.Value{}, false},
		"replay":    {"host", appraise.Reason{Code: appraise.CodeIMAReplay, Log: "ima", Path: "/bin/x", Digest: d}, fleet.Value{}, false},
		"its host":  {"vm", appraise.Reason{Code: appraise.CodeHost, Digest: d}, fleet.Value{}, false},
	} {
		v, ok := ValueOf("n", c.subject, c.reason)
		if ok != c.ok || ok && fmt.Sprint(v) != fmt.Sprint(c.want) {
			t.Errorf("%s: %+v, %v", name, v, ok)
		}
	}
}

func TestDifferences(t *testing.T) {
	was := &appraise.Result{
		BootID: "1", Kernel: "6.1", PCRs: appraise.NewPCRs(map[string]string{"sha256:4": "aa", "sha256:7": "cc"}), Host: appraise.Appraisal{Tier: appraise.Affirming},
		VMs: []appraise.VM{{UUID: "u1", Name: "web", Running: true, Appraisal: appraise.Appraisal{Tier: appraise.Affirming}, Launchers: []appraise.Launcher{{Role: "emulator", Path: "/qemu", SHA256: "1"}}}, {UUID: "u2", Name: "old"}},
	}
	is := &appraise.Result{
		BootID: "2", Kernel: "6.1", PCRs: appraise.NewPCRs(map[string]string{"sha256:4": "bb", "sha256:7": "cc"}), Host: appraise.Appraisal{Tier: appraise.Warning, Reasons: []appraise.Reason{{Code: "event-unknown", What: "shim"}}},
		VMs: []appraise.VM{{UUID: "u1", Name: "web", Appraisal: appraise.Appraisal{Tier: appraise.Affirming}, Launchers: []appraise.Launcher{{Role: "emulator", Path: "/qemu", SHA256: "2"}}}, {UUID: "u3", Name: "new", Running: true}},
	}
	var got []string
	for _, d := range Differences(was, is) {
		got = append(got, strings.Join([]string{d.Subject, d.Kind, d.What, d.Before, d.After}, "|"))
	}
	want := []string{
		"host|boot|boot|1|2", "host|tier|tier|affirming|warning", "host|reason|event-unknown||shim", "host|pcr|sha256:4|aa|bb",
		"u1|vm|VM|running|not running", "u1|launcher|emulator /qemu|1|2", "u2|vm|VM|not running|", "u3|vm|VM||running",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if d := Differences(is, is); len(d) != 0 {
		t.Errorf("%+v", d)
	}
}

func TestParseSums(t *testing.T) {
	d := strings.Repeat("0f", 32)
	values, err := ParseSums([]byte("# a comment\n\n"+d+"  usr/bin/a b\r\n"+strings.ToUpper(d)+" */usr/bin/c\n"+d[:40]+"  ./d\n"+d+d+"  e"), "n", fleet.HostIMA, "pkg")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, v := range values {
		got = append(got, v.Path+" "+v.Digest[:strings.IndexByte(v.Digest, ':')])
		if v.Subject != "n" || v.Kind != fleet.HostIMA || v.Detail != "pkg" || appraise.CheckValue(v) != nil {
			t.Errorf("%+v", v)
		}
	}
	if !slices.Equal(got, []string{"/usr/bin/a b sha256", "/usr/bin/c sha256", "/d sha1", "/e sha512"}) {
		t.Errorf("%q", got)
	}
	for text, want := range map[string]string{
		"d41d8cd98f00b204e9800998ecf8427e  md5":        "does not begin with a digest",
		d + "  x\n" + strings.Repeat("zz", 32) + "  y": "line 2",
		"\\" + d + "  a\\nb":                           "does not begin with a digest",
		d + "  a\\b":                                   "no clean path",
		d + " a":                                       "no path",
		d + "  ":                                       "no path",
		d:                                              "no path",
		d + "  ../a":                                   "no clean path",
		d + "  /a//b":                                  "no clean path",
		d + "  /":                                      "no clean path",
		d + "  a\xff":                                  "no clean path",
		d + "  a\x00b":                                 "no clean path",
		d + "  " + strings.Repeat("a", 5000):           "no clean path",
		"SHA256 (a) = " + d:                            "does not begin with a digest",
	} {
		if _, err := ParseSums([]byte(text), "", fleet.HostIMA, ""); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.50q: %v, want %q", text, err, want)
		}
	}
	if _, err := ParseSums(make([]byte, MaxImport+1), "", fleet.HostIMA, ""); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
}

// Whatever the file is, what comes out of it are Reference Values.
func FuzzParseSums(f *testing.F) {
	d := strings.Repeat("0f", 32)
	f.Add([]byte(d + "  usr/bin/a\n"))
	f.Add([]byte(d + " */usr/bin/a\r\n# x\n"))
	f.Add([]byte("\\" + d + "  a\\nb\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		values, err := ParseSums(b, "", fleet.HostIMA, "x")
		if err != nil {
			return
		}
		for _, v := range values {
			if err := appraise.CheckValue(v); err != nil || !strings.HasPrefix(v.Path, "/") {
				t.Errorf("%+v: %v", v, err)
			}
		}
	})
}

// A file may have as many values as MaxValues says.
func TestLongImport(t *testing.T) {
	s := newService(t)
	var b bytes.Buffer
	for i := range 120_000 {
		fmt.Fprintf(&b, "%064x  usr/bin/%d\n", i, i)
	}
	added, err := s.ImportValues(t.Context(), paula, Import{Format: FormatSums, Content: b.Bytes(), Name: "repository"})
	if err != nil || added.New != 120_000 {
		t.Fatalf("%+v %v", added, err)
	}
}

// A policy as long as policies may be is set and audited, as is an import that names
// many subjects; and the log says which document it was.
func TestLongInAudit(t *testing.T) {
	s := newService(t)
	p := appraise.DefaultPolicy()
	for i := 0; len(p.IMA.Excludes) < 8000; i++ {
		p.IMA.Excludes = append(p.IMA.Excludes, fmt.Sprintf("/srv/%0100d", i))
	}
	document, err := json.Marshal(p)
	if err != nil || len(document) < 800_000 || len(document) > appraise.MaxPolicy {
		t.Fatalf("%d bytes, %v", len(document), err)
	}
	set, err := s.SetPolicy(t.Context(), paula, document, 1)
	if err != nil || !bytes.Equal(set.Data, document) {
		t.Fatal(err)
	}
	if kept, err := s.Store.Setting(t.Context(), PolicySetting); err != nil || !bytes.Equal(kept.Data, document) {
		t.Error(err)
	}
	log, _, err := s.Store.AuditLog(t.Context(), store.AuditFilter{Action: "policy.set"}, store.Page{})
	if err != nil || len(log) != 1 || !strings.Contains(log[0].Detail, fmt.Sprintf("%x", sha256.Sum256(document))) {
		t.Errorf("%+v %v", log, err)
	}
	var values []fleet.Value
	for i := range 5000 {
		v := value("/a")
		v.Subject = fmt.Sprintf("%036d", i)
		values = append(values, v)
	}
	odd := value("/" + strings.Repeat("\u2028", 1300))
	for _, some := range [][]fleet.Value{values, slices.Repeat([]fleet.Value{odd}, 20)} {
		if _, err := s.AddValues(t.Context(), paula, some); err != nil {
			t.Error(err)
		}
	}
}
