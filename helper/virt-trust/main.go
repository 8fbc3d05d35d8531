// virt-trust shows and mends what virt-trustd guards on this host; see virt-trust(1).
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"virt-trust/internal/admin"
)

var version = "unknown" // set by the Makefile

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	command := &admin.Command{
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Args: os.Args[1:], Version: version,
	}
	code := command.Run(ctx)
	stop()
	os.Exit(code)
}
