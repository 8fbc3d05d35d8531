package ca

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"slices"

	"virt-trust/internal/evidence/quote"
)

// Keys are a node's TPM keys as it gives them: public areas (TPMT_PUBLIC), and
// the AK's word (TPM2_Certify) for the two beside it.
type Keys struct {
	EK, AK, Bind, Certifier             []byte
	BindAttest, BindSignature           []byte
	CertifierAttest, CertifierSignature []byte
}

// Proven is Keys of which each is of its kind, and of which bind key and
// certifier are in one TPM with the AK. Whether AK and EK are is not known yet:
// that takes an activation.
type Proven struct {
	EK, AK, Bind, Certifier *quote.Object
	AKKey                   *ecdsa.PublicKey
	CertifierSPKI           []byte // DER
	EKDigest                string
}

// Verify checks the keys. Errors are Refusals.
func (k *Keys) Verify() (*Proven, error) {
	p := &Proven{}
	for _, o := range []struct {
		what string
		code Code
		in   []byte
		out  **quote.Object
	}{
		{"EK", EKUnparsable, k.EK, &p.EK}, {"AK", AKAttributes, k.AK, &p.AK},
		{"bind key", BindBad, k.Bind, &p.Bind}, {"certifier", CertifierBad, k.Certifier, &p.Certifier},
	} {
		var err error
		if *o.out, err = quote.ParsePublic(o.in); err != nil {
			return nil, refuse(o.code, "the %s: %v", o.what, err)
		}
	}
	var err error
	if err = p.EK.EK(); err != nil {
		return nil, refuse(EKUnparsable, "the EK: %v", err)
	}
	if p.EKDigest, err = EKDigest(p.EK.Key); err != nil {
		return nil, refuse(EKUnparsable, "the EK: %v", err)
	}
	if p.AKKey, err = p.AK.AK(); err != nil {
		return nil, refuse(AKAttributes, "the AK: %v", err)
	}
	if _, _, err := p.Bind.Bind(); err != nil {
		return nil, refuse(BindBad, "the bind key: %v", err)
	}
	certifier, err := p.Certifier.Certifier()
	if err != nil {
		return nil, refuse(CertifierBad, "the certifier: %v", err)
	}
	if err := quote.VerifyCertify(k.BindAttest, k.BindSignature, p.AKKey, p.Bind.Name); err != nil {
		return nil, refuse(BindUncertain, "the bind key: %v", err)
	}
	if err := quote.VerifyCertify(k.CertifierAttest, k.CertifierSignature, p.AKKey, p.Certifier.Name); err != nil {
		return nil, refuse(CertifierUnc, "the certifier: %v", err)
	}
	if p.CertifierSPKI, err = x509.MarshalPKIXPublicKey(certifier); err != nil {
		return nil, refuse(CertifierBad, "the certifier: %v", err)
	}
	return p, nil
}

// nodeKeyLabel sets a quote over a TLS key apart from one over Evidence.
const nodeKeyLabel = "virt-trust/node-key/v1\x00"

// NodeKeyQualifyingData is what the AK's quote over a TLS key says: SHA-256(label ‖
// nonce ‖ SHA-256(spki)).
func NodeKeyQualifyingData(nonce, spki []byte) [sha256.Size]byte {
	d := sha256.Sum256(spki)
	return sha256.Sum256(slices.Concat([]byte(nodeKeyLabel), nonce, d[:]))
}

// VerifyNodeKey checks that a node's AK vouches for its TLS key, a
// SubjectPublicKeyInfo, on a nonce of ours. Errors are Refusals.
func VerifyNodeKey(ak *ecdsa.PublicKey, nonce, spki, attest, signature []byte) error {
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return refuse(Malformed, "the TLS key: %v", err)
	}
	if _, ok := key.(*ecdsa.PublicKey); !ok {
		return refuse(KeyNotQuoted, "the TLS key is no ECDSA key")
	}
	if err := strongEnough(key); err != nil {
		return refuse(KeyNotQuoted, "the TLS key: %v", err)
	}
	if _, err := quote.Verify(attest, signature, ak, NodeKeyQualifyingData(nonce, spki)); err != nil {
		return refuse(KeyNotQuoted, "the AK does not vouch for the TLS key: %v", err)
	}
	return nil
}

// AKOf gives the key of a stored AK.
func AKOf(area []byte) (*ecdsa.PublicKey, error) {
	o, err := quote.ParsePublic(area)
	if err != nil {
		return nil, fmt.Errorf("the node's AK in the store: %w", err)
	}
	return o.AK()
}

func nameOf(area []byte) ([]byte, error) {
	o, err := quote.ParsePublic(area)
	if err != nil {
		return nil, err
	}
	return o.Name, nil
}

// CertifierSPKI gives the key of a stored certifier: SubjectPublicKeyInfo, DER.
func CertifierSPKI(area []byte) ([]byte, error) {
	o, err := quote.ParsePublic(area)
	if err != nil {
		return nil, fmt.Errorf("the node's certifier in the store: %w", err)
	}
	key, err := o.Certifier()
	if err != nil {
		return nil, fmt.Errorf("the node's certifier in the store: %w", err)
	}
	return x509.MarshalPKIXPublicKey(key)
}
