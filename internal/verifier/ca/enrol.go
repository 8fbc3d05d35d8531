package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"

	"virt-trust/internal/verifier/fleet"
)

// Claim is a node that asks to be let in, with keys that were proved.
type Claim struct {
	Name  string
	Keys  *Proven
	Token bool // a join token came with it; whether it is good is the store's to say
	// Former is the Identity in a certificate that this CA once gave, which came with
	// the claim and names these very keys; nil for none.
	Former *Identity
	// EKTrust is nil where a manufacturer vouches for the EK, else the doubt.
	EKTrust *Refusal
}

// Known is what the store has that could stand in the claim's way; nil for none.
type Known struct {
	ByName, ByEK, ByAK *fleet.Node // not revoked
	Revoked            *fleet.Node // with this EK, or under the ID that the claim's former certificate names
}

// Rules are the Verifier's.
type Rules struct {
	Operator bool // every node waits for an operator, a manufacturer's word or not
}

// Decision is what comes of a claim.
type Decision struct {
	Node     *fleet.Node // the known node that the claim is from; nil for a new one
	ID       string      // of a new node that had one before; "" for a new ID
	UseToken bool
	// TokenNames says that the token has to name this node: one for any is not
	// enough to bring back what was revoked.
	TokenNames bool
	State      fleet.NodeState // of a new node
	Problem    Code            // that an operator should look at; "" for none
	// Learns: what the new node shows in its first round may be learned. Not of one
	// that was here before: what it shows now may be why it went.
	Learns bool
}

// Decide says what is to be done with a claim. Errors are Refusals; one with a
// Node is to be shown at that node.
//
// The same name, EK and AK is the same node, whatever became of its agent: it
// needs no token, because it shows that it still has the TPM. Anything between
// that and an entirely new node is someone who wants to be another.
func Decide(c Claim, k Known, r Rules) (Decision, error) {
	if !ValidName(c.Name) || c.Name != FoldName(c.Name) {
		return Decision{}, refuse(NameBad, "%.60q is no name for a node: a host name is", c.Name)
	}
	if n := k.ByEK; n != nil {
		switch {
		case n.Name != c.Name:
			return Decision{}, at(n, refuse(EKKnown, "the TPM is that of node %q, and %q asks to be let in with it", n.Name, c.Name))
		case !bytes.Equal(n.AKName, c.Keys.AK.Name):
			return Decision{}, at(n, refuse(AKSwapped, "node %q comes with another AK; if its keys were made anew, revoke the node and let it in with a token that names it", n.Name))
		case !bytes.Equal(n.BindName, c.Keys.Bind.Name) || !sameCertifier(n, c.Keys):
			return Decision{}, at(n, refuse(KeysSwapped, "node %q comes with another bind key or certifier; if its keys were made anew, revoke the node and let it in with a token that names it", n.Name))
		}
		return Decision{Node: n}, nil
	}
	if n := k.ByName; n != nil {
		return Decision{}, at(n, refuse(NameTaken, "another TPM claims to be node %q; if the machine was replaced, revoke the node first", n.Name))
	}
	if n := k.ByAK; n != nil {
		return Decision{}, at(n, refuse(AKSwapped, "the AK is that of node %q, whose EK is another", n.Name))
	}
	d := Decision{State: fleet.Active, UseToken: true}
	switch {
	case k.Revoked != nil && !c.Token:
		return Decision{}, at(k.Revoked, refuse(NodeRevoked, "node %q was revoked; a join token that names it lets it in again", k.Revoked.Name))
	case k.Revoked != nil:
		d.TokenNames = true
	case c.Token && c.Former != nil:
		d.ID = c.Former.Node // what is approved for it, counts again
	case c.Token:
	case c.Former != nil:
		// The store is older than the certificate, and may have forgotten more: that
		// the node was revoked, for one. So an operator looks at it.
		d.UseToken, d.ID, d.State, d.Problem = false, c.Former.Node, fleet.Pending, NodeRestored
	default:
		return Decision{}, refuse(TokenMissing, "the Verifier does not know this node; a join token lets it in")
	}
	if c.EKTrust != nil {
		d.State = fleet.Pending
		if d.Problem == "" {
			d.Problem = c.EKTrust.Code
		}
	}
	if r.Operator {
		d.State = fleet.Pending
	}
	d.Learns = d.ID == "" && k.Revoked == nil
	return d, nil
}

func sameCertifier(n *fleet.Node, k *Proven) bool {
	known, err := nameOf(n.Certifier)
	return err == nil && bytes.Equal(known, k.Certifier.Name)
}

func at(n *fleet.Node, r *Refusal) *Refusal {
	r.Node = n.ID
	return r
}

// Former gives the Identity in a certificate that came with a claim, if this CA
// gave it to these very keys, however long ago; else nil.
func (a *Authority) Former(der []byte, k *Proven) *Identity {
	if len(der) == 0 || len(der) > 2*MaxTBS {
		return nil
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil
	}
	id, err := a.verifyAnyTime(cert)
	if err != nil || hex.EncodeToString(id.EK) != k.EKDigest || !bytes.Equal(id.AK, k.AK.Name) || !bytes.Equal(id.Bind, k.Bind.Name) {
		return nil
	}
	return &id
}
