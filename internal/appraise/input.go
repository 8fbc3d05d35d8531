package appraise

import (
	"crypto/ecdsa"
	"time"
)

// Node is what the Verifier knows of an enrolled host.
type Node struct {
	ID     string
	AK     *ecdsa.PublicKey
	AKName []byte   // nil where only the key is known
	Groups []string // "group:NAME": subjects of Reference Values that are the node's too
}

// Input is all that an appraisal is made of. Nothing in it is changed.
type Input struct {
	Node     Node
	Nonce    []byte    // that the node was given; the caller sees to it that it is taken once
	Expires  time.Time // of the nonce; zero: it does not expire
	Evidence []byte
	Previous *Checkpoint // nil in the first round
	Values   []*Values   // of all, and of the node and its VMs; also those that were rejected
	Policy   *Policy
	// Learn: what is new in the first good round of the host, or of a VM, and was not
	// rejected, is taken for right; Learn gives it as Reference Values, which the
	// caller then stores.
	Learn bool
	Now   time.Time
}
