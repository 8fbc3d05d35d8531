package config

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestDefaults(t *testing.T) {
	c, err := Load(filepath.Join(t.TempDir(), "none"))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Default(), c); d != "" {
		t.Fatal(d)
	}
	if err := Default().check(); err != nil {
		t.Fatalf("the defaults are wrong themselves: %v", err)
	}
}

func TestParse(t *testing.T) {
	c, err := Parse([]byte("mode = \"audit\"\n[tpm]\ndevice = \"/run/tpm.sock\"\npcrs = [7]\n[grant]\nlifetime = \"90s\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Mode, want.TPM.Device, want.TPM.PCRs, want.Grant.Lifetime = "audit", "/run/tpm.sock", []uint{7}, Duration(90*time.Second)
	if d := cmp.Diff(want, c); d != "" {
		t.Fatal(d)
	}
}

// What is misspelt or makes no sense never becomes a default.
func TestRefusals(t *testing.T) {
	for text, want := range map[string]string{
		"mode = \"enforce\"\nmod = \"audit\"":      "line 2: unknown key",
		"[tpm]\n\npcr = [7]":                       "line 3: unknown key \"tpm.pcr\"",
		"[policy]\nadopt = \"yes\"":                "line 2",
		"[attestation]\npcrs = []":                 "attestation.pcrs: empty",
		"[attestation]\npcrs = [10, 15, 24]":       "there is no PCR 24",
		"[attestation]\npcrs = [10, 15, 10]":       "PCR 10 is named twice",
		"[attestation]\npcrs = [0, 10]":            "PCR 15 is not among them",
		"[attestation]\nima_list = \"ima\"":        "attestation.ima_list",
		"mode = \"permissive\"":                    "permissive",
		"[tpm]\npcrs = []":                         "empty",
		"[tpm]\npcrs = [7, 7]":                     "twice",
		"[tpm]\npcrs = [24]":                       "no PCR 24",
		"[tpm]\npcrs = [10]":                       "changes while the host runs",
		"[tpm]\npcrs = [15]":                       "changes while the host runs",
		"[tpm]\npcrs = [16]":                       "reset by anyone",
		"[tpm]\npcrs = [-1]":                       "there is no PCR",
		"[tpm]\nbank = \"sha1\"":                   "sha1",
		"[tpm]\ndevice = \"tpm0\"":                 "absolute",
		"[tpm]\ntimeout = \"10ms\"":                "between",
		"[tpm]\ntimeout = 30":                      "line 2",
		"[swtpm]\nuser = \"\"":                     "empty",
		"[swtpm]\nstate_root = \"/a/../b\"":        "clean",
		"[policy]\ncrash_recovery = \"lax\"":       "lax",
		"[libvirt]\nsocket = \"libvirt-sock\"":     "absolute",
		"[grant]\nlifetime = \"1h\"":               "between",
		"mode = \"enforce":                         "line 1",
		"mode = \"audit\"\nmode = \"enforce\"":     "line 2",
		"[tpm]\ndevice = \"/a\"\n[tpm]\nbank=\"\"": "line 3",
	} {
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}
