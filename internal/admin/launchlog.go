package admin

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"

	"virt-trust/internal/launcher/launchlog"
	"virt-trust/internal/vtpm/reason"
)

// LaunchLog is the answer of virt-trust launch-log.
type LaunchLog struct {
	State      string            `json:"state"` // replays, does-not-replay
	Problem    string            `json:"problem,omitempty"`
	PCR        uint64            `json:"pcr"`
	Live       map[string]string `json:"live"`     // what the PCR holds, by bank
	Replayed   map[string]string `json:"replayed"` // what the log gives
	BootID     string            `json:"boot_id"`
	ResetCount uint64            `json:"reset_count"`
	Entries    []json.RawMessage `json:"entries"`
}

func (c *Command) launchLogCommand() *cobra.Command {
	var verify bool
	var tcg string
	cmd := &cobra.Command{
		Use:   "launch-log",
		Short: "Show what was measured before VMs started, since boot",
		Long: "Shows the launch log of this boot: which programs and firmware ran, and for which VMs. --verify replays it against the PCR of the host's TPM that vouches for it; " +
			"--tcg writes it as a TCG event log.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			file, p, err := c.fetchLaunchLog(cmd.Context())
			if err != nil {
				if verify {
					err = notAppraised(err)
				}
				return err
			}
			if tcg != "" {
				return writeTCG(tcg, file)
			}
			l := newLaunchLog(file, p)
			if verify {
				l.Entries = nil
			}
			if err := c.print(l, func(w io.Writer) { l.write(w, verify) }); err != nil {
				return err
			}
			if verify && l.State != string(launchlog.Replays) {
				return &exit{code: ExitRefused}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&verify, "verify", false, "replay it against the TPM")
	cmd.Flags().StringVar(&tcg, "tcg", "", "write it to this file, for tpm2_eventlog(1)")
	cmd.MarkFlagsMutuallyExclusive("verify", "tcg")
	return cmd
}

// fetchLaunchLog gives the log as far as it was when the TPM was asked.
func (c *Command) fetchLaunchLog(ctx context.Context) (file []byte, p props, err error) {
	err = withGuard(ctx, workTimeout, func(ctx context.Context, g *guard) error {
		if err := g.Call(ctx, "LaunchLog", []any{uint64(0), map[string]dbus.Variant{}}, &file, &p); err != nil {
			return err
		}
		for uint64(len(file)) < p.number("size") {
			var piece []byte
			if err := g.Call(ctx, "LaunchLog", []any{uint64(len(file)), map[string]dbus.Variant{}}, &piece, new(props)); err != nil {
				return err
			}
			if len(piece) == 0 {
				return errors.New("the launch log ends too early")
			}
			file = append(file, piece...)
		}
		file = file[:min(uint64(len(file)), p.number("size"))]
		return nil
	})
	return file, p, err
}

// newLaunchLog replays the log here again: what virt-trustd says of it is not
// taken on trust.
func newLaunchLog(file []byte, p props) LaunchLog {
	l := LaunchLog{PCR: p.number("pcr"), Problem: p.text("problem"), Live: map[string]string{}, Entries: []json.RawMessage{}}
	live := map[string][]byte{}
	values, _ := p["values"].Value().(map[string]string)
	for bank, v := range values {
		if b, err := hex.DecodeString(v); err == nil {
			l.Live[bank], live[bank] = v, b
		}
	}
	log, err := launchlog.Parse(file)
	l.BootID, l.ResetCount, l.Replayed = log.Boot.ID, uint64(log.Boot.ResetCount), launchlog.Hex(log.Values)
	standing := log.Against(live, uint32(p.number("reset-count")))
	switch {
	case err != nil:
		l.State, l.Problem = string(launchlog.Broken), err.Error()
	case log.Boot.Gap != "":
		l.State, l.Problem = string(launchlog.Broken), reason.OneLine(log.Boot.Gap)
	case standing == launchlog.Replays:
		l.State = string(standing)
	default:
		l.State = string(launchlog.Broken)
		if l.Problem == "" {
			l.Problem = "the PCR holds another value"
		}
	}
	lines, _ := launchlog.Split(file)
	for _, line := range lines {
		l.Entries = append(l.Entries, json.RawMessage(line))
	}
	return l
}

func writeTCG(name string, file []byte) error {
	b, err := launchlog.TCG(file)
	if err != nil {
		return err
	}
	return os.WriteFile(name, b, 0o644)
}

func (l LaunchLog) write(w io.Writer, verify bool) {
	for _, raw := range l.Entries {
		var e launchlog.Entry
		if json.Unmarshal(raw, &e) != nil {
			continue
		}
		t := time.Unix(e.Time, 0)
		switch {
		case e.Boot != nil:
			fmt.Fprintf(w, "%s  boot %s, PCR %d\n", local(&t), reason.OneLine(e.Boot.ID), e.Boot.PCR)
		case e.Start != nil:
			fmt.Fprintf(w, "%s  start of VM %s, launchers %s\n", local(&t), reason.OneLine(e.Start.VM), ranges(e.Start.Launchers))
			if e.Start.EK != "" {
				fmt.Fprintf(w, "    EK %s\n", reason.OneLine(e.Start.EK))
			}
		}
		for _, f := range e.Files {
			by := f.By
			if by == "" {
				by = "not approved"
			}
			if f.IMA {
				by += ", IMA"
			}
			if f.Verity != "" {
				by += ", fs-verity"
			}
			fmt.Fprintf(w, "%s  %d: %s %s (%s)\n    %s\n", local(&t), f.N, reason.OneLine(f.Role), reason.OneLine(f.Path), reason.OneLine(by), f.SHA256)
		}
	}
	if !verify {
		return
	}
	fields(w, "Launch log", l.State, "Problem", l.Problem)
	var banks []string
	for bank := range l.Live {
		banks = append(banks, bank)
	}
	slices.Sort(banks)
	for _, bank := range banks {
		if l.Live[bank] == l.Replayed[bank] {
			fmt.Fprintf(w, "PCR %d %s: %s\n", l.PCR, bank, l.Live[bank])
			continue
		}
		fmt.Fprintf(w, "PCR %d %s: %s\n  the log gives: %s\n", l.PCR, bank, l.Live[bank], l.Replayed[bank])
	}
}

// ranges writes ascending numbers shortly: 1-4, 7.
func ranges(n []int) string {
	var parts []string
	for i := 0; i < len(n); {
		j := i
		for j+1 < len(n) && n[j+1] == n[j]+1 {
			j++
		}
		part := fmt.Sprint(n[i])
		if j > i {
			part += fmt.Sprintf("-%d", n[j])
		}
		parts, i = append(parts, part), j+1
	}
	return strings.Join(parts, ", ")
}
