package hosttpm

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/hosttpm/policy"
)

func wrapped(t testing.TB, h *Host) []byte {
	t.Helper()
	ct, err := h.WrapKeys(bytes.Repeat([]byte{0x55}, 64))
	if err != nil {
		t.Fatal(err)
	}
	return ct
}

// A cut is followed by a provisioning that succeeds, after each TPM command.
func TestProvisionAfterCut(t *testing.T) {
	t.Parallel()
	e := startEmulator(t)
	p := startProxy(t, e)
	for at := 1; ; at++ {
		dir := t.TempDir()
		h := open(t, p.sock, dir)
		cut := false
		p.set(func(x *proxied) error {
			if x.n < at {
				return nil
			}
			cut = true
			if at%2 == 0 && x.n == at { // the TPM did it, and the answer was lost
				x.tpm(x.command)
			}
			return errCut
		})
		err := h.Provision(t.Context())
		h.Close()
		p.set(nil)
		if !cut {
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("a provisioning is %d commands", at-1)
			break
		}
		if err == nil { // all that was lost is a flush
			works(t, open(t, p.sock, dir))
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, keysDir)); err == nil {
			t.Fatalf("command %d was cut and there are keys", at)
		}
		if at%9 != 0 { // each takes an RSA key
			continue
		}
		works(t, provisioned(t, p.sock, dir))
	}
	for i := firstEpochIndex + 1; i <= lastEpochIndex; i++ {
		if _, err := (tpm2.NVReadPublic{NVIndex: i}).Execute(e.Open()); err == nil {
			t.Errorf("a second counter was defined at %#x", i)
		}
	}
}

// The disk fills up, or the process is killed, after each step of writing.
func TestProvisionStopped(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	k := h.keys.Load()
	stop := errors.New("stopped")
	for at := 1; ; at++ {
		dir, n := filepath.Join(t.TempDir(), "new"), 0
		s := store{dir: dir, done: func(string) error {
			if n++; n == at {
				return stop
			}
			return nil
		}}
		err := s.save(k, time.Now())
		if err == nil {
			t.Logf("saving is %d steps", at-1)
			other := *k
			other.policies = nil
			if s.save(&other, time.Now()) == nil {
				t.Fatal("a key set was written over another")
			}
			if k, err := s.load(); err != nil || len(k.policies) != 1 {
				t.Fatal("the refusal to write over a key set harmed it: ", err)
			}
			return
		}
		got, lerr := store{dir: dir}.load()
		switch {
		case errors.Is(lerr, ErrNotProvisioned):
			if err := (store{dir: dir}).save(k, time.Now()); err != nil {
				t.Fatalf("after step %d: %v", at, err)
			}
			if got, lerr = (store{dir: dir}).load(); lerr != nil {
				t.Fatalf("after step %d: %v", at, lerr)
			}
		case lerr != nil:
			t.Fatalf("after step %d: %v", at, lerr)
		}
		if !bytes.Equal(got.bind.name, k.bind.name) || len(got.policies) != 1 {
			t.Fatalf("after step %d another set is read", at)
		}
	}
}

// A file of the set that is missing, cut or exchanged is never used, and never
// answered with new keys.
func TestDamagedFiles(t *testing.T) {
	t.Parallel()
	e, dir, other := startMade(t)
	files, err := filepath.Glob(filepath.Join(dir, "*", "*"))
	if err != nil || len(files) != 13 {
		t.Fatal(files, err)
	}
	policies, _ := filepath.Glob(filepath.Join(other, policiesDir, "*"))
	for _, f := range files {
		good, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		from := filepath.Join(other, keysDir, filepath.Base(f))
		if strings.HasSuffix(f, policyExt) && filepath.Base(filepath.Dir(f)) == policiesDir {
			from = policies[0]
		}
		others, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		for what, bad := range map[string][]byte{"missing": nil, "cut": good[:len(good)/2], "empty": {}, "another host's": others} {
			if bytes.Equal(bad, good) || what == "another host's" && filepath.Base(f) == "set.json" {
				continue // SRK and counter are the TPM's, which they share
			}
			if what == "missing" {
				if filepath.Base(filepath.Dir(f)) == policiesDir {
					continue // an approval that is not there
				}
				os.Remove(f)
			} else if err := os.WriteFile(f, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			h := open(t, e.Socket, dir)
			if err := h.Provision(t.Context()); !errors.Is(err, ErrFailed) {
				t.Errorf("%s %s: Provision gives %v", filepath.Base(f), what, err)
			}
			if _, err := h.UnsealListKey(t.Context()); !errors.Is(err, ErrFailed) {
				t.Errorf("%s %s: UnsealListKey gives %v", filepath.Base(f), what, err)
			}
			if s, err := h.Status(t.Context()); err != nil || s.State != Failed {
				t.Errorf("%s %s: Status gives %+v, %v", filepath.Base(f), what, s, err)
			}
			h.Close()
		}
		if err := os.WriteFile(f, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	works(t, open(t, e.Socket, dir))
}

func TestCleared(t *testing.T) {
	t.Parallel()
	lockout := tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	evict := func(t *testing.T, e *emulator, h *Host) {
		k := h.keys.Load()
		_, err := tpm2.EvictControl{
			Auth: owner, PersistentHandle: srkHandle, ObjectHandle: &tpm2.NamedHandle{Handle: srkHandle, Name: tpm2.TPM2BName{Buffer: k.srk.name}},
		}.Execute(e.Open())
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, clear := range map[string]func(*testing.T, *emulator, *Host){
		"cleared": func(t *testing.T, e *emulator, _ *Host) {
			if _, err := (tpm2.Clear{AuthHandle: lockout}).Execute(e.Open()); err != nil {
				t.Fatal(err)
			}
		},
		"another TPM": func(t *testing.T, e *emulator, _ *Host) {
			e.Stop()
			if err := os.Remove(filepath.Join(filepath.Dir(e.Socket), "tpm2-00.permall")); err != nil {
				t.Fatal(err)
			}
			e.Start()
		},
		"another TPM, set up": func(t *testing.T, e *emulator, _ *Host) {
			e.Stop()
			if err := os.Remove(filepath.Join(filepath.Dir(e.Socket), "tpm2-00.permall")); err != nil {
				t.Fatal(err)
			}
			e.Start()
			provisioned(t, e.Socket, t.TempDir()).Close() // with keys of its own
		},
		"counter deleted": func(t *testing.T, e *emulator, h *Host) {
			k := h.keys.Load()
			_, err := tpm2.NVUndefineSpace{AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: k.epochIndex, Name: tpm2.TPM2BName{Buffer: k.epochName}}}.Execute(e.Open())
			if err != nil {
				t.Fatal(err)
			}
		},
		"SRK evicted": evict, // and put back
	} {
		t.Run(name, func(t *testing.T) {
			e, dir, _ := startMade(t)
			h := open(t, e.Socket, dir)
			works(t, h)
			ct := wrapped(t, h)
			clear(t, e, h)
			if name == "SRK evicted" {
				works(t, h)
				return
			}
			for range 2 {
				for what, err := range map[string]error{
					"UnwrapKeys":    second(h.UnwrapKeys(t.Context(), ct)),
					"UnsealListKey": second(h.UnsealListKey(t.Context())),
					"Provision":     h.Provision(t.Context()),
				} {
					if !errors.Is(err, ErrCleared) || errors.Is(err, ErrPolicy) {
						t.Errorf("%s gives %v", what, err)
					}
				}
				if s, err := h.Status(t.Context()); err != nil || s.State != Cleared {
					t.Errorf("Status gives %+v, %v", s, err)
				}
				h.Close()
				h = open(t, e.Socket, dir)
			}
		})
	}
}

func second[T any](_ T, err error) error { return err }

// Approvals: a state is approved from an approved one; raising the epoch
// withdraws all.
func TestApprovals(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	ct := wrapped(t, h)
	e.extend(4)
	next, err := h.PCRs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Approve(t.Context(), "new kernel", next); !errors.Is(err, ErrPolicy) {
		t.Fatalf("a state that is not approved approves itself: %v", err)
	}
	e.Reset()
	works(t, h)
	if err := h.Approve(t.Context(), "new kernel", next); err != nil {
		t.Fatal(err)
	}
	works(t, h)
	e.extend(4)
	works(t, h)
	h.Close()
	h = open(t, e.Socket, dir)
	works(t, h)
	e.extend(4)
	e.extend(9)
	var p *PolicyError
	if _, err := h.UnwrapKeys(t.Context(), ct); !errors.As(err, &p) || !slices.Equal(p.Differing, []uint{4, 9}) {
		t.Fatalf("UnwrapKeys gives %v", err)
	}
	e.Reset()
	works(t, h)
	k := h.keys.Load()
	_, err = tpm2.NVIncrement{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: k.epochIndex, Name: tpm2.TPM2BName{Buffer: k.epochName}},
	}.Execute(e.Open())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.UnwrapKeys(t.Context(), ct); !errors.As(err, &p) || len(p.Differing) != 0 {
		t.Fatalf("after the epoch was raised, UnwrapKeys gives %v", err)
	}
	if _, err := h.UnsealListKey(t.Context()); !errors.Is(err, ErrPolicy) {
		t.Fatalf("after the epoch was raised, UnsealListKey gives %v", err)
	}
}

// A signature of the policy key for another use approves nothing, and neither
// does a policy of another key.
func TestForgedApproval(t *testing.T) {
	t.Parallel()
	e, dir, second := startMade(t)
	h, other := open(t, e.Socket, dir), open(t, e.Socket, second)
	e.extend(4)
	now, err := h.PCRs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	k := *h.keys.Load()
	forged := *other.keys.Load().policies[0]
	forged.State = now
	if forged.Policy, err = policy.Digest(now, forged.Epoch, forged.EpochName); err != nil {
		t.Fatal(err)
	}
	k.policies = []*policy.Approved{&forged}
	h.keys.Store(&k)
	if b, err := h.UnsealListKey(t.Context()); err == nil {
		t.Fatalf("a forged approval unseals %d bytes", len(b))
	}
}

// IMA extends PCR 10 whenever a program runs first: each extend of any PCR
// spoils the policy sessions that are under way.
func TestExtendMeanwhile(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	p := startProxy(t, e)
	h := open(t, p.sock, dir)
	spoilt := 0
	p.set(func(x *proxied) error {
		if x.cc == tpm2.TPMCCPolicyNV && spoilt < 5 {
			spoilt++
			_, err := x.tpm(extendCommand(10))
			return err
		}
		return nil
	})
	works(t, h)
	if spoilt != 5 {
		t.Fatal("nothing was tested")
	}
	p.set(func(x *proxied) error {
		if x.cc == tpm2.TPMCCPolicyNV {
			x.tpm(extendCommand(7))
		}
		return nil
	})
	var pe *PolicyError
	if _, err := h.UnsealListKey(t.Context()); !errors.As(err, &pe) || !slices.Equal(pe.Differing, []uint{7}) {
		t.Fatalf("PCR 7 was extended meanwhile, UnsealListKey gives %v", err)
	}
}

func extendCommand(pcr byte) []byte {
	b := []byte{0x80, 2, 0, 0, 0, 65, 0, 0, 1, 0x82, 0, 0, 0, pcr, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0x0B}
	return append(b, make([]byte, 32)...)
}

// Nothing a TPM, or what stands before it, answers makes us hang, crash or
// return a wrong key.
func TestHostileAnswers(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	p := startProxy(t, e)
	h := open(t, p.sock, dir)
	ct := wrapped(t, h)
	want, err := h.UnwrapKeys(t.Context(), ct)
	if err != nil {
		t.Fatal(err)
	}
	random := func(n int) []byte {
		b := make([]byte, n)
		rand.Read(b)
		return b
	}
	header := func(size uint32, rest ...byte) []byte {
		return append([]byte{0x80, 2, byte(size >> 24), byte(size >> 16), byte(size >> 8), byte(size), 0, 0, 0, 0}, rest...)
	}
	for name, answer := range map[string]func(x *proxied) error{
		"4 GiB":          func(x *proxied) error { x.response = header(0xFFFFFFFF); return nil },
		"size 0":         func(x *proxied) error { x.response = header(0); return nil },
		"size 9":         func(x *proxied) error { x.response = header(9); return nil },
		"size too small": func(x *proxied) error { x.response = header(10, 1, 2, 3, 4); return nil },
		"5000 bytes":     func(x *proxied) error { x.response = header(5000, make([]byte, 4990)...); return nil },
		"success, empty": func(x *proxied) error { x.response = header(10); return nil },
		"tag":            func(x *proxied) error { x.response = append([]byte{0, 0xC4}, header(10)[2:]...); return nil },
		"noise":          func(x *proxied) error { x.response = random(300); return nil },
		"noise in it":    func(x *proxied) error { x.response = header(300, random(290)...); return nil },
		"lengths":        func(x *proxied) error { x.response = header(300, bytes.Repeat([]byte{0xFF}, 290)...); return nil },
		"zeros":          func(x *proxied) error { x.response = header(300, make([]byte, 290)...); return nil },
		"failure mode":   func(x *proxied) error { x.response = code(tpm2.TPMRCFailure); return nil },
		"not started":    func(x *proxied) error { x.response = code(tpm2.TPMRCInitialize); return nil },
		"an odd code":    func(x *proxied) error { x.response = code(0xFFFFFFFF); return nil },
	} {
		for _, at := range []int{1, 3, 4, 9, 10, 11} {
			p.set(func(x *proxied) error {
				if x.n < at {
					return nil
				}
				return answer(x)
			})
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			_, err := h.UnwrapKeys(ctx, ct)
			cancel()
			if err == nil && at < 7 || errors.Is(err, ErrPolicy) || errors.Is(err, ErrBusy) {
				t.Errorf("%s from command %d on: %v", name, at, err)
			}
			p.set(nil)
			if got, err := h.UnwrapKeys(t.Context(), ct); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("after %s from command %d on: %v", name, at, err)
			}
		}
	}
	// One bit of each answer: a wrong key never comes out.
	p.set(func(x *proxied) error {
		r, err := x.tpm(x.command)
		if err == nil && x.cc == tpm2.TPMCCRSADecrypt {
			r[20] ^= 1
		}
		x.response = r
		return err
	})
	if got, err := h.UnwrapKeys(t.Context(), ct); !errors.Is(err, ErrFailed) {
		t.Fatalf("an answer with one bit changed gives %x, %v", got, err)
	}
}

func TestPutOff(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	p := startProxy(t, e)
	h := open(t, p.sock, dir)
	ct := wrapped(t, h)
	codes := []tpm2.TPMRC{tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate}
	p.set(func(x *proxied) error {
		if x.n%3 != 0 { // two of three
			x.response = code(codes[x.n%4])
		}
		return nil
	})
	works(t, h)
	p.set(func(x *proxied) error { x.response = code(tpm2.TPMRCTesting); return nil })
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := h.UnwrapKeys(ctx, ct); !errors.Is(err, ErrBusy) {
		t.Fatalf("a TPM that tests itself for ever gives %v", err)
	}
	p.set(func(x *proxied) error {
		if x.cc == tpm2.TPMCCLoad {
			x.response = code(tpm2.TPMRCLockout)
		}
		return nil
	})
	if _, err := h.UnwrapKeys(t.Context(), ct); !errors.Is(err, ErrLockedOut) {
		t.Fatalf("a TPM in lockout gives %v", err)
	}
	if s, err := h.Status(t.Context()); err != nil || s.State != LockedOut {
		t.Fatalf("Status gives %+v, %v", s, err)
	}
}

// Nothing that is secret passes between us and the TPM in the clear, from the
// making of the keys on.
func TestNothingInTheClear(t *testing.T) {
	t.Parallel()
	e := startEmulator(t)
	p := startProxy(t, e)
	var heard bytes.Buffer
	p.set(func(x *proxied) (err error) {
		x.response, err = x.tpm(x.command)
		heard.Write(x.command)
		heard.Write(x.response)
		return err
	})
	h := provisioned(t, p.sock, t.TempDir())
	key, err := h.UnsealListKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	scalar, err := do(t.Context(), h, func(c *client) ([]byte, error) { return c.unseal(h.keys.Load(), h.keys.Load().policyKey) })
	if err != nil {
		t.Fatal(err)
	}
	ct := wrapped(t, h)
	if _, err := h.UnwrapKeys(t.Context(), ct); err != nil {
		t.Fatal(err)
	}
	p.set(nil)
	if !bytes.Contains(heard.Bytes(), ct) {
		// The ciphertext is the first parameter and not encrypted: what is listened to is right.
		t.Fatal("nothing was heard")
	}
	for what, s := range map[string][]byte{"list key": key, "policy key": scalar, "vTPM keys": bytes.Repeat([]byte{0x55}, 16)} {
		if bytes.Contains(heard.Bytes(), s[:16]) {
			t.Errorf("the %s passes in the clear", what)
		}
	}
}

// A silent TPM holds nobody longer than their deadline, and the next one is
// served when it speaks again.
func TestSilent(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	p := startProxy(t, e)
	h := open(t, p.sock, dir)
	ct := wrapped(t, h)
	silence := make(chan struct{})
	p.set(func(x *proxied) error {
		if x.n == 3 {
			<-silence
			return errCut
		}
		return nil
	})
	time.AfterFunc(400*time.Millisecond, func() { close(silence) })
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			began := time.Now()
			_, err := h.UnwrapKeys(ctx, ct)
			if took := time.Since(began); !errors.Is(err, ErrBusy) || took > 250*time.Millisecond {
				t.Errorf("after %v: %v", took, err)
			}
		})
	}
	wg.Wait()
	works(t, h)
}

func TestQueueFull(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	p := startProxy(t, e)
	h := open(t, p.sock, dir)
	ct := wrapped(t, h)
	hold := make(chan struct{})
	held := make(chan struct{}, 1)
	p.set(func(x *proxied) error {
		if x.n == 1 {
			held <- struct{}{}
			<-hold
		}
		return nil
	})
	var wg sync.WaitGroup
	unwrap := func() {
		if _, err := h.UnwrapKeys(t.Context(), ct); err != nil {
			t.Errorf("one that had its place: %v", err)
		}
	}
	wg.Go(unwrap)
	<-held
	for range queueLength {
		wg.Go(unwrap)
	}
	for len(h.queue) < queueLength {
		time.Sleep(time.Millisecond)
	}
	if _, err := h.UnwrapKeys(t.Context(), ct); !errors.Is(err, ErrBusy) {
		t.Errorf("one too many: %v", err)
	}
	close(hold)
	wg.Wait()
}

func TestWrongCiphertext(t *testing.T) {
	t.Parallel()
	e, dir, second := startMade(t)
	h, other := open(t, e.Socket, dir), open(t, e.Socket, second)
	changed := wrapped(t, h)
	changed[100] ^= 1
	n := h.BindKeyPublic().N
	for name, ct := range map[string][]byte{
		"changed":         changed,
		"another host's":  wrapped(t, other),
		"short":           changed[:255],
		"empty":           nil,
		"zeros":           make([]byte, 256),
		"the modulus":     n.FillBytes(make([]byte, 256)),
		"above it":        new(big.Int).Add(n, big.NewInt(5)).FillBytes(make([]byte, 256)),
		"larger than any": bytes.Repeat([]byte{0xFF}, 256),
	} {
		if _, err := h.UnwrapKeys(t.Context(), ct); !errors.Is(err, ErrCiphertext) || errors.Is(err, ErrPolicy) || errors.Is(err, ErrFailed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	works(t, h)
}

// Others left all slots of the TPM taken.
func TestLeftovers(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	time.Sleep(2 * idleAfter) // so that it hangs up
	tpm := e.Open()
	for range 3 {
		if _, err := (tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHNull, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}).Execute(tpm); err != nil {
			t.Fatal(err)
		}
		if _, _, err := tpm2.PolicySession(tpm, tpm2.TPMAlgSHA256, 16); err != nil {
			t.Fatal(err)
		}
	}
	works(t, h)
	time.Sleep(2 * idleAfter)
	for _, kind := range []tpm2.TPMHT{tpm2.TPMHTTransient, tpm2.TPMHTLoadedSession} {
		r, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(kind) << 24, PropertyCount: 9}.Execute(e.Open())
		if err != nil {
			t.Fatal(err)
		}
		if l, err := r.CapabilityData.Data.Handles(); err != nil || len(l.Handle) != 0 {
			t.Errorf("we leave %v behind, %v", l, err)
		}
	}
}

// Somebody else's NV index and SRK.
func TestTakenHandles(t *testing.T) {
	t.Parallel()
	e := startEmulator(t)
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	_, err := tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
		NVIndex: firstEpochIndex, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8, Attributes: tpm2.TPMANV{OwnerWrite: true, AuthRead: true, OwnerRead: true, NoDA: true},
	})}.Execute(e.Open())
	if err != nil {
		t.Fatal(err)
	}
	h := provisioned(t, e.Socket, t.TempDir())
	works(t, h)
	if k := h.keys.Load(); k.epochIndex != firstEpochIndex+1 {
		t.Errorf("the counter is at %#x", k.epochIndex)
	}
}

// An RSA SRK, as older tools made it, will do; another key will not.
func TestSRKOfOthers(t *testing.T) {
	t.Parallel()
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	for name, c := range map[string]struct {
		template tpm2.TPMTPublic
		good     bool
	}{
		"RSA":     {tpm2.RSASRKTemplate, true},
		"signing": {akTemplate(), false},
	} {
		t.Run(name, func(t *testing.T) {
			e := startEmulator(t)
			tpm := e.Open()
			r, err := tpm2.CreatePrimary{PrimaryHandle: owner, InPublic: tpm2.New2B(c.template)}.Execute(tpm)
			if err != nil {
				t.Fatal(err)
			}
			_, err = tpm2.EvictControl{Auth: owner, ObjectHandle: &tpm2.NamedHandle{Handle: r.ObjectHandle, Name: r.Name}, PersistentHandle: srkHandle}.Execute(tpm)
			if err != nil {
				t.Fatal(err)
			}
			h := open(t, e.Socket, t.TempDir())
			err = h.Provision(t.Context())
			if c.good {
				if err != nil {
					t.Fatal(err)
				}
				works(t, h)
			} else if !errors.Is(err, ErrFailed) {
				t.Fatalf("Provision gives %v", err)
			}
		})
	}
}

// What the rules of the policy package give is what a TPM computes.
func TestPolicyDigests(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	k := h.keys.Load()
	time.Sleep(2 * idleAfter)
	tpm := e.Open()
	for i, pcrs := range [][]uint{{7}, testPCRs, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 23}} {
		for _, bank := range []string{"sha256", "sha384"} {
			state, err := do(t.Context(), h, func(c *client) (policy.State, error) { return c.readPCRs(bank, pcrs) })
			if err != nil {
				t.Fatal(err)
			}
			epoch, err := do(t.Context(), h, func(c *client) (uint64, error) { return c.readEpoch(k) })
			if err != nil {
				t.Fatal(err)
			}
			h.Close()
			h = open(t, e.Socket, h.cfg.Dir)
			trial, end, err := tpm2.PolicySession(tpm, tpm2.TPMAlgSHA256, 16, tpm2.Trial())
			if err != nil {
				t.Fatal(err)
			}
			digest := func() []byte {
				r, err := tpm2.PolicyGetDigest{PolicySession: trial.Handle()}.Execute(tpm)
				if err != nil {
					t.Fatal(err)
				}
				return r.PolicyDigest.Buffer
			}
			if _, err := (tpm2.PolicyPCR{PolicySession: trial.Handle(), Pcrs: selection(bank, pcrs)}).Execute(tpm); err != nil {
				t.Fatal(err)
			}
			_, err = tpm2.PolicyNV{
				AuthHandle:    tpm2.AuthHandle{Handle: k.epochIndex, Name: tpm2.TPM2BName{Buffer: k.epochName}, Auth: tpm2.PasswordAuth(nil)},
				NVIndex:       tpm2.NamedHandle{Handle: k.epochIndex, Name: tpm2.TPM2BName{Buffer: k.epochName}},
				PolicySession: trial.Handle(), OperandB: tpm2.TPM2BOperand{Buffer: big.NewInt(int64(epoch)).FillBytes(make([]byte, 8))}, Operation: tpm2.TPMEOEq,
			}.Execute(tpm)
			if err != nil {
				t.Fatal(err)
			}
			want := digest()
			if got, err := policy.Digest(state, epoch, k.epochName); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d, %s: Digest gives %x, %v, the TPM %x", i, bank, got, err, want)
			}
			_, err = tpm2.PolicyAuthorize{
				PolicySession: trial.Handle(), PolicyRef: tpm2.TPM2BDigest{Buffer: []byte(policy.Ref)}, KeySign: tpm2.TPM2BName{Buffer: k.policyName},
				ApprovedPolicy: tpm2.TPM2BDigest{Buffer: want}, CheckTicket: tpm2.TPMTTKVerified{Tag: tpm2.TPMSTVerified, Hierarchy: tpm2.TPMRHOwner},
			}.Execute(tpm)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := policy.Authorize(k.policyName), digest(); !bytes.Equal(got, want) {
				t.Errorf("Authorize gives %x, the TPM %x", got, want)
			}
			end()
		}
	}
	area, err := policy.PublicArea(k.policyPublic)
	if err != nil {
		t.Fatal(err)
	}
	l, err := tpm2.LoadExternal{InPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](area), Hierarchy: tpm2.TPMRHOwner}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(l.Name.Buffer, k.policyName) {
		t.Error("KeyName is not what the TPM computes")
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	for i, c := range []Config{
		{}, {Device: "/dev/null", Dir: "/x", Bank: "sha1", PCRs: testPCRs}, {Device: "/dev/null", Dir: "/x", Bank: "sha256"},
	} {
		if h, err := Open(c); err == nil {
			h.Close()
			t.Errorf("configuration %d is taken", i)
		}
	}
	h := open(t, filepath.Join(t.TempDir(), "none"), t.TempDir())
	if err := h.Provision(t.Context()); !errors.Is(err, ErrAbsent) {
		t.Error("without a TPM: ", err)
	}
	h.Close()
	h.Close()
	if _, err := h.Status(t.Context()); err != nil {
		t.Error(fmt.Sprint("closed: ", err))
	}
}
