package admin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"virt-trust/internal/bus"
	"virt-trust/internal/recovery"
	"virt-trust/internal/vtpm/reason"
)

// Recovery is the answer of virt-trust recovery show.
type Recovery struct {
	State     string     `json:"state"` // none, unconfirmed, confirmed, altered
	Recipient string     `json:"recipient,omitempty"`
	Made      *time.Time `json:"made,omitempty"`
	Confirmed *time.Time `json:"confirmed,omitempty"`
	Unwrapped []string   `json:"unwrapped,omitempty"` // VMs that could not be brought back

	test []byte
}

// NewRecovery is the answer of virt-trust recovery new. The key stands in it
// where it was not written to files.
type NewRecovery struct {
	Recipient string   `json:"recipient"`
	Key       string   `json:"key,omitempty"`
	Shares    []string `json:"shares,omitempty"`
	Threshold int      `json:"threshold,omitempty"`
	Files     []string `json:"files,omitempty"`
	What      string   `json:"what"`
}

func (c *Command) recoveryCommands() []*cobra.Command {
	group := &cobra.Command{
		Use: "recovery", Short: "The recovery key, which opens what the host's TPM no longer does", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return &exit{ExitUsage, errors.New("say what: virt-trust recovery show | new | confirm")}
		},
	}
	group.AddCommand(&cobra.Command{
		Use: "show", Short: "Show whether there is a recovery key, and for which VMs", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var r Recovery
			err := withGuard(cmd.Context(), readTimeout, func(ctx context.Context, g *guard) (err error) {
				r, err = g.recovery(ctx)
				return err
			})
			if err != nil {
				return err
			}
			return c.print(r, r.write)
		},
	}, c.recoveryNewCommand(), c.recoveryConfirmCommand())
	return []*cobra.Command{group, c.recoverCommand(), c.backupCommand(), c.restoreCommand()}
}

func (g *guard) recovery(ctx context.Context) (Recovery, error) {
	p, err := g.change(ctx, "GetRecovery", map[string]dbus.Variant{})
	r := Recovery{State: p.text("state"), Recipient: p.text("recipient"), Made: p.time("made"), Confirmed: p.time("confirmed")}
	names, _ := p["unwrapped"].Value().([]string)
	for _, n := range names {
		r.Unwrapped = append(r.Unwrapped, reason.OneLine(n))
	}
	r.test, _ = p["test"].Value().([]byte)
	return r, err
}

// recoveryAdvice says of a recovery key's state what is to be done.
func recoveryAdvice(state string) string {
	switch state {
	case "none":
		return "none: make one with 'virt-trust recovery new'"
	case "unconfirmed":
		return "not confirmed as stored: 'virt-trust recovery confirm'"
	case "altered":
		return "recovery.json does not name the key that the list holds, and nothing is wrapped to it: 'virt-trust recovery new --replace', or 'virt-trust recover' with the right key"
	}
	return state
}

func (r Recovery) write(w io.Writer) {
	fields(w,
		"Recovery key", recoveryAdvice(r.State),
		"Recipient", r.Recipient,
		"Made", local(r.Made),
		"Confirmed", local(r.Confirmed),
		"VMs without", strings.Join(r.Unwrapped, ", "),
	)
}

func (c *Command) recoveryNewCommand() *cobra.Command {
	var output, outputDir, recipient string
	var shares, threshold int
	var replace bool
	cmd := &cobra.Command{
		Use:   "new [--output FILE | --shares N --threshold M [--output-dir DIR] | --recipient age1…] [--replace]",
		Short: "Make the recovery key, show it once, and wrap everything to it",
		Long: "Makes the recovery key and shows it once, or writes it to a file, or splits it among several people. " +
			"virt-trustd gets its public half alone. With --recipient the key is one that you have already.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case recipient != "" && (output != "" || shares != 0), output != "" && shares != 0:
				return &exit{ExitUsage, errors.New("--recipient, --output and --shares go one at a time")}
			case (shares == 0) != (threshold == 0):
				return &exit{ExitUsage, errors.New("--shares and --threshold go together")}
			case outputDir != "" && shares == 0:
				return &exit{ExitUsage, errors.New("--output-dir is for --shares")}
			}
			return c.newRecovery(cmd.Context(), recipient, output, outputDir, shares, threshold, replace)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&output, "output", "o", "", "write the key to this new file instead of showing it")
	f.IntVar(&shares, "shares", 0, "split the key into this many shares")
	f.IntVar(&threshold, "threshold", 0, "how many shares are needed to have the key again")
	f.StringVar(&outputDir, "output-dir", "", "write each share to a new file in this folder")
	f.StringVar(&recipient, "recipient", "", "the public half, age1…, of a key that is kept elsewhere")
	f.BoolVar(&replace, "replace", false, "in place of the recovery key that there is")
	return cmd
}

func (c *Command) newRecovery(ctx context.Context, recipient, output, outputDir string, shares, threshold int, replace bool) (err error) {
	n := NewRecovery{Recipient: recipient, Threshold: threshold}
	var made []string // files, to be removed where the key does not come to be used
	defer func() {
		if err != nil {
			for _, f := range made {
				os.Remove(f)
			}
		}
	}()
	write := func(path, text string) error {
		if err := writeNew(path, []byte(text)); err != nil {
			return err
		}
		made = append(made, path)
		n.Files = append(n.Files, path)
		return nil
	}
	if recipient == "" {
		k, err := recovery.NewKey()
		if err != nil {
			return err
		}
		n.Recipient = k.Recipient().String()
		host, _ := os.Hostname()
		when := time.Now().Format(time.DateOnly)
		switch {
		case shares > 0:
			if n.Shares, err = k.Split(shares, threshold); err != nil {
				return &exit{ExitUsage, err}
			}
			if outputDir != "" {
				for i, s := range n.Shares {
					text := fmt.Sprintf("# virt-trust recovery key of %s, made %s\n# share %d of %d, of which %d are needed\n%s\n", host, when, i+1, shares, threshold, s)
					if err := write(filepath.Join(outputDir, fmt.Sprintf("share-%d.txt", i+1)), text); err != nil {
						return err
					}
				}
				n.Shares = nil
			}
		case output != "":
			if err := write(output, k.File(host, when)); err != nil {
				return err
			}
		default:
			n.Key = k.Text()
		}
	} else if _, err := recovery.ParseRecipient(recipient); err != nil {
		return &exit{ExitUsage, err}
	}
	options := map[string]dbus.Variant{"replace": dbus.MakeVariant(replace)}
	done, err := c.converse(ctx, "SetRecovery", []any{n.Recipient, options}, nil, nil)
	if err != nil {
		return err
	}
	n.What = done["what"]
	return c.print(n, n.write)
}

func (n NewRecovery) write(w io.Writer) {
	fmt.Fprintln(w, n.What)
	switch {
	case n.Key != "":
		fmt.Fprintf(w, "\nThis is the recovery key. It is shown once and is nowhere else: store it off this host, then run\n'virt-trust recovery confirm'.\n\n    %s\n", n.Key)
	case len(n.Shares) > 0:
		fmt.Fprintf(w, "\nThese are the shares of the recovery key, of which %d are needed. They are shown once: give each to\nsomebody else, then run 'virt-trust recovery confirm'.\n", n.Threshold)
		for i, s := range n.Shares {
			fmt.Fprintf(w, "\n%d:  %s\n", i+1, s)
		}
	case len(n.Files) > 0:
		fmt.Fprintf(w, "written to %s: move it off this host, then run 'virt-trust recovery confirm'\n", strings.Join(n.Files, ", "))
	default:
		fmt.Fprintln(w, "'virt-trust recovery confirm' shows that its key is at hand")
	}
}

// writeNew writes a file that must not be there yet, for its owner alone.
func writeNew(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		os.Remove(path)
	}
	return err
}

// keyFlags say where a recovery key comes from.
type keyFlags struct {
	identity string
	shares   []string
}

func (k *keyFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&k.identity, "identity", "i", "-", "file with the key, \"-\" for standard input")
	cmd.Flags().StringArrayVar(&k.shares, "share", nil, "file with a share of the key; as often as shares are needed")
}

// read gives the key as text.
func (c *Command) readKey(k keyFlags) ([]byte, error) {
	if len(k.shares) == 0 {
		return c.readSecret(k.identity)
	}
	if k.identity != "-" {
		return nil, &exit{ExitUsage, errors.New("--identity and --share go one at a time")}
	}
	var all []byte
	for _, name := range k.shares {
		b, err := c.readSecret(name)
		if err != nil {
			return nil, err
		}
		all = append(append(all, b...), '\n')
	}
	return all, nil
}

// readSecret reads a file, or standard input: on a terminal up to an empty
// line, without echo.
func (c *Command) readSecret(name string) ([]byte, error) {
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		return readAll(f)
	}
	f, ok := c.Stdin.(*os.File)
	if !ok {
		return readAll(c.Stdin)
	}
	loud, err := silent(f)
	if err != nil {
		return nil, err
	}
	if loud == nil { // no terminal
		return readAll(f)
	}
	defer loud()
	fmt.Fprintln(c.Stderr, "Recovery key, or its shares in lines (not shown); an empty line ends it:")
	var text []byte
	one := make([]byte, 1)
	for len(text) < recovery.MaxText {
		n, err := f.Read(one)
		if n == 0 || err != nil {
			break
		}
		if text = append(text, one[0]); bytes.HasSuffix(text, []byte("\n\n")) || len(text) == 1 && text[0] == '\n' {
			break
		}
	}
	return text, nil
}

// silent ends a terminal's echo until the function that it gives is called; nil
// where f is none.
func silent(f *os.File) (loud func(), err error) {
	was, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return nil, nil
	}
	now := *was
	now.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETSF, &now); err != nil {
		return nil, err
	}
	return func() { _ = unix.IoctlSetTermios(int(f.Fd()), unix.TCSETSF, was) }, nil
}

func readAll(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, recovery.MaxText+1))
	if err == nil && len(b) > recovery.MaxText {
		err = errors.New("this is too long for a key")
	}
	return b, err
}

func (c *Command) recoveryConfirmCommand() *cobra.Command {
	var from keyFlags
	cmd := &cobra.Command{
		Use:   "confirm [--identity FILE | --share FILE...]",
		Short: "Show that the recovery key is at hand, and end the reminders",
		Long:  "Opens a test with the recovery key, or with enough of its shares. The key does not leave this program.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := c.readKey(from)
			if err != nil {
				return err
			}
			defer clear(text)
			k, err := recovery.Parse(text)
			if err != nil {
				return err
			}
			return withGuard(cmd.Context(), workTimeout, func(ctx context.Context, g *guard) error {
				r, err := g.recovery(ctx)
				if err != nil {
					return err
				}
				answer := []byte{0}
				if r.State != "none" {
					if answer, err = k.Unwrap(r.test); errors.Is(err, recovery.ErrOtherKey) {
						return reason.Refuse(reason.KeyNotReleased, "", "this is the key of %s, and this host's is that of %s", k.Recipient(), r.Recipient)
					} else if err != nil {
						return err
					}
				}
				p, err := g.change(ctx, "ConfirmRecovery", answer, map[string]dbus.Variant{})
				if err != nil {
					return err
				}
				ch := Change{Done: true, What: p.text("what")}
				return c.print(ch, func(w io.Writer) { fmt.Fprintln(w, ch.What) })
			})
		},
	}
	from.add(cmd)
	return cmd
}

func (c *Command) recoverCommand() *cobra.Command {
	var from keyFlags
	cmd := &cobra.Command{
		Use:   "recover [VM] [--identity FILE | --share FILE...]",
		Short: "Bring the list and the vTPMs back with the recovery key",
		Long: "Brings list and vTPMs back after an update that was not approved, a cleared or replaced TPM, a move of the disk to another host, or a lost list. " +
			"With a VM: takes in that VM, whose image and vTPM come from another host.",
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			text, err := c.readKey(from)
			if err != nil {
				return err
			}
			defer clear(text)
			if _, err := recovery.Parse(text); err != nil {
				return err
			}
			vm := ""
			if len(args) > 0 {
				if vm = args[0]; vm == "" {
					return &exit{ExitUsage, errors.New("the VM's name is empty")}
				}
			}
			done, err := c.converse(cmd.Context(), "Recover", []any{vm, map[string]dbus.Variant{}}, text, nil)
			if err != nil {
				return err
			}
			ch := Change{VM: vm, UUID: done["uuid"], Name: done["name"], Done: true, What: done["what"]}
			return c.print(ch, func(w io.Writer) { fmt.Fprintln(w, ch.What) })
		},
	}
	from.add(cmd)
	return cmd
}

// converse has a conversation with virt-trustd, for as long as that takes.
// Progress goes to standard error, data and holds to hear.
func (c *Command) converse(ctx context.Context, method string, args []any, input []byte, hear func(bus.Line) error) (map[string]string, error) {
	client, err := bus.DialForDescriptors(ctx)
	if err != nil {
		return nil, bus.Unreachable(err.Error())
	}
	defer client.Close()
	done, err := client.Converse(ctx, method, args, input, func(l bus.Line) error {
		if l.Say != "" {
			fmt.Fprintln(c.Stderr, reason.OneLine(l.Say))
		}
		if hear == nil {
			return nil
		}
		return hear(l)
	})
	for k, v := range done {
		done[k] = reason.OneLine(v)
	}
	return done, err
}

// Backup is the answer of virt-trust backup.
type Backup struct {
	UUID  string `json:"uuid"`
	Name  string `json:"name"`
	File  string `json:"file"`
	Bytes int    `json:"bytes"`
	What  string `json:"what"`
}

func (c *Command) backupCommand() *cobra.Command {
	var to, files []string
	var output, pauseFor string
	cmd := &cobra.Command{
		Use:   "backup VM --recipient age1…|ssh-… [-o FILE] [--pause-for COMMAND]",
		Short: "Take a VM's vTPM out, encrypted to your public key",
		Long: "Writes a VM's vTPM to an age file. A VM that runs is paused for the instant in which its vTPM is read; " +
			"with --pause-for it stays paused while COMMAND takes the snapshot of its disks that belongs to it.",
		Args: cobra.ExactArgs(1), ValidArgsFunction: completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, name := range files {
				b, err := os.ReadFile(name)
				if err != nil {
					return err
				}
				for line := range strings.Lines(string(b)) {
					if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
						to = append(to, line)
					}
				}
			}
			if len(to) == 0 {
				return &exit{ExitUsage, errors.New("say to whom the backup is to be encrypted: --recipient or --recipients-file")}
			}
			if output == "" {
				output = args[0] + ".vtpm.age"
				if strings.ContainsRune(args[0], '/') {
					return &exit{ExitUsage, errors.New("name the file with --output")}
				}
			}
			return c.backup(cmd.Context(), args[0], to, output, pauseFor)
		},
	}
	cmd.Flags().StringArrayVarP(&to, "recipient", "r", nil, "public key: age1…, or ssh-ed25519 … or ssh-rsa … in quotes")
	cmd.Flags().StringArrayVarP(&files, "recipients-file", "R", nil, "file with public keys, one a line")
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write, \"-\" for standard output (default VM.vtpm.age)")
	cmd.Flags().StringVar(&pauseFor, "pause-for", "", "shell command to run while the VM is paused")
	return cmd
}

func (c *Command) backup(ctx context.Context, vm string, to []string, output, pauseFor string) error {
	options := map[string]dbus.Variant{"recipients": dbus.MakeVariant(to), "hold": dbus.MakeVariant(pauseFor != "")}
	var sealed bytes.Buffer
	done, err := c.converse(ctx, "Backup", []any{vm, options}, nil, func(l bus.Line) error {
		sealed.Write(l.Data)
		if !l.Hold {
			return nil
		}
		cmd := exec.CommandContext(ctx, "/bin/sh", "-c", pauseFor)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, c.Stderr, c.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w", pauseFor, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	b := Backup{UUID: done["uuid"], Name: done["name"], File: output, Bytes: sealed.Len(), What: done["what"]}
	if output == "-" {
		_, err := c.Stdout.Write(sealed.Bytes())
		return err
	}
	// An older backup of that name is there until this one is whole.
	os.Remove(output + ".new")
	if err := writeNew(output+".new", sealed.Bytes()); err != nil {
		return err
	}
	if err := os.Rename(output+".new", output); err != nil {
		return err
	}
	return c.print(b, func(w io.Writer) { fmt.Fprintf(w, "%s: %s: %s\n", b.Name, b.File, b.What) })
}

func (c *Command) restoreCommand() *cobra.Command {
	var identity string
	var replace bool
	cmd := &cobra.Command{
		Use:   "restore FILE --identity FILE [--replace]",
		Short: "Give a VM that is off its vTPM from a backup",
		Long: "Gives the VM of the backup's UUID, which must be defined and off, the vTPM of the backup. " +
			"Your private key does not leave this program.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if identity == "" || identity == "-" && args[0] == "-" {
				return &exit{ExitUsage, errors.New("say with which key the backup is opened: --identity FILE")}
			}
			key, err := c.readSecret(identity)
			if err != nil {
				return err
			}
			defer clear(key)
			file := c.Stdin
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return err
				}
				defer f.Close()
				file = f
			}
			archive, err := recovery.Unseal(file, key)
			if err != nil {
				return err
			}
			defer clear(archive)
			options := map[string]dbus.Variant{"replace": dbus.MakeVariant(replace)}
			done, err := c.converse(cmd.Context(), "Restore", []any{options}, archive, nil)
			if err != nil {
				return err
			}
			ch := Change{VM: done["uuid"], UUID: done["uuid"], Name: done["name"], Done: true, What: done["what"]}
			return c.print(ch, ch.write)
		},
	}
	cmd.Flags().StringVarP(&identity, "identity", "i", "", "file with the age or SSH private key, \"-\" for standard input")
	cmd.Flags().BoolVar(&replace, "replace", false, "also in place of a vTPM that is newer, which is set aside")
	return cmd
}
