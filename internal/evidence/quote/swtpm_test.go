package quote_test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"virt-trust/internal/evidence/quote"
	"virt-trust/internal/hosttpm/tpmtest"
)

func primary(t testing.TB, tpm transport.TPM, hierarchy tpm2.TPMHandle, public tpm2.TPMTPublic) (tpm2.NamedHandle, *quote.Object) {
	t.Helper()
	r, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.AuthHandle{Handle: hierarchy, Auth: tpm2.PasswordAuth(nil)}, InPublic: tpm2.New2B(public)}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tpm2.FlushContext{FlushHandle: r.ObjectHandle}.Execute(tpm) })
	area, err := r.OutPublic.Contents()
	if err != nil {
		t.Fatal(err)
	}
	o, err := quote.ParsePublic(tpm2.Marshal(*area))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(o.Name, r.Name.Buffer) {
		t.Errorf("Name %x, the TPM says %x", o.Name, r.Name.Buffer)
	}
	return tpm2.NamedHandle{Handle: r.ObjectHandle, Name: r.Name}, o
}

func akTemplate() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, SignEncrypt: true, Restricted: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme: tpm2.TPMTECCScheme{
				Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			CurveID: tpm2.TPMECCNistP256,
		}),
	}
}

// eccHigh is the EK template H-3 of the EK Credential Profile (P-384, SHA-384),
// whose user role goes by authValue or policy; here by authValue.
func eccHigh() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA384,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, Restricted: true, Decrypt: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Symmetric: tpm2.TPMTSymDefObject{
				Algorithm: tpm2.TPMAlgAES, KeyBits: tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(256)), Mode: tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
			},
			CurveID: tpm2.TPMECCNistP384,
		}),
	}
}

// A TPM opens what MakeCredential made for its EK and an object of its, and for
// no other object.
func TestCredentialAgainstSwtpm(t *testing.T) {
	tpm := tpmtest.New(t).Open()
	akHandle, ak := primary(t, tpm, tpm2.TPMRHOwner, akTemplate())
	if _, err := ak.AK(); err != nil {
		t.Error(err)
	}
	byPolicy := func(t testing.TB) tpm2.Session {
		return tpm2.Policy(tpm2.TPMAlgSHA256, 16, tpm2.PolicyCallback(func(tpm transport.TPM, s tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
			_, err := tpm2.PolicySecret{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)}, PolicySession: s}.Execute(tpm)
			return err
		}))
	}
	byPassword := func(testing.TB) tpm2.Session { return tpm2.PasswordAuth(nil) }
	for name, c := range map[string]struct {
		template tpm2.TPMTPublic
		auth     func(testing.TB) tpm2.Session
	}{
		"RSA 2048": {tpm2.RSAEKTemplate, byPolicy}, "P-256": {tpm2.ECCEKTemplate, byPolicy}, "P-384": {eccHigh(), byPassword},
	} {
		t.Run(name, func(t *testing.T) {
			handle, ek := primary(t, tpm, tpm2.TPMRHEndorsement, c.template)
			if err := ek.EK(); err != nil {
				t.Fatal(err)
			}
			activate := func(name []byte) ([]byte, error) {
				id, encrypted, err := quote.MakeCredential(rand.Reader, ek, name, []byte("a secret of thirty-two bytes, so"))
				if err != nil {
					t.Fatal(err)
				}
				blob, err := tpm2.Unmarshal[tpm2.TPM2BIDObject](id)
				if err != nil {
					t.Fatal(err)
				}
				secret, err := tpm2.Unmarshal[tpm2.TPM2BEncryptedSecret](encrypted)
				if err != nil {
					t.Fatal(err)
				}
				r, err := tpm2.ActivateCredential{
					ActivateHandle: tpm2.AuthHandle{Handle: akHandle.Handle, Name: akHandle.Name, Auth: tpm2.PasswordAuth(nil)},
					KeyHandle:      tpm2.AuthHandle{Handle: handle.Handle, Name: handle.Name, Auth: c.auth(t)},
					CredentialBlob: *blob, Secret: *secret,
				}.Execute(tpm)
				if err != nil {
					return nil, err
				}
				return r.CertInfo.Buffer, nil
			}
			got, err := activate(ak.Name)
			if err != nil || string(got) != "a secret of thirty-two bytes, so" {
				t.Errorf("%q, %v", got, err)
			}
			other := bytes.Clone(ak.Name)
			other[10] ^= 1
			if got, err := activate(other); err == nil {
				t.Errorf("a credential for another object is opened: %q", got)
			}
		})
	}
}

// A real TPM's quote over two banks, and its certification, are verified.
func TestQuoteAgainstSwtpm(t *testing.T) {
	tpm := tpmtest.New(t).Open()
	handle, object := primary(t, tpm, tpm2.TPMRHOwner, akTemplate())
	key, err := object.AK()
	if err != nil {
		t.Fatal(err)
	}
	extended := sha256.Sum256([]byte("event"))
	if _, err := (tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: 15, Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: extended[:]}}},
	}).Execute(tpm); err != nil {
		t.Fatal(err)
	}
	selection := tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: tpm2.TPMAlgSHA384, PCRSelect: []byte{0, 0x04, 0}}, {Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0x81, 0x80, 0}},
	}}
	r, err := tpm2.Quote{
		SignHandle:     tpm2.AuthHandle{Handle: handle.Handle, Name: handle.Name, Auth: tpm2.PasswordAuth(nil)},
		QualifyingData: tpm2.TPM2BData{Buffer: qualifying[:]}, PCRSelect: selection, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	q, err := quote.Verify(r.Quoted.Bytes(), tpm2.Marshal(r.Signature), key, qualifying)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(q.Covers("sha256", []uint{0, 7, 15}), q.Covers("sha384", []uint{10})); err != nil {
		t.Error(err)
	}
	h := sha256.New()
	h.Write(make([]byte, 32))
	h.Write(extended[:])
	values := map[string]map[uint][]byte{"sha384": {10: make([]byte, 48)}, "sha256": {0: make([]byte, 32), 7: make([]byte, 32), 15: h.Sum(nil)}}
	if err := q.Check(func(bank string, pcr uint) []byte { return values[bank][pcr] }); err != nil {
		t.Error(err)
	}
	if !slices.Equal([]string{q.Selections[0].Bank, q.Selections[1].Bank}, []string{"sha384", "sha256"}) {
		t.Errorf("banks in the order %v", q.Selections)
	}
	if q.Clock.Milliseconds == 0 || q.Firmware == 0 {
		t.Errorf("%+v", q)
	}

	certified, err := tpm2.Certify{
		ObjectHandle: tpm2.AuthHandle{Handle: handle.Handle, Name: handle.Name, Auth: tpm2.PasswordAuth(nil)},
		SignHandle:   tpm2.AuthHandle{Handle: handle.Handle, Name: handle.Name, Auth: tpm2.PasswordAuth(nil)},
		InScheme:     tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	if err := quote.VerifyCertify(certified.CertifyInfo.Bytes(), tpm2.Marshal(certified.Signature), key, object.Name); err != nil {
		t.Error(err)
	}
}
