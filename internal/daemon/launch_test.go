package daemon

import (
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"virt-trust/internal/domain"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/launcher/launchlog"
	"virt-trust/internal/launcher/measure"
	"virt-trust/internal/launcher/pkgdb"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/ek"
	"virt-trust/internal/vtpm/reason"
)

// chain is a house whose emulator is a file that a test can alter, and dpkg's
// database another.
type chain struct {
	*house
	f        *domain.Facts
	emulator string
}

func (c *chain) with(policy ...string) func(*config.Config) {
	return func(cfg *config.Config) { cfg.Launcher.Policy = policy }
}

func newChain(t *testing.T, change ...func(*config.Config)) *chain {
	t.Helper()
	c := &chain{house: newHouse(t)}
	c.emulator = filepath.Join(c.root, "emulators", "bin", "qemu")
	c.replace("qemu 1")
	c.vm(uuidA, true)
	c.f = c.facts(uuidA)
	c.f.Emulator = c.emulator
	c.again(change...)
	return c
}

// again starts virt-trustd anew, in the same boot.
func (c *chain) again(change ...func(*config.Config)) {
	c.t.Helper()
	c.reboot(change...)
	c.g.launch.measurer = &measure.Measurer{}
	c.g.launch.packages = pkgdb.DB{Dpkg: filepath.Join(c.root, "dpkg")}
}

func (c *chain) replace(content string) {
	c.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(c.emulator), 0o755), os.WriteFile(c.emulator+".new", []byte(content), 0o755), os.Rename(c.emulator+".new", c.emulator)); err != nil {
		c.t.Fatal(err)
	}
}

// packaged says what dpkg thinks the emulator is.
func (c *chain) packaged(content string) {
	c.t.Helper()
	line := fmt.Sprintf("%x  %s\n", md5.Sum([]byte(content)), strings.TrimPrefix(c.emulator, "/"))
	if err := errors.Join(os.MkdirAll(filepath.Join(c.root, "dpkg", "info"), 0o755), os.WriteFile(filepath.Join(c.root, "dpkg", "info", "qemu.md5sums"), []byte(line), 0o644)); err != nil {
		c.t.Fatal(err)
	}
}

func (c *chain) starts() {
	c.t.Helper()
	c.start(c.f)
	c.stop(c.f)
}

// refused wants the VM not to start for its launcher, nothing to be written,
// and Check to say so too.
func (c *chain) refused() *reason.Refusal {
	c.t.Helper()
	var r *reason.Refusal
	c.untouched(func() {
		r = refuses(c.t, c.prepare(c.f), reason.LauncherNotApproved)
		_, err := c.g.Check(context.Background(), c.f)
		refuses(c.t, err, reason.LauncherNotApproved)
	})
	return r
}

func (c *chain) logged() *launchlog.Log {
	c.t.Helper()
	names := testkit.Must[[]string](c.t)(logNames(c.g.launchLogs()))
	l, _, err := replay(filepath.Join(c.g.launchLogs(), names[len(names)-1]))
	if err != nil {
		c.t.Fatal(err)
	}
	return l
}

// stands wants the log to stand so to the TPM, now and for whoever asks later.
func (c *chain) stands(want launchlog.Standing) {
	c.t.Helper()
	if _, _, err := c.g.checkLaunchLog(background); err != nil {
		c.t.Fatal(err)
	}
	if got, problem := c.g.launchLogState(); got != string(want) || (problem == "") != (want == launchlog.Replays) {
		c.t.Errorf("the launch log %s (%s), not %s", got, problem, want)
	}
}

func hexOf(s string) string { d := sha256.Sum256([]byte(s)); return hex.EncodeToString(d[:]) }

func TestLauncherFirstUse(t *testing.T) {
	c := newChain(t)
	c.again(c.with(config.FirstUse))
	c.starts()
	c.replace("qemu 2")
	r := c.refused()
	for _, want := range []string{c.emulator, hexOf("qemu 1"), hexOf("qemu 2"), "virt-trust launcher approve " + c.emulator} {
		if !strings.Contains(r.Error(), want) {
			t.Errorf("%s: it lacks %s", r, want)
		}
	}
	if _, err := c.g.ApproveLauncher(background, c.emulator, hexOf("qemu 3")); reason.As(err) == nil {
		t.Errorf("another digest than was named is approved: %v", err)
	}
	testkit.Must[any](t)(c.g.ApproveLauncher(background, c.emulator, hexOf("qemu 2")))
	c.starts()
	testkit.Must[any](t)(c.g.RevokeLauncher(background, c.emulator))
	if r := c.refused(); !strings.Contains(r.What, "revoked") {
		t.Errorf("%s", r)
	}
	c.replace("qemu 1") // which ran before
	c.starts()
	testkit.Must[any](t)(c.g.RevokeLauncher(background, hexOf("qemu 1")))
	c.refused()
	c.again(c.with(config.FirstUse))
	c.refused()
	c.again(c.with()) // of nobody but the admin
	c.refused()
	// Not a VM without a vTPM, nor one that was released.
	if _, err := c.g.Check(background, &domain.Facts{UUID: uuidB, Emulator: c.emulator}); err != nil {
		t.Errorf("a VM without a vTPM: %v", err)
	}
}

func TestLauncherPackage(t *testing.T) {
	c := newChain(t)
	both := c.with(config.FirstUse, config.Package)
	c.again(both)
	c.packaged("qemu 1")
	c.starts()
	c.replace("qemu by hand")
	if r := c.refused(); !strings.Contains(r.What, "its package qemu brought another") {
		t.Errorf("%s", r)
	}
	c.packaged("qemu 2") // an upgrade
	c.replace("qemu 2")
	c.starts()
	c.replace("qemu 1") // its hole is back, by hand
	c.refused()
	c.packaged("qemu 1") // by a downgrade
	c.starts()

	// By hand before anything was known.
	c = newChain(t)
	c.again(both)
	testkit.Must[any](t)(c.g.List(background)) // which makes its file
	c.packaged("qemu 1")
	c.replace("qemu by hand")
	c.refused()
}

func TestLauncherAudit(t *testing.T) {
	c := newChain(t)
	audit := func(cfg *config.Config) { cfg.Mode, cfg.Launcher.Policy = "audit", []string{config.FirstUse} }
	c.again(audit)
	c.starts()
	c.replace("qemu 2")
	c.starts()
	if !strings.Contains(c.house.logged(), "would-refuse prepare: "+c.emulator) {
		t.Errorf("nothing is said:\n%s", c.house.logged())
	}
	for _, f := range c.logged().Files {
		if f.SHA256 == hexOf("qemu 2") && f.By == "" {
			return
		}
	}
	t.Errorf("what ran is not in the log: %+v", c.logged().Files)
}

// TestLaunchLog: what runs is logged once, each start ties it to the VM, and
// the warm start costs one command of the TPM.
func TestLaunchLog(t *testing.T) {
	c := newChain(t)
	c.starts()
	l := c.logged()
	if l.Starts != 1 || l.Last.VM != uuidA || l.Last.Generation == 0 || l.Last.LabelGeneration == 0 || len(l.Files) < 4 || len(l.Last.Launchers) != len(l.Files) {
		t.Errorf("%+v, last %+v", l, l.Last)
	}
	if l.Boot.ID != c.g.bootID || l.Number(c.emulator, sha256.Sum256([]byte("qemu 1"))) == 0 {
		t.Errorf("%+v", l)
	}
	extends := c.tpm.extends
	c.starts()
	if n := c.tpm.extends - extends; n != 1 {
		t.Errorf("a warm start extends %d times", n)
	}
	c.stands(launchlog.Replays)
	c.again()
	c.starts()
	c.stands(launchlog.Replays)
	if n := len(testkit.Must[[]string](t)(logNames(c.g.launchLogs()))); n != 1 {
		t.Errorf("%d logs in one boot", n)
	}

	// Replaced after it was measured, while swtpm starts.
	if err := c.prepare(c.f); err != nil {
		t.Fatal(err)
	}
	c.keys(uuidA)
	c.replace("qemu 2")
	refuses(t, c.g.Launched(c.f), reason.LauncherNotApproved)
	c.stop(c.f)
}

// TestLaunchLogCrash ends virt-trustd at each step of an entry.
func TestLaunchLogCrash(t *testing.T) {
	for name, cut := range map[string]func(c *chain, file string, line []byte){
		"before the whole line": func(c *chain, file string, line []byte) { appendTo(c.t, file, line[:len(line)/2]) },
		"before the PCR":        func(c *chain, file string, line []byte) { appendTo(c.t, file, append(line, '\n')) },
		"after the PCR": func(c *chain, file string, line []byte) {
			appendTo(c.t, file, append(line, '\n'))
			now := testkit.Must[hosttpm.PCR](c.t)(c.tpm.ReadPCR(background, 15))
			c.tpm.ExtendPCR(background, hosttpm.Extension{PCR: 15, Digests: launchlog.Digests(line, now.Values)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newChain(t)
			c.t = t
			c.starts()
			l := c.logged()
			file := filepath.Join(c.g.launchLogs(), testkit.Must[[]string](t)(logNames(c.g.launchLogs()))[0])
			line := testkit.Must[[]byte](t)(launchlog.Encode(launchlog.Entry{Event: launchlog.EventStart, Start: l.Last}))
			c.g.Close()
			cut(c, file, line)
			c.again()
			c.stands(launchlog.Replays)
			want := l.Starts + 1
			if strings.HasPrefix(name, "before the whole") {
				want--
			}
			if got := c.logged().Starts; got != want {
				t.Errorf("%d starts, not %d", got, want)
			}
			c.starts()
			c.stands(launchlog.Replays)
		})
	}
}

func appendTo(t testing.TB, name string, b []byte) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = f.Write(b)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestLaunchLogBroken: what does not replay is told of, stays so, and keeps no
// VM from starting unless that was asked for.
func TestLaunchLogBroken(t *testing.T) {
	for name, harm := range map[string]func(*chain){
		"extended by someone else": func(c *chain) {
			c.tpm.ExtendPCR(background, hosttpm.Extension{PCR: 15, Digests: map[string][]byte{"sha1": make([]byte, 20), "sha256": make([]byte, 32)}})
		},
		"altered": func(c *chain) {
			file := filepath.Join(c.g.launchLogs(), "00000001.jsonl")
			b := testkit.Must[[]byte](c.t)(os.ReadFile(file))
			os.WriteFile(file, []byte(strings.Replace(string(b), hexOf("qemu 1"), hexOf("qemu 2"), 1)), 0o600)
		},
		"removed":           func(c *chain) { os.RemoveAll(c.g.launchLogs()) },
		"the TPM was reset": func(c *chain) { c.tpm.reset() },
	} {
		t.Run(name, func(t *testing.T) {
			c := newChain(t)
			c.t = t
			c.starts()
			c.g.Close()
			harm(c)
			for range 2 {
				c.again()
				c.stands(launchlog.Broken)
				if !strings.Contains(c.house.logged(), "e81f4a6b2c9d4f35b7a0d6c3195e72fa") {
					t.Error("nothing is in the journal")
				}
				c.starts()
				c.stands(launchlog.Broken)
			}
			c.again(func(cfg *config.Config) { cfg.Launcher.RequireLog = true })
			c.stands(launchlog.Broken)
			refuses(t, c.prepare(c.f), reason.PolicyForbids)

			// A boot begins anew.
			c.g.Close()
			c.tpm.reset()
			os.Remove(c.g.runLaunchLog())
			c.again(func(cfg *config.Config) { cfg.Launcher.RequireLog = true })
			c.starts()
			c.stands(launchlog.Replays)
		})
	}
}

// TestLauncherValues: the file of the Reference Values cannot be put back,
// altered or removed without notice, and there is a way on.
func TestLauncherValues(t *testing.T) {
	for name, harm := range map[string]func(c *chain, old []byte) error{
		"older":   func(c *chain, old []byte) error { return os.WriteFile(c.g.valuesPath(), old, 0o600) },
		"removed": func(c *chain, old []byte) error { return os.Remove(c.g.valuesPath()) },
		"altered": func(c *chain, old []byte) error { return os.WriteFile(c.g.valuesPath(), append(old, 0), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			c := newChain(t)
			c.t = t
			c.starts()
			old := testkit.Must[[]byte](t)(os.ReadFile(c.g.valuesPath()))
			testkit.Must[any](t)(c.g.RevokeLauncher(background, c.emulator)) // which the older file does not know
			c.g.Close()
			if err := harm(c, old); err != nil {
				t.Fatal(err)
			}
			c.again()
			if r := c.refused(); !strings.Contains(r.Mend, "virt-trust launcher reset") {
				t.Errorf("%s", r)
			}
			if err := c.g.ResetLaunchers(background); err != nil {
				t.Fatal(err)
			}
			c.starts()
			c.again()
			c.starts()
		})
	}
}

func TestLauncherManifest(t *testing.T) {
	testkit.Need(t, "openssl")
	c := newChain(t)
	keys := filepath.Join(c.root, "keys.pem")
	policy := func(cfg *config.Config) {
		cfg.Launcher.Policy, cfg.Launcher.ManifestKeys = []string{config.Manifest}, keys
	}
	c.again()
	c.starts() // and all but the emulator is known, by its path
	var others strings.Builder
	for _, f := range c.logged().Files {
		if f.Path != c.emulator {
			fmt.Fprintf(&others, `{"path":%q,"sha256":%q},`, f.Path, f.SHA256)
		}
	}
	c.again(policy)
	c.refused() // first use counts no more
	manifest := filepath.Join(c.root, "manifest")
	write := func(serial int, digest string) {
		text := fmt.Sprintf(`{"format":"virt-trust-launchers-1","name":"m","serial":%d,"launchers":[%s{"path":%q,"sha256":%q}]}`, serial, others.String(), c.emulator, digest)
		os.WriteFile(manifest, []byte(text), 0o600)
		if out, err := exec.Command("sh", "-c", `cd "$1" && { [ -e key ] || openssl genpkey -algorithm ed25519 -out key; } && openssl pkey -in key -pubout -out keys.pem &&
			openssl pkeyutl -sign -rawin -inkey key -in manifest -out sig`, "sh", c.root).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	take := func() error {
		_, err := c.g.ImportLaunchers(background, testkit.Must[[]byte](t)(os.ReadFile(manifest)), testkit.Must[[]byte](t)(os.ReadFile(filepath.Join(c.root, "sig"))))
		return err
	}
	write(1, hexOf("qemu 1"))
	if err := take(); err != nil {
		t.Fatal(err)
	}
	c.starts()
	if err := take(); reason.As(err) == nil {
		t.Errorf("the same serial again: %v", err)
	}
	os.WriteFile(manifest, []byte("{}"), 0o600)
	if err := take(); reason.As(err) == nil {
		t.Errorf("what nobody signed: %v", err)
	}
	write(2, hexOf("qemu 2"))
	if err := take(); err != nil {
		t.Fatal(err)
	}
	c.refused()
	c.replace("qemu 2")
	c.starts()
	c.again()
	if err := take(); reason.As(err) == nil || !strings.Contains(err.Error(), "launcher.policy") {
		t.Errorf("where manifests do not count: %v", err)
	}
}

// TestEK notes the endorsement key once, in record and log.
func TestEK(t *testing.T) {
	c := newChain(t)
	dir := testkit.Folder(t)
	c.g.launch.ek = &ek.Reader{Dir: dir, UID: os.Getuid(), GID: os.Getgid()}
	c.starts()
	d := c.g.peek().Get(uuidA).EKDigest
	if d.IsZero() || c.logged().Last.EK != d.String() {
		t.Fatalf("EK %s, in the log %+v", d, c.logged().Last)
	}
	c.g.launch.ek.Dir = filepath.Join(dir, "none") // it is not read again
	c.starts()
	if c.logged().Last.EK != d.String() || strings.Contains(c.house.logged(), "endorsement key") {
		t.Errorf("the second time: %+v\n%s", c.logged().Last, c.house.logged())
	}
}
