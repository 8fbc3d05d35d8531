// Package domain turns what libvirt says about a VM into the few facts that
// virt-trust acts on. It reads domain XML and never writes it: an element that
// a struct lacks would be lost (hook output replaces the domain's XML).
//
// The XML is libvirt's own, but parts of it (name, metadata, paths) are a
// user's: counts, lengths and depth are bounded here.
package domain

import (
	"bytes"
	"cmp"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	"libvirt.org/go/libvirtxml"
)

const (
	// MaxXML is the largest domain XML that is read, in bytes.
	MaxXML = 4 << 20
	// maxDepth is where libxml2, and so libvirt itself, stops (xmlParserMaxDepth).
	maxDepth = 256
	maxDisks = 1000
	maxName  = 4096 // bytes, of names and paths
)

// Facts is what a domain XML says.
type Facts struct {
	UUID     string // lower case, with dashes
	Name     string // a user's choice: show it with %q, never use it as a key
	Emulator string // absolute path, or "" where the XML names none
	Firmware Firmware
	TPM      *TPM   // nil: no emulated TPM
	Disks    []Disk // by boot order, then in document order
}

// Firmware is what `<os>` says of it. A running or starting domain's XML has the
// loader, if there is one; a definition may leave the choice to libvirt (Auto).
type Firmware struct {
	Arch     string          // of `<type arch=>`: x86_64
	Machine  string          // of `<type machine=>`: pc-q35-7.2
	Auto     string          // of `<os firmware=>`: efi, bios, or ""
	Features map[string]bool // asked for or ruled out: secure-boot, enrolled-keys
	Loader   string          // the code image's path, or ""
	Secure   bool            // `<loader secure='yes'>`
	Template string          // of the NVRAM, or ""
}

// TPM is an emulated TPM, `<tpm><backend type='emulator'>`.
type TPM struct {
	Version         string // "2.0", "1.2"
	StatePath       string // explicit `<source path=>`, absolute and clean, else ""
	StateIsFile     bool   // `<source type='file'>`: StatePath is the state's only file
	SecretUUID      string // `<encryption secret=>`, else ""
	PersistentState bool   // state outlives a transient domain
}

// Disk is a disk of any kind. Which fields are set depends on Type.
type Disk struct {
	Type      string // file, block, volume, network, dir, nvme, vhostuser, ...
	Device    string // disk, cdrom, floppy, lun
	Format    string // of `<driver type=>`, never probed; "" if not said
	Path      string // file and block; a volume is resolved by package libvirt
	Pool      string // volume
	Volume    string // volume
	Target    string // vda
	ReadOnly  bool
	Shareable bool
	Transient bool // `<transient/>`: what is written to it is lost
	BootOrder uint // of `<boot order=>`, 0 if it has none
}

// HasEmulatorTPM is a cheap look before Parse: false only when there surely is
// no emulated TPM, since an element's name cannot be spelt in another way than
// with or without a prefix.
func HasEmulatorTPM(xml []byte) bool {
	return bytes.Contains(xml, []byte("<tpm")) || bytes.Contains(xml, []byte(":tpm"))
}

// Parse reads a domain XML as `virsh dumpxml` and the hook's stdin give it.
// An error says that it could not be understood.
func Parse(doc []byte) (*Facts, error) {
	if len(doc) > MaxXML {
		return nil, fmt.Errorf("domain XML has more than %d bytes", MaxXML)
	}
	if !utf8.Valid(doc) || bytes.IndexByte(doc, 0) >= 0 {
		return nil, errors.New("domain XML is not UTF-8 text")
	}
	dec := xml.NewTokenDecoder(&shallow{tokens: xml.NewDecoder(bytes.NewReader(doc))})
	f := &Facts{}
	if err := f.document(dec); err != nil {
		return nil, fmt.Errorf("domain XML: %w", err)
	}
	if !IsUUID(f.UUID) {
		return nil, fmt.Errorf("domain XML: %.64q is not a UUID", f.UUID)
	}
	if f.Name == "" || len(f.Name) > maxName {
		return nil, errors.New("domain XML: name is missing or too long")
	}
	// Order 0 is none, and wraps round to the end.
	slices.SortStableFunc(f.Disks, func(a, b Disk) int { return cmp.Compare(a.BootOrder-1, b.BootOrder-1) })
	return f, nil
}

// shallow passes tokens on until they are nested too deeply: libvirtxml's own
// unmarshallers recurse and a Go program does not survive a full stack.
type shallow struct {
	tokens *xml.Decoder
	depth  int
}

func (s *shallow) Token() (xml.Token, error) {
	t, err := s.tokens.Token()
	switch t.(type) {
	case xml.StartElement:
		s.depth++
	case xml.EndElement:
		s.depth--
	case xml.Directive:
		return nil, errors.New("a document type is not allowed")
	}
	if s.depth > maxDepth {
		return nil, fmt.Errorf("more than %d nested elements", maxDepth)
	}
	return t, err
}

// document reads the one root element and what stands around it.
func (f *Facts) document(dec *xml.Decoder) error {
	for seen := false; ; {
		t, err := dec.Token()
		if err == io.EOF && seen {
			return nil
		}
		if err != nil {
			return err
		}
		e, ok := t.(xml.StartElement)
		if !ok {
			continue
		}
		if seen || e.Name.Local != "domain" {
			return fmt.Errorf("the root element is <%.64s>", e.Name.Local)
		}
		seen = true
		if err := children(dec, func(e xml.StartElement) error { return f.inDomain(dec, e) }); err != nil {
			return err
		}
	}
}

// children calls do, which must consume the element, for each child of the
// current element, and reads the current element's end.
func children(dec *xml.Decoder, do func(xml.StartElement) error) error {
	for {
		t, err := dec.Token()
		if err != nil {
			return err
		}
		switch e := t.(type) {
		case xml.EndElement:
			return nil
		case xml.StartElement:
			if e.Name.Space != "" { // another vocabulary's element of the same name
				err = dec.Skip()
			} else {
				err = do(e)
			}
			if err != nil {
				return err
			}
		}
	}
}

func (f *Facts) inDomain(dec *xml.Decoder, e xml.StartElement) error {
	switch e.Name.Local {
	case "name":
		return text(dec, e, &f.Name)
	case "uuid":
		return text(dec, e, &f.UUID)
	case "os":
		var x libvirtxml.DomainOS
		if err := dec.DecodeElement(&x, &e); err != nil {
			return fmt.Errorf("<os>: %w", err)
		}
		return f.Firmware.set(x)
	case "devices":
		return children(dec, func(e xml.StartElement) error { return f.inDevices(dec, e) })
	}
	return dec.Skip()
}

// text takes the first element of a kind only, as libvirt's XPath does.
func text(dec *xml.Decoder, e xml.StartElement, into *string) error {
	if *into != "" {
		return dec.Skip()
	}
	return dec.DecodeElement(into, &e)
}

func (w *Firmware) set(x libvirtxml.DomainOS) error {
	w.Auto = x.Firmware
	if x.Type != nil {
		w.Arch, w.Machine = x.Type.Arch, x.Type.Machine
	}
	if x.FirmwareInfo != nil {
		w.Features = map[string]bool{}
		for _, ft := range x.FirmwareInfo.Features {
			w.Features[ft.Name] = ft.Enabled == "yes"
		}
	}
	if x.Loader != nil {
		w.Loader, w.Secure = strings.TrimSpace(x.Loader.Path), x.Loader.Secure == "yes"
	}
	if x.NVRam != nil {
		w.Template = x.NVRam.Template
	}
	for _, p := range []string{w.Loader, w.Template} {
		if p != "" && (!path.IsAbs(p) || len(p) > maxName) {
			return fmt.Errorf("<os>: %.64q is not an absolute path", p)
		}
	}
	return nil
}

func (f *Facts) inDevices(dec *xml.Decoder, e xml.StartElement) error {
	switch e.Name.Local {
	case "emulator":
		return text(dec, e, &f.Emulator)
	case "tpm":
		var x libvirtxml.DomainTPM
		if err := dec.DecodeElement(&x, &e); err != nil {
			return fmt.Errorf("<tpm>: %w", err)
		}
		return f.addTPM(x)
	case "disk":
		if len(f.Disks) == maxDisks {
			return fmt.Errorf("more than %d disks", maxDisks)
		}
		var x libvirtxml.DomainDisk
		if err := dec.DecodeElement(&x, &e); err != nil {
			return fmt.Errorf("<disk>: %w", err)
		}
		f.Disks = append(f.Disks, newDisk(e, x))
		return nil
	}
	return dec.Skip()
}

func (f *Facts) addTPM(x libvirtxml.DomainTPM) error {
	if x.Backend == nil || x.Backend.Emulator == nil {
		return nil
	}
	if f.TPM != nil {
		return errors.New("more than one emulated TPM")
	}
	em := x.Backend.Emulator
	t := &TPM{Version: em.Version, PersistentState: em.PersistentState == "yes"}
	switch t.Version {
	case "", "default":
		t.Version = "2.0" // libvirt's default for every machine that virt-trust knows
	case "1.2", "2.0":
	default:
		return fmt.Errorf("<tpm>: version %.64q is not known", t.Version)
	}
	if em.Encryption != nil {
		if t.SecretUUID = em.Encryption.Secret; !IsUUID(t.SecretUUID) {
			return fmt.Errorf("<tpm>: secret %.64q is not a UUID", t.SecretUUID)
		}
	}
	if s := em.Source; s != nil {
		switch {
		case s.Dir != nil:
			t.StatePath = s.Dir.Path
		case s.File != nil:
			t.StatePath, t.StateIsFile = s.File.Path, true
		}
		// A source without a path is the default place in libvirt's own layout.
		if p := t.StatePath; p != "" && (!path.IsAbs(p) || path.Clean(p) != p || len(p) > maxName) {
			return fmt.Errorf("<tpm>: state path %.64q is not an absolute, clean path", p)
		}
	}
	f.TPM = t
	return nil
}

func newDisk(e xml.StartElement, x libvirtxml.DomainDisk) Disk {
	d := Disk{
		Type: "file", Device: cmp.Or(x.Device, "disk"),
		ReadOnly: x.ReadOnly != nil, Shareable: x.Shareable != nil, Transient: x.Transient != nil,
	}
	for _, a := range e.Attr {
		if a.Name == (xml.Name{Local: "type"}) {
			d.Type = a.Value
		}
	}
	if x.Driver != nil {
		d.Format = x.Driver.Type
	}
	if x.Target != nil {
		d.Target = x.Target.Dev
	}
	if x.Boot != nil {
		d.BootOrder = x.Boot.Order
	}
	if s := x.Source; s != nil {
		switch {
		case s.File != nil:
			d.Path = s.File.File
		case s.Block != nil:
			d.Path = s.Block.Dev
		case s.Volume != nil:
			d.Pool, d.Volume = s.Volume.Pool, s.Volume.Volume
		}
	}
	return d
}

// LabelDisk is the disk whose image carries the label: the first by boot order
// that is a writable qcow2 image of this VM alone, at a place that can be
// opened as a file; nil if there is none.
func (f *Facts) LabelDisk() *Disk {
	for i := range f.Disks {
		d := &f.Disks[i]
		if d.Device != "disk" || d.Format != "qcow2" || d.ReadOnly || d.Shareable || d.Transient {
			continue
		}
		switch {
		case (d.Type == "file" || d.Type == "block") && d.Path != "",
			d.Type == "volume" && d.Pool != "" && d.Volume != "":
			return d
		}
	}
	return nil
}

// StateDir is where the vTPM's state lies: the explicit place, or below root
// as libvirt's qemu_tpm.c lays it out; "" without an emulated TPM.
func (f *Facts) StateDir(root string) string {
	switch {
	case f.TPM == nil:
		return ""
	case f.TPM.StatePath != "":
		return f.TPM.StatePath
	case f.TPM.Version == "1.2":
		return path.Join(root, f.UUID, "tpm1.2")
	}
	return path.Join(root, f.UUID, "tpm2")
}

// IsUUID reports whether s is a UUID as libvirt writes it: lower case, dashes.
func IsUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, c := range []byte(s) {
		if i == 8 || i == 13 || i == 18 || i == 23 {
			if c != '-' {
				return false
			}
		} else if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
