// Command virt-trust-ekcert is the create_certs_tool of swtpm_setup for guarded
// VMs. See virt-trust-ekcert(8).
package main

import (
	"os"

	"virt-trust/internal/ekcert"
	"virt-trust/internal/platform/journal"
)

func main() {
	t := ekcert.Tool{
		Args: os.Args[1:], Stderr: os.Stderr,
		Log:     journal.Quiet("virt-trust-ekcert"),
		Certify: ekcert.Certify,
	}
	os.Exit(t.Run())
}
