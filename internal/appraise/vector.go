package appraise

// Values of claims (AR4SI, 2.3.2 and 2.3.3).
const (
	claimMalfunction = -1 // the Verifier's
	claimApproved    = 2  // trustworthy instance; approved configuration, run time
	claimBoot        = 3  // approved executables up to the boot
	claimUnsafe      = 32 // configuration
	claimUnknown     = 33 // executables: not recognized
	claimBad         = 96 // untrustworthy instance; unsupportable configuration; contraindicated run time
	claimStranger    = 97 // instance: not recognized
	claimCrypto      = 99 // cryptographic validation failed
)

// aspect is the claim that a finding belongs to.
type aspect int

const (
	executables aspect = iota // what is not named below
	instance
	configuration
)

var aspects = map[string]aspect{
	CodeNonce: instance, CodeQuote: instance, CodeSignature: instance, CodeQualifying: instance, CodeAKName: instance,
	CodeNoPCRs: instance, CodeBank: instance, CodePCRsMissing: instance, CodePCRValues: instance,
	CodeClockBack: instance, CodeResets: instance, CodeVMSharedEK: instance, CodeVMEK: instance, CodeVMHidden: instance, CodeVMNotStarted: instance, CodeVMGeneration: instance,
	CodeVMQuote: instance, CodeVMReading: instance,
	CodeClockSkew: configuration, CodeListState: configuration, CodeMode: configuration, CodeVMState: configuration, CodeVMVerdict: configuration,
	CodeEventOrder: configuration, CodeEventMissing: configuration, CodeFirmwareError: configuration,
}

// strangers are findings by which the signature is nobody's, or another's.
var strangers = map[string]int8{
	CodeSignature: claimStranger, CodeAKName: claimStranger, CodeNonce: claimCrypto, CodeQualifying: claimCrypto, CodePCRValues: claimCrypto,
}

// appraisal gives tier and vector of the findings about a host, or a VM with
// the host's. A claim is made only where the subject was appraised in that
// respect: where the tier is none, what was good is not claimed.
func appraisal(reasons []Reason, bootOnly bool, host *Appraisal) Appraisal {
	if host != nil && rank(host.Tier) > rank(Affirming) {
		reasons = append(reasons, Reason{Code: CodeHost, Tier: host.Tier, What: "a VM is no better than its host, which is " + host.Tier.String()})
	}
	a := Appraisal{Tier: worst(reasons)}
	if rank(a.Tier) <= rank(Warning) {
		a.Vector = Vector{InstanceIdentity: claimApproved, Configuration: claimApproved, Executables: claimApproved}
		if bootOnly {
			a.Vector.Executables = claimBoot
		}
	}
	for _, r := range reasons {
		if r.Code == CodeHost {
			a.Vector.merge(host.Vector)
			continue
		}
		a.Vector.claim(r)
	}
	a.Reasons = settle(reasons)
	return a
}

func (v *Vector) claim(r Reason) {
	if r.Code == CodeInternal {
		v.InstanceIdentity, v.Configuration, v.Executables = claimMalfunction, claimMalfunction, claimMalfunction
		return
	}
	var to *int8
	var value int8
	switch aspects[r.Code] {
	case instance:
		to, value = &v.InstanceIdentity, claimBad
		if s := strangers[r.Code]; s != 0 {
			value = s
		}
		if r.Tier == Warning {
			value = claimApproved // there is no such claim
		}
	case configuration:
		to, value = &v.Configuration, claimBad
		if r.Tier == Warning {
			value = claimUnsafe
		}
	default:
		to, value = &v.Executables, claimBad
		if r.Tier == Warning {
			value = claimUnknown
		}
	}
	if r.Tier == Warning || r.Tier == Contraindicated {
		*to = max(*to, value)
	}
}

// merge keeps the worse of two vectors' claims.
func (v *Vector) merge(o Vector) {
	v.InstanceIdentity = max(v.InstanceIdentity, o.InstanceIdentity)
	v.Configuration = max(v.Configuration, o.Configuration)
	v.Executables = max(v.Executables, o.Executables)
}
