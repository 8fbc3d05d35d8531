package daemon

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"virt-trust/internal/domain"
	"virt-trust/internal/domain/libvirt"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/platform/secret"
	"virt-trust/internal/recovery"
	"virt-trust/internal/vtpm/label"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statefile"
)

// Recover brings list and vTPMs back with the recovery key. What the host's TPM
// says decides how: a state that is not approved is approved with the policy
// key; where the TPM does not know the keys any more, new ones are made around
// the old list key, and each VM's keys are wrapped anew. A list that is lost is
// made again from labels. say tells of each step. Every step may be the last: the
// next Recover goes on from there.
func (g *Guard) Recover(ctx context.Context, key *recovery.Key, say func(string)) (what string, err error) {
	g.recovering.Lock()
	defer g.recovering.Unlock()
	f, err := g.recoveryKey()
	if err != nil {
		return "", err
	}
	listKey, err := g.unwrapWith(key, f.WrappedListKey, 32)
	if err != nil {
		return "", err
	}
	defer listKey.Wipe()
	policyKey, err := g.unwrapWith(key, f.WrappedPolicyKey, 32)
	if err != nil {
		return "", err
	}
	defer policyKey.Wipe()

	how, err := g.recoverHost(ctx, listKey, policyKey, say)
	if err != nil {
		return "", err
	}
	_, uncounted := os.Stat(g.uncountedPath())
	anew := uncounted == nil
	store, err := g.List(ctx)
	switch r := reason.As(err); {
	case err == nil:
	case r != nil && r.Code == reason.ListRolledBack && anew:
		say("this TPM has not counted the list yet: it counts from here on")
		store, err = g.countAnew(ctx)
	case r != nil && r.Code == reason.ListDamaged:
		say("the vTPM list is lost or damaged: it is made again from the labels that are kept")
		var done string
		if done, err = g.rebuildList(ctx, key); err == nil {
			say(done)
			store = g.peek()
		}
	}
	if err != nil {
		return "", err
	}
	if err := os.Remove(g.uncountedPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if err := g.vouch(store, key); err != nil {
		return "", err
	}
	rewrapped, lost, err := g.recoverVMs(ctx, store, key, say)
	if err != nil {
		return "", fmt.Errorf("cut off: 'virt-trust recover' goes on from here: %w", err)
	}
	if err := g.rewrapHost(ctx); err != nil {
		return "", err
	}
	g.wrapVMs(ctx, func(string) {})
	what = how + fmt.Sprintf("; the list holds %s", vms(len(store.All())))
	if rewrapped > 0 {
		what += fmt.Sprintf(", %d of them with keys that were brought back", rewrapped)
	}
	g.report("", "", "recover", allow, "", what, journal.Recovered)
	if err := g.resume(ctx); err != nil {
		g.log.WithError(err).Warn("taking up running VMs")
	}
	for _, r := range store.All() {
		g.changed(r.UUID)
	}
	if len(lost) > 0 {
		return "", reason.Refuse(reason.KeyNotReleased, "their vTPMs are readable with the old TPM alone; 'virt-trust restore' brings one back from a backup, 'virt-trust adopt --new' gives a VM a new, empty one",
			"%s; but nothing has the keys of %s", what, strings.Join(lost, ", "))
	}
	return what, nil
}

// vouch has the list name the recovery key that has just opened what is wrapped
// to it, and the file with it.
func (g *Guard) vouch(store *liststore.Store, key *recovery.Key) error {
	to := key.Recipient()
	if string(store.Bound(boundRecovery)) != to.String() {
		if err := store.Commit(liststore.Change{Bind: boundRecovery, Value: []byte(to.String())}); err != nil {
			return err
		}
	}
	f := *g.recovery.Load()
	if f.Recipient == to.String() {
		return nil
	}
	f.Recipient, f.to = to.String(), to
	return g.saveRecovery(&f)
}

// unwrapWith opens what is wrapped to the host's recovery key.
func (g *Guard) unwrapWith(key *recovery.Key, file []byte, size int) (*secret.Buffer, error) {
	b, err := key.Unwrap(file)
	if errors.Is(err, recovery.ErrOtherKey) {
		return nil, otherRecoveryKey(g.recovery.Load())
	}
	if err != nil {
		return nil, err
	}
	if len(b) != size {
		secret.Wipe(b)
		return nil, fmt.Errorf("what was wrapped to the recovery key has %d bytes, not %d", len(b), size)
	}
	return secret.Take(b)
}

// key is the list key, as the list was opened or tried with.
func (g *Guard) key() []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.listKey
}

// uncountedPath names the mark of new keys whose TPM has not counted the list
// yet: a recovery that is cut off between the two goes on as it began.
func (g *Guard) uncountedPath() string { return filepath.Join(g.dirs.State, "uncounted") }

// countAnew takes the list for the newest: a TPM that is new to it cannot tell.
func (g *Guard) countAnew(ctx context.Context) (*liststore.Store, error) {
	g.openList.Lock()
	defer g.openList.Unlock()
	store, err := liststore.Accept(ctx, g.dirs.State, g.dirs.Run, g.key(), g.rollback())
	if err != nil {
		return nil, g.listRefusal(err)
	}
	g.opened(store)
	return store, nil
}

// recoverHost makes the host's TPM release the list key, with new keys where it
// has to.
func (g *Guard) recoverHost(ctx context.Context, listKey, policyKey *secret.Buffer, say func(string)) (how string, err error) {
	s, err := g.tpm.Status(ctx)
	if err != nil {
		return "", g.tpmRefusal(err)
	}
	f := g.recovery.Load()
	if s.State == hosttpm.NotApproved && f.PolicyKey != hex.EncodeToString(g.tpm.PolicyKeyName()) {
		s.State = hosttpm.Cleared // these keys are not the ones that were wrapped
	}
	switch s.State {
	case hosttpm.Absent:
		return "", g.tpmRefusal(hosttpm.ErrAbsent)
	case hosttpm.LockedOut:
		return "", g.tpmRefusal(hosttpm.ErrLockedOut)
	case hosttpm.NotApproved:
		say(fmt.Sprintf("the host is not in an approved state (PCR %s): the present one is approved with the policy key", pcrs(s.Differing)))
		now, err := g.tpm.PCRs(ctx)
		if err == nil {
			err = g.tpm.ApproveWith(ctx, policyKey.Bytes(), "recovery key", now)
		}
		if err != nil {
			return "", g.tpmRefusal(err)
		}
		return "the present state of the host was approved", nil
	case hosttpm.Ready:
		// A key set that was made beside the list, when the right one was gone,
		// has a list key of its own.
		h, _, err := liststore.UntrustedHeader(g.dirs.State)
		if err != nil || h.KeyID != list.KeyID(listKey.Bytes()) {
			return "the host's keys work", nil
		}
		present, err := g.tpm.UnsealListKey(ctx)
		if err != nil {
			return "", g.tpmRefusal(err)
		}
		defer secret.Wipe(present)
		if bytes.Equal(present, listKey.Bytes()) {
			return "the host's keys work", nil
		}
	}
	say("the TPM does not know the host's keys: new ones are made, which may take a minute")
	if err := liststore.WriteFile(g.uncountedPath(), nil, 0o600); err != nil {
		return "", err
	}
	if err := g.tpm.Reprovision(ctx, listKey.Bytes()); err != nil {
		return "", g.tpmRefusal(err)
	}
	g.report("", "", "recover", noted, "", "new keys were made in the host's TPM, and its present state was approved", journal.Provisioned)
	// A list that was open was so under the counter of the TPM before.
	g.mu.Lock()
	g.store = nil
	g.mu.Unlock()
	return "new keys were made in the host's TPM", nil
}

// recoverVMs wraps to the present bind key what another bind key has. lost are
// the names of VMs whose keys nothing has.
func (g *Guard) recoverVMs(ctx context.Context, store *liststore.Store, key *recovery.Key, say func(string)) (done int, lost []string, err error) {
	for _, r := range store.All() {
		if !recoverable(r) {
			continue
		}
		found, err := g.recoverVM(ctx, store, r.UUID, key)
		switch {
		case errors.Is(err, errNoKeys):
			lost = append(lost, r.Name)
			say(r.Name + ": lost: neither its record nor its label has its keys for this recovery key")
		case err != nil:
			return done, lost, err
		case found:
			done++
			say(r.Name + ": brought back")
		}
	}
	return done, lost, nil
}

func (g *Guard) recoverVM(ctx context.Context, store *liststore.Store, uuid string, key *recovery.Key) (done bool, err error) {
	defer g.lock(uuid)()
	r := store.Get(uuid)
	if r == nil || !recoverable(r) {
		return false, nil
	}
	b, err := g.tpm.UnwrapKeys(ctx, r.WrappedKeys)
	secret.Wipe(b)
	if err == nil { // it was done before, or there was no need
		return false, nil
	}
	if !errors.Is(err, hosttpm.ErrCiphertext) {
		return false, g.tpmRefusal(err)
	}
	keys, err := g.recoveredKeys(r, key)
	if err != nil {
		return false, err
	}
	defer keys.Wipe()
	n := r.Clone()
	if n.WrappedKeys, err = g.tpm.WrapKeys(keys.Bytes()); err != nil {
		return false, g.tpmRefusal(err)
	}
	return true, g.rekeyed(ctx, store, n, keys)
}

// recoveredKeys gives a VM's keys from its record, or from a label of its.
func (g *Guard) recoveredKeys(r *list.Record, key *recovery.Key) (*secret.Buffer, error) {
	if keys, err := openPair(key, r.RecoveryKeys); err == nil {
		return keys, nil
	}
	for _, payload := range g.labelsFor(r.UUID, r.LabelPath) {
		l, err := label.UntrustedParse(payload)
		if err != nil || l.VM != r.UUID || l.ID != r.LabelID {
			continue
		}
		c, _ := l.Recipient(key.Recipient().LabelName())
		keys, err := openPair(key, c)
		if err != nil {
			continue
		}
		if _, err := label.Verify(payload, stateKey(keys)); err == nil {
			return keys, nil
		}
		keys.Wipe()
	}
	return nil, errNoKeys
}

var errNoKeys = errors.New("this VM's keys are not wrapped to this recovery key")

// openPair opens a VM's two keys.
func openPair(key *recovery.Key, file []byte) (*secret.Buffer, error) {
	b, err := key.Unwrap(file)
	if err != nil {
		return nil, err
	}
	if len(b) != 2*secret.KeySize {
		secret.Wipe(b)
		return nil, errNoKeys
	}
	return secret.Take(b)
}

// RecoverVM takes a VM that is off into the list with the recovery key that its
// label names: its image and vTPM come from another host.
func (g *Guard) RecoverVM(ctx context.Context, d libvirt.Domain, f *domain.Facts, key *recovery.Key) (what string, err error) {
	return g.atRest(ctx, d, f, func(st *start) (string, error) {
		if st.r != nil && st.r.State != list.Released {
			return "", reason.Refuse(reason.PolicyForbids, "'virt-trust check' says whether it would start", "the vTPM list has this VM")
		}
		if st.seen.State.Kind != statefile.Encrypted {
			return "", reason.Refuse(reason.VTPMMissing, "bring it here first", "there is no encrypted vTPM state in %s", st.seen.Instance)
		}
		what, err := g.recoverRecord(ctx, st, key)
		if err != nil {
			return "", err
		}
		g.report(f.UUID, f.Name, "recover", allow, "", what, journal.Recovered)
		g.changed(f.UUID)
		return what, nil
	})
}

// keysLost refuses to make new keys beside a list that they could not open.
func (g *Guard) keysLost() error {
	if _, err := os.Lstat(liststore.Path(g.dirs.State)); err != nil {
		return nil
	}
	return reason.Refuse(reason.KeyNotReleased, g.wayBack(), "the files of the host's keys are gone, and there is a vTPM list that only they open")
}

// wayBack says what helps where the host's keys are dead.
func (g *Guard) wayBack() string {
	if g.recovery.Load() != nil {
		return "'virt-trust recover' with the recovery key brings them back"
	}
	return "bring the TPM and /var/lib/virt-trust back as they were, or start over: there is no recovery key, see RECOVERY in virt-trust(1)"
}
