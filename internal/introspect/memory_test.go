package introspect

import (
	"testing"
	"time"
)

func TestEqual(t *testing.T) {
	c := config(t)
	m := memory(t, c)
	begin := time.Now()
	if err := m.Calibrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("learned in %v", time.Since(begin))
	v := start(t, c, t.TempDir())
	equal(t, m, v)
	active, err := allocation(v.tpm)
	if err != nil {
		t.Fatal(err)
	}
	for pcr := range 17 {
		if err := extendAll(v.tpm, pcr, active); err != nil {
			t.Fatal(err)
		}
		equal(t, m, v)
	}
}
