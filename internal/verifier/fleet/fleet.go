// Package fleet has the nouns of the Verifier: nodes, their rounds, what was
// approved, who did what. It is pure; package store keeps them.
package fleet

import "time"

// NodeState is where a node stands.
type NodeState string

// The states. A node that is not Active gets no nonce, and its result is none.
const (
	Pending NodeState = "pending" // proved its keys, waits for an operator
	Active  NodeState = "active"
	Revoked NodeState = "revoked"
)

// Node is an enrolled host. Its keys do not change as long as it is a node.
type Node struct {
	ID    string // UUID, given by the Verifier
	Name  string // unique among nodes that are not revoked
	State NodeState
	// EKDigest is the SHA-256 of the EK's SubjectPublicKeyInfo in hexadecimal:
	// unique among nodes that are not revoked.
	EKDigest      string
	EKCertificate []byte // DER; nil where the TPM has none
	// EKTrust says why the EK is taken for a TPM's: "manufacturer" (its certificate
	// chains to a configured root), or "admin" and who that was.
	EKTrust      string
	AKName       []byte // TPM Name
	AK           []byte // TPMT_PUBLIC
	BindName     []byte
	Bind         []byte // TPMT_PUBLIC
	Certifier    []byte // TPMT_PUBLIC
	Serial       string // of its newest certificate, hexadecimal
	Enrolled     time.Time
	Seen         time.Time // its newest evidence, good or bad
	Problem      string    // what an operator should look at: a swapped AK, a second claimant
	ApprovedBy   string
	RevokedWhy   string
	AgentAddress string // of its pull API, where that is turned on
}

// Round is one round of a node. ID rises.
type Round struct {
	ID       int64
	Node     string
	Received time.Time
	HostTier string            // appraise.Tier by name
	VMTiers  map[string]string // by UUID
	Codes    []string          // of all reasons, sorted, each once
	Changes  []byte            // JSON of []appraise.Change
	Evidence []byte            // kept where the round was not affirming
	Result   []byte            // JSON of appraise.Result, kept where the round was not affirming or something changed
}

// Kind is what a Reference Value is of.
type Kind string

// The kinds.
const (
	HostEvent Kind = "host-event" // an event of the host's firmware and boot log: Path is "PCR/type/description"
	HostPCR   Kind = "host-pcr"   // a PCR of a host that sends no event log: Path is "bank:index"
	HostIMA   Kind = "host-ima"   // a file in the host's measurement list
	Launcher  Kind = "launcher"   // a file in the launch log
	VMPCR     Kind = "vm-pcr"     // a vTPM's PCR: Path is "bank:index"
	VMIMA     Kind = "vm-ima"     // for later
)

// ValueState is where a Reference Value stands.
type ValueState string

// The states. Only Approved counts.
const (
	Proposed ValueState = "proposed" // waits for the second of four eyes
	Approved ValueState = "approved"
	Rejected ValueState = "rejected"
)

// Value is a Reference Value (RFC 9334, 8.3).
type Value struct {
	ID      int64
	Subject string // "" for all, a node's ID, a VM's UUID, or "group:NAME"
	Kind    Kind
	Path    string // "" for wherever it lies
	Digest  string // "sha256:…" and so on, hexadecimal
	Source  string // learned, file, manifest, package, operator
	Detail  string // name of the manifest, the package
	State   ValueState
	By      string // who proposed it
	Second  string // who approved it
	Time    time.Time
}

// AuditEntry is one line of the audit log: Hash is the SHA-256 over the canonical
// JSON of all that stands before it, Previous included.
type AuditEntry struct {
	ID       int64     `json:"id"`
	Time     time.Time `json:"time"`
	Actor    string    `json:"actor"` // person, node, or "verifier"
	Action   string    `json:"action"`
	Subject  string    `json:"subject"`
	Detail   string    `json:"detail"` // JSON
	Previous string    `json:"previous"`
	Hash     string    `json:"hash"`
}

// Hook is a webhook.
type Hook struct {
	ID      int64
	URL     string
	Secret  []byte // signs each delivery
	Events  []string
	Created time.Time
}

// Delivery is one event on its way to a webhook.
type Delivery struct {
	ID       int64
	Hook     int64
	Event    string
	Body     []byte
	Attempts int
	Next     time.Time
	LastErr  string
}

// JoinToken lets one node in, once. Only its digest is kept.
type JoinToken struct {
	Digest  string // SHA-256 of the secret, hexadecimal
	Name    string // of the node that may use it; "" for any
	Expires time.Time
	By      string
	Used    time.Time
	UsedBy  string // node ID
}
