package admin

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"

	"virt-trust/internal/vtpm/imagefile"
	"virt-trust/internal/vtpm/label"
	"virt-trust/internal/vtpm/reason"
)

// Label is the answer of virt-trust label show. All but the verdict is what
// the image says of itself: without virt-trustd nobody can tell whether it is
// genuine.
type Label struct {
	Image      string   `json:"image"`
	ID         string   `json:"label_id"`
	VM         string   `json:"vm"`
	Instance   string   `json:"vtpm"`
	Algorithm  string   `json:"algorithm"`
	Generation uint64   `json:"generation"`
	Recipients []string `json:"recipients"` // TPM Names of bind keys
	ThisHost   *bool    `json:"this_host,omitempty"`
	Verdict    string   `json:"verdict"` // right, unknown, other, none
	What       string   `json:"what,omitempty"`
}

func (c *Command) labelCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "label", Short: "Look at the labels of images", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return &exit{ExitUsage, errors.New("say what: virt-trust label show IMAGE")}
		},
	}
	cmd.AddCommand(&cobra.Command{
		Use:   "show IMAGE",
		Short: "Show the label in a qcow2 image and hold it against the list",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			payload, err := imagefile.ReadLabel(args[0])
			if err != nil {
				return &exit{ExitFailed, err}
			}
			parsed, err := label.UntrustedParse(payload)
			if err != nil {
				return &exit{ExitFailed, fmt.Errorf("%s: %w", args[0], err)}
			}
			l := newLabel(args[0], parsed)
			if err := withGuard(cmd.Context(), readTimeout, func(ctx context.Context, g *guard) error {
				return l.hold(ctx, g, payload)
			}); err != nil {
				l.Verdict, l.What = "none", reason.OneLine(err.Error())
			}
			if err := c.print(l, l.write); err != nil {
				return err
			}
			switch l.Verdict {
			case "right":
				return nil
			case "other":
				return &exit{code: ExitRefused}
			}
			return &exit{code: ExitNotAppraised}
		},
	})
	return cmd
}

func newLabel(image string, l *label.Label) *Label {
	out := &Label{
		Image: image, ID: hex.EncodeToString(l.ID[:]), VM: l.VM, Instance: reason.OneLine(l.Instance),
		Algorithm: l.Algorithm, Generation: l.Generation, Recipients: []string{},
	}
	for _, r := range l.Recipients {
		out.Recipients = append(out.Recipients, hex.EncodeToString(r.BindKeyName))
	}
	return out
}

// hold asks virt-trustd what it thinks of the label.
func (l *Label) hold(ctx context.Context, g *guard, payload []byte) error {
	var p props
	if err := g.Call(ctx, "CheckLabel", []any{payload, map[string]dbus.Variant{}}, &p); err != nil {
		return err
	}
	l.Verdict, l.What = p.text("verdict"), p.text("what")
	host, err := g.host(ctx)
	if err != nil || host.BindKeyName == "" {
		return nil // the verdict stands without it
	}
	here := false
	for _, r := range l.Recipients {
		here = here || r == host.BindKeyName
	}
	l.ThisHost = &here
	return nil
}

func (l *Label) write(w io.Writer) {
	verdict := l.Verdict
	if l.What != "" {
		verdict += ": " + l.What
	}
	host := ""
	if l.ThisHost != nil {
		host = map[bool]string{true: "yes", false: "no"}[*l.ThisHost]
	}
	pairs := []string{
		"Image", reason.OneLine(l.Image), "Label id", l.ID, "VM", l.VM, "vTPM", l.Instance,
		"Algorithm", l.Algorithm, "Generation", fmt.Sprint(l.Generation),
	}
	for _, r := range l.Recipients {
		pairs = append(pairs, "For bind key", r)
	}
	fields(w, append(pairs, "For this host", host, "Verdict", verdict)...)
}
