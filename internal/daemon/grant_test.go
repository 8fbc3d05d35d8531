package daemon

import (
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virt-trust/internal/hosttpm"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/reason"
)

// lockAsQEMU takes the lock of who reads an image and lets others do so.
func lockAsQEMU(t testing.TB, f *os.File) {
	t.Helper()
	l := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: 100, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		t.Fatal(err)
	}
}

func TestGrants(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	other, _, _ := h.ran(uuidB)
	if _, err := h.g.Release(background, off(other), other); err != nil {
		t.Fatal(err)
	}
	redeem := func(program, path string, c *caller) (string, error) {
		r, err := h.g.Redeem(program, path, c)
		if err != nil {
			return "", err
		}
		defer r.Close()
		if r.State == nil {
			return "pass", nil
		}
		return "keys", nil
	}
	gets := func(want string) func(string, error) {
		return func(got string, err error) {
			t.Helper()
			if got != want || err != nil {
				t.Errorf("%q, %v; want %q", got, err, want)
			}
		}
	}
	no := func(_ string, err error) { t.Helper(); refuses(t, err, reason.KeyNotReleased) }
	elsewhere := &caller{pid: os.Getpid(), cgroup: "0::/user.slice\n"}

	// Without a start under way.
	no(redeem("swtpm", h.dir(uuidA), libvirts()))
	no(redeem("swtpm_setup", h.dir(uuidA)+"/../tpm2/", libvirts()))
	no(redeem("swtpm", filepath.Join(h.root, "swtpm", "cccccccc-0000-4000-8000-000000000003", "tpm2"), libvirts()))
	gets("pass")(redeem("swtpm", "/somewhere/else", libvirts()))
	if _, err := h.g.Redeem("swtpm", strings.Repeat("/x", 4000), libvirts()); reason.As(err) == nil {
		t.Error("a path without an end:", err)
	}
	if _, err := h.g.Redeem("cat", h.dir(uuidA), libvirts()); reason.As(err) == nil {
		t.Error("a grant for cat:", err)
	}

	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	no(redeem("swtpm", h.dir(uuidA), elsewhere))
	no(redeem("swtpm", h.dir(uuidB), libvirts()))
	gets("keys")(redeem("swtpm", h.dir(uuidA)+"/", libvirts()))
	no(redeem("swtpm", h.dir(uuidA), libvirts())) // twice
	if err := h.g.Launched(f); err != nil {
		t.Fatal(err)
	}
	no(redeem("swtpm_setup", h.dir(uuidA), libvirts())) // it runs: nothing is open
	h.stop(f)

	// Late.
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	h.later(time.Duration(h.g.cfg.Grant.Lifetime) + time.Second)
	no(redeem("swtpm", h.dir(uuidA), libvirts()))
	h.stop(f)

	// A clock that goes backwards gives nobody more time than it says.
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	h.stop(f)
	no(redeem("swtpm", h.dir(uuidA), libvirts()))

	// swtpm_setup and the swtpm that it runs, then libvirt's.
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("sleep", "60")
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	gets("keys")(redeem("swtpm_setup", h.dir(uuidA), &caller{pid: c.Process.Pid, cgroup: cgroup}))
	gets("pass")(redeem("swtpm", h.dir(uuidA), libvirts()))
	gets("pass")(redeem("swtpm", h.dir(uuidA), libvirts()))
	no(redeem("swtpm_setup", h.dir(uuidA), libvirts()))
	c.Process.Kill()
	c.Wait()
	gets("keys")(redeem("swtpm", h.dir(uuidA), libvirts()))
	no(redeem("swtpm", h.dir(uuidA), libvirts()))
	h.stop(f)

	// libvirt has swtpm_setup make a vTPM where it finds no folder: not in the
	// place of one that was there at prepare.
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(h.dir(uuidA), h.dir(uuidA)+".away"); err != nil {
		t.Fatal(err)
	}
	h.mkdir(uuidA)
	_, err := h.g.Redeem("swtpm_setup", h.dir(uuidA), libvirts())
	refuses(t, err, reason.VTPMMissing)
	os.Remove(h.dir(uuidA))
	if err := os.Rename(h.dir(uuidA)+".away", h.dir(uuidA)); err != nil {
		t.Fatal(err)
	}
	h.stop(f)
	h.start(f)
	h.stop(f)

	// A released VM.
	if err := h.prepare(other); err != nil {
		t.Fatal(err)
	}
	gets("pass")(redeem("swtpm", h.dir(uuidB), libvirts()))
	if err := h.g.Launched(other); err != nil {
		t.Error(err)
	}
}

// The descriptors are sealed and hold 64 hexadecimal digits.
func TestRedemption(t *testing.T) {
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	r, err := h.g.Redeem("swtpm", h.dir(uuidA), libvirts())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, k := range []*os.File{r.State, r.Transfer} {
		b := testkit.Must[[]byte](t)(io.ReadAll(k))
		if len(b) != 64 || strings.Trim(string(b), "0123456789abcdef") != "" {
			t.Errorf("%d bytes", len(b))
		}
		if _, err := k.WriteAt([]byte{'0'}, 0); !errors.Is(err, unix.EPERM) {
			t.Error("it can be written:", err)
		}
	}
}

// libvirt runs swtpm_setup once more on a new vTPM whose VM names its PCR banks:
// after it was made, once, and for no vTPM that was there before.
func TestGrantForPCRBanks(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f := h.vm(uuidA, false)
	setup := func() ([]byte, error) {
		c := exec.Command("sleep", "60")
		c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		defer c.Wait()
		defer c.Process.Kill()
		r, err := h.g.Redeem("swtpm_setup", h.dir(uuidA), &caller{pid: c.Process.Pid, cgroup: cgroup})
		if err != nil {
			return nil, err
		}
		defer r.Close()
		b := testkit.Must[[]byte](t)(io.ReadAll(r.State))
		return testkit.Must[[]byte](t)(hex.DecodeString(string(b))), nil
	}
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	h.mkdir(uuidA)
	key := testkit.Must[[]byte](t)(setup())
	_, err := setup()
	refuses(t, err, reason.KeyNotReleased) // nothing was made
	h.write(uuidA, key)
	testkit.Must[[]byte](t)(setup())
	_, err = setup()
	refuses(t, err, reason.KeyNotReleased)
	h.keys(uuidA)
	if err := h.g.Launched(f); err != nil {
		t.Fatal(err)
	}
	h.stop(f)

	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	testkit.Must[[]byte](t)(setup()) // for what changed in the definition
	_, err = setup()
	refuses(t, err, reason.KeyNotReleased)
	h.keys(uuidA)
	h.stop(f)
}

// TestControlSocket: where the name of swtpm's control socket is there before
// the socket, start waits for the socket, so that QEMU does not come too early.
func TestControlSocket(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f := h.vm(uuidA, true)
	path := filepath.Join(h.root, "control.sock")
	announced := func() bool {
		_, err := os.Lstat(filepath.Join(h.root, "run", "starts", uuidA))
		return err == nil
	}
	// begins is swtpm's wrapper, up to where it asks for the keys.
	begins := func() *exec.Cmd {
		t.Helper()
		if err := h.prepare(f); err != nil {
			t.Fatal(err)
		}
		if !announced() {
			t.Error("not announced")
		}
		h.mkdir(uuidA)
		swtpm := exec.Command("sleep", "60")
		swtpm.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := swtpm.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { swtpm.Process.Kill(); swtpm.Wait() })
		if err := os.WriteFile(path, nil, 0o600); err != nil { // the name
			t.Fatal(err)
		}
		c := &caller{pid: swtpm.Process.Pid, cgroup: cgroup}
		for _, other := range []string{"", "control.sock", "/" + strings.Repeat("x", maxStatePath)} {
			h.g.expect("swtpm", h.dir(uuidA), other, c)
		}
		h.g.expect("swtpm_setup", h.dir(uuidA), "/of/another/program", c)
		h.g.expect("swtpm", h.dir(uuidB), "/of/another/VM", c)
		h.g.expect("swtpm", h.dir(uuidA), "/of/a/stranger", &caller{pid: swtpm.Process.Pid, cgroup: "0::/user.slice\n"})
		h.g.expect("swtpm", h.dir(uuidA), path, c)
		h.g.expect("swtpm", h.dir(uuidA), "/of/who/comes/late", c)
		return swtpm
	}
	asks := func() *exec.Cmd {
		t.Helper()
		swtpm := begins()
		h.keys(uuidA)
		return swtpm
	}
	ends := func() {
		t.Helper()
		h.stop(f)
		os.Remove(path)
		if announced() {
			t.Error("announced for ever")
		}
	}
	makes := func() net.Listener {
		os.Remove(path)
		return testkit.Must[net.Listener](t)(net.Listen("unix", path))
	}

	// waits has something done after a while, and start waits for it.
	waits := func(while time.Duration, meanwhile func() net.Listener) {
		t.Helper()
		made, began := make(chan net.Listener, 1), time.Now()
		time.AfterFunc(while, func() { made <- meanwhile() })
		if err := h.g.Launched(f); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took < while {
			t.Errorf("it waited for %v", took)
		}
		(<-made).Close()
		ends()
	}
	asks()
	waits(300*time.Millisecond, makes)
	begins() // and libvirt goes on before the wrapper has asked
	waits(200*time.Millisecond, func() net.Listener { l := makes(); h.keys(uuidA); return l })

	// The wrapper is refused meanwhile, and libvirt does not hear of it.
	begins()
	time.AfterFunc(50*time.Millisecond, func() {
		h.later(time.Duration(h.g.cfg.Grant.Lifetime) + time.Second)
		h.g.Redeem("swtpm", h.dir(uuidA), libvirts())
	})
	if r := refuses(t, h.g.Launched(f), reason.KeyNotReleased); !strings.Contains(r.Text(), "expired") {
		t.Error(r)
	}
	ends()

	// Another was faster, which has its reason only where libvirt's wrapper is told.
	asks().Process.Kill()
	time.AfterFunc(20*time.Millisecond, func() { h.g.Redeem("swtpm", h.dir(uuidA), libvirts()) })
	if r := refuses(t, h.g.Launched(f), reason.KeyNotReleased); !strings.Contains(r.Text(), "redeemed before") {
		t.Error(r)
	}
	ends()

	// It never asks.
	begins()
	began := time.Now()
	if r := refuses(t, h.g.Launched(f), reason.KeyNotReleased); time.Since(began) < wrapperLimit || !strings.Contains(r.Text(), "wrapper") {
		t.Error(r)
	}
	ends()

	swtpm := asks()
	time.AfterFunc(50*time.Millisecond, func() { swtpm.Process.Kill(); swtpm.Wait() })
	r := refuses(t, h.g.Launched(f), reason.KeyNotReleased)
	if !strings.Contains(r.Text(), "swtpm ended") {
		t.Error(r)
	}
	ends()

	asks()
	began = time.Now()
	r = refuses(t, h.g.Launched(f), reason.KeyNotReleased)
	if took := time.Since(began); took < socketLimit || !strings.Contains(r.Text(), "has not made") {
		t.Error(took, r)
	}
	ends()

	// A wrapper that names no socket.
	h.start(f)
	ends()

	// What nobody waits for is not announced.
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	h.g.Close()
	h.boot(func(c *config.Config) { c.Mode = "audit" })
	if announced() {
		t.Error("by a virt-trustd that is gone")
	}
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	if announced() {
		t.Error("in audit mode")
	}
}

// TestAhead: libvirt goes on while the TPM works; wrapper and start wait for its
// word, and tell what it is.
func TestAhead(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	swtpm := func() (*Redemption, error) { return h.g.Redeem("swtpm", h.dir(uuidA), libvirts()) }
	type redeemed struct {
		r   *Redemption
		err error
	}
	// ahead prepares while the TPM is held, has wrapper and start come, and ends the wait.
	ahead := func() (prepared, launched error, r redeemed) {
		t.Helper()
		h.tpm.mu.Lock()
		h.tpm.held = make(chan struct{})
		h.tpm.mu.Unlock()
		goes, done := make(chan struct{}), make(chan error, 1)
		go func() { done <- h.g.Prepare(background, f, cgroup, func() { close(goes) }) }()
		select {
		case <-goes:
		case <-time.After(5 * time.Second):
			t.Fatal("libvirt waits for the TPM")
		}
		if !h.g.starting(uuidA) {
			t.Error("no start is under way")
		}
		keys, started := make(chan redeemed, 1), make(chan error, 1)
		go func() { r, err := swtpm(); keys <- redeemed{r, err} }()
		go func() { started <- h.g.Launched(f) }()
		time.Sleep(100 * time.Millisecond)
		select {
		case err := <-done:
			t.Fatal("prepared without the TPM", err)
		case r := <-keys:
			t.Fatal("keys without the TPM", r)
		case err := <-started:
			t.Fatal("started without the TPM", err)
		default:
		}
		h.tpm.mu.Lock()
		held := h.tpm.held
		h.tpm.held = nil
		h.tpm.mu.Unlock()
		close(held)
		return <-done, <-started, <-keys
	}

	prepared, launched, r := ahead()
	if prepared != nil || launched != nil || r.err != nil || r.r.State == nil {
		t.Fatal(prepared, launched, r)
	}
	r.r.Close()
	if got := h.g.stateOf(h.g.peek().Get(uuidA)); got != list.Running {
		t.Error(got)
	}
	h.stop(f)

	h.tpm.say(hosttpm.ErrPolicy)
	prepared, launched, r = ahead()
	h.tpm.say(nil)
	refuses(t, prepared, reason.HostNotApproved)
	refuses(t, launched, reason.HostNotApproved)
	refuses(t, r.err, reason.HostNotApproved)
	if r := h.g.peek().Get(uuidA); r.Open {
		t.Error("the record is open")
	}
	h.stop(f)
	if h.g.starting(uuidA) {
		t.Error("a start that was refused goes on for ever")
	}

	// Where libvirt must not go on.
	waits := func(why string) {
		t.Helper()
		if err := h.g.Prepare(background, f, cgroup, func() { t.Errorf("libvirt goes on: %s", why) }); err != nil {
			t.Fatal(why, err)
		}
		h.mkdir(f.UUID)
		if key, _ := h.keys(f.UUID); key == nil {
			t.Error(why, "no key")
		}
		if err := h.g.Launched(f); err != nil {
			t.Fatal(why, err)
		}
		h.stop(f)
	}
	h.g.unwrapTook.Store(int64(quickUnwrap))
	waits("the TPM is slow")
	h.g.Restoring(f)
	waits("a saved image is restored")
	other := f
	f = h.vm(uuidB, false)
	waits("a first start")
	f = other
	h.g.cfg.Mode = "audit"
	waits("audit mode")
	h.g.cfg.Mode = "enforce"
	h.reboot()
	waits("the TPM's pace is not known yet")

	// Whoever forgets to decide gives no keys.
	st := &start{f: f}
	st.seen.Instance = h.dir(uuidA)
	gr := h.g.openAhead(st, cgroup)
	h.g.decided(gr, nil)
	_, err := swtpm()
	refuses(t, err, reason.KeyNotReleased)
	refuses(t, h.g.Launched(f), reason.KeyNotReleased)
	h.g.closeGrant(uuidA)
}
