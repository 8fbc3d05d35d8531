package hosttpm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// fault is what a TPM, or the way to it, does instead of what it was asked.
type fault struct {
	name string
	do   func(*proxied) error
	// What an operation may give, besides success where success is set: any of
	// these. A fault that lasts never ends in success.
	once, lasting []error
	success       bool
	silent        bool
}

func answers(rc tpm2.TPMRC) func(*proxied) error {
	return func(x *proxied) error { x.response = code(rc); return nil }
}

// patience is that of who asks a TPM that has nothing to say.
const patience = 80 * time.Millisecond

var errSilent = []error{ErrBusy}

// faults are all that a TPM may do at any command. TPM_RC_LOCKOUT is no error
// of ours, and goes by itself; a failed self-test lasts until the TPM is reset.
var faults = []fault{
	{name: "RETRY", do: answers(tpm2.TPMRCRetry), success: true, lasting: errSilent},
	{name: "YIELDED", do: answers(tpm2.TPMRCYielded), success: true, lasting: errSilent},
	{name: "TESTING", do: answers(tpm2.TPMRCTesting), success: true, lasting: errSilent},
	{name: "NV_RATE", do: answers(tpm2.TPMRCNVRate), success: true, lasting: errSilent},
	{name: "CANCELED", do: answers(tpm2.TPMRCCanceled), success: true, lasting: errSilent},
	{name: "LOCKOUT", do: answers(tpm2.TPMRCLockout), once: []error{ErrLockedOut}, lasting: []error{ErrLockedOut}},
	{name: "MEMORY", do: answers(tpm2.TPMRCMemory), success: true, lasting: []error{ErrFailed}},
	{name: "OBJECT_MEMORY", do: answers(tpm2.TPMRCObjectMemory), success: true, lasting: []error{ErrFailed}},
	{name: "SESSION_MEMORY", do: answers(tpm2.TPMRCSessionMemory), success: true, lasting: []error{ErrFailed}},
	{name: "FAILURE", do: answers(tpm2.TPMRCFailure), once: []error{ErrFailed}, lasting: []error{ErrFailed}},
	{name: "NEEDS_TEST", do: answers(tpm2.TPMRCNeedsTest), once: []error{ErrFailed}, lasting: []error{ErrFailed}},
	{name: "garbage", do: func(x *proxied) error { x.response = bytes.Repeat([]byte{0xA5}, 64); return nil }, success: true, lasting: []error{ErrFailed}},
	{name: "a short response", do: func(x *proxied) error {
		r, err := x.tpm(x.command)
		x.response = r[:len(r)-1]
		return errors.Join(err, sendAndCut(x))
	}, success: true, lasting: []error{ErrFailed}},
	{name: "an empty success", do: func(x *proxied) error {
		x.response = []byte{0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0}
		return nil
	}, once: []error{ErrFailed}, lasting: []error{ErrFailed}},
	{name: "a closed connection", do: func(*proxied) error { return errCut }, success: true, lasting: []error{ErrFailed, ErrAbsent}},
	{name: "silence", do: silence, once: errSilent, lasting: errSilent, silent: true},
}

func sendAndCut(x *proxied) error {
	x.client.Write(x.response)
	return errCut
}

// silence says nothing until whoever asked has gone.
func silence(x *proxied) error {
	x.client.SetReadDeadline(time.Now().Add(10 * time.Second))
	_, err := x.client.Read(make([]byte, 1))
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return errors.New("nobody gives up")
	}
	return errCut
}

// use is one thing that is asked of the TPM. A nil error says that the answer
// was right.
type use struct {
	name string
	ask  func(context.Context, *Host) error
}

// uses are all uses of the keys that a host has.
func uses(t *testing.T, h *Host) []use {
	t.Helper()
	secret := bytes.Repeat([]byte{0x77}, 64)
	wrapped, err := h.WrapKeys(secret)
	if err != nil {
		t.Fatal(err)
	}
	listKey, err := h.UnsealListKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	state, err := h.PCRs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	public := h.CertifierPublic()
	want := func(got, want []byte, err error) error {
		if err == nil && !bytes.Equal(got, want) {
			return fmt.Errorf("a wrong answer: %x", got)
		}
		return err
	}
	return []use{
		{"UnsealListKey", func(ctx context.Context, h *Host) error {
			got, err := h.UnsealListKey(ctx)
			return want(got, listKey, err)
		}},
		{"UnwrapKeys", func(ctx context.Context, h *Host) error {
			got, err := h.UnwrapKeys(ctx, wrapped)
			return want(got, secret, err)
		}},
		{"Sign", func(ctx context.Context, h *Host) error {
			sig, err := h.Sign(ctx, [32]byte{7})
			if err == nil && !ecdsa.VerifyASN1(public, append([]byte{7}, make([]byte, 31)...), sig) {
				return errors.New("a wrong signature")
			}
			return err
		}},
		{"Approve", func(ctx context.Context, h *Host) error { return h.Approve(ctx, "again", state) }},
		{"PCRs", func(ctx context.Context, h *Host) error {
			now, err := h.PCRs(ctx)
			if err == nil && len(now.PCRs) != len(state.PCRs) {
				return errors.New("PCRs are missing")
			}
			return err
		}},
		{"Provision", func(ctx context.Context, h *Host) error { return h.Provision(ctx) }},
		{"Status", func(ctx context.Context, h *Host) error {
			s, err := h.Status(ctx)
			if err != nil {
				return err
			}
			is := map[string]error{Ready: nil, Failed: ErrFailed, LockedOut: ErrLockedOut, Absent: ErrAbsent, Cleared: ErrCleared, NotApproved: ErrPolicy}
			err, ok := is[s.State]
			if !ok || err != nil && s.Problem == "" {
				return fmt.Errorf("a status of %+v", s)
			}
			return err
		}},
	}
}

// allFaults: make faults, and make test, leave none out.
var allFaults = os.Getenv("VIRT_TRUST_FAULTS") == "all"

// At each command of each use the TPM fails in each way, once and for good. The
// answer is right, or it is the error that says what is the matter; and when
// the TPM is well again, so is everything.
func TestFaults(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	p := startProxy(t, e)
	first := open(t, p.sock, dir)
	all := uses(t, first)
	first.Close()
	everyFault(t, p, dir, all)
}

// everyFault tries each fault at each command of these uses.
func everyFault(t *testing.T, p *proxy, dir string, all []use) {
	t.Helper()
	cases, wrong := 0, 0
	for _, u := range all {
		n := commandsOf(t, p, dir, u)
		for i, f := range faults {
			for at := 1; at <= n; at++ {
				if (at+i)%8 != 0 && !allFaults {
					continue
				}
				for _, lasting := range []bool{false, true} {
					if lasting && at != 1 && at != n/2 && at != n {
						continue // what lasts meets the second try and the diagnosis, wherever it begins
					}
					cases++
					err := errNotMet
					for wait := patience; errors.Is(err, errNotMet) && wait < 10*time.Second; wait *= 4 {
						err = faulty(t, p, dir, u, f, at, lasting, wait) // on a busy machine it takes more to come so far
					}
					if err != nil {
						wrong++
						t.Errorf("%s, %s at command %d of %d, lasting %v: %v", u.name, f.name, at, n, lasting, err)
					}
				}
			}
		}
	}
	if k, err := (store{dir: dir}).load(); err != nil || len(k.policies) != 1 {
		t.Errorf("the keys on the disk: %v", err)
	}
	figures(t, "TPM faults: %d cases, %d wrong answers, 0 keys lost", cases, wrong)
}

// commandsOf counts the commands of a use by a virt-trustd that has just begun.
func commandsOf(t *testing.T, p *proxy, dir string, u use) (n int) {
	t.Helper()
	h := open(t, p.sock, dir)
	p.set(func(x *proxied) error { n = x.n; return nil })
	err := u.ask(t.Context(), h)
	p.set(nil)
	h.Close()
	if err != nil || n < 2 {
		t.Fatal(u.name, n, err)
	}
	return n
}

var errNotMet = errors.New("it never came to that command")

func faulty(t *testing.T, p *proxy, dir string, u use, f fault, at int, lasting bool, patience time.Duration) error {
	t.Helper()
	h := open(t, p.sock, dir)
	defer h.Close()
	met, at1 := false, tpm2.TPMCC(0)
	p.set(func(x *proxied) error {
		if x.n < at || x.n > at && !lasting {
			return nil
		}
		if x.n == at {
			met, at1 = true, x.cc
		}
		return f.do(x)
	})
	ctx, cancel := t.Context(), context.CancelFunc(func() {})
	if f.silent || lasting {
		ctx, cancel = context.WithTimeout(ctx, patience)
	}
	defer cancel()
	err := u.ask(ctx, h)
	p.set(nil)
	may := f.once
	if lasting {
		may = f.lasting
	}
	switch {
	case !met:
		return errNotMet
	case err == nil && (!lasting || at1 == tpm2.TPMCCFlushContext): // it was tried again
	case err == nil:
		return errors.New("it says that all is well")
	case !lasting && f.success:
		return fmt.Errorf("it is not tried again: %w", err)
	case f.name == "FAILURE" && !lasting && (at1 == tpm2.TPMCCRSADecrypt && errors.Is(err, ErrCiphertext) || at1 == tpm2.TPMCCActivateCredential && errors.Is(err, ErrCredential)):
		// So libtpms says that padding is wrong.
	default:
		found := false
		for _, e := range may {
			found = found || errors.Is(err, e)
		}
		if !found {
			return fmt.Errorf("the wrong reason: %w", err)
		}
	}
	if err := u.ask(t.Context(), h); err != nil {
		return fmt.Errorf("afterwards: %w", err)
	}
	return nil
}

// The first provisioning, with each fault at each of its commands: it ends in
// keys that work, or in none; and then it is begun again.
func TestFaultsInProvisioning(t *testing.T) {
	t.Parallel()
	e := startEmulator(t)
	p := startProxy(t, e)
	n := 0
	p.set(func(x *proxied) error { n = x.n; return nil })
	provisioned(t, p.sock, t.TempDir()).Close()
	p.set(nil)
	cases := 0
	for i, f := range faults {
		if f.success && f.name != "CANCELED" && f.name != "OBJECT_MEMORY" {
			continue // each ends in an RSA key; these stand for the others, which the one Send treats alike
		}
		for at := 1; at <= n; at++ {
			if f.success && at%7 != i%7 || !allFaults && at%16 != i {
				continue
			}
			dir := t.TempDir()
			h := open(t, p.sock, dir)
			p.set(func(x *proxied) error {
				if x.n != at {
					return nil
				}
				return f.do(x)
			})
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			if f.silent {
				cancel()
				ctx, cancel = context.WithTimeout(t.Context(), patience)
			}
			err := h.Provision(ctx)
			cancel()
			p.set(nil)
			cases++
			_, missing := os.Stat(filepath.Join(dir, keysDir))
			switch {
			case err == nil && missing == nil:
				works(t, h)
			case err == nil || missing == nil && !errors.Is(err, ErrBusy):
				t.Errorf("%s at command %d of %d: Provision gives %v, keys: %v", f.name, at, n, err, missing)
			}
			h.Close()
		}
	}
	works(t, provisioned(t, p.sock, t.TempDir()))
	figures(t, "TPM faults in the first provisioning: %d cases, 0 keys lost", cases)
}

// figures tells what a test has tried, if each case of it ended well.
func figures(t *testing.T, format string, args ...any) {
	t.Helper()
	if !t.Failed() {
		t.Logf("figures: "+format, args...)
	}
}
