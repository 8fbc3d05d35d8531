// Package quote reads and verifies what a TPM signs and says of its keys:
// quotes, certifications, public areas, Names; and makes the credential by which
// an AK is shown to live in the TPM of an EK. It is pure; section numbers are
// those of the TPM 2.0 Library, 1.59.
//
// One scheme is taken: ECDSA over NIST P-256 with SHA-256. All that is parsed
// here may come from anyone.
package quote

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"
)

// Errors of the functions below, for those who branch.
var (
	ErrFormat     = errors.New("not what a TPM attests")
	ErrSignature  = errors.New("the signature is not the AK's")
	ErrQualifying = errors.New("the TPM signed it for another question") // nonce or report
	ErrNoPCRs     = errors.New("the quote is over no PCRs")
	ErrBank       = errors.New("the quote is not over this PCR bank")
	ErrPCRs       = errors.New("the quote leaves PCRs out")
	ErrValues     = errors.New("the PCR values are not those that were quoted")
	ErrName       = errors.New("another object was certified")
	ErrKind       = errors.New("the key is not of the kind that it should be")
)

// Numbers of Part 2, 6.2, 6.3 and 6.9.
const (
	generated  = 0xff544347
	stCertify  = 0x8017
	stQuote    = 0x8018
	algSHA1    = 0x0004
	algSHA256  = 0x000B
	algSHA384  = 0x000C
	algSHA512  = 0x000D
	algECDSA   = 0x0018
	maxBanks   = 16
	maxSelect  = 4 // bytes of a selection: 32 PCRs
	maxBuffer  = 1024
	maxMessage = 4096
)

var bankNames = map[uint16]string{algSHA1: "sha1", algSHA256: "sha256", algSHA384: "sha384", algSHA512: "sha512"}

// Clock is what the TPM says of its time (10.11.1, TPMS_CLOCK_INFO). Where a key
// of the owner hierarchy signed it, a number that only the TPM knows, and that is the
// same for all that the key signs, was added to each of the two counters and to the
// firmware's version (Part 1, 36.7): only differences between two statements of one
// key mean something, and they wrap.
type Clock struct {
	Milliseconds uint64 // since the clock was last set; it runs only while there is power
	Resets       uint32 // TPM resets: boots
	Restarts     uint32 // restarts and resumes since the last reset
	Safe         bool   // no value of Milliseconds as high was ever given out before
}

// Selection is PCRs of one bank, ascending.
type Selection struct {
	Bank string // "sha256", …; "0x0012" for one that has no name here
	PCRs []uint
}

// Quote is what TPM2_Quote says (10.12.1, TPMS_QUOTE_INFO, with the TPMS_ATTEST
// around it).
type Quote struct {
	Signer     []byte // qualified Name of the key
	Qualifying []byte // extraData
	Clock      Clock
	Firmware   uint64 // firmwareVersion
	Selections []Selection
	Digest     []byte // of the PCRs' values
}

// statement is any TPMS_ATTEST (10.12.12).
type statement struct {
	kind               uint16
	signer, qualifying []byte
	clock              Clock
	firmware           uint64
	attested           reader
}

// reader takes numbers and bytes off the front of what is left.
type reader struct {
	b      []byte
	failed bool
}

func (r *reader) take(n int) []byte {
	if n > len(r.b) {
		r.failed, r.b = true, nil
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) number(size int) (n uint64) {
	for _, b := range r.take(size) {
		n = n<<8 | uint64(b)
	}
	return n
}

// buffer is a TPM2B.
func (r *reader) buffer() []byte {
	n := int(r.number(2))
	if n > maxBuffer {
		r.failed, r.b = true, nil
		return nil
	}
	return r.take(n)
}

func parseStatement(b []byte) (s statement, err error) {
	if len(b) > maxMessage {
		return s, fmt.Errorf("%w: %d bytes", ErrFormat, len(b))
	}
	r := reader{b: b}
	if r.number(4) != generated {
		return s, fmt.Errorf("%w: it does not begin with TPM_GENERATED", ErrFormat)
	}
	s.kind = uint16(r.number(2))
	s.signer, s.qualifying = r.buffer(), r.buffer()
	s.clock = Clock{Milliseconds: r.number(8), Resets: uint32(r.number(4)), Restarts: uint32(r.number(4))}
	safe := r.number(1)
	s.clock.Safe = safe == 1
	s.firmware = r.number(8)
	if r.failed || safe > 1 {
		return s, fmt.Errorf("%w: it is cut off, or spoilt", ErrFormat)
	}
	s.attested = r
	return s, nil
}

// UntrustedParse reads a TPMS_ATTEST that should be a quote. Nobody has vouched
// for it yet.
func UntrustedParse(attest []byte) (Quote, error) {
	s, err := parseStatement(attest)
	if err != nil {
		return Quote{}, err
	}
	if s.kind != stQuote {
		return Quote{}, fmt.Errorf("%w: it is of type %#x, not a quote", ErrFormat, s.kind)
	}
	q := Quote{Signer: s.signer, Qualifying: s.qualifying, Clock: s.clock, Firmware: s.firmware}
	r := s.attested
	n := int(r.number(4))
	if r.failed || n > maxBanks {
		return Quote{}, fmt.Errorf("%w: %d PCR selections", ErrFormat, n)
	}
	for range n {
		alg := uint16(r.number(2))
		size := int(r.number(1))
		if r.failed || size > maxSelect {
			return Quote{}, fmt.Errorf("%w: PCR selection of %d bytes", ErrFormat, size)
		}
		sel := Selection{Bank: bankNames[alg], PCRs: make([]uint, 0, 8*size)}
		if sel.Bank == "" {
			sel.Bank = fmt.Sprintf("%#06x", alg)
		}
		if slices.ContainsFunc(q.Selections, func(o Selection) bool { return o.Bank == sel.Bank }) {
			return Quote{}, fmt.Errorf("%w: bank %s is selected twice", ErrFormat, sel.Bank)
		}
		for i, bits := range r.take(size) {
			for bit := range 8 {
				if bits&(1<<bit) != 0 {
					sel.PCRs = append(sel.PCRs, uint(i*8+bit))
				}
			}
		}
		q.Selections = append(q.Selections, sel)
	}
	q.Digest = r.buffer()
	if r.failed || len(r.b) > 0 {
		return Quote{}, fmt.Errorf("%w: it is cut off, or something follows it", ErrFormat)
	}
	return q, nil
}

// Verify gives a quote that ak signed over the qualifying data. Errors:
// ErrFormat, ErrSignature, ErrQualifying; which PCRs it is over is asked by Covers, and
// has to be.
func Verify(attest, signature []byte, ak *ecdsa.PublicKey, qualifying [sha256.Size]byte) (Quote, error) {
	if err := verifySignature(attest, signature, ak); err != nil {
		return Quote{}, err
	}
	q, err := UntrustedParse(attest)
	if err != nil {
		return Quote{}, err
	}
	if subtle.ConstantTimeCompare(q.Qualifying, qualifying[:]) != 1 {
		return Quote{}, ErrQualifying
	}
	return q, nil
}

// verifySignature checks a TPMT_SIGNATURE (11.3.4) of the one scheme.
func verifySignature(message, signature []byte, key *ecdsa.PublicKey) error {
	if key == nil || key.Curve != elliptic.P256() {
		return fmt.Errorf("%w: it is not ECDSA over NIST P-256", ErrKind)
	}
	r := reader{b: signature}
	scheme, hash := r.number(2), r.number(2)
	if scheme != algECDSA || hash != algSHA256 {
		return fmt.Errorf("%w: scheme %#x with hash %#x, not ECDSA with SHA-256", ErrSignature, scheme, hash)
	}
	x, y := r.buffer(), r.buffer()
	if r.failed || len(r.b) > 0 || len(x) > 32 || len(y) > 32 {
		return fmt.Errorf("%w: it is cut off, or too long", ErrSignature)
	}
	digest := sha256.Sum256(message)
	if !ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(x), new(big.Int).SetBytes(y)) {
		return ErrSignature
	}
	return nil
}

// PCRs are those of a bank that were quoted.
func (q Quote) PCRs(bank string) []uint {
	for _, s := range q.Selections {
		if s.Bank == bank {
			return s.PCRs
		}
	}
	return nil
}

// Covers checks that the quote is over all of the PCRs in a bank. No PCRs are
// never covered. Errors: ErrNoPCRs, ErrBank, ErrPCRs.
func (q Quote) Covers(bank string, pcrs []uint) error {
	none := !slices.ContainsFunc(q.Selections, func(s Selection) bool { return len(s.PCRs) > 0 })
	have := q.PCRs(bank)
	switch {
	case none || len(pcrs) == 0:
		return ErrNoPCRs
	case len(have) == 0:
		return fmt.Errorf("%w: %s", ErrBank, bank)
	}
	var missing []uint
	for _, p := range pcrs {
		if !slices.Contains(have, p) {
			missing = append(missing, p)
		}
	}
	if missing != nil {
		return fmt.Errorf("%w: %v of bank %s", ErrPCRs, missing, bank)
	}
	return nil
}

// Check holds values against the digest (Part 1, 17.6; Part 2, 10.12.1): banks as
// they were selected, PCRs ascending. value gives that of a PCR, or nil. What was
// not selected is not looked at, and not vouched for: see PCRs. Errors: ErrNoPCRs,
// ErrValues.
func (q Quote) Check(value func(bank string, pcr uint) []byte) error {
	h := sha256.New()
	n := 0
	for _, s := range q.Selections {
		for _, p := range s.PCRs {
			v := value(s.Bank, p)
			if v == nil {
				return fmt.Errorf("%w: PCR %d of bank %s is not there", ErrValues, p, s.Bank)
			}
			h.Write(v)
			n++
		}
	}
	if n == 0 {
		return ErrNoPCRs
	}
	if !bytes.Equal(h.Sum(nil), q.Digest) {
		return ErrValues
	}
	return nil
}

// VerifyCertify checks that ak says of an object with this Name that it is in
// its TPM (TPM2_Certify: Part 3, 18.2). Errors: ErrFormat, ErrSignature, ErrName.
func VerifyCertify(attest, signature []byte, ak *ecdsa.PublicKey, name []byte) error {
	if err := verifySignature(attest, signature, ak); err != nil {
		return err
	}
	s, err := parseStatement(attest)
	if err != nil {
		return err
	}
	if s.kind != stCertify {
		return fmt.Errorf("%w: it is of type %#x, not a certification", ErrFormat, s.kind)
	}
	r := s.attested
	certified := r.buffer()
	r.buffer() // qualifiedName
	if r.failed || len(r.b) > 0 {
		return fmt.Errorf("%w: it is cut off, or something follows it", ErrFormat)
	}
	if len(name) < 2+sha256.Size || !bytes.Equal(certified, name) {
		return ErrName
	}
	return nil
}

// sized writes a TPM2B.
func sized(b []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)
}
