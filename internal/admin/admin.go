// Package admin is the virt-trust command: it asks virt-trustd over D-Bus and
// prints the answer as text or, with --json, as the same struct in JSON.
//
// Standard output carries the answer and nothing else. Progress and errors go
// to standard error, an error as one line. Exit codes: see the constants.
package admin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"

	"virt-trust/internal/bus"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/vtpm/reason"
)

// The exit codes of virt-trust(1).
const (
	ExitDone         = 0 // done; affirming
	ExitFailed       = 1
	ExitUsage        = 2
	ExitRefused      = 3 // refused; contraindicated
	ExitNotAppraised = 4 // could not be told
)

// Command is one run of virt-trust.
type Command struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Args           []string // without the program's name
	Version        string
	ConfigPath     string   // virt-trustd.toml, for the folder of vTPM states
	ClientPaths    []string // client.toml; nil for the user's own and the system's

	json bool
}

// exit is an error that has its exit code with it. err may be nil when the
// answer on standard output says it all.
type exit struct {
	code int
	err  error
}

func (e *exit) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit %d", e.code)
	}
	return e.err.Error()
}

func (e *exit) Unwrap() error { return e.err }

// notAppraised marks an error of a command that judges: it could not tell.
func notAppraised(err error) error {
	if e := (*exit)(nil); err == nil || errors.As(err, &e) { // its code is known
		return err
	}
	return &exit{ExitNotAppraised, err}
}

// Run carries the command out and gives its exit code.
func (c *Command) Run(ctx context.Context) int {
	if c.ConfigPath == "" {
		c.ConfigPath = config.Path
	}
	root := c.root()
	root.SetArgs(c.Args)
	root.SetIn(c.Stdin)
	root.SetOut(c.Stdout)
	root.SetErr(c.Stderr)

	started := false
	root.PersistentPreRun = func(*cobra.Command, []string) { started = true }
	err := root.ExecuteContext(ctx)
	if err == nil {
		return ExitDone
	}
	var e *exit
	switch {
	case errors.As(err, &e):
		if e.err != nil {
			c.complain(e.err)
		}
		return e.code
	case !started: // cobra never got as far as the command: flags or arguments
		c.complain(err)
		fmt.Fprintln(c.Stderr, "See 'virt-trust --help'.")
		return ExitUsage
	}
	c.complain(err)
	if r := reason.As(err); r != nil && r.Code != reason.HelperUnreachable && r.Code != reason.TPMBusy {
		return ExitRefused
	}
	return ExitFailed
}

// complain writes an error as one line, a refusal in the form that libvirt
// shows too.
func (c *Command) complain(err error) {
	if r := reason.As(err); r != nil {
		fmt.Fprintf(c.Stderr, "virt-trust: refused: %s\n", r.Error())
		return
	}
	if errors.Is(err, bus.ErrAccessDenied) && strings.Contains(err.Error(), "Rejected send message") { // by the bus, at length
		err = fmt.Errorf("%w: be root or in the group virt-trust", bus.ErrAccessDenied)
	}
	fmt.Fprintf(c.Stderr, "virt-trust: %s\n", reason.OneLine(err.Error()))
}

func (c *Command) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "virt-trust",
		Short:         "Guarded VMs and their vTPMs",
		Long:          "virt-trust shows and mends what virt-trustd guards on this host: VMs, their vTPMs and their images' labels.",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return &exit{ExitUsage, errors.New("a command is missing; see 'virt-trust --help'")}
		},
	}
	root.PersistentFlags().BoolVar(&c.json, "json", false, "print JSON")
	root.AddCommand(c.statusCommand(), c.listCommand(), c.showCommand(), c.labelCommand(), c.logCommand(),
		c.checkCommand(), c.ekCommand(), c.hostCommand(), c.reasonCommand(), c.versionCommand())
	root.AddCommand(c.changeCommands()...)
	root.AddCommand(c.emulatorCommand())
	root.AddCommand(c.recoveryCommands()...)
	root.AddCommand(c.launcherCommand(), c.launchLogCommand(), c.evidenceCommand(), c.appraiseCommand())
	root.AddCommand(c.fleetCommand(), c.referenceCommand(), c.policyCommand(), c.webhookCommand(), c.auditCommand())
	root.AddCommand(c.enrollCommand(), c.leaveCommand())
	return root
}

func (c *Command) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v := struct {
				Version string `json:"version"`
			}{c.Version}
			return c.print(v, func(w io.Writer) { fmt.Fprintln(w, v.Version) })
		},
	}
}

// Times after which an answer is not waited for: readTimeout where virt-trustd
// answers from memory, workTimeout where it rewrites state and asks the TPM,
// which may have a queue.
const (
	readTimeout = 30 * time.Second
	workTimeout = 5 * time.Minute
)

// withGuard connects to virt-trustd for the length of f.
func withGuard(ctx context.Context, timeout time.Duration, f func(context.Context, *guard) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	client, err := bus.Dial(ctx)
	if err != nil {
		return bus.Unreachable(err.Error())
	}
	defer client.Close()
	return f(ctx, &guard{client})
}

// completeVMs offers the names of known VMs, of those only that are not among
// the arguments yet. It fails quietly, and starts nothing.
func completeVMs(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	_ = withGuard(cmd.Context(), time.Second, func(ctx context.Context, g *guard) error {
		vms, err := g.managed(ctx, dbus.FlagNoAutoStart)
		for _, vm := range vms {
			names = append(names, vm.Name+"\t"+vm.UUID)
		}
		return err
	})
	return names, cobra.ShellCompDirectiveNoFileComp
}
