package admin

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/evidence/eventlog"
)

func TestHostUsage(t *testing.T) {
	for args, want := range map[string]string{
		"host":                                       "a command is missing",
		"host approve":                               "name one of --current, --predict and --next-boot",
		"host approve --current --next-boot":         "name one of",
		"host approve --current --kernel /x":         "belongs to --predict",
		"host approve --current --cancel":            "--cancel belongs to --next-boot",
		"host approve --next-boot --dry-run":         "--dry-run belongs to",
		"host approve --predict --uki=a --pcrlock":   "flag needs an argument",
		"host approve --predict --uki=a --pcrlock b": "either components or --pcrlock",
		"host approve --predict now":                 `"now" is no flag`,
		"host revoke":                                "requires at least 1 arg",
		"host dry-run now":                           "unknown command",
	} {
		var out, errOut bytes.Buffer
		c := &Command{Stdout: &out, Stderr: &errOut, Args: strings.Fields(args)}
		if code := c.Run(t.Context()); code != ExitUsage || !strings.Contains(errOut.String(), want) || out.Len() > 0 {
			t.Errorf("%s: exit %d, %q, want %q", args, code, errOut.String(), want)
		}
	}
}

// What is named on the command line is measured; of what is not, the file that
// this boot used is looked for.
func TestComponents(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		write(t, path, text)
		return path
	}
	old, new := file("old", "old"), file("new", "new")
	a := &approval{initrd: []string{old + "=" + new}, files: []string{new, dir + "/gone=" + new}, cmdline: "quiet"}
	all, err := a.components("sha256")
	if err != nil || len(all) != 4 {
		t.Fatal(all, err)
	}
	if c := all[0]; c.Kind != eventlog.Initrd || len(c.Old) != 1 || c.Old[0].Name != old || c.Path != old || c.New.Name != new || len(c.New.Flat) != 32 {
		t.Errorf("%+v", c)
	}
	if c := all[1]; c.Kind != eventlog.Other || c.Path != new || c.Old != nil {
		t.Errorf("%+v", c)
	}
	if c := all[2]; c.Path != dir+"/gone" || c.Old != nil {
		t.Errorf("%+v", c)
	}
	if c := all[3]; c.Kind != eventlog.Cmdline || c.Text != "quiet" {
		t.Errorf("%+v", c)
	}
	for _, a := range []*approval{{kernel: []string{dir + "/gone"}}, {kernel: []string{dir + "/gone=" + new}}, {uki: []string{dir}}} {
		if all, err := a.components("sha256"); err == nil {
			t.Errorf("%+v is measured as %+v", a, all)
		}
	}
	if _, err := os.Stat("/vmlinuz"); err == nil && len(present(eventlog.Kernel, "", "sha256")) == 0 {
		t.Error("the kernel at /vmlinuz is not found")
	}
}

func TestDryRunText(t *testing.T) {
	for want, d := range map[string]HostDryRun{
		"The host is in an approved state: ab12\n":                                                                               {Approved: true, State: "ab12"},
		"The host is in no approved state.\nNot all is told: no state is approved\n":                                             {Log: "no state is approved"},
		"The host is in no approved state. From ab12, PCR 0 9 differ:\nPCR 9: kernel command line changed from \"a\" to \"b\"\n": {State: "ab12", PCRs: []uint32{0, 9}, Changes: []BootChange{{9, `kernel command line changed from "a" to "b"`}}},
	} {
		var b bytes.Buffer
		if d.write(&b); b.String() != want {
			t.Errorf("%q, want %q", b.String(), want)
		}
	}
	at := time.Unix(0, 0)
	if s := (Host{NextBoot: &at}).nextBoot(); !strings.HasPrefix(s, "NOT CHECKED") || (Host{}).nextBoot() != "" {
		t.Error(s)
	}
}
