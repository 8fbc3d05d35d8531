package operate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"virt-trust/internal/appraise"
	"virt-trust/internal/appraise/corim"
	"virt-trust/internal/launcher/refvalues"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

// The formats of files of Reference Values.
const (
	FormatSums          = "sums"      // see ParseSums
	FormatValues        = "values"    // appraise.ValuesFile, without a signature
	FormatManifest      = "manifest"  // the same, signed
	FormatLaunchers     = "launchers" // a manifest of launchers, as virt-trustd takes it, signed
	FormatCoRIM         = "corim"     // see package corim, signed
	FormatUnsignedCoRIM = "corim-unsigned"
)

// Import is a file of Reference Values on its way in.
type Import struct {
	Format    string
	Content   []byte
	Signature []byte     // of FormatManifest and FormatLaunchers
	Subject   string     // of FormatSums, FormatLaunchers and, where it names none, a CoRIM
	Kind      fleet.Kind // of FormatSums; HostIMA where empty
	Name      string     // of FormatSums: the package, the repository
}

// ImportValues takes a file of Reference Values in. Errors are ErrInvalid where
// it is none, or its signature is wrong; ErrConflict where a manifest of its name
// with the same serial or a higher one was taken before.
func (s *Service) ImportValues(ctx context.Context, a Actor, in Import) (added Added, err error) {
	if err := a.need(Policy); err != nil {
		return added, err
	}
	c, err := s.readImport(in)
	if err != nil {
		return added, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	what, source := in.Name, FromFile
	if in.Format == FormatSums {
		source = FromPackage
	}
	if len(c.manifests) > 0 {
		source = FromManifest
	}
	if c.name != "" {
		what = c.name
	}
	err = s.do(ctx, a, Policy, func(tx *store.Tx) error {
		for _, m := range c.manifests {
			if err := s.raiseSerial(ctx, tx, a, m); err != nil {
				return err
			}
		}
		if err := s.withdrawOld(ctx, tx, a, c); err != nil {
			return err
		}
		added, err = s.add(ctx, tx, a, "value.import", what, source, c.values, c.ignored)
		return err
	})
	return added, err
}

// content is what a file says.
type content struct {
	name      string // of the file, as it says itself
	values    []fleet.Value
	manifests []manifest     // that take the places of others, where it is signed
	ignored   map[string]int // what no value was made of
}

// manifest is what a signed file says of itself.
type manifest struct {
	Name   string
	Serial uint64

	replaced bool // another took its place, for good
}

func ofManifest(name string, serial uint64, values []fleet.Value) content {
	return content{name: name + " " + strconv.FormatUint(serial, 10), values: values, manifests: []manifest{{Name: name, Serial: serial}}}
}

func (s *Service) readImport(in Import) (c content, err error) {
	if len(in.Content) > MaxImport {
		return c, fmt.Errorf("%d bytes, at most %d", len(in.Content), MaxImport)
	}
	switch in.Format {
	case FormatSums:
		if in.Kind == "" {
			in.Kind = fleet.HostIMA
		}
		if in.Kind != fleet.HostIMA && in.Kind != fleet.Launcher && in.Kind != fleet.VMIMA {
			return c, fmt.Errorf("checksums of files are no Reference Values of kind %.40q", in.Kind)
		}
		if !ValidName(in.Name) {
			return c, errors.New("checksums need a name: the package's, or the repository's")
		}
		c.values, err = ParseSums(in.Content, in.Subject, in.Kind, in.Name)
		return c, err
	case FormatValues:
		f, err := appraise.ParseValues(in.Content)
		if err != nil {
			return c, err
		}
		return content{values: f.Approved(FromFile)}, nil // add says what state they have
	case FormatManifest:
		f, err := appraise.VerifyValues(in.Content, in.Signature, s.ManifestKeys)
		if err != nil {
			return c, err
		}
		return ofManifest(f.Name, f.Serial, f.Approved(FromManifest)), nil
	case FormatLaunchers:
		m, err := refvalues.VerifyManifest(in.Content, in.Signature, s.ManifestKeys)
		if err != nil {
			return c, err
		}
		if len(m.Revoked) > 0 {
			return c, errors.New("the manifest revokes files: here, a manifest approves all that it names and nothing else")
		}
		name := "launchers " + m.Name
		var values []fleet.Value
		for _, l := range m.Launchers {
			values = append(values, fleet.Value{Subject: in.Subject, Kind: fleet.Launcher, Path: l.Path, Digest: "sha256:" + strings.ToLower(l.SHA256), Detail: name})
		}
		return ofManifest(name, m.Serial, values), nil
	case FormatCoRIM:
		m, err := corim.Verify(in.Content, s.ManifestKeys, in.Subject, s.Now())
		if err != nil {
			return c, err
		}
		c = ofCoRIM(m)
		for _, t := range m.Tags {
			c.manifests = append(c.manifests, manifest{Name: comid(t.ID), Serial: t.Version})
			for _, old := range t.Replaces {
				c.manifests = append(c.manifests, manifest{Name: comid(old), Serial: math.MaxUint64, replaced: true})
			}
		}
		return c, nil
	case FormatUnsignedCoRIM:
		m, err := corim.Parse(in.Content, in.Subject, s.Now())
		if err != nil {
			return c, err
		}
		return ofCoRIM(m), nil
	}
	return c, fmt.Errorf("there is no format %.40q", in.Format)
}

// comid is the name under which a CoMID is a manifest, with its version as serial.
func comid(id string) string { return "comid " + id }

func ofCoRIM(m *corim.Manifest) content {
	c := content{name: "corim " + m.ID, ignored: m.Ignored}
	for _, t := range m.Tags {
		for _, v := range t.Values {
			v.Detail = comid(t.ID)
			c.values = append(c.values, v)
		}
	}
	return c
}

// raiseSerial notes a manifest's serial, which has to be higher than the last.
func (s *Service) raiseSerial(ctx context.Context, tx *store.Tx, a Actor, m manifest) error {
	name := "manifest." + m.Name
	last, err := tx.Setting(ctx, name)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	if err == nil {
		var was manifest
		if err := json.Unmarshal(last.Data, &was); err != nil {
			return fmt.Errorf("setting %q: %w", name, err)
		}
		if m.replaced && m.Serial == was.Serial {
			return nil
		}
		if m.Serial <= was.Serial {
			return fmt.Errorf("%w: %w (%d)", ErrConflict, refvalues.ErrOlder, was.Serial)
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return tx.PutSetting(ctx, fleet.Setting{Name: name, Version: last.Version + 1, Data: b, By: a.Name, Time: s.Now()})
}

// withdrawOld rejects what manifests' predecessors had and they have no more, and
// all of those that were replaced.
func (s *Service) withdrawOld(ctx context.Context, tx *store.Tx, a Actor, c content) error {
	type key struct {
		subject      string
		kind         fleet.Kind
		path, digest string
	}
	keep, replaced := map[key]bool{}, map[string]bool{}
	for _, v := range c.values {
		keep[key{v.Subject, v.Kind, v.Path, v.Digest}] = true
	}
	for _, m := range c.manifests {
		replaced[m.Name] = m.replaced
	}
	if len(replaced) == 0 {
		return nil
	}
	for page := (store.Page{Limit: 1000}); ; {
		old, next, err := tx.Values(ctx, store.ValueFilter{Source: FromManifest}, page)
		if err != nil {
			return err
		}
		for _, v := range old {
			gone, old := replaced[v.Detail]
			if !old || v.State == fleet.Rejected || !gone && keep[key{v.Subject, v.Kind, v.Path, v.Digest}] {
				continue
			}
			if err := tx.SetValueState(ctx, v.ID, v.State, fleet.Rejected, a.Name); err != nil {
				return err
			}
			if err := s.audit(tx, a, "value.reject", strconv.FormatInt(v.ID, 10), detail{"manifest": v.Detail, "kind": v.Kind, "path": v.Path, "digest": v.Digest}); err != nil {
				return err
			}
		}
		if page.After = next; next == "" {
			return nil
		}
	}
}
