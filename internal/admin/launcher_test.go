package admin

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus"
	"virt-trust/internal/launcher/launchlog"
	"virt-trust/internal/vtpm/reason"
)

const someDigest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

type options = map[string]dbus.Variant

func TestLauncher(t *testing.T) {
	var calls []string
	said := func(method string) func(string, options) (options, *dbus.Error) {
		return func(what string, o options) (options, *dbus.Error) {
			sha, _ := o["sha256"].Value().(string)
			calls = append(calls, strings.TrimSpace(method+" "+what+" "+sha))
			if strings.Contains(what, "refused") {
				return nil, dbus.NewError(bus.ErrorRefused, []any{reason.Refuse(reason.LauncherNotApproved, "look", "another").Error()})
			}
			return variants(map[string]any{"path": what, "sha256": someDigest}), nil
		}
	}
	serve(t, func(f *fake) {
		f.methods = map[string]any{
			"Launchers": func(options) ([]options, *dbus.Error) {
				return []options{
					variants(map[string]any{"path": "/usr/bin/swtpm", "sha256": someDigest, "state": "approved", "source": "package", "detail": "swtpm\x1b[2J", "time": uint64(1700000000000000)}),
					variants(map[string]any{"path": "", "sha256": someDigest, "state": "revoked", "source": "admin", "detail": "", "time": uint64(0)}),
					variants(map[string]any{"path": "/usr/bin/old", "sha256": someDigest, "state": "superseded", "source": "package", "detail": "", "time": uint64(0)}),
				}, nil
			},
			"ApproveLauncher": said("approve"), "RevokeLauncher": said("revoke"),
			"ResetLaunchers": func(options) (options, *dbus.Error) { calls = append(calls, "reset"); return options{}, nil },
			"ImportLaunchers": func(m, s []byte, _ options) (options, *dbus.Error) {
				calls = append(calls, "import "+string(m)+" "+string(s))
				return variants(map[string]any{"name": "acme", "serial": uint64(7), "approved": uint32(2), "revoked": uint32(1)}), nil
			},
		}
	})
	stdout, _, code := run(t, "launcher", "list")
	if code != 0 || !strings.Contains(stdout, "/usr/bin/swtpm") || !strings.Contains(stdout, "(wherever it lies)") || strings.Contains(stdout, "/usr/bin/old") || strings.Contains(stdout, "\x1b") {
		t.Errorf("exit %d:\n%s", code, stdout)
	}
	if stdout, _, _ := run(t, "launcher", "list", "--all", "--json"); len(decode[[]Launcher](t, stdout)) != 3 {
		t.Errorf("%s", stdout)
	}
	dir := t.TempDir()
	manifest := filepath.Join(dir, "m")
	os.WriteFile(manifest, []byte("M"), 0o600)
	os.WriteFile(manifest+".sig", []byte("S"), 0o600)
	os.WriteFile(manifest+".other", []byte("O"), 0o600)
	for _, c := range []struct {
		args string
		code int
		call string
		says string
	}{
		{"approve /usr/bin/swtpm", 0, "approve /usr/bin/swtpm", "approved: " + someDigest},
		{"approve --sha256 " + someDigest + " /usr/bin/swtpm", 0, "approve /usr/bin/swtpm " + someDigest, ""},
		{"approve /refused", ExitRefused, "approve /refused", ""},
		{"revoke " + someDigest, 0, "revoke " + someDigest, "revoked: "},
		{"revoke /usr/bin/../bin/swtpm", 0, "revoke /usr/bin/swtpm", ""},
		{"import " + manifest, 0, "import M S", "acme, serial 7: 2 approved, 1 revoked"},
		{"import --signature " + manifest + ".other " + manifest, 0, "import M O", ""},
		{"import " + manifest + ".none", ExitFailed, "", ""},
		{"reset", 0, "reset", ""},
		{"", ExitUsage, "", ""},
		{"approve", ExitUsage, "", ""},
	} {
		calls = nil
		stdout, stderr, code := run(t, append([]string{"launcher"}, strings.Fields(c.args)...)...)
		if code != c.code || strings.Join(calls, "; ") != c.call || !strings.Contains(stdout, c.says) {
			t.Errorf("launcher %s: exit %d, calls %q, %s%s", c.args, code, calls, stdout, stderr)
		}
	}
}

func TestLaunchLog(t *testing.T) {
	var file []byte
	zero := map[string][]byte{"sha256": make([]byte, 32)}
	for _, e := range []launchlog.Entry{
		{Event: launchlog.EventBoot, Time: 1, Boot: &launchlog.Boot{ID: "b", ResetCount: 3, PCR: 15, Before: launchlog.Hex(zero)}},
		{Event: launchlog.EventFiles, Time: 2, Files: []launchlog.File{{N: 1, Role: "swtpm", Path: "/usr/bin/swtpm\x1b", SHA256: someDigest, By: "package", IMA: true}}},
	} {
		line, err := launchlog.Encode(e)
		if err != nil {
			t.Fatal(err)
		}
		file = append(append(file, line...), '\n')
	}
	log, err := launchlog.Parse(file)
	if err != nil {
		t.Fatal(err)
	}
	values, size := launchlog.Hex(log.Values), len(file)
	serve(t, func(f *fake) {
		f.methods = map[string]any{"LaunchLog": func(offset uint64, _ options) ([]byte, options, *dbus.Error) {
			// What virt-trustd says of itself is not taken for it.
			state := variants(map[string]any{"state": "replays", "problem": "", "pcr": uint32(15), "values": values, "reset-count": uint32(3), "size": uint64(size)})
			whole := append(bytes.Clone(file), "an entry that came later\n"...)
			return whole[offset:min(len(whole), int(offset)+50)], state, nil // in pieces
		}}
	})
	stdout, stderr, code := run(t, "launch-log", "--verify")
	if code != 0 || !strings.Contains(stdout, "replays") || !strings.Contains(stdout, values["sha256"]) {
		t.Errorf("exit %d: %s%s", code, stdout, stderr)
	}
	stdout, _, code = run(t, "launch-log")
	if code != 0 || !strings.Contains(stdout, "1: swtpm /usr/bin/swtpm") || !strings.Contains(stdout, "package, IMA") || strings.Contains(stdout, "\x1b") {
		t.Errorf("exit %d: %s", code, stdout)
	}
	stdout, _, _ = run(t, "launch-log", "--json")
	if l := decode[LaunchLog](t, stdout); l.State != "replays" || len(l.Entries) != 2 || !json.Valid(l.Entries[1]) {
		t.Errorf("%+v", l)
	}
	name := filepath.Join(t.TempDir(), "log")
	if _, stderr, code := run(t, "launch-log", "--tcg", name); code != 0 {
		t.Errorf("exit %d: %s", code, stderr)
	}
	if tool, err := exec.LookPath("tpm2_eventlog"); err == nil {
		if out, err := exec.Command(tool, name).CombinedOutput(); err != nil || !strings.Contains(string(out), values["sha256"]) {
			t.Errorf("%v: %s", err, out)
		}
	}
	values = launchlog.Hex(log.Previous)
	if stdout, _, code := run(t, "launch-log", "--verify"); code != ExitRefused || !strings.Contains(stdout, "does-not-replay") || !strings.Contains(stdout, "the log gives") {
		t.Errorf("exit %d: %s", code, stdout)
	}
	values = launchlog.Hex(log.Values)
	file = bytes.Replace(file, []byte("package"), []byte("pack age"), 1)
	size = len(file)
	if stdout, _, code := run(t, "launch-log", "--verify"); code != ExitRefused {
		t.Errorf("an altered log: exit %d: %s", code, stdout)
	}
}
