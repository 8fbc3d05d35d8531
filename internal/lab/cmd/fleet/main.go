// Command fleet runs the Verifier under a simulated fleet, for `make
// bench-verifier`: a real virt-trust-verifier with a real database on the
// loopback, and nodes with TPMs in software, each on a TLS connection of its own.
// What the fleet itself costs is in the same two processors' time.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"bytes"

	"virt-trust/internal/appraise"
	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/cakey"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/nodeapi"
	"virt-trust/internal/verifier/store"
)

func main() {
	s := &simulation{}
	flag.IntVar(&s.nodes, "nodes", 10000, "nodes")
	flag.IntVar(&s.vms, "vms", 20, "running VMs of each")
	flag.IntVar(&s.files, "files", 1000, "entries of each host's measurement list")
	flag.DurationVar(&s.period, "period", time.Minute, "time between two rounds of a node")
	flag.DurationVar(&s.ramp, "ramp", 5*time.Minute, "over how long the nodes come, each at first with all of its logs")
	flag.DurationVar(&s.time, "for", 3*time.Minute, "how long, after every node's first round")
	flag.StringVar(&s.program, "verifier", "bin/virt-trust-verifier", "the program")
	flag.StringVar(&s.database, "database", "", "postgres://…; SQLite in a temporary folder if empty")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := s.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

// simulation is one run.
type simulation struct {
	nodes, vms, files int
	period, time      time.Duration
	ramp              time.Duration
	program, database string

	dir, address string
	authority    *ca.Authority
	all          []*node

	missed, bad atomic.Int64
	failed      atomic.Int64 // rounds, also before it counts
	mu          sync.Mutex
	took        []time.Duration // of each round since all had their first
	counting    atomic.Bool
}

// node is one simulated host.
type node struct {
	id     string
	host   *forge.Host
	cert   tls.Certificate
	client *http.Client
	next   nodeapi.Round
}

func (s *simulation) run(ctx context.Context) (err error) {
	if s.dir, err = os.MkdirTemp("", "virt-trust-fleet-"); err != nil {
		return err
	}
	defer os.RemoveAll(s.dir)
	began := time.Now()
	if err := s.prepare(ctx); err != nil {
		return err
	}
	fmt.Printf("%d nodes with %d VMs each were made in %.0f s\n", s.nodes, s.vms, time.Since(began).Seconds())

	verifier := exec.Command(s.program, "--config", s.path("verifier.toml"))
	verifier.Stdout, verifier.Stderr = os.Stderr, os.Stderr
	verifier.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := verifier.Start(); err != nil {
		return err
	}
	defer func() {
		verifier.Process.Signal(syscall.SIGTERM)
		verifier.Wait()
	}()
	if err := s.wait(ctx); err != nil {
		return err
	}
	pid := verifier.Process.Pid
	idle := resident(pid)

	var first, done sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for i, n := range s.all {
		first.Add(1)
		done.Go(func() {
			once := sync.OnceFunc(first.Done)
			defer once()
			if !sleep(ctx, time.Duration(i)*s.ramp/time.Duration(s.nodes)) {
				return
			}
			s.live(ctx, n, once)
		})
	}
	first.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	fmt.Printf("every node had its first round, with all of its logs, after %.0f s; %d had to be tried again\n", time.Since(began).Seconds(), s.failed.Load())
	s.counting.Store(true)
	cpu, at := processor(pid), time.Now()
	sleep(ctx, s.time)
	s.counting.Store(false)
	cpu, elapsed := processor(pid)-cpu, time.Since(at)
	memory := resident(pid)
	cancel()
	done.Wait()

	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.took) == 0 {
		return errors.New("no round was counted")
	}
	slices.Sort(s.took)
	quantile := func(q float64) time.Duration { return s.took[min(len(s.took)-1, int(q*float64(len(s.took))))] }
	fmt.Printf("rounds: %d in %.0f s, %.0f a second; missed %d, not affirming %d\n", len(s.took), elapsed.Seconds(), float64(len(s.took))/elapsed.Seconds(), s.missed.Load(), s.bad.Load())
	fmt.Printf("latency of evidence, from its first byte to the result: median %.1f ms, p99 %.1f ms, most %.1f ms\n", ms(quantile(0.5)), ms(quantile(0.99)), ms(s.took[len(s.took)-1]))
	fmt.Printf("the Verifier used %.2f processors: %.0f rounds a second and processor\n", cpu.Seconds()/elapsed.Seconds(), float64(len(s.took))/cpu.Seconds())
	fmt.Printf("resident: %d MiB at first, %d MiB with %d nodes connected: %.0f MiB for 10,000\n", idle>>20, memory>>20, s.nodes, float64(memory-idle)/float64(s.nodes)*10000/(1<<20))
	if s.missed.Load() > 0 || s.bad.Load() > 0 {
		return errors.New("rounds were missed, or not affirming")
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func (s *simulation) path(name string) string { return filepath.Join(s.dir, name) }

// prepare makes the Verifier's files, and nodes that are enrolled already: what
// enrolment costs is not what this is about.
func (s *simulation) prepare(ctx context.Context) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s.address = l.Addr().String()
	l.Close()
	if s.database == "" {
		s.database = "sqlite:" + s.path("verifier.db")
	}
	config := fmt.Sprintf("listen = [%q]\nnames = [\"localhost\"]\ndatabase = %q\n[ca]\ncertificate = %q\nkey = %q\n[rounds]\ninterval = %q\nlifetime = %q\n[results]\nkeys = %q\n[policy]\nreference_values = \"strict\"\n[enrolment]\nmanufacturer_roots = %q\n",
		s.address, s.database, s.path("ca.pem"), s.path("ca-key.pem"), s.period, s.period*5/2, s.path("result-keys.pem"), s.path("roots"))
	if err := os.Mkdir(s.path("roots"), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(s.path("verifier.toml"), []byte(config), 0o600); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, s.program, "--config", s.path("verifier.toml"), "init").CombinedOutput(); err != nil {
		return fmt.Errorf("virt-trust-verifier init: %w: %s", err, out)
	}
	if s.authority, err = cakey.Open(s.path("ca.pem"), s.path("ca-key.pem")); err != nil {
		return err
	}
	db, err := store.Open(ctx, s.database, store.Options{})
	if err != nil {
		return err
	}
	defer db.Close()
	s.all = make([]*node, s.nodes)
	errs := make([]error, s.nodes)
	var wg sync.WaitGroup
	places := make(chan struct{}, 4)
	for i := range s.nodes {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			s.all[i], errs[i] = s.node(i)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	const batch = 500
	for from := 0; from < s.nodes; from += batch {
		some := s.all[from:min(from+batch, s.nodes)]
		err := db.Do(ctx, func(tx *store.Tx) error {
			for _, n := range some {
				if err := tx.PutNode(ctx, n.record()); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return db.Do(ctx, func(tx *store.Tx) error {
		_, err := tx.AddValues(ctx, s.values())
		return err
	})
}

// settled is how long a host's VMs have been up: what they have booted counts then.
const settled = 5 * time.Minute

var launchers = [][3]string{{"emulator", "/usr/bin/qemu-system-x86_64", "qemu"}, {"swtpm", "/usr/bin/swtpm", "swtpm"}, {"firmware", "/usr/share/OVMF/OVMF_CODE.fd", "ovmf"}}

func (s *simulation) node(i int) (*node, error) {
	h := forge.NewHost("sha256", nil, time.Now().Add(-settled))
	h.MeasureMany(s.files)
	numbers := h.Launchers(launchers...)
	for v := range s.vms {
		h.Start(h.AddVM(fmt.Sprintf("vm-%d-%d", i, v)), nil, numbers...)
	}
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	n := &node{id: fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:]), host: h}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	ek := sha256.Sum256(b[:])
	cert, err := s.authority.Node(ca.Identity{Node: n.id, Name: n.name(), EK: ek[:], AK: h.TPM.AKName(), Bind: h.TPM.AKName()}, spki, time.Now())
	if err != nil {
		return nil, err
	}
	n.cert = tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
	n.client = &http.Client{Timeout: s.period, Transport: &http.Transport{
		MaxIdleConnsPerHost: 1, IdleConnTimeout: time.Hour,
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: s.authority.Pool(), ServerName: "localhost", Certificates: []tls.Certificate{n.cert}},
	}}
	return n, nil
}

func (n *node) name() string { return "node-" + n.id }

func (n *node) record() fleet.Node {
	now := time.Now()
	id, _ := ca.UntrustedIdentity(n.cert.Leaf)
	return fleet.Node{
		ID: n.id, Name: n.name(), State: fleet.Active, EKDigest: hex.EncodeToString(id.EK), EKTrust: "admin: simulated",
		AKName: n.host.TPM.AKName(), AK: n.host.TPM.AK(), BindName: n.host.TPM.AKName(), Bind: n.host.TPM.AK(), Certifier: n.host.TPM.AK(),
		Serial: ca.Serial(n.cert.Leaf), Enrolled: now, Seen: now, Learns: true,
	}
}

// values are Reference Values for all: the nodes are alike.
func (s *simulation) values() []fleet.Value {
	n := s.all[0]
	n.host.Tick(time.Since(n.host.Now))
	nonce := make([]byte, report.NonceSize)
	rand.Read(nonce)
	in := appraise.Input{
		Node: appraise.Node{ID: n.id, AK: &n.host.TPM.Key.PublicKey, AKName: n.host.TPM.AKName()}, Nonce: nonce,
		Evidence: n.host.Evidence(nonce, forge.Options{}), Policy: appraise.DefaultPolicy(), Learn: true, Now: time.Now(),
	}
	var all []fleet.Value
	known := map[string]bool{}
	for _, v := range appraise.Learn(in) {
		v.Subject, v.State, v.By, v.Second, v.Time = "", fleet.Approved, "fleet", "", time.Now()
		if k := fmt.Sprint(v.Kind, v.Path, v.Digest); !known[k] {
			known[k] = true
			all = append(all, v)
		}
	}
	return all
}

// wait waits until the Verifier answers.
func (s *simulation) wait(ctx context.Context) error {
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.authority.Pool(), ServerName: "localhost"}}}
	defer c.CloseIdleConnections()
	for began := time.Now(); time.Since(began) < time.Minute; {
		r, err := c.Get("https://" + s.address + "/healthz")
		if err == nil {
			r.Body.Close()
			if r.StatusCode == http.StatusOK {
				return nil
			}
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return ctx.Err()
		}
	}
	return errors.New("the Verifier does not answer")
}

// live is a node's life: rounds, as the Verifier asks for them.
func (s *simulation) live(ctx context.Context, n *node, first func()) {
	defer n.client.CloseIdleConnections()
	due := time.Now()
	for ctx.Err() == nil {
		took, err := s.round(ctx, n)
		if ctx.Err() != nil {
			return
		}
		if s.counting.Load() {
			// A round that ends after the next was due is missed.
			if err != nil || time.Since(due) > s.period {
				s.missed.Add(1)
			}
			s.mu.Lock()
			s.took = append(s.took, took)
			s.mu.Unlock()
		}
		if err != nil {
			if s.failed.Add(1) <= 10 { // one says as much as a thousand
				fmt.Fprintln(os.Stderr, n.name(), err)
			}
			n.next = nodeapi.Round{}
			due = time.Now().Add(s.period/2 + mathrand.N(s.period/2)) // as agents do, not all at one moment
		} else {
			first()
			due = due.Add(time.Duration(n.next.Interval * float64(time.Second)))
		}
		if !sleep(ctx, time.Until(due)) {
			return
		}
	}
}

// round gives how long the Verifier took for the evidence.
func (s *simulation) round(ctx context.Context, n *node) (took time.Duration, err error) {
	if n.next.Nonce == nil {
		if err := s.post(ctx, n, "rounds", "application/json", []byte("{}"), &n.next); err != nil {
			return 0, err
		}
	}
	n.host.Tick(time.Since(n.host.Now))
	evidence := n.host.Evidence(n.next.Nonce, forge.Options{HaveBoot: n.next.HaveBoot, Have: n.next.Have})
	var o nodeapi.Outcome
	began := time.Now()
	err = s.post(ctx, n, "evidence", report.MediaType, evidence, &o)
	took = time.Since(began)
	switch {
	case err != nil:
	case o.Tier != appraise.Affirming:
		s.bad.Add(1)
		err = fmt.Errorf("%s: %v", o.Tier, o.Codes)
	case o.Next == nil:
		err = errors.New("no nonce for the next round")
	default:
		n.next = *o.Next
	}
	return took, err
}

func (s *simulation) post(ctx context.Context, n *node, what, kind string, body []byte, answer any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+s.address+"/v1/nodes/"+n.id+"/"+what, bytes.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", kind)
	a, err := n.client.Do(r)
	if err != nil {
		return err
	}
	defer a.Body.Close()
	b, err := io.ReadAll(io.LimitReader(a.Body, 1<<20))
	if err != nil {
		return err
	}
	if a.StatusCode/100 != 2 {
		return fmt.Errorf("%s: %s", a.Status, b)
	}
	return json.Unmarshal(b, answer)
}

// sleep reports whether the time went by.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// processor is the time that a process has used of processors (proc(5)).
func processor(pid int) time.Duration {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ
}

// resident is the memory of a process that is in use, in bytes.
func resident(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "VmRSS:" {
			kb, _ := strconv.Atoi(f[1])
			return kb << 10
		}
	}
	return 0
}
