// Package webhook takes events to the people's own programs: signed, tried
// again from the store's queue, and never into networks that only the Verifier
// can reach.
//
// A delivery is a POST of JSON, {"type", "timestamp", "data"}, with the headers
// of Standard Webhooks (standardwebhooks.com, 1.0): webhook-id is the same in
// every attempt, so that a receiver can drop what it has seen.
package webhook

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The events.
const (
	NodePending   = "node.pending"   // a node waits for an operator
	NodeProblem   = "node.problem"   // a swapped AK, a second claimant
	TrustChanged  = "trust.changed"  // the tier of a host or a VM
	ResultExpired = "result.expired" // no evidence came in time
	ValueProposed = "value.proposed" // Reference Values wait for a second person
	Test          = "test"           // on request, to one webhook
)

// Events are those that a webhook can ask for.
func Events() []string {
	return []string{NodePending, NodeProblem, TrustChanged, ResultExpired, ValueProposed}
}

// SecretSize is that of a webhook's secret in bytes.
const SecretSize = 32

// secretPrefix marks a secret for people and for scanners of leaked secrets.
const secretPrefix = "whsec_"

// EncodeSecret spells a secret as receivers' libraries want it.
func EncodeSecret(secret []byte) string {
	return secretPrefix + base64.StdEncoding.EncodeToString(secret)
}

// Sign gives the header webhook-signature over a delivery.
func Sign(secret []byte, id string, at time.Time, body []byte) string {
	return "v1," + base64.StdEncoding.EncodeToString(mac(secret, id, at.Unix(), body))
}

func mac(secret []byte, id string, at int64, body []byte) []byte {
	m := hmac.New(sha256.New, secret)
	fmt.Fprintf(m, "%s.%d.", id, at)
	m.Write(body)
	return m.Sum(nil)
}

// Tolerance is how far a delivery's time may be from the receiver's.
const Tolerance = 5 * time.Minute

// Verify is what a receiver does with the three headers: one of the signatures
// must be right, and the time near.
func Verify(secret []byte, id, timestamp, signatures string, body []byte, now time.Time) error {
	at, err := strconv.ParseInt(timestamp, 10, 64)
	if err != nil || now.Sub(time.Unix(at, 0)).Abs() > Tolerance {
		return errors.New("webhook-timestamp is not of now")
	}
	want := mac(secret, id, at, body)
	if !slices.ContainsFunc(strings.Fields(signatures), func(s string) bool {
		version, text, _ := strings.Cut(s, ",")
		got, err := base64.StdEncoding.DecodeString(text)
		return version == "v1" && err == nil && hmac.Equal(got, want)
	}) {
		return errors.New("webhook-signature is not of this secret")
	}
	return nil
}
