package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"virt-trust/internal/vtpm/reason"
)

type fleetHook struct {
	ID      int64      `json:"id"`
	URL     string     `json:"url"`
	Events  []string   `json:"events"`
	Created *time.Time `json:"created"`
	Secret  string     `json:"secret"`
}

// deadLetter is a delivery that was given up.
type deadLetter struct {
	ID       int64      `json:"id"`
	Webhook  int64      `json:"webhook"`
	Event    string     `json:"event"`
	Attempts int        `json:"attempts"`
	Created  *time.Time `json:"created"`
	Error    string     `json:"error"`
}

func (c *Command) webhookCommand() *cobra.Command {
	f := &verifierFlags{}
	cmd := parent("webhook", "Webhooks of a Verifier, to which it sends what happens")
	f.add(cmd)
	cmd.AddCommand(c.webhookList(f), c.webhookAdd(f), c.webhookDo(f, "remove", "Remove a webhook with all that waits for it", "removed"),
		c.webhookDo(f, "test", "Send the event test to a webhook, once", "the receiver took the test event"), c.webhookDead(f), c.webhookRevive(f))
	return cmd
}

func (c *Command) webhookList(f *verifierFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List webhooks",
		Args:  cobra.NoArgs,
		RunE: c.verified(f, func(ctx context.Context, v *verifier, _ []string) error {
			answer, _, err := get[struct{ Items json.RawMessage }](ctx, v, "/v1/webhooks")
			if err != nil {
				return err
			}
			var hooks []fleetHook
			if err := json.Unmarshal(answer.Items, &hooks); err != nil {
				return fmt.Errorf("the Verifier's answer: %w", err)
			}
			return c.print(answer.Items, func(w io.Writer) {
				rows := [][]string{{"ID", "SINCE", "URL", "EVENTS"}}
				for _, h := range hooks {
					rows = append(rows, []string{strconv.FormatInt(h.ID, 10), local(h.Created), reason.OneLine(h.URL), reason.OneLine(strings.Join(h.Events, " "))})
				}
				table(w, rows)
			})
		}),
	}
}

func (c *Command) webhookAdd(f *verifierFlags) *cobra.Command {
	var events []string
	cmd := &cobra.Command{
		Use:               "add URL [--event EVENT]...",
		Short:             "Add a webhook, and print this once the secret that signs its events",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: c.verified(f, func(ctx context.Context, v *verifier, args []string) error {
			body := map[string]any{"url": args[0]}
			if len(events) > 0 {
				body["events"] = events
			}
			h, raw, err := call[fleetHook](ctx, v, http.MethodPost, "/v1/webhooks", body)
			if err != nil {
				return err
			}
			return c.print(raw, func(w io.Writer) { fmt.Fprintf(w, "webhook %d: %s\n", h.ID, reason.OneLine(h.Secret)) })
		}),
	}
	cmd.Flags().StringArrayVar(&events, "event", nil, "only this event (all); see virt-trust-verifier(8)")
	return cmd
}

// completeNumbers offers the numbers in a list of a Verifier that are not among the
// arguments yet, each with a word on it. It fails quietly.
func completeNumbers[T any](c *Command, f *verifierFlags, most int, path string, of func(T) (int64, string)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) (found []string, _ cobra.ShellCompDirective) {
		ctx, cancel := context.WithTimeout(cmd.Context(), time.Second)
		defer cancel()
		v, err := c.verifier(f)
		if err != nil || len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		answer, _, err := get[struct{ Items []T }](ctx, v, path)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		for _, item := range answer.Items {
			id, what := of(item)
			if number := strconv.FormatInt(id, 10); !slices.Contains(args, number) {
				found = append(found, number+"\t"+reason.OneLine(what))
			}
		}
		return found, cobra.ShellCompDirectiveNoFileComp
	}
}

// webhookDo removes or tests a webhook.
func (c *Command) webhookDo(f *verifierFlags, action, short, done string) *cobra.Command {
	return &cobra.Command{
		Use:               action + " ID",
		Short:             short,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeNumbers(c, f, 1, "/v1/webhooks", func(h fleetHook) (int64, string) { return h.ID, h.URL }),
		RunE: c.verified(f, func(ctx context.Context, v *verifier, args []string) error {
			id, err := positive(args[0], "webhook")
			if err != nil {
				return err
			}
			method, path := http.MethodDelete, fmt.Sprintf("/v1/webhooks/%d", id)
			if action == "test" {
				method, path = http.MethodPost, path+"/test"
			}
			if _, err := v.ask(ctx, method, path, nil); err != nil {
				return err
			}
			return c.done(fmt.Sprintf("webhook %d: %s", id, done))
		}),
	}
}

func positive(text, what string) (int64, error) {
	id, err := strconv.ParseInt(text, 10, 64)
	if err != nil || id < 1 {
		return 0, &exit{ExitUsage, fmt.Errorf("%q is no number of a %s", text, what)}
	}
	return id, nil
}

func (c *Command) webhookDead(f *verifierFlags) *cobra.Command {
	var most int
	cmd := &cobra.Command{
		Use:   "dead",
		Short: "List the deliveries that were given up, newest first",
		Args:  cobra.NoArgs,
		RunE: c.verified(f, func(ctx context.Context, v *verifier, _ []string) error {
			letters, raw, err := all[deadLetter](ctx, v, "/v1/deliveries", nil, max(most, 0))
			if err != nil {
				return err
			}
			return c.print(raw, func(w io.Writer) {
				rows := [][]string{{"ID", "WEBHOOK", "EVENT", "SINCE", "ATTEMPTS", "LAST ERROR"}}
				for _, d := range letters {
					rows = append(rows, []string{
						strconv.FormatInt(d.ID, 10), strconv.FormatInt(d.Webhook, 10), reason.OneLine(d.Event), local(d.Created), strconv.Itoa(d.Attempts), reason.OneLine(d.Error),
					})
				}
				table(w, rows)
			})
		}),
	}
	cmd.Flags().IntVar(&most, "last", 0, "how many (all)")
	return cmd
}

func (c *Command) webhookRevive(f *verifierFlags) *cobra.Command {
	var every bool
	var of int64
	cmd := &cobra.Command{
		Use:               "revive ID... | --all [--webhook ID]",
		Short:             "Queue deliveries anew that were given up",
		Args:              cobra.ArbitraryArgs,
		ValidArgsFunction: completeNumbers(c, f, 1000, "/v1/deliveries?limit=100", func(d deadLetter) (int64, string) { return d.ID, d.Event + ": " + d.Error }),
		RunE: c.verified(f, func(ctx context.Context, v *verifier, args []string) error {
			if every == (len(args) > 0) || of != 0 && !every {
				return &exit{ExitUsage, errors.New("numbers of deliveries are wanted, or --all")}
			}
			var ids []int64
			for _, a := range args {
				id, err := positive(a, "delivery")
				if err != nil {
					return err
				}
				ids = append(ids, id)
			}
			if every {
				letters, _, err := all[deadLetter](ctx, v, "/v1/deliveries", nil, 0)
				if err != nil {
					return err
				}
				for _, d := range letters {
					if of == 0 || d.Webhook == of {
						ids = append(ids, d.ID)
					}
				}
			}
			for part := range slices.Chunk(ids, decideAtOnce) {
				if _, err := v.ask(ctx, http.MethodPost, "/v1/deliveries/revive", map[string]any{"ids": part}); err != nil {
					return err
				}
			}
			return c.done(plural(uint64(len(ids)), "delivery", "deliveries") + " queued anew")
		}),
	}
	cmd.Flags().BoolVar(&every, "all", false, "all that were given up")
	cmd.Flags().Int64Var(&of, "webhook", 0, "with --all: only those to this webhook")
	return cmd
}
