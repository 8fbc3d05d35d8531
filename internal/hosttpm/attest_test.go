package hosttpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"virt-trust/internal/testkit"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

var ownerAuth = tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}

// makeEK has a TPM make its EK of a kind, and keep it where keep is set.
func makeEK(t testing.TB, tpm transport.TPM, e endorsement, keep bool) crypto.PublicKey {
	t.Helper()
	r, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)}, InPublic: tpm2.New2B(e.template),
	}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	public, err := r.OutPublic.Contents()
	if err != nil {
		t.Fatal(err)
	}
	key, err := publicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	if keep {
		_, err = tpm2.EvictControl{Auth: ownerAuth, ObjectHandle: &tpm2.NamedHandle{Handle: r.ObjectHandle, Name: r.Name}, PersistentHandle: e.persistent}.Execute(tpm)
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := (tpm2.FlushContext{FlushHandle: r.ObjectHandle}).Execute(tpm); err != nil {
		t.Fatal(err)
	}
	return key
}

// certifyEK is what a TPM's maker does: a certificate over its EK.
func certifyEK(t testing.TB, key crypto.PublicKey) []byte {
	t.Helper()
	maker, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(7), Issuer: pkix.Name{CommonName: "Maker of TPMs"}, NotAfter: time.Now().Add(time.Hour),
		ExtraExtensions: []pkix.Extension{{Id: []int{1, 2, 3, 4}, Value: bytes.Repeat([]byte{5}, 700)}}, // as long as real ones
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key, maker)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// writeNV writes an index as a TPM's maker does.
func writeNV(t testing.TB, tpm transport.TPM, index tpm2.TPMHandle, b []byte, a tpm2.TPMANV) {
	t.Helper()
	a.OwnerWrite, a.NoDA = true, true
	public := tpm2.TPMSNVPublic{NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(b)), Attributes: a}
	if _, err := (tpm2.NVDefineSpace{AuthHandle: ownerAuth, PublicInfo: tpm2.New2B(public)}).Execute(tpm); err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(b); at += nvPiece {
		name, err := tpm2.NVName(&public)
		if err != nil {
			t.Fatal(err)
		}
		_, err = tpm2.NVWrite{
			AuthHandle: ownerAuth, NVIndex: tpm2.NamedHandle{Handle: index, Name: *name},
			Data: tpm2.TPM2BMaxNVBuffer{Buffer: b[at:min(len(b), at+nvPiece)]}, Offset: uint16(at),
		}.Execute(tpm)
		if err != nil {
			t.Fatal(err)
		}
		public.Attributes.Written = true
	}
}

var readableNV = tpm2.TPMANV{AuthRead: true, OwnerRead: true}

// makeCredential is TPM2_MakeCredential of a TPM that knows the EK's public
// half alone, for the AK with this Name.
func makeCredential(t testing.TB, tpm transport.TPM, ek []byte, name, secret []byte) (idObject, encryptedSecret []byte) {
	t.Helper()
	l, err := tpm2.LoadExternal{InPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](ek), Hierarchy: tpm2.TPMRHNull}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	defer tpm2.FlushContext{FlushHandle: l.ObjectHandle}.Execute(tpm)
	r, err := tpm2.MakeCredential{Handle: l.ObjectHandle, Credential: tpm2.TPM2BDigest{Buffer: secret}, ObjectName: tpm2.TPM2BName{Buffer: name}}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	return tpm2.Marshal(r.CredentialBlob), tpm2.Marshal(r.Secret)
}

// A host proves that its AK is in the TPM with its EK, whichever kind of EK the
// TPM's maker has certified, and whether the TPM keeps it or has to make it.
func TestIdentity(t *testing.T) {
	t.Parallel()
	rsa, ecc := endorsements[0], endorsements[1]
	for name, c := range map[string]struct {
		prepare func(t *testing.T, tpm transport.TPM) (certificate []byte)
		kind    tpm2.TPMAlgID
		problem string
	}{
		"no certificate": {func(*testing.T, transport.TPM) []byte { return nil }, tpm2.TPMAlgRSA, ""},
		"RSA, kept": {func(t *testing.T, tpm transport.TPM) []byte {
			cert := certifyEK(t, makeEK(t, tpm, rsa, true))
			writeNV(t, tpm, rsa.certificate, cert, readableNV)
			return cert
		}, tpm2.TPMAlgRSA, ""},
		"RSA, filled up": {func(t *testing.T, tpm transport.TPM) []byte {
			cert := certifyEK(t, makeEK(t, tpm, rsa, false))
			writeNV(t, tpm, rsa.certificate, append(bytes.Clone(cert), bytes.Repeat([]byte{0xFF}, 300)...), tpm2.TPMANV{OwnerRead: true})
			return cert
		}, tpm2.TPMAlgRSA, ""},
		"ECC alone": {func(t *testing.T, tpm transport.TPM) []byte {
			cert := certifyEK(t, makeEK(t, tpm, ecc, false))
			writeNV(t, tpm, ecc.certificate, cert, readableNV)
			return cert
		}, tpm2.TPMAlgECC, ""},
		"both": {func(t *testing.T, tpm transport.TPM) []byte {
			writeNV(t, tpm, ecc.certificate, certifyEK(t, makeEK(t, tpm, ecc, true)), readableNV)
			cert := certifyEK(t, makeEK(t, tpm, rsa, true))
			writeNV(t, tpm, rsa.certificate, cert, readableNV)
			return cert
		}, tpm2.TPMAlgRSA, ""},
		"another key's": {func(t *testing.T, tpm transport.TPM) []byte {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			writeNV(t, tpm, ecc.certificate, certifyEK(t, &key.PublicKey), readableNV)
			return nil
		}, tpm2.TPMAlgECC, "another key"},
		"no certificate at all": {func(t *testing.T, tpm transport.TPM) []byte {
			writeNV(t, tpm, rsa.certificate, bytes.Repeat([]byte{0}, 900), readableNV)
			return nil
		}, tpm2.TPMAlgRSA, "0x1c00002"},
		"another key at its place": {func(t *testing.T, tpm transport.TPM) []byte {
			other := rsa
			other.template = tpm2.RSASRKTemplate
			makeEK(t, tpm, other, true)
			return nil
		}, tpm2.TPMAlgRSA, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, dir, second := startMade(t)
			cert := c.prepare(t, e.Open())
			h := open(t, e.Socket, dir)
			id, err := h.Identity(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(id.EKCertificate, cert) || (c.problem == "") != (id.EKProblem == "") || !strings.Contains(id.EKProblem, c.problem) {
				t.Errorf("the certificate is %x, problem %q", id.EKCertificate, id.EKProblem)
			}
			public, err := tpm2.Unmarshal[tpm2.TPMTPublic](id.EK)
			if err != nil || public.Type != c.kind {
				t.Fatalf("the EK is %+v, %v", public, err)
			}
			k := h.keys.Load()
			if err := (certification{id.BindAttest, id.BindSignature}).verify(h.AKPublic(), k.bind.name); err != nil {
				t.Error(err)
			}
			if err := (certification{id.CertifierAttest, id.CertifierSignature}).verify(h.AKPublic(), k.certifier.name); err != nil {
				t.Error(err)
			}
			for what, area := range map[string]struct{ area, name []byte }{"AK": {id.AK, h.AKName()}, "bind key": {id.Bind, h.BindKeyName()}, "certifier": {id.Certifier, k.certifier.name}} {
				if d := sha256.Sum256(area.area); !bytes.Equal(append([]byte{0, 0x0B}, d[:]...), area.name) {
					t.Errorf("the %s's public area is not the one of its Name", what)
				}
			}
			h.hang(t)
			secret := bytes.Repeat([]byte("s0"), 16)
			blob, seed := makeCredential(t, e.Open(), id.EK, id.AKName, secret)
			if got, err := h.ActivateCredential(t.Context(), blob, seed); err != nil || !bytes.Equal(got, secret) {
				t.Fatalf("ActivateCredential gives %x, %v", got, err)
			}
			h.hang(t)
			// For another AK, of the same TPM too, it gives nothing.
			other := open(t, e.Socket, second)
			if got, err := other.ActivateCredential(t.Context(), blob, seed); !errors.Is(err, ErrCredential) || errors.Is(err, ErrFailed) {
				t.Errorf("with another AK: %x, %v", got, err)
			}
			other.hang(t)
			for what, change := range map[string]func(blob, seed []byte) ([]byte, []byte){
				"a changed blob": func(b, s []byte) ([]byte, []byte) { b[len(b)-1] ^= 1; return b, s },
				"a changed seed": func(b, s []byte) ([]byte, []byte) { s[len(s)-1] ^= 1; return b, s },
				"a short blob":   func(b, s []byte) ([]byte, []byte) { return b[:len(b)-1], s },
				"no seed":        func(b, s []byte) ([]byte, []byte) { return b, nil },
				"a long seed":    func(b, s []byte) ([]byte, []byte) { return b, append(s, 0) },
			} {
				b, s := change(bytes.Clone(blob), bytes.Clone(seed))
				if got, err := h.ActivateCredential(t.Context(), b, s); !errors.Is(err, ErrCredential) {
					t.Errorf("%s: %x, %v", what, got, err)
				}
			}
			works(t, h)
		})
	}
}

// hang has a Host give the one connection that swtpm serves to others.
func (h *Host) hang(t testing.TB) {
	t.Helper()
	if _, err := do(t.Context(), h, func(c *client) (struct{}, error) { c.hangUp(); return struct{}{}, nil }); err != nil {
		t.Fatal(err)
	}
}

// The secret of a credential does not pass in the clear.
func TestCredentialIsHidden(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	p := startProxy(t, e)
	h := open(t, p.sock, dir)
	id, err := h.Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	h.hang(t)
	secret := bytes.Repeat([]byte("s1"), 16)
	blob, seed := makeCredential(t, e.Open(), id.EK, id.AKName, secret)
	var heard bytes.Buffer
	p.set(func(x *proxied) (err error) {
		x.response, err = x.tpm(x.command)
		heard.Write(x.command)
		heard.Write(x.response)
		return err
	})
	got, err := h.ActivateCredential(t.Context(), blob, seed)
	p.set(nil)
	if err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("%x, %v", got, err)
	}
	if !bytes.Contains(heard.Bytes(), seed) || bytes.Contains(heard.Bytes(), secret[:8]) {
		t.Fatal("the secret was heard, or nothing was")
	}
}

// A quote is over the PCRs that come with it, whatever is extended meanwhile,
// and tpm2_checkquote finds it right.
func TestQuote(t *testing.T) {
	t.Parallel()
	testkit.Need(t, "tpm2_checkquote")
	e, dir, _ := startMade(t)
	p := startProxy(t, e)
	h := open(t, p.sock, dir)
	all := []uint{15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 10}
	for _, bank := range []string{"sha256", "sha384"} {
		qualifying := sha256.Sum256([]byte(bank))
		spoilt := 0
		p.set(func(x *proxied) error {
			if x.cc != tpm2.TPMCCPCRRead || spoilt == 3 {
				return nil
			}
			spoilt++
			_, err := x.tpm(extendCommand(10))
			return err
		})
		q, err := h.Quote(t.Context(), qualifying, bank, all)
		p.set(nil)
		if err != nil || spoilt != 3 && bank == "sha256" { // extendCommand is for that one
			t.Fatal(bank, spoilt, err)
		}
		if len(q.State.PCRs) != 16 || q.State.Bank != bank {
			t.Fatalf("the quote is over %+v", q.State)
		}
		checkquote(t, h, q, qualifying)
	}
	// The counts tell a reset of the TPM.
	before, err := h.Quote(t.Context(), [32]byte{}, "sha256", all)
	if err != nil {
		t.Fatal(err)
	}
	h.hang(t)
	e.Reset()
	after, err := h.Quote(t.Context(), [32]byte{}, "sha256", all)
	if err != nil || after.ResetCount != before.ResetCount+1 {
		t.Errorf("before and after a reset: %+v, %+v, %v", before, after, err)
	}
	for what, ask := range map[string]func() (*Quoted, error){
		"no PCRs":  func() (*Quoted, error) { return h.Quote(t.Context(), [32]byte{}, "sha256", nil) },
		"PCR 24":   func() (*Quoted, error) { return h.Quote(t.Context(), [32]byte{}, "sha256", []uint{1, 24}) },
		"sha1":     func() (*Quoted, error) { return h.Quote(t.Context(), [32]byte{}, "sha1", all) },
		"bank sm3": func() (*Quoted, error) { return h.Quote(t.Context(), [32]byte{}, "sm3", all) },
	} {
		if q, err := ask(); err == nil {
			t.Errorf("%s: %+v", what, q)
		}
	}
	p.set(func(x *proxied) error {
		if x.cc == tpm2.TPMCCPCRRead {
			x.tpm(extendCommand(10))
		}
		return nil
	})
	if _, err := h.Quote(t.Context(), [32]byte{}, "sha256", all); !errors.Is(err, ErrBusy) {
		t.Errorf("PCRs that never rest give %v", err)
	}
	p.set(nil)
	if _, err := open(t, e.Socket, t.TempDir()).Quote(t.Context(), [32]byte{}, "sha256", all); !errors.Is(err, ErrNotProvisioned) {
		t.Errorf("without keys: %v", err)
	}
}

// checkquote has tpm2_checkquote verify a quote.
func checkquote(t *testing.T, h *Host, q *Quoted, qualifying [32]byte) {
	t.Helper()
	dir := t.TempDir()
	public := tpm2.Marshal(tpm2.New2B(*h.keys.Load().ak.area))
	file := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	args := []string{"-u", file("ak", public), "-m", file("attest", q.Attest), "-s", file("signature", q.Signature), "-g", "sha256"}
	check := func(nonce []byte) error {
		cmd := exec.Command("tpm2_checkquote", append(args, "-q", hex.EncodeToString(nonce))...)
		cmd.WaitDelay = time.Second
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	if err := check(qualifying[:]); err != nil {
		t.Error("tpm2_checkquote: ", err)
	}
	qualifying[0] ^= 1
	if check(qualifying[:]) == nil {
		t.Error("tpm2_checkquote takes another nonce")
	}
}

// An answer that is not what was asked for is not handed on: one bit of what
// the TPM says, another qualifyingData, other PCRs, another kind of attestation.
func TestQuoteThatIsNone(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	p := startProxy(t, e)
	h := open(t, p.sock, dir)
	ask := func() error { return second(h.Quote(t.Context(), [32]byte{9}, "sha256", []uint{0, 7})) }
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	size := 0
	p.set(func(x *proxied) (err error) {
		if x.cc == tpm2.TPMCCQuote {
			x.response, err = x.tpm(x.command)
			size = len(x.response)
		}
		return err
	})
	if err := ask(); err != nil || size < 150 {
		t.Fatal(err)
	}
	for at := 16; at < size-6; at += 5 { // but for the header and the password session's end
		p.set(func(x *proxied) (err error) {
			if x.cc == tpm2.TPMCCQuote {
				x.response, err = x.tpm(x.command)
				x.response[at] ^= 4
			}
			return err
		})
		if err := ask(); !errors.Is(err, ErrFailed) && !errors.Is(err, ErrBusy) {
			t.Errorf("byte %d of %d changed: %v", at, size, err)
		}
	}
	p.set(func(x *proxied) error {
		if x.cc == tpm2.TPMCCQuote { // over PCR 0 and 8
			x.command[len(x.command)-2] = 1
			x.command[len(x.command)-3] = 1
		}
		return nil
	})
	if err := ask(); !errors.Is(err, ErrFailed) {
		t.Errorf("a quote over other PCRs: %v", err)
	}
	p.set(nil)
	if err := ask(); err != nil {
		t.Fatal(err)
	}
}

// Evidence waits for VM starts, and not they for it.
func TestQuoteGivesWay(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	p := startProxy(t, e)
	h := open(t, p.sock, dir)
	ct := wrapped(t, h)
	if _, err := h.UnwrapKeys(t.Context(), ct); err != nil {
		t.Fatal(err)
	}
	// The TPM is at work on a start, and more wait, when a quote is asked for.
	hold, held := make(chan struct{}), make(chan struct{}, 1)
	var quoted, unwrapped atomic.Int32
	early := false
	p.set(func(x *proxied) error {
		if x.n == 1 {
			held <- struct{}{}
			<-hold
		}
		switch x.cc {
		case tpm2.TPMCCQuote:
			early = early || unwrapped.Load() < 4
			quoted.Add(1)
		case tpm2.TPMCCRSADecrypt:
			unwrapped.Add(1)
		}
		return nil
	})
	done := make(chan error, 5)
	start := func() { done <- second(h.UnwrapKeys(t.Context(), ct)) }
	go start()
	<-held
	go func() { done <- second(h.Quote(t.Context(), [32]byte{}, "sha256", []uint{0})) }()
	time.Sleep(20 * time.Millisecond) // the quote stands at the door
	for range 3 {
		go start()
	}
	for len(h.queue) < 3 {
		time.Sleep(time.Millisecond)
	}
	close(hold)
	for range 5 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if early || quoted.Load() == 0 {
		t.Errorf("a quote went before a start: %v; %d quotes", early, quoted.Load())
	}
}

// attestations are the uses that evidence and enrolment make of the TPM; what
// they answer is checked.
func attestations(t *testing.T, e *emulator, h *Host) []use {
	t.Helper()
	first, err := h.Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	h.hang(t)
	secret := bytes.Repeat([]byte{0x66}, 32)
	blob, seed := makeCredential(t, e.Open(), first.EK, first.AKName, secret)
	ak := h.AKPublic()
	return []use{
		{"Identity", func(ctx context.Context, h *Host) error {
			id, err := h.Identity(ctx)
			if err == nil && (!bytes.Equal(id.EK, first.EK) || !bytes.Equal(id.EKCertificate, first.EKCertificate) || len(id.EKCertificate) == 0 || id.EKProblem != "") {
				return fmt.Errorf("a wrong identity: %+v", id)
			}
			return err
		}},
		{"ActivateCredential", func(ctx context.Context, h *Host) error {
			got, err := h.ActivateCredential(ctx, blob, seed)
			if err == nil && !bytes.Equal(got, secret) {
				return fmt.Errorf("a wrong secret: %x", got)
			}
			return err
		}},
		{"Quote", func(ctx context.Context, h *Host) error {
			q, err := h.Quote(ctx, [32]byte{3}, "sha256", []uint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10})
			if err != nil {
				return err
			}
			a, err := tpm2.Unmarshal[tpm2.TPMSAttest](q.Attest)
			if err != nil {
				return err
			}
			info, err := a.Attested.Quote()
			if err != nil || !bytes.Equal(info.PCRDigest.Buffer, pcrDigest(q.State)) || len(q.State.PCRs) != 11 {
				return fmt.Errorf("the PCRs are not those of the quote, %w", err)
			}
			sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](q.Signature)
			if err != nil {
				return err
			}
			der, err := ecdsaASN1(*sig)
			if d := sha256.Sum256(q.Attest); err != nil || !ecdsa.VerifyASN1(ak, d[:], der) {
				return errors.New("a wrong signature")
			}
			return nil
		}},
	}
}

// What evidence and enrolment ask of the TPM, with each fault at each command.
// With an EK that the TPM keeps, and with one that it has to make.
func TestFaultsInAttestation(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		kind endorsement
		keep bool
	}{"a kept EK": {endorsements[0], true}, "an EK made anew": {endorsements[1], false}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, dir, _ := startMade(t)
			writeNV(t, e.Open(), c.kind.certificate, certifyEK(t, makeEK(t, e.Open(), c.kind, c.keep)), readableNV)
			p := startProxy(t, e)
			first := open(t, p.sock, dir)
			all := attestations(t, e, first)
			first.Close()
			everyFault(t, p, dir, all)
		})
	}
}

// A round of evidence asks the TPM for no more than this: one signature, and
// two readings of eight PCRs. A resource manager does without GetCapability.
func TestCommandsOfAQuote(t *testing.T) {
	t.Parallel()
	e, dir, _ := startMade(t)
	h := open(t, e.Socket, dir)
	pcrs := []uint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
	quotes := func() {
		t.Helper()
		if _, err := h.Quote(t.Context(), [32]byte{1}, "sha256", pcrs); err != nil {
			t.Fatal(err)
		}
	}
	quotes()
	for _, c := range []struct {
		connection   string
		capabilities int
	}{{"new", 2}, {"kept", 0}} {
		if c.connection == "new" {
			h.hang(t)
		}
		before, got := h.Timings(), map[string]int{}
		quotes()
		for name, v := range h.Timings() {
			if n := v.Count - before[name].Count; n > 0 {
				got[name] = n
			}
		}
		want := map[string]int{"Load": 1, "Quote": 1, "PCR_Read": 2, "FlushContext": 1}
		if c.capabilities > 0 {
			want["GetCapability"] = c.capabilities
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("on a %s connection: %s", c.connection, d)
		}
	}
}
