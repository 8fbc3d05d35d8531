package layout

import (
	"bytes"
	"fmt"
	"path"
	"strconv"
	"strings"
)

// MaxMaps is how much of /proc/PID/maps is read.
const MaxMaps = 1 << 20

// Library is where a library lies in a process.
type Library struct {
	Base uint64 // of the mapping of its first byte
	Text []Span // its code
	Data Span   // its variables: .data, and .bss behind it
}

// Span is a stretch of memory.
type Span struct{ Start, End uint64 }

// Len is the number of bytes.
func (s Span) Len() uint64 { return s.End - s.Start }

// Holds reports whether o lies in s.
func (s Span) Holds(o Span) bool { return s.Start <= o.Start && o.Start <= o.End && o.End <= s.End }

// maxLibrary is what a library may span.
const maxLibrary = 64 << 20

// ParseMaps finds the library whose file's name begins with name and ".so" in
// the text of /proc/PID/maps (proc(5)). That it is there twice, or in no order
// that a dynamic linker makes, is an error.
func ParseMaps(text []byte, name string) (*Library, error) {
	if len(text) > MaxMaps {
		return nil, fmt.Errorf("%w: /proc/PID/maps has %d bytes", ErrShape, len(text))
	}
	l := &Library{}
	found, file := false, ""
	var before uint64 // end of the line before, where that belongs to the library
	for line := range bytes.Lines(text) {
		m, err := parseMapping(strings.TrimSuffix(string(line), "\n"))
		if err != nil {
			return nil, err
		}
		ours := strings.HasPrefix(path.Base(m.file), name+".so")
		switch {
		case ours && m.offset == 0 && found || ours && found && m.file != file:
			return nil, fmt.Errorf("%w: %s is mapped twice", ErrShape, name)
		case ours && m.offset == 0:
			l.Base, found, file = m.Start, true, m.file
		case ours && !found:
			return nil, fmt.Errorf("%w: the beginning of %s is not mapped", ErrShape, name)
		}
		switch {
		case ours && m.perm == "r-xp":
			l.Text = append(l.Text, m.Span)
		case ours && m.perm == "rw-p" && l.Data.End == 0:
			l.Data = m.Span
		case ours && m.perm == "rw-p" && l.Data.End == m.Start:
			l.Data.End = m.End
		case ours && (strings.Contains(m.perm, "w") || strings.Contains(m.perm, "x")):
			return nil, fmt.Errorf("%w: %s is mapped %s", ErrShape, name, m.perm)
		case (m.file == "" || strings.HasPrefix(m.file, "[anon:")) && m.perm == "rw-p" && before != 0 && before == l.Data.End && m.Start == before:
			l.Data.End = m.End // .bss
		}
		before = 0
		if ours {
			before = m.End
		}
	}
	if !found || len(l.Text) == 0 || l.Data.End == 0 || l.Data.Start < l.Base || l.Data.End-l.Base > maxLibrary {
		return nil, fmt.Errorf("%w: no %s as the dynamic linker maps it", ErrShape, name)
	}
	for _, t := range l.Text {
		if t.Start < l.Base || t.End > l.Data.Start {
			return nil, fmt.Errorf("%w: code of %s out of its place", ErrShape, name)
		}
	}
	return l, nil
}

type mapping struct {
	Span
	perm   string
	offset uint64
	file   string // "" for anonymous memory, "[anon:NAME]" where that has a name
}

// parseMapping reads "start-end perm offset dev inode   file".
func parseMapping(line string) (m mapping, err error) {
	bad := func() (mapping, error) {
		return mapping{}, fmt.Errorf("%w: %.80q in /proc/PID/maps", ErrShape, line)
	}
	f := strings.SplitN(line, " ", 6)
	if len(f) < 5 || len(f[1]) != 4 {
		return bad()
	}
	start, end, ok := strings.Cut(f[0], "-")
	if !ok {
		return bad()
	}
	if m.Start, err = strconv.ParseUint(start, 16, 64); err != nil {
		return bad()
	}
	if m.End, err = strconv.ParseUint(end, 16, 64); err != nil || m.End <= m.Start {
		return bad()
	}
	if m.offset, err = strconv.ParseUint(f[2], 16, 64); err != nil {
		return bad()
	}
	m.perm = f[1]
	if len(f) == 6 {
		m.file = strings.TrimLeft(f[5], " ")
	}
	return m, nil
}
