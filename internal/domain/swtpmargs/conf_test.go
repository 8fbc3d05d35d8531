package swtpmargs

import (
	"slices"
	"strings"
	"testing"
)

func TestWithCertsTool(t *testing.T) {
	const debian = "# Program invoked for creating certificates\ncreate_certs_tool= /usr/bin/swtpm_localca\ncreate_certs_tool_config = /etc/swtpm-localca.conf\n" +
		"create_certs_tool_options = /etc/swtpm-localca.options\n# banks\nactive_pcr_banks = sha256,sha384\n"
	for conf, want := range map[string]string{
		debian:                          "# Program invoked for creating certificates\n# banks\nactive_pcr_banks = sha256,sha384\ncreate_certs_tool = /t\n",
		"":                              "create_certs_tool = /t\n",
		"a = b":                         "a = b\ncreate_certs_tool = /t\n",
		"  create_certs_tool\t=x\n":     "create_certs_tool = /t\n",
		"#create_certs_tool = x\n":      "#create_certs_tool = x\ncreate_certs_tool = /t\n",
		"create_certs_tool_other = x":   "create_certs_tool_other = x\ncreate_certs_tool = /t\n",
		"profile = {\"Name\": \"=\"}\n": "profile = {\"Name\": \"=\"}\ncreate_certs_tool = /t\n",
	} {
		if got := string(WithCertsTool([]byte(conf), "/t")); got != want {
			t.Errorf("%q becomes %q", conf, got)
		}
	}
}

// There is one tool, ours, and every other line is as it was.
func FuzzWithCertsTool(f *testing.F) {
	f.Add([]byte("create_certs_tool = /a\ncreate_certs_tool_config=/b\nactive_pcr_banks = sha1\n"))
	f.Add([]byte("=\n\n create_certs_tool"))
	f.Fuzz(func(t *testing.T, conf []byte) {
		got := strings.Split(string(WithCertsTool(conf, "/t")), "\n")
		tools := 0
		for _, line := range got {
			if key, _, _ := strings.Cut(line, "="); strings.TrimSpace(key) == "create_certs_tool" {
				tools++
			}
		}
		if tools != 1 || got[len(got)-2] != "create_certs_tool = /t" {
			t.Errorf("%q", got)
		}
		for line := range strings.SplitSeq(string(conf), "\n") {
			if !strings.Contains(line, "create_certs_tool") && !slices.Contains(got, line) {
				t.Errorf("%q is lost", line)
			}
		}
	})
}

func TestConfig(t *testing.T) {
	for line, want := range map[string]string{ // with another configuration and keys
		"swtpm_setup --tpm2 --tpm-state /s --vmid a":        "swtpm_setup --tpm2 --tpm-state /s --vmid a --config /c KEYS",
		"swtpm_setup --config /etc/c --tpm2 --tpm-state /s": "swtpm_setup --tpm2 --tpm-state /s --config /c KEYS",
		"swtpm_setup --tpm-state /s --conf=/etc/c --tpm2":   "swtpm_setup --tpm-state /s --tpm2 --config /c KEYS",
		"swtpm_setup --tpm-state /s --tpm2 --config":        "swtpm_setup --tpm-state /s --tpm2 --config /c KEYS",
		"swtpm_setup --tpm-state /s --tpm2 -- x":            "swtpm_setup --tpm-state /s --tpm2 --config /c KEYS -- x",
		"swtpm_setup --tpm-state /s --tpm2 --new":           "swtpm_setup --tpm-state /s --tpm2 --config /c KEYS --new",
	} {
		c := Parse(SwtpmSetup, strings.Fields(line))
		if !c.TPM2 || strings.Contains(line, "/etc/c") != (c.Config == "/etc/c") {
			t.Errorf("%s: TPM 2 %t, configuration %q", line, c.TPM2, c.Config)
		}
		if got := c.Argv(); strings.Join(got, " ") != line {
			t.Errorf("%s: argv %q", line, got)
		}
		got := strings.Join(c.WithConfig("/c").WithKeys(11, 12), " ")
		if got = strings.Replace(got, "--keyfile-fd 11 --cipher aes-256-cbc", "KEYS", 1); got != want {
			t.Errorf("%s\n got %s\nwant %s", line, got, want)
		}
	}
	if c := Parse(Swtpm, strings.Fields("swtpm socket --tpmstate dir=/s")); c.TPM2 {
		t.Error("a TPM 1.2")
	}
	plain := Parse(SwtpmSetup, strings.Fields("swtpm_setup --tpm-state /s"))
	for env, want := range map[string][]string{
		"HOME=/h":                    {"/h/.config/swtpm_setup.conf", ConfigFile},
		"HOME=/h XDG_CONFIG_HOME=/x": {"/x/swtpm_setup.conf", ConfigFile},
		"":                           {ConfigFile},
	} {
		if got := plain.ConfigFiles(strings.Fields(env)); !slices.Equal(got, want) {
			t.Errorf("%s: %q", env, got)
		}
	}
	if got := Parse(SwtpmSetup, strings.Fields("swtpm_setup --tpm-state /s --config /c")).ConfigFiles([]string{"HOME=/h"}); !slices.Equal(got, []string{"/c"}) {
		t.Errorf("%q", got)
	}
}
