package hosttpm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/hosttpm/link"
	"virt-trust/internal/hosttpm/policy"
	"virt-trust/internal/platform/secret"
)

// The counter of waivers takes the first of these that is free. It is made
// when the first waiver is given: a host that never gives one has none.
const (
	firstWaiverIndex = tpm2.TPMHandle(0x01500120)
	lastWaiverIndex  = tpm2.TPMHandle(0x0150012F)
)

// maxResets of the TPM may come between a waiver and the boot that uses it:
// firmware resets the machine by itself while it is updated.
const maxResets = 8

const waiverFile = "waiver.json"

// ErrNoWaiver is for a waiver that is not there.
var ErrNoWaiver = errors.New("no boot without PCR check was asked for")

// Waive lets the next boot, and no other, be one without PCR check: at its
// Settle the policy key is released whatever the PCRs are, and approves them.
// The host must be in an approved state. An earlier waiver is void.
func (h *Host) Waive(ctx context.Context, note string) error {
	return h.withPolicyKey(ctx, func(c *client, k *keySet, key *ecdsa.PrivateKey) error {
		if old, err := h.store.waiver(k); err == nil && old != nil {
			if err := c.void(old); err != nil {
				return err
			}
		}
		uses, err := c.takeCounter(firstWaiverIndex, lastWaiverIndex)
		if err != nil {
			return fmt.Errorf("counter of waivers: %w", err)
		}
		w := &policy.Waiver{
			UseIndex: uint32(uses.index), UseName: uses.name, EpochName: k.epochName,
			Time: time.Now().UTC().Truncate(time.Second), Note: note,
		}
		if w.Use, err = c.readCounter(uses); err != nil {
			return fmt.Errorf("counter of waivers: %w", err)
		}
		if w.Epoch, err = c.readEpoch(k); err != nil {
			return err
		}
		if w.After, err = c.resetCount(); err != nil {
			return err
		}
		w.Until = w.After + maxResets
		if w.Policy, err = w.Digest(); err != nil {
			return err
		}
		if w.Signature, err = signPolicy(key, w.Policy); err != nil {
			return err
		}
		return h.store.saveWaiver(w)
	})
}

// Unwaive takes the waiver back.
func (h *Host) Unwaive(ctx context.Context) error {
	if _, err := h.set(); err != nil {
		return err
	}
	_, err := do(ctx, h, func(c *client) (struct{}, error) {
		w, err := h.store.waiver(h.keys.Load())
		if err == nil && w == nil {
			err = ErrNoWaiver
		}
		if err != nil {
			return struct{}{}, err
		}
		if err := c.void(w); err != nil {
			return struct{}{}, err
		}
		return struct{}{}, h.store.removeWaiver()
	})
	return err
}

// Waiver gives the waiver that waits for the next boot, or nil. It asks no
// TPM.
func (h *Host) Waiver() (*policy.Waiver, error) {
	k, err := h.set()
	if err != nil {
		return nil, err
	}
	return h.store.waiver(k)
}

// Used is what Settle made of a waiver.
type Used struct {
	Waiver   *policy.Waiver
	Approved *policy.State // what it approved; nil where nothing needed it
	Void     bool          // it held no longer
}

// settleWaiver uses the waiver up, if this is a boot for which it was given. In
// a state that is not approved it is what releases the policy key, and that
// state is approved: the rest of this boot and the boots after it are checked
// against it. Approval first, then the counter: a crash between the two leaves a
// waiver that the approved state then uses up.
func (c *client) settleWaiver(k *keySet) (*Used, error) {
	w, err := c.host.store.waiver(k)
	if err != nil || w == nil {
		return nil, err
	}
	resets, err := c.resetCount()
	if err != nil {
		return nil, err
	}
	if resets == w.After {
		return nil, nil
	}
	used := &Used{Waiver: w}
	epoch, err := c.readEpoch(k)
	if err != nil {
		return nil, err
	}
	uses, err := c.readCounter(usesOf(w))
	if err != nil && !isRC(err, tpm2.TPMRCHandle) {
		return nil, fmt.Errorf("counter of waivers: %w", err)
	}
	// resetCount starts anew where the TPM was cleared; the keys are gone then.
	used.Void = err != nil || resets < w.After || resets > w.Until || uses != w.Use || epoch != w.Epoch || !bytes.Equal(w.EpochName, k.epochName)
	_, err = c.match(k)
	switch {
	case err != nil && !errors.Is(err, ErrPolicy):
		return nil, err
	case err != nil && !used.Void:
		if used.Approved, err = c.approveByWaiver(k, w); err != nil {
			return nil, fmt.Errorf("the boot without PCR check: %w", err)
		}
	}
	if uses == w.Use {
		if err := c.void(w); err != nil {
			return nil, err
		}
	}
	return used, c.host.store.removeWaiver()
}

// approveByWaiver approves the state that the host is in.
func (c *client) approveByWaiver(k *keySet, w *policy.Waiver) (*policy.State, error) {
	scalar, err := c.unsealBy(k, k.policyKey, func(_ *keySet, use func(tpm2.Session) error) error {
		return use(tpm2.Policy(tpm2.TPMAlgSHA256, nonceSize, c.satisfyWaiver(k, w)))
	})
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(scalar)
	key, err := parsePolicyKey(k, scalar)
	if err != nil {
		return nil, err
	}
	now, err := c.readPCRs(c.host.cfg.Bank, c.host.cfg.PCRs)
	if err != nil {
		return nil, err
	}
	note := "boot without PCR check"
	if w.Note != "" {
		note += ": " + w.Note
	}
	return &now, c.approve(k, key, note, now)
}

func (c *client) satisfyWaiver(k *keySet, w *policy.Waiver) tpm2.PolicyCallback {
	return c.authorized(k, w.Policy, w.Signature, func(session tpm2.TPMISHPolicy) error {
		for _, b := range w.Bounds() {
			if err := c.policyResetCount(session, b); err != nil {
				return err
			}
		}
		if err := c.policyCounter(session, usesOf(w), w.Use); err != nil {
			return err
		}
		return c.policyCounter(session, counter{k.epochIndex, k.epochName}, w.Epoch)
	})
}

// policyResetCount is TPM2_PolicyCounterTimer (Part 3, 23.10) over resetCount,
// which go-tpm lacks.
func (c *client) policyResetCount(session tpm2.TPMISHPolicy, b policy.Bound) error {
	cmd := binary.BigEndian.AppendUint16(nil, link.TagPlain)
	cmd = binary.BigEndian.AppendUint32(cmd, link.HeaderSize+4+2+4+2+2)
	cmd = binary.BigEndian.AppendUint32(cmd, uint32(tpm2.TPMCCPolicyCounterTimer))
	cmd = binary.BigEndian.AppendUint32(cmd, uint32(session.HandleValue()))
	cmd = binary.BigEndian.AppendUint16(cmd, 4)
	cmd = binary.BigEndian.AppendUint32(cmd, b.Value)
	cmd = binary.BigEndian.AppendUint16(cmd, policy.ResetCountOffset)
	cmd = binary.BigEndian.AppendUint16(cmd, b.Operation)
	r, err := c.Send(cmd)
	if err != nil {
		return err
	}
	if rc := tpm2.TPMRC(binary.BigEndian.Uint32(r[6:])); rc != tpm2.TPMRCSuccess {
		return rc
	}
	return nil
}

// resetCount counts the TPM's resets: one for each boot, or more.
func (c *client) resetCount() (uint32, error) {
	r, err := tpm2.ReadClock{}.Execute(c)
	if err != nil {
		return 0, fmt.Errorf("reading the TPM's clock: %w", err)
	}
	return r.CurrentTime.ClockInfo.ResetCount, nil
}

func usesOf(w *policy.Waiver) counter {
	return counter{tpm2.TPMHandle(w.UseIndex), w.UseName}
}

// void makes a waiver's signature worthless.
func (c *client) void(w *policy.Waiver) error {
	if err := c.increment(usesOf(w)); err != nil && !isRC(err, tpm2.TPMRCHandle) {
		return fmt.Errorf("counter of waivers: %w", err)
	}
	return nil
}

// waiver reads the waiver; nil if there is none.
func (s store) waiver(k *keySet) (*policy.Waiver, error) {
	b, err := readFile(s.dir, waiverFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFailed, err)
	}
	w, err := policy.ParseWaiver(b)
	if err == nil {
		err = w.Verify(k.policyPublic)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrFailed, filepath.Join(s.dir, waiverFile), err)
	}
	return w, nil
}

func (s store) saveWaiver(w *policy.Waiver) error {
	b, err := w.Marshal()
	if err == nil {
		err = s.replace(filepath.Join(s.dir, waiverFile), b)
	}
	if err != nil {
		return fmt.Errorf("%w: saving a waiver: %w", ErrFailed, err)
	}
	return nil
}

func (s store) removeWaiver() error {
	if err := s.remove(filepath.Join(s.dir, waiverFile)); err != nil {
		return fmt.Errorf("%w: removing a waiver: %w", ErrFailed, err)
	}
	return nil
}
