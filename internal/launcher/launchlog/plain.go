package launchlog

import (
	"math"
	"strings"
)

// plain reads a line as Encode writes it when nothing in its texts is escaped:
// nearly all lines, in a tenth of the time. Of any other line ok is false, and it
// is for encoding/json.
func plain(line []byte) (e Entry, ok bool) {
	s := scanner{b: string(line)} // once: the texts are parts of it
	switch {
	case s.skip(`{"event":"boot","time":`):
		e = Entry{Event: EventBoot, Time: int64(s.number()), Boot: s.boot()}
	case s.skip(`{"event":"vm-start","time":`):
		e = Entry{Event: EventStart, Time: int64(s.number()), Start: s.start()}
	case s.skip(`{"event":"launchers","time":`):
		e = Entry{Event: EventFiles, Time: int64(s.number()), Files: s.files()}
	default:
		return e, false
	}
	if s.must("}"); s.failed || len(s.b) > 0 {
		return Entry{}, false
	}
	return e, true
}

// scanner takes what it expects off the front of what is left.
type scanner struct {
	b      string
	failed bool
}

func (s *scanner) skip(what string) bool {
	rest, ok := strings.CutPrefix(s.b, what)
	s.b = rest
	return ok
}

func (s *scanner) must(what string) { s.failed = !s.skip(what) || s.failed }

// text is what is left of a string, with the quotation mark at its end.
func (s *scanner) text() string {
	for i := range len(s.b) {
		switch c := s.b[i]; {
		case c == '"':
			t := s.b[:i]
			s.b = s.b[i+1:]
			return t
		case c < ' ' || c > '~' || c == '\\':
			s.failed = true
			return ""
		}
	}
	s.failed = true
	return ""
}

// number is of as many digits as a signed integer of 64 bits always takes, but for the
// largest: more than a time in nanoseconds has.
func (s *scanner) number() (n uint64) {
	i := 0
	for ; i < len(s.b) && i < 19 && s.b[i] >= '0' && s.b[i] <= '9'; i++ {
		n = 10*n + uint64(s.b[i]-'0')
	}
	s.failed = s.failed || i == 0 || i > 1 && s.b[0] == '0' || n > math.MaxInt64
	s.b = s.b[i:]
	return n
}

func (s *scanner) boot() *Boot {
	v := &Boot{Before: map[string]string{}}
	s.must(`,"boot":{"id":"`)
	v.ID = s.text()
	s.must(`,"reset_count":`)
	n := s.number()
	v.ResetCount = uint32(n)
	s.failed = s.failed || n > math.MaxUint32
	s.must(`,"pcr":`)
	v.PCR = uint(s.number())
	s.must(`,"before":{`)
	for !s.failed && !s.skip("}") {
		if len(v.Before) > 0 {
			s.must(",")
		}
		s.must(`"`)
		bank := s.text()
		s.must(`:"`)
		v.Before[bank] = s.text()
	}
	if s.skip(`,"gap":"`) {
		v.Gap = s.text()
	}
	s.must("}")
	return v
}

func (s *scanner) start() *Start {
	v := &Start{Launchers: []int{}}
	s.must(`,"start":{"vm":"`)
	v.VM = s.text()
	s.must(`,"generation":`)
	v.Generation = s.number()
	if s.skip(`,"label_generation":`) {
		v.LabelGeneration = s.number()
	}
	if s.skip(`,"ek":"`) {
		v.EK = s.text()
	}
	s.must(`,"launchers":[`)
	for !s.failed && !s.skip("]") {
		if len(v.Launchers) > 0 {
			s.must(",")
		}
		v.Launchers = append(v.Launchers, int(s.number()))
	}
	s.must(`,"launchers_sha256":"`)
	v.LaunchersSHA256 = s.text()
	s.must("}")
	return v
}

func (s *scanner) files() []File {
	s.must(`,"files":[`)
	const usual = 128 // bytes of a file, more or less
	all := make([]File, 0, len(s.b)/usual)
	for !s.failed && !s.skip("]") {
		if len(all) > 0 {
			s.must(",")
		}
		var f File
		s.must(`{"n":`)
		f.N = int(s.number())
		s.must(`,"role":"`)
		f.Role = s.text()
		s.must(`,"path":"`)
		f.Path = s.text()
		s.must(`,"sha256":"`)
		f.SHA256 = s.text()
		if s.skip(`,"by":"`) {
			f.By = s.text()
		}
		f.IMA = s.skip(`,"ima":true`)
		if s.skip(`,"verity":"`) {
			f.Verity = s.text()
		}
		s.must("}")
		all = append(all, f)
	}
	return all
}
