package admin

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"virt-trust/internal/vtpm/reason"
)

// fleetNode, fleetVM and the others are what is read out of a Verifier's answers;
// --json prints the answers themselves.
type fleetNode struct {
	ID         string         `json:"id"`
	Name       string         `json:"name"`
	State      string         `json:"state"`
	Tier       string         `json:"tier"`
	Codes      []string       `json:"codes"`
	Round      int64          `json:"round"`
	Received   *time.Time     `json:"received"`
	Expires    *time.Time     `json:"expires"`
	VMs        map[string]int `json:"vms"`
	Problem    string         `json:"problem"`
	ApprovedBy string         `json:"approved_by"`
	RevokedWhy string         `json:"revoked_why"`
	EK         string         `json:"ek"`
	EKTrust    string         `json:"ek_trust"`
	Learns     *bool          `json:"learns"`
	Result     *fleetResult   `json:"result"`
}

type fleetResult struct {
	Host   fleetAppraisal `json:"host"`
	Kernel string         `json:"kernel"`
	VMs    []struct {
		UUID    string `json:"uuid"`
		Name    string `json:"name"`
		Running bool   `json:"running"`
		fleetAppraisal
	} `json:"vms"`
}

type fleetAppraisal struct {
	Tier    string `json:"tier"`
	Reasons []struct {
		Code string `json:"code"`
		Tier string `json:"tier"`
		What string `json:"what"`
	} `json:"reasons"`
}

type fleetVM struct {
	UUID     string     `json:"uuid"`
	Name     string     `json:"name"`
	Node     string     `json:"node"`
	NodeName string     `json:"node_name"`
	Running  bool       `json:"running"`
	Tier     string     `json:"tier"`
	Expires  *time.Time `json:"expires"`
}

type fleetRound struct {
	ID       int64             `json:"id"`
	Received *time.Time        `json:"received"`
	Count    int64             `json:"count"`
	HostTier string            `json:"host_tier"`
	VMTiers  map[string]string `json:"vm_tiers"`
	Codes    []string          `json:"codes"`
}

// tierExit is the exit code of a command that shows a tier.
func tierExit(tier string) error {
	switch tier {
	case "affirming", "warning":
		return nil
	case "contraindicated":
		return &exit{code: ExitRefused}
	}
	return &exit{code: ExitNotAppraised}
}

func (c *Command) fleetCommand() *cobra.Command {
	f := &verifierFlags{}
	cmd := parent("fleet", "Hosts and VMs as a Verifier sees them")
	f.add(cmd)
	cmd.AddCommand(c.fleetList(f, "list", "List the nodes", url.Values{}), c.fleetList(f, "pending", "List the nodes that wait to be let in", url.Values{"state": {"pending"}}),
		c.fleetShow(f), c.fleetRounds(f), c.fleetDiff(f), c.fleetApprove(f), c.fleetLearn(f),
		c.fleetEnd(f, "reject", "Turn a pending node away"), c.fleetEnd(f, "revoke", "End an active node"), c.fleetEnd(f, "dismiss", "Say that a node's problem was looked at"),
		c.fleetToken(f))
	return cmd
}

func (c *Command) fleetList(f *verifierFlags, use, short string, query url.Values) *cobra.Command {
	var tier, state string
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs}
	if use == "list" {
		cmd.Flags().StringVar(&tier, "tier", "", "only these: affirming, warning, contraindicated, none")
		cmd.Flags().StringVar(&state, "state", "", "only these: pending, active, revoked")
	}
	cmd.RunE = c.verified(f, func(ctx context.Context, v *verifier, _ []string) error {
		q := maps.Clone(query)
		for key, value := range map[string]string{"tier": tier, "state": state} {
			if value != "" {
				q.Set(key, value)
			}
		}
		nodes, raw, err := all[fleetNode](ctx, v, "/v1/nodes", q, 0)
		if err != nil {
			return err
		}
		return c.print(raw, func(w io.Writer) {
			rows := [][]string{{"NAME", "STATE", "TIER", "VMS", "SEEN", "WHY"}}
			for _, n := range nodes {
				why := strings.Join(n.Codes, " ")
				if n.Problem != "" {
					why = "! " + n.Problem
				}
				rows = append(rows, []string{reason.OneLine(n.Name), n.State, n.Tier, counts(n.VMs), local(n.Received), reason.OneLine(why)})
			}
			table(w, rows)
		})
	})
	return cmd
}

// counts spells how many VMs stand where, the best first.
func counts(vms map[string]int) string {
	var parts []string
	for _, tier := range []string{"affirming", "warning", "contraindicated", "none"} {
		if n := vms[tier]; n > 0 {
			parts = append(parts, strconv.Itoa(n)+" "+tier)
		}
	}
	return strings.Join(parts, ", ")
}

// findNode gives a node by its ID or its name; of a name that a revoked node had
// too, the one that is not revoked.
func findNode(ctx context.Context, v *verifier, name string) (*fleetNode, error) {
	nodes, _, err := all[fleetNode](ctx, v, "/v1/nodes", url.Values{"search": {name}}, 0)
	if err != nil {
		return nil, err
	}
	nodes = slices.DeleteFunc(nodes, func(n fleetNode) bool { return n.ID != name && !strings.EqualFold(n.Name, name) })
	if len(nodes) == 0 {
		return nil, nil
	}
	slices.SortStableFunc(nodes, func(a, b fleetNode) int {
		rank := func(n fleetNode) int {
			if n.State == "revoked" {
				return 1
			}
			return 0
		}
		return cmp.Compare(rank(a), rank(b))
	})
	return &nodes[0], nil
}

func needNode(ctx context.Context, v *verifier, name string) (*fleetNode, error) {
	n, err := findNode(ctx, v, name)
	if err == nil && n == nil {
		err = fmt.Errorf("the Verifier knows no node %q", name)
	}
	return n, err
}

func (c *Command) fleetShow(f *verifierFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "show NODE | VM",
		Short: "Show a node or a VM, by name, ID or UUID, and why it is trusted or not",
		Long:  "Shows a node or a VM, by name, ID or UUID, and why it is trusted or not. The exit code is 0 if it is affirming or a warning, 3 if it is contraindicated, 4 if it could not be appraised.",
		Args:  cobra.ExactArgs(1),
		RunE: c.verified(f, func(ctx context.Context, v *verifier, args []string) error {
			n, err := findNode(ctx, v, args[0])
			if err != nil {
				return err
			}
			if n != nil {
				return c.showNode(ctx, v, n.ID)
			}
			vms, raw, err := all[fleetVM](ctx, v, "/v1/vms", url.Values{"search": {args[0]}}, 0)
			if err != nil {
				return err
			}
			found, raws := []fleetVM{}, []json.RawMessage{}
			for i, vm := range vms {
				if vm.UUID == args[0] || vm.Name == args[0] {
					found, raws = append(found, vm), append(raws, raw[i])
				}
			}
			if len(found) == 0 {
				return fmt.Errorf("the Verifier knows no node or VM %q", args[0])
			}
			return c.showVMs(ctx, v, found, raws)
		}),
	}
}

func (c *Command) showNode(ctx context.Context, v *verifier, id string) error {
	n, raw, err := get[fleetNode](ctx, v, "/v1/nodes/"+url.PathEscape(id))
	if err != nil {
		return err
	}
	if err := c.print(raw, n.write); err != nil {
		return err
	}
	return tierExit(n.Tier)
}

func (n fleetNode) write(w io.Writer) {
	kernel := ""
	if n.Result != nil {
		kernel = n.Result.Kernel
	}
	learning := ""
	if n.Learns != nil && !*n.Learns && n.State != "revoked" {
		learning = "off: approve its rounds, or have it learned ('virt-trust fleet learn')"
	}
	fields(w,
		"Name", reason.OneLine(n.Name), "ID", n.ID, "State", n.State, "Tier", n.Tier, "Problem", reason.OneLine(n.Problem),
		"Revoked", reason.OneLine(n.RevokedWhy), "Approved by", reason.OneLine(n.ApprovedBy), "EK", n.EK, "EK vouched by", reason.OneLine(n.EKTrust), "Learning", learning,
		"Kernel", reason.OneLine(kernel), "Last round", local(n.Received), "Good until", local(n.Expires),
	)
	if n.Result == nil {
		return
	}
	n.Result.Host.write(w)
	for _, vm := range n.Result.VMs {
		fmt.Fprintf(w, "\n%s (%s): %s\n", reason.OneLine(vm.Name), vm.UUID, vm.Tier)
		vm.write(w)
	}
}

func (a fleetAppraisal) write(w io.Writer) {
	for _, r := range a.Reasons {
		fmt.Fprintf(w, "  %s: %s: %s\n", r.Tier, r.Code, reason.OneLine(r.What))
	}
}

func (c *Command) showVMs(ctx context.Context, v *verifier, vms []fleetVM, raws []json.RawMessage) error {
	appraisals := make([]fleetAppraisal, len(vms))
	for i, vm := range vms {
		n, _, err := get[fleetNode](ctx, v, "/v1/nodes/"+url.PathEscape(vm.Node))
		if err != nil {
			return err
		}
		if n.Result == nil {
			continue
		}
		for _, of := range n.Result.VMs {
			if of.UUID == vm.UUID {
				appraisals[i] = of.fleetAppraisal
			}
		}
	}
	err := c.print(raws, func(w io.Writer) {
		for i, vm := range vms {
			if i > 0 {
				fmt.Fprintln(w)
			}
			fields(w, "Name", reason.OneLine(vm.Name), "UUID", vm.UUID, "Node", reason.OneLine(vm.NodeName), "Running", strconv.FormatBool(vm.Running),
				"Tier", vm.Tier, "Good until", local(vm.Expires))
			appraisals[i].write(w)
		}
	})
	if err != nil {
		return err
	}
	if len(vms) > 1 && vms[0].UUID == vms[1].UUID && vms[0].Running && vms[1].Running {
		return &exit{ExitNotAppraised, errors.New("two nodes say that the VM runs there")}
	}
	// Of several, the worst.
	worst := slices.MaxFunc(vms, func(a, b fleetVM) int { return cmp.Compare(rank(a.Tier), rank(b.Tier)) })
	return tierExit(worst.Tier)
}

func rank(tier string) int {
	if i := slices.Index([]string{"affirming", "warning", "contraindicated"}, tier); i >= 0 {
		return i
	}
	return 3
}

func (c *Command) fleetRounds(f *verifierFlags) *cobra.Command {
	var failed bool
	var most int
	cmd := &cobra.Command{
		Use:   "rounds NODE",
		Short: "List a node's rounds, newest first",
		Args:  cobra.ExactArgs(1),
		RunE: c.verified(f, func(ctx context.Context, v *verifier, args []string) error {
			if most < 1 {
				return &exit{ExitUsage, errors.New("--last: at least 1")}
			}
			n, err := needNode(ctx, v, args[0])
			if err != nil {
				return err
			}
			q := url.Values{}
			if failed {
				q.Set("failed", "true")
			}
			rounds, raw, err := all[fleetRound](ctx, v, "/v1/nodes/"+url.PathEscape(n.ID)+"/rounds", q, most)
			if err != nil {
				return err
			}
			return c.print(raw, func(w io.Writer) {
				rows := [][]string{{"ROUND", "SINCE", "TIMES", "HOST", "VMS", "WHY"}}
				for _, r := range rounds {
					vms := map[string]int{}
					for _, t := range r.VMTiers {
						vms[t]++
					}
					rows = append(rows, []string{strconv.FormatInt(r.ID, 10), local(r.Received), strconv.FormatInt(r.Count, 10), r.HostTier, counts(vms), reason.OneLine(strings.Join(r.Codes, " "))})
				}
				table(w, rows)
			})
		}),
	}
	cmd.Flags().BoolVar(&failed, "failed", false, "only those that were not affirming")
	cmd.Flags().IntVar(&most, "last", 20, "how many")
	return cmd
}

func (c *Command) fleetDiff(f *verifierFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "diff NODE [FROM [TO]]",
		Short: "Show what differs between two rounds of a node",
		Long:  "Shows what differs between two rounds of a node, by their numbers: by default its last one and the one before; with FROM alone, that one and the last.",
		Args:  cobra.RangeArgs(1, 3),
		RunE: c.verified(f, func(ctx context.Context, v *verifier, args []string) error {
			n, err := needNode(ctx, v, args[0])
			if err != nil {
				return err
			}
			numbers := make([]int64, 2)
			for i, s := range args[1:] {
				if numbers[i], err = strconv.ParseInt(s, 10, 64); err != nil || numbers[i] < 1 {
					return &exit{ExitUsage, fmt.Errorf("%q is no number of a round", s)}
				}
			}
			if len(args) < 3 {
				last, _, err := all[fleetRound](ctx, v, "/v1/nodes/"+url.PathEscape(n.ID)+"/rounds", nil, 2)
				if err != nil {
					return err
				}
				if len(last) < 2 && (len(args) < 2 || len(last) < 1) {
					return fmt.Errorf("node %q has no two rounds that differ", n.Name)
				}
				numbers[1] = last[0].ID
				if len(args) < 2 {
					numbers[0] = last[1].ID
				}
			}
			type difference struct{ Subject, Name, Kind, What, Before, After string }
			answer, raw, err := get[struct{ Items []difference }](ctx, v, fmt.Sprintf("/v1/rounds/%d/diff?from=%d", numbers[1], numbers[0]))
			if err != nil {
				return err
			}
			return c.print(raw, func(w io.Writer) {
				if len(answer.Items) == 0 {
					fmt.Fprintln(w, "nothing differs")
				}
				for _, d := range answer.Items {
					who := cmp.Or(d.Name, d.Subject)
					fmt.Fprintf(w, "%s: %s %s: %s -> %s\n", reason.OneLine(who), d.Kind, reason.OneLine(d.What), orDash(reason.OneLine(d.Before)), orDash(reason.OneLine(d.After)))
				}
			})
		}),
	}
}

func (c *Command) fleetApprove(f *verifierFlags) *cobra.Command {
	var round int64
	var which []string
	cmd := &cobra.Command{
		Use:   "approve NODE [--round N [--reason SUBJECT:N]...]",
		Short: "Let a pending node in, or take what a round of a node showed for right",
		Args:  cobra.ExactArgs(1),
		RunE: c.verified(f, func(ctx context.Context, v *verifier, args []string) error {
			n, err := needNode(ctx, v, args[0])
			if err != nil {
				return err
			}
			if round == 0 {
				if len(which) > 0 {
					return &exit{ExitUsage, errors.New("--reason goes with --round")}
				}
				return c.act(ctx, v, n, "approve", "let in", nil)
			}
			return c.approveRound(ctx, v, n, round, which)
		}),
	}
	cmd.Flags().Int64Var(&round, "round", 0, "a round's number: Reference Values are made of what it showed")
	cmd.Flags().StringArrayVar(&which, "reason", nil, "only of this reason: host:0 is the first of the host, UUID:0 of a VM")
	return cmd
}

func (c *Command) approveRound(ctx context.Context, v *verifier, n *fleetNode, round int64, which []string) error {
	type ref struct {
		Subject string `json:"subject"`
		Reason  int    `json:"reason"`
	}
	body := struct {
		Reasons []ref `json:"reasons,omitempty"`
	}{}
	for _, s := range which {
		subject, number, _ := strings.Cut(s, ":")
		i, err := strconv.Atoi(number)
		if err != nil || i < 0 || subject == "" {
			return &exit{ExitUsage, fmt.Errorf("--reason %q: host:N or UUID:N is wanted", s)}
		}
		body.Reasons = append(body.Reasons, ref{subject, i})
	}
	// The number could be another node's.
	r, _, err := get[struct{ Node string }](ctx, v, fmt.Sprintf("/v1/rounds/%d", round))
	if err != nil {
		return err
	}
	if r.Node != n.ID {
		return fmt.Errorf("round %d is not one of node %q", round, n.Name)
	}
	type left struct{ Code, What string }
	done, raw, err := call[struct {
		Values, New int
		State       string
		Left        []left
	}](ctx, v, "POST", fmt.Sprintf("/v1/rounds/%d/approve", round), body)
	if err != nil {
		return err
	}
	return c.print(raw, func(w io.Writer) {
		fmt.Fprintf(w, "%s of round %d: %s, %d of them new\n", plural(uint64(done.Values), "Reference Value", "Reference Values"), round, done.State, done.New)
		for _, l := range done.Left {
			fmt.Fprintf(w, "left: %s: %s\n", l.Code, reason.OneLine(l.What))
		}
	})
}

// act does something to a node and prints the node.
func (c *Command) act(ctx context.Context, v *verifier, n *fleetNode, action, done string, body any) error {
	after, raw, err := call[fleetNode](ctx, v, "POST", "/v1/nodes/"+url.PathEscape(n.ID)+"/"+action, body)
	if err != nil {
		return err
	}
	return c.print(raw, func(w io.Writer) { fmt.Fprintf(w, "%s: %s\n", reason.OneLine(after.Name), done) })
}

func (c *Command) fleetLearn(f *verifierFlags) *cobra.Command {
	var off bool
	cmd := &cobra.Command{Use: "learn NODE [--off]", Short: "Learn what a node shows for the first time, or do so no more", Args: cobra.ExactArgs(1)}
	cmd.Flags().BoolVar(&off, "off", false, "do so no more")
	cmd.RunE = c.verified(f, func(ctx context.Context, v *verifier, args []string) error {
		n, err := needNode(ctx, v, args[0])
		if err != nil {
			return err
		}
		done := "what it shows for the first time is learned"
		if off {
			done = "nothing of it is learned any more"
		}
		return c.act(ctx, v, n, "learn", done, map[string]bool{"on": !off})
	})
	return cmd
}

func (c *Command) fleetEnd(f *verifierFlags, action, short string) *cobra.Command {
	var why string
	cmd := &cobra.Command{Use: action + " NODE", Short: short, Args: cobra.ExactArgs(1)}
	done := map[string]string{"reject": "turned away", "revoke": "revoked", "dismiss": "its problem was put aside"}[action]
	if action != "dismiss" {
		cmd.Flags().StringVar(&why, "why", "", "for people, and for the audit log")
	}
	cmd.RunE = c.verified(f, func(ctx context.Context, v *verifier, args []string) error {
		n, err := needNode(ctx, v, args[0])
		if err != nil {
			return err
		}
		var body any
		if why != "" {
			body = map[string]string{"why": why}
		}
		return c.act(ctx, v, n, action, done, body)
	})
	return cmd
}

func (c *Command) fleetToken(f *verifierFlags) *cobra.Command {
	cmd := parent("token", "Join tokens, each of which lets one node in")
	var name string
	var lifetime time.Duration
	create := &cobra.Command{
		Use:   "create [--name NAME] [--lifetime TIME]",
		Short: "Make a join token, and print it this once",
		Args:  cobra.NoArgs,
		RunE: c.verified(f, func(ctx context.Context, v *verifier, _ []string) error {
			if lifetime < time.Second {
				return &exit{ExitUsage, errors.New("--lifetime: at least 1s")}
			}
			body := map[string]any{"seconds": int64(lifetime / time.Second)}
			if name != "" {
				body["name"] = name
			}
			t, raw, err := call[struct{ Secret string }](ctx, v, "POST", "/v1/tokens", body)
			if err != nil {
				return err
			}
			return c.print(raw, func(w io.Writer) { fmt.Fprintln(w, reason.OneLine(t.Secret)) })
		}),
	}
	create.Flags().StringVar(&name, "name", "", "of the node that may use it (any)")
	create.Flags().DurationVar(&lifetime, "lifetime", time.Hour, "how long it is good")
	list := &cobra.Command{
		Use:   "list",
		Short: "List join tokens, newest first",
		Args:  cobra.NoArgs,
		RunE: c.verified(f, func(ctx context.Context, v *verifier, _ []string) error {
			type token struct {
				Digest, Name, By string
				Created, Expires *time.Time
				Used             *time.Time
				UsedBy           string `json:"used_by"`
			}
			tokens, raw, err := all[token](ctx, v, "/v1/tokens", nil, 0)
			if err != nil {
				return err
			}
			return c.print(raw, func(w io.Writer) {
				rows := [][]string{{"DIGEST", "FOR", "BY", "EXPIRES", "USED BY"}}
				for _, t := range tokens {
					rows = append(rows, []string{t.Digest[:min(12, len(t.Digest))], reason.OneLine(t.Name), reason.OneLine(t.By), local(t.Expires), t.UsedBy})
				}
				table(w, rows)
			})
		}),
	}
	revoke := &cobra.Command{
		Use:   "revoke DIGEST",
		Short: "Take a join token back that was not used, by the beginning of its digest",
		Args:  cobra.ExactArgs(1),
		RunE: c.verified(f, func(ctx context.Context, v *verifier, args []string) error {
			if _, err := v.ask(ctx, "DELETE", "/v1/tokens/"+url.PathEscape(args[0]), nil); err != nil {
				return err
			}
			return c.done(args[0] + ": taken back")
		}),
	}
	cmd.AddCommand(create, list, revoke)
	return cmd
}

// done answers where the Verifier has nothing to say.
func (c *Command) done(text string) error {
	return c.print(struct {
		Done bool `json:"done"`
	}{true}, func(w io.Writer) { fmt.Fprintln(w, text) })
}
