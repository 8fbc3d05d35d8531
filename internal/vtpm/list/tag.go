package list

import (
	"bytes"
	"crypto/sha256"
)

// A state that is written under the VM's key may be an older one, of any age,
// and swtpm itself writes one when a saved image is restored, under other bytes
// than before. What it holds tells it: a tag is the beginning of a SHA-256 digest
// over the decrypted state, which no two states share in practice, since each
// holds the TPM's clock and its random numbers' next.

// Tag tells what a vTPM's state holds. The zero Tag is not known.
type Tag [8]byte

// MaxTags is how many older states a record remembers.
const MaxTags = 64

// TagOf gives the tag of a decrypted state.
func TagOf(plain []byte) (t Tag) {
	d := sha256.Sum256(plain)
	copy(t[:], d[:])
	return t
}

// SetTag makes t the tag of the baseline and remembers the one before it.
func (r *Record) SetTag(t Tag) {
	if t == (Tag{}) || t == r.Tag {
		return
	}
	older := bytes.Clone(r.OlderTags)
	if i := r.tag(t); i >= 0 {
		older = append(older[:i], older[i+len(t):]...)
	}
	if r.Tag != (Tag{}) {
		older = append(older, r.Tag[:]...)
	}
	if n := len(older) - MaxTags*len(t); n > 0 {
		older = bytes.Clone(older[n:])
	}
	r.Tag, r.OlderTags = t, older
}

// Had reports whether t is the tag of a state that the VM had before its
// baseline.
func (r *Record) Had(t Tag) bool { return t != (Tag{}) && r.tag(t) >= 0 }

func (r *Record) tag(t Tag) int {
	for i := 0; i+len(t) <= len(r.OlderTags); i += len(t) {
		if Tag(r.OlderTags[i:i+len(t)]) == t {
			return i
		}
	}
	return -1
}
