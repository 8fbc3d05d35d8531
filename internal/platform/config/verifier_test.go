package config

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const aDigest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

func TestVerifierDefaults(t *testing.T) {
	c, err := LoadVerifier(filepath.Join(t.TempDir(), "none"))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(DefaultVerifier(), c); d != "" {
		t.Fatal(d)
	}
	if err := DefaultVerifier().check(); err != nil {
		t.Fatalf("the defaults are wrong themselves: %v", err)
	}
}

func TestParseVerifier(t *testing.T) {
	c, err := ParseVerifier([]byte(`
names = ["verifier.example.org", "2001:db8::1"]
database = "postgres://virt-trust@db/fleet"
[rounds]
interval = "10s"
[[token]]
name = "alice"
role = "policy"
sha256 = "` + aDigest + `"
[oidc]
issuer = "https://id.example.org"
client_id = "vt"
redirect_url = "https://verifier.example.org/oidc/callback"
operator = ["ops"]
`))
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultVerifier()
	want.Names, want.Database, want.Rounds.Interval = []string{"verifier.example.org", "2001:db8::1"}, "postgres://virt-trust@db/fleet", Duration(10*time.Second)
	want.Tokens = []VerifierToken{{Name: "alice", Role: "policy", SHA256: aDigest}}
	want.OIDC.Issuer, want.OIDC.ClientID, want.OIDC.RedirectURL = "https://id.example.org", "vt", "https://verifier.example.org/oidc/callback"
	want.OIDC.Operator = []string{"ops"}
	if d := cmp.Diff(want, c); d != "" {
		t.Fatal(d)
	}
}

func TestVerifierRefusals(t *testing.T) {
	token := func(name, role, digest string) string {
		return "[[token]]\nname = \"" + name + "\"\nrole = \"" + role + "\"\nsha256 = \"" + digest + "\"\n"
	}
	for text, want := range map[string]string{
		"lisen = [\"x\"]":                               "line 1: unknown key",
		"listen = []":                                   "listen: empty",
		"names = [\"a b\"]":                             "no DNS name",
		"names = [\"\"]":                                "no DNS name",
		"database = \"mysql://u:secret@h/d\"":           "neither sqlite",
		"[ca]\nkey = \"ca.pem\"":                        "absolute",
		"[browsers]\ncertificate = \"/a\"":              "browsers.key",
		"[browsers]\nkey = \"/a\"":                      "browsers.certificate",
		"[browsers]\ncertificate = \"a\"\nkey = \"/b\"": "absolute",
		"[browsers]\ncertificate = \"/a\"\nkey = \"/b\"\nlisten = []":                            "browsers.listen: empty",
		"[browsers]\ncertificate = \"/a\"\nkey = \"/b\"\nlisten = [\":8443\"]":                   "in listen too",
		"[rounds]\ninterval = \"10ms\"":                                                          "between",
		"[rounds]\ninterval = \"5m\"":                                                            "not longer than",
		"[results]\naccess = \"all\"":                                                            "all",
		"[policy]\nreference_values = \"lax\"":                                                   "lax",
		"[enrolment]\napproval = \"none\"":                                                       "none",
		"[retention]\nrounds = \"1s\"":                                                           "between",
		"[limits]\nconnections = 0":                                                              "between",
		"[limits]\nheader_timeout = \"0s\"":                                                      "between",
		"[webhooks]\nallow_networks = [\"10/8\"]":                                                "allow_networks",
		token("", "reader", aDigest):                                                             "no name",
		token("a\\u0007", "reader", aDigest):                                                     "strange",
		token("a", "admin", aDigest):                                                             "admin",
		token("a", "reader", "abc"):                                                              "no SHA-256",
		token("a", "reader", strings.ToUpper(aDigest)):                                           "lower case",
		token("a", "reader", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"): "empty token",
		token("a", "reader", aDigest) + token("b", "policy", aDigest):                            "twice",
		token("a", "reader", aDigest) + "secret = \"x\"":                                         "line 5: unknown key",
		"[oidc]\nissuer = \"http://id\"":                                                         "https",
		"[ca]\ncrl_url = \"ldap://x\"":                                                           "crl_url",
		"[ca]\ncrl_url = \"http:///ca.crl\"":                                                     "crl_url",
		"[oidc]\nissuer = \"https://id\"\nredirect_url = \"https://v/oidc/callback\"\nclient_id = \"c\"": "nobody could do anything",
		"[oidc]\nissuer = \"https://id\"\nreader = [\"r\"]\nclient_id = \"\"\n":                          "client_id: empty",
	} {
		_, err := ParseVerifier([]byte(text))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "secret@") {
			t.Errorf("a password in %v", err)
		}
	}
}

// Where people log in by two ways and two have to agree, a token says whose it is.
func TestVerifierPersons(t *testing.T) {
	const both = "[policy]\nfour_eyes = true\n[oidc]\nissuer = \"https://id.example.org\"\nclient_id = \"vt\"\nredirect_url = \"https://v.example.org/oidc/callback\"\noperator = [\"ops\"]\n"
	one := strings.Replace(both, "true", "false", 1)
	token := func(more string) string { return "[[token]]\nname = \"laptop\"\nsha256 = \"" + aDigest + "\"\n" + more }
	for text, bad := range map[string]bool{
		both + token("role = \"operator\""):                               true,
		both + token("role = \"policy\""):                                 true,
		both + token("role = \"policy\"\nperson = \"alice@example.org\""): false,
		both + token("role = \"reader\""):                                 false,
		one + token("role = \"policy\""):                                  false,
		"[policy]\nfour_eyes = true\n" + token("role = \"policy\""):       false,
		both + token("role = \"policy\"\nperson = \"a\\u0007\""):          true,
	} {
		if _, err := ParseVerifier([]byte(text)); (err != nil) != bad {
			t.Errorf("%s: %v", text, err)
		} else if bad && !strings.Contains(err.Error(), "token") {
			t.Errorf("%s: %v", text, err)
		}
	}
}
