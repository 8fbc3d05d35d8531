package daemon

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/bus"
	"virt-trust/internal/domain"
	"virt-trust/internal/evidence/eventlog"
	"virt-trust/internal/evidence/quote"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/introspect"
	"virt-trust/internal/launcher/launchlog"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/ekcert"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
)

// site is an office whose every part has the same, real TPM: a machine that
// has booted, and measures what it runs.
type site struct {
	*office
	m   *machine
	ima string // the kernel's list
}

func openSite(t testing.TB) *site {
	t.Helper()
	o, m := bootedOffice(t, bootLog(t, "uki"))
	s := &site{office: o, m: m, ima: filepath.Join(m.dir, "ima")}
	o.g.cfg.Attestation.IMAList = s.ima
	s.restart()
	return s
}

// restart has virt-trustd begin anew, with an empty list under the real TPM's
// key at the first time.
func (s *site) restart() {
	s.t.Helper()
	if s.g.tpm != TPM(s.s.host) {
		for _, dir := range []string{s.g.dirs.State, s.g.dirs.Run} {
			if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o755)); err != nil {
				s.t.Fatal(err)
			}
		}
	}
	cfg := s.g.cfg
	s.g.Close()
	s.boot()
	s.g.cfg, s.g.tpm, s.g.changed = cfg, s.s.host, s.s.vmChanged
	s.s.g = s.g
	s.s.openList(background)
	if s.g.peek() == nil {
		s.t.Fatal(s.logged())
	}
}

// entry is one of a measurement list (template ima-ng), with what the kernel
// extends PCR 10 of the SHA-256 bank by.
func entry(path, content string) (line []byte, extend [32]byte) {
	field := func(b []byte) []byte { return append(binary.LittleEndian.AppendUint32(nil, uint32(len(b))), b...) }
	d := sha256.Sum256([]byte(content))
	data := slices.Concat(field(append([]byte("sha256:\x00"), d[:]...)), field([]byte(path+"\x00")))
	digest := sha1.Sum(data)
	line = binary.LittleEndian.AppendUint32(nil, 10)
	return slices.Concat(line, digest[:], field([]byte("ima-ng")), field(data)), sha256.Sum256(data)
}

// measures plays the kernel.
func (s *site) measures(paths ...string) {
	s.t.Helper()
	tpm := s.m.Open()
	f := testkit.Must[*os.File](s.t)(os.OpenFile(s.ima, os.O_CREATE, 0o600))
	f.Close()
	for _, p := range paths {
		line, d := entry(p, p)
		appendTo(s.t, s.ima, line)
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: 10, Auth: tpm2.PasswordAuth(nil)},
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: d[:]}}},
		}.Execute(tpm)
		if err != nil {
			s.t.Fatal(err)
		}
	}
}

// seer is a Reader of PCRs that are not there.
type seer struct {
	mu   sync.Mutex
	seen []introspect.Target
	err  error
	slow time.Duration
	now  atomic.Int32
	most atomic.Int32
}

func (r *seer) Read(ctx context.Context, t introspect.Target) (*report.Reading, error) {
	r.most.Store(max(r.most.Load(), r.now.Add(1)))
	defer r.now.Add(-1)
	select {
	case <-time.After(r.slow):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, t)
	if r.err != nil {
		return nil, r.err
	}
	d := sha256.Sum256([]byte(t.UUID))
	return &report.Reading{Reader: "test", Time: 7, Banks: []report.Bank{{Algorithm: "sha256", Values: report.Values{0: d[:]}}}}, nil
}

// notary is a vTPM's AK.
type notary struct {
	asked [][32]byte
	err   error
}

func (n *notary) Quote(_ context.Context, t introspect.Target, qualifying [32]byte, ak uint32) (*report.Quote, *report.Reading, error) {
	n.asked = append(n.asked, qualifying)
	if n.err != nil || ak != 0x8180ff01 {
		return nil, nil, n.err
	}
	return &report.Quote{Attest: []byte{1}, Signature: []byte{2}}, &report.Reading{Reader: "quoted"}, nil
}

// A vTPM that has an AK quotes, where that is turned on; where it does not, its
// PCRs are read all the same.
func TestEvidenceWithVTPMQuotes(t *testing.T) {
	s := openSite(t)
	f, _, _ := s.ran(uuidA)
	s.start(f)
	defer s.holder(uuidA)()
	n := &notary{}
	s.s.pcrs, s.s.quoter = &seer{}, n
	look := func(quotes bool, reader string, asked int) {
		t.Helper()
		e, r := s.take(bus.Have{})
		v := r.VMs[0]
		if (v.Quote != nil) != quotes || v.PCRs == nil || v.PCRs.Reader != reader || v.Problem != "" || len(n.asked) != asked {
			t.Errorf("the VM is %+v, asked %d", v, len(n.asked))
		}
		if quotes && (!bytes.Equal(v.Quote.AK, []byte("its AK")) || n.asked[asked-1] != report.VTPMQualifyingData(e.Nonce, v.UUID)) {
			t.Errorf("the quote is %+v for %x", v.Quote, n.asked)
		}
	}
	s.g.cfg.Attestation.VTPMAK = true
	look(false, "test", 0)
	r := s.g.peek().Get(uuidA).Clone()
	r.AKPublic = []byte("its AK")
	if err := s.g.peek().Commit(liststore.Change{Put: r}); err != nil {
		t.Fatal(err)
	}
	look(true, "quoted", 1)
	n.err = errors.New("not now")
	look(false, "test", 2)
	s.g.cfg.Attestation.VTPMAK = false
	look(false, "test", 2)
}

// take asks for evidence on the bus, and checks what a Verifier checks first:
// shape, quote, nonce, report, PCRs.
func (s *site) take(have bus.Have) (*report.Evidence, *report.Report) {
	s.t.Helper()
	nonce := make([]byte, report.NonceSize)
	rand.Read(nonce)
	c := s.client()
	b, err := c.Evidence(background, nonce, have, report.MaxEvidence)
	if err != nil {
		s.t.Fatal(err, s.logged())
	}
	return s.verified(b, nonce)
}

func (s *site) client() *bus.Client {
	s.t.Helper()
	s.t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", s.address)
	c := testkit.Must[*bus.Client](s.t)(bus.DialForDescriptors(background))
	s.t.Cleanup(func() { c.Close() })
	return c
}

func (s *site) verified(b, nonce []byte) (*report.Evidence, *report.Report) {
	s.t.Helper()
	e := testkit.Must[*report.Evidence](s.t)(report.UntrustedParse(b))
	r := testkit.Must[*report.Report](s.t)(report.UntrustedParseReport(e.Report))
	if !bytes.Equal(e.Nonce, nonce) || !bytes.Equal(r.AK, s.s.host.AKName()) {
		s.t.Fatal("another nonce, or another AK's")
	}
	q, err := quote.Verify(e.Quote.Attest, e.Quote.Signature, s.s.host.AKPublic(), report.QualifyingData(nonce, e.Report))
	if err != nil {
		s.t.Fatal(err)
	}
	if err := q.Covers("sha256", s.g.cfg.Attestation.PCRs); err != nil {
		s.t.Fatal(err)
	}
	if err := q.Check(e.PCRs.Value); err != nil || len(e.PCRs) != 1 {
		s.t.Fatal(err)
	}
	return e, r
}

func logOf(t *testing.T, e *report.Evidence, kind string) report.Log {
	t.Helper()
	i := slices.IndexFunc(e.Logs, func(l report.Log) bool { return l.Kind == kind })
	if i < 0 {
		t.Fatalf("there is no log %s", kind)
	}
	return e.Logs[i]
}

// replayIMA gives what PCR 10 is after each entry of a list.
func replayIMA(t *testing.T, b []byte) (pcr []byte) {
	t.Helper()
	pcr = make([]byte, 32)
	for len(b) > 0 {
		n := 4 + 20
		n += 4 + int(binary.LittleEndian.Uint32(b[n:]))
		size := int(binary.LittleEndian.Uint32(b[n:]))
		d := sha256.Sum256(b[n+4 : n+4+size])
		next := sha256.Sum256(append(pcr, d[:]...))
		pcr, b = next[:], b[n+4+size:]
	}
	return pcr
}

// Evidence of a host with VMs in all states, checked as a Verifier does: the
// quote is right, each log leads to its PCR, and the report says what is.
func TestEvidence(t *testing.T) {
	s := openSite(t)
	r := &seer{}
	s.s.pcrs = r
	s.measures("/usr/bin/one", "/usr/bin/two")
	running, _, _ := s.ran(uuidA)
	s.start(running)
	end := s.holder(uuidA)
	defer end()
	stopped, _, _ := s.ran(uuidB)
	s.stop(stopped)

	e, rep := s.take(bus.Have{})
	values := e.PCRs[0].Values
	boot := logOf(t, e, report.EventLog)
	l := testkit.Must[*eventlog.Log](t)(eventlog.UntrustedParse(boot.Data))
	for pcr, v := range testkit.Must[map[uint][]byte](t)(l.Replay("sha256")) {
		if pcr < 15 && pcr != 10 && !bytes.Equal(values[pcr], v) { // the others have logs of their own
			t.Errorf("the event log does not lead to PCR %d", pcr)
		}
	}
	if list := logOf(t, e, report.IMA); !bytes.Equal(replayIMA(t, list.Data), values[10]) || list.More || list.Problem != "" {
		t.Errorf("the measurement list does not lead to PCR 10: %+v", list)
	}
	launch := testkit.Must[*launchlog.Log](t)(launchlog.Parse(logOf(t, e, report.LaunchLog).Data))
	if !bytes.Equal(launch.Values["sha256"], values[15]) {
		t.Error("the launch log does not lead to PCR 15")
	}
	if rep.BootID != s.g.bootID || rep.Host.Mode != "enforce" || rep.Host.ListState != "readable" || rep.Host.LaunchPCR != 15 || rep.Host.LaunchLog != "replays" || rep.Host.Kernel == "" || rep.Host.Software != "1" || rep.Host.Name == "" {
		t.Errorf("the host is %+v of boot %s", rep.Host, rep.BootID)
	}
	if rep.Host.ListGeneration != s.g.peek().Generation() || rep.Host.ListCounter == 0 || rep.Host.ListCounter != s.g.peek().Counter() {
		t.Errorf("the list is %+v", rep.Host)
	}
	if len(rep.VMs) != 2 || len(rep.Deleted) != 0 {
		t.Fatalf("%d VMs, %d deleted", len(rep.VMs), len(rep.Deleted))
	}
	a, b := rep.VMs[0], rep.VMs[1]
	if a.Name != "vm-a" || a.State != string(list.Running) || !a.Running || a.PCRs == nil || a.Problem != "" || a.Generation != launch.Last.Generation && a.Generation == 0 {
		t.Errorf("the running VM is %+v", a)
	}
	if b.Name != "vm-b" || b.State != string(list.Stored) || b.Running || b.PCRs != nil || b.Problem != "" {
		t.Errorf("the stopped VM is %+v", b)
	}
	if len(r.seen) != 1 || r.seen[0].Swtpm == 0 || r.seen[0].UUID != uuidA || r.seen[0].StateDir != s.dir(uuidA) {
		t.Errorf("asked was %+v", r.seen)
	}

	// What is asked for from an offset on begins there; what has not grown is empty.
	s.measures("/usr/bin/three")
	have := bus.Have{Boot: rep.BootID, Offsets: map[string]uint64{}}
	whole := map[string][]byte{}
	for _, l := range e.Logs {
		have.Offsets[l.Kind], whole[l.Kind] = uint64(len(l.Data)), l.Data
	}
	e, _ = s.take(have)
	for _, l := range e.Logs {
		if l.From != have.Offsets[l.Kind] || (len(l.Data) > 0) != (l.Kind == report.IMA) {
			t.Errorf("log %s from %d, %d bytes", l.Kind, l.From, len(l.Data))
		}
		whole[l.Kind] = append(whole[l.Kind], l.Data...)
	}
	if !bytes.Equal(replayIMA(t, whole[report.IMA]), e.PCRs[0].Values[10]) {
		t.Error("the pieces of the list do not lead to PCR 10")
	}
	// Another boot's offsets, ones beyond the end, and ones in the middle of an entry
	// are no offsets.
	for what, h := range map[string]bus.Have{
		"another boot": {Boot: "x", Offsets: have.Offsets},
		"beyond":       {Boot: rep.BootID, Offsets: map[string]uint64{report.IMA: 1 << 40, report.EventLog: 1 << 63, report.LaunchLog: 1<<64 - 1}},
		"between":      {Boot: rep.BootID, Offsets: map[string]uint64{report.IMA: 5, report.EventLog: 5, report.LaunchLog: 5}},
	} {
		e, _ = s.take(h)
		for _, l := range e.Logs {
			if l.From != 0 || !bytes.HasPrefix(l.Data, whole[l.Kind]) {
				t.Errorf("%s: log %s from %d, %d bytes", what, l.Kind, l.From, len(l.Data))
			}
		}
	}
}

// A VM that went is among the deleted, also for the next virt-trustd.
func TestEvidenceOfDeletedVMs(t *testing.T) {
	s := openSite(t)
	f, _, _ := s.ran(uuidA)
	s.ran(uuidB)
	_, before := s.take(bus.Have{})
	if err := errors.Join(os.RemoveAll(filepath.Dir(s.dir(uuidA))), os.WriteFile(filepath.Join(s.root, "one"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	s.s.ended(background, uuidA, "the VM was undefined")
	testkit.Must[string](t)(s.g.Release(background, off(s.facts(uuidB)), s.facts(uuidB)))
	want := []string{f.UUID + " the VM was undefined", uuidB + " released to plain libvirt"}
	for _, when := range []string{"at once", "after a restart"} {
		_, r := s.take(bus.Have{})
		var got []string
		for _, d := range r.Deleted {
			got = append(got, fmt.Sprintf("%x-%x-%x-%x-%x %s", d.UUID[:4], d.UUID[4:6], d.UUID[6:8], d.UUID[8:10], d.UUID[10:], d.Why))
			if d.Time < before.Time {
				t.Errorf("deleted at %d, before %d", d.Time, before.Time)
			}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(when, d)
		}
		if len(r.VMs) != 1 || r.VMs[0].State != string(list.Released) {
			t.Errorf("%s: VMs %+v", when, r.VMs)
		}
		appendTo(t, s.g.gone.path, []byte(`{"uuid":"torn`))
		s.restart()
	}
	// A folder that cannot be written keeps no VM from being deleted, and nothing is
	// forgotten while virt-trustd runs.
	g := testkit.Must[*gone](t)(openGone(t.TempDir()))
	for i := range maxGone + 10 {
		if err := g.add(goneVM{UUID: uuidA, Time: int64(i)}); err != nil {
			t.Fatal(err)
		}
	}
	again := testkit.Must[*gone](t)(openGone(filepath.Dir(g.path)))
	if n := len(g.deleted()); n != report.MaxDeleted || g.deleted()[n-1].Time != maxGone+9 || !slices.Equal(again.deleted()[n-3:], g.deleted()[n-3:]) {
		t.Errorf("of %d there are %d", maxGone+10, n)
	}
	g.path = filepath.Join(g.path, "none", "x")
	if err := g.add(goneVM{UUID: uuidB}); err == nil || len(g.deleted()) != report.MaxDeleted {
		t.Error(err)
	}
}

// A VM that is being deleted is in the list or among the deleted, at each
// moment.
func TestEvidenceMissesNoVM(t *testing.T) {
	s := openSite(t)
	store := s.g.peek()
	id := testkit.Must[[16]byte](t)(binaryUUID(uuidA))
	in := list.Record{UUID: uuidA, Name: "a", Instance: s.dir(uuidA), State: list.Stored, KeyOwner: list.Ours}
	for range 60 {
		if err := store.Commit(liststore.Change{Put: &in}); err != nil {
			t.Fatal(err)
		}
		s.g.gone.mu.Lock()
		s.g.gone.all = nil
		s.g.gone.mu.Unlock()
		done := make(chan error)
		go func() { done <- s.g.delete(background, store, &in, "undefined") }()
		for deleting := true; deleting; {
			select {
			case err := <-done:
				deleting = false
				if err != nil {
					t.Fatal(err)
				}
			default:
			}
			r := testkit.Must[*report.Report](t)(s.s.report(background, make([]byte, 32)))
			listed := slices.ContainsFunc(r.VMs, func(v report.VM) bool { return v.UUID == id })
			told := slices.ContainsFunc(r.Deleted, func(d report.Deleted) bool { return d.UUID == id })
			if !listed && !told {
				t.Fatal("a VM is nowhere")
			}
		}
	}
}

// What is missing is said, and the rest is there.
func TestEvidenceWithProblems(t *testing.T) {
	s := openSite(t)
	f, _, _ := s.ran(uuidA)
	s.start(f)
	defer s.holder(uuidA)()
	problems := func(e *report.Evidence, r *report.Report) map[string]string {
		p := map[string]string{"vm": r.VMs[0].Problem}
		for _, l := range e.Logs {
			p[l.Kind] = l.Problem
		}
		return p
	}
	wants := func(what, key, text string) {
		t.Helper()
		for k, v := range problems(s.take(bus.Have{})) {
			if k == key != (v != "") && k != report.IMA || k == key && !strings.Contains(v, text) {
				t.Errorf("%s: %s: %q", what, k, v)
			}
		}
	}
	s.s.pcrs = &seer{}
	wants("no measurement list", report.IMA, "ima_policy")
	s.measures("/bin/sh")
	s.s.pcrs = &seer{err: introspect.ErrUnknownBuild}
	wants("a libtpms that is not known", "vm", "unknown build")
	s.s.pcrs = &seer{err: introspect.ErrGone} // but something holds the lock
	wants("a vTPM that is gone", "vm", "ended")
	s.s.pcrs = &seer{slow: time.Hour}
	wants("a reader that hangs", "vm", "deadline")
	s.s.pcrs = &seer{}
	if err := os.WriteFile(s.ima, bytes.Repeat([]byte{0xFF}, 500), 0o600); err != nil {
		t.Fatal(err)
	}
	wants("a measurement list that is none", report.IMA, "no measurement list")
	s.g.cfg.TPM.EventLog = filepath.Join(s.root, "none")
	wants("no event log", report.EventLog, "no such file")
	if err := os.WriteFile(s.g.cfg.TPM.EventLog, make([]byte, eventlog.MaxSize+1), 0o600); err != nil {
		t.Fatal(err)
	}
	wants("an event log without end", report.EventLog, "more than")
}

// The measurement list goes in pieces that end where an entry does.
func TestLongMeasurementList(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "ima")
	var all []byte
	for i := range 4000 { // of 5 KB
		line, _ := entry("/"+strings.Repeat("x", 4000)+fmt.Sprint(i), "")
		all = append(all, line...)
	}
	all = append(all, all...)
	if len(all) < maxIMAPiece+1<<20 {
		t.Fatal(len(all))
	}
	torn := all[: len(all)-7 : len(all)-7]
	for what, b := range map[string][]byte{"whole": all, "torn": torn} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		var got []byte
		for range 5 {
			l := imaPiece(path, uint64(len(got)))
			if l.From != uint64(len(got)) || l.Problem != "" || len(l.Data) > maxIMAPiece {
				t.Fatalf("%s: from %d, want %d; %d bytes, %s", what, l.From, len(got), len(l.Data), l.Problem)
			}
			if n, ok := wholeEntries(l.Data); !ok || n != len(l.Data) {
				t.Fatalf("%s: a piece of %d bytes has %d in whole entries", what, len(l.Data), n)
			}
			got = append(got, l.Data...)
			if !l.More || len(l.Data) == 0 {
				break
			}
		}
		if !bytes.HasPrefix(all, got) || len(all)-len(got) > 8192 || what == "whole" && len(got) != len(all) {
			t.Errorf("%s: of %d bytes %d came", what, len(b), len(got))
		}
	}
}

// Who may ask: root and the agent, and nobody else. The agent cannot ask for
// ever.
func TestAttestationCallers(t *testing.T) {
	testkit.Root(t) // who can be others
	s := openSite(t)
	const nobody, agent = 65534, 1 // the bus speaks to users that there are
	ask := func(uid uint32) error {
		err := s.s.admit(background, &caller{uid: uid}, "Evidence", agentOnly)
		return err
	}
	s.s.agent = func() (uint32, error) { return 0, errors.New("there is none") }
	if ask(agent) == nil || ask(0) != nil {
		t.Error("where there is no agent")
	}
	s.s.agent = func() (uint32, error) { return agent, nil }
	if ask(agent) != nil || ask(0) != nil || !errors.Is(ask(nobody), errDenied) || !errors.Is(ask(2), errDenied) {
		t.Error("where there is one")
	}
	for method, args := range map[string]int{"Identity": 0, "ActivateCredential": 2, "QuoteKey": 2, "Evidence": 1, "SetCertifierCertificate": 1} {
		got := s.as(nobody, "attest", "other", s.address, method, strings.Repeat("a", args))
		if !strings.HasPrefix(got, bus.ErrorAccessDenied) {
			t.Errorf("%s by nobody: %s", method, got)
		}
	}
	if got := s.as(agent, "attest", "other", s.address, "Identity", ""); strings.Contains(got, "Error") {
		t.Errorf("Identity by the agent: %s", got)
	}
	s.s.asked.n = agentPace
	s.s.asked.from = time.Now()
	if got := s.as(agent, "attest", "other", s.address, "Identity", ""); !strings.HasPrefix(got, bus.ErrorRefused+" [tpm-busy: ") {
		t.Errorf("Identity once more: %s", got)
	}
	if err := s.client().Attest(background, "Identity", []any{dict{}}, new(dict)); err != nil {
		t.Errorf("the admin has to wait for the agent: %v", err)
	}
}

// callAttest calls a method of the attestation with byte arrays.
func callAttest(address, method string, n int) {
	conn, err := dbus.Connect(address)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	args := []any{}
	for range n {
		args = append(args, []byte("0123456789abcdef"))
	}
	c := conn.Object(bus.Name, bus.HostPath).Call(bus.AttestationInterface+"."+method, 0, append(args, dict{})...)
	var e dbus.Error
	if errors.As(c.Err, &e) {
		fmt.Println(e.Name, e.Body)
	} else {
		fmt.Println(c.Err, len(c.Body))
	}
	os.Exit(0)
}

// The host proves what it is, and is told by the CA who it is.
func TestIdentityAndCertifier(t *testing.T) {
	s := openSite(t)
	c := s.client()
	var id dict
	if err := c.Attest(background, "Identity", []any{dict{}}, &id); err != nil {
		t.Fatal(err)
	}
	want := []string{"ak", "bind", "bind_attest", "bind_signature", "certifier", "certifier_attest", "certifier_signature", "ek", "host_name"}
	if got := slices.Sorted(maps.Keys(id)); !slices.Equal(got, want) {
		t.Fatalf("an identity has %q", got)
	}
	get := func(key string) []byte { b, _ := id[key].Value().([]byte); return b }
	objects := map[string]*quote.Object{}
	for _, key := range []string{"ek", "ak", "bind", "certifier"} {
		objects[key] = testkit.Must[*quote.Object](t)(quote.ParsePublic(get(key)))
	}
	ak, err := objects["ak"].AK()
	if err != nil || objects["ek"].EK() != nil {
		t.Fatal(err, objects["ek"].EK())
	}
	for _, key := range []string{"bind", "certifier"} {
		if err := quote.VerifyCertify(get(key+"_attest"), get(key+"_signature"), ak, objects[key].Name); err != nil {
			t.Error(key, err)
		}
	}
	// AK and EK are of one TPM.
	secret := bytes.Repeat([]byte{4}, 32)
	blob, seed, err := quote.MakeCredential(rand.Reader, objects["ek"], objects["ak"].Name, secret)
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	if err := c.Attest(background, "ActivateCredential", []any{blob, seed, dict{}}, &got); err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("%x, %v", got, err)
	}
	blob[5] ^= 1
	refuses0(t, c.Attest(background, "ActivateCredential", []any{blob, seed, dict{}}), reason.PolicyForbids)

	// The CA's certificate over the certifier.
	certifier := s.s.host.CertifierPublic()
	caKey := testkit.Must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, MaxPathLen: 1, SubjectKeyId: []byte{1}}
	ca.Subject.CommonName = "CA"
	issue := func(key *ecdsa.PublicKey) *x509.Certificate {
		tmpl := testkit.Must[*x509.Certificate](t)(ekcert.IssuerTemplate(certifier))
		tmpl.SerialNumber, tmpl.NotAfter = big.NewInt(2), time.Now().Add(time.Hour)
		return testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(testkit.Must[[]byte](t)(x509.CreateCertificate(rand.Reader, tmpl, ca, key, caKey))))
	}
	set := func(chain []byte) error {
		return c.Attest(background, "SetCertifierCertificate", []any{chain, dict{}})
	}
	root := testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(testkit.Must[[]byte](t)(x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey))))
	first := issue(certifier)
	if err := set(ekcert.EncodeChain([]*x509.Certificate{first, root})); err != nil {
		t.Fatal(err)
	}
	for what, chain := range map[string][]byte{
		"nothing": nil, "another key's": ekcert.EncodeChain([]*x509.Certificate{issue(&caKey.PublicKey), root}), "noise": []byte("noise"), "the CA's alone": ekcert.EncodeChain([]*x509.Certificate{root}),
		"too long": bytes.Repeat(ekcert.EncodeChain([]*x509.Certificate{first}), 100),
	} {
		if r := reason.As(set(chain)); r == nil || r.Code != reason.PolicyForbids {
			t.Errorf("%s: %v", what, r)
		}
	}
	if err := c.Attest(background, "Identity", []any{dict{}}, &id); err != nil || !bytes.Equal(get("certifier_certificate"), first.Raw) {
		t.Errorf("the certificate is %x, %v", get("certifier_certificate"), err)
	}
}

// A quote of a key and evidence never stand for one another: the data that is
// quoted differs whatever the agent chooses.
func TestQuoteKey(t *testing.T) {
	s := openSite(t)
	c := s.client()
	key := testkit.Must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	spki := testkit.Must[[]byte](t)(x509.MarshalPKIXPublicKey(&key.PublicKey))
	nonce := bytes.Repeat([]byte{8}, 32)
	var attest, signature []byte
	ask := func(nonce, spki []byte) error {
		return c.Attest(background, "QuoteKey", []any{nonce, spki, dict{}}, &attest, &signature)
	}
	if err := ask(nonce, spki); err != nil {
		t.Fatal(err)
	}
	d := sha256.Sum256(spki)
	q, err := quote.Verify(attest, signature, s.s.host.AKPublic(), sha256.Sum256(slices.Concat([]byte("virt-trust/node-key/v1\x00"), nonce, d[:])))
	if err != nil || q.Covers("sha256", s.g.cfg.Attestation.PCRs) != nil {
		t.Fatal(err)
	}
	_, r := s.take(bus.Have{})
	forged := testkit.Must[[]byte](t)(r.Encode())
	for what, a := range map[string][2][]byte{
		"a report as a key":      {nonce, forged},
		"a key and more":         {nonce, append(bytes.Clone(spki), 0)},
		"no key":                 {nonce, nil},
		"a long key":             {nonce, bytes.Repeat(spki, 20)},
		"a short nonce":          {nonce[:15], spki},
		"a long nonce":           {bytes.Repeat(nonce, 3), spki},
		"a nonce with the label": {[]byte(nodeKeyLabel + "0123456789abcdef"), spki},
	} {
		if ref := reason.As(ask(a[0], a[1])); ref == nil || ref.Code != reason.PolicyForbids {
			t.Errorf("%s: %v", what, ref)
		}
	}
	for _, n := range [][]byte{nil, nonce[:15], bytes.Repeat(nonce, 3), []byte(nodeKeyLabel + "0123456789abcdef")} {
		_, err := c.Evidence(background, n, bus.Have{}, report.MaxEvidence)
		refuses0(t, err, reason.PolicyForbids)
	}
	if bytes.HasPrefix(forged, []byte{0x30}) || forged[0] != 0xA7 || spki[0] != 0x30 {
		t.Errorf("a report begins with %#x, a key with %#x: see nodeKeyData", forged[0], spki[0])
	}
}

// Rounds come one after the other, read few VMs at once, and a start does not
// wait for them, however slow what they read is.
func TestEvidenceHoldsNothingUp(t *testing.T) {
	s := openSite(t)
	r := &seer{slow: 50 * time.Millisecond}
	s.s.pcrs = r
	var all []*domain.Facts
	for i := range 2 * readers {
		f := s.vm(fmt.Sprintf("cccccccc-0000-4000-8000-%012d", i), true)
		s.start(f)
		defer s.holder(f.UUID)()
		all = append(all, f)
	}
	f, _, _ := s.ran(uuidA)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if _, err := s.s.evidence(background, make([]byte, 32), bus.Have{}); err != nil {
				t.Error(err)
			}
		})
	}
	for r.now.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	began := time.Now()
	s.start(f)
	if r.now.Load() == 0 {
		t.Error("the start ended when the rounds had")
	}
	t.Logf("a start beside rounds: %v", time.Since(began))
	wg.Wait()
	if most := r.most.Load(); most > readers {
		t.Errorf("%d VMs were read at once", most)
	}
	if len(r.seen) < 2*len(all) {
		t.Errorf("%d readings", len(r.seen))
	}
	// Who waits for a round has no more patience than it says.
	s.s.collecting <- struct{}{}
	ctx, cancel := context.WithTimeout(background, 10*time.Millisecond)
	defer cancel()
	_, err := s.s.evidence(ctx, make([]byte, 32), bus.Have{})
	refuses(t, err, reason.TPMBusy)
	<-s.s.collecting
	// A host without keys, or without a TPM, has no evidence.
	s.m.Stop()
	if _, err := s.s.evidence(background, make([]byte, 32), bus.Have{}); !errors.Is(err, hosttpm.ErrAbsent) {
		t.Errorf("without a TPM: %v", err)
	}
}
