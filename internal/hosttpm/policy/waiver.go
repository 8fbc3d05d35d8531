package policy

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

const (
	ccPolicyCounterTimer = 0x16D
	opGreater            = 0x0003 // TPM_EO_UNSIGNED_GT
	opLessOrEqual        = 0x0009 // TPM_EO_UNSIGNED_LE
	// ResetCountOffset is where TPMS_TIME_INFO has resetCount: after time and
	// clock (Part 2, 10.11.6).
	ResetCountOffset = 16
)

// Waiver is a signed policy that looks at no PCR. It holds while the TPM's
// resetCount is greater than After, so not in the boot in which it was given,
// and at most Until; while the counter of waivers has the value Use; and in its
// epoch. Raising the counter of waivers is what uses it up.
type Waiver struct {
	After, Until uint32
	Use          uint64
	UseIndex     uint32 // NV index of the counter of waivers
	UseName      []byte // its Name
	Epoch        uint64
	EpochName    []byte
	Policy       []byte // WaiverDigest of the above
	Signature    []byte // as an Approved's
	Time         time.Time
	Note         string
}

// Digest is the policyDigest of PolicyCounterTimer (23.10) for After and for
// Until, then PolicyNV for Use and for Epoch.
func (w *Waiver) Digest() ([]byte, error) {
	if len(w.UseName) != nameSize || len(w.EpochName) != nameSize {
		return nil, fmt.Errorf("NV index Names of %d and %d bytes, want %d", len(w.UseName), len(w.EpochName), nameSize)
	}
	digest := make([]byte, sha256.Size)
	for _, bound := range w.Bounds() {
		args := sha256.Sum256(operands(binary.BigEndian.AppendUint32(nil, bound.Value), ResetCountOffset, bound.Operation))
		digest = extend(digest, ccPolicyCounterTimer, args[:])
	}
	digest = counterEquals(digest, w.Use, w.UseName)
	return counterEquals(digest, w.Epoch, w.EpochName), nil
}

// Bound is a comparison of resetCount with Value; Operation is a TPM_EO.
type Bound struct {
	Value     uint32
	Operation uint16
}

// Bounds are the two that a waiver sets, in the order of its policy.
func (w *Waiver) Bounds() [2]Bound {
	return [2]Bound{{w.After, opGreater}, {w.Until, opLessOrEqual}}
}

type waiverJSON struct {
	Version   int    `json:"version"`
	After     uint32 `json:"after_reset"`
	Until     uint32 `json:"until_reset"`
	Use       uint64 `json:"use"`
	UseIndex  uint32 `json:"use_index"`
	UseName   string `json:"use_name"`
	Epoch     uint64 `json:"epoch"`
	EpochName string `json:"epoch_name"`
	Policy    string `json:"policy"`
	Signature string `json:"signature"`
	Time      string `json:"time"`
	Note      string `json:"note"`
}

// Marshal gives the waiver as indented JSON.
func (w *Waiver) Marshal() ([]byte, error) {
	if err := w.check(); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(waiverJSON{
		Version: version, After: w.After, Until: w.Until, Use: w.Use, UseIndex: w.UseIndex, UseName: hex.EncodeToString(w.UseName),
		Epoch: w.Epoch, EpochName: hex.EncodeToString(w.EpochName), Policy: hex.EncodeToString(w.Policy),
		Signature: hex.EncodeToString(w.Signature), Time: w.Time.UTC().Format(timeShape), Note: w.Note,
	}, "", "  ")
	return append(b, '\n'), err
}

// ParseWaiver reads what Marshal wrote. The result is unchecked but for its
// shape: Verify checks it.
func ParseWaiver(b []byte) (*Waiver, error) {
	if len(b) > maxFile {
		return nil, fmt.Errorf("waiver of %d bytes, at most %d", len(b), maxFile)
	}
	var j waiverJSON
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&j); err != nil {
		return nil, fmt.Errorf("waiver: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("waiver goes on after its end")
	}
	if j.Version != version {
		return nil, fmt.Errorf("waiver of version %d, want %d", j.Version, version)
	}
	w := &Waiver{After: j.After, Until: j.Until, Use: j.Use, UseIndex: j.UseIndex, Epoch: j.Epoch, Note: j.Note}
	var errs [5]error
	w.UseName, errs[0] = hex.DecodeString(j.UseName)
	w.EpochName, errs[1] = hex.DecodeString(j.EpochName)
	w.Policy, errs[2] = hex.DecodeString(j.Policy)
	w.Signature, errs[3] = hex.DecodeString(j.Signature)
	w.Time, errs[4] = time.Parse(timeShape, j.Time)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, fmt.Errorf("waiver: %w", err)
	}
	return w, w.check()
}

func (w *Waiver) check() error {
	switch {
	case len(w.UseName) != nameSize || len(w.EpochName) != nameSize:
		return fmt.Errorf("waiver with NV index Names of %d and %d bytes", len(w.UseName), len(w.EpochName))
	case w.After >= w.Until:
		return fmt.Errorf("waiver that holds for no boot: after %d, until %d", w.After, w.Until)
	case len(w.Policy) != sha256.Size:
		return fmt.Errorf("waiver with a digest of %d bytes", len(w.Policy))
	case len(w.Signature) == 0 || len(w.Signature) > maxSig:
		return fmt.Errorf("waiver with a signature of %d bytes", len(w.Signature))
	case len(w.Note) > maxNote:
		return fmt.Errorf("waiver with a note of %d bytes, at most %d", len(w.Note), maxNote)
	}
	return nil
}

// Verify checks that the digest is the one of what stands beside it, and that
// the policy key signed it.
func (w *Waiver) Verify(key *ecdsa.PublicKey) error {
	d, err := w.Digest()
	if err != nil {
		return fmt.Errorf("waiver: %w", err)
	}
	if !bytes.Equal(d, w.Policy) {
		return errors.New("waiver: the digest is not the one of its values")
	}
	h := AuthorizedHash(w.Policy)
	if !ecdsa.VerifyASN1(key, h[:], w.Signature) {
		return errors.New("waiver: the policy key did not sign it")
	}
	return nil
}
