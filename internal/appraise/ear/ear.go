// Package ear writes and verifies Attestation Results as EAT Attestation Results
// (EAR, draft-ietf-rats-ear), JWTs signed with ES256, for relying parties. It is
// pure but for the crypto.Signer that is handed in.
//
// The submodules are "host" and, for each VM, "vm/" and its UUID; a result of one
// VM has these two. What is not in the draft is under "virt-trust.…".
package ear

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"

	"virt-trust/internal/appraise"
)

// MediaType is that of a result (RFC 9782, 4).
const MediaType = "application/eat+jwt"

// Profile is the value of eat_profile (draft-ietf-rats-ear, 4).
const Profile = "tag:ietf.org,2026:rats/ear#virt-trust-1"

// Names of submodules.
const (
	Host     = "host"
	VMPrefix = "vm/"
)

// Bounds of what is verified.
const (
	MaxToken = 64 << 20 // bytes
	maxKeys  = 64
)

// Leeway is how far the clocks of Verifier and relying party may differ.
const Leeway = time.Minute

// Claims are those of a result.
type Claims struct {
	Profile    string               `json:"eat_profile"`
	Issued     int64                `json:"iat"` // seconds since 1970
	Expires    int64                `json:"exp"`
	Subject    string               `json:"sub"` // the node's id
	VerifierID VerifierID           `json:"ear.verifier-id"`
	Submods    map[string]Appraisal `json:"submods"`
	HostName   string               `json:"virt-trust.host-name,omitempty"` // nothing vouches for it
	BootID     string               `json:"virt-trust.boot-id,omitempty"`
}

// VerifierID says who appraised (draft-ietf-rats-ear, 3.3).
type VerifierID struct {
	Developer string `json:"developer"`
	Build     string `json:"build"`
}

// Appraisal is of the host or of one VM (draft-ietf-rats-ear, 3.2).
type Appraisal struct {
	Status   appraise.Tier   `json:"ear.status"`
	Vector   appraise.Vector `json:"ear.trustworthiness-vector"`
	PolicyID string          `json:"ear.appraisal-policy-id,omitempty"`

	Reasons []appraise.Reason `json:"virt-trust.reasons,omitempty"`
	Name    string            `json:"virt-trust.vm-name,omitempty"`
	Running *bool             `json:"virt-trust.vm-running,omitempty"`
	EK      string            `json:"virt-trust.vtpm-ek,omitempty"` // SHA-256 of its SubjectPublicKeyInfo
}

// Issuer signs results.
type Issuer struct {
	Signer crypto.Signer // ECDSA over NIST P-256
	Build  string        // virt-trust's version
	Policy string        // id of the policy
	// Before are public keys whose results may not have expired yet.
	Before []crypto.PublicKey
}

// Key names the signing key; "" for one that cannot sign results.
func (i *Issuer) Key() string {
	key, err := publicKey(i.Signer.Public())
	if err != nil {
		return ""
	}
	id, err := KeyID(key)
	if err != nil {
		return ""
	}
	return id
}

// KeySet is the JWK Set of the keys whose results may still hold (RFC 7517).
func (i *Issuer) KeySet() ([]byte, error) {
	return JWKS(append([]crypto.PublicKey{i.Signer.Public()}, i.Before...)...)
}

// KeyID is the name of a key: its thumbprint (RFC 7638).
func KeyID(key *ecdsa.PublicKey) (string, error) {
	t, err := (&jose.JSONWebKey{Key: key}).Thumbprint(crypto.SHA256)
	if err != nil {
		return "", err
	}
	return base64.RawURLEncoding.EncodeToString(t), nil
}

func publicKey(k crypto.PublicKey) (*ecdsa.PublicKey, error) {
	key, ok := k.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("results are signed with ECDSA over NIST P-256 alone")
	}
	return key, nil
}

// JWKS is the set of public keys of a Verifier, for /.well-known/jwks.json: its
// present one, and those before, whose results have not expired yet.
func JWKS(keys ...crypto.PublicKey) ([]byte, error) {
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, k := range keys {
		key, err := publicKey(k)
		if err != nil {
			return nil, err
		}
		id, err := KeyID(key)
		if err != nil {
			return nil, err
		}
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: key, KeyID: id, Algorithm: string(jose.ES256), Use: "sig"})
	}
	return json.Marshal(set)
}

// ErrNoVM says that a result has no such VM.
var ErrNoVM = errors.New("the result has no such VM")

// Sign gives the EAR of a result: of all of it, or of the one VM with this UUID and
// of its host. It expires when the result does.
func (i *Issuer) Sign(r *appraise.Result, vm string) (string, error) {
	key, err := publicKey(i.Signer.Public())
	if err != nil {
		return "", err
	}
	c := Claims{
		Profile: Profile, Issued: r.Received.Unix(), Expires: r.Expires.Unix(), Subject: r.Node, VerifierID: VerifierID{"virt-trust", i.Build},
		Submods: map[string]Appraisal{Host: i.appraisal(r.Host)}, HostName: r.HostName, BootID: r.BootID,
	}
	for n := range r.VMs {
		v := &r.VMs[n]
		if vm != "" && v.UUID != vm {
			continue
		}
		a := i.appraisal(v.Appraisal)
		a.Name, a.Running, a.EK = v.Name, &v.Running, v.EK
		c.Submods[VMPrefix+v.UUID] = a
	}
	if vm != "" && len(c.Submods) != 2 {
		return "", fmt.Errorf("%w: %.40q", ErrNoVM, vm)
	}
	id, err := KeyID(key)
	if err != nil {
		return "", err
	}
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: cryptosigner.Opaque(i.Signer), KeyID: id}},
		(&jose.SignerOptions{}).WithType("eat+jwt"),
	)
	if err != nil {
		return "", err
	}
	body, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	signed, err := signer.Sign(body)
	if err != nil {
		return "", fmt.Errorf("signing a result: %w", err)
	}
	return signed.CompactSerialize()
}

func (i *Issuer) appraisal(a appraise.Appraisal) Appraisal {
	return Appraisal{Status: a.Tier, Vector: a.Vector, PolicyID: i.Policy, Reasons: a.Reasons}
}

// Errors of Verify.
var (
	ErrToken   = errors.New("not an Attestation Result")
	ErrKey     = errors.New("the Attestation Result is not signed by the Verifier's key")
	ErrExpired = errors.New("the Attestation Result has expired")
)

// Verify gives the claims of a result that a key of the JWK Set signed, with
// ES256 and nothing else, and that holds now. Of a result that does not hold, all is
// none. Errors: ErrToken, ErrKey, ErrExpired.
func Verify(token string, jwks []byte, now time.Time) (*Claims, error) {
	if len(token) > MaxToken {
		return nil, fmt.Errorf("%w: %d bytes", ErrToken, len(token))
	}
	jws, err := jose.ParseSignedCompact(strings.TrimSpace(token), []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrToken, err)
	}
	key, err := find(jwks, jws.Signatures[0].Protected)
	if err != nil {
		return nil, err
	}
	body, err := jws.Verify(key)
	if err != nil {
		return nil, ErrKey
	}
	c := &Claims{}
	d := json.NewDecoder(bytes.NewReader(body))
	if err := d.Decode(c); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrToken, err)
	}
	if c.Profile != Profile || d.More() {
		return nil, fmt.Errorf("%w: its profile is %.80q", ErrToken, c.Profile)
	}
	switch at := now.Unix(); {
	case c.Issued > at+int64(Leeway.Seconds()):
		return nil, fmt.Errorf("%w: it was issued at %s, which is yet to come", ErrToken, time.Unix(c.Issued, 0).UTC().Format(time.RFC3339))
	case c.Expires <= c.Issued || at >= c.Expires:
		return nil, fmt.Errorf("%w: at %s", ErrExpired, time.Unix(c.Expires, 0).UTC().Format(time.RFC3339))
	}
	return c, c.check()
}

// find gives the key of a JWK Set that a signature names.
func find(jwks []byte, h jose.Header) (*ecdsa.PublicKey, error) {
	if typ, _ := h.ExtraHeaders[jose.HeaderType].(string); typ != "eat+jwt" {
		return nil, fmt.Errorf("%w: it is of type %.40q", ErrToken, typ)
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(jwks, &set); err != nil {
		return nil, fmt.Errorf("the key set: %w", err)
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("the key set: %d keys", len(set.Keys))
	}
	for _, k := range set.Keys {
		key, ok := k.Key.(*ecdsa.PublicKey)
		if h.KeyID == "" || k.KeyID != h.KeyID || !ok || key.Curve != elliptic.P256() || k.Use != "" && k.Use != "sig" || k.Algorithm != "" && k.Algorithm != string(jose.ES256) {
			continue
		}
		return key, nil
	}
	return nil, fmt.Errorf("%w: the key set has no key %.80q", ErrKey, h.KeyID)
}

// check refuses results that say one thing and its opposite: a tier that is better
// than a claim under it, or a VM that is better than its host.
func (c *Claims) check() error {
	host, ok := c.Submods[Host]
	if !ok {
		return fmt.Errorf("%w: it says nothing of the host", ErrToken)
	}
	for name, a := range c.Submods {
		v := a.Vector
		for _, claim := range []int8{v.InstanceIdentity, v.Configuration, v.Executables, v.FileSystem, v.Hardware, v.RuntimeOpaque, v.StorageOpaque, v.SourcedData} {
			if better(a.Status, tierOf(claim)) {
				return fmt.Errorf("%w: %.60q is %s with a claim of %d", ErrToken, name, a.Status, claim)
			}
		}
		if better(a.Status, host.Status) {
			return fmt.Errorf("%w: %.60q is %s, and the host %s", ErrToken, name, a.Status, host.Status)
		}
	}
	return nil
}

// tierOf is the tier that a claim's value belongs to (AR4SI, 2.3.1); of no claim
// nothing follows.
func tierOf(claim int8) appraise.Tier {
	switch n := int(claim); {
	case n >= -32 && n <= 31:
		return appraise.Affirming
	case n >= -96 && n <= 95:
		return appraise.Warning
	}
	return appraise.Contraindicated
}

// better: a says more than b allows. None says nothing, and is never better.
func better(a, b appraise.Tier) bool {
	rank := func(t appraise.Tier) int {
		return map[appraise.Tier]int{appraise.Affirming: 0, appraise.Warning: 1, appraise.None: 2, appraise.Contraindicated: 3}[t]
	}
	return a != appraise.None && rank(a) < rank(b)
}
