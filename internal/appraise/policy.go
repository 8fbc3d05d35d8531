package appraise

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"virt-trust/internal/launcher/refvalues"
)

// PolicyFormat is what a policy file must name.
const PolicyFormat = "virt-trust-policy-1"

// MaxPolicy bounds a policy file, in bytes.
const MaxPolicy = 1 << 20

// Policy is an appraisal policy for Evidence (RFC 9334, 8.5). As JSON it is a
// policy file; what a file does not name is as in DefaultPolicy. A Policy that is
// in use is not changed.
type Policy struct {
	Format string `json:"format"`
	ID     string `json:"id"`

	Bank   string `json:"bank"`   // of the host's quote
	PCRs   []uint `json:"pcrs"`   // that must be quoted
	Events []uint `json:"events"` // PCRs whose events are held against Reference Values, one by one
	// LaunchPCR is where hosts measure launchers to. A host may not choose it: it
	// could hide what was measured into another PCR.
	LaunchPCR uint   `json:"launch_pcr"`
	VMBank    string `json:"vm_bank"`
	VMPCRs    []uint `json:"vm_pcrs"` // of a vTPM, that must be as its Reference Values say

	IMA IMAPolicy `json:"ima"`

	UnknownEvent    Tier `json:"unknown_event"`    // what an event leads to that no Reference Value has
	UnknownLauncher Tier `json:"unknown_launcher"` // and a launcher
	AuditMode       Tier `json:"audit_mode"`       // and a host in mode audit
	RequireVMQuote  bool `json:"require_vm_quote"` // each VM that runs is quoted by its vTPM

	MaxAge   Seconds `json:"max_age"`   // of a result
	MaxSkew  Seconds `json:"max_skew"`  // of the host's clock
	Starting Seconds `json:"vm_starts"` // after its start a VM's PCRs may not be complete

	ready atomic.Pointer[compiled]
}

// IMAPolicy is for files in the IMA measurement list.
type IMAPolicy struct {
	Require bool `json:"require"` // a host without a list is not appraised
	// Excludes are paths that are not looked at: "/var/log/*" for what lies in a
	// folder or below it, anything else for itself.
	Excludes []string `json:"excludes"`
	Unknown  Tier     `json:"unknown"` // what a file leads to that no Reference Value has at its path
	Changed  Tier     `json:"changed"` // and one whose path has another digest there
	// Keys in PEM: a file whose IMA signature one of them made is accepted.
	Keys string `json:"keys"`
}

// Seconds is a time span; in JSON a number of seconds.
type Seconds time.Duration

// MarshalJSON gives the number of seconds.
func (s Seconds) MarshalJSON() ([]byte, error) {
	return json.Marshal(time.Duration(s).Seconds())
}

// UnmarshalJSON reads a number of seconds, up to ten years.
func (s *Seconds) UnmarshalJSON(b []byte) error {
	var n float64
	if err := json.Unmarshal(b, &n); err != nil {
		return err
	}
	if n < 0 || n > 10*365*24*3600 {
		return fmt.Errorf("%v seconds", n)
	}
	*s = Seconds(n * float64(time.Second))
	return nil
}

// DefaultPolicy is the policy of a Verifier that was given none.
func DefaultPolicy() *Policy {
	boot := []uint{0, 2, 4, 7, 8, 9, 11, 12, 14}
	return &Policy{
		Format: PolicyFormat, ID: "default",
		Bank: "sha256", PCRs: []uint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, Events: boot, LaunchPCR: 15,
		VMBank: "sha256", VMPCRs: slices.Clone(boot),
		IMA:          IMAPolicy{Excludes: []string{}, Unknown: Warning, Changed: Contraindicated},
		UnknownEvent: Contraindicated, UnknownLauncher: Contraindicated, AuditMode: Warning,
		MaxAge: Seconds(5 * time.Minute), MaxSkew: Seconds(5 * time.Minute), Starting: Seconds(90 * time.Second),
	}
}

// ParsePolicy reads a policy file without a look at who signed it.
func ParsePolicy(b []byte) (*Policy, error) {
	if len(b) > MaxPolicy {
		return nil, errors.New("the policy is too long")
	}
	p := DefaultPolicy()
	p.Format, p.ID = "", ""
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(p); err != nil {
		return nil, fmt.Errorf("the policy: %w", err)
	}
	if d.More() {
		return nil, errors.New("the policy: something follows it")
	}
	return p, p.check()
}

// VerifyPolicy gives the policy that one of the keys signed: a detached
// signature, as of a manifest (refvalues.VerifySignature).
func VerifyPolicy(policy, signature []byte, keys []any) (*Policy, error) {
	if len(policy) > MaxPolicy {
		return nil, errors.New("the policy is too long")
	}
	if err := refvalues.VerifySignature(policy, signature, keys); err != nil {
		return nil, fmt.Errorf("the policy: %w", err)
	}
	return ParsePolicy(policy)
}

func (p *Policy) check() error {
	banks := []string{"sha1", "sha256", "sha384"}
	switch {
	case p.Format != PolicyFormat:
		return fmt.Errorf("the policy: its format is %.40q, not %q", p.Format, PolicyFormat)
	case p.ID == "" || len(p.ID) > 100:
		return errors.New("the policy has no id, or a long one")
	case !slices.Contains(banks, p.Bank) || !slices.Contains(banks, p.VMBank):
		return fmt.Errorf("the policy: a bank is none of %v", banks)
	case len(p.PCRs) == 0:
		return errors.New("the policy: no PCRs have to be quoted, so that a quote would say nothing")
	case p.MaxAge <= 0:
		return errors.New("the policy: max_age is 0, so that no result would ever hold")
	}
	for _, n := range slices.Concat(p.PCRs, p.Events, p.VMPCRs) {
		if n > 23 {
			return fmt.Errorf("the policy: there is no PCR %d", n)
		}
	}
	for _, n := range p.Events {
		if !slices.Contains(p.PCRs, n) {
			return fmt.Errorf("the policy: events of PCR %d are looked at, and the PCR is not quoted", n)
		}
	}
	if !slices.Contains(p.PCRs, p.LaunchPCR) || slices.Contains(p.Events, p.LaunchPCR) {
		return fmt.Errorf("the policy: launch_pcr %d has to be among pcrs, and not among events", p.LaunchPCR)
	}
	for _, e := range p.IMA.Excludes {
		if !strings.HasPrefix(e, "/") || strings.Contains(strings.TrimSuffix(e, "*"), "*") || strings.HasSuffix(e, "*") && !strings.HasSuffix(e, "/*") {
			return fmt.Errorf("the policy: exclude %.80q is no path, nor one with /* at its end", e)
		}
	}
	for _, t := range []Tier{p.IMA.Unknown, p.IMA.Changed, p.UnknownEvent, p.UnknownLauncher, p.AuditMode} {
		if t == None {
			return errors.New("the policy: a tier is none of affirming, warning, contraindicated")
		}
	}
	if _, err := p.imaKeys(); err != nil {
		return fmt.Errorf("the policy: ima.keys: %w", err)
	}
	return nil
}

// compiled is a policy made ready.
type compiled struct {
	*Policy
	revision uint64 // tells one policy from another
	keys     []crypto.PublicKey
	exact    map[string]bool
	prefixes []string
}

// compile makes a policy ready, once.
func (p *Policy) compile() *compiled {
	if c := p.ready.Load(); c != nil {
		return c
	}
	c := &compiled{Policy: p, exact: map[string]bool{}}
	if b, err := json.Marshal(p); err == nil {
		d := sha256.Sum256(b)
		c.revision = binary.BigEndian.Uint64(d[:])
	}
	c.keys, _ = p.imaKeys() // check saw to it
	for _, e := range p.IMA.Excludes {
		if prefix, ok := strings.CutSuffix(e, "*"); ok {
			c.prefixes = append(c.prefixes, prefix)
		} else {
			c.exact[e] = true
		}
	}
	p.ready.Store(c)
	return c
}

// excluded reports whether a file is not looked at. A path with ".." in it is
// none that the kernel gives.
func (c *compiled) excluded(path []byte) bool {
	if c.exact[string(path)] {
		return true
	}
	for _, p := range c.prefixes {
		if len(path) > len(p) && string(path[:len(p)]) == p && !bytes.Contains(path, []byte("/../")) {
			return true
		}
	}
	return false
}
