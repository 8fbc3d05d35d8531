package daemon

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/bus"
	"virt-trust/internal/domain"
	"virt-trust/internal/domain/emulator"
	"virt-trust/internal/domain/libvirt"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/reason"
)

const qemu = "qemu-system-x86_64"

// underOurs makes a VM name virt-trust's emulator, and gives the digest of the
// QEMU behind it.
func underOurs(t *testing.T, f *domain.Facts) []byte {
	t.Helper()
	testkit.Need(t, qemu)
	f.Emulator = filepath.Join(emulator.Dir, qemu)
	d := sha256.Sum256(testkit.Must[[]byte](t)(os.ReadFile(emulator.Real(qemu))))
	return d[:]
}

func TestEmulatorGrants(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	digest := underOurs(t, f)
	redeem := func(uuid string, digest []byte, c *caller) error { return h.g.RedeemEmulator(uuid, digest, c) }
	no := func(err error) { t.Helper(); refuses(t, err, reason.PolicyForbids) }
	yes := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	inScope := func(scope string) *caller { return &caller{cgroup: scope} }

	no(redeem(uuidA, digest, libvirts())) // by hand
	no(redeem("", nil, libvirts()))
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	no(redeem(uuidA, digest, libvirts())) // before swtpm
	h.mkdir(uuidA)
	h.keys(uuidA)
	if err := h.g.Launched(f); err != nil {
		t.Fatal(err)
	}
	no(redeem(uuidB, digest, libvirts())) // another VM
	no(redeem(uuidA, digest, inScope("0::/user.slice\n")))
	r := refuses(t, redeem(uuidA, make([]byte, 32), libvirts()), reason.LauncherNotApproved)
	if !strings.Contains(r.What, strings.Repeat("0", 64)) || !strings.Contains(r.What, fmt.Sprintf("%x", digest)) || !strings.Contains(r.What, qemu) {
		t.Errorf("it does not name the file and both digests: %s", r.What)
	}
	refuses(t, redeem(uuidA, nil, libvirts()), reason.LauncherNotApproved)
	yes(redeem(uuidA, digest, libvirts()))
	no(redeem(uuidA, digest, libvirts())) // twice
	h.stop(f)

	// In the cgroups that libvirt makes; late; after the VM's end.
	for _, scope := range []string{"0::/machine.slice/machine-qemu\\x2d1\\x2dvm.scope/libvirt\n", "1:cpu:/\n0::/machine/qemu-1-vm.libvirt-qemu\n"} {
		h.start(f)
		yes(redeem(uuidA, digest, inScope(scope)))
		h.stop(f)
	}
	h.start(f)
	h.later(time.Duration(h.g.cfg.Grant.Lifetime) + time.Second)
	no(redeem(uuidA, digest, libvirts()))
	h.stop(f)
	h.start(f)
	h.stop(f)
	no(redeem(uuidA, digest, libvirts()))

	// A grant is for the start that it was opened for.
	h.start(f)
	h.stop(f)
	f.Emulator = emulator.Real(qemu)
	h.start(f)
	no(redeem(uuidA, digest, libvirts()))
	h.stop(f)

	// What is behind an emulator that there is not.
	f.Emulator = emulator.Dir + "/qemu-system-nothing"
	h.untouched(func() { refuses(t, h.prepare(f), reason.LauncherNotApproved) })
	_, err := h.g.Check(background, f)
	refuses(t, err, reason.LauncherNotApproved)

	// A released VM is plain libvirt's.
	underOurs(t, f)
	if _, err := h.g.Release(background, off(f), f); err != nil {
		t.Fatal(err)
	}
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	if r, err := h.g.Redeem("swtpm", h.dir(uuidA), libvirts()); err != nil || r.State != nil {
		t.Errorf("%+v, %v", r, err)
	}
	yes(h.g.Launched(f))
	yes(redeem(uuidA, make([]byte, 32), libvirts()))
}

func TestEmulatorPolicy(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	f.Emulator = "/usr/bin/" + qemu
	if err := h.prepare(f); err != nil {
		t.Errorf("the real QEMU, which nobody forbids: %v", err)
	}
	h.stop(f)

	h.reboot(func(c *config.Config) { c.Emulator.Require = true })
	h.untouched(func() {
		if r := refuses(t, h.prepare(f), reason.PolicyForbids); !strings.Contains(r.Mend, "virt-trust emulator adopt vm-a") {
			t.Error(r.Mend)
		}
	})
	_, err := h.g.Check(background, f)
	refuses(t, err, reason.PolicyForbids)
	ours := *f
	digest := underOurs(t, &ours)
	h.start(&ours)
	if err := h.g.RedeemEmulator(uuidA, digest, libvirts()); err != nil {
		t.Error(err)
	}
	h.stop(&ours)

	// Audit mode only says so.
	h.reboot(func(c *config.Config) { c.Emulator.Require, c.Mode = true, "audit" })
	h.start(f)
	if err := h.g.RedeemEmulator(uuidA, nil, libvirts()); err != nil {
		t.Error(err)
	}
	h.stop(f)
	if log := h.logged(); strings.Count(log, "would-refuse") < 2 {
		t.Errorf("it says nothing:\n%s", log)
	}
}

// definitions is libvirt as far as its domains' XML goes.
type definitions struct {
	xml, saved string
	full       error // of a saved image
}

func (l *definitions) Redefine(_ context.Context, _ string, edit func([]byte, bool) ([]byte, error)) (definition, saved bool, err error) {
	change := func(xml *string, image bool) (bool, error) {
		now, err := edit([]byte(*xml), image)
		changed := err == nil && string(now) != *xml
		if changed && image && l.full != nil {
			return false, l.full
		}
		if changed {
			*xml = string(now)
		}
		return changed, err
	}
	if definition, err = change(&l.xml, false); err == nil && l.saved != "" {
		saved, err = change(&l.saved, true)
	}
	return definition, saved, err
}

func TestAdoptEmulator(t *testing.T) {
	t.Parallel()
	testkit.Need(t, qemu)
	h := newHouse(t)
	with := func(path, tpm string) string {
		return "<domain type='kvm'>\n  <name>vm-a</name><uuid>" + uuidA + "</uuid>\n<metadata><x:y xmlns:x='z'/></metadata><devices><emulator>" + path + "</emulator>" + tpm + "</devices><!-- more -->\n</domain>\n"
	}
	const tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
	ours := filepath.Join(emulator.Dir, qemu)
	d := libvirt.Domain{UUID: uuidA, Name: "vm-a", Persistent: true}
	adopt := func(l *definitions) (string, error) { return h.g.AdoptEmulator(background, l, d) }
	restore := func(l *definitions) (string, error) { return h.g.RestoreEmulator(background, l, d) }
	ok := func(what string, err error) string {
		t.Helper()
		if err != nil || what == "" {
			t.Errorf("%q, %v", what, err)
		}
		return what
	}

	// There and back, exactly, also by another name of the same program; also
	// with a virt-trustd between that has begun anew.
	link := filepath.Join(h.root, "my-qemu")
	if err := os.Symlink("/usr/bin/"+qemu, link); err != nil {
		t.Fatal(err)
	}
	for _, was := range []string{"/usr/bin/" + qemu, "/usr/bin/../bin/" + qemu, link} {
		l := &definitions{xml: with(was, tpm), saved: with("/usr/bin/"+qemu, tpm)}
		before := *l
		ok(adopt(l))
		if l.xml != with(ours, tpm) || l.saved != with(ours, tpm) {
			t.Errorf("adopted: %+v", l)
		}
		if what := ok(adopt(l)); !strings.Contains(what, "already") {
			t.Errorf("again: %s", what)
		}
		h.reboot()
		ok(restore(l))
		if l.xml != before.xml {
			t.Errorf("restored: %s", l.xml)
		}
		if what := ok(restore(l)); !strings.Contains(what, "not virt-trust's") {
			t.Errorf("again: %s", what)
		}
		if all := testkit.Must[map[string]string](t)(h.g.readEmulators()); len(all) != 0 {
			t.Errorf("remembered: %v", all)
		}
	}

	// Cut off between the two, it goes on.
	l := &definitions{xml: with(link, tpm), saved: with(link, tpm), full: errors.New("no room")}
	if _, err := adopt(l); !errors.Is(err, l.full) {
		t.Error(err)
	}
	if l.full = nil; l.xml != with(ours, tpm) {
		t.Errorf("%+v", l)
	}
	ok(adopt(l))
	if l.saved != with(ours, tpm) {
		t.Errorf("%+v", l)
	}
	l.full = errors.New("no room")
	if _, err := restore(l); !errors.Is(err, l.full) {
		t.Error(err)
	}
	l.full = nil
	ok(restore(l))
	if l.xml != with(link, tpm) || l.saved != with(link, tpm) {
		t.Errorf("%+v", l)
	}

	// Named by hand, or remembered by nobody.
	l = &definitions{xml: with(ours, tpm)}
	ok(restore(l))
	if l.xml != with("/usr/bin/"+qemu, tpm) {
		t.Errorf("%+v", l)
	}

	script := filepath.Join(h.root, "script")
	os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755)
	for _, xml := range []string{with("/usr/bin/"+qemu, ""), with("/bin/true", tpm), with("/nowhere", tpm), with(script, tpm)} {
		l := &definitions{xml: xml}
		_, err := adopt(l)
		if r := reason.As(err); r == nil || r.Code != reason.PolicyForbids || l.xml != xml {
			t.Errorf("%v: %s", err, l.xml)
		}
	}
	d.Persistent = false
	for _, do := range []func(*definitions) (string, error){adopt, restore} {
		_, err := do(&definitions{xml: with("/usr/bin/"+qemu, tpm)})
		refuses(t, err, reason.PolicyForbids)
	}

	// A file that cannot be read keeps a VM from being changed.
	d.Persistent = true
	os.WriteFile(h.g.emulatorsFile(), []byte("{"), 0o600)
	l = &definitions{xml: with("/usr/bin/"+qemu, tpm)}
	if _, err := adopt(l); err == nil || l.xml != with("/usr/bin/"+qemu, tpm) {
		t.Errorf("%v: %+v", err, l)
	}
}

func TestEmulatorCallers(t *testing.T) {
	t.Parallel()
	testkit.Root(t) // who can be others
	o := openOffice(t)
	f, _, _ := o.ran(uuidA)
	underOurs(t, f)
	o.start(f)
	redeem := []string{o.address, "RedeemGrant", emulator.Program, uuidA}
	for name, got := range map[string]string{
		"not the emulator":  o.as(0, "call", append([]string{"wrapper"}, redeem...)...),
		"not QEMU's user":   o.as(65534, "call", append([]string{"emulator"}, redeem...)...),
		"no VM":             o.as(0, "call", append([]string{"emulator"}, append(redeem[:3:3], "x")...)...),
		"not libvirt's":     o.as(0, "call", append([]string{"emulator"}, redeem...)...), // of another cgroup
		"swtpm's keys":      o.as(0, "call", "emulator", o.address, "RedeemGrant", "swtpm", o.dir(uuidA)),
		"another's program": o.as(0, "call", "emulator", o.address, "RedeemGrant", "cat", ""),
	} {
		if !strings.HasPrefix(got, bus.ErrorRefused+" [policy-forbids: ") {
			t.Errorf("%s: %s", name, got)
		}
	}
	o.g.mu.Lock()
	own := &caller{pid: os.Getpid()}
	err := own.readProc()
	o.g.emulators[uuidA].cgroup = own.cgroup
	o.g.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if got := o.as(0, "call", append([]string{"emulator"}, redeem...)...); got != "pass" {
		t.Errorf("the emulator: %s", got)
	}
	for _, m := range []string{"AdoptEmulator", "RestoreEmulator"} {
		if got := o.as(65534, "call", "other", o.address, m, uuidA); !strings.HasPrefix(got, bus.ErrorAccessDenied) {
			t.Errorf("%s by nobody: %s", m, got)
		}
	}
}
