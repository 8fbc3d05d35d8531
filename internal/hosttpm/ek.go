package hosttpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// ErrCredential is for a credential that was made for another EK or AK, or was
// changed.
var ErrCredential = errors.New("not a credential for this host's EK and AK")

// endorsement is one kind of EK: a template of the TCG EK Credential Profile
// (2.5, B.3), and where such a key and its certificate lie (2.2.1.4 and TCG
// Provisioning Guidance 1.0, 7.8).
type endorsement struct {
	name        string
	template    tpm2.TPMTPublic
	persistent  tpm2.TPMHandle
	certificate tpm2.TPMHandle
}

// endorsements in the order in which they are preferred: RSA-2048, since each
// TPM has it, unless the TPM holds a certificate for the other one alone.
var endorsements = []endorsement{
	{"RSA-2048", tpm2.RSAEKTemplate, 0x81010001, 0x01C00002},
	{"ECC P-256", tpm2.ECCEKTemplate, 0x81010002, 0x01C0000A},
}

const (
	maxCertificate = 4096 // bytes; those that are out there have less than 2,000
	nvPiece        = 512  // bytes that every TPM gives with one TPM2_NV_Read
)

// Identity is what tells this host from every other: public areas as
// TPMT_PUBLIC, certifications by the AK as TPMS_ATTEST and TPMT_SIGNATURE.
type Identity struct {
	EK            []byte
	EKCertificate []byte // X.509, DER, over EK; nil where the TPM holds none
	// EKProblem says why a certificate that the TPM does hold is not given.
	EKProblem                           string
	AK, Bind, Certifier                 []byte
	BindAttest, BindSignature           []byte
	CertifierAttest, CertifierSignature []byte
	AKName, BindName, CertifierKeyName  []byte
}

// Identity asks the TPM for its EK and gives it with the host's keys. It waits
// for every other request. A TPM that has no EK in its memory makes it, which
// takes some of them ten seconds.
func (h *Host) Identity(ctx context.Context) (*Identity, error) {
	if _, err := h.set(); err != nil {
		return nil, err
	}
	id, err := doLaterWithin(ctx, h, max(provisionTimeout, h.cfg.Timeout), func(c *client) (*Identity, error) {
		k := h.keys.Load()
		id := &Identity{
			AK: tpm2.Marshal(*k.ak.area), Bind: tpm2.Marshal(*k.bind.area), Certifier: tpm2.Marshal(*k.certifier.area),
			BindAttest: k.bindCertified.attest, BindSignature: k.bindCertified.signature,
			CertifierAttest: k.certifierCertified.attest, CertifierSignature: k.certifierCertified.signature,
			AKName: k.ak.name, BindName: k.bind.name, CertifierKeyName: k.certifier.name,
		}
		e, index, err := c.chooseEK()
		if err != nil {
			return nil, err
		}
		var certificate []byte
		if index != nil {
			if certificate, err = c.readNV(e.certificate, index); err != nil {
				return nil, fmt.Errorf("reading the EK's certificate: %w", err)
			}
		}
		return id, c.withEK(e, func(ek tpm2.NamedHandle, public *tpm2.TPMTPublic) error {
			id.EK = tpm2.Marshal(*public)
			if index == nil {
				return nil
			}
			if id.EKCertificate, err = certificateOver(public, certificate); err != nil {
				id.EKProblem = fmt.Sprintf("the EK certificate at %#x: %s", uint32(e.certificate), err)
			}
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("asking for the host's identity: %w", err)
	}
	return id, nil
}

// chooseEK gives the EK that is used, always the same one of a TPM, and the
// public area of the index that has its certificate, or nil.
func (c *client) chooseEK() (endorsement, *tpm2.TPMSNVPublic, error) {
	for _, e := range endorsements {
		r, err := tpm2.NVReadPublic{NVIndex: e.certificate}.Execute(c)
		if isRC(err, tpm2.TPMRCHandle) {
			continue
		}
		if err != nil {
			return e, nil, fmt.Errorf("looking for the EK's certificate: %w", err)
		}
		public, err := r.NVPublic.Contents()
		if err != nil {
			return e, nil, err
		}
		if public.NVIndex != e.certificate {
			return e, nil, fmt.Errorf("%w: it gave index %#x for %#x", ErrFailed, uint32(public.NVIndex), uint32(e.certificate))
		}
		if public.Attributes.Written && public.Attributes.NT == tpm2.TPMNTOrdinary {
			return e, public, nil
		}
	}
	return endorsements[0], nil, nil
}

// readNV reads an index by pieces. It may be read by its empty authValue or by
// the owner's.
func (c *client) readNV(index tpm2.TPMHandle, public *tpm2.TPMSNVPublic) ([]byte, error) {
	if public.DataSize > maxCertificate {
		return nil, fmt.Errorf("%w: %d bytes at %#x, at most %d", ErrFailed, public.DataSize, uint32(index), maxCertificate)
	}
	name, err := tpm2.NVName(public)
	if err != nil {
		return nil, err
	}
	auth := tpm2.AuthHandle{Handle: index, Name: *name, Auth: tpm2.PasswordAuth(nil)}
	if !public.Attributes.AuthRead {
		auth = tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	}
	var all []byte
	for len(all) < int(public.DataSize) {
		want := min(nvPiece, int(public.DataSize)-len(all))
		r, err := tpm2.NVRead{
			AuthHandle: auth, NVIndex: tpm2.NamedHandle{Handle: index, Name: *name}, Size: uint16(want), Offset: uint16(len(all)),
		}.Execute(c)
		if err != nil {
			return nil, ownerError(err)
		}
		if len(r.Data.Buffer) != want {
			return nil, fmt.Errorf("%w: it gave %d bytes for %d", ErrFailed, len(r.Data.Buffer), want)
		}
		all = append(all, r.Data.Buffer...)
	}
	return all, nil
}

// certificateOver gives the certificate at the beginning of what an index
// holds, without the filling after it, if it is over this key.
func certificateOver(public *tpm2.TPMTPublic, b []byte) ([]byte, error) {
	var whole asn1.RawValue
	if _, err := asn1.Unmarshal(b, &whole); err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(whole.FullBytes)
	if err != nil {
		return nil, err
	}
	ours, err := publicKey(public)
	if err != nil {
		return nil, err
	}
	theirs := cert.PublicKey
	if theirs == nil {
		// An RSA key may stand under id-RSAES-OAEP (EK Credential Profile, 3.2.4),
		// which x509 does not know.
		var spki struct {
			Algorithm asn1.RawValue
			Key       asn1.BitString
		}
		if _, err := asn1.Unmarshal(cert.RawSubjectPublicKeyInfo, &spki); err != nil {
			return nil, err
		}
		if theirs, err = x509.ParsePKCS1PublicKey(spki.Key.Bytes); err != nil {
			return nil, err
		}
	}
	if k, ok := ours.(interface{ Equal(crypto.PublicKey) bool }); ok && k.Equal(theirs) {
		return whole.FullBytes, nil
	}
	return nil, errors.New("it is over another key than the TPM's EK")
}

func publicKey(a *tpm2.TPMTPublic) (crypto.PublicKey, error) {
	if a.Type == tpm2.TPMAlgRSA {
		return rsaPublic(a)
	}
	return ecdsaPublic(a)
}

// withEK calls use with the EK: the one that the TPM keeps, where it is of the
// template, or one that is made and flushed.
func (c *client) withEK(e endorsement, use func(tpm2.NamedHandle, *tpm2.TPMTPublic) error) error {
	r, err := tpm2.ReadPublic{ObjectHandle: e.persistent}.Execute(c)
	if err != nil && !isRC(err, tpm2.TPMRCHandle) {
		return fmt.Errorf("reading the EK: %w", err)
	}
	if err == nil {
		public, name, err := e.check(r.OutPublic)
		if err == nil {
			return use(tpm2.NamedHandle{Handle: e.persistent, Name: *name}, public)
		}
		if !errors.Is(err, errOtherTemplate) {
			return err
		}
	}
	made, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)}, InPublic: tpm2.New2B(e.template),
	}.Execute(c)
	if err != nil {
		return fmt.Errorf("making the EK: %w", endorsementError(err))
	}
	defer c.flush(made.ObjectHandle)
	public, name, err := e.check(made.OutPublic)
	if err != nil {
		return fmt.Errorf("%w: making the EK: %w", ErrFailed, err)
	}
	return use(tpm2.NamedHandle{Handle: made.ObjectHandle, Name: *name}, public)
}

var errOtherTemplate = errors.New("a key of another template")

// check gives the public area of a key of this kind, and its Name.
func (e endorsement) check(b tpm2.TPM2BPublic) (*tpm2.TPMTPublic, *tpm2.TPM2BName, error) {
	public, err := b.Contents()
	if err != nil {
		return nil, nil, err
	}
	want := e.template
	want.Unique = public.Unique
	if !bytes.Equal(tpm2.Marshal(want), tpm2.Marshal(*public)) {
		return nil, nil, errOtherTemplate
	}
	name, err := tpm2.ObjectName(public) // not the one that the response claims
	return public, name, err
}

// endorsementError explains what a TPM with an endorsement password answers.
func endorsementError(err error) error {
	if isRC(err, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail) {
		return fmt.Errorf("%w: its endorsement hierarchy has a password: %w", ErrFailed, err)
	}
	return err
}

// ActivateCredential gives the secret in a credential (Part 1, 24) that was made
// for this host's EK and the Name of its AK, at most 32 bytes, which the caller
// wipes. idObject and encryptedSecret are TPM2B_ID_OBJECT and
// TPM2B_ENCRYPTED_SECRET, with their size fields. It waits for every other
// request.
func (h *Host) ActivateCredential(ctx context.Context, idObject, encryptedSecret []byte) ([]byte, error) {
	if _, err := h.set(); err != nil {
		return nil, err
	}
	blob, err := sized(idObject)
	if err != nil {
		return nil, fmt.Errorf("%w: TPM2B_ID_OBJECT: %w", ErrCredential, err)
	}
	seed, err := sized(encryptedSecret)
	if err != nil {
		return nil, fmt.Errorf("%w: TPM2B_ENCRYPTED_SECRET: %w", ErrCredential, err)
	}
	return doLaterWithin(ctx, h, max(provisionTimeout, h.cfg.Timeout), func(c *client) ([]byte, error) {
		k := h.keys.Load()
		e, _, err := c.chooseEK()
		if err != nil {
			return nil, err
		}
		session, err := c.secretly(k)
		if err != nil {
			return nil, err
		}
		var out []byte
		err = c.withEK(e, func(ek tpm2.NamedHandle, _ *tpm2.TPMTPublic) error {
			return c.with(k, k.ak, func(ak tpm2.TPMHandle) error {
				r, err := tpm2.ActivateCredential{
					ActivateHandle: tpm2.AuthHandle{Handle: ak, Name: tpm2.TPM2BName{Buffer: k.ak.name}, Auth: tpm2.PasswordAuth(nil)},
					KeyHandle:      tpm2.AuthHandle{Handle: ek.Handle, Name: ek.Name, Auth: tpm2.Policy(tpm2.TPMAlgSHA256, nonceSize, c.endorsed)},
					CredentialBlob: tpm2.TPM2BIDObject{Buffer: blob}, Secret: tpm2.TPM2BEncryptedSecret{Buffer: seed},
				}.Execute(c, session)
				if err != nil {
					if c.failed == tpm2.TPMCCActivateCredential && (isRC(err, badCredential...) || isRC(err, tpm2.TPMRCFailure) && c.alive(k)) {
						rc, _ := responseCode(err)
						return fmt.Errorf("%w (TPM response %#x)", ErrCredential, uint32(rc))
					}
					return fmt.Errorf("activating a credential: %w", endorsementError(err))
				}
				out = r.CertInfo.Buffer
				return nil
			})
		})
		return out, err
	})
}

// badCredential is what TPMs answer where seed or blob are not for the keys. For
// bad OAEP padding libtpms has TPM_RC_FAILURE.
var badCredential = []tpm2.TPMRC{tpm2.TPMRCIntegrity, tpm2.TPMRCValue, tpm2.TPMRCSize, tpm2.TPMRCECCPoint, tpm2.TPMRCInsufficient}

// endorsed satisfies an EK's policy: PolicySecret of the endorsement hierarchy.
func (c *client) endorsed(_ transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
	_, err := tpm2.PolicySecret{
		AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		PolicySession: session, NonceTPM: nonce,
	}.Execute(c)
	if err != nil {
		c.flush(session) // go-tpm forgets a session whose policy failed
		return policyStep{endorsementError(err)}
	}
	return nil
}

// sized gives what a TPM2B that is all of b holds.
func sized(b []byte) ([]byte, error) {
	const most = 1024
	if len(b) < 3 || len(b) > most || int(b[0])<<8|int(b[1]) != len(b)-2 {
		return nil, fmt.Errorf("%d bytes that are not what their size field says", len(b))
	}
	return b[2:], nil
}
