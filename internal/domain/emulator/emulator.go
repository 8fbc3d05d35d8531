// Package emulator knows virt-trust's own emulator, which stands before QEMU,
// and puts an emulator's path into a domain XML.
package emulator

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"virt-trust/internal/domain"
)

const (
	// Dir holds virt-trust's emulators, one for each of Names. It is on nobody's
	// PATH: libvirt would take them for every new VM's default.
	Dir = "/usr/libexec/virt-trust/emulator"
	// RealDir is where the programs are that they stand for, by the same names.
	RealDir = "/usr/bin"
	// Links holds, by the same names, links to the descriptor FD of whoever follows
	// them: what is executed by one keeps its name in ps(1).
	Links = Dir + "/open"
	FD    = 777
)

// Program is what virt-trust-wrapper(8) asks a grant for by RedeemGrant.
const Program = "qemu"

// Names are the emulators that there is a wrapper for: of machines that can
// have an emulated TPM.
func Names() []string {
	return []string{"qemu-system-aarch64", "qemu-system-ppc64", "qemu-system-x86_64"}
}

// Ours reports whether an emulator's path, as the domain XML has it, is one of
// virt-trust's, and of which name.
func Ours(p string) (name string, ok bool) {
	name, ok = strings.CutPrefix(p, Dir+"/")
	return name, ok && name != "" && !strings.Contains(name, "/")
}

// Real is the program that virt-trust's emulator of this name becomes.
func Real(name string) string { return path.Join(RealDir, name) }

// Replace puts another path into the first <emulator> of a domain XML. Not one
// byte beside that element's text is touched. It gives the path that stood there.
func Replace(doc []byte, p string) (out []byte, was string, err error) {
	if len(doc) > domain.MaxXML {
		return nil, "", fmt.Errorf("domain XML has more than %d bytes", domain.MaxXML)
	}
	if !path.IsAbs(p) || strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r > '~' }) {
		return nil, "", fmt.Errorf("%.100q is no path for an emulator", p)
	}
	from, to, was, err := find(doc)
	if err != nil {
		return nil, "", fmt.Errorf("domain XML: %w", err)
	}
	var text bytes.Buffer
	_ = xml.EscapeText(&text, []byte(p)) // a Buffer takes it
	return bytes.Join([][]byte{doc[:from], text.Bytes(), doc[to:]}, nil), was, nil
}

// find gives the bounds of the emulator's text, and the text as it is meant.
func find(doc []byte) (from, to int64, text string, err error) {
	dec := xml.NewDecoder(bytes.NewReader(doc))
	var at []string // names of the elements that are open; of others' vocabularies, ""
	var b strings.Builder
	inside := false
	for {
		before := dec.InputOffset()
		t, err := dec.Token()
		if err == io.EOF {
			err = errors.New("it names no emulator")
		}
		if err != nil {
			return 0, 0, "", err
		}
		switch e := t.(type) {
		case xml.StartElement:
			if inside {
				return 0, 0, "", errors.New("<emulator> holds an element")
			}
			name := e.Name.Local
			if e.Name.Space != "" {
				name = ""
			}
			if len(at) == 0 && name != "domain" {
				return 0, 0, "", fmt.Errorf("the root element is <%.64s>", e.Name.Local)
			}
			at = append(at, name)
			if len(at) == 3 && at[1] == "devices" && at[2] == "emulator" {
				inside, from = true, dec.InputOffset()
			}
		case xml.EndElement:
			if inside {
				if bytes.HasSuffix(doc[:before], []byte("/>")) {
					return 0, 0, "", errors.New("<emulator/> is empty")
				}
				return from, before, b.String(), nil
			}
			at = at[:len(at)-1]
		case xml.CharData:
			if inside {
				b.Write(e)
			}
		case xml.Directive:
			return 0, 0, "", errors.New("a document type is not allowed")
		}
	}
}
