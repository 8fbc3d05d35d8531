// Package launchlog is the launch log: what was measured before VMs started on
// this host, in an order that a PCR of the host's TPM vouches for. It is pure.
//
// A log is of one life of the PCRs, from a reset of the TPM to the next. It is
// text: each line is an entry in JSON, and the PCR is extended, in every bank,
// by the digest of the line without its newline, so that `sha256sum` and
// `tpm2_pcrread` are enough to check it. The first entry says which boot it is
// and what the PCR held before; then come files, each once, numbered from 1;
// and VM starts, which name by their numbers the files that ran.
package launchlog

import (
	"bytes"
	"cmp"
	"crypto"
	_ "crypto/sha1"
	"crypto/sha256"
	_ "crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Bounds of a log.
const (
	MaxLine  = 1 << 20
	MaxFiles = 1 << 16 // in one log
)

// What an entry is about.
const (
	EventBoot  = "boot"
	EventFiles = "launchers"
	EventStart = "vm-start"
)

// Entry is one line.
type Entry struct {
	Event string `json:"event"`
	Time  int64  `json:"time"` // seconds since 1970; of the host's clock, which nobody vouches for
	Boot  *Boot  `json:"boot,omitempty"`
	Files []File `json:"files,omitempty"`
	Start *Start `json:"start,omitempty"`
}

// Boot begins a log.
type Boot struct {
	ID         string `json:"id"`          // the kernel's boot id
	ResetCount uint32 `json:"reset_count"` // of the TPM: tells a life of the PCRs from the next
	PCR        uint   `json:"pcr"`
	// Before is what the PCR held, in hexadecimal, by bank: normally zeros.
	Before map[string]string `json:"before"`
	// Gap says what is wrong with what the PCR was extended by before, in this boot;
	// a log that has one proves nothing of that, and counts as one that does not
	// replay.
	Gap string `json:"gap,omitempty"`
}

// File is a file that runs for VMs, or that one runs.
type File struct {
	N      int    `json:"n"`
	Role   string `json:"role"` // emulator, emulator-module, firmware, nvram-template, swtpm, ...
	Path   string `json:"path"`
	SHA256 string `json:"sha256"`
	// By says why it was approved: first-use, package, manifest, admin; "" for one
	// that ran in audit mode only.
	By     string `json:"by,omitempty"`
	IMA    bool   `json:"ima,omitempty"`    // the kernel's measurement list has this path with this digest
	Verity string `json:"verity,omitempty"` // its fs-verity digest: the kernel checks what is read
}

// Start ties a VM to what runs it.
type Start struct {
	VM              string `json:"vm"`         // UUID
	Generation      uint64 `json:"generation"` // of its record in the vTPM list
	LabelGeneration uint64 `json:"label_generation,omitempty"`
	// EK is the SHA-256 digest of the vTPM's RSA endorsement key, as
	// SubjectPublicKeyInfo in DER; "" where it could not be read.
	EK string `json:"ek,omitempty"`
	// Launchers are the numbers of the files, ascending; LaunchersSHA256 is Set of
	// their digests, which speaks for itself without the rest of the log.
	Launchers       []int  `json:"launchers"`
	LaunchersSHA256 string `json:"launchers_sha256"`
}

// Encode gives an entry's line, without the newline.
func Encode(e Entry) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(e); err != nil {
		return nil, err
	}
	line := bytes.TrimSuffix(b.Bytes(), []byte("\n"))
	if len(line) > MaxLine {
		return nil, fmt.Errorf("an entry of %d bytes is too long", len(line))
	}
	return line, nil
}

// Set is the digest of a set of files: SHA-256 over their SHA-256 digests, sorted.
func Set(digests [][sha256.Size]byte) [sha256.Size]byte {
	d := slices.Clone(digests)
	slices.SortFunc(d, func(a, b [sha256.Size]byte) int { return bytes.Compare(a[:], b[:]) })
	var all []byte
	for _, x := range slices.Compact(d) {
		all = append(all, x[:]...)
	}
	return sha256.Sum256(all)
}

// ErrFormat says that a log is none.
var ErrFormat = errors.New("not a launch log")

// Log is a log replayed as far as its lines were added. The zero Log is empty.
type Log struct {
	// Bank is the one bank that is replayed, "" for all that the log has: to be set
	// before the first line.
	Bank string

	Boot    Boot
	Entries int
	Files   []File
	Starts  int
	Last    *Start // the newest VM start
	Time    int64  // of the newest entry
	// Values are what the PCR holds after the lines, Previous what it held before
	// the last of them; by bank.
	Values, Previous map[string][]byte

	known map[fileKey]int // of Files, once somebody asks
}

type fileKey struct {
	path   string
	sha256 string
}

// Number gives the number of a file that is in the log, or 0.
func (l *Log) Number(path string, digest [sha256.Size]byte) int {
	if l.known == nil {
		l.known = map[fileKey]int{}
		l.know(l.Files)
	}
	return l.known[fileKey{path, hex.EncodeToString(digest[:])}]
}

func (l *Log) know(files []File) {
	for i := range files {
		l.known[fileKey{files[i].Path, files[i].SHA256}] = files[i].N
	}
}

// Add replays one more line, which nobody has vouched for yet. An error leaves
// the log as it was.
func (l *Log) Add(line []byte) error {
	e, err := l.check(line)
	if err != nil {
		return fmt.Errorf("%w: line %d: %w", ErrFormat, l.Entries+1, err)
	}
	if e.Boot != nil {
		l.Boot, l.Values = *e.Boot, e.Boot.values(l.Bank)
	}
	l.Files = append(l.Files, e.Files...)
	if l.known != nil {
		l.know(e.Files)
	}
	if e.Start != nil {
		l.Last = e.Start
		l.Starts++
	}
	l.Entries, l.Time = l.Entries+1, e.Time
	l.Previous, l.Values = l.Values, Extended(l.Values, line)
	return nil
}

func (l *Log) check(line []byte) (e Entry, err error) {
	if len(line) > MaxLine || bytes.IndexByte(line, '\n') >= 0 {
		return e, errors.New("it is too long, or no line")
	}
	e, ok := plain(line)
	if !ok {
		if err := json.Unmarshal(line, &e); err != nil {
			return e, err
		}
	}
	if (e.Event == EventBoot) != (l.Entries == 0) {
		return e, fmt.Errorf("an entry %.40q is out of place", e.Event)
	}
	if (e.Boot != nil) != (e.Event == EventBoot) || (len(e.Files) > 0) != (e.Event == EventFiles) || (e.Start != nil) != (e.Event == EventStart) {
		return e, fmt.Errorf("an entry %.40q has not what belongs into it", e.Event)
	}
	switch {
	case e.Boot != nil:
		return e, e.Boot.check()
	case e.Start != nil:
		return e, l.checkStart(e.Start)
	case len(l.Files)+len(e.Files) > MaxFiles:
		return e, errors.New("too many files")
	}
	for i, f := range e.Files {
		if f.N != len(l.Files)+1+i || f.Path == "" {
			return e, fmt.Errorf("file %d is out of order, or has no path", f.N)
		}
		if _, err := ParseDigest(f.SHA256); err != nil {
			return e, err
		}
	}
	return e, nil
}

func (b *Boot) check() error {
	if b.PCR > 23 || len(b.Before) == 0 {
		return errors.New("it does not say what the PCR was")
	}
	for bank, v := range b.Before {
		h, known := hashes[bank]
		d, err := hex.DecodeString(v)
		if !known || err != nil || len(d) != h.Size() {
			return fmt.Errorf("bank %.20q: %.140q is no value of a PCR", bank, v)
		}
	}
	return nil
}

// values are those before the log, of one bank or, with "", of all.
func (b *Boot) values(only string) map[string][]byte {
	m := map[string][]byte{}
	for bank, v := range b.Before {
		if only == "" || bank == only {
			m[bank], _ = hex.DecodeString(v)
		}
	}
	return m
}

func (l *Log) checkStart(s *Start) error {
	if last := l.Last; last != nil && slices.Equal(s.Launchers, last.Launchers) { // as most have
		if s.LaunchersSHA256 != last.LaunchersSHA256 {
			return errSet
		}
		return nil
	}
	var digests [][sha256.Size]byte
	for i, n := range s.Launchers {
		if n < 1 || n > len(l.Files) || i > 0 && n <= s.Launchers[i-1] {
			return fmt.Errorf("launcher %d is not in the log, or out of order", n)
		}
		d, _ := ParseDigest(l.Files[n-1].SHA256)
		digests = append(digests, d)
	}
	if set := Set(digests); s.LaunchersSHA256 != hex.EncodeToString(set[:]) {
		return errSet
	}
	return nil
}

var errSet = errors.New("the digest of the launchers is not theirs")

// ParseDigest reads a SHA-256 digest in lower-case hexadecimal.
func ParseDigest(s string) (d [sha256.Size]byte, err error) {
	if len(s) == hex.EncodedLen(len(d)) && strings.ToLower(s) == s {
		var digits [2 * sha256.Size]byte // on the stack: there are many
		copy(digits[:], s)
		if _, err = hex.Decode(d[:], digits[:]); err == nil {
			return d, nil
		}
	}
	return [sha256.Size]byte{}, fmt.Errorf("%.80q is no SHA-256 digest", s)
}

// Split cuts a log file into its lines. A last line without a newline was cut
// off by a crash, before the PCR was extended by it: it is given apart.
func Split(file []byte) (lines [][]byte, torn []byte) {
	for len(file) > 0 {
		line, rest, whole := bytes.Cut(file, []byte("\n"))
		if !whole {
			return lines, line
		}
		lines, file = append(lines, line), rest
	}
	return lines, nil
}

// Parse replays a log file. The replay is good as far as it got, also with an
// error.
func Parse(file []byte) (*Log, error) {
	l := &Log{}
	lines, _ := Split(file)
	for _, line := range lines {
		if err := l.Add(line); err != nil {
			return l, err
		}
	}
	return l, nil
}

// hashes are the banks that are extended.
var hashes = map[string]crypto.Hash{"sha1": crypto.SHA1, "sha256": crypto.SHA256, "sha384": crypto.SHA384, "sha512": crypto.SHA512}

// Banks gives the names of the banks of a PCR's values, in the order of their size.
func Banks(values map[string][]byte) []string {
	return slices.SortedFunc(maps.Keys(values), func(a, b string) int { return cmp.Compare(hashes[a].Size(), hashes[b].Size()) })
}

// Digests gives the digests of an event in the banks of a PCR's values.
func Digests(event []byte, values map[string][]byte) map[string][]byte {
	d := map[string][]byte{}
	for bank := range values {
		if h, ok := hashes[bank]; ok {
			d[bank] = sum(h, event)
		}
	}
	return d
}

// Extended gives what a PCR of these values holds after an event (Part 1,
// 17.4): H(old ‖ H(event)) in each bank.
func Extended(values map[string][]byte, event []byte) map[string][]byte {
	next := map[string][]byte{}
	for bank, v := range values {
		if h, ok := hashes[bank]; ok {
			next[bank] = sum(h, v, sum(h, event))
		}
	}
	return next
}

func sum(h crypto.Hash, parts ...[]byte) []byte {
	d := h.New()
	for _, p := range parts {
		d.Write(p)
	}
	return d.Sum(nil)
}

// Equal compares the values of a PCR bank by bank.
func Equal(a, b map[string][]byte) bool { return len(a) > 0 && maps.EqualFunc(a, b, bytes.Equal) }

// Zero reports whether a PCR is as it is after a reset.
func Zero(values map[string][]byte) bool {
	for _, v := range values {
		if len(bytes.Trim(v, "\x00")) > 0 {
			return false
		}
	}
	return true
}

// Hex gives the values of a PCR in hexadecimal.
func Hex(values map[string][]byte) map[string]string {
	m := map[string]string{}
	for bank, v := range values {
		m[bank] = hex.EncodeToString(v)
	}
	return m
}

// Standing is how a log stands to the PCR.
type Standing string

// The standings.
const (
	Replays    Standing = "replays"
	Pending    Standing = "pending" // all but the last entry is in the PCR: a crash came between the two
	Broken     Standing = "does-not-replay"
	WasReset   Standing = "tpm-was-reset" // the PCR has begun another life
	NotThere   Standing = "empty"
	NotChecked Standing = "unknown"
)

// Against holds the log against the PCR as the TPM has it now.
func (l *Log) Against(values map[string][]byte, resetCount uint32) Standing {
	switch {
	case l.Entries == 0:
		return NotThere
	case resetCount != l.Boot.ResetCount:
		return WasReset
	case Equal(values, l.Values):
		return Replays
	case Equal(values, l.Previous):
		return Pending
	}
	return Broken
}
