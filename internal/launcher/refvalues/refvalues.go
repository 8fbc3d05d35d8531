// Package refvalues holds the Reference Values of launchers (RFC 9334, 8.3):
// which programs and firmware may run for VMs, and who said so. It is pure:
// files are measured, packages asked and signatures made elsewhere.
//
// A value ties a SHA-256 digest to a path, and has a source:
//
//   - first-use: nothing was known of this path before;
//   - package: the distribution's package database has this content for it;
//   - manifest: a manifest that a configured key signed names it;
//   - admin: an administrator named it.
//
// A value counts while its source does (Policy). One that is revoked never
// does, whoever else approved the same digest, until an admin approves it anew.
package refvalues

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/fxamacker/cbor/v2"
)

// Bounds of a set, and of what one value holds.
const (
	MaxValues = 8192
	MaxPath   = 4096 // bytes
	MaxFile   = 64 << 20
)

// Source says who approved a value.
type Source string

// The sources.
const (
	FirstUse Source = "first-use"
	Package  Source = "package"
	Manifest Source = "manifest"
	Admin    Source = "admin"
)

// State is where a value stands.
type State string

// The states.
const (
	Approved State = "approved"
	Revoked  State = "revoked"
	// Superseded: a package upgrade has put another content in its place. An
	// attacker who puts the old one back is not helped by its having run.
	Superseded State = "superseded"
)

// Digest is a SHA-256 digest.
type Digest [sha256.Size]byte

// String is the digest in hexadecimal.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// Value is one Reference Value.
type Value struct {
	Digest Digest `cbor:"1,keyasint"`
	Path   string `cbor:"2,keyasint,omitempty"` // with links resolved; "": wherever it lies
	Source Source `cbor:"3,keyasint"`
	State  State  `cbor:"4,keyasint"`
	Detail string `cbor:"5,keyasint,omitempty"` // the package, or the manifest's name
	Time   int64  `cbor:"6,keyasint"`           // seconds since 1970, of the last change
}

// Set is all Reference Values of a host. A Set that is in use is not changed:
// each change makes a new one, of the next generation.
type Set struct {
	Generation uint64            `cbor:"1,keyasint"`
	Values     []Value           `cbor:"2,keyasint"`
	Serials    map[string]uint64 `cbor:"3,keyasint,omitempty"` // of the manifests, by name
}

// Policy says which sources count. An admin always does.
type Policy struct {
	FirstUse, Package, Manifest bool
}

func (p Policy) counts(s Source) bool {
	switch s {
	case FirstUse:
		return p.FirstUse
	case Package:
		return p.Package
	case Manifest:
		return p.Manifest
	}
	return s == Admin
}

// Vouch is what the package database says of a file.
type Vouch string

// What it can say.
const (
	NotAsked  Vouch = ""
	Unowned   Vouch = "unowned"   // no package brought it
	Same      Vouch = "same"      // it is as the package brought it
	Different Vouch = "different" // the package brought another content
)

// Found is a file that would run.
type Found struct {
	Path   string // with links resolved
	Digest Digest
}

// Verdict is what the Reference Values say of a file.
type Verdict struct {
	// Source approves the file, now or, with Learn, as soon as the value was added;
	// "" refuses it.
	Source Source
	Learn  bool
	// Ask: the package database decides; appraise again with what it says.
	Ask bool
	// Of a refusal: whether this very digest was revoked, or is not what its
	// package brought, and the digest that is approved at its path, if one is.
	Revoked, Altered bool
	Expected         *Digest
}

// Appraise holds a file against the set. vouch is NotAsked until Verdict.Ask
// asks for it.
func (s *Set) Appraise(f Found, p Policy, vouch Vouch) Verdict {
	v := Verdict{}
	known := false
	for i := len(s.Values) - 1; i >= 0; i-- {
		r := &s.Values[i]
		if r.Digest == f.Digest && r.State == Revoked {
			return Verdict{Revoked: true, Expected: s.expected(f, p)}
		}
		if r.Path == f.Path {
			known = true
		}
		if v.Source == "" && r.Digest == f.Digest && (r.Path == "" || r.Path == f.Path) && r.State == Approved && p.counts(r.Source) {
			v.Source = r.Source
		}
	}
	switch {
	case v.Source != "":
		return v
	case p.Package && vouch == NotAsked:
		return Verdict{Ask: true}
	case p.Package && vouch == Same:
		return Verdict{Source: Package, Learn: true}
	case p.FirstUse && !known && vouch != Different:
		return Verdict{Source: FirstUse, Learn: true}
	}
	return Verdict{Altered: vouch == Different, Expected: s.expected(f, p)}
}

// expected gives the digest that was approved last at a file's path.
func (s *Set) expected(f Found, p Policy) *Digest {
	for i := len(s.Values) - 1; i >= 0; i-- {
		if r := s.Values[i]; r.Path == f.Path && r.State == Approved && p.counts(r.Source) && r.Digest != f.Digest {
			return &r.Digest
		}
	}
	return nil
}

// errFull: superseded values make room, nothing else does.
var errFull = fmt.Errorf("there are %d Reference Values: no more are kept; revoke what no VM uses", MaxValues)

// Next gives a copy of the next generation, to be changed.
func (s *Set) Next() *Set {
	n := &Set{Generation: s.Generation + 1, Values: slices.Clone(s.Values), Serials: map[string]uint64{}}
	for name, serial := range s.Serials {
		n.Serials[name] = serial
	}
	return n
}

// Learn adds what Appraise approved for the first time. A package's new content
// supersedes what the package, or first use, had approved at its path.
func (s *Set) Learn(f Found, source Source, detail string, now int64) error {
	if source == Package {
		for i := range s.Values {
			if r := &s.Values[i]; r.Path == f.Path && r.State == Approved && (r.Source == Package || r.Source == FirstUse) {
				r.State, r.Time = Superseded, now
			}
		}
	}
	return s.put(Value{Digest: f.Digest, Path: f.Path, Source: source, State: Approved, Detail: detail, Time: now})
}

// Approve is the admin's word for a file; it lifts a revocation.
func (s *Set) Approve(f Found, now int64) error {
	s.Values = slices.DeleteFunc(s.Values, func(v Value) bool { return v.Digest == f.Digest && v.State == Revoked })
	return s.put(Value{Digest: f.Digest, Path: f.Path, Source: Admin, State: Approved, Time: now})
}

// Revoke is the admin's word against a digest, wherever it lies, whether or not
// it was known before. path is kept for those who read the list; it may be "".
func (s *Set) Revoke(d Digest, path string, now int64) error {
	found := false
	for i := range s.Values {
		if r := &s.Values[i]; r.Digest == d {
			r.State, r.Time, found = Revoked, now, true
		}
	}
	if found {
		return nil
	}
	return s.put(Value{Digest: d, Path: path, Source: Admin, State: Revoked, Time: now})
}

// put adds a value in place of one of the same digest, path and source.
func (s *Set) put(v Value) error {
	s.Values = slices.DeleteFunc(s.Values, func(o Value) bool {
		return o.Digest == v.Digest && o.Path == v.Path && o.Source == v.Source && o.State != Revoked
	})
	if len(s.Values) >= MaxValues {
		i := slices.IndexFunc(s.Values, func(o Value) bool { return o.State == Superseded })
		if i < 0 {
			return errFull
		}
		s.Values = slices.Delete(s.Values, i, i+1)
	}
	if len(v.Path) > MaxPath || len(v.Detail) > MaxPath {
		return errors.New("the path is too long")
	}
	s.Values = append(s.Values, v)
	return nil
}

const (
	magic      = "VTRLNCH\n"
	version    = 1
	headerSize = len(magic) + 2 + sha256.Size
)

// Errors of Decode.
var (
	ErrFormat = errors.New("not a file of Reference Values")
	ErrKey    = errors.New("not written under this list key, or altered")
)

var encMode, decMode = modes()

func modes() (cbor.EncMode, cbor.DecMode) {
	e, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		panic(err)
	}
	d, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		MaxArrayElements: MaxValues, MaxMapPairs: MaxValues, MaxNestedLevels: 8, ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return e, d
}

// seal is the HMAC under a key of its own of the list key: whoever can write
// the disk of a host that is off cannot approve anything.
func seal(listKey, body []byte) ([]byte, error) {
	k, err := hkdf.Key(sha256.New, listKey, nil, "virt-trust/launchers/v1", sha256.Size)
	if err != nil {
		return nil, err
	}
	defer clear(k)
	m := hmac.New(sha256.New, k)
	m.Write(body)
	return m.Sum(nil), nil
}

// Encode gives the file: magic, version, HMAC, CBOR.
func (s *Set) Encode(listKey []byte) ([]byte, error) {
	body, err := encMode.Marshal(s)
	if err != nil {
		return nil, err
	}
	mac, err := seal(listKey, body)
	if err != nil {
		return nil, err
	}
	b := binary.BigEndian.AppendUint16([]byte(magic), version)
	return append(append(b, mac...), body...), nil
}

// Decode opens a file. Errors: ErrFormat, ErrKey.
func Decode(b, listKey []byte) (*Set, error) {
	if len(b) < headerSize || len(b) > MaxFile || string(b[:len(magic)]) != magic {
		return nil, ErrFormat
	}
	if v := binary.BigEndian.Uint16(b[len(magic):]); v != version {
		return nil, fmt.Errorf("%w: its version is %d", ErrFormat, v)
	}
	body := b[headerSize:]
	mac, err := seal(listKey, body)
	if err != nil {
		return nil, err
	}
	if !hmac.Equal(mac, b[headerSize-sha256.Size:headerSize]) {
		return nil, ErrKey
	}
	return untrusted(body)
}

func untrusted(body []byte) (*Set, error) {
	s := &Set{}
	if err := decMode.Unmarshal(body, s); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	for _, v := range s.Values {
		if !slices.Contains([]Source{FirstUse, Package, Manifest, Admin}, v.Source) || !slices.Contains([]State{Approved, Revoked, Superseded}, v.State) ||
			len(v.Path) > MaxPath || len(v.Detail) > MaxPath {
			return nil, fmt.Errorf("%w: a value that is none", ErrFormat)
		}
	}
	return s, nil
}
