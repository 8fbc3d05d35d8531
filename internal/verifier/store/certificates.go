package store

import (
	"context"
	"fmt"
	"time"
)

// Certificate is one that the CA gave to a node, or to its certifier.
type Certificate struct {
	Serial  string // hexadecimal
	Node    string // ID
	Expires time.Time
	Data    []byte // DER of a certifier's; nil of a node's
}

// Revoked is a certificate of a node that was revoked.
type Revoked struct {
	Serial string
	At     time.Time
}

// CRL is a revocation list.
type CRL struct {
	Number int64 // rises; 0 before the first
	Made   time.Time
	Digest []byte // of what is in it, by which its maker tells whether that has changed
	Data   []byte // DER
}

// MaxCertificates is how many of one node are good at once: a node that asks for them
// all the time does not fill the database, nor a revocation list.
const MaxCertificates = 500

// certificateTime is how long after its end a certificate is kept: a revoked one has
// to be in a list that was made after that (RFC 5280, 3.3).
const certificateTime = 24 * time.Hour

// AddCertificate notes a certificate. ErrLimit where the node has too many.
func (tx *Tx) AddCertificate(ctx context.Context, c Certificate) error {
	if c.Serial == "" || c.Expires.IsZero() || len(c.Data) > maxKey {
		return fmt.Errorf("%w: certificate", ErrInvalid)
	}
	if err := bounded(maxName, c.Serial, c.Node); err != nil {
		return err
	}
	var n int
	err := tx.one(ctx, "SELECT count(*) FROM certificates WHERE node = ? AND expires > ?", []any{c.Node, tx.now()}, &n)
	if err == nil && n >= MaxCertificates {
		err = ErrLimit
	}
	if err == nil {
		_, err = tx.exec(ctx, "INSERT INTO certificates (serial, node, expires, data) VALUES (?, ?, ?, ?)", c.Serial, c.Node, c.Expires, c.Data)
	}
	if err != nil {
		return fmt.Errorf("noting a certificate of node %s: %w", c.Node, err)
	}
	return nil
}

// CertifierCertificate gives the newest certificate of a node's certifier, DER;
// ErrNotFound.
func (r reads) CertifierCertificate(ctx context.Context, node string) ([]byte, error) {
	var der []byte
	err := r.one(ctx, "SELECT data FROM certificates WHERE node = ? AND data IS NOT NULL ORDER BY expires DESC LIMIT 1", []any{node}, &der)
	if err != nil {
		return nil, fmt.Errorf("certificate of the certifier of node %s: %w", node, err)
	}
	return der, nil
}

// RevokedCertificates gives those of nodes that were revoked, by serial number, until
// some time after they have expired.
func (r reads) RevokedCertificates(ctx context.Context) ([]Revoked, error) {
	all, err := list(ctx, r, `SELECT c.serial, n.revoked_at FROM certificates c JOIN nodes n ON n.id = c.node
 WHERE n.state = 'revoked' AND c.expires > ? ORDER BY c.serial`, []any{r.now().Add(-certificateTime)},
		func(scan func(...any) error, v *Revoked) error { return scan(&v.Serial, at{&v.At}) })
	if err != nil {
		return nil, fmt.Errorf("revoked certificates: %w", err)
	}
	return all, nil
}

// CRL gives the newest revocation list.
func (r reads) CRL(ctx context.Context) (c CRL, err error) {
	if err = r.one(ctx, "SELECT number, made, digest, data FROM crl WHERE one = 1", nil, &c.Number, at{&c.Made}, &c.Digest, &c.Data); err != nil {
		return CRL{}, fmt.Errorf("revocation list: %w", err)
	}
	return c, nil
}

// PutCRL makes a list the newest in place of that with the number before: ErrVersion
// where another was quicker, or the number does not rise.
func (tx *Tx) PutCRL(ctx context.Context, before int64, c CRL) error {
	n, err := tx.exec(ctx, "UPDATE crl SET number = ?, made = ?, digest = ?, data = ? WHERE one = 1 AND number = ? AND number < ?",
		c.Number, c.Made, c.Digest, c.Data, before, c.Number)
	if err == nil && n == 0 {
		err = ErrVersion
	}
	if err != nil {
		return fmt.Errorf("revocation list: %w", err)
	}
	return nil
}
