package config

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"
	"unicode"
)

// VerifierPath is where virt-trust-verifier's configuration lies.
const VerifierPath = "/etc/virt-trust/verifier.toml"

// Verifier is verifier.toml.
type Verifier struct {
	Listen    []string          `toml:"listen"`   // addresses, unless systemd hands sockets over
	Names     []string          `toml:"names"`    // of the server certificate: DNS names, IP addresses; the first is the Verifier's own
	Database  string            `toml:"database"` // "sqlite:PATH" or "postgres://…"
	CA        VerifierCA        `toml:"ca"`
	Browsers  VerifierBrowsers  `toml:"browsers"`
	Rounds    VerifierRounds    `toml:"rounds"`
	Results   VerifierResults   `toml:"results"`
	Policy    VerifierPolicy    `toml:"policy"`
	Enrolment VerifierEnrolment `toml:"enrolment"`
	Retention VerifierRetention `toml:"retention"`
	People    VerifierPeople    `toml:"people"`
	OIDC      VerifierOIDC      `toml:"oidc"`
	Webhooks  VerifierWebhooks  `toml:"webhooks"`
	Limits    VerifierLimits    `toml:"limits"`
	Tokens    []VerifierToken   `toml:"token"`
}

// VerifierCA is the Verifier's certificate authority for nodes.
type VerifierCA struct {
	Certificate string `toml:"certificate"` // PEM
	Key         string `toml:"key"`         // PKCS #8 in PEM
	CRLURL      string `toml:"crl_url"`     // of the revocation list, for certificates; "" for none
}

// VerifierBrowsers is a second way in, for people alone, with a certificate that
// their browsers trust. Without a certificate there is none.
type VerifierBrowsers struct {
	Listen      []string `toml:"listen"`      // addresses, unless systemd hands sockets of this name over
	Certificate string   `toml:"certificate"` // PEM, with those between it and its root
	Key         string   `toml:"key"`         // PEM
}

// VerifierRounds is how often nodes are appraised.
type VerifierRounds struct {
	Interval Duration `toml:"interval"`
	Lifetime Duration `toml:"lifetime"` // of a result, from the evidence's arrival
}

// VerifierResults is how Attestation Results are given out.
type VerifierResults struct {
	Keys   string `toml:"keys"`   // file of signing keys in PEM; the first signs, the others are still published
	Access string `toml:"access"` // reader, open
}

// VerifierPolicy is the appraisal policy where no policy document says else.
type VerifierPolicy struct {
	ReferenceValues string `toml:"reference_values"` // learn, strict
	FourEyes        bool   `toml:"four_eyes"`
	ManifestKeys    string `toml:"manifest_keys"` // public keys in PEM of the policy authority
}

// VerifierEnrolment is which nodes get in.
type VerifierEnrolment struct {
	ManufacturerRoots string `toml:"manufacturer_roots"` // folder of certificates, PEM or DER
	Approval          string `toml:"approval"`           // manufacturer, operator
}

// VerifierRetention is how long the past is kept.
type VerifierRetention struct {
	Rounds   Duration `toml:"rounds"`
	Evidence Duration `toml:"evidence"` // of rounds that were not affirming
	// EvidenceMiB bounds all of that: of the node that has most, the oldest goes first.
	EvidenceMiB int `toml:"evidence_mib"`
}

// VerifierPeople is how people log in.
type VerifierPeople struct {
	SessionTime Duration `toml:"session_time"` // of the page's
}

// VerifierOIDC is an OpenID Connect provider. Without an issuer there is none.
type VerifierOIDC struct {
	Issuer           string   `toml:"issuer"`
	ClientID         string   `toml:"client_id"`
	ClientSecretFile string   `toml:"client_secret_file"` // "" for a public client
	RedirectURL      string   `toml:"redirect_url"`       // https://NAME/oidc/callback
	NameClaim        string   `toml:"name_claim"`
	RolesClaim       string   `toml:"roles_claim"` // its values, a text or a list, are looked for in the three below
	Reader           []string `toml:"reader"`
	Operator         []string `toml:"operator"`
	Policy           []string `toml:"policy"`
}

// VerifierWebhooks is where webhooks may lead.
type VerifierWebhooks struct {
	AllowNetworks []string `toml:"allow_networks"` // private ones, as prefixes
	AllowHTTP     bool     `toml:"allow_http"`
}

// VerifierLimits bounds what clients may take.
type VerifierLimits struct {
	Connections   int      `toml:"connections"`
	Requests      int      `toml:"requests"`       // of one person, a minute
	Anonymous     int      `toml:"anonymous"`      // of one address without identity, a minute
	HeaderTimeout Duration `toml:"header_timeout"` // for TLS handshake and header
	BodyTimeout   Duration `toml:"body_timeout"`   // for the whole request
	IdleTimeout   Duration `toml:"idle_timeout"`
}

// VerifierToken is a person's or a program's static token; the Verifier knows
// its digest only.
type VerifierToken struct {
	Name   string `toml:"name"`
	Person string `toml:"person"` // whose it is, as the OpenID provider names him; "" for Name
	Role   string `toml:"role"`   // reader, operator, policy
	SHA256 string `toml:"sha256"` // hexadecimal
}

// DefaultVerifier gives the compiled-in configuration.
func DefaultVerifier() Verifier {
	const state = "/var/lib/virt-trust-verifier/"
	return Verifier{
		Listen: []string{":8443"}, Names: []string{}, Database: "sqlite:" + state + "verifier.db",
		CA:        VerifierCA{Certificate: state + "ca.pem", Key: state + "ca-key.pem"},
		Browsers:  VerifierBrowsers{Listen: []string{":8444"}},
		Rounds:    VerifierRounds{Interval: Duration(time.Minute), Lifetime: Duration(150 * time.Second)},
		Results:   VerifierResults{Keys: state + "result-keys.pem", Access: "reader"},
		Policy:    VerifierPolicy{ReferenceValues: "learn", ManifestKeys: "/etc/virt-trust/verifier-manifest-keys.pem"},
		Enrolment: VerifierEnrolment{ManufacturerRoots: "/etc/virt-trust/tpm-roots", Approval: "manufacturer"},
		Retention: VerifierRetention{Rounds: Duration(30 * 24 * time.Hour), Evidence: Duration(30 * 24 * time.Hour), EvidenceMiB: 20_480},
		People:    VerifierPeople{SessionTime: Duration(12 * time.Hour)},
		OIDC:      VerifierOIDC{NameClaim: "email", RolesClaim: "groups", Reader: []string{}, Operator: []string{}, Policy: []string{}},
		Webhooks:  VerifierWebhooks{AllowNetworks: []string{}},
		Limits: VerifierLimits{
			Connections: 25_000, Requests: 600, Anonymous: 120,
			HeaderTimeout: Duration(10 * time.Second), BodyTimeout: Duration(time.Minute), IdleTimeout: Duration(3 * time.Minute),
		},
	}
}

// LoadVerifier reads the file at path over the defaults.
func LoadVerifier(path string) (Verifier, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return DefaultVerifier(), nil
	}
	if err != nil {
		return Verifier{}, err
	}
	c, err := ParseVerifier(b)
	if err != nil {
		return Verifier{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// ParseVerifier reads a configuration over the defaults and checks it.
func ParseVerifier(b []byte) (Verifier, error) {
	c := DefaultVerifier()
	if err := strict(b, &c); err != nil {
		return Verifier{}, err
	}
	return c, c.check()
}

func (c Verifier) check() error {
	const day = 24 * time.Hour
	l := c.Limits
	errs := []error{
		oneOf("results.access", c.Results.Access, "reader", "open"),
		oneOf("policy.reference_values", c.Policy.ReferenceValues, "learn", "strict"),
		oneOf("enrolment.approval", c.Enrolment.Approval, "manufacturer", "operator"),
		abs("ca.certificate", c.CA.Certificate), abs("ca.key", c.CA.Key), abs("results.keys", c.Results.Keys),
		abs("policy.manifest_keys", c.Policy.ManifestKeys), abs("enrolment.manufacturer_roots", c.Enrolment.ManufacturerRoots),
		between("rounds.interval", c.Rounds.Interval, time.Second, time.Hour),
		between("rounds.lifetime", c.Rounds.Lifetime, time.Second, day),
		between("retention.rounds", c.Retention.Rounds, time.Hour, 3660*day),
		between("retention.evidence", c.Retention.Evidence, time.Hour, 3660*day),
		inRange("retention.evidence_mib", c.Retention.EvidenceMiB, 1, 1<<30),
		between("people.session_time", c.People.SessionTime, time.Minute, 30*day),
		between("limits.header_timeout", l.HeaderTimeout, time.Second, 10*time.Minute),
		between("limits.body_timeout", l.BodyTimeout, time.Second, 10*time.Minute),
		between("limits.idle_timeout", l.IdleTimeout, time.Second, time.Hour),
		inRange("limits.connections", l.Connections, 10, 1_000_000),
		inRange("limits.requests", l.Requests, 1, 1_000_000), inRange("limits.anonymous", l.Anonymous, 1, 1_000_000),
	}
	if c.Rounds.Lifetime <= c.Rounds.Interval {
		errs = append(errs, errors.New("rounds.lifetime: not longer than rounds.interval: every result would expire before the next"))
	}
	if u, err := url.Parse(c.CA.CRLURL); c.CA.CRLURL != "" && (err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || len(c.CA.CRLURL) > 300) {
		errs = append(errs, fmt.Errorf("ca.crl_url: %.80q is no URL with http or https", c.CA.CRLURL))
	}
	if len(c.Listen) == 0 {
		errs = append(errs, errors.New("listen: empty"))
	}
	for _, n := range c.Names {
		if n == "" || strings.ContainsAny(n, "/:@ ") && !isAddr(n) {
			errs = append(errs, fmt.Errorf("names: %q is no DNS name or IP address", n))
		}
	}
	if !strings.HasPrefix(c.Database, "sqlite:") && !strings.HasPrefix(c.Database, "postgres://") && !strings.HasPrefix(c.Database, "postgresql://") {
		errs = append(errs, errors.New("database: neither sqlite:PATH nor postgres://…")) // its value may hold a password
	}
	for _, n := range c.Webhooks.AllowNetworks {
		if _, err := netip.ParsePrefix(n); err != nil {
			errs = append(errs, fmt.Errorf("webhooks.allow_networks: %w", err))
		}
	}
	return errors.Join(append(errs, c.Browsers.check(c.Listen), c.OIDC.check(), checkTokens(c.Tokens), c.checkPersons())...)
}

func (b VerifierBrowsers) check(others []string) error {
	if b.Certificate == "" && b.Key == "" {
		return nil
	}
	errs := []error{abs("browsers.certificate", b.Certificate), abs("browsers.key", b.Key)}
	if len(b.Listen) == 0 {
		errs = append(errs, errors.New("browsers.listen: empty"))
	}
	for _, a := range b.Listen {
		if slices.Contains(others, a) {
			errs = append(errs, fmt.Errorf("browsers.listen: %q is in listen too", a))
		}
	}
	return errors.Join(errs...)
}

func (o VerifierOIDC) check() error {
	if o.Issuer == "" {
		return nil
	}
	var errs []error
	for key, v := range map[string]string{"issuer": o.Issuer, "redirect_url": o.RedirectURL} {
		if u, err := url.Parse(v); err != nil || u.Scheme != "https" || u.Host == "" {
			errs = append(errs, fmt.Errorf("oidc.%s: %q is no https URL", key, v))
		}
	}
	for key, v := range map[string]string{"client_id": o.ClientID, "name_claim": o.NameClaim, "roles_claim": o.RolesClaim} {
		if v == "" {
			errs = append(errs, fmt.Errorf("oidc.%s: empty", key))
		}
	}
	if o.ClientSecretFile != "" {
		errs = append(errs, abs("oidc.client_secret_file", o.ClientSecretFile))
	}
	if len(o.Reader)+len(o.Operator)+len(o.Policy) == 0 {
		errs = append(errs, errors.New("oidc: reader, operator and policy are empty: nobody could do anything"))
	}
	return errors.Join(errs...)
}

func checkTokens(tokens []VerifierToken) error {
	var errs []error
	names, digests := map[string]bool{}, map[string]bool{}
	for i, t := range tokens {
		key := fmt.Sprintf("token %d", i+1)
		errs = append(errs, oneOf(key+": role", t.Role, "reader", "operator", "policy"))
		strange := func(s string) bool {
			return len(s) > 100 || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsGraphic(r) })
		}
		if t.Name == "" || strange(t.Name) || strange(t.Person) {
			errs = append(errs, fmt.Errorf("%s: it has no name, or a strange one", key))
		}
		if b, err := hex.DecodeString(t.SHA256); err != nil || len(b) != 32 || strings.ToLower(t.SHA256) != t.SHA256 {
			errs = append(errs, fmt.Errorf("%s: sha256 is no SHA-256 digest in lower case", key))
		}
		// The digest of nothing: a token file that was empty.
		if t.SHA256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" {
			errs = append(errs, fmt.Errorf("%s: sha256 is the digest of an empty token", key))
		}
		if names[t.Name] || digests[t.SHA256] {
			errs = append(errs, fmt.Errorf("%s: its name or digest stands there twice", key))
		}
		names[t.Name], digests[t.SHA256] = true, true
	}
	return errors.Join(errs...)
}

// checkPersons: where people log in by two ways and two have to agree, it has to be
// known who is who.
func (c Verifier) checkPersons() error {
	var errs []error
	for _, t := range c.Tokens {
		if c.Policy.FourEyes && c.OIDC.Issuer != "" && t.Role != "reader" && t.Person == "" {
			errs = append(errs, fmt.Errorf("token of %q: with policy.four_eyes and oidc it needs a person, as the claim %q names him: one who has both would count as two", t.Name, c.OIDC.NameClaim))
		}
	}
	return errors.Join(errs...)
}

func isAddr(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}

func inRange(key string, n, low, high int) error {
	if n < low || n > high {
		return fmt.Errorf("%s: %d is not between %d and %d", key, n, low, high)
	}
	return nil
}
