package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"

	"virt-trust/internal/bus"
)

// Decision is one line of virt-trust log.
type Decision struct {
	Time      *time.Time `json:"time"`
	UUID      string     `json:"uuid,omitempty"`
	Name      string     `json:"name,omitempty"`
	Operation string     `json:"operation"`
	Verdict   string     `json:"verdict"` // allow, refuse, would-refuse, note
	Reason    string     `json:"reason,omitempty"`
	What      string     `json:"what,omitempty"`
}

// maxLog is what --follow looks back over at each signal.
const maxLog = 1000

func (c *Command) logCommand() *cobra.Command {
	var limit uint32
	var follow bool
	cmd := &cobra.Command{
		Use:   "log",
		Short: "Show recent decisions, oldest first",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if follow {
				return c.follow(cmd.Context(), limit)
			}
			var decisions []Decision
			err := withGuard(cmd.Context(), readTimeout, func(ctx context.Context, g *guard) (err error) {
				decisions, err = g.log(ctx, limit)
				return err
			})
			if err != nil {
				return err
			}
			return c.print(decisions, func(w io.Writer) {
				for _, d := range decisions {
					d.write(w)
				}
			})
		},
	}
	cmd.Flags().Uint32VarP(&limit, "lines", "n", 20, "how many")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with new ones; with --json one object a line")
	return cmd
}

func (g *guard) log(ctx context.Context, limit uint32) ([]Decision, error) {
	var raw []props
	if err := g.Call(ctx, "Log", []any{limit, map[string]dbus.Variant{}}, &raw); err != nil {
		return nil, err
	}
	decisions := make([]Decision, 0, len(raw))
	for _, p := range raw {
		decisions = append(decisions, Decision{
			Time: p.time("time"), UUID: p.text("uuid"), Name: p.text("name"), Operation: p.text("operation"),
			Verdict: p.text("verdict"), Reason: p.text("reason"), What: p.text("what"),
		})
	}
	return decisions, nil
}

// follow prints decisions as they come, until ctx ends. Whatever virt-trustd
// says on the bus is the occasion to ask it for what is new: a signal tells of
// refusals only.
func (c *Command) follow(ctx context.Context, limit uint32) error {
	client, err := bus.Dial(ctx)
	if err != nil {
		return bus.Unreachable(err.Error())
	}
	defer client.Close()
	g := &guard{client}
	signals := make(chan *dbus.Signal, 64)
	client.Conn().Signal(signals)
	if err := client.Conn().AddMatchSignalContext(ctx, dbus.WithMatchSender(bus.Name)); err != nil {
		return err
	}

	decisions, err := g.log(ctx, limit)
	if err != nil {
		return err
	}
	var last time.Time
	for {
		for _, d := range decisions {
			if d.Time == nil || !d.Time.After(last) {
				continue
			}
			if c.json {
				if err := json.NewEncoder(c.Stdout).Encode(d); err != nil {
					return err
				}
				continue
			}
			d.write(c.Stdout)
		}
		for _, d := range decisions {
			if d.Time != nil && d.Time.After(last) {
				last = *d.Time
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case _, open := <-signals:
			if !open && ctx.Err() != nil {
				return nil // the end of ctx closes the connection, too
			}
			if !open {
				return bus.Unreachable("the connection was closed")
			}
		case <-time.After(5 * time.Second): // signals may be lost
		}
		for len(signals) > 0 {
			<-signals
		}
		// A restart of virt-trustd is waited out.
		if next, err := g.log(ctx, maxLog); err == nil {
			decisions = next
		}
	}
}

func (d Decision) write(w io.Writer) {
	name := d.Name
	if name == "" {
		name = orDash(d.UUID)
	}
	line := fmt.Sprintf("%s  %-12s  %s  %s", local(d.Time), d.Verdict, name, d.Operation)
	if d.Reason != "" {
		line += "  " + d.Reason
	}
	if d.What != "" {
		line += ": " + d.What
	}
	fmt.Fprintln(w, line)
}
