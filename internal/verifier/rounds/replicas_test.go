package rounds

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

// replica is another Verifier on the same database.
func (b *bench) replica() *bench {
	b.t.Helper()
	r := &bench{t: b.t, dsn: b.dsn, ca: b.ca, policy: b.policy, options: b.options}
	r.start()
	b.t.Cleanup(r.stop)
	return r
}

// Any replica takes the Evidence for a nonce that another gave out, what one has
// taken no other takes, and what one remembers it does not believe.
func TestReplicas(t *testing.T) {
	b := newBench(t, nil)
	m := b.join("host-a", b.newHost("one"))
	m.round(forge.Options{})
	r := b.replica()
	there := &member{b: r, id: m.id, host: m.host, cert: m.cert, http: r.client(m.cert)}
	if o := there.outcome(there.send(m.evidence(m.next(), forge.Options{}))); o.Tier != appraise.Affirming {
		t.Errorf("%+v", o)
	}
	for range 3 {
		evidence := m.evidence(m.next(), forge.Options{})
		done := make(chan answer, 2)
		go func() { done <- m.send(evidence) }()
		go func() { done <- there.send(evidence) }()
		good := 0
		for range 2 {
			switch a := <-done; {
			case a.status == http.StatusOK && m.outcome(a).Tier == appraise.Affirming:
				good++
			case a.problem.Code == ca.NonceBad, a.status == http.StatusOK: // after the other, against its new nonce
			default:
				t.Errorf("%d %s", a.status, a.body)
			}
		}
		if good != 1 {
			t.Errorf("%d of two replicas took it", good)
		}
	}
	// What changed behind a replica's back counts at once: here, a value that is
	// withdrawn, and the tier that the other saw last.
	m.round(forge.Options{})
	m.host.Measure("/usr/bin/evil", []byte("evil"))
	if o := there.round(forge.Options{}); o.Tier != appraise.Warning {
		t.Errorf("%+v", o)
	}
	b.do(func(ctx context.Context, tx *store.Tx) error {
		_, err := tx.AddHook(ctx, fleet.Hook{URL: "https://hook.example", Secret: make([]byte, 32), Created: b.clock.Now()})
		return err
	})
	if o := m.round(forge.Options{}); o.Tier != appraise.Warning {
		t.Errorf("%+v", o)
	}
	if n, _, err := b.store.Queued(context.Background()); n != 0 || err != nil {
		t.Errorf("%d events about a change that the other replica has told of, %v", n, err)
	}
}

// A checkpoint that is gone makes no first round: what is new then is not learned.
func TestCheckpointLost(t *testing.T) {
	b := newBench(t, nil)
	m := b.join("host-a", b.newHost("one"))
	m.round(forge.Options{})
	for name, checkpoint := range map[string][]byte{"gone": nil, "damaged": []byte("damaged")} {
		r := m.next()
		now := b.clock.Now()
		b.do(func(ctx context.Context, tx *store.Tx) error {
			_, err := tx.CompleteRound(ctx, store.Completion{Node: m.id, Nonce: r.Nonce, Checkpoint: checkpoint, Result: &appraise.Result{Node: m.id, Received: now, Expires: now.Add(time.Minute)}})
			return err
		})
		m.host.Measure("/usr/bin/evil-"+name, []byte("evil"))
		r = m.next()
		if r.HaveBoot != "" || len(r.Have) != 0 {
			t.Errorf("%s: %+v", name, r)
		}
		if o := m.outcome(m.send(m.evidence(r, forge.Options{}))); o.Tier != appraise.Warning || !contains(o.Codes, appraise.CodeIMAUnknown) {
			t.Errorf("%s: %+v", name, o)
		}
	}
}

// Of a node that is not to be learned nothing is, neither the host nor a VM, until
// somebody says so.
func TestNotLearned(t *testing.T) {
	b := newBench(t, nil)
	m := b.join("host-a", b.newHost("one"))
	m.learns(false)
	for range 2 {
		if o := m.round(forge.Options{}); o.Tier != appraise.None || !contains(o.Codes, appraise.CodeHostNoValues) {
			t.Errorf("%+v", o)
		}
	}
	if all, _, err := b.store.Values(t.Context(), store.ValueFilter{}, store.Page{}); err != nil || len(all) != 0 {
		t.Errorf("%d values, %v", len(all), err)
	}
	// The first round after that asks for all that was sent before.
	m.learns(true)
	if o := m.round(forge.Options{}); o.Tier != appraise.None || o.Next.Have["ima"] != 0 {
		t.Errorf("%+v", o)
	}
	if o := m.round(forge.Options{}); o.Tier != appraise.Affirming {
		t.Errorf("%+v", o)
	}
}

// A store that does not know the certificate of a node is older than that: what the
// node shows from then on is not learned, and an operator is told.
func TestOlderStore(t *testing.T) {
	b := newBench(t, nil)
	m := b.join("host-a", b.newHost("one"))
	m.certified(b.clock.Now()) // the newest: all is well
	if o := m.round(forge.Options{}); o.Tier != appraise.Affirming {
		t.Fatalf("%+v", o)
	}
	m.certified(b.clock.Now().Add(-time.Hour))
	m.host.Start(m.host.AddVM("two"), bootLog(t, "sd"), m.host.VMs[0].Used...)
	m.host.Tick(5 * time.Minute)
	b.clock.Pass(5 * time.Minute)
	for range 2 {
		m.round(forge.Options{})
		if v := m.vm("two"); v.Tier != appraise.None || !hasCode(v.Reasons, appraise.CodeVMNoValues) {
			t.Errorf("%+v", v.Appraisal)
		}
	}
	if v := m.vm("one"); v.Tier != appraise.Affirming {
		t.Errorf("what was known: %+v", v.Appraisal)
	}
	n := testkit.Must[fleet.Node](t)(b.store.Node(t.Context(), m.id))
	if n.Learns || !strings.HasPrefix(n.Problem, string(ca.NodeRestored)) {
		t.Errorf("%+v", n)
	}
	told, _, err := b.store.AuditLog(t.Context(), store.AuditFilter{Action: "node.restored"}, store.Page{})
	if err != nil || len(told) != 1 {
		t.Errorf("%+v %v", told, err)
	}
}

func (m *member) change(f func(*fleet.Node)) {
	m.b.t.Helper()
	m.b.do(func(ctx context.Context, tx *store.Tx) error {
		n, err := tx.Node(ctx, m.id)
		if err != nil {
			return err
		}
		f(&n)
		_, err = tx.UpdateNode(ctx, n)
		return err
	})
}

func (m *member) learns(on bool) { m.change(func(n *fleet.Node) { n.Learns = on }) }

func (m *member) certified(at time.Time) { m.change(func(n *fleet.Node) { n.Certified = at }) }

// What an operator takes back that was learned stays taken back, round after round.
func TestRejectedIsNotLearned(t *testing.T) {
	b := newBench(t, nil)
	m := b.join("host-a", b.newHost("one"))
	if o := m.round(forge.Options{}); o.Tier != appraise.Affirming {
		t.Fatalf("%+v", o)
	}
	all, _, err := b.store.Values(t.Context(), store.ValueFilter{Kind: fleet.Launcher}, store.Page{})
	if err != nil || len(all) != 2 {
		t.Fatalf("%+v %v", all, err)
	}
	b.do(func(ctx context.Context, tx *store.Tx) error {
		return tx.SetValueState(ctx, all[0].ID, fleet.Approved, fleet.Rejected, "anna")
	})
	for range 2 {
		if o := m.round(forge.Options{}); o.Tier != appraise.Warning || !contains(o.Codes, appraise.CodeLauncherUnknown) {
			t.Errorf("%+v", o)
		}
	}
	again, _, err := b.store.Values(t.Context(), store.ValueFilter{Kind: fleet.Launcher, State: fleet.Approved}, store.Page{})
	if err != nil || len(again) != 1 {
		t.Errorf("%+v %v", again, err)
	}
}

// A first round that has more to learn than the store takes at once has a result
// that says so, and keeps nobody else waiting.
func TestTooMuchToLearn(t *testing.T) {
	b := newBench(t, nil)
	host := b.newHost("one")
	host.MeasureMany(store.MaxValues + 1)
	m := b.join("host-a", host)
	for range 2 {
		if o := m.round(forge.Options{}); o.Tier != appraise.None || !contains(o.Codes, appraise.CodeInternal) {
			t.Errorf("%+v", o)
		}
	}
	if r := m.result().Host.Reasons; len(r) != 1 || !strings.Contains(r[0].What, "to learn") {
		t.Errorf("%+v", r)
	}
}

// With a policy that learns nothing, a first round is not affirming; without a
// policy that can be used, none is.
func TestPolicy(t *testing.T) {
	learn, broken := false, error(nil)
	policy := appraise.DefaultPolicy()
	b := newBench(t, func(o *Options) {
		o.Policy = func(context.Context) (Policy, error) { return Policy{Appraisal: policy, Learn: learn}, broken }
	})
	m := b.join("host-a", b.newHost("one"))
	if o := m.round(forge.Options{}); o.Tier == appraise.Affirming {
		t.Errorf("strict: %+v", o)
	}
	learn = true
	other := b.join("host-b", b.newHost("two"))
	if o := other.round(forge.Options{}); o.Tier != appraise.Affirming {
		t.Errorf("%+v", o)
	}
	broken = store.ErrUnavailable
	if o := other.round(forge.Options{}); o.Tier != appraise.None || !contains(o.Codes, appraise.CodeInternal) {
		t.Errorf("without a policy: %+v", o)
	}
	broken = nil
	if o := other.round(forge.Options{}); o.Tier != appraise.Affirming {
		t.Errorf("%+v", o)
	}
}

// A panic in the middle of an appraisal is a result of None, and the next round is
// as good as ever.
func TestAppraisalPanics(t *testing.T) {
	bug := false
	b := newBench(t, func(o *Options) {
		policy := appraise.DefaultPolicy()
		o.Policy = func(context.Context) (Policy, error) {
			if bug {
				panic("bug")
			}
			return Policy{Appraisal: policy, Learn: true}, nil
		}
	})
	m := b.join("host-a", b.newHost("one"))
	m.round(forge.Options{})
	bug = true
	o := m.round(forge.Options{})
	if o.Tier != appraise.None || !contains(o.Codes, appraise.CodeInternal) || len(m.result().VMs) != 1 || m.result().VMs[0].Tier != appraise.None {
		t.Errorf("%+v %+v", o, m.result())
	}
	bug = false
	if o := m.outcome(m.send(m.evidence(o.Next, forge.Options{}))); o.Tier != appraise.Affirming {
		t.Errorf("%+v", o)
	}
}

// The Verifier's own certificate is made anew before it ends, and when the clock
// went back behind it; a CA that does not sign for a while is no reason to stop.
func TestServerCertificate(t *testing.T) {
	b := newBench(t, nil)
	now := time.Now()
	c := &serverCertificate{ca: b.ca, names: []string{"verifier.example"}, now: func() time.Time { return now }}
	first, err := c.get(nil)
	if err != nil || len(first.Certificate) != 2 {
		t.Fatal(err)
	}
	now = now.Add(24 * time.Hour)
	if again, err := c.get(nil); err != nil || again != first {
		t.Errorf("made anew after a day: %v", err)
	}
	c.names = nil // the CA refuses
	now = now.Add(5 * 24 * time.Hour)
	if again, err := c.get(nil); err != nil || again != first {
		t.Errorf("not served while it is good: %v", err)
	}
	now = now.Add(2 * 24 * time.Hour)
	if _, err := c.get(nil); err == nil {
		t.Error("an expired certificate is served")
	}
	c.names = []string{"verifier.example"}
	if again, err := c.get(nil); err != nil || again == first || now.After(again.Leaf.NotAfter) {
		t.Errorf("%v", err)
	}
	now = now.Add(-30 * 24 * time.Hour)
	if again, err := c.get(nil); err != nil || now.Before(again.Leaf.NotBefore) {
		t.Errorf("the clock went back: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	if _, err := New(Options{}); err == nil {
		t.Error("a handler of nothing")
	}
}
