// Command virt-trust-emulator runs under the names of QEMU's emulators.
package main

import (
	"os"

	"virt-trust/internal/domain/emulator"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/wrap"
)

func main() {
	e := wrap.Emulator{
		Args: os.Args, Env: os.Environ(), RealDir: emulator.RealDir, Links: emulator.Links, Self: "/proc/self/exe",
		Stderr: os.Stderr,
		Log:    journal.Quiet("virt-trust-emulator"),
		Redeem: wrap.RedeemEmulator,
	}
	os.Exit(e.Run())
}
