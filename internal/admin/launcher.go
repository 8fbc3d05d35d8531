package admin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"
)

// Launcher is one Reference Value: a program, library or firmware that may, or
// may not, run for VMs.
type Launcher struct {
	Path   string     `json:"path,omitempty"` // "" of one that is approved wherever it lies
	SHA256 string     `json:"sha256"`
	State  string     `json:"state"`            // approved, revoked, superseded
	Source string     `json:"source"`           // first-use, package, manifest, admin
	Detail string     `json:"detail,omitempty"` // the package's or manifest's name
	Time   *time.Time `json:"time"`
}

func (c *Command) launcherCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "launcher",
		Short: "Programs and firmware that may run VMs",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return &exit{ExitUsage, errors.New("a command is missing; see 'virt-trust launcher --help'")}
		},
	}
	var digest, signature string
	approve := &cobra.Command{
		Use:   "approve FILE",
		Short: "Approve a file as it is now; this lifts a revocation",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			options := map[string]dbus.Variant{}
			if digest != "" {
				options["sha256"] = dbus.MakeVariant(digest)
			}
			return c.changeLauncher(cmd.Context(), "approved", "ApproveLauncher", path, options)
		},
	}
	approve.Flags().StringVar(&digest, "sha256", "", "refuse unless the file has this digest")
	revoke := &cobra.Command{
		Use:   "revoke FILE | SHA256",
		Short: "Revoke a digest, or that of a file as it is now, wherever it lies",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			what := args[0]
			if !isDigest(what) {
				var err error
				if what, err = filepath.Abs(what); err != nil {
					return err
				}
			}
			return c.changeLauncher(cmd.Context(), "revoked", "RevokeLauncher", what, map[string]dbus.Variant{})
		},
	}
	imports := &cobra.Command{
		Use:   "import MANIFEST",
		Short: "Take a signed manifest; it replaces the one of its name",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if signature == "" {
				signature = args[0] + ".sig"
			}
			return c.importLaunchers(cmd.Context(), args[0], signature)
		},
	}
	imports.Flags().StringVar(&signature, "signature", "", "the signature's file (MANIFEST.sig)")
	cmd.AddCommand(c.launcherListCommand(), approve, revoke, imports, c.launcherResetCommand())
	return cmd
}

func isDigest(s string) bool {
	return len(s) == 64 && strings.Trim(strings.ToLower(s), "0123456789abcdef") == ""
}

func (c *Command) launcherListCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List what is approved and what is revoked",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			launchers := []Launcher{}
			err := withGuard(cmd.Context(), readTimeout, func(ctx context.Context, g *guard) error {
				var raw []props
				if err := g.Call(ctx, "Launchers", []any{map[string]dbus.Variant{}}, &raw); err != nil {
					return err
				}
				for _, p := range raw {
					l := Launcher{Path: p.text("path"), SHA256: p.text("sha256"), State: p.text("state"), Source: p.text("source"), Detail: p.text("detail"), Time: p.time("time")}
					if all || l.State != "superseded" {
						launchers = append(launchers, l)
					}
				}
				return nil
			})
			if err != nil {
				return err
			}
			return c.print(launchers, func(w io.Writer) {
				rows := [][]string{{"SHA256", "STATE", "BY", "SINCE", "FILE"}}
				for _, l := range launchers {
					file := l.Path
					if file == "" {
						file = "(wherever it lies)"
					}
					rows = append(rows, []string{l.SHA256, l.State, strings.TrimSpace(l.Source + " " + l.Detail), local(l.Time), file})
				}
				table(w, rows)
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "also what a package upgrade has superseded")
	return cmd
}

func (c *Command) changeLauncher(ctx context.Context, done, method, what string, options map[string]dbus.Variant) error {
	return withGuard(ctx, workTimeout, func(ctx context.Context, g *guard) error {
		var p props
		if err := g.Call(ctx, method, []any{what, options}, &p); err != nil {
			return err
		}
		l := Launcher{Path: p.text("path"), SHA256: p.text("sha256"), State: done, Source: "admin"}
		return c.print(l, func(w io.Writer) { fmt.Fprintf(w, "%s: %s\n", done, strings.TrimSpace(l.SHA256+" "+l.Path)) })
	})
}

// maxManifest is what virt-trustd takes, in bytes.
const maxManifest = 4 << 20

func (c *Command) importLaunchers(ctx context.Context, manifest, signature string) error {
	m, err := readFile(manifest, maxManifest)
	if err != nil {
		return err
	}
	sig, err := readFile(signature, maxManifest)
	if err != nil {
		return err
	}
	return withGuard(ctx, workTimeout, func(ctx context.Context, g *guard) error {
		var p props
		if err := g.Call(ctx, "ImportLaunchers", []any{m, sig, map[string]dbus.Variant{}}, &p); err != nil {
			return err
		}
		v := struct {
			Name     string `json:"name"`
			Serial   uint64 `json:"serial"`
			Approved uint64 `json:"approved"`
			Revoked  uint64 `json:"revoked"`
		}{p.text("name"), p.number("serial"), p.number("approved"), p.number("revoked")}
		return c.print(v, func(w io.Writer) {
			fmt.Fprintf(w, "%s, serial %d: %d approved, %d revoked\n", v.Name, v.Serial, v.Approved, v.Revoked)
		})
	})
}

func (c *Command) launcherResetCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "reset",
		Short: "Forget all approvals and revocations",
		Long:  "Forgets all approvals and revocations, where their file is lost or damaged. What runs next is approved anew as launcher.policy says.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withGuard(cmd.Context(), workTimeout, func(ctx context.Context, g *guard) error {
				if err := g.Call(ctx, "ResetLaunchers", []any{map[string]dbus.Variant{}}, new(props)); err != nil {
					return err
				}
				v := struct {
					Done bool `json:"done"`
				}{true}
				return c.print(v, func(w io.Writer) { fmt.Fprintln(w, "all approvals and revocations are forgotten") })
			})
		},
	}
}
