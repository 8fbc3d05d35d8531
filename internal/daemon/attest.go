package daemon

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/user"
	"slices"
	"strconv"
	"time"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/platform/secret"
	"virt-trust/internal/vtpm/reason"
)

// agentUser is the user of virt-trust-agent. There is none on a host without
// it.
const agentUser = "virt-trust-agent"

// agentPace bounds what the agent may ask in a minute: as much as third parties
// may at most, and as much again for its own rounds, which those must not
// starve, and a new certificate now and then.
const agentPace = 2 * config.MaxPerMinute

// agentUID gives the agent's user, which may have been made a moment ago.
func agentUID() (uint32, error) {
	u, err := user.Lookup(agentUser)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(u.Uid, 10, 32)
	return uint32(n), err
}

// attestation is org.virttrust1.Attestation. It is for virt-trust-agent, which
// faces the network and is not trusted more than a way for messages: it gets
// nothing signed whose content it chooses, but for the key of its own TLS.
func (s *Service) attestation() map[string]any {
	serve := func(sender dbus.Sender, method string, body func(context.Context) error) *dbus.Error {
		return s.serve(sender, method, agentOnly, adminDeadline, func(ctx context.Context, c *caller) error {
			if c.uid != 0 && s.asked.over(time.Now(), agentPace) {
				return reason.Refuse(reason.TPMBusy, "ask less often", "more than %d questions in a minute", agentPace)
			}
			return s.attestRefusal(body(ctx))
		})
	}
	methods := s.certifierMethods()
	maps.Copy(methods, map[string]any{
		"Identity": func(options dict, sender dbus.Sender) (dict, *dbus.Error) {
			result := dict{}
			return result, serve(sender, "Identity", func(ctx context.Context) error {
				d, err := s.identity(ctx)
				maps.Copy(result, d)
				return err
			})
		},
		"ActivateCredential": func(idObject, encryptedSecret []byte, options dict, sender dbus.Sender) ([]byte, *dbus.Error) {
			activated := []byte{}
			derr := serve(sender, "ActivateCredential", func(ctx context.Context) (err error) {
				if activated, err = s.host.ActivateCredential(ctx, idObject, encryptedSecret); err == nil {
					// The library sends after this returns and does not say when it has.
					b := activated
					time.AfterFunc(redeemDeadline, func() { secret.Wipe(b) })
				}
				return err
			})
			return activated, derr
		},
		"QuoteKey": func(nonce, spki []byte, options dict, sender dbus.Sender) (attest, signature []byte, derr *dbus.Error) {
			attest, signature = []byte{}, []byte{}
			derr = serve(sender, "QuoteKey", func(ctx context.Context) error {
				q, err := s.quoteKey(ctx, nonce, spki)
				if err == nil {
					attest, signature = q.Attest, q.Signature
				}
				return err
			})
			return attest, signature, derr
		},
		"Evidence": func(nonce []byte, options dict, sender dbus.Sender) (dbus.UnixFD, *dbus.Error) {
			var fd dbus.UnixFD
			derr := serve(sender, "Evidence", func(ctx context.Context) error {
				b, err := s.evidence(ctx, nonce, bus.HaveOf(options, report.EventLog, report.IMA, report.LaunchLog))
				if err != nil {
					return err
				}
				f, err := bus.Sealed("evidence", b)
				if err != nil {
					return err
				}
				time.AfterFunc(redeemDeadline, func() { f.Close() }) // as above
				fd = dbus.UnixFD(f.Fd())
				return nil
			})
			if derr != nil {
				// A result is sent beside no error; a descriptor must be one all the same.
				return -1, derr
			}
			return fd, nil
		},
	})
	return methods
}

// attestRefusal is hostRefusal for what these methods add.
func (s *Service) attestRefusal(err error) error {
	if errors.Is(err, hosttpm.ErrCredential) {
		return reason.Refuse(reason.PolicyForbids, "enrol the host again", "the credential is not for the EK and the AK of this host")
	}
	return s.hostRefusal(err)
}

func (s *Service) identity(ctx context.Context) (dict, error) {
	id, err := s.host.Identity(ctx)
	if err != nil {
		return nil, err
	}
	name, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	d := strs("host_name", text(name))
	for key, b := range map[string][]byte{
		"ek": id.EK, "ek_certificate": id.EKCertificate, "ak": id.AK, "bind": id.Bind, "certifier": id.Certifier,
		"bind_attest": id.BindAttest, "bind_signature": id.BindSignature,
		"certifier_attest": id.CertifierAttest, "certifier_signature": id.CertifierSignature,
	} {
		if len(b) > 0 {
			d[key] = dbus.MakeVariant(b)
		}
	}
	if id.EKProblem != "" {
		d["ek_problem"] = dbus.MakeVariant(text(id.EKProblem))
	}
	chain, err := s.g.certifierChain(ctx)
	if err != nil {
		return nil, err
	}
	if c := chain[0]; !bytes.Equal(c.RawIssuer, c.RawSubject) { // not the one that it gave itself
		d["certifier_certificate"] = dbus.MakeVariant(c.Raw)
	}
	return d, nil
}

// checkNonce takes what a Verifier may have made: 32 bytes as a rule.
func checkNonce(nonce []byte) error {
	if len(nonce) < 16 || len(nonce) > 64 {
		return reason.Refuse(reason.PolicyForbids, "take 16 to 64 random bytes", "a nonce of %d bytes", len(nonce))
	}
	// See nodeKeyData.
	if bytes.HasPrefix(nonce, []byte(nodeKeyLabel)) {
		return reason.Refuse(reason.PolicyForbids, "take random bytes", "a nonce that begins as a quote of a key does")
	}
	return nil
}

// nodeKeyLabel begins what is hashed for the quote of a node's TLS key.
const nodeKeyLabel = "virt-trust/node-key/v1\x00"

// nodeKeyData is the qualifyingData of the quote that binds a node's TLS key to
// its TPM: SHA-256(label ‖ nonce ‖ SHA-256(spki)), where evidence has
// SHA-256(nonce ‖ SHA-256(report)).
//
// The AK signs quotes for these two alone, and neither can stand for the other.
// Say that a quote of one is shown as one of the other. SHA-256 being free of
// collisions, what was hashed is the same bytes, and so are its last 32:
// SHA-256(spki) = SHA-256(report), and spki = report. But a report is a CBOR map
// and begins with 0xA7, and a SubjectPublicKeyInfo is an ASN.1 SEQUENCE and
// begins with 0x30: quoteKey takes nothing else, and evidence is over reports
// that virt-trustd has made. That the agent chooses the nonce of both, and of
// evidence one that begins with the label, changes nothing of it; such a nonce
// is refused all the same.
func nodeKeyData(nonce, spki []byte) [sha256.Size]byte {
	d := sha256.Sum256(spki)
	return sha256.Sum256(slices.Concat([]byte(nodeKeyLabel), nonce, d[:]))
}

// quoteKey quotes the PCRs of evidence for a TLS key.
func (s *Service) quoteKey(ctx context.Context, nonce, spki []byte) (*hosttpm.Quoted, error) {
	if err := checkNonce(nonce); err != nil {
		return nil, err
	}
	const most = 1024
	key, err := x509.ParsePKIXPublicKey(spki[:min(len(spki), most)])
	var again []byte
	if err == nil {
		again, err = x509.MarshalPKIXPublicKey(key)
	}
	if err != nil || !bytes.Equal(again, spki) {
		return nil, reason.Refuse(reason.PolicyForbids, "give a SubjectPublicKeyInfo in DER", "%d bytes that are no public key", len(spki))
	}
	return s.host.Quote(ctx, nodeKeyData(nonce, spki), s.g.cfg.TPM.Bank, s.g.cfg.Attestation.PCRs)
}

// evidence collects, one round at a time.
func (s *Service) evidence(ctx context.Context, nonce []byte, have bus.Have) ([]byte, error) {
	if err := checkNonce(nonce); err != nil {
		return nil, err
	}
	select {
	case s.collecting <- struct{}{}:
		defer func() { <-s.collecting }()
	case <-ctx.Done():
		return nil, reason.Refuse(reason.TPMBusy, "try again", "evidence for others is being collected")
	}
	e, err := s.collect(ctx, nonce, have)
	if err != nil {
		return nil, err
	}
	b, err := e.Encode()
	if err == nil && len(b) > report.MaxEvidence {
		err = fmt.Errorf("evidence of %d bytes, at most %d", len(b), report.MaxEvidence)
	}
	return b, err
}
