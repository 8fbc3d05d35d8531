package page

import (
	"fmt"
	"strings"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/store"
)

// claim is one of the trustworthiness vector's, in words.
type claim struct {
	Name, Words string
	Value       int8
	Tier        appraise.Tier
}

// claims gives those that were made (AR4SI, draft-ietf-rats-ar4si, 2.3.4).
func claims(v appraise.Vector) []claim {
	all := []struct {
		name  string
		value int8
		words map[int8]string
	}{
		{"Instance identity", v.InstanceIdentity, map[int8]string{
			2: "it is the node that was enrolled", 96: "it is known, and not trusted", 97: "it is not the node that was enrolled"}},
		{"Configuration", v.Configuration, map[int8]string{
			2: "known and approved", 3: "no known weaknesses", 32: "it has known weaknesses", 36: "parts of it could not be seen", 96: "not to be accepted", 99: "its evidence does not verify"}},
		{"Executables", v.Executables, map[int8]string{
			2: "only approved files ran, at boot and since", 3: "only approved files ran at boot", 4: "only recognized files ran", 32: "files with known weaknesses ran", 33: "files ran that nobody knows", 96: "files ran that must not", 99: "their evidence does not verify"}},
		{"File system", v.FileSystem, map[int8]string{
			2: "only approved files", 32: "files that nobody knows", 96: "files that must not be there"}},
		{"Hardware", v.Hardware, map[int8]string{
			2: "genuine, and in a known state", 32: "genuine, with known weaknesses", 96: "genuine, and not to be accepted", 97: "not recognized", 99: "its evidence does not verify"}},
		{"Runtime memory", v.RuntimeOpaque, map[int8]string{
			2: "encrypted towards the host", 32: "kept from other programs", 96: "visible to others"}},
		{"Storage", v.StorageOpaque, map[int8]string{
			2: "secrets at rest are encrypted", 32: "secrets are kept apart, not encrypted", 96: "secrets are readable"}},
		{"Sourced data", v.SourcedData, map[int8]string{
			2: "from sources that are trusted", 32: "from sources that nobody vouches for", 96: "from sources that are not trusted"}},
	}
	var out []claim
	for _, c := range all {
		if c.value == 0 {
			continue
		}
		k := claim{c.name, c.words[c.value], c.value, tierOf(c.value)}
		if k.Words == "" {
			k.Words = map[appraise.Tier]string{
				appraise.Affirming: "as it should be", appraise.Warning: "not quite as it should be",
				appraise.Contraindicated: "not as it should be", appraise.None: "could not be told"}[k.Tier]
		}
		out = append(out, k)
	}
	return out
}

// tierOf a claim: AR4SI, 2.3.2.
func tierOf(v int8) appraise.Tier {
	switch {
	case v >= -1 && v <= 1:
		return appraise.None
	case v >= 2 && v <= 31 || v <= -2 && v >= -32:
		return appraise.Affirming
	case v >= 32 && v <= 95 || v <= -33 && v >= -96:
		return appraise.Warning
	}
	return appraise.Contraindicated
}

// advice is what to do about a reason. Every code of package appraise and of the
// store has some: advice_test.go.
var advice = map[string]string{
	// Of the evidence.
	"no-evidence":        "See whether virt-trust-agent runs on the host and reaches this Verifier: systemctl status virt-trust-agent.",
	"result-expired":     "No evidence came in time. See whether the host is up and virt-trust-agent reaches this Verifier. Nothing is known of it until then.",
	"node-not-active":    "The node waits for approval, or was revoked: it gets no rounds.",
	"evidence-format":    "Agent and Verifier are of versions that do not fit, or something between them changes what is sent. Bring both to one version.",
	"appraisal-failed":   "The Verifier itself failed over this evidence; its log says where. Keep the round and report it.",
	"nonce-wrong":        "The evidence answers another question than this Verifier asked: replayed, or another node's. If it comes again, take the host out of service and look who sends it.",
	"nonce-expired":      "The evidence took too long. See the host's load, its TPM and the network between; if it comes again, suspect that someone holds it up.",
	"quote-invalid":      "Not a quote of a TPM. Treat the host as taken over until it is explained.",
	"quote-signature":    "Another key than the enrolled AK signed: another TPM answered, or the AK was swapped. Take the host out of service; revoke it and enrol it anew once explained.",
	"quote-binding":      "The report is not the one that was quoted: changed on its way or by the agent. Treat the host as taken over.",
	"ak-other":           "The report names another AK than the enrolled one. If the TPM was replaced, revoke the node and enrol it anew.",
	"quote-over-no-pcrs": "The quote says nothing about the host's state. Treat it as an attempt to deceive.",
	"quote-wrong-bank":   "Set the PCR bank in virt-trustd.toml to that of this Verifier's policy.",
	"quote-lacks-pcrs":   "PCRs that the policy wants were not quoted. Bring virt-trustd to the version of this Verifier.",
	"pcr-values-forged":  "The PCR values sent are not those that the TPM signed. Treat the host as taken over.",
	// Of time.
	"clock-went-back":  "The TPM's clock or counters are behind those of the round before: old evidence, a reset TPM, or another one. Compare with the host's own journal.",
	"reset-count":      "The TPM saw another number of boots than the host tells. Compare with 'last -x reboot' on the host.",
	"host-clock-wrong": "Set the host's clock (timedatectl); certificates and evidence depend on it.",
	// Of the boot.
	"event-log-missing":         "The firmware's event log was not readable: see that securityfs is mounted, and the firmware has measured boot turned on.",
	"event-log-format":          "The event log cannot be read. Update the firmware; keep the round if it comes again.",
	"event-log-does-not-replay": "The log does not lead to what the TPM holds: entries were changed, dropped or added. Boot the host from known media and compare.",
	"event-unknown":             "Something ran at boot that nobody approved. If an update explains it, approve it; else boot from known media.",
	"event-missing":             "Something that always runs at boot did not. If a change of firmware or boot loader explains it, approve; else look at the host's firmware.",
	"event-order":               "An event stands where it cannot be: the log was written by something else than firmware. Treat the host as taken over.",
	"firmware-error":            "The firmware reports that it failed to start properly. Look at its own log; update or reset it.",
	"host-pcr-other":            "A PCR is not what its Reference Value says. If an update explains it, approve the change; else boot from known media.",
	"host-no-values":            "There are no Reference Values for this host: import some, or let its first round be learned.",
	"log-rewritten":             "A log that only grows was shortened or rewritten within one boot. Treat the host as taken over.",
	"log-incomplete":            "A part of a log is still to come. If it stays so for several rounds, see the limits in agent.toml.",
	"policy-changed":            "The policy changed; the host sends everything again in its next round.",
	// Of files.
	"ima-missing":         "The kernel measures no files. Boot with an IMA policy (ima_policy=tcb or one of your own).",
	"ima-format":          "The measurement list cannot be read. See the kernel's ima_template.",
	"ima-does-not-replay": "The list does not lead to what the TPM holds: entries were changed or dropped. Treat the host as taken over.",
	"ima-unknown":         "A file ran that nobody approved. If a package or you put it there, approve it; else find out who did.",
	"ima-changed":         "A known file has another content. If an update explains it, import the package's checksums; else restore the file and find out who changed it.",
	"ima-violation":       "A file was written while it was measured: nobody can say what ran. Look which program writes it.",
	"ima-boot-aggregate":  "The list belongs to another boot than the quote. Reboot the host; if it stays so, treat it as taken over.",
	"ima-withdrawn":       "A file ran whose approval was taken back. Update it, and reboot the host.",
	"more-findings":       "There are more findings than are kept: mend the first ones, the rest will show.",
	"ima-too-many":        "There are more findings than are kept: mend the first ones, the rest will show.",
	// Of launchers.
	"launch-log-missing":         "virt-trustd sent no launch log: see that it runs (virt-trust status).",
	"launch-log-format":          "The launch log cannot be read. Bring virt-trustd to the version of this Verifier.",
	"launch-log-does-not-replay": "The launch log does not lead to its PCR: entries were changed or dropped. Treat the host as taken over; reboot to begin a new log.",
	"launch-log-gap":             "The launch log lacks entries. Reboot the host to begin a new one; find out what removed them.",
	"launch-log-other-boot":      "The launch log is of another boot. Restart virt-trustd; if it stays so, reboot the host.",
	"launch-pcr-other":           "The host measures launchers into another PCR than the policy's launch_pcr: make them agree.",
	"launch-pcr-before":          "Something was measured into the launch PCR before virt-trustd began its log. If that is right on this host, approve it; else give launcher.pcr one that nothing else uses.",
	"launcher-unknown":           "QEMU, firmware or swtpm ran in a version that nobody approved. If an update explains it, approve it or import the package's checksums; else reinstall the package and restart the VM.",
	"vtpm-list-state":            "The host's vTPM list is not readable in this state: see 'virt-trust status' on the host.",
	"audit-mode":                 "virt-trustd only logs what it would refuse. Set mode = \"enforce\" in virt-trustd.toml.",
	// Of VMs.
	"host":                 "Mend the host: a VM is never better than what it runs on.",
	"vm-hidden":            "The VM was started in this boot and the report is silent about it. Look for it on the host (virsh list --all); treat the host as taken over until it is explained.",
	"vm-never-started":     "The host says that it runs, and its launch log has no start of it. Restart the VM through libvirt.",
	"vm-other-start":       "The launch log's start is not the one in the vTPM list. Restart the VM through libvirt.",
	"vm-state":             "Its record is in no state in which it may run: see 'virt-trust show' on the host.",
	"vm-ek-other":          "The VM has another vTPM than before. If it was made anew on purpose, approve it; else restore the right one (virt-trust repair).",
	"vm-ek-shared":         "Two VMs have one vTPM: one is a copy. Stop both, find out which is the original, and make the other a vTPM of its own.",
	"vm-runs-twice":        "Two nodes have this VM running: one of them has a copy of it. Stop the one that is none of yours; revoke its node if you cannot explain it.",
	"vm-elsewhere":         "Another node has a VM of this UUID with another vTPM, and nothing is learned of either. Find out whose it is; delete the other there, reject what it taught, or revoke its node if that is gone.",
	"vm-moved":             "The VM was on another node with another vTPM. If it was made anew here on purpose, nothing is to be done; else bring it here with its vTPM.",
	"vm-pcrs-missing":      "Its PCRs could not be read: see 'virt-trust show' on the host.",
	"vm-pcr-other":         "The guest booted something that nobody approved. If an update in the guest explains it, approve the change; else restore the guest from a known image.",
	"vm-no-values":         "There are no Reference Values for this VM: approve what it shows now, or import some.",
	"vm-starting":          "It has just been started. Its next round will tell.",
	"vm-quote":             "The quote out of its vTPM is not right: another key signed, or it is old. Restart the VM; if it stays so, look at its vTPM.",
	"vm-reading-other":     "What the host read and what the vTPM signed differ: one of them lies. Treat the host as taken over until it is explained.",
	"vm-started-unguarded": "It was started although something was wrong (audit mode, or an admin's word). See its last verdict on the host.",
	"vm-not-running":       "Start it to have it appraised.",
}

// adviceFor gives what to do; a code that is newer than this page has the host's
// own words at least.
func adviceFor(code string) string {
	if a := advice[code]; a != "" {
		return a
	}
	return "See virt-trust-verifier(8) for this reason code."
}

// finding is a reason with what to do about it.
type finding struct {
	appraise.Reason
	Do      string
	Inherit bool // it is the host's
}

// inherited says whether a VM's reason is really its host's.
func inherited(code string) bool {
	return code == appraise.CodeHost || code == store.CodeExpired || code == store.CodeInactive
}

func findings(rs []appraise.Reason) []finding {
	out := make([]finding, 0, len(rs))
	for _, r := range rs {
		out = append(out, finding{r, adviceFor(r.Code), inherited(r.Code)})
	}
	return out
}

// logName is a log in words.
func logName(kind string) string {
	switch kind {
	case "tcg-event-log":
		return "firmware event log"
	case "ima":
		return "IMA measurement list"
	case "launch-log":
		return "launch log"
	}
	return kind
}

// Where says where in the logs the finding stands.
func (f finding) Where() string {
	var parts []string
	if f.Log != "" {
		parts = append(parts, logName(f.Log))
	}
	if f.Entry != nil {
		parts = append(parts, fmt.Sprintf("entry %d", *f.Entry+1))
	}
	if f.PCR != nil {
		parts = append(parts, fmt.Sprintf("PCR %d", *f.PCR))
	}
	return strings.Join(parts, ", ")
}

// changeMark is the sign of a kind of change.
func changeMark(kind string) string {
	switch kind {
	case "vm-started", "vm-new":
		return "+"
	case "vm-stopped", "vm-gone":
		return "−"
	case "reboot":
		return "↻"
	}
	return "±"
}

// changeWords is a kind of change in words.
func changeWords(kind string) string {
	w := map[string]string{
		"tier": "trust", "reboot": "reboot", "event": "boot event", "ima-entry": "file measured", "launcher": "launcher",
		"vm-started": "VM started", "vm-stopped": "VM stopped", "vm-new": "new VM", "vm-gone": "VM gone", "pcr": "PCR",
	}[kind]
	if w == "" {
		return kind
	}
	return w
}
