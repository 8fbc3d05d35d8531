package measure

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// needed is what a program's libraries were when program and loader cache were
// these.
type needed struct {
	program, cache id
	libraries      []string
}

// swtpmLibraries gives the files of libtpms and libswtpm that the dynamic
// loader would map for a program (ld.so(8)): by the program's own search path,
// then by the loader's cache, then from the standard folders. Nothing is run for
// it, as ldd does.
func (m *Measurer) swtpmLibraries(program string) ([]string, error) {
	var st, cache unix.Stat_t
	if err := unix.Stat(program, &st); err != nil {
		return nil, err
	}
	cacheFile := m.LoaderCache
	if cacheFile == "" {
		cacheFile = "/etc/ld.so.cache"
	}
	_ = unix.Stat(cacheFile, &cache)
	m.mu.Lock()
	n, ok := m.libraries[program]
	m.mu.Unlock()
	if ok && n.program == idOf(&st) && n.cache == idOf(&cache) && !slices.ContainsFunc(n.libraries, gone) {
		return n.libraries, nil
	}
	b, err := os.ReadFile(cacheFile)
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	entries, _ := parseLoaderCache(b) // where it is none, the loader passes over it too
	n = needed{program: idOf(&st), cache: idOf(&cache)}
	seen := map[string]bool{}
	for todo := []string{program}; len(todo) > 0; todo = todo[1:] {
		libs, err := direct(todo[0], entries)
		if err != nil {
			return nil, err
		}
		for _, l := range libs {
			if !seen[l] {
				seen[l] = true
				n.libraries, todo = append(n.libraries, l), append(todo, l)
			}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.libraries == nil {
		m.libraries = map[string]needed{}
	}
	m.libraries[program] = n
	return n.libraries, nil
}

func gone(file string) bool {
	_, err := os.Lstat(file)
	return err != nil
}

// direct gives the libraries of libtpms and libswtpm that an ELF file itself asks
// for. A script asks for none.
func direct(file string, cache []cached) (libs []string, err error) {
	r, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	magic := make([]byte, len(elf.ELFMAG))
	if _, err := r.ReadAt(magic, 0); err != nil || string(magic) != elf.ELFMAG {
		return nil, nil
	}
	f, err := elf.NewFile(r)
	if err != nil {
		return nil, err
	}
	names, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		paths, _ := f.DynString(tag)
		for _, p := range paths {
			for _, d := range filepath.SplitList(p) {
				d = strings.NewReplacer("${ORIGIN}", filepath.Dir(file), "$ORIGIN", filepath.Dir(file)).Replace(d)
				dirs = append(dirs, d)
			}
		}
	}
	fits := func(p string) bool {
		l, err := elf.Open(p)
		if err != nil {
			return false
		}
		defer l.Close()
		return l.Class == f.Class && l.Machine == f.Machine
	}
	for _, name := range names {
		if !strings.HasPrefix(name, "libtpms") && !strings.HasPrefix(name, "libswtpm") {
			continue
		}
		var found []string
		for _, d := range dirs {
			if p := filepath.Join(d, name); len(found) == 0 && fits(p) {
				found = []string{p}
			}
		}
		if len(found) == 0 { // of variants for several processors, each may be the one
			for _, c := range cache {
				if c.name == name && fits(c.path) {
					found = append(found, c.path)
				}
			}
		}
		for _, d := range []string{"/lib64", "/usr/lib64", "/lib", "/usr/lib"} {
			if p := filepath.Join(d, name); len(found) == 0 && fits(p) {
				found = []string{p}
			}
		}
		if len(found) == 0 {
			return nil, errors.New("there is no " + name)
		}
		for _, p := range found {
			if p, err = filepath.EvalSymlinks(p); err != nil {
				return nil, err
			}
			libs = append(libs, p)
		}
	}
	return libs, nil
}

// cached is one entry of the loader's cache.
type cached struct{ name, path string }

const (
	cacheMagic  = "glibc-ld.so.cache1.1"
	cacheHeader = 48
	cacheEntry  = 24
	maxCached   = 1 << 16
)

// parseLoaderCache reads /etc/ld.so.cache (glibc, sysdeps/generic/dl-cache.h,
// struct cache_file_new), in the byte order of this machine. An older format may
// stand before it.
func parseLoaderCache(b []byte) ([]cached, error) {
	at := bytes.Index(b, []byte(cacheMagic))
	if at < 0 {
		return nil, errors.New("not a cache of the dynamic loader")
	}
	b = b[at:]
	if len(b) < cacheHeader {
		return nil, errors.New("the cache of the dynamic loader is cut off")
	}
	n := binary.NativeEndian.Uint32(b[len(cacheMagic):])
	if n > maxCached || cacheHeader+int(n)*cacheEntry > len(b) {
		return nil, errors.New("the cache of the dynamic loader has too many entries")
	}
	text := func(at uint32) (string, bool) {
		if int64(at) >= int64(len(b)) {
			return "", false
		}
		s, _, ok := bytes.Cut(b[at:min(int64(len(b)), int64(at)+unix.PathMax)], []byte{0})
		return string(s), ok
	}
	var all []cached
	for i := range int(n) {
		e := b[cacheHeader+i*cacheEntry:]
		name, ok := text(binary.NativeEndian.Uint32(e[4:]))
		path, ok2 := text(binary.NativeEndian.Uint32(e[8:]))
		if !ok || !ok2 {
			return nil, errors.New("the cache of the dynamic loader is damaged")
		}
		if strings.HasPrefix(name, "libtpms") || strings.HasPrefix(name, "libswtpm") {
			all = append(all, cached{name, path})
		}
	}
	return all, nil
}
