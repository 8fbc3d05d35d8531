package ca

import (
	"errors"
	"fmt"
)

// Code says why something was refused, or what an operator should look at. The
// codes are stable: they stand in problem+json, the audit log, events and
// fleet.Node.Problem.
type Code string

// The codes.
const (
	TokenMissing  Code = "token-missing" // no join token, and nothing else that lets the node in
	TokenWrong    Code = "token-wrong"   // none that was ever given out
	TokenUsed     Code = "token-used"    // by another enrolment
	TokenExpired  Code = "token-expired" //
	TokenOther    Code = "token-other"   // it is for a node of another name
	NameBad       Code = "name-bad"      // no name that a node can have
	NameTaken     Code = "name-taken"    // another TPM under a known name
	EKKnown       Code = "ek-known"      // a known TPM under another name
	AKSwapped     Code = "ak-swapped"    // a known TPM with another AK
	KeysSwapped   Code = "keys-swapped"  // a known AK with another bind key or certifier
	NodeRevoked   Code = "node-revoked"  //
	NodePending   Code = "node-pending"  // an operator has not approved it yet
	NodeUnknown   Code = "node-unknown"  //
	NodeRestored  Code = "node-restored" // this CA knew it, the store does not: one of them is from a backup
	EKUnparsable  Code = "ek-unparsable" // no TPMT_PUBLIC of an EK
	EKIsVTPM      Code = "ek-is-vtpm"    // an EK of a virtual TPM
	EKOther       Code = "ek-other"      // the certificate is for another key
	EKNoCert      Code = "ek-no-certificate"
	EKCertBad     Code = "ek-certificate-unreadable"
	EKUnknownRoot Code = "ek-certificate-unknown-root"
	EKExpired     Code = "ek-certificate-expired"
	EKNotEK       Code = "ek-certificate-not-for-ek" // without tcg-kp-EKCertificate, or a CA's
	AKAttributes  Code = "ak-attributes"             // the AK is none: not restricted, not fixed, …
	BindBad       Code = "bind-attributes"           // the bind key is not as it must be
	BindUncertain Code = "bind-not-certified"        // the AK does not vouch for it
	CertifierBad  Code = "certifier-attributes"
	CertifierUnc  Code = "certifier-not-certified"
	Activation    Code = "activation-failed"  // the secret is wrong: EK and AK are not in one TPM
	Enrolment     Code = "enrolment-unknown"  // it never began, was finished, or took too long
	KeyNotQuoted  Code = "key-not-quoted"     // the AK does not vouch for the TLS key
	NonceBad      Code = "nonce-bad"          // not given out, used, or too old
	OtherNode     Code = "other-node"         // a certificate of another node than the address names
	NoCertificate Code = "certificate-needed" // of a node
	CertificateNo Code = "certificate-bad"    // not a node's
	NoList        Code = "no-revocation-list" // the CA's certificate does not let it sign one
	Malformed     Code = "malformed"
	TooLarge      Code = "too-large"
	TooMany       Code = "too-many"
	Busy          Code = "busy"
	Failed        Code = "failed"
)

// Refusal is why a node, or a certificate, was refused.
type Refusal struct {
	Code Code
	What string // for people; text in it that came from a node is quoted
	// Node is the ID of the known node that an operator should look at, if one is
	// concerned.
	Node string
}

func (r *Refusal) Error() string { return string(r.Code) + ": " + r.What }

func refuse(code Code, format string, args ...any) *Refusal {
	return &Refusal{Code: code, What: fmt.Sprintf(format, args...)}
}

// AsRefusal gives the Refusal in err; nil where there is none.
func AsRefusal(err error) *Refusal {
	var r *Refusal
	if errors.As(err, &r) {
		return r
	}
	return nil
}
