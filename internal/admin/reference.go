package admin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/vtpm/reason"
)

type reference struct {
	ID      int64      `json:"id"`
	Subject string     `json:"subject"`
	Kind    string     `json:"kind"`
	Path    string     `json:"path"`
	Digest  string     `json:"digest"`
	Source  string     `json:"source"`
	Detail  string     `json:"detail"`
	State   string     `json:"state"`
	By      string     `json:"by"`
	Second  string     `json:"second"`
	Time    *time.Time `json:"time"`
}

func (c *Command) referenceCommand() *cobra.Command {
	f := &verifierFlags{}
	cmd := parent("reference", "Reference Values of a Verifier")
	f.add(cmd)
	cmd.AddCommand(c.referenceList(f), c.referenceImport(f), c.referenceDecide(f, "approve", "Approve proposed values, as a second person"),
		c.referenceDecide(f, "reject", "Reject proposed values, or withdraw approved ones"))
	return cmd
}

func (c *Command) referenceList(f *verifierFlags) *cobra.Command {
	q := map[string]*string{}
	cmd := &cobra.Command{Use: "list", Short: "List Reference Values, newest first", Args: cobra.NoArgs}
	for name, use := range map[string]string{
		"subject": "only of this node or VM", "kind": "only these: host-event, host-pcr, host-ima, launcher, vm-pcr, vm-ima",
		"state": "only these: proposed, approved, rejected", "source": "only these: learned, file, manifest, package, operator", "search": "part of the path, or the whole digest",
	} {
		q[name] = cmd.Flags().String(name, "", use)
	}
	most := cmd.Flags().Int("last", 0, "how many (all)")
	cmd.RunE = c.verified(f, func(ctx context.Context, v *verifier, _ []string) error {
		query := url.Values{}
		for name, value := range q {
			if *value != "" {
				query.Set(name, *value)
			}
		}
		if s := query.Get("subject"); s != "" {
			if n, err := findNode(ctx, v, s); err != nil {
				return err
			} else if n != nil {
				query.Set("subject", n.ID)
			}
		}
		values, raw, err := all[reference](ctx, v, "/v1/values", query, max(*most, 0))
		if err != nil {
			return err
		}
		return c.print(raw, func(w io.Writer) {
			rows := [][]string{{"ID", "STATE", "KIND", "SUBJECT", "SOURCE", "BY", "DIGEST", "PATH"}}
			for _, r := range values {
				by := r.By
				if r.Second != "" {
					by += ", " + r.Second
				}
				rows = append(rows, []string{
					strconv.FormatInt(r.ID, 10), r.State, r.Kind, cmp.Or(reason.OneLine(r.Subject), "(all)"), reason.OneLine(r.Source + " " + r.Detail), reason.OneLine(by), reason.OneLine(r.Digest), reason.OneLine(r.Path),
				})
			}
			table(w, rows)
		})
	})
	return cmd
}

// maxReference is what a Verifier takes in one file, in bytes.
const maxReference = 32 << 20

func (c *Command) referenceImport(f *verifierFlags) *cobra.Command {
	var format, signature, subject, kind, name string
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Import a file of Reference Values",
		Long: "Imports a file of Reference Values: checksums as sha256sum writes them (--format sums), values in JSON (values), the same " +
			"signed (manifest), a signed manifest of launchers (launchers), a signed CoRIM (corim), or one that nobody signed " +
			"(corim-unsigned). A signature is read from FILE.sig; a CoRIM has its own.",
		Args: cobra.ExactArgs(1),
		RunE: c.verified(f, func(ctx context.Context, v *verifier, args []string) error {
			body := map[string]any{"format": format}
			for key, value := range map[string]string{"kind": kind, "subject": subject, "name": name} {
				if value != "" {
					body[key] = value
				}
			}
			if format == "sums" && name == "" {
				body["name"] = filepath.Base(args[0])
			}
			content, err := readAtMost(args[0], maxReference)
			if err != nil {
				return err
			}
			body["content"] = content
			if format == "manifest" || format == "launchers" {
				if body["signature"], err = readAtMost(cmp.Or(signature, args[0]+".sig"), 64<<10); err != nil {
					return err
				}
			}
			if subject != "" {
				if n, err := findNode(ctx, v, subject); err != nil {
					return err
				} else if n != nil {
					body["subject"] = n.ID
				}
			}
			added, raw, err := call[struct {
				Values, New int
				State       string
				Ignored     map[string]int
			}](ctx, v, http.MethodPost, "/v1/values/import", body)
			if err != nil {
				return err
			}
			return c.print(raw, func(w io.Writer) {
				fmt.Fprintf(w, "%s: %s, %d of them new\n", plural(uint64(added.Values), "Reference Value", "Reference Values"), added.State, added.New)
				for _, what := range slices.Sorted(maps.Keys(added.Ignored)) {
					fmt.Fprintf(w, "ignored: %d %s\n", added.Ignored[what], reason.OneLine(what))
				}
			})
		}),
	}
	cmd.Flags().StringVar(&format, "format", "sums", "sums, values, manifest, launchers, corim, corim-unsigned")
	cmd.Flags().StringVar(&signature, "signature", "", "the signature's file (FILE.sig)")
	cmd.Flags().StringVar(&subject, "subject", "", "the node or VM that they are for, where the file does not say (all)")
	cmd.Flags().StringVar(&kind, "kind", "", "of checksums: host-ima, launcher, vm-ima (host-ima)")
	cmd.Flags().StringVar(&name, "name", "", "of checksums: the package or repository (the file's name)")
	return cmd
}

func readAtMost(path string, most int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("%s is longer than %d bytes", path, most)
	}
	return b, err
}

// decideAtOnce is how many values, or deliveries, a Verifier decides in one request.
const decideAtOnce = 1000

func (c *Command) referenceDecide(f *verifierFlags, action, short string) *cobra.Command {
	var by string
	cmd := &cobra.Command{
		Use:   action + " ID...",
		Short: short,
		Args:  cobra.ArbitraryArgs,
		RunE: c.verified(f, func(ctx context.Context, v *verifier, args []string) error {
			var ids []int64
			for _, a := range args {
				id, err := strconv.ParseInt(a, 10, 64)
				if err != nil || id < 1 {
					return &exit{ExitUsage, fmt.Errorf("%q is no number of a Reference Value", a)}
				}
				ids = append(ids, id)
			}
			if by != "" {
				values, _, err := all[reference](ctx, v, "/v1/values", url.Values{"state": {"proposed"}}, 0)
				if err != nil {
					return err
				}
				for _, r := range values {
					if r.By == by {
						ids = append(ids, r.ID)
					}
				}
			}
			if len(ids) == 0 {
				return &exit{ExitUsage, errors.New("no Reference Value is named")}
			}
			for part := range slices.Chunk(ids, decideAtOnce) {
				if _, err := v.ask(ctx, http.MethodPost, "/v1/values/"+action, map[string]any{"ids": part}); err != nil {
					return err
				}
			}
			return c.done(fmt.Sprintf("%s: %s", plural(uint64(len(ids)), "Reference Value", "Reference Values"), map[string]string{"approve": "approved", "reject": "rejected"}[action]))
		}),
	}
	cmd.Flags().StringVar(&by, "proposed-by", "", "all that this person has proposed")
	return cmd
}

func (c *Command) auditCommand() *cobra.Command {
	f := &verifierFlags{}
	cmd := parent("audit", "A Verifier's audit log")
	f.add(cmd)
	var noted []string
	verify := &cobra.Command{
		Use:   "verify [FILE] [--noted ID:HASH]...",
		Short: "Check that an audit log is whole, in a file, or as a Verifier exports it",
		Long: "Checks each hash and each link of an audit log, exported to a file (\"-\" is standard input), or asked of the Verifier, and prints " +
			"where it ends. Whoever notes that elsewhere, and gives it back with --noted, finds out whether the log was cut or written anew meanwhile.",
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var heads []fleet.AuditHead
			for _, n := range noted {
				var h fleet.AuditHead
				if _, err := fmt.Sscanf(n, "%d:%64s", &h.ID, &h.Hash); err != nil || h.ID < 1 {
					return &exit{ExitUsage, fmt.Errorf("--noted %q: ID:HASH is wanted", n)}
				}
				heads = append(heads, h)
			}
			return c.verifyAudit(cmd.Context(), f, args, heads)
		},
	}
	verify.Flags().StringArrayVar(&noted, "noted", nil, "where the log ended at an earlier time, as ID:HASH")
	export := &cobra.Command{
		Use:   "export",
		Short: "Print the audit log as JSON lines",
		Args:  cobra.NoArgs,
		RunE: c.verified(f, func(ctx context.Context, v *verifier, _ []string) error {
			resp, err := v.send(ctx, http.MethodGet, "/v1/audit/export", nil)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			_, err = io.Copy(c.Stdout, resp.Body)
			return err
		}),
	}
	cmd.AddCommand(verify, export)
	return cmd
}

func (c *Command) verifyAudit(ctx context.Context, f *verifierFlags, args []string, noted []fleet.AuditHead) error {
	var in io.Reader
	switch {
	case len(args) == 0:
		v, err := c.verifier(f)
		if err != nil {
			return err
		}
		resp, err := v.send(ctx, http.MethodGet, "/v1/audit/export", nil)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		in = resp.Body
	case args[0] == "-":
		in = c.Stdin
	default:
		file, err := os.Open(args[0])
		if err != nil {
			return notAppraised(err)
		}
		defer file.Close()
		in = file
	}
	head, err := fleet.VerifyExport(in, noted...)
	var broken *fleet.AuditError
	if errors.As(err, &broken) {
		return &exit{ExitRefused, err}
	}
	if err != nil {
		return notAppraised(err)
	}
	return c.print(head, func(w io.Writer) {
		if head.ID == 0 {
			fmt.Fprintln(w, "the log is empty")
			return
		}
		fmt.Fprintf(w, "the log is whole; it ends at %d:%s\n", head.ID, head.Hash)
	})
}
