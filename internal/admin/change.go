package admin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"

	"virt-trust/internal/bus"
	"virt-trust/internal/vtpm/reason"
)

// Change is what came of a change for one VM.
type Change struct {
	VM     string `json:"vm"` // as it was asked for
	UUID   string `json:"uuid,omitempty"`
	Name   string `json:"name,omitempty"`
	Done   bool   `json:"done"`
	What   string `json:"what,omitempty"`
	Reason string `json:"reason,omitempty"` // of a refusal
}

// released is list.Released as the bus spells it.
const released = "released"

func (c *Command) changeCommands() []*cobra.Command {
	var repairList, rolledBack, listRolledBack bool
	adopt := c.changeCommand("adopt", "Adopt", "Take a VM that is off into the list as it is",
		"Takes a VM that is off into the list as it is: a plain vTPM is encrypted in place, an image that was copied or overlaid gets a new label.")
	release := c.changeCommand("release", "Release", "Give a VM that is off back to plain libvirt",
		"Gives a VM that is off back to plain libvirt: its vTPM is decrypted in place, label and record are removed.")

	repair := &cobra.Command{
		Use:               "repair VM | --list",
		Short:             "Put back what the list expects of a VM, or the list itself",
		Long:              "Puts back the kept vTPM state and the label of a VM that is off. With --list it writes the list file back or rebuilds it from labels.",
		ValidArgsFunction: completeVMs,
		Args: func(_ *cobra.Command, args []string) error {
			if repairList == (len(args) == 1) || len(args) > 1 {
				return errors.New("name one VM, or --list")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			vm := ""
			if !repairList {
				vm = args[0]
				if vm == "" { // which would mean the list
					return &exit{ExitUsage, errors.New("the VM's name is empty")}
				}
			}
			return c.one(cmd.Context(), "Repair", vm, nil)
		},
	}
	repair.Flags().BoolVar(&repairList, "list", false, "the vTPM list itself")

	accept := &cobra.Command{
		Use:   "accept VM --rolled-back | --list-rolled-back",
		Short: "Take an older vTPM of a VM, or an older list, for right",
		Long: "Takes the vTPM state and the label that are there, older ones of this VM's own, for right: after a restore from a backup, for example. " +
			"With --list-rolled-back it takes the vTPM list that is there; each VM is then held against it.",
		ValidArgsFunction: completeVMs,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case rolledBack == listRolledBack:
				return errors.New("say what is accepted: --rolled-back or --list-rolled-back")
			case rolledBack && len(args) != 1:
				return errors.New("name one VM")
			case listRolledBack && len(args) > 0:
				return errors.New("--list-rolled-back is for all VMs")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			vm, option := "", "list-rolled-back"
			if rolledBack {
				vm, option = args[0], "rolled-back"
				if vm == "" {
					return &exit{ExitUsage, errors.New("the VM's name is empty")}
				}
			}
			return c.one(cmd.Context(), "Accept", vm, map[string]dbus.Variant{option: dbus.MakeVariant(true)})
		},
	}
	accept.Flags().BoolVar(&rolledBack, "rolled-back", false, "an older state or label of this VM's own vTPM")
	accept.Flags().BoolVar(&listRolledBack, "list-rolled-back", false, "an older vTPM list")
	return []*cobra.Command{adopt, release, repair, accept}
}

// changeCommand makes adopt and release, which take a VM or --all.
func (c *Command) changeCommand(use, method, short, long string) *cobra.Command {
	var all, fresh bool
	cmd := &cobra.Command{
		Use: use + " VM | --all", Short: short, Long: long,
		Args: vmOrAll(&all), ValidArgsFunction: completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case all && fresh:
				return &exit{ExitUsage, errors.New("--new is for one VM")}
			case all:
				return c.every(cmd.Context(), method)
			case fresh:
				return c.one(cmd.Context(), method, args[0], map[string]dbus.Variant{"new": dbus.MakeVariant(true)})
			}
			return c.one(cmd.Context(), method, args[0], nil)
		},
	}
	if method == "Adopt" {
		cmd.Use = use + " [--new] VM | --all"
		cmd.Flags().BoolVar(&fresh, "new", false, "give the VM a new, empty vTPM in place of one that is lost")
	}
	which := map[string]string{"Adopt": "all VMs with vTPM state that the list does not know", "Release": "all VMs of the list"}
	cmd.Flags().BoolVar(&all, "all", false, which[method])
	return cmd
}

func (g *guard) changeVM(ctx context.Context, method, vm string, options map[string]dbus.Variant) (Change, error) {
	if options == nil {
		options = map[string]dbus.Variant{}
	}
	p, err := g.change(ctx, method, vm, options)
	if err != nil {
		ch := Change{VM: vm, What: reason.OneLine(err.Error())}
		if r := reason.As(err); r != nil {
			ch.Reason, ch.What = string(r.Code), r.Text()
		}
		return ch, err
	}
	return Change{VM: vm, UUID: p.text("uuid"), Name: p.text("name"), Done: true, What: p.text("what")}, nil
}

func (ch Change) write(w io.Writer) {
	name := ch.Name
	if name == "" {
		name = ch.VM
	}
	if name == "" {
		name = "vTPM list"
	}
	switch {
	case ch.Reason != "":
		fmt.Fprintf(w, "%s: refused: %s: %s\n", name, ch.Reason, ch.What)
	case !ch.Done:
		fmt.Fprintf(w, "%s: failed: %s\n", name, ch.What)
	case ch.What != "":
		fmt.Fprintf(w, "%s: %s\n", name, ch.What)
	default:
		fmt.Fprintf(w, "%s: done\n", name)
	}
}

// one does one change. In text, what went wrong is standard error's alone.
func (c *Command) one(ctx context.Context, method, vm string, options map[string]dbus.Variant) error {
	return withGuard(ctx, workTimeout, func(ctx context.Context, g *guard) error {
		ch, err := g.changeVM(ctx, method, vm, options)
		if err != nil && !c.json {
			return err
		}
		return errors.Join(c.print(ch, ch.write), err)
	})
}

// every does a change for all VMs that it is for, and goes on after a refusal.
func (c *Command) every(ctx context.Context, method string) error {
	var todo []target
	err := withGuard(ctx, readTimeout, func(ctx context.Context, g *guard) error {
		m, err := g.manager(ctx)
		if err != nil {
			return err
		}
		if !m.listKnown() { // "all" would be none
			return m.listRefusal()
		}
		known, err := g.vms(ctx)
		if err != nil {
			return err
		}
		// A released VM stays in the list, so that its next start does not adopt it.
		guarded := func(vm VM) bool { return vm.State != released }
		if method == "Release" {
			todo = targets(slices.DeleteFunc(known, func(vm VM) bool { return !guarded(vm) }), nil)
			return nil
		}
		folders, err := c.stateFolders()
		folders = slices.DeleteFunc(folders, func(uuid string) bool {
			return slices.ContainsFunc(known, func(vm VM) bool { return vm.UUID == uuid })
		})
		todo = targets(slices.DeleteFunc(known, guarded), folders)
		return err
	})
	if err != nil {
		return err
	}
	return c.each(ctx, method, todo)
}

// each does a change for VMs, one after the other.
func (c *Command) each(ctx context.Context, method string, todo []target) error {
	changes := []Change{}
	var refused, failed int
	for i, t := range todo {
		name := t.name
		if name == "" {
			name = t.uuid
		}
		fmt.Fprintf(c.Stderr, "%d of %d: %s\n", i+1, len(todo), name)
		var ch Change
		err := withGuard(ctx, workTimeout, func(ctx context.Context, g *guard) (err error) {
			ch, err = g.changeVM(ctx, method, t.uuid, nil)
			return err
		})
		switch {
		case err == nil:
		case t.name == "" && errors.Is(err, bus.ErrNotFound):
			ch.What = "left-over state: libvirt has no such VM"
		case ctx.Err() != nil:
			return ctx.Err()
		case ch.Reason != "" && reason.Code(ch.Reason) != reason.HelperUnreachable:
			refused++
		default:
			failed++
		}
		if ch.UUID == "" {
			ch.UUID, ch.Name = t.uuid, t.name
		}
		changes = append(changes, ch)
	}
	err := c.print(changes, func(w io.Writer) {
		for _, ch := range changes {
			ch.write(w)
		}
	})
	switch {
	case err != nil:
		return err
	case failed > 0:
		return &exit{ExitFailed, fmt.Errorf("failed for %s", plural(uint64(failed), "VM", "VMs"))}
	case refused > 0:
		return &exit{ExitRefused, fmt.Errorf("refused for %s", plural(uint64(refused), "VM", "VMs"))}
	}
	return nil
}
