package hosttpm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/hosttpm/policy"
	"virt-trust/internal/platform/secret"
)

// provisionTimeout is for the TPM's work in Provision alone: some take most of
// a minute for an RSA key.
const provisionTimeout = 5 * time.Minute

const listKeySize = 32

// Provision gives the host its keys if it has none, and approves the state
// that it is in. If it has, Provision checks that the TPM still takes them:
// ErrCleared if not; keys are never made anew while there are some, since vTPMs
// hang on them.
func (h *Host) Provision(ctx context.Context) error {
	if damaged := h.damaged.Load(); damaged != nil {
		return *damaged
	}
	if k := h.keys.Load(); k != nil {
		_, err := do(ctx, h, func(c *client) (struct{}, error) {
			if _, err := c.readEpoch(k); err != nil {
				return struct{}{}, err
			}
			return struct{}{}, c.with(k, k.bind, func(tpm2.TPMHandle) error { return nil })
		})
		return err
	}
	_, err := doWithin(ctx, h, max(provisionTimeout, h.cfg.Timeout), func(c *client) (struct{}, error) {
		if h.keys.Load() != nil { // by another call meanwhile
			return struct{}{}, nil
		}
		now := time.Now()
		k, err := c.makeKeys(h.cfg, now, nil, "first provisioning")
		if err != nil {
			return struct{}{}, fmt.Errorf("making the host's keys: %w", err)
		}
		if err := h.store.save(k, now); err != nil {
			return struct{}{}, fmt.Errorf("%w: saving the host's keys: %w", ErrFailed, err)
		}
		h.keys.Store(k)
		return struct{}{}, nil
	})
	return err
}

// makeKeys makes a key set in the TPM and approves the state that it is in. The
// list key is a new one unless it is given; note says why the state is approved.
// What it leaves in the TPM itself, SRK and epoch counter, it takes up when it
// is called again.
func (c *client) makeKeys(cfg Config, now time.Time, listKey []byte, note string) (*keySet, error) {
	k := &keySet{}
	if err := c.takeSRK(k); err != nil {
		return nil, err
	}
	if err := c.takeEpoch(k); err != nil {
		return nil, err
	}
	policyKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	state, err := c.readPCRs(cfg.Bank, cfg.PCRs)
	if err != nil {
		return nil, err
	}
	epoch, err := c.readEpoch(k)
	if err != nil {
		return nil, err
	}
	a, err := approve(policyKey, state, epoch, k.epochName, now, note)
	if err != nil {
		return nil, err
	}
	k.policies = []*policy.Approved{a}
	k.policyPublic = &policyKey.PublicKey
	scalar, err := policyKey.Bytes()
	if err != nil {
		return nil, err
	}
	defer secret.Wipe(scalar)
	if listKey == nil {
		listKey = make([]byte, listKeySize)
		defer secret.Wipe(listKey)
		rand.Read(listKey)
	}

	name, err := policy.KeyName(k.policyPublic)
	if err != nil {
		return nil, err
	}
	authPolicy := policy.Authorize(name)
	for _, o := range []struct {
		made      **object
		public    tpm2.TPMTPublic
		data      []byte
		certified *certification
	}{
		{&k.ak, akTemplate(), nil, nil},
		{&k.certifier, certifierTemplate(), nil, &k.certifierCertified},
		{&k.policyKey, sealedTemplate(authPolicy), scalar, nil},
		{&k.listKey, sealedTemplate(authPolicy), listKey, nil},
		{&k.bind, bindTemplate(authPolicy), nil, &k.bindCertified}, // last: it may take a minute
	} {
		if *o.made, err = c.create(k, o.public, o.data); err != nil {
			return nil, err
		}
		if o.certified != nil {
			if *o.certified, err = c.certify(k, *o.made); err != nil {
				return nil, err
			}
		}
	}
	return k, k.complete()
}

// takeSRK takes the storage root key at its standard handle, and makes it
// where there is none.
func (c *client) takeSRK(k *keySet) error {
	r, err := tpm2.ReadPublic{ObjectHandle: srkHandle}.Execute(c)
	if isRC(err, tpm2.TPMRCHandle) {
		if err = c.makeSRK(nil); err == nil {
			r, err = tpm2.ReadPublic{ObjectHandle: srkHandle}.Execute(c)
		}
	}
	if err != nil {
		return fmt.Errorf("storage root key: %w", err)
	}
	public, err := r.OutPublic.Contents()
	if err != nil {
		return fmt.Errorf("storage root key: %w", err)
	}
	a := public.ObjectAttributes
	if !a.Restricted || !a.Decrypt || a.SignEncrypt || !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin || !a.UserWithAuth {
		return fmt.Errorf("%w: the key at %#x is no storage root key", ErrFailed, uint32(srkHandle))
	}
	name, err := tpm2.ObjectName(public) // not the one that the response claims
	if err != nil {
		return fmt.Errorf("storage root key: %w", err)
	}
	k.srk = parent{srkHandle, name.Buffer, public}
	return nil
}

// makeSRK makes the storage root key persistent, if it gets the Name want or
// want is nil.
func (c *client) makeSRK(want []byte) error {
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	r, err := tpm2.CreatePrimary{PrimaryHandle: owner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(c)
	if err != nil {
		return ownerError(err)
	}
	defer c.flush(r.ObjectHandle)
	if want != nil && !bytes.Equal(r.Name.Buffer, want) {
		return ErrCleared
	}
	_, err = tpm2.EvictControl{
		Auth: owner, ObjectHandle: &tpm2.NamedHandle{Handle: r.ObjectHandle, Name: r.Name}, PersistentHandle: srkHandle,
	}.Execute(c)
	return ownerError(err)
}

// takeEpoch takes the epoch counter.
func (c *client) takeEpoch(k *keySet) error {
	n, err := c.takeCounter(firstEpochIndex, lastEpochIndex)
	if err != nil {
		return fmt.Errorf("epoch counter: %w", err)
	}
	k.epochIndex, k.epochName = n.index, n.name
	return nil
}

// takeCounter takes the first handle of a range that is free or that already
// holds such a counter. A counter never goes back, not even when it is deleted
// and defined anew (Part 3, 31.3), so that one left by an earlier attempt is as
// good as a new one.
func (c *client) takeCounter(first, last tpm2.TPMHandle) (counter, error) {
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	for index := first; index <= last; index++ {
		want := counterTemplate(index)
		r, err := tpm2.NVReadPublic{NVIndex: index}.Execute(c)
		if isRC(err, tpm2.TPMRCHandle) {
			if _, err = (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(want)}).Execute(c); err == nil {
				r, err = tpm2.NVReadPublic{NVIndex: index}.Execute(c)
			}
			err = ownerError(err)
		}
		if err != nil {
			return counter{}, err
		}
		public, err := r.NVPublic.Contents()
		if err != nil {
			return counter{}, err
		}
		written := public.Attributes.Written
		want.Attributes.Written = written
		if !bytes.Equal(tpm2.Marshal(*public), tpm2.Marshal(want)) {
			continue // somebody else's
		}
		if !written {
			if err := c.increment(counter{index, r.NVName.Buffer}); err != nil {
				return counter{}, err
			}
			want.Attributes.Written = true // and with it the Name changes
		}
		name, err := tpm2.NVName(&want)
		if err != nil {
			return counter{}, err
		}
		return counter{index, name.Buffer}, nil
	}
	return counter{}, fmt.Errorf("%w: all NV indexes from %#x to %#x are taken", ErrFailed, uint32(first), uint32(last))
}

func (c *client) increment(n counter) error {
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	_, err := tpm2.NVIncrement{AuthHandle: owner, NVIndex: n.handle()}.Execute(c)
	return ownerError(err)
}

// ownerError explains what a TPM with an owner password answers.
func ownerError(err error) error {
	if isRC(err, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail) {
		return fmt.Errorf("%w: its owner hierarchy has a password: %w", ErrFailed, err)
	}
	return err
}

// create makes an object under the SRK, of data if that is given. The session
// hides the data on its way and proves that the answer is the SRK's TPM's.
func (c *client) create(k *keySet, public tpm2.TPMTPublic, data []byte) (*object, error) {
	session := tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize, tpm2.Salted(k.srk.handle, *k.srk.public), tpm2.AESEncryption(128, tpm2.EncryptIn))
	cmd := tpm2.Create{ParentHandle: k.srk.auth(session), InPublic: tpm2.New2B(public)}
	if data != nil {
		cmd.InSensitive.Sensitive = &tpm2.TPMSSensitiveCreate{Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: data})}
	}
	r, err := cmd.Execute(c)
	if err != nil {
		return nil, fmt.Errorf("creating a key: %w", err)
	}
	return newObject(r.OutPublic, r.OutPrivate)
}

// certify has the AK certify that o is in its TPM.
func (c *client) certify(k *keySet, o *object) (certification, error) {
	var cert certification
	err := c.with(k, k.ak, func(ak tpm2.TPMHandle) error {
		return c.with(k, o, func(h tpm2.TPMHandle) error {
			empty := tpm2.PasswordAuth(nil)
			r, err := tpm2.Certify{
				ObjectHandle: tpm2.AuthHandle{Handle: h, Name: tpm2.TPM2BName{Buffer: o.name}, Auth: empty},
				SignHandle:   tpm2.AuthHandle{Handle: ak, Name: tpm2.TPM2BName{Buffer: k.ak.name}, Auth: empty},
				InScheme:     tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			}.Execute(c)
			if err != nil {
				return fmt.Errorf("certifying a key: %w", err)
			}
			cert = certification{attest: r.CertifyInfo.Bytes(), signature: tpm2.Marshal(r.Signature)}
			return nil
		})
	})
	return cert, err
}

// The values of Status.State.
const (
	Ready         = "ready"
	NotApproved   = "not-approved"
	Absent        = "absent"
	Cleared       = "cleared"
	LockedOut     = "locked-out"
	Failed        = "failed"
	Unprovisioned = "unprovisioned"
)

// Status is the host's TPM as it is now.
type Status struct {
	State        string // one of the constants above
	Problem      string // what is wrong, for people; "" when ready
	Manufacturer string // the TPM's, up to four letters; "" where it could not be asked
	Differing    []uint // PCRs in which the nearest approved state differs, ascending
}

// Status asks the TPM how it is. What is wrong with it is in the Status; the
// error is for a TPM that could not be asked in time (ErrBusy).
func (h *Host) Status(ctx context.Context) (Status, error) {
	type answer struct {
		maker string
		err   error
	}
	a, err := do(ctx, h, func(c *client) (answer, error) {
		r, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(tpm2.TPMPTManufacturer), PropertyCount: 1}.Execute(c)
		if err != nil {
			return answer{}, err
		}
		var a answer
		if p, err := r.CapabilityData.Data.TPMProperties(); err == nil && len(p.TPMProperty) == 1 {
			a.maker = fourLetters(p.TPMProperty[0].Value)
		}
		k, err := h.set()
		if err != nil {
			a.err = err
			return a, nil
		}
		// What a start needs, short of using a key.
		if err := c.with(k, k.bind, func(tpm2.TPMHandle) error { return nil }); err != nil {
			return a, err
		}
		_, err = c.match(k)
		if errors.Is(err, ErrPolicy) {
			a.err = err
			return a, nil
		}
		return a, err
	})
	if err == nil {
		err = a.err
	}
	s := Status{State: Ready, Manufacturer: a.maker}
	if err == nil {
		return s, nil
	}
	s.Problem = err.Error()
	var p *PolicyError
	switch {
	case errors.Is(err, ErrBusy):
		return Status{}, err
	case errors.As(err, &p):
		s.State, s.Differing = NotApproved, p.Differing
	case errors.Is(err, ErrAbsent):
		s.State = Absent
	case errors.Is(err, ErrCleared):
		s.State = Cleared
	case errors.Is(err, ErrLockedOut):
		s.State = LockedOut
	case errors.Is(err, ErrNotProvisioned):
		s.State = Unprovisioned
	default:
		s.State = Failed
	}
	return s, nil
}

// fourLetters spells TPM_PT_MANUFACTURER.
func fourLetters(v uint32) string {
	b := bytes.TrimRight(binary.BigEndian.AppendUint32(nil, v), "\x00 ")
	for i := range b {
		if b[i] < ' ' || b[i] > '~' {
			b[i] = '?'
		}
	}
	return string(b)
}
