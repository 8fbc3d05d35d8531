package hosttpm

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/hosttpm/policy"
)

// state is the host's n-th state, see boot.
func state(t testing.TB, e *emulator, h *Host, n int) policy.State {
	t.Helper()
	h = boot(t, e, h, n)
	s, err := h.PCRs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	h.Close()
	return s
}

// approvedHost is one with states 0, 1 and 2, all approved, and in state 0.
func approvedHost(t testing.TB) (*emulator, *Host, [3]policy.State) {
	t.Helper()
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	var s [3]policy.State
	for i := range s {
		s[i] = state(t, e, h, i)
	}
	h = boot(t, e, h, 0)
	if err := h.Approve(t.Context(), "test", s[1], s[2]); err != nil {
		t.Fatal(err)
	}
	return e, h, s
}

func TestRevoke(t *testing.T) {
	t.Parallel()
	e, h, s := approvedHost(t)
	dir := h.cfg.Dir
	saved := filepath.Join(t.TempDir(), "saved")
	if err := os.CopyFS(saved, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"", "123", "0123456789abcdef"} {
		if _, err := h.Revoke(t.Context(), false, id); !errors.Is(err, ErrUnknownState) {
			t.Errorf("revoking %q: %v", id, err)
		}
	}
	if _, err := h.Revoke(t.Context(), false, s[0].ID()); !errors.Is(err, ErrCurrentState) {
		t.Errorf("revoking the state that the host is in: %v", err)
	}
	works(t, h)
	gone, err := h.Revoke(t.Context(), false, s[1].ID()[:6])
	if err != nil || len(gone) != 1 || gone[0].ID() != s[1].ID() {
		t.Fatalf("Revoke gives %v, %v", gone, err)
	}
	works(t, h)
	if now, err := h.States(t.Context()); err != nil || len(now.Approved) != 2 || now.Match == nil || now.Match.ID() != s[0].ID() {
		t.Fatalf("States gives %+v, %v", now, err)
	}
	h = boot(t, e, h, 2)
	works(t, h)
	h = boot(t, e, h, 1)
	shut(t, h, "in the revoked state")

	// With the files of before the revocation, over or in place of those of now.
	if err := os.CopyFS(dir+"2", os.DirFS(saved)); err != nil {
		t.Fatal(err)
	}
	h.Close()
	old := open(t, e.Socket, dir+"2")
	shut(t, old, "with the old files")
	old.Close()
	entries, err := os.ReadDir(filepath.Join(saved, policiesDir))
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		b, err := os.ReadFile(filepath.Join(saved, policiesDir, entry.Name()))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, policiesDir, entry.Name()), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	h = open(t, e.Socket, dir)
	settles(t, h)
	shut(t, h, "with the old files put back")
	h = boot(t, e, h, 0)
	works(t, h)

	// By force also the one that the host is in.
	if _, err := h.Revoke(t.Context(), true, s[0].ID()); err != nil {
		t.Fatal(err)
	}
	shut(t, h, "in the state that was revoked by force")
	h = boot(t, e, h, 2)
	works(t, h)
}

// Whatever cuts a revocation short, after each change on the disk and before
// and after each time that the counter is raised: what stays approved opens the
// keys, and once the revocation is done, or is done again, the revoked state does
// not, with none of the files that ever were.
func TestRevokeCutShort(t *testing.T) {
	t.Parallel()
	e, h, s := approvedHost(t)
	dir := h.cfg.Dir
	stop := errors.New("stopped")
	attic := t.TempDir() // every policy that was ever on the disk
	keep := func(string) error {
		entries, err := os.ReadDir(filepath.Join(dir, policiesDir))
		if err != nil {
			return err
		}
		for _, entry := range entries {
			b, err := os.ReadFile(filepath.Join(dir, policiesDir, entry.Name()))
			if err == nil {
				err = os.WriteFile(filepath.Join(attic, entry.Name()), b, 0o600)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	p := startProxy(t, e)
	for at := 1; ; at++ {
		n, raised := 0, false
		h.Close()
		h = open(t, p.sock, dir)
		h.store.done = func(path string) error {
			if err := keep(path); err != nil {
				return err
			}
			if n++; n == at {
				return stop
			}
			return nil
		}
		p.set(func(x *proxied) error {
			if x.cc == tpm2.TPMCCNVIncrement {
				raised = true
			}
			return nil
		})
		_, err := h.Revoke(t.Context(), false, s[2].ID())
		if err == nil {
			t.Logf("%d steps", at-1)
			return
		}
		h.Close()
		h = open(t, e.Socket, dir)
		settles(t, h)
		works(t, h)
		if now, err := h.States(t.Context()); err != nil || len(now.Approved) != 3 && len(now.Approved) != 2 {
			t.Fatalf("step %d: States gives %+v, %v", at, now, err)
		} else if len(now.Approved) == 3 && raised {
			t.Fatalf("step %d: the epoch is another, and all are approved", at)
		} else if len(now.Approved) == 3 {
			if _, err := h.Revoke(t.Context(), false, s[2].ID()); err != nil {
				t.Fatalf("step %d: again: %v", at, err)
			}
		}
		h = boot(t, e, h, 1)
		works(t, h)
		h.Close()
		var back []string
		entries, err := os.ReadDir(attic)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			name := filepath.Join(dir, policiesDir, entry.Name())
			if _, err := os.Stat(name); err == nil {
				continue
			}
			b, err := os.ReadFile(filepath.Join(attic, entry.Name()))
			if err == nil {
				err = os.WriteFile(name, b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			back = append(back, name)
		}
		if len(back) == 0 {
			t.Fatalf("step %d: no file of a revoked state was kept", at)
		}
		h = boot(t, e, open(t, e.Socket, dir), 2)
		settles(t, h)
		shut(t, h, "in the revoked state")
		for _, name := range back {
			os.Remove(name)
			os.Remove(filepath.Join(attic, filepath.Base(name)))
		}
		h = boot(t, e, h, 0)
		works(t, h)
		if err := h.Approve(t.Context(), "test", s[2]); err != nil {
			t.Fatal(err)
		}
	}
}
