// Package fleet has the nouns of the Verifier: nodes, their rounds, what was
// approved, who did what. It is pure; package store keeps them.
package fleet

import (
	"strings"
	"time"

	"virt-trust/internal/appraise/tier"
)

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
	// Learns: what it, or a VM of its, shows for the first time becomes Reference
	// Values, where the configuration lets nodes be learned.
	Learns    bool
	Certified time.Time // when its newest certificate begins
	RevokedAt time.Time // zero while it is not
	Version   int64     // rises with each change; the store's UpdateNode wants the one that was read
}

// Round is one round of a node, or a run of rounds one after the other with the
// same result, of which nothing had to be kept singly. ID rises.
type Round struct {
	ID       int64
	Node     string
	Received time.Time         // the first of the run
	Last     time.Time         // the last of the run
	Count    int64             // how many; 1 for a single one
	Expires  time.Time         // of the last
	HostTier string            // appraise.Tier by name
	VMTiers  map[string]string // by UUID
	Codes    []string          // of all reasons, sorted, each once
	Changes  []byte            // JSON of []appraise.Change
	Evidence []byte            // kept where the round was not affirming, as long as retention lets it
	Result   []byte            // JSON of appraise.Result, with the times of the last
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
	Second  string // who approved or rejected it, where that is another person
	Time    time.Time
	// FourEyes says that it counts only when a second, different person approved it.
	FourEyes bool
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
	Created  time.Time
	Dead     bool // given up
}

// Status is a node with what its newest result says now.
type Status struct {
	Node
	// Tier is None once the result has expired, and of a node that is not Active.
	Tier     tier.Tier
	Round    int64     // ID of the newest round; 0 before the first
	Received time.Time // of the newest result
	Expires  time.Time
	Codes    []string          // of all reasons, sorted, each once
	VMs      map[tier.Tier]int // how many VMs stand where; all None once expired
}

// VM is one VM in the newest result of one node. While a VM moves, two nodes may
// have it.
type VM struct {
	UUID     string
	Node     string // ID
	NodeName string
	Name     string
	Running  bool
	EKDigest string // SHA-256 of its SubjectPublicKeyInfo, hexadecimal
	// Tier is None once the result has expired, and of a node that is not Active.
	Tier    tier.Tier
	Expires time.Time
	Changed time.Time // when its entry last changed
}

// Summary counts nodes and VMs by what their newest results say now.
type Summary struct {
	Nodes    map[NodeState]int
	ByTier   map[tier.Tier]int // active nodes
	VMs      map[tier.Tier]int // of active nodes
	Problems int               // nodes with something that an operator should look at
}

// Challenge is a nonce that was given out once and is taken back once.
type Challenge struct {
	ID      string // unguessable, or the nonce itself
	Purpose string // "enrolment", "certificate"
	Source  string // whom its number is limited for: an address, or its network
	Data    []byte // what the taker needs to know
	Expires time.Time
}

// Session is a person's, of the web page. Only the digest of its secret is kept.
type Session struct {
	Digest  string // SHA-256, hexadecimal
	Person  string
	Role    string
	Data    []byte // what the sign-in needs to keep
	Created time.Time
	Expires time.Time
}

// Setting is one version of a document: policy, settings. Versions count from 1.
type Setting struct {
	Name    string
	Version int64
	Data    []byte
	By      string
	Time    time.Time
}

// JoinToken lets one node in, once. Only its digest is kept.
type JoinToken struct {
	Digest  string // SHA-256 of the secret, hexadecimal
	Name    string // of the node that may use it; "" for any
	Expires time.Time
	By      string
	Created time.Time
	Used    time.Time // zero while it has not been
	UsedBy  string    // node ID
}

// SamePerson says whether two names are one person's, for four eyes. A name is often
// an e-mail address, which people and providers spell in upper and lower case.
func SamePerson(a, b string) bool { return strings.EqualFold(a, b) }
