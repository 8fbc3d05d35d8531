// Package forge makes Evidence for tests and benchmarks: a TPM in software, a
// host with VMs whose logs replay to its PCRs, and Evidence of both, right or spoilt
// on purpose. What it gives is signed by a key that it made itself; no program that
// ships may import it.
package forge

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	_ "crypto/sha1" // the banks
	"crypto/sha256"
	_ "crypto/sha512"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/evidence/quote"
	"virt-trust/internal/evidence/report"
)

// Hashes are the PCR banks.
var Hashes = map[string]crypto.Hash{"sha1": crypto.SHA1, "sha256": crypto.SHA256, "sha384": crypto.SHA384}

var algorithms = map[string]tpm2.TPMAlgID{"sha1": tpm2.TPMAlgSHA1, "sha256": tpm2.TPMAlgSHA256, "sha384": tpm2.TPMAlgSHA384}

// TPM is a TPM in software: PCRs, a clock, and an AK. It signs whatever it is told.
type TPM struct {
	Key              *ecdsa.PrivateKey
	PCRs             map[string]map[uint][]byte // by bank
	Clock            uint64                     // milliseconds
	Resets, Restarts uint32
	Hides            uint32 // is added to both, as with keys of the owner hierarchy (quote.Clock)
	Unsafe           bool
}

// NewTPM makes one that was just started, with these PCR banks.
func NewTPM(banks ...string) *TPM {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	t := &TPM{Key: key, Clock: 60_000, Resets: 7, Hides: 0xfffffff0, PCRs: map[string]map[uint][]byte{}}
	for _, b := range banks {
		t.PCRs[b] = map[uint][]byte{}
	}
	t.clear()
	return t
}

func (t *TPM) clear() {
	for bank, values := range t.PCRs {
		for i := range uint(24) {
			values[i] = make([]byte, Hashes[bank].Size())
			if i >= 17 && i <= 22 {
				for n := range values[i] {
					values[i][n] = 0xff
				}
			}
		}
	}
}

// Reset is a reboot.
func (t *TPM) Reset() {
	t.Resets++
	t.Restarts = 0
	t.Clock += 30_000
	t.clear()
}

// PCR gives a PCR's value.
func (t *TPM) PCR(bank string, pcr uint) []byte { return t.PCRs[bank][pcr] }

// Extend extends a PCR in a bank.
func (t *TPM) Extend(bank string, pcr uint, digest []byte) {
	h := Hashes[bank].New()
	h.Write(t.PCRs[bank][pcr])
	h.Write(digest)
	t.PCRs[bank][pcr] = h.Sum(nil)
}

// AK gives the AK's TPMT_PUBLIC.
func (t *TPM) AK() []byte { return Public(&t.Key.PublicKey) }

// AKName gives its Name.
func (t *TPM) AKName() []byte {
	d := sha256.Sum256(t.AK())
	return append([]byte{0, 0x0b}, d[:]...)
}

// Public is the public area of an AK with that key.
func Public(key *ecdsa.PublicKey, change ...func(*tpm2.TPMTPublic)) []byte {
	point, err := key.Bytes() // 4 ‖ x ‖ y
	if err != nil {
		panic(err)
	}
	p := tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, SignEncrypt: true, Restricted: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			CurveID: tpm2.TPMECCNistP256,
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[1:33]},
			Y: tpm2.TPM2BECCParameter{Buffer: point[33:]},
		}),
	}
	for _, f := range change {
		f(&p)
	}
	return tpm2.Marshal(p)
}

// Quote quotes PCRs.
func (t *TPM) Quote(qualifying []byte, selections ...quote.Selection) report.Quote {
	info := tpm2.TPMSQuoteInfo{}
	h := sha256.New()
	for _, s := range selections {
		bits := make([]byte, 3)
		for _, p := range slices.Sorted(slices.Values(s.PCRs)) {
			bits[p/8] |= 1 << (p % 8)
			h.Write(t.PCRs[s.Bank][p])
		}
		info.PCRSelect.PCRSelections = append(info.PCRSelect.PCRSelections, tpm2.TPMSPCRSelection{Hash: algorithms[s.Bank], PCRSelect: bits})
	}
	info.PCRDigest.Buffer = h.Sum(nil)
	return t.Sign(qualifying, tpm2.TPMSTAttestQuote, tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &info))
}

// Certify certifies an object.
func (t *TPM) Certify(name []byte) report.Quote {
	info := tpm2.TPMSCertifyInfo{Name: tpm2.TPM2BName{Buffer: name}, QualifiedName: tpm2.TPM2BName{Buffer: name}}
	return t.Sign(nil, tpm2.TPMSTAttestCertify, tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &info))
}

// Sign makes a statement of any type and signs it.
func (t *TPM) Sign(qualifying []byte, kind tpm2.TPMST, attested tpm2.TPMUAttest) report.Quote {
	safe := tpm2.TPMIYesNo(!t.Unsafe)
	return t.SignBytes(tpm2.Marshal(tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: kind, QualifiedSigner: tpm2.TPM2BName{Buffer: t.AKName()},
		ExtraData: tpm2.TPM2BData{Buffer: qualifying},
		ClockInfo: tpm2.TPMSClockInfo{Clock: t.Clock, ResetCount: t.Resets + t.Hides, RestartCount: t.Restarts + t.Hides, Safe: safe},
		Attested:  attested,
	}))
}

// SignBytes signs bytes that need not be a statement.
func (t *TPM) SignBytes(attest []byte) report.Quote {
	d := sha256.Sum256(attest)
	r, s, err := ecdsa.Sign(rand.Reader, t.Key, d[:])
	if err != nil {
		panic(err)
	}
	return report.Quote{Attest: attest, Signature: tpm2.Marshal(tpm2.TPMTSignature{
		SigAlg: tpm2.TPMAlgECDSA,
		Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
			Hash:       tpm2.TPMAlgSHA256,
			SignatureR: tpm2.TPM2BECCParameter{Buffer: r.Bytes()}, SignatureS: tpm2.TPM2BECCParameter{Buffer: s.Bytes()},
		}),
	})}
}
