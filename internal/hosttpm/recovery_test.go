package hosttpm

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"virt-trust/internal/testkit"
)

// secrets gives copies of what WithSecrets shows.
func secrets(t testing.TB, h *Host) (listKey, policyKey []byte) {
	t.Helper()
	err := h.WithSecrets(t.Context(), func(l, p []byte) error {
		listKey, policyKey = bytes.Clone(l), bytes.Clone(p)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return listKey, policyKey
}

// With another TPM the keys are dead; a new set takes the old list key over,
// and the old policy key says nothing any more.
func TestReprovision(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	listKey, policyKey := secrets(t, h)
	if err := h.Waive(t.Context(), "an update"); err != nil {
		t.Fatal(err)
	}
	bind, policyName := h.BindKeyName(), h.PolicyKeyName()
	h.Close()
	e.Stop()

	e = startEmulator(t)
	h = open(t, e.Socket, dir)
	if err := h.WithSecrets(t.Context(), func(_, _ []byte) error { return nil }); !errors.Is(err, ErrCleared) {
		t.Fatalf("with another TPM: %v", err)
	}
	if err := h.Reprovision(t.Context(), listKey[1:]); err == nil {
		t.Fatal("31 bytes are taken for a list key")
	}
	if err := h.Reprovision(t.Context(), listKey); err != nil {
		t.Fatal(err)
	}
	works(t, h)
	if w, err := h.store.waiver(h.keys.Load()); w != nil || err != nil {
		t.Errorf("the old policy key's waiver: %v, %v", w, err)
	}
	got, newPolicy := secrets(t, h)
	if !bytes.Equal(got, listKey) {
		t.Error("another list key")
	}
	if bytes.Equal(newPolicy, policyKey) || bytes.Equal(h.PolicyKeyName(), policyName) || bytes.Equal(h.BindKeyName(), bind) {
		t.Error("old keys go on")
	}
	h.Close()
	h = open(t, e.Socket, dir)
	works(t, h)
	if old, _ := filepath.Glob(filepath.Join(dir, setAsideDir, "*", keysDir, "bind.pem")); len(old) != 1 {
		t.Errorf("set aside: %v", old)
	}
}

// Damaged key files are no obstacle: that is what recovery is for.
func TestReprovisionDamaged(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	listKey, _ := secrets(t, h)
	h.Close()
	if err := (store{dir: dir}).write(filepath.Join(dir, keysDir, "bind.pem"), []byte("x")); err != nil {
		t.Fatal(err)
	}
	h = open(t, e.Socket, dir)
	if _, err := h.UnsealListKey(t.Context()); !errors.Is(err, ErrFailed) {
		t.Fatal(err)
	}
	if err := h.Reprovision(t.Context(), listKey); err != nil {
		t.Fatal(err)
	}
	works(t, h)
}

// Whatever step the exchange of key sets is cut off after, there is the old
// set, the new one or none that could be used, and the same call ends it.
func TestExchangeCrash(t *testing.T) {
	t.Parallel()
	_, dir, other := startMade(t)
	old, err := store{dir: dir}.load()
	if err != nil {
		t.Fatal(err)
	}
	k, err := store{dir: other}.load()
	if err != nil {
		t.Fatal(err)
	}
	crash := errors.New("crash")
	var cut []string
	for n := 1; ; n++ {
		s, steps := store{dir: filepath.Join(testkit.Folder(t), "keys")}, 0
		if err := os.CopyFS(s.dir, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		s.done = func(path string) error {
			if steps++; steps == n {
				cut = append(cut, filepath.Base(path))
				return crash
			}
			return nil
		}
		err := s.exchange(k, time.Now())
		s.done = nil
		if err != nil && !errors.Is(err, crash) {
			t.Fatalf("step %d: %v", n, err)
		}
		got, loaded := s.load()
		switch {
		case loaded != nil && err == nil:
			t.Fatal(loaded)
		case loaded != nil: // none; the old one lies aside
		case !bytes.Equal(got.bind.name, k.bind.name) && !bytes.Equal(got.bind.name, old.bind.name):
			t.Fatalf("step %d: neither the old set nor the new one", n)
		}
		if err == nil {
			break
		}
		if err := s.exchange(k, time.Now()); err != nil {
			t.Fatalf("again after step %d: %v", n, err)
		}
		if got, err := s.load(); err != nil || !bytes.Equal(got.bind.name, k.bind.name) || len(got.policies) != len(k.policies) {
			t.Fatalf("again after step %d: %v", n, err)
		}
		if aside, _ := filepath.Glob(filepath.Join(s.dir, setAsideDir, "*", keysDir, "bind.pem")); len(aside) == 0 {
			t.Fatalf("step %d: the old keys are gone", n)
		}
	}
	if len(cut) < 12 || !slices.Contains(cut, stagingDir) {
		t.Errorf("cut off after: %v", cut)
	}
}
