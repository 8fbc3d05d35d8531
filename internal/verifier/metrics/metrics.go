// Package metrics counts what the Verifier does, for Prometheus, in a registry of
// its own.
package metrics

import (
	"context"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

// Fleet is what is asked of a *store.Store when metrics are read.
type Fleet interface {
	Summary(context.Context) (fleet.Summary, error)
	Queued(context.Context) (waiting, dead int, err error)
	Stats(context.Context) (store.Stats, error)
}

// Metrics are the Verifier's. Those of the fleet are read from the store, and are
// the same in all replicas; the others are this one's own.
type Metrics struct {
	registry *prometheus.Registry

	rounds, refused, enrolled, expired, deliveries *prometheus.CounterVec
	failed, databaseErrors                         prometheus.Counter
	seconds, bytes                                 prometheus.Histogram
}

// Options are what the figures are made of.
type Options struct {
	Version string
	Fleet   Fleet
	CAUntil time.Time                         // when the CA's certificate ends
	Server  func() (until time.Time, ok bool) // and the server's; false while there is none
	// Browsers is the same of the certificate for browsers.
	Browsers func() (until time.Time, ok bool)
}

// New makes the registry.
func New(o Options) *Metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "virt_trust_" + name, Help: help}, labels)
	}
	m := &Metrics{
		registry:       prometheus.NewRegistry(),
		rounds:         counter("rounds_total", "Rounds appraised and stored, by the host's tier.", "tier"),
		refused:        counter("refused_total", "Requests of nodes that were refused, by code.", "code"),
		enrolled:       counter("enrolled_total", "Nodes that were enrolled, by state.", "state"),
		expired:        counter("results_expired_total", "Results that expired before another came, by the host's tier before.", "tier"),
		deliveries:     counter("webhook_deliveries_total", "Attempts to deliver to webhooks, by what came of them.", "outcome"),
		failed:         prometheus.NewCounter(prometheus.CounterOpts{Name: "virt_trust_rounds_failed_total", Help: "Rounds that could not be appraised or stored."}),
		databaseErrors: prometheus.NewCounter(prometheus.CounterOpts{Name: "virt_trust_database_errors_total", Help: "Times that the database did not answer."}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "virt_trust_appraisal_seconds", Help: "Time from Evidence to stored result.", Buckets: prometheus.ExponentialBuckets(0.0005, 2, 16),
		}),
		bytes: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "virt_trust_evidence_bytes", Help: "Size of Evidence, unpacked.", Buckets: prometheus.ExponentialBuckets(1024, 4, 9),
		}),
	}
	// Those that an alert watches are there from the start.
	for _, t := range tiers {
		m.rounds.WithLabelValues(t.String())
		m.expired.WithLabelValues(t.String())
	}
	m.deliveries.WithLabelValues("delivered")
	m.deliveries.WithLabelValues("failed")
	build := prometheus.NewGauge(prometheus.GaugeOpts{Name: "virt_trust_build_info", Help: "The Verifier's version.", ConstLabels: prometheus.Labels{"version": o.Version}})
	build.Set(1)
	m.registry.MustRegister(m.rounds, m.refused, m.enrolled, m.expired, m.deliveries, m.failed, m.databaseErrors, m.seconds, m.bytes, build,
		&gauges{o: o, errors: m.databaseErrors}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

var tiers = []appraise.Tier{appraise.Affirming, appraise.Warning, appraise.Contraindicated, appraise.None}

// Handler serves the registry.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4})
}

// Round counts a round: of rounds.Observer.
func (m *Metrics) Round(tier appraise.Tier, bytes int, took time.Duration, err error) {
	if err != nil {
		m.failed.Inc()
		return
	}
	m.rounds.WithLabelValues(tier.String()).Inc()
	m.seconds.Observe(took.Seconds())
	m.bytes.Observe(float64(bytes))
}

// Refused counts a refusal: of rounds.Observer.
func (m *Metrics) Refused(code ca.Code) { m.refused.WithLabelValues(string(code)).Inc() }

// Enrolled counts an enrolment: of rounds.Observer.
func (m *Metrics) Enrolled(state string) { m.enrolled.WithLabelValues(state).Inc() }

// Expired counts a result that expired.
func (m *Metrics) Expired(tier appraise.Tier) { m.expired.WithLabelValues(tier.String()).Inc() }

// Delivered counts an attempt to deliver to a webhook.
func (m *Metrics) Delivered(err error) {
	outcome := "delivered"
	if err != nil {
		outcome = "failed"
	}
	m.deliveries.WithLabelValues(outcome).Inc()
}

// DatabaseError counts a time that the database did not answer.
func (m *Metrics) DatabaseError() { m.databaseErrors.Inc() }

// gauges are read when somebody asks.
type gauges struct {
	o      Options
	errors prometheus.Counter
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("virt_trust_"+name, help, labels, nil)
}

var (
	up           = desc("database_up", "Whether the database answered just now.")
	nodes        = desc("nodes", "Nodes by state.", "state")
	nodeTiers    = desc("node_tiers", "Active nodes by what their newest results say now.", "tier")
	vmTiers      = desc("vm_tiers", "VMs of active nodes by what their newest results say now.", "tier")
	problemNodes = desc("node_problems", "Nodes with something that an operator should look at.")
	queued       = desc("webhook_queue", "Deliveries to webhooks that wait, or were given up.", "state")
	size         = desc("database_bytes", "Size of the database.")
	evidence     = desc("evidence_stored_bytes", "Size of all Evidence that is kept.")
	certificate  = desc("certificate_expiry_timestamp_seconds", "When a certificate ends, in seconds since 1970.", "certificate")
)

func (g *gauges) Describe(c chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{up, nodes, nodeTiers, vmTiers, problemNodes, queued, size, evidence, certificate} {
		c <- d
	}
}

// readTime is for all questions to the store.
const readTime = 5 * time.Second

func (g *gauges) Collect(c chan<- prometheus.Metric) {
	set := func(d *prometheus.Desc, v float64, labels ...string) {
		c <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	set(certificate, float64(g.o.CAUntil.Unix()), "ca")
	for name, until := range map[string]func() (time.Time, bool){"server": g.o.Server, "browsers": g.o.Browsers} {
		if t, ok := until(); ok {
			set(certificate, float64(t.Unix()), name)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), readTime)
	defer cancel()
	s, err := g.o.Fleet.Summary(ctx)
	waiting, dead, err2 := 0, 0, error(nil)
	var stats store.Stats
	if err == nil {
		waiting, dead, err2 = g.o.Fleet.Queued(ctx)
	}
	if err == nil && err2 == nil {
		stats, err2 = g.o.Fleet.Stats(ctx)
	}
	if err != nil || err2 != nil {
		// Figures of a moment ago would be a lie: there are none.
		g.errors.Inc()
		set(up, 0)
		return
	}
	set(up, 1)
	for _, state := range []fleet.NodeState{fleet.Pending, fleet.Active, fleet.Revoked} {
		set(nodes, float64(s.Nodes[state]), string(state))
	}
	for _, t := range tiers {
		set(nodeTiers, float64(s.ByTier[t]), t.String())
		set(vmTiers, float64(s.VMs[t]), t.String())
	}
	set(problemNodes, float64(s.Problems))
	set(queued, float64(waiting), "waiting")
	set(queued, float64(dead), "given-up")
	set(size, float64(stats.Bytes))
	set(evidence, float64(stats.EvidenceBytes))
}
