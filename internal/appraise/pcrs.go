package appraise

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math/bits"
)

const numPCRs = 24

// pcrs are PCRs of one bank, as a checkpoint keeps them.
type pcrs struct {
	Bank   string `cbor:"1,keyasint"`
	Which  uint32 `cbor:"2,keyasint"` // a bit for each, that of PCR 0 the lowest
	Values []byte `cbor:"3,keyasint"` // by PCR, ascending

	texts map[string]string // what results have: by their paths, in hexadecimal
}

// packPCRs gives those of some PCRs that have a value. The values are of the
// bank's size: package report sees to it.
func packPCRs(bank string, values map[uint][]byte, some uint32) pcrs {
	n := pcrs{Bank: bank, Values: make([]byte, 0, len(values)*algorithms[bank].size)}
	for p := range uint(numPCRs) {
		if some&(1<<p) == 0 {
			continue
		}
		if v, ok := values[p]; ok {
			n.Which, n.Values = n.Which|1<<p, append(n.Values, v...)
		}
	}
	return n
}

const everyPCR = 1<<numPCRs - 1

// told has the texts: those of was, where the values are the same.
func (n pcrs) told(was *pcrs) pcrs {
	if n.same(was) && was.texts != nil {
		return *was
	}
	all := hex.EncodeToString(n.Values)
	n.texts = make(map[string]string, bits.OnesCount32(n.Which))
	for p := range uint(numPCRs) {
		if at, end, ok := n.bounds(p); ok {
			n.texts[pcrPath(n.Bank, p)] = all[2*at : 2*end]
		}
	}
	return n
}

func (n *pcrs) same(o *pcrs) bool {
	return n.Which == o.Which && n.Bank == o.Bank && bytes.Equal(n.Values, o.Values)
}

// at is a PCR's value; nil where there is none.
func (n *pcrs) at(p uint) []byte {
	if at, end, ok := n.bounds(p); ok {
		return n.Values[at:end]
	}
	return nil
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

func (n *pcrs) bounds(p uint) (at, end int, ok bool) {
	if p >= numPCRs || n.Which&(1<<p) == 0 {
		return 0, 0, false
	}
	size := algorithms[n.Bank].size
	at = size * bits.OnesCount32(n.Which&(1<<p-1))
	return at, at + size, size > 0 && at+size <= len(n.Values)
}

// pcrPaths are the names of PCRs in Reference Values and results.
var pcrPaths = func() map[string]*[numPCRs]string {
	all := map[string]*[numPCRs]string{}
	for bank := range algorithms {
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
