package introspect

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2/transport"

	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/statedir"
)

// config is that of a Memory with a folder of its own.
func config(t testing.TB) Config {
	t.Helper()
	c := Config{Swtpm: testkit.Need(t, "swtpm"), Dir: testkit.Folder(t), UID: os.Getuid(), GID: os.Getgid()}
	if u, err := user.Lookup("tss"); err == nil && os.Geteuid() == 0 {
		c.UID, _ = strconv.Atoi(u.Uid)
		c.GID, _ = strconv.Atoi(u.Gid)
	}
	return c
}

func memory(t testing.TB, c Config) *Memory {
	m := NewMemory(c)
	t.Cleanup(func() { m.Close() })
	return m
}

// vtpm is a real swtpm.
type vtpm struct {
	Target
	cmd  *exec.Cmd
	tpm  transport.TPM
	conn net.Conn
	ctrl string
}

// start runs swtpm on a state folder, and waits until it answers.
func start(t testing.TB, c Config, dir string, args ...string) *vtpm {
	t.Helper()
	run := t.TempDir()
	socket, ctrl := filepath.Join(run, "s"), filepath.Join(run, "c")
	v := &vtpm{Target: Target{UUID: "8b1f3b6e-0f9a-4d7f-9d55-111111111111", StateDir: dir}, ctrl: ctrl}
	if args == nil {
		args = []string{"--flags", "not-need-init,startup-clear"}
	}
	v.cmd = exec.Command(c.Swtpm, append([]string{"socket", "--tpm2", "--tpmstate", "dir=" + dir, "--server", "type=unixio,path=" + socket, "--ctrl", "type=unixio,path=" + ctrl}, args...)...)
	v.cmd.SysProcAttr, v.cmd.WaitDelay = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}, time.Second
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.end() })
	v.Swtpm = v.cmd.Process.Pid
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		conn, err := net.Dial("unix", socket)
		pid, _ := statedir.Holder(dir)
		if err == nil && pid == v.Swtpm {
			v.conn, v.tpm = conn, transport.FromReadWriter(conn)
			return v
		}
		if err == nil {
			conn.Close()
		}
		if time.Now().After(deadline) {
			t.Fatalf("swtpm: %v, holder %d", err, pid)
		}
	}
}

func (v *vtpm) end() {
	if v.conn != nil {
		v.conn.Close()
	}
	v.cmd.Process.Kill()
	v.cmd.Wait()
}

// equal compares a reading with what the TPM itself says.
func equal(t testing.TB, m Reader, v *vtpm) {
	t.Helper()
	r, err := m.Read(t.Context(), v.Target)
	if err != nil {
		t.Fatal(err)
	}
	active, err := allocation(v.tpm)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, b := range active {
		if b.Select == 0 {
			continue
		}
		want, err := readBank(v.tpm, b.Hash)
		if err != nil {
			t.Fatal(err)
		}
		got := r.Banks[n]
		n++
		if len(got.Values) != len(want) {
			t.Errorf("bank %s has %d PCRs", got.Algorithm, len(want))
		}
		for i, w := range want {
			if !bytes.Equal(got.Values[i], w) {
				t.Errorf("PCR %d of bank %s: read %x, the TPM says %x", i, got.Algorithm, got.Values[i], w)
			}
		}
	}
	if n != len(r.Banks) {
		t.Errorf("%d banks read, %d active", len(r.Banks), n)
	}
}
