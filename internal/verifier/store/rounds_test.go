package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/fleet"
)

func TestRoundsFold(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		n := b.addNode(1)
		_, err := b.Result(ctx, n.ID)
		wantErr(t, err, ErrNotFound)

		first := b.round(b.testResult(n.ID, 2, appraise.Affirming), []byte("not kept"))
		start := b.clock.Now()
		for range 4 {
			b.clock.pass(time.Minute)
			if id := b.round(b.testResult(n.ID, 2, appraise.Affirming), []byte("not kept")); id != first {
				t.Fatalf("an unchanged round is %d, not %d", id, first)
			}
		}
		r := testkit.Must[fleet.Round](t)(b.Round(ctx, first))
		if r.Count != 5 || !r.Received.Equal(start) || !r.Last.Equal(b.clock.Now()) || !r.Expires.Equal(b.clock.Now().Add(2*time.Minute)) || r.Evidence != nil || r.HostTier != "affirming" || len(r.VMTiers) != 2 {
			t.Errorf("%+v", r)
		}

		// Something to say for people makes a round of its own, whatever the tiers.
		b.clock.pass(time.Minute)
		res := b.testResult(n.ID, 2, appraise.Affirming)
		res.Changes = []appraise.Change{{Subject: "host", Kind: "reboot", What: "it did"}}
		second := b.round(res, nil)
		b.clock.pass(time.Minute)
		bad := b.testResult(n.ID, 3, appraise.Contraindicated)
		evidence := bytes.Repeat([]byte("evidence"), 100_000)
		third := b.round(bad, evidence)
		b.clock.pass(time.Minute)
		fourth := b.round(b.testResult(n.ID, 3, appraise.Contraindicated), []byte("kept too"))
		if second <= first || third <= second || fourth <= third {
			t.Errorf("rounds %d %d %d %d", first, second, third, fourth)
		}
		if r := testkit.Must[fleet.Round](t)(b.Round(ctx, first)); r.Count != 5 || !r.Last.Equal(start.Add(4*time.Minute)) || !r.Expires.Equal(start.Add(6*time.Minute)) {
			t.Errorf("the run when another followed: %+v", r)
		}
		r = testkit.Must[fleet.Round](t)(b.Round(ctx, third))
		var kept appraise.Result
		if err := json.Unmarshal(r.Result, &kept); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(r.Evidence, evidence) || !reflect.DeepEqual(r.Codes, []string{"pcr-mismatch"}) || !reflect.DeepEqual(&kept, bad) {
			t.Errorf("what was kept: %d bytes, %v, %+v", len(r.Evidence), r.Codes, kept)
		}
		if r := testkit.Must[fleet.Round](t)(b.Round(ctx, second)); !bytes.Contains(r.Changes, []byte("reboot")) {
			t.Errorf("changes %s", r.Changes)
		}
		for _, c := range []struct {
			f    RoundFilter
			want []int64
		}{
			{RoundFilter{}, []int64{fourth, third, second, first}},
			{RoundFilter{Node: n.ID, NotAffirmed: true}, []int64{fourth, third}},
			{RoundFilter{Node: "other"}, nil},
			{RoundFilter{VM: n.ID + "/2"}, []int64{fourth, third}},
			{RoundFilter{VM: n.ID + "/1", Since: start.Add(5 * time.Minute)}, []int64{fourth, third, second}},
		} {
			var got []int64
			for p := (Page{Limit: 1}); ; {
				all, next, err := b.Rounds(ctx, c.f, p)
				if err != nil {
					t.Fatal(err)
				}
				for _, r := range all {
					if got = append(got, r.ID); r.Evidence != nil || r.Result != nil {
						t.Error("a list with evidence")
					}
				}
				if p.After = next; next == "" {
					break
				}
			}
			if !reflect.DeepEqual(got, c.want) {
				t.Errorf("%+v: %v, want %v", c.f, got, c.want)
			}
		}
		_, err = b.Round(ctx, 12345)
		wantErr(t, err, ErrNotFound)
		if st := testkit.Must[RoundState](t)(b.RoundState(ctx, n.ID)); st.Round != fourth || string(st.Checkpoint) != "checkpoint" || st.Nonce != nil || st.Version != 8 {
			t.Errorf("%+v", st)
		}
	})
}

// A tier is never given without its end: every way to read one.
func TestExpired(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		n := b.addNode(1)
		b.round(b.testResult(n.ID, 2, appraise.Affirming), nil)
		check := func(when string, want appraise.Tier, code string) {
			t.Helper()
			res := testkit.Must[*appraise.Result](t)(b.Result(ctx, n.ID))
			if res.Host.Tier != want || res.VMs[0].Tier != want || res.VMs[1].Tier != want {
				t.Errorf("%s: Result %+v", when, res)
			}
			if code != "" && (res.Host.Reasons[0].Code != code || res.VMs[1].Reasons[0].Code != code) {
				t.Errorf("%s: reasons %+v", when, res.Host.Reasons)
			}
			st := testkit.Must[fleet.Status](t)(b.Status(ctx, n.ID))
			if st.Tier != want || st.VMs[want] != 2 || len(st.VMs) != 1 {
				t.Errorf("%s: Status %+v", when, st)
			}
			vms, _, err := b.VMs(ctx, VMFilter{Node: n.ID, Tier: &want}, Page{})
			if err != nil || len(vms) != 2 || vms[0].Tier != want || vms[0].Name != "vm\uFFFD0" || !vms[0].Running {
				t.Errorf("%s: VMs %+v %v", when, vms, err)
			}
			byEK := testkit.Must[[]fleet.VM](t)(b.VMsByEK(ctx, "", "ek-"+n.ID+"-0"))
			if code != CodeInactive && (len(byEK) != 1 || byEK[0].Tier != want) {
				t.Errorf("%s: VMsByEK %+v", when, byEK)
			}
			all, _, err := b.Nodes(ctx, NodeFilter{Tier: &want}, Page{})
			if err != nil || len(all) != 1 || all[0].Tier != want {
				t.Errorf("%s: Nodes %+v %v", when, all, err)
			}
			sum := testkit.Must[fleet.Summary](t)(b.Summary(ctx))
			if code != CodeInactive && (sum.ByTier[want] != 1 || sum.VMs[want] != 2 || len(sum.ByTier) != 1 || len(sum.VMs) != 1 || sum.Nodes[fleet.Active] != 1) {
				t.Errorf("%s: Summary %+v", when, sum)
			}
			if code == CodeInactive && (len(sum.ByTier) != 0 || len(sum.VMs) != 0 || sum.Nodes[fleet.Revoked] != 1) {
				t.Errorf("%s: Summary %+v", when, sum)
			}
			if prev := testkit.Must[*appraise.Result](t)(b.PreviousResult(ctx, n.ID)); prev.Host.Tier != appraise.Affirming {
				t.Errorf("%s: PreviousResult %+v", when, prev)
			}
		}
		check("fresh", appraise.Affirming, "")
		b.clock.pass(2*time.Minute - time.Microsecond)
		check("just", appraise.Affirming, "")
		b.clock.pass(time.Microsecond)
		check("expired", appraise.None, CodeExpired)
		b.round(b.testResult(n.ID, 2, appraise.Affirming), nil)
		check("again", appraise.Affirming, "")
		n.Version, n.State = 1, fleet.Revoked
		b.do(func(ctx context.Context, tx *Tx) error { _, err := tx.UpdateNode(ctx, n); return err })
		check("revoked", appraise.None, CodeInactive)
	})
}

func TestNonces(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		n, m := b.addNode(1), b.addNode(2)
		complete := func(node, nonce, next string) error {
			_, err := b.CompleteRound(ctx, Completion{Node: node, Nonce: []byte(nonce), Next: []byte(next), NextExpires: b.clock.Now().Add(time.Minute), Result: b.testResult(node, 1, appraise.Affirming)})
			return err
		}
		issue := func(node, nonce string) {
			t.Helper()
			testkit.Must[RoundState](t)(b.IssueNonce(ctx, node, []byte(nonce), b.clock.Now().Add(time.Minute)))
		}
		wantErr(t, complete(n.ID, "never", ""), ErrNonce)
		issue(n.ID, "n1")
		wantErr(t, complete(m.ID, "n1", ""), ErrNonce) // another node's
		issue(n.ID, "n2")
		wantErr(t, complete(n.ID, "n1", ""), ErrNonce) // replaced
		if err := complete(n.ID, "n2", "n3"); err != nil {
			t.Fatal(err)
		}
		wantErr(t, complete(n.ID, "n2", ""), ErrNonce) // used
		b.clock.pass(time.Minute)
		wantErr(t, complete(n.ID, "n3", ""), ErrNonce) // expired
		issue(n.ID, "n4")
		if err := complete(n.ID, "n4", "n5"); err != nil {
			t.Fatal(err)
		}
		if err := complete(n.ID, "n5", ""); err != nil {
			t.Fatal(err)
		}
		if _, err := b.CompleteRound(ctx, Completion{Node: n.ID, Result: b.testResult(n.ID, 0, appraise.Affirming)}); !errors.Is(err, ErrInvalid) {
			t.Errorf("no nonce: %v", err)
		}
		issue(n.ID, "n6")
		if _, err := b.CompleteRound(ctx, Completion{Node: n.ID, Nonce: []byte("n6"), Checkpoint: make([]byte, MaxCheckpoint+1), Result: b.testResult(n.ID, 0, appraise.Affirming)}); !errors.Is(err, ErrInvalid) {
			t.Errorf("checkpoint: %v", err)
		}
		twice := b.testResult(n.ID, 2, appraise.Affirming)
		twice.VMs[1].UUID = twice.VMs[0].UUID
		if _, err := b.CompleteRound(ctx, Completion{Node: n.ID, Nonce: []byte("n6"), Result: twice}); !errors.Is(err, ErrInvalid) {
			t.Errorf("a VM twice: %v", err)
		}
		_, err := b.IssueNonce(ctx, "none", []byte("n"), b.clock.Now())
		wantErr(t, err, ErrNotFound)
		wantErr(t, complete("none", "n", ""), ErrNotFound)
		n.Version, n.State = 1, fleet.Pending
		b.do(func(ctx context.Context, tx *Tx) error { _, err := tx.UpdateNode(ctx, n); return err })
		_, err = b.IssueNonce(ctx, n.ID, []byte("n"), b.clock.Now())
		wantErr(t, err, ErrInactive)
		wantErr(t, complete(n.ID, "n6", ""), ErrInactive)
	})
}

// A nonce is good once, whoever brings it, to whichever replica; and what the
// rounds that lost brought is not there.
func TestNonceOnceAmongReplicas(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		replicas := []*Store{b.Store, b.replica()}
		n := b.addNode(1)
		for round := range 10 {
			nonce := fmt.Appendf(nil, "nonce %d", round)
			testkit.Must[RoundState](t)(replicas[round%2].IssueNonce(t.Context(), n.ID, nonce, b.clock.Now().Add(time.Minute)))
			var won atomic.Int32
			var wg sync.WaitGroup
			for i := range 10 {
				wg.Go(func() {
					r := b.testResult(n.ID, 1, appraise.Affirming)
					r.VMs[0].Name = fmt.Sprintf("round %d, %d", round, i)
					_, err := replicas[i%2].CompleteRound(t.Context(), Completion{Node: n.ID, Nonce: nonce, Checkpoint: fmt.Append(nil, round, i), Result: r})
					if err == nil {
						won.Add(1)
					} else if !errors.Is(err, ErrNonce) {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if won.Load() != 1 {
				t.Fatalf("%d rounds with one nonce", won.Load())
			}
		}
		if all, _, err := b.Rounds(t.Context(), RoundFilter{}, Page{}); err != nil || len(all) != 10 {
			t.Errorf("%d rounds, %v", len(all), err)
		}
	})
}

func TestVMs(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		n, m := b.addNode(1), b.addNode(2)
		r := b.testResult(n.ID, 30, appraise.Affirming)
		b.round(r, nil)
		begin := b.clock.Now()
		b.clock.pass(time.Second)
		r = b.testResult(n.ID, 29, appraise.Affirming)
		r.VMs[3].Tier = appraise.Warning
		b.round(r, nil)
		all, next, err := b.VMs(ctx, VMFilter{Node: n.ID}, Page{Limit: 20})
		more, end, err2 := b.VMs(ctx, VMFilter{Node: n.ID}, Page{Limit: 20, After: next})
		if err := errors.Join(err, err2); err != nil || len(all) != 20 || len(more) != 9 || end != "" {
			t.Fatalf("%d and %d VMs, %v", len(all), len(more), err)
		}
		for _, v := range append(all, more...) {
			if changed := v.UUID == n.ID+"/3"; v.Changed.After(begin) != changed || (v.Tier == appraise.Warning) != changed {
				t.Errorf("%+v", v)
			}
		}
		// One EK in two VMs on two hosts; the same VM on two hosts is none.
		if got := testkit.Must[[]string](t)(b.SharedEKs(ctx)); len(got) != 0 {
			t.Errorf("shared: %q", got)
		}
		other := b.testResult(m.ID, 2, appraise.Affirming)
		other.VMs[0].EK, other.VMs[1].UUID, other.VMs[1].EK = r.VMs[0].EK, r.VMs[1].UUID, r.VMs[1].EK
		b.round(other, nil)
		if got := testkit.Must[[]string](t)(b.SharedEKs(ctx)); !reflect.DeepEqual(got, []string{r.VMs[0].EK}) {
			t.Errorf("shared: %q", got)
		}
		if got := testkit.Must[[]fleet.VM](t)(b.VMsByEK(ctx, r.VMs[0].EK, r.VMs[1].EK)); len(got) != 4 {
			t.Errorf("%+v", got)
		}
		for _, c := range []struct {
			node string
			own  []VMKey
			want []string // UUID and node
		}{
			{n.ID, []VMKey{{r.VMs[0].UUID, r.VMs[0].EK}}, []string{other.VMs[0].UUID + m.ID}},
			{n.ID, []VMKey{{r.VMs[0].UUID, r.VMs[0].EK}, {r.VMs[1].UUID, r.VMs[1].EK}, {r.VMs[2].UUID, r.VMs[2].EK}}, []string{other.VMs[0].UUID + m.ID, r.VMs[1].UUID + m.ID}},
			{n.ID, []VMKey{{r.VMs[3].UUID, r.VMs[2].EK}}, []string{r.VMs[2].UUID + n.ID}}, // its own, of another VM
			{"", []VMKey{{r.VMs[2].UUID, r.VMs[2].EK}}, []string{r.VMs[2].UUID + n.ID}},
			{n.ID, []VMKey{{r.VMs[2].UUID, r.VMs[2].EK}}, nil},
			{n.ID, []VMKey{{r.VMs[2].UUID, ""}}, nil},
			{n.ID, []VMKey{{r.VMs[1].UUID, ""}}, []string{r.VMs[1].UUID + m.ID}}, // the same name elsewhere
			{n.ID, nil, nil},
		} {
			var got []string
			for _, v := range testkit.Must[[]fleet.VM](t)(b.Others(ctx, c.node, c.own)) {
				got = append(got, v.UUID+v.Node)
			}
			slices.Sort(got)
			slices.Sort(c.want)
			if !slices.Equal(got, c.want) {
				t.Errorf("others of %v on %q: %q, not %q", c.own, c.node, got, c.want)
			}
		}
		moving, _, err := b.VMs(ctx, VMFilter{UUID: r.VMs[1].UUID}, Page{})
		if err != nil || len(moving) != 2 || moving[0].NodeName != n.Name || moving[1].NodeName != m.Name {
			t.Errorf("%+v %v", moving, err)
		}
		for f, want := range map[VMFilter]int{{Search: "VM\uFFFD1"}: 12, {Search: r.VMs[5].UUID}: 1, {EK: r.VMs[1].EK}: 2} {
			if got, _, err := b.VMs(ctx, f, Page{}); err != nil || len(got) != want {
				t.Errorf("%+v: %d, %v; want %d", f, len(got), err, want)
			}
		}
	})
}

// VMs at a tier are those of whose rows vmTierNow says so, page by page, whether
// few nodes or many have results that count.
func TestVMsAtTier(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		const nodes = 2*few + 2
		tiers := []appraise.Tier{appraise.None, appraise.Affirming, appraise.Warning, appraise.Contraindicated}
		b.do(func(ctx context.Context, tx *Tx) error {
			for i := range nodes {
				n := testNode(i)
				if i == 5 {
					n.State = fleet.Revoked
				}
				if err := tx.PutNode(ctx, n); err != nil {
					return err
				}
				for j := range 2 {
					if _, err := tx.exec(ctx, "INSERT INTO vms (uuid, node, name, running, ek_digest, tier, changed) VALUES (?, ?, ?, 1, '', ?, 0)",
						fmt.Sprint((i*7+j)%nodes), n.ID, fmt.Sprint("vm", i), tiers[(i+j)%4]); err != nil {
						return err
					}
				}
			}
			return nil
		})
		every := func(f VMFilter, limit int) (out []fleet.VM) {
			for p := (Page{Limit: limit}); ; {
				vms, next, err := b.VMs(t.Context(), f, p)
				if err != nil || next != "" && len(vms) != limit {
					t.Fatalf("%d VMs, %v", len(vms), err)
				}
				out = append(out, vms...)
				if p.After = next; next == "" {
					return out
				}
			}
		}
		for _, counts := range []int{0, 7, few, few + 1, nodes - 7, nodes} {
			b.do(func(ctx context.Context, tx *Tx) error {
				if _, err := tx.exec(ctx, "UPDATE node_state SET expires = 0"); err != nil {
					return err
				}
				if _, err := tx.exec(ctx, "UPDATE node_state SET tier = 32 WHERE node < ?", testNode(9).ID); err != nil {
					return err
				}
				_, err := tx.exec(ctx, "UPDATE node_state SET expires = ? WHERE node < ?", b.clock.Now().Add(time.Minute), testNode(counts).ID)
				return err
			})
			all := every(VMFilter{}, 1000)
			if found := every(VMFilter{Search: "M1"}, 37); !slices.Equal(found, slices.DeleteFunc(slices.Clone(all), func(v fleet.VM) bool { return !strings.Contains(v.Name, "m1") })) {
				t.Errorf("%d VMs found", len(found))
			}
			for _, tier := range tiers {
				want := slices.DeleteFunc(slices.Clone(all), func(v fleet.VM) bool { return v.Tier != tier })
				hosts, _, err := b.Nodes(t.Context(), NodeFilter{}, Page{Limit: 1000})
				if err != nil {
					t.Fatal(err)
				}
				hosts = slices.DeleteFunc(hosts, func(n fleet.Status) bool { return n.Tier != tier })
				if got, _, err := b.Nodes(t.Context(), NodeFilter{Tier: &tier}, Page{Limit: 1000}); err != nil || !reflect.DeepEqual(ids(got), ids(hosts)) {
					t.Errorf("%d nodes count: %d are %s, want %d, %v", counts, len(got), tier, len(hosts), err)
				}
				if got := every(VMFilter{Tier: &tier}, 37); !slices.Equal(got, want) {
					t.Errorf("%d nodes count: %d VMs are %s, want %d", counts, len(got), tier, len(want))
				}
				want = slices.DeleteFunc(want, func(v fleet.VM) bool { return v.Node != testNode(5).ID && v.UUID != "9" })
				got := append(every(VMFilter{Tier: &tier, Node: testNode(5).ID}, 1), every(VMFilter{Tier: &tier, UUID: "9"}, 1)...)
				if len(got) != len(want) {
					t.Errorf("%d nodes count: %d VMs of one node or UUID are %s, want %d", counts, len(got), tier, len(want))
				}
			}
		}
	})
}

func ids(all []fleet.Status) (out []string) {
	for _, n := range all {
		out = append(out, n.ID)
	}
	return out
}

func TestWaiting(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		b.addNode(1)
		b.do(func(ctx context.Context, tx *Tx) error {
			for i := range 2 {
				n := testNode(10 + i)
				if n.State = fleet.Pending; i == 1 {
					n.Problem = "whose is it?"
				}
				if err := tx.PutNode(ctx, n); err != nil {
					return err
				}
			}
			_, err := tx.AddValues(ctx, []fleet.Value{{Kind: fleet.HostPCR, Path: "a", Digest: "d", State: fleet.Proposed}, {Kind: fleet.HostPCR, Path: "b", Digest: "d", State: fleet.Approved}})
			return err
		})
		if nodes, values, err := b.Waiting(t.Context()); nodes != 2 || values != 1 || err != nil {
			t.Errorf("%d nodes and %d values wait, %v", nodes, values, err)
		}
		for f, want := range map[NodeFilter]int{{State: fleet.Pending}: 2, {State: fleet.Active}: 1, {Problem: true}: 1, {}: 3} {
			if all, _, err := b.Nodes(t.Context(), f, Page{}); err != nil || len(all) != want {
				t.Errorf("%+v: %d, %v", f, len(all), err)
			}
		}
	})
}

func TestTakeExpired(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		replicas := []*Store{b.Store, b.replica()}
		for i := range 20 {
			b.round(b.testResult(b.addNode(i).ID, 0, appraise.Warning), nil)
		}
		b.addNode(20) // never had a round
		b.do(func(ctx context.Context, tx *Tx) error {
			_, err := tx.AddHook(ctx, fleet.Hook{URL: "https://a", Events: []string{"trust"}})
			return err
		})
		take := func() (n int32) {
			var got atomic.Int32
			var wg sync.WaitGroup
			for i := range 8 {
				wg.Go(func() {
					var all []Expired
					err := replicas[i%2].Do(t.Context(), func(tx *Tx) (err error) {
						if all, err = tx.TakeExpired(t.Context(), 5); err != nil {
							return err
						}
						for _, e := range all {
							if e.Name == "" || e.Tier != appraise.Warning {
								t.Errorf("%+v", e)
							}
							if _, err := tx.Enqueue(t.Context(), "trust", []byte(e.Node)); err != nil {
								return err
							}
							tx.Audit(fleet.AuditEntry{Actor: "verifier", Action: "expired", Subject: e.Node})
						}
						return nil
					})
					if err != nil {
						t.Error(err)
					}
					got.Add(int32(len(all)))
				})
			}
			wg.Wait()
			return got.Load()
		}
		if n := take(); n != 0 {
			t.Errorf("%d before their time", n)
		}
		b.clock.pass(2 * time.Minute)
		wantErr(t, b.Do(t.Context(), func(tx *Tx) error {
			if all, err := tx.TakeExpired(t.Context(), 100); err != nil || len(all) != 20 {
				t.Errorf("%d, %v", len(all), err)
			}
			return ErrLimit // undone
		}), ErrLimit)
		if n := take() + take(); n != 20 {
			t.Errorf("%d, want 20", n)
		}
		if waiting, _, err := b.Queued(t.Context()); err != nil || waiting != 20 {
			t.Errorf("%d events, %v", waiting, err)
		}
		b.round(b.testResult(testNode(3).ID, 0, appraise.Warning), nil)
		b.clock.pass(2 * time.Minute)
		if n := take(); n != 1 {
			t.Errorf("after one more round and expiry: %d", n)
		}
		if head := testkit.Must[fleet.AuditHead](t)(b.VerifyAudit(t.Context(), nil, nil)); head.ID != 21 {
			t.Errorf("audit: %+v", head)
		}
	})
}

func TestTakeTurn(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		replicas := []*Store{b.Store, b.replica()}
		for range 5 {
			var mine atomic.Int32
			var wg sync.WaitGroup
			for i := range 10 {
				wg.Go(func() {
					if testkit.Must[bool](t)(replicas[i%2].TakeTurn(t.Context(), "retention", time.Hour)) {
						mine.Add(1)
					}
				})
			}
			wg.Wait()
			if mine.Load() != 1 {
				t.Fatalf("%d had the turn", mine.Load())
			}
			b.clock.pass(time.Hour)
		}
		testkit.Must[bool](t)(b.TakeTurn(t.Context(), "retention", time.Hour))
		b.clock.pass(-30 * time.Minute) // a replica whose clock is behind
		if testkit.Must[bool](t)(b.TakeTurn(t.Context(), "retention", time.Hour)) {
			t.Error("a turn before its time")
		}
		b.clock.pass(-10000 * time.Hour) // the clock was wrong by a year, and is right again
		if !testkit.Must[bool](t)(b.TakeTurn(t.Context(), "retention", time.Hour)) {
			t.Error("work waits for a year")
		}
	})
}

func TestExpire(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		n, loud := b.addNode(1), b.addNode(2)
		quiet := b.round(b.testResult(n.ID, 1, appraise.Warning), random(1000))
		var last int64
		for i := range 10 {
			b.clock.pass(time.Hour)
			r := b.testResult(loud.ID, i, appraise.Warning)
			last = b.round(r, random(1000))
		}
		b.do(func(ctx context.Context, tx *Tx) error {
			tx.Audit(fleet.AuditEntry{Time: time.Unix(1, 0), Actor: "a", Action: "b"})
			return tx.AddToken(ctx, fleet.JoinToken{Digest: "old", Expires: b.clock.Now()})
		})
		if err := b.PutSession(ctx, fleet.Session{Digest: "d", Expires: b.clock.Now()}); err != nil {
			t.Fatal(err)
		}
		stats := testkit.Must[Stats](t)(b.Stats(ctx))
		if stats.Evidence != 11 || stats.EvidenceBytes < 11000 || stats.Audit != 1 || stats.Bytes < 10000 || stats.Schema != 4 {
			t.Errorf("%+v", stats)
		}
		if v := testkit.Must[Removed](t)(b.Expire(ctx, b.clock.Now(), Retention{})); v != (Removed{Sessions: 1, Tokens: 1}) {
			t.Errorf("no retention: %+v", v)
		}
		// By size: the loud one's oldest go, the quiet one's stays although it is older.
		v := testkit.Must[Removed](t)(b.Expire(ctx, b.clock.Now(), Retention{EvidenceBytes: 4500}))
		if after := testkit.Must[Stats](t)(b.Stats(ctx)); after.EvidenceBytes > 4500 || after.Evidence != 4 || v.Evidence != 7 {
			t.Errorf("%+v, %+v", v, after)
		}
		for _, id := range []int64{quiet, last} {
			if r := testkit.Must[fleet.Round](t)(b.Round(ctx, id)); len(r.Evidence) != 1000 {
				t.Errorf("round %d has %d bytes of evidence", id, len(r.Evidence))
			}
		}
		// By age: never the newest round of a node.
		v = testkit.Must[Removed](t)(b.Expire(ctx, b.clock.Now(), Retention{RoundAge: 150 * time.Minute, EvidenceAge: 90 * time.Minute}))
		if v.Rounds != 7 || v.Evidence != 2 {
			t.Errorf("%+v", v)
		}
		all, _, err := b.Rounds(ctx, RoundFilter{}, Page{})
		if err != nil || len(all) != 4 || all[3].ID != quiet {
			t.Errorf("%+v %v", all, err)
		}
		if testkit.Must[*appraise.Result](t)(b.Result(ctx, n.ID)) == nil {
			t.Error("no result")
		}
		if head := testkit.Must[fleet.AuditHead](t)(b.VerifyAudit(ctx, nil, nil)); head.ID != 1 {
			t.Error("the audit log is shorter")
		}
	})
}

func TestSettings(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		put := func(v int64, data string) error {
			return b.Do(ctx, func(tx *Tx) error {
				return tx.PutSetting(ctx, fleet.Setting{Name: "policy", Version: v, Data: []byte(data), By: "anna"})
			})
		}
		_, err := b.Setting(ctx, "policy")
		wantErr(t, err, ErrNotFound)
		wantErr(t, put(2, "x"), ErrVersion)
		if err := errors.Join(put(1, "one"), put(2, "two")); err != nil {
			t.Fatal(err)
		}
		wantErr(t, put(2, "other"), ErrVersion)
		if v := testkit.Must[fleet.Setting](t)(b.Setting(ctx, "policy")); v.Version != 2 || string(v.Data) != "two" || v.By != "anna" || !v.Time.Equal(b.clock.Now()) {
			t.Errorf("%+v", v)
		}
		all, next, err := b.SettingVersions(ctx, "policy", Page{Limit: 1})
		rest, end, err2 := b.SettingVersions(ctx, "policy", Page{Limit: 1, After: next})
		if err := errors.Join(err, err2); err != nil || len(all) != 1 || len(rest) != 1 || string(rest[0].Data) != "one" || end != "" {
			t.Errorf("%v %+v %+v", err, all, rest)
		}
		var won atomic.Int32
		var wg sync.WaitGroup
		other := b.replica()
		for i := range 8 {
			wg.Go(func() {
				err := []*Store{b.Store, other}[i%2].Do(ctx, func(tx *Tx) error {
					return tx.PutSetting(ctx, fleet.Setting{Name: "policy", Version: 3, Data: []byte("three")})
				})
				if err == nil {
					won.Add(1)
				} else if !errors.Is(err, ErrVersion) {
					t.Error(err)
				}
			})
		}
		if wg.Wait(); won.Load() != 1 {
			t.Errorf("version 3 was written %d times", won.Load())
		}
	})
}

func TestValues(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		ctx := t.Context()
		add := func(want int, vs ...fleet.Value) {
			t.Helper()
			b.do(func(ctx context.Context, tx *Tx) error {
				n, err := tx.AddValues(ctx, vs)
				if n != want {
					t.Errorf("%d new, want %d", n, want)
				}
				return err
			})
		}
		value := func(subject, path string) fleet.Value {
			return fleet.Value{Subject: subject, Kind: fleet.HostIMA, Path: path, Digest: "sha256:00", Source: "learned", State: fleet.Approved, By: "verifier"}
		}
		version := func(subjects ...string) int64 { return testkit.Must[int64](t)(b.ValuesVersion(ctx, subjects...)) }
		long := strings.Repeat("p", 4096)
		var many []fleet.Value
		for i := range 500 {
			many = append(many, value("node", fmt.Sprint("/bin/", i)))
		}
		many = append(many, many[7], value("node", long), value("vm", "/x"), value("", "/y"), value("other", "/z"))
		add(504, many...)
		add(0, many...)
		v1, vOther := version("", "node", "vm"), version("other")
		if v1 == 0 || version("nobody") != 0 {
			t.Errorf("versions %d", v1)
		}
		if got := testkit.Must[[]fleet.Value](t)(b.ValuesFor(ctx, "", "node", "vm")); len(got) != 503 {
			t.Errorf("%d values", len(got))
		}

		// Four eyes.
		p := value("node", "/proposed")
		p.State, p.FourEyes, p.By, p.Source = fleet.Proposed, true, "anna", "operator"
		add(1, p)
		if version("node") != v1 {
			t.Error("a proposal makes caches void")
		}
		all, _, err := b.Values(ctx, ValueFilter{State: fleet.Proposed}, Page{})
		if err != nil || len(all) != 1 {
			t.Fatalf("%+v %v", all, err)
		}
		id := all[0].ID
		set := func(from, to fleet.ValueState, who string) error {
			return b.Do(ctx, func(tx *Tx) error { return tx.SetValueState(ctx, id, from, to, who) })
		}
		wantErr(t, set(fleet.Proposed, fleet.Approved, "anna"), ErrSamePerson)
		wantErr(t, set(fleet.Proposed, fleet.Approved, "Anna"), ErrSamePerson)
		wantErr(t, set(fleet.Proposed, fleet.Approved, ""), ErrSamePerson)
		wantErr(t, set(fleet.Approved, fleet.Rejected, "berta"), ErrVersion)
		for _, second := range []string{"", "anna"} {
			if err := b.raw(fmt.Sprintf("UPDATE reference_values SET state = 'approved', second = '%s' WHERE id = %d", second, id)); err == nil {
				t.Errorf("SQL lets %q approve", second)
			}
		}
		sneaky := p
		sneaky.State, sneaky.Path = fleet.Approved, "/sneaky"
		wantErr(t, b.Do(ctx, func(tx *Tx) error { _, err := tx.AddValues(ctx, []fleet.Value{sneaky}); return err }), ErrSamePerson)
		if err := set(fleet.Proposed, fleet.Approved, "berta"); err != nil {
			t.Fatal(err)
		}
		if v := testkit.Must[fleet.Value](t)(b.Value(ctx, id)); v.Second != "berta" || v.State != fleet.Approved || v.By != "anna" {
			t.Errorf("%+v", v)
		}
		v2 := version("", "node", "vm")
		if v2 <= v1 || version("other") != vOther {
			t.Errorf("versions %d after %d; other %d after %d", v2, v1, version("other"), vOther)
		}
		if err := set(fleet.Approved, fleet.Rejected, "anna"); err != nil {
			t.Fatal(err)
		}
		if version("node") <= v2 {
			t.Error("a rejection does not make caches void")
		}
		v3 := version("node")
		got := testkit.Must[[]fleet.Value](t)(b.ValuesFor(ctx, "node"))
		if i := slices.IndexFunc(got, func(v fleet.Value) bool { return v.State == fleet.Rejected }); len(got) != 502 || i < 0 || got[i].Path != "/proposed" {
			t.Errorf("%d values; the rejected one is at %d", len(got), i)
		}
		add(1, p) // proposed anew
		if got := testkit.Must[[]fleet.Value](t)(b.ValuesFor(ctx, "node")); len(got) != 502 || version("node") != v3 {
			t.Errorf("%d values, version %d after %d: a proposal counts", len(got), version("node"), v3)
		}
		wantErr(t, set(fleet.Rejected, fleet.Proposed, "anna"), ErrConflict)
		_, err = b.Value(ctx, 99999)
		wantErr(t, err, ErrNotFound)
		other := "other"
		for i, c := range []struct {
			f    ValueFilter
			want int
		}{{ValueFilter{Subject: &other}, 1}, {ValueFilter{Search: "/BIN/49"}, 11}, {ValueFilter{Source: "operator"}, 2}, {ValueFilter{Kind: fleet.VMPCR}, 0}, {ValueFilter{Search: "sha256:00", State: fleet.Rejected}, 1}} {
			if got, _, err := b.Values(ctx, c.f, Page{}); err != nil || len(got) != c.want {
				t.Errorf("filter %d: %d, %v; want %d", i, len(got), err, c.want)
			}
		}
	})
}

// Two that learn the same values at one moment do not fail, and add each once.
func TestValuesAtOnce(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		replicas := []*Store{b.Store, b.replica()}
		var added atomic.Int64
		var wg sync.WaitGroup
		for i := range 6 {
			wg.Go(func() {
				var vs []fleet.Value
				for j := range 200 {
					vs = append(vs, fleet.Value{Kind: fleet.HostIMA, Path: fmt.Sprint((j*7 + i*31) % 200), Digest: "d", State: fleet.Approved})
				}
				err := replicas[i%2].Do(t.Context(), func(tx *Tx) error {
					n, err := tx.AddValues(t.Context(), vs)
					added.Add(int64(n))
					return err
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if got := testkit.Must[[]fleet.Value](t)(b.ValuesFor(t.Context(), "")); len(got) != 200 {
			t.Errorf("%d values", len(got))
		}
	})
}
