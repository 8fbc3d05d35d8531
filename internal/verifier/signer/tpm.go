package signer

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"os"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"virt-trust/internal/evidence/quote"
	"virt-trust/internal/hosttpm/link"
	"virt-trust/internal/hosttpm/tss2"
)

// Key is a key in a TPM, ECDSA P-256, under the primary key that the TCG's ECC
// storage template gives in the owner hierarchy: nothing persistent is needed,
// and the same TPM always makes the same parent.
type Key struct {
	mu     sync.Mutex
	device string
	file   *tss2.Key
	public *ecdsa.PublicKey
	name   []byte
}

// template: not restricted, because the digest of a certificate comes from
// outside; fixed to its TPM and parent, made in it.
func template() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, SignEncrypt: true},
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

// Make makes a key in the TPM at device and gives it as a TSS2 key file, which is
// of use to that TPM alone.
func Make(device string) ([]byte, error) {
	var out []byte
	err := withParent(device, func(tpm transport.TPM, parent tpm2.AuthHandle) error {
		r, err := tpm2.Create{ParentHandle: parent, InPublic: tpm2.New2B(template())}.Execute(tpm)
		if err != nil {
			return fmt.Errorf("making the CA's key: %w", err)
		}
		k := tss2.Key{
			Type: tss2.Loadable, EmptyAuth: true, Parent: uint32(tpm2.TPMRHOwner),
			Public: tpm2.Marshal(r.OutPublic), Private: tpm2.Marshal(r.OutPrivate),
		}
		out, err = k.Marshal()
		return err
	})
	return out, err
}

// Load reads a key file that Make gave. The TPM is not asked yet.
func Load(device string, file []byte) (*Key, error) {
	f, err := tss2.Parse(file)
	if err != nil {
		return nil, err
	}
	if !f.Type.Equal(tss2.Loadable) || !f.EmptyAuth || f.Parent != uint32(tpm2.TPMRHOwner) || len(f.Policy) > 0 {
		return nil, errors.New("this is not a key file that virt-trust-signer made")
	}
	b, err := tpm2.Unmarshal[tpm2.TPM2BPublic](f.Public)
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	area, err := b.Contents()
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	want := template()
	want.Unique = area.Unique
	if !bytes.Equal(tpm2.Marshal(want), tpm2.Marshal(*area)) {
		return nil, errors.New("the key in the key file is not of the kind that it should be")
	}
	object, err := quote.ParsePublic(tpm2.Marshal(*area))
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	public, ok := object.Key.(*ecdsa.PublicKey)
	if !ok { // of another kind than template's
		return nil, fmt.Errorf("key file: a %T", object.Key)
	}
	return &Key{device: device, file: f, public: public, name: object.Name}, nil
}

// Public is the key's public half, *ecdsa.PublicKey.
func (k *Key) Public() crypto.PublicKey { return k.public }

// Sign signs a SHA-256 digest in the TPM: ASN.1.
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 || len(digest) != sha256.Size {
		return nil, errors.New("the key signs SHA-256 alone")
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	var sig []byte
	err := withParent(k.device, func(tpm transport.TPM, parent tpm2.AuthHandle) error {
		public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](k.file.Public)
		if err != nil {
			return err
		}
		private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](k.file.Private)
		if err != nil {
			return err
		}
		l, err := tpm2.Load{ParentHandle: parent, InPublic: *public, InPrivate: *private}.Execute(tpm)
		if err != nil {
			return fmt.Errorf("loading the CA's key, which only the TPM that made it can: %w", err)
		}
		defer flush(tpm, l.ObjectHandle)
		r, err := tpm2.Sign{
			KeyHandle:  tpm2.AuthHandle{Handle: l.ObjectHandle, Name: tpm2.TPM2BName{Buffer: k.name}, Auth: tpm2.PasswordAuth(nil)},
			Digest:     tpm2.TPM2BDigest{Buffer: digest},
			InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
		}.Execute(tpm)
		if err != nil {
			return fmt.Errorf("signing: %w", err)
		}
		ecc, err := r.Signature.Signature.ECDSA()
		if err != nil {
			return err
		}
		var b cryptobyte.Builder
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1BigInt(new(big.Int).SetBytes(ecc.SignatureR.Buffer))
			b.AddASN1BigInt(new(big.Int).SetBytes(ecc.SignatureS.Buffer))
		})
		sig, err = b.Bytes()
		return err
	})
	if err != nil {
		return nil, err
	}
	if !ecdsa.VerifyASN1(k.public, digest, sig) {
		return nil, errors.New("the TPM's signature is wrong")
	}
	return sig, nil
}

// withParent opens the TPM and makes the parent key for the length of f.
func withParent(device string, f func(transport.TPM, tpm2.AuthHandle) error) (err error) {
	// go-tpm takes a response apart by reflection, and it is not to be trusted.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the TPM's response cannot be read: %v", p)
		}
	}()
	tpm, err := open(device)
	if err != nil {
		return fmt.Errorf("opening the TPM: %w", err)
	}
	defer tpm.Close()
	p, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(tpm)
	if err != nil {
		return fmt.Errorf("making the parent key: %w", err)
	}
	defer flush(tpm, p.ObjectHandle)
	return f(tpm, tpm2.AuthHandle{Handle: p.ObjectHandle, Name: p.Name, Auth: tpm2.PasswordAuth(nil)})
}

const patience = time.Minute // with others who use the TPM

// open opens a device node, or swtpm's data socket.
func open(device string) (*link.Link, error) {
	if fi, err := os.Stat(device); err == nil && fi.Mode()&fs.ModeSocket == 0 && !link.Managed(device) {
		return nil, fmt.Errorf("%s is not the resource manager's device, /dev/tpmrm0: others use the TPM too", device)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return link.Dial(ctx, device)
}

func flush(tpm transport.TPM, h tpm2.TPMHandle) {
	_, _ = tpm2.FlushContext{FlushHandle: h}.Execute(tpm) // the resource manager does it too
}
