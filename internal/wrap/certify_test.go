package wrap_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus/bustest"
)

// swtpm_setup gets virt-trust's tool for certificates where virt-trustd says
// so, with the admin's other settings, and nothing else is changed.
func TestCertify(t *testing.T) {
	dir := install(t)
	bustest.Start(t)
	action := ""
	asked := make(chan map[string]dbus.Variant, 10)
	bustest.Serve(t, bustest.Manager{RedeemGrant: func(_ dbus.Sender, _, _ string, options map[string]dbus.Variant) (string, []dbus.Variant, *dbus.Error) {
		asked <- options
		if strings.HasPrefix(action, "pass") {
			return action, nil, nil
		}
		_, keys, err := grant(t)
		return action, keys, err
	}})
	conf := filepath.Join(dir, "admin.conf")
	const admins = "create_certs_tool = /admin/tool\nactive_pcr_banks = sha384\n"
	if err := os.WriteFile(conf, []byte(admins), 0o644); err != nil {
		t.Fatal(err)
	}
	argv := []string{"swtpm_setup", "--tpm2", "--tpm-state", stateDir, "--config", conf, "--create-ek-cert"}
	for _, action = range []string{"keys-certify", "pass-certify"} {
		got := run(t, dir, nil, argv...).fake(t)
		if o := <-asked; o["certificates"].Value() != true {
			t.Errorf("asked with %v", o)
		}
		n := 0
		at := slices.Index(got.Argv, "--config")
		if at < 0 {
			t.Fatalf("argv %q", got.Argv)
		}
		fmt.Sscanf(got.Argv[at+1], "/proc/self/fd/%d", &n)
		want := []string{"swtpm_setup", "--tpm2", "--tpm-state", stateDir, "--create-ek-cert", "--config", fmt.Sprintf("/proc/self/fd/%d", n)}
		if !slices.Equal(got.Argv[:min(len(want), len(got.Argv))], want) || (len(got.Argv) > len(want)) != (action == "keys-certify") {
			t.Errorf("argv %q", got.Argv)
		}
		f := got.FDs[n]
		if f.Text != "active_pcr_banks = sha384\ncreate_certs_tool = /usr/libexec/virt-trust/virt-trust-ekcert\n" || f.Seals&sealed != sealed {
			t.Errorf("the configuration: %+v", f)
		}
	}
	// Not ours: as it was called.
	action = "pass"
	if got := run(t, dir, nil, argv...).fake(t); !slices.Equal(got.Argv, argv) {
		t.Errorf("argv %q", got.Argv)
	}
	// swtpm itself has no certificates.
	action = "pass-certify"
	for len(asked) > 0 {
		<-asked
	}
	own := []string{"swtpm", "socket", "--tpmstate", "dir=" + stateDir}
	if got := run(t, dir, nil, own...).fake(t); !slices.Equal(got.Argv, own) {
		t.Errorf("argv %q", got.Argv)
	}
	if o := <-asked; len(o) != 0 {
		t.Errorf("asked with %v", o)
	}
	// What cannot be read, or is no configuration.
	action = "keys-certify"
	os.WriteFile(conf, make([]byte, 65<<10), 0o644)
	for _, name := range []string{conf, filepath.Join(dir, "none"), dir} {
		argv[5] = name
		if r := run(t, dir, nil, argv...); r.status != 1 || !strings.Contains(r.stderr, "the configuration of swtpm_setup: ") {
			t.Errorf("%s: %+v", name, r)
		}
	}
}
