package operate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"virt-trust/internal/appraise"
	"virt-trust/internal/launcher/refvalues"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

// The formats of files of Reference Values.
const (
	FormatSums      = "sums"      // see ParseSums
	FormatValues    = "values"    // appraise.ValuesFile, without a signature
	FormatManifest  = "manifest"  // the same, signed
	FormatLaunchers = "launchers" // a manifest of launchers, as virt-trustd takes it, signed
)

// Import is a file of Reference Values on its way in.
type Import struct {
	Format    string
	Content   []byte
	Signature []byte     // of FormatManifest and FormatLaunchers
	Subject   string     // of FormatSums and FormatLaunchers
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
	values, m, err := s.readImport(in)
	if err != nil {
		return added, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	err = s.do(ctx, a, Policy, func(tx *store.Tx) error {
		if m == nil {
			source := FromFile
			if in.Format == FormatSums {
				source = FromPackage
			}
			added, err = s.add(ctx, tx, a, "value.import", in.Name, source, values)
			return err
		}
		if err := s.raiseSerial(ctx, tx, a, m); err != nil {
			return err
		}
		if err := s.withdrawOld(ctx, tx, a, m.Name, values); err != nil {
			return err
		}
		added, err = s.add(ctx, tx, a, "value.import", m.Name+" "+strconv.FormatUint(m.Serial, 10), FromManifest, values)
		return err
	})
	return added, err
}

// manifest is what a signed file says of itself.
type manifest struct {
	Name   string
	Serial uint64
}

// readImport gives the values, and the manifest where the file is signed.
func (s *Service) readImport(in Import) ([]fleet.Value, *manifest, error) {
	if len(in.Content) > MaxImport {
		return nil, nil, fmt.Errorf("%d bytes, at most %d", len(in.Content), MaxImport)
	}
	switch in.Format {
	case FormatSums:
		if in.Kind == "" {
			in.Kind = fleet.HostIMA
		}
		if in.Kind != fleet.HostIMA && in.Kind != fleet.Launcher && in.Kind != fleet.VMIMA {
			return nil, nil, fmt.Errorf("checksums of files are no Reference Values of kind %.40q", in.Kind)
		}
		if !ValidName(in.Name) {
			return nil, nil, errors.New("checksums need a name: the package's, or the repository's")
		}
		values, err := ParseSums(in.Content, in.Subject, in.Kind, in.Name)
		return values, nil, err
	case FormatValues:
		f, err := appraise.ParseValues(in.Content)
		if err != nil {
			return nil, nil, err
		}
		return f.Approved(FromFile), nil, nil // add says what state they have
	case FormatManifest:
		f, err := appraise.VerifyValues(in.Content, in.Signature, s.ManifestKeys)
		if err != nil {
			return nil, nil, err
		}
		return f.Approved(FromManifest), &manifest{f.Name, f.Serial}, nil
	case FormatLaunchers:
		m, err := refvalues.VerifyManifest(in.Content, in.Signature, s.ManifestKeys)
		if err != nil {
			return nil, nil, err
		}
		if len(m.Revoked) > 0 {
			return nil, nil, errors.New("the manifest revokes files: here, a manifest approves all that it names and nothing else")
		}
		name := "launchers " + m.Name
		var values []fleet.Value
		for _, l := range m.Launchers {
			values = append(values, fleet.Value{Subject: in.Subject, Kind: fleet.Launcher, Path: l.Path, Digest: "sha256:" + strings.ToLower(l.SHA256), Detail: name})
		}
		return values, &manifest{name, m.Serial}, nil
	}
	return nil, nil, fmt.Errorf("there is no format %.40q", in.Format)
}

// raiseSerial notes a manifest's serial, which has to be higher than the last.
func (s *Service) raiseSerial(ctx context.Context, tx *store.Tx, a Actor, m *manifest) error {
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

// withdrawOld rejects what a manifest's predecessor had and it has no more.
func (s *Service) withdrawOld(ctx context.Context, tx *store.Tx, a Actor, name string, values []fleet.Value) error {
	type key struct {
		subject      string
		kind         fleet.Kind
		path, digest string
	}
	keep := map[key]bool{}
	for _, v := range values {
		keep[key{v.Subject, v.Kind, v.Path, v.Digest}] = true
	}
	for page := (store.Page{Limit: 1000}); ; {
		old, next, err := tx.Values(ctx, store.ValueFilter{Source: FromManifest}, page)
		if err != nil {
			return err
		}
		for _, v := range old {
			if v.Detail != name || v.State == fleet.Rejected || keep[key{v.Subject, v.Kind, v.Path, v.Digest}] {
				continue
			}
			if err := tx.SetValueState(ctx, v.ID, v.State, fleet.Rejected, a.Name); err != nil {
				return err
			}
			if err := s.audit(tx, a, "value.reject", strconv.FormatInt(v.ID, 10), detail{"manifest": name, "kind": v.Kind, "path": v.Path, "digest": v.Digest}); err != nil {
				return err
			}
		}
		if page.After = next; next == "" {
			return nil
		}
	}
}
