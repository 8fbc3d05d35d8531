// Package statefile reads and writes swtpm's state files (tpm2-00.permall and
// its kin) as bytes, so that a vTPM can be taken in, given back and told apart
// without starting it.
//
// The format is that of swtpm 0.7 to 0.10 (src/swtpm/swtpm_nvstore.c): a
// 10-byte header (version, least version that can read it, header size u16,
// flags u16, total length u32), then TLVs (tag u16, length u32), all
// big-endian. An encrypted file has the AES-CBC ciphertext, an IV as long as
// the key of which the first 16 bytes are used, and an HMAC-SHA256 over
// ciphertext ‖ IV under the same key.
package statefile

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
)

// KeySize is the length of a state key in bytes: swtpm's aes-256-cbc.
const KeySize = 32

// MaxSize bounds a state file. libtpms' largest is 146 KB.
const MaxSize = 1 << 20

const (
	headerSize = 10
	version    = 2
	minVersion = 1

	flagEncrypted  = 0x01
	flagEncrypt256 = 0x08

	tagData      = 1
	tagEncrypted = 2
	tagHMAC      = 3
	tagIV        = 6
)

// Kind says what a state file is.
type Kind string

// The kinds. Damaged is everything that swtpm would not load.
const (
	Plain     Kind = "plain"
	Encrypted Kind = "encrypted"
	Damaged   Kind = "damaged"
)

// Errors of Decrypt and Verify.
var (
	ErrFormat = errors.New("not a state file of swtpm")
	ErrKind   = errors.New("the state file is not of the expected kind")
	ErrMAC    = errors.New("the state file was not written under this key")
)

type file struct {
	flags uint16
	tlv   map[uint16][]byte
}

func parse(b []byte) (*file, error) {
	be := binary.BigEndian
	if len(b) < headerSize || len(b) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes long", ErrFormat, len(b))
	}
	if b[0] != version || b[1] > version || be.Uint16(b[2:]) != headerSize {
		return nil, fmt.Errorf("%w: unknown header", ErrFormat)
	}
	if n := be.Uint32(b[6:]); uint64(n) != uint64(len(b)) {
		return nil, fmt.Errorf("%w: %d bytes long where its header says %d", ErrFormat, len(b), n)
	}
	f := &file{be.Uint16(b[4:]), map[uint16][]byte{}}
	for rest := b[headerSize:]; len(rest) > 0; {
		if len(rest) < 6 {
			return nil, fmt.Errorf("%w: cut off", ErrFormat)
		}
		tag, n := be.Uint16(rest), be.Uint32(rest[2:])
		rest = rest[6:]
		if uint64(n) > uint64(len(rest)) {
			return nil, fmt.Errorf("%w: a part overruns its end", ErrFormat)
		}
		if _, twice := f.tlv[tag]; twice {
			return nil, fmt.Errorf("%w: part %d comes twice", ErrFormat, tag)
		}
		f.tlv[tag], rest = rest[:n], rest[n:]
	}
	return f, nil
}

// Classify says what b is, without a key.
func Classify(b []byte) Kind {
	f, err := parse(b)
	switch {
	case err != nil:
		return Damaged
	case f.flags == 0 && len(f.tlv[tagData]) > 0:
		return Plain
	case f.flags&flagEncrypted != 0 && len(f.tlv[tagEncrypted]) > 0:
		return Encrypted
	}
	return Damaged
}

func (f *file) mac(key []byte) []byte {
	m := hmac.New(sha256.New, key)
	m.Write(f.tlv[tagEncrypted])
	m.Write(f.tlv[tagIV])
	return m.Sum(nil)
}

func verify(b, key []byte) (*file, error) {
	if len(key) != KeySize {
		return nil, fmt.Errorf("a state key is %d bytes, not %d", KeySize, len(key))
	}
	f, err := parse(b)
	if err != nil {
		return nil, err
	}
	if f.flags != flagEncrypted|flagEncrypt256 || len(f.tlv[tagIV]) != KeySize {
		return nil, fmt.Errorf("%w: not AES-256", ErrKind)
	}
	if !hmac.Equal(f.tlv[tagHMAC], f.mac(key)) {
		return nil, ErrMAC
	}
	return f, nil
}

// Verify checks that b was encrypted under the state key. Errors: ErrFormat,
// ErrKind, ErrMAC.
func Verify(b, key []byte) error {
	_, err := verify(b, key)
	return err
}

// Decrypt gives the plain state file of the encrypted one.
func Decrypt(b, key []byte) ([]byte, error) {
	f, err := verify(b, key)
	if err != nil {
		return nil, err
	}
	ct := f.tlv[tagEncrypted]
	if len(ct) == 0 || len(ct)%aes.BlockSize != 0 {
		return nil, fmt.Errorf("%w: ciphertext of %d bytes", ErrFormat, len(ct))
	}
	c, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	pt := make([]byte, len(ct))
	cipher.NewCBCDecrypter(c, f.tlv[tagIV][:aes.BlockSize]).CryptBlocks(pt, ct)
	// swtpm pads to a multiple of the key's length.
	pad := int(pt[len(pt)-1])
	if pad == 0 || pad > KeySize || pad > len(pt) {
		return nil, fmt.Errorf("%w: padding", ErrFormat)
	}
	return frame(0, part{tagData, pt[:len(pt)-pad]}), nil
}

// Encrypt gives the encrypted state file of the plain one. iv is 32 fresh
// random bytes.
func Encrypt(b, key, iv []byte) ([]byte, error) {
	if len(key) != KeySize || len(iv) != KeySize {
		return nil, fmt.Errorf("a state key and its IV are %d bytes, not %d and %d", KeySize, len(key), len(iv))
	}
	f, err := parse(b)
	if err != nil {
		return nil, err
	}
	data := f.tlv[tagData]
	if f.flags != 0 || len(data) == 0 {
		return nil, fmt.Errorf("%w: not plain", ErrKind)
	}
	pad := KeySize - len(data)%KeySize
	buf := make([]byte, len(data)+pad)
	copy(buf, data)
	for i := len(data); i < len(buf); i++ {
		buf[i] = byte(pad)
	}
	c, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	cipher.NewCBCEncrypter(c, iv[:aes.BlockSize]).CryptBlocks(buf, buf)
	e := &file{tlv: map[uint16][]byte{tagEncrypted: buf, tagIV: iv}}
	return frame(flagEncrypted|flagEncrypt256, part{tagEncrypted, buf}, part{tagHMAC, e.mac(key)}, part{tagIV, iv}), nil
}

type part struct {
	tag  uint16
	data []byte
}

func frame(flags uint16, parts ...part) []byte {
	be := binary.BigEndian
	n := headerSize
	for _, p := range parts {
		n += 6 + len(p.data)
	}
	b := make([]byte, 0, n)
	b = append(b, version, minVersion)
	b = be.AppendUint16(b, headerSize)
	b = be.AppendUint16(b, flags)
	b = be.AppendUint32(b, uint32(n))
	for _, p := range parts {
		b = be.AppendUint16(b, p.tag)
		b = be.AppendUint32(b, uint32(len(p.data)))
		b = append(b, p.data...)
	}
	return b
}
