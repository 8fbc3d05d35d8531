// Package nodeapi is what agents and the Verifier say to each other, as JSON over
// TLS; bytes are base64. It is pure.
//
//	POST /v1/enrolments                EnrolmentRequest → 201 EnrolmentChallenge
//	POST /v1/enrolments/{id}           EnrolmentAnswer → 200, 202 Membership
//	POST /v1/nodes/{id}/challenges     → 201 Challenge
//	POST /v1/nodes/{id}/certificates   CertificateRequest → 200, 202 Membership
//	POST /v1/nodes/{id}/rounds         → 201 Round
//	POST /v1/nodes/{id}/evidence       report.MediaType, gzip or not → 200 Outcome
//
// The last two want the node's certificate. Errors are Problems.
package nodeapi

import (
	"time"

	"virt-trust/internal/appraise/tier"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
)

// EnrolmentRequest is the body of POST /v1/enrolments: who asks, with what keys
// (TPMT_PUBLIC), and what lets it in.
type EnrolmentRequest struct {
	Token       string `json:"token,omitempty"`       // its secret, base64url: the pin stays with the node
	Certificate []byte `json:"certificate,omitempty"` // DER: the node's last, where it had one
	Name        string `json:"name"`

	EK                 []byte `json:"ek"`
	EKCertificate      []byte `json:"ek_certificate,omitempty"` // DER
	AK                 []byte `json:"ak"`
	Bind               []byte `json:"bind"`
	BindAttest         []byte `json:"bind_attest"`
	BindSignature      []byte `json:"bind_signature"`
	Certifier          []byte `json:"certifier"`
	CertifierAttest    []byte `json:"certifier_attest"`
	CertifierSignature []byte `json:"certifier_signature"`
	Address            string `json:"address,omitempty"` // of the agent's pull API
}

// EnrolmentChallenge is the answer: a credential that only the TPM with the EK
// opens, and only if it has the AK (TPM2B_ID_OBJECT, TPM2B_ENCRYPTED_SECRET).
type EnrolmentChallenge struct {
	ID              string `json:"id"`
	IDObject        []byte `json:"id_object"`
	EncryptedSecret []byte `json:"encrypted_secret"`
}

// EnrolmentAnswer is the body of POST /v1/enrolments/{id}: the opened secret, which
// is the nonce, too, on which the AK vouches for the TLS key (a
// SubjectPublicKeyInfo).
type EnrolmentAnswer struct {
	Secret    []byte `json:"secret"`
	SPKI      []byte `json:"spki"`
	Attest    []byte `json:"attest"`
	Signature []byte `json:"signature"`
}

// Membership is what a node gets: with state "pending" no certificates, until an
// operator has approved it.
type Membership struct {
	Node             string          `json:"node"`
	State            fleet.NodeState `json:"state"`
	Problem          ca.Code         `json:"problem,omitempty"`
	CertificateChain string          `json:"certificate_chain,omitempty"` // PEM: the node's, and the CA's
	CertifierChain   string          `json:"certifier_chain,omitempty"`   // PEM
	Interval         float64         `json:"interval,omitempty"`          // seconds between rounds
}

// Challenge is the answer of POST /v1/nodes/{id}/challenges.
type Challenge struct {
	Nonce   []byte    `json:"nonce"`
	Expires time.Time `json:"expires"`
}

// CertificateRequest is the body of POST /v1/nodes/{id}/certificates. Certifier
// asks for a certificate of the certifier as well.
type CertificateRequest struct {
	Nonce     []byte `json:"nonce"`
	SPKI      []byte `json:"spki"`
	Attest    []byte `json:"attest"`
	Signature []byte `json:"signature"`
	Certifier bool   `json:"certifier,omitempty"`
}

// Round is what a node needs for its next round. Of the logs of boot HaveBoot the
// Verifier has the first bytes already, by kind.
type Round struct {
	Nonce    []byte            `json:"nonce"`
	Expires  time.Time         `json:"expires"`  // of the nonce, by the Verifier's clock
	Interval float64           `json:"interval"` // seconds until the evidence is wanted
	HaveBoot string            `json:"have_boot,omitempty"`
	Have     map[string]uint64 `json:"have,omitempty"`
}

// Outcome is the answer to Evidence.
type Outcome struct {
	Tier  tier.Tier `json:"tier"`  // of the host
	Codes []string  `json:"codes"` // of all reasons, sorted, each once
	Next  *Round    `json:"next,omitempty"`
}

// Problem is an error's body (RFC 9457).
type Problem struct {
	Type   string  `json:"type"`
	Title  string  `json:"title"`
	Status int     `json:"status"`
	Detail string  `json:"detail,omitempty"`
	Code   ca.Code `json:"code"` // stable
}

// ProblemType is the media type of a Problem.
const ProblemType = "application/problem+json"
