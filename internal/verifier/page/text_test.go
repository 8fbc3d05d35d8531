package page

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestReveal(t *testing.T) {
	for in, want := range map[string]string{
		"plain\n\tline":                         "plain\n\tline",
		"":                                      "",
		"a\u202eb":                              "a⟨U+202E⟩b",
		"a\u200bb":                              "a⟨U+200B⟩b",
		"\u2066x\u2069":                         "⟨U+2066⟩x⟨U+2069⟩",
		"\x00\x1b[31m\x7f\r":                    "␀␛[31m␡␍",
		"\u0085":                                "⟨U+0085⟩",
		"\xff\xfe":                              "⟨xFF⟩⟨xFE⟩",
		"\U000e0041":                            "⟨U+E0041⟩",
		"\u2028":                                "⟨U+2028⟩",
		"Zürich 東京 🙂":                           "Zürich 東京 🙂",
		"a\u0301":                               "a\u0301",
		"a\u0301\u0301\u0301\u0301\u0301\u0301": "a\u0301\u0301\u0301\u0301⟨U+0301⟩⟨U+0301⟩",
		"\ufffd":                                "\ufffd",
		"x\u3164":                               "x⟨U+3164⟩",
	} {
		if got := string(reveal([]byte(in))); got != want {
			t.Errorf("reveal(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestOneLine(t *testing.T) {
	for in, want := range map[string]string{"a": "a", " a  ": "␠a␠␠", "a\nb\tc\r": "a␊b␉c␍", "  ": "␠␠", "": ""} {
		if got := oneLine(in); got != want {
			t.Errorf("oneLine(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestCut(t *testing.T) {
	for _, c := range []struct {
		in   string
		n    int
		want string
	}{
		{"short", 10, "short"},
		{"/usr/bin/qemu-system-x86_64", 12, "/usr/bi…6_64"},
		{"東京東京東京", 7, "東京…京"},
		{"a\u202e" + strings.Repeat("b", 40), 12, "a⟨U+202…bbbb"},
	} {
		if got := cut(c.in, c.n); got != c.want {
			t.Errorf("cut(%q, %d) = %q, want %q", c.in, c.n, got, c.want)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("a\u202e\xff\x00東京", 8)
	f.Add(strings.Repeat("\u0301", 20), 3)
	f.Fuzz(func(t *testing.T, s string, n int) {
		out := reveal([]byte(s))
		if !utf8.Valid(out) {
			t.Fatalf("%q: no UTF-8", out)
		}
		for _, r := range string(out) {
			if hidden(r) || r < ' ' && r != '\n' && r != '\t' {
				t.Fatalf("%q: %U is left", out, r)
			}
		}
		if again := reveal(out); string(again) != string(out) {
			t.Fatalf("%q, then %q", out, again)
		}
		n = min(max(n, 1), 200)
		width := 0
		for _, r := range cut(s, n) {
			width += cells(r)
		}
		if width > n {
			t.Fatalf("cut(%q, %d) is %d broad", s, n, width)
		}
	})
}
