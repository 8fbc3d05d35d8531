package verifier

import (
	"crypto/rand"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/appraise"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/store/storetest"
)

// A node whose rounds all fail does not fill the disk with its evidence.
func TestEvidenceIsBounded(t *testing.T) {
	db := openStore(t, storetest.SQLite(t))
	n := fleet.Node{ID: "n", Name: "loud", State: fleet.Active, EKDigest: "ek", AKName: []byte("ak"), Enrolled: time.Now()}
	if err := db.Do(t.Context(), func(tx *store.Tx) error { return tx.PutNode(t.Context(), n) }); err != nil {
		t.Fatal(err)
	}
	evidence := make([]byte, 512<<10)
	for range 4 {
		nonce := []byte(rand.Text())
		rand.Read(evidence)
		now := time.Now()
		if _, err := db.IssueNonce(t.Context(), n.ID, nonce, now.Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		bad := &appraise.Result{Node: n.ID, Received: now, Expires: now.Add(time.Minute), Host: appraise.Appraisal{Tier: appraise.Contraindicated}}
		if _, err := db.CompleteRound(t.Context(), store.Completion{Node: n.ID, Nonce: nonce, Result: bad, Evidence: evidence}); err != nil {
			t.Fatal(err)
		}
	}
	cfg := config.DefaultVerifier()
	cfg.Retention.EvidenceMiB = 1
	v := &verifier{store: db}
	if err := v.retain(t.Context(), Options{Config: cfg, Log: logrus.NewEntry(logrus.New())}); err != nil {
		t.Fatal(err)
	}
	if s, err := db.Stats(t.Context()); err != nil || s.EvidenceBytes > 1<<20 || s.Evidence == 0 {
		t.Errorf("%+v %v", s, err)
	}
}
