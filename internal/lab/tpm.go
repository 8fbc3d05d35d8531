package lab

import (
	"fmt"
	"strings"
	"time"
)

// ExtendPCR extends a PCR (bank sha256) of the host's TPM, as a boot into
// another state would.
func (h *Host) ExtendPCR(pcr int) {
	h.t.Helper()
	h.Must("tpm2_pcrextend", "-T", "swtpm:path="+TPMSocket, fmt.Sprintf("%d:sha256=%s", pcr, randomHex(32)))
}

// RestartTPM does to the TPM what a reboot of the host does: the PCRs start
// anew, connections break.
func (h *Host) RestartTPM() {
	h.t.Helper()
	h.Must("systemctl", "restart", "hosttpm.service", "hosttpm-mux.service")
}

// StopTPM takes the TPM away; StartTPM brings it back, with new PCRs.
func (h *Host) StopTPM() {
	h.t.Helper()
	h.Must("systemctl", "stop", "hosttpm-mux.service", "hosttpm.service")
}

// StartTPM is the end of StopTPM.
func (h *Host) StartTPM() {
	h.t.Helper()
	h.Must("systemctl", "start", "hosttpm.service", "hosttpm-mux.service")
}

// ClearTPM clears the TPM by its platform hierarchy, as firmware does: all
// that belongs to the owner is gone.
func (h *Host) ClearTPM() {
	h.t.Helper()
	h.Must("tpm2_clear", "-T", "swtpm:path="+TPMSocket, "-c", "p")
}

// ReplaceTPM puts another, new TPM into the host.
func (h *Host) ReplaceTPM() {
	h.t.Helper()
	h.StopTPM()
	h.Shell("rm -rf " + tpmState + "/*")
	h.StartTPM()
}

// SlowTPM makes each of the TPM's commands take so much longer, as discrete
// TPMs do; 0 ends that.
func (h *Host) SlowTPM(by time.Duration) {
	h.t.Helper()
	h.WriteFile(TPMSocket+".delay", []byte(by.String()), 0o600)
}

// BusyTPM says how many commands the slowed TPM was at between two instants,
// and for how long.
func (h *Host) BusyTPM(from, to time.Time) (commands int, busy time.Duration) {
	h.t.Helper()
	for line := range strings.Lines(string(h.ReadFile(TPMSocket + ".log"))) {
		var began, ended int64
		if _, err := fmt.Sscan(line, &began, &ended); err != nil {
			h.t.Fatalf("lab: the TPM's log: %q", line)
		}
		began, ended = max(began, from.UnixMicro()), min(ended, to.UnixMicro())
		if began < ended {
			commands++
			busy += time.Duration(ended-began) * time.Microsecond
		}
	}
	return commands, busy
}
