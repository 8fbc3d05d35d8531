// Package recovery is the recovery key: what opens the list, the policy key and
// every VM's keys when the host's TPM no longer does, and the formats around
// it. The key is an age identity (X25519), and what is wrapped to it is a whole
// age file each, so that age(1) alone can open it as well.
package recovery

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"filippo.io/age"

	"virt-trust/internal/recovery/shamir"
)

const (
	identityHRP  = "age-secret-key-"
	shareHRP     = "vtshare"
	shareVersion = 1
	scalarSize   = 32 // bytes of an X25519 identity
	setSize      = 4

	// MaxText bounds what is read as a recovery key: an identity with comments,
	// or shares.
	MaxText = 32 << 10
	// maxWrapped bounds a wrapped secret. One of 64 bytes takes 264.
	maxWrapped = 4 << 10
)

// ErrOtherKey says that something was wrapped to another key.
var ErrOtherKey = errors.New("wrapped to another recovery key")

// Recipient is a recovery key's public half.
type Recipient struct{ r *age.X25519Recipient }

// ParseRecipient reads "age1…".
func ParseRecipient(s string) (Recipient, error) {
	r, err := age.ParseX25519Recipient(strings.TrimSpace(s))
	if err != nil {
		return Recipient{}, errors.New("not a recipient of the form age1…, X25519")
	}
	return Recipient{r}, nil
}

// String is the recipient as age writes it.
func (r Recipient) String() string { return r.r.String() }

// LabelName is how a label names this recipient, where other names are TPM
// Names: no Name begins with TPM_ALG_ERROR, 0 (TPM 2.0 Part 2, 6.3).
func (r Recipient) LabelName() []byte {
	h := sha256.Sum256([]byte(r.String()))
	return append([]byte{0, 0}, h[:]...)
}

// Wrap gives an age file that holds secret.
func (r Recipient) Wrap(secret []byte) ([]byte, error) {
	var b bytes.Buffer
	w, err := age.Encrypt(&b, r.r)
	if err == nil {
		_, err = w.Write(secret)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("wrapping to the recovery key: %w", err)
	}
	return b.Bytes(), nil
}

// Key is a recovery key.
type Key struct{ id *age.X25519Identity }

// NewKey makes a recovery key.
func NewKey() (*Key, error) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, err
	}
	return &Key{id}, nil
}

// Recipient is the key's public half.
func (k *Key) Recipient() Recipient { return Recipient{k.id.Recipient()} }

// Text is the key as age writes it: AGE-SECRET-KEY-1….
func (k *Key) Text() string { return k.id.String() }

// File is an age identity file: the key with its recipient and host.
func (k *Key) File(host, when string) string {
	return fmt.Sprintf("# virt-trust recovery key of %s, made %s\n# recipient: %s\n%s\n", host, when, k.Recipient(), k.Text())
}

// Unwrap opens what was wrapped to the key. Errors: ErrOtherKey, others for
// what is no age file.
func (k *Key) Unwrap(file []byte) ([]byte, error) {
	if len(file) > maxWrapped {
		return nil, fmt.Errorf("a wrapped secret of %d bytes", len(file))
	}
	r, err := age.Decrypt(bytes.NewReader(file), k.id)
	var other *age.NoIdentityMatchError
	if errors.As(err, &other) {
		return nil, ErrOtherKey
	}
	if err != nil {
		return nil, fmt.Errorf("opening with the recovery key: %w", err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		clear(b)
		return nil, fmt.Errorf("opening with the recovery key: %w", err)
	}
	return b, nil
}

// Parse reads a recovery key: an age identity file, or as many shares as it
// needs, in lines. Empty lines and comments (#) are skipped.
func Parse(text []byte) (*Key, error) {
	if len(text) > MaxText {
		return nil, fmt.Errorf("a recovery key of %d bytes", len(text))
	}
	var identities, shares []string
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		switch {
		case line == "", strings.HasPrefix(line, "#"):
		case isShare(line):
			shares = append(shares, line)
		default:
			identities = append(identities, line)
		}
	}
	switch {
	case len(shares) > 0 && len(identities) == 0:
		return Combine(shares)
	case len(identities) != 1 || len(shares) > 0:
		return nil, errors.New("neither one recovery key (AGE-SECRET-KEY-1…) nor shares of one (vtshare1…)")
	}
	id, err := age.ParseX25519Identity(strings.ToUpper(compact(identities[0])))
	if err != nil { // whose text may quote the key
		return nil, errors.New("not a recovery key, or mistyped: it has the form AGE-SECRET-KEY-1…")
	}
	return &Key{id}, nil
}

func isShare(s string) bool {
	return strings.HasPrefix(strings.ToLower(compact(s)), shareHRP+"1")
}

// compact takes out what people put into long texts to read them.
func compact(s string) string {
	return strings.Map(func(r rune) rune {
		if r == ' ' || r == '\t' {
			return -1
		}
		return r
	}, s)
}

// Split gives n shares of the key as text, any m of which are the key. A share
// is bech32 behind "vtshare1", in groups of eight: version (1 byte), set (4, of
// the recipient's SHA-256), threshold (1), index (1), data (32).
func (k *Key) Split(n, m int) ([]string, error) {
	scalar, err := decodeBech32(identityHRP, k.Text())
	if err != nil {
		return nil, err
	}
	defer clear(scalar)
	shares, err := shamir.Split(scalar, n, m, rand.Reader)
	if err != nil {
		return nil, err
	}
	var texts []string
	for _, s := range shares {
		b := append([]byte{shareVersion}, k.set()...)
		b = append(append(b, byte(m), s.Index), s.Data...)
		texts = append(texts, groups(encodeBech32(shareHRP, b)))
		clear(s.Data)
		clear(b)
	}
	return texts, nil
}

func (k *Key) set() []byte { return k.Recipient().LabelName()[2 : 2+setSize] }

func groups(s string) string {
	var parts []string
	for part := range slices.Chunk([]byte(s), 8) {
		parts = append(parts, string(part))
	}
	return strings.Join(parts, " ")
}

// Share is what one share says of itself.
type Share struct {
	Set       string // the same for all shares of one split key, in hexadecimal
	Threshold int    // how many are needed
	Index     int    // from 1

	data []byte
}

// ParseShare reads one share. Errors name the share by what can be told of it,
// never by its text.
func ParseShare(text string) (Share, error) {
	b, err := decodeBech32(shareHRP, compact(strings.TrimSpace(text)))
	if err != nil {
		return Share{}, fmt.Errorf("not a share, or mistyped: %w", err)
	}
	const head = 1 + setSize + 2
	if len(b) != head+scalarSize || b[0] != shareVersion {
		return Share{}, errors.New("a share of another version")
	}
	s := Share{Set: fmt.Sprintf("%x", b[1:1+setSize]), Threshold: int(b[head-2]), Index: int(b[head-1]), data: b[head:]}
	if s.Threshold < 2 || s.Index < 1 {
		return Share{}, errors.New("a share that nobody split")
	}
	return s, nil
}

// Combine gives the key of which these are shares.
func Combine(texts []string) (*Key, error) {
	var shares []Share
	for i, t := range texts {
		s, err := ParseShare(t)
		if err != nil {
			return nil, fmt.Errorf("share %d of those given: %w", i+1, err)
		}
		if slices.ContainsFunc(shares, func(o Share) bool { return o.Set == s.Set && o.Index == s.Index }) {
			continue // given twice
		}
		shares = append(shares, s)
	}
	if len(shares) == 0 {
		return nil, errors.New("no shares")
	}
	var parts []shamir.Share
	for _, s := range shares {
		if s.Set != shares[0].Set || s.Threshold != shares[0].Threshold {
			return nil, fmt.Errorf("shares of different keys: number %d is of set %s, number %d of set %s", shares[0].Index, shares[0].Set, s.Index, s.Set)
		}
		parts = append(parts, shamir.Share{Index: byte(s.Index), Data: s.data})
	}
	if len(parts) < shares[0].Threshold {
		return nil, fmt.Errorf("%d shares of set %s are needed, %d given", shares[0].Threshold, shares[0].Set, len(parts))
	}
	scalar, err := shamir.Combine(parts)
	if err != nil {
		return nil, err
	}
	defer clear(scalar)
	id, err := age.ParseX25519Identity(strings.ToUpper(encodeBech32(identityHRP, scalar)))
	if err != nil {
		return nil, errors.New("the shares do not give a recovery key")
	}
	k := &Key{id}
	if fmt.Sprintf("%x", k.set()) != shares[0].Set {
		return nil, errors.New("the shares do not give the key of their set: one of them is forged")
	}
	return k, nil
}
