package daemon

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"virt-trust/internal/hosttpm"
	"virt-trust/internal/recovery"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/imagefile"
	"virt-trust/internal/vtpm/label"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
)

func quietly(string) {}

// withRecovery gives a house a recovery key.
func (h *house) withRecovery() *recovery.Key {
	h.t.Helper()
	k := testkit.Must[*recovery.Key](h.t)(recovery.NewKey())
	testkit.Must[string](h.t)(h.g.SetRecovery(background, k.Recipient(), quietly))
	return k
}

// otherTPM gives the host another TPM, and starts virt-trustd anew.
func (h *house) otherTPM() {
	h.t.Helper()
	h.tpm.say(hosttpm.ErrCleared)
	h.reboot()
}

// toRecovery reports whether a VM's label in its image has its keys for a key.
func (h *house) toRecovery(uuid string, k *recovery.Key) bool {
	h.t.Helper()
	l := testkit.Must[*label.Label](h.t)(label.UntrustedParse(testkit.Must[[]byte](h.t)(imagefile.ReadLabel(h.image(uuid)))))
	_, here := l.Recipient(h.tpm.BindKeyName())
	_, recovery := l.Recipient(k.Recipient().LabelName())
	if !here {
		h.t.Error("the label is not for this host")
	}
	return recovery
}

func TestSetRecovery(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	if h.g.recoveryState() != "none" || len(h.g.unwrapped()) != 1 {
		t.Error("a host without a recovery key says otherwise")
	}
	if h.g.remind(); !strings.Contains(h.logged(), "no recovery key") {
		t.Error("nothing reminds of it")
	}
	k := h.withRecovery()
	if !h.toRecovery(uuidA, k) {
		t.Error("the label has no part for the recovery key")
	}
	fb := h.vm(uuidB, false)
	h.start(fb) // new since
	h.stop(fb)
	if !h.toRecovery(uuidB, k) || len(h.g.unwrapped()) != 0 {
		t.Error("a new VM's keys are not wrapped")
	}
	h.start(f)
	h.stop(f)
	h.belongs(f)

	// Only who has the key can confirm it.
	refuses(t, second(h.g.ConfirmRecovery(make([]byte, 32))), reason.KeyNotReleased)
	h.reboot()
	testkit.Must[any](t)(h.g.List(background))
	if h.g.recoveryState() != "unconfirmed" {
		t.Error("confirmed by a wrong answer")
	}
	testkit.Must[string](t)(h.g.ConfirmRecovery(testkit.Must[[]byte](t)(k.Unwrap(h.g.recovery.Load().Test))))
	if h.g.recoveryState() != "confirmed" {
		t.Error("not confirmed")
	}

	// Another key takes its place everywhere.
	other := h.withRecovery()
	if h.toRecovery(uuidA, k) || !h.toRecovery(uuidA, other) || h.g.recoveryState() != "unconfirmed" {
		t.Error("the old key goes on")
	}
	refuses(t, second(h.g.Recover(background, k, quietly)), reason.KeyNotReleased)
	h.start(f)
	h.stop(f)
	h.belongs(f)
}

// Nothing is wrapped to a recovery key that someone has put in the file's place.
func TestRecoveryFileExchanged(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	k := h.withRecovery()
	mine := testkit.Must[[]byte](t)(os.ReadFile(h.g.recoveryPath()))
	theirs := testkit.Must[*recovery.Key](t)(recovery.NewKey())
	forged := bytes.ReplaceAll(mine, []byte(k.Recipient().String()), []byte(theirs.Recipient().String()))
	// The key id too, so that the host's own secrets seem to be others.
	forged = bytes.Replace(forged, []byte(`"list_key_id": "`), []byte(`"list_key_id": "00`), 1)
	if err := os.WriteFile(h.g.recoveryPath(), forged, 0o600); err != nil {
		t.Fatal(err)
	}
	h.reboot()
	testkit.Must[any](t)(h.g.List(background))
	if err := h.g.keepRecovery(background); err != nil {
		t.Fatal(err)
	}
	h.start(f)
	h.stop(f)
	h.start(h.vm(uuidB, false))
	if h.toRecovery(uuidA, theirs) {
		t.Error("a label is wrapped to the forger's key")
	}
	for _, r := range h.g.peek().All() {
		if r.RecoveryTo == theirs.Recipient().String() {
			t.Errorf("%s is wrapped to the forger's key", r.Name)
		}
	}
	if b := testkit.Must[[]byte](t)(os.ReadFile(h.g.recoveryPath())); !bytes.Equal(b, forged) || h.g.recoveryState() != "altered" {
		t.Errorf("the forged file: %s\n%s", h.g.recoveryState(), b)
	}
	if h.g.remind(); !strings.Contains(h.logged(), "does not name the recovery key") {
		t.Error("nothing says so")
	}
	// Who has the real key puts it right.
	testkit.Must[string](t)(h.g.Recover(background, k, quietly))
	if h.g.recoveryState() == "altered" || !h.toRecovery(uuidA, k) {
		t.Error("not put right: " + h.g.recoveryState())
	}
}

// A damaged recovery.json keeps no VM from starting, and is made known.
func TestRecoveryFileDamaged(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	h.withRecovery()
	for _, b := range []string{"", "{", `{"version":2}`, `{"version":1,"recipient":"age1"}`} {
		if err := os.WriteFile(h.g.recoveryPath(), []byte(b), 0o600); err != nil {
			t.Fatal(err)
		}
		h.reboot()
		h.start(f)
		h.stop(f)
		if h.g.recoveryState() != "altered" || !strings.Contains(h.logged(), "cannot be read") {
			t.Errorf("%q: %s", b, h.g.recoveryState())
		}
	}
	h.withRecovery()
	if h.g.recoveryState() != "unconfirmed" {
		t.Error(h.g.recoveryState())
	}
}

func second[T any](_ T, err error) error { return err }

// A VM that runs gets its label when it stops.
func TestSetRecoveryWhileRunning(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	key := h.start(f)
	k := h.withRecovery()
	h.write(uuidA, key)
	h.noted(uuidA)
	h.stop(f)
	if !h.toRecovery(uuidA, k) {
		t.Error("the label has no part for the recovery key")
	}
	h.belongs(f)
	h.otherTPM()
	testkit.Must[string](t)(h.g.Recover(background, k, quietly))
	h.start(f)
	h.stop(f)
	h.decrypts(uuidA, key)
}

// An older host's records have no recovery keys, and an image whose header is
// small has no room for them.
func TestSetRecoverySmallClusters(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f := h.vm(uuidA, true)
	if out, err := exec.Command("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-o", "cluster_size=2048", "-F", "raw", "-b", "/"+strings.Repeat("b", 500), h.image(uuidA), "1M").CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	key := h.start(f)
	h.stop(f)
	k := h.withRecovery()
	if h.toRecovery(uuidA, k) {
		t.Error("2 KiB have room for it?")
	}
	h.start(f)
	h.stop(f)
	h.otherTPM()
	testkit.Must[string](t)(h.g.Recover(background, k, quietly))
	if h.toRecovery(uuidA, k) {
		t.Error("2 KiB have room for it?")
	}
	h.start(f)
	h.stop(f)
	h.decrypts(uuidA, key)
}

// Each thing that can happen to a host, and one VM that was in the list before
// the recovery key was made, one after.
func TestRecover(t *testing.T) {
	t.Parallel()
	for what, happens := range map[string]func(*house){
		"other state":            func(h *house) { h.tpm.say(hosttpm.ErrPolicy); h.reboot() },
		"other TPM":              (*house).otherTPM,
		"list lost":              func(h *house) { os.Remove(liststore.Path(h.g.dirs.State)); h.reboot() },
		"list damaged":           func(h *house) { os.WriteFile(liststore.Path(h.g.dirs.State), []byte("VTRLIST\n"), 0o600); h.reboot() },
		"list lost, other TPM":   func(h *house) { os.Remove(liststore.Path(h.g.dirs.State)); h.otherTPM() },
		"list lost, other state": func(h *house) { os.Remove(liststore.Path(h.g.dirs.State)); h.tpm.say(hosttpm.ErrPolicy); h.reboot() },
		"other keys beside the list": func(h *house) {
			h.tpm.become(newFakeTPM())
			h.reboot()
		},
		"nothing": (*house).reboot0,
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			fa, keyA, _ := h.ran(uuidA)
			k := h.withRecovery()
			fb, keyB, _ := h.ran(uuidB)
			before := h.tpm.PolicyKeyName()
			happens(h)
			if what != "nothing" {
				if reason.As(h.prepare(fa)) == nil {
					t.Fatal("nothing happened")
				}
				wrong := testkit.Must[*recovery.Key](t)(recovery.NewKey())
				refuses(t, second(h.g.Recover(background, wrong, quietly)), reason.KeyNotReleased)
			}
			var said []string
			testkit.Must[string](t)(h.g.Recover(background, k, func(s string) { said = append(said, s) }))
			t.Log(said)
			h.start(fa)
			h.stop(fa)
			h.start(fb)
			h.stop(fb)
			h.decrypts(uuidA, keyA)
			h.decrypts(uuidB, keyB)
			if !h.toRecovery(uuidA, k) || !h.toRecovery(uuidB, k) || len(h.g.unwrapped()) != 0 {
				t.Error("the next recovery would fail")
			}
			if f := h.g.recovery.Load(); f.PolicyKey != hexName(h.tpm.PolicyKeyName()) {
				t.Error("the policy key that is wrapped is not the one in use")
			} else if bytes.Equal(before, h.tpm.PolicyKeyName()) == (strings.Contains(what, "TPM") || strings.Contains(what, "keys")) {
				t.Error("policy key")
			}
			// And once more, from the start.
			h.otherTPM()
			testkit.Must[string](t)(h.g.Recover(background, k, quietly))
			h.start(fa)
			h.stop(fa)
			h.decrypts(uuidA, keyA)
		})
	}
}

func (h *house) reboot0() { h.reboot() }

// A VM whose keys nothing has is named, and the others come back.
func TestRecoverWithoutOne(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	fa, _, _ := h.ran(uuidA)
	k := h.withRecovery()
	fb, keyB, _ := h.ran(uuidB)
	r := h.g.peek().Get(uuidA).Clone()
	r.RecoveryKeys, r.RecoveryTo = nil, ""
	if err := h.g.peek().Commit(liststore.Change{Put: r}); err != nil {
		t.Fatal(err)
	}
	os.Remove(h.g.keepDir(uuidA) + "/" + keptLabel)
	if err := imagefile.RemoveLabel(h.image(uuidA), func([]byte) bool { return true }); err != nil {
		t.Fatal(err)
	}
	h.otherTPM()
	ref := refuses(t, second(h.g.Recover(background, k, quietly)), reason.KeyNotReleased)
	if !strings.Contains(ref.What, "vm-a") || strings.Contains(ref.What, "vm-b") {
		t.Error(ref)
	}
	h.start(fb)
	h.stop(fb)
	h.decrypts(uuidB, keyB)
	if h.prepare(fa) == nil {
		t.Error("a VM without keys starts")
	}
}

// A recovery that is cut off after any VM goes on from there.
func TestRecoverCutOff(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	fa, keyA, _ := h.ran(uuidA)
	fb, keyB, _ := h.ran(uuidB)
	k := h.withRecovery()
	h.otherTPM()
	err := second(h.g.Recover(background, k, func(s string) {
		if strings.HasSuffix(s, "brought back") {
			h.tpm.say(hosttpm.ErrBusy)
		}
	}))
	if err == nil {
		t.Fatal("not cut off")
	}
	h.tpm.say(nil)
	h.reboot()
	testkit.Must[string](t)(h.g.Recover(background, k, quietly))
	h.start(fa)
	h.stop(fa)
	h.start(fb)
	h.stop(fb)
	h.decrypts(uuidA, keyA)
	h.decrypts(uuidB, keyB)
}

// A recovery that is cut off between the new keys and the new counter is one
// that the next goes on from, without another word of the admin's.
func TestRecoverCutOffBeforeTheCount(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, key, _ := h.ran(uuidA)
	k := h.withRecovery()
	for range 3 {
		h.start(f)
		h.stop(f)
		h.g.settleCounter(background)
	}
	h.otherTPM()
	cut := func() (err error) {
		defer func() { err, _ = recover().(error) }()
		return second(h.g.Recover(background, k, func(s string) {
			if strings.Contains(s, "has not counted") {
				panic(errors.New(s))
			}
		}))
	}()
	if cut == nil {
		t.Fatal("not cut off")
	}
	h.reboot()
	refuses(t, h.prepare(f), reason.ListRolledBack)
	testkit.Must[string](t)(h.g.Recover(background, k, quietly))
	h.start(f)
	h.stop(f)
	h.decrypts(uuidA, key)
}

// Without a recovery key nothing is made anew over what could come back.
func TestNoRecoveryKey(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	h.otherTPM()
	k := testkit.Must[*recovery.Key](t)(recovery.NewKey())
	h.untouched(func() {
		ref := refuses(t, h.prepare(f), reason.KeyNotReleased)
		if !strings.Contains(ref.Mend, "there is no recovery key") {
			t.Error(ref)
		}
		refuses(t, second(h.g.Recover(background, k, quietly)), reason.KeyNotReleased)
	})
}

// With its image and vTPM a VM comes to another host by the recovery key of the
// first.
func TestRecoverVM(t *testing.T) {
	t.Parallel()
	from, to := newHouse(t), newHouse(t)
	to.tpm.become(newFakeTPM())
	f, key, _ := from.ran(uuidA)
	k := from.withRecovery()
	there := to.facts(uuidA)
	to.mkdir(uuidA)
	copyFile(t, from.image(uuidA), to.image(uuidA))
	copyFile(t, from.state(uuidA), to.state(uuidA))
	testkit.Must[any](t)(to.g.List(background))
	refuses(t, to.prepare(there), reason.LabelOtherHost)
	other := testkit.Must[*recovery.Key](t)(recovery.NewKey())
	refuses(t, second(to.g.RecoverVM(background, off(f), there, other)), reason.KeyNotReleased)
	testkit.Must[string](t)(to.g.RecoverVM(background, off(f), there, k))
	to.start(there)
	to.stop(there)
	to.decrypts(uuidA, key)
	refuses(t, second(to.g.RecoverVM(background, off(f), there, k)), reason.PolicyForbids)
}

func TestKeysLostBesideAList(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.ran(uuidA)
	refuses(t, h.g.keysLost(), reason.KeyNotReleased)
	os.Remove(liststore.Path(h.g.dirs.State))
	if err := h.g.keysLost(); err != nil {
		t.Error(err)
	}
}

func FuzzParseRecovery(f *testing.F) {
	h := newHouse(f)
	testkit.Must[any](f)(h.g.List(background))
	h.withRecovery()
	f.Add(testkit.Must[[]byte](f)(os.ReadFile(h.g.recoveryPath())))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := parseRecovery(b); err == nil && r.to.String() == "" {
			t.Fatal(r)
		}
	})
}

// backup gives a VM's vTPM as an admin with the key k has it.
func (h *house) backup(uuid string, k *recovery.Key, running bool) *recovery.Backup {
	h.t.Helper()
	f := h.facts(uuid)
	d := off(f)
	d.Active = running
	sealed := testkit.Must[[]byte](h.t)(h.g.Backup(background, d, f, []string{k.Recipient().String()}))
	archive := testkit.Must[[]byte](h.t)(recovery.Unseal(bytes.NewReader(sealed), []byte(k.Text())))
	return testkit.Must[*recovery.Backup](h.t)(recovery.ParseBackup(archive))
}

func TestBackupRestore(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, key, _ := h.ran(uuidA)
	k := testkit.Must[*recovery.Key](t)(recovery.NewKey())
	b := h.backup(uuidA, k, false)
	if !bytes.Equal(b.State, plainState(t)) || b.Running || b.UUID != uuidA {
		t.Fatalf("%+v", b)
	}
	if what := testkit.Must[string](t)(h.g.Restore(background, off(f), f, b, false)); what != "the VM has this vTPM" {
		t.Error(what)
	}
	// Written since.
	h.start(f)
	h.write(uuidA, key)
	h.noted(uuidA)
	running := h.backup(uuidA, k, true)
	if !running.Running || !bytes.Equal(running.State, plainState(t)) || running.Baseline == b.Baseline {
		t.Errorf("%+v", running)
	}
	on := off(f)
	on.Active = true
	refuses(t, second(h.g.Restore(background, on, f, b, true)), reason.PolicyForbids)
	h.stop(f)
	h.untouched(func() {
		refuses(t, second(h.g.Restore(background, off(f), f, b, false)), reason.VTPMRolledBack)
	})
	testkit.Must[string](t)(h.g.Restore(background, off(f), f, b, true))
	if aside, _ := filepath.Glob(filepath.Join(h.g.dirs.State, "set-aside", uuidA+".*")); len(aside) != 1 {
		t.Errorf("set aside: %v", aside)
	}
	h.start(f)
	h.stop(f)
	h.decrypts(uuidA, key)
	h.belongs(f)

	// Its vTPM is lost.
	b = h.backup(uuidA, k, false)
	os.RemoveAll(h.dir(uuidA))
	os.Remove(h.g.keepDir(uuidA) + "/" + keptState)
	refuses(t, h.prepare(f), reason.VTPMMissing)
	testkit.Must[string](t)(h.g.Restore(background, off(f), f, b, false))
	h.start(f)
	h.stop(f)
	h.decrypts(uuidA, key)

	// Another VM's, and other kinds.
	fb := h.vm(uuidB, false)
	refuses(t, second(h.g.Restore(background, off(fb), fb, b, true)), reason.PolicyForbids)
	bad := *b
	bad.State = []byte("x")
	refuses(t, second(h.g.Restore(background, off(f), f, &bad, true)), reason.VTPMChanged)
	bad = *b
	bad.File = "tpm-00.permall"
	refuses(t, second(h.g.Restore(background, off(f), f, &bad, true)), reason.VTPMChanged)
	bad = *b
	bad.Encrypted = true
	refuses(t, second(h.g.Restore(background, off(f), f, &bad, true)), reason.PolicyForbids)
	saved := off(f)
	saved.ManagedSave = true
	refuses(t, second(h.g.Restore(background, saved, f, b, true)), reason.PolicyForbids)
}

// On a host that has nothing of the VM but its definition.
func TestRestoreElsewhere(t *testing.T) {
	t.Parallel()
	from, to := newHouse(t), newHouse(t)
	to.tpm.become(newFakeTPM())
	from.ran(uuidA)
	k := testkit.Must[*recovery.Key](t)(recovery.NewKey())
	b := from.backup(uuidA, k, false)
	f := to.vm(uuidA, false)
	copyFile(t, from.image(uuidA), to.image(uuidA))
	testkit.Must[string](t)(to.g.Restore(background, off(f), f, b, false))
	key := to.start(f)
	to.stop(f)
	to.decrypts(uuidA, key)
	to.belongs(f)
}

// What would not start is no backup.
func TestBackupRefused(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, versions := h.ran(uuidA)
	to := []string{testkit.Must[*recovery.Key](t)(recovery.NewKey()).Recipient().String()}
	if _, err := h.g.Backup(background, off(f), f, []string{"age1x"}); err == nil {
		t.Error("a recipient that is none")
	}
	h.put(uuidA, versions[0])
	refuses(t, second(h.g.Backup(background, off(f), f, to)), reason.VTPMRolledBack)
	fb := h.vm(uuidB, true)
	refuses(t, second(h.g.Backup(background, off(fb), fb, to)), reason.VTPMUnknown)
}

// A record that is changed leaves the one before as it was.
func TestRecordKeepsRecovery(t *testing.T) {
	r := &list.Record{UUID: uuidA, RecoveryKeys: []byte{1}, RecoveryTo: "age1"}
	c := r.Clone()
	c.RecoveryKeys[0] = 2
	if r.RecoveryKeys[0] != 1 {
		t.Error("a clone shares its bytes")
	}
}
