package fleet

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// MaxAuditLine bounds a line of an exported audit log, in bytes.
const MaxAuditLine = 1 << 20

// MaxAuditText bounds Actor, Action, Subject and Detail together, in bytes, so
// that a line is within MaxAuditLine however it is escaped.
const MaxAuditText = 128 << 10

// auditTime is RFC 3339 in UTC, always with microseconds.
const auditTime = "2006-01-02T15:04:05.000000Z"

// AuditHead is where an audit log ended at some moment: noted elsewhere, it finds
// out a log that was cut or written anew. The zero head is that of an empty log.
type AuditHead struct {
	ID   int64  `json:"id"`
	Hash string `json:"hash"`
}

// Next gives e as the entry that follows: its ID, Previous and Hash.
func (h AuditHead) Next(e AuditEntry) AuditEntry {
	e.ID, e.Previous, e.Time = h.ID+1, h.Hash, e.Time.UTC().Truncate(time.Microsecond)
	e.Hash = e.Digest()
	return e
}

// AuditError says where an audit log is broken.
type AuditError struct {
	ID  int64 // of the entry
	Why string
}

func (e *AuditError) Error() string { return fmt.Sprintf("audit log, entry %d: %s", e.ID, e.Why) }

// Digest is what Hash has to be: SHA-256, in hexadecimal, over the entry's
// canonical JSON (RFC 8785) without its Hash.
func (e AuditEntry) Digest() string {
	d := sha256.Sum256(e.canonical(false))
	return hex.EncodeToString(d[:])
}

// Line is the entry as an export has it: canonical JSON (RFC 8785), no newline.
func (e AuditEntry) Line() []byte { return e.canonical(true) }

// MarshalJSON gives Line.
func (e AuditEntry) MarshalJSON() ([]byte, error) { return e.Line(), nil }

func (e AuditEntry) canonical(hash bool) []byte {
	b := make([]byte, 0, 256+len(e.Detail))
	text := func(key, value string) {
		b = append(b, ',', '"')
		b = append(b, key...)
		b = append(b, '"', ':')
		b = appendText(b, value)
	}
	text("action", e.Action)
	text("actor", e.Actor)
	text("detail", e.Detail)
	if hash {
		text("hash", e.Hash)
	}
	b = append(b, `,"id":`...)
	b = strconv.AppendInt(b, e.ID, 10)
	text("previous", e.Previous)
	text("subject", e.Subject)
	text("time", e.Time.UTC().Format(auditTime))
	b[0] = '{'
	return append(b, '}')
}

// appendText writes a string as RFC 8785, 3.2.2.2, wants it.
func appendText(b []byte, s string) []byte {
	const hexDigits = "0123456789abcdef"
	b = append(b, '"')
	for _, r := range s { // what is not UTF-8 comes as U+FFFD
		switch r {
		case '"', '\\':
			b = append(b, '\\', byte(r))
		case '\b':
			b = append(b, `\b`...)
		case '\t':
			b = append(b, `\t`...)
		case '\n':
			b = append(b, `\n`...)
		case '\f':
			b = append(b, `\f`...)
		case '\r':
			b = append(b, `\r`...)
		default:
			if r < 0x20 {
				b = append(b, `\u00`...)
				b = append(b, hexDigits[r>>4], hexDigits[r&15])
				continue
			}
			b = utf8.AppendRune(b, r)
		}
	}
	return append(b, '"')
}

// Chain checks an audit log entry by entry. The zero Chain begins at the first.
type Chain struct {
	head  AuditHead
	noted []AuditHead // not met yet, by ID
}

// NewChain also wants every head in noted to be in the log.
func NewChain(noted ...AuditHead) *Chain {
	n := slices.DeleteFunc(slices.Clone(noted), func(h AuditHead) bool { return h == AuditHead{} })
	slices.SortFunc(n, func(a, b AuditHead) int { return int(min(max(a.ID-b.ID, -1), 1)) })
	return &Chain{noted: n}
}

// Head is that of what was added so far.
func (c *Chain) Head() AuditHead { return c.head }

// Add checks the entry that follows; *AuditError.
func (c *Chain) Add(e AuditEntry) error {
	switch {
	case e.ID != c.head.ID+1:
		return &AuditError{c.head.ID + 1, fmt.Sprintf("missing; entry %d follows", e.ID)}
	case e.Previous != c.head.Hash:
		return &AuditError{e.ID, "does not follow the entry before it"}
	case !e.Time.Equal(e.Time.Truncate(time.Microsecond)), e.Hash != e.Digest():
		return &AuditError{e.ID, "was changed: its hash is another"}
	}
	for len(c.noted) > 0 && c.noted[0].ID <= e.ID {
		if c.noted[0] != (AuditHead{e.ID, e.Hash}) {
			return &AuditError{e.ID, "is not the one whose hash was noted: the log was written anew"}
		}
		c.noted = c.noted[1:]
	}
	c.head = AuditHead{e.ID, e.Hash}
	return nil
}

// End says whether all noted heads were met; *AuditError.
func (c *Chain) End() (AuditHead, error) {
	if len(c.noted) > 0 {
		return c.head, &AuditError{c.noted[len(c.noted)-1].ID, fmt.Sprintf("missing: the log was cut after entry %d", c.head.ID)}
	}
	return c.head, nil
}

// VerifyExport reads an audit log as JSON lines, each an AuditEntry's Line, and
// checks each hash, each link, and that every head in noted is in it. It gives
// the head. *AuditError says where the log is broken; other errors are r's.
func VerifyExport(r io.Reader, noted ...AuditHead) (AuditHead, error) {
	c, lines := NewChain(noted...), bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 64<<10), MaxAuditLine)
	for lines.Scan() {
		var e AuditEntry
		// What is not byte for byte how it is written could be read in two ways.
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil || !bytes.Equal(lines.Bytes(), e.Line()) {
			return c.head, &AuditError{c.head.ID + 1, "is not written as an audit entry is"}
		}
		if err := c.Add(e); err != nil {
			return c.head, err
		}
	}
	if err := lines.Err(); errors.Is(err, bufio.ErrTooLong) {
		return c.head, &AuditError{c.head.ID + 1, "is too long"}
	} else if err != nil {
		return c.head, fmt.Errorf("reading the audit log after entry %d: %w", c.head.ID, err)
	}
	return c.End()
}

// CleanText makes text that can be kept and hashed: valid UTF-8 without NUL.
func CleanText(s string) string {
	if strings.IndexByte(s, 0) < 0 && utf8.ValidString(s) {
		return s
	}
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}
