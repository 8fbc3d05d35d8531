package inject

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
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

// Quoter has vTPMs quote. Its zero value runs Program.
type Quoter struct {
	Program string
	Env     []string // of the program; none is needed
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
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	in, err := json.Marshal(r)
	if err != nil {
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
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
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
