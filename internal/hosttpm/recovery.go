package hosttpm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"virt-trust/internal/platform/secret"
)

// setAsideDir has the key sets that recovery put others in place of: with their
// own TPM, they work again.
const setAsideDir = "set-aside"

// WithSecrets calls use with the two secrets that are sealed to the host's
// state, the list key and the policy key's private half, of 32 bytes each. They
// are wiped when use returns.
func (h *Host) WithSecrets(ctx context.Context, use func(listKey, policyKey []byte) error) error {
	k, err := h.set()
	if err != nil {
		return err
	}
	listKey, err := do(ctx, h, func(c *client) ([]byte, error) { return c.unseal(k, k.listKey) })
	if err != nil {
		return err
	}
	defer secret.Wipe(listKey)
	policyKey, err := do(ctx, h, func(c *client) ([]byte, error) { return c.unseal(k, k.policyKey) })
	if err != nil {
		return err
	}
	defer secret.Wipe(policyKey)
	return use(listKey, policyKey)
}

// PolicyKeyName is the Name of the policy key, 34 bytes; nil before Provision.
func (h *Host) PolicyKeyName() []byte {
	return keyOf(h, func(k *keySet) []byte { return k.policyName })
}

// Reprovision makes a new key set for the TPM that there is now, with a list
// key that the host had before, of 32 bytes, which stay the caller's. It
// approves the state that the host is in. The old key files are set aside. A
// crash leaves the old set, the new one, or none: then Reprovision is called
// again.
func (h *Host) Reprovision(ctx context.Context, listKey []byte) error {
	if len(listKey) != listKeySize {
		return fmt.Errorf("a list key is %d bytes, not %d", listKeySize, len(listKey))
	}
	_, err := doWithin(ctx, h, max(provisionTimeout, h.cfg.Timeout), func(c *client) (struct{}, error) {
		now := time.Now()
		k, err := c.makeKeys(h.cfg, now, listKey, "recovery")
		if err != nil {
			return struct{}{}, fmt.Errorf("making the host's keys: %w", err)
		}
		h.keys.Store(nil)
		if err := h.store.exchange(k, now); err != nil {
			return struct{}{}, fmt.Errorf("%w: saving the host's keys: %w", ErrFailed, err)
		}
		// What is known of the TPM was known of the old keys.
		c.drop()
		c.approved, c.tickets = nil, nil
		h.damaged.Store(nil)
		h.counter.Store(nil)
		h.keys.Store(k)
		return struct{}{}, nil
	})
	return err
}

// exchange writes a new key set in place of the one that is there.
func (s store) exchange(k *keySet, now time.Time) error {
	if err := s.setAside(now); err != nil {
		return fmt.Errorf("setting the old keys aside: %w", err)
	}
	return s.save(k, now)
}

// setAside moves a key set, and what its policy key has signed, out of the way.
func (s store) setAside(now time.Time) error {
	aside := filepath.Join(s.dir, setAsideDir, strconv.FormatInt(now.UnixNano(), 10))
	if err := os.MkdirAll(aside, 0o700); err != nil {
		return err
	}
	for _, name := range []string{keysDir, policiesDir, waiverFile, revocationFile} {
		err := os.Rename(filepath.Join(s.dir, name), filepath.Join(aside, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := s.step(name, err); err != nil {
			return err
		}
	}
	for _, dir := range []string{aside, filepath.Dir(aside), s.dir} {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return nil
}
