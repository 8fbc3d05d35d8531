// Package sandbox gives up, once and before a program serves, what it will not
// need. What systemd can do is in the unit; this is what only the process can.
package sandbox

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// mclOnFault locks pages when they are touched: the address space that Go's
// runtime reserves is never filled.
const mclOnFault = 4

// KeepSecrets keeps all of this process's memory out of swap and core dumps,
// and other processes of its user out of its memory.
func KeepSecrets() error {
	if err := NoDumps(); err != nil {
		return err
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | mclOnFault); err != nil {
		return fmt.Errorf("locking memory (LimitMEMLOCK=infinity is needed): %w", err)
	}
	return nil
}

// NoDumps keeps this process's memory out of core dumps, and other processes of
// its user out of its memory.
func NoDumps() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbidding core dumps: %w", err)
	}
	return nil
}
