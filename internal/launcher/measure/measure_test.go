package measure

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/domain"
	"virt-trust/internal/testkit"
)

// put writes a file of a test, long enough ago for its digest to be remembered.
func put(t testing.TB, name, content string) string {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(content), 0o755)); err != nil {
		t.Fatal(err)
	}
	return name
}

func link(t testing.TB, to, name string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.Symlink(to, name)); err != nil {
		t.Fatal(err)
	}
}

// TestTargets lays out a host in a folder.
func TestTargets(t *testing.T) {
	root := t.TempDir()
	in := func(name string) string { return filepath.Join(root, name) }
	put(t, in("usr/bin/qemu-real"), "qemu")
	link(t, "qemu-real", in("usr/bin/qemu"))
	put(t, in("usr/lib64/qemu/accel.so"), "module")
	put(t, in("usr/lib/modules/ui.so.1"), "module")
	link(t, "../modules/ui.so.1", in("usr/lib/qemu/ui.so"))
	put(t, in("usr/lib/qemu/notes.txt"), "none")
	put(t, in("usr/bin/swtpm"), "#!swtpm")
	put(t, in("usr/bin/swtpm_setup"), "#!setup")
	wrapper := put(t, in("libexec/wrapper"), "wrapper")
	for _, p := range []string{"swtpm", "swtpm_setup"} {
		link(t, wrapper, in("libexec/bin/"+p))
	}
	put(t, in("fw/code.fd"), "code")
	put(t, in("fw/vars.fd"), "vars")
	put(t, in("fw/ms.fd"), "vars of Microsoft")
	const d = `{"interface-types":["uefi"],"mapping":{"device":"flash","executable":{"filename":%q},"nvram-template":{"filename":%q}},
		"targets":[{"architecture":"x86_64","machines":["pc-q35-*"]}],"features":[%s]}`
	put(t, in("etc/20-first.json"), "") // hides the first
	put(t, in("share/20-first.json"), fmt.Sprintf(d, in("fw/none.fd"), in("fw/none.fd"), ""))
	put(t, in("share/30-broken.json"), "{")
	put(t, in("share/40-ms.json"), fmt.Sprintf(d, in("fw/code.ms.fd"), in("fw/ms.fd"), `"enrolled-keys","secure-boot","requires-smm"`))
	link(t, "code.fd", in("fw/code.ms.fd"))
	put(t, in("share/60-plain.json"), fmt.Sprintf(d, in("fw/code.fd"), in("fw/vars.fd"), ""))

	path := in("libexec/bin") + ":" + in("usr/bin")
	m := &Measurer{Wrapper: wrapper, Own: []string{wrapper}, Descriptors: []string{in("share"), in("etc")}}
	always := []string{"emulator usr/bin/qemu-real", "emulator-module usr/lib/modules/ui.so.1", "emulator-module usr/lib64/qemu/accel.so",
		"swtpm usr/bin/swtpm", "swtpm_setup usr/bin/swtpm_setup", "virt-trust libexec/wrapper"}
	q35 := domain.Firmware{Arch: "x86_64", Machine: "pc-q35-7.2", Auto: "efi"}
	with := func(f func(*domain.Firmware)) domain.Firmware { w := q35; f(&w); return w }
	for name, c := range map[string]struct {
		emulator string
		w        domain.Firmware
		more     []string
	}{
		"no firmware": {in("usr/bin/qemu"), domain.Firmware{Arch: "aarch64"}, nil},
		"loader and template": {in("usr/bin/qemu"), with(func(w *domain.Firmware) { w.Loader, w.Template = in("fw/code.fd"), in("fw/ms.fd") }),
			[]string{"firmware fw/code.fd", "nvram-template fw/ms.fd"}},
		"loader alone":    {in("usr/bin/qemu"), with(func(w *domain.Firmware) { w.Auto, w.Loader = "", in("fw/code.fd") }), []string{"firmware fw/code.fd", "nvram-template fw/vars.fd"}},
		"libvirt chooses": {in("usr/bin/qemu"), q35, []string{"firmware fw/code.fd", "nvram-template fw/ms.fd"}},
		"without enrolled keys": {in("usr/bin/qemu"), with(func(w *domain.Firmware) { w.Features = map[string]bool{"enrolled-keys": false} }),
			[]string{"firmware fw/code.fd", "nvram-template fw/vars.fd"}},
		"another machine": {in("usr/bin/qemu"), with(func(w *domain.Firmware) { w.Machine = "pc-i440fx-7.2" }), nil},
	} {
		got, err := m.Targets(&domain.Facts{Emulator: c.emulator, Firmware: c.w}, path)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var lines []string
		for _, g := range got {
			lines = append(lines, g.Role+" "+strings.TrimPrefix(g.Path, root+"/"))
		}
		want := append(slices.Clone(always), c.more...)
		slices.Sort(want)
		slices.Sort(lines)
		if !slices.Equal(lines, want) {
			t.Errorf("%s:\n%s\nnot\n%s", name, strings.Join(lines, "\n"), strings.Join(want, "\n"))
		}
	}
	for name, f := range map[string]*domain.Facts{
		"no emulator":        {},
		"a missing emulator": {Emulator: in("usr/bin/none")},
		"a missing firmware": {Emulator: in("usr/bin/qemu"), Firmware: domain.Firmware{Loader: in("fw/none.fd"), Template: in("fw/vars.fd")}},
	} {
		if got, err := m.Targets(f, path); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestMeasure alters a file in every way that it can be, and wants no old
// digest of it.
func TestMeasure(t *testing.T) {
	dir := t.TempDir()
	m := &Measurer{}
	name := put(t, filepath.Join(dir, "file"), "one")
	target := []Target{{Swtpm, name}}
	is := func(content string) File {
		t.Helper()
		f, err := m.Measure(target)
		if err != nil {
			t.Fatal(err)
		}
		if f[0].SHA256 != sha256.Sum256([]byte(content)) || !f[0].Unchanged() {
			t.Errorf("the digest is not of %q", content)
		}
		return f[0]
	}
	is("one")
	if len(m.digests) != 0 {
		t.Error("the digest of a file that was just written is remembered")
	}
	time.Sleep(settled + 20*time.Millisecond)
	f := is("one")
	if len(m.digests) != 1 {
		t.Error("the digest is not remembered")
	}
	st, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	put(t, name, "two") // in place, same size, and with the old mtime
	if err := os.Chtimes(name, st.ModTime(), st.ModTime()); err != nil {
		t.Fatal(err)
	}
	is("two")
	if f.Unchanged() {
		t.Error("the file passes for unchanged")
	}
	time.Sleep(settled + 20*time.Millisecond)
	f = is("two")
	put(t, name+".new", "six")
	if err := os.Chtimes(name+".new", st.ModTime(), st.ModTime()); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
	if is("six"); f.Unchanged() {
		t.Error("a file that was put in its place passes for it")
	}
	os.Remove(name)
	if f, err := m.Measure(target); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is gone: %v, %v", f, err)
	}
	for kind, make := range map[string]func() error{
		"a link":   func() error { return os.Symlink("/etc/passwd", name) },
		"a folder": func() error { return os.Mkdir(name, 0o755) },
	} {
		if err := make(); err != nil {
			t.Fatal(err)
		}
		if f, err := m.Measure(target); err == nil {
			t.Errorf("%s: %v", kind, f)
		}
		os.Remove(name)
	}
}

// TestSwtpm finds what the real swtpm maps, by what the dynamic loader says.
func TestSwtpm(t *testing.T) {
	swtpm := testkit.Need(t, "swtpm")
	out, err := exec.Command("ldd", swtpm).Output()
	if err != nil {
		testkit.Missing(t, "%v", err)
	}
	var want []string
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) > 2 && (strings.HasPrefix(f[0], "libtpms") || strings.HasPrefix(f[0], "libswtpm")) {
			real, err := filepath.EvalSymlinks(f[2])
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, real)
		}
	}
	m := &Measurer{}
	for range 2 {
		got, err := m.swtpmLibraries(swtpm)
		if err != nil {
			t.Fatal(err)
		}
		got = slices.Clone(got)
		slices.Sort(got)
		slices.Sort(want)
		if len(want) < 2 || !slices.Equal(got, want) {
			t.Errorf("%q, not %q", got, want)
		}
	}
}

func TestIMA(t *testing.T) {
	d := sha256.Sum256([]byte("qemu"))
	h := hex.EncodeToString(d[:])
	got := readIMA(strings.NewReader("10 00 ima-ng sha256:" + h + " /usr/bin/qemu\n10 00 ima-sig sha256:" + h + " /usr/bin/signed 0302\n" +
		"10 00 ima-ng sha1:" + h[:40] + " /usr/bin/old\n10 00 ima 00 /x\nrubbish\n"))
	if len(got) != 2 || !got[imaKey{"/usr/bin/qemu", d}] || !got[imaKey{"/usr/bin/signed", d}] {
		t.Errorf("%v", got)
	}
	if v := Kernel([]File{{Target: Target{Swtpm, put(t, filepath.Join(t.TempDir(), "x"), "x")}}}); len(v) != 1 || v[0].IMA || v[0].Verity != "" {
		t.Errorf("a file that nobody vouches for: %+v", v)
	}
}

func FuzzLoaderCache(f *testing.F) {
	if b, err := os.ReadFile("/etc/ld.so.cache"); err == nil && len(b) < 1<<16 {
		f.Add(b)
	}
	f.Add(append(append([]byte(cacheMagic), make([]byte, 60)...), "libtpms.so.0\x00/x\x00"...))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := parseLoaderCache(b)
		if err != nil && all != nil {
			t.Error("entries of a damaged cache")
		}
	})
}

func FuzzDescriptor(f *testing.F) {
	f.Add([]byte(`{"interface-types":["uefi"],"mapping":{"device":"flash","executable":{"filename":"/a"}},"targets":[{"architecture":"x86_64","machines":["pc-[q*"]}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if d, err := parseDescriptor(b); err == nil {
			d.fits(domain.Firmware{Arch: "x86_64", Machine: "pc-q35", Auto: "efi"})
			d.code()
		}
	})
}

func FuzzIMA(f *testing.F) {
	f.Add("10 00 ima-ng sha256:00 /usr/bin/qemu\n")
	f.Fuzz(func(t *testing.T, s string) { readIMA(strings.NewReader(s)) })
}

func BenchmarkWarm(b *testing.B) {
	m := &Measurer{}
	f := &domain.Facts{Emulator: "/usr/bin/qemu-system-x86_64", Firmware: domain.Firmware{Arch: "x86_64", Machine: "pc-q35-7.2", Auto: "efi"}}
	for b.Loop() {
		targets, err := m.Targets(f, "/usr/bin")
		if err != nil {
			b.Skip(err)
		}
		if _, err := m.Measure(targets); err != nil {
			b.Fatal(err)
		}
	}
}
