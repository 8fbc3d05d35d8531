package hosttpm

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/hosttpm/policy"
)

// boot is a reboot of the host into a state, which is 0 for the provisioned
// one, and the start of what uses its keys.
func boot(t testing.TB, e *emulator, h *Host, state int) *Host {
	t.Helper()
	h.Close()
	e.Reset()
	for range state {
		e.extend(4)
	}
	return open(t, e.Socket, h.cfg.Dir)
}

func settles(t testing.TB, h *Host) Settled {
	t.Helper()
	s, err := h.Settle(t.Context())
	if err != nil {
		t.Fatal("Settle: ", err)
	}
	return s
}

// shut wants the keys not to be released.
func shut(t testing.TB, h *Host, when string) {
	t.Helper()
	if key, err := h.UnsealListKey(t.Context()); !errors.Is(err, ErrPolicy) {
		t.Fatalf("%s: UnsealListKey gives %d bytes, %v", when, len(key), err)
	}
}

func TestWaiver(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	before := h.Timings()
	if s := settles(t, h); s.Used != nil || s.Revocation || len(h.Timings()) != len(before) {
		t.Errorf("with nothing to settle: %+v, %v", s, h.Timings())
	}
	if err := h.Unwaive(t.Context()); !errors.Is(err, ErrNoWaiver) {
		t.Error("no waiver, taken back: ", err)
	}
	if err := h.Waive(t.Context(), "firmware"); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, waiverFile)
	old, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}

	// It is worth nothing in the boot in which it was given.
	e.extend(4)
	if s := settles(t, h); s.Used != nil {
		t.Errorf("in its own boot: %+v", s)
	}
	shut(t, h, "in the waiver's own boot")
	w, err := h.Waiver()
	if err != nil || w == nil {
		t.Fatal("the waiver is gone: ", err)
	}
	if byWaiver(t, h, w) == nil {
		t.Fatal("the TPM takes the waiver in its own boot")
	}

	h = boot(t, e, h, 2)
	shut(t, h, "before Settle")
	s := settles(t, h)
	if s.Used == nil || s.Used.Void || s.Used.Approved == nil || s.Used.Waiver.Note != "firmware" {
		t.Fatalf("at the next boot: %+v", s.Used)
	}
	works(t, h)
	if s := settles(t, h); s.Used != nil {
		t.Errorf("a second time: %+v", s)
	}
	if w, err := h.Waiver(); w != nil || err != nil {
		t.Errorf("it is still there: %+v, %v", w, err)
	}

	// The state that it approved stays approved; another is not, whoever puts the
	// waiver back.
	h = boot(t, e, h, 2)
	works(t, h)
	for range 2 {
		h = boot(t, e, h, 3)
		if err := os.WriteFile(file, old, 0o600); err != nil {
			t.Fatal(err)
		}
		w, err := h.Waiver()
		if err != nil || byWaiver(t, h, w) == nil {
			t.Fatal("the TPM takes the waiver twice, ", err)
		}
		if s := settles(t, h); s.Used == nil || !s.Used.Void || s.Used.Approved != nil {
			t.Fatalf("a used waiver that was put back: %+v", s.Used)
		}
		shut(t, h, "with a used waiver")
	}
	h = boot(t, e, h, 0)
	works(t, h)
}

// byWaiver tries the waiver, past all that this package sees to itself.
func byWaiver(t testing.TB, h *Host, w *policy.Waiver) error {
	t.Helper()
	_, err := do(t.Context(), h, func(c *client) ([]byte, error) {
		k := h.keys.Load()
		return c.unsealBy(k, k.listKey, func(_ *keySet, use func(tpm2.Session) error) error {
			return use(tpm2.Policy(tpm2.TPMAlgSHA256, nonceSize, c.satisfyWaiver(k, w)))
		})
	})
	return err
}

// A boot into an approved state uses the waiver up too, and it can be taken
// back; nobody has it for longer than some resets, and no older epoch.
func TestWaiverEnds(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	file := filepath.Join(dir, waiverFile)
	h := open(t, e.Socket, dir)
	for name, end := range map[string]func(){
		"an approved boot": func() {
			h = boot(t, e, h, 0)
			if s := settles(t, h); s.Used == nil || s.Used.Void || s.Used.Approved != nil {
				t.Fatalf("a boot that did not need it: %+v", s.Used)
			}
		},
		"taken back": func() {
			if err := h.Unwaive(t.Context()); err != nil {
				t.Fatal(err)
			}
		},
		"another one": func() {
			if err := h.Waive(t.Context(), "another"); err != nil {
				t.Fatal(err)
			}
			if err := h.Unwaive(t.Context()); err != nil {
				t.Fatal(err)
			}
		},
		"too many resets": func() {
			h.Close()
			for range maxResets {
				e.Reset()
				e.extend(5)
			}
		},
		"a revocation": func() {
			next := policy.State{Bank: "sha256", PCRs: map[uint][]byte{0: bytes.Repeat([]byte{1}, 32)}}
			if err := h.Approve(t.Context(), "", next); err != nil {
				t.Fatal(err)
			}
			if _, err := h.Revoke(t.Context(), false, next.ID()); err != nil {
				t.Fatal(err)
			}
			if w, err := h.Waiver(); w != nil || err != nil {
				t.Errorf("a revocation leaves %+v, %v", w, err)
			}
		},
	} {
		if err := h.Waive(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		old, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		end()
		h = boot(t, e, h, 5)
		if err := os.WriteFile(file, old, 0o600); err != nil {
			t.Fatal(err)
		}
		w, err := h.Waiver()
		if err != nil || byWaiver(t, h, w) == nil {
			t.Errorf("%s: the TPM takes the waiver, %v", name, err)
		}
		if s := settles(t, h); s.Used == nil || !s.Used.Void || s.Used.Approved != nil {
			t.Errorf("%s: %+v", name, s.Used)
		}
		shut(t, h, name)
		h = boot(t, e, h, 0)
		works(t, h)
	}
}

// Whatever cuts the use of a waiver short, the next start finds either the
// waiver or what it approved, and in the end it is used once.
func TestWaiverCutShort(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	stop := errors.New("stopped")
	for state, at := 1, 1; ; at++ {
		if err := h.Waive(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
		h = boot(t, e, h, state)
		n := 0
		h.store.done = func(string) error {
			if n++; n == at {
				return stop
			}
			return nil
		}
		_, err := h.Settle(t.Context())
		h.Close()
		h = open(t, e.Socket, dir)
		settles(t, h)
		works(t, h)
		if w, err := h.Waiver(); w != nil || err != nil {
			t.Fatalf("step %d: %+v, %v is left", at, w, err)
		}
		if err == nil {
			t.Logf("%d steps", at-1)
			return
		}
		h = boot(t, e, h, state+1)
		settles(t, h)
		shut(t, h, "after a waiver was used")
		h = boot(t, e, h, state)
		works(t, h)
		state++
	}
}
