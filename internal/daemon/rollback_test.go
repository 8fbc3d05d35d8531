package daemon

import (
	"context"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/hosttpm"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statefile"
)

// snapshot copies what lies on the host's disk, and gives what puts it back, or
// of it what is below some folders.
func (h *house) snapshot() (putBack func(folders ...string)) {
	h.t.Helper()
	copied := h.t.TempDir()
	for _, d := range []string{"state", "swtpm", "images"} {
		if err := os.CopyFS(filepath.Join(copied, d), os.DirFS(filepath.Join(h.root, d))); err != nil {
			h.t.Fatal(err)
		}
	}
	return func(folders ...string) {
		h.t.Helper()
		if len(folders) == 0 {
			folders = []string{"state", "swtpm", "images"}
		}
		for _, d := range folders {
			os.RemoveAll(filepath.Join(h.root, d))
			if err := os.CopyFS(filepath.Join(h.root, d), os.DirFS(filepath.Join(copied, d))); err != nil {
				h.t.Fatal(err)
			}
		}
	}
}

// cutPower ends virt-trustd and the boot with it; change is done while the host
// is off.
func (h *house) cutPower(change func()) {
	h.t.Helper()
	h.g.Close()
	os.Remove(filepath.Join(h.root, "run", "list-generation"))
	change()
	h.boot()
}

func (h *house) raised() {
	h.t.Helper()
	if err := h.g.raise(context.Background(), h.g.peek(), false); err != nil {
		h.t.Fatal(err)
	}
}

// An older /var/lib, all of it, is genuine and belongs together: the counter
// alone tells.
func TestOlderVarLib(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	older := h.snapshot()
	key := h.start(f)
	h.write(uuidA, key)
	h.noted(uuidA)
	h.stop(f)
	h.raised()
	newer := h.snapshot()

	h.cutPower(func() { older() })
	h.untouched(func() {
		refuses(t, h.prepare(f), reason.ListRolledBack)
		_, err := h.g.Accept(background, off(f), f)
		refuses(t, err, reason.ListRolledBack)
		_, err = h.g.Check(background, f)
		refuses(t, err, reason.ListRolledBack)
	})
	// What is put right starts.
	h.cutPower(func() { newer() })
	h.start(f)
	h.stop(f)
	h.raised()

	// What was restored on purpose starts on the admin's word.
	h.cutPower(func() { older() })
	refuses(t, h.prepare(f), reason.ListRolledBack)
	_, err := h.g.RepairList(background) // which would take every state there is
	refuses(t, err, reason.ListRolledBack)
	testkit.Must[string](t)(h.g.AcceptList(background))
	h.start(f)
	h.decrypts(uuidA, key)
	h.stop(f)
	h.belongs(f)
	if _, err := h.g.AcceptList(background); reason.As(err) == nil {
		t.Error("a list that is the newest was accepted")
	}
	// And the one of before is the older now.
	h.raised()
	h.cutPower(func() { newer() })
	refuses(t, h.prepare(f), reason.ListRolledBack)
}

// Of a restored list, VMs that have a newer state stay refused, each with its
// own way back.
func TestOlderListNewerState(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	b := h.vm(uuidB, true)
	h.start(b)
	h.stop(b)
	older := h.snapshot()
	key := h.start(f)
	h.write(uuidA, key)
	h.noted(uuidA)
	h.stop(f)
	h.raised()
	h.cutPower(func() { older("state") })
	refuses(t, h.prepare(f), reason.ListRolledBack)
	testkit.Must[string](t)(h.g.AcceptList(background))
	h.start(b)
	refuses(t, h.prepare(f), reason.VTPMRolledBack)
	testkit.Must[string](t)(h.g.Accept(background, off(f), f))
	h.start(f)
	h.decrypts(uuidA, key)
}

// What a VM writes while it runs cannot be taken back by a power cut, once it
// was raised: neither alone nor together with the journal.
func TestOlderStateOfARunningVM(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	key := h.start(f)
	h.raised()
	older := h.snapshot() // as a snapshot of the running host's disk is
	h.write(uuidA, key)
	h.noted(uuidA)
	later := h.snapshot()
	h.write(uuidA, key)
	h.noted(uuidA)
	if !h.g.hasNotes(h.g.peek()) {
		t.Fatal("nothing to take into the list")
	}
	h.raised()
	if h.g.hasNotes(h.g.peek()) || h.g.peek().Exposed() {
		t.Fatal("raised, and not in the list")
	}
	newest := h.snapshot()
	for i, putBack := range []func(...string){older, later} {
		h.cutPower(func() { putBack() })
		if err := h.prepare(f); reason.As(err) == nil || reason.As(err).Code != reason.ListRolledBack {
			t.Errorf("all of it, %d: %v", i, err)
		}
		h.cutPower(func() {
			putBack()
			// The list alone is the newest.
			list := filepath.Join(h.root, "state", "vtpm-list")
			newest("state")
			b := testkit.Must[[]byte](t)(os.ReadFile(list))
			putBack()
			if err := os.WriteFile(list, b, 0o600); err != nil {
				t.Fatal(err)
			}
		})
		if err := h.prepare(f); reason.As(err) == nil || reason.As(err).Code != reason.VTPMRolledBack {
			t.Errorf("state and journal, %d: %v", i, err)
		}
	}
	h.cutPower(func() { newest() })
	h.start(f)
	h.decrypts(uuidA, key)
	h.stop(f)
	h.belongs(f)
}

// The counter is raised by itself, once for many commits, and what fails is
// tried again.
func TestKeepRaised(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.reboot(func(c *config.Config) { c.Rollback.Window = config.Duration(200 * time.Millisecond) })
	ctx, cancel := context.WithCancel(background)
	done := make(chan struct{})
	go func() { defer close(done); h.g.keepRaised(ctx) }()
	wait := func(what string, is func() bool) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal(what)
			}
		}
	}
	began := time.Now()
	f, _, _ := h.ran(uuidA)
	store := h.g.peek()
	wait("never raised", func() bool { return !store.Exposed() })
	if n, most := h.tpm.counter(), 3+uint64(time.Since(began)/(200*time.Millisecond)); n > most {
		t.Errorf("%d raises for three short runs, in the time of %d", n, most)
	}
	key := h.start(f)
	wait("never raised", func() bool { return !store.Exposed() })
	before := h.tpm.counter()
	h.write(uuidA, key)
	h.noted(uuidA)
	wait("the write never came into the list", func() bool { return !h.g.hasNotes(store) && !store.Exposed() })
	if n := h.tpm.counter(); n != before+1 {
		t.Errorf("%d raises for one write", n-before)
	}
	h.stop(f)
	h.g.settleCounter(background)
	if store.Exposed() {
		t.Error("exposed at the end")
	}
	cancel()
	<-done
}

// holding makes a state that holds something of its own.
func (h *house) holding(key []byte, what byte) []byte {
	h.t.Helper()
	plain := plainState(h.t)
	plain[len(plain)-1] = what
	iv := make([]byte, 32)
	rand.Read(iv)
	return testkit.Must[[]byte](h.t)(statefile.Encrypt(plain, key, iv))
}

// A power cut lets no older state in, however old it is and whatever became of
// the journal.
func TestVeryOldState(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, key, _ := h.ran(uuidA)
	var states [][]byte
	for i := range list.MaxHistory + 4 {
		h.start(f)
		h.put(uuidA, h.holding(key, byte(i)))
		h.noted(uuidA)
		h.stop(f)
		states = append(states, h.read(uuidA))
	}
	h.start(f)
	newest := h.holding(key, 200)
	h.put(uuidA, h.holding(key, 199))
	h.noted(uuidA)
	first := testkit.Must[[]byte](t)(h.g.kept(uuidA, keptJournal))
	older := h.read(uuidA)
	h.put(uuidA, newest)
	h.noted(uuidA)
	h.raised()
	h.cutPower(func() {
		h.put(uuidA, older)
		h.g.keep(uuidA, keptJournal, first)
	})
	refuses(t, h.prepare(f), reason.VTPMRolledBack)
	for _, i := range []int{0, len(states) - 1} {
		h.cutPower(func() {
			h.put(uuidA, states[i])
			h.g.dropJournal(uuidA)
		})
		h.untouched(func() { refuses(t, h.prepare(f), reason.VTPMRolledBack) })
	}
	// One that was written in the last instant is taken.
	h.cutPower(func() { h.put(uuidA, h.holding(key, 201)) })
	h.start(f)
	h.stop(f)
	// Nor does one that is put there while the VM runs become the newest.
	h.start(f)
	h.put(uuidA, h.holding(key, 202))
	h.noted(uuidA)
	h.put(uuidA, states[0])
	h.stop(f)
	refuses(t, h.prepare(f), reason.VTPMRolledBack)
	testkit.Must[string](t)(h.g.Accept(background, off(f), f))
	h.start(f)
	h.stop(f)
	h.belongs(f)
}

func TestRevertedImages(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, key, _ := h.ran(uuidA)
	reverts := func() uint32 {
		t.Helper()
		h.raised()
		return h.g.peek().Get(uuidA).Reverts
	}
	save := func(what byte) {
		t.Helper()
		h.put(uuidA, h.holding(key, what))
		h.noted(uuidA)
		h.stop(f)
		if err := h.g.saved(uuidA); err != nil {
			t.Fatal(err)
		}
		if s := h.g.peek().Get(uuidA).State; s != list.Suspended {
			t.Fatal(s)
		}
	}
	restore := func(what byte) {
		t.Helper()
		h.g.Restoring(f)
		h.start(f)
		h.put(uuidA, h.holding(key, what)) // QEMU gives swtpm what the image holds
		h.noted(uuidA)
	}
	h.start(f)
	for _, what := range []byte{7, 8, 7} { // as a guest may
		h.put(uuidA, h.holding(key, what))
		h.noted(uuidA)
	}
	save(1)
	restore(1)
	if n := reverts(); n != 0 {
		t.Errorf("the image of the last stop: %d", n)
	}
	save(2)
	restore(1) // an older file
	if n := reverts(); n != 1 {
		t.Errorf("an older image: %d", n)
	}
	h.stop(f)
	restore(3) // whatever it holds: the VM was not saved
	if n := reverts(); n != 2 {
		t.Errorf("an image, and the VM had been shut down: %d", n)
	}
	h.stop(f)
	restore(1) // both
	h.put(uuidA, h.holding(key, 4))
	h.noted(uuidA)
	if n := reverts(); n != 3 {
		t.Errorf("an older image, and the VM had been shut down: %d", n)
	}
	h.stop(f)
	h.start(f)
	save(5)
	h.g.Restoring(f) // faster than libvirt's word of the save
	if err := h.g.peek().Commit(liststore.Change{Put: func() *list.Record {
		r := h.g.peek().Get(uuidA).Clone()
		r.State = list.Stored
		return r
	}()}); err != nil {
		t.Fatal(err)
	}
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	if err := h.g.saved(uuidA); err != nil {
		t.Fatal(err)
	}
	h.keys(uuidA)
	if err := h.g.Launched(f); err != nil {
		t.Fatal(err)
	}
	if n := reverts(); n != 3 {
		t.Errorf("a fast restore: %d", n)
	}
	h.stop(f)
	h.belongs(f)
	if n := strings.Count(h.logged(), string(journal.Reverted)); n != 3 {
		t.Errorf("%d events", n)
	}

	h.reboot(func(c *config.Config) { c.Policy.Restore = "refuse" })
	h.g.Restoring(f)
	refuses(t, h.prepare(f), reason.PolicyForbids)
	h.start(f)
	save(6)
	h.g.Restoring(f)
	h.start(f)
	h.put(uuidA, h.holding(key, 1))
	h.stop(f)
	refuses(t, h.prepare(f), reason.VTPMRolledBack)
}

// An older copy of the image has an older label.
func TestOlderLabel(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"repair", "accept"} {
		h := newHouse(t)
		f, key, _ := h.ran(uuidA)
		older := testkit.Must[[]byte](t)(os.ReadFile(h.image(uuidA)))
		testkit.Must[string](t)(h.g.Adopt(background, off(f), f, false)) // gives it a new one
		os.WriteFile(h.image(uuidA), older, 0o600)
		h.untouched(func() { refuses(t, h.prepare(f), reason.VTPMRolledBack) })
		if way == "repair" {
			testkit.Must[string](t)(h.g.Repair(background, off(f), f))
		} else {
			testkit.Must[string](t)(h.g.Accept(background, off(f), f))
		}
		h.start(f)
		h.decrypts(uuidA, key)
		h.stop(f)
		h.belongs(f)
		os.WriteFile(h.image(uuidA), older, 0o600)
		refuses(t, h.prepare(f), reason.VTPMRolledBack)
	}
}

// Without a window every change is counted before it is done.
func TestNoWindow(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	none := func(c *config.Config) { c.Rollback.Window = 0 }
	h.reboot(none)
	f, key, _ := h.ran(uuidA)
	h.start(f)
	if h.g.peek().Exposed() {
		t.Error("exposed after a start")
	}
	started := h.snapshot()
	h.tpm.say(hosttpm.ErrBusy)
	refuses(t, h.g.Stopped(background, f, false), reason.TPMBusy)
	h.tpm.say(nil)
	h.stop(f)
	h.raised() // what was refused is done all the same
	if h.g.peek().Exposed() {
		t.Error("exposed after a stop")
	}
	newest := h.snapshot()
	h.cutPower(func() { started() })
	refuses(t, h.prepare(f), reason.ListRolledBack)
	h.cutPower(func() { newest() })
	h.start(f)
	h.decrypts(uuidA, key)
}
