package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"virt-trust/internal/testkit"
)

func TestDecisions(t *testing.T) {
	path := filepath.Join(t.TempDir(), "decisions.jsonl")
	open := func() *decisions {
		t.Helper()
		return testkit.Must[*decisions](t)(openDecisions(path))
	}
	d := open()
	for i := range 3 {
		d.add(Decision{Operation: fmt.Sprint("before ", i)})
	}
	d.Close()

	// Power goes while a line is written: it alone is lost.
	b := testkit.Must[[]byte](t)(os.ReadFile(path))
	os.WriteFile(path, b[:len(b)-10], 0o600)
	d = open()
	d.add(Decision{Operation: "after"})
	d.Close()
	d = open()
	got := ""
	for _, e := range d.recent(0) {
		got += e.Operation + ";"
	}
	if got != "before 0;before 1;after;" {
		t.Errorf("%q", got)
	}

	// It neither grows without end nor forgets the newest.
	what := strings.Repeat("x", 900)
	for i := range 3000 {
		d.add(Decision{Operation: fmt.Sprint(i), What: what})
	}
	d.Close()
	for _, p := range []string{path, path + ".1"} {
		if st, err := os.Stat(p); err != nil || st.Size() > maxDecisionsFile+2000 {
			t.Errorf("%s: %v, %v", p, st, err)
		}
	}
	d = open()
	defer d.Close()
	all := d.recent(0)
	if len(all) != maxDecisions || all[len(all)-1].Operation != "2999" || all[0].Operation != "2000" {
		t.Errorf("%d, from %s to %s", len(all), all[0].Operation, all[len(all)-1].Operation)
	}
	if last := d.recent(1); len(last) != 1 || last[0].Operation != "2999" {
		t.Error(last)
	}
}
