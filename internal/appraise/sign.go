package appraise

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
)

// imaKeys reads the keys of IMA signatures.
func (p *Policy) imaKeys() (keys []crypto.PublicKey, err error) {
	for rest := bytes.TrimSpace([]byte(p.IMA.Keys)); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "PUBLIC KEY" {
			return nil, errors.New("not a public key in PEM")
		}
		k, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, err
		}
		switch k.(type) {
		case *rsa.PublicKey, *ecdsa.PublicKey:
			keys = append(keys, k)
		default:
			return nil, fmt.Errorf("a %T does not sign files for IMA; RSA and ECDSA do", k)
		}
	}
	return keys, nil
}

// imaHashes are the algorithms of a signature's header (enum hash_algo,
// include/uapi/linux/hash_info.h).
var imaHashes = map[byte]struct {
	name string
	hash crypto.Hash
}{2: {"sha1", crypto.SHA1}, 4: {"sha256", crypto.SHA256}, 5: {"sha384", crypto.SHA384}, 6: {"sha512", crypto.SHA512}}

// imaSigned reports whether one of the keys made an IMA signature, version 2
// (struct signature_v2_hdr: type 3, version 2, algorithm, key id, length, signature),
// over a digest. SHA-1 is not taken.
func imaSigned(keys []crypto.PublicKey, algorithm string, digest, signature []byte) bool {
	if len(keys) == 0 || len(signature) < 9 || signature[0] != 3 || signature[1] != 2 {
		return false
	}
	h, ok := imaHashes[signature[2]]
	size := int(binary.BigEndian.Uint16(signature[7:]))
	sig := signature[9:]
	if !ok || h.name != algorithm || h.hash == crypto.SHA1 || len(digest) != h.hash.Size() || len(sig) != size {
		return false
	}
	for _, k := range keys {
		switch k := k.(type) {
		case *rsa.PublicKey:
			if rsa.VerifyPKCS1v15(k, h.hash, digest, sig) == nil {
				return true
			}
		case *ecdsa.PublicKey:
			if ecdsa.VerifyASN1(k, digest, sig) {
				return true
			}
		}
	}
	return false
}
