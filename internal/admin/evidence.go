package admin

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"virt-trust/internal/bus"
	"virt-trust/internal/evidence/report"
)

// Evidence is what evidence --json shows: what the host says, checked in form
// and not appraised.
type Evidence struct {
	Nonce     string         `json:"nonce"`
	Time      time.Time      `json:"time"`
	AK        string         `json:"ak"` // Name
	BootID    string         `json:"boot_id"`
	Host      EvidenceHost   `json:"host"`
	PCRs      []EvidencePCRs `json:"pcrs"`
	Attest    string         `json:"attest"`
	Signature string         `json:"signature"`
	Logs      []EvidenceLog  `json:"logs"`
	VMs       []EvidenceVM   `json:"vms"`
	Deleted   []EvidenceGone `json:"deleted"`
}

// EvidenceHost is report.Host.
type EvidenceHost struct {
	Name           string `json:"name"`
	Software       string `json:"software"`
	Mode           string `json:"mode"`
	ListState      string `json:"list_state"`
	ListGeneration uint64 `json:"list_generation"`
	ListCounter    uint64 `json:"list_counter"`
	LaunchPCR      uint   `json:"launch_pcr"`
	LaunchLog      string `json:"launch_log"`
	Kernel         string `json:"kernel"`
}

// EvidencePCRs is a bank.
type EvidencePCRs struct {
	Bank   string          `json:"bank"`
	Values map[uint]string `json:"values"`
}

// EvidenceLog says how much of a log there is.
type EvidenceLog struct {
	Kind    string `json:"kind"`
	From    uint64 `json:"from"`
	Bytes   int    `json:"bytes"`
	More    bool   `json:"more"`
	Problem string `json:"problem,omitempty"`
}

// EvidenceVM is report.VM.
type EvidenceVM struct {
	UUID          string         `json:"uuid"`
	Name          string         `json:"name"`
	State         string         `json:"state"`
	Running       bool           `json:"running"`
	Generation    uint64         `json:"generation"`
	EK            string         `json:"ek,omitempty"`
	EKCertificate bool           `json:"ek_certificate"`
	Verdict       string         `json:"verdict,omitempty"`
	Reason        string         `json:"reason,omitempty"`
	Reader        string         `json:"reader,omitempty"`
	PCRs          []EvidencePCRs `json:"pcrs,omitempty"`
	Quoted        bool           `json:"quoted"` // by the AK in the vTPM
	Problem       string         `json:"problem,omitempty"`
}

// EvidenceGone is a VM whose record ended in this boot.
type EvidenceGone struct {
	UUID string    `json:"uuid"`
	Time time.Time `json:"time"`
	Why  string    `json:"why"`
}

func (c *Command) evidenceCommand() *cobra.Command {
	var nonceHex, out string
	cmd := &cobra.Command{
		Use:   "evidence",
		Short: "Take evidence of this host and its VMs, as a Verifier gets it",
		Long: "Has the host's TPM quote its PCRs over a report of all VMs, and adds the host's logs. The result is CBOR, as 'virt-trust appraise' and a Verifier read it; " +
			"without -o it goes to standard output. --json shows what it says, without judging it.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			nonce := make([]byte, report.NonceSize)
			rand.Read(nonce)
			if nonceHex != "" {
				var err error
				if nonce, err = hex.DecodeString(nonceHex); err != nil || len(nonce) < 16 || len(nonce) > 64 {
					return &exit{ExitUsage, errors.New("--nonce: 16 to 64 bytes in hexadecimal are wanted")}
				}
			}
			if f, ok := c.Stdout.(*os.File); ok && out == "" && !c.json && isTerminal(f) {
				return &exit{ExitUsage, errors.New("evidence is not for a terminal: -o FILE writes it, --json shows it")}
			}
			b, err := fetchEvidence(cmd.Context(), nonce)
			if err != nil {
				return err
			}
			if out != "" {
				if err := writeWhole(out, b); err != nil {
					return err
				}
			}
			if c.json {
				e, err := newEvidence(b)
				if err != nil {
					return err
				}
				return c.print(e, nil)
			}
			if out == "" {
				_, err = c.Stdout.Write(b)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&nonceHex, "nonce", "", "the Verifier's, in hexadecimal; random by default")
	cmd.Flags().StringVarP(&out, "output", "o", "", "write it to this file")
	return cmd
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func fetchEvidence(ctx context.Context, nonce []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, workTimeout)
	defer cancel()
	client, err := bus.DialForDescriptors(ctx)
	if err != nil {
		return nil, bus.Unreachable(err.Error())
	}
	defer client.Close()
	b, err := client.Evidence(ctx, nonce, bus.Have{}, report.MaxEvidence)
	if errors.Is(err, bus.ErrAccessDenied) {
		return nil, fmt.Errorf("%w: evidence is for root", bus.ErrAccessDenied)
	}
	return b, err
}

// writeWhole writes a file that is there whole, or as it was.
func writeWhole(name string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

func newEvidence(b []byte) (*Evidence, error) {
	e, err := report.UntrustedParse(b)
	if err != nil {
		return nil, err
	}
	r, err := report.UntrustedParseReport(e.Report)
	if err != nil {
		return nil, err
	}
	v := &Evidence{
		Nonce: hex.EncodeToString(e.Nonce), Time: time.UnixMicro(r.Time).UTC(), AK: hex.EncodeToString(r.AK), BootID: r.BootID,
		Host: EvidenceHost(r.Host), PCRs: banks(e.PCRs), Attest: hex.EncodeToString(e.Quote.Attest), Signature: hex.EncodeToString(e.Quote.Signature),
		Logs: []EvidenceLog{}, VMs: []EvidenceVM{}, Deleted: []EvidenceGone{},
	}
	for _, l := range e.Logs {
		v.Logs = append(v.Logs, EvidenceLog{l.Kind, l.From, len(l.Data), l.More, l.Problem})
	}
	for _, m := range r.VMs {
		vm := EvidenceVM{
			UUID: spell(m.UUID), Name: m.Name, State: m.State, Running: m.Running, Generation: m.Generation, EK: hex.EncodeToString(m.EK),
			EKCertificate: len(m.EKCertificate) > 0, Verdict: m.Verdict, Reason: m.Reason, Quoted: m.Quote != nil, Problem: m.Problem,
		}
		if m.PCRs != nil {
			vm.Reader, vm.PCRs = m.PCRs.Reader, banks(m.PCRs.Banks)
		}
		v.VMs = append(v.VMs, vm)
	}
	for _, d := range r.Deleted {
		v.Deleted = append(v.Deleted, EvidenceGone{spell(d.UUID), time.UnixMicro(d.Time).UTC(), d.Why})
	}
	return v, nil
}

func spell(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

func banks(all []report.Bank) []EvidencePCRs {
	out := []EvidencePCRs{}
	for _, b := range all {
		p := EvidencePCRs{Bank: b.Algorithm, Values: map[uint]string{}}
		for i, v := range b.Values.All() {
			p.Values[i] = hex.EncodeToString(v)
		}
		out = append(out, p)
	}
	return out
}
