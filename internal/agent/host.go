package agent

import (
	"context"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus"
	"virt-trust/internal/evidence/report"
)

// Identity is the host's keys, as org.virttrust1.Attestation gives them.
type Identity struct {
	EK, EKCertificate                   []byte
	AK, Bind, Certifier                 []byte
	BindAttest, BindSignature           []byte
	CertifierAttest, CertifierSignature []byte
	CertifierCertificate                []byte // DER; nil where none was set
	HostName                            string
}

// Host is what virt-trustd does for the agent.
type Host interface {
	Identity(context.Context) (*Identity, error)
	// ActivateCredential opens a credential for the AK: TPM2B_ID_OBJECT and
	// TPM2B_ENCRYPTED_SECRET.
	ActivateCredential(ctx context.Context, idObject, encryptedSecret []byte) ([]byte, error)
	// QuoteKey has the AK vouch for a TLS key: TPMS_ATTEST and TPMT_SIGNATURE.
	QuoteKey(ctx context.Context, nonce, spki []byte) (attest, signature []byte, err error)
	Evidence(ctx context.Context, nonce []byte, have bus.Have) ([]byte, error)
	SetCertifierCertificate(ctx context.Context, chain []byte) error
}

// guard is virt-trustd on the system bus. A connection is made for each call:
// virt-trustd and the bus come and go.
type guard struct{}

func (guard) with(ctx context.Context, f func(*bus.Client) error) error {
	c, err := bus.DialForDescriptors(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	return f(c)
}

func (g guard) Identity(ctx context.Context) (*Identity, error) {
	var d map[string]dbus.Variant
	err := g.with(ctx, func(c *bus.Client) error {
		return c.Attest(ctx, "Identity", []any{map[string]dbus.Variant{}}, &d)
	})
	if err != nil {
		return nil, err
	}
	b := func(key string) []byte { v, _ := d[key].Value().([]byte); return v }
	i := &Identity{
		EK: b("ek"), EKCertificate: b("ek_certificate"), AK: b("ak"), Bind: b("bind"), Certifier: b("certifier"),
		BindAttest: b("bind_attest"), BindSignature: b("bind_signature"),
		CertifierAttest: b("certifier_attest"), CertifierSignature: b("certifier_signature"), CertifierCertificate: b("certifier_certificate"),
	}
	i.HostName, _ = d["host_name"].Value().(string)
	return i, nil
}

func (g guard) ActivateCredential(ctx context.Context, idObject, encryptedSecret []byte) (secret []byte, err error) {
	err = g.with(ctx, func(c *bus.Client) error {
		return c.Attest(ctx, "ActivateCredential", []any{idObject, encryptedSecret, map[string]dbus.Variant{}}, &secret)
	})
	return secret, err
}

func (g guard) QuoteKey(ctx context.Context, nonce, spki []byte) (attest, signature []byte, err error) {
	err = g.with(ctx, func(c *bus.Client) error {
		return c.Attest(ctx, "QuoteKey", []any{nonce, spki, map[string]dbus.Variant{}}, &attest, &signature)
	})
	return attest, signature, err
}

func (g guard) Evidence(ctx context.Context, nonce []byte, have bus.Have) (evidence []byte, err error) {
	err = g.with(ctx, func(c *bus.Client) error {
		evidence, err = c.Evidence(ctx, nonce, have, report.MaxEvidence)
		return err
	})
	return evidence, err
}

func (g guard) SetCertifierCertificate(ctx context.Context, chain []byte) error {
	return g.with(ctx, func(c *bus.Client) error {
		return c.Attest(ctx, "SetCertifierCertificate", []any{chain, map[string]dbus.Variant{}})
	})
}
