package admin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"virt-trust/internal/bus"
	"virt-trust/internal/bus/components"
	"virt-trust/internal/evidence/eventlog"
)

// nextBoot warns of a boot that will not be checked.
func (h Host) nextBoot() string {
	if h.NextBoot == nil {
		return ""
	}
	return "NOT CHECKED, as asked for at " + local(h.NextBoot) + "; 'virt-trust host approve --next-boot --cancel' ends it"
}

// pcrlockFile is where systemd-pcrlock keeps what it predicted.
const pcrlockFile = "/var/lib/systemd/pcrlock.json"

func (c *Command) hostCommand() *cobra.Command {
	host := &cobra.Command{
		Use:   "host",
		Short: "Approve and revoke states of the host, and see how it differs",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return &exit{ExitUsage, errors.New("a command is missing; see 'virt-trust host --help'")}
		},
	}
	host.AddCommand(c.hostStatesCommand(), c.hostApproveCommand(), c.hostRevokeCommand(), c.hostHistoryCommand(), c.hostDryRunCommand())
	return host
}

// callHost calls a method of the host object.
func (g *guard) callHost(ctx context.Context, out any, method string, args ...any) error {
	call := g.Conn().Object(bus.Name, bus.HostPath).CallWithContext(ctx, bus.HostInterface+"."+method, dbus.FlagAllowInteractiveAuthorization, args...)
	if call.Err != nil {
		return bus.MapError(call.Err)
	}
	return call.Store(out)
}

// HostState is a state of the host in which keys are released.
type HostState struct {
	ID      string     `json:"id"`
	Time    *time.Time `json:"time"`
	Current bool       `json:"current"`
	PCRs    []uint32   `json:"pcrs"`
	Note    string     `json:"note,omitempty"`
}

func (g *guard) hostStates(ctx context.Context) ([]HostState, error) {
	var all []props
	if err := g.callHost(ctx, &all, "States", map[string]dbus.Variant{}); err != nil {
		return nil, err
	}
	states := []HostState{}
	for _, p := range all {
		current, _ := p["current"].Value().(bool)
		states = append(states, HostState{ID: p.text("id"), Time: p.time("time"), Current: current, PCRs: p.numbers("pcrs"), Note: p.text("note")})
	}
	return states, nil
}

func (c *Command) hostStatesCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "states",
		Short: "List the approved states of the host",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withGuard(cmd.Context(), readTimeout, func(ctx context.Context, g *guard) error {
				states, err := g.hostStates(ctx)
				if err != nil {
					return notAppraised(err)
				}
				return c.print(states, func(w io.Writer) {
					rows := [][]string{{"STATE", "APPROVED", "NOW", "PCRS", "NOTE"}}
					for _, s := range states {
						now := ""
						if s.Current {
							now = "here"
						}
						rows = append(rows, []string{s.ID, local(s.Time), now, numbers(s.PCRs), s.Note})
					}
					table(w, rows)
				})
			})
		},
	}
}

// completeStates offers the IDs of approved states.
func completeStates(cmd *cobra.Command, _ []string, _ string) (ids []string, _ cobra.ShellCompDirective) {
	_ = withGuard(cmd.Context(), time.Second, func(ctx context.Context, g *guard) error {
		states, err := g.hostStates(ctx)
		for _, s := range states {
			ids = append(ids, s.ID+"\t"+s.Note)
		}
		return err
	})
	return ids, cobra.ShellCompDirectiveNoFileComp
}

// BootChange is a difference between two boots.
type BootChange struct {
	PCR  uint32 `json:"pcr"`
	What string `json:"what"`
}

func (p props) changes(key string) []BootChange {
	var raw []BootChange
	if v, ok := p[key]; ok {
		_ = v.Store(&raw)
	}
	clean := []BootChange{}
	for _, ch := range raw {
		q := props{"what": dbus.MakeVariant(ch.What)}
		clean = append(clean, BootChange{ch.PCR, q.text("what")})
	}
	return clean
}

// HostChange is what came of a change to what is approved.
type HostChange struct {
	Done    bool         `json:"done"`
	What    string       `json:"what"`
	States  []string     `json:"states,omitempty"`
	Changes []BootChange `json:"changes,omitempty"` // from this boot to the one that was predicted
}

func newHostChange(p props, done bool) HostChange {
	states, _ := p["states"].Value().([]string)
	return HostChange{Done: done, What: p.text("what"), States: states, Changes: p.changes("changes")}
}

func (ch HostChange) write(w io.Writer) {
	fmt.Fprintln(w, ch.What)
	for _, id := range ch.States {
		fmt.Fprintln(w, "state "+id)
	}
	writeChanges(w, ch.Changes)
}

func writeChanges(w io.Writer, all []BootChange) {
	for _, ch := range all {
		fmt.Fprintf(w, "PCR %d: %s\n", ch.PCR, ch.What)
	}
}

// approval is what the flags of host approve say.
type approval struct {
	current, predict, nextBoot, cancel, dryRun bool
	kernel, initrd, uki, shim, files           []string
	cmdline, pcrlock, note                     string
}

// named counts the components.
func (a *approval) named() int {
	n := len(a.kernel) + len(a.initrd) + len(a.uki) + len(a.shim) + len(a.files)
	if a.cmdline != "" {
		n++
	}
	return n
}

func (a *approval) check(_ *cobra.Command, args []string) error {
	ways := 0
	for _, way := range []bool{a.current, a.predict, a.nextBoot} {
		if way {
			ways++
		}
	}
	switch {
	case len(args) > 0:
		return fmt.Errorf("%q is no flag", args[0])
	case ways != 1:
		return errors.New("name one of --current, --predict and --next-boot")
	case !a.predict && (a.named() > 0 || a.pcrlock != ""):
		return errors.New("what the next boot is made of belongs to --predict")
	case a.cancel && !a.nextBoot:
		return errors.New("--cancel belongs to --next-boot")
	case a.dryRun && a.nextBoot:
		return errors.New("--dry-run belongs to --current or --predict")
	case a.named() > 0 && a.pcrlock != "":
		return errors.New("either components or --pcrlock: systemd-pcrlock knows its own")
	}
	return nil
}

func (c *Command) hostApproveCommand() *cobra.Command {
	var a approval
	cmd := &cobra.Command{
		Use:   "approve --current | --predict [COMPONENT...] | --next-boot [--cancel]",
		Short: "Approve a state of the host",
		Long: `Lets the TPM release the keys of vTPMs in another state of the host than so far.
The host must be in an approved state.

--predict works out the next boot from the event log of this one and the files
that will be other ones. Each is given as FILE or as OLD=NEW, where OLD is the
file that this boot used; where it can, virt-trust finds OLD itself.`,
		Args:              a.check,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withGuard(cmd.Context(), workTimeout, func(ctx context.Context, g *guard) error {
				ch, err := g.approve(ctx, &a)
				if err != nil {
					return err
				}
				return c.print(ch, ch.write)
			})
		},
	}
	f := cmd.Flags()
	f.BoolVar(&a.current, "current", false, "the state that the host is in, after other PCRs were configured")
	f.BoolVar(&a.predict, "predict", false, "the state of the next boot; without components, what systemd-pcrlock predicts")
	f.BoolVar(&a.nextBoot, "next-boot", false, "whatever state the next boot has, for that boot's first start of virt-trustd")
	f.BoolVar(&a.cancel, "cancel", false, "with --next-boot: check the next boot after all")
	f.StringArrayVar(&a.kernel, "kernel", nil, "a new kernel: [OLD=]FILE")
	f.StringArrayVar(&a.initrd, "initrd", nil, "a new initrd: [OLD=]FILE")
	f.StringArrayVar(&a.uki, "uki", nil, "a new unified kernel image: [OLD=]FILE")
	f.StringArrayVar(&a.shim, "shim", nil, "a new shim: [OLD=]FILE")
	f.StringArrayVar(&a.files, "component", nil, "another file: OLD=NEW, or PATH for one that is there already, as /boot/grub/grub.cfg")
	f.StringVar(&a.cmdline, "cmdline", "", "the new command line of the kernel")
	f.StringVar(&a.pcrlock, "pcrlock", "", "a prediction of systemd-pcrlock instead of "+pcrlockFile)
	f.StringVar(&a.note, "note", "", "why, for the history")
	f.BoolVar(&a.dryRun, "dry-run", false, "show what would be approved, and do not")
	return cmd
}

func (g *guard) approve(ctx context.Context, a *approval) (HostChange, error) {
	var p props
	options := map[string]dbus.Variant{"note": dbus.MakeVariant(a.note)}
	if a.nextBoot {
		options["cancel"] = dbus.MakeVariant(a.cancel)
		err := g.callHost(ctx, &p, "NextBoot", options)
		return newHostChange(p, true), err
	}
	how, parts := "current", []eventlog.Component{}
	switch {
	case a.predict && a.named() > 0:
		h, err := g.host(ctx)
		if err != nil {
			return HostChange{}, err
		}
		how = "predict"
		if parts, err = a.components(h.Bank); err != nil {
			return HostChange{}, err
		}
	case a.predict:
		path := a.pcrlock
		if path == "" {
			path = pcrlockFile
		}
		b, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) && a.pcrlock == "" {
			return HostChange{}, &exit{ExitUsage, errors.New("say what will be another one (--kernel, --initrd, --uki, --shim, --component, --cmdline): systemd-pcrlock is not set up here")}
		}
		if err != nil {
			return HostChange{}, err
		}
		how, options["prediction"] = "pcrlock", dbus.MakeVariant(string(b))
	}
	method := "Approve"
	if a.dryRun {
		method = "Predict"
	}
	err := g.callHost(ctx, &p, method, how, components.Encode(parts), options)
	return newHostChange(p, !a.dryRun), err
}

// components measures the files that are named.
func (a *approval) components(bank string) ([]eventlog.Component, error) {
	var all []eventlog.Component
	for _, k := range []struct {
		kind  string
		files []string
	}{{eventlog.Kernel, a.kernel}, {eventlog.Initrd, a.initrd}, {eventlog.Unified, a.uki}, {eventlog.Shim, a.shim}, {eventlog.Other, a.files}} {
		for _, f := range k.files {
			c := eventlog.Component{Kind: k.kind}
			old, path, given := strings.Cut(f, "=")
			if !given {
				path = f
			}
			var err error
			if c.New, err = measure(path, bank); err != nil {
				return nil, err
			}
			switch {
			case given:
				c.Path = old
				o, err := measure(old, bank)
				switch {
				case err == nil:
					c.Old = []eventlog.File{o}
				case k.kind != eventlog.Other || !errors.Is(err, os.ErrNotExist):
					return nil, err
				}
			case k.kind == eventlog.Other:
				if c.Path, err = filepath.Abs(path); err != nil {
					return nil, err
				}
			default:
				c.Old = present(k.kind, path, bank)
			}
			all = append(all, c)
		}
	}
	if a.cmdline != "" {
		all = append(all, eventlog.Component{Kind: eventlog.Cmdline, Text: a.cmdline})
	}
	return all, nil
}

func measure(path, bank string) (eventlog.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return eventlog.File{}, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return eventlog.File{}, err
	}
	if !st.Mode().IsRegular() {
		return eventlog.File{}, fmt.Errorf("%s is no file", path)
	}
	m, err := eventlog.Measure(f, st.Size(), bank)
	if err != nil {
		return m, fmt.Errorf("%s: %w", path, err)
	}
	m.Name = path
	return m, nil
}

// maxPresent files are measured to find the one that this boot used.
const maxPresent = 16

// present measures the files that this boot may have used for a kind of
// component; the event log tells which it was.
func present(kind, but, bank string) []eventlog.File {
	var u unix.Utsname
	_ = unix.Uname(&u)
	release := unix.ByteSliceToString(u.Release[:])
	patterns := map[string][]string{
		eventlog.Kernel:  {"/boot/vmlinuz-" + release, "/usr/lib/modules/" + release + "/vmlinuz", "/vmlinuz", "/boot/*/" + release + "/linux", "/efi/*/" + release + "/linux"},
		eventlog.Initrd:  {"/boot/initrd.img-" + release, "/boot/initramfs-" + release + ".img", "/boot/initrd-" + release, "/boot/*/" + release + "/initrd*"},
		eventlog.Unified: {"/boot/efi/EFI/Linux/*.efi", "/efi/EFI/Linux/*.efi", "/boot/EFI/Linux/*.efi"},
		eventlog.Shim:    {"/boot/efi/EFI/*/shim*.efi", "/efi/EFI/*/shim*.efi", "/boot/efi/EFI/BOOT/BOOT*.EFI", "/efi/EFI/BOOT/BOOT*.EFI"},
	}[kind]
	var all []eventlog.File
	for _, p := range patterns {
		paths, _ := filepath.Glob(p)
		for _, path := range paths {
			if path == but || len(all) == maxPresent {
				continue
			}
			if f, err := measure(path, bank); err == nil {
				all = append(all, f)
			}
		}
	}
	return all
}

func (c *Command) hostRevokeCommand() *cobra.Command {
	var force bool
	var note string
	cmd := &cobra.Command{
		Use:   "revoke STATE...",
		Short: "Withdraw the approval of a state of the host",
		Long: `Withdraws the approval of states, named by the first digits of their IDs as 'virt-trust host states' has them.
The TPM releases nothing in them any more, also when files of before are put back.`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeStates,
		RunE: func(cmd *cobra.Command, args []string) error {
			return withGuard(cmd.Context(), workTimeout, func(ctx context.Context, g *guard) error {
				var p props
				err := g.callHost(ctx, &p, "Revoke", args, map[string]dbus.Variant{"force": dbus.MakeVariant(force), "note": dbus.MakeVariant(note)})
				if err != nil {
					return err
				}
				ch := newHostChange(p, true)
				return c.print(ch, ch.write)
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also the state that the host is in: no VM with a vTPM starts then")
	cmd.Flags().StringVar(&note, "note", "", "why, for the history")
	return cmd
}

// HostEvent is something that was done to what is approved.
type HostEvent struct {
	Time   *time.Time `json:"time"`
	Event  string     `json:"event"`
	UID    int64      `json:"uid"` // -1: virt-trustd itself
	States []string   `json:"states,omitempty"`
	What   string     `json:"what,omitempty"`
	Note   string     `json:"note,omitempty"`
}

func (c *Command) hostHistoryCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "history",
		Short: "Show what was approved and revoked, when and by whom",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withGuard(cmd.Context(), readTimeout, func(ctx context.Context, g *guard) error {
				var raw []props
				if err := g.callHost(ctx, &raw, "History", map[string]dbus.Variant{}); err != nil {
					return notAppraised(err)
				}
				all := []HostEvent{}
				for _, p := range raw {
					uid, _ := p["uid"].Value().(int64)
					states, _ := p["states"].Value().([]string)
					all = append(all, HostEvent{p.time("time"), p.text("event"), uid, states, p.text("what"), p.text("note")})
				}
				return c.print(all, func(w io.Writer) {
					rows := [][]string{{"TIME", "EVENT", "BY", "STATES", "WHAT"}}
					for _, e := range all {
						what := e.What
						if e.Note != "" {
							what = strings.TrimPrefix(what+": "+e.Note, ": ")
						}
						rows = append(rows, []string{local(e.Time), e.Event, who(e.UID), strings.Join(e.States, " "), what})
					}
					table(w, rows)
				})
			})
		},
	}
}

func who(uid int64) string {
	if uid < 0 {
		return "virt-trustd"
	}
	id := strconv.FormatInt(uid, 10)
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return id
}

// HostDryRun is the answer of virt-trust host dry-run.
type HostDryRun struct {
	Approved bool         `json:"approved"`
	State    string       `json:"state,omitempty"` // the approved one that the host is in, or that is nearest
	PCRs     []uint32     `json:"differing_pcrs"`
	Changes  []BootChange `json:"changes"`
	Log      string       `json:"log_problem,omitempty"` // why changes are not all told
}

func (c *Command) hostDryRunCommand() *cobra.Command {
	var state string
	cmd := &cobra.Command{
		Use:   "dry-run [--state STATE]",
		Short: "Show how the host differs from an approved state, event by event",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var d HostDryRun
			err := withGuard(cmd.Context(), readTimeout, func(ctx context.Context, g *guard) error {
				var p props
				if err := g.callHost(ctx, &p, "DryRun", map[string]dbus.Variant{"state": dbus.MakeVariant(state)}); err != nil {
					return err
				}
				d = HostDryRun{State: p.text("state"), PCRs: p.numbers("pcrs"), Changes: p.changes("changes"), Log: p.text("log")}
				d.Approved, _ = p["approved"].Value().(bool)
				return nil
			})
			if err != nil {
				return notAppraised(err)
			}
			if err := c.print(d, d.write); err != nil {
				return err
			}
			if !d.Approved {
				return &exit{code: ExitRefused}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&state, "state", "", "this approved state instead of the nearest")
	_ = cmd.RegisterFlagCompletionFunc("state", completeStates)
	return cmd
}

func (d HostDryRun) write(w io.Writer) {
	switch {
	case d.Approved && len(d.PCRs) == 0:
		fmt.Fprintf(w, "The host is in an approved state: %s\n", d.State)
	case d.Approved:
		fmt.Fprintf(w, "The host is in an approved state. From %s, PCR %s differ:\n", d.State, numbers(d.PCRs))
	case d.State == "":
		fmt.Fprintln(w, "The host is in no approved state.")
	default:
		fmt.Fprintf(w, "The host is in no approved state. From %s, PCR %s differ:\n", d.State, numbers(d.PCRs))
	}
	writeChanges(w, d.Changes)
	if d.Log != "" {
		fmt.Fprintf(w, "Not all is told: %s\n", d.Log)
	}
}
