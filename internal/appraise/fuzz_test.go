package appraise

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/launcher/refvalues"
	"virt-trust/internal/verifier/fleet"
)

// Whatever a host signs, an appraisal ends with a result, and with none better
// than the Evidence of this round shows: a spoilt log, report or checkpoint is
// never affirming.
func FuzzAppraise(f *testing.F) {
	b := learned(f)
	first := b.state
	b.host.Measure("/tmp/x", []byte("x"))
	good := b.input(forge.Options{})
	e, err := report.UntrustedParse(good.Evidence)
	if err != nil {
		f.Fatal(err)
	}
	logs := map[string][]byte{}
	for _, l := range e.Logs {
		logs[l.Kind] = l.Data
	}
	state, err := first.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(e.Report, logs[report.EventLog], logs[report.IMA], logs[report.LaunchLog], uint64(0), state, true)
	f.Add(e.Report, b.host.EventLog, b.host.IMA, b.host.Launch, uint64(0), []byte{}, false)
	f.Add(e.Report, logs[report.EventLog], logs[report.IMA], logs[report.LaunchLog], b.state.IMA.At.Offset, state, false)
	f.Fuzz(func(t *testing.T, rep, events, list, launch []byte, from uint64, checkpoint []byte, learn bool) {
		in := good
		in.Learn = learn
		previous, err := DecodeCheckpoint(checkpoint)
		if err != nil {
			if !errors.Is(err, ErrCheckpoint) {
				t.Error(err)
			}
			return
		}
		in.Previous = previous
		in.Evidence = b.host.Evidence(in.Nonce, forge.Options{Evidence: func(e *report.Evidence, h *forge.Host) {
			e.Report = rep
			q := report.QualifyingData(e.Nonce, rep)
			e.Quote = h.TPM.Quote(q[:], all16Selection)
			e.Logs = []report.Log{{Kind: report.EventLog, From: from, Data: events}, {Kind: report.IMA, From: from, Data: list}, {Kind: report.LaunchLog, From: from, Data: launch}}
		}})
		result, next, learned := Round(in)
		for _, v := range learned {
			if CheckValue(v) != nil {
				t.Errorf("learned %+v", v)
			}
		}
		for _, v := range result.VMs {
			if rank(v.Tier) < rank(result.Host.Tier) {
				t.Errorf("VM %s is %v, its host %v", v.UUID, v.Tier, result.Host.Tier)
			}
		}
		for _, r := range result.Host.Reasons {
			if r.Code == CodeInternal {
				t.Errorf("%s", r.What)
			}
		}
		if _, err := json.Marshal(result); err != nil {
			t.Error(err)
		}
		if next != nil {
			enc, err := next.Encode()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := DecodeCheckpoint(enc); err != nil {
				t.Error(err)
			}
			next.Have()
		}
	})
}

func FuzzParsePolicy(f *testing.F) {
	b, err := json.Marshal(DefaultPolicy())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"format": "virt-trust-policy-1", "id": "x", "ima": {"excludes": ["/tmp/*"]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ParsePolicy(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParsePolicy(again); err != nil {
			t.Errorf("%v: %s", err, again)
		}
		if len(p.PCRs) == 0 {
			t.Error("a policy for quotes over no PCRs")
		}
		p.compile().excluded([]byte("/tmp/x"))
	})
}

func FuzzParseValues(f *testing.F) {
	f.Add([]byte(`{"format": "virt-trust-values-1", "name": "acme", "serial": 1, "values": [{"subject": "", "kind": "host-ima", "path": "/bin/true", "digest": "sha256:` + strings.Repeat("0a", 32) + `"},
		{"subject": "n", "kind": "host-event", "path": "4/0x80000003/boot application", "digest": "sha1:` + strings.Repeat("0a", 20) + `"}, {"kind": "vm-pcr", "path": "sha256:0", "digest": "sha256:` + strings.Repeat("0A", 32) + `"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := ParseValues(b)
		if err != nil {
			return
		}
		x := NewValues(v.Approved("file"))
		for _, e := range v.Values {
			if s := x.subjects[e.Subject]; s == nil || s.revision == 0 && len(v.Values) == 1 {
				t.Errorf("%+v is not indexed", e)
			}
		}
	})
}

func TestPolicyRefused(t *testing.T) {
	good := map[string]any{"format": PolicyFormat, "id": "x"}
	try := func(name string, v any) error {
		m := map[string]any{}
		for k, e := range good {
			m[k] = e
		}
		if name != "" {
			m[name] = v
		}
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		_, err = ParsePolicy(b)
		return err
	}
	if err := try("", nil); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		v    any
	}{
		{"format", "other"}, {"id", ""}, {"id", strings.Repeat("x", 101)}, {"unknown", 1}, {"bank", "md5"}, {"vm_bank", ""}, {"pcrs", []int{}}, {"pcrs", []int{24}}, {"events", []int{16}},
		{"vm_pcrs", []int{24}}, {"max_age", 0}, {"max_age", -1}, {"max_age", 1e12}, {"unknown_event", "bad"}, {"audit_mode", "none"}, {"unknown_launcher", ""},
		{"ima", map[string]any{"unknown": "x"}}, {"ima", map[string]any{"excludes": []string{"tmp"}}}, {"ima", map[string]any{"excludes": []string{"/tmp*"}}},
		{"ima", map[string]any{"excludes": []string{"/*/x"}}}, {"ima", map[string]any{"keys": "x"}}, {"ima", map[string]any{"other": 1}},
	} {
		if err := try(c.name, c.v); err == nil {
			t.Errorf("%s: %v is taken", c.name, c.v)
		}
	}
	for _, b := range []string{"", "[]", `{"format": "virt-trust-policy-1", "id": "x"} {}`, strings.Repeat(" ", MaxPolicy+1)} {
		if _, err := ParsePolicy([]byte(b)); err == nil {
			t.Errorf("%.20q is taken", b)
		}
	}
}

func TestSignedFiles(t *testing.T) {
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	policy := []byte(`{"format": "virt-trust-policy-1", "id": "x"}`)
	values := []byte(`{"format": "virt-trust-values-1", "name": "acme", "serial": 3, "values": [{"subject": "", "kind": "launcher", "path": "", "digest": "sha256:` + strings.Repeat("0a", 32) + `"}]}`)
	keys := []any{public}
	if p, err := VerifyPolicy(policy, ed25519.Sign(key, policy), keys); err != nil || p.ID != "x" {
		t.Errorf("%+v, %v", p, err)
	}
	if v, err := VerifyValues(values, ed25519.Sign(key, values), keys); err != nil || v.Serial != 3 || v.Approved("manifest")[0].State != fleet.Approved {
		t.Errorf("%+v, %v", v, err)
	}
	for _, sig := range [][]byte{nil, ed25519.Sign(key, []byte("x")), make([]byte, 5000)} {
		if _, err := VerifyPolicy(policy, sig, keys); !errors.Is(err, refvalues.ErrSignature) {
			t.Error(err)
		}
		if _, err := VerifyValues(values, sig, keys); !errors.Is(err, refvalues.ErrSignature) {
			t.Error(err)
		}
	}
	if _, err := VerifyPolicy(policy, ed25519.Sign(key, policy), nil); !errors.Is(err, refvalues.ErrSignature) {
		t.Error(err)
	}
}

func TestValuesRefused(t *testing.T) {
	d := "sha256:" + strings.Repeat("0a", 32)
	for _, v := range []fleet.Value{
		{Kind: fleet.HostIMA, Path: "/x", Digest: "sha256:00"}, {Kind: fleet.HostIMA, Path: "/x", Digest: strings.Repeat("0a", 32)}, {Kind: fleet.HostIMA, Path: "/x", Digest: "md5:" + strings.Repeat("0a", 16)},
		{Kind: fleet.HostEvent, Path: "x", Digest: d}, {Kind: fleet.HostEvent, Path: "24/0x1/x", Digest: d}, {Kind: fleet.HostPCR, Path: "sha256:24", Digest: d}, {Kind: fleet.VMPCR, Path: "sha1:0", Digest: d},
		{Kind: fleet.VMPCR, Path: "0", Digest: d}, {Kind: "other", Path: "/x", Digest: d}, {Kind: fleet.Launcher, Path: strings.Repeat("x", maxPath+1), Digest: d},
	} {
		if CheckValue(v) == nil {
			t.Errorf("%+v is taken", v)
		}
		v.State = fleet.Approved
		if len(NewValues([]fleet.Value{v}).subjects) != 0 {
			t.Errorf("%+v is indexed", v)
		}
	}
	rejected := NewValues([]fleet.Value{{Kind: fleet.HostIMA, Path: "/x", Digest: d, State: fleet.Rejected}})
	if v := (&Input{Values: []*Values{rejected}}).view(""); len(v.at(ofIMA, []byte("/x"))) != 0 || v.revision() != 0 || !v.rejected(fleet.HostIMA) || v.rejected(fleet.Launcher) {
		t.Errorf("a value that is rejected counts: %+v", v)
	}
	for _, s := range []fleet.ValueState{fleet.Proposed, ""} {
		if len(NewValues([]fleet.Value{{Kind: fleet.HostIMA, Digest: d, State: s}}).subjects) != 0 {
			t.Errorf("a value that is %q counts", s)
		}
	}
	for _, b := range []string{"", "{}", `{"format": "virt-trust-values-1", "name": ""}`, `{"format": "virt-trust-values-1", "name": "x"} x`, `{"format": "virt-trust-values-1", "name": "x", "other": 1}`,
		`{"format": "virt-trust-values-1", "name": "x", "values": [{"kind": "host-ima", "digest": "x"}]}`} {
		if _, err := ParseValues([]byte(b)); err == nil {
			t.Errorf("%q is taken", b)
		}
	}
}

// A file that a configured key signed needs no Reference Value.
func TestIMASignatures(t *testing.T) {
	rk, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ek, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("file"))
	header := func(sig []byte) []byte {
		return append([]byte{3, 2, 4, 1, 2, 3, 4, byte(len(sig) >> 8), byte(len(sig))}, sig...)
	}
	rs, err := rsa.SignPKCS1v15(rand.Reader, rk, 5, digest[:]) // crypto.SHA256
	if err != nil {
		t.Fatal(err)
	}
	es, err := ecdsa.SignASN1(rand.Reader, ek, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	var keys []byte
	for _, k := range []any{&rk.PublicKey, &ek.PublicKey} {
		der, err := x509.MarshalPKIXPublicKey(k)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})...)
	}
	other := sha256.Sum256([]byte("other"))
	for name, c := range map[string]struct {
		digest []byte
		sig    []byte
		tier   Tier
	}{
		"RSA": {digest[:], header(rs), Affirming}, "ECDSA": {digest[:], header(es), Affirming}, "none": {digest[:], nil, Warning}, "of another file": {other[:], header(rs), Warning},
		"cut off": {digest[:], header(rs)[:20], Warning}, "version 1": {digest[:], append([]byte{3, 1}, header(rs)[2:]...), Warning}, "SHA-1": {digest[:], append([]byte{3, 2, 2}, header(rs)[3:]...), Warning},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.policy.IMA.Keys = string(keys)
			b.round(forge.Options{})
			b.want(Affirming)
			b.host.Tick(time.Minute)
			b.host.MeasureEntry(forge.IMAEntry{Template: "ima-sig", Path: "/opt/x", Digest: c.digest, Extra: c.sig})
			b.round(forge.Options{})
			if b.result.Host.Tier != c.tier {
				t.Errorf("%v: %s", b.result.Host.Tier, dump(b.result.Host.Reasons))
			}
		})
	}
}

func TestCheckpoint(t *testing.T) {
	b := learned(t)
	enc, err := b.state.Encode()
	if err != nil {
		t.Fatal(err)
	}
	back, err := DecodeCheckpoint(enc)
	if err != nil || !reflect.DeepEqual(back, b.state) {
		t.Errorf("%v", err)
	}
	if boot, have := back.Have(); boot != b.host.BootID || have[report.IMA] != uint64(len(b.host.IMA)) || have[report.LaunchLog] != uint64(len(b.host.Launch)) || have[report.EventLog] != uint64(len(b.host.EventLog)) {
		t.Errorf("%s, %v", boot, have)
	}
	if c, err := DecodeCheckpoint(nil); c != nil || err != nil {
		t.Errorf("nothing: %v, %v", c, err)
	}
	if boot, have := (*Checkpoint)(nil).Have(); boot != "" || len(have) != 0 {
		t.Error("nothing has something")
	}
	back.Version++
	enc, _ = back.Encode()
	for _, bad := range [][]byte{enc, []byte("x"), {0xa0}} {
		if _, err := DecodeCheckpoint(bad); !errors.Is(err, ErrCheckpoint) {
			t.Errorf("%.10x: %v", bad, err)
		}
	}
}

// A log is kept whole, however long it is; one that was kept deflated, as all were
// once, is the same log.
func TestPack(t *testing.T) {
	for _, n := range []int{0, 1, maxStored, maxStored + 1, 100 << 10} {
		b := bytes.Repeat([]byte("event log"), n/9+1)[:n]
		if got := unpack(pack(b)); !bytes.Equal(got, b) {
			t.Errorf("of %d bytes %d come back", n, len(got))
		}
		if len(pack(b)) > maxStored+5 {
			t.Errorf("%d bytes are kept in %d", n, len(pack(b)))
		}
	}
	b := learned(t)
	kept := *b.state
	for _, c := range []struct {
		packed []byte
		tier   Tier
	}{
		{deflate(unpack(kept.Events.Packed)), Affirming}, {pack([]byte("another log")), Contraindicated},
	} {
		s := kept
		s.Events.Packed = c.packed
		in := b.input(forge.Options{Have: map[string]uint64{}})
		in.Previous = &s
		if r, _ := Appraise(in); r.Host.Tier != c.tier {
			t.Errorf("%v: %s", r.Host.Tier, dump(r.Host.Reasons))
		}
	}
}

// A panic below is the Verifier's, and the result none.
func TestPanic(t *testing.T) {
	b := learned(t)
	in := b.input(forge.Options{})
	in.Values = []*Values{nil}
	result, next := Appraise(in)
	if result.Host.Tier != None || result.Host.Reasons[0].Code != CodeInternal || next != in.Previous || result.Host.Vector.InstanceIdentity != claimMalfunction {
		t.Errorf("%+v", result.Host)
	}
	for _, v := range result.VMs {
		if v.Tier != None {
			t.Errorf("%+v", v)
		}
	}
	if len(result.VMs) != 3 {
		t.Errorf("%d VMs", len(result.VMs))
	}
}
