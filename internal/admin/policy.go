package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"virt-trust/internal/appraise"
	"virt-trust/internal/vtpm/reason"
)

type policyVersion struct {
	Version  int64                   `json:"version"`
	State    string                  `json:"state"`
	By       string                  `json:"by"`
	Time     *time.Time              `json:"time"`
	Document json.RawMessage         `json:"document"`
	Changes  []appraise.PolicyChange `json:"changes"`
	Unread   bool                    `json:"unread"`
}

// policyCheck is what a policy would change.
type policyCheck struct {
	Changes []appraise.PolicyChange `json:"changes"`
	Next    int64                   `json:"next"`
}

func (c *Command) policyCommand() *cobra.Command {
	f := &verifierFlags{}
	cmd := parent("policy", "The appraisal policy of a Verifier")
	f.add(cmd)
	cmd.AddCommand(c.policyShow(f), c.policyCheck(f), c.policySet(f), c.policyHistory(f),
		c.policyDecide(f, "approve", "Make the proposed policy the one that counts, as a second person"), c.policyDecide(f, "reject", "Drop the proposed policy"))
	return cmd
}

func (c *Command) policyShow(f *verifierFlags) *cobra.Command {
	var version int64
	var proposed bool
	cmd := &cobra.Command{
		Use:   "show [--version N | --proposed]",
		Short: "Print the policy that counts, an earlier one, or the proposed one",
		Args:  cobra.NoArgs,
		RunE: c.verified(f, func(ctx context.Context, v *verifier, _ []string) error {
			path := "/v1/policy"
			switch {
			case proposed && version != 0 || version < 0:
				return &exit{ExitUsage, errors.New("--version N, from 1 on, or --proposed")}
			case proposed:
				path += "/proposed"
			case version > 0:
				path += "/versions/" + strconv.FormatInt(version, 10)
			}
			p, raw, err := get[policyVersion](ctx, v, path)
			if err != nil {
				return err
			}
			if !c.json { // beside the document, which can be written to a file as it is
				fmt.Fprintf(c.Stderr, "virt-trust: %s\n", p.title())
			}
			return c.print(raw, func(w io.Writer) {
				text, _ := appraise.PolicyText(p.Document) // it was in JSON
				fmt.Fprintln(w, text)
			})
		}),
	}
	cmd.Flags().Int64Var(&version, "version", 0, "this one of those that counted")
	cmd.Flags().BoolVar(&proposed, "proposed", false, "the one that waits for a second person")
	return cmd
}

func (p policyVersion) title() string {
	if p.Version == 0 {
		return "no policy was set; this one counts"
	}
	does := "set"
	if p.State == "proposed" {
		does = "proposed"
	}
	return fmt.Sprintf("version %d, %s by %s, %s", p.Version, does, reason.OneLine(p.By), local(p.Time))
}

// readPolicy reads a policy's file, which is JSON at least: it becomes part of a
// request.
func readPolicy(name string) (json.RawMessage, error) {
	b, err := readFile(name, appraise.MaxPolicy)
	if err != nil {
		return nil, err
	}
	var document json.RawMessage
	if err := json.Unmarshal(b, &document); err != nil {
		return nil, fmt.Errorf("%s is no JSON: %w", name, err)
	}
	return document, nil
}

// checkPolicy asks the Verifier what a policy would change.
func checkPolicy(ctx context.Context, v *verifier, document json.RawMessage) (policyCheck, json.RawMessage, error) {
	return call[policyCheck](ctx, v, http.MethodPost, "/v1/policy/check", map[string]any{"document": document})
}

// noChange is said of a policy that is as the one that counts.
const noChange = "nothing differs from the policy that counts"

func writePolicyChanges(w io.Writer, changes []appraise.PolicyChange) {
	for _, ch := range changes {
		fmt.Fprintf(w, "%s: %s -> %s\n", reason.OneLine(ch.Key), orDash(reason.OneLine(ch.Before)), orDash(reason.OneLine(ch.After)))
	}
}

func (c *Command) policyCheck(f *verifierFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE",
		Short: "Check a policy's file, and show what it would change; nothing is set",
		Args:  cobra.ExactArgs(1),
		RunE: c.verified(f, func(ctx context.Context, v *verifier, args []string) error {
			document, err := readPolicy(args[0])
			if err != nil {
				return err
			}
			check, raw, err := checkPolicy(ctx, v, document)
			if err != nil {
				return err
			}
			return c.print(raw, func(w io.Writer) {
				if len(check.Changes) == 0 {
					fmt.Fprintln(w, noChange)
				}
				writePolicyChanges(w, check.Changes)
			})
		}),
	}
}

func (c *Command) policySet(f *verifierFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "set FILE",
		Short: "Show what a policy's file changes, and set it; in four-eyes mode propose it",
		Long:  "Shows what a policy's file changes, and sets it, or proposes it where the Verifier wants a second person. A policy that changes nothing is not set. If the policy changed between the two, nothing is set.",
		Args:  cobra.ExactArgs(1),
		RunE: c.verified(f, func(ctx context.Context, v *verifier, args []string) error {
			document, err := readPolicy(args[0])
			if err != nil {
				return err
			}
			check, _, err := checkPolicy(ctx, v, document)
			if err != nil {
				return err
			}
			answer := struct {
				Changes []appraise.PolicyChange `json:"changes"`
				Set     json.RawMessage         `json:"set"` // null where nothing changes
			}{Changes: check.Changes}
			says := noChange
			if len(check.Changes) > 0 {
				p, raw, err := call[policyVersion](ctx, v, http.MethodPut, "/v1/policy", map[string]any{"version": check.Next, "document": document})
				if err != nil {
					return err
				}
				answer.Set = raw
				says = fmt.Sprintf("version %d counts from now on", p.Version)
				if p.State == "proposed" {
					says = fmt.Sprintf("proposed as version %d: it counts once another person approves it", p.Version)
				}
			}
			return c.print(answer, func(w io.Writer) {
				writePolicyChanges(w, check.Changes)
				fmt.Fprintln(w, says)
			})
		}),
	}
}

func (c *Command) policyHistory(f *verifierFlags) *cobra.Command {
	var most int
	cmd := &cobra.Command{
		Use:   "history",
		Short: "List the policies that counted, newest first, and what each changed",
		Args:  cobra.NoArgs,
		RunE: c.verified(f, func(ctx context.Context, v *verifier, _ []string) error {
			if most < 1 {
				return &exit{ExitUsage, errors.New("--last: at least 1")}
			}
			versions, raw, err := all[policyVersion](ctx, v, "/v1/policy/versions", nil, most)
			if err != nil {
				return err
			}
			return c.print(raw, func(w io.Writer) {
				for i, p := range versions {
					if i > 0 {
						fmt.Fprintln(w)
					}
					fmt.Fprintln(w, p.title())
					switch {
					case p.Unread:
						fmt.Fprintln(w, "what it changed cannot be read any more")
					case len(p.Changes) == 0:
						fmt.Fprintln(w, "it changed nothing")
					}
					writePolicyChanges(w, p.Changes)
				}
			})
		}),
	}
	cmd.Flags().IntVar(&most, "last", 20, "how many")
	return cmd
}

func (c *Command) policyDecide(f *verifierFlags, action, short string) *cobra.Command {
	return &cobra.Command{
		Use:   action,
		Short: short,
		Args:  cobra.NoArgs,
		RunE: c.verified(f, func(ctx context.Context, v *verifier, _ []string) error {
			p, _, err := get[policyVersion](ctx, v, "/v1/policy/proposed")
			if err != nil {
				return err
			}
			var check policyCheck
			if action == "approve" {
				if check, _, err = checkPolicy(ctx, v, p.Document); err != nil {
					return err
				}
			}
			// The very version that was looked at.
			set, raw, err := call[policyVersion](ctx, v, http.MethodPost, "/v1/policy/proposed/"+action, map[string]int64{"version": p.Version})
			if err != nil {
				return err
			}
			if action == "reject" {
				return c.done("the proposal of " + reason.OneLine(p.By) + " was dropped")
			}
			return c.print(raw, func(w io.Writer) {
				writePolicyChanges(w, check.Changes)
				fmt.Fprintf(w, "version %d counts from now on\n", set.Version)
			})
		}),
	}
}
