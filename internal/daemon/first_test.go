package daemon

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"virt-trust/internal/platform/config"
	"virt-trust/internal/vtpm/reason"
)

// A virt-trustd that is started anew while swtpm_setup makes a vTPM has no grant
// for the rest of it: that start fails, with a reason. Whatever swtpm_setup has
// left by then, and whether libvirt removes that, the next start succeeds
// without an admin, and the vTPM is guarded from there on.
func TestRestartedWhileTheVTPMIsMade(t *testing.T) {
	t.Parallel()
	for _, strict := range []bool{false, true} {
		for writes := range 3 { // of swtpm until then
			for _, locked := range []bool{false, true} {
				for _, removed := range []bool{false, true} {
					t.Run(fmt.Sprintf("%d writes, strict %v, locked %v, removed %v", writes, strict, locked, removed), func(t *testing.T) {
						t.Parallel()
						restartedAt(t, writes, func(c *config.Config) {
							if strict {
								c.Policy.CrashRecovery = "strict"
							}
						}, locked, removed)
					})
				}
			}
		}
	}
}

// A virt-trustd that is asked to end waits for the starts that are under way, and
// for none that libvirt gave up.
func TestEndsAfterStarts(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f := h.vm(uuidA, false)
	took := func(meanwhile func()) time.Duration {
		began, done := time.Now(), make(chan struct{})
		go func() { h.g.awaitStarts(time.Second); close(done) }()
		meanwhile()
		<-done
		return time.Since(began)
	}
	if d := took(func() {}); d > 500*time.Millisecond {
		t.Errorf("with nothing under way it takes %v", d)
	}
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	if d := took(func() {}); d < time.Second {
		t.Errorf("it waits %v for a start", d)
	}
	d := took(func() {
		time.Sleep(50 * time.Millisecond)
		h.mkdir(uuidA)
		if _, err := h.g.Redeem("swtpm", h.dir(uuidA), libvirts()); err != nil {
			t.Error(err)
		}
		if err := h.g.Launched(f); err != nil {
			t.Error(err)
		}
	})
	if d > 900*time.Millisecond {
		t.Errorf("it waits %v although the VM runs", d)
	}
	h.stop(f)
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	h.later(time.Duration(h.g.cfg.Grant.Lifetime) + time.Second)
	if d := took(func() {}); d > 500*time.Millisecond {
		t.Errorf("for one that has expired it waits %v", d)
	}
}

func restartedAt(t *testing.T, writes int, conf func(*config.Config), locked, removed bool) {
	h := newHouse(t)
	h.reboot(conf)
	f := h.vm(uuidA, false)
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	h.mkdir(uuidA)
	setup := exec.Command("sleep", "60")
	setup.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := setup.Start(); err != nil {
		t.Fatal(err)
	}
	r, err := h.g.Redeem("swtpm_setup", h.dir(uuidA), &caller{pid: setup.Process.Pid, cgroup: cgroup})
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	key := stateKey(h.g.sessions[uuidA].keys)
	key = append([]byte{}, key...)
	end := func() {}
	if locked {
		end = h.holder(uuidA)
	}
	for range writes {
		h.write(uuidA, key)
		time.Sleep(20 * time.Millisecond) // virt-trustd sees it
	}
	h.reboot(conf)
	if err := h.g.resume(background); err != nil {
		t.Fatal(err)
	}
	if writes > 0 && !removed { // swtpm_setup goes on with what it has
		h.write(uuidA, key)
		time.Sleep(20 * time.Millisecond)
	}
	_, err = h.g.Redeem("swtpm", h.dir(uuidA), libvirts())
	refuses(t, err, reason.KeyNotReleased)
	end()
	setup.Process.Kill()
	setup.Wait()
	if removed {
		os.RemoveAll(filepath.Dir(h.dir(uuidA)))
	}
	h.stop(f)

	again := h.start(f)
	h.write(uuidA, again)
	h.noted(uuidA)
	h.stop(f)
	h.start(f)
	h.stop(f)
	h.belongs(f)
	os.RemoveAll(filepath.Dir(h.dir(uuidA)))
	refuses(t, h.prepare(f), reason.VTPMMissing)
}
