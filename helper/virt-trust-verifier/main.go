// Command virt-trust-verifier enrols hosts, appraises their Evidence, and says
// what is trusted. See virt-trust-verifier(8).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"virt-trust/internal/platform/journal"
	"virt-trust/internal/verifier"
)

var version = "devel" // set by the build

func main() {
	path := flag.String("config", verifier.DefaultConfig, "the configuration")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: virt-trust-verifier [--config FILE] [serve | init | check-config | person NAME ROLE | rotate | version]; see virt-trust-verifier(8)")
	}
	flag.Parse()
	log := journal.New("virt-trust-verifier").WithField("version", version)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	err := verifier.Command(ctx, verifier.Invocation{Args: flag.Args(), Config: *path, Stdout: os.Stdout, Version: version, Log: log, Hangups: hangups})
	switch {
	case errors.Is(err, verifier.ErrUsage):
		flag.Usage()
		os.Exit(2)
	case err != nil && (flag.NArg() == 0 || flag.Arg(0) == "serve"):
		log.Fatal(err)
	case err != nil:
		fmt.Fprintf(os.Stderr, "virt-trust-verifier: %v\n", err)
		os.Exit(1)
	}
}
