package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"

	"virt-trust/internal/platform/journal"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/nodeapi"
)

// tlsKey is a key for the node's TLS connections, in memory alone.
type tlsKey struct {
	key  *ecdsa.PrivateKey
	spki []byte
}

func newKey() (*tlsKey, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(k.Public())
	return &tlsKey{k, spki}, err
}

// certificate reads a chain that the Verifier gave over the key.
func (k *tlsKey) certificate(chain string, m *membership) (*tls.Certificate, error) {
	block, _ := pem.Decode([]byte(chain))
	if block == nil {
		return nil, errors.New("the Verifier gave no certificate")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("the Verifier's certificate for this node: %w", err)
	}
	if !k.key.PublicKey.Equal(leaf.PublicKey) {
		return nil, errors.New("the Verifier gave a certificate over another key")
	}
	if err := leaf.CheckSignatureFrom(m.ca); err != nil {
		return nil, fmt.Errorf("the Verifier's certificate for this node: %w", err)
	}
	if id, err := ca.UntrustedIdentity(leaf); err != nil || id.Node != m.Node {
		return nil, fmt.Errorf("the Verifier gave the certificate of node %q (%v), not of %s", id.Node, err, m.Node)
	}
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: k.key, Leaf: leaf}, nil
}

// EnrolOptions are what an admin says when a host becomes a node.
type EnrolOptions struct {
	Token string // vtj1.…; it names the CA
	Pin   string // of the CA, in place of a token, for a node that the Verifier knows
	Name  string // "" for the host's own
}

// Enrol makes the host a node of the Verifier at url, in place of any other that
// it belonged to. What it gives is how the node stands then; it is errPending
// while an operator has to approve it.
func (a *Agent) Enrol(ctx context.Context, url string, o EnrolOptions) (Status, error) {
	a.working.Lock()
	defer a.working.Unlock()
	defer a.poke()
	if _, err := parseURL(url); err != nil {
		return a.Status(), err
	}
	var secret []byte
	var pin ca.Pin
	var err error
	switch {
	case o.Token != "":
		secret, pin, err = ca.ParseToken(o.Token)
	case o.Pin != "":
		pin, err = ca.ParsePin(o.Pin)
	case a.m != nil && a.m.ca != nil:
		pin = ca.PinOf(a.m.ca)
	default:
		err = errors.New("a join token is needed: an operator of the Verifier makes one")
	}
	if err != nil {
		return a.Status(), err
	}
	if o.Name == "" && a.m != nil {
		o.Name = a.m.Name
	}
	err = a.enrol(ctx, url, pin, secret, o.Name)
	if errors.Is(err, errPending) {
		a.set(func(s *Status) { s.State, s.LastError = Pending, err.Error() })
		err = nil
	}
	return a.Status(), err
}

// enrolAgain is for a Verifier that has forgotten the node: it was restored from a
// backup that is older than the node.
func (a *Agent) enrolAgain(ctx context.Context) error {
	a.log.Warn("the Verifier does not know this node any more: it asks to be let in again")
	return a.enrol(ctx, a.m.URL, ca.PinOf(a.m.ca), nil, a.m.Name)
}

func (a *Agent) enrol(ctx context.Context, url string, pin ca.Pin, secret []byte, name string) error {
	u, err := parseURL(url)
	if err != nil {
		return err
	}
	i, err := a.host.Identity(ctx)
	if err != nil {
		return fmt.Errorf("virt-trustd does not tell the host's keys: %w", err)
	}
	if name == "" {
		if name = i.HostName; name == "" {
			if name, err = os.Hostname(); err != nil {
				return err
			}
		}
	}
	q := nodeapi.EnrolmentRequest{
		Name: strings.TrimSuffix(name, "."), EK: i.EK, EKCertificate: i.EKCertificate, AK: i.AK, Bind: i.Bind,
		BindAttest: i.BindAttest, BindSignature: i.BindSignature,
		Certifier: i.Certifier, CertifierAttest: i.CertifierAttest, CertifierSignature: i.CertifierSignature, Address: a.address,
	}
	if secret != nil {
		q.Token = ca.SpellSecret(secret)
	}
	if a.m != nil {
		q.Certificate = a.m.Certificate
	}
	c := newClient(u, pin, nil)
	defer c.close()
	var challenge nodeapi.EnrolmentChallenge
	if _, err := c.call(ctx, "/v1/enrolments", q, &challenge); err != nil {
		return err
	}
	if !plainID(challenge.ID) {
		return errors.New("the Verifier's enrolment has a strange ID")
	}
	var answer nodeapi.EnrolmentAnswer
	if answer.Secret, err = a.host.ActivateCredential(ctx, challenge.IDObject, challenge.EncryptedSecret); err != nil {
		return fmt.Errorf("the TPM does not open the Verifier's credential: %w", err)
	}
	key, err := newKey()
	if err != nil {
		return err
	}
	answer.SPKI = key.spki
	if answer.Attest, answer.Signature, err = a.host.QuoteKey(ctx, answer.Secret, key.spki); err != nil {
		return fmt.Errorf("virt-trustd does not vouch for the agent's key: %w", err)
	}
	var m nodeapi.Membership
	if _, err := c.call(ctx, "/v1/enrolments/"+challenge.ID, answer, &m); err != nil {
		return err
	}
	if !ca.ValidNode(m.Node) || m.State != fleet.Active && m.State != fleet.Pending {
		return errors.New("the Verifier's answer makes no sense")
	}
	root := c.ca.Load()
	member := &membership{URL: u.String(), CA: root.Raw, Node: m.Node, Name: q.Name, ca: root}
	if a.m != nil && a.m.Node == m.Node {
		member.Certificate = a.m.Certificate
	}
	if err := member.save(a.dir); err != nil {
		return fmt.Errorf("keeping the membership: %w", err)
	}
	a.belong(member)
	a.log.WithField("node", m.Node).WithField("verifier", u.Host).WithField(journal.ID, journal.Enrolled).Infof("the host became a node: %s", m.State)
	return a.join(ctx, &m, key)
}

// plainID keeps an ID that goes into a path to what belongs there.
func plainID(id string) bool {
	return len(id) > 0 && len(id) <= 64 && !strings.ContainsFunc(id, func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'a' || r > 'z') && r != '-'
	})
}

// Leave ends the host's membership. The Verifier keeps the node, until an operator
// revokes it.
func (a *Agent) Leave(context.Context) error {
	a.working.Lock()
	defer a.working.Unlock()
	if err := forget(a.dir); err != nil {
		return err
	}
	a.belong(nil)
	return nil
}
