package layout

import (
	"errors"
	"strings"
	"testing"
)

const lines = `55f7bbb06000-55f7bbb07000 rw-p 00008000 fe:00 10166449                   /usr/bin/swtpm
55f7eb1e0000-55f7eb2a6000 rw-p 00000000 00:00 0                          [heap]
7f28a05da000-7f28a05dc000 rw-p 001d3000 fe:00 326269                     /usr/lib/x86_64-linux-gnu/libc.so.6
7f28a05dc000-7f28a05e9000 rw-p 00000000 00:00 0 
7f28a05e9000-7f28a05f3000 r--p 00000000 fe:00 15630608                   /usr/lib/x86_64-linux-gnu/libtpms.so.0.9.2
7f28a05f3000-7f28a067a000 r-xp 0000a000 fe:00 15630608                   /usr/lib/x86_64-linux-gnu/libtpms.so.0.9.2
7f28a067a000-7f28a06c7000 r--p 00091000 fe:00 15630608                   /usr/lib/x86_64-linux-gnu/libtpms.so.0.9.2
7f28a06c7000-7f28a06cb000 r--p 000dd000 fe:00 15630608                   /usr/lib/x86_64-linux-gnu/libtpms.so.0.9.2
7f28a06cb000-7f28a06ce000 rw-p 000e1000 fe:00 15630608                   /usr/lib/x86_64-linux-gnu/libtpms.so.0.9.2
7f28a06ce000-7f28a0701000 rw-p 00000000 00:00 0 
7f28a070b000-7f28a0710000 r--p 00000000 fe:00 15630720                   /usr/lib/x86_64-linux-gnu/swtpm/libswtpm_libtpms.so.0.0.0
7f28a0722000-7f28a0724000 rw-p 00000000 00:00 0 
7ffcfccff000-7ffcfcd20000 rw-p 00000000 00:00 0                          [stack]
`

func TestParseMaps(t *testing.T) {
	bss := Span{0x7f28a06cb000, 0x7f28a0701000}
	for name, c := range map[string]struct {
		edit string // from|to
		data Span
	}{
		"as it is":       {"", bss},
		"upgraded":       {"libtpms.so.0.9.2\n|libtpms.so.0.9.2 (deleted)\n", bss},
		"a named .bss":   {"00:00 0 \n7f28a070b|00:00 0                          [anon:.bss]\n7f28a070b", bss},
		"no .bss":        {"7f28a06ce000-7f28a0701000 rw-p 00000000 00:00 0 \n|", Span{0x7f28a06cb000, 0x7f28a06ce000}},
		"a gap":          {"7f28a06ce000-|7f28a06cf000-", Span{0x7f28a06cb000, 0x7f28a06ce000}},
		"other memory":   {"00:00 0 \n7f28a070b|00:00 0    [heap]\n7f28a070b", Span{0x7f28a06cb000, 0x7f28a06ce000}},
		"another's .bss": {"7f28a06cb000-7f28a06ce000 rw-p 000e1000 fe:00 15630608                   /usr/lib/x86_64-linux-gnu/libtpms.so.0.9.2|7f28a06cb000-7f28a06ce000 rw-p 000e1000 fe:00 15630608                   /usr/lib/other", Span{}},
		"absent":         {"libtpms.so|libtpm2.so", Span{}},
		"no code":        {"r-xp|r--p", Span{}},
		"no beginning":   {"r--p 00000000 fe:00 15630608|r--p 00001000 fe:00 15630608", Span{}},
		"twice":          {"r--p 00091000 fe:00 15630608|r--p 00000000 fe:00 15630608", Span{}},
		"two files":      {"r--p 00091000 fe:00 15630608                   /usr/lib/x86_64-linux-gnu/libtpms.so.0.9.2|r--p 00091000 fe:00 15630608                   /tmp/libtpms.so.0", Span{}},
		"shared":         {"rw-p 000e1000|rw-s 000e1000", Span{}},
		"writable code":  {"r-xp 0000a000|rwxp 0000a000", Span{}},
		"no number":      {"7f28a05e9000-7|zf28a05e9000-7", Span{}},
		"backwards":      {"7f28a06ce000-7f28a0701000|7f28a0701000-7f28a06ce000", Span{}},
		"cut":            {"\n7f28a070b000-7f28a0710000 r--p 00000000 fe:00 15630720                   /usr/lib/x86_64-linux-gnu/swtpm/libswtpm_libtpms.so.0.0.0|\n7f28a070b000-7f28a0710000 r--p", Span{}},
	} {
		from, to, _ := strings.Cut(c.edit, "|")
		if from != "" && !strings.Contains(lines, from) {
			t.Fatalf("%s: nothing to edit", name)
		}
		text := lines
		if from != "" {
			text = strings.ReplaceAll(lines, from, to)
		}
		l, err := ParseMaps([]byte(text), "libtpms")
		switch {
		case c.data == Span{} && !errors.Is(err, ErrShape):
			t.Errorf("%s: %+v, %v", name, l, err)
		case c.data != Span{} && (err != nil || l.Data != c.data || l.Base != 0x7f28a05e9000 || len(l.Text) != 1):
			t.Errorf("%s: %+v, %v", name, l, err)
		}
	}
	if _, err := ParseMaps(make([]byte, MaxMaps+1), "libtpms"); !errors.Is(err, ErrShape) {
		t.Error(err)
	}
}

func FuzzParseMaps(f *testing.F) {
	f.Add([]byte(lines))
	f.Fuzz(func(t *testing.T, text []byte) {
		l, err := ParseMaps(text, "libtpms")
		if err != nil {
			return
		}
		if l.Data.Len() == 0 || l.Data.Len() > maxLibrary || len(l.Text) == 0 || l.Data.Start < l.Base {
			t.Fatalf("%+v", l)
		}
		for _, s := range l.Text {
			if s.Len() > maxLibrary || s.End <= s.Start {
				t.Fatalf("%+v", l)
			}
		}
	})
}
