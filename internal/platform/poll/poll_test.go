package poll

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// A look is right also while signals come, as they do in each program in Go.
func TestSignals(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	thread, stop := unix.Gettid(), make(chan struct{})
	defer close(stop)
	go func() {
		for {
			select {
			case <-stop:
				return
			default:
				unix.Tgkill(unix.Getpid(), thread, unix.SIGURG)
			}
		}
	}()
	look := unix.PollFd{Fd: int32(p[0]), Events: unix.POLLIN}
	interrupted := 0
	for range 100_000 {
		if _, err := unix.Poll([]unix.PollFd{look}, 0); err == unix.EINTR {
			interrupted++
		}
		if n, err := Now(look); n != 0 || err != nil {
			t.Fatal(n, err)
		}
	}
	if interrupted == 0 {
		t.Error("no signal came")
	}
	if _, err := unix.Write(p[1], []byte{1}); err != nil {
		t.Fatal(err)
	}
	if n, err := Now(look); n != 1 || err != nil {
		t.Error(n, err)
	}
}
