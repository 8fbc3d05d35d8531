package appraise

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/fleet"
)

const nodeID = "11111111-2222-4333-8444-555555555555"

var epoch = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

func bootLog(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("../evidence/eventlog/testdata/" + name + ".bin")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// bench is a Verifier and a node of it.
type bench struct {
	t      testing.TB
	host   *forge.Host
	policy *Policy
	values []fleet.Value
	state  *Checkpoint
	learn  bool
	result Result
	in     Input
}

// newBench is a host with two VMs that run, of which the first round was
// learned.
func newBench(t testing.TB) *bench {
	t.Helper()
	h := forge.NewHost("sha256", bootLog(t, "uki"), epoch)
	h.MeasureMany(20)
	b := &bench{t: t, host: h, policy: DefaultPolicy(), learn: true}
	n := h.Launchers([3]string{"emulator", "/usr/bin/qemu-system-x86_64", "qemu"}, [3]string{"swtpm", "/usr/bin/swtpm", "swtpm"})
	h.Start(h.AddVM("one"), bootLog(t, "sd"), n...)
	h.Start(h.AddVM("two"), bootLog(t, "grub"), n...)
	h.AddVM("three")
	h.Tick(5 * time.Minute)
	return b
}

// learned is newBench after its first round.
func learned(t testing.TB) *bench {
	t.Helper()
	b := newBench(t)
	b.round(forge.Options{})
	b.want(Affirming)
	h := b.host
	h.Tick(time.Minute)
	return b
}

func (b *bench) nonce() []byte {
	n := make([]byte, report.NonceSize)
	rand.Read(n)
	return n
}

// input is a round's; what the checkpoint covers is not sent.
func (b *bench) input(o forge.Options) Input {
	nonce := b.nonce()
	if o.Have == nil {
		o.HaveBoot, o.Have = b.state.Have()
	}
	ak := b.host.TPM
	return Input{
		Node: Node{ID: nodeID, AK: &ak.Key.PublicKey, AKName: ak.AKName()}, Nonce: nonce, Expires: b.host.Now.Add(time.Minute),
		Evidence: b.host.Evidence(nonce, o), Previous: b.state, Values: []*Values{NewValues(b.values)}, Policy: b.policy, Learn: b.learn, Now: b.host.Now,
	}
}

// round is one round, stored.
func (b *bench) round(o forge.Options) Result {
	b.t.Helper()
	return b.appraise(b.input(o))
}

func (b *bench) appraise(in Input) Result {
	b.t.Helper()
	before, err := in.Previous.encoded()
	if err != nil {
		b.t.Fatal(err)
	}
	result, next, learned := Round(in)
	after, err := in.Previous.encoded()
	if err != nil || !bytes.Equal(before, after) {
		b.t.Errorf("the checkpoint before was changed: %v", err)
	}
	if _, err := json.Marshal(result); err != nil {
		b.t.Error(err)
	}
	stored, err := next.encoded()
	if err != nil {
		b.t.Fatal(err)
	}
	if b.state, err = DecodeCheckpoint(stored); err != nil {
		b.t.Fatal(err)
	}
	b.values = append(b.values, learned...)
	b.result, b.in = result, in
	return result
}

func (c *Checkpoint) encoded() ([]byte, error) {
	if c == nil {
		return nil, nil
	}
	return c.Encode()
}

func codesOf(a Appraisal) (codes []string) {
	for _, r := range a.Reasons {
		codes = append(codes, r.Code)
	}
	slices.Sort(codes)
	return slices.Compact(codes)
}

// want holds the host's tier and codes against what they should be.
func (b *bench) want(tier Tier, codes ...string) {
	b.t.Helper()
	slices.Sort(codes)
	if got := codesOf(b.result.Host); b.result.Host.Tier != tier || !slices.Equal(got, codes) {
		b.t.Errorf("host: %v %v, want %v %v\n%s", b.result.Host.Tier, got, tier, codes, dump(b.result.Host.Reasons))
	}
	for _, v := range b.result.VMs {
		if rank(v.Tier) < rank(b.result.Host.Tier) {
			b.t.Errorf("VM %s is %v, better than its host", v.Name, v.Tier)
		}
	}
}

func dump(reasons []Reason) string {
	j, _ := json.MarshalIndent(reasons, "", " ")
	return string(j)
}

func (b *bench) vm(name string) VM {
	b.t.Helper()
	i := slices.IndexFunc(b.result.VMs, func(v VM) bool { return v.Name == name })
	if i < 0 {
		b.t.Fatalf("there is no VM %s in %d", name, len(b.result.VMs))
	}
	return b.result.VMs[i]
}

func (b *bench) wantVM(name string, tier Tier, codes ...string) {
	b.t.Helper()
	slices.Sort(codes)
	v := b.vm(name)
	if got := codesOf(v.Appraisal); v.Tier != tier || !slices.Equal(got, codes) {
		b.t.Errorf("VM %s: %v %v, want %v %v\n%s", name, v.Tier, got, tier, codes, dump(v.Reasons))
	}
}

func (b *bench) hostVM(name string) *forge.VM {
	for _, v := range b.host.VMs {
		if v.Name == name {
			return v
		}
	}
	b.t.Fatal(name)
	return nil
}

// The first round is learned; what comes later is held against it.
func TestLearned(t *testing.T) {
	b := newBench(t)
	b.learn = false
	b.round(forge.Options{})
	b.want(None, CodeHostNoValues, CodeIMAUnknown, CodeLauncherUnknown)
	b.wantVM("one", None, CodeHost, CodeVMNoValues, CodeLauncherUnknown)
	if len(b.values) != 0 {
		t.Errorf("%d values were learned", len(b.values))
	}

	b = newBench(t)
	b.round(forge.Options{})
	b.want(Affirming)
	b.wantVM("one", Affirming)
	b.wantVM("three", None, CodeVMNotRunning)
	kinds := map[fleet.Kind]int{}
	for i, v := range b.values {
		if slices.Contains(b.values[:i], v) {
			t.Errorf("twice: %+v", v)
		}
		kinds[v.Kind]++
		if v.Source != "learned" || CheckValue(v) != nil || v.State != fleet.Approved {
			t.Errorf("%+v", v)
		}
	}
	if kinds[fleet.HostIMA] != 20 || kinds[fleet.Launcher] != 2 || kinds[fleet.VMPCR] != 18 || kinds[fleet.HostEvent] < 10 {
		t.Errorf("learned %v", kinds)
	}
	if v := b.result.Host.Vector; v != (Vector{InstanceIdentity: 2, Configuration: 2, Executables: 2}) {
		t.Errorf("vector %+v", v)
	}

	b.host.Tick(time.Minute)
	n := len(b.values)
	b.round(forge.Options{})
	b.want(Affirming)
	if len(b.values) != n || len(b.result.Changes) != 0 {
		t.Errorf("%d new values, %v", len(b.values)-n, b.result.Changes)
	}
	// Also without learning, and whole.
	b.learn = false
	b.round(forge.Options{Have: map[string]uint64{}})
	b.want(Affirming)
	b.wantVM("two", Affirming)
	if b.result.Expires.Sub(b.result.Received) != 5*time.Minute {
		t.Errorf("holds for %v", b.result.Expires.Sub(b.result.Received))
	}
	// And the whole again without any checkpoint.
	b.state = nil
	b.round(forge.Options{})
	b.want(Affirming)
}

// What an incremental round gives is what a whole one gives.
func TestIncremental(t *testing.T) {
	b := learned(t)
	b.host.Measure("/usr/bin/new", []byte("new"))
	whole := b.input(forge.Options{Have: map[string]uint64{}})
	whole.Previous = nil
	a, _ := Appraise(whole)
	b.round(forge.Options{})
	b.want(Warning, CodeIMAUnknown)
	if !slices.Equal(codesOf(a.Host), codesOf(b.result.Host)) || *a.Host.Reasons[0].Entry != *b.result.Host.Reasons[0].Entry || *a.Host.Reasons[0].Entry != 21 {
		t.Errorf("whole: %s\nincremental: %s", dump(a.Host.Reasons), dump(b.result.Host.Reasons))
	}
	// It stays so in the next round, which does not bring it again, until someone
	// approves it.
	b.host.Tick(time.Minute)
	b.round(forge.Options{})
	b.want(Warning, CodeIMAUnknown)
	r := b.result.Host.Reasons[0]
	b.values = append(b.values, fleet.Value{Kind: fleet.HostIMA, Path: r.Path, Digest: r.Digest, State: fleet.Proposed})
	b.round(forge.Options{})
	b.want(Warning, CodeIMAUnknown)
	b.values[len(b.values)-1].State = fleet.Approved
	b.round(forge.Options{})
	b.want(Affirming)
	// And is told again, when the approval is taken back.
	b.values = b.values[:len(b.values)-1]
	b.round(forge.Options{})
	b.want(Warning, CodeIMAWithdrawn)
	b.round(forge.Options{})
	b.want(Warning, CodeIMAUnknown)
}

func (b *bench) drop(kind fleet.Kind, path string) {
	n := len(b.values)
	b.values = slices.DeleteFunc(b.values, func(v fleet.Value) bool { return v.Kind == kind && strings.Contains(v.Path, path) })
	if len(b.values) == n {
		b.t.Fatalf("no value %s %s", kind, path)
	}
}

// reject takes values back, as an operator does.
func (b *bench) reject(match func(fleet.Value) bool) {
	n := 0
	for i := range b.values {
		if v := &b.values[i]; v.State == fleet.Approved && match(*v) {
			v.State = fleet.Rejected
			n++
		}
	}
	if n == 0 {
		b.t.Fatal("no such value")
	}
}

// What was learned and is taken back is not learned anew: a launcher in no later
// round, a VM not after it was away, and the host not without its checkpoint.
func TestRejectedIsNotLearned(t *testing.T) {
	b := learned(t)
	b.reject(func(v fleet.Value) bool { return v.Kind == fleet.Launcher && v.Path == "/usr/bin/swtpm" })
	for range 2 {
		b.host.Tick(time.Minute)
		b.round(forge.Options{})
		b.want(Warning, CodeLauncherUnknown)
		b.wantVM("one", Contraindicated, CodeLauncherUnknown, CodeHost)
	}

	b = learned(t)
	id := b.vm("one").UUID
	b.reject(func(v fleet.Value) bool { return v.Subject == id })
	without := forge.Options{Report: func(r *report.Report) {
		i := slices.IndexFunc(r.VMs, func(v report.VM) bool { return v.Name == "one" })
		r.Deleted = append(r.Deleted, report.Deleted{UUID: r.VMs[i].UUID})
		r.VMs = slices.Delete(r.VMs, i, i+1)
	}}
	for _, o := range []forge.Options{{}, without, {}} {
		b.host.Tick(time.Minute)
		b.round(o)
	}
	b.want(Affirming)
	b.wantVM("one", None, CodeVMNoValues)

	b = learned(t)
	b.reject(func(v fleet.Value) bool { return v.Subject == nodeID && v.Kind == fleet.HostEvent })
	b.state = nil
	b.host.Tick(time.Minute)
	b.round(forge.Options{})
	b.want(None, CodeHostNoValues)
}

// A Reference Value that is taken back is missed in the files that it had
// accepted, though they are not sent again; the next round names them.
func TestWithdrawn(t *testing.T) {
	b := learned(t)
	b.drop(fleet.HostIMA, "libexample-7.so")
	b.round(forge.Options{})
	b.want(Warning, CodeIMAWithdrawn)
	b.host.Tick(time.Minute)
	b.round(forge.Options{})
	b.want(Warning, CodeIMAUnknown)
	if r := b.result.Host.Reasons[0]; !strings.Contains(r.Path, "libexample-7.so") || *r.Entry != 8 {
		t.Errorf("%+v", r)
	}
}
