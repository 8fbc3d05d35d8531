package hosttpm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/hosttpm/policy"
	"virt-trust/internal/hosttpm/tss2"
)

// srkHandle is where the TCG's provisioning guidance puts the SRK.
const srkHandle = tpm2.TPMHandle(0x81000001)

// The epoch counter takes the first of these handles that is free. They lie in
// the range for owners' use (TCG Registry of Reserved Handles, 2.2.2), away
// from 0x01D10200, where systemd has its own.
const (
	firstEpochIndex = tpm2.TPMHandle(0x01500110)
	lastEpochIndex  = tpm2.TPMHandle(0x0150011F)
)

// keySet is all that is known of the host's keys; it does not change.
type keySet struct {
	srk                               parent
	bind, ak, certifier               *object
	policyKey, listKey                *object // sealed data
	bindPublic                        *rsa.PublicKey
	akPublic, certifierPublic         *ecdsa.PublicKey
	policyPublic                      *ecdsa.PublicKey
	policyArea, policyName            []byte // TPMT_PUBLIC and Name of the policy key
	epochIndex                        tpm2.TPMHandle
	epochName                         []byte
	policies                          []*policy.Approved // newest first
	bindCertified, certifierCertified certification
}

// parent is the storage root key.
type parent struct {
	handle tpm2.TPMHandle
	name   []byte
	public *tpm2.TPMTPublic
}

func (p parent) auth(s tpm2.Session) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: p.handle, Name: tpm2.TPM2BName{Buffer: p.name}, Auth: s}
}

// object is a key or sealed data under the SRK.
type object struct {
	public  tpm2.TPM2BPublic
	private tpm2.TPM2BPrivate
	area    *tpm2.TPMTPublic
	name    []byte
}

func newObject(public tpm2.TPM2BPublic, private tpm2.TPM2BPrivate) (*object, error) {
	area, err := public.Contents()
	if err != nil {
		return nil, err
	}
	name, err := tpm2.ObjectName(area)
	if err != nil {
		return nil, err
	}
	return &object{public, private, area, name.Buffer}, nil
}

// file gives o as a TSS2 key file, without a description: tpm2-tools 5.4 take
// no such file.
func (o *object) file(kind []int, parent tpm2.TPMHandle) ([]byte, error) {
	k := tss2.Key{
		Type: kind, EmptyAuth: true, Parent: uint32(parent),
		Public: tpm2.Marshal(o.public), Private: tpm2.Marshal(o.private),
	}
	return k.Marshal()
}

// certification is the AK's word that an object with some Name is in its TPM.
type certification struct {
	attest    []byte // TPMS_ATTEST
	signature []byte // TPMT_SIGNATURE
}

// verify checks that ak certified the object named name.
func (c certification) verify(ak *ecdsa.PublicKey, name []byte) error {
	a, err := tpm2.Unmarshal[tpm2.TPMSAttest](c.attest)
	if err != nil {
		return err
	}
	info, err := a.Attested.Certify()
	if err != nil {
		return err
	}
	if a.Magic != tpm2.TPMGeneratedValue || !bytes.Equal(info.Name.Buffer, name) {
		return errors.New("certification of another object")
	}
	sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](c.signature)
	if err != nil {
		return err
	}
	der, err := ecdsaASN1(*sig)
	if err != nil {
		return err
	}
	digest := sha256.Sum256(c.attest)
	if !ecdsa.VerifyASN1(ak, digest[:], der) {
		return errors.New("certification that the AK did not sign")
	}
	return nil
}

// indexes gives the PCRs of a bank that any approved policy looks at.
func (k *keySet) indexes(bank string) []uint {
	var all []uint
	for _, a := range k.policies {
		if a.Bank == bank {
			all = append(all, a.Indexes()...)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// complete derives what follows from the objects and checks that they are of
// the kind that they should be: a file that was exchanged is not used.
func (k *keySet) complete() error {
	var err error
	if k.policyArea, err = policy.PublicArea(k.policyPublic); err != nil {
		return err
	}
	if k.policyName, err = policy.KeyName(k.policyPublic); err != nil {
		return err
	}
	authPolicy := policy.Authorize(k.policyName)
	for _, o := range []struct {
		what string
		have *object
		want tpm2.TPMTPublic
	}{
		{"bind key", k.bind, bindTemplate(authPolicy)},
		{"AK", k.ak, akTemplate()},
		{"certifier", k.certifier, certifierTemplate()},
		{"policy key", k.policyKey, sealedTemplate(authPolicy)},
		{"list key", k.listKey, sealedTemplate(authPolicy)},
	} {
		o.want.Unique = o.have.area.Unique
		if !bytes.Equal(tpm2.Marshal(o.want), tpm2.Marshal(*o.have.area)) {
			return fmt.Errorf("the %s is not of the kind that it should be", o.what)
		}
	}
	if k.bindPublic, err = rsaPublic(k.bind.area); err != nil {
		return err
	}
	if k.akPublic, err = ecdsaPublic(k.ak.area); err != nil {
		return err
	}
	if k.certifierPublic, err = ecdsaPublic(k.certifier.area); err != nil {
		return err
	}
	if err := k.bindCertified.verify(k.akPublic, k.bind.name); err != nil {
		return fmt.Errorf("bind key: %w", err)
	}
	if err := k.certifierCertified.verify(k.akPublic, k.certifier.name); err != nil {
		return fmt.Errorf("certifier: %w", err)
	}
	return nil
}

func rsaPublic(a *tpm2.TPMTPublic) (*rsa.PublicKey, error) {
	parms, err := a.Parameters.RSADetail()
	if err != nil {
		return nil, err
	}
	n, err := a.Unique.RSA()
	if err != nil {
		return nil, err
	}
	return tpm2.RSAPub(parms, n)
}

func ecdsaPublic(a *tpm2.TPMTPublic) (*ecdsa.PublicKey, error) {
	parms, err := a.Parameters.ECCDetail()
	if err != nil {
		return nil, err
	}
	point, err := a.Unique.ECC()
	if err != nil {
		return nil, err
	}
	return tpm2.ECDSAPub(parms, point)
}

// bindTemplate: user operations only by policy; the admin role by the empty
// authValue, so that the AK can certify the key. Nothing else can be done with it:
// fixedTPM and fixedParent forbid duplication.
func bindTemplate(authPolicy []byte) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, NoDA: true, Decrypt: true},
		AuthPolicy:       tpm2.TPM2BDigest{Buffer: authPolicy},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			Scheme: tpm2.TPMTRSAScheme{
				Scheme:  tpm2.TPMAlgOAEP,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgOAEP, &tpm2.TPMSEncSchemeOAEP{HashAlg: tpm2.TPMAlgSHA256}),
			},
			KeyBits: 2048,
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{}),
	}
}

func akTemplate() tpm2.TPMTPublic        { return signingTemplate(true) }
func certifierTemplate() tpm2.TPMTPublic { return signingTemplate(false) }

func signingTemplate(restricted bool) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true,
			SignEncrypt: true, Restricted: restricted,
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
}

func sealedTemplate(authPolicy []byte) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true},
		AuthPolicy:       tpm2.TPM2BDigest{Buffer: authPolicy},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{
			Scheme: tpm2.TPMTKeyedHashScheme{Scheme: tpm2.TPMAlgNull},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{}),
	}
}

// counterTemplate is a plain counter: not an orderly one, which jumps after a
// crash.
func counterTemplate(index tpm2.TPMHandle) tpm2.TPMSNVPublic {
	return tpm2.TPMSNVPublic{
		NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
		Attributes: tpm2.TPMANV{OwnerWrite: true, AuthRead: true, OwnerRead: true, NoDA: true, NT: tpm2.TPMNTCounter},
	}
}
