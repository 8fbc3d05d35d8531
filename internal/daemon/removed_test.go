package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"virt-trust/internal/vtpm/reason"
)

// A VM that is undefined is forgotten at once, without libvirt's word; a vTPM
// that is deleted is missing.
func TestRemoved(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	h.g.dirs.Domains = filepath.Join(h.root, "qemu")
	os.Mkdir(h.g.dirs.Domains, 0o755)
	define := func(name string) string {
		t.Helper()
		path := filepath.Join(h.g.dirs.Domains, name+".xml")
		if err := os.WriteFile(path, fmt.Appendf(nil, domainXML, name, uuidA, h.image(uuidA), ""), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	ctx, cancel := context.WithCancel(background)
	defer cancel()
	s := &Service{g: h.g, log: h.g.log}
	go s.watchRemovals(ctx)
	folder, away := filepath.Dir(h.dir(uuidA)), filepath.Join(h.root, "away")
	if err := os.CopyFS(away, os.DirFS(folder)); err != nil {
		t.Fatal(err)
	}

	// Under its own name, or another: a rename takes the old name last.
	for _, name := range []string{f.Name, "renamed"} {
		path := define(name)
		os.RemoveAll(folder)
		time.Sleep(50 * time.Millisecond)
		h.untouched(func() { refuses(t, h.prepare(f), reason.VTPMMissing) })
		if err := os.CopyFS(folder, os.DirFS(away)); err != nil {
			t.Fatal(err)
		}
		os.Remove(path)
	}
	// A folder that cannot be read says nothing.
	os.Rename(h.g.dirs.Domains, h.g.dirs.Domains+".away")
	os.RemoveAll(folder)
	time.Sleep(50 * time.Millisecond)
	if h.g.peek().Get(uuidA) == nil {
		t.Fatal("forgotten although libvirt's definitions are not there")
	}
	os.Rename(h.g.dirs.Domains+".away", h.g.dirs.Domains)

	// Nor do definitions that are all gone.
	h.ran(uuidB)
	os.RemoveAll(folder)
	time.Sleep(50 * time.Millisecond)
	s.removed(ctx, uuidA)
	if h.g.peek().Get(uuidA) == nil {
		t.Fatal("forgotten by a libvirt that has lost its own folder")
	}
	os.WriteFile(filepath.Join(h.g.dirs.Domains, "vm-b.xml"), fmt.Appendf(nil, domainXML, "vm-b", uuidB, "", ""), 0o600)

	// Until the watch stands, again and again.
	for range 100 {
		os.MkdirAll(folder, 0o755)
		os.Remove(folder)
		time.Sleep(20 * time.Millisecond)
		if h.g.peek().Get(uuidA) == nil {
			break
		}
	}
	define(f.Name)
	if err := h.prepare(f); err != nil {
		t.Errorf("a VM that was defined anew: %v", err)
	}
}

// A link to the hook that leads nowhere counts as none, as it does to libvirt.
func TestHookMissing(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "virt-trust-hook")
	s := &Service{programs: Programs{Link: filepath.Join(dir, "50-virt-trust")}}
	check := func(want bool) {
		t.Helper()
		if state := s.libvirtState(); (state == "hook-missing") != want {
			t.Error(state)
		}
	}
	check(true)
	if err := os.Symlink(program, s.programs.Link); err != nil {
		t.Fatal(err)
	}
	check(true)
	if err := os.WriteFile(program, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	check(false)
}
