package config

import (
	"strings"
	"testing"
)

func TestAgent(t *testing.T) {
	c, err := ParseAgent(nil)
	if err != nil || c.Pull.Listen != "" || c.Pull.PerMinute != 12 {
		t.Errorf("%+v, %v: something listens by default", c, err)
	}
	digest := strings.Repeat("ab", 32)
	c, err = ParseAgent([]byte("[pull]\nlisten = \":8444\"\ntokens = [\"" + digest + "\"]\n"))
	if err != nil || c.Pull.Listen != ":8444" || c.Pull.Tokens[0] != digest {
		t.Errorf("%+v, %v", c, err)
	}
	for text, want := range map[string]string{
		"x = 1":                      "line 1: unknown key",
		"[pull]\nlisten = \":8444\"": "nobody may ask",
		"[pull]\nlisten = \"8444\"\ntokens = [\"" + digest + "\"]": "HOST:PORT",
		"[pull]\ntokens = [\"secret\"]":                            "SHA-256",
		"[pull]\ncertificate = \"/a\"":                             "one without the other",
		"[pull]\nlisten = \":8444\"\nclient_ca = \"ca.pem\"":       "absolute",
		"[pull]\nper_minute = 0":                                   "pull.per_minute",
		"[pull]\nper_minute = 61":                                  "pull.per_minute",
		"[pull]\nlisten = 7":                                       "line 2",
		"[pull]\n\nport = 7":                                       "line 3: unknown key",
	} {
		if _, err := ParseAgent([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func FuzzParseAgent(f *testing.F) {
	f.Add([]byte("[pull]\nlisten = \":8444\"\ntokens = [\"" + strings.Repeat("ab", 32) + "\"]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseAgent(b)
		if err == nil && c.Pull.Listen != "" && c.Pull.ClientCA == "" && len(c.Pull.Tokens) == 0 {
			t.Errorf("anybody may ask: %+v", c)
		}
	})
}
