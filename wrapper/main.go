// Command virt-trust-wrapper runs under the names swtpm and swtpm_setup.
package main

import (
	"os"

	"virt-trust/internal/platform/journal"
	"virt-trust/internal/wrap"
)

func main() {
	w := wrap.Wrapper{
		Args: os.Args, Env: os.Environ(), Path: os.Getenv("PATH"), Self: "/proc/self/exe",
		Stderr: os.Stderr, CertsTool: "/usr/libexec/virt-trust/virt-trust-ekcert",
		Starts: "/run/virt-trust/starts",
		Log:    journal.Quiet("virt-trust-wrapper"),
		Redeem: wrap.Redeem,
	}
	os.Exit(w.Run())
}
