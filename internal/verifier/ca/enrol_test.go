package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"math/big"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/evidence/quote"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/vtpm/ekcert"
)

// maker is a TPM manufacturer: a root, an intermediate, and the EKs that it makes.
type maker struct {
	t           *testing.T
	root, sub   *x509.Certificate
	key, subKey *ecdsa.PrivateKey
}

func newMaker(t *testing.T) *maker {
	m := &maker{t: t, key: newKey(t), subKey: newKey(t)}
	ca := func(name string, parent *x509.Certificate, key, by *ecdsa.PrivateKey) *x509.Certificate {
		c := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: now.AddDate(-5, 0, 0), NotAfter: now.AddDate(20, 0, 0),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
		if parent == nil {
			parent = c
		}
		return testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(testkit.Must[[]byte](t)(x509.CreateCertificate(rand.Reader, c, parent, key.Public(), by))))
	}
	m.root = ca("maker root", nil, m.key, m.key)
	m.sub = ca("maker EK CA", m.root, m.subKey, m.key)
	return m
}

// directoryName is the critical SubjectAltName of an EK certificate.
func directoryName(t *testing.T, model string) pkix.Extension {
	der := testkit.Must[[]byte](t)(asn1.Marshal(pkix.RDNSequence{{{Type: asn1.ObjectIdentifier{2, 23, 133, 2, 1}, Value: "id:49465800"}}, {{Type: asn1.ObjectIdentifier{2, 23, 133, 2, 2}, Value: model}}}))
	san := testkit.Must[[]byte](t)(asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: der}}))
	return pkix.Extension{Id: oidSAN, Critical: true, Value: san}
}

func (m *maker) certify(key any, change func(*x509.Certificate)) []byte {
	m.t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(77), NotBefore: now.AddDate(-1, 0, 0), NotAfter: now.AddDate(10, 0, 0), KeyUsage: x509.KeyUsageKeyEncipherment,
		BasicConstraintsValid: true, UnknownExtKeyUsage: []asn1.ObjectIdentifier{OIDEKCertificate}, ExtraExtensions: []pkix.Extension{directoryName(m.t, "SLB9670")},
	}
	if change != nil {
		change(c)
	}
	return testkit.Must[[]byte](m.t)(x509.CreateCertificate(rand.Reader, c, m.sub, key, m.subKey))
}

func TestVerifyEK(t *testing.T) {
	mk, other := newMaker(t), newMaker(t)
	ek := testkit.Must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
	ecc, another := newKey(t), newKey(t)
	m := testkit.Must[*Manufacturers](t)(NewManufacturers([]*x509.Certificate{mk.root, mk.sub}))
	good := mk.certify(ek.Public(), nil)
	if c := testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(good)); len(c.UnhandledCriticalExtensions) == 0 {
		t.Error("crypto/x509 takes a SubjectAltName of a directoryName now: plain is not needed")
	}
	for name, ok := range map[string]error{
		"RSA": m.VerifyEK(ek.Public(), good, now), "ECC": m.VerifyEK(ecc.Public(), mk.certify(ecc.Public(), nil), now),
		"by an intermediate alone": testkit.Must[*Manufacturers](t)(NewManufacturers([]*x509.Certificate{mk.sub})).VerifyEK(ek.Public(), good, now),
		"RSAES-OAEP":               m.VerifyEK(ek.Public(), oaep(t, mk, ek), now),
	} {
		if ok != nil {
			t.Errorf("%s: %v", name, ok)
		}
	}
	for name, c := range map[string]struct {
		key  any
		cert []byte
		m    *Manufacturers
		at   time.Time
		code Code
	}{
		"none":            {ek.Public(), nil, m, now, EKNoCert},
		"garbage":         {ek.Public(), []byte("x"), m, now, EKCertBad},
		"long":            {ek.Public(), make([]byte, MaxEKCertificate+1), m, now, EKCertBad},
		"of another EK":   {ecc.Public(), good, m, now, EKOther},
		"of another ECC":  {another.Public(), mk.certify(ecc.Public(), nil), m, now, EKOther},
		"another's OAEP":  {ecc.Public(), oaep(t, mk, ek), m, now, EKOther},
		"unknown root":    {ek.Public(), other.certify(ek.Public(), nil), m, now, EKUnknownRoot},
		"no roots at all": {ek.Public(), good, testkit.Must[*Manufacturers](t)(NewManufacturers(nil)), now, EKUnknownRoot},
		"no intermediate": {ek.Public(), good, testkit.Must[*Manufacturers](t)(NewManufacturers([]*x509.Certificate{mk.root})), now, EKUnknownRoot},
		"expired":         {ek.Public(), good, m, now.AddDate(11, 0, 0), EKExpired},
		"not yet":         {ek.Public(), good, m, now.AddDate(-2, 0, 0), EKExpired},
		"without its use": {ek.Public(), mk.certify(ek.Public(), func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil }), m, now, EKNotEK},
		"for TLS": {ek.Public(), mk.certify(ek.Public(), func(c *x509.Certificate) {
			c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}), m, now, EKNotEK},
		"a CA's":         {ek.Public(), mk.certify(ek.Public(), func(c *x509.Certificate) { c.IsCA = true }), m, now, EKNotEK},
		"a vTPM's model": {ek.Public(), mk.certify(ek.Public(), func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{directoryName(t, ekcert.Model)} }), m, now, EKIsVTPM},
		"a vTPM's policy": {ek.Public(), mk.certify(ek.Public(), func(c *x509.Certificate) {
			c.Policies = []x509.OID{testkit.Must[x509.OID](t)(x509.ParseOID(ekcert.PolicyTakenIn))}
		}), m, now, EKIsVTPM},
		"a VM's URN": {ek.Public(), mk.certify(ek.Public(), func(c *x509.Certificate) { c.ExtraExtensions, c.URIs = nil, []*url.URL{nodeURI(identity().Node)} }), m, now, EKIsVTPM},
		"critical unknown": {ek.Public(), mk.certify(ek.Public(), func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oidArc, Critical: true, Value: []byte{5, 0}})
		}), m, now, EKUnknownRoot},
	} {
		r := AsRefusal(c.m.VerifyEK(c.key, c.cert, c.at))
		if r == nil || r.Code != c.code {
			t.Errorf("%s: %v, want %s", name, r, c.code)
			continue
		}
		// An operator may vouch for what is unknown, never for what is wrong.
		if final := c.code == EKOther || c.code == EKIsVTPM; Doubtful(c.code) == final {
			t.Errorf("%s: doubtful %v", name, !final)
		}
	}
	if _, err := NewManufacturers([]*x509.Certificate{testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(good))}); err == nil {
		t.Error("an EK certificate is a manufacturer's root")
	}
}

// oaep is an EK certificate whose key is named id-RSAES-OAEP, as some TPM
// manufacturers do.
func oaep(t *testing.T, m *maker, key *rsa.PrivateKey) []byte {
	t.Helper()
	type certificate struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}
	good := testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(m.certify(key.Public(), nil)))
	spki := testkit.Must[[]byte](t)(asn1.Marshal(struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}{pkix.AlgorithmIdentifier{Algorithm: oidRSAOAEP}, asn1.BitString{Bytes: x509.MarshalPKCS1PublicKey(&key.PublicKey), BitLength: 8 * len(x509.MarshalPKCS1PublicKey(&key.PublicKey))}}))
	var fields []asn1.RawValue
	if _, err := asn1.Unmarshal(good.RawTBSCertificate, &fields); err != nil {
		t.Fatal(err)
	}
	for i, f := range fields {
		if bytes.Equal(f.FullBytes, good.RawSubjectPublicKeyInfo) {
			fields[i] = asn1.RawValue{FullBytes: spki}
		}
	}
	tbs := testkit.Must[[]byte](t)(asn1.Marshal(fields))
	d := sha256.Sum256(tbs)
	sig := testkit.Must[[]byte](t)(ecdsa.SignASN1(rand.Reader, m.subKey, d[:]))
	var c certificate
	if _, err := asn1.Unmarshal(good.Raw, &c); err != nil {
		t.Fatal(err)
	}
	c.TBS, c.Signature = asn1.RawValue{FullBytes: tbs}, asn1.BitString{Bytes: sig, BitLength: 8 * len(sig)}
	return testkit.Must[[]byte](t)(asn1.Marshal(c))
}

// Public areas as a TPM has them, over keys that are in no TPM.

func signing(key *ecdsa.PublicKey, restricted bool) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, SignEncrypt: true, Restricted: restricted},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme:  tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
			CurveID: tpm2.TPMECCNistP256,
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: key.X.FillBytes(make([]byte, 32))}, Y: tpm2.TPM2BECCParameter{Buffer: key.Y.FillBytes(make([]byte, 32))},
		}),
	}
}

func bindArea(key *rsa.PublicKey) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, NoDA: true, Decrypt: true},
		AuthPolicy:       tpm2.TPM2BDigest{Buffer: make([]byte, 32)},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			Scheme:  tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgOAEP, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgOAEP, &tpm2.TPMSEncSchemeOAEP{HashAlg: tpm2.TPMAlgSHA256})},
			KeyBits: 2048,
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: key.N.Bytes()}),
	}
}

func ekArea(key *rsa.PublicKey) tpm2.TPMTPublic {
	a := tpm2.RSAEKTemplate
	a.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: key.N.Bytes()})
	return a
}

// soft is a TPM's keys in software.
type soft struct {
	t             *testing.T
	ek, bind      *rsa.PrivateKey
	ak, certifier *ecdsa.PrivateKey
	keys          Keys
}

func newSoft(t *testing.T) *soft {
	s := &soft{t: t, ek: testkit.Must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048)), bind: testkit.Must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048)), ak: newKey(t), certifier: newKey(t)}
	s.keys = Keys{
		EK: tpm2.Marshal(ekArea(&s.ek.PublicKey)), AK: tpm2.Marshal(signing(&s.ak.PublicKey, true)),
		Bind: tpm2.Marshal(bindArea(&s.bind.PublicKey)), Certifier: tpm2.Marshal(signing(&s.certifier.PublicKey, false)),
	}
	s.keys.BindAttest, s.keys.BindSignature = s.certify(s.ak, s.keys.Bind)
	s.keys.CertifierAttest, s.keys.CertifierSignature = s.certify(s.ak, s.keys.Certifier)
	return s
}

// certify is what TPM2_Certify gives.
func (s *soft) certify(by *ecdsa.PrivateKey, area []byte) (attest, signature []byte) {
	name := testkit.Must[*quote.Object](s.t)(quote.ParsePublic(area)).Name
	a := tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestCertify,
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{Name: tpm2.TPM2BName{Buffer: name}}),
	}
	return s.sign(by, tpm2.Marshal(a))
}

func (s *soft) sign(by *ecdsa.PrivateKey, attest []byte) ([]byte, []byte) {
	d := sha256.Sum256(attest)
	r, v, err := ecdsa.Sign(rand.Reader, by, d[:])
	if err != nil {
		s.t.Fatal(err)
	}
	sig := tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
		Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: r.FillBytes(make([]byte, 32))}, SignatureS: tpm2.TPM2BECCParameter{Buffer: v.FillBytes(make([]byte, 32))},
	})}
	return attest, tpm2.Marshal(sig)
}

func (s *soft) quote(qualifying [32]byte) (attest, signature []byte) {
	a := tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestQuote, ExtraData: tpm2.TPM2BData{Buffer: qualifying[:]},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
			PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(0, 7)}}},
			PCRDigest: tpm2.TPM2BDigest{Buffer: make([]byte, 32)},
		}),
	}
	return s.sign(s.ak, tpm2.Marshal(a))
}

func TestKeys(t *testing.T) {
	s := newSoft(t)
	p, err := s.keys.Verify()
	if err != nil {
		t.Fatal(err)
	}
	if !p.AKKey.Equal(s.ak.Public()) || !bytes.Equal(p.CertifierSPKI, spkiOf(t, s.certifier.Public())) || len(p.EKDigest) != 64 {
		t.Errorf("%+v", p)
	}
	area := func(a tpm2.TPMTPublic, f func(*tpm2.TPMTPublic)) []byte {
		f(&a)
		return tpm2.Marshal(a)
	}
	foreign := newKey(t)
	for name, c := range map[string]struct {
		change func(*Keys)
		code   Code
	}{
		"EK empty":      {func(k *Keys) { k.EK = nil }, EKUnparsable},
		"EK long":       {func(k *Keys) { k.EK = make([]byte, 2000) }, EKUnparsable},
		"EK that signs": {func(k *Keys) { k.EK = k.AK }, EKUnparsable},
		"EK that leaves": {func(k *Keys) {
			k.EK = area(ekArea(&s.ek.PublicKey), func(a *tpm2.TPMTPublic) { a.ObjectAttributes.FixedTPM = false })
		}, EKUnparsable},
		"AK empty": {func(k *Keys) { k.AK = nil }, AKAttributes},
		"AK free":  {func(k *Keys) { k.AK = tpm2.Marshal(signing(&s.ak.PublicKey, false)) }, AKAttributes},
		"AK that leaves": {func(k *Keys) {
			k.AK = area(signing(&s.ak.PublicKey, true), func(a *tpm2.TPMTPublic) { a.ObjectAttributes.FixedTPM = false })
		}, AKAttributes},
		"AK from outside": {func(k *Keys) {
			k.AK = area(signing(&s.ak.PublicKey, true), func(a *tpm2.TPMTPublic) { a.ObjectAttributes.SensitiveDataOrigin = false })
		}, AKAttributes},
		"bind empty": {func(k *Keys) { k.Bind = nil }, BindBad},
		"bind without policy": {func(k *Keys) {
			k.Bind = area(bindArea(&s.bind.PublicKey), func(a *tpm2.TPMTPublic) { a.AuthPolicy.Buffer = nil })
			k.BindAttest, k.BindSignature = s.certify(s.ak, k.Bind)
		}, BindBad},
		"bind with password": {func(k *Keys) {
			k.Bind = area(bindArea(&s.bind.PublicKey), func(a *tpm2.TPMTPublic) { a.ObjectAttributes.UserWithAuth = true })
			k.BindAttest, k.BindSignature = s.certify(s.ak, k.Bind)
		}, BindBad},
		"bind that leaves": {func(k *Keys) {
			k.Bind = area(bindArea(&s.bind.PublicKey), func(a *tpm2.TPMTPublic) { a.ObjectAttributes.FixedParent = false })
			k.BindAttest, k.BindSignature = s.certify(s.ak, k.Bind)
		}, BindBad},
		"bind is the EK":        {func(k *Keys) { k.Bind = k.EK }, BindBad},
		"bind not certified":    {func(k *Keys) { k.BindAttest, k.BindSignature = nil, nil }, BindUncertain},
		"bind, other certified": {func(k *Keys) { k.BindAttest, k.BindSignature = k.CertifierAttest, k.CertifierSignature }, BindUncertain},
		"bind, by another":      {func(k *Keys) { k.BindAttest, k.BindSignature = s.certify(foreign, k.Bind) }, BindUncertain},
		"bind, flipped": {func(k *Keys) {
			k.BindAttest = slices.Clone(k.BindAttest)
			k.BindAttest[len(k.BindAttest)-1] ^= 1
		}, BindUncertain},
		"certifier empty":         {func(k *Keys) { k.Certifier = nil }, CertifierBad},
		"certifier is the AK":     {func(k *Keys) { k.Certifier = k.AK }, CertifierBad},
		"certifier not certified": {func(k *Keys) { k.CertifierSignature = nil }, CertifierUnc},
		"certifier, by itself":    {func(k *Keys) { k.CertifierAttest, k.CertifierSignature = s.certify(s.certifier, k.Certifier) }, CertifierUnc},
		"certifier, other certified": {func(k *Keys) {
			k.Certifier = tpm2.Marshal(signing(&foreign.PublicKey, false))
		}, CertifierUnc},
	} {
		k := s.keys
		c.change(&k)
		if _, err := k.Verify(); AsRefusal(err) == nil || AsRefusal(err).Code != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
}

func TestVerifyNodeKey(t *testing.T) {
	s := newSoft(t)
	nonce, spki := bytes.Repeat([]byte{1}, 32), spkiOf(t, newKey(t).Public())
	attest, signature := s.quote(NodeKeyQualifyingData(nonce, spki))
	if err := VerifyNodeKey(&s.ak.PublicKey, nonce, spki, attest, signature); err != nil {
		t.Fatal(err)
	}
	other := spkiOf(t, newKey(t).Public())
	p521 := spkiOf(t, testkit.Must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P521(), rand.Reader)).Public())
	evidence, evidenceSig := s.quote(sha256.Sum256(nonce))
	certified, certifiedSig := s.certify(s.ak, s.keys.Bind)
	for name, c := range map[string]struct {
		ak                             *ecdsa.PublicKey
		nonce, spki, attest, signature []byte
		code                           Code
	}{
		"another key":     {&s.ak.PublicKey, nonce, other, attest, signature, KeyNotQuoted},
		"another nonce":   {&s.ak.PublicKey, make([]byte, 32), spki, attest, signature, KeyNotQuoted},
		"another AK":      {&s.certifier.PublicKey, nonce, spki, attest, signature, KeyNotQuoted},
		"evidence":        {&s.ak.PublicKey, nonce, spki, evidence, evidenceSig, KeyNotQuoted},
		"a certification": {&s.ak.PublicKey, nonce, spki, certified, certifiedSig, KeyNotQuoted},
		"no key":          {&s.ak.PublicKey, nonce, []byte("x"), attest, signature, Malformed},
		"RSA":             {&s.ak.PublicKey, nonce, spkiOf(t, s.bind.Public()), attest, signature, KeyNotQuoted},
		"P-521":           {&s.ak.PublicKey, nonce, p521, attest, signature, KeyNotQuoted},
		"nothing":         {&s.ak.PublicKey, nonce, spki, nil, nil, KeyNotQuoted},
	} {
		if err := VerifyNodeKey(c.ak, c.nonce, c.spki, c.attest, c.signature); AsRefusal(err) == nil || AsRefusal(err).Code != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
}

func TestDecide(t *testing.T) {
	s, other := newSoft(t), newSoft(t)
	keys, others := testkit.Must[*Proven](t)(s.keys.Verify()), testkit.Must[*Proven](t)(other.keys.Verify())
	mixed := *keys // the EK is the same, its other keys were made anew
	mixed.AK, mixed.Bind, mixed.Certifier = others.AK, others.Bind, others.Certifier
	rebound := *keys
	rebound.Bind = others.Bind
	recertified := *keys
	recertified.Certifier = others.Certifier
	nodeOf := func(name string, k *Proven, certifier []byte) *fleet.Node {
		return &fleet.Node{ID: "id-" + name, Name: name, State: fleet.Active, EKDigest: k.EKDigest, AKName: k.AK.Name, BindName: k.Bind.Name, Certifier: certifier}
	}
	node := nodeOf("a", keys, s.keys.Certifier)
	revoked := nodeOf("a", keys, s.keys.Certifier)
	revoked.State = fleet.Revoked
	former := identity()
	doubt := &Refusal{Code: EKUnknownRoot}

	for name, c := range map[string]struct {
		claim Claim
		known Known
		rules Rules
		want  Decision
	}{
		"new":                  {Claim{Name: "a", Keys: keys, Token: true}, Known{}, Rules{}, Decision{State: fleet.Active, UseToken: true, Learns: true}},
		"new, operator":        {Claim{Name: "a", Keys: keys, Token: true}, Known{}, Rules{Operator: true}, Decision{State: fleet.Pending, UseToken: true, Learns: true}},
		"new, doubtful EK":     {Claim{Name: "a", Keys: keys, Token: true, EKTrust: doubt}, Known{}, Rules{}, Decision{State: fleet.Pending, UseToken: true, Learns: true, Problem: EKUnknownRoot}},
		"the same":             {Claim{Name: "a", Keys: keys}, Known{ByName: node, ByEK: node, ByAK: node}, Rules{}, Decision{Node: node}},
		"the same, with token": {Claim{Name: "a", Keys: keys, Token: true}, Known{ByName: node, ByEK: node, ByAK: node}, Rules{Operator: true}, Decision{Node: node}},
		"forgotten":            {Claim{Name: "a", Keys: keys, Former: &former}, Known{}, Rules{}, Decision{ID: former.Node, State: fleet.Pending, Problem: NodeRestored}},
		"forgotten, doubtful":  {Claim{Name: "a", Keys: keys, Former: &former, EKTrust: doubt}, Known{}, Rules{}, Decision{ID: former.Node, State: fleet.Pending, Problem: NodeRestored}},
		"forgotten, token":     {Claim{Name: "a", Keys: keys, Former: &former, Token: true}, Known{}, Rules{}, Decision{ID: former.Node, State: fleet.Active, UseToken: true}},
		"revoked, token":       {Claim{Name: "a", Keys: keys, Token: true}, Known{Revoked: revoked}, Rules{}, Decision{State: fleet.Active, UseToken: true, TokenNames: true}},
	} {
		if d, err := Decide(c.claim, c.known, c.rules); err != nil || d != c.want {
			t.Errorf("%s: %+v, %v, want %+v", name, d, err, c.want)
		}
	}
	for name, c := range map[string]struct {
		claim Claim
		known Known
		code  Code
		node  string
	}{
		"no token":            {Claim{Name: "a", Keys: keys}, Known{}, TokenMissing, ""},
		"no name":             {Claim{Name: "a\n", Keys: keys, Token: true}, Known{}, NameBad, ""},
		"upper case":          {Claim{Name: "A", Keys: others, Token: true}, Known{}, NameBad, ""},
		"name takeover":       {Claim{Name: "a", Keys: others, Token: true}, Known{ByName: node}, NameTaken, "id-a"},
		"TPM under two names": {Claim{Name: "b", Keys: keys, Token: true}, Known{ByEK: node, ByAK: node}, EKKnown, "id-a"},
		"TPM under another's": {Claim{Name: "b", Keys: keys, Token: true}, Known{ByName: nodeOf("b", others, nil), ByEK: node}, EKKnown, "id-a"},
		"AK swapped":          {Claim{Name: "a", Keys: &mixed, Token: true}, Known{ByName: node, ByEK: node}, AKSwapped, "id-a"},
		"AK of another":       {Claim{Name: "b", Keys: keys, Token: true}, Known{ByAK: node}, AKSwapped, "id-a"},
		"bind key swapped":    {Claim{Name: "a", Keys: &rebound, Token: true}, Known{ByName: node, ByEK: node, ByAK: node}, KeysSwapped, "id-a"},
		"certifier swapped":   {Claim{Name: "a", Keys: &recertified, Token: true}, Known{ByName: node, ByEK: node, ByAK: node}, KeysSwapped, "id-a"},
		"revoked":             {Claim{Name: "a", Keys: keys}, Known{Revoked: revoked}, NodeRevoked, "id-a"},
		"revoked, former":     {Claim{Name: "a", Keys: keys, Former: &former}, Known{Revoked: revoked}, NodeRevoked, "id-a"},
	} {
		_, err := Decide(c.claim, c.known, Rules{})
		if r := AsRefusal(err); r == nil || r.Code != c.code || r.Node != c.node {
			t.Errorf("%s: %v, want %s at %q", name, err, c.code, c.node)
		}
	}
}

// A certificate of long ago shows that the CA knew these keys, and no others.
func TestFormer(t *testing.T) {
	a, _ := newAuthority(t, elliptic.P256())
	other, _ := newAuthority(t, elliptic.P256())
	s := newSoft(t)
	p := testkit.Must[*Proven](t)(s.keys.Verify())
	id := identity()
	digest := testkit.Must[string](t)(EKDigest(p.EK.Key))
	id.EK, id.AK, id.Bind = testkit.Must[[]byte](t)(hex.DecodeString(digest)), p.AK.Name, p.Bind.Name
	key := spkiOf(t, newKey(t).Public())
	long := testkit.Must[*x509.Certificate](t)(a.Node(id, key, now.AddDate(-3, 0, 0)))
	if got := a.Former(long.Raw, p); got == nil || got.Node != id.Node {
		t.Errorf("%+v", got)
	}
	stranger := testkit.Must[*Proven](t)(newSoft(t).keys.Verify())
	certifier := testkit.Must[*x509.Certificate](t)(a.Certifier(id, key, now))
	for name, c := range map[string]struct {
		der []byte
		p   *Proven
	}{
		"nothing": {nil, p}, "garbage": {[]byte("x"), p}, "other keys": {long.Raw, stranger}, "a certifier's": {certifier.Raw, p},
		"another CA's": {testkit.Must[*x509.Certificate](t)(other.Node(id, key, now)).Raw, p},
		"long":         {make([]byte, 2*MaxTBS+1), p},
	} {
		if got := a.Former(c.der, c.p); got != nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
