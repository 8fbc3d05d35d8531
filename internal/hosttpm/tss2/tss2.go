// Package tss2 reads and writes TPM 2.0 key files: the PEM blocks
// "TSS2 PRIVATE KEY" of draft-bottomley-tpm2-keys-00, as OpenSSL's TPM provider
// and engine and tpm2-tools know them.
//
// What is in such a file is no secret: the private part is encrypted by the
// TPM under the parent key. A file that asks for more than this package knows
// (an importable key, an authPolicy) is an error and never half read.
package tss2

import (
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"unicode"
	"unicode/utf8"
)

// PEMType is the type of the PEM block (section 4).
const PEMType = "TSS2 PRIVATE KEY"

// The kinds of key (section 3.1.1).
var (
	Loadable = asn1.ObjectIdentifier{2, 23, 133, 10, 1, 3} // for TPM2_Load
	Sealed   = asn1.ObjectIdentifier{2, 23, 133, 10, 1, 5} // sealed data, for TPM2_Load and TPM2_Unseal
)

// Bounds of what is read.
const (
	MaxFile        = 16 << 10
	maxPublic      = 1 << 10
	maxPrivate     = 2 << 10
	maxPolicy      = 16
	maxPolicyBytes = 2 << 10
	maxDescription = 256
)

// Key is one key file.
type Key struct {
	Type        asn1.ObjectIdentifier // Loadable or Sealed
	EmptyAuth   bool                  // the object's authValue is empty
	Policy      []Command             // the policy as the draft's section 4.1 spells it; nil for none
	Description string                // UTF-8, at most 256 bytes
	RSAParent   bool                  // Parent is a hierarchy, under which the RSA storage template is meant
	Parent      uint32                // a persistent handle or a hierarchy
	Public      []byte                // TPM2B_PUBLIC, its size included
	Private     []byte                // TPM2B_PRIVATE, its size included
}

// Command is one policy command of a Key.
type Command struct {
	Code uint32 // TPM_CC
	Data []byte // the command's parameters
}

// The ASN.1 of section 3.
type tpmKey struct {
	Type        asn1.ObjectIdentifier
	EmptyAuth   bool            `asn1:"explicit,optional,tag:0"`
	Policy      []policyCommand `asn1:"explicit,optional,omitempty,tag:1"`
	Description string          `asn1:"explicit,optional,omitempty,utf8,tag:4"`
	RSAParent   bool            `asn1:"explicit,optional,tag:5"`
	Parent      int64
	Public      []byte
	Private     []byte
}

type policyCommand struct {
	Code int64  `asn1:"explicit,tag:0"`
	Data []byte `asn1:"explicit,tag:1"`
}

// Parse reads the one key file that b holds; text around the PEM block is an
// error.
func Parse(b []byte) (*Key, error) {
	if len(b) > MaxFile {
		return nil, fmt.Errorf("TSS2 key file of %d bytes, at most %d", len(b), MaxFile)
	}
	block, rest := pem.Decode(b)
	switch {
	case block == nil:
		return nil, errors.New("no PEM block in a TSS2 key file")
	case block.Type != PEMType:
		return nil, fmt.Errorf("PEM block %q, want %q", block.Type, PEMType)
	case len(block.Headers) > 0:
		return nil, errors.New("TSS2 key file has PEM headers")
	case len(rest) > 0:
		return nil, errors.New("TSS2 key file goes on after its PEM block")
	}
	var a tpmKey
	if rest, err := asn1.Unmarshal(block.Bytes, &a); err != nil {
		return nil, fmt.Errorf("TSS2 key file: %w", err)
	} else if len(rest) > 0 {
		return nil, errors.New("TSS2 key file goes on after its ASN.1")
	}
	if a.Parent < 0 || a.Parent > 1<<32-1 {
		return nil, fmt.Errorf("TSS2 key file names parent %#x, which is no handle", a.Parent)
	}
	k := &Key{
		Type: a.Type, EmptyAuth: a.EmptyAuth, Description: a.Description, RSAParent: a.RSAParent,
		Parent: uint32(a.Parent), Public: a.Public, Private: a.Private,
	}
	for _, c := range a.Policy {
		if c.Code < 0 || c.Code > 1<<32-1 {
			return nil, fmt.Errorf("TSS2 key file names policy command %#x", c.Code)
		}
		k.Policy = append(k.Policy, Command{uint32(c.Code), c.Data})
	}
	return k, k.check()
}

// Marshal gives the key as a PEM block. It refuses what Parse would.
func (k *Key) Marshal() ([]byte, error) {
	if err := k.check(); err != nil {
		return nil, err
	}
	a := tpmKey{
		Type: k.Type, EmptyAuth: k.EmptyAuth, Description: k.Description, RSAParent: k.RSAParent,
		Parent: int64(k.Parent), Public: k.Public, Private: k.Private,
	}
	for _, c := range k.Policy {
		a.Policy = append(a.Policy, policyCommand{int64(c.Code), c.Data})
	}
	der, err := asn1.Marshal(a)
	if err != nil {
		return nil, fmt.Errorf("TSS2 key file: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: PEMType, Bytes: der}), nil
}

func (k *Key) check() error {
	if !k.Type.Equal(Loadable) && !k.Type.Equal(Sealed) {
		return fmt.Errorf("TSS2 key file of type %v, which is neither a loadable key nor sealed data", k.Type)
	}
	if len(k.Policy) > maxPolicy {
		return fmt.Errorf("TSS2 key file with %d policy commands, at most %d", len(k.Policy), maxPolicy)
	}
	for _, c := range k.Policy {
		if len(c.Data) > maxPolicyBytes {
			return fmt.Errorf("TSS2 key file with a policy command of %d bytes, at most %d", len(c.Data), maxPolicyBytes)
		}
	}
	if len(k.Description) > maxDescription || !utf8.ValidString(k.Description) ||
		slices.ContainsFunc([]rune(k.Description), unicode.IsControl) {
		return errors.New("TSS2 key file with a description that is too long or no plain text")
	}
	if err := checkSized("public", k.Public, maxPublic); err != nil {
		return err
	}
	return checkSized("private", k.Private, maxPrivate)
}

// checkSized wants b to be a non-empty TPM2B: a size and just so many bytes
// (TPM 2.0 Part 2, 10.4.1).
func checkSized(what string, b []byte, limit int) error {
	switch {
	case len(b) > limit:
		return fmt.Errorf("TSS2 key file with a %s part of %d bytes, at most %d", what, len(b), limit)
	case len(b) < 3 || int(binary.BigEndian.Uint16(b)) != len(b)-2:
		return fmt.Errorf("TSS2 key file whose %s part does not have the size that it says", what)
	}
	return nil
}
