package hosttpm

import (
	"bytes"
	"context"
	"fmt"
	"maps"

	"github.com/google/go-tpm/tpm2"
)

// banks are the PCR banks that are read and extended, by the name of their
// hash. A bank of another hash (SM3, SHA3) stays as it is.
var banks = []struct {
	name string
	alg  tpm2.TPMAlgID
	size int // of a digest, in bytes
}{
	{"sha1", tpm2.TPMAlgSHA1, 20}, {"sha256", tpm2.TPMAlgSHA256, 32}, {"sha384", tpm2.TPMAlgSHA384, 48}, {"sha512", tpm2.TPMAlgSHA512, 64},
}

// PCR is one PCR as the TPM has it now.
type PCR struct {
	Values map[string][]byte // by bank: "sha1", "sha256", "sha384", "sha512", those that are active
	// ResetCount tells one life of the PCRs from the next: the TPM raises it each
	// time it is reset (Part 1, 36.5).
	ResetCount uint32
}

// ReadPCR reads a PCR in all of its banks.
func (h *Host) ReadPCR(ctx context.Context, index uint) (PCR, error) {
	return do(ctx, h, func(c *client) (PCR, error) {
		values, err := c.readBanks(index)
		if err != nil {
			return PCR{}, err
		}
		r, err := tpm2.ReadClock{}.Execute(c)
		if err != nil {
			return PCR{}, fmt.Errorf("reading the TPM's clock: %w", err)
		}
		return PCR{values, r.CurrentTime.ClockInfo.ResetCount}, nil
	})
}

// Extension is one extension of a PCR. Each map is by bank, and has the banks
// that are active.
type Extension struct {
	PCR           uint
	Digests       map[string][]byte // of the event
	Before, After map[string][]byte // what the PCR is taken to hold, and shall hold then
}

// ExtendPCR extends a PCR in all banks with one command. Where the connection
// broke under it, a second try goes by Before and After, so that nothing is
// extended twice. After an error the PCR may have been extended or not.
func (h *Host) ExtendPCR(ctx context.Context, e Extension) error {
	again := false
	_, err := do(ctx, h, func(c *client) (none struct{}, err error) {
		err = c.extend(e, again)
		again = true
		return none, err
	})
	return err
}

// extend extends; with again, unless it was done before.
func (c *client) extend(e Extension, again bool) error {
	if again {
		now, err := c.readBanks(e.PCR)
		if err != nil {
			return err
		}
		if maps.EqualFunc(now, e.After, bytes.Equal) {
			return nil
		}
		if !maps.EqualFunc(now, e.Before, bytes.Equal) {
			return fmt.Errorf("%w: PCR %d was extended by someone else, or was reset", ErrFailed, e.PCR)
		}
	}
	var digests tpm2.TPMLDigestValues
	for _, b := range banks {
		if d, ok := e.Digests[b.name]; ok {
			digests.Digests = append(digests.Digests, tpm2.TPMTHA{HashAlg: b.alg, Digest: d})
		}
	}
	extend := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(e.PCR), Auth: tpm2.PasswordAuth(nil)}, Digests: digests}
	if _, err := extend.Execute(c); err != nil {
		return fmt.Errorf("extending PCR %d: %w", e.PCR, err)
	}
	return nil
}

// readBanks reads one PCR in every active bank. A TPM may answer for some of
// the banks that it was asked for; it is asked for the rest then.
func (c *client) readBanks(index uint) (map[string][]byte, error) {
	values := map[string][]byte{}
	for progress := true; progress; {
		var ask, got tpm2.TPMLPCRSelection
		for _, b := range banks {
			if _, have := values[b.name]; !have {
				ask.PCRSelections = append(ask.PCRSelections, tpm2.TPMSPCRSelection{Hash: b.alg, PCRSelect: tpm2.PCClientCompatible.PCRs(index)})
			}
		}
		if len(ask.PCRSelections) == 0 {
			break
		}
		r, err := tpm2.PCRRead{PCRSelectionIn: ask}.Execute(c)
		if err != nil {
			return nil, fmt.Errorf("reading PCR %d: %w", index, err)
		}
		for _, s := range r.PCRSelectionOut.PCRSelections {
			if selects(tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{s}}, index) {
				got.PCRSelections = append(got.PCRSelections, s)
			}
		}
		progress = false
		if len(got.PCRSelections) != len(r.PCRValues.Digests) {
			return nil, fmt.Errorf("%w: it gave %d values of PCR %d for %d banks", ErrFailed, len(r.PCRValues.Digests), index, len(got.PCRSelections))
		}
		for i, s := range got.PCRSelections {
			for _, b := range banks {
				if b.alg == s.Hash && values[b.name] == nil && len(r.PCRValues.Digests[i].Buffer) == b.size {
					values[b.name], progress = r.PCRValues.Digests[i].Buffer, true
				}
			}
		}
	}
	if len(values) == 0 {
		return nil, fmt.Errorf("%w: PCR %d is in no bank that is known", ErrFailed, index)
	}
	return values, nil
}
