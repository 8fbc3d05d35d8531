package eventlog

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"virt-trust/internal/testkit"

	gotestdata "github.com/google/go-eventlog/testdata"
)

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func parse(t testing.TB, b []byte) *Log {
	t.Helper()
	l, err := UntrustedParse(b)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// boots is testdata/boots.json.
type boots struct {
	PCRs  map[string]map[uint]string
	Files map[string]File
}

func theBoots(t testing.TB) (b boots) {
	t.Helper()
	if err := json.Unmarshal(read(t, "boots.json"), &b); err != nil {
		t.Fatal(err)
	}
	return b
}

// live are the PCRs that a boot of testdata ended with.
func (b boots) live(t testing.TB, name string) map[uint][]byte {
	t.Helper()
	all := map[uint][]byte{}
	for p, v := range b.PCRs[name] {
		var err error
		if all[p], err = hex.DecodeString(v); err != nil {
			t.Fatal(err)
		}
	}
	if len(all) != 15 {
		t.Fatalf("%d PCRs of %s", len(all), name)
	}
	return all
}

// Logs of machines replay to the PCRs that those machines had, and are written
// as they were read.
func TestReplay(t *testing.T) {
	b := theBoots(t)
	for name := range b.PCRs {
		raw := read(t, name+".bin")
		l := parse(t, raw)
		if !bytes.Equal(l.Marshal(), raw) {
			t.Errorf("%s: written otherwise than it was read", name)
		}
		got, err := l.Replay("sha256")
		if err != nil {
			t.Fatal(err)
		}
		for p, want := range b.live(t, name) {
			if !bytes.Equal(got[p], want) {
				t.Errorf("%s: PCR %d replays to %x, the TPM has %x", name, p, got[p], want)
			}
		}
		if _, err := l.Explain("sha256", b.live(t, name)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

var strangers = map[string][]byte{
	"arch": gotestdata.ArchLinuxWorkstationEventLog, "debian": gotestdata.Debian10EventLog, "glinux": gotestdata.GlinuxAlexEventLog,
	"rhel": gotestdata.Rhel8EventLog, "ubuntu-sev": gotestdata.Ubuntu1804AmdSevEventLog, "ubuntu-no-dbx": gotestdata.Ubuntu2104NoDbxEventLog,
	"ubuntu": gotestdata.Ubuntu2104NoSecureBootEventLog, "ubuntu-snp": gotestdata.Ubuntu2404AmdSevSnpEventLog, "cos": gotestdata.Cos101AmdSevEventLog,
}

// Logs of other people's machines replay to what tpm2_eventlog says; where it
// does not know the locality of the start (5.4 does not), to what the machine's
// TPM had, which go-eventlog's tests have on record.
func TestStrangers(t *testing.T) {
	program := testkit.Need(t, "tpm2_eventlog")
	for name, raw := range strangers {
		l := parse(t, raw)
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		out, _ := exec.Command(program, file).Output() // it fails after some logs whose PCRs it has printed
		banks := regexp.MustCompile(`(?m)^  (sha\d+):\n((?:    \d+ *: 0x[0-9a-f]+\n)+)`).FindAllSubmatch(out, -1)
		if len(banks) == 0 {
			t.Errorf("%s: tpm2_eventlog prints no PCRs", name)
		}
		for _, m := range banks {
			bank := string(m[1])
			if _, _, known := bankOf(bank); !known {
				continue
			}
			got, err := l.Replay(bank)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			for _, line := range regexp.MustCompile(`(\d+) *: 0x([0-9a-f]+)`).FindAllSubmatch(m[2], -1) {
				p, _ := strconv.ParseUint(string(line[1]), 10, 8)
				want := string(line[2])
				if name == "glinux" && p == 0 {
					want = map[string]string{
						"sha1": "29d236609a5f9cc6912af44ba5f57b13a17c8a84", "sha256": "0e5ea849d7647a1ac1becc096fee4df98f00f8015f934afadaab0b8aa20b38a5",
					}[bank]
				}
				if v, ok := got[uint(p)]; ok && hex.EncodeToString(v) != want {
					t.Errorf("%s, %s: PCR %d replays to %x, tpm2_eventlog says %s", name, bank, p, v, line[2])
				}
			}
		}
		for i := range l.Events {
			if d := l.Events[i].Describe(); d.What == "" {
				t.Errorf("%s: event %d has no words", name, i)
			}
		}
	}
}

func TestDescribe(t *testing.T) {
	want := map[string][]string{
		"grub": {
			`7 Secure Boot variable SecureBoot "on"`, `7 Secure Boot variable db "2 entries"`, `4 boot application \EFI\BOOT\BOOTX64.EFI ""`,
			`9 file (hd0,msdos1)/EFI/debian/grub.cfg, loaded by GRUB ""`, `8 GRUB command "linux /vmlinuz root=/dev/vda1 ro console=ttyS0 quiet"`,
			`8 kernel command line "/vmlinuz root=/dev/vda1 ro console=ttyS0 quiet"`, `9 file /initrd.img, loaded by GRUB ""`,
			`14 shim's variable MokList ""`, `0 firmware volume "896 KiB at 0x820000"`,
		},
		"uki": {`11 section .linux of the unified kernel image ""`, `9 initial file system (initrd) ""`, `7 Secure Boot variable SecureBoot "off"`},
		"sd":  {`12 kernel command line "initrd=\\initrd.img root=/dev/vda1 ro console=ttyS0 quiet"`, `4 boot application \vmlinuz ""`},
	}
	for name, lines := range want {
		var got []string
		for _, e := range parse(t, read(t, name+".bin")).Events {
			d := e.Describe()
			got = append(got, strconv.Itoa(int(e.PCR))+" "+d.What+" "+strconv.Quote(d.Value))
		}
		for _, line := range lines {
			if !slices.Contains(got, line) {
				t.Errorf("%s: no %s among\n%s", name, line, strings.Join(got, "\n"))
			}
		}
	}
}

var all = []uint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14}

func TestDiff(t *testing.T) {
	want := map[string][]string{
		"uki": {
			`4 boot application \EFI\BOOT\BOOTX64.EFI changed (digest `, `4 boot application in memory changed (digest `,
			`9 command line of the kernel's EFI stub changed (digest `, `9 initial file system (initrd) changed (digest `,
			`11 section .linux of the unified kernel image changed (digest `, `11 section .cmdline of the unified kernel image changed (digest `,
			`11 section .initrd of the unified kernel image changed (digest `,
		},
		"sd": {
			`4 boot application \vmlinuz changed (digest `, `9 command line of the kernel's EFI stub changed (digest `, `9 initial file system (initrd) changed (digest `,
			`12 kernel command line changed from "initrd=\\initrd.img root=/dev/vda1 ro console=ttyS0 quiet" to "initrd=\\initrd.img root=/dev/vda1 ro console=ttyS0 quiet mitigations=auto"`,
		},
		"grub": {
			`8 GRUB command changed from "linux /vmlinuz root=/dev/vda1 ro console=ttyS0 quiet" to "linux /vmlinuz root=/dev/vda1 ro console=ttyS0 quiet mitigations=auto"`,
			`8 kernel command line changed from "/vmlinuz root=/dev/vda1 ro console=ttyS0 quiet" to "/vmlinuz root=/dev/vda1 ro console=ttyS0 quiet mitigations=auto"`,
			`9 file (hd0,msdos1)/EFI/debian/grub.cfg, loaded by GRUB changed (digest `, `9 file /initrd.img, loaded by GRUB changed (digest `,
		},
	}
	for name, lines := range want {
		was, now := parse(t, read(t, name+".bin")), parse(t, read(t, name+"2.bin"))
		changes, err := Diff(was, now, "sha256", all)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, c := range changes {
			got = append(got, strconv.Itoa(int(c.PCR))+" "+c.What)
		}
		if len(got) != len(lines) {
			t.Errorf("%s: %d changes, want %d:\n%s", name, len(got), len(lines), strings.Join(got, "\n"))
			continue
		}
		for i := range lines {
			if !strings.HasPrefix(got[i], lines[i]) {
				t.Errorf("%s: %s\nwant %s", name, got[i], lines[i])
			}
		}
		if c, err := Diff(was, was, "sha256", all); len(c) != 0 || err != nil {
			t.Errorf("%s differs from itself: %v, %v", name, c, err)
		}
	}
	for _, c := range second(Diff(parse(t, read(t, "sd.bin")), parse(t, read(t, "grub.bin")), "sha256", all))(t) {
		if strings.Contains(c.What, `SecureBoot changed from "off" to "on"`) {
			return
		}
	}
	t.Error("that Secure Boot was turned on is not said")
}

func second[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// What is predicted from one boot and the new files is what the next boot had.
func TestPredict(t *testing.T) {
	b := theBoots(t)
	f := b.Files
	const line = "root=/dev/vda1 ro console=ttyS0 quiet mitigations=auto"
	for name, c := range map[string][]Component{
		"uki": {{Kind: Unified, Old: []File{f["kernel"], f["uki"]}, New: f["uki2"]}},
		"sd": {
			{Kind: Kernel, Old: []File{f["uki"], f["kernel"]}, New: f["kernel2"]}, {Kind: Initrd, Old: []File{f["initrd"]}, New: f["initrd2"]},
			{Kind: Cmdline, Text: `initrd=\initrd.img ` + line},
		},
		"grub": {
			{Kind: Initrd, New: f["initrd2"]}, {Kind: Other, Path: "/boot/efi/EFI/debian/grub.cfg", New: f["grub.cfg2"]},
			{Kind: Cmdline, Text: line}, {Kind: Kernel, New: f["kernel"]}, {Kind: Shim, New: f["shim"]},
		},
	} {
		now := second(parse(t, read(t, name+".bin")).Explain("sha256", b.live(t, name)))(t)
		next, err := now.Predict("sha256", all, c...)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got := second(next.Replay("sha256"))(t)
		for p, want := range b.live(t, name+"2") {
			if !bytes.Equal(got[p], want) {
				t.Errorf("%s: PCR %d is predicted as %x, the next boot had %x", name, p, got[p], want)
			}
		}
		if !bytes.Equal(parse(t, next.Marshal()).Marshal(), next.Marshal()) {
			t.Errorf("%s: the predicted log cannot be read", name)
		}
		if c := second(Diff(next, parse(t, read(t, name+"2.bin")), "sha256", all))(t); len(c) != 0 {
			t.Errorf("%s: the predicted log differs from the next boot's: %v", name, c)
		}
	}
}

func TestPredictRefuses(t *testing.T) {
	b := theBoots(t)
	f := b.Files
	for _, c := range []struct {
		log  string
		c    Component
		says string
	}{
		{"uki", Component{Kind: Unified, New: f["uki2"]}, "does not show what uki2 takes the place of"},
		{"uki", Component{Kind: Unified, Old: []File{f["uki2"]}, New: f["uki2"]}, "does not show"},
		{"uki", Component{Kind: Unified, Old: []File{f["uki"]}, New: f["kernel"]}, "no unified kernel image"},
		{"sd", Component{Kind: Kernel, New: f["kernel2"]}, "does not show"},
		{"sd", Component{Kind: Kernel, Old: []File{f["kernel"]}, New: f["initrd"]}, "no image that firmware boots"},
		{"sd", Component{Kind: Kernel, Old: []File{f["initrd"]}, New: f["kernel2"]}, "does not show"},
		{"sd", Component{Kind: Initrd, Old: []File{f["kernel"]}, New: f["initrd2"]}, "does not show"},
		{"sd", Component{Kind: Shim, New: f["shim"]}, "does not show"},
		{"grub", Component{Kind: Kernel, Path: "initrd", Old: []File{f["initrd"]}, New: f["kernel2"]}, "does not show initrd"},
		{"grub", Component{Kind: Other, Path: "/etc/passwd", New: f["initrd"]}, "does not show"},
		{"uki", Component{Kind: Cmdline, Text: "quiet"}, "no command line"},
	} {
		now := parse(t, read(t, c.log+".bin"))
		if _, err := now.Predict("sha256", all, c.c); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s, %+v: %v, want %q", c.log, c.c, err, c.says)
		}
	}
	if _, err := parse(t, read(t, "sd.bin")).Predict("sha256", all); err == nil {
		t.Error("a prediction of nothing")
	}
}

// The boot phases that systemd measures are found; anything else that a log
// does not have is named.
func TestExplain(t *testing.T) {
	b := theBoots(t)
	now := parse(t, read(t, "uki.bin"))
	live := b.live(t, "uki")
	for _, phase := range []string{"enter-initrd", "leave-initrd", "sysinit", "ready"} {
		live[11] = hashOf("sha256", live[11], hashOf("sha256", []byte(phase)))
		l, err := now.Explain("sha256", live)
		if err != nil {
			t.Fatalf("after %s: %v", phase, err)
		}
		if got := second(l.Replay("sha256"))(t); !bytes.Equal(got[11], live[11]) {
			t.Errorf("after %s: PCR 11 is %x", phase, got[11])
		}
	}
	live[7][0] ^= 1
	live[4][0] ^= 1
	var e *NotReplayed
	if _, err := now.Explain("sha256", live); !as(err, &e) || !slices.Equal(e.PCRs, []uint{4, 7, 11}) && !slices.Equal(e.PCRs, []uint{4, 7}) {
		t.Errorf("PCRs 4 and 7 are others: %v", err)
	}
}

func as(err error, target **NotReplayed) bool {
	e, ok := err.(*NotReplayed)
	*target = e
	return ok
}

// A locality other than 0 is where PCR 0 begins.
func TestLocality(t *testing.T) {
	l := second(New("sha256"))(t)
	l.Events = append(l.Events,
		Event{Type: NoAction, Digests: [][]byte{make([]byte, 32)}, Data: append([]byte(localitySignature), 3)},
		Event{Type: Separator, Digests: [][]byte{hashOf("sha256", make([]byte, 4))}, Data: make([]byte, 4)})
	got := second(parse(t, l.Marshal()).Replay("sha256"))(t)
	begin := make([]byte, 32)
	begin[31] = 3
	if want := hashOf("sha256", begin, hashOf("sha256", make([]byte, 4))); !bytes.Equal(got[0], want) {
		t.Errorf("PCR 0 is %x, want %x", got[0], want)
	}
	l.Events = append(l.Events, l.Events[1])
	if _, err := l.Replay("sha256"); err == nil {
		t.Error("a second locality is accepted")
	}
}

func TestSpoilt(t *testing.T) {
	raw := read(t, "sd.bin")
	for n := range len(raw) {
		if l, err := UntrustedParse(raw[:n]); err == nil && !padding(raw[len(l.Marshal()):n]) {
			t.Fatalf("%d bytes of %d are a log", n, len(raw))
		}
	}
	if l := parse(t, append(bytes.Clone(raw), make([]byte, 100)...)); !bytes.Equal(l.Marshal(), raw) {
		t.Error("padding is not left out")
	}
	if _, err := UntrustedParse(make([]byte, MaxSize+1)); err == nil {
		t.Error("a log that is too large is read")
	}
}

// A PE image that the test makes itself, with a digest that it hashes itself.
func TestMeasure(t *testing.T) {
	le16 := func(b []byte, at, v int) { b[at], b[at+1] = byte(v), byte(v>>8) }
	le32 := func(b []byte, at, v int) { le16(b, at, v); le16(b, at+2, v>>16) }
	const pe, opt, optSize, headers = 0x80, 0x80 + 24, 240, 0x400
	b := make([]byte, headers)
	copy(b, "MZ")
	le32(b, 60, pe)
	copy(b[pe:], "PE\x00\x00")
	le16(b, pe+6, 2)
	le16(b, pe+20, optSize)
	le16(b, opt, 0x20B)
	le32(b, opt+60, headers)
	le32(b, opt+64, 0x1234567) // checksum
	le32(b, opt+108, 16)
	content := []string{strings.Repeat("a", 0x200), strings.Repeat("b", 0x200)}
	for i, raw := range []int{headers + 0x200, headers} { // the table is not in the file's order
		s := b[opt+optSize+40*i:]
		copy(s, []string{".text", ".cmdline"}[i])
		le32(s, 8, []int{0x200, 0x300}[i])
		le32(s, 16, 0x200)
		le32(s, 20, raw)
	}
	certs := strings.Repeat("c", 64)
	le32(b, opt+112+32, headers+0x400+8)
	le32(b, opt+112+36, len(certs))
	file := string(b) + content[1] + content[0] + "trailing" + certs
	f := second(Measure(strings.NewReader(file), int64(len(file)), "sha256"))(t)
	want := hashOf("sha256", b[:opt+64], b[opt+68:opt+112+32], b[opt+112+40:], []byte(content[1]+content[0]+"trailing"))
	if !bytes.Equal(f.Image, want) || !bytes.Equal(f.Flat, hashOf("sha256", []byte(file))) || f.Sections != nil {
		t.Errorf("Measure gives %+v, want image %x", f, want)
	}
	p := second(parsePE(strings.NewReader(file), int64(len(file))))(t)
	var memory bytes.Buffer
	memory.ReadFrom(p.content(p.find(".cmdline")))
	if memory.String() != content[1]+strings.Repeat("\x00", 0x100) {
		t.Errorf(".cmdline in memory is %q", memory.String())
	}
	if f := second(Measure(strings.NewReader("text"), 4, "sha256"))(t); f.Image != nil || !bytes.Equal(f.Flat, hashOf("sha256", []byte("text"))) {
		t.Errorf("of a text, Measure gives %+v", f)
	}
}

func FuzzUntrustedParse(f *testing.F) {
	for _, name := range []string{"uki.bin", "sd2.bin", "grub2.bin"} {
		f.Add(read(f, name))
	}
	f.Add(slices.Collect(maps.Values(strangers))[0])
	f.Add(make([]byte, 64))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := UntrustedParse(b)
		if err != nil {
			return
		}
		again, err := UntrustedParse(l.Marshal())
		if err != nil || len(again.Events) != len(l.Events) && !padding(l.Marshal()[len(again.Marshal()):]) {
			t.Fatalf("what was read cannot be read again: %v", err)
		}
		for _, bank := range []string{"sha1", "sha256"} {
			live, err := l.Replay(bank)
			if err != nil {
				continue
			}
			for i := range l.Events {
				l.Events[i].Describe()
			}
			now, err := l.Explain(bank, live)
			if err != nil {
				t.Fatalf("a log does not explain what it replays to: %v", err)
			}
			e := now.Events[len(b)%len(now.Events)]
			new := File{Name: "new", Flat: make([]byte, 32), Image: make([]byte, 32), Sections: []Section{{".linux", make([]byte, 32)}}}
			old := File{Flat: e.digest(), Image: e.digest(), Sections: []Section{{".linux", e.digest()}}}
			for _, c := range []Component{{Kind: Kernel, New: new}, {Kind: Unified, Old: []File{old}, New: new}, {Kind: Cmdline, Text: "x"}, {Kind: Other, Path: "/x", New: new}, {Kind: Shim, New: new}} {
				if next, err := now.Predict(bank, all, c); err == nil {
					if _, err := Diff(now, next, bank, all); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
	})
}

func FuzzMeasure(f *testing.F) {
	f.Add([]byte("MZ"))
	b := make([]byte, 0x400)
	copy(b, "MZ")
	b[60] = 0x80
	copy(b[0x80:], "PE\x00\x00\x00\x00\x01")
	b[0x80+20] = 240
	b[0x98], b[0x99] = 0x0B, 2
	b[0x98+61] = 4
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = Measure(bytes.NewReader(b), int64(len(b)), "sha256")
	})
}
