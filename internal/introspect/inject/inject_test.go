package inject

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"virt-trust/internal/evidence/report"
	"virt-trust/internal/introspect"
	"virt-trust/internal/testkit"
)

func quoter() *Quoter {
	return &Quoter{Program: "/proc/self/exe", Env: []string{"PLAY=inject"}}
}

// compare holds a reading against that of swtpm's memory.
func compare(t *testing.T, v *vm, got *report.Reading) {
	t.Helper()
	m := introspect.NewMemory(introspect.Config{Swtpm: testkit.Need(t, "swtpm"), Dir: t.TempDir()})
	defer m.Close()
	want, err := m.Read(t.Context(), v.Target)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got.Banks) != fmt.Sprint(want.Banks) || len(got.Banks) != 4 {
		t.Errorf("by command %v\nfrom memory %v", got.Banks, want.Banks)
	}
}

// verify checks a quote with nothing of the package.
func verify(t *testing.T, q *report.Quote, r *report.Reading, akHex string, qualifying []byte) {
	t.Helper()
	raw, err := hex.DecodeString(akHex)
	if err != nil {
		t.Fatal(err)
	}
	pub2b, err := tpm2.Unmarshal[tpm2.TPM2BPublic](raw)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := pub2b.Contents()
	if err != nil {
		t.Fatal(err)
	}
	parms, err1 := pub.Parameters.ECCDetail()
	point, err2 := pub.Unique.ECC()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	key, err := tpm2.ECDSAPub(parms, point)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](q.Signature)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := sig.Signature.ECDSA()
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(q.Attest)
	if !ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(ec.SignatureR.Buffer), new(big.Int).SetBytes(ec.SignatureS.Buffer)) {
		t.Error("the signature is wrong")
	}
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](q.Attest)
	if err != nil {
		t.Fatal(err)
	}
	quoted, err := attest.Attested.Quote()
	if err != nil || !bytes.Equal(attest.ExtraData.Buffer, qualifying) {
		t.Fatalf("%v, qualifyingData %x", err, attest.ExtraData.Buffer)
	}
	i := slices.IndexFunc(r.Banks, func(b report.Bank) bool { return b.Algorithm == "sha256" })
	h := sha256.New()
	for pcr := range uint(24) {
		h.Write(r.Banks[i].Values[pcr])
	}
	if !bytes.Equal(quoted.PCRDigest.Buffer, h.Sum(nil)) {
		t.Error("the quote is over other PCRs than the reading")
	}
}

func TestQuote(t *testing.T) {
	v := startVM(t)
	q := quoter()
	qualifying := report.VTPMQualifyingData([]byte("nonce"), [16]byte{1})
	if _, _, err := q.Quote(t.Context(), v.Target, qualifying, akHandle); !errors.Is(err, ErrNoAK) {
		t.Errorf("no key: %v", err)
	}
	v.tell(t, "ak")
	ak := v.says(t, "ak ")
	v.says(t, "done")
	quote, reading, err := q.Quote(t.Context(), v.Target, qualifying, akHandle)
	if err != nil {
		t.Fatal(err)
	}
	verify(t, quote, reading, ak, qualifying[:])
	compare(t, v, reading)

	// The guest has all slots: one of its objects is put aside, and is back.
	v.tell(t, "fill")
	v.says(t, "done")
	if quote, reading, err = q.Quote(t.Context(), v.Target, qualifying, akHandle); err != nil {
		t.Fatal(err)
	}
	verify(t, quote, reading, ak, qualifying[:])
	v.tell(t, "check")
	v.says(t, "done")

	// What is not known is found, and what is wrong is refused.
	blank := v.Target
	blank.QEMU, blank.Swtpm = 0, 0
	if reading, err = q.Read(t.Context(), blank); err != nil {
		t.Error(err)
	} else {
		compare(t, v, reading)
	}
	wrong := v.Target
	wrong.QEMU = os.Getpid()
	if _, err := q.Read(t.Context(), wrong); !errors.Is(err, introspect.ErrOther) {
		t.Errorf("another QEMU: %v", err)
	}
	wrong = v.Target
	wrong.StateDir = t.TempDir()
	if _, err := q.Read(t.Context(), wrong); !errors.Is(err, introspect.ErrGone) {
		t.Errorf("another state: %v", err)
	}
	v.tell(t, "pair")
	v.says(t, "done")
	if _, err := q.Read(t.Context(), v.Target); !errors.Is(err, ErrChannel) {
		t.Errorf("two pairs of sockets: %v", err)
	}
}

// Under load no answer goes to the wrong one, on either side.
func TestUnderLoad(t *testing.T) {
	v := startVM(t)
	v.tell(t, "ak")
	ak := v.says(t, "ak ")
	v.says(t, "done")
	v.tell(t, "load")
	q := quoter()
	loaded := make(chan string, 1)
	go func() { line, _ := v.out.ReadString('\n'); loaded <- line }()
	var times []time.Duration
	busy, states := 0, map[string]bool{}
	for {
		qualifying := sha256.Sum256(fmt.Append(nil, len(times)))
		a, err := q.Ask(t.Context(), Request{Target: v.Target, AK: akHandle, Qualifying: qualifying[:]})
		switch {
		case errors.Is(err, introspect.ErrBusy): // it may be, of a guest that always has a command under way
			busy++
		case err != nil:
			v.qemu.Process.Kill()
			t.Fatalf("%v; the guest: %q", err, <-loaded)
		default:
			verify(t, a.Quote, a.Reading, ak, qualifying[:])
			times = append(times, a.Held)
			states[fmt.Sprintf("%x", a.Reading.Banks[1].Values[16])] = true
		}
		select {
		case line := <-loaded:
			if !strings.HasPrefix(line, "extended") {
				t.Fatal(line)
			}
			v.says(t, "done load")
			if len(states) < 2 {
				t.Fatalf("there was no load: %d quotes of %d states, busy %d times", len(times), len(states), busy)
			}
			slices.Sort(times)
			t.Logf("the guest %s; %d quotes of %d states, busy %d times, VM held for %v, at worst %v", strings.TrimSpace(line), len(times), len(states), busy, times[len(times)/2], times[len(times)-1])
			return
		default:
		}
	}
}

// A swtpm or a QEMU that has ended, or is about to, is told from one whose channel
// is not to be found.
func TestEnded(t *testing.T) {
	for range 20 {
		v := startVM(t)
		v.swtpm.Process.Signal(syscall.SIGSTOP) // it does not see QEMU's end
		for _, p := range []*os.Process{v.qemu.Process, v.swtpm.Process} {
			p.Kill()
			for ended := false; !ended; {
				ended = stateOf(t, p.Pid) == "Z" // nobody has waited for it yet
				c, err := find(v.Swtpm)
				c.close()
				if !errors.Is(err, introspect.ErrGone) && (ended || err != nil) {
					t.Errorf("ended %v: %v", ended, err)
				}
			}
		}
		v.qemu.Wait()
		v.swtpm.Wait()
	}
}

// Several may ask at once, and a caller that does not wait is in nobody's way.
func TestAtOnce(t *testing.T) {
	v := startVM(t)
	q := quoter()
	ctx, cancel := context.WithTimeout(t.Context(), time.Microsecond)
	defer cancel()
	if _, err := q.Read(ctx, v.Target); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	results := make(chan error)
	for range 4 {
		go func() {
			_, err := q.Read(t.Context(), v.Target)
			results <- err
		}()
	}
	for range 4 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

func stateOf(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), "\nState:\t")
	return after[:1]
}

// What an administrator has stopped stays stopped, before and after.
func TestStoppedByAnother(t *testing.T) {
	v := startVM(t)
	v.qemu.Process.Signal(syscall.SIGSTOP)
	for range 3 {
		if _, err := quoter().Read(t.Context(), v.Target); !errors.Is(err, introspect.ErrStopped) {
			t.Errorf("%v", err)
		}
		// A thread that its tracer lets go runs for a moment on its way back.
		s := stateOf(t, v.QEMU)
		for range 200 {
			if s == "T" {
				break
			}
			time.Sleep(5 * time.Millisecond)
			s = stateOf(t, v.QEMU)
		}
		if s != "T" {
			t.Errorf("its state is %s", s)
		}
	}
	v.qemu.Process.Signal(syscall.SIGCONT)
	if _, err := quoter().Read(t.Context(), v.Target); err != nil {
		t.Error(err)
	}
	v.swtpm.Process.Signal(syscall.SIGSTOP)
	if _, err := quoter().Read(t.Context(), v.Target); !errors.Is(err, introspect.ErrBusy) {
		t.Errorf("a swtpm that is stopped: %v", err)
	}
	v.swtpm.Process.Signal(syscall.SIGCONT)
	v.tell(t, "load")
	v.says(t, "extended")
}

// What a debugger has is left to it.
func TestTraced(t *testing.T) {
	v := startVM(t)
	tracer := exec.Command(testkit.Need(t, "strace"), "-f", "-e", "trace=none", "-o", "/dev/null", "-p", fmt.Sprint(v.QEMU))
	tracer.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := tracer.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.QEMU))
		if !bytes.Contains(b, []byte("TracerPid:\t0\n")) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("strace does not attach")
		}
	}
	if _, err := quoter().Read(t.Context(), v.Target); !errors.Is(err, introspect.ErrForbidden) {
		t.Errorf("%v", err)
	}
	tracer.Process.Signal(syscall.SIGINT)
	tracer.Wait()
	if _, err := quoter().Read(t.Context(), v.Target); err != nil {
		t.Error(err)
	}
}

// A VM never stays stopped, and its vTPM stays in step, whenever virt-trustd's
// side is killed: the parent at any moment; the child while it holds QEMU.
func TestKilled(t *testing.T) {
	v := startVM(t)
	v.tell(t, "load")
	loaded := make(chan string, 1)
	go func() { line, _ := v.out.ReadString('\n'); loaded <- line }()
	n, answers := 0, filepath.Join(t.TempDir(), "answers")
	for ; ; n++ {
		// The parent is a shell, which is killed with the request under way.
		parent := exec.Command("/bin/sh", "-c", `"$EXE" <"$REQUEST" >>"$ANSWERS" & wait`)
		request := filepath.Join(t.TempDir(), "request")
		if err := os.WriteFile(request, fmt.Appendf(nil, `{"StateDir":%q}`, v.StateDir), 0o600); err != nil {
			t.Fatal(err)
		}
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		parent.Env = append(os.Environ(), "PLAY=inject", "EXE="+exe, "REQUEST="+request, "ANSWERS="+answers)
		if err := parent.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(n%20) * time.Millisecond)
		parent.Process.Kill()
		parent.Wait()
		select {
		case line := <-loaded:
			if !strings.HasPrefix(line, "extended") {
				t.Fatal(line)
			}
			t.Logf("the guest %s while %d parents were killed", strings.TrimSpace(line), n)
			v.says(t, "done load")
		default:
			continue
		}
		break
	}
	time.Sleep(100 * time.Millisecond)
	b, err := os.ReadFile(answers)
	if err != nil {
		t.Fatal(err)
	}
	readings := strings.Count(string(b), `"Reader":"vtpm-command"`)
	t.Logf("%d exchanges were carried through", readings)
	// One that finds its predecessor still at work is refused, as by a debugger.
	if n < 10 || readings < 5 {
		t.Errorf("%d were killed, %d exchanges carried through: %.400s", n, readings, b)
	}
}

// A tracer that is killed leaves nothing stopped.
func TestTracerKilled(t *testing.T) {
	v := startVM(t)
	for range 20 {
		c := exec.Command("/proc/self/exe", "-test.run=^TestHoldForEver$")
		c.Env = append(os.Environ(), fmt.Sprintf("HOLD=%d", v.QEMU))
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil {
			t.Fatal("it is not held")
		}
		if s := stateOf(t, v.QEMU); s != "t" {
			t.Fatalf("its state is %s while it is held", s)
		}
		c.Process.Kill()
		c.Wait()
		if s := stateOf(t, v.QEMU); s == "t" || s == "T" {
			t.Fatalf("its state is %s after the tracer was killed", s)
		}
	}
	v.tell(t, "load")
	v.says(t, "extended")
}

// TestHoldForEver is a process that holds another (TestTracerKilled).
func TestHoldForEver(t *testing.T) {
	var pid int
	if _, err := fmt.Sscan(os.Getenv("HOLD"), &pid); err != nil {
		return
	}
	ended := make(chan error)
	go func() {
		runtime.LockOSThread()
		_, err := hold(pid, time.Second)
		if err != nil {
			ended <- err
		}
		fmt.Println("held")
		time.Sleep(time.Minute)
	}()
	t.Fatal(<-ended)
}

// A signal that comes before or while a process is held comes to it afterwards.
func TestSignalsAreKept(t *testing.T) {
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), "PLAY=count")
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Wait()
	defer c.Process.Kill()
	lines := bufio.NewReader(out)
	says := func(want string) {
		t.Helper()
		out.(*os.File).SetReadDeadline(time.Now().Add(5 * time.Second))
		if line, err := lines.ReadString('\n'); err != nil || line != want+"\n" {
			t.Fatalf("%q, %v", line, err)
		}
	}
	says("ready")
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for i := range 200 {
		if i%2 == 0 {
			c.Process.Signal(unix.SIGUSR1)
		}
		h, err := hold(c.Process.Pid, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 1 {
			c.Process.Signal(unix.SIGUSR1)
		}
		if err := h.release(); err != nil {
			t.Fatal(err)
		}
		says("got it")
	}
}

// A swtpm that hangs with a command of ours holds the VM no longer than it may,
// and the answer that comes late is not left to the guest.
func TestSwtpmHangs(t *testing.T) {
	v := startVM(t)
	const hangs = 1500 * time.Millisecond
	slow := exec.Command(testkit.Need(t, "strace"), "-f", "-p", fmt.Sprint(v.Swtpm), "-o", "/dev/null", "-e", "trace=write,writev,sendmsg,sendto",
		"-e", fmt.Sprintf("inject=write,writev,sendmsg,sendto:delay_enter=%d", hangs.Microseconds()))
	slow.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := slow.Start(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.Swtpm)); !bytes.Contains(b, []byte("TracerPid:\t0\n")) && stateOf(t, v.Swtpm) == "S" {
			break
		}
		if time.Now().After(end) {
			t.Fatal("strace does not attach")
		}
	}
	v.tell(t, "load") // or swtpm would be seen in restart_syscall(2), into which strace has put it
	v.says(t, "extended")
	v.says(t, "done")
	began, done := time.Now(), make(chan error, 1)
	go func() {
		_, err := quoter().Read(t.Context(), v.Target)
		done <- err
	}()
	var held time.Duration
	for from, err := (time.Time{}), error(nil); err == nil; time.Sleep(time.Millisecond) {
		switch stopped := stateOf(t, v.QEMU) == "t"; {
		case stopped && from.IsZero():
			from = time.Now()
		case !stopped && !from.IsZero():
			held, from = max(held, time.Since(from)), time.Time{}
		}
		select {
		case err = <-done:
			if !errors.Is(err, introspect.ErrBusy) {
				t.Fatalf("after %v: %v", time.Since(began), err)
			}
		default:
		}
	}
	if held < holdLimit/2 || held > holdLimit+200*time.Millisecond || time.Since(began) < hangs {
		t.Errorf("the VM was held for %v; all took %v", held, time.Since(began))
	}
	t.Logf("figures: swtpm hangs for %v: the VM is held for %v", hangs, held)
	slow.Process.Signal(syscall.SIGINT)
	slow.Wait()
	v.tell(t, "load")
	v.says(t, "extended")
	v.says(t, "done")
	if _, err := quoter().Read(t.Context(), v.Target); err != nil {
		t.Error(err)
	}
}

// A thread that does not stop in time is let go all the same, and can be held
// again.
func TestSlowThread(t *testing.T) {
	v := startVM(t)
	v.tell(t, "load")
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	slow := 0
	for range 300 {
		h, err := hold(v.QEMU, 0) // no time at all
		if err == nil {
			err = h.release()
		} else if errors.Is(err, errSlow) {
			slow, err = slow+1, nil
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if slow == 0 {
		t.Error("no thread was too slow")
	}
	v.says(t, "extended")
	v.says(t, "done")
	if s := stateOf(t, v.QEMU); s == "t" || s == "T" {
		t.Errorf("its state is %s", s)
	}
}

func TestAsk(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := quoter().Ask(ctx, Request{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := (&Quoter{Program: "/nonexistent"}).Ask(t.Context(), Request{}); err == nil {
		t.Error("no program")
	}
	if _, err := (&Quoter{Program: "/bin/false"}).Ask(t.Context(), Request{}); err == nil {
		t.Error("a program that fails")
	}
	if _, _, err := (&Quoter{Program: "/bin/cat"}).Quote(t.Context(), introspect.Target{}, [32]byte{}, 1); err == nil {
		t.Error("an answer without a quote")
	}
	for code, is := range codes {
		if _, err := parseAnswer(fmt.Appendf(nil, `{"Error":"text","Code":%q}`, code)); !errors.Is(err, is) || err.Error() != "text" {
			t.Errorf("%s: %v", code, err)
		}
	}
}

// said is a TPM that gives answers that were written before.
type said [][]byte

func (s *said) Send([]byte) ([]byte, error) {
	body := (*s)[0]
	*s = (*s)[1:]
	return append(binary.BigEndian.AppendUint32([]byte{0x80, 0x01}, uint32(10+len(body))), append(make([]byte, 4), body...)...), nil
}

// A vTPM that says that it has a PCR 24 is not taken at its word.
func TestPCR24(t *testing.T) {
	selection := []byte{0, 0, 0, 1, 0, 0x0b, 4, 0, 0, 0, 1} // of SHA-256: PCR 24
	capability := append([]byte{0, 0, 0, 0, 5}, selection...)
	read := append(append(make([]byte, 4), selection...), append([]byte{0, 0, 0, 1, 0, 32}, make([]byte, 32)...)...)
	if all, err := banks(&said{capability, read}); err == nil {
		t.Errorf("%v", all)
	}
}

func FuzzParseAnswer(f *testing.F) {
	f.Add([]byte(`{"Error":"text","Code":"busy"}`))
	f.Add([]byte(`{"Quote":{"Attest":"AAAA","Signature":"AAAA"},"Reading":{"Reader":"vtpm-command","Time":1,"Banks":[{"Algorithm":"sha1","Values":["AAAA"]}]},"Held":5}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if a, err := parseAnswer(b); (a == nil) == (err == nil) {
			t.Fatal(a, err)
		}
	})
}
