// Command virt-trust-inject asks the vTPM of one running VM something, between
// two commands of the guest, for virt-trustd. See package inject.
package main

import (
	"fmt"
	"os"

	"virt-trust/internal/introspect/inject"
)

func main() {
	if len(os.Args) > 1 {
		fmt.Fprintln(os.Stderr, "virt-trust-inject is started by virt-trustd")
		os.Exit(2)
	}
	if err := inject.Child(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "virt-trust-inject:", err)
		os.Exit(1)
	}
}
