package report

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// UnmarshalCBOR reads values as they stand in most of a report, where each VM
// has some dozens of them, at a fraction of what it takes by reflection. b is
// well-formed CBOR.
func (v *Values) UnmarshalCBOR(b []byte) error {
	r := valuesReader{bytes.Clone(b)}
	n, ok := r.head(5) // a map
	if !ok || n > numPCRs {
		return fmt.Errorf("%w: PCR values", ErrFormat)
	}
	m := make(Values, n)
	for range n {
		pcr, ok := r.head(0)
		if !ok || pcr >= numPCRs {
			return fmt.Errorf("%w: PCR values: an index", ErrFormat)
		}
		size, ok := r.head(2) // bytes
		if !ok || size > uint64(len(r.b)) {
			return fmt.Errorf("%w: PCR values: PCR %d", ErrFormat, pcr)
		}
		if _, twice := m[uint(pcr)]; twice {
			return fmt.Errorf("%w: PCR values: PCR %d twice", ErrFormat, pcr)
		}
		m[uint(pcr)], r.b = r.b[:size:size], r.b[size:]
	}
	if len(r.b) > 0 {
		return fmt.Errorf("%w: PCR values: something follows", ErrFormat)
	}
	*v = m
	return nil
}

type valuesReader struct{ b []byte }

// head takes the head of a data item of a major type (RFC 8949, 3), of definite
// length, and gives its argument.
func (r *valuesReader) head(major byte) (n uint64, ok bool) {
	if len(r.b) == 0 || r.b[0]>>5 != major {
		return 0, false
	}
	info := r.b[0] & 31
	r.b = r.b[1:]
	if info < 24 {
		return uint64(info), true
	}
	size := 1 << (info - 24)
	if info > 27 || len(r.b) < size {
		return 0, false
	}
	var wide [8]byte
	copy(wide[8-size:], r.b)
	r.b = r.b[size:]
	return binary.BigEndian.Uint64(wide[:]), true
}
