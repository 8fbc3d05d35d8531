package liststore

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"virt-trust/internal/vtpm/list"
)

var key = bytes.Repeat([]byte{1}, list.KeySize)

func newStore(t testing.TB) (s *Store, dir, run string) {
	t.Helper()
	dir, run = t.TempDir(), t.TempDir()
	s, err := Open(t.Context(), dir, run, key, Rollback{})
	if err != nil {
		t.Fatal(err)
	}
	return s, dir, run
}

func put(id string) Change { return Change{Put: &list.Record{UUID: id, Name: "vm " + id}} }

func TestCommit(t *testing.T) {
	s, dir, run := newStore(t)
	if err := s.Commit(put("a"), put("b")); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(Change{Delete: "a"}); err != nil {
		t.Fatal(err)
	}
	s, err := Open(t.Context(), dir, run, key, Rollback{})
	if err != nil {
		t.Fatal(err)
	}
	if s.Get("a") != nil || s.Find("vm b") == nil || len(s.All()) != 1 || s.Check() != nil {
		t.Fatal(s.All())
	}
}

// A record that was committed is the store's own.
func TestCommitKeepsNoCallersRecord(t *testing.T) {
	s, dir, run := newStore(t)
	c := put("a")
	if err := s.Commit(c); err != nil {
		t.Fatal(err)
	}
	c.Put.Name = "changed"
	if err := s.Commit(put("b")); err != nil {
		t.Fatal(err)
	}
	onDisk, err := Open(t.Context(), dir, run, key, Rollback{})
	if err != nil || s.Get("a").Name != "vm a" || onDisk.Get("a").Name != "vm a" {
		t.Fatal(s.Get("a").Name, err)
	}
}

func TestManyCommitsAtOnce(t *testing.T) {
	s, dir, run := newStore(t)
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			if err := s.Commit(put(fmt.Sprint(i))); err != nil {
				t.Error(err)
			}
			if s.Get(fmt.Sprint(i)) == nil {
				t.Error("committed, and not there")
			}
		})
	}
	wg.Wait()
	s, err := Open(t.Context(), dir, run, key, Rollback{})
	if err != nil || len(s.All()) != 50 {
		t.Fatal(err)
	}
}

func TestDetection(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func(path string, older []byte)
		want   error
	}{
		{"deleted", func(p string, _ []byte) { os.Remove(p) }, ErrMissing},
		{"edited", func(p string, _ []byte) {
			b, _ := os.ReadFile(p)
			b[len(b)-1] ^= 1
			os.WriteFile(p, b, 0o600)
		}, ErrDamaged},
		{"emptied", func(p string, _ []byte) { os.WriteFile(p, nil, 0o600) }, ErrDamaged},
		{"a link", func(p string, _ []byte) { os.Remove(p); os.Symlink("/dev/zero", p) }, ErrDamaged},
		{"older", func(p string, older []byte) { os.WriteFile(p, older, 0o600) }, ErrRolledBack},
		{"copied over itself", func(p string, _ []byte) {
			b, _ := os.ReadFile(p)
			os.Remove(p)
			os.WriteFile(p, b, 0o600)
		}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, dir, run := newStore(t)
			older, _ := os.ReadFile(Path(dir))
			if err := s.Commit(put("a")); err != nil {
				t.Fatal(err)
			}
			tt.damage(Path(dir), older)
			if err := s.Check(); !errors.Is(err, tt.want) {
				t.Fatalf("while running: %v, want %v", err, tt.want)
			}
			if _, err := Open(t.Context(), dir, run, key, Rollback{}); !errors.Is(err, tt.want) {
				t.Fatalf("after a restart: %v, want %v", err, tt.want)
			}
			// The two ways back.
			if err := s.Rewrite(); err != nil || s.Check() != nil {
				t.Fatal(err)
			}
			tt.damage(Path(dir), older)
			n, err := Rebuild(t.Context(), dir, run, key, Rollback{}, s.All())
			if err != nil || n.Get("a") == nil || n.Generation() < s.Generation() {
				t.Fatal(err)
			}
			if n, err = Open(t.Context(), dir, run, key, Rollback{}); err != nil || n.Get("a") == nil {
				t.Fatal(err)
			}
		})
	}
}

func TestOtherKey(t *testing.T) {
	_, dir, run := newStore(t)
	if _, err := Open(t.Context(), dir, run, bytes.Repeat([]byte{2}, list.KeySize), Rollback{}); !errors.Is(err, ErrDamaged) || !errors.Is(err, list.ErrKey) {
		t.Fatal(err)
	}
}

// What a write that failed leaves is the old list, in memory and on disk.
func TestFailedWrite(t *testing.T) {
	s, dir, _ := newStore(t)
	if err := s.Commit(put("a")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, fileName+".new"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(put("b")); err == nil {
		t.Fatal("no error")
	}
	if s.Get("b") != nil || s.Get("a") == nil || s.Check() != nil {
		t.Fatal("half a commit")
	}
	os.Remove(filepath.Join(dir, fileName+".new"))
	if err := s.Commit(put("b")); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkCommit1000(b *testing.B) {
	s, _, _ := newStore(b)
	var all []Change
	for i := range 1000 {
		r := &list.Record{UUID: fmt.Sprintf("3f2c1c1e-0000-4000-8000-%012d", i), Name: fmt.Sprint("vm", i), Instance: "/var/lib/libvirt/swtpm/3f2c1c1e-0000-4000-8000-000000000000/tpm2", WrappedKeys: make([]byte, 256), LabelPath: "/var/lib/libvirt/images/vm.qcow2"}
		for j := range list.MaxHistory {
			r.Remember(list.Digest{byte(j)}, 1)
		}
		all = append(all, Change{Put: r})
	}
	if err := s.Commit(all...); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := s.Commit(all[0]); err != nil {
			b.Fatal(err)
		}
	}
}
