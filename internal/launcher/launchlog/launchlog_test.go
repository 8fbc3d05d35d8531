package launchlog

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"virt-trust/internal/testkit"
)

func zeros() map[string][]byte {
	return map[string][]byte{"sha1": make([]byte, 20), "sha256": make([]byte, 32)}
}

func hexOf(s string) string { d := sha256.Sum256([]byte(s)); return hex.EncodeToString(d[:]) }

// sample is a log of a boot, two files, and a start.
func sample(t testing.TB) []byte {
	t.Helper()
	set := Set([][32]byte{sha256.Sum256([]byte("qemu")), sha256.Sum256([]byte("swtpm"))})
	var file []byte
	for _, e := range []Entry{
		{Event: EventBoot, Time: 1, Boot: &Boot{ID: "b", ResetCount: 7, PCR: 15, Before: Hex(zeros())}},
		{Event: EventFiles, Time: 2, Files: []File{{N: 1, Role: "emulator", Path: "/usr/bin/qemu", SHA256: hexOf("qemu"), By: "package"}, {N: 2, Role: "swtpm", Path: "/usr/bin/swtpm", SHA256: hexOf("swtpm"), IMA: true}}},
		{Event: EventStart, Time: 3, Start: &Start{VM: "4d7e4855-358c-441c-ae14-1f6d9f242818", Generation: 4, LabelGeneration: 1795740664230927870, EK: hexOf("ek"), Launchers: []int{1, 2}, LaunchersSHA256: hex.EncodeToString(set[:])}},
	} {
		line, err := Encode(e)
		if err != nil {
			t.Fatal(err)
		}
		file = append(append(file, line...), '\n')
	}
	return file
}

func TestReplay(t *testing.T) {
	file := sample(t)
	l, err := Parse(file)
	if err != nil {
		t.Fatal(err)
	}
	if l.Entries != 3 || len(l.Files) != 2 || l.Starts != 1 || l.Last.Generation != 4 || l.Boot.PCR != 15 {
		t.Errorf("%+v", l)
	}
	if n := l.Number("/usr/bin/swtpm", sha256.Sum256([]byte("swtpm"))); n != 2 {
		t.Errorf("swtpm is number %d", n)
	}
	if n := l.Number("/usr/bin/swtpm", sha256.Sum256([]byte("other"))); n != 0 {
		t.Errorf("another swtpm is number %d", n)
	}
	// By hand: what sha256sum would give.
	pcr := make([]byte, 32)
	for _, line := range strings.Split(strings.TrimSuffix(string(file), "\n"), "\n") {
		d := sha256.Sum256([]byte(line))
		v := sha256.Sum256(append(pcr, d[:]...))
		pcr = v[:]
	}
	if !bytes.Equal(l.Values["sha256"], pcr) {
		t.Errorf("the PCR is %x, not %x", l.Values["sha256"], pcr)
	}

	for _, c := range []struct {
		values map[string][]byte
		reset  uint32
		want   Standing
	}{
		{l.Values, 7, Replays}, {l.Previous, 7, Pending}, {zeros(), 7, Broken}, {zeros(), 8, WasReset}, {l.Values, 8, WasReset}, {nil, 7, Broken},
		{map[string][]byte{"sha256": l.Values["sha256"]}, 7, Broken},
	} {
		if got := l.Against(c.values, c.reset); got != c.want {
			t.Errorf("against %x after reset %d: %s, not %s", c.values, c.reset, got, c.want)
		}
	}
	if got := new(Log).Against(zeros(), 0); got != NotThere {
		t.Errorf("an empty log: %s", got)
	}
}

// A log of which one bank is wanted has that one alone, and it is the same.
func TestOneBank(t *testing.T) {
	file := sample(t)
	whole, err := Parse(file)
	if err != nil {
		t.Fatal(err)
	}
	l := &Log{Bank: "sha1"}
	lines, _ := Split(file)
	for i, line := range lines {
		if err := l.Add(line); err != nil {
			t.Fatal(err)
		}
		// Also to one who asks while the log grows.
		if n := l.Number("/usr/bin/swtpm", sha256.Sum256([]byte("swtpm"))); (n == 2) != (i > 0) {
			t.Errorf("after line %d swtpm is number %d", i+1, n)
		}
	}
	if want := map[string][]byte{"sha1": whole.Values["sha1"]}; !Equal(l.Values, want) {
		t.Errorf("%x, want %x", l.Values, want)
	}
	again := append(append(file, lines[2]...), '\n') // another start with the same launchers
	if l, err := Parse(again); err != nil || l.Starts != 2 {
		t.Errorf("%+v, %v", l, err)
	}
}

// TestAltered takes a log's meaning or its bytes apart: what is not refused as
// no log must give another PCR.
func TestAltered(t *testing.T) {
	file := sample(t)
	good, _ := Parse(file)
	for i := range file {
		for _, bit := range []byte{1, 0x20} {
			b := bytes.Clone(file)
			b[i] ^= bit
			l, err := Parse(b)
			if err == nil && Equal(l.Values, good.Values) {
				t.Fatalf("byte %d altered, and the log replays to the same", i)
			}
		}
	}
	lines, _ := Split(file)
	for name, b := range map[string][]byte{
		"two boots":                            append(bytes.Clone(file), append(bytes.Clone(lines[0]), '\n')...),
		"no boot":                              append(bytes.Clone(lines[1]), '\n'),
		"files twice":                          append(bytes.Clone(file), append(bytes.Clone(lines[1]), '\n')...),
		"unknown file":                         append(append(bytes.Clone(lines[0]), '\n'), append(bytes.Clone(lines[2]), '\n')...),
		"another set":                          bytes.Replace(file, []byte(`"launchers":[1,2]`), []byte(`"launchers":[2]`), 1),
		"another set than before, of the same": append(append(bytes.Clone(file), bytes.Replace(lines[2], []byte(`"launchers_sha256":"4`), []byte(`"launchers_sha256":"5`), 1)...), '\n'),
		"other event":                          bytes.Replace(file, []byte(EventStart), []byte("vm-stop"), 1),
		"no JSON":                              []byte("x\n"),
	} {
		if _, err := Parse(b); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	torn := file[:len(file)-5]
	l, err := Parse(torn)
	if err != nil || l.Entries != 2 {
		t.Errorf("with a torn end: %d entries, %v", l.Entries, err)
	}
	if _, rest := Split(torn); len(rest) == 0 {
		t.Error("the torn end is lost")
	}
}

// TestEventLog has tpm2-tools read the log.
func TestEventLog(t *testing.T) {
	tool := testkit.Need(t, "tpm2_eventlog")
	file := sample(t)
	b, err := TCG(file)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool, name).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	l, _ := Parse(file)
	for _, want := range []string{"EV_IPL", "PCRIndex: 15", hex.EncodeToString(l.Values["sha1"]), hex.EncodeToString(l.Values["sha256"]), "/usr/bin/swtpm"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("tpm2_eventlog does not say %q:\n%s", want, out)
		}
	}
	if n := strings.Count(string(out), "EV_IPL"); n != 3 {
		t.Errorf("%d events:\n%s", n, out)
	}
	if _, err := TCG(nil); !errors.Is(err, ErrFormat) {
		t.Errorf("an empty log: %v", err)
	}
}

func TestEncode(t *testing.T) {
	line, err := Encode(Entry{Event: EventFiles, Files: []File{{N: 1, Path: "/a\n<b>", SHA256: hexOf("")}}})
	if err != nil || bytes.ContainsRune(line, '\n') || !json.Valid(line) {
		t.Errorf("%q, %v", line, err)
	}
	if _, err := Encode(Entry{Event: EventFiles, Files: []File{{Path: strings.Repeat("x", MaxLine)}}}); err == nil {
		t.Error("an entry without end")
	}
}

func FuzzParse(f *testing.F) {
	file := sample(f)
	f.Add(file)
	f.Add(file[:len(file)/2])
	f.Add([]byte(`{"event":"boot","boot":{"pcr":15,"before":{"sha256":""}}}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := Parse(b)
		if l.Entries > 0 && (len(l.Values) == 0 || l.Against(l.Values, l.Boot.ResetCount) != Replays) {
			t.Error("a log that does not replay to itself")
		}
		_, torn := Split(b)
		if tcg, e := TCG(b); (e == nil) != (err == nil && l.Entries > 0) || e == nil && len(tcg) < (len(b)-len(torn))/2 {
			t.Errorf("parsed: %v; in the TCG's format: %v", err, e)
		}
	})
}

// Lines need no JSON library, unless something in them is escaped or is not as
// Encode writes it.
func TestPlain(t *testing.T) {
	lines, _ := Split(sample(t))
	for _, line := range lines {
		if _, ok := plain(line); !ok {
			t.Errorf("%s is not", line)
		}
	}
	boot, files, start := string(lines[0]), string(lines[1]), string(lines[2])
	for _, line := range []string{
		"", "{", "{}", "}", boot[:len(boot)-1], boot + "}", strings.Replace(boot, `:7,`, `:4294967296,`, 1), strings.Replace(boot, `"}}`, `",}}`, 1), files[:len(files)-1], start[:len(start)-1], files + " ", start + "}",
		strings.Replace(files, "/usr/bin/qemu", `/usr/bin/\u0071emu`, 1), strings.Replace(files, "/usr/bin/qemu", "/usr/bin/q\u00e9mu", 1), strings.Replace(files, `"n":1`, `"n":-1`, 1),
		strings.Replace(files, `"n":1`, `"n":01`, 1), strings.Replace(files, `"n":1`, `"n":1.0`, 1), strings.Replace(files, `},{`, `}{`, 1), strings.Replace(files, `},{`, `},,{`, 1),
		strings.Replace(start, `"time":3`, `"time":9223372036854775808`, 1), strings.Replace(start, `"time":3`, `"time":10000000000000000000`, 1), strings.Replace(start, `[1,2]`, `null`, 1), strings.Replace(start, `[1,2]`, `[1,2,]`, 1), strings.Replace(start, `[1,2]`, `[,1,2]`, 1),
	} {
		if e, ok := plain([]byte(line)); ok || e.Boot != nil || e.Files != nil || e.Start != nil {
			t.Errorf("%s is read as %+v", line, e)
		}
	}
}

// What is read without the JSON library is what the library reads.
func FuzzPlain(f *testing.F) {
	lines, _ := Split(sample(f))
	for _, line := range lines {
		f.Add(line)
	}
	f.Add([]byte(`{"event":"boot","time":0,"boot":{"id":"","reset_count":0,"pcr":0,"before":{},"gap":""}}`))
	f.Add([]byte(`{"event":"launchers","time":0,"files":[{"n":1,"role":"","path":"","sha256":"","by":"","ima":true,"verity":""}]}`))
	f.Add([]byte(`{"event":"vm-start","time":0,"start":{"vm":"","generation":0,"launchers":[],"launchers_sha256":""}}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		e, ok := plain(line)
		if !ok {
			return
		}
		var want Entry
		if err := json.Unmarshal(line, &want); err != nil || !reflect.DeepEqual(e, want) {
			t.Errorf("%+v\nis not\n%+v, %v", e, want, err)
		}
	})
}

// A log that is taken up again where it was left is the log that was read whole.
func TestResume(t *testing.T) {
	var lines [][]byte
	add := func(e Entry) {
		t.Helper()
		b, err := Encode(e)
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, b)
	}
	d := sha256.Sum256([]byte("file"))
	set := Set([][32]byte{d})
	add(Entry{Event: EventBoot, Boot: &Boot{ID: "b", PCR: 15, Before: map[string]string{"sha256": strings.Repeat("0", 64)}}})
	add(Entry{Event: EventFiles, Files: []File{{N: 1, Role: "swtpm", Path: "/usr/bin/swtpm", SHA256: hex.EncodeToString(d[:])}}})
	add(Entry{Event: EventStart, Start: &Start{VM: "v", Launchers: []int{1}, LaunchersSHA256: hex.EncodeToString(set[:])}})
	whole := &Log{}
	for i, line := range lines {
		if i > 0 {
			l := Resume(Log{Boot: whole.Boot, Entries: whole.Entries, Files: whole.Files, Starts: whole.Starts, Values: whole.Values})
			for _, rest := range lines[i:] {
				if err := l.Add(rest); err != nil {
					t.Fatal(err)
				}
			}
			if l.Entries != len(lines) || l.Starts != 1 || l.Number("/usr/bin/swtpm", d) != 1 {
				t.Errorf("resumed after %d lines: %+v", i, l)
			}
		}
		if err := whole.Add(line); err != nil {
			t.Fatal(err)
		}
	}
	l := Resume(Log{Boot: whole.Boot, Entries: 1, Values: whole.Values})
	if err := l.Add(lines[0]); err == nil {
		t.Error("a log begins twice")
	}
}
