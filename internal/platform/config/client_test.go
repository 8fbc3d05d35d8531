package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestClient(t *testing.T) {
	dir := t.TempDir()
	own, all := filepath.Join(dir, "own"), filepath.Join(dir, "all")
	if c, err := LoadClient(own, all); err != nil || c != (Client{}) {
		t.Errorf("%+v, %v", c, err)
	}
	os.WriteFile(all, []byte("verifier = \"https://all:8443\"\nca = \"/ca.pem\"\n"), 0o600)
	if c, err := LoadClient(own, all); err != nil || c.Verifier != "https://all:8443" || c.CA != "/ca.pem" {
		t.Errorf("%+v, %v", c, err)
	}
	os.WriteFile(own, []byte("verifier = \"https://own\"\ntoken_file = \"/token\"\n"), 0o600)
	if c, err := LoadClient(own, all); err != nil || c != (Client{Verifier: "https://own", TokenFile: "/token"}) {
		t.Errorf("%+v, %v", c, err)
	}
	for text, want := range map[string]string{
		"verifier = \"http://v\"": "https", "verifier = \"https://u:p@v\"": "https", "verifier = \"https://v/v1\"": "https", "ca = \"ca.pem\"": "absolute",
		"token = \"secret\"": "line 1: unknown key",
	} {
		if _, err := ParseClient([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
