package packaging

import (
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"virt-trust/internal/platform/config"
)

// TestVerifierDefaults: verifier.toml as it is shipped changes nothing, what
// stands in its comments are the defaults, all of them, and the page says the same.
func TestVerifierDefaults(t *testing.T) {
	text := read(t, "verifier.toml")
	c, err := config.ParseVerifier([]byte(text))
	if err != nil || !reflect.DeepEqual(c, config.DefaultVerifier()) {
		t.Errorf("as shipped: %+v, %v", c, err)
	}
	plain, _, _ := strings.Cut(text, "#[[token]]")
	c, err = config.ParseVerifier([]byte(commented.ReplaceAllString(plain, "$1")))
	if err != nil || !reflect.DeepEqual(c, config.DefaultVerifier()) {
		t.Errorf("with the comments taken off: %+v, %v", c, err)
	}
	page := read(t, "man/virt-trust-verifier.toml.5")
	var walk func(reflect.Type, string)
	walk = func(typ reflect.Type, section string) {
		for f := range typ.Fields() {
			key := f.Tag.Get("toml")
			switch {
			case f.Type == reflect.TypeFor[[]config.VerifierToken]():
				for g := range reflect.TypeFor[config.VerifierToken]().Fields() {
					if !strings.Contains(page, ".It Ic "+g.Tag.Get("toml")+"\n") {
						t.Errorf("[[token]] %s is missing in the page", g.Tag.Get("toml"))
					}
				}
				continue
			case f.Type.Kind() == reflect.Struct:
				_, inText, found := strings.Cut(text, "["+key+"]\n")
				if !found || !strings.Contains(page, ".Ss ["+key+"]\n") {
					t.Errorf("[%s] is missing", key)
				}
				inText, _, _ = strings.Cut(inText, "\n[")
				walk(f.Type, inText)
				continue
			}
			in := section
			if in == "" {
				in, _, _ = strings.Cut(text, "\n[")
			}
			line := regexp.MustCompile(`(?m)^#` + key + ` = (.*)$`).FindStringSubmatch(in)
			if line == nil {
				t.Errorf("%s is missing in verifier.toml", key)
				continue
			}
			value := line[1]
			if s, ok := strings.CutPrefix(value, `"`); ok {
				value = "Qq " + strings.TrimSuffix(s, `"`)
			}
			if value == "Qq " {
				value += `\&`
			}
			if strings.HasPrefix(value, `["`) {
				value = strings.ReplaceAll(value, `"`, `\(dq`)
			}
			if want := ".It Ic " + key + " No = " + value + "\n"; !strings.Contains(page, want) {
				t.Errorf("virt-trust-verifier.toml(5) lacks %q", want)
			}
		}
	}
	walk(reflect.TypeFor[config.Verifier](), "")
}

// maxVerifierExposure is in tenths: 12 were reached, of which the network is most.
const maxVerifierExposure = "12"

// TestVerifierUnits: systemd knows every word of them, and they stay as tight as
// they are.
func TestVerifierUnits(t *testing.T) {
	analyze := tool(t, "systemd-analyze")
	root := t.TempDir()
	unit := read(t, "../systemd/virt-trust-verifier.service")
	put(t, filepath.Join(root, "virt-trust-verifier.service"), strings.ReplaceAll(unit, "/usr/libexec/virt-trust/virt-trust-verifier", "/bin/true"))
	units := []string{"virt-trust-verifier.service", "virt-trust-verifier.socket", "virt-trust-verifier-browsers.socket"}
	for _, u := range units[1:] {
		put(t, filepath.Join(root, u), read(t, "../systemd/"+u))
	}
	for _, u := range units {
		if out := run(t, analyze, "verify", "--man=no", filepath.Join(root, u)); strings.Contains(out, root) || strings.Contains(out, "virt-trust") {
			t.Errorf("%s: %s", u, out)
		}
	}
	run(t, analyze, "security", "--offline=true", "--no-pager", "--threshold="+maxVerifierExposure, filepath.Join(root, "virt-trust-verifier.service"))
}

// TestAlerts: promtool reads the example alerts, and they fire when they should.
func TestAlerts(t *testing.T) {
	promtool := tool(t, "promtool")
	run(t, promtool, "check", "rules", "prometheus/virt-trust-alerts.yml")
	run(t, promtool, "test", "rules", "prometheus/virt-trust-alerts.test.yml")
}
