package domain

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

// The XML files are what libvirt 9.0.0 (Debian 12) made of `virsh define` and,
// for live.xml, `virsh start`.
func TestGolden(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.xml")
	if len(files) < 12 {
		t.Fatalf("only %d XML files", len(files))
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			doc, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			f, err := Parse(doc)
			if err != nil {
				t.Fatal(err)
			}
			got, _ := json.MarshalIndent(struct {
				Facts     *Facts
				StateDir  string
				LabelDisk *Disk
			}{f, f.StateDir("/var/lib/libvirt/swtpm"), f.LabelDisk()}, "", "  ")
			got = append(got, '\n')
			golden := strings.TrimSuffix(file, "xml") + "golden"
			if *update {
				if err := os.WriteFile(golden, got, 0o666); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), string(got)); d != "" {
				t.Error(d)
			}
			if f.TPM != nil && !HasEmulatorTPM(doc) {
				t.Error("HasEmulatorTPM denies a TPM that is there")
			}
		})
	}
}

const (
	id   = "6f1c2d3e-0000-4a5b-8c6d-000000000001"
	head = "<domain type='kvm'><name>vm</name><uuid>" + id + "</uuid>"
)

func devices(s string) string { return head + "<devices>" + s + "</devices></domain>" }

func TestTPM(t *testing.T) {
	for name, c := range map[string]struct {
		xml  string
		want *TPM
		dir  string
	}{
		"none":                    {"", nil, ""},
		"external":                {"<tpm model='tpm-crb'><backend type='external'><source type='unix' mode='connect' path='/s'/></backend></tpm>", nil, ""},
		"a backend of the future": {"<tpm><backend type='quantum'><x/></backend></tpm>", nil, ""},
		"defaults":                {"<tpm><backend type='emulator'/></tpm>", &TPM{Version: "2.0"}, "/root/" + id + "/tpm2"},
		"1.2":                     {"<tpm><backend type='emulator' version='1.2'/></tpm>", &TPM{Version: "1.2"}, "/root/" + id + "/tpm1.2"},
		"a folder": {"<tpm><backend type='emulator' version='2.0'><source type='dir' path='/srv/t'/></backend></tpm>",
			&TPM{Version: "2.0", StatePath: "/srv/t"}, "/srv/t"},
		"a file": {"<tpm><backend type='emulator' version='2.0'><source type='file' path='/srv/t.state'/></backend></tpm>",
			&TPM{Version: "2.0", StatePath: "/srv/t.state", StateIsFile: true}, "/srv/t.state"},
		"with a spapr proxy": {"<tpm model='tpm-spapr-proxy'><backend type='passthrough'><device path='/dev/tpmrm0'/></backend></tpm>" +
			"<tpm model='tpm-spapr'><backend type='emulator'/></tpm>", &TPM{Version: "2.0"}, "/root/" + id + "/tpm2"},
		"in another namespace": {"<x:tpm xmlns:x='urn:x'><x:backend type='emulator'/></x:tpm>", nil, ""},
	} {
		f, err := Parse([]byte(devices(c.xml)))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if d := cmp.Diff(c.want, f.TPM); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if got := f.StateDir("/root"); got != c.dir {
			t.Errorf("%s: StateDir = %q, want %q", name, got, c.dir)
		}
	}
}

func TestNotUnderstood(t *testing.T) {
	tpm := "<tpm><backend type='emulator'/></tpm>"
	for name, xml := range map[string]string{
		"empty":             "",
		"not XML":           "hello",
		"cut off":           devices(tpm)[:100],
		"no domain":         "<network><name>n</name></network>",
		"two roots":         devices("") + devices(tpm),
		"no UUID":           "<domain><name>n</name></domain>",
		"no name":           "<domain><uuid>" + id + "</uuid></domain>",
		"upper-case UUID":   strings.Replace(devices(""), id, strings.ToUpper(id), 1),
		"UUID with path":    strings.Replace(devices(""), id, "../../../../../../../../../etc/shadow", 1),
		"two TPMs":          devices(tpm + tpm),
		"TPM 3":             devices("<tpm><backend type='emulator' version='3.0'/></tpm>"),
		"relative state":    devices("<tpm><backend type='emulator'><source type='dir' path='a/b'/></backend></tpm>"),
		"state with dots":   devices("<tpm><backend type='emulator'><source type='dir' path='/a/../b'/></backend></tpm>"),
		"secret is a path":  devices("<tpm><backend type='emulator'><encryption secret='/etc/shadow'/></backend></tpm>"),
		"document type":     "<!DOCTYPE domain [<!ENTITY e 'x'>]>" + devices(""),
		"entity":            devices("<emulator>&e;</emulator>"),
		"NUL":               devices("<!-- \x00 -->"),
		"not UTF-8":         devices("<!-- \xff -->"),
		"long name":         strings.Replace(devices(""), ">vm<", ">"+strings.Repeat("v", 5000)+"<", 1),
		"too long":          devices(strings.Repeat(" ", MaxXML)),
		"too many disks":    devices(strings.Repeat("<disk/>", maxDisks+1)),
		"too deep":          devices(strings.Repeat("<a>", 300) + strings.Repeat("</a>", 300)),
		"deep backing":      devices("<disk>" + strings.Repeat("<backingStore type='file'>", 100_000) + strings.Repeat("</backingStore>", 100_000) + "</disk>"),
		"boot order is bad": devices("<disk><boot order='-1'/></disk>"),
	} {
		if f, err := Parse([]byte(xml)); err == nil {
			t.Errorf("%s: understood as %+v", name, f)
		} else if len(err.Error()) > 500 {
			t.Errorf("%s: the error has %d bytes", name, len(err.Error()))
		}
	}
}

func TestLabelDisk(t *testing.T) {
	disk := func(attr, driver, inside string) string {
		return fmt.Sprintf("<disk %s><driver name='qemu' type='%s'/>%s</disk>", attr, driver, inside)
	}
	file := "<source file='/i.qcow2'/><target dev='vda'/>"
	for name, c := range map[string]struct {
		xml  string
		want string // target
	}{
		"file":             {disk("type='file' device='disk'", "qcow2", file), "vda"},
		"block":            {disk("type='block' device='disk'", "qcow2", "<source dev='/dev/d'/><target dev='vda'/>"), "vda"},
		"volume":           {disk("type='volume' device='disk'", "qcow2", "<source pool='p' volume='v'/><target dev='vda'/>"), "vda"},
		"device unsaid":    {disk("type='file'", "qcow2", file), "vda"},
		"raw":              {disk("type='file' device='disk'", "raw", file), ""},
		"format unsaid":    {"<disk type='file' device='disk'>" + file + "</disk>", ""},
		"cdrom":            {disk("type='file' device='cdrom'", "qcow2", file), ""},
		"lun":              {disk("type='block' device='lun'", "qcow2", "<source dev='/dev/d'/>"), ""},
		"network":          {disk("type='network' device='disk'", "qcow2", "<source protocol='rbd' name='n'/>"), ""},
		"read-only":        {disk("type='file' device='disk'", "qcow2", file+"<readonly/>"), ""},
		"shareable":        {disk("type='file' device='disk'", "qcow2", file+"<shareable/>"), ""},
		"transient":        {disk("type='file' device='disk'", "qcow2", file+"<transient/>"), ""},
		"empty":            {disk("type='file' device='disk'", "qcow2", "<target dev='vda'/>"), ""},
		"second is first":  {disk("type='file'", "qcow2", file) + disk("type='file'", "qcow2", "<source file='/2'/><target dev='vdb'/><boot order='7'/>"), "vdb"},
		"document order":   {disk("type='file'", "qcow2", "<source file='/2'/><target dev='vdz'/>") + disk("type='file'", "qcow2", file), "vdz"},
		"a cdrom boots":    {disk("type='file' device='cdrom'", "qcow2", "<source file='/c'/><boot order='1'/>") + disk("type='file'", "qcow2", file), "vda"},
		"mirror, overlays": {disk("type='file'", "qcow2", file+"<backingStore type='file'><format type='qcow2'/><source file='/b'/></backingStore><mirror type='file' job='copy'><source file='/m'/></mirror>"), "vda"},
	} {
		f, err := Parse([]byte(devices(c.xml)))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got := ""
		if d := f.LabelDisk(); d != nil {
			got = d.Target
		}
		if got != c.want {
			t.Errorf("%s: label goes to %q, want %q", name, got, c.want)
		}
	}
}

func TestParseHookArgs(t *testing.T) {
	got, err := ParseHookArgs([]string{"my vm", "migrate", "begin", "-"})
	if want := (HookCall{Name: "my vm", Op: OpMigrate, SubOp: "begin"}); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	got, err = ParseHookArgs([]string{"vm", "release", "end", "shutdown", "and more"})
	if want := (HookCall{Name: "vm", Op: OpRelease, SubOp: "end", Extra: "shutdown"}); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for _, argv := range [][]string{nil, {"vm", "start", "begin"}, {strings.Repeat("v", 5000), "start", "begin", "-"}} {
		if got, err := ParseHookArgs(argv); err == nil {
			t.Errorf("%.60q: %+v", argv, got)
		}
	}
}

func TestOperations(t *testing.T) {
	refuse := []Operation{OpPrepare, OpStart, OpRestore, OpMigrate}
	for _, op := range []Operation{OpPrepare, OpStart, OpStarted, OpStopped, OpRelease, OpRestore, OpMigrate, OpReconnect, OpAttach} {
		if !op.Known() {
			t.Errorf("%s is not known", op)
		}
		if got, want := op.MayRefuse(), slices.Contains(refuse, op); got != want {
			t.Errorf("%s: MayRefuse = %t", op, got)
		}
		if got, want := op.Ignored(), slices.Contains([]Operation{OpStarted, OpStopped, OpAttach}, op); got != want {
			t.Errorf("%s: Ignored = %t", op, got)
		}
		if got, want := op.Vetoable(), slices.Contains(refuse, op) || op == OpStarted; got != want {
			t.Errorf("%s: Vetoable = %t", op, got)
		}
	}
	if op := Operation("teleport"); op.Known() || op.Vetoable() || op.MayRefuse() || op.Ignored() {
		t.Error("an unknown operation is known")
	}
}

func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.xml")
	for _, file := range files {
		b, _ := os.ReadFile(file)
		f.Add(b)
	}
	f.Add([]byte(devices("<tpm><backend type='emulator'><source type='file' path='/f'/></backend></tpm>")))
	f.Add([]byte(devices("<x:tpm xmlns:x=''><backend type='emulator'/></x:tpm>")))
	f.Fuzz(func(t *testing.T, doc []byte) {
		facts, err := Parse(doc)
		if err != nil {
			return
		}
		if facts.TPM != nil {
			if !HasEmulatorTPM(doc) {
				t.Fatal("the hook would have overlooked this TPM")
			}
			if dir := facts.StateDir("/r"); filepath.Clean(dir) != dir || !filepath.IsAbs(dir) {
				t.Fatalf("StateDir %q", dir)
			}
		}
		if !IsUUID(facts.UUID) || facts.Name == "" || len(facts.Disks) > maxDisks {
			t.Fatalf("%+v", facts)
		}
		if d := facts.LabelDisk(); d != nil && (d.Format != "qcow2" || d.ReadOnly || d.Shareable) {
			t.Fatalf("%+v", d)
		}
	})
}
