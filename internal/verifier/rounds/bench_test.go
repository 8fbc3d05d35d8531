package rounds

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virt-trust/internal/appraise"
	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/nodeapi"
)

// BenchmarkRound is a round of a node with 20 VMs in the steady state, from the
// request to the answer, on the disk: without TLS and the network.
func BenchmarkRound(b *testing.B) {
	w := newBench(b, func(o *Options) { o.Log.Logger.Out = discard{} })
	const fleetSize = 50
	type station struct {
		*member
		next *nodeapi.Round
		body []byte
	}
	var all []*station
	for i := range fleetSize {
		var vms []string
		for j := range 20 {
			vms = append(vms, fmt.Sprintf("vm-%d-%d", i, j))
		}
		m := w.join(fmt.Sprintf("host-%d", i), w.newHost(vms...))
		o := m.round(forge.Options{})
		if o.Tier != appraise.Affirming {
			b.Fatalf("%+v", o)
		}
		all = append(all, &station{member: m, next: o.Next})
	}
	send := func(s *station) *nodeapi.Outcome {
		r := httptest.NewRequestWithContext(context.Background(), http.MethodPost, "/v1/nodes/"+s.id+"/evidence", bytes.NewReader(s.body))
		r.Header.Set("Content-Type", report.MediaType)
		r.TLS = &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{s.cert.Leaf, w.ca.Certificate()}}}
		rec := httptest.NewRecorder()
		w.h.ServeHTTP(rec, r)
		var o nodeapi.Outcome
		if rec.Code != http.StatusOK || json.Unmarshal(rec.Body.Bytes(), &o) != nil {
			b.Errorf("%d %s", rec.Code, rec.Body)
			return nil
		}
		return &o
	}
	var spent, cpu time.Duration
	rounds, size := 0, 0
	for b.Loop() {
		b.StopTimer()
		for _, s := range all {
			s.body = s.evidence(s.next, forge.Options{})
			size += len(s.body)
		}
		b.StartTimer()
		began, used := time.Now(), cpuTime()
		var working sync.WaitGroup
		slots := make(chan struct{}, 16) // at once, as they come
		for _, s := range all {
			slots <- struct{}{}
			working.Go(func() {
				defer func() { <-slots }()
				o := send(s)
				if o == nil || o.Tier != appraise.Affirming {
					b.Errorf("%+v", o)
					return
				}
				s.next = o.Next
			})
		}
		working.Wait()
		if b.Failed() {
			b.FailNow()
		}
		spent += time.Since(began)
		cpu += cpuTime() - used
		rounds += len(all)
	}
	b.ReportMetric(float64(rounds)/spent.Seconds(), "rounds/s")
	b.ReportMetric(cpu.Seconds()*1000/float64(rounds), "cpu-ms/round")
	b.ReportMetric(float64(size)/float64(rounds), "B/evidence")
}

// cpuTime is what this process has used of all cores.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }
