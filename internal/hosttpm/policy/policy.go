// Package policy computes the policies that bind the host's keys to its state,
// and reads and writes the approved ones. It is arithmetic on bytes: whoever
// has a key's public area can recompute with it under which states the key
// works.
//
// A key's authPolicy is PolicyAuthorize(policy key, Ref): it accepts every policy
// that the policy key has signed. Such a policy, an Approved one, is PolicyPCR over
// a set of PCR values followed by PolicyNV, which holds only while the epoch
// counter has the value that it had at the approval: raising the counter
// withdraws every approval that is not signed again.
//
// Clauses are those of the TPM 2.0 Library, Part 3, version 1.59; all
// policies are computed with SHA-256.
package policy

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"time"
)

// Ref is the policyRef of the host's policy: a signature made for another use
// of the policy key does not approve a host state.
const Ref = "virt-trust/host/v1"

const (
	ccPolicyNV        = 0x149
	ccPolicyAuthorize = 0x16A
	ccPolicyPCR       = 0x17F
	opEqual           = 0x0000 // TPM_EO_EQ

	numPCRs   = 24
	nameSize  = 2 + sha256.Size // TPM2B_NAME's content: algorithm and digest
	maxFile   = 64 << 10
	maxNote   = 1 << 10
	maxSig    = 80 // DER of an ECDSA P-256 signature is at most 72
	version   = 1
	timeShape = time.RFC3339
)

var banks = map[string]struct {
	alg  uint16 // TPM_ALG_ID
	size int
}{
	"sha256": {0x000B, 32},
	"sha384": {0x000C, 48},
}

// State is a set of PCR values of one bank.
type State struct {
	Bank string          // "sha256" or "sha384"
	PCRs map[uint][]byte // index 0 to 23 to its value
}

// Check wants a bank and PCRs that can be approved.
func (s State) Check() error {
	bank, ok := banks[s.Bank]
	if !ok {
		return fmt.Errorf("PCR bank %q is none of sha256, sha384", s.Bank)
	}
	if len(s.PCRs) == 0 {
		return errors.New("no PCRs")
	}
	for i, v := range s.PCRs {
		if i >= numPCRs {
			return fmt.Errorf("there is no PCR %d", i)
		}
		if len(v) != bank.size {
			return fmt.Errorf("PCR %d has %d bytes, in bank %s they have %d", i, len(v), s.Bank, bank.size)
		}
	}
	return nil
}

// Indexes gives the state's PCR indexes, ascending.
func (s State) Indexes() []uint { return slices.Sorted(maps.Keys(s.PCRs)) }

// ID names a state for people and files: 16 hexadecimal digits that depend on
// nothing but bank, PCR numbers and values. A state keeps its ID when it is signed
// again for another epoch.
func (s State) ID() string {
	h := sha256.New()
	h.Write([]byte("virt-trust/state/v1\x00" + s.Bank))
	for _, i := range s.Indexes() {
		h.Write([]byte{0, byte(i)})
		h.Write(s.PCRs[i])
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// Differing gives the PCRs of s whose values in now are others or missing,
// ascending.
func (s State) Differing(now State) []uint {
	var d []uint
	for _, i := range s.Indexes() {
		if s.Bank != now.Bank || !bytes.Equal(s.PCRs[i], now.PCRs[i]) {
			d = append(d, i)
		}
	}
	return d
}

// Digest is the policyDigest of PolicyPCR over s (23.7) followed by PolicyNV:
// the 8 bytes of the epoch counter whose Name is epochName equal epoch (23.9).
func Digest(s State, epoch uint64, epochName []byte) ([]byte, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	if len(epochName) != nameSize {
		return nil, fmt.Errorf("NV index Name of %d bytes, want %d", len(epochName), nameSize)
	}
	values := sha256.New()
	var selected [3]byte
	for _, i := range s.Indexes() {
		values.Write(s.PCRs[i])
		selected[i/8] |= 1 << (i % 8)
	}
	selection := binary.BigEndian.AppendUint32(nil, 1) // TPML_PCR_SELECTION
	selection = binary.BigEndian.AppendUint16(selection, banks[s.Bank].alg)
	selection = append(selection, byte(len(selected)))
	selection = append(selection, selected[:]...)
	digest := extend(make([]byte, sha256.Size), ccPolicyPCR, selection, values.Sum(nil))
	return counterEquals(digest, epoch, epochName), nil
}

// counterEquals extends a policyDigest by PolicyNV (23.9): the counter whose Name
// is name has value.
func counterEquals(digest []byte, value uint64, name []byte) []byte {
	args := sha256.Sum256(operands(binary.BigEndian.AppendUint64(nil, value), 0, opEqual))
	return extend(digest, ccPolicyNV, args[:], name)
}

// operands is what PolicyNV and PolicyCounterTimer hash: operandB ‖ offset ‖
// operation.
func operands(b []byte, offset, operation uint16) []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, offset), operation)
}

// Authorize is the policyDigest of PolicyAuthorize (23.16) for the key that has
// the Name keyName, with Ref: the authPolicy of the host's keys.
func Authorize(keyName []byte) []byte {
	// PolicyUpdate in two steps (23.2.3): the reference is hashed on its own.
	d := sha256.Sum256(append(extend(make([]byte, sha256.Size), ccPolicyAuthorize, keyName), Ref...))
	return d[:]
}

// AuthorizedHash is what the policy key signs to approve the policy with this
// digest: H(approvedPolicy ‖ policyRef) (23.16).
func AuthorizedHash(digest []byte) [sha256.Size]byte {
	return sha256.Sum256(append(bytes.Clone(digest), Ref...))
}

func extend(digest []byte, cc uint32, parts ...[]byte) []byte {
	h := sha256.New()
	h.Write(digest)
	h.Write(binary.BigEndian.AppendUint32(nil, cc))
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// PublicArea is the TPMT_PUBLIC under which a policy key is loaded into a TPM:
// ECC P-256, ECDSA with SHA-256, signing, no policy of its own.
func PublicArea(pub *ecdsa.PublicKey) ([]byte, error) {
	if pub.Curve != elliptic.P256() {
		return nil, errors.New("policy key is not on P-256")
	}
	point, err := pub.Bytes() // 4 ‖ X ‖ Y
	if err != nil {
		return nil, err
	}
	b := []byte{
		0x00, 0x23, // TPM_ALG_ECC
		0x00, 0x0B, // nameAlg SHA-256
		0x00, 0x04, 0x00, 0x40, // objectAttributes: sign, userWithAuth
		0x00, 0x00, // no authPolicy
		0x00, 0x10, // symmetric TPM_ALG_NULL
		0x00, 0x18, 0x00, 0x0B, // ECDSA, SHA-256
		0x00, 0x03, // TPM_ECC_NIST_P256
		0x00, 0x10, // kdf TPM_ALG_NULL
	}
	b = append(append(b, 0, 32), point[1:33]...)
	return append(append(b, 0, 32), point[33:]...), nil
}

// KeyName is the Name of the policy key loaded as PublicArea says (Part 1, 16).
func KeyName(pub *ecdsa.PublicKey) ([]byte, error) {
	area, err := PublicArea(pub)
	if err != nil {
		return nil, err
	}
	d := sha256.Sum256(area)
	return append([]byte{0x00, 0x0B}, d[:]...), nil
}

// Approved is a host state that the policy key has signed.
type Approved struct {
	State
	Epoch     uint64
	EpochName []byte // Name of the epoch counter
	Policy    []byte // Digest of the three
	Signature []byte // ASN.1 ECDSA by the policy key over AuthorizedHash(Policy)
	Time      time.Time
	Note      string
}

type approvedJSON struct {
	Version   int               `json:"version"`
	Bank      string            `json:"bank"`
	PCRs      map[string]string `json:"pcrs"`
	Epoch     uint64            `json:"epoch"`
	EpochName string            `json:"epoch_name"`
	Policy    string            `json:"policy"`
	Signature string            `json:"signature"`
	Time      string            `json:"time"`
	Note      string            `json:"note"`
}

// Marshal gives the approved policy as indented JSON.
func (a *Approved) Marshal() ([]byte, error) {
	if err := a.check(); err != nil {
		return nil, err
	}
	j := approvedJSON{
		Version: version, Bank: a.Bank, PCRs: map[string]string{}, Epoch: a.Epoch,
		EpochName: hex.EncodeToString(a.EpochName), Policy: hex.EncodeToString(a.Policy),
		Signature: hex.EncodeToString(a.Signature), Time: a.Time.UTC().Format(timeShape), Note: a.Note,
	}
	for i, v := range a.PCRs {
		j.PCRs[strconv.Itoa(int(i))] = hex.EncodeToString(v)
	}
	b, err := json.MarshalIndent(j, "", "  ")
	return append(b, '\n'), err
}

// ParseApproved reads what Marshal wrote. The result is unchecked but for its
// shape: Verify checks it.
func ParseApproved(b []byte) (*Approved, error) {
	if len(b) > maxFile {
		return nil, fmt.Errorf("approved policy of %d bytes, at most %d", len(b), maxFile)
	}
	var j approvedJSON
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&j); err != nil {
		return nil, fmt.Errorf("approved policy: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("approved policy goes on after its end")
	}
	if j.Version != version {
		return nil, fmt.Errorf("approved policy of version %d, want %d", j.Version, version)
	}
	if len(j.PCRs) > numPCRs {
		return nil, fmt.Errorf("approved policy over %d PCRs", len(j.PCRs))
	}
	a := &Approved{State: State{Bank: j.Bank, PCRs: map[uint][]byte{}}, Epoch: j.Epoch, Note: j.Note}
	for name, value := range j.PCRs {
		i, err := strconv.ParseUint(name, 10, 8)
		if err != nil || strconv.FormatUint(i, 10) != name {
			return nil, fmt.Errorf("approved policy over PCR %q", name)
		}
		if a.PCRs[uint(i)], err = hex.DecodeString(value); err != nil {
			return nil, fmt.Errorf("approved policy, PCR %d: %w", i, err)
		}
	}
	var errs [4]error
	a.EpochName, errs[0] = hex.DecodeString(j.EpochName)
	a.Policy, errs[1] = hex.DecodeString(j.Policy)
	a.Signature, errs[2] = hex.DecodeString(j.Signature)
	a.Time, errs[3] = time.Parse(timeShape, j.Time)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, fmt.Errorf("approved policy: %w", err)
	}
	return a, a.check()
}

func (a *Approved) check() error {
	if err := a.State.Check(); err != nil {
		return fmt.Errorf("approved policy: %w", err)
	}
	switch {
	case len(a.EpochName) != nameSize:
		return fmt.Errorf("approved policy with an NV index Name of %d bytes", len(a.EpochName))
	case len(a.Policy) != sha256.Size:
		return fmt.Errorf("approved policy with a digest of %d bytes", len(a.Policy))
	case len(a.Signature) == 0 || len(a.Signature) > maxSig:
		return fmt.Errorf("approved policy with a signature of %d bytes", len(a.Signature))
	case len(a.Note) > maxNote:
		return fmt.Errorf("approved policy with a note of %d bytes, at most %d", len(a.Note), maxNote)
	}
	return nil
}

// Verify checks that the digest is the one of the PCR values, the epoch and
// the counter that stand beside it, and that the policy key signed it.
func (a *Approved) Verify(key *ecdsa.PublicKey) error {
	d, err := Digest(a.State, a.Epoch, a.EpochName)
	if err != nil {
		return fmt.Errorf("approved policy: %w", err)
	}
	if !bytes.Equal(d, a.Policy) {
		return errors.New("approved policy: the digest is not the one of its values")
	}
	h := AuthorizedHash(a.Policy)
	if !ecdsa.VerifyASN1(key, h[:], a.Signature) {
		return errors.New("approved policy: the policy key did not sign it")
	}
	return nil
}
