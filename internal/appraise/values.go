package appraise

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"virt-trust/internal/verifier/fleet"
)

// Values are Reference Values, indexed: those that are approved, and of those
// that were rejected what is not to be learned any more. They are built once and
// used for many rounds, by many at once.
type Values struct {
	subjects map[string]*subjectValues
}

// subjectValues are those of one subject.
type subjectValues struct {
	revision uint64                 // the sum of all values' digests
	files    [2]map[string]struct{} // of IMA, launchers: digest ("\x0b" ‖ 32 bytes) ‖ path, which is "" for wherever
	paths    [2]map[string][]string // path => digests, in hexadecimal
	// events: "PCR/" ‖ digest; words: PCR/type/description => digests, in
	// hexadecimal.
	events map[string]bool
	words  map[string][]string
	pcrs   [2]map[string][]string // of the host, of a VM: "sha256:0" => values, in hexadecimal
	// marks are of IMA's values: see mark.
	marks map[uint64]bool
	// rejected are the kinds and paths of values that somebody took back, or never
	// approved.
	rejected map[fleet.Kind]map[string]bool
}

// Indexes of files and pcrs.
const (
	ofIMA      = 0
	ofLauncher = 1
	ofHost     = 0
	ofVM       = 1
)

var algorithms = []string{"sha1", "sha256", "sha384", "sha512"}

// identify gives an algorithm's TPM_ALG_ID and the size of its digests; 0 of one
// that there is not. It is asked for each entry of IMA's list, and a map is slower.
func identify(algorithm string) (id byte, size int) {
	switch algorithm {
	case "sha256":
		return 0x0b, 32
	case "sha1":
		return 0x04, 20
	case "sha384":
		return 0x0c, 48
	case "sha512":
		return 0x0d, 64
	}
	return 0, 0
}

// parseDigest reads "sha256:…".
func parseDigest(s string) (key []byte, hexDigits string, err error) {
	alg, digits, _ := strings.Cut(s, ":")
	id, size := identify(alg)
	b, err := hex.DecodeString(digits)
	if size == 0 || err != nil || len(b) != size {
		return nil, "", fmt.Errorf("%.150q is no digest: sha256:… is", s)
	}
	return append([]byte{id}, b...), strings.ToLower(digits), nil
}

// CheckValue says what is wrong with a Reference Value that is to be stored.
func CheckValue(v fleet.Value) error {
	if _, _, err := parseDigest(v.Digest); err != nil {
		return err
	}
	if !utf8.ValidString(v.Path) || strings.ContainsRune(v.Path, 0) {
		return fmt.Errorf("%.80q is no path that can be stored", v.Path)
	}
	switch v.Kind {
	case fleet.HostEvent:
		if _, err := eventPCR(v.Path); err != nil {
			return err
		}
	case fleet.HostPCR, fleet.VMPCR:
		bank, n, _ := strings.Cut(v.Path, ":")
		if i, err := strconv.ParseUint(n, 10, 8); err != nil || i > 23 || sizeOf(bank) == 0 || !strings.HasPrefix(v.Digest, bank+":") {
			return fmt.Errorf("%.80q with %.20q is no PCR: sha256:0 with sha256:… is", v.Path, v.Digest)
		}
	case fleet.HostIMA, fleet.VMIMA, fleet.Launcher:
		if v.Path != "" && len(v.Path) > maxPath {
			return fmt.Errorf("path of %d bytes", len(v.Path))
		}
	default:
		return fmt.Errorf("there is no kind of Reference Value %.40q", v.Kind)
	}
	return nil
}

const maxPath = 4096

// eventPCR is the PCR of "PCR/type/description".
func eventPCR(path string) (byte, error) {
	n, _, ok := strings.Cut(path, "/")
	i, err := strconv.ParseUint(n, 10, 8)
	if !ok || err != nil || i > 23 {
		return 0, fmt.Errorf("%.80q is no event: PCR/type/description is", path)
	}
	return byte(i), nil
}

// NewValues indexes those that are approved or rejected. One that CheckValue would
// refuse matches nothing.
func NewValues(values []fleet.Value) *Values {
	x := &Values{subjects: map[string]*subjectValues{}}
	for i := range values {
		v := &values[i]
		switch {
		case CheckValue(*v) != nil:
		case v.State == fleet.Approved:
			x.add(v)
		case v.State == fleet.Rejected:
			s := x.of(v.Subject)
			if s.rejected[v.Kind] == nil {
				s.rejected[v.Kind] = map[string]bool{}
			}
			s.rejected[v.Kind][v.Path] = true
		}
	}
	return x
}

func (x *Values) of(subject string) *subjectValues {
	s := x.subjects[subject]
	if s == nil {
		s = &subjectValues{events: map[string]bool{}, words: map[string][]string{}, marks: map[uint64]bool{}, rejected: map[fleet.Kind]map[string]bool{}}
		for i := range 2 {
			s.files[i], s.paths[i], s.pcrs[i] = map[string]struct{}{}, map[string][]string{}, map[string][]string{}
		}
		x.subjects[subject] = s
	}
	return s
}

func (x *Values) add(v *fleet.Value) {
	s := x.of(v.Subject)
	key, digits, _ := parseDigest(v.Digest)
	digest := strings.ToLower(v.Digest)
	switch v.Kind {
	case fleet.HostEvent:
		pcr, _ := eventPCR(v.Path)
		s.events[string(pcr)+string(key)] = true
		s.words[v.Path] = append(s.words[v.Path], digest)
	case fleet.HostPCR:
		s.pcrs[ofHost][v.Path] = append(s.pcrs[ofHost][v.Path], digits)
	case fleet.VMPCR:
		s.pcrs[ofVM][v.Path] = append(s.pcrs[ofVM][v.Path], digits)
	case fleet.HostIMA, fleet.Launcher:
		of := ofIMA
		if v.Kind == fleet.Launcher {
			of = ofLauncher
		} else {
			s.marks[mark([]byte(v.Path), key[1:])] = true
		}
		s.files[of][string(key)+v.Path] = struct{}{}
		s.paths[of][v.Path] = append(s.paths[of][v.Path], digest)
	}
	d := sha256.Sum256([]byte(strings.Join([]string{v.Subject, string(v.Kind), v.Path, strings.ToLower(v.Digest)}, "\x00")))
	s.revision += binary.BigEndian.Uint64(d[:])
}

// mark stands for a path, "" for any, and a digest there. It is no hash that one
// could rely on against someone who chooses both: it tells of a value that was
// accepted by comparison before whether it is still there.
func mark(path, digest []byte) uint64 {
	const prime = 0x9e3779b97f4a7c15
	h := binary.BigEndian.Uint64(digest)
	for len(path) >= 8 {
		h = (h ^ binary.LittleEndian.Uint64(path)) * prime
		h ^= h >> 29
		path = path[8:]
	}
	for _, c := range path {
		h = (h ^ uint64(c)) * prime
	}
	return h
}

// view is the Reference Values for some subjects.
type view []*subjectValues

func (in *Input) view(subjects ...string) view {
	all := make(view, 0, len(in.Values)*len(subjects))
	for _, x := range in.Values {
		for _, name := range subjects {
			if s := x.subjects[name]; s != nil {
				all = append(all, s)
			}
		}
	}
	return all
}

func (v view) has(f func(*subjectValues) bool) bool {
	for _, s := range v {
		if f(s) {
			return true
		}
	}
	return false
}

func (v view) hasEvents() bool {
	return v.has(func(s *subjectValues) bool { return len(s.events) > 0 })
}

// hasHost: something was said of the host's boot. What the launch PCR held before its
// log is not of the boot.
func (v view) hasHost(launchPCR string) bool {
	return v.has(func(s *subjectValues) bool {
		pcrs := len(s.pcrs[ofHost])
		if len(s.pcrs[ofHost][launchPCR]) > 0 {
			pcrs--
		}
		return len(s.events) > 0 || pcrs > 0
	})
}

func (v view) hasLauncher() bool {
	return v.has(func(s *subjectValues) bool { return len(s.files[ofLauncher]) > 0 })
}

func (v view) hasVM() bool {
	return v.has(func(s *subjectValues) bool { return len(s.pcrs[ofVM]) > 0 })
}

// rejected: a value of one of the kinds was taken back. What was is not learned
// again, else that would last until the next round.
func (v view) rejected(kinds ...fleet.Kind) bool {
	return v.has(func(s *subjectValues) bool {
		return slices.ContainsFunc(kinds, func(k fleet.Kind) bool { return len(s.rejected[k]) > 0 })
	})
}

// marked reports whether what a mark stands for is still a Reference Value.
func (v view) marked(m uint64) bool {
	return v.has(func(s *subjectValues) bool { return s.marks[m] })
}

// file reports whether a digest is right for a path: the two are in key, which
// begins with the digest.
func (v view) file(of int, key []byte, digest int) bool {
	for _, s := range v {
		if _, ok := s.files[of][string(key)]; ok {
			return true
		}
		if _, ok := s.files[of][string(key[:digest])]; ok {
			return true
		}
	}
	return false
}

// at gives the digests that are right for a path.
func (v view) at(of int, path []byte) (digests []string) {
	for _, s := range v {
		digests = append(digests, s.paths[of][string(path)]...)
	}
	return digests
}

func (v view) event(key []byte) bool {
	for _, s := range v {
		if s.events[string(key)] {
			return true
		}
	}
	return false
}

func (v view) words(path string) (digests []string) {
	for _, s := range v {
		digests = append(digests, s.words[path]...)
	}
	return digests
}

func (v view) pcr(of int, path string) (values []string) {
	if len(v) == 1 {
		return v[0].pcrs[of][path]
	}
	for _, s := range v {
		values = append(values, s.pcrs[of][path]...)
	}
	return values
}

// revision tells whether something was added or taken away.
func (v view) revision() (n uint64) {
	for _, s := range v {
		n += s.revision
	}
	return n
}
