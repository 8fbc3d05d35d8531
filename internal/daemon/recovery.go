package daemon

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"virt-trust/internal/platform/journal"
	"virt-trust/internal/platform/secret"
	"virt-trust/internal/recovery"
	"virt-trust/internal/vtpm/imagefile"
	"virt-trust/internal/vtpm/label"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
)

// recoveryFile is recovery.json: the recovery key's public half, and what of the
// host is wrapped to it, as age files. It is replaced whole.
type recoveryFile struct {
	Version   int       `json:"version"`
	Recipient string    `json:"recipient"`
	Made      time.Time `json:"made"`
	Confirmed time.Time `json:"confirmed,omitzero"` // when someone showed that they have the key

	ListKeyID string `json:"list_key_id"` // of the key in ListKey, as in the list's header
	PolicyKey string `json:"policy_key"`  // Name of the key in WrappedPolicyKey

	WrappedListKey   []byte `json:"list_key_age"`
	WrappedPolicyKey []byte `json:"policy_key_age"`
	Test             []byte `json:"test_age"` // 32 random bytes
	TestDigest       []byte `json:"test_sha256"`

	to recovery.Recipient
}

const recoveryVersion = 1

// boundRecovery is the name under which the list holds the recovery key's
// recipient. The file beside it can be read where the list cannot, but also be
// exchanged by whoever writes this disk: nothing is wrapped to a recipient that
// the list does not name.
const boundRecovery = "recovery"

// trusted gives what the list vouches for; nil: nothing, or there is no list.
func (g *Guard) trusted() *recoveryFile {
	f, store := g.recovery.Load(), g.peek()
	if f == nil || store == nil || string(store.Bound(boundRecovery)) != f.Recipient {
		return nil
	}
	return f
}

func (g *Guard) recoveryPath() string { return filepath.Join(g.dirs.State, "recovery.json") }

// loadRecovery reads recovery.json. A host without one has no recovery key.
func (g *Guard) loadRecovery() error {
	b, err := os.ReadFile(g.recoveryPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	f, err := parseRecovery(b)
	if err != nil {
		return fmt.Errorf("%s: %w", g.recoveryPath(), err)
	}
	g.recovery.Store(f)
	return nil
}

func parseRecovery(b []byte) (*recoveryFile, error) {
	const maxFile = 64 << 10
	if len(b) > maxFile {
		return nil, fmt.Errorf("%d bytes long", len(b))
	}
	f := &recoveryFile{}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(f); err != nil {
		return nil, err
	}
	if f.Version != recoveryVersion {
		return nil, fmt.Errorf("version %d, want %d", f.Version, recoveryVersion)
	}
	var err error
	f.to, err = recovery.ParseRecipient(f.Recipient)
	return f, err
}

func (g *Guard) saveRecovery(f *recoveryFile) error {
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	if err := liststore.WriteFile(g.recoveryPath(), append(b, '\n'), 0o600); err != nil {
		return err
	}
	g.recovery.Store(f)
	return nil
}

// SetRecovery makes to the host's recovery key: whatever was wrapped to another
// is wrapped to this one. say tells of each VM. Cut off, it goes on by itself.
func (g *Guard) SetRecovery(ctx context.Context, to recovery.Recipient, say func(string)) (what string, err error) {
	store, err := g.List(ctx)
	if err != nil {
		return "", err
	}
	g.recovering.Lock()
	defer g.recovering.Unlock()
	f := &recoveryFile{Version: recoveryVersion, Recipient: to.String(), Made: g.now().UTC().Truncate(time.Second), to: to}
	test := make([]byte, 32)
	rand.Read(test)
	digest := sha256.Sum256(test)
	f.TestDigest = digest[:]
	if f.Test, err = to.Wrap(test); err != nil {
		return "", err
	}
	if err := g.wrapHost(ctx, f); err != nil {
		return "", err
	}
	// Cut off between the two, the host goes on with the old file, and says that
	// it is not the list's.
	if err := store.Commit(liststore.Change{Bind: boundRecovery, Value: []byte(f.Recipient)}); err != nil {
		return "", err
	}
	if err := g.saveRecovery(f); err != nil {
		return "", err
	}
	g.report("", "", "recovery", allow, "", "the list key and the policy key were wrapped to a new recovery key, "+f.Recipient, journal.RecoverySet)
	say("the list key and the policy key are wrapped to it")
	wrapped, failed := g.wrapVMs(ctx, say)
	what = fmt.Sprintf("wrapped to %s: the host's keys, and those of %s", f.Recipient, vms(wrapped))
	if failed > 0 {
		what += fmt.Sprintf("; those of %s could not be, which is tried again", vms(failed))
	}
	return what, nil
}

func vms(n int) string {
	if n == 1 {
		return "1 VM"
	}
	return fmt.Sprintf("%d VMs", n)
}

// wrapHost wraps the host's two secrets as f says.
func (g *Guard) wrapHost(ctx context.Context, f *recoveryFile) error {
	f.PolicyKey = hex.EncodeToString(g.tpm.PolicyKeyName())
	err := g.tpm.WithSecrets(ctx, func(listKey, policyKey []byte) (err error) {
		f.ListKeyID = keyID(listKey)
		if f.WrappedListKey, err = f.to.Wrap(listKey); err != nil {
			return err
		}
		f.WrappedPolicyKey, err = f.to.Wrap(policyKey)
		return err
	})
	if err != nil {
		return g.tpmRefusal(err)
	}
	return nil
}

func keyID(listKey []byte) string {
	id := list.KeyID(listKey)
	return hex.EncodeToString(id[:])
}

// keepRecovery sees to it that what is wrapped to the recovery key is what is
// in use, after a crash or a change of the host's keys. Called with the list
// open, and its key with it.
func (g *Guard) keepRecovery(ctx context.Context) error {
	if g.trusted() == nil {
		return nil
	}
	g.recovering.Lock()
	defer g.recovering.Unlock()
	if err := g.rewrapHost(ctx); err != nil {
		return err
	}
	g.wrapVMs(ctx, func(string) {})
	return nil
}

// rewrapHost wraps the host's secrets to its recovery key if they are others
// than those that are.
func (g *Guard) rewrapHost(ctx context.Context) error {
	t := g.trusted()
	if t == nil {
		return nil
	}
	f := *t
	if f.PolicyKey == hex.EncodeToString(g.tpm.PolicyKeyName()) && f.ListKeyID == keyID(g.key()) {
		return nil
	}
	if err := g.wrapHost(ctx, &f); err != nil {
		return err
	}
	return g.saveRecovery(&f)
}

// unwrapped gives the VMs whose keys are not wrapped to the recovery key.
func (g *Guard) unwrapped() (left []*list.Record) {
	f, store := g.trusted(), g.peek()
	if store == nil {
		return nil
	}
	for _, r := range store.All() {
		if recoverable(r) && (f == nil || r.RecoveryTo != f.Recipient) {
			left = append(left, r)
		}
	}
	return left
}

// recoverable reports whether a record has keys of ours.
func recoverable(r *list.Record) bool {
	return r.KeyOwner == list.Ours && r.State != list.Released && len(r.WrappedKeys) > 0
}

// wrapVMs wraps the keys of those VMs to the recovery key that it has not got.
func (g *Guard) wrapVMs(ctx context.Context, say func(string)) (done, failed int) {
	if g.trusted() == nil {
		return 0, 0
	}
	for _, r := range g.unwrapped() {
		err := g.wrapVM(ctx, r.UUID)
		if err != nil {
			failed++
			say(fmt.Sprintf("%s: not now: %s", r.Name, err))
			g.log.WithField(journal.VM, r.UUID).WithError(err).Warn("wrapping a VM's keys to the recovery key")
			continue
		}
		done++
		say(r.Name + ": wrapped")
	}
	return done, failed
}

func (g *Guard) wrapVM(ctx context.Context, uuid string) error {
	defer g.lock(uuid)()
	store := g.peek()
	r := store.Get(uuid)
	if r == nil || !recoverable(r) {
		return nil
	}
	keys, err := g.unwrap(ctx, r.WrappedKeys)
	if err != nil {
		return err
	}
	defer keys.Wipe()
	return g.rekeyed(ctx, store, r.Clone(), keys)
}

// wrapRecovery wraps a VM's keys to the recovery key, if there is one and they
// are not yet.
func (g *Guard) wrapRecovery(r *list.Record, keys *secret.Buffer) error {
	f := g.trusted()
	if f == nil || r.RecoveryTo == f.Recipient {
		return nil
	}
	wrapped, err := f.to.Wrap(keys.Bytes())
	if err != nil {
		return err
	}
	r.RecoveryKeys, r.RecoveryTo = wrapped, f.Recipient
	return nil
}

// rekeyed commits a record whose keys are wrapped otherwise than before, and
// gives the image a label that has them. A label that is not the one that was
// written last stays as it is: a start refuses it as before.
func (g *Guard) rekeyed(ctx context.Context, store *liststore.Store, r *list.Record, keys *secret.Buffer) error {
	if err := g.wrapRecovery(r, keys); err != nil {
		return err
	}
	seen, err := g.readLabel(r.LabelPath)
	if r.LabelPath == "" || err != nil || seen.Unsupported != "" {
		seen.Path, seen.Present = "", false
	}
	payload, err := g.sealLabel(r, keys, seen.Path)
	if err != nil {
		return err
	}
	if err := g.keep(r.UUID, keptLabel, payload); err != nil {
		return err
	}
	if len(r.PendingLabel) > 0 && r.LabelDigest.IsZero() && r.LabelPath == "" {
		// Of a list that was made again: the image, wherever it is, has this one.
		r.LabelDigest = list.DigestOf(r.PendingLabel)
	}
	right := seen.Present && !r.LabelDigest.IsZero() && seen.Digest == r.LabelDigest
	if right || len(r.PendingLabel) > 0 {
		r.PendingLabel = payload
	}
	r.Changed = g.unix()
	if err := store.Commit(liststore.Change{Put: r}); err != nil {
		return err
	}
	defer g.changed(r.UUID)
	n, _, err := g.writePending(ctx, r, seen.Path)
	if err != nil || n == r {
		return err
	}
	return store.Commit(liststore.Change{Put: n})
}

// recipients of a record's label: this host, and the recovery key.
func (g *Guard) recipients(r *list.Record) []label.Recipient {
	rs := []label.Recipient{{BindKeyName: g.tpm.BindKeyName(), Ciphertext: r.WrappedKeys}}
	if len(r.RecoveryKeys) == 0 || len(r.RecoveryKeys) > label.MaxCiphertext {
		return rs
	}
	to, err := recovery.ParseRecipient(r.RecoveryTo)
	if err != nil {
		return rs
	}
	return append(rs, label.Recipient{BindKeyName: to.LabelName(), Ciphertext: r.RecoveryKeys})
}

// roomFor reports whether an image can carry a label of n bytes. One of which
// it cannot be told can: writing the label will tell.
func roomFor(path string, n int) bool {
	if path == "" {
		return true
	}
	room, err := imagefile.HasRoom(path, n)
	return room || err != nil
}

// ConfirmRecovery takes the answer to the recovery key's test, which only who
// has the key can give, and ends the reminders.
func (g *Guard) ConfirmRecovery(answer []byte) (what string, err error) {
	g.recovering.Lock()
	defer g.recovering.Unlock()
	f, err := g.recoveryKey()
	if err != nil {
		return "", err
	}
	if d := sha256.Sum256(answer); !bytes.Equal(d[:], f.TestDigest) {
		return "", otherRecoveryKey(f)
	}
	n := *f
	n.Confirmed = g.now().UTC().Truncate(time.Second)
	if err := g.saveRecovery(&n); err != nil {
		return "", err
	}
	what = "the recovery key " + f.Recipient + " is confirmed as stored"
	g.report("", "", "recovery", allow, "", what, "")
	return what, nil
}

// recoveryKey gives the host's recovery key, of a file that is read again where
// it could not be at the start.
func (g *Guard) recoveryKey() (*recoveryFile, error) {
	if g.recovery.Load() == nil {
		if err := g.loadRecovery(); err != nil {
			return nil, err
		}
	}
	if f := g.recovery.Load(); f != nil {
		return f, nil
	}
	return nil, noRecoveryKey()
}

func noRecoveryKey() error {
	return reason.Refuse(reason.KeyNotReleased, "where the host's keys still work, 'virt-trust recovery new' makes one; what is lost without one, and what is not, stands in virt-trust(1) under RECOVERY",
		"this host has no recovery key")
}

func otherRecoveryKey(f *recoveryFile) error {
	return reason.Refuse(reason.KeyNotReleased, "give the key of that recipient, or as many of its shares as it needs",
		"it is not the recovery key of this host, whose recipient is %s", f.Recipient)
}

// remind says in the journal what keeps recovery from being possible.
func (g *Guard) remind() {
	e := g.log.WithField(journal.ID, journal.RecoveryMissing)
	switch g.recoveryState() {
	case "altered":
		e.Warn("recovery.json does not name the recovery key that the vTPM list holds: it was exchanged, or its making was cut off; nothing is wrapped to it, 'virt-trust recovery new --replace' makes another")
	case "none":
		e.Warn("no recovery key: if the host's TPM is cleared or replaced, or its state changes without approval, every guarded vTPM is lost; 'virt-trust recovery new' makes one")
	case "unconfirmed":
		e.Warn("the recovery key is not confirmed as stored: 'virt-trust recovery confirm' does that")
	}
}

// recoveryState is for the bus: none, unconfirmed, confirmed, or altered for a
// file that the list does not vouch for. A list that is not open cannot tell.
func (g *Guard) recoveryState() string {
	f := g.recovery.Load()
	switch {
	case f == nil && (g.peek() == nil || len(g.peek().Bound(boundRecovery)) == 0):
		return "none"
	case f == nil, g.peek() != nil && g.trusted() == nil:
		return "altered"
	case f.Confirmed.IsZero():
		return "unconfirmed"
	}
	return "confirmed"
}
