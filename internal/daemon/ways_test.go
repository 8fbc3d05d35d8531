package daemon

import (
	"bytes"
	"os"
	"testing"

	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/imagefile"
	"virt-trust/internal/vtpm/reason"
)

// Where label and state are both wrong, the way of the one is not barred by the
// other: a backup that is older than what the list holds, in a VM whose image
// came back without its label and whose kept state is gone too.
func TestWaysThatMeet(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, versions := h.ran(uuidA)
	h.put(uuidA, versions[0])
	if err := imagefile.RemoveLabel(h.image(uuidA), func([]byte) bool { return true }); err != nil {
		t.Fatal(err)
	}
	os.Remove(h.g.keepDir(uuidA) + "/" + keptState)
	refuses(t, h.prepare(f), reason.LabelMissing)
	_, err := h.g.Repair(background, off(f), f)
	refuses(t, err, reason.VTPMMissing)
	refuses(t, h.prepare(f), reason.VTPMRolledBack)
	testkit.Must[string](t)(h.g.Accept(background, off(f), f))
	h.start(f)
	h.stop(f)
	h.belongs(f)
}

// A VM whose first run a crash has ended has its vTPM in the journal alone:
// nothing but --new gives that up.
func TestAdoptAfterACrashedFirstRun(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f := h.vm(uuidA, false)
	h.write(uuidA, h.start(f))
	h.noted(uuidA)
	written := h.read(uuidA)
	h.reboot()
	os.Remove(h.state(uuidA))
	testkit.Must[any](t)(h.g.List(background))
	_, err := h.g.Adopt(background, off(f), f, false)
	refuses(t, err, reason.VTPMMissing)
	refuses(t, h.prepare(f), reason.VTPMMissing)
	testkit.Must[string](t)(h.g.Repair(background, off(f), f))
	h.start(f)
	if !bytes.Equal(h.read(uuidA), written) {
		t.Error("what came back is not what was written")
	}
}
