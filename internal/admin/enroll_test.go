package admin

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus"
	"virt-trust/internal/bus/bustest"
)

// fakeAgent plays virt-trust-agent, and systemd.
type fakeAgent struct {
	url     string
	options map[string]dbus.Variant
	left    bool
	enabled []string
	err     *dbus.Error
	props   map[string]dbus.Variant
}

func serveAgent(t *testing.T) *fakeAgent {
	t.Helper()
	bustest.Start(t)
	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	f := &fakeAgent{props: map[string]dbus.Variant{"State": dbus.MakeVariant("not-enrolled")}}
	for _, err := range []error{
		conn.ExportMethodTable(map[string]any{
			"Enroll": func(url string, options map[string]dbus.Variant) (map[string]dbus.Variant, *dbus.Error) {
				f.url, f.options = url, options
				return map[string]dbus.Variant{"state": dbus.MakeVariant("active"), "node": dbus.MakeVariant("an-id"), "name": dbus.MakeVariant("host-a\x1b[31m")}, f.err
			},
			"Leave": func(map[string]dbus.Variant) *dbus.Error { f.left = true; return f.err },
		}, bus.AgentPath, bus.AgentInterface),
		conn.ExportMethodTable(map[string]any{
			"GetAll": func(string) (map[string]dbus.Variant, *dbus.Error) { return f.props, nil },
		}, bus.AgentPath, "org.freedesktop.DBus.Properties"),
		conn.ExportMethodTable(map[string]any{
			"EnableUnitFiles": func(names []string, runtime, force bool) (bool, [][]string, *dbus.Error) {
				f.enabled = names
				return true, nil, nil
			},
			"DisableUnitFiles": func(names []string, runtime bool) ([][]string, *dbus.Error) { f.enabled = nil; return nil, nil },
			"Reload":           func() *dbus.Error { return nil },
		}, "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{bus.AgentName, "org.freedesktop.systemd1"} {
		if r, err := conn.RequestName(name, dbus.NameFlagDoNotQueue); err != nil || r != dbus.RequestNameReplyPrimaryOwner {
			t.Fatal(r, err)
		}
	}
	return f
}

func enroll(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	c := &Command{Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &err, Args: args}
	code = c.Run(t.Context())
	return code, out.String(), err.String()
}

func TestEnroll(t *testing.T) {
	f := serveAgent(t)
	const url, token = "https://verifier.example:8443", "vtj1.secret.pin"
	code, out, err := enroll(t, token+"\n", "enroll", url, "--name", "host-a")
	if code != 0 || f.url != url || f.options["token"].Value() != token || f.options["name"].Value() != "host-a" || len(f.enabled) != 1 || f.enabled[0] != "virt-trust-agent.service" {
		t.Errorf("%d %s%s %+v", code, out, err, f)
	}
	if strings.Contains(out, "\x1b") || !strings.Contains(out, "is a node of "+url) || strings.Contains(out+err, token) {
		t.Errorf("%q %q", out, err)
	}
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("vtj1.other.pin\nmore\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, err := enroll(t, "", "enroll", url, "--token-file", file); code != 0 || f.options["token"].Value() != "vtj1.other.pin" {
		t.Errorf("%d %s %v", code, err, f.options)
	}
	if code, _, err := enroll(t, "", "enroll", url, "--pin", "pin"); code != 0 || f.options["pin"].Value() != "pin" || f.options["token"].Value() != nil {
		t.Errorf("%d %s %v", code, err, f.options)
	}
	f.url = ""
	for name, args := range map[string][]string{
		"no URL": {"enroll"}, "token in the arguments": {"enroll", url, token}, "two sources": {"enroll", url, "--pin", "x", "--token-file", file},
		"no token": {"enroll", url}, "long token": {"enroll", url, "--token-file", "/dev/zero"}, "status of something": {"enroll", "--status", url}, "leave what": {"leave", "x"},
	} {
		if code, out, _ := enroll(t, "\n", args...); code != ExitUsage || out != "" || f.url != "" {
			t.Errorf("%s: %d %s", name, code, out)
		}
	}
	f.err = dbus.NewError(bus.ErrorFailed, []any{"the Verifier refuses: ek-known: \"x\""})
	f.enabled = nil
	if code, out, err := enroll(t, token, "enroll", url); code != ExitFailed || out != "" || !strings.Contains(err, "ek-known") || f.enabled != nil {
		t.Errorf("%d %q %q", code, out, err)
	}
	f.err, f.enabled = nil, []string{"x"}
	if code, _, err := enroll(t, "", "leave"); code != 0 || !f.left || f.enabled != nil {
		t.Errorf("%d %s", code, err)
	}
}

func TestEnrollStatus(t *testing.T) {
	f := serveAgent(t)
	for _, c := range []struct {
		state, tier string
		code        int
	}{
		{"not-enrolled", "", ExitNotAppraised}, {"pending", "", ExitNotAppraised}, {"active", "affirming", ExitDone}, {"active", "warning", ExitDone},
		{"active", "contraindicated", ExitRefused}, {"active", "none", ExitNotAppraised}, {"active", "", ExitNotAppraised},
		{"refused", "affirming", ExitRefused}, {"unreachable", "affirming", ExitNotAppraised},
	} {
		f.props = map[string]dbus.Variant{
			"State": dbus.MakeVariant(c.state), "LastTier": dbus.MakeVariant(c.tier), "Verifier": dbus.MakeVariant("https://v"),
			"LastRound": dbus.MakeVariant(uint64(1_764_000_000_000_000)), "LastError": dbus.MakeVariant("a\nb"),
		}
		code, out, err := enroll(t, "", "enroll", "--status")
		if code != c.code || err != "" || !strings.Contains(out, "https://v") || strings.Contains(out, "a\nb") {
			t.Errorf("%+v: %d %q %q", c, code, out, err)
		}
	}
	if code, out, _ := enroll(t, "", "enroll", "--status", "--json"); code != ExitNotAppraised || !strings.Contains(out, `"state": "unreachable"`) {
		t.Errorf("%d %s", code, out)
	}
}

func TestEnrollWithoutAgent(t *testing.T) {
	bustest.Start(t)
	if code, out, err := enroll(t, "", "enroll", "--status"); code != ExitNotAppraised || out != "" || !strings.Contains(err, "virt-trust-agent") || strings.Contains(err, "virt-trustd") {
		t.Errorf("%d %q %q", code, out, err)
	}
}
