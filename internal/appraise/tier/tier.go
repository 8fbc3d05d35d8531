// Package tier is how far something is trusted: a package of its own, so that
// the Verifier's nouns have it without the appraisal. It is pure.
package tier

// Tier is how far something is trusted (AR4SI, draft-ietf-rats-ar4si, 3.2; EAR).
type Tier int8

// The tiers, best first. None is the zero Tier: what could not be appraised is
// never better.
const (
	None            Tier = 0
	Affirming       Tier = 2
	Warning         Tier = 32
	Contraindicated Tier = 96
)

// String is the tier's name in EAR.
func (t Tier) String() string {
	switch t {
	case Affirming:
		return "affirming"
	case Warning:
		return "warning"
	case Contraindicated:
		return "contraindicated"
	}
	return "none"
}

// MarshalText gives the tier's name.
func (t Tier) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// UnmarshalText reads a tier's name; an unknown one is None.
func (t *Tier) UnmarshalText(b []byte) error {
	*t = None
	for _, known := range []Tier{Affirming, Warning, Contraindicated} {
		if known.String() == string(b) {
			*t = known
		}
	}
	return nil
}
