package daemon

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus"
	"virt-trust/internal/domain"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/reason"
)

// Whoever listens learns that the TPM came and went, once for each time.
func TestHostAnnounced(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	f := o.vm(uuidA, true)
	if err := o.conn.AddMatchSignal(dbus.WithMatchObjectPath(bus.HostPath)); err != nil {
		t.Fatal(err)
	}
	told := make(chan *dbus.Signal, 100)
	o.conn.Signal(told)
	// await gives what is announced until the host's state is the one given.
	await := func(state string) dict {
		t.Helper()
		for late := time.After(10 * time.Second); ; {
			select {
			case s := <-told:
				if s.Name != propertiesChanged || s.Body[0] != bus.HostInterface {
					t.Fatalf("%s %v", s.Name, s.Body)
				}
				if changed := s.Body[1].(dict); changed["State"].Value() == state {
					return changed
				}
			case <-late:
				t.Fatalf("nobody said that the host is %s", state)
			}
		}
	}
	read := func() {
		t.Helper()
		if err := o.call(bus.HostPath, "org.freedesktop.DBus.Properties.GetAll", bus.HostInterface).Err; err != nil {
			t.Fatal(err)
		}
	}

	dir := t.TempDir()
	tpm := exec.Command(testkit.Need(t, "swtpm"), "socket", "--tpm2", "--tpmstate", "dir="+dir, "--flags", "not-need-init,startup-clear",
		"--server", "type=unixio,path="+filepath.Join(o.root, "no-tpm"))
	tpm.SysProcAttr, tpm.WaitDelay = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}, time.Second
	if err := tpm.Start(); err != nil {
		t.Fatal(err)
	}
	for range 200 {
		if _, err := os.Stat(filepath.Join(o.root, "no-tpm")); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	// A start that went well shows that what was wrong is so no longer.
	o.s.verdict(f, domain.OpPrepare, nil, nil)
	await(hosttpm.Unprovisioned)

	tpm.Process.Kill()
	tpm.Wait()
	os.Remove(filepath.Join(o.root, "no-tpm"))
	o.s.verdict(f, domain.OpPrepare, reason.Refuse(reason.TPMFailed, "", "it does not answer"), nil)
	if changed := await(hosttpm.Absent); changed["Problem"].Value() == "" {
		t.Errorf("%v", changed)
	}
	// What is as it was is not news.
	for range 3 {
		o.s.statusMu.Lock()
		o.s.status.at = time.Time{} // so that the TPM is asked
		o.s.statusMu.Unlock()
		read()
	}
	select {
	case s := <-told:
		t.Errorf("announced once more: %v", s.Body)
	case <-time.After(200 * time.Millisecond):
	}
}
