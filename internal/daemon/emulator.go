package daemon

import (
	"context"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/domain"
	"virt-trust/internal/domain/emulator"
	"virt-trust/internal/domain/libvirt"
	"virt-trust/internal/launcher/measure"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/lifecycle"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
)

// emulatorGrant lets a VM's QEMU start under virt-trust's emulator, once. It is
// opened at prepare and good from start on, between which swtpm starts.
type emulatorGrant struct {
	measured *measure.File // what may run; nil: of a released VM, anything
	cgroup   string        // of libvirt
	expires  time.Time
	good     bool
}

// checkEmulator holds what a VM names as its emulator against the policy. A
// released VM is not asked.
func (g *Guard) checkEmulator(st *start) error {
	_, ours := emulator.Ours(st.f.Emulator)
	if ours || !g.cfg.Emulator.Require || st.d.Plan == lifecycle.Pass {
		return nil
	}
	return reason.Refuse(reason.PolicyForbids, fmt.Sprintf("run 'virt-trust emulator adopt %s'", st.f.Name),
		"the VM's emulator is %.200q, and emulator.require asks for virt-trust's", st.f.Emulator)
}

// openEmulator opens a grant for a VM that names virt-trust's emulator.
func (g *Guard) openEmulator(st *start, cgroup string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.emulators, st.f.UUID)
	if _, ours := emulator.Ours(st.f.Emulator); !ours {
		return
	}
	gr := &emulatorGrant{cgroup: cgroup, expires: g.now().Add(g.grantLifetime())}
	for _, l := range st.runs {
		if l.Role == measure.Emulator {
			gr.measured = &l.File
		}
	}
	g.emulators[st.f.UUID] = gr
}

// readyEmulator makes a VM's grant good: swtpm runs, and QEMU comes next.
func (g *Guard) readyEmulator(uuid string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if gr := g.emulators[uuid]; gr != nil {
		gr.good = true
	}
}

func (g *Guard) closeEmulator(uuid string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.emulators, uuid)
}

// RedeemEmulator tells virt-trust's emulator whether it may become the QEMU that
// has this SHA-256 digest. In audit mode it always may.
func (g *Guard) RedeemEmulator(uuid string, digest []byte, c *caller) error {
	r := g.redeemEmulator(uuid, digest, c)
	if r == nil {
		return nil
	}
	if g.cfg.Mode == "audit" {
		g.report(uuid, "", "redeem", wouldRefuse, r.Code, r.Text(), journal.WouldRefuse)
		return nil
	}
	return r
}

func (g *Guard) redeemEmulator(uuid string, digest []byte, c *caller) *reason.Refusal {
	const again = "start the VM again"
	g.mu.Lock()
	defer g.mu.Unlock()
	gr := g.emulators[uuid]
	switch {
	case gr == nil || !gr.good:
		return reason.Refuse(reason.PolicyForbids, "start the VM with libvirt", "no start of this VM is under way in which its emulator would come next")
	case g.now().After(gr.expires):
		return reason.Refuse(reason.PolicyForbids, again, "the grant for this start has expired")
	case c.cgroup != gr.cgroup && !machineScope(c.cgroup):
		return reason.Refuse(reason.PolicyForbids, "start the VM with libvirt", "the emulator was not called by libvirt")
	case gr.measured != nil && string(gr.measured.SHA256[:]) != string(digest):
		return reason.Refuse(reason.LauncherNotApproved, again, "%s has the SHA-256 digest %.64s; measured for this start was %x",
			gr.measured.Path, hex.EncodeToString(digest), gr.measured.SHA256)
	}
	delete(g.emulators, uuid)
	return nil
}

// machineScope reports whether libvirt has made a cgroup for a VM, as it does
// where it may: /machine.slice/machine-qemu\x2d… with systemd, else
// /machine/qemu-….
func machineScope(cgroup string) bool {
	return strings.Contains(cgroup, `:/machine.slice/machine-qemu\x2d`) || strings.Contains(cgroup, ":/machine/qemu-")
}

// --- which emulator a VM names ---

// emulatorsFile remembers, by UUID, what a VM named before.
func (g *Guard) emulatorsFile() string { return filepath.Join(g.dirs.State, "emulators.json") }

func (g *Guard) readEmulators() (map[string]string, error) {
	b, err := os.ReadFile(g.emulatorsFile())
	if errors.Is(err, fs.ErrNotExist) {
		return map[string]string{}, nil
	}
	all := map[string]string{}
	if err == nil {
		err = json.Unmarshal(b, &all)
	}
	if err != nil {
		return nil, fmt.Errorf("reading which emulators VMs had: %w", err)
	}
	return all, nil
}

// remember notes what a VM named, "" for nothing any more.
func (g *Guard) remember(uuid, path string) error {
	all, err := g.readEmulators()
	if err != nil {
		return err
	}
	if all[uuid] == path {
		return nil
	}
	all[uuid] = path
	if path == "" {
		delete(all, uuid)
	}
	b, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	return liststore.WriteFile(g.emulatorsFile(), append(b, '\n'), 0o600)
}

// definer is what is asked of libvirt here.
type definer interface {
	Redefine(ctx context.Context, uuid string, edit func(xml []byte, saved bool) ([]byte, error)) (definition, saved bool, err error)
}

// standIn gives virt-trust's emulator for the one at path.
func standIn(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", reason.Refuse(reason.PolicyForbids, "correct its domain XML", "the VM's emulator %.200q cannot be found", path)
	}
	for _, name := range emulator.Names() {
		target, err := filepath.EvalSymlinks(emulator.Real(name))
		if err != nil || target != real {
			continue
		}
		f, err := elf.Open(real)
		if err != nil {
			break
		}
		f.Close()
		return filepath.Join(emulator.Dir, name), nil
	}
	return "", reason.Refuse(reason.PolicyForbids, "see virt-trust-wrapper(8)", "virt-trust has nothing that stands before the emulator %.200q", path)
}

var errTransient = reason.Refuse(reason.PolicyForbids, "change the XML that it is made from", "the VM is transient: libvirt keeps no definition of it")

// AdoptEmulator makes a VM's definition, and its managed save image, name
// virt-trust's emulator. What it named before is remembered first.
func (g *Guard) AdoptEmulator(ctx context.Context, l definer, d libvirt.Domain) (string, error) {
	g.adopting.Lock()
	defer g.adopting.Unlock()
	if !d.Persistent {
		return "", errTransient
	}
	definition, saved, err := l.Redefine(ctx, d.UUID, func(xml []byte, saved bool) ([]byte, error) {
		f, err := domain.Parse(xml)
		if err != nil {
			return nil, err
		}
		if _, ours := emulator.Ours(f.Emulator); ours {
			return xml, nil
		}
		if f.TPM == nil {
			return nil, reason.Refuse(reason.PolicyForbids, "", "the VM has no vTPM, and its emulator nothing to ask virt-trustd for")
		}
		to, err := standIn(f.Emulator)
		if err != nil {
			return nil, err
		}
		out, was, err := emulator.Replace(xml, to)
		if err == nil && !saved {
			err = g.remember(d.UUID, was)
		}
		return out, err
	})
	switch {
	case err != nil:
		return "", err
	case !definition && !saved:
		return "its emulator is virt-trust's already", nil
	}
	what := "its emulator is virt-trust's"
	if d.Active {
		what += " from its next start on"
	}
	g.report(d.UUID, d.Name, "adopt-emulator", noted, "", what, "")
	return what, nil
}

// RestoreEmulator makes a VM name the emulator that it named before.
func (g *Guard) RestoreEmulator(ctx context.Context, l definer, d libvirt.Domain) (string, error) {
	g.adopting.Lock()
	defer g.adopting.Unlock()
	if !d.Persistent {
		return "", errTransient
	}
	all, err := g.readEmulators()
	if err != nil {
		return "", err
	}
	to := all[d.UUID]
	definition, saved, err := l.Redefine(ctx, d.UUID, func(xml []byte, _ bool) ([]byte, error) {
		f, err := domain.Parse(xml)
		if err != nil {
			return nil, err
		}
		name, ours := emulator.Ours(f.Emulator)
		if !ours {
			return xml, nil
		}
		if to == "" { // put there by hand
			to = emulator.Real(name)
		}
		out, _, err := emulator.Replace(xml, to)
		return out, err
	})
	if err == nil {
		err = g.remember(d.UUID, "")
	}
	switch {
	case err != nil:
		return "", err
	case !definition && !saved:
		return "its emulator is not virt-trust's", nil
	}
	what := "its emulator is " + to + " again"
	if d.Active {
		what += " from its next start on"
	}
	g.report(d.UUID, d.Name, "restore-emulator", noted, "", what, "")
	return what, nil
}

func (s *Service) redeemEmulator(options dict, sender dbus.Sender) *dbus.Error {
	return s.serve(sender, "RedeemGrant", emulatorOnly, redeemDeadline, func(_ context.Context, c *caller) error {
		uuid := option[string](options, "uuid")
		err := s.g.RedeemEmulator(uuid, option[[]byte](options, "sha256"), c)
		if err != nil {
			if !domain.IsUUID(uuid) {
				uuid = ""
			}
			s.deny(uuid, emulator.Program, "redeem", err)
		}
		return err
	})
}

// emulatorMethods are those of org.virttrust1.Manager about emulators.
func (s *Service) emulatorMethods() map[string]any {
	return map[string]any{
		"Emulators":       s.emulators,
		"AdoptEmulator":   s.emulatorVerb("AdoptEmulator", s.g.AdoptEmulator),
		"RestoreEmulator": s.emulatorVerb("RestoreEmulator", s.g.RestoreEmulator),
	}
}

func (s *Service) emulators(_ dict, sender dbus.Sender) ([]dict, *dbus.Error) {
	all := []dict{}
	return all, s.serve(sender, "Emulators", reader, adminDeadline, func(ctx context.Context, _ *caller) error {
		c, err := s.dial(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		list, err := c.List(ctx)
		if err != nil {
			return err
		}
		remembered, err := s.g.readEmulators()
		if err != nil {
			return err
		}
		for _, d := range list {
			xml, err := c.Definition(ctx, d.UUID)
			if errors.Is(err, libvirt.ErrNoDomain) {
				continue
			}
			if err != nil {
				return err
			}
			f, err := domain.Parse([]byte(xml))
			if err != nil {
				s.log.WithField(journal.VM, d.UUID).WithError(err).Warn("a VM's emulator cannot be told")
				continue
			}
			e := strs("uuid", d.UUID, "name", d.Name, "emulator", f.Emulator, "runs", "")
			if now, err := domain.Parse([]byte(d.XML)); err == nil && d.Active {
				e["runs"] = dbus.MakeVariant(now.Emulator)
			}
			// One that was not restored to the end counts, too.
			_, ours := emulator.Ours(f.Emulator)
			for k, v := range map[string]bool{"adopted": ours || remembered[d.UUID] != "", "vtpm": f.TPM != nil, "persistent": d.Persistent} {
				e[k] = dbus.MakeVariant(v)
			}
			all = append(all, e)
		}
		return nil
	})
}

// emulatorVerb makes a method that changes one VM's definition.
func (s *Service) emulatorVerb(method string, body func(context.Context, definer, libvirt.Domain) (string, error)) any {
	return func(vm string, options dict, sender dbus.Sender) (dict, *dbus.Error) {
		result := dict{}
		return result, s.serve(sender, method, polkitAction, adminDeadline, func(ctx context.Context, _ *caller) error {
			c, err := s.dial(ctx)
			if err != nil {
				return err
			}
			defer c.Close()
			d, err := c.Lookup(ctx, vm)
			if err != nil {
				return err
			}
			what, err := body(ctx, c, d)
			maps.Copy(result, strs("uuid", d.UUID, "name", d.Name, "what", what))
			s.deny(d.UUID, d.Name, strings.ToLower(method), err)
			return err
		})
	}
}

// dial connects to libvirt.
func (s *Service) dial(ctx context.Context) (*libvirt.Client, error) {
	socket, _, err := libvirt.Socket(s.g.cfg.Libvirt.Socket)
	if err != nil {
		return nil, err
	}
	return libvirt.Dial(ctx, socket)
}
