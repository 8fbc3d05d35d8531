package hosttpm

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"
	"time"
)

var testPCRs = []uint{0, 2, 4, 7, 9, 11, 12, 14}

func open(t testing.TB, device, dir string) *Host {
	t.Helper()
	h, err := Open(Config{Device: device, Dir: dir, PCRs: testPCRs, Bank: "sha256", Timeout: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

func provisioned(t testing.TB, device, dir string) *Host {
	t.Helper()
	h := open(t, device, dir)
	if err := h.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	return h
}

// works uses every key of h.
func works(t testing.TB, h *Host) {
	t.Helper()
	secret := bytes.Repeat([]byte("k0"), 32)
	ct, err := h.WrapKeys(secret)
	if err != nil {
		t.Fatal(err)
	}
	got, err := h.UnwrapKeys(t.Context(), ct)
	if err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("UnwrapKeys gives %x, %v", got, err)
	}
	if key, err := h.UnsealListKey(t.Context()); err != nil || len(key) != 32 {
		t.Fatalf("UnsealListKey gives %d bytes, %v", len(key), err)
	}
	if _, err := h.Sign(t.Context(), [32]byte{1}); err != nil {
		t.Fatal("Sign: ", err)
	}
	s, err := h.Status(t.Context())
	if err != nil || s.State != Ready {
		t.Fatalf("Status gives %+v, %v", s, err)
	}
}

func TestKeys(t *testing.T) {
	t.Parallel()
	e, dir := startEmulator(t), t.TempDir()
	h := open(t, e.Socket, dir)
	if s, err := h.Status(t.Context()); err != nil || s.State != Unprovisioned {
		t.Fatalf("Status gives %+v, %v", s, err)
	}
	if _, err := h.UnsealListKey(t.Context()); !errors.Is(err, ErrNotProvisioned) {
		t.Fatal(err)
	}
	if err := h.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	works(t, h)
	before := h.Timings()
	ct, _ := h.WrapKeys(make([]byte, 64))
	began := time.Now()
	if _, err := h.UnwrapKeys(t.Context(), ct); err != nil {
		t.Fatal(err)
	}
	t.Log("one UnwrapKeys: ", time.Since(began))
	for name, v := range h.Timings() {
		if n := v.Count - before[name].Count; n > 0 {
			t.Log(name, n, v.Last)
		}
	}
	h.Close()
	again := open(t, e.Socket, dir)
	works(t, again)
	if err := again.Provision(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func TestOtherState(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	works(t, h)
	ct, err := h.WrapKeys(make([]byte, 64))
	if err != nil {
		t.Fatal(err)
	}
	e.extend(5) // none of ours
	works(t, h)
	e.extend(7)
	check := func(err error) {
		t.Helper()
		var p *PolicyError
		if !errors.Is(err, ErrPolicy) || !errors.As(err, &p) || !slices.Equal(p.Differing, []uint{7}) {
			t.Fatalf("after PCR 7 was extended: %v", err)
		}
	}
	_, err = h.UnwrapKeys(t.Context(), ct)
	check(err)
	_, err = h.UnsealListKey(t.Context())
	check(err)
	s, err := h.Status(t.Context())
	if err != nil || s.State != NotApproved || !slices.Equal(s.Differing, []uint{7}) {
		t.Fatalf("Status gives %+v, %v", s, err)
	}
	e.Stop()
	if _, err := h.UnsealListKey(t.Context()); !errors.Is(err, ErrAbsent) {
		t.Fatalf("without a TPM: %v", err)
	}
	if s, err := h.Status(t.Context()); err != nil || s.State != Absent {
		t.Fatalf("Status gives %+v, %v", s, err)
	}
	e.Start() // its PCRs are at their first values again
	works(t, h)
}

// A warm start asks the TPM for no more than this, even where the connection
// has to be made first: one RSA decryption, its session and its policy, and the
// key. A resource manager does without GetCapability.
func TestCommandsOfAWarmStart(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	ct := wrapped(t, h)
	unwrap := func() {
		t.Helper()
		if _, err := h.UnwrapKeys(t.Context(), ct); err != nil {
			t.Fatal(err)
		}
	}
	unwrap()
	for _, c := range []struct {
		connection string
		most       map[string]int
	}{
		{"new", map[string]int{
			"GetCapability": 2, "StartAuthSession": 2, "Load": 1, "PolicyPCR": 1, "PolicyNV": 1, "PolicyAuthorize": 1, "RSA_Decrypt": 1, "FlushContext": 1,
		}},
		{"kept", map[string]int{
			"StartAuthSession": 1, "Load": 1, "PolicyPCR": 1, "PolicyNV": 1, "PolicyAuthorize": 1, "RSA_Decrypt": 1, "FlushContext": 1,
		}},
	} {
		if c.connection == "new" {
			do(t.Context(), h, func(c *client) (struct{}, error) { c.hangUp(); return struct{}{}, nil })
		}
		before := h.Timings()
		unwrap()
		for name, v := range h.Timings() {
			if n := v.Count - before[name].Count; n > c.most[name] {
				t.Errorf("on a %s connection: %d times %s, at most %d", c.connection, n, name, c.most[name])
			}
		}
	}
}
