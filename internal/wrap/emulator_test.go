package wrap_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"virt-trust/internal/bus/bustest"
	"virt-trust/internal/domain/emulator"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/testkit"
	"virt-trust/internal/wrap"
)

const qemu = "qemu-system-x86_64"

// machine is what a fake QEMU finds when it begins.
type machine struct {
	Argv, Env []string
	Exe, Comm string
	FDs       []string // those that were inherited
}

// asEmulator makes this test binary, where EMULATOR names a folder, its
// emulator, or the fake QEMU that lies in it as real/NAME.
func asEmulator() {
	dir := os.Getenv("EMULATOR")
	if dir == "" {
		return
	}
	if exe, _ := os.Executable(); strings.HasPrefix(exe, dir+"/real/") {
		m := machine{Argv: os.Args, Env: os.Environ(), Exe: exe}
		comm, _ := os.ReadFile("/proc/self/comm")
		m.Comm = strings.TrimSpace(string(comm))
		for n := 3; n < 1024; n++ {
			if flags, err := unix.FcntlInt(uintptr(n), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
				link, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", n))
				m.FDs = append(m.FDs, fmt.Sprintf("%d %s", n, link))
			}
		}
		json.NewEncoder(os.Stdout).Encode(m)
		os.Exit(42)
	}
	e := wrap.Emulator{
		Args: os.Args, Env: os.Environ(), RealDir: dir + "/real", Links: dir + "/open", Self: "/proc/self/exe",
		Stderr: os.Stderr, Log: journal.Quiet("test"), Redeem: wrap.RedeemEmulator,
	}
	os.Exit(e.Run())
}

func copyOf(t *testing.T, to string, more string) {
	t.Helper()
	me, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = os.WriteFile(to, append(me, more...), 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// installEmulator gives a folder with emulator/NAME, real/NAME and open/NAME.
func installEmulator(t *testing.T) string {
	t.Helper()
	dir := testkit.Folder(t)
	for _, d := range []string{"emulator", "real", "open"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	copyOf(t, dir+"/emulator/"+qemu, "")
	copyOf(t, dir+"/real/"+qemu, "")
	if err := os.Symlink(fmt.Sprintf("/proc/self/fd/%d", emulator.FD), dir+"/open/"+qemu); err != nil {
		t.Fatal(err)
	}
	return dir
}

func emulate(t *testing.T, dir string, files []*os.File, argv ...string) (m machine, r result) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "emulator", filepath.Base(argv[0])))
	cmd.Args = argv
	cmd.Env = []string{"EMULATOR=" + dir, "ODD=a=b\nc", "DBUS_SYSTEM_BUS_ADDRESS=" + os.Getenv("DBUS_SYSTEM_BUS_ADDRESS")}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = &out, &errs, files
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	r = result{cmd.ProcessState.ExitCode(), out.String(), errs.String(), 0}
	if r.status == 42 {
		if err := json.Unmarshal(out.Bytes(), &m); err != nil {
			t.Fatal(err)
		}
	}
	return m, r
}

func withTPM(name string) []string {
	return []string{name, "-name", "guest=vm", "-uuid", uuid, "-chardev", "socket,id=c,path=/s", "-tpmdev", "emulator,id=t,chardev=c", "-S"}
}

func TestEmulator(t *testing.T) {
	dir := installEmulator(t)
	bustest.Start(t)
	type call struct {
		program, path, uuid string
		digest              [32]byte
	}
	var calls []call
	var answer *dbus.Error
	meanwhile := func() {}
	bustest.Serve(t, bustest.Manager{RedeemGrant: func(_ dbus.Sender, program, path string, options map[string]dbus.Variant) (string, []dbus.Variant, *dbus.Error) {
		uuid, _ := options["uuid"].Value().(string)
		digest, _ := options["sha256"].Value().([]byte)
		calls = append(calls, call{program, path, uuid, [32]byte(digest)})
		meanwhile()
		return "pass", []dbus.Variant{}, answer
	}})
	real := dir + "/real/" + qemu
	content, err := os.ReadFile(real)
	if err != nil {
		t.Fatal(err)
	}
	want := call{"qemu", "", uuid, sha256.Sum256(content)}
	inherited, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}

	bare, r := emulate(t, dir, nil, qemu, "-version")
	if len(calls) != 0 || r.status != 42 || bare.Exe != real {
		t.Fatalf("a probe: %+v, %+v", calls, r)
	}
	argv := withTPM("/any/where/" + qemu)
	m, r := emulate(t, dir, []*os.File{inherited}, argv...)
	if r.status != 42 || !slices.Equal(m.Argv, argv) || m.Exe != real || m.Comm != qemu[:15] {
		t.Errorf("%+v, %+v", m, r)
	}
	if len(calls) != 1 || calls[0] != want {
		t.Errorf("%+v, want %+v", calls, want)
	}
	if len(m.FDs) != len(bare.FDs)+1 || !slices.Equal(m.Env, bare.Env) || len(m.Env) != 3 {
		t.Errorf("descriptors %v, environment %q; of a probe %v, %q", m.FDs, m.Env, bare.FDs, bare.Env)
	}

	// What was hashed is what is executed, whatever has its name by then.
	meanwhile = func() {
		meanwhile = func() {}
		os.Rename(real, real+".away")
		copyOf(t, real, "replaced")
	}
	if m, r = emulate(t, dir, nil, argv...); m.Exe != real+".away" || calls[len(calls)-1] != want {
		t.Errorf("replaced meanwhile: %+v, %+v", m, r)
	}
	if m, r = emulate(t, dir, nil, argv...); m.Exe != real || calls[len(calls)-1] == want {
		t.Errorf("replaced before: %+v, %+v, the same digest", m, r)
	}
	meanwhile = func() {
		meanwhile = func() {}
		time.Sleep(20 * time.Millisecond) // a tick of the clock that times files
		f, _ := os.OpenFile(real, os.O_WRONLY|os.O_APPEND, 0)
		io.WriteString(f, "more")
		f.Close()
	}
	if _, r = emulate(t, dir, nil, argv...); r.status != 1 || !strings.HasPrefix(r.stderr, "virt-trust: refused: launcher-not-approved: "+real) {
		t.Errorf("written to meanwhile: %+v", r)
	}

	// Without the link, and with its number taken, it is executed all the same.
	taken := make([]*os.File, emulator.FD-2)
	for i := range taken {
		taken[i] = inherited
	}
	if m, r = emulate(t, dir, taken, argv...); m.Exe != real || len(m.FDs) < len(taken) {
		t.Errorf("with the number taken: %+v, %+v", m, r)
	}
	os.Remove(dir + "/open/" + qemu)
	if m, r = emulate(t, dir, nil, argv...); m.Exe != real {
		t.Errorf("without the link: %+v, %+v", m, r)
	}
	os.Symlink("/bin/false", dir+"/open/"+qemu)
	if m, r = emulate(t, dir, nil, argv...); m.Exe != real {
		t.Errorf("with another link: %+v, %+v", m, r)
	}

	// Refusals.
	for what, c := range map[string]struct {
		answer *dbus.Error
		argv   []string
		text   string
	}{
		"refused": {bustest.Refused("launcher-not-approved: it is not"), argv, "launcher-not-approved: it is not\n"},
		"denied":  {dbus.NewError("org.freedesktop.DBus.Error.AccessDenied", []any{"no"}), argv, "policy-forbids: QEMU runs as a user"},
		"failed":  {dbus.NewError("org.virttrust1.Error.Failed", []any{"oh\nno"}), argv, "launcher-not-approved: it could not be told"},
		"no UUID": {nil, slices.DeleteFunc(slices.Clone(argv), func(s string) bool { return s == "-uuid" || s == uuid }), "policy-forbids: the command line"},
	} {
		answer = c.answer
		if _, r := emulate(t, dir, nil, c.argv...); r.status != 1 || r.stdout != "" || !strings.HasPrefix(r.stderr, "virt-trust: refused: "+c.text) || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%s: %+v", what, r)
		}
	}
	answer = nil
	if _, r := emulate(t, dir, nil, append(argv[:1:1], "-uuid", uuid)...); r.status != 42 {
		t.Errorf("without a vTPM: %+v", r)
	}
}

// TestEmulatorAlone: without virt-trustd, and for what is no QEMU.
func TestEmulatorAlone(t *testing.T) {
	dir := installEmulator(t)
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+dir+"/nobody")
	if _, r := emulate(t, dir, nil, withTPM(qemu)...); r.status != 1 || !strings.HasPrefix(r.stderr, "virt-trust: refused: helper-unreachable: ") {
		t.Errorf("a VM with a vTPM: %+v", r)
	}
	if _, r := emulate(t, dir, nil, qemu, "-uuid", uuid); r.status != 42 {
		t.Errorf("a VM without one: %+v", r)
	}
	real := dir + "/real/" + qemu
	for what, make := range map[string]func() error{
		"itself":   func() error { return os.Link(dir+"/emulator/"+qemu, real) },
		"a script": func() error { return os.WriteFile(real, []byte("#!/bin/sh\nexit 42\n"), 0o755) },
		"a folder": func() error { return os.Mkdir(real, 0o755) },
		"nothing":  func() error { return nil },
	} {
		os.Remove(real)
		if err := make(); err != nil {
			t.Fatal(err)
		}
		if _, r := emulate(t, dir, nil, withTPM(qemu)...); r.status != 127 || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%s as the real one: %+v", what, r)
		}
	}
	copyOf(t, dir+"/emulator/other", "")
	if _, r := emulate(t, dir, nil, "other"); r.status != 1 {
		t.Errorf("under another name: %+v", r)
	}
}

// BenchmarkEmulatorHash is what a start under virt-trust's emulator pays for
// hashing QEMU, which is in the page cache.
func BenchmarkEmulatorHash(b *testing.B) {
	f, err := os.Open("/usr/bin/" + qemu)
	if err != nil {
		b.Skip(err)
	}
	st, _ := f.Stat()
	b.SetBytes(st.Size())
	for b.Loop() {
		f.Seek(0, io.SeekStart)
		io.CopyBuffer(sha256.New(), struct{ io.Reader }{f}, make([]byte, 1<<20))
	}
}
