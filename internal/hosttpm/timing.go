package hosttpm

import (
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// Timing is what one kind of TPM command took so far, retries included.
type Timing struct {
	Count             int
	Total, Last, Most time.Duration
}

// timings is safe for concurrent use.
type timings struct {
	mu sync.Mutex
	by map[string]Timing
}

func (t *timings) add(cc tpm2.TPMCC, d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.by == nil {
		t.by = map[string]Timing{}
	}
	name := commandName(cc)
	v := t.by[name]
	v.Count++
	v.Total += d
	v.Last = d
	v.Most = max(v.Most, d)
	t.by[name] = v
}

func (t *timings) snapshot() map[string]Timing {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.by)
}

var commandNames = map[tpm2.TPMCC]string{
	tpm2.TPMCCActivateCredential: "ActivateCredential", tpm2.TPMCCPolicySecret: "PolicySecret", tpm2.TPMCCQuote: "Quote",
	tpm2.TPMCCCertify: "Certify", tpm2.TPMCCCreate: "Create", tpm2.TPMCCCreatePrimary: "CreatePrimary",
	tpm2.TPMCCEvictControl: "EvictControl", tpm2.TPMCCFlushContext: "FlushContext", tpm2.TPMCCGetCapability: "GetCapability",
	tpm2.TPMCCLoad: "Load", tpm2.TPMCCLoadExternal: "LoadExternal", tpm2.TPMCCNVDefineSpace: "NV_DefineSpace",
	tpm2.TPMCCNVIncrement: "NV_Increment", tpm2.TPMCCNVUndefineSpace: "NV_UndefineSpace", tpm2.TPMCCNVRead: "NV_Read", tpm2.TPMCCNVReadPublic: "NV_ReadPublic",
	tpm2.TPMCCPCRRead: "PCR_Read", tpm2.TPMCCPCRExtend: "PCR_Extend", tpm2.TPMCCReadClock: "ReadClock", tpm2.TPMCCPolicyAuthorize: "PolicyAuthorize", tpm2.TPMCCPolicyNV: "PolicyNV",
	tpm2.TPMCCPolicyPCR: "PolicyPCR", tpm2.TPMCCRSADecrypt: "RSA_Decrypt", tpm2.TPMCCReadPublic: "ReadPublic",
	tpm2.TPMCCSign: "Sign", tpm2.TPMCCStartAuthSession: "StartAuthSession", tpm2.TPMCCUnseal: "Unseal",
	tpm2.TPMCCVerifySignature: "VerifySignature",
}

func commandName(cc tpm2.TPMCC) string {
	if n, ok := commandNames[cc]; ok {
		return n
	}
	return fmt.Sprintf("%#x", uint32(cc))
}
