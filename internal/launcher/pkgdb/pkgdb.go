// Package pkgdb asks the distribution's package database whether a file is as
// its package brought it: dpkg's checksums, read from its files, or rpm's, by
// way of rpm itself.
//
// It is a word against hand-replaced files and for honest upgrades, no more:
// whoever is root can write the database too, and dpkg's checksums are MD5.
package pkgdb

import (
	"bufio"
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"virt-trust/internal/launcher/measure"
	"virt-trust/internal/launcher/refvalues"
)

// DB is the package databases of a host. The zero DB is the host's own.
type DB struct {
	Dpkg string   // dpkg's folder; "": /var/lib/dpkg
	RPM  []string // how rpm is called; nil: /usr/bin/rpm, where it has a database
}

// Answer is what is known of a file.
type Answer struct {
	Vouch   refvalues.Vouch
	Package string // its name, where one brought the file
}

// Ask asks about measured files, in their order. Where a database is being
// changed or cannot be read it is an error, and nothing is known.
func (d DB) Ask(ctx context.Context, files []measure.File) ([]Answer, error) {
	answers := make([]Answer, len(files))
	for i := range answers {
		answers[i].Vouch = refvalues.Unowned
	}
	if err := d.askDpkg(files, answers); err != nil {
		return nil, fmt.Errorf("asking dpkg's database: %w", err)
	}
	if err := d.askRPM(ctx, files, answers); err != nil {
		return nil, fmt.Errorf("asking rpm's database: %w", err)
	}
	return answers, nil
}

// claim is a package's checksum for a file.
type claim struct {
	pkg    string
	digest string // MD5 or SHA-256, in hexadecimal
}

func (a *Answer) weigh(claims []claim, is func(digest string) bool) {
	for _, c := range claims {
		if is(c.digest) {
			*a = Answer{refvalues.Same, c.pkg}
			return
		}
		*a = Answer{refvalues.Different, c.pkg}
	}
}

// --- dpkg ---

func (d DB) askDpkg(files []measure.File, answers []Answer) error {
	dir := d.Dpkg
	if dir == "" {
		dir = "/var/lib/dpkg"
	}
	lists, err := filepath.Glob(filepath.Join(dir, "info", "*.md5sums"))
	if err != nil || len(lists) == 0 {
		return err
	}
	diversions, err := readDiversions(filepath.Join(dir, "diversions"))
	if err != nil {
		return err
	}
	names := make([][]string, len(files)) // under which each file can stand in a list
	wanted := map[string][]claim{}
	for i, f := range files {
		names[i] = spellings(diversions.original(f.Path))
		for _, n := range names[i] {
			wanted[n] = nil
		}
	}
	for _, l := range lists {
		pkg, _, _ := strings.Cut(strings.TrimSuffix(filepath.Base(l), ".md5sums"), ":")
		b, err := os.ReadFile(l)
		if errors.Is(err, os.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return err
		}
		parseMD5(b, func(path []byte, digest string) {
			if claims, ok := wanted[string(path)]; ok {
				wanted[string(path)] = append(claims, claim{pkg, digest})
			}
		})
	}
	for i, f := range files {
		var claims []claim
		for _, n := range names[i] {
			for _, c := range wanted[n] {
				if diversions.lies(f.Path, c.pkg) {
					claims = append(claims, c)
				}
			}
		}
		if len(claims) == 0 {
			continue
		}
		sum, err := md5Of(f)
		if err != nil {
			return err
		}
		answers[i].weigh(claims, func(d string) bool { return d == sum })
	}
	return nil
}

// md5Of reads a file again, and wants it to be what was measured.
func md5Of(f measure.File) (string, error) {
	r, err := measure.Open(f.Path)
	if err != nil {
		return "", err
	}
	defer r.Close()
	weak, strong := md5.New(), sha256.New()
	if _, err := io.Copy(io.MultiWriter(weak, strong), r); err != nil {
		return "", err
	}
	if !bytes.Equal(strong.Sum(nil), f.SHA256[:]) {
		return "", fmt.Errorf("%s has changed since it was measured", f.Path)
	}
	return hex.EncodeToString(weak.Sum(nil)), nil
}

// parseMD5 reads lines "DIGEST  PATH", the path without its first slash.
func parseMD5(b []byte, each func(path []byte, digest string)) {
	for line := range bytes.Lines(b) {
		line = bytes.TrimSuffix(line, []byte("\n"))
		if len(line) > md5.Size*2+2 && line[md5.Size*2] == ' ' {
			each(line[md5.Size*2+2:], string(line[:md5.Size*2]))
		}
	}
}

// spellings gives the names under which a package can have a file: on a merged
// /usr, a path below /usr/lib may be one below /lib to dpkg.
func spellings(path string) []string {
	names := []string{strings.TrimPrefix(path, "/")}
	if rest, ok := strings.CutPrefix(path, "/usr/"); ok {
		top, _, _ := strings.Cut(rest, "/")
		if to, err := os.Readlink("/" + top); err == nil && filepath.Clean("/"+to) == "/usr/"+top {
			names = append(names, rest)
		}
	}
	return names
}

// diversion is one of dpkg-divert(1): every package but by has its file from
// put to to.
type diversion struct{ from, to, by string }

type diversions []diversion

func readDiversions(name string) (diversions, error) {
	b, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return parseDiversions(b), err
}

func parseDiversions(b []byte) (all diversions) {
	lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	for ; len(lines) >= 3; lines = lines[3:] {
		all = append(all, diversion{lines[0], lines[1], lines[2]})
	}
	return all
}

// original gives the name under which a package has the file that lies at path.
func (all diversions) original(path string) string {
	for _, d := range all {
		if d.to == path {
			return d.from
		}
	}
	return path
}

// lies reports whether it is pkg's file that lies at path.
func (all diversions) lies(path, pkg string) bool {
	for _, d := range all {
		if d.to == path {
			return d.by != pkg
		}
		if d.from == path {
			return d.by == pkg
		}
	}
	return true
}

// --- rpm ---

// rpmDatabases are where rpm keeps one.
var rpmDatabases = []string{"/usr/lib/sysimage/rpm/rpmdb.sqlite", "/var/lib/rpm/rpmdb.sqlite", "/var/lib/rpm/Packages.db", "/var/lib/rpm/Packages"}

const (
	rpmTimeout = 20 * time.Second
	maxRPM     = 256 << 20
)

// askRPM has rpm list the files of the packages that own these, with their
// digests. rpm tells nothing by its exit status: a file without an owner fails
// it too.
func (d DB) askRPM(ctx context.Context, files []measure.File, answers []Answer) error {
	call := d.RPM
	if call == nil {
		if !slices.ContainsFunc(rpmDatabases, exists) {
			return nil
		}
		call = []string{"/usr/bin/rpm"}
	}
	claims := map[string][]claim{}
	args := append(slices.Clone(call[1:]), "--query", "--queryformat", `[%{=FILEDIGESTALGO} %{=NEVRA} %{FILEDIGESTS} %{FILENAMES}\n]`, "--file")
	asked := false
	for i, f := range files {
		if answers[i].Vouch == refvalues.Unowned {
			args, asked = append(args, f.Path), true
			claims[f.Path] = nil
		}
	}
	if !asked {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, rpmTimeout)
	defer cancel()
	c := exec.CommandContext(ctx, call[0], args...)
	c.Env, c.WaitDelay = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "HOME=/"}, time.Second
	if d.RPM != nil {
		c.Env = append(os.Environ(), c.Env[1:]...)
	}
	var out bytes.Buffer
	c.Stdout = &limited{&out, maxRPM}
	err := c.Run()
	var exit *exec.ExitError
	if err != nil && (ctx.Err() != nil || !errors.As(err, &exit)) {
		return err
	}
	if err := parseRPM(&out, claims); err != nil {
		return err
	}
	for i, f := range files {
		answers[i].weigh(claims[f.Path], func(d string) bool { return d == hex.EncodeToString(f.SHA256[:]) })
	}
	return nil
}

// parseRPM reads lines "ALGORITHM PACKAGE DIGEST PATH" for the paths that are in
// claims. Of algorithms it knows SHA-256 alone (PGPHASHALGO_SHA256, 8), which is
// what rpm has used since 2009.
func parseRPM(r io.Reader, claims map[string][]claim) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		f := strings.SplitN(s.Text(), " ", 4)
		if len(f) != 4 || f[0] != "8" || len(f[2]) != 2*sha256.Size {
			continue
		}
		if known, ok := claims[f[3]]; ok {
			claims[f[3]] = append(known, claim{f[1], f[2]})
		}
	}
	return s.Err()
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// limited is a writer that fails when it gets too much.
type limited struct {
	w    io.Writer
	left int
}

func (l *limited) Write(b []byte) (int, error) {
	if l.left -= len(b); l.left < 0 {
		return 0, errors.New("it says too much")
	}
	return l.w.Write(b)
}
