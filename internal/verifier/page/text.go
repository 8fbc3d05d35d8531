package page

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// What hosts and guests call things is hostile. html/template keeps it from
// being markup; this file keeps it from deceiving the eye: a right-to-left
// override in a VM's name turns the words beside it around, a zero-width space
// makes two names look like one, a hundred combining marks cover the row above.

// maxMarks is how many combining marks may follow one another.
const maxMarks = 4

// reveal writes a page's bytes anew with all that does not show itself shown:
// control characters as their pictures (U+2400), others as ⟨U+202E⟩, bytes that
// are no UTF-8 as ⟨xFF⟩. It goes over the whole page at the end, so that no
// template can forget it; line ends and tabs, which the templates have too, stay.
func reveal(page []byte) []byte {
	clean := true
	for _, b := range page {
		if b >= utf8.RuneSelf || b < ' ' && b != '\n' && b != '\t' || b == 0x7f {
			clean = false
			break
		}
	}
	if clean {
		return page
	}
	out := make([]byte, 0, len(page)+len(page)/16)
	marks := 0
	for i := 0; i < len(page); {
		r, n := utf8.DecodeRune(page[i:])
		if unicode.Is(unicode.M, r) {
			marks++
		} else {
			marks = 0
		}
		switch {
		case r == utf8.RuneError && n == 1:
			out = fmt.Appendf(out, "⟨x%02X⟩", page[i])
		case r == '\n' || r == '\t':
			out = append(out, byte(r))
		case r < ' ':
			out = utf8.AppendRune(out, '␀'+r)
		case r == 0x7f:
			out = utf8.AppendRune(out, '␡')
		case hidden(r) || marks > maxMarks:
			out = fmt.Appendf(out, "⟨U+%04X⟩", r)
		default:
			out = append(out, page[i:i+n]...)
		}
		i += n
	}
	return out
}

// hidden says whether a character has no look of its own, or changes that of
// its neighbours: C1 controls, format characters (bidirectional marks and
// overrides, zero-width ones, tags), separators other than the space, private
// use, fillers and variation selectors.
func hidden(r rune) bool {
	switch {
	case r < 0x80:
		return false
	case r == 0xa0: // templates use it
		return false
	case unicode.In(r, unicode.Cc, unicode.Cf, unicode.Co, unicode.Cs, unicode.Zl, unicode.Zp, unicode.Zs):
		return true
	case r == 0x115f || r == 0x1160 || r == 0x3164 || r == 0xffa0 || r == 0x2800: // fillers, by their class letters
		return true
	case unicode.Is(unicode.Variation_Selector, r):
		return true
	}
	return false
}

// oneLine is a hostile string on one line: its line ends and tabs are shown too,
// and so are the spaces at its ends, which two names may differ by.
func oneLine(s string) string {
	if s == "" {
		return ""
	}
	s = strings.NewReplacer("\n", "␊", "\r", "␍", "\t", "␉").Replace(s)
	body := strings.TrimLeft(s, " ")
	lead := len(s) - len(body)
	body2 := strings.TrimRight(body, " ")
	return strings.Repeat("␠", lead) + body2 + strings.Repeat("␠", len(body)-len(body2))
}

// cells is how broad a character is in a fixed-width face: about.
func cells(r rune) int {
	switch {
	case unicode.Is(unicode.M, r):
		return 0
	case r >= 0x1100 && r <= 0x115f, r >= 0x2e80 && r <= 0xa4cf, r >= 0xac00 && r <= 0xd7a3, r >= 0xf900 && r <= 0xfaff,
		r >= 0xfe30 && r <= 0xfe6f, r >= 0xff00 && r <= 0xff60, r >= 0x1f000 && r <= 0x3fffd:
		return 2
	}
	return 1
}

// cut is s in at most n cells: the middle goes, because paths and digests differ
// at both ends. What was cut is reachable where it is shown (see "long" in the
// templates). s is shown as reveal would, so that what it adds counts.
func cut(s string, n int) string {
	s = string(reveal([]byte(oneLine(s))))
	width := 0
	for _, r := range s {
		width += cells(r)
	}
	if width <= n {
		return s
	}
	rs := []rune(s)
	head, tail := 0, len(rs)
	for room := n - 1 - n/3; head < tail && room >= cells(rs[head]); head++ {
		room -= cells(rs[head])
	}
	for room := n / 3; tail > head && room >= cells(rs[tail-1]); tail-- {
		room -= cells(rs[tail-1])
	}
	return string(rs[:head]) + "…" + string(rs[tail:])
}
