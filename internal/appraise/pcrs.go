package appraise

import (
	"bytes"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/bits"

	"virt-trust/internal/evidence/report"
)

const numPCRs = 24

// PCRs are those of a result. As JSON they are an object: "sha256:0" has the value
// of PCR 0 of bank sha256, in hexadecimal. Of 24 in each of many VMs nobody looks at
// most, so that they are written out only where somebody does.
type PCRs struct {
	packed pcrs
	texts  map[string]string
}

// NewPCRs are those that are written out in m, which is not changed later.
func NewPCRs(m map[string]string) PCRs { return PCRs{texts: m} }

// IsZero reports whether there are none.
func (p PCRs) IsZero() bool { return p.packed.Which == 0 && len(p.texts) == 0 }

// Texts gives all, as in JSON; it may be changed by nobody.
func (p PCRs) Texts() map[string]string {
	if p.texts != nil || p.packed.Which == 0 {
		return p.texts
	}
	return p.packed.texts()
}

// MarshalJSON gives an object of texts.
func (p PCRs) MarshalJSON() ([]byte, error) { return json.Marshal(p.Texts()) }

// UnmarshalJSON reads an object of texts: any, since nobody vouches for what is
// read.
func (p *PCRs) UnmarshalJSON(b []byte) error {
	*p = PCRs{}
	return json.Unmarshal(b, &p.texts)
}

// pcrs are PCRs of one bank, as a checkpoint keeps them.
type pcrs struct {
	Bank   string `cbor:"1,keyasint"`
	Which  uint32 `cbor:"2,keyasint"` // a bit for each, that of PCR 0 the lowest
	Values []byte `cbor:"3,keyasint"` // by PCR, ascending
}

// packPCRs gives those of some PCRs that have a value. The values are of the
// bank's size: package report sees to it. They are before's where nothing has
// changed, as mostly from one round to the next.
func packPCRs(bank string, values *report.Values, some uint32, before pcrs) pcrs {
	var room [numPCRs * sha512.Size]byte
	n := pcrs{Bank: bank, Values: room[:0]}
	for p, v := range values {
		if v != nil && some&(1<<p) != 0 {
			n.Which, n.Values = n.Which|1<<p, append(n.Values, v...)
		}
	}
	if n.same(&before) {
		return before
	}
	return pcrs{Bank: bank, Which: n.Which, Values: bytes.Clone(n.Values)}
}

// sizeOf is the size of a bank's digests; 0 of one that there is not.
func sizeOf(bank string) int {
	_, size := identify(bank)
	return size
}

const everyPCR = 1<<numPCRs - 1

// texts are what results have: values by their paths, in hexadecimal.
func (n *pcrs) texts() map[string]string {
	m := make(map[string]string, bits.OnesCount32(n.Which))
	for p := range uint(numPCRs) {
		if v := n.at(p); v != nil {
			m[pcrPath(n.Bank, p)] = hex.EncodeToString(v)
		}
	}
	return m
}

// is compares a PCR's value with hexadecimal digits.
func (n *pcrs) is(p uint, all []string) bool {
	v := n.at(p)
	for _, digits := range all {
		if v != nil && isHex(digits, v) {
			return true
		}
	}
	return false
}

func (n *pcrs) hex(p uint) string { return hex.EncodeToString(n.at(p)) }

func (n *pcrs) same(o *pcrs) bool {
	return n.Which == o.Which && n.Bank == o.Bank && bytes.Equal(n.Values, o.Values)
}

// at is a PCR's value; nil where there is none.
func (n *pcrs) at(p uint) []byte {
	size := sizeOf(n.Bank)
	if p >= numPCRs || n.Which&(1<<p) == 0 || size == 0 {
		return nil
	}
	at := size * bits.OnesCount32(n.Which&(1<<p-1))
	if at+size > len(n.Values) {
		return nil
	}
	return n.Values[at : at+size]
}

func (n *pcrs) byPCR() map[uint][]byte {
	m := make(map[uint][]byte, bits.OnesCount32(n.Which))
	for p := range uint(numPCRs) {
		if v := n.at(p); v != nil {
			m[p] = v
		}
	}
	return m
}

// isHex compares hexadecimal digits with bytes.
func isHex(digits string, b []byte) bool {
	const alphabet = "0123456789abcdef"
	if len(digits) != 2*len(b) {
		return false
	}
	for i, c := range b {
		if digits[2*i] != alphabet[c>>4] || digits[2*i+1] != alphabet[c&15] {
			return false
		}
	}
	return true
}

// pcrPaths are the names of PCRs in Reference Values and results.
var pcrPaths = func() map[string]*[numPCRs]string {
	all := map[string]*[numPCRs]string{}
	for _, bank := range algorithms {
		all[bank] = new([numPCRs]string)
		for p := range all[bank] {
			all[bank][p] = fmt.Sprintf("%s:%d", bank, p)
		}
	}
	return all
}()

func pcrPath(bank string, pcr uint) string {
	if t := pcrPaths[bank]; t != nil && pcr < uint(len(t)) {
		return t[pcr]
	}
	return fmt.Sprintf("%s:%d", bank, pcr)
}
