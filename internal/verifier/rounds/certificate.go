package rounds

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"net/http"
	"time"

	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/nodeapi"
	"virt-trust/internal/verifier/store"
)

const challengeTime = 5 * time.Minute

func (h *Handler) challenge(r *http.Request) (int, any, error) {
	n, err := h.node(r.Context(), r.PathValue("id"))
	if err != nil {
		return 0, nil, err
	}
	if err := h.pays(r, "node "+n.ID); err != nil {
		return 0, nil, err
	}
	nonce := make([]byte, 32)
	if err := h.random(nonce); err != nil {
		return 0, nil, err
	}
	c := nodeapi.Challenge{Nonce: nonce, Expires: h.now().Add(challengeTime)}
	err = h.Store.PutChallenge(r.Context(), fleet.Challenge{
		ID: hex.EncodeToString(nonce), Purpose: certificatePurpose, Source: n.ID + " " + source(r), Data: []byte(n.ID), Expires: c.Expires,
	})
	return http.StatusCreated, c, err
}

// node gives a node that is not revoked.
func (h *Handler) node(ctx context.Context, id string) (fleet.Node, error) {
	if !ca.ValidNode(id) {
		return fleet.Node{}, refuse(ca.NodeUnknown, "%.60q is no node's ID", id)
	}
	n, err := h.Store.Node(ctx, id)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return n, refuse(ca.NodeUnknown, "the Verifier does not know node %s: enrol it", id)
	case err == nil && n.State == fleet.Revoked:
		return n, &ca.Refusal{Code: ca.NodeRevoked, What: "the node was revoked; a join token that names it lets it in again", Node: id}
	}
	return n, err
}

func (h *Handler) certificate(r *http.Request) (int, any, error) {
	var q nodeapi.CertificateRequest
	if err := readJSON(r, &q); err != nil {
		return 0, nil, err
	}
	ctx := r.Context()
	c, err := h.Store.TakeChallenge(ctx, certificatePurpose, hex.EncodeToString(q.Nonce))
	if errors.Is(err, store.ErrNotFound) || err == nil && string(c.Data) != r.PathValue("id") {
		return 0, nil, refuse(ca.NonceBad, "the nonce was not given out for this, was used, or is too old")
	}
	if err != nil {
		return 0, nil, err
	}
	if err := h.pays(r, "challenge "+c.ID); err != nil {
		return 0, nil, err
	}
	n, err := h.node(ctx, string(c.Data))
	if err != nil {
		return 0, nil, err
	}
	ak, err := ca.AKOf(n.AK)
	if err != nil {
		return 0, nil, err
	}
	if err := ca.VerifyNodeKey(ak, q.Nonce, q.SPKI, q.Attest, q.Signature); err != nil {
		return 0, nil, err
	}
	return h.membership(ctx, n, q.SPKI, q.Certifier)
}

// membership gives an active node its certificates, and a pending one word that it
// waits.
func (h *Handler) membership(ctx context.Context, n fleet.Node, spki []byte, certifier bool) (int, any, error) {
	m := nodeapi.Membership{Node: n.ID, State: n.State, Problem: ca.Code(firstWord(n.Problem)), Interval: h.Interval.Seconds()}
	if n.State != fleet.Active {
		return http.StatusAccepted, m, nil
	}
	ek, err := hex.DecodeString(n.EKDigest)
	if err != nil {
		return 0, nil, err
	}
	id := ca.Identity{Node: n.ID, Name: n.Name, EK: ek, AK: n.AKName, Bind: n.BindName, AKPublic: n.AK}
	cert, err := h.CA.Node(id, spki, h.now())
	if err != nil {
		return 0, nil, err
	}
	m.CertificateChain = chain(cert.Raw, h.CA.Certificate().Raw)
	given := []store.Certificate{{Serial: ca.Serial(cert), Node: n.ID, Expires: cert.NotAfter}}
	if certifier {
		c, fresh, err := h.certifier(ctx, n, id)
		if err != nil {
			return 0, nil, err
		}
		if fresh {
			given = append(given, store.Certificate{Serial: ca.Serial(c), Node: n.ID, Expires: c.NotAfter, Data: c.Raw})
		}
		m.CertifierChain = chain(c.Raw, h.CA.Certificate().Raw)
	}
	if err := h.noteCertificates(ctx, n, cert, given); err != nil {
		return 0, nil, err
	}
	return http.StatusOK, m, nil
}

// noteCertificates writes down what was given, of which cert is the node's own,
// before the node has it, unless the node was revoked while it was signed.
func (h *Handler) noteCertificates(ctx context.Context, n fleet.Node, cert *x509.Certificate, given []store.Certificate) error {
	serial := ca.Serial(cert)
	note := h.shown.again("certificate "+n.ID, h.now())
	return h.Store.Do(ctx, func(tx *store.Tx) error {
		now, err := tx.Node(ctx, n.ID)
		if err != nil {
			return err
		}
		if now.State != fleet.Active {
			return &ca.Refusal{Code: ca.NodeRevoked, What: "the node was revoked", Node: n.ID}
		}
		now.Serial = serial
		if cert.NotBefore.After(now.Certified) { // replicas' clocks differ
			now.Certified = cert.NotBefore
		}
		if _, err := tx.UpdateNode(ctx, now); err != nil {
			return err
		}
		for _, c := range given {
			if err := tx.AddCertificate(ctx, c); err != nil {
				return err
			}
		}
		if note {
			tx.Audit(fleet.AuditEntry{Time: h.now(), Actor: "node " + n.ID, Action: "node.certificate", Subject: n.ID, Detail: detail("serial", serial)})
		}
		return nil
	})
}

// certifier gives the certificate of a node's certifier: the last, while that is good
// for a while yet and says what a new one would say, so that there are few to revoke.
func (h *Handler) certifier(ctx context.Context, n fleet.Node, id ca.Identity) (c *x509.Certificate, fresh bool, err error) {
	spki, err := ca.CertifierSPKI(n.Certifier)
	if err != nil {
		return nil, false, err
	}
	der, err := h.Store.CertifierCertificate(ctx, n.ID)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, false, err
	}
	now := h.now()
	if last, err := x509.ParseCertificate(der); err == nil && h.CA.Still(last, id, spki, now) {
		return last, false, nil
	}
	c, err = h.CA.Certifier(id, spki, now)
	return c, true, err
}

// firstWord gives the code that a fleet.Node.Problem begins with.
func firstWord(s string) string {
	for i, r := range s {
		if r == ':' || r == ' ' {
			return s[:i]
		}
	}
	return s
}
