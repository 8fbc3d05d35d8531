package metrics

import (
	"context"
	"encoding/json"
	"errors"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

// census stands for a store.
type census struct{ err error }

func (c *census) Summary(context.Context) (fleet.Summary, error) {
	return fleet.Summary{
		Nodes: map[fleet.NodeState]int{fleet.Active: 3, fleet.Pending: 1}, ByTier: map[appraise.Tier]int{appraise.Affirming: 2, appraise.None: 1},
		VMs: map[appraise.Tier]int{appraise.Contraindicated: 7}, Problems: 4,
	}, c.err
}
func (c *census) Queued(context.Context) (int, int, error) { return 5, 6, c.err }
func (c *census) Stats(context.Context) (store.Stats, error) {
	return store.Stats{Bytes: 1000, EvidenceBytes: 100}, c.err
}

func newMetrics(c *census) *Metrics {
	return New(Options{Version: "1.2.3", Fleet: c, CAUntil: time.Unix(2000000000, 0), Server: func() (time.Time, bool) { return time.Unix(1900000000, 0), true }, Browsers: func() (time.Time, bool) { return time.Unix(1800000000, 0), true }})
}

func read(t *testing.T, m *Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	return w.Body.String()
}

// exercised counts one of everything.
func exercised(c *census) *Metrics {
	m := newMetrics(c)
	m.Round(appraise.Affirming, 5000, 20*time.Millisecond, nil)
	m.Round(appraise.None, 5000, time.Second, errors.New("no"))
	m.Refused("nonce-bad")
	m.Enrolled("active")
	m.Expired(appraise.Warning)
	m.Delivered(nil)
	m.Delivered(errors.New("no"))
	m.DatabaseError()
	return m
}

func TestMetrics(t *testing.T) {
	c := &census{}
	text := read(t, exercised(c))
	for _, want := range []string{
		`virt_trust_rounds_total{tier="affirming"} 1`, `virt_trust_rounds_total{tier="none"} 0`, `virt_trust_rounds_failed_total 1`, `virt_trust_appraisal_seconds_count 1`,
		`virt_trust_evidence_bytes_sum 5000`, `virt_trust_refused_total{code="nonce-bad"} 1`, `virt_trust_enrolled_total{state="active"} 1`,
		`virt_trust_results_expired_total{tier="warning"} 1`, `virt_trust_webhook_deliveries_total{outcome="failed"} 1`, `virt_trust_database_errors_total 1`,
		`virt_trust_database_up 1`, `virt_trust_nodes{state="active"} 3`, `virt_trust_nodes{state="revoked"} 0`, `virt_trust_node_tiers{tier="none"} 1`,
		`virt_trust_vm_tiers{tier="contraindicated"} 7`, `virt_trust_node_problems 4`, `virt_trust_webhook_queue{state="waiting"} 5`, `virt_trust_webhook_queue{state="given-up"} 6`,
		`virt_trust_database_bytes 1000`, `virt_trust_evidence_stored_bytes 100`, `virt_trust_certificate_expiry_timestamp_seconds{certificate="ca"} 2e+09`,
		`virt_trust_build_info{version="1.2.3"} 1`,
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("%s is missing", want)
		}
	}
	families, err := exercised(c).registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if counter := f.GetType().String() == "COUNTER"; strings.HasPrefix(f.GetName(), "virt_trust_") && (counter != strings.HasSuffix(f.GetName(), "_total") || !strings.HasSuffix(f.GetHelp(), ".")) {
			t.Errorf("%s, a %s: %s", f.GetName(), f.GetType(), f.GetHelp())
		}
	}
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		return // the names and types above are what it would look at
	}
	cmd := exec.Command(promtool, "check", "metrics")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// While the database does not answer there are no figures of the fleet, not even
// those of a moment ago.
func TestDatabaseAway(t *testing.T) {
	c := &census{}
	m := newMetrics(c)
	read(t, m)
	c.err = store.ErrUnavailable
	text := read(t, m)
	if !strings.Contains(text, "virt_trust_database_up 0\n") || strings.Contains(text, "virt_trust_node_tiers{") || strings.Contains(text, "virt_trust_nodes{") || !strings.Contains(text, `certificate="ca"`) {
		t.Error(text)
	}
	if text := read(t, m); !strings.Contains(text, "virt_trust_database_errors_total 1") && !strings.Contains(text, "virt_trust_database_errors_total 2") {
		t.Error("nobody counted it")
	}
}

var name = regexp.MustCompile(`\b(virt_trust|process|go)_[a-z_]+`)

// used holds an expression against the metrics that there are, labels included,
// and notes which it uses.
func used(t *testing.T, where, expr string, there, seen map[string]bool, text string) {
	t.Helper()
	for _, m := range name.FindAllString(expr, -1) {
		if !there[m] {
			t.Errorf("%s: there is no metric %s", where, m)
		}
		seen[strings.TrimSuffix(m, "_bucket")] = true
	}
	for _, sel := range regexp.MustCompile(`(virt_trust_[a-z_]+)\{([a-z_]+)="([^"]*)"`).FindAllStringSubmatch(expr, -1) {
		if !strings.Contains(text, sel[1]+"{"+sel[2]+`="`+sel[3]+`"`) {
			t.Errorf("%s: no metric is ever %s", where, sel[0])
		}
	}
}

// The alerts and the dashboard use metrics that there are, and between them all
// of ours.
func TestAlertsAndDashboard(t *testing.T) {
	text := read(t, exercised(&census{}))
	there, seen := map[string]bool{}, map[string]bool{}
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "#") {
			there[name.FindString(line)] = true
		}
	}
	alerts, err := os.ReadFile("../../../packaging/prometheus/virt-trust-alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	exprs := regexp.MustCompile(`(?m)^        expr: (.*)$`).FindAllStringSubmatch(string(alerts), -1)
	if n := strings.Count(string(alerts), "- alert: "); n < 10 || n != len(exprs) {
		t.Errorf("%d alerts with %d expressions", n, len(exprs))
	}
	for _, e := range exprs {
		used(t, "alert", e[1], there, seen, text)
	}
	b, err := os.ReadFile("../../../packaging/grafana/virt-trust.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Title  string
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &dashboard); err != nil || len(dashboard.Panels) < 10 {
		t.Fatal(err, len(dashboard.Panels))
	}
	for _, p := range dashboard.Panels {
		if len(p.Targets) == 0 {
			t.Errorf("%s shows nothing", p.Title)
		}
		for _, target := range p.Targets {
			used(t, p.Title, target.Expr, there, seen, text)
		}
	}
	for line := range strings.Lines(text) {
		if m, ok := strings.CutPrefix(line, "# TYPE virt_trust_"); ok {
			if m, _, _ = strings.Cut(m, " "); !seen["virt_trust_"+m] {
				t.Errorf("neither an alert nor the dashboard uses virt_trust_%s", m)
			}
		}
	}
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Log("without promtool, which would read the alerts")
		return
	}
	if out, err := exec.Command(promtool, "check", "rules", "../../../packaging/prometheus/virt-trust-alerts.yml").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
