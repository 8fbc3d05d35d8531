// Package corim reads Concise Reference Integrity Manifests (draft-ietf-rats-corim)
// into Reference Values. What is taken for what,
// virt-trust-verifier-appraisal(7) says; what no Reference Value can be made of is
// refused or counted, never passed over in silence.
package corim

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/fxamacker/cbor/v2"
	"github.com/veraison/go-cose"

	"virt-trust/internal/appraise"
	"virt-trust/internal/launcher/refvalues"
	"virt-trust/internal/verifier/fleet"
)

// Profile is that of CoRIMs that say by the model of a class what their values are
// of: "host", "launcher" or "vm".
const Profile = "tag:ietf.org,2026:rats/corim#virt-trust-1"

// parsecTPM is the profile of Parsec for TPMs: its values are PCRs by their numbers,
// as they are where there is no profile.
const parsecTPM = "tag:github.com/parallaxsecond,2023-03-03:tpm"

// Bounds of what is read.
const (
	MaxSize = 32 << 20 // bytes
	maxTags = 1000
	maxName = 100 // bytes of an id, of a group's name
)

// Manifest is a CoRIM.
type Manifest struct {
	ID      string
	Tags    []Tag
	Ignored map[string]int // how much of it no Reference Value was made of, by what it is
}

// Tag is a CoMID in it. A newer one has the ID of the older and a higher version.
type Tag struct {
	ID       string
	Version  uint64
	Replaces []string      // IDs of others that were wrong
	Values   []fleet.Value // Subject, Kind, Path and Digest
}

// Parse reads a CoRIM that nobody signed. Values that name neither a node nor a VM
// nor a group are for subject.
func Parse(b []byte, subject string, now time.Time) (*Manifest, error) {
	return read(b, subject, now, func(r *reader) error {
		if b[0] == isTag<<5|cose.CBORTagSign1Message {
			return errors.New("it is signed, and wants to be verified")
		}
		return r.corim(b)
	})
}

// Verify reads a CoRIM that one of the keys signed (COSE_Sign1): Ed25519 or ECDSA,
// see refvalues.ParseKeys. refvalues.ErrSignature where none of them did.
func Verify(b []byte, keys []any, subject string, now time.Time) (*Manifest, error) {
	return read(b, subject, now, func(r *reader) error {
		var message cose.Sign1Message
		if err := message.UnmarshalCBOR(b); err != nil {
			return fmt.Errorf("it is not signed, or not as COSE_Sign1: %w", err)
		}
		alg, err := message.Headers.Protected.Algorithm()
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(keys, func(key any) bool {
			v, err := cose.NewVerifier(alg, key)
			return err == nil && message.Verify(nil, v) == nil
		}) {
			return refvalues.ErrSignature
		}
		if err := r.protected(message.Headers.Protected); err != nil {
			return fmt.Errorf("its signature: %w", err)
		}
		r.signed = true
		return r.corim(message.Payload)
	})
}

// mode refuses fields of structures that are not known: they may change what the
// rest means.
var mode = func() cbor.DecMode {
	m, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, MaxNestedLevels: 24,
		MaxArrayElements: appraise.MaxValues, MaxMapPairs: appraise.MaxValues, ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return m
}()

type reader struct {
	m       *Manifest
	subject string
	now     time.Time
	signed  bool
	ours    bool // its profile is Profile
	values  int
}

func read(b []byte, subject string, now time.Time, f func(*reader) error) (m *Manifest, err error) {
	defer func() {
		if p := recover(); p != nil {
			m, err = nil, fmt.Errorf("the CoRIM: its reader failed: %v", p)
		}
	}()
	if len(b) == 0 || len(b) > MaxSize {
		return nil, fmt.Errorf("the CoRIM: %d bytes, at least 1 and at most %d", len(b), MaxSize)
	}
	r := &reader{subject: subject, now: now, m: &Manifest{Ignored: map[string]int{}}}
	if err := f(r); err != nil {
		return nil, fmt.Errorf("the CoRIM: %w", err)
	}
	return r.m, nil
}

func (r *reader) ignore(what string, n int) {
	if n > 0 {
		r.m.Ignored[what] += n
	}
}

// Major types of CBOR.
const (
	isUint  = 0
	isBytes = 2
	isText  = 3
	isArray = 4
	isTag   = 6
)

func major(b cbor.RawMessage) byte {
	if len(b) == 0 {
		return 0xff
	}
	return b[0] >> 5
}

// untag takes a tag off, where there is one.
func untag(b cbor.RawMessage) (uint64, cbor.RawMessage, error) {
	var t cbor.RawTag
	if major(b) != isTag {
		return 0, b, nil
	}
	err := mode.Unmarshal(b, &t)
	return t.Number, t.Content, err
}

// unwrap gives the CBOR that is in bytes, where it is.
func unwrap(b cbor.RawMessage) (cbor.RawMessage, error) {
	if major(b) != isBytes {
		return b, nil
	}
	var inner []byte
	err := mode.Unmarshal(b, &inner)
	return inner, err
}

// id is a text, or a UUID of 16 bytes.
func id(b cbor.RawMessage) (s string, err error) {
	if major(b) == isBytes {
		return uuid(b)
	}
	if err = mode.Unmarshal(b, &s); err == nil && !isName(s) {
		err = fmt.Errorf("%.100q is no id", s)
	}
	return s, err
}

func isName(s string) bool {
	return s != "" && len(s) <= maxName && !strings.ContainsFunc(s, func(c rune) bool { return !unicode.IsGraphic(c) })
}

func uuid(b cbor.RawMessage) (string, error) {
	var u []byte
	if err := mode.Unmarshal(b, &u); err != nil {
		return "", err
	}
	if len(u) != 16 {
		return "", fmt.Errorf("a UUID of %d bytes", len(u))
	}
	h := hex.EncodeToString(u)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:], nil
}

// validity is a validity-map.
type validity struct {
	NotBefore *time.Time `cbor:"0,keyasint"`
	NotAfter  time.Time  `cbor:"1,keyasint"` // without one it has expired
}

func (v *validity) at(now time.Time) error {
	switch {
	case v == nil:
	case v.NotBefore != nil && now.Before(*v.NotBefore):
		return fmt.Errorf("not valid before %s", v.NotBefore.UTC().Format(time.RFC3339))
	case now.After(v.NotAfter):
		return fmt.Errorf("expired at %s", v.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// Header parameters that COSE does not know.
const (
	headerMeta      = int64(8)
	headerCWTClaims = int64(15)
)

const contentType = "application/rim+cbor"

// protected looks at what the signer said beside the CoRIM.
func (r *reader) protected(h cose.ProtectedHeader) error {
	if h[cose.HeaderLabelContentType] != contentType {
		return fmt.Errorf("of content type %.100q, not %q", fmt.Sprint(h[cose.HeaderLabelContentType]), contentType)
	}
	critical, err := h.Critical()
	if err != nil {
		return err
	}
	known := []any{cose.HeaderLabelAlgorithm, cose.HeaderLabelCritical, cose.HeaderLabelContentType, headerMeta, headerCWTClaims}
	for _, label := range critical {
		if !slices.Contains(known, label) {
			return fmt.Errorf("critical header %.40s is not known", fmt.Sprint(label))
		}
	}
	if b, ok := h[headerMeta].([]byte); ok {
		var meta struct {
			Signer   cbor.RawMessage `cbor:"0,keyasint"`
			Validity *validity       `cbor:"1,keyasint"`
		}
		if err := mode.Unmarshal(b, &meta); err != nil {
			return err
		}
		if err := meta.Validity.at(r.now); err != nil {
			return err
		}
	}
	if h[headerCWTClaims] == nil {
		return nil
	}
	b, err := cbor.Marshal(h[headerCWTClaims])
	if err != nil {
		return err
	}
	var claims struct {
		Until time.Time  `cbor:"4,keyasint"`
		From  *time.Time `cbor:"5,keyasint"`
	}
	claims.Until = r.now                               // where they name none
	if err := cbor.Unmarshal(b, &claims); err != nil { // other claims are anybody's
		return err
	}
	return (&validity{claims.From, claims.Until}).at(r.now)
}

// corim is a corim-map: tagged or, until 2024, bare.
func (r *reader) corim(b cbor.RawMessage) error {
	const tagCoRIM = 501
	number, content, err := untag(b)
	if err == nil && number != 0 && number != tagCoRIM {
		err = fmt.Errorf("CBOR tag %d, not %d", number, tagCoRIM)
	}
	if err != nil {
		return err
	}
	var m struct {
		ID        cbor.RawMessage   `cbor:"0,keyasint"`
		Tags      []cbor.RawMessage `cbor:"1,keyasint"`
		Dependent []cbor.RawMessage `cbor:"2,keyasint"`
		Profile   cbor.RawMessage   `cbor:"3,keyasint"`
		Validity  *validity         `cbor:"4,keyasint"`
		Entities  cbor.RawMessage   `cbor:"5,keyasint"`
	}
	if err := mode.Unmarshal(content, &m); err != nil {
		return err
	}
	if r.m.ID, err = id(m.ID); err != nil {
		return err
	}
	if err := r.profile(m.Profile); err != nil {
		return err
	}
	if err := m.Validity.at(r.now); err != nil {
		return err
	}
	r.ignore("dependent RIMs", len(m.Dependent))
	if len(m.Tags) == 0 || len(m.Tags) > maxTags {
		return fmt.Errorf("%d tags, at least 1 and at most %d", len(m.Tags), maxTags)
	}
	for i, t := range m.Tags {
		if err := r.tag(t); err != nil {
			return fmt.Errorf("tag %d: %w", i, err)
		}
	}
	replaced := map[string]bool{}
	for _, t := range r.m.Tags {
		for _, old := range t.Replaces {
			replaced[old] = true
		}
	}
	for _, t := range r.m.Tags {
		if replaced[t.ID] {
			return fmt.Errorf("CoMID %q is replaced by one beside it", t.ID)
		}
	}
	return nil
}

// profile refuses one that is not known, as the draft demands: it may say that the
// rest means something else. Until 2024 there could be several, in an array.
func (r *reader) profile(b cbor.RawMessage) error {
	if b == nil {
		return nil
	}
	all := []cbor.RawMessage{b}
	if major(b) == isArray {
		if err := mode.Unmarshal(b, &all); err != nil {
			return err
		}
	}
	for _, p := range all {
		const tagURI = 32
		var name string
		number, content, err := untag(p)
		if err == nil && (number == 0 || number == tagURI) {
			err = mode.Unmarshal(content, &name)
		}
		switch {
		case err != nil:
			return fmt.Errorf("its profile: %w", err)
		case name == Profile:
			r.ours = true
		case name != parsecTPM:
			return fmt.Errorf("its profile %.200q (%.80x) is not known", name, []byte(p))
		}
	}
	return nil
}

// tag is one of the CoRIM's: 506(bytes), or, until 2024, bytes with 506(CoMID).
func (r *reader) tag(b cbor.RawMessage) error {
	b, err := unwrap(b)
	if err != nil {
		return err
	}
	number, content, err := untag(b)
	if err != nil {
		return err
	}
	switch number {
	case 505:
		r.ignore("CoSWID tags", 1)
	case 506:
		if content, err = unwrap(content); err != nil {
			return err
		}
		return r.comid(content)
	case 507, 508:
		r.ignore("tags with trust anchors", 1)
	default:
		r.ignore("unknown tags", 1)
	}
	return nil
}
