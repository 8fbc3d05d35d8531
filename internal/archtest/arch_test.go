// Package archtest holds the code against ARCHITECTURE.md: which wing may reach
// which. A new arrow is a decision; it is made here.
package archtest

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

type pkg struct {
	ImportPath   string
	Name         string
	Standard     bool
	Imports      []string
	Deps         []string
	TestImports  []string
	XTestImports []string
}

const module = "virt-trust/"

func load(t *testing.T) map[string]pkg {
	t.Helper()
	c := exec.Command("go", "list", "-deps", "-json=ImportPath,Name,Standard,Imports,Deps", "./...")
	c.Dir = "../.."
	out, err := c.Output()
	if err != nil {
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			t.Fatalf("%v: %s", err, ee.Stderr)
		}
		t.Fatal(err)
	}
	all := map[string]pkg{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all[p.ImportPath] = p
	}
	if len(all) < 50 {
		t.Fatalf("only %d packages", len(all))
	}
	return all
}

// pure packages hold rules: bytes and values in, values and errors out.
var pure = []string{
	"domain", "domain/emulator", "domain/qemuargs", "domain/swtpmargs", "vtpm/reason", "vtpm/label", "vtpm/qcow2", "vtpm/list", "vtpm/lifecycle", "vtpm/statefile",
	"hosttpm/policy", "hosttpm/tss2", "evidence/eventlog", "launcher/launchlog", "launcher/refvalues", "recovery/shamir",
	"evidence/report", "evidence/quote", "evidence/ima", "appraise", "appraise/corim", "appraise/tier", "appraise/ear", "vtpm/ekcert", "introspect/layout",
	"verifier/fleet", "verifier/ca", "verifier/nodeapi",
}

// doing is what a pure package may not reach itself.
var doing = []string{"os", "os/exec", "net", "net/http", "math/rand", "math/rand/v2", "crypto/rand", "log", "syscall", "io/ioutil", "golang.org/x/sys/unix", "github.com/sirupsen/logrus", "github.com/godbus/dbus/v5"}

func TestPurePackages(t *testing.T) {
	all := load(t)
	for _, name := range pure {
		p, ok := all[module+"internal/"+name]
		if !ok {
			t.Errorf("there is no package %s", name)
			continue
		}
		for _, i := range p.Imports {
			if slices.Contains(doing, i) {
				t.Errorf("%s is pure, and imports %s", name, i)
			}
			if rest, ok := strings.CutPrefix(i, module+"internal/"); ok && !slices.Contains(pure, rest) {
				t.Errorf("%s is pure, and imports %s, which is not", name, rest)
			}
		}
	}
}

// forTests are packages that no program reaches.
var forTests = []string{"internal/lab", "internal/evidence/forge", "internal/appraise/corim/corimtest", "internal/verifier/store/storetest", "internal/verifier/page/pagetest", "internal/bus/bustest", "internal/hosttpm/tpmtest", "internal/testkit"}

func TestArrows(t *testing.T) {
	all := load(t)
	never := func(from string, to ...string) {
		t.Helper()
		p, ok := all[module+from]
		if !ok {
			t.Errorf("there is no package %s", from)
			return
		}
		for _, d := range p.Deps {
			for _, bad := range to {
				if d == bad || strings.HasPrefix(d, bad+"/") {
					t.Errorf("%s reaches %s", from, d)
				}
			}
		}
	}
	tpm, sql, bus := "github.com/google/go-tpm", "database/sql", "github.com/godbus/dbus/v5"
	for _, main := range []string{"hooks/qemu", "wrapper", "wrapper/emulator", "helper/virt-trust-ekcert"} {
		never(main, "net/http", sql, tpm, module+"internal/hosttpm", "github.com/spf13/cobra", module+"internal/daemon", "github.com/digitalocean/go-libvirt")
	}
	never("helper/virt-trust", module+"internal/hosttpm", module+"internal/daemon", module+"internal/agent", sql)
	never("helper/virt-trust-agent", module+"internal/hosttpm", module+"internal/daemon", sql, "github.com/digitalocean/go-libvirt")
	never("helper/virt-trust-verifier", module+"internal/hosttpm", module+"internal/daemon", bus, "github.com/digitalocean/go-libvirt")
	never("helper/virt-trust-verifier/signer", module+"internal/daemon", bus, sql, "net/http")
	never("helper/virt-trust-inject", module+"internal/daemon", bus, sql, "net/http")
	// What reads CoRIMs, with its libraries, is the Verifier's alone.
	for _, main := range []string{"helper/virt-trust", "helper/virt-trust-agent", "helper/virt-trustd", "helper/virt-trust-verifier/signer"} {
		never(main, module+"internal/appraise/corim")
	}
	never("helper/virt-trustd", "net/http", sql, "github.com/spf13/cobra")
	never("internal/vtpm/imagefile", bus, tpm)
	never("internal/hosttpm", bus, "libvirt.org/go/libvirtxml")

	only := func(target string, importers ...string) {
		t.Helper()
		for path, p := range all {
			rest, ours := strings.CutPrefix(path, module)
			if ours && slices.Contains(p.Imports, target) && !slices.Contains(importers, rest) {
				t.Errorf("%s imports %s; only %v may", rest, target, importers)
			}
		}
	}
	only("libvirt.org/go/libvirtxml", "internal/domain")
	only("github.com/digitalocean/go-libvirt", "internal/domain/libvirt")
	only(module+"internal/hosttpm", "internal/daemon")
	// The structures of a TPM are data; this is the way to one.
	only(module+"internal/hosttpm/link", "internal/hosttpm", "internal/hosttpm/tpmtest", "internal/verifier/signer")
	only(tpm + "/tpm2/transport/linuxudstpm")
	only(tpm+"/tpm2/transport/linuxtpm", "internal/lab/guest")
	only(module+"internal/daemon", "helper/virt-trustd")
	only("github.com/spf13/cobra", "internal/admin")
	only("github.com/BurntSushi/toml", "internal/platform/config")
	only(module+"internal/introspect/inject", "internal/daemon", "helper/virt-trust-inject", "internal/lab/pcrs")
	only("github.com/veraison/go-cose", "internal/appraise/corim", "internal/appraise/corim/corimtest")
	only("modernc.org/sqlite", "internal/verifier/store")
	only("github.com/pressly/goose/v3", "internal/verifier/store")
	only("github.com/jackc/pgx/v5/stdlib", "internal/verifier/store", "internal/verifier/store/storetest")

	for path, p := range all {
		rest, ours := strings.CutPrefix(path, module)
		if !ours {
			continue
		}
		if slices.Contains([]string{"util", "utils", "common", "helpers", "types", "models"}, p.Name) {
			t.Errorf("%s has a name that says nothing", rest)
		}
		for _, main := range []string{"helper/", "hooks/", "wrapper"} {
			if !strings.HasPrefix(rest, main) {
				continue
			}
			for _, d := range p.Deps {
				if slices.ContainsFunc(forTests, func(prefix string) bool { return strings.HasPrefix(d, module+prefix) }) {
					t.Errorf("%s ships, and reaches %s", rest, d)
				}
			}
		}
	}
}
