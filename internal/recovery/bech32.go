package recovery

import (
	"errors"
	"fmt"
	"strings"
)

// Bech32 (BIP 173) without its bound of 90 characters, as age writes keys.
// Its checksum finds every error in up to four characters of a text that keeps
// to the bound.

const charset = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"

func polymod(values []byte) uint32 {
	check := uint32(1)
	for _, v := range values {
		top := check >> 25
		check = check&0x1ffffff<<5 ^ uint32(v)
		for i, g := range [5]uint32{0x3b6a57b2, 0x26508e6d, 0x1ea119fa, 0x3d4233dd, 0x2a1462b3} {
			check ^= g & -(top >> i & 1)
		}
	}
	return check
}

// expand gives the human-readable part as the checksum sees it.
func expand(hrp string) []byte {
	var high, low []byte
	for i := range len(hrp) {
		high, low = append(high, hrp[i]>>5), append(low, hrp[i]&31)
	}
	return append(append(high, 0), low...)
}

// encodeBech32 writes data behind hrp, in lower case.
func encodeBech32(hrp string, data []byte) string {
	var values []byte
	acc, bits := uint32(0), 0
	for _, b := range data {
		acc, bits = acc<<8|uint32(b), bits+8
		for bits >= 5 {
			bits -= 5
			values = append(values, byte(acc>>bits&31))
		}
	}
	if bits > 0 {
		values = append(values, byte(acc<<(5-bits)&31))
	}
	sum := polymod(append(append(expand(hrp), values...), 0, 0, 0, 0, 0, 0)) ^ 1
	for i := range 6 {
		values = append(values, byte(sum>>(5*(5-i))&31))
	}
	var s strings.Builder
	s.WriteString(hrp + "1")
	for _, v := range values {
		s.WriteByte(charset[v])
	}
	clear(values)
	return s.String()
}

// decodeBech32 reads what encodeBech32 wrote, in one case or the other.
func decodeBech32(hrp, s string) ([]byte, error) {
	lower := strings.ToLower(s)
	if s != lower && s != strings.ToUpper(s) {
		return nil, errors.New("upper and lower case are mixed")
	}
	body, ok := strings.CutPrefix(lower, hrp+"1")
	if !ok {
		return nil, fmt.Errorf("it does not begin with %s1", hrp)
	}
	if len(body) < 6 {
		return nil, errors.New("it is cut short")
	}
	values := make([]byte, len(body))
	defer clear(values)
	for i := range len(body) {
		v := strings.IndexByte(charset, body[i])
		if v < 0 {
			return nil, errors.New("it has characters that do not belong there")
		}
		values[i] = byte(v)
	}
	if polymod(append(expand(hrp), values...)) != 1 {
		return nil, errors.New("its checksum is wrong: a character is mistyped or missing")
	}
	var data []byte
	acc, bits := uint32(0), 0
	for _, v := range values[:len(values)-6] {
		acc, bits = acc<<5|uint32(v), bits+5
		if bits >= 8 {
			bits -= 8
			data = append(data, byte(acc>>bits))
		}
	}
	if bits >= 5 || acc&(1<<bits-1) != 0 {
		return nil, errors.New("its padding is wrong")
	}
	return data, nil
}
