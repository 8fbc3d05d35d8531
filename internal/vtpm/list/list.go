// Package list is the vTPM list: the records that tie each VM to its vTPM and
// its label, and the sealed form in which they lie on disk. It is pure: keys,
// nonces and times come from the caller.
//
// The file is a 56-byte header (magic, version, length, key id, generation,
// counter, time up to which raises are paid for, nonce), which is authenticated,
// then AES-256-GCM over a map of the records and of what else is bound to the
// list, in CBOR, core deterministic encoding (RFC 8949, 4.2.1). Version 1, whose
// header has neither counter nor time, and whose records stand alone, is read
// and no longer written.
package list

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/fxamacker/cbor/v2"
)

// Bounds of a list. MaxFile leaves 4 KiB for each record.
const (
	MaxRecords = 1 << 16
	MaxFile    = MaxRecords * 4096
	MaxHistory = 8
	MaxBound   = 1 << 20 // bytes of all bound values
	MaxOlder   = 64      // states before those
	MaxCert    = 2048    // bytes of a certificate
	MaxPublic  = 1024    // bytes of a TPMT_PUBLIC

	shortDigest = 8 // bytes

	KeySize   = 32
	NonceSize = 12
)

// State is where a VM's vTPM stands in its life, after the nine of the paper.
type State string

// The states.
const (
	Created      State = "created"   // keys and label are made, nothing has run
	Stored       State = "stored"    // at rest
	Deploying    State = "deploying" // a launch grant is open
	Running      State = "running"
	Suspended    State = "suspended" // at rest, with the VM saved to a file
	HandingOver  State = "handing-over"
	Incoming     State = "incoming"
	Snapshotting State = "snapshotting"
	Deleted      State = "deleted"
	Released     State = "released" // given back to plain libvirt: started as it is
)

// KeyOwner says who holds the key of the vTPM's state.
type KeyOwner string

// Ours is the default; Libvirts is a VM with an <encryption> secret of its own.
const (
	Ours     KeyOwner = "virt-trust"
	Libvirts KeyOwner = "libvirt"
)

// Digest is a SHA-256 digest. The zero Digest stands for none.
type Digest [sha256.Size]byte

// IsZero reports whether there is no digest.
func (d Digest) IsZero() bool { return d == Digest{} }

// String is the digest in hexadecimal, "" for none.
func (d Digest) String() string {
	if d.IsZero() {
		return ""
	}
	return hex.EncodeToString(d[:])
}

// Past is a baseline that once was right.
type Past struct {
	Digest Digest `cbor:"1,keyasint"`
	Time   int64  `cbor:"2,keyasint"` // seconds since 1970
}

// Record is what is known of one VM's vTPM.
type Record struct {
	UUID     string `cbor:"1,keyasint"`
	Name     string `cbor:"2,keyasint"`
	Instance string `cbor:"3,keyasint"` // the state folder's path
	State    State  `cbor:"4,keyasint"`
	// Open is set, durably, before swtpm may write, and cleared when it is gone
	// and measured: a record found open with nothing running is a crash.
	Open     bool     `cbor:"5,keyasint,omitempty"`
	KeyOwner KeyOwner `cbor:"6,keyasint"`
	// WrappedKeys is the OAEP ciphertext of state key ‖ transfer key.
	WrappedKeys []byte `cbor:"7,keyasint,omitempty"`

	LabelID      [16]byte `cbor:"8,keyasint"`
	LabelPath    string   `cbor:"9,keyasint,omitempty"`  // the image that carries the label
	LabelDigest  Digest   `cbor:"10,keyasint"`           // of the payload in the image
	PendingLabel []byte   `cbor:"11,keyasint,omitempty"` // a payload that waits for the image to be free

	Baseline  Digest `cbor:"12,keyasint"` // of the state folder at rest
	AdoptFrom Digest `cbor:"13,keyasint"` // of the plain state, while it is being replaced by Baseline
	History   []Past `cbor:"14,keyasint,omitempty"`

	Generation uint64 `cbor:"15,keyasint"` // raised each time the record is opened
	BootID     string `cbor:"16,keyasint,omitempty"`
	Created    int64  `cbor:"17,keyasint"` // seconds since 1970
	Changed    int64  `cbor:"18,keyasint"`

	LastVerdict string `cbor:"19,keyasint,omitempty"`
	LastReason  string `cbor:"20,keyasint,omitempty"`
	LastWhat    string `cbor:"21,keyasint,omitempty"`

	// Ephemeral: the VM is transient, and libvirt removes its vTPM when it stops.
	Ephemeral bool `cbor:"22,keyasint,omitempty"`

	// RecoveryKeys is an age file of state key ‖ transfer key, to the recovery
	// key whose recipient is RecoveryTo.
	RecoveryKeys []byte `cbor:"24,keyasint,omitempty"`
	RecoveryTo   string `cbor:"25,keyasint,omitempty"`

	Tag       Tag    `cbor:"26,keyasint"`           // of the baseline
	OlderTags []byte `cbor:"27,keyasint,omitempty"` // one after the other, oldest first
	// Noted: the baseline is an entry of the journal that belongs to this opening.
	Noted           bool   `cbor:"28,keyasint,omitempty"`
	LabelGeneration uint64 `cbor:"29,keyasint,omitempty"` // of the newest label
	Reverts         uint32 `cbor:"30,keyasint,omitempty"` // how often the vTPM went back with a saved image
	Reverted        int64  `cbor:"31,keyasint,omitempty"` // when it did last
	// Older are the beginnings of digests from before the history, oldest first.
	Older []byte `cbor:"32,keyasint,omitempty"`

	// EKDigest is the SHA-256 digest of the vTPM's RSA endorsement key, as
	// SubjectPublicKeyInfo in DER; none before its first start, and of a TPM 1.2.
	EKDigest Digest `cbor:"23,keyasint,omitzero"`
	// EKCertificate is X.509 over that key in DER (package vtpm/ekcert), by the
	// certifier of this host.
	EKCertificate []byte `cbor:"41,keyasint,omitempty"`
	// AKPublic is the TPMT_PUBLIC of the AK that the vTPM got at its manufacture,
	// AKCertificate X.509 over it; empty where that was not turned on.
	AKPublic      []byte `cbor:"42,keyasint,omitempty"`
	AKCertificate []byte `cbor:"43,keyasint,omitempty"`
	// AKDue: the vTPM was to get an AK at its manufacture, and has none yet.
	AKDue bool `cbor:"44,keyasint,omitempty"`
	// Launchers is the generation of the Reference Values for launchers under which
	// the record was opened last: a file of an older one was rolled back.
	Launchers uint64 `cbor:"40,keyasint,omitempty"`
}

// Clone copies the record deeply.
func (r *Record) Clone() *Record {
	c := *r
	c.WrappedKeys = bytes.Clone(r.WrappedKeys)
	c.PendingLabel = bytes.Clone(r.PendingLabel)
	c.RecoveryKeys = bytes.Clone(r.RecoveryKeys)
	c.History = slices.Clone(r.History)
	c.OlderTags = bytes.Clone(r.OlderTags)
	c.Older = bytes.Clone(r.Older)
	c.EKCertificate, c.AKPublic, c.AKCertificate = bytes.Clone(r.EKCertificate), bytes.Clone(r.AKPublic), bytes.Clone(r.AKCertificate)
	return &c
}

// SetBaseline makes d the baseline and remembers the one before it.
func (r *Record) SetBaseline(d Digest, now int64) {
	if d == r.Baseline {
		return
	}
	if !r.Baseline.IsZero() {
		r.Remember(r.Baseline, now)
	}
	r.History = slices.DeleteFunc(r.History, func(p Past) bool { return p.Digest == d })
	if i := r.older(d); i >= 0 {
		r.Older = slices.Concat(r.Older[:i], r.Older[i+shortDigest:])
	}
	r.Baseline = d
}

// Remember notes a digest that was right once, the oldest with its beginning
// alone.
func (r *Record) Remember(d Digest, now int64) {
	r.History = slices.DeleteFunc(r.History, func(p Past) bool { return p.Digest == d })
	r.History = append(r.History, Past{d, now})
	if n := len(r.History) - MaxHistory; n > 0 {
		older := bytes.Clone(r.Older)
		for _, p := range r.History[:n] {
			older = append(older, p.Digest[:shortDigest]...)
		}
		r.Older = older[max(0, len(older)-MaxOlder*shortDigest):]
		r.History = slices.Clone(r.History[n:])
	}
}

// Past finds a digest among those that were right once. Of those before the
// history the time is not known.
func (r *Record) Past(d Digest) (Past, bool) {
	for _, p := range r.History {
		if p.Digest == d {
			return p, true
		}
	}
	return Past{Digest: d}, r.older(d) >= 0
}

// older finds a digest from before the history.
func (r *Record) older(d Digest) int {
	for i := 0; i+shortDigest <= len(r.Older); i += shortDigest {
		if bytes.Equal(r.Older[i:i+shortDigest], d[:shortDigest]) {
			return i
		}
	}
	return -1
}

// List is the vTPM list in memory.
type List struct {
	Generation uint64
	Counter    uint64             // see Judge; 0: of a list that was never counted
	Paid       int64              // see Pace
	Records    map[string]*Record // by UUID; a record that has been encoded is not to be changed
	// Bound are values, by name, that have no business with one VM, and that
	// nobody may exchange for others or for older ones.
	Bound map[string][]byte

	encoded map[*Record]cbor.RawMessage // what Encode made last
}

// body is what is sealed.
type body[R any] struct {
	Records []R               `cbor:"1,keyasint"`
	Bound   map[string][]byte `cbor:"2,keyasint,omitempty"`
}

// Next gives the list of the next generation, with the same contents.
func (l *List) Next() *List {
	return &List{
		Generation: l.Generation + 1, Counter: l.Counter, Paid: l.Paid,
		Records: maps.Clone(l.Records), Bound: maps.Clone(l.Bound), encoded: l.encoded,
	}
}

// Bind sets a bound value, or removes it if value is empty.
func (l *List) Bind(name string, value []byte) {
	if len(value) == 0 {
		delete(l.Bound, name)
		return
	}
	if l.Bound == nil {
		l.Bound = map[string][]byte{}
	}
	l.Bound[name] = bytes.Clone(value)
}

func (l *List) boundSize() (n int) {
	for name, value := range l.Bound {
		n += len(name) + len(value)
	}
	return n
}

// New makes an empty list.
func New() *List { return &List{Records: map[string]*Record{}} }

// Find gives the record with this UUID or, failing that, this name; nil when
// there is none. A name is looked up only because admins use it.
func (l *List) Find(vm string) *Record {
	if r := l.Records[strings.ToLower(vm)]; r != nil {
		return r
	}
	for _, r := range l.Records {
		if r.Name == vm {
			return r
		}
	}
	return nil
}

// Header is what can be read of a list file without its key.
type Header struct {
	Version    uint16
	KeyID      [8]byte
	Generation uint64
	Counter    uint64
	Paid       int64
}

const (
	magic        = "VTRLIST\n"
	version      = 2
	headerSizeV1 = 8 + 2 + 2 + 8 + 8 + NonceSize
	headerSize   = headerSizeV1 + 8 + 8
)

// size is the header's length in bytes.
func (h Header) size() int {
	if h.Version == 1 {
		return headerSizeV1
	}
	return headerSize
}

// Errors of Decode.
var (
	ErrFormat  = errors.New("not a vTPM list")
	ErrVersion = errors.New("a vTPM list of a newer version")
	ErrKey     = errors.New("not written under this list key, or altered")
)

var encMode, decMode = modes()

func modes() (cbor.EncMode, cbor.DecMode) {
	e, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		panic(err)
	}
	d, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		MaxArrayElements: MaxRecords, MaxMapPairs: 64, MaxNestedLevels: 8, ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return e, d
}

// subkey derives the key of one use from the list key.
func subkey(listKey []byte, use string) (cipher.AEAD, error) {
	if len(listKey) != KeySize {
		return nil, fmt.Errorf("a list key is %d bytes, not %d", KeySize, len(listKey))
	}
	k, err := hkdf.Key(sha256.New, listKey, nil, use, 32)
	if err != nil {
		return nil, err
	}
	defer clear(k)
	b, err := aes.NewCipher(k)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

// KeyID is how a list's header names the key that it is sealed under.
func KeyID(listKey []byte) (id [8]byte) {
	k, err := hkdf.Key(sha256.New, listKey, nil, "virt-trust/list/key-id/v1", len(id))
	if err == nil {
		copy(id[:], k)
	}
	return id
}

// Encode seals the list under its key with a nonce of NonceSize fresh bytes.
func (l *List) Encode(listKey, nonce []byte) ([]byte, error) {
	if len(nonce) != NonceSize {
		return nil, fmt.Errorf("a nonce is %d bytes, not %d", NonceSize, len(nonce))
	}
	if len(l.Records) > MaxRecords {
		return nil, fmt.Errorf("%d records are more than a list holds", len(l.Records))
	}
	if n := l.boundSize(); n > MaxBound {
		return nil, fmt.Errorf("%d bytes are more than can be bound to a list", n)
	}
	aead, err := subkey(listKey, "virt-trust/list/v1")
	if err != nil {
		return nil, err
	}
	// Of a thousand records one is new: what has been encoded stays.
	records := make([]cbor.RawMessage, 0, len(l.Records))
	encoded := make(map[*Record]cbor.RawMessage, len(l.Records))
	for _, id := range slices.Sorted(maps.Keys(l.Records)) {
		r := l.Records[id]
		b, ok := l.encoded[r]
		if !ok {
			if b, err = encMode.Marshal(r); err != nil {
				return nil, err
			}
		}
		encoded[r] = b
		records = append(records, b)
	}
	l.encoded = encoded
	plain, err := encMode.Marshal(body[cbor.RawMessage]{records, l.Bound})
	if err != nil {
		return nil, err
	}
	id := KeyID(listKey)
	h := make([]byte, 0, headerSize+len(plain)+aead.Overhead())
	h = append(h, magic...)
	h = binary.BigEndian.AppendUint16(h, version)
	h = binary.BigEndian.AppendUint16(h, headerSize)
	h = append(h, id[:]...)
	h = binary.BigEndian.AppendUint64(h, l.Generation)
	h = binary.BigEndian.AppendUint64(h, l.Counter)
	h = binary.BigEndian.AppendUint64(h, uint64(l.Paid))
	h = append(h, nonce...)
	return aead.Seal(h, nonce, plain, h[:headerSize]), nil
}

// UntrustedHeader reads the header of a list file, which only Decode checks.
func UntrustedHeader(b []byte) (Header, error) {
	var h Header
	if len(b) < headerSizeV1 || string(b[:8]) != magic {
		return h, ErrFormat
	}
	h.Version = binary.BigEndian.Uint16(b[8:])
	copy(h.KeyID[:], b[12:])
	h.Generation = binary.BigEndian.Uint64(b[20:])
	if h.Version != 1 && h.Version != version {
		return h, fmt.Errorf("%w (%d)", ErrVersion, h.Version)
	}
	if int(binary.BigEndian.Uint16(b[10:])) != h.size() || len(b) < h.size() {
		return h, ErrFormat
	}
	if h.Version > 1 {
		h.Counter = binary.BigEndian.Uint64(b[28:])
		h.Paid = int64(binary.BigEndian.Uint64(b[36:]))
	}
	return h, nil
}

// Decode opens a sealed list. Errors: ErrFormat, ErrVersion, ErrKey.
func Decode(b, listKey []byte) (*List, error) {
	h, err := UntrustedHeader(b)
	if err != nil {
		return nil, err
	}
	if len(b) > MaxFile {
		return nil, fmt.Errorf("%w: %d bytes long", ErrFormat, len(b))
	}
	aead, err := subkey(listKey, "virt-trust/list/v1")
	if err != nil {
		return nil, err
	}
	if h.KeyID != KeyID(listKey) {
		return nil, fmt.Errorf("%w: its key is another one", ErrKey)
	}
	n := h.size()
	plain, err := aead.Open(nil, b[n-NonceSize:n], b[n:], b[:n])
	if err != nil {
		return nil, ErrKey
	}
	var in body[*Record]
	if h.Version == 1 {
		err = decMode.Unmarshal(plain, &in.Records)
	} else {
		err = decMode.Unmarshal(plain, &in)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	l := New()
	l.Generation, l.Counter, l.Paid, l.Bound = h.Generation, h.Counter, h.Paid, in.Bound
	if l.boundSize() > MaxBound {
		return nil, fmt.Errorf("%w: more is bound to it than can be", ErrFormat)
	}
	for _, r := range in.Records {
		if r == nil || r.UUID == "" || len(r.History) > MaxHistory || len(r.OlderTags) > MaxTags*len(Tag{}) || len(r.OlderTags)%len(Tag{}) != 0 ||
			len(r.Older) > MaxOlder*shortDigest || len(r.Older)%shortDigest != 0 ||
			len(r.EKCertificate) > MaxCert || len(r.AKCertificate) > MaxCert || len(r.AKPublic) > MaxPublic {
			return nil, fmt.Errorf("%w: a record that is none", ErrFormat)
		}
		if _, twice := l.Records[r.UUID]; twice {
			return nil, fmt.Errorf("%w: two records of one VM", ErrFormat)
		}
		l.Records[r.UUID] = r
	}
	return l, nil
}

// DigestOf is the SHA-256 digest of b.
func DigestOf(b []byte) Digest { return sha256.Sum256(b) }
