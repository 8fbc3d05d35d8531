// Package tpmtest gives tests a TPM: a swtpm behind a socket.
package tpmtest

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2/transport"

	"virt-trust/internal/hosttpm/link"
	"virt-trust/internal/testkit"
)

// TPM is a swtpm with its state in a folder.
type TPM struct {
	Socket string
	dir    string
	t      testing.TB
	child  *exec.Cmd
}

// New starts one that is new.
func New(t testing.TB) *TPM { return In(t, testkit.Folder(t)) }

// In starts one with the state in dir, where the socket is too.
func In(t testing.TB, dir string) *TPM {
	t.Helper()
	testkit.Need(t, "swtpm")
	e := &TPM{Socket: filepath.Join(dir, "sock"), dir: dir, t: t}
	e.Start()
	t.Cleanup(e.Stop)
	return e
}

// Start powers it on.
func (e *TPM) Start() {
	e.t.Helper()
	e.child = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+e.dir, "--server", "type=unixio,path="+e.Socket,
		"--ctrl", "type=unixio,path="+e.Socket+".ctrl", "--flags", "not-need-init,startup-clear")
	e.child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	e.child.WaitDelay = time.Second
	var words strings.Builder
	e.child.Stdout, e.child.Stderr = &words, &words
	if err := e.child.Start(); err != nil {
		e.t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		c, err := net.Dial("unix", e.Socket)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(deadline) {
			e.child.Process.Kill()
			e.child.Wait()
			e.child = nil
			e.t.Fatalf("swtpm does not come up: %v: %s", err, words.String())
		}
	}
}

// Stop takes its power away.
func (e *TPM) Stop() {
	if e.child == nil {
		return
	}
	e.child.Process.Kill()
	e.child.Wait()
	e.child = nil
	for _, f := range []string{e.Socket, e.Socket + ".ctrl", filepath.Join(e.dir, ".lock")} {
		os.Remove(f)
	}
}

// Reset is a power cycle: PCRs, sessions and loaded objects are gone.
func (e *TPM) Reset() {
	e.t.Helper()
	e.Stop()
	e.Start()
}

// Open is a user of the TPM, which opens a connection for each command.
func (e *TPM) Open() transport.TPM {
	e.t.Helper()
	if _, err := os.Stat(e.Socket); err != nil {
		e.t.Fatal(err)
	}
	return user(e.Socket)
}

// user is the socket of a TPM that others use too.
type user string

// Send implements transport.TPM.
func (u user) Send(command []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	l, err := link.Dial(ctx, string(u))
	if err != nil {
		return nil, err
	}
	defer l.Close()
	return l.Send(command)
}
