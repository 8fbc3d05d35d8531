// Command virt-trust-hook is what libvirt's hook script runs.
package main

import (
	"os"

	"virt-trust/internal/hook"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/platform/journal"
)

func main() {
	h := hook.Hook{
		Args: os.Args[1:], Stdin: os.Stdin, Stderr: os.Stderr,
		Config: config.Path, Path: os.Getenv("PATH"),
		Log: journal.Quiet("virt-trust-hook"),
		Ask: hook.Ask, Limit: hook.Limit,
	}
	os.Exit(h.Run())
}
