package daemon

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/launcher/measure"
	"virt-trust/internal/launcher/refvalues"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
)

// What admins say of launchers, and what they see of the launch log.

// changeValues has change make the next generation of the Reference Values, and
// anchors it in the vTPM list, so that an older file is not taken for it.
func (g *Guard) changeValues(ctx context.Context, what string, change func(*refvalues.Set) error) error {
	store, err := g.List(ctx)
	if err != nil {
		return err
	}
	generation, err := g.nextValues(store, change)
	if err != nil {
		return err
	}
	g.report("", "", "launcher", allow, "", what, journal.LauncherChanged)
	return g.anchorValues(store, generation)
}

func (g *Guard) nextValues(store *liststore.Store, change func(*refvalues.Set) error) (uint64, error) {
	g.launch.mu.Lock()
	defer g.launch.mu.Unlock()
	if err := g.readValues(store); err != nil {
		return 0, err
	}
	next := g.launch.values.Next()
	if err := change(next); err != nil {
		return 0, err
	}
	return next.Generation, g.writeValues(next)
}

func (g *Guard) anchorValues(store *liststore.Store, generation uint64) error {
	for _, r := range store.All() {
		err := func() error {
			defer g.lock(r.UUID)()
			now := store.Get(r.UUID)
			if now == nil || now.Launchers >= generation {
				return nil
			}
			n := now.Clone()
			n.Launchers = generation
			return store.Commit(liststore.Change{Put: n})
		}()
		if err != nil {
			return fmt.Errorf("noting the Reference Values in the vTPM list: %w", err)
		}
	}
	return nil
}

// measureOne measures a file that an admin names.
func (g *Guard) measureOne(path string) (refvalues.Found, error) {
	if !filepath.IsAbs(path) || len(path) > refvalues.MaxPath {
		return refvalues.Found{}, fmt.Errorf("%.100q is no absolute path", path)
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return refvalues.Found{}, err
	}
	files, err := g.launch.measurer.Measure([]measure.Target{{Path: real}})
	if err != nil {
		return refvalues.Found{}, err
	}
	return refvalues.Found{Path: real, Digest: files[0].SHA256}, nil
}

// ApproveLauncher is the admin's word for a file as it is now. expected is its
// digest, if the admin names one.
func (g *Guard) ApproveLauncher(ctx context.Context, path, expected string) (refvalues.Found, error) {
	f, err := g.measureOne(path)
	if err != nil {
		return f, err
	}
	if expected != "" && !strings.EqualFold(expected, f.Digest.String()) {
		return f, reason.Refuse(reason.LauncherNotApproved, "look at the file", "%s has the SHA-256 digest %s, and not the one that was named", f.Path, f.Digest)
	}
	return f, g.changeValues(ctx, "approved: "+f.Path+" "+f.Digest.String(), func(s *refvalues.Set) error { return s.Approve(f, g.unix()) })
}

// RevokeLauncher is the admin's word against a digest, or a file's.
func (g *Guard) RevokeLauncher(ctx context.Context, what string) (f refvalues.Found, err error) {
	if f.Digest, err = refvalues.ParseDigest(what); err != nil {
		if f, err = g.measureOne(what); err != nil {
			return f, err
		}
	}
	return f, g.changeValues(ctx, strings.TrimSpace("revoked: "+f.Path+" "+f.Digest.String()), func(s *refvalues.Set) error { return s.Revoke(f.Digest, f.Path, g.unix()) })
}

// ImportLaunchers takes a manifest that one of the configured keys signed.
func (g *Guard) ImportLaunchers(ctx context.Context, manifest, signature []byte) (*refvalues.SignedManifest, error) {
	if !g.launchPolicy().Manifest {
		return nil, reason.Refuse(reason.PolicyForbids, `add "manifest" to launcher.policy in virt-trustd.toml`, "manifests do not count here")
	}
	b, err := os.ReadFile(g.cfg.Launcher.ManifestKeys)
	if err != nil {
		return nil, reason.Refuse(reason.PolicyForbids, "put the public key of whoever signs manifests there", "there is no key to verify manifests with: %s", err)
	}
	keys, err := refvalues.ParseKeys(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", g.cfg.Launcher.ManifestKeys, err)
	}
	m, err := refvalues.VerifyManifest(manifest, signature, keys)
	if errors.Is(err, refvalues.ErrSignature) {
		return nil, reason.Refuse(reason.PolicyForbids, "have it signed anew, over the bytes that the file has now", "the manifest is not signed by a key in %s", g.cfg.Launcher.ManifestKeys)
	}
	if err != nil {
		return nil, err
	}
	what := fmt.Sprintf("manifest %s, serial %d: %d approved, %d revoked", m.Name, m.Serial, len(m.Launchers), len(m.Revoked))
	err = g.changeValues(ctx, what, func(s *refvalues.Set) error { return s.Import(m, g.unix()) })
	if errors.Is(err, refvalues.ErrOlder) {
		return nil, reason.Refuse(reason.PolicyForbids, "give it a higher serial", "%s", err)
	}
	return m, err
}

// ResetLaunchers begins the Reference Values anew, above every generation that
// is known. What was revoked is forgotten too: an admin's word.
func (g *Guard) ResetLaunchers(ctx context.Context) error {
	store, err := g.List(ctx)
	if err != nil {
		return err
	}
	next := &refvalues.Set{Generation: 1}
	for _, r := range store.All() {
		next.Generation = max(next.Generation, r.Launchers+1)
	}
	g.launch.mu.Lock()
	if g.launch.values != nil {
		next.Generation = max(next.Generation, g.launch.values.Generation+1)
	}
	err = g.writeValues(next)
	g.launch.mu.Unlock()
	if err != nil {
		return err
	}
	g.report("", "", "launcher", allow, "", "the Reference Values for launchers begin anew", journal.LauncherChanged)
	return g.anchorValues(store, next.Generation)
}

// Launchers gives the Reference Values.
func (g *Guard) Launchers(ctx context.Context) ([]refvalues.Value, error) {
	store, err := g.List(ctx)
	if err != nil {
		return nil, err
	}
	g.launch.mu.Lock()
	defer g.launch.mu.Unlock()
	if err := g.readValues(store); err != nil {
		return nil, err
	}
	return g.launch.values.Values, nil
}

// launchLogState says how the launch log stands, as far as is known.
func (g *Guard) launchLogState() (state, problem string) {
	g.launch.mu.Lock()
	defer g.launch.mu.Unlock()
	return string(g.launch.log.standing), g.launch.log.problem
}

// --- on the bus ---

func (s *Service) launchers(options dict, sender dbus.Sender) ([]dict, *dbus.Error) {
	all := []dict{}
	derr := s.serve(sender, "Launchers", reader, adminDeadline, func(ctx context.Context, c *caller) error {
		values, err := s.g.Launchers(ctx)
		for _, v := range values {
			d := strs("sha256", v.Digest.String(), "path", v.Path, "source", string(v.Source), "state", string(v.State), "detail", v.Detail)
			d["time"] = dbus.MakeVariant(uint64(v.Time) * 1e6)
			all = append(all, d)
		}
		return err
	})
	return all, derr
}

// changeLaunchers serves what org.virttrust1.launcher allows.
func (s *Service) changeLaunchers(sender dbus.Sender, body func(context.Context) (dict, error)) (dict, *dbus.Error) {
	result := dict{}
	return result, s.serve(sender, "Launcher", polkitAction, adminDeadline, func(ctx context.Context, c *caller) error {
		d, err := body(ctx)
		maps.Copy(result, d)
		return err
	})
}

func (s *Service) approveLauncher(path string, options dict, sender dbus.Sender) (dict, *dbus.Error) {
	return s.changeLaunchers(sender, func(ctx context.Context) (dict, error) {
		f, err := s.g.ApproveLauncher(ctx, path, option[string](options, "sha256"))
		return strs("path", f.Path, "sha256", f.Digest.String()), err
	})
}

func (s *Service) revokeLauncher(what string, options dict, sender dbus.Sender) (dict, *dbus.Error) {
	return s.changeLaunchers(sender, func(ctx context.Context) (dict, error) {
		f, err := s.g.RevokeLauncher(ctx, what)
		return strs("path", f.Path, "sha256", f.Digest.String()), err
	})
}

func (s *Service) importLaunchers(manifest, signature []byte, options dict, sender dbus.Sender) (dict, *dbus.Error) {
	return s.changeLaunchers(sender, func(ctx context.Context) (dict, error) {
		m, err := s.g.ImportLaunchers(ctx, manifest, signature)
		if err != nil {
			return nil, err
		}
		d := strs("name", m.Name)
		d["serial"], d["approved"], d["revoked"] = dbus.MakeVariant(m.Serial), dbus.MakeVariant(uint32(len(m.Launchers))), dbus.MakeVariant(uint32(len(m.Revoked)))
		return d, nil
	})
}

func (s *Service) resetLaunchers(options dict, sender dbus.Sender) (dict, *dbus.Error) {
	return s.changeLaunchers(sender, func(ctx context.Context) (dict, error) { return nil, s.g.ResetLaunchers(ctx) })
}

// launchLog gives the launch log by pieces. At the first the TPM is asked.
func (s *Service) launchLog(offset uint64, options dict, sender dbus.Sender) (piece []byte, result dict, derr *dbus.Error) {
	piece, result = []byte{}, dict{}
	derr = s.serve(sender, "LaunchLog", reader, adminDeadline, func(ctx context.Context, c *caller) error {
		if offset == 0 {
			pcr, size, err := s.g.checkLaunchLog(ctx)
			if err != nil {
				return err
			}
			values := map[string]string{}
			for bank, v := range pcr.Values {
				values[bank] = hex.EncodeToString(v)
			}
			state, problem := s.g.launchLogState()
			maps.Copy(result, strs("state", state, "problem", problem))
			result["pcr"], result["size"] = dbus.MakeVariant(uint32(s.g.cfg.Launcher.PCR)), dbus.MakeVariant(uint64(size))
			result["values"], result["reset-count"] = dbus.MakeVariant(values), dbus.MakeVariant(pcr.ResetCount)
		}
		b, err := s.g.readLaunchLog(offset)
		piece = append(piece, b...)
		return err
	})
	return piece, result, derr
}
