package hosttpm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// The list counter takes the first of these that is free. It is made when it is
// first needed. Nothing on the disk says where it is: what is on the disk can be
// taken away. It is known by its authPolicy, which names the bind key and is
// good for nothing else.
const (
	firstListIndex = tpm2.TPMHandle(0x01500130)
	lastListIndex  = tpm2.TPMHandle(0x0150013F)
)

// listCounterTemplate is a counter that its empty authValue counts up, so that
// it works on when the owner hierarchy gets a password.
func listCounterTemplate(index tpm2.TPMHandle, use string, k *keySet) tpm2.TPMSNVPublic {
	id := sha256.Sum256(append([]byte(use+"\x00"), k.bind.name...))
	t := counterTemplate(index)
	t.Attributes.OwnerWrite, t.Attributes.AuthWrite = false, true
	t.AuthPolicy = tpm2.TPM2BDigest{Buffer: id[:]}
	return t
}

const (
	listCounter  = "virt-trust/list-counter/v1"
	probeCounter = "virt-trust/probe/v1"
)

// place is a handle of the range, as it is now.
type place struct {
	index tpm2.TPMHandle
	found bool // the counter is there
	name  []byte
	again bool // and was counted up before
}

// findCounter finds the counter of this use, or the first free handle.
func (c *client) findCounter(k *keySet, use string) (place, error) {
	const size = uint32(lastListIndex - firstListIndex + 1)
	r, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(firstListIndex), PropertyCount: size}.Execute(c)
	if err != nil {
		return place{}, err
	}
	handles, err := r.CapabilityData.Data.Handles()
	if err != nil {
		return place{}, err
	}
	var free place
	for index := firstListIndex; index <= lastListIndex; index++ {
		if !slices.Contains(handles.Handle, index) {
			if free.index == 0 {
				free.index = index
			}
			continue
		}
		r, err := tpm2.NVReadPublic{NVIndex: index}.Execute(c)
		if err != nil {
			return place{}, err
		}
		public, err := r.NVPublic.Contents()
		if err != nil {
			return place{}, err
		}
		want := listCounterTemplate(index, use, k)
		want.Attributes.Written = public.Attributes.Written
		if !bytes.Equal(tpm2.Marshal(*public), tpm2.Marshal(want)) {
			continue
		}
		name, err := tpm2.NVName(&want) // not the one that the response claims
		if err != nil {
			return place{}, err
		}
		return place{index, true, name.Buffer, want.Attributes.Written}, nil
	}
	if free.index == 0 {
		return place{}, fmt.Errorf("%w: all NV indexes from %#x to %#x are taken", ErrFailed, uint32(firstListIndex), uint32(lastListIndex))
	}
	return free, nil
}

// defineCounter makes the counter of this use, which is found then.
func (c *client) defineCounter(k *keySet, p place, use string) (place, error) {
	t := listCounterTemplate(p.index, use, k)
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	if _, err := (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(t)}).Execute(c); err != nil {
		return p, ownerError(err)
	}
	name, err := tpm2.NVName(&t)
	return place{p.index, true, name.Buffer, false}, err
}

// countUp gives the place as it is then: its Name changes with the first time.
func (c *client) countUp(k *keySet, p place, use string) (place, error) {
	n := counter{p.index, p.name}
	if _, err := (tpm2.NVIncrement{
		AuthHandle: tpm2.AuthHandle{Handle: n.index, Name: tpm2.TPM2BName{Buffer: n.name}, Auth: tpm2.PasswordAuth(nil)}, NVIndex: n.handle(),
	}).Execute(c); err != nil {
		return p, err
	}
	if p.again {
		return p, nil
	}
	t := listCounterTemplate(p.index, use, k)
	t.Attributes.Written = true
	name, err := tpm2.NVName(&t)
	p.name, p.again = name.Buffer, true
	return p, err
}

// readSurely reads a counter so that the answer is the TPM's and nobody's else:
// it has the HMAC of the salted session.
func (c *client) readSurely(k *keySet, p place) (uint64, error) {
	session, err := c.secretly(k)
	if err != nil {
		return 0, err
	}
	n := counter{p.index, p.name}
	r, err := tpm2.NVRead{
		AuthHandle: tpm2.AuthHandle{Handle: n.index, Name: tpm2.TPM2BName{Buffer: n.name}, Auth: tpm2.PasswordAuth(nil)}, NVIndex: n.handle(), Size: 8,
	}.Execute(c, session)
	if err != nil {
		return 0, err
	}
	if len(r.Data.Buffer) != 8 {
		return 0, fmt.Errorf("%w: counter of %d bytes", ErrFailed, len(r.Data.Buffer))
	}
	return binary.BigEndian.Uint64(r.Data.Buffer), nil
}

// Counter reads the list counter, a number above zero that never goes back; 0
// where these keys have no such counter in their TPM.
func (h *Host) Counter(ctx context.Context) (uint64, error) {
	k, err := h.set()
	if err != nil {
		return 0, err
	}
	v, err := do(ctx, h, func(c *client) (uint64, error) {
		p, err := c.findCounter(k, listCounter)
		if err != nil || !p.again {
			return 0, err
		}
		h.counter.Store(&p)
		return c.readSurely(k, p)
	})
	if err != nil {
		return 0, fmt.Errorf("reading the list counter: %w", err)
	}
	return v, nil
}

// FirstCount foretells at what the list counter will stand when it is made: a
// TPM begins a new counter above every one that was deleted, so that another one,
// which goes again at once, tells.
func (h *Host) FirstCount(ctx context.Context) (uint64, error) {
	k, err := h.set()
	if err != nil {
		return 0, err
	}
	return do(ctx, h, func(c *client) (v uint64, err error) {
		p, err := c.findCounter(k, probeCounter)
		if err == nil && !p.found {
			p, err = c.defineCounter(k, p, probeCounter)
		}
		if err == nil {
			p, err = c.countUp(k, p, probeCounter)
		}
		if err == nil {
			v, err = c.readSurely(k, p)
		}
		if err == nil {
			owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
			_, err = tpm2.NVUndefineSpace{AuthHandle: owner, NVIndex: counter{p.index, p.name}.handle()}.Execute(c)
		}
		if err != nil {
			return 0, fmt.Errorf("foretelling the list counter: %w", ownerError(err))
		}
		return v + 1, nil
	})
}

// Count brings the list counter to next, one above what it is, and makes it
// where there is none. It gives what the counter is then: no other value, but
// for a counter that is new or that someone else counted up. Done again after an
// error it counts once. It gives way to every other request unless urgent.
func (h *Host) Count(ctx context.Context, next uint64, urgent bool) (uint64, error) {
	k, err := h.set()
	if err != nil {
		return 0, err
	}
	in := doLater[uint64]
	if urgent {
		in = do[uint64]
	}
	again := false
	v, err := in(ctx, h, func(c *client) (v uint64, err error) {
		// Of a counter that was read before, and counts as it should, one command is
		// all: a start may be waiting behind it.
		if p := h.counter.Load(); p != nil && !again {
			again = true
			_, err := c.countUp(k, *p, listCounter)
			return next, err
		}
		again = true
		p, err := c.findCounter(k, listCounter)
		if err == nil && p.again {
			if v, err = c.readSurely(k, p); err == nil && v >= next {
				h.counter.Store(&p)
				return v, nil
			}
		}
		if err == nil && !p.found {
			p, err = c.defineCounter(k, p, listCounter)
		}
		if err == nil {
			p, err = c.countUp(k, p, listCounter)
		}
		if err == nil {
			v, err = c.readSurely(k, p)
		}
		if err == nil {
			h.counter.Store(&p)
		}
		return v, err
	})
	if err != nil {
		h.counter.Store(nil) // look before the next time
		return 0, fmt.Errorf("raising the list counter: %w", err)
	}
	return v, nil
}
