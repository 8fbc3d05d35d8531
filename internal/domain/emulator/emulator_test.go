package emulator

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"virt-trust/internal/domain"
)

const ours = Dir + "/qemu-system-x86_64"

func TestOurs(t *testing.T) {
	for p, want := range map[string]string{
		ours: "qemu-system-x86_64", "/usr/bin/qemu-system-x86_64": "", Dir: "", Dir + "/": "", Dir + "/../x": "", Dir + "/a/b": "",
		Dir + "x/qemu": "", "": "",
	} {
		if name, ok := Ours(p); ok != (want != "") || ok && name != want {
			t.Errorf("%q: %q, %t", p, name, ok)
		}
	}
}

func TestReplace(t *testing.T) {
	for _, c := range []struct{ before, text, after, was string }{
		{"<domain><devices><emulator>", "/usr/bin/qemu-system-x86_64", "</emulator></devices></domain>", "/usr/bin/qemu-system-x86_64"},
		{
			"<?xml version='1.0'?>\n<!-- <devices><emulator>/no</emulator></devices> -->\n<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\r\n <metadata>\n<x:devices xmlns:x='y'><x:emulator>/no</x:emulator></x:devices></metadata><devices>\n <disk/><emulator >",
			" /a&amp;b<!-- why --><![CDATA[<c>]]>", "</emulator><emulator>/second</emulator>\n</devices><qemu:commandline><qemu:arg value='-x'/></qemu:commandline></domain>\n\n", " /a&b<c>",
		},
		{"<domain><emulator>/no</emulator><devices><x xmlns='urn:other'><emulator>/no</emulator></x><emulator a='b'>", "", "</emulator\n></devices></domain>", ""},
	} {
		out, was, err := Replace([]byte(c.before+c.text+c.after), ours)
		if err != nil || was != c.was || string(out) != c.before+ours+c.after {
			t.Errorf("%s: %q, %v\n%s", c.before, was, err, out)
		}
	}
	for what, doc := range map[string]string{
		"no emulator": "<domain><devices/></domain>", "another document": "<network><devices><emulator>/x</emulator></devices></network>",
		"nothing": "", "not to the end": "<domain><devices><emulator>/x", "empty": "<domain><devices><emulator/></devices></domain>",
		"an element inside": "<domain><devices><emulator><a>/x</a></emulator></devices></domain>",
		"a document type":   "<!DOCTYPE domain [<!ENTITY e '/x'>]><domain><devices><emulator>/x</emulator></devices></domain>",
		"too deep":          "<domain><a><devices><emulator>/x</emulator></devices></a></domain>",
		"too long":          "<domain><devices><emulator>/x</emulator></devices>" + strings.Repeat(" ", domain.MaxXML) + "</domain>",
	} {
		if out, _, err := Replace([]byte(doc), ours); err == nil {
			t.Errorf("%s: %s", what, out)
		}
	}
	for _, p := range []string{"", "relative", "/new\nline", "/\xff"} {
		if _, _, err := Replace([]byte("<domain><devices><emulator>/x</emulator></devices></domain>"), p); err == nil {
			t.Errorf("the path %q", p)
		}
	}
}

// TestLibvirtsXML: in every domain XML that is tested elsewhere, to set and to
// restore gives what was there, byte for byte, and only the emulator differs.
func TestLibvirtsXML(t *testing.T) {
	files, _ := filepath.Glob("../testdata/*.xml")
	if len(files) < 10 {
		t.Fatalf("%d files", len(files))
	}
	for _, file := range files {
		doc, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		f, err := domain.Parse(doc)
		if err != nil {
			t.Fatal(err)
		}
		set, was, err := Replace(doc, ours)
		if f.Emulator == "" {
			if err == nil {
				t.Errorf("%s names no emulator: %q", file, was)
			}
			continue
		}
		if err != nil || was != f.Emulator {
			t.Errorf("%s: %q, %v", file, was, err)
			continue
		}
		g, err := domain.Parse(set)
		if err != nil || g.Emulator != ours {
			t.Errorf("%s: %+v, %v", file, g, err)
		}
		if back, was, err := Replace(set, f.Emulator); err != nil || was != ours || string(back) != string(doc) {
			t.Errorf("%s: not restored: %q, %v", file, was, err)
		}
	}
}

func FuzzReplace(f *testing.F) {
	f.Add("<domain><devices><emulator>/x</emulator></devices></domain>")
	f.Add("<domain><metadata><a:emulator xmlns:a='b'/></metadata><devices><emulator><![CDATA[/x]]></emulator></devices></domain>")
	f.Add("<domain><devices><emulator/><emulator>/x</emulator></devices></domain>")
	f.Fuzz(func(t *testing.T, doc string) {
		out, _, err := Replace([]byte(doc), ours)
		if err != nil {
			return
		}
		// What is there now is what was put there, and what was around it still is.
		again, was, err := Replace(out, "/x")
		if err != nil || was != ours {
			t.Fatalf("%q became %q: %q, %v", doc, out, was, err)
		}
		i := strings.Index(string(out), ours)
		for i >= 0 && (!strings.HasPrefix(doc, string(out[:i])) || !strings.HasSuffix(doc, string(out[i+len(ours):]))) {
			j := strings.Index(string(out[i+1:]), ours)
			if j < 0 {
				t.Fatalf("%q became %q and %q", doc, out, again)
			}
			i += 1 + j
		}
	})
}
