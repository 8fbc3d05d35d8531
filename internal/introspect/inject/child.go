package inject

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/evidence/report"
	"virt-trust/internal/introspect"
)

// Request is what virt-trust-inject is asked for.
type Request struct {
	introspect.Target
	AK         uint32
	Qualifying []byte // nil: no quote, only the PCRs
}

// Answer is what it says.
type Answer struct {
	Quote   *report.Quote   `json:",omitempty"`
	Reading *report.Reading `json:",omitempty"`
	Held    time.Duration   // for which QEMU stood still
	Code    string          `json:",omitempty"` // of codes
	Error   string          `json:",omitempty"`
}

var (
	// ErrChannel: which socket leads to the vTPM cannot be told.
	ErrChannel = errors.New("the channel to the vTPM cannot be told from others")
	// ErrNoAK: there is no key at the handle.
	ErrNoAK = errors.New("the vTPM has no such key")
	// ErrLost: something went wrong while a command of ours was with the vTPM. The
	// guest may get wrong answers from it until it starts again.
	ErrLost = errors.New("the vTPM's channel is out of step")
)

// codes are how errors get from the child to the parent.
var codes = map[string]error{
	"gone": introspect.ErrGone, "other": introspect.ErrOther, "busy": introspect.ErrBusy, "stopped": introspect.ErrStopped,
	"forbidden": introspect.ErrForbidden, "channel": ErrChannel, "no-ak": ErrNoAK, "lost": ErrLost,
}

// The bounds of an exchange.
const (
	stopLimit   = 50 * time.Millisecond  // for QEMU's threads to stop
	idleLimit   = 5 * time.Millisecond   // for swtpm to finish what it has, QEMU being held
	holdLimit   = 500 * time.Millisecond // for which QEMU stands still, whatever swtpm does
	backLimit   = 100 * time.Millisecond // of it, in which nothing is begun but to put back what is the guest's
	answerLimit = 10 * time.Second       // for one command, QEMU running again: an answer that is left behind would be its
	slowLimit   = time.Second            // for a thread that was not let go to stop after all
	endLimit    = 100 * time.Millisecond // for a process whose descriptors are closed to have ended
	roundLimit  = 3 * time.Second        // for a moment without a command of the guest
	pause       = 400 * time.Microsecond // between two looks
)

// Child is the body of virt-trust-inject: one request on in, one answer on
// out. It is a process of its own so that no end of virt-trustd comes between a
// command and its answer.
func Child(in io.Reader, out io.Writer) error {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	var q Request
	if err := json.NewDecoder(io.LimitReader(in, maxMessage)).Decode(&q); err != nil {
		return fmt.Errorf("reading the request: %w", err)
	}
	a := Answer{}
	if err := a.ask(q); err != nil {
		a.Quote, a.Reading, a.Error = nil, nil, err.Error()
		for code, is := range codes {
			if errors.Is(err, is) && (a.Code == "" || code == "lost") {
				a.Code = code
			}
		}
	}
	return json.NewEncoder(out).Encode(a)
}

const maxMessage = 1 << 20

func (a *Answer) ask(q Request) error {
	runtime.LockOSThread() // of which QEMU's threads are the tracees; for good
	pid, err := q.Holder()
	if err != nil {
		return err
	}
	c, err := find(pid)
	if err != nil {
		return err
	}
	defer c.close()
	// Had swtpm ended meanwhile, and another process got its number, that would not
	// have the lock.
	if again, err := q.Holder(); err != nil || again != pid {
		return errors.Join(introspect.ErrGone, err)
	}
	if q.QEMU != 0 && q.QEMU != c.qemu {
		return fmt.Errorf("%w: its QEMU is process %d, not %d", introspect.ErrOther, c.qemu, q.QEMU)
	}
	for deadline := time.Now().Add(roundLimit); time.Now().Before(deadline); sleep(pause) {
		if ok, err := c.idle(); err != nil {
			return err
		} else if !ok {
			continue
		}
		asked, err := a.hold(c, q)
		if asked || err != nil {
			return err
		}
	}
	return introspect.ErrBusy
}

// hold holds QEMU and asks, unless a command is under way.
func (a *Answer) hold(c *channel, q Request) (asked bool, err error) {
	begin := time.Now()
	h, err := hold(c.qemu, stopLimit)
	if errors.Is(err, errSlow) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	held := true
	letGo := func() error {
		err := h.release()
		if held {
			held, a.Held = false, max(a.Held, time.Since(begin))
		}
		return err
	}
	defer func() {
		if e := letGo(); e != nil {
			err = errors.Join(err, e)
		}
	}()
	c.end, c.letGo = begin.Add(holdLimit), letGo
	if err := c.connected(); err != nil {
		return false, err
	}
	still := time.Now()
	for ok := false; !ok; sleep(20 * time.Microsecond) {
		if ok, err = c.idle(); err != nil {
			return false, err
		}
		if ok {
			break
		}
		if time.Since(still) > idleLimit {
			return false, nil
		}
	}
	tpm := patient{tpmOf(c)}
	at := time.Now()
	all, err := banks(tpm)
	if err != nil {
		return true, err
	}
	a.Reading = &report.Reading{Reader: ByCommand, Time: at.UnixMicro(), Banks: all}
	if q.Qualifying == nil {
		return true, nil
	}
	sel, err := quoted(all)
	if err != nil {
		return true, err
	}
	a.Quote, err = quote(tpm, tpm2.TPMHandle(q.AK), q.Qualifying, sel)
	return true, err
}
