package quote_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/evidence/quote"
)

var qualifying = sha256.Sum256([]byte("nonce and report"))

// banks is a selection of two banks, PCRs not in their order.
var banks = []quote.Selection{{Bank: "sha256", PCRs: []uint{0, 1, 7, 10, 15}}, {Bank: "sha1", PCRs: []uint{10, 23}}}

func newTPM() *forge.TPM {
	t := forge.NewTPM("sha1", "sha256")
	for i := range uint(16) {
		t.Extend("sha256", i, bytes.Repeat([]byte{byte(i)}, 32))
		t.Extend("sha1", i, bytes.Repeat([]byte{byte(i)}, 20))
	}
	return t
}

func TestVerify(t *testing.T) {
	tpm := newTPM()
	tpm.Restarts, tpm.Hides = 3, 0
	s := tpm.Quote(qualifying[:], banks...)
	q, err := quote.Verify(s.Attest, s.Signature, &tpm.Key.PublicKey, qualifying)
	if err != nil {
		t.Fatal(err)
	}
	if want := (quote.Clock{Milliseconds: 60_000, Resets: 7, Restarts: 3, Safe: true}); q.Clock != want {
		t.Errorf("clock %+v", q.Clock)
	}
	if !slices.EqualFunc(q.Selections, banks, func(a, b quote.Selection) bool { return a.Bank == b.Bank && slices.Equal(a.PCRs, b.PCRs) }) {
		t.Errorf("selections %v", q.Selections)
	}
	if err := q.Covers("sha256", []uint{0, 7, 15}); err != nil {
		t.Error(err)
	}
	if got := q.PCRs("sha1"); !slices.Equal(got, []uint{10, 23}) || q.PCRs("sha512") != nil {
		t.Errorf("PCRs %v were quoted", got)
	}
	if err := q.Check(tpm.PCR); err != nil {
		t.Error(err)
	}
	if err := q.Covers("sha256", []uint{0, 2}); !errors.Is(err, quote.ErrPCRs) {
		t.Errorf("a PCR that was not quoted: %v", err)
	}
	if err := q.Covers("sha384", []uint{0}); !errors.Is(err, quote.ErrBank) {
		t.Errorf("a bank that was not quoted: %v", err)
	}
	if err := q.Covers("sha256", nil); !errors.Is(err, quote.ErrNoPCRs) {
		t.Errorf("no PCRs asked for: %v", err)
	}
	tpm.Extend("sha1", 23, make([]byte, 20))
	if err := q.Check(tpm.PCR); !errors.Is(err, quote.ErrValues) {
		t.Errorf("another value: %v", err)
	}
	delete(tpm.PCRs["sha1"], 23)
	if err := q.Check(tpm.PCR); !errors.Is(err, quote.ErrValues) {
		t.Errorf("a value that is not there: %v", err)
	}
}

// A quote over nothing is well signed, and good for nothing.
func TestOverNothing(t *testing.T) {
	tpm := newTPM()
	for name, sel := range map[string][]quote.Selection{"no bank": nil, "a bank without PCRs": {{Bank: "sha256"}}} {
		s := tpm.Quote(qualifying[:], sel...)
		q, err := quote.Verify(s.Attest, s.Signature, &tpm.Key.PublicKey, qualifying)
		if err != nil {
			t.Fatal(err)
		}
		if err := q.Covers("sha256", []uint{0}); !errors.Is(err, quote.ErrNoPCRs) {
			t.Errorf("%s: %v", name, err)
		}
		if err := q.Check(tpm.PCR); !errors.Is(err, quote.ErrNoPCRs) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRefused(t *testing.T) {
	tpm, other := newTPM(), newTPM()
	good := tpm.Quote(qualifying[:], banks...)
	certified := tpm.Certify(tpm.AKName())
	twice := tpm.Quote(qualifying[:], banks[0], banks[0])
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spoilt := func(b []byte, at int, to byte) []byte {
		b = bytes.Clone(b)
		b[at] = to
		return b
	}
	long := tpm.SignBytes(append(bytes.Clone(good.Attest), 0))
	short := tpm.SignBytes(good.Attest[:len(good.Attest)-1])
	magic := tpm.SignBytes(spoilt(good.Attest, 0, 0))
	for name, c := range map[string]struct {
		attest, signature []byte
		ak                *ecdsa.PublicKey
		q                 [32]byte
		want              error
	}{
		"another AK":         {good.Attest, good.Signature, &other.Key.PublicKey, qualifying, quote.ErrSignature},
		"another nonce":      {good.Attest, good.Signature, &tpm.Key.PublicKey, [32]byte{1}, quote.ErrQualifying},
		"no AK":              {good.Attest, good.Signature, nil, qualifying, quote.ErrKind},
		"another curve":      {good.Attest, good.Signature, &p384.PublicKey, qualifying, quote.ErrKind},
		"a changed bit":      {spoilt(good.Attest, 60, 0xaa), good.Signature, &tpm.Key.PublicKey, qualifying, quote.ErrSignature},
		"another scheme":     {good.Attest, spoilt(good.Signature, 1, 0x14), &tpm.Key.PublicKey, qualifying, quote.ErrSignature},
		"another hash":       {good.Attest, spoilt(good.Signature, 3, 0x04), &tpm.Key.PublicKey, qualifying, quote.ErrSignature},
		"no signature":       {good.Attest, nil, &tpm.Key.PublicKey, qualifying, quote.ErrSignature},
		"more signature":     {good.Attest, append(bytes.Clone(good.Signature), 0), &tpm.Key.PublicKey, qualifying, quote.ErrSignature},
		"a certification":    {certified.Attest, certified.Signature, &tpm.Key.PublicKey, qualifying, quote.ErrFormat},
		"a bank twice":       {twice.Attest, twice.Signature, &tpm.Key.PublicKey, qualifying, quote.ErrFormat},
		"a byte too many":    {long.Attest, long.Signature, &tpm.Key.PublicKey, qualifying, quote.ErrFormat},
		"a byte too few":     {short.Attest, short.Signature, &tpm.Key.PublicKey, qualifying, quote.ErrFormat},
		"no TPM_GENERATED":   {magic.Attest, magic.Signature, &tpm.Key.PublicKey, qualifying, quote.ErrFormat},
		"nothing, unsigned":  {nil, nil, &tpm.Key.PublicKey, qualifying, quote.ErrSignature},
		"signature of zeros": {good.Attest, []byte{0, 0x18, 0, 0x0b, 0, 0, 0, 0}, &tpm.Key.PublicKey, qualifying, quote.ErrSignature},
	} {
		if q, err := quote.Verify(c.attest, c.signature, c.ak, c.q); !errors.Is(err, c.want) || q.Digest != nil {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func TestVerifyCertify(t *testing.T) {
	tpm, other := newTPM(), newTPM()
	c := tpm.Certify(other.AKName())
	if err := quote.VerifyCertify(c.Attest, c.Signature, &tpm.Key.PublicKey, other.AKName()); err != nil {
		t.Fatal(err)
	}
	if err := quote.VerifyCertify(c.Attest, c.Signature, &other.Key.PublicKey, other.AKName()); !errors.Is(err, quote.ErrSignature) {
		t.Errorf("by another AK: %v", err)
	}
	if err := quote.VerifyCertify(c.Attest, c.Signature, &tpm.Key.PublicKey, tpm.AKName()); !errors.Is(err, quote.ErrName) {
		t.Errorf("of another object: %v", err)
	}
	none := tpm.Certify(nil)
	if err := quote.VerifyCertify(none.Attest, none.Signature, &tpm.Key.PublicKey, nil); !errors.Is(err, quote.ErrName) {
		t.Errorf("of no Name: %v", err)
	}
	q := tpm.Quote(qualifying[:], banks...)
	if err := quote.VerifyCertify(q.Attest, q.Signature, &tpm.Key.PublicKey, tpm.AKName()); !errors.Is(err, quote.ErrFormat) {
		t.Errorf("a quote: %v", err)
	}
}

func rsaPublic(t testing.TB, key *rsa.PublicKey, change ...func(*tpm2.TPMTPublic)) []byte {
	t.Helper()
	p := tpm2.TPMTPublic{
		Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, NoDA: true, Decrypt: true},
		AuthPolicy:       tpm2.TPM2BDigest{Buffer: make([]byte, 32)},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			Scheme: tpm2.TPMTRSAScheme{
				Scheme:  tpm2.TPMAlgOAEP,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgOAEP, &tpm2.TPMSEncSchemeOAEP{HashAlg: tpm2.TPMAlgSHA256}),
			},
			KeyBits: tpm2.TPMKeyBits(key.N.BitLen()),
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: key.N.Bytes()}),
	}
	for _, f := range change {
		f(&p)
	}
	return tpm2.Marshal(p)
}

// Each attribute by which a key is of its kind is missed when it is not there.
func TestKinds(t *testing.T) {
	ec := &newTPM().Key.PublicKey
	rk, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	type attributes = func(*tpm2.TPMAObject)
	with := func(f attributes) func(*tpm2.TPMTPublic) {
		return func(p *tpm2.TPMTPublic) { f(&p.ObjectAttributes) }
	}
	ak := func(o *quote.Object) error { _, err := o.AK(); return err }
	certifier := func(o *quote.Object) error { _, err := o.Certifier(); return err }
	bind := func(o *quote.Object) error { _, _, err := o.Bind(); return err }
	sha1Scheme := func(p *tpm2.TPMTPublic) {
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme:  tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA1})},
			CurveID: tpm2.TPMECCNistP256,
		})
	}
	anyScheme := func(p *tpm2.TPMTPublic) {
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{Scheme: tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}, CurveID: tpm2.TPMECCNistP256})
	}
	free := with(func(a *tpm2.TPMAObject) { a.Restricted = false })
	for name, c := range map[string]struct {
		area []byte
		is   func(*quote.Object) error
		ok   bool
	}{
		"AK":                      {forge.Public(ec), ak, true},
		"AK, free":                {forge.Public(ec, free), ak, false},
		"AK, not fixedTPM":        {forge.Public(ec, with(func(a *tpm2.TPMAObject) { a.FixedTPM = false })), ak, false},
		"AK, not fixedParent":     {forge.Public(ec, with(func(a *tpm2.TPMAObject) { a.FixedParent = false })), ak, false},
		"AK, imported":            {forge.Public(ec, with(func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false })), ak, false},
		"AK, decrypts":            {forge.Public(ec, with(func(a *tpm2.TPMAObject) { a.Decrypt = true })), ak, false},
		"AK, does not sign":       {forge.Public(ec, with(func(a *tpm2.TPMAObject) { a.SignEncrypt = false })), ak, false},
		"AK, SHA-1":               {forge.Public(ec, sha1Scheme), ak, false},
		"AK, any scheme":          {forge.Public(ec, anyScheme), ak, false},
		"AK, RSA":                 {rsaPublic(t, &rk.PublicKey), ak, false},
		"certifier":               {forge.Public(ec, free), certifier, true},
		"certifier, restricted":   {forge.Public(ec), certifier, false},
		"certifier, not fixedTPM": {forge.Public(ec, free, with(func(a *tpm2.TPMAObject) { a.FixedTPM = false })), certifier, false},
		"bind":                    {rsaPublic(t, &rk.PublicKey), bind, true},
		"bind, adminWithPolicy":   {rsaPublic(t, &rk.PublicKey, with(func(a *tpm2.TPMAObject) { a.AdminWithPolicy = true })), bind, true},
		"bind, userWithAuth":      {rsaPublic(t, &rk.PublicKey, with(func(a *tpm2.TPMAObject) { a.UserWithAuth = true })), bind, false},
		"bind, not fixedTPM":      {rsaPublic(t, &rk.PublicKey, with(func(a *tpm2.TPMAObject) { a.FixedTPM = false })), bind, false},
		"bind, not fixedParent":   {rsaPublic(t, &rk.PublicKey, with(func(a *tpm2.TPMAObject) { a.FixedParent = false })), bind, false},
		"bind, signs":             {rsaPublic(t, &rk.PublicKey, with(func(a *tpm2.TPMAObject) { a.SignEncrypt = true })), bind, false},
		"bind, no policy":         {rsaPublic(t, &rk.PublicKey, func(p *tpm2.TPMTPublic) { p.AuthPolicy.Buffer = nil }), bind, false},
		"bind, OAEP with SHA-1": {rsaPublic(t, &rk.PublicKey, func(p *tpm2.TPMTPublic) {
			p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{KeyBits: 2048, Scheme: tpm2.TPMTRSAScheme{
				Scheme: tpm2.TPMAlgOAEP, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgOAEP, &tpm2.TPMSEncSchemeOAEP{HashAlg: tpm2.TPMAlgSHA1}),
			}})
		}), bind, false},
		"bind, ECC":      {forge.Public(ec), bind, false},
		"EK, a bind key": {rsaPublic(t, &rk.PublicKey), (*quote.Object).EK, false},
		"EK, an AK":      {forge.Public(ec), (*quote.Object).EK, false},
	} {
		o, err := quote.ParsePublic(c.area)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if c.ok && strings.HasPrefix(name, "AK") != (quote.FastAK(c.area) != nil) {
			t.Errorf("%s: read at once: %v", name, quote.FastAK(c.area))
		}
		if _, err := quote.ParseAK(c.area); (err == nil) != (ak(o) == nil) {
			t.Errorf("%s: ParseAK: %v", name, err)
		}
		if err := c.is(o); (err == nil) != c.ok || err != nil && !errors.Is(err, quote.ErrKind) {
			t.Errorf("%s: %v", name, err)
		}
	}
	o, err := quote.ParsePublic(rsaPublic(t, &rk.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	if key, policy, _ := o.Bind(); !key.Equal(&rk.PublicKey) || len(policy) != 32 {
		t.Error("another key, or policy, than the bind key's")
	}
	if _, _, err := quote.MakeCredential(rand.Reader, o, o.Name, []byte("secret")); !errors.Is(err, quote.ErrKind) {
		t.Errorf("credential for a key that is no EK: %v", err)
	}
}

func TestParsePublicRefuses(t *testing.T) {
	tpm := newTPM()
	good := tpm.AK()
	off := forge.Public(&tpm.Key.PublicKey, func(p *tpm2.TPMTPublic) {
		p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: bytes.Repeat([]byte{1}, 32)}, Y: tpm2.TPM2BECCParameter{Buffer: bytes.Repeat([]byte{1}, 32)}})
	})
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"nothing": nil, "cut off": good[:len(good)-1], "followed": append(bytes.Clone(good), 0), "long": make([]byte, quote.MaxPublic+1),
		"not on the curve": off, "RSA of 1024 bits": rsaPublic(t, &small.PublicKey),
		"a Name of SHA-1": forge.Public(&tpm.Key.PublicKey, func(p *tpm2.TPMTPublic) { p.NameAlg = tpm2.TPMAlgSHA1 }),
	} {
		if _, err := quote.ParsePublic(b); !errors.Is(err, quote.ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	o, err := quote.ParsePublic(good)
	if err != nil || !bytes.Equal(o.Name, tpm.AKName()) {
		t.Errorf("%v, Name %x", err, o.Name)
	}
}

// What this package reads by hand is what go-tpm reads.
func FuzzUntrustedParse(f *testing.F) {
	tpm := newTPM()
	f.Add(tpm.Quote(qualifying[:], banks...).Attest)
	f.Add(tpm.Quote(nil).Attest)
	f.Add(tpm.Certify(tpm.AKName()).Attest)
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := quote.UntrustedParse(b)
		if err != nil {
			return
		}
		a, err := tpm2.Unmarshal[tpm2.TPMSAttest](b)
		if err != nil {
			t.Fatalf("go-tpm: %v", err)
		}
		info, err := a.Attested.Quote()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(info.PCRDigest.Buffer, q.Digest) || !bytes.Equal(a.ExtraData.Buffer, q.Qualifying) || a.ClockInfo.Clock != q.Clock.Milliseconds ||
			a.ClockInfo.ResetCount != q.Clock.Resets || a.FirmwareVersion != q.Firmware || len(info.PCRSelect.PCRSelections) != len(q.Selections) {
			t.Errorf("%+v is not %+v", q, a)
		}
		q.Covers("sha256", []uint{0})
		if err := q.Check(tpm.PCR); err == nil && len(q.Selections) == 0 {
			t.Error("no PCRs have a right digest")
		}
	})
}

func FuzzVerify(f *testing.F) {
	tpm := newTPM()
	s := tpm.Quote(qualifying[:], banks...)
	f.Add(s.Attest, s.Signature)
	f.Fuzz(func(t *testing.T, attest, signature []byte) {
		if _, err := quote.Verify(attest, signature, &tpm.Key.PublicKey, qualifying); err == nil && !bytes.Equal(attest, s.Attest) {
			t.Error("forged")
		}
		quote.VerifyCertify(attest, signature, &tpm.Key.PublicKey, tpm.AKName())
	})
}

func FuzzParsePublic(f *testing.F) {
	tpm := newTPM()
	rk, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(tpm.AK())
	f.Add(rsaPublic(f, &rk.PublicKey))
	f.Add(tpm2.Marshal(tpm2.RSAEKTemplate))
	f.Add(tpm2.Marshal(tpm2.ECCEKTemplate))
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := quote.ParsePublic(b)
		if err != nil {
			return
		}
		slow, slowErr := o.AK()
		if key, err := quote.ParseAK(b); (err == nil) != (slowErr == nil) || err == nil && !key.Equal(slow) {
			t.Errorf("read at once: %v, by go-tpm: %v", err, slowErr)
		}
		o.Certifier()
		o.Bind()
		if _, err := o.SPKI(); err != nil {
			t.Error(err)
		}
		if o.EK() == nil {
			if _, _, err := quote.MakeCredential(rand.Reader, o, tpm.AKName(), []byte("secret")); err != nil {
				t.Error(err)
			}
		}
	})
}
