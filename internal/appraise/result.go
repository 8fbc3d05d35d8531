// Package appraise holds Evidence against Reference Values and policy and says
// what came of it (RFC 9334): a Result for the host and for each VM, as tiers
// with reasons. It is pure.
package appraise

import (
	"time"

	"virt-trust/internal/appraise/tier"
)

// Tier is how far something is trusted.
type Tier = tier.Tier

// The tiers, best first. None is the zero Tier: what could not be appraised is
// never better.
const (
	None            = tier.None
	Affirming       = tier.Affirming
	Warning         = tier.Warning
	Contraindicated = tier.Contraindicated
)

// Vector is the trustworthiness vector (AR4SI, 2.3): claims of -128 to 127, 0
// for no claim.
type Vector struct {
	InstanceIdentity int8 `json:"instance-identity,omitempty"`
	Configuration    int8 `json:"configuration,omitempty"`
	Executables      int8 `json:"executables,omitempty"`
	FileSystem       int8 `json:"file-system,omitempty"`
	Hardware         int8 `json:"hardware,omitempty"`
	RuntimeOpaque    int8 `json:"runtime-opaque,omitempty"`
	StorageOpaque    int8 `json:"storage-opaque,omitempty"`
	SourcedData      int8 `json:"sourced-data,omitempty"`
}

// Reason is one finding. What is for people; the rest is for programs. Text in
// it may come from a guest or a hostile host: whoever shows it escapes it.
type Reason struct {
	Code string `json:"code"` // stable, kebab-case: see the list in codes.go
	Tier Tier   `json:"tier"` // what it alone leads to
	What string `json:"what"`
	// Of a finding in a log: which (report.EventLog, IMA, LaunchLog), which entry,
	// counted from 0 in the whole log, of which PCR, and the two digests in
	// hexadecimal.
	Log      string `json:"log,omitempty"`
	Entry    *int   `json:"entry,omitempty"`
	PCR      *uint  `json:"pcr,omitempty"`
	Path     string `json:"path,omitempty"`
	Digest   string `json:"digest,omitempty"`
	Expected string `json:"expected,omitempty"`
}

// Appraisal is of the host or of one VM.
type Appraisal struct {
	Tier    Tier     `json:"tier"`
	Vector  Vector   `json:"vector"`
	Reasons []Reason `json:"reasons"` // worst first; none when affirming
}

// VM is the appraisal of one VM: never better than its host's.
type VM struct {
	UUID    string `json:"uuid"`
	Name    string `json:"name"`
	Running bool   `json:"running"`
	Appraisal
	EK            string     `json:"ek,omitempty"` // SHA-256 of its SubjectPublicKeyInfo, hexadecimal
	EKCertificate []byte     `json:"ek_certificate,omitempty"`
	PCRs          PCRs       `json:"pcrs,omitzero"`
	Launchers     []Launcher `json:"launchers,omitempty"`
	Started       int64      `json:"started,omitempty"` // seconds since 1970, of the launch log
}

// Launcher is a file that ran for a VM, out of the launch log.
type Launcher struct {
	Role   string `json:"role"`
	Path   string `json:"path"`
	SHA256 string `json:"sha256"`
	By     string `json:"by,omitempty"`
}

// Result is an Attestation Result: of one round of one node.
type Result struct {
	Node     string    `json:"node"` // ID
	Received time.Time `json:"received"`
	Expires  time.Time `json:"expires"` // after that it says nothing: None
	Host     Appraisal `json:"host"`
	VMs      []VM      `json:"vms"`
	PCRs     PCRs      `json:"pcrs,omitzero"` // of the host
	HostName string    `json:"host_name,omitempty"`
	Software string    `json:"software,omitempty"`
	Kernel   string    `json:"kernel,omitempty"`
	BootID   string    `json:"boot_id,omitempty"`
	// Changes are what differs from the round before, for people.
	Changes []Change `json:"changes,omitempty"`
}

// Change is one difference between two rounds.
type Change struct {
	Subject string `json:"subject"` // "host", or a VM's UUID
	Kind    string `json:"kind"`    // tier, reboot, event, ima-entry, launcher, vm-started, vm-stopped, vm-new, vm-gone, pcr
	What    string `json:"what"`
}
