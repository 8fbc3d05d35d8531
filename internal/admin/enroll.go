package admin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"

	"virt-trust/internal/bus"
)

// Membership is how the host stands with its Verifier.
type Membership struct {
	State              string     `json:"state"` // not-enrolled, pending, active, refused, unreachable
	Verifier           string     `json:"verifier,omitempty"`
	Node               string     `json:"node,omitempty"`
	Name               string     `json:"name,omitempty"`
	CertificateExpires *time.Time `json:"certificate_expires,omitempty"`
	LastRound          *time.Time `json:"last_round,omitempty"`
	LastTier           string     `json:"last_tier,omitempty"`
	LastError          string     `json:"last_error,omitempty"`
}

const (
	agentUnit  = "virt-trust-agent.service"
	enrollTime = 5 * time.Minute
	maxToken   = 1 << 10
)

func (c *Command) enrollCommand() *cobra.Command {
	var tokenFile, name, pin string
	var status bool
	cmd := &cobra.Command{
		Use:   "enroll URL [--name NAME] [--token-file FILE | --pin PIN] | enroll --status",
		Short: "Make this host a node of a Verifier",
		Long: "Makes this host a node of the Verifier at URL (https://HOST:PORT) and has virt-trust-agent bring it evidence from then on. " +
			"The join token is asked for, or read from standard input or a file; it is not taken from the command line, which others can see. " +
			"A host that the Verifier knows already needs no token but the pin of its CA.",
		Args: func(cmd *cobra.Command, args []string) error {
			if status {
				return cobra.NoArgs(cmd, args)
			}
			return cobra.ExactArgs(1)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if status {
				return c.enrollStatus(cmd.Context())
			}
			options := map[string]dbus.Variant{}
			if name != "" {
				options["name"] = dbus.MakeVariant(name)
			}
			if pin != "" {
				if tokenFile != "" {
					return &exit{ExitUsage, errors.New("--pin and --token-file go one at a time")}
				}
				options["pin"] = dbus.MakeVariant(pin)
			} else {
				token, err := c.readToken(tokenFile)
				if err != nil {
					return err
				}
				options["token"] = dbus.MakeVariant(token)
			}
			return c.enroll(cmd.Context(), args[0], options)
		},
	}
	cmd.Flags().StringVar(&tokenFile, "token-file", "", "file with the join token, \"-\" for standard input")
	cmd.Flags().StringVar(&name, "name", "", "the node's name (the host's own)")
	cmd.Flags().StringVar(&pin, "pin", "", "pin of the Verifier's CA, for a host that the Verifier knows")
	cmd.Flags().BoolVar(&status, "status", false, "show how the host stands with its Verifier")
	return cmd
}

func (c *Command) leaveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "leave",
		Short: "Forget the Verifier",
		Long:  "virt-trust-agent brings no evidence any more. The Verifier keeps the node, as one that says nothing, until an operator revokes it.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withAgent(cmd.Context(), func(ctx context.Context, client *bus.Client) error {
				if err := client.Agent(ctx, bus.AgentInterface+".Leave", []any{map[string]dbus.Variant{}}); err != nil {
					return err
				}
				return setUnit(ctx, client, "DisableUnitFiles", []string{agentUnit}, false)
			})
		},
	}
}

// readToken reads a join token: a line of a file, of standard input, or as it is
// typed, unseen.
func (c *Command) readToken(name string) (string, error) {
	from := c.Stdin
	if name != "" && name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return "", err
		}
		defer f.Close()
		from = f
	} else if f, ok := c.Stdin.(*os.File); ok {
		loud, err := silent(f)
		if err != nil {
			return "", err
		}
		if loud != nil {
			defer fmt.Fprintln(c.Stderr)
			defer loud()
			fmt.Fprint(c.Stderr, "Join token (not shown): ")
		}
	}
	var line []byte
	for one := make([]byte, 1); len(line) <= maxToken; {
		n, err := from.Read(one)
		if n == 1 && one[0] != '\n' {
			line = append(line, one[0])
			continue
		}
		if n == 1 || errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", err
		}
	}
	token := string(bytes.TrimSpace(line))
	if token == "" || len(line) > maxToken {
		return "", &exit{ExitUsage, errors.New("a join token is needed; an operator makes one with 'virt-trust fleet token create', or on the Verifier's page")}
	}
	return token, nil
}

func (c *Command) withAgent(ctx context.Context, f func(context.Context, *bus.Client) error) error {
	ctx, cancel := context.WithTimeout(ctx, enrollTime)
	defer cancel()
	client, err := bus.Dial(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	return f(ctx, client)
}

func (c *Command) enroll(ctx context.Context, url string, options map[string]dbus.Variant) error {
	return c.withAgent(ctx, func(ctx context.Context, client *bus.Client) error {
		var result props
		if err := client.Agent(ctx, bus.AgentInterface+".Enroll", []any{url, options}, &result); err != nil {
			return err
		}
		// From now on it starts with the host.
		if err := setUnit(ctx, client, "EnableUnitFiles", []string{agentUnit}, false, false); err != nil {
			return fmt.Errorf("the host is a node, but 'systemctl enable %s' failed: %w", agentUnit, err)
		}
		m := Membership{State: result.text("state"), Verifier: url, Node: result.text("node"), Name: result.text("name")}
		return c.print(m, func(w io.Writer) {
			if m.State == "pending" {
				fmt.Fprintf(w, "%s waits at %s for an operator to approve it (node %s)\n", m.Name, m.Verifier, m.Node)
				return
			}
			fmt.Fprintf(w, "%s is a node of %s (node %s)\n", m.Name, m.Verifier, m.Node)
		})
	})
}

// setUnit changes whether a unit starts with the host.
func setUnit(ctx context.Context, client *bus.Client, method string, args ...any) error {
	manager := client.Conn().Object("org.freedesktop.systemd1", "/org/freedesktop/systemd1")
	if err := manager.CallWithContext(ctx, "org.freedesktop.systemd1.Manager."+method, 0, args...).Err; err != nil {
		return bus.MapError(err)
	}
	if err := manager.CallWithContext(ctx, "org.freedesktop.systemd1.Manager.Reload", 0).Err; err != nil {
		return bus.MapError(err)
	}
	return nil
}

func (c *Command) enrollStatus(ctx context.Context) error {
	return c.withAgent(ctx, func(ctx context.Context, client *bus.Client) error {
		var p props
		if err := client.Agent(ctx, "org.freedesktop.DBus.Properties.GetAll", []any{bus.AgentInterface}, &p); err != nil {
			return notAppraised(err)
		}
		m := Membership{
			State: p.text("State"), Verifier: p.text("Verifier"), Node: p.text("Node"), Name: p.text("Name"),
			CertificateExpires: p.time("CertificateExpires"), LastRound: p.time("LastRound"), LastTier: p.text("LastTier"), LastError: p.text("LastError"),
		}
		if err := c.print(m, func(w io.Writer) { writeMembership(w, m) }); err != nil {
			return err
		}
		switch {
		case m.State == "refused" || m.LastTier == "contraindicated":
			return &exit{ExitRefused, nil}
		case m.State != "active" || m.LastTier == "" || m.LastTier == "none":
			return &exit{ExitNotAppraised, nil}
		}
		return nil
	})
}

func writeMembership(w io.Writer, m Membership) {
	when := func(t *time.Time) string {
		if t == nil {
			return ""
		}
		return t.Format(time.RFC3339)
	}
	fields(w, "State", strings.ReplaceAll(m.State, "-", " "), "Verifier", m.Verifier, "Node", m.Node, "Name", m.Name,
		"Certificate until", when(m.CertificateExpires), "Last round", when(m.LastRound), "Result", m.LastTier, "Trouble", m.LastError)
}
