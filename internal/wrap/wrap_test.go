package wrap_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
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

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"virt-trust/internal/bus"
	"virt-trust/internal/bus/bustest"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/testkit"
	"virt-trust/internal/wrap"
)

const (
	uuid     = "6f1c2d3e-0000-4a5b-8c6d-00000000000c"
	stateDir = "/var/lib/libvirt/swtpm/" + uuid + "/tpm2"
)

var (
	stateKey    = strings.Repeat("5a", 32)
	transferKey = strings.Repeat("c3", 32)
)

// seen is what a fake swtpm finds when it begins.
type seen struct {
	Argv []string
	Env  []string
	FDs  map[int]fd
}

type fd struct {
	Link   string
	Offset int64
	Seals  int
	Text   string
}

// built holds virt-trust-wrapper, and its journal's socket while a test listens.
var built string

// TestMain is also the fake swtpm: a child with FAKE set tells what it sees.
func TestMain(m *testing.M) {
	asEmulator()
	if starts := os.Getenv("STARTS"); starts != "" { // the wrapper, with another folder of starts
		os.Unsetenv("STARTS")
		w := wrap.Wrapper{
			Args: os.Args, Env: os.Environ(), Path: os.Getenv("PATH"), Self: "/proc/self/exe", Stderr: os.Stderr,
			Log: journal.Quiet("test"), Starts: starts, Redeem: wrap.Redeem,
		}
		os.Exit(w.Run())
	}
	if os.Getenv("FAKE") == "" {
		status := m.Run()
		if built != "" {
			os.RemoveAll(built)
		}
		os.Exit(status)
	}
	s := seen{Argv: os.Args, Env: os.Environ(), FDs: map[int]fd{}}
	for n := 3; n < 256; n++ {
		if flags, err := unix.FcntlInt(uintptr(n), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC != 0 {
			continue // closed, or this process's own
		}
		var f fd
		f.Link, _ = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", n))
		f.Offset, _ = unix.Seek(n, 0, io.SeekCurrent)
		f.Seals, _ = unix.FcntlInt(uintptr(n), unix.F_GET_SEALS, 0)
		text, _ := io.ReadAll(os.NewFile(uintptr(n), ""))
		f.Text = string(text)
		s.FDs[n] = f
	}
	json.NewEncoder(os.Stdout).Encode(s)
	os.Exit(42)
}

// install gives a folder with bin/swtpm and bin/swtpm_setup, the wrapper, and
// real/swtpm and real/swtpm_setup, the fakes.
func install(t *testing.T) string {
	t.Helper()
	testkit.Need(t, "go")
	dir := testkit.Folder(t)
	for _, d := range []string{"bin", "real"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if built == "" {
		tmp, err := os.MkdirTemp("", "virt-trust-")
		if err != nil {
			t.Fatal(err)
		}
		bustest.Build(t, "../../wrapper", filepath.Join(tmp, "virt-trust-wrapper"), filepath.Join(tmp, "journal"))
		built = tmp
	}
	wrapper, err := os.ReadFile(filepath.Join(built, "virt-trust-wrapper"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "virt-trust-wrapper"), wrapper, 0o755); err != nil {
		t.Fatal(err)
	}
	me, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"swtpm", "swtpm_setup"} {
		if err := os.Symlink("../virt-trust-wrapper", filepath.Join(dir, "bin", p)); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "real", p), me, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// memfd makes a key's descriptor as virt-trustd does.
func memfd(t testing.TB, text string, seals int) dbus.Variant {
	t.Helper()
	n, err := unix.MemfdCreate("key", unix.MFD_ALLOW_SEALING|unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(n) })
	if _, err := unix.Write(n, []byte(text)); err != nil { // the offset is left at the end
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(n), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	return dbus.MakeVariant(dbus.UnixFD(n))
}

const sealed = unix.F_SEAL_WRITE | unix.F_SEAL_GROW | unix.F_SEAL_SHRINK | unix.F_SEAL_SEAL

// grant answers with both keys.
func grant(t testing.TB) (string, []dbus.Variant, *dbus.Error) {
	return "keys", []dbus.Variant{memfd(t, stateKey, sealed), memfd(t, transferKey, sealed)}, nil
}

type result struct {
	status         int
	stdout, stderr string
	took           time.Duration
}

// fake reads what the fake told, or ends the test.
func (r result) fake(t *testing.T) seen {
	t.Helper()
	var s seen
	if err := json.Unmarshal([]byte(r.stdout), &s); err != nil || r.status != 42 {
		t.Fatalf("the real program did not run: %+v", r)
	}
	return s
}

func run(t *testing.T, dir string, files []*os.File, argv ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "bin", filepath.Base(argv[0])))
	cmd.Args = argv
	path := filepath.Join(dir, "bin") + ":" + filepath.Join(dir, "real")
	cmd.Env = []string{"PATH=" + path, "FAKE=1", "ODD=a=b\nc", "DBUS_SYSTEM_BUS_ADDRESS=" + os.Getenv("DBUS_SYSTEM_BUS_ADDRESS")}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = &out, &errs, files
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	begin := time.Now()
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String(), time.Since(begin)}
}

func TestKeys(t *testing.T) {
	dir := install(t)
	bustest.Start(t)
	type call struct{ program, path string }
	calls := make(chan call, 10)
	bustest.Serve(t, bustest.Manager{RedeemGrant: func(_ dbus.Sender, program, path string, _ map[string]dbus.Variant) (string, []dbus.Variant, *dbus.Error) {
		calls <- call{program, path}
		return grant(t)
	}})
	inherited, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	inherited.WriteString("the pid file")
	inherited.Seek(4, io.SeekStart)

	// What this process itself hands down, go test's pipes for one.
	inherits := len(run(t, dir, nil, "swtpm").fake(t).FDs)

	argv := []string{"/any/where/swtpm", "socket", "--tpmstate", "dir=" + stateDir + ",mode=0600", "--tpm2", "--log", "file=/l,level=20", "--server", "type=tcp,fd=4"}
	quiet := slices.Replace(slices.Clone(argv), 6, 7, "file=/l")
	numbers := func(got seen) (state, transfer int) {
		t.Helper()
		tail := got.Argv[len(got.Argv)-4:]
		fmt.Sscanf(strings.Join(tail, " "), "--key fd=%d,format=hex,mode=aes-256-cbc --migration-key fd=%d", &state, &transfer)
		if want := fmt.Sprintf("--key fd=%d,format=hex,mode=aes-256-cbc --migration-key fd=%d,format=hex,mode=aes-256-cbc", state, transfer); state < 3 || transfer < 3 || strings.Join(tail, " ") != want {
			t.Fatalf("argv %q", got.Argv)
		}
		return state, transfer
	}
	first, second := numbers(run(t, dir, []*os.File{inherited}, argv...).fake(t))
	<-calls
	inherited.Seek(4, io.SeekStart)
	argv[8], quiet[8] = fmt.Sprintf("type=tcp,fd=%d", first), fmt.Sprintf("type=tcp,fd=%d", first)
	argv, quiet = append(argv, "--pid", fmt.Sprintf("fd=%d", second)), append(quiet, "--pid", fmt.Sprintf("fd=%d", second))
	got := run(t, dir, []*os.File{inherited}, argv...).fake(t)
	state, transfer := numbers(got)
	if !slices.Equal(got.Argv[:len(got.Argv)-4], quiet) {
		t.Errorf("argv\n got %q\nwant %q", got.Argv, quiet)
	}
	for _, n := range []int{state, transfer} {
		if n == first || n == second {
			t.Errorf("descriptor %d is named in %q", n, argv)
		}
	}
	if c := <-calls; c != (call{"swtpm", stateDir}) {
		t.Errorf("redeemed %+v", c)
	}
	for n, text := range map[int]string{state: stateKey, transfer: transferKey} {
		f := got.FDs[n]
		if f.Text != text || f.Offset != 0 || f.Seals&sealed != sealed || !strings.HasPrefix(f.Link, "/memfd:") {
			t.Errorf("descriptor %d: %+v", n, f)
		}
	}
	if f := got.FDs[3]; f.Text != "pid file" || f.Offset != 4 || f.Link != inherited.Name() {
		t.Errorf("the inherited descriptor: %+v", f)
	}
	if len(got.FDs) != inherits+3 {
		t.Errorf("descriptors have leaked: %+v", got.FDs)
	}
	if want := "PATH=" + filepath.Join(dir, "bin") + ":" + filepath.Join(dir, "real"); len(got.Env) != 4 || !slices.Contains(got.Env, want) || !slices.Contains(got.Env, "ODD=a=b\nc") {
		t.Errorf("environment: %q", got.Env)
	}

	got = run(t, dir, nil, "swtpm_setup", "--tpm2", "--tpm-state", "dir://"+stateDir, "--createek").fake(t)
	number := 0
	if n := len(got.Argv) - 3; n > 0 {
		number, _ = strconv.Atoi(got.Argv[n])
	}
	if want := []string{"swtpm_setup", "--tpm2", "--tpm-state", "dir://" + stateDir, "--createek", "--keyfile-fd", strconv.Itoa(number), "--cipher", "aes-256-cbc"}; number < 3 || !slices.Equal(got.Argv, want) {
		t.Errorf("argv %q", got.Argv)
	}
	if c := <-calls; c != (call{"swtpm_setup", stateDir}) {
		t.Errorf("redeemed %+v", c)
	}
	if got.FDs[number].Text != stateKey {
		t.Errorf("descriptors: %+v", got.FDs)
	}

	// Probes do not ask.
	for _, argv := range [][]string{
		{"swtpm", "socket", "--print-capabilities"},
		{"/x/swtpm", "--version"},
		{"swtpm", "socket", "--print-states", "--tpmstate", "backend-uri=dir://" + stateDir, "--tpm2"},
		{"swtpm_setup", "--print-capabilities"},
		{"swtpm_setup"},
	} {
		if got := run(t, dir, nil, argv...).fake(t); !slices.Equal(got.Argv, argv) || len(got.FDs) != inherits {
			t.Errorf("probe %q: %+v", argv, got)
		}
	}
	if len(calls) > 0 {
		t.Errorf("a probe redeemed %+v", <-calls)
	}
}

func TestPass(t *testing.T) {
	dir := install(t)
	bustest.Start(t)
	bustest.Serve(t, bustest.Manager{RedeemGrant: func(dbus.Sender, string, string, map[string]dbus.Variant) (string, []dbus.Variant, *dbus.Error) {
		return "pass", nil, nil
	}})
	argv := []string{filepath.Join(dir, "bin", "swtpm"), "socket", "--tpmstate", "backend-uri=dir://" + stateDir, "--key", "fd=7,mode=aes-256-cbc", "--log", "level=3"}
	if got := run(t, dir, nil, argv...).fake(t); !slices.Equal(got.Argv, argv) || len(got.FDs) != len(run(t, dir, nil, "swtpm").fake(t).FDs) {
		t.Errorf("%+v", got)
	}
}

// TestSocket: the name of the control socket is there before virt-trustd is asked
// where it has announced the VM's start, and nowhere else; who gets no keys takes
// it away.
func TestSocket(t *testing.T) {
	dir := install(t)
	starts, path := testkit.Folder(t), filepath.Join(testkit.Folder(t), "1-vm-swtpm.sock")
	bustest.Start(t)
	var refuse atomic.Bool
	var asked atomic.Pointer[string]
	bustest.Serve(t, bustest.Manager{RedeemGrant: func(_ dbus.Sender, _, _ string, options map[string]dbus.Variant) (string, []dbus.Variant, *dbus.Error) {
		socket, _ := options["socket"].Value().(string)
		st, err := os.Lstat(path)
		is := fmt.Sprintf("%s %v", socket, err == nil && st.Mode() == 0o600)
		asked.Store(&is)
		if refuse.Load() {
			return "", nil, dbus.NewError(bus.ErrorRefused, []any{"key-not-released: no"})
		}
		return grant(t)
	}})
	try := func(ctrl, state string) (result, string) {
		cmd := exec.Command("/proc/self/exe")
		cmd.Args = []string{"swtpm", "socket", "--ctrl", ctrl, "--tpmstate", "dir=" + state, "--tpm2"}
		cmd.Env = []string{"PATH=" + filepath.Join(dir, "real"), "FAKE=1", "STARTS=" + starts, "DBUS_SYSTEM_BUS_ADDRESS=" + os.Getenv("DBUS_SYSTEM_BUS_ADDRESS")}
		out, _ := cmd.CombinedOutput()
		return result{status: cmd.ProcessState.ExitCode(), stdout: string(out)}, *asked.Load()
	}
	there := func() bool { _, err := os.Lstat(path); return err == nil }
	ctrl := "type=unixio,path=" + path + ",mode=0600"

	if r, got := try(ctrl, stateDir); r.status != 42 || got != path+" false" || there() {
		t.Errorf("not announced: %q, %+v", got, r)
	}
	if err := os.WriteFile(filepath.Join(starts, uuid), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if r, got := try(ctrl, stateDir); r.status != 42 || got != path+" true" || !there() {
		t.Errorf("announced: %q, %+v", got, r)
	}
	os.Remove(path)
	for ctrl, is := range map[string]string{"type=unixio,clientfd=5,path=" + path: " false", "type=tcp,port=5": " false"} {
		if r, got := try(ctrl, stateDir); r.status != 42 || got != is || there() {
			t.Errorf("%s: %q, %+v", ctrl, got, r)
		}
	}
	if _, got := try(ctrl, strings.Replace(stateDir, uuid, "6f1c2d3e-0000-4a5b-8c6d-00000000000d", 1)); got != path+" false" || there() {
		t.Errorf("another VM's: %q", got)
	}
	refuse.Store(true)
	if r, got := try(ctrl, stateDir); r.status != 1 || got != path+" true" || there() {
		t.Errorf("refused: %q, %+v", got, r)
	}

	// What is there stays as it is, and a name that cannot be made stops nobody.
	if err := os.WriteFile(path, []byte("else's"), 0o640); err != nil {
		t.Fatal(err)
	}
	link := path + ".link"
	if err := os.Symlink(path+".target", link); err != nil {
		t.Fatal(err)
	}
	for _, refused := range []bool{false, true} {
		refuse.Store(refused)
		for _, p := range []string{path, link, filepath.Join(path, "x")} {
			if r, _ := try("type=unixio,path="+p, stateDir); (r.status == 42) == refused {
				t.Errorf("%s: %+v", p, r)
			}
		}
	}
	if b, err := os.ReadFile(path); string(b) != "else's" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := os.Lstat(path + ".target"); err == nil {
		t.Error("through a link")
	}
}

// TestAnswers holds every answer that is none against the one line and the status.
func TestAnswers(t *testing.T) {
	dir := install(t)
	journald, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(built, "journal"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer journald.Close()
	bustest.Start(t)
	var answer atomic.Pointer[func() (string, []dbus.Variant, *dbus.Error)]
	bustest.Serve(t, bustest.Manager{RedeemGrant: func(dbus.Sender, string, string, map[string]dbus.Variant) (string, []dbus.Variant, *dbus.Error) {
		return (*answer.Load())()
	}})
	keys := func(action string, fds ...dbus.Variant) func() (string, []dbus.Variant, *dbus.Error) {
		return func() (string, []dbus.Variant, *dbus.Error) { return action, fds, nil }
	}
	fails := func(e *dbus.Error) func() (string, []dbus.Variant, *dbus.Error) {
		return func() (string, []dbus.Variant, *dbus.Error) { return "", []dbus.Variant{}, e }
	}
	good := memfd(t, stateKey, sealed)
	for name, c := range map[string]struct {
		answer func() (string, []dbus.Variant, *dbus.Error)
		code   string
	}{
		"refused":         {fails(bustest.Refused("key-not-released: no grant is open; start the VM")), "key-not-released: no grant is open; start the VM\n"},
		"denied":          {fails(dbus.NewError("org.freedesktop.DBus.Error.AccessDenied", []any{"no"})), "key-not-released"},
		"failed":          {fails(dbus.NewError("org.virttrust1.Error.Failed", []any{"oh\nno"})), "key-not-released"},
		"unknown action":  {keys("dance"), "key-not-released"},
		"no keys":         {keys("keys"), "key-not-released"},
		"one key":         {keys("keys", good), "key-not-released"},
		"three keys":      {keys("keys", good, good, good), "key-not-released"},
		"no descriptors":  {keys("keys", dbus.MakeVariant(3), dbus.MakeVariant("4")), "key-not-released"},
		"pass with a key": {keys("pass", good), "key-not-released"},
		"unsealed":        {keys("keys", good, memfd(t, transferKey, 0)), "key-not-released"},
		"short key":       {keys("keys", memfd(t, stateKey[:62], sealed), good), "key-not-released"},
	} {
		answer.Store(&c.answer)
		for _, path := range []string{stateDir, "/srv/tpm"} {
			r := run(t, dir, nil, "swtpm", "socket", "--tpmstate", "dir="+path)
			if r.status != 1 || r.stdout != "" || !strings.HasPrefix(r.stderr, "virt-trust: refused: "+c.code) || strings.Count(r.stderr, "\n") != 1 {
				t.Errorf("%s, %s: %+v", name, path, r)
			}
			buf := make([]byte, 1<<16)
			journald.SetReadDeadline(time.Now().Add(time.Second))
			n, err := journald.Read(buf)
			e := string(buf[:n])
			if err != nil || !strings.Contains(e, "SYSLOG_IDENTIFIER=virt-trust-wrapper\n") || !strings.Contains(e, "MESSAGE_ID=171bd3d1921c41d1900557a6c3f5ba00\n") ||
				!strings.Contains(e, "VIRT_TRUST_STATE_PATH="+path+"\n") || strings.Contains(e, "VIRT_TRUST_VM_UUID="+uuid+"\n") != (path == stateDir) {
				t.Errorf("%s, %s: logged %q, %v", name, path, e, err)
			}
		}
	}
}

// TestUnreachable: a VM in libvirt's default layout is refused, other state is none of ours.
func TestUnreachable(t *testing.T) {
	dir := install(t)
	check := func(name string, limit time.Duration) {
		t.Helper()
		r := run(t, dir, nil, "swtpm", "socket", "--tpmstate", "dir="+stateDir)
		if r.status != 1 || !strings.HasPrefix(r.stderr, "virt-trust: refused: helper-unreachable: ") || strings.Count(r.stderr, "\n") != 1 || r.took > limit {
			t.Errorf("%s: %+v", name, r)
		}
		argv := []string{"swtpm", "socket", "--tpmstate", "dir=/srv/tpm", "--log", "level=5"}
		r = run(t, dir, nil, argv...)
		if got := r.fake(t); !slices.Equal(got.Argv, argv) || r.took > limit {
			t.Errorf("%s: another's state: %+v", name, r)
		}
		r = run(t, dir, nil, "swtpm", "--version")
		r.fake(t)
	}
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
	check("no bus", 500*time.Millisecond)

	bustest.Start(t)
	check("nobody owns the name", 500*time.Millisecond)
	release := make(chan struct{})
	defer close(release)
	bustest.Serve(t, bustest.Manager{RedeemGrant: func(dbus.Sender, string, string, map[string]dbus.Variant) (string, []dbus.Variant, *dbus.Error) {
		<-release
		return "pass", nil, nil
	}})
	check("virt-trustd hangs", time.Second) // all that libvirt waits

	socket := filepath.Join(t.TempDir(), "bus")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+socket)
	check("the bus hangs", time.Second)
}

// TestFind: the wrapper never becomes itself.
func TestFind(t *testing.T) {
	dir := install(t)
	again := filepath.Join(dir, "again")
	if err := os.Mkdir(again, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(dir, "virt-trust-wrapper"), filepath.Join(again, "swtpm")); err != nil {
		t.Fatal(err)
	}
	start := func(path, name string) (int, string, string) {
		cmd := exec.Command(filepath.Join(dir, "bin", "swtpm"), "--version")
		cmd.Args[0] = name
		cmd.Env = []string{"PATH=" + path, "FAKE=1"}
		cmd.Dir = filepath.Join(dir, "real")
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		timer := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
		defer timer.Stop()
		cmd.Run()
		return cmd.ProcessState.ExitCode(), out.String(), errs.String()
	}
	bin := filepath.Join(dir, "bin")
	if status, out, errs := start(bin+"::.:"+again+":"+bin+":"+filepath.Join(dir, "real"), "swtpm"); status != 42 {
		t.Errorf("status %d, %q, %q", status, out, errs)
	}
	testkit.Need(t, "/usr/bin/swtpm")
	for _, path := range []string{"", bin, ".:real", bin + ":" + again} { // the last resort is /usr/bin
		if status, out, errs := start(path, "swtpm"); status != 0 || !strings.HasPrefix(out, "TPM emulator version") {
			t.Errorf("PATH=%s: status %d, %q, %q", path, status, out, errs)
		}
	}
	if status, _, errs := start(bin, "virt-trust-wrapper"); status != 1 || strings.Count(errs, "\n") != 1 {
		t.Errorf("under its own name: status %d, %q", status, errs)
	}
}

// TestHidden: while keys are held, the wrapper's /proc entries are root's.
func TestHidden(t *testing.T) {
	testkit.Root(t)
	dir := install(t)
	bustest.Start(t)
	owner := make(chan uint32, 1)
	var conn atomic.Pointer[dbus.Conn]
	conn.Store(bustest.Serve(t, bustest.Manager{RedeemGrant: func(sender dbus.Sender, _, _ string, _ map[string]dbus.Variant) (string, []dbus.Variant, *dbus.Error) {
		var pid uint32
		if err := conn.Load().BusObject().Call("org.freedesktop.DBus.GetConnectionUnixProcessID", 0, string(sender)).Store(&pid); err != nil {
			t.Error(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(fmt.Sprintf("/proc/%d/fd", pid), &st); err != nil {
			t.Error(err)
		}
		// virt-trustd must still be able to tell who asks.
		if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil || exe != filepath.Join(dir, "virt-trust-wrapper") {
			t.Errorf("exe %q, %v", exe, err)
		}
		owner <- st.Uid
		return grant(t)
	}}))
	cmd := exec.Command(filepath.Join(dir, "bin", "swtpm"), "socket", "--tpmstate", "dir="+stateDir)
	cmd.Args[0] = "swtpm"
	cmd.Env = append(os.Environ(), "FAKE=1", "PATH="+filepath.Join(dir, "real"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	cmd.WaitDelay = time.Second
	out, _ := cmd.Output()
	if uid := <-owner; uid != 0 {
		t.Errorf("its descriptors can be opened by user %d", uid)
	}
	if !strings.Contains(string(out), stateKey) {
		t.Errorf("the keys did not arrive: %s", out)
	}
}

// TestRealProbes holds the wrapper against Debian's programs byte for byte.
func TestRealProbes(t *testing.T) {
	testkit.Need(t, "/usr/bin/swtpm", "/usr/bin/swtpm_setup")
	dir := install(t)
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
	for _, argv := range [][]string{
		{"swtpm", "socket", "--print-capabilities"}, {"swtpm", "--version"}, {"swtpm", "-v"}, {"swtpm", "socket", "--help"}, {"swtpm"}, {"swtpm", "cuse", "--help"},
		{"swtpm", "chardev", "--print-capabilities"}, {"swtpm", "socket", "--no-such-option"}, {"swtpm", "socket", "--tpm2", "--print-capabilities", "--log", "file=-"},
		{"swtpm_setup", "--print-capabilities"}, {"swtpm_setup", "--version"}, {"swtpm_setup", "--help"}, {"swtpm_setup", "--no-such-option"}, {"swtpm_setup"},
	} {
		ask := func(program string) string {
			cmd := exec.Command(program)
			cmd.Args = argv
			cmd.Env = []string{"PATH=" + filepath.Join(dir, "bin") + ":/usr/bin"}
			var out, errs bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &errs
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			cmd.WaitDelay = 5 * time.Second
			cmd.Run()
			return fmt.Sprintf("status %d\n%s\n%s", cmd.ProcessState.ExitCode(), &out, &errs)
		}
		if real, wrapped := ask("/usr/bin/"+argv[0]), ask(filepath.Join(dir, "bin", argv[0])); real != wrapped {
			t.Errorf("%q:\n%s\n-- through the wrapper:\n%s", argv, real, wrapped)
		}
	}
}

// TestRealSwtpm makes a vTPM and uses it through the wrapper, as libvirt does.
func TestRealSwtpm(t *testing.T) {
	testkit.Need(t, "/usr/bin/swtpm", "/usr/bin/swtpm_setup", "/usr/bin/swtpm_localca")
	dir := install(t)
	work := testkit.Folder(t)
	state := filepath.Join(work, uuid, "tpm2")
	if err := os.MkdirAll(state, 0o700); err != nil {
		t.Fatal(err)
	}
	// The machine's own certificate authority is left alone.
	for name, text := range map[string]string{
		"swtpm_setup.conf":   "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = " + work + "/swtpm-localca.conf\ncreate_certs_tool_options = /etc/swtpm-localca.options\nactive_pcr_banks = sha256\n",
		"swtpm-localca.conf": "statedir = " + work + "/ca\nsigningkey = " + work + "/ca/signkey.pem\nissuercert = " + work + "/ca/issuercert.pem\ncertserial = " + work + "/ca/certserial\n",
	} {
		if err := os.WriteFile(filepath.Join(work, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	bustest.Start(t)
	var nested, key atomic.Pointer[string]
	key.Store(&stateKey)
	calls := make(chan string, 100)
	bustest.Serve(t, bustest.Manager{RedeemGrant: func(_ dbus.Sender, program, path string, _ map[string]dbus.Variant) (string, []dbus.Variant, *dbus.Error) {
		calls <- program + " " + path
		if program == "swtpm" && nested.Load() != nil {
			return "pass", nil, nil
		}
		return "keys", []dbus.Variant{memfd(t, *key.Load(), sealed), memfd(t, transferKey, sealed)}, nil
	}})
	command := func(program string, args ...string) (*exec.Cmd, *bytes.Buffer) {
		cmd := exec.Command(filepath.Join(dir, "bin", program), args...)
		cmd.Env = append(os.Environ(), "PATH="+filepath.Join(dir, "bin")+":/usr/bin:/bin", "XDG_CONFIG_HOME="+work)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		cmd.WaitDelay = 5 * time.Second
		return cmd, &out
	}

	yes := "yes"
	nested.Store(&yes)
	setup, out := command("swtpm_setup", "--tpm2", "--tpm-state", state, "--vmid", "vm:"+uuid, "--logfile", filepath.Join(work, "log"),
		"--createek", "--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--not-overwrite")
	if err := setup.Run(); err != nil {
		log, _ := os.ReadFile(filepath.Join(work, "log"))
		t.Fatalf("%v\n%s\n%s", err, out, log)
	}
	nested.Store(nil)
	if got, want := len(calls), 2; got != want {
		t.Errorf("%d redemptions, want %d: swtpm_setup's own and that of the swtpm that manufactures", got, want)
	}
	for _, want := range []string{"swtpm_setup " + state, "swtpm " + state} {
		if got := <-calls; got != want {
			t.Errorf("redeemed %q, want %q", got, want)
		}
	}
	permall, err := os.ReadFile(filepath.Join(state, "tpm2-00.permall"))
	if err != nil {
		t.Fatal(err)
	}
	// swtpm's header: version, minimum, header size (16 bit), flags (16 bit).
	if len(permall) < 1000 || permall[5]&1 == 0 {
		t.Errorf("the state is not encrypted: %x", permall[:min(10, len(permall))])
	}

	// libvirt's command line, and a client of the data channel besides.
	start := func() (*exec.Cmd, *bytes.Buffer, net.Conn) {
		t.Helper()
		ctrl, data := filepath.Join(work, "ctrl"), filepath.Join(work, "data")
		os.Remove(ctrl)
		os.Remove(data)
		cmd, out := command("swtpm", "socket", "--ctrl", "type=unixio,path="+ctrl+",mode=0600", "--tpmstate", "dir="+state+",mode=0600",
			"--log", "file="+filepath.Join(work, "swtpm.log"), "--terminate", "--tpm2", "--server", "type=unixio,path="+data, "--flags", "not-need-init,startup-clear")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		for begin := time.Now(); time.Since(begin) < 3*time.Second; time.Sleep(5 * time.Millisecond) {
			if conn, err := net.Dial("unix", data); err == nil {
				conn.SetDeadline(time.Now().Add(5 * time.Second))
				return cmd, out, conn
			}
			if unix.Kill(cmd.Process.Pid, 0) != nil {
				break
			}
		}
		return cmd, out, nil
	}
	getRandom := func(conn net.Conn) {
		t.Helper()
		// TPM2_GetRandom of 8 bytes (TPM 2.0 Part 3, 16.1).
		conn.Write([]byte{0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, 0x7b, 0, 8})
		answer := make([]byte, 20)
		if _, err := io.ReadFull(conn, answer); err != nil || !bytes.Equal(answer[:12], []byte{0x80, 0x01, 0, 0, 0, 20, 0, 0, 0, 0, 0, 8}) {
			t.Errorf("TPM2_GetRandom: %x, %v", answer, err)
		}
	}
	for range 2 {
		cmd, out, conn := start()
		if conn == nil {
			t.Fatalf("swtpm did not come up: %s", out)
		}
		// The process that libvirt started has become the real swtpm.
		if exe, _ := os.Readlink("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/exe"); exe != "/usr/bin/swtpm" {
			t.Errorf("the process is %s", exe)
		}
		getRandom(conn)
		conn.Close() // --terminate ends it
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
	before, _ := os.ReadFile(filepath.Join(state, "tpm2-00.permall"))
	wrong := strings.Repeat("00", 32)
	key.Store(&wrong)
	cmd, out, conn := start()
	if conn != nil {
		// swtpm opens its sockets before it loads the state.
		conn.Close()
	}
	if cmd.Wait(); cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("with a wrong key: %v\n%s", cmd.ProcessState, out)
	}
	if after, _ := os.ReadFile(filepath.Join(state, "tpm2-00.permall")); !bytes.Equal(before, after) {
		t.Error("a wrong key has changed the state")
	}
}
