package appraise

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode"

	"virt-trust/internal/launcher/refvalues"
	"virt-trust/internal/verifier/fleet"
)

// ValuesFormat is what a file of Reference Values must name.
const ValuesFormat = "virt-trust-values-1"

// Bounds of such a file.
const (
	MaxValuesFile = 64 << 20 // bytes
	MaxValues     = 1 << 19
)

// ValuesFile is a file of Reference Values:
//
//	{"format": "virt-trust-values-1", "name": "acme-2026", "serial": 7,
//	 "values": [{"subject": "", "kind": "host-ima", "path": "/usr/bin/true", "digest": "sha256:…"}]}
//
// A signature is beside it, as that of a manifest of launchers
// (refvalues.SignedManifest).
type ValuesFile struct {
	Format string       `json:"format"`
	Name   string       `json:"name"`
	Serial uint64       `json:"serial"`
	Values []ValueEntry `json:"values"`
}

// ValueEntry is one Reference Value in a file.
type ValueEntry struct {
	Subject string     `json:"subject"`
	Kind    fleet.Kind `json:"kind"`
	Path    string     `json:"path"`
	Digest  string     `json:"digest"`
}

// ParseValues reads a file of Reference Values without a look at who signed it.
// One value that is none spoils the file.
func ParseValues(b []byte) (*ValuesFile, error) {
	if len(b) > MaxValuesFile {
		return nil, errors.New("the Reference Values are too long")
	}
	f := &ValuesFile{}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(f); err != nil {
		return nil, fmt.Errorf("the Reference Values: %w", err)
	}
	switch {
	case d.More():
		return nil, errors.New("the Reference Values: something follows them")
	case f.Format != ValuesFormat:
		return nil, fmt.Errorf("the Reference Values: their format is %.40q, not %q", f.Format, ValuesFormat)
	case f.Name == "" || len(f.Name) > 100 || strings.ContainsFunc(f.Name, func(r rune) bool { return !unicode.IsGraphic(r) }):
		return nil, errors.New("the Reference Values have no name, or a strange one")
	case len(f.Values) > MaxValues:
		return nil, fmt.Errorf("the Reference Values: %d, at most %d", len(f.Values), MaxValues)
	}
	for i, v := range f.list() {
		if err := CheckValue(v); err != nil {
			return nil, fmt.Errorf("the Reference Values: number %d: %w", i+1, err)
		}
	}
	return f, nil
}

// VerifyValues gives the file of Reference Values that one of the keys signed.
func VerifyValues(file, signature []byte, keys []any) (*ValuesFile, error) {
	if len(file) > MaxValuesFile {
		return nil, errors.New("the Reference Values are too long")
	}
	if err := refvalues.VerifySignature(file, signature, keys); err != nil {
		return nil, fmt.Errorf("the Reference Values: %w", err)
	}
	return ParseValues(file)
}

func (f *ValuesFile) list() []fleet.Value {
	all := make([]fleet.Value, 0, len(f.Values))
	for _, v := range f.Values {
		all = append(all, fleet.Value{Subject: v.Subject, Kind: v.Kind, Path: v.Path, Digest: v.Digest, Detail: f.Name})
	}
	return all
}

// Approved gives the values as those of a source that counts.
func (f *ValuesFile) Approved(source string) []fleet.Value {
	all := f.list()
	for i := range all {
		all[i].State, all[i].Source = fleet.Approved, source
	}
	return all
}
