package admin

import (
	"cmp"
	"context"
	"io"
	"slices"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"
)

// Emulator is what a VM of libvirt's names as its emulator.
type Emulator struct {
	UUID       string `json:"uuid"`
	Name       string `json:"name"`
	Emulator   string `json:"emulator"`
	Adopted    bool   `json:"adopted"`
	Runs       string `json:"runs,omitempty"` // what it runs under now
	VTPM       bool   `json:"vtpm"`
	Persistent bool   `json:"persistent"`
}

func (c *Command) emulatorCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "emulator",
		Short: "Start VMs under virt-trust's emulator, which becomes QEMU",
		Args:  cobra.NoArgs,
		Long:  "virt-trust's emulator hashes the QEMU that it becomes, and asks virt-trustd whether that one may start the VM.",
	}
	list := &cobra.Command{
		Use: "list", Short: "List the emulators that libvirt's VMs name", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := c.emulators(cmd.Context())
			if err != nil {
				return err
			}
			return c.print(all, func(w io.Writer) { writeEmulators(w, all) })
		},
	}
	verb := func(use, method, short, long, which string, is func(Emulator) bool) *cobra.Command {
		var all bool
		cmd := &cobra.Command{
			Use: use + " VM | --all", Short: short, Long: long, Args: vmOrAll(&all), ValidArgsFunction: completeVMs,
			RunE: func(cmd *cobra.Command, args []string) error {
				if !all {
					return c.one(cmd.Context(), method, args[0], nil)
				}
				list, err := c.emulators(cmd.Context())
				if err != nil {
					return err
				}
				todo := []target{}
				for _, e := range list {
					if is(e) {
						todo = append(todo, target{uuid: e.UUID, name: e.Name})
					}
				}
				return c.each(cmd.Context(), method, todo)
			},
		}
		cmd.Flags().BoolVar(&all, "all", false, which)
		return cmd
	}
	cmd.AddCommand(list,
		verb("adopt", "AdoptEmulator", "Make a VM name virt-trust's emulator",
			"Makes a VM's definition name virt-trust's emulator. A VM that runs goes on as it is, until its next start.",
			"all defined VMs that have a vTPM", func(e Emulator) bool { return e.VTPM && e.Persistent && !e.Adopted }),
		verb("restore", "RestoreEmulator", "Make a VM name the emulator that it named before",
			"Makes a VM's definition name the emulator that it named before. A VM that runs goes on as it is, until its next start.",
			"all VMs whose emulator is virt-trust's", func(e Emulator) bool { return e.Adopted && e.Persistent }))
	return cmd
}

// emulators asks what libvirt's VMs name, sorted by name.
func (c *Command) emulators(ctx context.Context) (all []Emulator, err error) {
	err = withGuard(ctx, readTimeout, func(ctx context.Context, g *guard) error {
		var answers []props
		if err := g.Call(ctx, "Emulators", []any{map[string]dbus.Variant{}}, &answers); err != nil {
			return err
		}
		all = []Emulator{}
		for _, p := range answers {
			all = append(all, Emulator{
				UUID: p.text("uuid"), Name: p.text("name"), Emulator: p.text("emulator"), Runs: p.text("runs"),
				Adopted: p.flag("adopted"), VTPM: p.flag("vtpm"), Persistent: p.flag("persistent"),
			})
		}
		slices.SortFunc(all, func(a, b Emulator) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.UUID, b.UUID)) })
		return nil
	})
	return all, err
}

func writeEmulators(w io.Writer, all []Emulator) {
	rows := [][]string{{"NAME", "VTPM", "EMULATOR", "RUNS UNDER"}}
	for _, e := range all {
		rows = append(rows, []string{e.Name, map[bool]string{true: "yes", false: "no"}[e.VTPM], e.Emulator, e.Runs})
	}
	table(w, rows)
}
