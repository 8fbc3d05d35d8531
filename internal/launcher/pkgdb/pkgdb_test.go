package pkgdb

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"virt-trust/internal/launcher/measure"
	"virt-trust/internal/launcher/refvalues"
	"virt-trust/internal/testkit"
)

func put(t *testing.T, name, content string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func measured(t *testing.T, paths ...string) []measure.File {
	t.Helper()
	var targets []measure.Target
	for _, p := range paths {
		targets = append(targets, measure.Target{Path: p})
	}
	files, err := new(measure.Measurer).Measure(targets)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func answers(t *testing.T, d DB, want []Answer, paths ...string) {
	t.Helper()
	got, err := d.Ask(context.Background(), measured(t, paths...))
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range paths {
		if got[i] != want[i] {
			t.Errorf("%s: %+v, not %+v", p, got[i], want[i])
		}
	}
}

func TestDpkg(t *testing.T) {
	root := t.TempDir()
	at := func(name string) string { return filepath.Join(root, name) }
	sums := func(pkg string, contents map[string]string) {
		var b strings.Builder
		for name, c := range contents {
			fmt.Fprintf(&b, "%x  %s\n", md5.Sum([]byte(c)), strings.TrimPrefix(at(name), "/"))
		}
		put(t, at("dpkg/info/"+pkg+".md5sums"), b.String())
	}
	for _, f := range []string{"same", "altered", "alone", "diverted", "diverted.distrib", "shared"} {
		put(t, at(f), "content of "+f)
	}
	sums("a", map[string]string{"same": "content of same", "altered": "what it was", "diverted": "content of diverted.distrib"})
	sums("b", map[string]string{"diverted": "content of diverted"})
	sums("lib:amd64", map[string]string{"shared": "content of shared"})
	sums("lib:i386", map[string]string{"shared": "content of shared"})
	put(t, at("dpkg/diversions"), strings.Join([]string{at("diverted"), at("diverted.distrib"), "b", ""}, "\n"))

	d := DB{Dpkg: at("dpkg")}
	answers(t, d, []Answer{{refvalues.Same, "a"}, {refvalues.Different, "a"}, {refvalues.Unowned, ""}, {refvalues.Same, "b"}, {refvalues.Same, "a"}, {refvalues.Same, "lib"}},
		at("same"), at("altered"), at("alone"), at("diverted"), at("diverted.distrib"), at("shared"))

	old := measured(t, at("same"))
	put(t, at("same"), "content of diverted")
	if got, err := d.Ask(context.Background(), old); err == nil {
		t.Errorf("a file that changed after it was measured: %+v", got)
	}
	answers(t, DB{Dpkg: at("none")}, []Answer{{refvalues.Unowned, ""}}, at("alone"))
}

// TestRealDpkg asks this machine about a program that came with a package, and
// about its copy.
func TestRealDpkg(t *testing.T) {
	testkit.Need(t, "dpkg")
	swtpm := testkit.Need(t, "swtpm")
	b, err := os.ReadFile(swtpm)
	if err != nil {
		t.Fatal(err)
	}
	mine := filepath.Join(t.TempDir(), "swtpm")
	put(t, mine, string(b))
	answers(t, DB{}, []Answer{{refvalues.Same, "swtpm"}, {refvalues.Unowned, ""}}, swtpm, mine)
}

func TestMergedUsr(t *testing.T) {
	if to, err := os.Readlink("/lib"); err != nil || to != "usr/lib" {
		testkit.Missing(t, "/usr is not merged here")
	}
	if got := spellings("/usr/lib/x/libtpms.so"); len(got) != 2 || got[1] != "lib/x/libtpms.so" {
		t.Errorf("%q", got)
	}
	if got := spellings("/usr/share/x"); len(got) != 1 {
		t.Errorf("%q", got)
	}
}

const spec = `Name: virt-trust-test
Version: 1
Release: 2
Summary: test
License: none
BuildArch: noarch
%%description
test
%%install
mkdir -p %%{buildroot}%[1]s
printf same > %%{buildroot}%[1]s/same
printf 'as it was' > %%{buildroot}%[1]s/altered
%%files
%[1]s
`

// TestRPM builds a package with the real rpm, and installs it into a database of
// its own.
func TestRPM(t *testing.T) {
	rpm, build := testkit.Need(t, "rpm"), testkit.Need(t, "rpmbuild")
	dir := t.TempDir()
	content, db := filepath.Join(dir, "content"), filepath.Join(dir, "db")
	put(t, filepath.Join(dir, "t.spec"), fmt.Sprintf(spec, content))
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %q: %v: %s", name, args, err, out)
		}
	}
	run(build, "--define", "_topdir "+dir, "--define", "__os_install_post %{nil}", "-bb", filepath.Join(dir, "t.spec"))
	run(rpm, "--dbpath", db, "--nodeps", "--justdb", "-i", filepath.Join(dir, "RPMS", "noarch", "virt-trust-test-1-2.noarch.rpm"))
	put(t, filepath.Join(content, "same"), "same")
	put(t, filepath.Join(content, "altered"), "as it is")
	put(t, filepath.Join(content, "alone"), "")
	const pkg = "virt-trust-test-1-2.noarch"
	answers(t, DB{Dpkg: dir, RPM: []string{rpm, "--dbpath", db}}, []Answer{{refvalues.Same, pkg}, {refvalues.Different, pkg}, {refvalues.Unowned, ""}},
		filepath.Join(content, "same"), filepath.Join(content, "altered"), filepath.Join(content, "alone"))
	if _, err := (DB{Dpkg: dir, RPM: []string{filepath.Join(dir, "none")}}).Ask(context.Background(), measured(t, filepath.Join(content, "same"))); err == nil {
		t.Error("an rpm that cannot be run has an answer")
	}
}

func FuzzMD5(f *testing.F) {
	f.Add([]byte("d41d8cd98f00b204e9800998ecf8427e  usr/bin/swtpm\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		parseMD5(b, func(path []byte, digest string) {
			if len(path) == 0 || len(digest) != 32 || bytes.ContainsRune(path, '\n') {
				t.Errorf("%q %q", path, digest)
			}
		})
	})
}

func FuzzDiversions(f *testing.F) {
	f.Add([]byte("/a\n/b\np\n"), "/a")
	f.Fuzz(func(t *testing.T, b []byte, path string) {
		d := parseDiversions(b)
		d.original(path)
		d.lies(path, "p")
	})
}

func FuzzRPM(f *testing.F) {
	f.Add([]byte(fmt.Sprintf("8 p-1 %x /a\n", sha256.Sum256(nil))))
	f.Fuzz(func(t *testing.T, b []byte) { _ = parseRPM(bytes.NewReader(b), map[string][]claim{"/a": nil}) })
}
