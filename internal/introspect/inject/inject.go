// Package inject asks a running VM's vTPM something between two commands of the
// guest, and has it quote. It works on any VM with a swtpm, and changes nothing
// of it.
//
// QEMU talks to swtpm over a pair of sockets. virt-trust-inject borrows QEMU's
// end (pidfd_getfd(2)), holds all of QEMU's threads (ptrace(2)), sees that both
// queues are empty and swtpm waits for work, sends its commands, reads the
// answers, and lets go. If a command of the guest is under way, it lets go at once
// and tries again, for three seconds.
//
// What can go wrong:
//   - virt-trustd ends, is killed or restarted: virt-trust-inject is a process of
//     its own and carries the exchange through.
//   - virt-trust-inject is killed: the kernel lets QEMU go on (see held). Killed
//     between a command and its answer, some 0.1 ms, it leaves that answer to QEMU,
//     and the guest gets wrong answers until it resets its vTPM. Nothing but an
//     administrator kills it.
//   - QEMU was stopped by somebody else, or is being debugged: ErrStopped,
//     ErrForbidden, and it stays as it was. A VM that is suspended by libvirt is
//     not: its QEMU runs.
//   - swtpm hangs: after half a second QEMU is let go. The answer is awaited
//     for ten seconds more, so that the guest does not get it; without one, or
//     where the guest was quicker, ErrLost.
//   - The guest has all three slots for transient objects: one is saved, flushed
//     and loaded again, and must come back under its handle.
//   - The guest has an exclusive audit session (TPM 2.0 Part 1, 17.3): it is not
//     exclusive any more, as after any command that is not audited.
//   - QEMU has another pair of sockets of its own making, as with vhost-user
//     devices (virtiofs): which is the vTPM's cannot be told from outside
//     (sock_diag(7) would need the host's network): ErrChannel.
package inject

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/go-tpm/tpm2/transport"

	"virt-trust/internal/evidence/report"
	"virt-trust/internal/introspect"
)

// ByCommand is what a Quoter's readings are called.
const ByCommand = "vtpm-command"

// Program is where virt-trust-inject is installed.
const Program = "/usr/libexec/virt-trust/virt-trust-inject"

// Quoter has vTPMs quote. Its zero value runs Program. It may be used by several
// at once; no two VMs are held at a time.
type Quoter struct {
	Program string
	Env     []string // of the program; none is needed

	turn sync.Mutex
}

// Quote has the vTPM quote all PCRs of its SHA-256 bank, or of its first active
// one where that is not active, by the key at the persistent handle ak, and
// reads all active banks in the same pause of the VM. Errors are package introspect's, ErrChannel, ErrNoAK and ErrLost.
func (q *Quoter) Quote(ctx context.Context, t introspect.Target, qualifying [32]byte, ak uint32) (*report.Quote, *report.Reading, error) {
	a, err := q.Ask(ctx, Request{Target: t, AK: ak, Qualifying: qualifying[:]})
	if err == nil && (a.Quote == nil || a.Reading == nil) {
		err = errors.New("virt-trust-inject gave no quote")
	}
	if err != nil {
		return nil, nil, fmt.Errorf("quote by the vTPM of VM %s: %w", t.UUID, err)
	}
	return a.Quote, a.Reading, nil
}

// Read implements introspect.Reader, by TPM2_PCR_Read.
func (q *Quoter) Read(ctx context.Context, t introspect.Target) (*report.Reading, error) {
	a, err := q.Ask(ctx, Request{Target: t})
	if err == nil && a.Reading == nil {
		err = errors.New("virt-trust-inject gave no reading")
	}
	if err != nil {
		return nil, fmt.Errorf("reading the PCRs of VM %s: %w", t.UUID, err)
	}
	return a.Reading, nil
}

// Ask runs the program for one request. It is never killed: where ctx ends
// first, it is left to end its exchange by itself, which is bounded.
func (q *Quoter) Ask(ctx context.Context, r Request) (*Answer, error) {
	in, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	q.turn.Lock()
	if err := ctx.Err(); err != nil {
		q.turn.Unlock()
		return nil, err
	}
	program := q.Program
	if program == "" {
		program = Program
	}
	var out, words bytes.Buffer
	c := exec.Command(program)
	c.Stdin, c.Stdout, c.Stderr = bytes.NewReader(in), &out, &words
	c.Env, c.Dir, c.WaitDelay = append([]string{"PATH=/usr/bin:/bin"}, q.Env...), "/", time.Second
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		q.turn.Unlock()
		return nil, err
	}
	ended := make(chan error, 1)
	go func() {
		defer q.turn.Unlock()
		ended <- c.Wait()
	}()
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case err := <-ended:
		if err != nil {
			return nil, fmt.Errorf("%s: %w (%.200q)", program, err, strings.TrimSpace(words.String()))
		}
	}
	return parseAnswer(out.Bytes())
}

func parseAnswer(b []byte) (*Answer, error) {
	a := &Answer{}
	if err := json.Unmarshal(b, a); err != nil || len(b) > maxMessage {
		return nil, fmt.Errorf("virt-trust-inject's answer of %d bytes: %w", len(b), err)
	}
	switch {
	case a.Error == "":
		return a, nil
	case codes[a.Code] != nil:
		return nil, &answerError{a.Error, codes[a.Code]}
	}
	return nil, errors.New(a.Error)
}

// answerError is an error of the child: its text, and which one it is.
type answerError struct {
	text string
	is   error
}

func (e *answerError) Error() string { return e.text }
func (e *answerError) Unwrap() error { return e.is }

// tpmOf is the channel as go-tpm has it.
func tpmOf(c *channel) transport.TPM { return c }
