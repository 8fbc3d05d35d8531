package admin

import (
	"slices"
	"strings"
	"testing"

	"virt-trust/internal/vtpm/reason"
)

func TestEmulator(t *testing.T) {
	const ours, qemu = "/usr/libexec/virt-trust/emulator/qemu-system-x86_64", "/usr/bin/qemu-system-x86_64"
	vm := func(uuid, name, emulator, runs string, adopted, vtpm, persistent bool) map[string]any {
		return map[string]any{"uuid": uuid, "name": name, "emulator": emulator, "runs": runs, "adopted": adopted, "vtpm": vtpm, "persistent": persistent}
	}
	f := serve(t, func(f *fake) {
		f.emulators = []map[string]any{
			vm(web, "web", qemu, ours, false, true, true),
			vm(bad, "bad\x1b[31m", ours, "", true, true, true),
			vm(lone, "transient", qemu, qemu, false, true, false),
			vm(lone, "without", qemu, "", false, false, true),
		}
	})
	stdout, stderr, code := run(t, "emulator", "list")
	if code != ExitDone || stderr != "" || !strings.Contains(strings.Join(strings.Fields(stdout), " "), " web yes "+qemu+" "+ours+" ") || strings.Contains(stdout, "\x1b") {
		t.Errorf("exit %d, %q\n%s", code, stderr, stdout)
	}
	stdout, _, _ = run(t, "emulator", "list", "--json")
	if all := decode[[]Emulator](t, stdout); len(all) != 4 || all[2].Name != "web" || all[2].Runs != ours || !all[2].VTPM || all[2].Adopted {
		t.Errorf("%+v", all)
	}

	for _, c := range []struct {
		args []string
		want []string // calls
	}{
		{[]string{"adopt", web}, []string{"AdoptEmulator " + web}},
		{[]string{"restore", bad}, []string{"RestoreEmulator " + bad}},
		{[]string{"adopt", "--all"}, []string{"AdoptEmulator " + web}},
		{[]string{"restore", "--all"}, []string{"RestoreEmulator " + bad}},
	} {
		f.calls = nil
		stdout, _, code := run(t, append([]string{"emulator"}, c.args...)...)
		if code != ExitDone || !slices.Equal(f.calls, c.want) || !strings.Contains(stdout, "emulator done") {
			t.Errorf("%q: exit %d, %q\n%s", c.args, code, f.calls, stdout)
		}
	}
	for _, args := range [][]string{{"adopt"}, {"restore", "web", "--all"}, {"list", "web"}} {
		if _, _, code := run(t, append([]string{"emulator"}, args...)...); code != ExitUsage {
			t.Errorf("%q: exit %d", args, code)
		}
	}
	f.refuse[web] = reason.Refuse(reason.PolicyForbids, "", "no")
	if _, stderr, code := run(t, "emulator", "adopt", "--all"); code != ExitRefused || !strings.Contains(stderr, "refused for 1 VM") {
		t.Errorf("exit %d, %q", code, stderr)
	}
}
