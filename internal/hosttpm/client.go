package hosttpm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"sync/atomic"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"virt-trust/internal/hosttpm/link"
	"virt-trust/internal/hosttpm/policy"
	"virt-trust/internal/platform/secret"
)

const (
	nonceSize    = 16
	maxLeftovers = 64
	maxAbandoned = 4
)

// client is the TPM as its goroutine sees it: at most one connection, and what
// is known of the TPM behind it. It is a transport.TPM for go-tpm.
type client struct {
	host *Host
	ctx  context.Context // of the operation under way
	link *link.Link      // nil: not connected

	encrypted tpm2.Session // salted, encrypts responses; lives as long as link
	failed    tpm2.TPMCC   // the command that the TPM refused last
	response  []byte       // the last one; it may hold what is secret
	abandoned atomic.Int32 // commands that no one waits for any more

	// These outlive the connection: a ticket is good until the TPM is cleared.
	approved *policy.Approved // the policy that worked last
	tickets  map[string]tpm2.TPMTTKVerified
}

var _ transport.TPM = (*client)(nil)

// connect makes a connection if there is none.
func (c *client) connect() error {
	if c.link != nil {
		return nil
	}
	if n := c.abandoned.Load(); n >= maxAbandoned {
		return fmt.Errorf("%w: it has not answered %d commands", ErrBusy, n)
	}
	l, err := link.Dial(c.ctx, c.host.cfg.Device)
	if err != nil {
		return err
	}
	c.link = l
	if l.Managed {
		return nil
	}
	// A raw TPM keeps what a client left behind, and has room for three objects.
	for _, kind := range []uint32{uint32(tpm2.TPMHTTransient) << 24, uint32(tpm2.TPMHTLoadedSession) << 24} {
		r, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: kind, PropertyCount: maxLeftovers}.Execute(c)
		if err != nil {
			return err
		}
		handles, err := r.CapabilityData.Data.Handles()
		if err != nil {
			return err
		}
		for _, h := range handles.Handle[:min(len(handles.Handle), maxLeftovers)] {
			if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(c); err != nil {
				return err
			}
		}
	}
	return nil
}

// drop gives the connection up with all that hangs on it.
func (c *client) drop() {
	if c.link != nil {
		c.link.Close()
	}
	c.link, c.encrypted = nil, nil
}

// hangUp ends an idle connection and leaves nothing behind.
func (c *client) hangUp() {
	if c.link == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	c.ctx = ctx
	if c.encrypted != nil {
		c.flush(c.encrypted.Handle())
	}
	c.drop()
}

// Send gives one command to the TPM and its response back. A command that the
// TPM put off is sent again until the operation's time is up.
func (c *client) Send(command []byte) ([]byte, error) {
	if c.link == nil {
		return nil, fmt.Errorf("%w: it is closed", link.ErrBroken)
	}
	if len(command) < link.HeaderSize {
		return nil, fmt.Errorf("command of %d bytes", len(command))
	}
	cc := tpm2.TPMCC(binary.BigEndian.Uint32(command[6:]))
	began := time.Now()
	defer func() { c.host.timings.add(cc, time.Since(began)) }()
	return link.Repeat(c.ctx, func() ([]byte, error) {
		if err := link.Wait(c.ctx, c.host.cfg.Delay); err != nil {
			return nil, err
		}
		c.forgetResponse()
		r, err := c.link.Exchange(c.ctx, command, &c.abandoned)
		if err != nil {
			c.drop()
			return nil, err
		}
		c.response = r
		if tpm2.TPMRC(binary.BigEndian.Uint32(r[6:])) != tpm2.TPMRCSuccess {
			c.failed = cc
		}
		return r, nil
	})
}

func isPCRChanged(err error) bool { return isRC(err, tpm2.TPMRCPCRChanged) }

func (c *client) forgetResponse() {
	secret.Wipe(c.response)
	c.response = nil
}

// flush takes an object or session out of the TPM. Where that fails the
// connection is given up, which does it too.
func (c *client) flush(h tpm2.TPMHandle) {
	if c.link == nil {
		return
	}
	if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(c); err != nil {
		c.drop()
	}
}

// secretly gives the session under which responses are encrypted.
func (c *client) secretly(k *keySet) (tpm2.Session, error) {
	if c.encrypted == nil {
		s, _, err := tpm2.HMACSession(c, tpm2.TPMAlgSHA256, nonceSize,
			tpm2.Salted(k.srk.handle, *k.srk.public), tpm2.AESEncryption(128, tpm2.EncryptOut))
		if err != nil {
			return nil, err
		}
		c.encrypted = s
	}
	return c.encrypted, nil
}

// with loads o, calls use with it, and flushes it.
func (c *client) with(k *keySet, o *object, use func(tpm2.TPMHandle) error) error {
	r, err := tpm2.Load{ParentHandle: k.srk.auth(tpm2.PasswordAuth(nil)), InPrivate: o.private, InPublic: o.public}.Execute(c)
	if err != nil {
		return fmt.Errorf("loading a key: %w", err)
	}
	defer c.flush(r.ObjectHandle)
	if !bytes.Equal(r.Name.Buffer, o.name) {
		return fmt.Errorf("%w: it loaded another key than was asked for", ErrFailed)
	}
	return use(r.ObjectHandle)
}

// unseal gives the data that o seals under the host's policy.
func (c *client) unseal(k *keySet, o *object) ([]byte, error) {
	return c.unsealBy(k, o, c.underPolicy)
}

// unsealBy is unseal with a session that satisfies the policy in under's way.
func (c *client) unsealBy(k *keySet, o *object, under func(*keySet, func(tpm2.Session) error) error) ([]byte, error) {
	session, err := c.secretly(k)
	if err != nil {
		return nil, err
	}
	var out []byte
	err = c.with(k, o, func(h tpm2.TPMHandle) error {
		return under(k, func(auth tpm2.Session) error {
			r, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: h, Name: tpm2.TPM2BName{Buffer: o.name}, Auth: auth}}.Execute(c, session)
			if err != nil {
				return fmt.Errorf("unsealing: %w", err)
			}
			out = r.OutData.Buffer
			return nil
		})
	})
	return out, err
}

// decrypt is one RSA decryption with the bind key under the host's policy.
func (c *client) decrypt(k *keySet, ciphertext []byte) ([]byte, error) {
	session, err := c.secretly(k)
	if err != nil {
		return nil, err
	}
	var out []byte
	err = c.with(k, k.bind, func(h tpm2.TPMHandle) error {
		return c.underPolicy(k, func(auth tpm2.Session) error {
			r, err := tpm2.RSADecrypt{
				KeyHandle:  tpm2.AuthHandle{Handle: h, Name: tpm2.TPM2BName{Buffer: k.bind.name}, Auth: auth},
				CipherText: tpm2.TPM2BPublicKeyRSA{Buffer: ciphertext},
				InScheme:   tpm2.TPMTRSADecrypt{Scheme: tpm2.TPMAlgNull}, // the key's own
				Label:      tpm2.TPM2BData{Buffer: []byte(oaepLabel)},
			}.Execute(c, session)
			if err != nil {
				// What goes before, such as the making of the session, says nothing about the ciphertext.
				if c.failed == tpm2.TPMCCRSADecrypt && (isRC(err, tpm2.TPMRCValue, tpm2.TPMRCSize) || isRC(err, tpm2.TPMRCFailure) && c.alive(k)) {
					rc, _ := responseCode(err)
					return fmt.Errorf("%w (TPM response %#x)", ErrCiphertext, uint32(rc))
				}
				return fmt.Errorf("decrypting with the bind key: %w", err)
			}
			out = r.Message.Buffer
			return nil
		})
	})
	return out, err
}

// alive tells a TPM that still does something from one in failure mode.
// libtpms answers TPM_RC_FAILURE also when OAEP padding is wrong.
func (c *client) alive(k *keySet) bool {
	_, err := tpm2.ReadPublic{ObjectHandle: k.srk.handle}.Execute(c)
	return err == nil
}

// sign signs digest with the certifier and checks what came back.
func (c *client) sign(k *keySet, digest [32]byte) ([]byte, error) {
	var sig []byte
	err := c.with(k, k.certifier, func(h tpm2.TPMHandle) error {
		r, err := tpm2.Sign{
			KeyHandle:  tpm2.AuthHandle{Handle: h, Name: tpm2.TPM2BName{Buffer: k.certifier.name}, Auth: tpm2.PasswordAuth(nil)},
			Digest:     tpm2.TPM2BDigest{Buffer: digest[:]},
			InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
		}.Execute(c)
		if err != nil {
			return fmt.Errorf("signing: %w", err)
		}
		if sig, err = ecdsaASN1(r.Signature); err != nil {
			return err
		}
		if !ecdsa.VerifyASN1(k.certifierPublic, digest[:], sig) {
			return fmt.Errorf("%w: its signature is wrong", ErrFailed)
		}
		return nil
	})
	return sig, err
}

// underPolicy calls use with a session that satisfies the host's policy. The
// approved policy that worked last is tried first, so that the PCRs need to be
// read only when it does not work any more.
func (c *client) underPolicy(k *keySet, use func(auth tpm2.Session) error) error {
	for try := 0; ; try++ {
		if c.approved == nil {
			a, err := c.match(k)
			if err != nil {
				return err
			}
			c.approved = a
		}
		err := use(tpm2.Policy(tpm2.TPMAlgSHA256, nonceSize, c.satisfy(k, c.approved)))
		if err == nil || c.link == nil || isPCRChanged(err) || !isPolicyStep(err) && !isRC(err, tpm2.TPMRCPolicyFail) {
			return err
		}
		c.approved, c.tickets = nil, nil
		if try > 0 {
			return err
		}
	}
}

func isPolicyStep(err error) bool {
	var p policyStep
	return errors.As(err, &p)
}

// satisfy gives the commands that bring a policy session to the host's policy
// by way of a.
func (c *client) satisfy(k *keySet, a *policy.Approved) tpm2.PolicyCallback {
	return c.authorized(k, a.Policy, a.Signature, func(session tpm2.TPMISHPolicy) error {
		_, err := tpm2.PolicyPCR{PolicySession: session, Pcrs: selection(a.Bank, a.Indexes())}.Execute(c)
		if err == nil {
			err = c.policyCounter(session, counter{k.epochIndex, k.epochName}, a.Epoch)
		}
		return err
	})
}

// counter is an NV index that counts.
type counter struct {
	index tpm2.TPMHandle
	name  []byte
}

func (n counter) handle() tpm2.NamedHandle {
	return tpm2.NamedHandle{Handle: n.index, Name: tpm2.TPM2BName{Buffer: n.name}}
}

// policyCounter is PolicyNV: n has value.
func (c *client) policyCounter(session tpm2.TPMISHPolicy, n counter, value uint64) error {
	_, err := tpm2.PolicyNV{
		AuthHandle: tpm2.AuthHandle{Handle: n.index, Name: tpm2.TPM2BName{Buffer: n.name}, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    n.handle(), PolicySession: session,
		OperandB: tpm2.TPM2BOperand{Buffer: binary.BigEndian.AppendUint64(nil, value)}, Operation: tpm2.TPMEOEq,
	}.Execute(c)
	return err
}

// authorized gives the commands that bring a policy session to the host's
// policy by way of a signed one, which steps satisfies.
func (c *client) authorized(k *keySet, digest, signature []byte, steps func(tpm2.TPMISHPolicy) error) tpm2.PolicyCallback {
	return func(_ transport.TPM, session tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
		ticket, err := c.ticket(k, digest, signature)
		if err == nil {
			err = steps(session)
		}
		if err == nil {
			_, err = tpm2.PolicyAuthorize{
				PolicySession: session, ApprovedPolicy: tpm2.TPM2BDigest{Buffer: digest}, PolicyRef: tpm2.TPM2BDigest{Buffer: []byte(policy.Ref)},
				KeySign: tpm2.TPM2BName{Buffer: k.policyName}, CheckTicket: ticket,
			}.Execute(c)
		}
		if err != nil {
			c.flush(session) // go-tpm forgets a session whose policy failed
			return policyStep{err}
		}
		return nil
	}
}

// ticket has the TPM verify a policy's signature, once until the TPM is cleared.
func (c *client) ticket(k *keySet, approved, signature []byte) (tpm2.TPMTTKVerified, error) {
	if t, ok := c.tickets[string(approved)]; ok {
		return t, nil
	}
	var none tpm2.TPMTTKVerified
	var r, s big.Int
	var seq cryptobyte.String
	der := cryptobyte.String(signature)
	if !der.ReadASN1(&seq, asn1.SEQUENCE) || !seq.ReadASN1Integer(&r) || !seq.ReadASN1Integer(&s) {
		return none, errors.New("signature of an approved policy is not ASN.1")
	}
	// A ticket of the null hierarchy is not accepted by PolicyAuthorize.
	key, err := tpm2.LoadExternal{InPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](k.policyArea), Hierarchy: tpm2.TPMRHOwner}.Execute(c)
	if err != nil {
		return none, fmt.Errorf("loading the policy key: %w", err)
	}
	defer c.flush(key.ObjectHandle)
	digest := policy.AuthorizedHash(approved)
	v, err := tpm2.VerifySignature{
		KeyHandle: key.ObjectHandle, Digest: tpm2.TPM2BDigest{Buffer: digest[:]},
		Signature: tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
			Hash:       tpm2.TPMAlgSHA256,
			SignatureR: tpm2.TPM2BECCParameter{Buffer: r.FillBytes(make([]byte, 32))},
			SignatureS: tpm2.TPM2BECCParameter{Buffer: s.FillBytes(make([]byte, 32))},
		})},
	}.Execute(c)
	if err != nil {
		return none, fmt.Errorf("verifying an approved policy: %w", err)
	}
	if c.tickets == nil {
		c.tickets = map[string]tpm2.TPMTTKVerified{}
	}
	c.tickets[string(approved)] = v.Validation
	return v.Validation, nil
}

// match finds the approved policy that the host's state satisfies now, or says
// how the nearest one differs.
func (c *client) match(k *keySet) (*policy.Approved, error) {
	epoch, err := c.readEpoch(k)
	if err != nil {
		return nil, err
	}
	states := map[string]policy.State{}
	nearest := &PolicyError{}
	found := false
	for _, a := range k.policies {
		now, ok := states[a.Bank]
		if !ok {
			if now, err = c.readPCRs(a.Bank, k.indexes(a.Bank)); err != nil {
				return nil, err
			}
			states[a.Bank] = now
		}
		differing := a.Differing(now)
		if len(differing) == 0 && a.Epoch == epoch && bytes.Equal(a.EpochName, k.epochName) {
			return a, nil
		}
		if !found || len(differing) < len(nearest.Differing) {
			found, nearest.Differing = true, differing
		}
	}
	return nil, nearest
}

// readPCRs reads PCRs; a TPM gives at most eight at once.
func (c *client) readPCRs(bank string, indexes []uint) (policy.State, error) {
	s := policy.State{Bank: bank, PCRs: map[uint][]byte{}}
	for left := indexes; len(left) > 0; {
		r, err := tpm2.PCRRead{PCRSelectionIn: selection(bank, left)}.Execute(c)
		if err != nil {
			return s, fmt.Errorf("reading PCRs: %w", err)
		}
		values := r.PCRValues.Digests
		var next []uint
		for _, i := range left {
			if len(values) > 0 && selects(r.PCRSelectionOut, i) {
				s.PCRs[i], values = values[0].Buffer, values[1:]
			} else {
				next = append(next, i)
			}
		}
		if len(next) == len(left) {
			return s, fmt.Errorf("%w: PCR bank %s is not active", ErrFailed, bank)
		}
		left = next
	}
	if err := s.Check(); err != nil {
		return s, fmt.Errorf("%w: %w", ErrFailed, err)
	}
	return s, nil
}

func selection(bank string, indexes []uint) tpm2.TPMLPCRSelection {
	alg := tpm2.TPMAlgSHA256
	if bank == "sha384" {
		alg = tpm2.TPMAlgSHA384
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: alg, PCRSelect: tpm2.PCClientCompatible.PCRs(indexes...)}}}
}

func selects(l tpm2.TPMLPCRSelection, i uint) bool {
	for _, s := range l.PCRSelections {
		if int(i/8) < len(s.PCRSelect) && s.PCRSelect[i/8]&(1<<(i%8)) != 0 {
			return true
		}
	}
	return false
}

// readEpoch reads the epoch counter.
func (c *client) readEpoch(k *keySet) (uint64, error) {
	v, err := c.readCounter(counter{k.epochIndex, k.epochName})
	if err != nil {
		return 0, fmt.Errorf("reading the epoch counter: %w", err)
	}
	return v, nil
}

func (c *client) readCounter(n counter) (uint64, error) {
	r, err := tpm2.NVRead{
		AuthHandle: tpm2.AuthHandle{Handle: n.index, Name: tpm2.TPM2BName{Buffer: n.name}, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    n.handle(), Size: 8,
	}.Execute(c)
	if err != nil {
		return 0, err
	}
	if len(r.Data.Buffer) != 8 {
		return 0, fmt.Errorf("%w: counter of %d bytes", ErrFailed, len(r.Data.Buffer))
	}
	return binary.BigEndian.Uint64(r.Data.Buffer), nil
}

// errRestored is diagnose's word that the TPM can be used again.
var errRestored = errors.New("the storage root key was put back")

// diagnose finds out whether err comes from a TPM that was cleared or
// exchanged: it has another SRK or epoch counter than the one that the keys
// were made under. It gives ErrCleared then, and nil if all is as it should be.
// An SRK that was evicted but still comes out of the TPM's seed is put back.
func (c *client) diagnose(err error) error {
	k := c.host.keys.Load()
	for _, known := range []error{ErrPolicy, ErrBusy, ErrAbsent, ErrCiphertext, ErrCredential, link.ErrBroken} {
		if k == nil || errors.Is(err, known) {
			return nil
		}
	}
	if c.connect() != nil {
		return nil
	}
	srk, err := tpm2.ReadPublic{ObjectHandle: k.srk.handle}.Execute(c)
	if isRC(err, tpm2.TPMRCHandle) {
		if k.srk.handle == srkHandle && c.makeSRK(k.srk.name) == nil {
			return errRestored
		}
		return fmt.Errorf("%w: the storage root key at %#x is gone", ErrCleared, uint32(k.srk.handle))
	}
	if err == nil && !bytes.Equal(srk.Name.Buffer, k.srk.name) {
		return fmt.Errorf("%w: another storage root key is at %#x", ErrCleared, uint32(k.srk.handle))
	}
	epoch, err := tpm2.NVReadPublic{NVIndex: k.epochIndex}.Execute(c)
	if isRC(err, tpm2.TPMRCHandle) {
		return fmt.Errorf("%w: the epoch counter at %#x is gone", ErrCleared, uint32(k.epochIndex))
	}
	if err == nil && !bytes.Equal(epoch.NVName.Buffer, k.epochName) {
		return fmt.Errorf("%w: another NV index is at %#x", ErrCleared, uint32(k.epochIndex))
	}
	return nil
}

// ecdsaASN1 turns a TPM's signature into ASN.1.
func ecdsaASN1(sig tpm2.TPMTSignature) ([]byte, error) {
	e, err := sig.Signature.ECDSA()
	if err != nil {
		return nil, err
	}
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1BigInt(new(big.Int).SetBytes(e.SignatureR.Buffer))
		b.AddASN1BigInt(new(big.Int).SetBytes(e.SignatureS.Buffer))
	})
	return b.Bytes()
}
