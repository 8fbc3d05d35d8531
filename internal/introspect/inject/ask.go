package inject

import (
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"virt-trust/internal/evidence/report"
)

// patient repeats a command for as long as the TPM says that it is to be
// (TPM_RC_RETRY, _YIELDED, _TESTING: TPM 2.0 Part 2, 6.6.3), as it does at the first
// use of an algorithm.
type patient struct{ transport.TPM }

const tries = 10

func (p patient) Send(command []byte) (answer []byte, err error) {
	for range tries {
		if answer, err = p.TPM.Send(command); err != nil || len(answer) < 10 {
			return answer, err
		}
		rc := tpm2.TPMRC(uint32(answer[6])<<24 | uint32(answer[7])<<16 | uint32(answer[8])<<8 | uint32(answer[9]))
		if rc != tpm2.TPMRCRetry && rc != tpm2.TPMRCYielded && rc != tpm2.TPMRCTesting {
			break
		}
	}
	return answer, nil
}

// names are those that evidence has for banks.
var names = map[tpm2.TPMIAlgHash]string{tpm2.TPMAlgSHA1: "sha1", tpm2.TPMAlgSHA256: "sha256", tpm2.TPMAlgSHA384: "sha384", tpm2.TPMAlgSHA512: "sha512"}

// banks reads all active PCRs, for which QEMU must be held: a command gives
// eight.
func banks(tpm transport.TPM) ([]report.Bank, error) {
	r, err := tpm2.GetCapability{Capability: tpm2.TPMCapPCRs, PropertyCount: 1}.Execute(tpm)
	if err != nil {
		return nil, fmt.Errorf("TPM2_GetCapability: %w", err)
	}
	active, err := r.CapabilityData.Data.AssignedPCR()
	if err != nil {
		return nil, err
	}
	var all []report.Bank
	for _, b := range active.PCRSelections {
		if names[b.Hash] == "" || !slices.ContainsFunc(b.PCRSelect, func(b byte) bool { return b != 0 }) {
			continue
		}
		bank := report.Bank{Algorithm: names[b.Hash]}
		for i := range b.PCRSelect {
			if err := readEight(tpm, b, i, &bank.Values); err != nil {
				return nil, err
			}
		}
		all = append(all, bank)
	}
	return all, nil
}

func readEight(tpm transport.TPM, b tpm2.TPMSPCRSelection, i int, values *report.Values) error {
	sel := make([]byte, len(b.PCRSelect))
	if sel[i] = b.PCRSelect[i]; sel[i] == 0 {
		return nil
	}
	r, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: b.Hash, PCRSelect: sel}}}}.Execute(tpm)
	if err != nil {
		return fmt.Errorf("TPM2_PCR_Read: %w", err)
	}
	n := 0
	for bit := range 8 {
		if sel[i]>>bit&1 == 0 {
			continue
		}
		pcr := 8*i + bit
		if n >= len(r.PCRValues.Digests) || pcr >= len(values) {
			return fmt.Errorf("TPM2_PCR_Read gave %d PCRs of bank %s from PCR %d on", n, names[b.Hash], 8*i)
		}
		values[pcr] = r.PCRValues.Digests[n].Buffer
		n++
	}
	return nil
}

// quoted is the bank that is quoted: SHA-256 where it is active, else the first
// that is.
func quoted(all []report.Bank) (tpm2.TPMLPCRSelection, error) {
	if len(all) == 0 {
		return tpm2.TPMLPCRSelection{}, errors.New("the vTPM has no active bank")
	}
	b := all[0]
	if i := slices.IndexFunc(all, func(b report.Bank) bool { return b.Algorithm == "sha256" }); i >= 0 {
		b = all[i]
	}
	s := tpm2.TPMSPCRSelection{PCRSelect: make([]byte, 3)}
	for h, name := range names {
		if name == b.Algorithm {
			s.Hash = h
		}
	}
	for i := range b.Values.All() {
		s.PCRSelect[i/8] |= 1 << (i % 8)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{s}}, nil
}

// quote has the key at a persistent handle quote. Loading that takes a slot
// for transient objects, of which there are three; where the guest has all of
// them, one is saved and put back.
func quote(tpm transport.TPM, ak tpm2.TPMHandle, qualifying []byte, sel tpm2.TPMLPCRSelection) (*report.Quote, error) {
	pub, err := tpm2.ReadPublic{ObjectHandle: ak}.Execute(tpm)
	if err != nil && !errors.Is(err, tpm2.TPMRCObjectMemory) {
		return nil, fmt.Errorf("%w: TPM2_ReadPublic of %#x: %w", ErrNoAK, uint32(ak), err)
	}
	if err != nil {
		var q *report.Quote
		err = withSlot(tpm, func() error { q, err = quote(tpm, ak, qualifying, sel); return err })
		return q, err
	}
	sign := func() (*tpm2.QuoteResponse, error) {
		return tpm2.Quote{
			SignHandle:     tpm2.AuthHandle{Handle: ak, Name: pub.Name, Auth: tpm2.PasswordAuth(nil)},
			QualifyingData: tpm2.TPM2BData{Buffer: qualifying},
			InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			PCRSelect:      sel,
		}.Execute(tpm)
	}
	r, err := sign()
	if errors.Is(err, tpm2.TPMRCObjectMemory) {
		err = withSlot(tpm, func() error { r, err = sign(); return err })
	}
	if err != nil {
		return nil, fmt.Errorf("TPM2_Quote: %w", err)
	}
	return &report.Quote{Attest: r.Quoted.Bytes(), Signature: tpm2.Marshal(r.Signature)}, nil
}

// withSlot does something while one of the guest's transient objects is saved.
// It comes back under its handle: that of the only free slot.
func withSlot(tpm transport.TPM, do func() error) error {
	const first, many = 0x80000000, 64
	r, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: many}.Execute(tpm)
	if err != nil {
		return fmt.Errorf("TPM2_GetCapability: %w", err)
	}
	handles, err := r.CapabilityData.Data.Handles()
	if err != nil {
		return err
	}
	if len(handles.Handle) == 0 {
		return errors.New("the vTPM says that it is full, and has no transient object")
	}
	h := handles.Handle[len(handles.Handle)-1]
	saved, err := tpm2.ContextSave{SaveHandle: h}.Execute(tpm)
	if err != nil {
		return fmt.Errorf("TPM2_ContextSave: %w", err)
	}
	if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(tpm); err != nil {
		return fmt.Errorf("TPM2_FlushContext: %w", err)
	}
	err = do()
	back, err2 := tpm2.ContextLoad{Context: saved.Context}.Execute(tpm)
	switch {
	case err2 != nil:
		return errors.Join(err, fmt.Errorf("%w: TPM2_ContextLoad of the guest's object %#x: %w", ErrLost, uint32(h), err2))
	case back.LoadedHandle != h:
		return errors.Join(err, fmt.Errorf("%w: the guest's object %#x came back as %#x", ErrLost, uint32(h), uint32(back.LoadedHandle)))
	}
	return err
}
