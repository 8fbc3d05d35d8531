package daemon

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"virt-trust/internal/bus"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/introspect"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
)

// running puts n VMs into the list, each with a swtpm that runs.
func (s *site) running(n int) {
	s.t.Helper()
	swtpm := testkit.Need(s.t, "swtpm")
	memory := introspect.NewMemory(introspect.Config{Swtpm: swtpm, Dir: s.g.dirs.Run, UID: os.Getuid(), GID: os.Getgid()})
	s.t.Cleanup(func() { memory.Close() })
	s.s.pcrs = memory
	for i := range n {
		uuid := fmt.Sprintf("dddddddd-0000-4000-8000-%012d", i)
		s.mkdir(uuid)
		c := exec.Command(swtpm, "socket", "--tpm2", "--tpmstate", "dir="+s.dir(uuid), "--server", "type=unixio,path="+filepath.Join(s.dir(uuid), "sock"), "--flags", "not-need-init,startup-clear")
		c.SysProcAttr, c.WaitDelay = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}, time.Second
		if err := c.Start(); err != nil {
			s.t.Fatal(err)
		}
		s.t.Cleanup(func() { c.Process.Kill(); c.Wait() })
		if err := s.g.peek().Commit(liststore.Change{Put: &list.Record{
			UUID: uuid, Name: "vm-" + uuid[30:], Instance: s.dir(uuid), State: list.Running, Open: true, KeyOwner: list.Ours, Generation: 1, LastVerdict: allow,
		}}); err != nil {
			s.t.Fatal(err)
		}
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		_, r := s.round(bus.Have{})
		read := 0
		for _, v := range r.VMs {
			if v.PCRs != nil {
				read++
			}
		}
		if read == n {
			return
		}
		if time.Now().After(end) {
			s.t.Fatalf("the PCRs of %d of %d vTPMs are read: %s", read, n, r.VMs[0].Problem)
		}
	}
}

// round is one round without the bus.
func (s *site) round(have bus.Have) (*report.Evidence, *report.Report) {
	s.t.Helper()
	nonce := make([]byte, 32)
	b, err := s.s.evidence(background, nonce, have)
	if err != nil {
		s.t.Fatal(err)
	}
	return s.verified(b, nonce)
}

func (s *site) commands() (n int) {
	for _, v := range s.s.host.Timings() {
		n += v.Count
	}
	return n
}

// BenchmarkEvidence is one round of a host with so many VMs, each with a real
// swtpm, and 1,000 entries in the kernel's list; what the receiver has already
// is not sent again.
func BenchmarkEvidence(b *testing.B) {
	for _, n := range []int{0, 5, 100} {
		b.Run(fmt.Sprintf("VMs=%d", n), func(b *testing.B) {
			s := openSite(b)
			paths := make([]string, 1000)
			for i := range paths {
				paths[i] = fmt.Sprintf("/usr/bin/program-%d", i)
			}
			s.measures(paths...)
			s.running(n)
			e, r := s.round(bus.Have{})
			have := bus.Have{Boot: r.BootID, Offsets: map[string]uint64{}}
			for _, l := range e.Logs {
				have.Offsets[l.Kind] = uint64(len(l.Data))
			}
			before, nonce, size := s.commands(), make([]byte, 32), 0
			for b.Loop() {
				out, err := s.s.evidence(background, nonce, have)
				if err != nil {
					b.Fatal(err)
				}
				size = len(out)
			}
			b.ReportMetric(float64(s.commands()-before)/float64(b.N), "TPM-commands/round")
			b.ReportMetric(float64(size), "B/round")
		})
	}
}

// BenchmarkStartBesideEvidence is the warm start of a VM on a TPM that takes
// 5 ms for each command: alone, beside as many rounds of 20 VMs as the agent may
// ask for, and beside rounds without a pause. A start may have to wait for the
// quote that is under way, of five commands, and for none else.
func BenchmarkStartBesideEvidence(b *testing.B) {
	const each = 5 * time.Millisecond
	s := openSite(b)
	f, _, _ := s.ran(uuidA)
	s.running(20)
	s.s.host.Close()
	slow, err := hosttpm.Open(hosttpm.Config{Device: s.m.Socket, Dir: filepath.Join(s.root, "tpm"), PCRs: s.g.cfg.TPM.PCRs, Bank: "sha256", Timeout: 20 * time.Second, Delay: each})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { slow.Close() })
	s.s.host, s.g.tpm = slow, slow
	for _, beside := range []struct {
		name  string
		pause time.Duration
	}{{"alone", 0}, {"every-second", time.Minute / agentPace}, {"without-a-pause", time.Nanosecond}} {
		b.Run(beside.name, func(b *testing.B) {
			ctx, end := context.WithCancel(background)
			var wg sync.WaitGroup
			rounds := 0
			if beside.pause > 0 {
				wg.Go(func() {
					for ctx.Err() == nil {
						if _, err := s.s.evidence(ctx, make([]byte, 32), bus.Have{}); err == nil {
							rounds++
						}
						select {
						case <-ctx.Done():
						case <-time.After(beside.pause):
						}
					}
				})
			}
			var took []time.Duration
			for b.Loop() {
				began := time.Now()
				s.start(f)
				took = append(took, time.Since(began))
				s.stop(f)
			}
			end()
			wg.Wait()
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms/start")
			b.ReportMetric(float64(took[len(took)-1].Microseconds())/1000, "ms/slowest")
			b.ReportMetric(float64(rounds)/float64(b.N), "rounds/start")
		})
	}
}
