package eventlog

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// Description is an event in words.
type Description struct {
	What  string // a noun phrase: "kernel command line", `boot application \EFI\debian\shimx64.efi`
	Value string // what it was measured of, where that is text or can be said in a few words; else ""
	// kind is What without what differs between two versions of one thing.
	kind string
}

// maxWords of an event are shown.
const maxWords = 400

// clean makes the words of a log fit for a terminal.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
	if len(s) > maxWords {
		s = strings.ToValidUTF8(s[:maxWords], "") + "…"
	}
	return s
}

// text is data that is text, in UTF-16 or in bytes.
func text(data []byte) (string, bool) {
	if s, ok := narrow(data); ok && len(data) >= 4 && mostlyASCII(data) {
		return s, true
	}
	b := bytes.TrimRight(data, "\x00")
	for _, c := range b {
		if c < ' ' && c != '\t' && c != '\n' || c == 0x7f {
			return "", false
		}
	}
	return string(b), len(b) > 0
}

// mostlyASCII tells UTF-16 from bytes that happen to be pairs.
func mostlyASCII(b []byte) bool {
	zero := 0
	for i := 1; i < len(b); i += 2 {
		if b[i] == 0 {
			zero++
		}
	}
	return zero*4 >= len(b) // half of the units, at least
}

var fixedNames = map[EventType]string{
	CRTMContents: "contents of the firmware's root of trust", CRTMVersion: "version of the firmware's root of trust",
	Microcode: "CPU microcode", GPT: "partition table", GPT2: "partition table",
	HandoffTables: "tables that the firmware hands over", HandoffTables2: "tables that the firmware hands over",
	HCRTM: "start of the hardware's root of trust",
}

// Describe says in words what an event is. Nothing of it is checked.
func (e *Event) Describe() Description {
	if name, ok := fixedNames[e.Type]; ok {
		d := Description{What: name, kind: name}
		if e.Type == CRTMVersion {
			d.Value, _ = text(e.Data)
			d.Value = clean(d.Value)
		}
		return d
	}
	switch e.Type {
	case Separator:
		d := Description{What: "end of the firmware's own measurements", kind: "separator"}
		if !bytes.Equal(e.Data, make([]byte, 4)) {
			d.Value = hex.EncodeToString(e.Data[:min(4, len(e.Data))])
		}
		return d
	case Action:
		s, _ := text(e.Data)
		return Description{What: fmt.Sprintf("firmware's action %q", clean(s)), kind: "action " + s}
	case VariableConfig, VariableBoot, VariableBoot2, VariableAuthority:
		return e.describeVariable()
	case BootApplication, BootDriver, RuntimeDriver:
		what := map[EventType]string{BootApplication: "boot application", BootDriver: "driver", RuntimeDriver: "driver"}[e.Type]
		path := e.imagePath()
		if path == "" {
			return Description{What: what + " in memory", kind: what}
		}
		return Description{What: what + " " + clean(path), kind: what}
	case FirmwareBlob, FirmwareBlob2:
		return e.describeBlob()
	case IPL:
		return e.describeIPL()
	case EventTag:
		return e.describeTag()
	}
	d := Description{What: fmt.Sprintf("event of type %#x", uint32(e.Type))}
	d.kind = d.What
	if s, ok := text(e.Data); ok && len(s) > 3 {
		d.What += fmt.Sprintf(" %q", clean(s))
	}
	return d
}

// Variable is the name of the UEFI variable that the event's data shows; "" where
// they show none.
func (e *Event) Variable() string {
	name, _, _ := variable(e.Data)
	return name
}

// describeVariable: UEFI_VARIABLE_DATA (PFP, 10.4.2).
func (e *Event) describeVariable() Description {
	name, data, ok := variable(e.Data)
	if !ok {
		return Description{What: "UEFI variable", kind: "variable"}
	}
	what := "UEFI variable " + name
	switch {
	case e.Type == VariableAuthority:
		d := Description{What: "Secure Boot authority from " + clean(name), kind: "authority"}
		d.Value = clean(subject(data))
		return d
	case slices.Contains([]string{"SecureBoot", "PK", "KEK", "db", "dbx", "dbt", "dbr"}, name):
		what = "Secure Boot variable " + name
	case name == "BootOrder":
		what = "boot order"
	case strings.HasPrefix(name, "Boot") && len(name) == 8:
		what = "boot entry " + name
	}
	d := Description{What: clean(what), kind: "variable " + name}
	switch {
	case name == "SecureBoot" && len(data) == 1:
		d.Value = map[byte]string{0: "off", 1: "on"}[data[0]]
	case name == "BootOrder":
		var order []string
		for i := 0; i+1 < len(data) && len(order) < 64; i += 2 {
			order = append(order, fmt.Sprintf("%04X", binary.LittleEndian.Uint16(data[i:])))
		}
		d.Value = strings.Join(order, ",")
	case strings.HasPrefix(what, "boot entry") && len(data) > 6:
		rest := data[6:] // EFI_LOAD_OPTION: attributes, length of the path, text
		for i := 0; i+1 < len(rest); i += 2 {
			if rest[i] == 0 && rest[i+1] == 0 {
				d.Value, _ = narrow(rest[:i+2])
				break
			}
		}
		d.Value = clean(d.Value)
	case strings.HasPrefix(what, "Secure Boot"):
		if n, ok := signatures(data); ok {
			d.Value = fmt.Sprintf("%d entries", n)
			if n == 1 {
				d.Value = "1 entry"
			}
		}
	}
	return d
}

func variable(b []byte) (name string, data []byte, ok bool) {
	r := &reader{b: b}
	r.take(16)
	nameLen, dataLen := r.u64(), r.u64()
	if nameLen > 1024 || dataLen > maxData {
		return "", nil, false
	}
	wideName := r.take(2 * int(nameLen))
	data = r.take(int(dataLen))
	if r.failed {
		return "", nil, false
	}
	name, ok = narrow(append(slices.Clone(wideName), 0, 0))
	return name, data, ok && name != ""
}

// signatures counts the entries of a list of EFI_SIGNATURE_LISTs (UEFI,
// 32.4.1).
func signatures(b []byte) (n int, ok bool) {
	for len(b) > 0 {
		r := &reader{b: b}
		r.take(16)
		list, header, size := r.u32(), r.u32(), r.u32()
		if r.failed || uint64(list) > uint64(len(b)) || list < 28 || size == 0 || uint64(header)+28 > uint64(list) {
			return 0, false
		}
		n += int((list - 28 - header) / size)
		b = b[list:]
	}
	return n, true
}

// subject shortens what an authority is: a certificate's text is not worth
// parsing ASN.1 for, its common name is readable as it stands.
func subject(data []byte) string {
	for _, name := range []string{"Microsoft Windows Production PCA 2011", "Microsoft Corporation UEFI CA 2011", "Microsoft UEFI CA 2023", "Windows UEFI CA 2023", "Debian Secure Boot CA", "Canonical Ltd. Master Certificate Authority", "Red Hat Secure Boot CA 5"} {
		if bytes.Contains(data, []byte(name)) {
			return name
		}
	}
	return ""
}

func (e *Event) describeBlob() Description {
	r := &reader{b: e.Data}
	name := ""
	if e.Type == FirmwareBlob2 {
		s, _ := text(r.take(int(r.u8())))
		name = " " + clean(s)
	}
	base, length := r.u64(), r.u64()
	if r.failed {
		return Description{What: "firmware volume", kind: "blob"}
	}
	return Description{
		What: fmt.Sprintf("firmware volume%s", name), Value: fmt.Sprintf("%d KiB at %#x", length>>10, base), kind: "blob" + name,
	}
}

// imagePath is the file part of a UEFI_IMAGE_LOAD_EVENT's device path (PFP,
// 10.2.3; UEFI, 10.3), or what else names the image.
func (e *Event) imagePath() string {
	r := &reader{b: e.Data}
	r.take(24)
	n := r.u64()
	if r.failed || n > uint64(len(r.b)) {
		return ""
	}
	r.b = r.b[:n]
	path := ""
	for len(r.b) >= 4 {
		kind, sub, size := r.u8(), r.u8(), int(r.u16())
		node := r.take(size - 4)
		if r.failed || kind == 0x7f {
			break
		}
		switch {
		case kind == 4 && sub == 4: // media, file path
			s, ok := narrow(node)
			if !ok {
				return ""
			}
			path = strings.TrimSuffix(path, `\`) + s
		case kind == 4 && (sub == 6 || sub == 7) && len(node) == 16: // firmware file, firmware volume
			path += map[byte]string{6: "firmware file ", 7: "firmware volume "}[sub] + guid(node) + " "
		}
	}
	return strings.TrimSpace(path)
}

func guid(b []byte) string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint16(b[4:]), binary.LittleEndian.Uint16(b[6:]), b[8:10], b[10:16])
}

// What GRUB and systemd write before what they measured.
const (
	grubCommand = "grub_cmd: "
	grubCmdline = "kernel_cmdline: "
)

// PCRs by what boot loaders put there (the Linux TPM PCR Registry).
const (
	pcrImages      = 4
	pcrGRUBText    = 8
	pcrFiles       = 9
	pcrUnified     = 11
	pcrKernelText  = 12
	pcrMachineKeys = 14
)

func (e *Event) describeIPL() Description {
	s, ok := text(e.Data)
	if !ok {
		return Description{What: "boot loader's measurement", kind: "ipl"}
	}
	switch {
	case strings.HasPrefix(s, grubCommand):
		cmd := s[len(grubCommand):]
		verb, _, _ := strings.Cut(cmd, " ")
		return Description{What: "GRUB command", Value: clean(cmd), kind: "grub " + verb}
	case strings.HasPrefix(s, grubCmdline):
		return Description{What: "kernel command line", Value: clean(s[len(grubCmdline):]), kind: "cmdline"}
	case e.PCR == pcrFiles:
		return Description{What: "file " + clean(s) + ", loaded by GRUB", kind: "file " + fileKind(s)}
	case e.PCR == pcrUnified && strings.HasPrefix(s, "."):
		return Description{What: "section " + clean(s) + " of the unified kernel image", kind: "section " + s}
	case e.PCR == pcrUnified:
		return Description{What: fmt.Sprintf("boot phase %q", clean(s)), kind: "phase " + s}
	case e.PCR == pcrKernelText:
		return Description{What: "kernel command line", Value: clean(s), kind: "cmdline"}
	case e.PCR == pcrMachineKeys, e.PCR == 7:
		return Description{What: "shim's variable " + clean(s), kind: "shim " + s}
	}
	return Description{What: fmt.Sprintf("boot loader's measurement %q", clean(s)), kind: "ipl " + s}
}

// fileKind is a file's name up to its version, so that a kernel is held against
// the one that took its place.
func fileKind(path string) string {
	name := path[strings.LastIndexByte(path, '/')+1:]
	for i, r := range name {
		if (r == '-' || r == '_') && i+1 < len(name) && name[i+1] >= '0' && name[i+1] <= '9' {
			return name[:i]
		}
	}
	return name
}

const (
	tagInitrd  = "Linux initrd"
	tagOptions = "LOADED_IMAGE::LoadOptions"
)

// describeTag: a PCClient tagged event (PFP, 10.4.2.1), as the kernel's EFI
// stub makes.
func (e *Event) describeTag() Description {
	r := &reader{b: e.Data}
	id := r.u32()
	s, ok := text(r.take(int(r.u32())))
	switch {
	case !ok:
		return Description{What: fmt.Sprintf("tagged event %#x", id), kind: fmt.Sprintf("tag %#x", id)}
	case s == tagInitrd:
		return Description{What: "initial file system (initrd)", kind: s}
	case s == tagOptions:
		return Description{What: "command line of the kernel's EFI stub", kind: s}
	}
	return Description{What: fmt.Sprintf("tagged event %q", clean(s)), kind: "tag " + s}
}
