package inject

import (
	"bytes"
	"crypto/sha256"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"virt-trust/internal/introspect"
	"virt-trust/internal/testkit"
)

// The real QEMU, with as much of a guest as its firmware, which starts the vTPM
// and measures.
func TestQEMU(t *testing.T) {
	qemu := testkit.Need(t, "qemu-system-x86_64")
	v, ctrl := startSwtpm(t)
	v.qemu = exec.Command(qemu, "-nodefaults", "-display", "none", "-machine", "q35,accel=tcg", "-m", "64",
		"-chardev", "socket,id=c,path="+ctrl, "-tpmdev", "emulator,id=t,chardev=c", "-device", "tpm-crb,tpmdev=t")
	v.qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := v.qemu.Start(); err != nil {
		t.Fatal(err)
	}
	defer v.qemu.Wait()
	defer v.qemu.Process.Kill()
	v.QEMU = v.qemu.Process.Pid
	m := introspect.NewMemory(introspect.Config{Swtpm: testkit.Need(t, "swtpm"), Dir: t.TempDir()})
	defer m.Close()

	// Until the firmware has measured: PCR 0 has its version, and no PCR changes.
	zero := make([]byte, sha256.Size)
	var last string
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(500 * time.Millisecond) {
		r, err := m.Read(t.Context(), v.Target)
		if err == nil && !bytes.Equal(r.Banks[1].Values[0], zero) {
			if now := string(r.Banks[1].Values[0]) + string(r.Banks[1].Values[4]); now == last {
				break
			} else {
				last = now
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("the firmware measures nothing: %v", err)
		}
	}
	for range 20 {
		a, err := quoter().Ask(t.Context(), Request{Target: v.Target})
		if err != nil {
			t.Fatal(err)
		}
		compare(t, v, a.Reading)
	}
	if s := stateOf(t, v.QEMU); s == "t" || s == "T" {
		t.Errorf("its state is %s", s)
	}
	v.qemu.Process.Signal(syscall.SIGSTOP)
	if _, err := quoter().Read(t.Context(), v.Target); err == nil || stateOf(t, v.QEMU) != "T" {
		t.Errorf("stopped by another: %v, state %s", err, stateOf(t, v.QEMU))
	}
	v.qemu.Process.Signal(syscall.SIGCONT)
	if _, err := quoter().Read(t.Context(), v.Target); err != nil {
		t.Error(err)
	}
}
