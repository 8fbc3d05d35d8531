package ek

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// AKHandle is where a vTPM keeps the AK that it gets at its manufacture: among
// the persistent objects of the platform hierarchy (TPM 2.0 Part 2, table 28,
// PLATFORM_PERSISTENT), whose authorisation firmware makes random at each boot,
// so that neither the guest nor its owner can evict it.
const AKHandle = tpm2.TPMHandle(0x8180ff01)

// akTemplate is an ECC P-256 restricted signing key without authorisation: it
// signs only what the vTPM itself says.
var akTemplate = tpm2.TPMTPublic{
	Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{
		FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true,
		SignEncrypt: true, Restricted: true,
	},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		Scheme: tpm2.TPMTECCScheme{
			Scheme:  tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
		},
		CurveID: tpm2.TPMECCNistP256,
	}),
	Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{}),
}

// MakeAK gives the state of a vTPM, as Identity takes it, with an AK at
// AKHandle, and the AK's TPMT_PUBLIC. An AK that is there stays. The state that it
// is given stays as it is.
func (r Reader) MakeAK(ctx context.Context, name string, state, stateKey []byte) (after, public []byte, err error) {
	after, err = r.load(ctx, name, state, stateKey, func(t transport.TPM) error {
		public, err = makeAK(t)
		return err
	})
	return after, public, err
}

// ParseAK gives the public key of a TPMT_PUBLIC that MakeAK gave.
func ParseAK(public []byte) (*ecdsa.PublicKey, error) {
	p, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
	if err != nil {
		return nil, err
	}
	parms, err := p.Parameters.ECCDetail()
	if err != nil {
		return nil, err
	}
	point, err := p.Unique.ECC()
	if err != nil {
		return nil, err
	}
	return tpm2.ECDSAPub(parms, point)
}

func makeAK(t transport.TPM) (public []byte, err error) {
	if public, err = readAK(t); public != nil || err != nil {
		return public, err
	}
	k, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHPlatform, InPublic: tpm2.New2B(akTemplate)}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("making the AK: %w", err)
	}
	_, err = tpm2.EvictControl{
		Auth:             tpm2.TPMRHPlatform,
		ObjectHandle:     &tpm2.NamedHandle{Handle: k.ObjectHandle, Name: k.Name},
		PersistentHandle: AKHandle,
	}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("making the AK persistent: %w", err)
	}
	_, err = tpm2.FlushContext{FlushHandle: k.ObjectHandle}.Execute(t)
	// An orderly end, as swtpm_setup's is.
	_, e := tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}.Execute(t)
	if err = errors.Join(err, e); err != nil {
		return nil, err
	}
	return k.OutPublic.Bytes(), nil
}

// readAK gives the AK that is there, nil if there is none.
func readAK(t transport.TPM) ([]byte, error) {
	r, err := tpm2.ReadPublic{ObjectHandle: AKHandle}.Execute(t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("looking for an AK: %w", err)
	}
	p, err := r.OutPublic.Contents()
	if err != nil {
		return nil, err
	}
	blank := *p
	blank.Unique = akTemplate.Unique
	if !bytes.Equal(tpm2.Marshal(blank), tpm2.Marshal(akTemplate)) || !primary(tpm2.TPMRHPlatform, r.Name.Buffer, r.QualifiedName.Buffer) {
		return nil, fmt.Errorf("there is another key at %#x", uint32(AKHandle))
	}
	return r.OutPublic.Bytes(), nil
}
