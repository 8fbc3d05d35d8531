package page

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/page/pagetest"
	"virt-trust/internal/verifier/store"
)

// world is a host in software whose evidence is appraised for real, round by round,
// into the store that the page reads.
type world struct {
	*harness
	host   *forge.Host
	node   string
	policy *appraise.Policy
	last   *appraise.Checkpoint
}

func guestLog(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("../../evidence/eventlog/testdata/" + name + ".bin")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// round is one: evidence of the host, appraised with what the store has approved.
func (w *world) round() appraise.Result {
	w.t.Helper()
	ctx := context.Background()
	w.host.Tick(time.Minute)
	w.mu.Lock()
	w.now = w.host.Now
	w.mu.Unlock()
	nonce := make([]byte, report.NonceSize)
	rand.Read(nonce)
	subjects := []string{"", w.node}
	vms, _, err := w.Store.VMs(ctx, store.VMFilter{Node: w.node}, store.Page{})
	if err != nil {
		w.t.Fatal(err)
	}
	for _, v := range vms {
		subjects = append(subjects, v.UUID)
	}
	values, err := w.Store.ValuesFor(ctx, subjects...)
	if err != nil {
		w.t.Fatal(err)
	}
	o := forge.Options{}
	o.HaveBoot, o.Have = w.last.Have()
	evidence := w.host.Evidence(nonce, o)
	res, next, learned := appraise.Round(appraise.Input{
		Node:  appraise.Node{ID: w.node, AK: &w.host.TPM.Key.PublicKey, AKName: w.host.TPM.AKName()},
		Nonce: nonce, Expires: w.host.Now.Add(time.Minute), Evidence: evidence, Previous: w.last, Values: []*appraise.Values{appraise.NewValues(values)}, Policy: w.policy, Learn: true, Now: w.host.Now,
	})
	res.Changes = appraise.Diff(w.last, next, w.policy)
	w.last = next
	if len(learned) > 0 {
		err := w.Store.Do(ctx, func(tx *store.Tx) error {
			_, err := tx.AddValues(ctx, learned)
			return err
		})
		if err != nil {
			w.t.Fatal(err)
		}
	}
	if _, err := w.Store.IssueNonce(ctx, w.node, nonce, w.host.Now.Add(time.Minute)); err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.Store.CompleteRound(ctx, store.Completion{Node: w.node, Nonce: nonce, Result: &res, Evidence: evidence}); err != nil {
		w.t.Fatal(err)
	}
	return res
}

// TestRealResults goes from evidence to page: a first round that is learned, a file
// and a guest's kernel that nobody knows, found at the right link for the right
// reason, approved by two people on the page, and affirmed again.
func TestRealResults(t *testing.T) {
	w := &world{harness: newHarness(t), node: pagetest.Good, policy: appraise.DefaultPolicy()}
	w.now = start
	w.host = forge.NewHost("sha256", guestLog(t, "uki"), start)
	n := w.Build.Node(w.node, "kvm-01", fleet.Active)
	n.AKName = w.host.TPM.AKName()
	if err := w.Build.Put(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	w.host.MeasureMany(20)
	launchers := w.host.Launchers([3]string{"emulator", "/usr/bin/qemu-system-x86_64", "qemu"}, [3]string{"firmware", "/usr/share/OVMF/OVMF_CODE.fd", "ovmf"}, [3]string{"swtpm", "/usr/bin/swtpm", "swtpm"})
	v := w.host.AddVM("vault")
	w.host.Start(v, guestLog(t, "sd"), launchers...)
	w.host.Tick(5 * time.Minute)

	res := w.round()
	if res.Host.Tier != appraise.Affirming || len(res.VMs) != 1 || res.VMs[0].Tier != appraise.Affirming {
		t.Fatalf("the first round: %+v", res)
	}
	vm := "/nodes/" + w.node + "/vms/" + res.VMs[0].UUID
	if body := w.get(vm); !strings.Contains(body, "All 12 links are affirmed") {
		t.Error("the chain does not hold:", links(body))
	}
	if body := w.get("/values?source=learned"); !strings.Contains(body, "VM vault") {
		t.Error("what was learned is not shown")
	}

	// The guest boots something else.
	w.host.Stop(v)
	w.host.Start(v, guestLog(t, "grub"), launchers...)
	w.host.Tick(5 * time.Minute)
	res = w.round()
	if res.VMs[0].Tier == appraise.Affirming || res.Host.Tier != appraise.Affirming {
		t.Fatalf("another guest: %+v", res)
	}
	body := w.get(vm)
	if l := links(body); l["vtpm"] != "affirming" || l["qemu"] != "affirming" || l["guest-loader"] == "affirming" || l["guest-kernel"] == "affirming" {
		t.Errorf("links: %v", l)
	}
	if !strings.Contains(w.get("/"), "vault") || !strings.Contains(body, appraise.CodeVMPCR) {
		t.Error("the fleet does not name the VM")
	}
	if body := w.get(w.diffPath(w.node)); !strings.Contains(body, "VM vault") || !strings.Contains(body, "PCR ") {
		t.Error("the comparison does not say what changed")
	}

	// A file on the host that nobody knows breaks the chain before all of the VM.
	w.host.Measure("/usr/local/bin/<b>odd</b>", []byte("odd"))
	res = w.round()
	body = w.get(vm)
	if l := links(body); l["host-tpm"] != "affirming" || l["host-kernel"] != "affirming" || l["host-daemon"] == "affirming" {
		t.Errorf("links: %v; %+v", l, res.Host)
	}
	if body := w.get("/nodes/" + w.node); !strings.Contains(body, "&lt;b&gt;odd") || !strings.Contains(body, appraise.CodeIMAUnknown) {
		t.Error("the host's page does not name the file")
	}

	// One proposes all of it, another approves, and it counts in the next round.
	round := w.get("/nodes/" + w.node + "/rounds/" + w.newest(w.node))
	form := url.Values{}
	for _, part := range strings.Split(round, `name="ref" value="`)[1:] {
		form.Add("ref", part[:strings.IndexByte(part, '"')])
	}
	if len(form["ref"]) < 2 {
		t.Fatalf("to approve: %v", form)
	}
	w.post("/nodes/"+w.node+"/rounds/"+w.newest(w.node)+"/approve", form)
	ids := url.Values{}
	for _, v := range w.values(store.ValueFilter{State: fleet.Proposed}) {
		ids.Add("id", fmt.Sprint(v.ID))
	}
	if res = w.round(); res.Host.Tier == appraise.Affirming {
		t.Error("a proposal counts already")
	}
	w.as(policyB).post("/values/approve", ids)
	if res = w.round(); res.Host.Tier != appraise.Affirming || res.VMs[0].Tier != appraise.Affirming {
		t.Fatalf("after the approval: host %+v, VM %+v", res.Host, res.VMs[0].Appraisal)
	}
	if body := w.get(vm); !strings.Contains(body, "All 12 links are affirmed") {
		t.Error("the chain does not hold again:", links(body))
	}
}

// links are the words that a VM's page has of each link.
func links(body string) map[string]string {
	out := map[string]string{}
	for _, part := range strings.Split(body, `<li id="link-`)[1:] {
		id, rest, _ := strings.Cut(part, `"`)
		_, rest, _ = strings.Cut(rest, "</svg>")
		word, _, _ := strings.Cut(rest, "<")
		out[id] = strings.TrimSpace(word)
	}
	return out
}
