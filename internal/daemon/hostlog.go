package daemon

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"virt-trust/internal/evidence/eventlog"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/vtpm/liststore"
)

// What is done to approvals.
const (
	eventApproved  = "approved"
	eventRevoked   = "revoked"
	eventNextBoot  = "next-boot-given"
	eventCancelled = "next-boot-cancelled"
	eventUsed      = "next-boot-used"
	eventUnused    = "next-boot-unused" // that boot was in an approved state
	eventVoid      = "next-boot-void"   // it held no longer
)

// byItself is the UID of what virt-trustd did by itself.
const byItself = -1

// HostEvent is a line of `virt-trust host history`.
type HostEvent struct {
	Time   int64    `json:"time"` // microseconds since 1970
	Event  string   `json:"event"`
	States []string `json:"states,omitempty"`
	What   string   `json:"what,omitempty"`
	Note   string   `json:"note,omitempty"`
	UID    int64    `json:"uid"`
}

// history keeps what was done to approvals, each line flushed before the next
// thing is done.
type history struct {
	mu   sync.Mutex
	path string
}

const maxHistory = 1 << 20

func (h *history) add(e HostEvent) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if e.Time == 0 {
		e.Time = time.Now().UnixMicro()
	}
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	line = append(line, '\n')
	if st, err := os.Stat(h.path); err == nil && st.Size() > maxHistory {
		if err := h.shorten(); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(h.path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	// A line that a crash cut off is ended before the next one.
	if st, err := f.Stat(); err == nil && st.Size() > 0 {
		last := make([]byte, 1)
		if _, err := f.ReadAt(last, st.Size()-1); err == nil && last[0] != '\n' {
			line = append([]byte{'\n'}, line...)
		}
	}
	_, err = f.Write(line)
	return errors.Join(err, f.Sync(), f.Close(), liststore.SyncDir(filepath.Dir(h.path)))
}

// shorten keeps the newer half.
func (h *history) shorten() error {
	all, err := h.read()
	if err != nil {
		return err
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	for _, e := range all[len(all)/2:] {
		if err := enc.Encode(e); err != nil {
			return err
		}
	}
	return liststore.WriteFile(h.path, b.Bytes(), 0o600)
}

// all gives the history, oldest first.
func (h *history) all() ([]HostEvent, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.read()
}

func (h *history) read() ([]HostEvent, error) {
	f, err := os.Open(h.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []HostEvent
	s := bufio.NewScanner(io.LimitReader(f, 2*maxHistory))
	s.Buffer(nil, 64<<10)
	for s.Scan() {
		var e HostEvent
		if json.Unmarshal(s.Bytes(), &e) == nil { // a torn line is skipped
			all = append(all, e)
		}
	}
	return all, s.Err()
}

// bootLogs keeps, for each approved state, the event log of a boot into it.
type bootLogs struct{ dir string }

// maxPacked bounds a kept log as it lies on the disk.
const maxPacked = eventlog.MaxSize / 4

func (b bootLogs) path(id string) string { return filepath.Join(b.dir, id+".gz") }

func (b bootLogs) save(id string, l *eventlog.Log) error {
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		return err
	}
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	_, err := w.Write(l.Marshal())
	if err = errors.Join(err, w.Close()); err != nil {
		return err
	}
	if packed.Len() > maxPacked {
		return fmt.Errorf("event log of %d bytes, at most %d are kept", packed.Len(), maxPacked)
	}
	return liststore.WriteFile(b.path(id), packed.Bytes(), 0o600)
}

// load gives a state's log; fs.ErrNotExist if none was kept.
func (b bootLogs) load(id string) (*eventlog.Log, error) {
	f, err := os.Open(b.path(id))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := gzip.NewReader(io.LimitReader(f, maxPacked))
	if err != nil {
		return nil, err
	}
	raw, err := io.ReadAll(io.LimitReader(r, eventlog.MaxSize+1))
	if err != nil {
		return nil, err
	}
	return eventlog.UntrustedParse(raw)
}

// prune removes the logs of states that are approved no longer.
func (b bootLogs) prune(s *hosttpm.States) {
	entries, _ := os.ReadDir(b.dir)
	for _, e := range entries {
		id := strings.TrimSuffix(e.Name(), ".gz")
		if !slices.ContainsFunc(s.Approved, func(a *approvedState) bool { return a.ID() == id }) {
			os.Remove(filepath.Join(b.dir, e.Name()))
		}
	}
}
