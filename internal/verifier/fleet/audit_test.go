package fleet

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
)

func auditLog(n int) ([]AuditEntry, []byte) {
	var all []AuditEntry
	var out []byte
	var head AuditHead
	for i := range n {
		e := head.Next(AuditEntry{Time: time.Unix(1000+int64(i), 1_234_567), Actor: "anna", Action: "a", Subject: "s\u2028\u0001\b\f\"\\<é", Detail: `{"a":1}`})
		head = AuditHead{e.ID, e.Hash}
		all = append(all, e)
		out = append(append(out, e.Line()...), '\n')
	}
	return all, out
}

// The form that is hashed never changes: logs out there depend on it.
func TestAuditForm(t *testing.T) {
	all, _ := auditLog(2)
	const want = `{"action":"a","actor":"anna","detail":"{\"a\":1}","hash":"2ad9","id":1,"previous":"","subject":"s` + "\u2028" + `\u0001\b\f\"\\<é","time":"1970-01-01T00:16:40.001234Z"}`
	e := all[0]
	e.Hash = "2ad9"
	if got := string(e.Line()); got != want {
		t.Errorf("form\n%s, want\n%s", got, want)
	}
	if all[0].Hash != "ab701c9bf3ad0226b7fc88fbdc2bafeec8d8c0f7d52f7dbe20436d593f9d8ddf" {
		t.Errorf("hash %s", all[0].Hash)
	}
	if all[1].Previous != all[0].Hash || all[1].ID != 2 {
		t.Errorf("%+v", all[1])
	}
	var back AuditEntry
	if err := json.Unmarshal(all[1].Line(), &back); err != nil || back != all[1] {
		t.Errorf("%+v, %v", back, err)
	}
}

func TestVerifyExport(t *testing.T) {
	all, log := auditLog(5)
	head := AuditHead{5, all[4].Hash}
	noted := []AuditHead{{}, {2, all[1].Hash}, head}
	if got, err := VerifyExport(bytes.NewReader(log), noted...); err != nil || got != head {
		t.Fatalf("%+v, %v", got, err)
	}
	if got, err := VerifyExport(strings.NewReader("")); err != nil || got != (AuditHead{}) {
		t.Fatalf("empty: %+v, %v", got, err)
	}
	lines := strings.SplitAfter(strings.TrimSuffix(string(log), "\n"), "\n")
	edit := func(f func([]string) []string) string { return strings.Join(f(append([]string(nil), lines...)), "") }
	rehashed := all[2]
	rehashed.Actor = "berta"
	rehashed.Hash = rehashed.Digest()
	for name, c := range map[string]struct {
		log   string
		id    int64
		noted []AuditHead
	}{
		"changed":        {edit(func(l []string) []string { l[2] = strings.Replace(l[2], "anna", "anne", 1); return l }), 3, nil},
		"hashed anew":    {edit(func(l []string) []string { l[2] = string(rehashed.Line()) + "\n"; return l }), 4, nil},
		"left out":       {edit(func(l []string) []string { return append(l[:2], l[3:]...) }), 3, nil},
		"swapped":        {edit(func(l []string) []string { l[1], l[2] = l[2], l[1]; return l }), 2, nil},
		"twice":          {edit(func(l []string) []string { l[2] = l[1]; return l }), 3, nil},
		"beginning gone": {edit(func(l []string) []string { return l[1:] }), 1, nil},
		"cut":            {edit(func(l []string) []string { return l[:3] }), 5, noted},
		"another log":    {string(log), 4, []AuditHead{{4, all[3].Previous}}},
		"spaces":         {edit(func(l []string) []string { l[0] = strings.Replace(l[0], ":", ": ", 1); return l }), 1, nil},
		"key twice":      {edit(func(l []string) []string { l[0] = strings.Replace(l[0], `{`, `{"actor":"berta",`, 1); return l }), 1, nil},
		"other key":      {edit(func(l []string) []string { l[0] = strings.Replace(l[0], `{`, `{"x":1,`, 1); return l }), 1, nil},
		"no JSON":        {"x\n", 1, nil},
		"empty line":     {"\n" + string(log), 1, nil},
		"too long":       {strings.Repeat("x", MaxAuditLine+1), 1, nil},
	} {
		var broken *AuditError
		if _, err := VerifyExport(strings.NewReader(c.log), c.noted...); !errors.As(err, &broken) || broken.ID != c.id {
			t.Errorf("%s: %v, want entry %d", name, err, c.id)
		}
	}
	wrong := errors.New("broken pipe")
	if _, err := VerifyExport(failing{wrong}); !errors.Is(err, wrong) {
		t.Errorf("reader: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// What is accepted is exactly a log that was written that way.
func FuzzVerifyExport(f *testing.F) {
	_, log := auditLog(3)
	f.Add(log)
	f.Add([]byte("{}\n"))
	f.Add(bytes.Replace(log, []byte("anna"), []byte("\xff\x00"), 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		head, err := VerifyExport(bytes.NewReader(b))
		if err != nil {
			return
		}
		var at AuditHead
		for line := range bytes.Lines(b) {
			var e AuditEntry
			if err := json.Unmarshal(line, &e); err != nil {
				t.Fatal(err)
			}
			if next := at.Next(e); !bytes.Equal(next.Line(), bytes.TrimRight(line, "\r\n")) {
				t.Fatalf("accepted %q", line)
			}
			at = AuditHead{e.ID, e.Hash}
		}
		if at != head {
			t.Fatalf("head %+v, want %+v", head, at)
		}
	})
}

func TestCleanText(t *testing.T) {
	for in, want := range map[string]string{"": "", "ok é": "ok é", "a\x00b": "a\uFFFDb", "a\xffb": "a\uFFFDb", "\xff\x00": "\uFFFD\uFFFD"} {
		if got := CleanText(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
