// Command virt-trustd guards the vTPMs of this host's VMs. It is the only owner
// of the host's TPM. See virt-trustd(8).
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"virt-trust/internal/daemon"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/platform/sandbox"
)

var version = "devel" // set by the build

func main() {
	showVersion := flag.Bool("version", false, "print the version")
	flag.Usage = func() { fmt.Fprintln(os.Stderr, "usage: virt-trustd [--version]; see virt-trustd(8)") }
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if *showVersion {
		fmt.Println("virt-trustd", version)
		return
	}
	log := journal.New("virt-trustd").WithField("version", version)
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	cfg, err := config.Load(config.Path)
	if err != nil {
		return err
	}
	if err := sandbox.KeepSecrets(); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return daemon.Run(ctx, daemon.Options{
		Config: cfg, Version: version, Log: journal.New("virt-trustd").WithContext(ctx),
		Dirs: daemon.Dirs{State: "/var/lib/virt-trust", Run: "/run/virt-trust", Domains: "/etc/libvirt/qemu"},
		Programs: daemon.Programs{
			Hook: "/usr/libexec/virt-trust/virt-trust-hook", Wrapper: "/usr/libexec/virt-trust/virt-trust-wrapper",
			Emulator: "/usr/libexec/virt-trust/virt-trust-emulator", EKCert: "/usr/libexec/virt-trust/virt-trust-ekcert",
			Link: "/etc/libvirt/hooks/qemu.d/50-virt-trust", Removed: "/run/virt-trust.removed",
		},
	})
}
