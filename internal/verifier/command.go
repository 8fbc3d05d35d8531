package verifier

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/platform/config"
	"virt-trust/internal/platform/sandbox"
)

// DefaultConfig is where the configuration lies.
const DefaultConfig = config.VerifierPath

// ErrUsage says that the command line makes no sense.
var ErrUsage = errors.New("wrong usage")

// Invocation is one run of virt-trust-verifier.
type Invocation struct {
	Args    []string // the command, and what belongs to it; none is serve
	Config  string   // the configuration's file
	Stdout  io.Writer
	Version string
	Log     *logrus.Entry
	Hangups <-chan os.Signal // each makes a server reload
}

// Command carries an invocation out.
func Command(ctx context.Context, in Invocation) error {
	command, args := "serve", []string(nil)
	if len(in.Args) > 0 {
		command, args = in.Args[0], in.Args[1:]
	}
	if want := map[string]int{"person": 2}[command]; len(args) != want {
		return ErrUsage
	}
	load := func() (config.Verifier, error) { return config.LoadVerifier(in.Config) }
	switch command {
	case "version":
		fmt.Fprintln(in.Stdout, "virt-trust-verifier", in.Version)
		return nil
	case "person":
		return NewPerson(args[0], args[1], in.Stdout)
	case "serve", "init", "check-config", "rotate":
	default:
		return ErrUsage
	}
	cfg, err := load()
	if err != nil {
		return err
	}
	switch command {
	case "init":
		return Init(cfg, in.Stdout)
	case "rotate":
		return Rotate(cfg, in.Stdout)
	case "check-config":
		if err := Check(cfg); err != nil {
			return err
		}
		for _, r := range remarks(cfg, time.Now()) {
			fmt.Fprintln(in.Stdout, "warning:", r)
		}
		for _, c := range cautions(cfg) {
			fmt.Fprintln(in.Stdout, "note:", c)
		}
		fmt.Fprintln(in.Stdout, "the configuration is right")
		return nil
	}
	if err := sandbox.NoDumps(); err != nil {
		return err
	}
	reload := make(chan struct{})
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-in.Hangups:
				select {
				case reload <- struct{}{}:
				case <-ctx.Done():
				}
			}
		}
	}()
	return Run(ctx, Options{Config: cfg, Version: in.Version, Log: in.Log, Reload: reload, Load: load})
}
