// Package packaging has tests of what the package ships and no program runs.
package packaging

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"virt-trust/internal/domain/emulator"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/testkit"
)

// tool gives a program, or ends the test: a laptop may lack it.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/" + name)
	}
	if err != nil {
		testkit.Missing(t, "%v", err)
	}
	return path
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// run gives what a program wrote, and wants it to succeed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Errorf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, out)
	}
	return string(out)
}

var commented = regexp.MustCompile(`(?m)^#([a-z_]+ = )`)

// TestDefaults: the file as it is shipped changes nothing, and what stands in
// its comments are the defaults, all of them.
func TestDefaults(t *testing.T) {
	text := read(t, "virt-trustd.toml")
	c, err := config.Parse([]byte(text))
	if err != nil || !reflect.DeepEqual(c, config.Default()) {
		t.Errorf("as shipped: %+v, %v", c, err)
	}
	c, err = config.Parse([]byte(commented.ReplaceAllString(text, "$1")))
	if err != nil || !reflect.DeepEqual(c, config.Default()) {
		t.Errorf("with the comments taken off: %+v, %v", c, err)
	}

	page := read(t, "man/virt-trustd.toml.5")
	var walk func(reflect.Type)
	walk = func(typ reflect.Type) {
		for f := range typ.Fields() {
			key := f.Tag.Get("toml")
			if f.Type.Kind() == reflect.Struct {
				if !strings.Contains(text, "["+key+"]\n") || !strings.Contains(page, ".Ss ["+key+"]\n") {
					t.Errorf("[%s] is missing", key)
				}
				walk(f.Type)
				continue
			}
			line := regexp.MustCompile(`(?m)^#` + key + ` = (.*)$`).FindStringSubmatch(text)
			if line == nil {
				t.Errorf("%s is missing in virt-trustd.toml", key)
				continue
			}
			value := line[1]
			if s, ok := strings.CutPrefix(value, `"`); ok {
				value = "Qq " + strings.TrimSuffix(s, `"`)
			}
			if value == "Qq " {
				value += `\&`
			}
			if want := ".It Ic " + key + " No = " + value + "\n"; !strings.Contains(page, want) {
				t.Errorf("virt-trustd.toml(5) lacks %q", want)
			}
		}
	}
	walk(reflect.TypeFor[config.Config]())
}

// TestContractPage: org.virttrust1(5) has every name of the contract.
func TestContractPage(t *testing.T) {
	type member struct {
		Name string `xml:"name,attr"`
	}
	var contract struct {
		Interfaces []struct {
			member
			Methods    []member `xml:"method"`
			Properties []member `xml:"property"`
			Signals    []member `xml:"signal"`
		} `xml:"interface"`
	}
	if err := xml.Unmarshal([]byte(read(t, "../dbus/org.virttrust1.xml")), &contract); err != nil {
		t.Fatal(err)
	}
	page := read(t, "man/org.virttrust1.5")
	for _, i := range contract.Interfaces {
		_, section, found := strings.Cut(page, ".Ss "+i.Name+"\n")
		if !found {
			t.Errorf("%s is missing", i.Name)
		}
		section, _, _ = strings.Cut(section, "\n.Ss ")
		for _, m := range append(i.Methods, i.Signals...) {
			if !strings.Contains(section, ".It Fn "+m.Name+" ") {
				t.Errorf("%s.%s is missing", i.Name, m.Name)
			}
		}
		for _, p := range i.Properties {
			if !regexp.MustCompile(`(?m)^\.(It )?Va ` + p.Name + `\b`).MatchString(section) {
				t.Errorf("%s.%s is missing", i.Name, p.Name)
			}
		}
	}
	// And the other way round: methods that polkit guards have their actions.
	policy := read(t, "org.virttrust1.policy")
	for _, action := range []string{
		"adopt", "release", "repair", "accept", "setrecovery", "confirmrecovery", "recover", "backup", "restore", "approve", "nextboot", "revoke", "adoptemulator", "restoreemulator",
	} {
		if !strings.Contains(policy, `<action id="org.virttrust1.`+action+`">`) {
			t.Errorf("polkit has no action %s", action)
		}
	}
}

// TestEmulators: the emulators are installed as virt-trust's programs look for them.
func TestEmulators(t *testing.T) {
	makefile, triggers := read(t, "../Makefile"), read(t, "debian/virt-trust/triggers")
	for _, want := range []string{
		"EMULATORS = " + strings.Join(emulator.Names(), " ") + "\n", fmt.Sprintf("EMULATOR_FD = %d\n", emulator.FD),
		"libexecdir = $(prefix)/libexec/virt-trust\n", "$(libexecdir)/emulator/open/$$e;",
	} {
		if !strings.Contains(makefile, want) {
			t.Errorf("the Makefile lacks %q", want)
		}
	}
	if emulator.Links != "/usr/libexec/virt-trust/emulator/open" || emulator.Dir+"/open" != emulator.Links {
		t.Error(emulator.Dir, emulator.Links)
	}
	for _, name := range emulator.Names() {
		if !strings.Contains(triggers, "interest-noawait "+emulator.Real(name)+"\n") {
			t.Errorf("an upgrade of %s goes unnoticed", name)
		}
	}
}

// TestUpgradeRestarts: an upgrade leaves none of our services running as it was,
// and restarts nobody else's, libvirt's least of all. TestUpgrade has it done.
func TestUpgradeRestarts(t *testing.T) {
	restarted := map[string]bool{}
	invoked := regexp.MustCompile(`deb-systemd-invoke (?:\$action|(?:try-)?restart) ([^>|]*)`)
	for _, postinst := range []string{"debian/virt-trust/postinst", "debian/virt-trust-verifier/postinst"} {
		for _, m := range invoked.FindAllStringSubmatch(read(t, postinst), -1) {
			for _, unit := range strings.Fields(m[1]) {
				restarted[unit] = true
			}
		}
	}
	services, _ := filepath.Glob("../systemd/*.service")
	for _, path := range services {
		unit := filepath.Base(path)
		if !restarted[unit] {
			t.Errorf("an upgrade leaves %s running as it was", unit)
		}
		delete(restarted, unit)
	}
	if len(services) < 4 || len(restarted) > 0 {
		t.Errorf("%d services; restarted besides: %v", len(services), restarted)
	}
}

func TestManPages(t *testing.T) {
	man := tool(t, "man")
	pages, _ := filepath.Glob("man/*.[1-8]")
	if len(pages) < 7 {
		t.Errorf("%d pages", len(pages))
	}
	for _, page := range pages {
		cmd := exec.Command(man, "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", page)
		cmd.Env = append(os.Environ(), "MANWIDTH=80", "LC_ALL=C.UTF-8")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Run(); err != nil || stderr.Len() > 0 {
			t.Errorf("%s: %v: %s", page, err, &stderr)
		}
	}
}

// TestAppArmor compiles our profiles, and libvirt's own with our rules in them.
func TestAppArmor(t *testing.T) {
	parser := tool(t, "apparmor_parser")
	run(t, parser, "-Q", "-K", "apparmor/virt-trust")

	const libvirtd = "/etc/apparmor.d/usr.sbin.libvirtd"
	if _, err := os.Stat(libvirtd); err != nil {
		testkit.Missing(t, "%v", err)
	}
	// A copy of the machine's profiles, as postinst leaves them.
	dir := filepath.Join(t.TempDir(), "apparmor.d")
	run(t, "cp", "-r", "/etc/apparmor.d", dir)
	for from, to := range map[string]string{
		"virt-trust-libvirtd": "abstractions/virt-trust-libvirtd", "virt-trust-libvirt-qemu": "abstractions/virt-trust-libvirt-qemu",
	} {
		put(t, filepath.Join(dir, to), read(t, "apparmor/"+from))
	}
	put(t, filepath.Join(dir, "local/usr.sbin.libvirtd"), "include if exists <abstractions/virt-trust-libvirtd> # virt-trust\n")
	put(t, filepath.Join(dir, "local/abstractions/libvirt-qemu"), "include if exists <abstractions/virt-trust-libvirt-qemu> # virt-trust\n")
	// A VM's profile as virt-aa-helper makes it (TEMPLATE.qemu).
	put(t, filepath.Join(dir, "libvirt/libvirt-vm"), `#include <tunables/global>
profile libvirt-00000000-0000-0000-0000-000000000001 flags=(attach_disconnected) {
  #include <abstractions/libvirt-qemu>
}
`)
	for _, profile := range []string{"usr.sbin.libvirtd", "libvirt/libvirt-vm"} {
		plain := run(t, parser, "-Q", "-K", "-b", dir, "--preprocess", filepath.Join(dir, profile))
		if !strings.Contains(plain, "/usr/libexec/virt-trust/virt-trust-wrapper") || !strings.Contains(plain, "/usr/libexec/virt-trust/virt-trust-emulator") {
			t.Errorf("%s does not include our rules", profile)
		}
		run(t, parser, "-Q", "-K", "-b", dir, filepath.Join(dir, profile))
	}
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// maxExposure is in tenths, as systemd-analyze security counts: 27 were
// reached, and nothing may be lost. Five of them are CAP_SETUID and CAP_SETGID:
// the swtpm that virt-trustd runs to read an endorsement key is better off as
// swtpm's user, and who has CAP_DAC_OVERRIDE gains nothing by them.
const maxExposure = "28"

// TestUnits: systemd knows every word of them, and they stay as tight as they are.
func TestUnits(t *testing.T) {
	analyze := tool(t, "systemd-analyze")
	root := t.TempDir()
	unit := read(t, "../systemd/virt-trustd.service")
	// The program need not be installed where this runs.
	put(t, filepath.Join(root, "virt-trustd.service"), strings.Replace(unit, "/usr/libexec/virt-trust/virt-trustd", "/bin/true", 1))
	put(t, filepath.Join(root, "libvirtd.service"), "[Service]\nExecStart=/bin/true\n")
	put(t, filepath.Join(root, "libvirtd.service.d/50-virt-trust.conf"), read(t, "../systemd/50-virt-trust.conf"))
	for _, u := range []string{"virt-trustd.service", "libvirtd.service"} {
		if out := run(t, analyze, "verify", "--man=no", filepath.Join(root, u)); strings.Contains(out, root) || strings.Contains(out, "virt-trust") {
			t.Errorf("%s: %s", u, out)
		}
	}
	run(t, analyze, "security", "--offline=true", "--no-pager", "--threshold="+maxExposure, filepath.Join(root, "virt-trustd.service"))
}

// TestScripts: the shell can read them.
func TestScripts(t *testing.T) {
	scripts, err := filepath.Glob("debian/*/p*")
	if err != nil || len(scripts) < 4 {
		t.Fatal(scripts, err)
	}
	for _, script := range append(scripts, "debian/build") {
		run(t, "/bin/sh", "-n", script)
		if fi, err := os.Stat(script); err != nil || fi.Mode()&0o111 == 0 {
			t.Errorf("%s: %v, not executable", script, err)
		}
	}
}

const (
	hookLink    = "/etc/libvirt/hooks/qemu.d/50-virt-trust"
	hookProgram = "/usr/libexec/virt-trust/virt-trust-hook"
)

// TestHookLink: libvirt finds the program by a link, and virt-trustd looks at both.
func TestHookLink(t *testing.T) {
	makefile, daemon := read(t, "../Makefile"), read(t, "../helper/virt-trustd/main.go")
	for _, want := range []string{"libexecdir = $(prefix)/libexec/virt-trust\n", "ln -sf $(libexecdir)/virt-trust-hook $(DESTDIR)$(sysconfdir)/libvirt/hooks/qemu.d/50-virt-trust\n"} {
		if !strings.Contains(makefile, want) {
			t.Errorf("the Makefile lacks %q", want)
		}
	}
	for _, want := range []string{`Link: "` + hookLink + `"`, `Hook: "` + hookProgram + `"`} {
		if !strings.Contains(daemon, want) {
			t.Errorf("virt-trustd's main.go lacks %q", want)
		}
	}
}

// TestHookWasConffile: dpkg puts the link where versions before had a script, which
// was a conffile. What an admin made of that is kept where libvirt does not run it.
func TestHookWasConffile(t *testing.T) {
	dpkg, build := tool(t, "dpkg"), tool(t, "dpkg-deb")
	const script = "#!/bin/sh\n: shipped\n"
	dir := t.TempDir()
	pack := func(version string, fill func(root string)) string {
		root := filepath.Join(dir, version)
		put(t, root+"/DEBIAN/control", "Package: virt-trust\nVersion: "+version+"\nArchitecture: all\nMaintainer: a <a@b.invalid>\nDescription: test\n")
		put(t, root+hookProgram, version)
		if err := os.MkdirAll(root+filepath.Dir(hookLink), 0o755); err != nil {
			t.Fatal(err)
		}
		fill(root)
		run(t, build, "--root-owner-group", "-Znone", "-b", root, root+".deb")
		return root + ".deb"
	}
	old := pack("1", func(root string) {
		put(t, root+hookLink, script)
		put(t, root+"/DEBIAN/conffiles", hookLink+"\n")
		run(t, "chmod", "755", root+hookLink)
	})
	next := func(root string) {
		if err := os.Symlink(hookProgram, root+hookLink); err != nil {
			t.Fatal(err)
		}
		run(t, "install", "-m", "755", "debian/virt-trust/preinst", root+"/DEBIAN/preinst")
	}
	link, later := pack("2", next), pack("3", next)

	for name, c := range map[string]struct {
		before func(root string, dpkg func(args ...string))
		kept   string
	}{
		"as shipped":            {func(string, func(...string)) {}, ""},
		"changed":               {func(root string, _ func(...string)) { put(t, root+hookLink, script+": mine\n") }, script + ": mine\n"},
		"deleted":               {func(root string, _ func(...string)) { run(t, "rm", root+hookLink) }, ""},
		"the package's remains": {func(_ string, dpkg func(...string)) { dpkg("--remove", "virt-trust") }, ""},
		"changed, and the package's remains": {func(root string, dpkg func(...string)) {
			put(t, root+hookLink, ": mine\n")
			dpkg("--remove", "virt-trust")
		}, ": mine\n"},
		"nobody's": {func(root string, dpkg func(...string)) {
			dpkg("--purge", "virt-trust")
			put(t, root+hookLink, ": mine\n")
		}, ": mine\n"},
	} {
		root := filepath.Join(dir, name)
		put(t, root+"/var/lib/dpkg/status", "")
		for _, d := range []string{"info", "updates", "triggers"} {
			if err := os.MkdirAll(root+"/var/lib/dpkg/"+d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		do := func(args ...string) {
			run(t, dpkg, append([]string{"--root=" + root, "--log=/dev/null", "--force-not-root", "--force-bad-path", "--force-script-chrootless", "--force-unsafe-io"}, args...)...)
		}
		do("-i", old)
		c.before(root, do)
		for _, deb := range []string{link, later, later} {
			do("-i", deb)
			if to, err := os.Readlink(root + hookLink); err != nil || to != hookProgram {
				t.Errorf("%s: the link leads to %q, %v", name, to, err)
			}
			if out := run(t, dpkg, "--root="+root, "-V", "virt-trust"); out != "" {
				t.Errorf("%s: dpkg -V: %s", name, out)
			}
			left, _ := filepath.Glob(root + hookLink + ".*")
			if c.kept == "" {
				if len(left) > 0 {
					t.Errorf("%s: %q are left", name, left)
				}
				continue
			}
			if fi, err := os.Stat(root + hookLink + ".dpkg-bak"); err != nil || fi.Mode()&0o111 != 0 || len(left) != 1 {
				t.Errorf("%s: %q, %v, %v", name, left, fi, err)
			} else if text := read(t, root+hookLink+".dpkg-bak"); text != c.kept {
				t.Errorf("%s: %q was kept", name, text)
			}
		}
		do("--remove", "virt-trust")
		if _, err := os.Lstat(root + hookLink); err == nil {
			t.Errorf("%s: the link outlives its package", name)
		}
	}
}

// TestVerifierConfigure: a configuration that the admin removed, which dpkg leaves so,
// does not keep the Verifier from being upgraded.
func TestVerifierConfigure(t *testing.T) {
	root, bin := t.TempDir(), t.TempDir()
	for _, name := range []string{"systemd-sysusers", "systemd-tmpfiles", "chown"} {
		put(t, filepath.Join(bin, name), "#!/bin/sh\necho "+name+" >>"+root+"/ran\n")
		if err := os.Chmod(filepath.Join(bin, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	configure := func() {
		t.Helper()
		cmd := exec.Command("debian/virt-trust-verifier/postinst", "configure", "0.3.0")
		cmd.Env = append(os.Environ(), "DPKG_ROOT="+root, "PATH="+bin+":"+os.Getenv("PATH"))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
	configure()
	put(t, filepath.Join(root, "etc/virt-trust/verifier.toml"), "")
	configure()
	if fi, err := os.Stat(filepath.Join(root, "etc/virt-trust/verifier.toml")); err != nil || fi.Mode().Perm() != 0o640 || !strings.Contains(read(t, filepath.Join(root, "ran")), "chown") {
		t.Errorf("%v %v", fi, err)
	}
}

// TestRemovalRefuses: prerm keeps the package while a VM is guarded, and lets
// it be upgraded at any time.
func TestRemovalRefuses(t *testing.T) {
	root := t.TempDir()
	prerm := func(args ...string) (string, error) {
		cmd := exec.Command("debian/virt-trust/prerm", args...)
		cmd.Env = append(os.Environ(), "DPKG_ROOT="+root)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := prerm("remove"); err != nil {
		t.Errorf("nothing is guarded: %v: %s", err, out)
	}
	put(t, filepath.Join(root, "var/lib/virt-trust/vtpm/11111111-1111-1111-1111-111111111111/label"), "")
	out, err := prerm("remove")
	if err == nil || !strings.Contains(out, "11111111-1111") || !strings.Contains(out, "virt-trust release --all") {
		t.Errorf("a VM is guarded: %v: %s", err, out)
	}
	if out, err := prerm("upgrade", "9.9"); err != nil {
		t.Errorf("upgrade: %v: %s", err, out)
	}
	if err := os.RemoveAll(filepath.Join(root, "var/lib/virt-trust/vtpm")); err != nil {
		t.Fatal(err)
	}
	for _, names := range []string{"etc/libvirt/qemu/web.xml", "run/libvirt/qemu/web.xml", "var/lib/virt-trust/emulators.json"} {
		put(t, filepath.Join(root, names), "  <emulator>"+emulator.Dir+"/qemu-system-x86_64</emulator>\n{\"uuid\": \"/usr/bin/qemu\"}\n")
		// virt-trust cannot restore anything here.
		if out, err := prerm("remove"); err == nil || !strings.Contains(out, "its emulator") {
			t.Errorf("%s names it: %v: %s", names, err, out)
		}
		if err := os.Remove(filepath.Join(root, names)); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := prerm("remove"); err != nil {
		t.Errorf("with all restored: %v: %s", err, out)
	}
	put(t, filepath.Join(root, "var/lib/virt-trust/vtpm/11111111-1111-1111-1111-111111111111/label"), "")
	put(t, filepath.Join(root, "etc/virt-trust/allow-strand"), "")
	if out, err := prerm("remove"); err != nil {
		t.Errorf("with the admin's word: %v: %s", err, out)
	}
}
