// Command virt-trust-agent brings this host's Evidence to a Verifier. See
// virt-trust-agent(8).
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"virt-trust/internal/agent"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/platform/journal"
)

var version = "devel" // set by the build

func main() {
	showVersion := flag.Bool("version", false, "print the version")
	flag.Usage = func() { fmt.Fprintln(os.Stderr, "usage: virt-trust-agent [--version]; see virt-trust-agent(8)") }
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if *showVersion {
		fmt.Println("virt-trust-agent", version)
		return
	}
	log := journal.New("virt-trust-agent").WithField("version", version)
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	cfg, err := config.LoadAgent(config.AgentPath)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return agent.Run(ctx, agent.Options{
		Config: cfg, Dir: "/var/lib/virt-trust-agent", Version: version, Log: journal.New("virt-trust-agent").WithContext(ctx),
	})
}
