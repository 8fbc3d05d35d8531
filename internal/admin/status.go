package admin

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
)

// Status is the answer of virt-trust status.
type Status struct {
	Manager
	Host Host `json:"host"`
}

func (c *Command) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show how virt-trustd, the host's TPM and libvirt stand",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var s Status
			err := withGuard(cmd.Context(), readTimeout, func(ctx context.Context, g *guard) (err error) {
				if s.Manager, err = g.manager(ctx); err != nil {
					return err
				}
				s.Host, err = g.host(ctx)
				return err
			})
			if err != nil {
				return notAppraised(err)
			}
			if err := c.print(s, s.write); err != nil {
				return err
			}
			return s.verdict()
		},
	}
}

// verdict: whether a VM that belongs here would start, and would be guarded.
func (s Status) verdict() error {
	switch {
	case s.Host.State == "not-approved":
		return &exit{code: ExitRefused}
	case s.Host.State != "ready":
		return &exit{code: ExitNotAppraised}
	case !s.listKnown(), s.Libvirt == "restart-needed", s.Libvirt == "hook-missing":
		return &exit{code: ExitRefused}
	}
	return nil
}

func (s Status) write(w io.Writer) {
	libvirt := s.Libvirt
	switch libvirt {
	case "restart-needed":
		libvirt += ": systemctl restart libvirtd (running VMs go on)"
	case "hook-missing":
		libvirt += ": /etc/libvirt/hooks/qemu.d/50-virt-trust does not lead to the hook; reinstall virt-trust"
	}
	list := s.ListState
	if s.listKnown() {
		list = fmt.Sprintf("%s, %s, generation %d", s.ListState, plural(s.VMs, "VM", "VMs"), s.Generation)
	}
	launchLog := s.LaunchLog
	if s.LaunchLogProblem != "" {
		launchLog += ": " + s.LaunchLogProblem
	}
	tpm := s.Host.Device
	if s.Host.Manufacturer != "" {
		tpm += " (" + s.Host.Manufacturer + ")"
	}
	fields(w,
		"virt-trustd", s.Version+", "+s.Mode,
		"libvirt", libvirt,
		"Host", s.Host.State,
		"Problem", s.Host.Problem,
		"PCRs", s.Host.Bank+" "+numbers(s.Host.PCRs),
		"PCRs that differ", numbers(s.Host.DifferingPCRs),
		"Next boot", s.Host.nextBoot(),
		"TPM", tpm,
		"vTPM list", list,
		"List's problem", s.ListProblem,
		"Launch log", launchLog,
		"Rollback", s.Manager.rollback(),
		"Recovery key", recoveryAdvice(s.Recovery),
	)
}

// rollback says how soon an older list is noticed, and what that costs the TPM.
func (m Manager) rollback() string {
	if m.Counter == 0 {
		return ""
	}
	when := "at once"
	if m.RaisedWithin > 0 {
		when = "within " + (time.Duration(m.RaisedWithin) * time.Microsecond).Round(time.Second/10).String()
	}
	s := fmt.Sprintf("older lists noticed %s; counter %d, %s left at once, %d a year", when, m.Counter, plural(m.RaisesLeft, "raise", "raises"), m.RaisesPerYear)
	if m.RaiseDue {
		s += "; a raise is due"
	}
	return s
}
