package agent

import (
	cryptorand "crypto/rand"
	"testing"
	"time"

	"virt-trust/internal/verifier/fleet"
)

var randReader = cryptorand.Reader

// From a host's TPM and a join token to rounds.
func TestEnrolAndRounds(t *testing.T) {
	m := newMachine(t, "a")
	v := newVerifier(t)
	a := newTestAgent(t, m, "")
	st, err := a.Enrol(t.Context(), v.url(), EnrolOptions{Token: v.token("", time.Hour)})
	if err != nil || st.State != Active || st.Name != "host-a" {
		t.Fatal(st, err)
	}
	n := v.node(st.Node)
	if n.State != fleet.Active || n.EKTrust != "manufacturer" || n.Serial == "" || n.ApprovedBy != "operator" {
		t.Errorf("%+v", n)
	}
	goes(t, a, "three rounds", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.asked >= 3
	})
	s, err := v.store.RoundState(t.Context(), st.Node)
	if err != nil || s.Round == 0 {
		t.Errorf("%+v, %v", s, err)
	}
	r, err := v.store.Result(t.Context(), st.Node)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", r)
}
