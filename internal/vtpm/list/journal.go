package list

import (
	"encoding/binary"
	"fmt"
)

// A journal notes, while a VM runs, each settled write of its vTPM state. Its
// entries are of one size, numbered, encrypted, and bound to the VM and to the
// opening of its record, so that an old journal or one with a hole is not
// taken for this one. A torn last entry is what a power cut leaves; it counts
// as not written.

// EntrySize is the length in bytes of a journal entry.
const EntrySize = NonceSize + len(Digest{}) + 8 + 16

func journalAAD(uuid string, generation, seq uint64) []byte {
	b := append([]byte(uuid), 0)
	b = binary.BigEndian.AppendUint64(b, generation)
	return binary.BigEndian.AppendUint64(b, seq)
}

// SealEntry makes entry number seq (from 0) of the journal that belongs to
// this opening of the record.
func SealEntry(listKey, nonce []byte, uuid string, generation, seq uint64, p Past) ([]byte, error) {
	if len(nonce) != NonceSize {
		return nil, fmt.Errorf("a nonce is %d bytes, not %d", NonceSize, len(nonce))
	}
	aead, err := subkey(listKey, "virt-trust/journal/v1")
	if err != nil {
		return nil, err
	}
	body := binary.BigEndian.AppendUint64(p.Digest[:], uint64(p.Time))
	return aead.Seal(append([]byte(nil), nonce...), nonce, body, journalAAD(uuid, generation, seq)), nil
}

// OpenJournal reads the entries that are good, in order, up to the first that
// is not. clean is false when bytes are left over.
func OpenJournal(b, listKey []byte, uuid string, generation uint64) (entries []Past, clean bool, err error) {
	aead, err := subkey(listKey, "virt-trust/journal/v1")
	if err != nil {
		return nil, false, err
	}
	for seq := uint64(0); len(b) >= EntrySize; seq++ {
		e := b[:EntrySize]
		body, err := aead.Open(nil, e[:NonceSize], e[NonceSize:], journalAAD(uuid, generation, seq))
		if err != nil {
			return entries, false, nil
		}
		var p Past
		copy(p.Digest[:], body)
		p.Time = int64(binary.BigEndian.Uint64(body[len(p.Digest):]))
		entries = append(entries, p)
		b = b[EntrySize:]
	}
	return entries, len(b) == 0, nil
}
