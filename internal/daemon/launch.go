package daemon

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/domain"
	"virt-trust/internal/launcher/launchlog"
	"virt-trust/internal/launcher/measure"
	"virt-trust/internal/launcher/pkgdb"
	"virt-trust/internal/launcher/refvalues"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/ek"
	"virt-trust/internal/vtpm/ekcert"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statedir"
)

// The launch chain. At prepare, before anything is done about a VM, the files
// that will run for it are measured and held against the Reference Values. When
// nothing else is in the way of the start, what is new is learned, put into the
// launch log, and the launch PCR is extended by it: all before the grant. At
// start, when swtpm runs and QEMU does not, the files are looked at once more,
// and an entry ties the VM to them. That entry waits until then because only
// then a new VM has an endorsement key, and because what fails in between has not
// started.

// launch is what Guard knows of launchers.
type launch struct {
	measurer *measure.Measurer
	packages pkgdb.DB
	ek       *ek.Reader // all but the program; nil: no endorsement key is read

	mu     sync.Mutex     // held while values are learned, and while the log is written
	values *refvalues.Set // nil: not read yet
	log    launchLog
}

// chain names virt-trust's own programs in the launch chain, and swtpm's user.
func (g *Guard) chain(p Programs, uid, gid int) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	g.launch.measurer.Wrapper, g.launch.measurer.Own = p.Wrapper, []string{p.Hook, p.Wrapper, p.Emulator, self}
	g.launch.ek = &ek.Reader{Dir: g.dirs.Run, UID: uid, GID: gid}
	return nil
}

// launcher is a file that runs for a VM.
type launcher struct {
	measure.File
	by      refvalues.Source // "": not approved, in audit mode
	learn   bool
	detail  string // the package
	verdict refvalues.Verdict
}

// defaultPath is libvirt's PATH where no hook tells it.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

type pathKey struct{}

// withPath tells what ctx is about that libvirt has this PATH.
func withPath(ctx context.Context, path string) context.Context {
	return context.WithValue(ctx, pathKey{}, path)
}

func libvirtsPath(ctx context.Context) string {
	if p, ok := ctx.Value(pathKey{}).(string); ok && p != "" {
		return p
	}
	return defaultPath
}

func (g *Guard) launchPolicy() refvalues.Policy {
	has := func(s string) bool { return slices.Contains(g.cfg.Launcher.Policy, s) }
	return refvalues.Policy{FirstUse: has(config.FirstUse), Package: has(config.Package), Manifest: has(config.Manifest)}
}

func (g *Guard) valuesPath() string { return filepath.Join(g.dirs.State, "launchers") }

const resetMend = "'virt-trust launcher reset' begins them anew, see virt-trust-reasons(7)"

// readValues reads the Reference Values, once. The vTPM list, which is open,
// has their key, and remembers in each record under which generation of them it
// was opened. Called with launch.mu held.
func (g *Guard) readValues(store *liststore.Store) error {
	if g.launch.values != nil {
		return nil
	}
	least := uint64(0)
	for _, r := range store.All() {
		least = max(least, r.Launchers)
	}
	g.mu.Lock()
	key := g.listKey
	g.mu.Unlock()
	b, err := os.ReadFile(g.valuesPath())
	s := &refvalues.Set{}
	switch {
	case errors.Is(err, fs.ErrNotExist) && least > 0:
		return reason.Refuse(reason.LauncherNotApproved, resetMend, "the Reference Values in %s are missing", g.valuesPath())
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("reading the Reference Values for launchers: %w", err)
	default:
		if s, err = refvalues.Decode(b, key); err != nil {
			return reason.Refuse(reason.LauncherNotApproved, resetMend, "the Reference Values in %s cannot be used: %s", g.valuesPath(), err)
		}
	}
	if s.Generation < least {
		return reason.Refuse(reason.LauncherNotApproved, resetMend, "the Reference Values in %s are older ones: generation %d, where VMs started under %d", g.valuesPath(), s.Generation, least)
	}
	g.launch.values = s
	return nil
}

// writeValues makes a new generation the present one. Called with launch.mu held.
func (g *Guard) writeValues(s *refvalues.Set) error {
	g.mu.Lock()
	key := g.listKey
	g.mu.Unlock()
	b, err := s.Encode(key)
	if err != nil {
		return err
	}
	if err := liststore.WriteFile(g.valuesPath(), b, 0o600); err != nil {
		return fmt.Errorf("writing the Reference Values for launchers: %w", err)
	}
	g.launch.values = s
	return nil
}

// measure finds and hashes what will run for a VM.
func (g *Guard) measure(ctx context.Context, f *domain.Facts) ([]measure.File, error) {
	defer lap(ctx, tookLaunchers)()
	targets, err := g.launch.measurer.Targets(f, libvirtsPath(ctx))
	if err == nil {
		var files []measure.File
		if files, err = g.launch.measurer.Measure(targets); err == nil {
			return files, nil
		}
	}
	return nil, reason.Refuse(reason.LauncherNotApproved, "install it, or correct the domain XML", "what would run for this VM cannot be measured: %s", err)
}

// appraise measures what will run for a VM and holds it against the Reference
// Values. It changes nothing. In audit mode what is not approved is among the
// launchers, and the refusal is given too.
func (g *Guard) appraise(ctx context.Context, f *domain.Facts, store *liststore.Store) ([]launcher, error) {
	files, err := g.measure(ctx, f)
	if err != nil {
		return nil, err
	}
	g.launch.mu.Lock()
	defer g.launch.mu.Unlock()
	if err := g.readValues(store); err != nil {
		return nil, err
	}
	all, err := g.hold(ctx, files)
	if err != nil {
		return nil, err
	}
	if g.cfg.Launcher.RequireLog && g.launch.log.standing == launchlog.Broken {
		return all, reason.Refuse(reason.PolicyForbids, "restart the host, or set launcher.require_log to false", "the launch log does not replay")
	}
	return all, refuseLaunchers(all)
}

// hold asks the Reference Values and, where these leave it to them, the package
// databases. Called with launch.mu held.
func (g *Guard) hold(ctx context.Context, files []measure.File) ([]launcher, error) {
	all := make([]launcher, len(files))
	policy := g.launchPolicy()
	var ask []int
	for i, f := range files {
		all[i].File = f
		if v := g.judge(&all[i], policy, refvalues.NotAsked); v.Ask {
			ask = append(ask, i)
		}
	}
	if len(ask) == 0 {
		return all, nil
	}
	var asked []measure.File
	for _, i := range ask {
		asked = append(asked, files[i])
	}
	answers, err := g.launch.packages.Ask(ctx, asked)
	if err != nil {
		return nil, err
	}
	for n, i := range ask {
		all[i].detail = answers[n].Package
		g.judge(&all[i], policy, answers[n].Vouch)
	}
	return all, nil
}

func (g *Guard) judge(l *launcher, p refvalues.Policy, v refvalues.Vouch) refvalues.Verdict {
	l.verdict = g.launch.values.Appraise(refvalues.Found{Path: l.Path, Digest: l.SHA256}, p, v)
	l.by, l.learn = l.verdict.Source, l.verdict.Learn
	return l.verdict
}

// refuseLaunchers gives the refusal of all that is not approved, or nil.
func refuseLaunchers(all []launcher) error {
	var bad []launcher
	for _, l := range all {
		if l.by == "" {
			bad = append(bad, l)
		}
	}
	if len(bad) == 0 {
		return nil
	}
	// What was revoked, or altered, says more than what is merely new.
	slices.SortStableFunc(bad, func(a, b launcher) int { return weight(b.verdict) - weight(a.verdict) })
	l := bad[0]
	found := hex.EncodeToString(l.SHA256[:])
	expected := "none is approved"
	if l.verdict.Expected != nil {
		expected = "approved is " + l.verdict.Expected.String()
	}
	what := fmt.Sprintf("%s has the SHA-256 digest %s, %s", l.Path, found, expected)
	mend := fmt.Sprintf("if that is right, 'virt-trust launcher approve %s'", l.Path)
	switch {
	case l.verdict.Revoked:
		what = fmt.Sprintf("%s has the SHA-256 digest %s, which was revoked; %s", l.Path, found, expected)
		mend = fmt.Sprintf("install another version, or 'virt-trust launcher approve %s'", l.Path)
	case l.verdict.Altered:
		what += fmt.Sprintf(", and its package %s brought another one", l.detail)
		mend = fmt.Sprintf("install the package anew or, if that is right, 'virt-trust launcher approve %s'", l.Path)
	}
	if len(bad) > 1 {
		what += fmt.Sprintf(" (and %d more files)", len(bad)-1)
	}
	return reason.Refuse(reason.LauncherNotApproved, mend, "%s", what)
}

func weight(v refvalues.Verdict) int {
	switch {
	case v.Revoked:
		return 2
	case v.Altered:
		return 1
	}
	return 0
}

// admit learns what was approved for the first time, and puts what is new since
// boot into the launch log. It gives the generation of the Reference Values.
func (g *Guard) admit(ctx context.Context, f *domain.Facts, all []launcher) (uint64, error) {
	if len(all) == 0 { // in audit mode, what cannot be measured
		return 0, nil
	}
	g.launch.mu.Lock()
	defer g.launch.mu.Unlock()
	var learned []launcher
	next := g.launch.values.Next()
	for _, l := range all {
		// Another start may have learned it meanwhile, or an admin revoked it.
		v := g.launch.values.Appraise(refvalues.Found{Path: l.Path, Digest: l.SHA256}, g.launchPolicy(), refvalues.NotAsked)
		if v.Revoked && l.by != "" {
			return 0, reason.Refuse(reason.LauncherNotApproved, "start the VM again", "%s was revoked while the VM was being started", l.Path)
		}
		if !l.learn || v.Source != "" && !v.Learn {
			continue
		}
		if err := next.Learn(refvalues.Found{Path: l.Path, Digest: l.SHA256}, l.by, l.detail, g.unix()); err != nil {
			return 0, err
		}
		learned = append(learned, l)
	}
	if len(learned) > 0 {
		if err := g.writeValues(next); err != nil {
			return 0, err
		}
	}
	for _, l := range learned {
		g.log.WithFields(logrus.Fields{journal.ID: journal.LauncherLearned, journal.VM: f.UUID, journal.VMName: f.Name, "path": l.Path, "sha256": hex.EncodeToString(l.SHA256[:])}).
			Info("approved by " + strings.TrimSpace(string(l.by)+" "+l.detail) + ": the " + l.Role + " " + l.Path)
	}
	if err := g.logFiles(ctx, all); err != nil {
		return 0, err
	}
	return g.launch.values.Generation, nil
}

// launchers appraises what will run for a VM. One that is released to plain
// libvirt is not concerned.
func (g *Guard) launchers(ctx context.Context, f *domain.Facts) ([]launcher, error) {
	store, err := g.List(ctx)
	if err != nil {
		return nil, err
	}
	if r := store.Get(f.UUID); r != nil && r.State == list.Released {
		return nil, nil
	}
	return g.appraise(ctx, f, store)
}

// launched puts the start of a VM into the launch log, between swtpm's start
// and QEMU's. Called with the VM's lock held.
func (g *Guard) launched(ctx context.Context, f *domain.Facts, all []launcher, m manufacture) error {
	if len(all) == 0 {
		return nil
	}
	for _, l := range all {
		if l.Unchanged() {
			continue
		}
		again, err := g.launch.measurer.Measure([]measure.Target{l.Target})
		if err != nil || again[0].SHA256 != l.SHA256 {
			return reason.Refuse(reason.LauncherNotApproved, "start the VM again", "%s was replaced while the VM was being started", l.Path)
		}
	}
	start := launchlog.Start{VM: f.UUID}
	if store := g.peek(); store != nil {
		if r := store.Get(f.UUID); r != nil {
			r = g.readEK(ctx, store, f, r, all, m)
			if shared := sharedNote(store, r); shared != "" {
				g.report(r.UUID, r.Name, "start", noted, "", shared, journal.EKShared)
			}
			start.Generation, start.LabelGeneration, start.EK = r.Generation, r.LabelGeneration, r.EKDigest.String()
		}
	}
	g.launch.mu.Lock()
	defer g.launch.mu.Unlock()
	return g.logStart(ctx, start, all)
}

// readEK notes a vTPM's endorsement key in its record, once for each vTPM, and
// what its manufacture has given. That it could not be read keeps no VM from
// starting.
func (g *Guard) readEK(ctx context.Context, store *liststore.Store, f *domain.Facts, r *list.Record, all []launcher, m manufacture) *list.Record {
	if !r.EKDigest.IsZero() && !m.fresh && m.ak == nil || f.TPM.Version != "2.0" {
		return r
	}
	log := g.log.WithField(journal.VM, f.UUID)
	n := r.Clone()
	if r.KeyOwner == list.Ours {
		g.mu.Lock()
		s := g.sessions[f.UUID]
		g.mu.Unlock()
		if g.launch.ek == nil || s == nil || s.keys == nil {
			return r
		}
		seen, err := statedir.Look(s.dir)
		if err == nil && !seen.Exists() { // swtpm without swtpm_setup makes it later
			return r
		}
		var id ek.Identity
		if err == nil {
			id, err = g.reader(all).Identity(ctx, seen.Name, seen.Data, stateKey(s.keys))
		}
		if err != nil {
			log.WithError(err).Warn("reading the vTPM's endorsement key: it is not in the launch log")
			return r
		}
		n.EKDigest = list.DigestOf(id.EK)
		if m.tpm == (ekcert.TPM{}) { // swtpm_setup has not told
			m.tpm = tpmOf(id)
		}
	} else if n.EKDigest = m.key; m.key.IsZero() { // only swtpm_setup has told
		return r
	}
	notes := g.noteIdentity(ctx, n, m)
	if err := store.Commit(liststore.Change{Put: n}); err != nil {
		log.WithError(err).Warn("noting the vTPM's endorsement key: it is not in the launch log")
		return r
	}
	for _, o := range notes {
		g.report(r.UUID, r.Name, "start", noted, "", o.text, o.event)
	}
	return n
}
