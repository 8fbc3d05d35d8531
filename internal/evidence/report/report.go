// Package report is the form of Evidence (RFC 9334, 8.1): what a host says of
// itself and of all its VMs in one round, bound together by one quote of its
// TPM. It is pure.
//
// Evidence is CBOR in core deterministic encoding (RFC 8949, 4.2.1);
// evidence.cddl is its grammar. The quote's qualifyingData is
// SHA-256(nonce ‖ SHA-256(report)), so that the report is as fresh as the
// Verifier's nonce, and nothing in it can be changed on its way. The logs beside
// it are vouched for by the PCRs that they replay to.
package report

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/fxamacker/cbor/v2"
)

// CDDL is the grammar of Evidence (RFC 8610).
//
//go:embed evidence.cddl
var CDDL string

// MediaType is that of Evidence.
const MediaType = "application/vnd.virt-trust.evidence+cbor"

// Version is the only one so far, of Evidence and of Report.
const Version = 1

// Bounds.
const (
	MaxEvidence = 64 << 20 // bytes
	MaxReport   = 16 << 20
	MaxVMs      = 4096
	MaxDeleted  = 4096
	MaxName     = 4096 // bytes of any text
	MaxLogs     = 8    // in one place
	MaxQuote    = 4096 // bytes of an attestation or a signature
	MaxCert     = 4096 // bytes of a certificate
	NonceSize   = 32   // of the Verifier's; at least 16 and at most 64 are taken
	numPCRs     = 24
)

// Evidence is one round's.
type Evidence struct {
	Version uint   `cbor:"1,keyasint"`
	Nonce   []byte `cbor:"2,keyasint"` // the Verifier's
	Report  []byte `cbor:"3,keyasint"` // a Report, in the encoding that was hashed
	Quote   Quote  `cbor:"4,keyasint"` // by the AK that the report names
	PCRs    Banks  `cbor:"5,keyasint"` // the values that were quoted
	Logs    []Log  `cbor:"6,keyasint"` // of the host
}

// Quote is what a TPM signed, with its signature.
type Quote struct {
	Attest    []byte `cbor:"1,keyasint"` // TPMS_ATTEST
	Signature []byte `cbor:"2,keyasint"` // TPMT_SIGNATURE
}

// Bank is PCRs of one bank: "sha1", "sha256", "sha384", "sha512".
type Bank struct {
	Algorithm string `cbor:"1,keyasint"`
	Values    Values `cbor:"2,keyasint"`
}

// Banks are PCRs of several banks, each of which is there once.
type Banks []Bank

// Values gives those of a bank; nil where it is not there.
func (all Banks) Values(bank string) *Values {
	for i := range all {
		if all[i].Algorithm == bank {
			return &all[i].Values
		}
	}
	return nil
}

// Value gives a PCR's; nil where there is none.
func (all Banks) Value(bank string, pcr uint) []byte {
	if v := all.Values(bank); v != nil && pcr < numPCRs {
		return v[pcr]
	}
	return nil
}

// Values are those of PCRs, by index; nil where there is none. They are encoded
// as a map.
type Values [numPCRs][]byte

// ValuesOf gives those of PCRs 0 to 23.
func ValuesOf(m map[uint][]byte) (v Values) {
	for i := range v {
		v[i] = m[uint(i)]
	}
	return v
}

// MarshalCBOR gives a map of those that there are.
func (v Values) MarshalCBOR() ([]byte, error) { return encMode.Marshal(maps.Collect(v.All())) }

// All are those that there are, ascending.
func (v *Values) All() iter.Seq2[uint, []byte] {
	return func(yield func(uint, []byte) bool) {
		for i, b := range v {
			if b != nil && !yield(uint(i), b) {
				return
			}
		}
	}
}

// The kinds of Log.
const (
	EventLog  = "tcg-event-log" // firmware, boot loader, kernel: PFP, clause 10
	IMA       = "ima"           // the kernel's measurement list: binary, as in securityfs
	LaunchLog = "launch-log"    // package launchlog
)

// Log is a log, or what of it the receiver lacks: Data begins at byte From of
// the whole, at the beginning of an entry, and From is what the receiver asked
// for, or 0 where the log is another one than the receiver knows. Data may be
// empty. Where a log is cut short for its size, More says so.
type Log struct {
	Kind string `cbor:"1,keyasint"`
	From uint64 `cbor:"2,keyasint"`
	Data []byte `cbor:"3,keyasint"`
	More bool   `cbor:"4,keyasint,omitempty"`
	// Problem says why there is no log; Data is empty then.
	Problem string `cbor:"5,keyasint,omitempty"`
}

// Report is what virt-trustd says of the host and of its VMs.
type Report struct {
	Version uint      `cbor:"1,keyasint"`
	AK      []byte    `cbor:"2,keyasint"` // Name of the AK that quotes
	BootID  string    `cbor:"3,keyasint"` // the kernel's
	Time    int64     `cbor:"4,keyasint"` // microseconds since 1970, of the host's clock
	Host    Host      `cbor:"5,keyasint"`
	VMs     []VM      `cbor:"6,keyasint"` // all in the vTPM list, by UUID, ascending
	Deleted []Deleted `cbor:"7,keyasint"` // records deleted, or given back to plain libvirt, since boot
}

// Host is the part of the report about the host.
type Host struct {
	Name           string `cbor:"1,keyasint"` // its host name: nothing vouches for it
	Software       string `cbor:"2,keyasint"` // virt-trust's version
	Mode           string `cbor:"3,keyasint"` // enforce, audit
	ListState      string `cbor:"4,keyasint"` // as on D-Bus: readable, empty, sealed, damaged, rolled-back
	ListGeneration uint64 `cbor:"5,keyasint"`
	ListCounter    uint64 `cbor:"6,keyasint"` // of the TPM
	LaunchPCR      uint   `cbor:"7,keyasint"`
	LaunchLog      string `cbor:"8,keyasint"` // its standing: replays, pending, does-not-replay, …
	Kernel         string `cbor:"9,keyasint"` // its release: nothing vouches for it
}

// VM is the part of the report about one VM.
type VM struct {
	UUID            [16]byte `cbor:"1,keyasint"`
	Name            string   `cbor:"2,keyasint"`
	State           string   `cbor:"3,keyasint"` // of its record: list.State
	Running         bool     `cbor:"4,keyasint"` // its swtpm runs
	Generation      uint64   `cbor:"5,keyasint"` // of its record; the launch log's vm-start has the same
	LabelGeneration uint64   `cbor:"6,keyasint,omitempty"`
	EK              []byte   `cbor:"7,keyasint,omitempty"` // SHA-256 of the vTPM's RSA EK, SubjectPublicKeyInfo in DER
	EKCertificate   []byte   `cbor:"8,keyasint,omitempty"` // X.509, DER
	Verdict         string   `cbor:"9,keyasint,omitempty"` // of its last start
	Reason          string   `cbor:"10,keyasint,omitempty"`
	// PCRs are the vTPM's as the host read them; of a VM that runs, unless Problem
	// says why not.
	PCRs *Reading `cbor:"11,keyasint,omitempty"`
	// Quote is by the AK in the vTPM, where that is turned on.
	Quote   *VTPMQuote `cbor:"12,keyasint,omitempty"`
	Problem string     `cbor:"13,keyasint,omitempty"`
	// Logs are the guest's, out of its memory: EventLog, IMA. None so far.
	Logs []Log `cbor:"14,keyasint,omitempty"`
}

// Reading is a vTPM's PCRs, all 24 of each active bank.
type Reading struct {
	Reader string `cbor:"1,keyasint"` // how: swtpm-memory, vtpm-command
	Time   int64  `cbor:"2,keyasint"` // microseconds since 1970
	Banks  Banks  `cbor:"3,keyasint"`
}

// VTPMQuote is a quote by the AK that the vTPM got at its manufacture. Its
// qualifyingData is SHA-256(nonce ‖ UUID).
type VTPMQuote struct {
	Quote Quote  `cbor:"1,keyasint"`
	AK    []byte `cbor:"2,keyasint"` // its TPMT_PUBLIC
}

// Deleted is a VM that had a record in this boot.
type Deleted struct {
	UUID [16]byte `cbor:"1,keyasint"`
	Time int64    `cbor:"2,keyasint"` // microseconds since 1970
	Why  string   `cbor:"3,keyasint,omitempty"`
}

// ErrFormat says that bytes are no Evidence or no Report.
var ErrFormat = errors.New("not evidence")

var encMode = func() cbor.EncMode {
	o := cbor.CoreDetEncOptions()
	o.NilContainers = cbor.NilContainerAsEmpty
	e, err := o.EncMode()
	if err != nil {
		panic(err)
	}
	return e
}()

// Encode gives the evidence's bytes.
func (e *Evidence) Encode() ([]byte, error) { return encMode.Marshal(e) }

// Encode gives the report's bytes, of which the digest is quoted.
func (r *Report) Encode() ([]byte, error) { return encMode.Marshal(r) }

// QualifyingData is what the quote says: SHA-256(nonce ‖ SHA-256(report)).
func QualifyingData(nonce, report []byte) [sha256.Size]byte {
	d := sha256.Sum256(report)
	return sha256.Sum256(slices.Concat(nonce, d[:]))
}

// VTPMQualifyingData is what a vTPM's quote says: SHA-256(nonce ‖ UUID).
func VTPMQualifyingData(nonce []byte, uuid [16]byte) [sha256.Size]byte {
	return sha256.Sum256(slices.Concat(nonce, uuid[:]))
}

// UntrustedParse reads Evidence and checks shapes and bounds; the report in it
// is not read yet. What it gives refers to b.
func UntrustedParse(b []byte) (*Evidence, error) {
	if len(b) > MaxEvidence {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrFormat, len(b), MaxEvidence)
	}
	e, rd := &Evidence{}, &reader{b: b}
	e.read(rd)
	if err := rd.end(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	switch {
	case e.Version != Version:
		return nil, fmt.Errorf("%w: version %d", ErrFormat, e.Version)
	case len(e.Nonce) < 16 || len(e.Nonce) > 64:
		return nil, fmt.Errorf("%w: nonce of %d bytes", ErrFormat, len(e.Nonce))
	case len(e.Report) > MaxReport:
		return nil, fmt.Errorf("%w: report of %d bytes", ErrFormat, len(e.Report))
	}
	if err := errors.Join(e.Quote.check(), checkBanks(e.PCRs), checkLogs(e.Logs)); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	return e, nil
}

// UntrustedParseReport reads a Report and checks shapes and bounds. What it gives
// refers to b.
func UntrustedParseReport(b []byte) (*Report, error) {
	if len(b) > MaxReport {
		return nil, fmt.Errorf("%w: report of %d bytes", ErrFormat, len(b))
	}
	r, rd := &Report{}, &reader{b: b}
	r.read(rd)
	if err := rd.end(); err != nil {
		return nil, fmt.Errorf("%w: report: %w", ErrFormat, err)
	}
	if r.Version != Version {
		return nil, fmt.Errorf("%w: report of version %d", ErrFormat, r.Version)
	}
	if len(r.VMs) > MaxVMs || len(r.Deleted) > MaxDeleted || len(r.AK) > 66 || r.Host.LaunchPCR >= numPCRs {
		return nil, fmt.Errorf("%w: report out of bounds", ErrFormat)
	}
	if err := checkText(r.BootID, r.Host.Name, r.Host.Software, r.Host.Mode, r.Host.ListState, r.Host.LaunchLog, r.Host.Kernel); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	for i := range r.VMs {
		if i > 0 && bytes.Compare(r.VMs[i-1].UUID[:], r.VMs[i].UUID[:]) >= 0 {
			return nil, fmt.Errorf("%w: VMs out of order, or one twice", ErrFormat)
		}
		if err := r.VMs[i].check(); err != nil {
			return nil, fmt.Errorf("%w: VM %x: %w", ErrFormat, r.VMs[i].UUID, err)
		}
	}
	for _, d := range r.Deleted {
		if err := checkText(d.Why); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrFormat, err)
		}
	}
	return r, nil
}

func (v *VM) check() error {
	err := checkText(v.Name, v.State, v.Verdict, v.Reason, v.Problem)
	if len(v.EK) != 0 && len(v.EK) != sha256.Size || len(v.EKCertificate) > MaxCert {
		err = errors.Join(err, errors.New("endorsement key out of bounds"))
	}
	if v.PCRs != nil {
		err = errors.Join(err, checkText(v.PCRs.Reader), checkBanks(v.PCRs.Banks))
	}
	if v.Quote != nil {
		err = errors.Join(err, v.Quote.Quote.check())
		if len(v.Quote.AK) > 1024 {
			err = errors.Join(err, errors.New("AK out of bounds"))
		}
	}
	return errors.Join(err, checkLogs(v.Logs))
}

func (q *Quote) check() error {
	if len(q.Attest) > MaxQuote || len(q.Signature) > MaxQuote {
		return errors.New("quote out of bounds")
	}
	return nil
}

// sizes are those of the banks' digests.
var sizes = map[string]int{"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}

func checkBanks(banks Banks) error {
	for i := range banks {
		b := &banks[i]
		size, ok := sizes[b.Algorithm]
		for j := range banks[:i] {
			ok = ok && banks[j].Algorithm != b.Algorithm
		}
		if !ok {
			return fmt.Errorf("PCR bank %.20q", b.Algorithm)
		}
		for n, v := range b.Values {
			if v != nil && len(v) != size {
				return fmt.Errorf("PCR %d of bank %s with %d bytes", n, b.Algorithm, len(v))
			}
		}
	}
	return nil
}

func checkLogs(logs []Log) error {
	if len(logs) > MaxLogs {
		return fmt.Errorf("%d logs", len(logs))
	}
	seen := map[string]bool{}
	for _, l := range logs {
		if seen[l.Kind] {
			return fmt.Errorf("two logs of kind %.20q", l.Kind)
		}
		seen[l.Kind] = true
		if l.Kind != EventLog && l.Kind != IMA && l.Kind != LaunchLog {
			return fmt.Errorf("log of kind %.20q", l.Kind)
		}
		if err := checkText(l.Problem); err != nil {
			return err
		}
	}
	return nil
}

func checkText(texts ...string) error {
	for _, t := range texts {
		if len(t) > MaxName {
			return fmt.Errorf("text of %d bytes", len(t))
		}
		if strings.ContainsRune(t, 0) { // no name has one, and no database takes it
			return errors.New("text with a NUL in it")
		}
	}
	return nil
}
