package daemon

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"virt-trust/internal/evidence/report"
)

// gone remembers, for this boot, the VMs whose records were deleted or given
// back to plain libvirt, so that a Verifier who saw one in the round before is
// told why it is missing. It lies in the run-time folder, which ends with the
// boot and outlives virt-trustd. It is written before the list is: a VM may be
// in both for a moment, or after a crash, but never in neither.
type gone struct {
	mu   sync.Mutex
	path string
	all  []goneVM // oldest first
}

type goneVM struct {
	UUID string `json:"uuid"`
	Time int64  `json:"time"` // microseconds since 1970
	Why  string `json:"why"`
}

// maxGone lines are read again.
const maxGone = 2 * report.MaxDeleted

// openGone reads what an earlier virt-trustd of this boot has left, as far as
// it can be read. A line that a kill cut off is none.
func openGone(run string) (d *gone, err error) {
	d = &gone{path: filepath.Join(run, "gone.jsonl")}
	f, err := os.Open(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		return d, nil
	}
	if err != nil {
		return d, err
	}
	defer f.Close()
	s := bufio.NewScanner(io.LimitReader(f, maxGone*1024))
	s.Buffer(nil, 64<<10)
	for s.Scan() {
		var v goneVM
		if json.Unmarshal(s.Bytes(), &v) == nil {
			d.all = append(d.all, v)
		}
	}
	return d, s.Err()
}

// add remembers a VM.
func (d *gone) add(v goneVM) error {
	v.Why = text(v.Why)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.all = append(d.all, v)
	flags := os.O_WRONLY | os.O_CREATE | os.O_APPEND
	write := []goneVM{v}
	if len(d.all) > maxGone { // the newest that a report has room for
		d.all = append([]goneVM(nil), d.all[len(d.all)-report.MaxDeleted:]...)
		flags, write = os.O_WRONLY|os.O_CREATE|os.O_TRUNC, d.all
	}
	f, err := os.OpenFile(d.path, flags, 0o600)
	if err != nil {
		return err
	}
	var b []byte
	for _, v := range write {
		line, e := json.Marshal(v)
		err = errors.Join(err, e)
		b = append(append(b, line...), '\n')
	}
	_, e := f.Write(b)
	if err = errors.Join(err, e, f.Close()); err != nil {
		return fmt.Errorf("remembering that a VM is gone: %w", err)
	}
	return nil
}

// deleted gives the newest of them for a report, oldest first.
func (d *gone) deleted() []report.Deleted {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := []report.Deleted{}
	for _, v := range d.all[max(0, len(d.all)-report.MaxDeleted):] {
		if id, err := binaryUUID(v.UUID); err == nil {
			all = append(all, report.Deleted{UUID: id, Time: v.Time, Why: v.Why})
		}
	}
	return all
}

// goes remembers that a VM's record is about to end. That it could not be
// written down stops nothing: this virt-trustd knows it all the same.
func (g *Guard) goes(uuid, why string) {
	if err := g.gone.add(goneVM{UUID: uuid, Time: g.now().UnixMicro(), Why: why}); err != nil {
		g.log.WithError(err).Warn("a Verifier may ask where a VM is that was deleted")
	}
}
