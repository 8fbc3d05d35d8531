package appraise

// The reason codes: stable, for programs.
const (
	// Of the Evidence as a whole.
	CodeNoEvidence  = "no-evidence"        // none came, or it was not read
	CodeFormat      = "evidence-format"    // not Evidence of a version that is known
	CodeInternal    = "appraisal-failed"   // the Verifier itself failed over it
	CodeNonce       = "nonce-wrong"        // not the nonce that was given out: replayed, or another's
	CodeNonceLate   = "nonce-expired"      // delayed
	CodeQuote       = "quote-invalid"      // not a quote
	CodeSignature   = "quote-signature"    // not by the node's AK: another TPM, relayed
	CodeQualifying  = "quote-binding"      // the quote is of another nonce or report
	CodeAKName      = "ak-other"           // the report names another AK
	CodeNoPCRs      = "quote-over-no-pcrs" // it says nothing
	CodeBank        = "quote-wrong-bank"   // over another bank than the policy's
	CodePCRsMissing = "quote-lacks-pcrs"   // PCRs of the policy are not quoted
	CodePCRValues   = "pcr-values-forged"  // the values are not those that were quoted
	CodeTooMany     = "more-findings"      // than are shown

	// Of time.
	CodeClockBack = "clock-went-back"  // the TPM's clock or counters are lower than before
	CodeResets    = "reset-count"      // boot id and resetCount tell different stories
	CodeClockSkew = "host-clock-wrong" // far from the Verifier's

	// Of the firmware's and the boot loader's event log.
	CodeEventLogMissing = "event-log-missing"
	CodeEventLogFormat  = "event-log-format"
	CodeEventLogReplay  = "event-log-does-not-replay"
	CodeEventUnknown    = "event-unknown"  // no Reference Value has it
	CodeEventMissing    = "event-missing"  // one that every boot has
	CodeEventOrder      = "event-order"    // one where it cannot be
	CodeFirmwareError   = "firmware-error" // a separator says that the firmware failed
	CodeHostPCR         = "host-pcr-other" // a PCR is not what a Reference Value says
	CodeHostNoValues    = "host-no-values" // there are no Reference Values for the host
	CodeLogChanged      = "log-rewritten"  // a log is shorter or another than before, in one boot
	CodeLogIncomplete   = "log-incomplete" // a part is missing, or more is to come
	CodePolicyChanged   = "policy-changed" // what was appraised before is asked for again

	// Of the IMA measurement list.
	CodeIMAMissing   = "ima-missing"
	CodeIMAFormat    = "ima-format"
	CodeIMAReplay    = "ima-does-not-replay"
	CodeIMAUnknown   = "ima-unknown"        // a file that no Reference Value has
	CodeIMAChanged   = "ima-changed"        // a file that has another content than its Reference Values
	CodeIMAViolation = "ima-violation"      // written while it was measured
	CodeIMAAggregate = "ima-boot-aggregate" // the list is not of this boot
	CodeIMAWithdrawn = "ima-withdrawn"      // accepted once, and no more
	CodeIMATooMany   = "ima-too-many"       // more findings than are kept

	// Of the launch log, and of launchers.
	CodeLaunchMissing   = "launch-log-missing"
	CodeLaunchFormat    = "launch-log-format"
	CodeLaunchReplay    = "launch-log-does-not-replay"
	CodeLaunchGap       = "launch-log-gap"
	CodeLaunchPCR       = "launch-pcr-other"  // the host measures launchers to another PCR than the policy's
	CodeLaunchBefore    = "launch-pcr-before" // it held something before the log began, which no Reference Value has
	CodeLaunchBoot      = "launch-log-other-boot"
	CodeLauncherUnknown = "launcher-unknown"

	// Of what virt-trustd says of itself.
	CodeListState = "vtpm-list-state"
	CodeMode      = "audit-mode"

	// Of a VM.
	CodeHost          = "host"                 // it is no better than its host
	CodeVMHidden      = "vm-hidden"            // it was started in this boot, and the report is silent about it
	CodeVMNotStarted  = "vm-never-started"     // reported running; the launch log has no start of it
	CodeVMGeneration  = "vm-other-start"       // the launch log's start is not of the record's generation
	CodeVMState       = "vm-state"             // its record is in no state in which it may run
	CodeVMEK          = "vm-ek-other"          // record, launch log, or the round before have another EK
	CodeVMSharedEK    = "vm-ek-shared"         // two VMs have one
	CodeVMPCRsMissing = "vm-pcrs-missing"      // it runs, and its PCRs were not read
	CodeVMPCR         = "vm-pcr-other"         // a PCR is not what its Reference Values say
	CodeVMNoValues    = "vm-no-values"         // there are no Reference Values for it
	CodeVMStarting    = "vm-starting"          // it was started a moment ago: its PCRs are not complete
	CodeVMQuote       = "vm-quote"             // the quote out of the vTPM is not right
	CodeVMReading     = "vm-reading-other"     // quote and reading do not agree
	CodeVMVerdict     = "vm-started-unguarded" // it was started although something was wrong
	CodeVMNotRunning  = "vm-not-running"       // nothing of it can be appraised
)
