package hosttpm

import (
	"errors"
	"fmt"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/hosttpm/link"
)

// What can be wrong with the TPM. Every error of this package is one of these
// for errors.Is, but for those that a caller's own mistake makes.
var (
	ErrPolicy         = errors.New("the host is not in an approved state")
	ErrCleared        = errors.New("the TPM no longer holds what this host's keys were made under")
	ErrBusy           = link.ErrBusy
	ErrLockedOut      = errors.New("the TPM refuses authorisations for some time")
	ErrAbsent         = link.ErrAbsent
	ErrFailed         = link.ErrFailed
	ErrNotProvisioned = errors.New("this host has no keys yet")
	ErrCiphertext     = errors.New("not wrapped to this host's bind key")
)

// PolicyError is ErrPolicy with the nearest approved state's difference.
type PolicyError struct {
	Differing []uint // PCRs that have other values, ascending; empty: the state is approved no longer
}

func (e *PolicyError) Error() string {
	if len(e.Differing) == 0 {
		return ErrPolicy.Error() + ": its approval was withdrawn"
	}
	var s []string
	for _, p := range e.Differing {
		s = append(s, fmt.Sprint(p))
	}
	return ErrPolicy.Error() + ": PCR " + strings.Join(s, ", ") + " differ"
}

// Is makes errors.Is(err, ErrPolicy) true.
func (e *PolicyError) Is(target error) bool { return target == ErrPolicy }

// policyStep marks an error of a command that builds the policy, to tell it
// from one of the command that uses it.
type policyStep struct{ err error }

func (e policyStep) Error() string { return "policy: " + e.err.Error() }
func (e policyStep) Unwrap() error { return e.err }

// responseCode gives the TPM's response code in err's chain.
func responseCode(err error) (tpm2.TPMRC, bool) {
	var rc tpm2.TPMRC
	ok := errors.As(err, &rc)
	return rc, ok
}

func isRC(err error, codes ...tpm2.TPMRC) bool {
	rc, ok := responseCode(err)
	if !ok {
		return false
	}
	for _, c := range codes {
		if rc.Is(c) {
			return true
		}
	}
	return false
}

// lostState are codes of a TPM that forgot our sessions or objects, as after
// its reset, and of a PCR extended by others between two of our commands: a
// second try on a fresh connection is worth its while.
func lostState(err error) bool {
	return isRC(err, tpm2.TPMRCHandle, tpm2.TPMRCReferenceH0, tpm2.TPMRCReferenceH1, tpm2.TPMRCReferenceH2,
		tpm2.TPMRCReferenceS0, tpm2.TPMRCReferenceS1, tpm2.TPMRCReferenceS2,
		tpm2.TPMRCObjectMemory, tpm2.TPMRCSessionMemory, tpm2.TPMRCSessionHandles, tpm2.TPMRCMemory,
		tpm2.TPMRCContextGap, tpm2.TPMRCAuthFail, tpm2.TPMRCBadAuth, tpm2.TPMRCTicket)
}

// sentinel puts the sentinel that fits on an error which has none yet.
func sentinel(err error) error {
	for _, s := range []error{ErrPolicy, ErrCleared, ErrBusy, ErrLockedOut, ErrAbsent, ErrFailed, ErrNotProvisioned, ErrCiphertext, ErrCredential} {
		if errors.Is(err, s) {
			return err
		}
	}
	if isRC(err, tpm2.TPMRCLockout) {
		return fmt.Errorf("%w: %w", ErrLockedOut, err)
	}
	return fmt.Errorf("%w: %w", ErrFailed, err)
}
