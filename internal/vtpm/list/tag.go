package list

import (
	"bytes"
	"crypto/sha256"
)

// When a saved image is restored, swtpm writes the vTPM's state of that time, under
// other bytes than it had then. What it holds tells it: a tag is the beginning of a
// SHA-256 digest over the decrypted state. A vTPM counts its starts, so that what it
// first writes in a run is as a rule not what it ever held before; later in a run
// that may well be. One that was taken back may come to what it held then once more,
// so that those states are forgotten.

// Tag tells what a vTPM's state holds. The zero Tag is not known.
type Tag [8]byte

// MaxTags is how many older states a record remembers by what they held.
const MaxTags = 32

// TagOf gives the tag of a decrypted state.
func TagOf(plain []byte) (t Tag) {
	d := sha256.Sum256(plain)
	copy(t[:], d[:])
	return t
}

// SetTag makes t the tag of the baseline and remembers the one before it. Where
// t is an older one, the vTPM was taken back to it.
func (r *Record) SetTag(t Tag) {
	if t == (Tag{}) || t == r.Tag {
		return
	}
	if i := r.tag(t); i >= 0 {
		r.Tag, r.OlderTags = t, bytes.Clone(r.OlderTags[:i])
		return
	}
	older := bytes.Clone(r.OlderTags)
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
