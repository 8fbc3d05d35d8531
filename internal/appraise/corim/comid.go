package corim

import (
	"encoding/hex"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/fxamacker/cbor/v2"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
)

// The structures of a CoMID, as far as they are looked at.
type (
	comid struct {
		Language cbor.RawMessage `cbor:"0,keyasint"`
		Identity struct {
			ID      cbor.RawMessage `cbor:"0,keyasint"`
			Version uint64          `cbor:"1,keyasint"`
		} `cbor:"1,keyasint"`
		Entities cbor.RawMessage `cbor:"2,keyasint"`
		Links    []struct {
			To  cbor.RawMessage `cbor:"0,keyasint"`
			Rel *uint64         `cbor:"1,keyasint"`
		} `cbor:"3,keyasint"`
		Triples map[int64][]cbor.RawMessage `cbor:"4,keyasint"`
	}
	referenceTriple struct {
		_            struct{} `cbor:",toarray"`
		Environment  environment
		Measurements []measurement
	}
	environment struct {
		Class    *class          `cbor:"0,keyasint"`
		Instance cbor.RawMessage `cbor:"1,keyasint"`
		Group    cbor.RawMessage `cbor:"2,keyasint"`
	}
	class struct {
		ID     cbor.RawMessage `cbor:"0,keyasint"`
		Vendor cbor.RawMessage `cbor:"1,keyasint"`
		Model  string          `cbor:"2,keyasint"`
		Layer  cbor.RawMessage `cbor:"3,keyasint"`
		Index  cbor.RawMessage `cbor:"4,keyasint"`
	}
	measurement struct {
		Key          cbor.RawMessage           `cbor:"0,keyasint"`
		Values       map[int64]cbor.RawMessage `cbor:"1,keyasint"`
		AuthorizedBy cbor.RawMessage           `cbor:"2,keyasint"`
	}
	digest struct {
		_         struct{} `cbor:",toarray"`
		Algorithm any
		Value     []byte
	}
)

// What a measurement may say; digests and registers are taken, version and name
// are words for what has the digest.
const (
	ofVersion   = 0
	ofDigests   = 2
	ofName      = 11
	ofRegisters = 14
)

func (r *reader) comid(b cbor.RawMessage) (err error) {
	var c comid
	if err := mode.Unmarshal(b, &c); err != nil {
		return err
	}
	t := Tag{Version: c.Identity.Version}
	if t.ID, err = id(c.Identity.ID); err != nil {
		return err
	}
	if slices.ContainsFunc(r.m.Tags, func(o Tag) bool { return o.ID == t.ID }) {
		return fmt.Errorf("a second CoMID %q", t.ID)
	}
	if len(c.Links) > maxTags {
		return fmt.Errorf("%d linked tags, at most %d", len(c.Links), maxTags)
	}
	for _, l := range c.Links {
		to, err := id(l.To)
		switch {
		case err != nil:
			return err
		case l.Rel == nil:
			return errors.New("a linked tag says not how")
		case *l.Rel != 1 || !r.signed: // replaces; what nobody signed takes nothing away
			r.ignore("linked tags", 1)
		default:
			t.Replaces = append(t.Replaces, to)
		}
	}
	for kind, triples := range c.Triples {
		switch kind {
		case 0:
		case 1:
			r.ignore("endorsed triples", len(triples))
		case 2, 3: // until 2024 each the other
			r.ignore("key triples", len(triples))
		default:
			r.ignore("other triples", len(triples))
		}
	}
	for i, b := range c.Triples[0] {
		if err := r.reference(&t, b); err != nil {
			return fmt.Errorf("reference triple %d: %w", i, err)
		}
	}
	r.m.Tags = append(r.m.Tags, t)
	return nil
}

// target is what values are of, and whom they are for.
type target struct {
	subject    string
	pcrs, file fleet.Kind // "" where there are none
}

// targets are the models of Profile.
var targets = map[string]target{
	"host":     {pcrs: fleet.HostPCR, file: fleet.HostIMA},
	"launcher": {file: fleet.Launcher},
	"vm":       {pcrs: fleet.VMPCR, file: fleet.VMIMA},
}

func (r *reader) reference(t *Tag, b cbor.RawMessage) error {
	var triple referenceTriple
	if err := mode.Unmarshal(b, &triple); err != nil {
		return err
	}
	e := &triple.Environment
	of := targets["host"]
	if r.ours {
		if e.Class == nil {
			return errors.New("its environment has no class")
		}
		known := false
		if of, known = targets[e.Class.Model]; !known {
			return fmt.Errorf("model %.40q is none of host, launcher and vm", e.Class.Model)
		}
	}
	subject, err := r.whose(e)
	if err != nil {
		return err
	}
	if subject == nil {
		r.ignore("measurements of whom no UUID and no group's name tells", len(triple.Measurements))
		return nil
	}
	of.subject = *subject
	for i := range triple.Measurements {
		if err := r.measurement(t, of, &triple.Measurements[i]); err != nil {
			return err
		}
	}
	return nil
}

// whose gives the subject; nil where it is one that Reference Values cannot have,
// such as an instance within a group: they would be for more than that.
func (r *reader) whose(e *environment) (*string, error) {
	const tagUUID, tagBytes = 37, 560
	if e.Instance == nil && e.Group == nil {
		return &r.subject, nil
	}
	instance, u, err := untag(e.Instance)
	if err != nil {
		return nil, err
	}
	group, g, err := untag(e.Group)
	if err != nil {
		return nil, err
	}
	switch {
	case e.Group == nil && instance == tagUUID:
		subject, err := uuid(u)
		return &subject, err
	case e.Instance == nil && group == tagBytes:
		var name []byte
		if err := mode.Unmarshal(g, &name); err != nil {
			return nil, err
		}
		subject := "group:" + strings.ToValidUTF8(string(name), "\x00")
		if !isName(subject) || len(name) == 0 {
			return nil, fmt.Errorf("%.100q is no name of a group", name)
		}
		return &subject, nil
	}
	return nil, nil
}

// measurement takes one that is about digests alone. One that says more is left
// out: the values would match more than it says.
func (r *reader) measurement(t *Tag, of target, m *measurement) error {
	digests, registers := m.Values[ofDigests], m.Values[ofRegisters]
	for field := range m.Values {
		if !slices.Contains([]int64{ofVersion, ofDigests, ofName, ofRegisters}, field) {
			digests, registers = nil, nil
		}
	}
	switch {
	case m.AuthorizedBy != nil:
		r.ignore("measurements that other keys have to authorize", 1)
	case digests == nil && registers == nil:
		r.ignore("measurements of more or other than digests", 1)
	case registers == nil:
		key := m.Key
		if key == nil {
			key = m.Values[ofName]
		}
		return r.element(t, of, key, digests)
	case digests != nil || m.Key != nil: // registers of a part: of which PCRs, nobody can tell
		r.ignore("integrity registers of a part", 1)
	default:
		var all map[any]cbor.RawMessage
		if err := mode.Unmarshal(registers, &all); err != nil {
			return err
		}
		for key, digests := range all {
			b, err := cbor.Marshal(key)
			if err != nil {
				return err
			}
			if err := r.element(t, of, b, digests); err != nil {
				return err
			}
		}
	}
	return nil
}

// algorithms are the numbers and names of hashes: IANA's Named Information, COSE.
var algorithms = map[any]string{
	uint64(1): "sha256", uint64(7): "sha384", uint64(8): "sha512", "sha-256": "sha256", "sha-384": "sha384", "sha-512": "sha512",
	int64(-16): "sha256", int64(-43): "sha384", int64(-44): "sha512",
}

// element is a PCR, by its number, or a file, by its path.
func (r *reader) element(t *Tag, of target, key, b cbor.RawMessage) error {
	var (
		digests []digest
		pcr     uint64
		file    string
		err     error
	)
	v := fleet.Value{Subject: of.subject}
	switch major(key) {
	case isUint:
		if err = mode.Unmarshal(key, &pcr); pcr < 24 {
			v.Kind = of.pcrs
		}
	case isText:
		if err = mode.Unmarshal(key, &file); strings.HasPrefix(file, "/") && path.Clean(file) == file {
			v.Kind, v.Path = of.file, file
		}
	}
	if err := errors.Join(err, mode.Unmarshal(b, &digests)); err != nil {
		return err
	}
	if v.Kind == "" {
		r.ignore("digests of what is no PCR and no file here", len(digests))
		return nil
	}
	seen := map[string]bool{}
	for _, d := range digests {
		name := ""
		switch d.Algorithm.(type) {
		case uint64, int64, string: // not all types can be looked up
			name = algorithms[d.Algorithm]
		}
		switch {
		case name == "":
			r.ignore("digests of other algorithms", 1)
			continue
		case seen[name]: // the draft allows one of each
			return fmt.Errorf("two %s digests of one thing", name)
		case r.values == appraise.MaxValues:
			return fmt.Errorf("more than %d digests", appraise.MaxValues)
		}
		seen[name] = true
		r.values++
		if v.Digest = name + ":" + hex.EncodeToString(d.Value); v.Kind == of.pcrs {
			v.Path = name + ":" + strconv.FormatUint(pcr, 10)
		}
		if err := appraise.CheckValue(v); err != nil {
			return err
		}
		t.Values = append(t.Values, v)
	}
	return nil
}
