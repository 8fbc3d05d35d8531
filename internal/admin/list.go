package admin

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// List is the answer of virt-trust list. While the list cannot be read, VMs
// is what virt-trustd still knows, and the rest says why, and what there is.
type List struct {
	VMs          []VM     `json:"vms"`
	State        string   `json:"list_state"`
	Problem      string   `json:"list_problem,omitempty"`
	Generation   uint64   `json:"list_generation"`
	Differing    []uint32 `json:"differing_pcrs,omitempty"`
	StateFolders []string `json:"state_folders,omitempty"` // UUIDs
}

func (c *Command) listCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the VMs that are guarded",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var l List
			var refused error
			err := withGuard(cmd.Context(), readTimeout, func(ctx context.Context, g *guard) error {
				m, err := g.manager(ctx)
				if err != nil {
					return err
				}
				l.State, l.Problem, l.Generation = m.ListState, m.ListProblem, m.Generation
				if l.VMs, err = g.vms(ctx); err != nil || m.listKnown() {
					return err
				}
				refused = m.listRefusal()
				host, err := g.host(ctx)
				l.Differing = host.DifferingPCRs
				return err
			})
			if err != nil {
				return err
			}
			if refused != nil {
				if l.StateFolders, err = c.stateFolders(); err != nil {
					fmt.Fprintf(c.Stderr, "virt-trust: the folders of vTPM states: %v\n", err)
				}
			}
			if err := c.print(l, l.write); err != nil {
				return err
			}
			if refused != nil {
				return &exit{ExitRefused, refused}
			}
			return nil
		},
	}
}

func (l List) write(w io.Writer) {
	if len(l.VMs) > 0 {
		rows := [][]string{{"NAME", "UUID", "STATE", "LABEL", "KEY", "LAST"}}
		for _, vm := range l.VMs {
			last := vm.LastVerdict
			if vm.LastReason != "" {
				last += " (" + vm.LastReason + ")"
			}
			rows = append(rows, []string{vm.Name, vm.UUID, vm.State, vm.LabelState, vm.KeyOwner, last})
		}
		table(w, rows)
		l.writeShared(w)
	}
	switch {
	case l.State == "empty" || l.State == "readable":
		return
	case len(l.VMs) > 0:
		fmt.Fprintln(w)
	}
	fields(w,
		"vTPM list", fmt.Sprintf("%s, generation %d", l.State, l.Generation),
		"Problem", l.Problem,
		"PCRs that differ", numbers(l.Differing),
	)
	for i, uuid := range l.StateFolders {
		if i == 0 {
			fmt.Fprintln(w, "vTPM state that is there, of VMs:")
		}
		fmt.Fprintln(w, "  "+uuid)
	}
}

// writeShared names VMs whose vTPMs are copies of one another.
func (l List) writeShared(w io.Writer) {
	first := true
	for _, vm := range l.VMs {
		if len(vm.EKSharedWith) == 0 {
			continue
		}
		if first {
			fmt.Fprintln(w, "\nvTPMs that are copies of one another, by their endorsement keys:")
		}
		first = false
		fmt.Fprintf(w, "  %s (%s) and %s\n", vm.Name, vm.UUID, strings.Join(vm.EKSharedWith, ", "))
	}
}

func (c *Command) showCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "show VM",
		Short:             "Show what is known of a VM, by its name or UUID",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			var vm VM
			err := withGuard(cmd.Context(), readTimeout, func(ctx context.Context, g *guard) error {
				path, err := g.find(ctx, args[0])
				if err != nil {
					return err
				}
				p, err := g.properties(ctx, path, vmInterface)
				vm = newVM(p)
				return err
			})
			if err != nil {
				return err
			}
			return c.print(vm, vm.write)
		},
	}
}

func (vm VM) write(w io.Writer) {
	label := vm.LabelState
	switch {
	case vm.LabelPath != "":
		label += ", in " + vm.LabelPath
	case vm.KeyOwner == "virt-trust" && vm.State != released:
		label += ": no qcow2 disk can carry one; the wrapped keys are in the vTPM list alone"
	}
	key := vm.KeyOwner
	if key == "libvirt" {
		key += " (an <encryption> secret of the VM's own)"
	}
	recovery := map[string]string{"wrapped": "its keys are wrapped to the recovery key", "none": "its keys are not wrapped to a recovery key"}[vm.Recovery]
	if vm.KeyOwner == "libvirt" || vm.State == released {
		recovery = ""
	}
	last := vm.LastVerdict
	if vm.LastReason != "" {
		last += ", " + vm.LastReason
	}
	if vm.LastWhat != "" {
		last += ": " + vm.LastWhat
	}
	certificate := vm.EKOrigin
	if certificate == "" && vm.EKDigest != "" {
		certificate = "none"
	}
	reverts := ""
	if vm.Reverts > 0 {
		reverts = fmt.Sprintf("%s, last %s", plural(vm.Reverts, "time", "times"), local(vm.Reverted))
	}
	fields(w,
		"Name", vm.Name,
		"UUID", vm.UUID,
		"State", vm.State,
		"vTPM", vm.StatePath,
		"Baseline", vm.Baseline,
		"EK digest", vm.EKDigest,
		"EK certificate", certificate,
		"Same EK as", strings.Join(vm.EKSharedWith, " "),
		"Key", key,
		"Recovery", recovery,
		"Label", label,
		"Label id", vm.LabelID,
		"Starts", fmt.Sprint(vm.Generation),
		"Created", local(vm.Created),
		"Changed", local(vm.Changed),
		"Reverted", reverts,
		"Last decision", last,
	)
}
