// Package liststore keeps the vTPM list on disk: each commit is written whole
// beside the old list, synced, renamed over it and the folder synced, so that
// a crash or a power cut leaves the old list or the new one. Beside it lie a
// marker, which tells a lost list from one that never was, and, in the run-time
// folder, the generation written last in this boot. A counter in the host's TPM
// tells an older list from the newest across boots; see counter.go.
package liststore

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"virt-trust/internal/vtpm/list"
)

// Errors of Open and Check.
var (
	ErrMissing    = errors.New("the vTPM list is missing")
	ErrDamaged    = errors.New("the vTPM list is damaged")
	ErrRolledBack = errors.New("the vTPM list is an older one")
	ErrCounter    = errors.New("the counter of the host's TPM is not the one of the vTPM list")
)

const (
	fileName   = "vtpm-list"
	markerName = "vtpm-list.made"
	runName    = "list-generation"
)

// Store is an open vTPM list.
type Store struct {
	dir, run string
	key      []byte
	rollback Rollback

	write   sync.Mutex // held by the commit that writes
	raise   sync.Mutex // held by the raise that is under way; taken before write
	counted uint64     // where the counter stands; under mu
	files   int        // how many lists carry the counter's value of cur; under mu

	mu   sync.Mutex
	cur  *list.List // never changed in place; its records are neither
	sig  signature
	next *batch
}

type batch struct {
	changes []Change
	raise   bool
	done    bool
	err     error
}

// Change is one record put, one deleted, or one value bound to the list.
type Change struct {
	Put    *list.Record
	Delete string // UUID
	Bind   string // the value's name
	Value  []byte // empty: the value is removed
}

// signature tells whether the file is the one that was written last.
type signature struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

func signatureOf(path string) (signature, error) {
	var st syscall.Stat_t
	if err := syscall.Lstat(path, &st); err != nil {
		return signature{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return signature{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}, nil
}

// Path is where the list in dir lies.
func Path(dir string) string { return filepath.Join(dir, fileName) }

// UntrustedHeader reads what of the list in dir can be known without its key,
// and its size in bytes.
func UntrustedHeader(dir string) (list.Header, int64, error) {
	b, err := readFile(Path(dir))
	if err != nil {
		return list.Header{}, 0, err
	}
	h, err := list.UntrustedHeader(b)
	return h, int64(len(b)), err
}

func readFile(path string) ([]byte, error) {
	st, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > list.MaxFile {
		return nil, fmt.Errorf("%w: %s is no list", ErrDamaged, path)
	}
	return os.ReadFile(path)
}

// Open reads the list in dir with its key, or makes an empty one where there
// never was any. run is the run-time folder. The key is kept; the caller may
// not clear it. Errors: ErrMissing, ErrDamaged, ErrRolledBack, ErrCounter, what
// the counter says, others.
func Open(ctx context.Context, dir, run string, key []byte, r Rollback) (*Store, error) {
	s := &Store{dir: dir, run: run, key: key, rollback: r}
	if err := s.load(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Store) load(ctx context.Context) error {
	b, err := readFile(Path(s.dir))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(filepath.Join(s.dir, markerName)); err == nil {
			return ErrMissing
		}
		if n, err := s.counterNow(ctx); err != nil {
			return err
		} else if n > 0 { // only a list makes one
			return ErrMissing
		}
		return s.make(ctx, list.New())
	}
	if err != nil {
		return err
	}
	l, err := list.Decode(b, s.key)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if last := s.lastGeneration(); l.Generation < last {
		return fmt.Errorf("%w: generation %d, where %d was written last", ErrRolledBack, l.Generation, last)
	}
	sig, err := signatureOf(Path(s.dir))
	if err != nil {
		return err
	}
	s.cur, s.sig = l, sig
	if err := s.judge(ctx); err != nil {
		return err
	}
	// A crash between the two may have left no marker.
	return s.mark()
}

// Rebuild replaces whatever lies in dir by a new list of these records, above
// every generation that is known.
func Rebuild(ctx context.Context, dir, run string, key []byte, r Rollback, records []*list.Record) (*Store, error) {
	l := list.New()
	for _, r := range records {
		l.Records[r.UUID] = r
	}
	if h, _, err := UntrustedHeader(dir); err == nil && h.Generation < 1<<62 {
		l.Generation = h.Generation
	}
	return replace(ctx, dir, run, key, r, l)
}

// Accept takes the list in dir for the newest, whatever counter and generation
// say. Errors: ErrMissing, ErrDamaged, others.
func Accept(ctx context.Context, dir, run string, key []byte, r Rollback) (*Store, error) {
	b, err := readFile(Path(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrMissing
	}
	if err != nil {
		return nil, err
	}
	l, err := list.Decode(b, key)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return replace(ctx, dir, run, key, r, l)
}

func replace(ctx context.Context, dir, run string, key []byte, r Rollback, l *list.List) (*Store, error) {
	s := &Store{dir: dir, run: run, key: key, rollback: r}
	l.Generation = max(l.Generation, s.lastGeneration())
	return s, s.make(ctx, l)
}

// make writes l as the newest list that there is.
func (s *Store) make(ctx context.Context, l *list.List) error {
	s.cur = l
	if err := s.rebase(ctx); err != nil {
		return err
	}
	return s.mark()
}

func (s *Store) mark() error {
	name := filepath.Join(s.dir, markerName)
	if _, err := os.Lstat(name); err == nil {
		return nil
	}
	return WriteFile(name, []byte("The file vtpm-list was made here. If it is missing, it was lost: see virt-trust(1), repair --list.\n"), 0o600)
}

func (s *Store) lastGeneration() uint64 {
	b, err := os.ReadFile(filepath.Join(s.run, runName))
	if err != nil {
		return 0 // not written since boot
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// Get gives the record of a UUID, or nil. Records are not to be changed.
func (s *Store) Get(uuid string) *list.Record { return s.list().Records[uuid] }

// Find gives the record of a UUID or a name, or nil.
func (s *Store) Find(vm string) *list.Record { return s.list().Find(vm) }

// Bound gives a value that is bound to the list; nil: there is none. It is not
// to be changed.
func (s *Store) Bound(name string) []byte { return s.list().Bound[name] }

// Generation is the list's generation.
func (s *Store) Generation() uint64 { return s.list().Generation }

// All gives every record, by UUID.
func (s *Store) All() []*list.Record {
	l := s.list()
	all := make([]*list.Record, 0, len(l.Records))
	for _, id := range slices.Sorted(maps.Keys(l.Records)) {
		all = append(all, l.Records[id])
	}
	return all
}

func (s *Store) list() *list.List {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cur
}

// Commit makes changes durable. Commits that come while another one is being
// written go together into the next.
func (s *Store) Commit(changes ...Change) error {
	if s.rollback.Each && len(changes) > 0 {
		return s.Raise(context.Background(), true, changes...)
	}
	err := s.enter(changes, false)
	if s.rollback.Stirred != nil {
		s.rollback.Stirred()
	}
	return err
}

// enter commits; with raise, for a list that only the next value of the counter
// makes the newest.
func (s *Store) enter(changes []Change, raise bool) error {
	s.mu.Lock()
	if s.next == nil {
		s.next = &batch{}
	}
	b := s.next
	b.changes = append(b.changes, changes...)
	b.raise = b.raise || raise
	s.mu.Unlock()

	s.write.Lock()
	defer s.write.Unlock()
	if b.done {
		return b.err
	}
	s.mu.Lock()
	s.next = nil
	s.mu.Unlock()
	b.err, b.done = s.commit(b.changes, b.raise), true
	return b.err
}

func (s *Store) commit(changes []Change, raise bool) error {
	l := s.list().Next()
	s.carry(l, raise)
	for _, c := range changes {
		switch {
		case c.Put != nil:
			l.Records[c.Put.UUID] = c.Put.Clone() // the caller may change its own
		case c.Bind != "":
			l.Bind(c.Bind, c.Value)
		default:
			delete(l.Records, c.Delete)
		}
	}
	nonce := make([]byte, list.NonceSize)
	rand.Read(nonce)
	b, err := l.Encode(s.key, nonce)
	if err != nil {
		return err
	}
	if err := WriteFile(Path(s.dir), b, 0o600); err != nil {
		return fmt.Errorf("writing the vTPM list: %w", err)
	}
	sig, err := signatureOf(Path(s.dir))
	if err != nil {
		return err
	}
	s.mu.Lock()
	if l.Counter != s.cur.Counter {
		s.files = 0
	}
	s.files++
	s.cur, s.sig = l, sig
	s.mu.Unlock()
	// The run-time folder is memory: what is written there needs no sync.
	name := filepath.Join(s.run, runName)
	if err := os.WriteFile(name+".new", strconv.AppendUint(nil, l.Generation, 10), 0o600); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// Check sees to it that the file is still the one that was written last.
// Errors: ErrMissing, ErrDamaged, ErrRolledBack.
func (s *Store) Check() error {
	s.write.Lock()
	defer s.write.Unlock()
	s.mu.Lock()
	want, generation := s.sig, s.cur.Generation
	s.mu.Unlock()
	sig, err := signatureOf(Path(s.dir))
	if errors.Is(err, fs.ErrNotExist) {
		return ErrMissing
	}
	if err != nil {
		return err
	}
	if sig == want {
		return nil
	}
	b, err := readFile(Path(s.dir))
	if err != nil {
		return err
	}
	l, err := list.Decode(b, s.key)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	case l.Generation < generation:
		return fmt.Errorf("%w: generation %d, where %d was written last", ErrRolledBack, l.Generation, generation)
	case l.Generation > generation:
		return fmt.Errorf("%w: generation %d was not written by this virt-trustd", ErrDamaged, l.Generation)
	}
	s.mu.Lock()
	s.sig = sig // copied or touched, and still the same
	s.mu.Unlock()
	return nil
}

// Rewrite writes the list that is in memory over whatever lies on disk.
func (s *Store) Rewrite() error { return s.Commit() }

// WriteFile writes a file whole or not at all, durably.
func WriteFile(name string, data []byte, mode fs.FileMode) error {
	dir := filepath.Dir(name)
	tmp := name + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NOFOLLOW, mode)
	if err != nil {
		return err
	}
	_, err = bytes.NewReader(data).WriteTo(f)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		os.Remove(tmp)
		return err
	}
	if err := os.Rename(tmp, name); err != nil {
		os.Remove(tmp)
		return err
	}
	return SyncDir(dir)
}

// SyncDir makes renames in a folder durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
