package daemon

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"virt-trust/internal/testkit"
)

// A disk as a power cut may leave it. It is told each call of an operation, and
// gives every tree that can lie there if the power goes after that call: of
// each file the data that was not synced is there, or not, or zeros, write for
// write; of each folder the makings, renames and removals since its last sync
// are there up to any one of them. That is less than any file system promises.
type disk struct {
	folders map[string]*diskFolder
	open    map[string]*diskFile // by descriptor and path
}

type diskFolder struct {
	safe, now map[string]*diskFile
	since     []map[string]*diskFile // now, after each call since the last sync
}

// diskFile is a file, or a folder below, which has no bytes of its own.
type diskFile struct {
	folder    bool
	safe, now []byte
	since     []diskWrite
}

type diskWrite struct {
	at  int
	b   []byte
	cut bool // to at bytes
}

func (w diskWrite) on(b []byte) []byte {
	if w.cut {
		return append(slices.Clone(b[:min(w.at, len(b))]), make([]byte, max(0, w.at-len(b)))...)
	}
	b = append(slices.Clone(b), make([]byte, max(0, w.at+len(w.b)-len(b)))...)
	copy(b[w.at:], w.b)
	return b
}

// readDisk takes what lies at root as safe.
func readDisk(t *testing.T, root string) *disk {
	t.Helper()
	d := &disk{folders: map[string]*diskFolder{}, open: map[string]*diskFile{}}
	err := filepath.WalkDir(root, func(p string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		f := &diskFile{folder: e.IsDir()}
		if f.folder {
			d.folders[p] = &diskFolder{now: map[string]*diskFile{}}
		} else if f.now, err = os.ReadFile(p); err != nil {
			return err
		}
		f.safe = f.now
		if p != root {
			d.folders[filepath.Dir(p)].now[filepath.Base(p)] = f
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range d.folders {
		f.safe = maps.Clone(f.now)
	}
	return d
}

func (d *disk) change(folder string, do func(map[string]*diskFile)) {
	f := d.folders[folder]
	if f == nil {
		return // none of ours
	}
	f.now = maps.Clone(f.now)
	do(f.now)
	f.since = append(f.since, f.now)
}

func (d *disk) at(path string) *diskFile {
	if f := d.folders[filepath.Dir(path)]; f != nil {
		return f.now[filepath.Base(path)]
	}
	return nil
}

// unsynced makes the file at path one that was just written and renamed there,
// in the place of one with the bytes old.
func (d *disk) unsynced(path string, old []byte) {
	f := d.at(path)
	before := &diskFile{safe: old, now: old}
	d.folders[filepath.Dir(path)].safe[filepath.Base(path)] = before
	d.folders[filepath.Dir(path)].since = []map[string]*diskFile{d.folders[filepath.Dir(path)].now}
	f.safe, f.since = nil, []diskWrite{{b: f.now}}
}

func (f *diskFile) write(w diskWrite) {
	f.now = w.on(f.now)
	f.since = append(f.since, w)
}

// call takes one line of strace -y -xx; it reports whether it changed anything.
func (d *disk) call(line string) bool {
	name, rest, ok := strings.Cut(line, "(")
	args, result, ok2 := cutLast(rest, ") = ")
	if !ok || !ok2 || strings.HasPrefix(result, "-1") {
		return false
	}
	a := splitArgs(args)
	switch name {
	case "openat":
		p := joinAt(a[0], a[1])
		if strings.Contains(a[2], "O_CREAT") && d.at(p) == nil {
			d.change(filepath.Dir(p), func(m map[string]*diskFile) { m[filepath.Base(p)] = &diskFile{} })
		} else if f := d.at(p); f != nil && strings.Contains(a[2], "O_TRUNC") && len(f.now) > 0 {
			f.write(diskWrite{cut: true})
		}
		fd, _, _ := strings.Cut(result, "<")
		if f := d.at(p); f != nil {
			d.open[fd] = f
		} else {
			delete(d.open, fd)
		}
		return strings.Contains(a[2], "O_CREAT")
	case "write", "pwrite64":
		fd, _, _ := strings.Cut(a[0], "<")
		f := d.open[fd]
		if f == nil || d.at(tracedPath(a[0])) != f {
			return false
		}
		w := diskWrite{at: len(f.now), b: []byte(unquote(a[1]))}
		if name == "pwrite64" {
			w.at, _ = strconv.Atoi(a[3])
		}
		f.write(w)
	case "ftruncate":
		fd, _, _ := strings.Cut(a[0], "<")
		n, _ := strconv.Atoi(a[1])
		if f := d.open[fd]; f != nil {
			f.write(diskWrite{at: n, cut: true})
		}
	case "fsync":
		p := tracedPath(a[0])
		if f := d.folders[p]; f != nil {
			f.safe, f.since = maps.Clone(f.now), nil
			return true
		}
		fd, _, _ := strings.Cut(a[0], "<")
		if f := d.open[fd]; f != nil {
			f.safe, f.since = f.now, nil
		}
	case "mkdirat":
		p := joinAt(a[0], a[1])
		d.change(filepath.Dir(p), func(m map[string]*diskFile) { m[filepath.Base(p)] = &diskFile{folder: true} })
		d.folders[p] = &diskFolder{safe: map[string]*diskFile{}, now: map[string]*diskFile{}}
	case "renameat":
		from, to := joinAt(a[0], a[1]), joinAt(a[2], a[3])
		f := d.at(from)
		if f == nil {
			return false
		}
		d.change(filepath.Dir(to), func(m map[string]*diskFile) { delete(m, filepath.Base(from)); m[filepath.Base(to)] = f })
	case "unlinkat":
		p := joinAt(a[0], a[1])
		if d.at(p) == nil {
			return false
		}
		d.change(filepath.Dir(p), func(m map[string]*diskFile) { delete(m, filepath.Base(p)) })
	default:
		return false
	}
	return true
}

// tree is a disk after a power cut: bytes by path, nil for a folder.
type tree map[string][]byte

// cuts gives all trees that a power cut may leave now.
func (d *disk) cuts(root string) []tree {
	trees := []tree{{}}
	var walk func(path string)
	walk = func(path string) {
		f := d.folders[path]
		var next []tree
		versions := append([]map[string]*diskFile{f.safe}, f.since...)
		for _, v := range versions {
			part := []tree{{}}
			for _, name := range slices.Sorted(maps.Keys(v)) {
				p := filepath.Join(path, name)
				if v[name].folder {
					for _, t := range part {
						t[p] = nil
					}
					continue
				}
				var with []tree
				for _, b := range v[name].versions() {
					for _, t := range part {
						t = maps.Clone(t)
						t[p] = append([]byte{}, b...)
						with = append(with, t)
					}
				}
				part = with
			}
			for _, t := range trees {
				for _, q := range part {
					t := maps.Clone(t)
					maps.Copy(t, q)
					next = append(next, t)
				}
			}
		}
		trees = next
		for _, name := range slices.Sorted(maps.Keys(d.folders)) {
			if filepath.Dir(name) == path && name != path {
				walk(name)
			}
		}
	}
	walk(root)
	return trees
}

// versions are the bytes that a power cut may leave of a file.
func (f *diskFile) versions() (all [][]byte) {
	zeros := make([]byte, len(f.now))
	all = append(all, f.safe)
	for pick := range 1 << min(len(f.since), 6) {
		b := f.safe
		for i, w := range f.since {
			if pick>>i&1 == 1 || i >= 6 {
				b = w.on(b)
			}
		}
		all = append(all, b)
	}
	if len(f.since) > 0 && len(f.safe) == 0 {
		all = append(all, zeros)
	}
	slices.SortFunc(all, bytes.Compare)
	return slices.CompactFunc(all, bytes.Equal)
}

// lay makes root hold the tree, with the modes of what lies at like. What was
// in memory, the run-time folder, is gone.
func (t tree) lay(tb testing.TB, root string) {
	tb.Helper()
	os.RemoveAll(root)
	for _, p := range slices.Sorted(maps.Keys(t)) {
		if t[p] == nil || strings.HasPrefix(p, filepath.Join(root, "run")+"/") {
			continue
		}
		if !t.reaches(root, p) {
			continue // its folder is gone
		}
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			tb.Fatal(err)
		}
		if err := os.WriteFile(p, t[p], 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	for _, p := range slices.Sorted(maps.Keys(t)) {
		if t[p] == nil && t.reaches(root, p) {
			os.MkdirAll(p, 0o755)
		}
	}
}

func (t tree) reaches(root, p string) bool {
	for dir := filepath.Dir(p); dir != root; dir = filepath.Dir(dir) {
		if _, there := t[dir]; !there {
			return false
		}
	}
	return true
}

func (t tree) digest() (sum [32]byte) {
	h := sha256.New()
	for _, p := range slices.Sorted(maps.Keys(t)) {
		fmt.Fprintf(h, "%s %v %d\n", p, t[p] == nil, len(t[p]))
		h.Write(t[p])
	}
	return [32]byte(h.Sum(nil))
}

// The power goes after any call of any operation. Whatever is left, the VM
// starts with its vTPM, by itself or by the way that its refusal names.
func TestPowerCutAtEachWrite(t *testing.T) {
	makings(t)
	var cases atomic.Int64
	t.Cleanup(func() {
		figures(t, "power cuts: %d different disks, 0 vTPMs lost, 0 wrongly started, 0 refused without a way back", cases.Load())
	})
	for _, tt := range scenes {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h, f, _ := tt.before(t)
			d := readDisk(t, h.root)
			check := tt.check
			if tt.op == "write" || tt.op == "stop" {
				// swtpm itself syncs nothing.
				kept, err := h.g.kept(uuidA, keptState)
				if err != nil {
					t.Fatal(err)
				}
				d.unsynced(h.state(uuidA), kept)
				check = guarded
			}
			calls := h.calls(tt.op)
			seen := map[[32]byte]bool{}
			cut := func(after string) {
				for _, tree := range d.cuts(h.root) {
					if seen[tree.digest()] {
						continue
					}
					seen[tree.digest()] = true
					if len(seen)%80 != 1 && !allFaults {
						continue
					}
					cases.Add(1)
					tree.lay(t, h.root)
					h.boot()
					if tt.op == "prepare" || tt.op == "stop" || tt.op == "write" {
						h.startsItself(f)
					}
					check(h, f)
					h.g.Close()
					if t.Failed() {
						t.Fatalf("the power went after %s", after)
					}
				}
			}
			cut("nothing")
			for i, c := range calls {
				if d.call(c) {
					cut(fmt.Sprintf("call %d of %d, %.120s", i, len(calls), unquote(c)))
				}
			}
			if len(seen) < 4 {
				t.Errorf("only %d disks", len(seen))
			}
			t.Log(len(seen), "disks")
		})
	}
}

// calls carries an operation out and gives what it did to files.
func (h *house) calls(op string) (all []string) {
	h.t.Helper()
	trace := filepath.Join(h.t.TempDir(), "trace")
	words, err := h.inChild(op, "--seccomp-bpf", "-y", "-xx", "-s", "1000000", "-o", trace, "-e", "signal=none",
		"-e", "trace=openat,write,pwrite64,ftruncate,fsync,mkdirat,renameat,unlinkat")
	if err != nil {
		h.t.Fatalf("%s: %v: %s", op, err, words)
	}
	main := ""
	for line := range strings.Lines(string(testkit.Must[[]byte](h.t)(os.ReadFile(trace)))) {
		pid, rest, _ := strings.Cut(line, " ")
		if main == "" {
			main = pid
		}
		if pid == main {
			all = append(all, strings.TrimSpace(rest))
		}
	}
	return all
}

// unquote undoes what strace -xx does to strings and paths.
func unquote(s string) string {
	s = strings.Trim(s, `"`)
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && s[i+1] == 'x' {
			n, _ := strconv.ParseUint(s[i+2:i+4], 16, 8)
			b.WriteByte(byte(n))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// tracedPath is the path that strace -y shows with a descriptor.
func tracedPath(fd string) string {
	_, p, _ := strings.Cut(fd, "<")
	return unquote(strings.TrimSuffix(p, ">"))
}

func joinAt(fd, name string) string {
	name = unquote(name)
	if filepath.IsAbs(name) {
		return filepath.Clean(name)
	}
	return filepath.Join(tracedPath(fd), name)
}

func splitArgs(s string) (all []string) {
	for _, a := range strings.Split(s, ", ") {
		all = append(all, strings.TrimSpace(a))
	}
	return all
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}
