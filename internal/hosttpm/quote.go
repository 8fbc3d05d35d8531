package hosttpm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/hosttpm/policy"
)

// quoteTries bounds the quotes that are made until no PCR was extended between
// a quote and the reading of the PCRs.
const quoteTries = 16

// Quoted is a quote by the AK, and the PCRs that it is over.
type Quoted struct {
	Attest    []byte // TPMS_ATTEST
	Signature []byte // TPMT_SIGNATURE
	State     policy.State
	// Of TPMS_CLOCK_INFO: Clock is in milliseconds (Part 1, 36). Since the AK is not
	// in the endorsement hierarchy, the TPM adds to both counts, modulo 2^32, a
	// number that stays the same for this AK (36.7): they can be compared from quote
	// to quote, and with nothing else.
	Clock                    uint64
	ResetCount, RestartCount uint32
	Safe                     bool
}

// Quote has the AK quote PCRs of a bank, "sha256" or "sha384", with this
// qualifyingData. It waits for every other request. Those that come meanwhile
// wait for one quote and the reading of its PCRs at most: where a PCR was
// extended in between, they go before the next try.
func (h *Host) Quote(ctx context.Context, qualifying [sha256.Size]byte, bank string, pcrs []uint) (*Quoted, error) {
	if _, err := h.set(); err != nil {
		return nil, err
	}
	if len(pcrs) == 0 {
		return nil, errors.New("a quote over no PCR says nothing")
	}
	if bank != "sha256" && bank != "sha384" {
		return nil, fmt.Errorf("there is no quote of PCR bank %q", bank)
	}
	pcrs = slices.Compact(slices.Sorted(slices.Values(pcrs)))
	if last := pcrs[len(pcrs)-1]; last > 23 {
		return nil, fmt.Errorf("there is no PCR %d", last)
	}
	for range quoteTries {
		q, err := doLater(ctx, h, func(c *client) (*Quoted, error) { return c.quote(qualifying, bank, pcrs) })
		if q != nil || err != nil {
			return q, err
		}
	}
	return nil, fmt.Errorf("%w: PCRs were extended during each of %d quotes", ErrBusy, quoteTries)
}

// quote gives a quote, or nil where a PCR was extended before all were read.
func (c *client) quote(qualifying [sha256.Size]byte, bank string, pcrs []uint) (q *Quoted, err error) {
	k := c.host.keys.Load()
	var digest []byte
	err = c.with(k, k.ak, func(ak tpm2.TPMHandle) error {
		r, err := tpm2.Quote{
			SignHandle:     tpm2.AuthHandle{Handle: ak, Name: tpm2.TPM2BName{Buffer: k.ak.name}, Auth: tpm2.PasswordAuth(nil)},
			QualifyingData: tpm2.TPM2BData{Buffer: qualifying[:]},
			InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			PCRSelect:      selection(bank, pcrs),
		}.Execute(c)
		if err != nil {
			return fmt.Errorf("quoting: %w", err)
		}
		if q, digest, err = checkQuote(r, k.akPublic, qualifying, selection(bank, pcrs)); err != nil {
			return fmt.Errorf("%w: its quote: %w", ErrFailed, err)
		}
		return nil
	})
	if err == nil {
		q.State, err = c.readPCRs(bank, pcrs)
	}
	if err != nil || !bytes.Equal(pcrDigest(q.State), digest) {
		return nil, err
	}
	return q, nil
}

// checkQuote sees to it that a quote is the one that was asked for. It would be
// refused elsewhere, where nobody knows why.
func checkQuote(r *tpm2.QuoteResponse, ak *ecdsa.PublicKey, qualifying [sha256.Size]byte, want tpm2.TPMLPCRSelection) (*Quoted, []byte, error) {
	a, err := r.Quoted.Contents()
	if err != nil {
		return nil, nil, err
	}
	info, err := a.Attested.Quote()
	if err != nil {
		return nil, nil, err
	}
	if a.Magic != tpm2.TPMGeneratedValue || a.Type != tpm2.TPMSTAttestQuote || !bytes.Equal(a.ExtraData.Buffer, qualifying[:]) {
		return nil, nil, errors.New("it says something else than it was asked for")
	}
	if !bytes.Equal(tpm2.Marshal(info.PCRSelect), tpm2.Marshal(want)) {
		return nil, nil, errors.New("it is over other PCRs")
	}
	der, err := ecdsaASN1(r.Signature)
	if err != nil {
		return nil, nil, err
	}
	q := &Quoted{Attest: r.Quoted.Bytes(), Signature: tpm2.Marshal(r.Signature)}
	if d := sha256.Sum256(q.Attest); !ecdsa.VerifyASN1(ak, d[:], der) {
		return nil, nil, errors.New("its signature is wrong")
	}
	c := a.ClockInfo
	q.Clock, q.ResetCount, q.RestartCount, q.Safe = c.Clock, c.ResetCount, c.RestartCount, bool(c.Safe)
	return q, info.PCRDigest.Buffer, nil
}

// pcrDigest is TPMS_QUOTE_INFO's, by the hash of the AK's scheme.
func pcrDigest(s policy.State) []byte {
	h := sha256.New()
	for _, i := range s.Indexes() {
		h.Write(s.PCRs[i])
	}
	return h.Sum(nil)
}
