package daemon

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/statedir"
)

// What is kept of each VM under vtpm/UUID: the label, also where an image
// carries it; the last good state; the journal while the VM runs. All of it is
// encrypted or wrapped to the TPM: none of it is a secret.
const (
	keptLabel   = "label"
	keptState   = "state"
	keptJournal = "journal"
)

func (g *Guard) keepDir(uuid string) string { return filepath.Join(g.dirs.State, "vtpm", uuid) }

func (g *Guard) keep(uuid, name string, data []byte) error {
	dir := g.keepDir(uuid)
	if err := os.Mkdir(dir, 0o700); err == nil {
		if err := liststore.SyncDir(filepath.Dir(dir)); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrExist) {
		return err
	}
	return liststore.WriteFile(filepath.Join(dir, name), data, 0o600)
}

func (g *Guard) kept(uuid, name string) ([]byte, error) {
	return os.ReadFile(filepath.Join(g.keepDir(uuid), name))
}

// forget removes what is kept of a VM.
func (g *Guard) forget(uuid string) error {
	return os.RemoveAll(g.keepDir(uuid))
}

func (g *Guard) keptDigest(uuid, name string) list.Digest {
	b, err := g.kept(uuid, keptState)
	if err != nil {
		return list.Digest{}
	}
	return statedir.Digest(name, b)
}

// keepState keeps a state that is durable in its folder, if it is not kept yet.
func (g *Guard) keepState(uuid string, dir *statedir.Seen) error {
	if b, err := g.kept(uuid, keptState); err == nil && bytes.Equal(b, dir.Data) {
		return nil
	}
	return g.keep(uuid, keptState, dir.Data)
}

// readJournal gives the writes noted since the record was opened.
func (g *Guard) readJournal(r *list.Record) ([]list.Past, error) {
	b, err := g.kept(r.UUID, keptJournal)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the journal: %w", err)
	}
	g.mu.Lock()
	key := g.listKey
	g.mu.Unlock()
	entries, _, err := list.OpenJournal(b, key, r.UUID, r.Generation)
	// A journal that lacks what was taken from it into the record is an older one.
	if r.Noted && !slices.ContainsFunc(entries, func(p list.Past) bool { return p.Digest == r.Baseline }) {
		return nil, err
	}
	return entries, err
}

// maxJournal is when a journal is written anew with its newest entries alone.
const maxJournal = 512

// note adds a state to the journal of a session. Called with its lock held.
func (g *Guard) note(s *session, r *list.Record, d list.Digest) error {
	if n := len(s.noted); n > 0 && s.noted[n-1].Digest == d {
		return nil
	}
	g.mu.Lock()
	key := g.listKey
	g.mu.Unlock()
	p := list.Past{Digest: d, Time: g.unix()}
	path := filepath.Join(g.keepDir(r.UUID), keptJournal)
	seal := func(seq int, p list.Past) ([]byte, error) {
		nonce := make([]byte, list.NonceSize)
		rand.Read(nonce)
		return list.SealEntry(key, nonce, r.UUID, r.Generation, uint64(seq), p)
	}
	rewrite := func() error {
		keep := s.noted
		if len(keep) > list.MaxHistory {
			keep = keep[len(keep)-list.MaxHistory:]
			if r.Noted && !slices.ContainsFunc(keep, func(p list.Past) bool { return p.Digest == r.Baseline }) {
				keep = append([]list.Past{{Digest: r.Baseline, Time: keep[0].Time}}, keep...)
			}
		}
		noted := append(append([]list.Past(nil), keep...), p)
		var b []byte
		for i, e := range noted {
			sealed, err := seal(i, e)
			if err != nil {
				return err
			}
			b = append(b, sealed...)
		}
		if err := g.keep(r.UUID, keptJournal, b); err != nil {
			return err
		}
		s.noted = noted
		g.stirred()
		return nil
	}
	if len(s.noted) >= maxJournal || len(s.noted) == 0 {
		return rewrite()
	}
	e, err := seal(len(s.noted), p)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if errors.Is(err, fs.ErrNotExist) { // someone removed it
		return rewrite()
	}
	if err != nil {
		return err
	}
	// At the place where it belongs: a torn entry of before is overwritten.
	_, err = f.WriteAt(e, int64(len(s.noted))*int64(list.EntrySize))
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		s.noted = append(s.noted, p)
		g.stirred()
	}
	return err
}

func (g *Guard) dropJournal(uuid string) error { return g.unkeep(uuid, keptJournal) }

// unkeep removes one thing that is kept of a VM.
func (g *Guard) unkeep(uuid, name string) error {
	err := os.Remove(filepath.Join(g.keepDir(uuid), name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
