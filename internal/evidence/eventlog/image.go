package eventlog

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// File is what a boot measures of a file, in one PCR bank.
type File struct {
	Name     string
	Flat     []byte    // digest of all of it
	Image    []byte    // Authenticode digest of a PE image; nil if it is none
	Linux    []byte    // the same of the kernel inside a unified kernel image
	Sections []Section // of a unified kernel image, in the order in which they are measured
	Options  []byte    // digest of its .cmdline as the kernel gets it
}

// Section is a section of a unified kernel image.
type Section struct {
	Name   string
	Digest []byte
}

// unifiedSections are those that systemd-stub measures, if it knows them, in
// its order (systemd-stub(7), src/fundamental/uki.h). .pcrsig is not measured.
var unifiedSections = []string{".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey"}

const (
	maxFile    = 1 << 30
	maxHeaders = 1 << 20
	maxCmdline = 64 << 10
	maxPE      = 96 // sections of a PE image, more than which Windows does not load either
)

// Measure gives what a boot measures of the size bytes of a file that r has.
func Measure(r io.ReaderAt, size int64, bank string) (File, error) {
	var f File
	_, h, ok := bankOf(bank)
	if !ok {
		return f, fmt.Errorf("there is no PCR bank %q", bank)
	}
	if size > maxFile {
		return f, fmt.Errorf("%d bytes, at most %d", size, maxFile)
	}
	flat := h.New()
	if _, err := io.Copy(flat, io.NewSectionReader(r, 0, size)); err != nil {
		return f, err
	}
	f.Flat = flat.Sum(nil)
	p, err := parsePE(r, size)
	if errors.Is(err, errNoPE) {
		return f, nil
	}
	if err != nil {
		return f, err
	}
	image := h.New()
	if err := p.authenticode(image); err != nil {
		return f, err
	}
	f.Image = image.Sum(nil)
	if p.find(".linux") == nil {
		return f, nil
	}
	for _, name := range unifiedSections {
		s := p.find(name)
		if s == nil {
			continue
		}
		w := h.New()
		if _, err := io.Copy(w, p.content(s)); err != nil {
			return f, err
		}
		f.Sections = append(f.Sections, Section{name, w.Sum(nil)})
		switch name {
		case ".linux":
			kernel := io.NewSectionReader(r, int64(s.raw), int64(min(s.rawSize, s.size)))
			inner, err := parsePE(kernel, kernel.Size())
			if errors.Is(err, errNoPE) {
				continue
			}
			if err != nil {
				return f, fmt.Errorf("kernel inside: %w", err)
			}
			w := h.New()
			if err := inner.authenticode(w); err != nil {
				return f, fmt.Errorf("kernel inside: %w", err)
			}
			f.Linux = w.Sum(nil)
		case ".cmdline":
			text, err := io.ReadAll(io.LimitReader(p.content(s), maxCmdline))
			if err != nil {
				return f, err
			}
			w := h.New()
			w.Write(wide(strings.TrimRight(string(text), "\x00 \t\n\r")))
			f.Options = w.Sum(nil)
		}
	}
	return f, nil
}

// wide is a text as UEFI has it: UTF-16LE with a NUL.
func wide(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return append(b, 0, 0)
}

// narrow undoes wide; ok is false where b is no such text.
func narrow(b []byte) (s string, ok bool) {
	if len(b) < 2 || len(b)%2 != 0 {
		return "", false
	}
	var units []uint16
	for i := 0; i < len(b); i += 2 {
		units = append(units, binary.LittleEndian.Uint16(b[i:]))
	}
	if n := slices.Index(units, 0); n >= 0 {
		for _, u := range units[n:] {
			if u != 0 {
				return "", false
			}
		}
		units = units[:n]
	}
	s = string(utf16.Decode(units))
	return s, !strings.ContainsRune(s, utf8.RuneError)
}

// image is a PE image, as far as its hash is concerned (Microsoft, PE Format;
// Windows Authenticode Portable Executable Signature Format).
type image struct {
	r        io.ReaderAt
	size     int64
	checksum int64 // where the checksum stands: 4 bytes that are not hashed
	dirEntry int64 // of the certificate table: 8 bytes that are not hashed; 0 if there is none
	headers  int64 // SizeOfHeaders
	certs    int64 // size of the certificate table, which is at the end
	sections []section
}

type section struct {
	name                    string
	size, raw, rawSize, rva uint32
}

var errNoPE = errors.New("no PE image")

func parsePE(r io.ReaderAt, size int64) (*image, error) {
	var dos [64]byte
	if _, err := r.ReadAt(dos[:], 0); errors.Is(err, io.EOF) || err == nil && string(dos[:2]) != "MZ" {
		return nil, errNoPE
	} else if err != nil {
		return nil, err
	}
	at := int64(binary.LittleEndian.Uint32(dos[60:]))
	var head [24]byte
	if at+int64(len(head)) > size {
		return nil, errNoPE
	}
	if _, err := r.ReadAt(head[:], at); err != nil {
		return nil, err
	}
	if string(head[:4]) != "PE\x00\x00" {
		return nil, errNoPE
	}
	numSections := int(binary.LittleEndian.Uint16(head[6:]))
	optSize := int(binary.LittleEndian.Uint16(head[20:]))
	if numSections == 0 || numSections > maxPE || optSize < 96 || optSize > 4096 {
		return nil, fmt.Errorf("PE image with %d sections and an optional header of %d bytes", numSections, optSize)
	}
	rest := make([]byte, optSize+40*numSections)
	optAt := at + int64(len(head))
	if _, err := r.ReadAt(rest, optAt); err != nil {
		return nil, fmt.Errorf("PE image: %w", err)
	}
	opt, table := rest[:optSize], rest[optSize:]
	p := &image{r: r, size: size, checksum: optAt + 64, headers: int64(binary.LittleEndian.Uint32(opt[60:]))}
	dirs := 96
	switch magic := binary.LittleEndian.Uint16(opt); magic {
	case 0x10B:
	case 0x20B:
		dirs = 112
	default:
		return nil, fmt.Errorf("PE image with magic %#x", magic)
	}
	const certificateTable = 4
	if entry := dirs + 8*certificateTable; optSize >= entry+8 && binary.LittleEndian.Uint32(opt[dirs-4:]) > certificateTable {
		p.dirEntry = optAt + int64(entry)
		p.certs = int64(binary.LittleEndian.Uint32(opt[entry+4:]))
	}
	if p.headers < optAt+int64(len(rest)) || p.headers > min(maxHeaders, size) || p.certs > size-p.headers {
		return nil, fmt.Errorf("PE image with headers of %d bytes and certificates of %d, in a file of %d", p.headers, p.certs, size)
	}
	for i := range numSections {
		t := table[40*i:]
		s := section{
			name: string(bytes.TrimRight(t[:8], "\x00")), size: binary.LittleEndian.Uint32(t[8:]), rva: binary.LittleEndian.Uint32(t[12:]),
			rawSize: binary.LittleEndian.Uint32(t[16:]), raw: binary.LittleEndian.Uint32(t[20:]),
		}
		if int64(s.raw)+int64(s.rawSize) > size {
			return nil, fmt.Errorf("PE image whose section %q ends behind the file", s.name)
		}
		p.sections = append(p.sections, s)
	}
	return p, nil
}

// authenticode writes to w what the image's digest is of: the headers without
// checksum and the certificate table's entry, the sections in the order of the
// file, and what is behind them but for the certificates.
func (p *image) authenticode(w io.Writer) error {
	part := func(from, to int64) error {
		if from > to {
			return errors.New("PE image whose parts overlap")
		}
		_, err := io.Copy(w, io.NewSectionReader(p.r, from, to-from))
		return err
	}
	from := p.checksum + 4
	if err := part(0, p.checksum); err != nil {
		return err
	}
	if p.dirEntry != 0 {
		if err := part(from, p.dirEntry); err != nil {
			return err
		}
		from = p.dirEntry + 8
	}
	if err := part(from, p.headers); err != nil {
		return err
	}
	sum := p.headers
	sorted := slices.SortedStableFunc(slices.Values(p.sections), func(a, b section) int { return cmp.Compare(a.raw, b.raw) })
	for _, s := range sorted {
		if s.rawSize == 0 {
			continue
		}
		if err := part(int64(s.raw), int64(s.raw)+int64(s.rawSize)); err != nil {
			return err
		}
		if sum += int64(s.rawSize); sum > p.size {
			return errors.New("PE image whose parts overlap")
		}
	}
	if end := p.size - p.certs; end > sum {
		return part(sum, end)
	}
	return nil
}

func (p *image) find(name string) *section {
	for i := range p.sections {
		if p.sections[i].name == name {
			return &p.sections[i]
		}
	}
	return nil
}

// maxZeros bounds what a section claims to have behind what the file has.
const maxZeros = 1 << 20

// content is a section as it lies in memory: VirtualSize bytes.
func (p *image) content(s *section) io.Reader {
	have := io.NewSectionReader(p.r, int64(s.raw), int64(min(s.size, s.rawSize)))
	if s.size <= s.rawSize {
		return have
	}
	return io.MultiReader(have, io.LimitReader(zeros{}, int64(min(s.size-s.rawSize, maxZeros))))
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}
