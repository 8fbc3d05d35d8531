// Package hosttpm is the host's TPM: the keys that hold the vTPMs of this host,
// the policy under which they work, and the one goroutine that speaks to it.
//
// Keys. Under the storage root key (SRK) lie the bind key, to which vTPM keys
// are wrapped; the AK; the certifier, which signs what a restricted AK may not;
// and, as sealed data, the list key and the private half of the policy key. Bind
// key and sealed data have the host's policy (package policy) for their only
// authorisation.
//
// Sessions. What is secret crosses to the TPM and back under a salted HMAC
// session that encrypts parameters. It stands beside the policy session instead
// of being one with it: a policy session that encrypts on an object whose
// authValue the caller lacks gives a wrong plaintext and no error. The salt goes
// to the SRK whose public part was pinned when the keys were made, so that
// nothing between this process and the TPM can read or change it later.
//
// Failures. An operation that fails drops the connection. What it left in the
// TPM is flushed by the resource manager, or, on a raw device or socket whose
// only owner we are, by ourselves at the next connection. When nothing is asked
// for a moment the connection is closed too: swtpm serves one client at a time,
// and a session that is kept in the resource manager makes TPM_RC_CONTEXT_GAP
// for everyone else on the machine.
package hosttpm

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"virt-trust/internal/hosttpm/link"
	"virt-trust/internal/platform/secret"
)

const (
	queueLength = 64
	idleAfter   = 250 * time.Millisecond
	oaepLabel   = "virt-trust/label/v1\x00" // TPM 2.0 wants the NUL (Part 1, B.4)
	maxTries    = 32                        // of an operation whose policy session a PCR extend spoilt
)

// Config says which TPM, and where its keys lie.
type Config struct {
	Device  string        // a device node, or swtpm's data socket
	Dir     string        // for key files and approved policies; made if missing, 0700
	PCRs    []uint        // what a first provisioning approves
	Bank    string        // "sha256" or "sha384"
	Timeout time.Duration // for one request, waiting in the queue included; 0 means 30 s
	Delay   time.Duration // added to each command: a slow TPM for benchmarks
}

// Host is the host's TPM. Its methods are safe for concurrent use; each that
// takes a context ends with it, or after Config.Timeout, at the latest.
type Host struct {
	cfg     Config
	store   store
	queue   chan request
	later   chan request // served while queue is empty
	quit    chan struct{}
	closing sync.Once
	stopped sync.WaitGroup
	timings timings
	keys    atomic.Pointer[keySet] // nil: not provisioned
	counter atomic.Pointer[place]  // of the list counter: nil where it has to be looked for
	damaged atomic.Pointer[error]  // why the key files cannot be used, if they cannot
}

// set gives the host's keys.
func (h *Host) set() (*keySet, error) {
	if damaged := h.damaged.Load(); damaged != nil {
		return nil, *damaged
	}
	if k := h.keys.Load(); k != nil {
		return k, nil
	}
	return nil, ErrNotProvisioned
}

// request is one operation in the queue.
type request struct {
	ctx context.Context
	run func(*client)
}

// Open reads the host's keys, if it has any, and starts the goroutine that
// owns the TPM. The TPM need not be there yet. Key files that are damaged leave
// a Host whose every use is ErrFailed; a Config that makes no sense is an error.
func Open(cfg Config) (*Host, error) {
	if cfg.Device == "" || cfg.Dir == "" || len(cfg.PCRs) == 0 || cfg.Bank != "sha256" && cfg.Bank != "sha384" {
		return nil, fmt.Errorf("incomplete configuration of the TPM: device %q, folder %q, bank %q, %d PCRs", cfg.Device, cfg.Dir, cfg.Bank, len(cfg.PCRs))
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 30 * time.Second
	}
	h := &Host{cfg: cfg, store: store{dir: cfg.Dir}, queue: make(chan request, queueLength), later: make(chan request), quit: make(chan struct{})}
	keys, err := h.store.load()
	if err != nil && !errors.Is(err, ErrNotProvisioned) {
		h.damaged.Store(&err)
	}
	h.keys.Store(keys)
	h.stopped.Go(h.serve)
	return h, nil
}

// Close ends the goroutine after the operation that it is at.
func (h *Host) Close() error {
	h.closing.Do(func() { close(h.quit) })
	h.stopped.Wait()
	return nil
}

// serve owns the TPM.
func (h *Host) serve() {
	c := &client{host: h}
	idle := time.NewTimer(idleAfter)
	defer idle.Stop()
	defer c.hangUp()
	work := func(r request) {
		if r.ctx.Err() == nil {
			c.ctx = r.ctx
			r.run(c)
		}
		idle.Reset(idleAfter)
	}
	for {
		select {
		case <-h.quit:
			return
		default:
		}
		select {
		case r := <-h.queue:
			work(r)
			continue
		default:
		}
		select {
		case <-h.quit:
			return
		case r := <-h.queue:
			work(r)
		case r := <-h.later:
			work(r)
		case <-idle.C:
			c.hangUp()
		}
	}
}

// do runs op in the TPM's goroutine and waits for it no longer than ctx and
// Config.Timeout allow. op may run more than once.
func do[T any](ctx context.Context, h *Host, op func(*client) (T, error)) (T, error) {
	return doWithin(ctx, h, h.cfg.Timeout, op)
}

func doWithin[T any](ctx context.Context, h *Host, timeout time.Duration, op func(*client) (T, error)) (T, error) {
	return doIn(ctx, h, timeout, func(_ context.Context, r request) error {
		select {
		case h.queue <- r:
			return nil
		default:
			return fmt.Errorf("%w: %d requests are waiting", ErrBusy, queueLength)
		}
	}, op)
}

// doLater is do for what can wait: every other request goes first.
func doLater[T any](ctx context.Context, h *Host, op func(*client) (T, error)) (T, error) {
	return doLaterWithin(ctx, h, h.cfg.Timeout, op)
}

func doLaterWithin[T any](ctx context.Context, h *Host, timeout time.Duration, op func(*client) (T, error)) (T, error) {
	return doIn(ctx, h, timeout, func(ctx context.Context, r request) error {
		select {
		case h.later <- r:
			return nil
		case <-h.quit:
			return fmt.Errorf("%w: closed", ErrFailed)
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ErrBusy, ctx.Err())
		}
	}, op)
}

func doIn[T any](ctx context.Context, h *Host, timeout time.Duration, enter func(context.Context, request) error, op func(*client) (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var none T
	done := make(chan result) // unbuffered: a result that nobody waits for is wiped
	run := func(c *client) {
		var r result
		r.v, r.err = attempt(c, op)
		select {
		case done <- r:
		case <-ctx.Done():
			if b, ok := any(r.v).([]byte); ok {
				secret.Wipe(b)
			}
		}
	}
	select {
	case <-h.quit:
		return none, fmt.Errorf("%w: closed", ErrFailed)
	default:
	}
	if err := enter(ctx, request{ctx, run}); err != nil {
		return none, err
	}
	select {
	case r := <-done:
		return r.v, r.err
	case <-h.quit:
		return none, fmt.Errorf("%w: closed", ErrFailed)
	case <-ctx.Done():
		return none, fmt.Errorf("%w: %w", ErrBusy, ctx.Err())
	}
}

// attempt runs op, a second time where the TPM or the connection may have
// been reset under it, and finds out what an error means.
func attempt[T any](c *client, op func(*client) (T, error)) (v T, err error) {
	var none T
	fresh, restored := false, false
	for try := 0; ; try++ {
		if err = c.connect(); err == nil {
			v, err = guard(c, op)
		}
		c.forgetResponse()
		if err == nil {
			return v, nil
		}
		if isPCRChanged(err) && try < maxTries && c.ctx.Err() == nil {
			continue
		}
		c.drop()
		switch {
		case c.ctx.Err() != nil:
			return none, fmt.Errorf("%w: %w", ErrBusy, c.ctx.Err())
		case !fresh && (errors.Is(err, link.ErrBroken) || lostState(err)):
			fresh = true
			continue
		}
		found, _ := guard(c, func(c *client) (error, error) { return c.diagnose(err), nil })
		c.drop()
		switch {
		case found == errRestored && !restored:
			restored = true
			continue
		case found != nil:
			err = found
		}
		return none, sentinel(err)
	}
}

// guard turns a panic into an error: go-tpm takes a response apart by
// reflection, and a response is not to be trusted.
func guard[T any](c *client, op func(*client) (T, error)) (v T, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: its response cannot be read: %v", ErrFailed, p)
		}
	}()
	return op(c)
}

// UnsealListKey gives the 32 bytes of the list key. The caller wipes them.
func (h *Host) UnsealListKey(ctx context.Context) ([]byte, error) {
	k, err := h.set()
	if err != nil {
		return nil, err
	}
	return do(ctx, h, func(c *client) ([]byte, error) { return c.unseal(k, k.listKey) })
}

// WrapKeys encrypts secret, at most 190 bytes, to the bind key. It needs no
// TPM.
func (h *Host) WrapKeys(secret []byte) ([]byte, error) {
	k, err := h.set()
	if err != nil {
		return nil, err
	}
	return rsa.EncryptOAEP(sha256.New(), rand.Reader, k.bindPublic, secret, []byte(oaepLabel))
}

// UnwrapKeys undoes WrapKeys in the TPM, with one RSA decryption, if the host
// is in an approved state. The caller wipes the result. A ciphertext that was
// made for another key or changed is ErrCiphertext.
func (h *Host) UnwrapKeys(ctx context.Context, ciphertext []byte) ([]byte, error) {
	k, err := h.set()
	if err != nil {
		return nil, err
	}
	if len(ciphertext) != k.bindPublic.Size() {
		return nil, fmt.Errorf("%w: %d bytes, want %d", ErrCiphertext, len(ciphertext), k.bindPublic.Size())
	}
	return do(ctx, h, func(c *client) ([]byte, error) { return c.decrypt(k, ciphertext) })
}

// Sign signs a SHA-256 digest with the certifier: ECDSA, ASN.1.
func (h *Host) Sign(ctx context.Context, digest [sha256.Size]byte) ([]byte, error) {
	k, err := h.set()
	if err != nil {
		return nil, err
	}
	return do(ctx, h, func(c *client) ([]byte, error) { return c.sign(k, digest) })
}

// BindKeyName is the bind key's TPM Name, 34 bytes; nil before Provision.
func (h *Host) BindKeyName() []byte { return keyOf(h, func(k *keySet) []byte { return k.bind.name }) }

// BindKeyPublic is the bind key's public half; nil before Provision.
func (h *Host) BindKeyPublic() *rsa.PublicKey {
	return keyOf(h, func(k *keySet) *rsa.PublicKey { return k.bindPublic })
}

// AKName is the AK's TPM Name, 34 bytes; nil before Provision.
func (h *Host) AKName() []byte { return keyOf(h, func(k *keySet) []byte { return k.ak.name }) }

// AKPublic is the AK's public half; nil before Provision.
func (h *Host) AKPublic() *ecdsa.PublicKey {
	return keyOf(h, func(k *keySet) *ecdsa.PublicKey { return k.akPublic })
}

// CertifierPublic is the certifier's public half; nil before Provision.
func (h *Host) CertifierPublic() *ecdsa.PublicKey {
	return keyOf(h, func(k *keySet) *ecdsa.PublicKey { return k.certifierPublic })
}

func keyOf[T any](h *Host, f func(*keySet) T) T {
	if k := h.keys.Load(); k != nil {
		return f(k)
	}
	var none T
	return none
}

// Timings gives, by TPM command name, how often and how long the TPM was asked
// since Open.
func (h *Host) Timings() map[string]Timing { return h.timings.snapshot() }
