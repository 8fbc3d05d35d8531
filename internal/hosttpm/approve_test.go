package hosttpm

import (
	"crypto/ecdsa"
	"errors"
	"slices"
	"testing"

	"virt-trust/internal/platform/secret"
)

// scalar is the policy key, as someone who keeps it elsewhere has it.
func scalar(t testing.TB, h *Host) []byte {
	t.Helper()
	var out []byte
	err := h.withPolicyKey(t.Context(), func(_ *client, _ *keySet, key *ecdsa.PrivateKey) (err error) {
		out, err = key.Bytes()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// A policy key from elsewhere approves the state that the host is in, which is
// not approved yet. Another key does nothing.
func TestApproveWith(t *testing.T) {
	t.Parallel()
	e, dir, other := startMade(t)
	h := open(t, e.Socket, dir)
	key := scalar(t, h)
	foreign := open(t, e.Socket, other)
	wrong := scalar(t, foreign)
	foreign.Close()
	e.extend(4)
	now, err := h.PCRs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := h.ApproveWith(t.Context(), wrong, "", now); err == nil {
		t.Error("another host's policy key approves a state")
	}
	if err := h.ApproveWith(t.Context(), key, "recovered", now, now); err != nil {
		t.Fatal(err)
	}
	secret.Wipe(key)
	works(t, h)
	h.Close()
	h = open(t, e.Socket, dir)
	works(t, h)
	s, err := h.States(t.Context())
	if err != nil || s.Match == nil || s.Match.Note != "recovered" || len(s.Approved) != 2 {
		t.Fatalf("States gives %+v, %v", s, err)
	}
	if s.Match.ID() != now.ID() || !slices.Equal(s.Now.Indexes(), testPCRs) {
		t.Errorf("the state is %s with PCRs %v", s.Match.ID(), s.Now.Indexes())
	}
	e.extend(9)
	s, err = h.States(t.Context())
	if err != nil || s.Match != nil || s.Nearest == nil || s.Nearest.Note != "recovered" {
		t.Fatalf("in another state, States gives %+v, %v", s, err)
	}
	if err := h.Approve(t.Context(), "", now); !errors.Is(err, ErrPolicy) {
		t.Errorf("a state that is not approved approves: %v", err)
	}
}
