package admin

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"

	"virt-trust/internal/bus"
)

const vmInterface = bus.VMInterface

// find gives the object of a VM from its name or UUID.
func (g *guard) find(ctx context.Context, vm string) (path dbus.ObjectPath, err error) {
	err = g.Call(ctx, "GetVM", []any{vm}, &path)
	return path, err
}

// Verdict is the answer of virt-trust check: whether a VM would start now.
type Verdict struct {
	VM      string `json:"vm"` // as it was asked for
	UUID    string `json:"uuid,omitempty"`
	Name    string `json:"name,omitempty"`
	Verdict string `json:"verdict"` // start, refuse, none
	Reason  string `json:"reason,omitempty"`
	What    string `json:"what,omitempty"`
	Mend    string `json:"mend,omitempty"`
}

func (c *Command) checkCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:               "check VM | --all",
		Short:             "Tell whether a VM would start now and, if not, why and what to do",
		Args:              vmOrAll(&all),
		ValidArgsFunction: completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return withGuard(cmd.Context(), workTimeout, func(ctx context.Context, g *guard) error {
				if !all {
					v, err := g.check(ctx, args[0])
					if err != nil {
						return notAppraised(err)
					}
					if err := c.print(v, v.write); err != nil {
						return err
					}
					return v.exit()
				}
				return c.checkAll(ctx, g)
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all VMs that are in the list or have vTPM state")
	return cmd
}

func (c *Command) checkAll(ctx context.Context, g *guard) error {
	known, err := g.vms(ctx)
	if err != nil {
		return notAppraised(err)
	}
	folders, err := c.stateFolders()
	if err != nil {
		fmt.Fprintf(c.Stderr, "virt-trust: only VMs of the list are checked: %v\n", err)
	}
	verdicts := []Verdict{}
	var worst error
	for _, t := range targets(known, folders) {
		v, err := g.check(ctx, t.uuid)
		switch {
		case t.name == "" && errors.Is(err, bus.ErrNotFound):
			continue // left-over state of a VM that is no more
		case err != nil:
			v = Verdict{VM: t.uuid, UUID: t.uuid, Name: t.name, Verdict: "none", What: err.Error()}
		}
		verdicts = append(verdicts, v)
		if e := v.exit(); e != nil && (worst == nil || v.Verdict == "refuse") {
			worst = e
		}
	}
	err = c.print(verdicts, func(w io.Writer) {
		if len(verdicts) == 0 {
			return
		}
		rows := [][]string{{"NAME", "UUID", "VERDICT", "REASON", "WHAT"}}
		for _, v := range verdicts {
			rows = append(rows, []string{v.Name, v.UUID, v.Verdict, v.Reason, v.What})
		}
		table(w, rows)
	})
	if err != nil {
		return err
	}
	return worst
}

func (g *guard) check(ctx context.Context, vm string) (Verdict, error) {
	var p props
	if err := g.Call(ctx, "Check", []any{vm, map[string]dbus.Variant{}}, &p); err != nil {
		return Verdict{}, err
	}
	v := Verdict{
		VM: vm, UUID: p.text("uuid"), Name: p.text("name"), Verdict: p.text("verdict"),
		Reason: p.text("reason"), What: p.text("what"), Mend: p.text("mend"),
	}
	if v.Verdict != "start" && v.Verdict != "refuse" {
		return v, fmt.Errorf("virt-trustd gave the verdict %q, which this version does not know", v.Verdict)
	}
	return v, nil
}

func (v Verdict) exit() error {
	switch v.Verdict {
	case "start":
		return nil
	case "refuse":
		return &exit{code: ExitRefused}
	}
	return &exit{code: ExitNotAppraised}
}

func (v Verdict) write(w io.Writer) {
	fields(w, "Name", v.Name, "UUID", v.UUID, "Verdict", v.Verdict, "Reason", v.Reason, "What", v.What, "To mend", v.Mend)
}

// vmOrAll wants either one VM or --all.
func vmOrAll(all *bool) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch {
		case *all && len(args) > 0:
			return errors.New("either a VM or --all, not both")
		case !*all && len(args) != 1:
			return errors.New("name one VM, or --all")
		}
		return nil
	}
}

// target is a VM to which something is done; name is "" where only its folder
// is known.
type target struct{ uuid, name string }

// targets are the VMs of the list, then those that only have state.
func targets(known []VM, folders []string) []target {
	var t []target
	seen := map[string]bool{}
	for _, vm := range known {
		t = append(t, target{vm.UUID, vm.Name})
		seen[vm.UUID] = true
	}
	for _, uuid := range folders {
		if !seen[uuid] {
			t = append(t, target{uuid: uuid})
		}
	}
	return t
}
