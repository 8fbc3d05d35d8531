// Package poll looks at descriptors.
package poll

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Now gives how many of the descriptors have something to tell, without waiting
// (poll(2)). A signal, as Go's own runtime sends them, interrupts also a look that
// does not wait, and tells nothing of the descriptors.
func Now(fds ...unix.PollFd) (n int, err error) {
	for {
		if n, err = unix.Poll(fds, 0); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
