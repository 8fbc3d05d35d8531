package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store/storetest"
)

// benchStores gives each database with its durability as it ships.
func benchStores(b *testing.B, f func(b *testing.B, s *Store, nodes []string) func(*testing.B)) {
	nodes := 1000
	if v := os.Getenv("VIRT_TRUST_BENCH_NODES"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			b.Fatal(err)
		}
		nodes = n
	}
	for _, name := range []string{"sqlite", "postgres"} {
		var dsn string
		if name == "sqlite" {
			dsn = storetest.SQLite(b)
		} else {
			server, err := storetest.New()
			storetest.Need(b, err)
			b.Cleanup(func() {
				if err := server.Remove(); err != nil {
					b.Error(err)
				}
			})
			dsn = server.NewDatabase(b)
		}
		s, err := Open(b.Context(), dsn, Options{MaxConns: 16})
		if err != nil {
			b.Fatal(err)
		}
		defer s.Close()
		ids := make([]string, nodes)
		err = s.Do(b.Context(), func(tx *Tx) error {
			for i := range ids {
				ids[i] = testNode(i).ID
				if err := tx.PutNode(b.Context(), testNode(i)); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
		b.Run(name, f(b, s, ids))
	}
}

var benchPCRs = func() map[string]string {
	m := map[string]string{}
	for i := range 24 {
		m[fmt.Sprintf("sha256:%d", i)] = hex.EncodeToString(random(sha256.Size))
	}
	return m
}()

// realistic is a result of a host with 20 VMs, each with 24 PCRs of SHA-256.
func realistic(node string, change int) *appraise.Result {
	now := time.Now()
	good := appraise.Appraisal{Tier: appraise.Affirming, Vector: appraise.Vector{InstanceIdentity: 2, Executables: 2, Hardware: 2}}
	r := &appraise.Result{Node: node, Received: now, Expires: now.Add(3 * time.Minute), Host: good, PCRs: appraise.NewPCRs(benchPCRs), HostName: "h", Kernel: "6.1", BootID: "b"}
	for i := range 20 {
		uuid := fmt.Sprintf("%s-%d", node, i)
		vm := appraise.VM{UUID: uuid, Name: "vm", Running: true, Appraisal: good, EK: uuid, PCRs: appraise.NewPCRs(benchPCRs)}
		for _, role := range []string{"emulator", "firmware", "swtpm", "libtpms"} {
			vm.Launchers = append(vm.Launchers, appraise.Launcher{Role: role, Path: "/usr/bin/" + role, SHA256: benchPCRs["sha256:0"]})
		}
		r.VMs = append(r.VMs, vm)
	}
	if change > 0 { // one PCR of one VM
		pcrs := maps.Clone(benchPCRs)
		pcrs["sha256:9"] = strconv.Itoa(change)
		r.VMs[change%20].PCRs = appraise.NewPCRs(pcrs)
		r.Changes = []appraise.Change{{Subject: r.VMs[change%20].UUID, Kind: "pcr", What: "PCR 9"}}
	}
	return r
}

// benchRounds takes in rounds of all nodes from 64 connections at once, each with
// the next nonce in it, as the Verifier does; making the result (realistic) is in
// the time, some 100 µs.
func benchRounds(b *testing.B, complete func(node string, i int) Completion) {
	benchStores(b, func(b *testing.B, s *Store, ids []string) func(*testing.B) {
		ctx := context.Background()
		nonce := func(node, round int) []byte {
			d := sha256.Sum256(fmt.Append(nil, node, round))
			return d[:]
		}
		round, turn := make([]int, len(ids)), make([]sync.Mutex, len(ids)) // a node does one round after the other
		one := func(n int) error {
			turn[n].Lock()
			defer turn[n].Unlock()
			i := round[n]
			round[n]++
			c := complete(ids[n], i)
			c.Nonce, c.Next, c.NextExpires = nonce(n, i), nonce(n, i+1), time.Now().Add(time.Hour)
			_, err := s.CompleteRound(ctx, c)
			return err
		}
		var wg sync.WaitGroup
		for k := range 32 {
			wg.Go(func() {
				for n := k; n < len(ids); n += 32 {
					if _, err := s.IssueNonce(ctx, ids[n], nonce(n, 0), time.Now().Add(time.Hour)); err != nil {
						b.Error(err)
					} else if err := one(n); err != nil {
						b.Error(err)
					}
				}
			})
		}
		wg.Wait()
		var next atomic.Int64
		return func(b *testing.B) {
			b.SetParallelism(32)
			before := cpu(b)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := one(int(next.Add(1)) % len(ids)); err != nil {
						b.Error(err)
						return
					}
				}
			})
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "rounds/s")
			b.ReportMetric(float64((cpu(b)-before).Microseconds())/float64(b.N), "cpu-µs/round")
			b.ReportMetric(rss(b), "MB-rss")
			if st, err := s.Stats(ctx); err != nil {
				b.Error(err)
			} else {
				b.ReportMetric(float64(st.Bytes)/1e6, "MB-disk")
			}
		}
	})
}

// cpu is what this process used, PostgreSQL's server left out: on a machine that
// others use too it says more than the wall clock.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// rss is what the process has in memory: SQLite's is not on Go's heap.
func rss(b *testing.B) float64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if kb, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.ParseFloat(strings.Fields(kb)[0], 64)
			if err != nil {
				b.Fatal(err)
			}
			return n / 1e3
		}
	}
	b.Fatal("no VmRSS")
	return 0
}

// The usual round: nothing changed; a checkpoint of 4 KiB that did.
func BenchmarkUnchangedRound(b *testing.B) {
	checkpoint := random(4096)
	benchRounds(b, func(node string, i int) Completion {
		c := append([]byte(strconv.Itoa(i)), checkpoint...)
		return Completion{Node: node, Result: realistic(node, 0), Checkpoint: c}
	})
}

// One PCR of one of 20 VMs changed.
func BenchmarkChangedRound(b *testing.B) {
	checkpoint := random(4096)
	benchRounds(b, func(node string, i int) Completion {
		return Completion{Node: node, Result: realistic(node, i), Checkpoint: append([]byte(strconv.Itoa(i)), checkpoint...)}
	})
}

// Evidence of 64 KiB is kept.
func BenchmarkFailedRound(b *testing.B) {
	evidence := random(64 << 10)
	benchRounds(b, func(node string, i int) Completion {
		r := realistic(node, i)
		r.Host.Tier = appraise.Contraindicated
		return Completion{Node: node, Result: r, Checkpoint: evidence[:4096], Evidence: evidence}
	})
}

// What the fleet page asks for.
func BenchmarkFleetPage(b *testing.B) {
	benchStores(b, func(b *testing.B, s *Store, ids []string) func(*testing.B) {
		for _, id := range ids {
			nonce := []byte(id)
			if _, err := s.IssueNonce(b.Context(), id, nonce, time.Now().Add(time.Hour)); err != nil {
				b.Fatal(err)
			}
			if _, err := s.CompleteRound(b.Context(), Completion{Node: id, Nonce: nonce, Result: realistic(id, 0)}); err != nil {
				b.Fatal(err)
			}
		}
		return func(b *testing.B) {
			for b.Loop() {
				if _, err := s.Summary(b.Context()); err != nil {
					b.Fatal(err)
				}
				if all, _, err := s.Nodes(b.Context(), NodeFilter{}, Page{}); err != nil || len(all) != 100 {
					b.Fatal(len(all), err)
				}
			}
		}
	})
}

// The values for one appraisal: 1,000 for all and 200 of the node.
func BenchmarkValuesFor(b *testing.B) {
	benchStores(b, func(b *testing.B, s *Store, ids []string) func(*testing.B) {
		var vs []fleet.Value
		for i := range 1200 {
			v := fleet.Value{Kind: fleet.HostIMA, Path: fmt.Sprint("/usr/bin/", i), Digest: "sha256:" + strings.Repeat("0", 64), State: fleet.Approved, Source: "learned"}
			if i >= 1000 {
				v.Subject = ids[0]
			}
			vs = append(vs, v)
		}
		if err := s.Do(b.Context(), func(tx *Tx) error { _, err := tx.AddValues(b.Context(), vs); return err }); err != nil {
			b.Fatal(err)
		}
		return func(b *testing.B) {
			for b.Loop() {
				if all, err := s.ValuesFor(b.Context(), "", ids[0]); err != nil || len(all) != 1200 {
					b.Fatal(len(all), err)
				}
			}
		}
	})
}
