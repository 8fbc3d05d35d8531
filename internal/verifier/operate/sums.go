package operate

import (
	"bytes"
	"fmt"
	"path"
	"strings"
	"unicode/utf8"

	"virt-trust/internal/verifier/fleet"
)

// MaxImport bounds a file of Reference Values, in bytes.
const MaxImport = 32 << 20

// digestNames are the algorithms by the length of a digest in hexadecimal.
var digestNames = map[int]string{40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512"}

// ParseSums reads checksums of files as sha256sum(1) and its sisters write them
// and package repositories publish them: a line is
//
//	DIGEST  PATH
//
// with two spaces, or one and "*" before the path. As in dpkg's lists a path that
// is not absolute is below "/". Empty lines and lines that begin with "#" are
// passed over; a name with a newline or a backslash, which sha256sum escapes, is
// refused, as are MD5 digests and paths that are not clean.
func ParseSums(b []byte, subject string, kind fleet.Kind, detail string) ([]fleet.Value, error) {
	if len(b) > MaxImport {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrInvalid, len(b), MaxImport)
	}
	var values []fleet.Value
	n := 0
	for line := range bytes.Lines(b) {
		n++
		text := strings.TrimRight(string(line), "\r\n")
		if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		digits, rest, _ := strings.Cut(text, " ")
		alg, known := digestNames[len(digits)]
		switch {
		case !known || strings.Trim(digits, "0123456789abcdefABCDEF") != "":
			return nil, fmt.Errorf("%w: line %d: it does not begin with a digest of SHA-1 or SHA-2", ErrInvalid, n)
		case len(rest) < 2 || rest[0] != ' ' && rest[0] != '*':
			return nil, fmt.Errorf("%w: line %d: no path after the digest", ErrInvalid, n)
		}
		file := rest[1:]
		if !strings.HasPrefix(file, "/") {
			file = "/" + strings.TrimPrefix(file, "./")
		}
		if !utf8.ValidString(file) || strings.ContainsAny(file, "\\\x00") || len(file) > 4096 || path.Clean(file) != file || file == "/" {
			return nil, fmt.Errorf("%w: line %d: %.80q is no clean path", ErrInvalid, n, file)
		}
		if len(values) == MaxValues {
			return nil, fmt.Errorf("%w: more than %d files", ErrInvalid, MaxValues)
		}
		values = append(values, fleet.Value{Subject: subject, Kind: kind, Path: file, Digest: alg + ":" + strings.ToLower(digits), Detail: detail})
	}
	return values, nil
}
