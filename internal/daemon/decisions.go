package daemon

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"virt-trust/internal/vtpm/reason"
)

// Verdicts of a decision.
const (
	allow       = "allow"
	refused     = "refuse"
	wouldRefuse = "would-refuse" // audit mode
	noted       = "note"
)

// Decision is a line of `virt-trust log`.
type Decision struct {
	Time      int64       `json:"time"` // microseconds since 1970
	UUID      string      `json:"uuid,omitempty"`
	Name      string      `json:"name,omitempty"`
	Operation string      `json:"operation"`
	Verdict   string      `json:"verdict"`
	Reason    reason.Code `json:"reason,omitempty"`
	What      string      `json:"what,omitempty"`
}

// decisions keeps the newest decisions, over restarts too. The journal is the
// record; this is for `virt-trust log`, so that losing its end to a power cut
// does no harm.
type decisions struct {
	mu   sync.Mutex
	path string
	f    *os.File
	size int64
	torn bool // the last line may lack its end
	last []Decision
}

const (
	maxDecisions     = 1000
	maxDecisionsFile = 1 << 20
)

func openDecisions(path string) (*decisions, error) {
	d := &decisions{path: path}
	for _, name := range []string{path + ".1", path} {
		if err := d.read(name); err != nil {
			return nil, err
		}
	}
	var err error
	if d.f, err = os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		return nil, err
	}
	st, err := d.f.Stat()
	if err != nil {
		d.f.Close()
		return nil, err
	}
	d.size, d.torn = st.Size(), st.Size() > 0
	return d, nil
}

func (d *decisions) read(name string) error {
	f, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	s := bufio.NewScanner(io.LimitReader(f, 2*maxDecisionsFile))
	for s.Scan() {
		var e Decision
		if json.Unmarshal(s.Bytes(), &e) == nil { // a torn line is skipped
			d.remember(e)
		}
	}
	return nil
}

func (d *decisions) remember(e Decision) {
	d.last = append(d.last, e)
	if len(d.last) > 2*maxDecisions {
		d.last = append([]Decision(nil), d.last[len(d.last)-maxDecisions:]...)
	}
}

func (d *decisions) add(e Decision) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e.Time == 0 {
		e.Time = time.Now().UnixMicro()
	}
	d.remember(e)
	b, err := json.Marshal(e)
	if err != nil || d.f == nil {
		return
	}
	if d.size > maxDecisionsFile {
		if err := os.Rename(d.path, d.path+".1"); err == nil {
			if f, err := os.OpenFile(d.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err == nil {
				d.f.Close()
				d.f, d.size, d.torn = f, 0, false
			}
		}
	}
	b = append(b, '\n')
	if d.torn { // an empty line does no harm
		b = append([]byte{'\n'}, b...)
	}
	n, _ := d.f.Write(b) // a full disk must not stop a VM
	d.size, d.torn = d.size+int64(n), n < len(b)
}

// recent gives the newest, oldest first.
func (d *decisions) recent(limit int) []Decision {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := len(d.last)
	if limit <= 0 || limit > maxDecisions {
		limit = maxDecisions
	}
	return append([]Decision(nil), d.last[max(0, n-limit):]...)
}

func (d *decisions) Close() error { return d.f.Close() }
