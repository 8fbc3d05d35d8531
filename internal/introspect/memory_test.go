package introspect

import (
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"virt-trust/internal/evidence/report"
	"virt-trust/internal/introspect/layout"
	"virt-trust/internal/testkit"
)

const every = 1<<layout.PCRs - 1

func TestEqual(t *testing.T) {
	c := config(t)
	m := memory(t, c)
	v := start(t, c, t.TempDir())
	equal(t, m, v)
	active, err := allocation(v.tpm)
	if err != nil {
		t.Fatal(err)
	}
	for pcr := range 17 {
		if err := extendAll(v.tpm, pcr, active); err != nil {
			t.Fatal(err)
		}
		equal(t, m, v)
	}
}

// Banks that are not active are not reported, nor are PCRs that are not; what
// is set for the next start is not active yet.
func TestBanks(t *testing.T) {
	c := config(t)
	m := memory(t, c)
	dir := t.TempDir()
	v := start(t, c, dir)
	before := []layout.BankSelection{{Hash: 4, Select: every}, {Hash: 0xb, Select: every}, {Hash: 0xc, Select: every}, {Hash: 0xd, Select: every}}
	for _, next := range []layout.Selection{
		{{Hash: 4}, {Hash: 0xb, Select: every}, {Hash: 0xc}, {Hash: 0xd}},
		{{Hash: 4, Select: every}, {Hash: 0xb}, {Hash: 0xc}, {Hash: 0xd, Select: every}},
		{{Hash: 4}, {Hash: 0xb}, {Hash: 0xc, Select: every}, {Hash: 0xd}},
		{{Hash: 4, Select: 0x800081}, {Hash: 0xb, Select: every}, {Hash: 0xc}, {Hash: 0xd}},
		before,
	} {
		if err := allocate(v.tpm, next); err != nil {
			t.Fatal(err)
		}
		banksAre(t, m, v, before)
		v.end()
		v = start(t, c, dir)
		banksAre(t, m, v, next)
		if next[0].Select != 0x800081 { // which is not to be had whole
			equal(t, m, v)
		}
		before = next
	}
}

func banksAre(t *testing.T, m *Memory, v *vtpm, want layout.Selection) {
	t.Helper()
	r, err := m.Read(t.Context(), v.Target)
	if err != nil {
		t.Fatal(err)
	}
	var text []string
	for _, b := range want {
		name := map[uint16]string{4: "sha1", 0xb: "sha256", 0xc: "sha384", 0xd: "sha512"}[b.Hash]
		if b.Select != 0 {
			text = append(text, fmt.Sprintf("%s %06x", name, b.Select))
		}
	}
	var got []string
	for _, b := range r.Banks {
		sel := 0
		for i := range b.Values.All() {
			sel |= 1 << i
		}
		got = append(got, fmt.Sprintf("%s %06x", b.Algorithm, sel))
	}
	if !slices.Equal(got, text) {
		t.Errorf("read %q, active are %q", got, text)
	}
}

var hashes = map[uint16]func() hash.Hash{4: sha1.New, 0xb: sha256.New, 0xc: sha512.New384, 0xd: sha512.New}

func state(banks []report.Bank) string {
	h := sha256.New()
	for _, b := range banks {
		fmt.Fprintf(h, "%s\n", b.Algorithm)
		for i, v := range b.Values.All() {
			fmt.Fprintf(h, "%d %x\n", i, v)
		}
	}
	return string(h.Sum(nil))
}

// Under load, every reading is all PCRs of all banks as they were after some
// command, and none is older than the one before.
func TestUnderLoad(t *testing.T) {
	c := config(t)
	m := memory(t, c)
	v := start(t, c, t.TempDir())
	first, err := m.Read(t.Context(), v.Target)
	if err != nil {
		t.Fatal(err)
	}
	const readings = 1000
	digest := func(n int, h hash.Hash) []byte {
		fmt.Fprintf(h, "extend %d", n)
		return h.Sum(nil)
	}
	pcrOf := func(n int) int { return []int{0, 7, 10, 16, 23}[n%5] }
	var done atomic.Bool
	var extends int
	loaded := make(chan error, 1)
	go func() {
		for ; !done.Load(); extends++ {
			var d tpm2.TPMLDigestValues
			for _, alg := range []uint16{4, 0xb, 0xc, 0xd} {
				d.Digests = append(d.Digests, tpm2.TPMTHA{HashAlg: tpm2.TPMAlgID(alg), Digest: digest(extends, hashes[alg]())})
			}
			_, err := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcrOf(extends)), Auth: tpm2.PasswordAuth(nil)}, Digests: d}.Execute(v.tpm)
			if err != nil {
				loaded <- err
				return
			}
		}
		loaded <- nil
	}()
	var states []string
	begin := time.Now()
	for range readings {
		r, err := m.Read(t.Context(), v.Target)
		if err != nil {
			t.Fatal(err)
		}
		states = append(states, state(r.Banks))
	}
	took := time.Since(begin)
	done.Store(true)
	if err := <-loaded; err != nil {
		t.Fatal(err)
	}
	at := map[string]int{state(first.Banks): 0}
	for n := range extends {
		for i, alg := range []uint16{4, 0xb, 0xc, 0xd} {
			h := hashes[alg]()
			h.Write(first.Banks[i].Values[uint(pcrOf(n))])
			h.Write(digest(n, hashes[alg]()))
			first.Banks[i].Values[uint(pcrOf(n))] = h.Sum(nil)
		}
		at[state(first.Banks)] = n + 1
	}
	last, seen := 0, map[int]bool{}
	for i, s := range states {
		n, ok := at[s]
		if !ok || n < last {
			t.Fatalf("reading %d: after command %d, known %v; the one before was after %d", i, n, ok, last)
		}
		last, seen[n] = n, true
	}
	if len(seen) < min(extends, readings)/50 || extends < 100 {
		t.Errorf("only %d states seen: there was no load", len(seen))
	}
	t.Logf("%d readings in %v, while %d commands extended PCRs; %d states seen", readings, took, extends, len(seen))
	equal(t, m, v)
}

// A vTPM that works on one command for long is read meanwhile.
func TestWhileBusy(t *testing.T) {
	c := config(t)
	m := memory(t, c)
	v := start(t, c, t.TempDir())
	equal(t, m, v)
	want, err := m.Read(t.Context(), v.Target)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	begin := time.Now()
	go func() { // RSA keys: some 100 ms each
		var err error
		for i := 0; i < 8 && err == nil; i++ {
			var k *tpm2.CreatePrimaryResponse
			k, err = tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHNull, InPublic: tpm2.New2B(tpm2.RSASRKTemplate), OutsideInfo: tpm2.TPM2BData{Buffer: []byte{byte(i)}},
				InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{}}}.Execute(v.tpm)
			if err == nil {
				_, err = tpm2.FlushContext{FlushHandle: k.ObjectHandle}.Execute(v.tpm)
			}
		}
		done <- err
	}()
	n := 0
	for err = nil; ; {
		r, e := m.Read(t.Context(), v.Target)
		if e != nil || state(r.Banks) != state(want.Banks) {
			t.Fatalf("reading %d: %v", n, e)
		}
		n++
		select {
		case err = <-done:
		default:
			continue
		}
		break
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d readings in %v of RSA keys", n, time.Since(begin))
}

// What a guest puts into its vTPM does not move the reader: neither PCRs that it
// made up, nor banks.
func TestHostileMemory(t *testing.T) {
	c := config(t)
	m := memory(t, c)
	v := start(t, c, t.TempDir())
	equal(t, m, v)
	var l *layout.Layout
	for _, l = range m.lessons.all {
	}
	p := m.known[v.StateDir]
	spans := l.Spans()
	for i := range spans {
		spans[i].Start, spans[i].End = spans[i].Start+p.lib.Base, spans[i].End+p.lib.Base
	}
	parts, err := p.parts(spans)
	if err != nil {
		t.Fatal(err)
	}
	real, active := parts[0], parts[1]
	for i := range real { // as a boot that the guest would like to show
		if real[i] == 0 {
			real[i] = 0x5a
		}
	}
	for i, data := range [][]byte{real[:1968], real[1968:], active} {
		index := tpm2.TPMHandle(0x01500000 + i)
		auth := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
		_, err := tpm2.NVDefineSpace{AuthHandle: auth, PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{NVIndex: index, NameAlg: tpm2.TPMAlgSHA256,
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, NoDA: true}, DataSize: uint16(len(data))})}.Execute(v.tpm)
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; at < len(data); at += 512 {
			pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(v.tpm)
			if err != nil {
				t.Fatal(err)
			}
			_, err = tpm2.NVWrite{AuthHandle: auth, NVIndex: tpm2.NamedHandle{Handle: index, Name: pub.NVName},
				Data: tpm2.TPM2BMaxNVBuffer{Buffer: data[at:min(at+512, len(data))]}, Offset: uint16(at)}.Execute(v.tpm)
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	all, err := p.data()
	if err != nil || !bytes.Contains(all, real[:1968]) {
		t.Fatalf("the decoy is not in memory: %v", err)
	}
	equal(t, m, v)
	fresh := memory(t, c)
	equal(t, fresh, v)
}

func TestOtherProcess(t *testing.T) {
	c := config(t)
	m := memory(t, c)
	a, b := start(t, c, t.TempDir()), start(t, c, t.TempDir())
	equal(t, m, a)
	mixed := a.Target
	mixed.Swtpm = b.Swtpm
	refused(t, m, mixed, ErrOther)
	mixed.Swtpm, mixed.StateDir = a.Swtpm, b.StateDir
	refused(t, m, mixed, ErrOther)
	mixed.Swtpm, mixed.StateDir = a.Swtpm, t.TempDir()
	refused(t, m, mixed, ErrGone)
	mixed.StateDir = "relative"
	refused(t, m, mixed, ErrOther)
	found := a.Target
	found.Swtpm = 0
	if _, err := m.Read(t.Context(), found); err != nil {
		t.Error(err)
	}

	// A process that holds the lock and is no swtpm.
	dir := t.TempDir()
	impostor := exec.Command("/proc/self/exe", "-test.run=^TestHoldLock$")
	impostor.Env = append(os.Environ(), "HOLD_LOCK="+filepath.Join(dir, ".lock"))
	impostor.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := impostor.Start(); err != nil {
		t.Fatal(err)
	}
	defer impostor.Wait()
	defer impostor.Process.Kill()
	target := Target{Swtpm: impostor.Process.Pid, StateDir: dir}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if pid, _ := target.Holder(); pid != 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the lock is not held")
		}
	}
	refused(t, m, target, ErrOther)
}

// TestHoldLock is a process that holds a lock (TestOtherProcess).
func TestHoldLock(t *testing.T) {
	name := os.Getenv("HOLD_LOCK")
	if name == "" {
		return
	}
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Minute)
}

func refused(t *testing.T, m *Memory, target Target, want error) {
	t.Helper()
	r, err := m.Read(t.Context(), target)
	if r != nil || !errors.Is(err, want) {
		t.Errorf("%+v: %v, want %v", target, err, want)
	}
}

func TestEndedAndStartedAgain(t *testing.T) {
	c := config(t)
	m := memory(t, c)
	dir := t.TempDir()
	v := start(t, c, dir)
	equal(t, m, v)
	v.end()
	refused(t, m, v.Target, ErrGone)
	again := start(t, c, dir)
	equal(t, m, again)
	if len(m.known) != 1 {
		t.Errorf("%d processes are held", len(m.known))
	}
	if err := m.Close(); err != nil || len(m.known) != 0 {
		t.Error(err)
	}
	equal(t, m, again)
}

// A process number that is used again is another process: nothing that was known
// of the first is believed of the second.
func TestSameNumber(t *testing.T) {
	const lastPID = "/proc/sys/kernel/ns_last_pid"
	c := config(t)
	m := memory(t, c)
	dir := t.TempDir()
	v := start(t, c, dir)
	if err := extendAll(v.tpm, 3, layout.Selection{{Hash: 0xb, Select: every}}); err != nil {
		t.Fatal(err)
	}
	equal(t, m, v)
	first, known := v.Swtpm, m.known[dir]
	v.end()
	for try := 0; v.Swtpm != first || try == 0; try++ {
		if try > 0 {
			v.end()
		}
		if try == 200 {
			t.Fatal("the number was not to be had again")
		}
		if err := os.WriteFile(lastPID, []byte(strconv.Itoa(first-1)), 0); err != nil {
			testkit.Missing(t, "%v", err)
		}
		v = start(t, c, dir)
	}
	equal(t, m, v)
	if m.known[dir] == known {
		t.Error("it is taken for the first")
	}
	if _, err := known.now(); err == nil {
		t.Error("what was opened of the first is of the second")
	}
}

func TestStopped(t *testing.T) {
	c := config(t)
	m := memory(t, c)
	v := start(t, c, t.TempDir())
	equal(t, m, v)
	v.cmd.Process.Signal(syscall.SIGSTOP)
	refused(t, m, v.Target, ErrStopped)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := m.Read(ctx, v.Target); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the caller's deadline: %v", err)
	}
	v.cmd.Process.Signal(syscall.SIGCONT)
	equal(t, m, v)
}

// What lies in memory before TPM2_Startup is of the VM's last boot, or nothing.
func TestNotStarted(t *testing.T) {
	c := config(t)
	m := memory(t, c)
	dir := t.TempDir()
	for range 2 { // the second time with state
		v := start(t, c, dir, "--flags", "not-need-init")
		ctrl, err := net.Dial("unix", v.ctrl)
		if err != nil {
			t.Fatal(err)
		}
		s := session{tpm: v.tpm, ctrl: ctrl}
		for range 3 {
			refused(t, m, v.Target, ErrNotStarted)
			if err := s.startup(); err != nil {
				t.Fatal(err)
			}
			equal(t, m, v)
			if err := extendAll(v.tpm, 4, layout.Selection{{Hash: 0xb, Select: every}}); err != nil {
				t.Fatal(err)
			}
			equal(t, m, v)
			if _, err := (tpm2.Shutdown{ShutdownType: tpm2.TPMSUState}).Execute(v.tpm); err != nil {
				t.Fatal(err)
			}
			equal(t, m, v)
			if err := s.reset(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := (tpm2.Startup{StartupType: tpm2.TPMSUState}).Execute(v.tpm); err != nil {
			t.Fatal(err)
		}
		equal(t, m, v)
		ctrl.Close()
		v.end()
	}
}

// What was learned is kept for whoever comes next, and is not believed blindly.
func TestLessons(t *testing.T) {
	c := config(t)
	v := start(t, c, t.TempDir())
	equal(t, memory(t, c), v)
	file := filepath.Join(c.Dir, "libtpms-layouts.json")
	kept, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	second := memory(t, c)
	equal(t, second, v)
	if !second.learned.IsZero() {
		t.Error("it was learned again")
	}
	for name, damaged := range map[string]string{"empty": "", "cut": string(kept[:len(kept)-9]), "impossible": strings.Replace(string(kept), `"stride":`, `"stride":1`, 1), "null": `{"00":null}`} {
		if err := os.WriteFile(file, []byte(damaged), 0o600); err != nil {
			t.Fatal(err)
		}
		m := memory(t, c)
		equal(t, m, v)
		if m.learned.IsZero() {
			t.Errorf("%s: it was not learned again", name)
		}
	}

	// A layout that is not this build's gives an error, and no values.
	var all map[string]*layout.Layout
	if err := json.Unmarshal(kept, &all); err != nil {
		t.Fatal(err)
	}
	for _, spoil := range map[string]func(l *layout.Layout){
		"another place": func(l *layout.Layout) { l.Allocation += 2 },
		"no hash":       func(l *layout.Layout) { l.Hashes = l.Hashes[:3]; l.Banks = l.Banks[:3] },
		"not in memory": func(l *layout.Layout) { l.Allocation += 32 << 20 },
	} {
		m := memory(t, c)
		m.lessons.load()
		for _, l := range m.lessons.all {
			spoil(l)
		}
		refused(t, m, v.Target, ErrUnknownBuild)
	}
}

// A VM that runs with another build than the installed one is not read as if it
// had that.
func TestAnotherBuild(t *testing.T) {
	c := config(t)
	m := memory(t, c)
	plain := start(t, c, t.TempDir())
	equal(t, m, plain)
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", plain.Swtpm))
	if err != nil {
		t.Fatal(err)
	}
	var path string
	var end int64
	for line := range strings.Lines(string(maps)) {
		if f := strings.Fields(line); len(f) == 6 && strings.Contains(f[5], "/libtpms.so") && f[1] == "r-xp" {
			path = f[5]
			off, _ := strconv.ParseInt(f[2], 16, 64)
			from, to, _ := strings.Cut(f[0], "-")
			a, _ := strconv.ParseInt(from, 16, 64)
			b, _ := strconv.ParseInt(to, 16, 64)
			end = off + b - a
		}
	}
	lib, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lib[end-1] ^= 1 // behind the last function, up to the end of its page
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "libtpms.so.0"), lib, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("LD_LIBRARY_PATH", dir)
	other := start(t, c, t.TempDir())
	refused(t, m, other.Target, ErrUnknownBuild)
	learned := m.learned
	refused(t, m, other.Target, ErrUnknownBuild)
	if m.learned != learned {
		t.Error("each reading learns again")
	}
	equal(t, m, plain)
}

func TestParseStatus(t *testing.T) {
	const status = "Name:\ta\\nState:\tR\nUmask:\t0022\nState:\tS (sleeping)\nThreads:\t1\nvoluntary_ctxt_switches:\t34\nnonvoluntary_ctxt_switches:\t5\n"
	m, err := parseStatus([]byte(status))
	if want := (moment{'S', 1, 34}); err != nil || m != want {
		t.Errorf("%+v, %v", m, err)
	}
	for _, bad := range []string{"", "Name:\tx\nThreads:\t1\n", "\nState:\tS\nThreads:\tx\nvoluntary_ctxt_switches:\t1\n"} {
		if _, err := parseStatus([]byte(bad)); err == nil {
			t.Errorf("%q passes", bad)
		}
	}
	cpu, err := parseCPU([]byte("12 (a) b) S 1 1 1 0 -1 4194560 100 0 0 0 7 5 0 0 20 0 1 0 12345"))
	if err != nil || cpu != 12 {
		t.Errorf("%d, %v", cpu, err)
	}
	if _, err := parseCPU([]byte("12 (a) S 1")); err == nil {
		t.Error("a short line passes")
	}
}

func FuzzProc(f *testing.F) {
	f.Add([]byte("Name:\tswtpm\nState:\tS (sleeping)\nThreads:\t1\nvoluntary_ctxt_switches:\t34\n"))
	f.Add([]byte("12 (a) b) S 1 1 1 0 -1 4194560 100 0 0 0 7 5 0 0 20 0 1 0 12345"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := parseStatus(b); err == nil && m.state == 0 {
			t.Fatal("no state")
		}
		parseCPU(b)
	})
}
