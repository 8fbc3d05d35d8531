package daemon

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"virt-trust/internal/domain"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/imagefile"
	"virt-trust/internal/vtpm/label"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
)

var background = context.Background()

func TestNewVM(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f := h.vm(uuidA, false)
	key := h.start(f)
	h.write(uuidA, key)
	h.noted(uuidA)
	h.stop(f)
	h.belongs(f)
	r := h.g.peek().Get(uuidA)
	if r.State != list.Stored || r.Open || r.LabelPath != h.image(uuidA) || r.Generation != 1 {
		t.Errorf("%+v", r)
	}
	payload := testkit.Must[[]byte](t)(imagefile.ReadLabel(h.image(uuidA)))
	if l, err := label.Verify(payload, key); err != nil || l.VM != uuidA || l.Instance != h.dir(uuidA) {
		t.Errorf("%+v, %v", l, err)
	}

	h.tpm.unwraps = 0
	if again := h.start(f); !bytes.Equal(again, key) {
		t.Error("a warm start got another key")
	}
	if h.tpm.unwraps != 1 {
		t.Errorf("a warm start asked the TPM to decrypt %d times", h.tpm.unwraps)
	}
	h.decrypts(uuidA, key)
	h.stop(f)
}

func TestKeysOfTwoVMsDiffer(t *testing.T) {
	h := newHouse(t)
	a, b := h.vm(uuidA, false), h.vm(uuidB, false)
	h.prepare(a)
	h.mkdir(uuidA)
	h.prepare(b)
	h.mkdir(uuidB)
	s1, t1 := h.keys(uuidA)
	s2, t2 := h.keys(uuidB)
	for i, x := range [][]byte{s1, t1, s2, t2} {
		for _, y := range [][]byte{s1, t1, s2, t2}[i+1:] {
			if bytes.Equal(x, y) || len(x) != 32 {
				t.Error("keys are equal, or none")
			}
		}
	}
}

func TestAdoption(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f := h.vm(uuidA, true)
	old := testkit.Must[*os.File](t)(os.Open(h.state(uuidA)))
	defer old.Close()
	key := h.start(f)
	h.decrypts(uuidA, key)
	h.noPlain(uuidA)
	b := make([]byte, len(plainState(t)))
	if n, err := old.ReadAt(b, 0); err != nil || !bytes.Equal(b[:n], make([]byte, n)) {
		t.Error("the plain state was not overwritten", err)
	}
	h.stop(f)
	h.belongs(f)
}

// What plain swtpm left when it was killed goes with the plain state, also when
// an admin adopts.
func TestAdoptionDiscards(t *testing.T) {
	h := newHouse(t)
	f := h.vm(uuidA, true)
	torn := filepath.Join(h.dir(uuidA), "TMP2-00.permall")
	copyFile(t, h.state(uuidA), torn)
	testkit.Must[string](t)(h.g.Adopt(background, off(f), f, false))
	h.noPlain(uuidA)
	// And what Release left at its last step.
	copyFile(t, filepath.Join(made.dir, "tpm2", "tpm2-00.permall"), filepath.Join(h.dir(uuidA), ".virt-trust.new"))
	h.start(f)
	h.noPlain(uuidA)
}

// Each way in which a VM, its label and its vTPM can fail to belong together is
// refused with its code, changes nothing, and has a way back that works.
func TestRefusals(t *testing.T) {
	t.Parallel()
	repair := func(h *house, f *domain.Facts) error {
		_, err := h.g.Repair(background, off(f), f)
		return err
	}
	accept := func(h *house, f *domain.Facts) error {
		_, err := h.g.Accept(background, off(f), f)
		return err
	}
	adopt := func(h *house, f *domain.Facts) error {
		_, err := h.g.Adopt(background, off(f), f, false)
		return err
	}
	adoptNew := func(h *house, f *domain.Facts) error {
		_, err := h.g.Adopt(background, off(f), f, true)
		return err
	}
	byHand := func(do func(*house)) func(*house, *domain.Facts) error {
		return func(h *house, _ *domain.Facts) error { do(h); return nil }
	}
	planted := func(h *house) string { return filepath.Join(h.dir(uuidA), "tpm2-00.volatilestate") }
	for _, tt := range []struct {
		name   string
		tamper func(h *house, versions [][]byte)
		code   reason.Code
		mend   func(*house, *domain.Facts) error
		new    bool // the way back gives a new vTPM
	}{
		{"state edited", func(h *house, v [][]byte) { b := bytes.Clone(v[2]); b[50] ^= 1; h.put(uuidA, b) }, reason.VTPMChanged, repair, false},
		{"state truncated", func(h *house, v [][]byte) { h.put(uuidA, v[2][:100]) }, reason.VTPMChanged, repair, false},
		{"state zeroed", func(h *house, v [][]byte) { h.put(uuidA, make([]byte, len(v[2]))) }, reason.VTPMChanged, repair, false},
		{"state deleted", func(h *house, v [][]byte) { os.Remove(h.state(uuidA)) }, reason.VTPMMissing, repair, false},
		{"folder deleted", func(h *house, v [][]byte) { os.RemoveAll(filepath.Dir(h.dir(uuidA))) }, reason.VTPMMissing, repair, false},
		{"folder deleted, kept state too", func(h *house, v [][]byte) {
			os.RemoveAll(filepath.Dir(h.dir(uuidA)))
			os.Remove(filepath.Join(h.g.keepDir(uuidA), keptState))
		}, reason.VTPMMissing, adoptNew, true},
		{"last but one state", func(h *house, v [][]byte) { h.put(uuidA, v[1]) }, reason.VTPMRolledBack, repair, false},
		{"first state, accepted", func(h *house, v [][]byte) { h.put(uuidA, v[0]) }, reason.VTPMRolledBack, accept, false},
		{"replaced by a plain one", func(h *house, v [][]byte) { h.manufacture(uuidA) }, reason.VTPMChanged, repair, false},
		{"another VM's", func(h *house, v [][]byte) {
			f := h.vm(uuidB, true)
			h.start(f)
			h.stop(f)
			h.put(uuidA, h.read(uuidB))
		}, reason.VTPMChanged, repair, false},
		{"volatile state planted", func(h *house, v [][]byte) { os.WriteFile(planted(h), v[0], 0o600) }, reason.VTPMChanged,
			byHand(func(h *house) { os.Remove(planted(h)) }), false},
		{"state is a link", func(h *house, v [][]byte) {
			os.Rename(h.state(uuidA), h.state(uuidA)+".x")
			os.Rename(h.state(uuidA)+".x", filepath.Join(h.root, "elsewhere"))
			os.Symlink(filepath.Join(h.root, "elsewhere"), h.state(uuidA))
		}, reason.VTPMChanged, byHand(func(h *house) {
			os.Remove(h.state(uuidA))
			os.Rename(filepath.Join(h.root, "elsewhere"), h.state(uuidA))
		}), false},
		{"label removed", func(h *house, v [][]byte) { copyFile(h.t, filepath.Join(made.dir, "disk.qcow2"), h.image(uuidA)) }, reason.LabelMissing, repair, false},
		{"label removed, adopted", func(h *house, v [][]byte) { copyFile(h.t, filepath.Join(made.dir, "disk.qcow2"), h.image(uuidA)) }, reason.LabelMissing, adopt, false},
		{"label edited", func(h *house, v [][]byte) {
			p := testkit.Must[[]byte](h.t)(imagefile.ReadLabel(h.image(uuidA)))
			p[len(p)-1] ^= 1
			if err := imagefile.WriteLabel(h.image(uuidA), p); err != nil {
				h.t.Fatal(err)
			}
		}, reason.LabelDamaged, repair, false},
		{"label of another VM", func(h *house, v [][]byte) {
			f := h.vm(uuidB, true)
			h.start(f)
			h.stop(f)
			copyFile(h.t, h.image(uuidB), h.image(uuidA))
		}, reason.LabelOtherVM, adopt, false},
		{"label of another host", func(h *house, v [][]byte) {
			l := testkit.Must[*label.Label](h.t)(label.UntrustedParse(testkit.Must[[]byte](h.t)(imagefile.ReadLabel(h.image(uuidA)))))
			l.Recipients[0].BindKeyName[5] ^= 1
			p := testkit.Must[[]byte](h.t)(l.Seal(make([]byte, 32)))
			if err := imagefile.WriteLabel(h.image(uuidA), p); err != nil {
				h.t.Fatal(err)
			}
		}, reason.LabelOtherHost, repair, false},
		{"label garbage", func(h *house, v [][]byte) {
			if err := imagefile.WriteLabel(h.image(uuidA), []byte("garbage")); err != nil {
				h.t.Fatal(err)
			}
		}, reason.LabelDamaged, repair, false},
		{"image is gone", func(h *house, v [][]byte) { os.Rename(h.image(uuidA), h.image(uuidA)+".x") }, reason.LabelMissing,
			byHand(func(h *house) { os.Rename(h.image(uuidA)+".x", h.image(uuidA)) }), false},
		{"list deleted", func(h *house, v [][]byte) { os.Remove(liststore.Path(h.g.dirs.State)) }, reason.ListDamaged,
			byHand(func(h *house) { testkit.Must[string](h.t)(h.g.RepairList(background)) }), false},
		{"list edited", func(h *house, v [][]byte) {
			p := liststore.Path(h.g.dirs.State)
			b := testkit.Must[[]byte](h.t)(os.ReadFile(p))
			b[len(b)-1] ^= 1
			os.WriteFile(p, b, 0o600)
		}, reason.ListDamaged, byHand(func(h *house) { testkit.Must[string](h.t)(h.g.RepairList(background)) }), false},
		{"the host's state differs", func(h *house, v [][]byte) { h.tpm.say(&hosttpm.PolicyError{Differing: []uint{7}}) }, reason.HostNotApproved,
			byHand(func(h *house) { h.tpm.say(nil) }), false},
		{"TPM cleared", func(h *house, v [][]byte) { h.tpm.say(hosttpm.ErrCleared) }, reason.KeyNotReleased, byHand(func(h *house) { h.tpm.say(nil) }), false},
		{"TPM busy", func(h *house, v [][]byte) { h.tpm.say(hosttpm.ErrBusy) }, reason.TPMBusy, byHand(func(h *house) { h.tpm.say(nil) }), false},
		{"TPM locked out", func(h *house, v [][]byte) { h.tpm.say(hosttpm.ErrLockedOut) }, reason.TPMLockedOut, byHand(func(h *house) { h.tpm.say(nil) }), false},
		{"TPM gone", func(h *house, v [][]byte) { h.tpm.say(hosttpm.ErrAbsent) }, reason.TPMFailed, byHand(func(h *house) { h.tpm.say(nil) }), false},
		{"keys wrapped to another TPM", func(h *house, v [][]byte) { h.tpm.say(hosttpm.ErrCiphertext) }, reason.KeyNotReleased, byHand(func(h *house) { h.tpm.say(nil) }), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			f, key, versions := h.ran(uuidA)
			tt.tamper(h, versions)
			h.untouched(func() {
				refuses(t, h.prepare(f), tt.code)
				if _, err := h.g.Check(background, f); reason.As(err) == nil {
					t.Errorf("a dry run says %v", err)
				}
				if _, err := h.g.Redeem("swtpm", h.dir(uuidA), libvirts()); reason.As(err) == nil {
					t.Errorf("keys were given: %v", err)
				}
				// libvirt tells of the end of a start that was refused, too.
				h.stop(f)
				refuses(t, h.prepare(f), tt.code)
			})
			if err := tt.mend(h, f); err != nil {
				t.Fatal("the way back:", err)
			}
			got := h.start(f)
			if bytes.Equal(got, key) == tt.new {
				t.Errorf("after the way back the key is the old one: %v", !tt.new)
			}
			if !tt.new {
				h.decrypts(uuidA, key)
			}
			h.stop(f)
			h.belongs(f)
		})
	}
}

// A copy of an image, label and all, does not start another VM, nor does a
// label without its vTPM.
func TestUnknownVMs(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		set  func(*house)
		code reason.Code
		new  bool
	}{
		{"copied image", func(h *house) { copyFile(h.t, h.image(uuidA), h.image(uuidB)) }, reason.LabelOtherVM, false},
		{"copied image and state", func(h *house) {
			copyFile(h.t, h.image(uuidA), h.image(uuidB))
			h.mkdir(uuidB)
			copyFile(h.t, h.state(uuidA), h.state(uuidB))
		}, reason.LabelOtherVM, false},
		{"copied state", func(h *house) {
			h.vm(uuidB, false)
			h.mkdir(uuidB)
			copyFile(h.t, h.state(uuidA), h.state(uuidB))
		}, reason.VTPMUnknown, false},
		{"damaged state", func(h *house) { h.vm(uuidB, true); h.put(uuidB, make([]byte, 5000)) }, reason.VTPMUnknown, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHouse(t)
			h.ran(uuidA)
			tt.set(h)
			f := h.facts(uuidB)
			h.untouched(func() { refuses(t, h.prepare(f), tt.code) })
			if err := h.g.peek().Get(uuidB); err != nil {
				t.Error("it has a record")
			}
			_, err := h.g.Adopt(background, off(f), f, false)
			if _, e := os.Stat(h.state(uuidB)); e == nil {
				// Another VM's state, or a damaged one, is never taken in.
				refuses(t, err, map[bool]reason.Code{true: reason.VTPMUnknown, false: reason.KeyNotReleased}[tt.name == "damaged state"])
				os.RemoveAll(filepath.Dir(h.dir(uuidB)))
				_, err = h.g.Adopt(background, off(f), f, false)
			}
			if err != nil {
				t.Fatal(err)
			}
			h.start(f)
		})
	}
}

func TestAdoptEncryptedStateFromItsLabel(t *testing.T) {
	h := newHouse(t)
	f, key, _ := h.ran(uuidA)
	store := h.g.peek()
	if err := store.Commit(liststore.Change{Delete: uuidA}); err != nil {
		t.Fatal(err)
	}
	os.RemoveAll(h.g.keepDir(uuidA))
	h.untouched(func() { refuses(t, h.prepare(f), reason.VTPMUnknown) })
	what, err := h.g.Adopt(background, off(f), f, false)
	if err != nil || !strings.Contains(what, "from its label") {
		t.Fatal(what, err)
	}
	if got := h.start(f); !bytes.Equal(got, key) {
		t.Error("another key")
	}
	h.decrypts(uuidA, key)
}

func TestWhileItRuns(t *testing.T) {
	t.Parallel()
	t.Run("rolled back", func(t *testing.T) {
		h := newHouse(t)
		f, _, v := h.ran(uuidA)
		key := h.start(f)
		h.write(uuidA, key)
		h.noted(uuidA)
		good := h.read(uuidA)
		h.put(uuidA, v[1])
		h.stop(f)
		refuses(t, h.prepare(f), reason.VTPMRolledBack)
		testkit.Must[string](t)(h.g.Repair(background, off(f), f))
		h.start(f)
		if !bytes.Equal(h.read(uuidA), good) {
			t.Error("what was put back is not the newest")
		}
	})
	t.Run("forged", func(t *testing.T) {
		h := newHouse(t)
		f, _, _ := h.ran(uuidA)
		h.start(f)
		h.write(uuidA, bytes.Repeat([]byte{9}, 32))
		h.stop(f)
		refuses(t, h.prepare(f), reason.VTPMChanged)
		testkit.Must[string](t)(h.g.Repair(background, off(f), f))
		h.start(f)
	})
	t.Run("replaced between prepare and QEMU", func(t *testing.T) {
		for _, what := range []string{"older", "forged", "deleted", "the VM's own"} {
			h := newHouse(t)
			f, _, v := h.ran(uuidA)
			if err := h.prepare(f); err != nil {
				t.Fatal(err)
			}
			key, _ := h.keys(uuidA)
			switch what {
			case "older":
				h.put(uuidA, v[0])
			case "forged":
				h.write(uuidA, bytes.Repeat([]byte{9}, 32))
			case "the VM's own": // which nobody remembers: swtpm has not begun to write
				h.write(uuidA, key)
			case "deleted": // swtpm would make a blank one
				os.Remove(h.state(uuidA))
			}
			if r := reason.As(h.g.Launched(f)); r == nil || r.Code != reason.VTPMChanged {
				t.Errorf("%s: %v", what, r)
			}
			h.stop(f)
			if h.prepare(f) == nil {
				t.Errorf("%s: the next start takes it", what)
			}
		}
	})
	t.Run("swtpm without the wrapper", func(t *testing.T) {
		h := newHouse(t)
		f, _, _ := h.ran(uuidA)
		if err := h.prepare(f); err != nil {
			t.Fatal(err)
		}
		refuses(t, h.g.Launched(f), reason.KeyNotReleased)
	})
}

// virt-trustd can be killed and started again while VMs run.
func TestRestartWhileAVMRuns(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, v := h.ran(uuidA)
	key := h.start(f)
	end := h.holder(uuidA)
	h.write(uuidA, key)
	h.noted(uuidA)
	h.reboot()
	h.tpm.unwraps = 0
	if err := h.g.resume(background); err != nil {
		t.Fatal(err)
	}
	if h.tpm.unwraps != 0 {
		t.Error("to take up running VMs took the TPM, which a host full of VMs has to wait for")
	}
	if r := h.g.peek().Get(uuidA); h.g.stateOf(r) != list.Running {
		t.Errorf("the VM is %s", h.g.stateOf(r))
	}
	h.write(uuidA, key)
	h.noted(uuidA)
	h.untouched(func() {
		refuses(t, h.prepare(f), reason.PolicyForbids) // a second swtpm
		for _, verb := range []func() (string, error){
			func() (string, error) { return h.g.Release(background, off(f), f) },
			func() (string, error) { return h.g.Repair(background, off(f), f) },
			func() (string, error) { return h.g.Accept(background, off(f), f) },
			func() (string, error) { return h.g.Adopt(background, off(f), f, true) },
		} {
			_, err := verb()
			refuses(t, err, reason.PolicyForbids)
		}
	})
	end()
	h.stop(f)
	h.belongs(f)

	// And once more, with the VM's end while no virt-trustd runs.
	h.write(uuidA, h.start(f))
	h.noted(uuidA)
	h.write(uuidA, key)
	h.g.Close()
	h.boot()
	h.later(12 * time.Minute) // a VM that was started a moment ago may be starting
	if err := h.g.resume(background); err != nil {
		t.Fatal(err)
	}
	h.belongs(f)
	h.start(f)
	h.g.Close()

	// A crash is no way to an older state.
	h.put(uuidA, v[2])
	h.boot()
	if err := h.g.resume(background); err != nil {
		t.Fatal(err)
	}
	refuses(t, h.prepare(f), reason.VTPMRolledBack)
}

// While the TPM is away, a state that cannot be verified is not noted as good.
func TestRestartWithoutTPM(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, v := h.ran(uuidA)
	h.start(f)
	end := h.holder(uuidA)
	h.reboot()
	if err := h.g.resume(background); err != nil {
		t.Fatal(err)
	}
	h.tpm.say(hosttpm.ErrAbsent)
	h.write(uuidA, bytes.Repeat([]byte{9}, 32))
	time.Sleep(50 * time.Millisecond)
	if b, _ := h.g.kept(uuidA, keptState); !bytes.Equal(b, v[2]) {
		t.Error("a forged state was kept as good")
	}
	h.tpm.say(nil)
	end()
	h.stop(f)
	refuses(t, h.prepare(f), reason.VTPMChanged)
	testkit.Must[string](t)(h.g.Repair(background, off(f), f))
	h.start(f)
}

func TestPowerCut(t *testing.T) {
	t.Parallel()
	// cut leaves a VM that was running, with one more write than was settled.
	cut := func(t *testing.T, change ...func(*config.Config)) (*house, *domain.Facts, []byte, [][]byte) {
		h := newHouse(t)
		f, _, v := h.ran(uuidA)
		key := h.start(f)
		h.write(uuidA, key)
		h.noted(uuidA)
		v = append(v, h.read(uuidA))
		h.g.Close()
		h.boot(change...)
		return h, f, key, v
	}
	strict := func(c *config.Config) { c.Policy.CrashRecovery = "strict" }

	t.Run("zeros", func(t *testing.T) {
		for _, what := range [][]byte{make([]byte, 6000), {}} { // ext4, XFS
			h, f, key, v := cut(t)
			h.put(uuidA, what)
			h.start(f)
			if !bytes.Equal(h.read(uuidA), v[3]) {
				t.Error("not the newest that was kept")
			}
			h.decrypts(uuidA, key)
			h.stop(f)
			h.belongs(f)
		}
	})
	t.Run("zeros, the last one noted but not kept", func(t *testing.T) {
		h, f, key, v := cut(t)
		h.g.keep(uuidA, keptState, v[2])
		h.put(uuidA, make([]byte, 6000))
		h.start(f)
		h.decrypts(uuidA, key)
		if !bytes.Equal(h.read(uuidA), v[2]) {
			t.Error("not the one that was kept")
		}
		h.stop(f)
		h.put(uuidA, v[3]) // is older now
		refuses(t, h.prepare(f), reason.VTPMRolledBack)
	})
	t.Run("one write ahead", func(t *testing.T) {
		h, f, key, _ := cut(t)
		h.write(uuidA, key)
		h.start(f)
		h.decrypts(uuidA, key)
	})
	t.Run("one write ahead, strict", func(t *testing.T) {
		h, f, key, _ := cut(t, strict)
		h.write(uuidA, key)
		h.untouched(func() {
			refuses(t, h.prepare(f), reason.VTPMRolledBack)
			h.stop(f) // must not take for right what was refused
			refuses(t, h.prepare(f), reason.VTPMRolledBack)
		})
		testkit.Must[string](t)(h.g.Accept(background, off(f), f))
		h.start(f)
		h.decrypts(uuidA, key)
	})
	t.Run("used to roll back", func(t *testing.T) {
		for i := range 3 {
			h, f, _, v := cut(t)
			h.put(uuidA, v[i])
			h.untouched(func() {
				refuses(t, h.prepare(f), reason.VTPMRolledBack)
				h.stop(f)
				refuses(t, h.prepare(f), reason.VTPMRolledBack)
			})
			testkit.Must[string](t)(h.g.Repair(background, off(f), f))
			h.start(f)
			if !bytes.Equal(h.read(uuidA), v[3]) {
				t.Error("what was put back is not the newest")
			}
		}
	})
	t.Run("in the first start", func(t *testing.T) {
		h := newHouse(t)
		f := h.vm(uuidA, false)
		if err := h.prepare(f); err != nil {
			t.Fatal(err)
		}
		h.reboot()
		h.mkdir(uuidA)
		h.put(uuidA, make([]byte, 6000))
		r := refuses(t, h.prepare(f), reason.VTPMChanged)
		if !strings.Contains(r.Mend, "remove it") {
			t.Error(r.Mend)
		}
		os.Remove(h.state(uuidA))
		h.start(f)
	})
}

func TestTPMSaysNoToANewVM(t *testing.T) {
	h := newHouse(t)
	testkit.Must[*liststore.Store](t)(h.g.List(background))
	f := h.vm(uuidA, true)
	h.tpm.say(&hosttpm.PolicyError{Differing: []uint{4, 7}})
	h.untouched(func() {
		r := refuses(t, h.prepare(f), reason.HostNotApproved)
		if !strings.Contains(r.What, "4, 7") {
			t.Error(r.What)
		}
	})
}

func TestDeadline(t *testing.T) {
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	h.tpm.delay = time.Minute
	ctx, cancel := context.WithTimeout(background, 20*time.Millisecond)
	defer cancel()
	refuses(t, h.g.Prepare(ctx, f, cgroup, nil), reason.TPMBusy)
}

func TestRepairList(t *testing.T) {
	t.Parallel()
	t.Run("from memory, rolled back", func(t *testing.T) {
		h := newHouse(t)
		p := liststore.Path(h.g.dirs.State)
		f := h.vm(uuidA, true)
		h.start(f)
		h.stop(f)
		old := testkit.Must[[]byte](t)(os.ReadFile(p))
		h.start(f)
		h.stop(f)
		os.WriteFile(p, old, 0o600)
		h.untouched(func() { refuses(t, h.prepare(f), reason.ListRolledBack) })
		testkit.Must[string](t)(h.g.RepairList(background))
		h.start(f)
	})
	t.Run("from labels", func(t *testing.T) {
		h := newHouse(t)
		a, key, _ := h.ran(uuidA)
		b := h.vm(uuidB, true)
		h.start(b)
		h.stop(b)
		os.RemoveAll(filepath.Dir(h.dir(uuidB))) // is not mounted, say
		h.g.Close()
		os.WriteFile(liststore.Path(h.g.dirs.State), []byte("garbage"), 0o600)
		h.boot()
		h.untouched(func() { refuses(t, h.prepare(a), reason.ListDamaged) })
		what := testkit.Must[string](t)(h.g.RepairList(background))
		if !strings.Contains(what, "2 VMs") {
			t.Error(what)
		}
		if got := h.start(a); !bytes.Equal(got, key) {
			t.Error("another key")
		}
		h.decrypts(uuidA, key)
		h.stop(a)
		h.belongs(a)
		// A missing state must not become a blank vTPM in silence.
		refuses(t, h.prepare(b), reason.VTPMMissing)
		testkit.Must[string](t)(h.g.Repair(background, off(b), b))
		h.decrypts(uuidB, h.start(b))
	})
	t.Run("nothing to do", func(t *testing.T) {
		h := newHouse(t)
		if what, err := h.g.RepairList(background); err != nil || !strings.Contains(what, "nothing") {
			t.Error(what, err)
		}
	})
}

func TestRelease(t *testing.T) {
	t.Parallel()
	release := func(h *house, f *domain.Facts) error {
		_, err := h.g.Release(background, off(f), f)
		return err
	}
	t.Run("and back", func(t *testing.T) {
		h := newHouse(t)
		f, _, _ := h.ran(uuidA)
		if err := release(h, f); err != nil {
			t.Fatal(err)
		}
		released(h, f)
		h.stop(f)
		h.g.report("", "", "", noted, "", "", "")
		if _, err := os.Stat(h.g.keepDir(uuidA)); err == nil {
			t.Error("something of it is kept")
		}
		testkit.Must[string](t)(h.g.Adopt(background, off(f), f, false))
		h.decrypts(uuidA, h.start(f))
	})
	t.Run("never started", func(t *testing.T) {
		h := newHouse(t)
		f := h.vm(uuidA, false)
		if err := h.prepare(f); err != nil {
			t.Fatal(err)
		}
		_, err := h.g.Release(background, off(f), f)
		refuses(t, err, reason.PolicyForbids) // it is being started
		h.stop(f)
		if err := release(h, f); err != nil {
			t.Fatal(err)
		}
		h.manufacture(uuidA)
		released(h, f)
	})
	t.Run("never seen", func(t *testing.T) {
		h := newHouse(t)
		f := h.vm(uuidA, true)
		if err := release(h, f); err != nil {
			t.Fatal(err)
		}
		released(h, f)
	})
	t.Run("image in use", func(t *testing.T) {
		h := newHouse(t)
		f, key, _ := h.ran(uuidA)
		end := h.useImage(uuidA)
		before := h.read(uuidA)
		refuses(t, release(h, f), reason.PolicyForbids)
		if !bytes.Equal(before, h.read(uuidA)) {
			t.Error("the state was decrypted although the VM was not released")
		}
		end()
		h.decrypts(uuidA, h.start(f))
		h.stop(f)
		if err := release(h, f); err != nil {
			t.Fatal(err)
		}
		released(h, f)
		_ = key
	})
	t.Run("with a managed save", func(t *testing.T) {
		h := newHouse(t)
		f, _, _ := h.ran(uuidA)
		d := off(f)
		d.ManagedSave = true
		h.untouched(func() {
			_, err := h.g.Release(background, d, f)
			refuses(t, err, reason.PolicyForbids)
		})
	})
	t.Run("tampered", func(t *testing.T) {
		h := newHouse(t)
		f, _, v := h.ran(uuidA)
		h.put(uuidA, v[0])
		h.untouched(func() { refuses(t, release(h, f), reason.VTPMRolledBack) })
	})
}

// useImage locks an image as a QEMU that reads it does.
func (h *house) useImage(uuid string) (end func()) {
	h.t.Helper()
	f := testkit.Must[*os.File](h.t)(os.Open(h.image(uuid)))
	lockAsQEMU(h.t, f)
	return func() { f.Close() }
}

func TestImageInUse(t *testing.T) {
	h := newHouse(t)
	f := h.vm(uuidA, true)
	end := h.useImage(uuidA)
	key := h.start(f) // the label waits
	h.stop(f)
	if r := h.g.peek().Get(uuidA); len(r.PendingLabel) == 0 {
		t.Fatal("no label waits")
	}
	end()
	h.start(f)
	h.stop(f)
	h.belongs(f)
	h.decrypts(uuidA, key)
}

func TestDelete(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	s := &Service{g: h.g, log: h.g.log}
	s.ended(background, uuidA, "the VM was undefined")
	if h.g.peek().Get(uuidA) == nil {
		t.Fatal("deleted although its state was kept")
	}
	os.RemoveAll(filepath.Dir(h.dir(uuidA)))

	// A file system that is not mounted is no deletion.
	root := h.g.cfg.Swtpm.StateRoot
	os.Rename(root, root+".away")
	s.ended(background, uuidA, "libvirt does not have the VM any more")
	if h.g.peek().Get(uuidA) == nil {
		t.Fatal("keys were erased because a file system was away")
	}
	os.Rename(root+".away", root)

	s.ended(background, uuidA, "the VM was undefined")
	if h.g.peek().Get(uuidA) != nil {
		t.Fatal("it is still there")
	}
	if _, err := imagefile.ReadLabel(h.image(uuidA)); !errors.Is(err, imagefile.ErrNoLabel) {
		t.Error("the label is still there:", err)
	}
	if _, err := os.Stat(h.g.keepDir(uuidA)); err == nil {
		t.Error("something of it is kept")
	}
	files, _ := filepath.Glob(filepath.Join(h.g.dirs.State, "deleted", uuidA+".*.json"))
	if len(files) != 1 {
		t.Fatal(files)
	}
	var st Statement
	if err := json.Unmarshal(testkit.Must[[]byte](t)(os.ReadFile(files[0])), &st); err != nil {
		t.Fatal(err)
	}
	signed := st.Signed
	st.Signed = nil
	digest := sha256.Sum256(testkit.Must[[]byte](t)(json.Marshal(st)))
	if st.VM != uuidA || !ecdsa.VerifyASN1(&h.tpm.sig.PublicKey, digest[:], signed) {
		t.Errorf("%+v", st)
	}

	// The name may be used again at once.
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	s.ended(background, uuidA, "libvirt did not have it a moment ago")
	if h.g.peek().Get(uuidA) == nil {
		t.Error("the record of a VM that is being started was deleted")
	}
}

func TestLibvirtsOwnEncryption(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.vm(uuidA, false)
	f := factsIn(h.root, uuidA, "<encryption secret='11111111-2222-4333-8444-555555555555'/>")
	h.manufacture(uuidA)
	theirs := bytes.Repeat([]byte{5}, 32)
	os.RemoveAll(h.dir(uuidA))
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	h.mkdir(uuidA)
	if state, _ := h.keys(uuidA); state != nil {
		t.Fatal("keys of ours were given")
	}
	h.write(uuidA, theirs)
	h.noted(uuidA) // also in the first run, for which libvirt makes the folder
	if err := h.g.Launched(f); err != nil {
		t.Fatal(err)
	}
	h.write(uuidA, theirs)
	h.noted(uuidA)
	old := h.read(uuidA)
	h.write(uuidA, theirs)
	h.noted(uuidA)
	h.stop(f)
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	h.stop(f)
	h.put(uuidA, old)
	h.untouched(func() { refuses(t, h.prepare(f), reason.VTPMRolledBack) })
	h.untouched(func() { refuses(t, h.prepare(h.facts(uuidA)), reason.PolicyForbids) })
}

func TestTwoVMsOneFolder(t *testing.T) {
	h := newHouse(t)
	h.prepare(h.vm(uuidA, false)) // has no state yet
	h.vm(uuidB, false)
	f := factsIn(h.root, uuidB, "<source type='dir' path='"+h.dir(uuidA)+"'/>")
	h.untouched(func() { refuses(t, h.prepare(f), reason.VTPMChanged) })
}

func TestAudit(t *testing.T) {
	t.Parallel()
	audit := func(c *config.Config) { c.Mode = "audit" }
	t.Run("an older state runs, and stays an older one", func(t *testing.T) {
		h := newHouse(t)
		f, key, v := h.ran(uuidA)
		h.reboot(audit)
		h.put(uuidA, v[1])
		h.start(f)
		h.stop(f)
		if !strings.Contains(h.logged(), wouldRefuse) {
			t.Error("nothing is said of it")
		}
		h.reboot()
		refuses(t, h.prepare(f), reason.VTPMRolledBack)
		h.put(uuidA, v[2])
		h.start(f)
		h.decrypts(uuidA, key)
	})
	t.Run("after a crash too", func(t *testing.T) {
		h := newHouse(t)
		f, key, v := h.ran(uuidA)
		h.start(f)
		h.write(uuidA, key)
		h.noted(uuidA)
		h.reboot(audit)
		h.put(uuidA, v[2])
		h.start(f)
		h.stop(f)
		h.reboot()
		refuses(t, h.prepare(f), reason.VTPMRolledBack)
	})
	t.Run("a VM that is not guarded starts without a TPM", func(t *testing.T) {
		h := newHouse(t)
		g, _, _ := h.ran(uuidB)
		h.reboot(audit)
		f := h.vm(uuidA, true)
		h.tpm.say(hosttpm.ErrAbsent)
		if key := h.start(f); key != nil {
			t.Error("it got keys")
		}
		if !bytes.Equal(h.read(uuidA), plainState(t)) {
			t.Error("its state was changed")
		}
		refuses(t, h.prepare(g), reason.TPMFailed) // which needs its keys
	})
}

// What many VMs, hostile or not, bring must not stay in memory.
func TestNothingStaysInMemory(t *testing.T) {
	h := newHouse(t)
	for i := range 100 {
		id := fmt.Sprintf("cccccccc-0000-4000-8000-%012d", i)
		h.mkdir(id)
		h.put(id, []byte("garbage"))
		f := h.facts(id)
		h.g.Restoring(f)
		err := h.prepare(f)
		refuses(t, err, reason.VTPMUnknown)
		h.g.lastRefusal(id, reason.As(err))
		h.stop(f)
	}
	g := h.g
	if n := len(g.vms) + len(g.grants) + len(g.sessions) + len(g.restore) + len(g.verdicts); n != 0 {
		t.Errorf("%d things stay: %d %d %d %d %d", n, len(g.vms), len(g.grants), len(g.sessions), len(g.restore), len(g.verdicts))
	}
}

// A start that libvirt gave up without a word is closed.
func TestSweep(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	h.g.sweep(background)
	if r := h.g.peek().Get(uuidA); !r.Open {
		t.Fatal("a start under way was closed")
	}
	h.later(12 * time.Minute)
	h.g.sweep(background)
	if r := h.g.peek().Get(uuidA); r.Open || len(h.g.sessions) != 0 {
		t.Error("it is still open")
	}
	h.belongs(f)

	// swtpm takes its lock a while after `start`: until then a VM that starts looks
	// like one that does not run, also to a virt-trustd that is started anew.
	h.start(f)
	h.g.sweep(background)
	if r := h.g.peek().Get(uuidA); !r.Open || len(h.g.sessions) != 1 {
		t.Fatal("a start under way was closed")
	}
	h.reboot()
	if err := h.g.resume(background); err != nil {
		t.Fatal(err)
	}
	if r := h.g.peek().Get(uuidA); !r.Open {
		t.Fatal("a start under way was closed")
	}
	// A running VM that nobody watches is taken up.
	end := h.holder(uuidA)
	h.g.sweep(background)
	if len(h.g.sessions) != 1 {
		t.Error("it is not watched")
	}
	end()
	h.reboot()
	testkit.Must[*liststore.Store](t)(h.g.List(background))
	h.later(12 * time.Minute)
	h.g.sweep(background)
	if r := h.g.peek().Get(uuidA); r.Open {
		t.Error("it is still open")
	}
}

// Everything at once, for the race detector.
func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	ids := []string{uuidA, uuidB}
	for _, id := range ids {
		h.vm(id, true)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	around := func(do func(id string)) {
		for _, id := range ids {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						do(id)
					}
				}
			})
		}
	}
	around(func(id string) {
		f := h.facts(id)
		if h.prepare(f) != nil {
			return
		}
		if r, err := h.g.Redeem("swtpm", h.dir(id), libvirts()); err == nil {
			r.Close()
		}
		h.g.Launched(f)
		b := h.read(id)
		os.WriteFile(h.state(id)+"x", b, 0o600)
		os.Rename(h.state(id)+"x", h.state(id))
		h.g.Stopped(background, f, false)
	})
	around(func(id string) { h.g.Check(background, h.facts(id)); h.g.setState(id, list.Suspended) })
	around(func(id string) { h.g.settled(h.dir(id)); h.g.settleAll() })
	around(func(id string) { f := h.facts(id); h.g.Repair(background, off(f), f) })
	around(func(id string) { h.g.sweep(background); h.g.resume(background); h.g.listState() })
	around(func(id string) { (&Service{g: h.g, log: h.g.log}).renamed(id, fmt.Sprint(time.Now().UnixNano())) })
	time.Sleep(300 * time.Millisecond)
	close(stop)
	wg.Wait()
	for _, id := range ids {
		h.stop(h.facts(id))
		h.decrypts(id, h.start(h.facts(id)))
	}
	// Its end, with a write under way.
	go h.g.settled(h.dir(uuidA))
	h.g.Close()
}

// A vTPM that nothing can be done with does not lock its VM out for ever: on
// the admin's word it is set aside, whole, and the VM gets a new one.
func TestStartOver(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func(h *house, whole []byte) (left []byte)
		code   reason.Code
	}{
		{"forged", func(h *house, whole []byte) []byte {
			whole[len(whole)/2] ^= 1
			return whole
		}, reason.VTPMChanged},
		{"unknown and encrypted for another host", func(h *house, whole []byte) []byte {
			f := h.facts(uuidA)
			if _, err := h.g.Release(background, off(f), f); err != nil {
				t.Fatal(err)
			}
			return whole
		}, reason.VTPMUnknown},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHouse(t)
			f, _, _ := h.ran(uuidA)
			left := tt.damage(h, bytes.Clone(h.read(uuidA)))
			h.put(uuidA, left)
			if tt.code == reason.VTPMUnknown {
				if err := h.g.peek().Commit(liststore.Change{Delete: uuidA}); err != nil {
					t.Fatal(err)
				}
			}
			refuses(t, h.prepare(f), tt.code)
			h.untouched(func() {
				if _, err := h.g.Adopt(background, off(f), f, false); reason.As(err) == nil {
					t.Errorf("adopted: %v", err)
				}
			})
			if _, err := h.g.Adopt(background, off(f), f, true); err != nil {
				t.Fatal(err)
			}
			aside, err := filepath.Glob(filepath.Join(h.g.dirs.State, "set-aside", uuidA+".*"))
			if err != nil || len(aside) != 1 {
				t.Fatalf("set aside: %v, %v", aside, err)
			}
			if b, err := os.ReadFile(aside[0]); err != nil || !bytes.Equal(b, left) {
				t.Errorf("what was set aside is not what there was: %v", err)
			}
			if err := h.prepare(f); err != nil {
				t.Errorf("no new start: %v", err)
			}
		})
	}
}
