// Command virt-trust-hook is libvirt's hook for the events of VMs.
package main

import (
	"os"

	"virt-trust/internal/hook"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/platform/journal"
)

func main() {
	h := hook.Hook{
		Name: os.Args[0], Args: os.Args[1:], Stdin: os.Stdin, Stderr: os.Stderr,
		Config: config.Path, Path: os.Getenv("PATH"),
		Log: journal.Quiet("virt-trust-hook"),
		Ask: hook.Ask, Limit: hook.Limit,
	}
	os.Exit(h.Run())
}
