package hosttpm

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

// emulator is a swtpm that plays the host's TPM.
type emulator struct {
	t     testing.TB
	dir   string // state
	sock  string
	child *exec.Cmd
}

// startEmulator starts one that is new.
func startEmulator(t testing.TB) *emulator {
	t.Helper()
	return startIn(t, tempDir(t))
}

// tempDir is t.TempDir without the test's name, which swtpm's options and the
// length of a socket's path do not take.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hosttpm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// An RSA key takes swtpm half a second: most tests begin with a copy of a TPM
// for which two key sets were made.
var made struct {
	once   sync.Once
	folder string
	err    error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if made.folder != "" {
		os.RemoveAll(made.folder)
	}
	os.Exit(code)
}

// startMade starts an emulator for which the key sets in dir and other were
// made.
func startMade(t testing.TB) (e *emulator, dir, other string) {
	t.Helper()
	need(t, "swtpm")
	made.once.Do(func() {
		if made.folder, made.err = os.MkdirTemp("", "hosttpm"); made.err != nil {
			return
		}
		for _, d := range []string{"tpm", "keys", "other"} {
			made.err = errors.Join(made.err, os.Mkdir(filepath.Join(made.folder, d), 0o700))
		}
		e := startIn(t, filepath.Join(made.folder, "tpm"))
		for _, d := range []string{"keys", "other"} {
			h := provisioned(t, e.sock, filepath.Join(made.folder, d))
			h.Close()
		}
		e.stop()
		os.Remove(e.sock + ".ctrl")
		os.Remove(filepath.Join(e.dir, ".lock"))
	})
	if made.err != nil {
		t.Fatal(made.err)
	}
	root := tempDir(t)
	if err := os.CopyFS(root, os.DirFS(made.folder)); err != nil {
		t.Fatal(err)
	}
	return startIn(t, filepath.Join(root, "tpm")), filepath.Join(root, "keys"), filepath.Join(root, "other")
}

func startIn(t testing.TB, dir string) *emulator {
	t.Helper()
	need(t, "swtpm")
	e := &emulator{t: t, dir: dir, sock: filepath.Join(dir, "sock")}
	e.start()
	t.Cleanup(e.stop)
	return e
}

func need(t testing.TB, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

func (e *emulator) start() {
	e.t.Helper()
	e.child = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+e.dir, "--server", "type=unixio,path="+e.sock,
		"--ctrl", "type=unixio,path="+e.sock+".ctrl", "--flags", "not-need-init,startup-clear")
	e.child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	e.child.WaitDelay = time.Second
	var words strings.Builder
	e.child.Stdout, e.child.Stderr = &words, &words
	if err := e.child.Start(); err != nil {
		e.t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		c, err := net.Dial("unix", e.sock)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(deadline) {
			e.child.Process.Kill()
			e.child.Wait()
			e.t.Fatalf("swtpm does not come up: %v: %s", err, words.String())
		}
	}
}

func (e *emulator) stop() {
	if e.child != nil {
		e.child.Process.Kill()
		e.child.Wait()
		e.child = nil
		os.Remove(e.sock)
	}
}

// reset is a power cycle: PCRs, sessions and loaded objects are gone.
func (e *emulator) reset() {
	e.stop()
	e.start()
}

// other is another user of the TPM, which opens a connection for each command.
func (e *emulator) other() transport.TPM {
	e.t.Helper()
	tpm, err := linuxudstpm.Open(e.sock)
	if err != nil {
		e.t.Fatal(err)
	}
	return tpm
}

func (e *emulator) extend(pcr uint) {
	e.t.Helper()
	if err := extend(e.other(), pcr); err != nil {
		e.t.Fatal(err)
	}
}

func extend(tpm transport.TPM, pcr uint) error {
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}},
	}.Execute(tpm)
	return err
}

// errCut has a proxy cut the connection instead of answering.
var errCut = errors.New("cut")

// proxy stands before an emulator and may do to commands and responses what it
// likes.
type proxy struct {
	sock string
	l    net.Listener

	mu  sync.Mutex
	tap func(p *proxied) error // called with each command, before it is sent on
}

// proxied is one command under way. A tap that sets response sends it instead
// of asking the TPM.
type proxied struct {
	n        int // counted from 1 since the tap was set
	cc       tpm2.TPMCC
	command  []byte
	response []byte
	tpm      func([]byte) ([]byte, error) // asks the TPM itself
	client   net.Conn                     // for answers that are none
}

func startProxy(t testing.TB, e *emulator) *proxy {
	t.Helper()
	p := &proxy{sock: filepath.Join(tempDir(t), "proxy")}
	var err error
	if p.l, err = net.Listen("unix", p.sock); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.l.Close() })
	go func() {
		for {
			c, err := p.l.Accept()
			if err != nil {
				return
			}
			p.serve(c, e.sock)
		}
	}()
	return p
}

// set makes f the tap from the next command on; nil passes everything.
func (p *proxy) set(f func(*proxied) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f == nil {
		p.tap = nil
		return
	}
	n := 0
	p.tap = func(x *proxied) error {
		n++
		x.n = n
		return f(x)
	}
}

func (p *proxy) serve(client net.Conn, sock string) {
	defer client.Close()
	tpm, err := dialSocket(context.Background(), sock)
	if err != nil {
		return
	}
	defer tpm.Close()
	ask := func(b []byte) ([]byte, error) {
		if _, err := tpm.Write(b); err != nil {
			return nil, err
		}
		return readMessage(tpm)
	}
	for {
		b, err := readMessage(client)
		if err != nil {
			return
		}
		x := &proxied{command: b, cc: tpm2.TPMCC(binary.BigEndian.Uint32(b[6:])), tpm: ask, client: client}
		p.mu.Lock()
		if p.tap != nil {
			err = p.tap(x)
		}
		p.mu.Unlock()
		if err == nil && x.response == nil {
			x.response, err = ask(b)
		}
		if err != nil {
			return
		}
		client.Write(x.response)
	}
}

func readMessage(c net.Conn) ([]byte, error) {
	b := make([]byte, headerSize)
	if _, err := io.ReadFull(c, b); err != nil {
		return nil, err
	}
	b = append(b, make([]byte, binary.BigEndian.Uint32(b[2:])-headerSize)...)
	_, err := io.ReadFull(c, b[headerSize:])
	return b, err
}

// code is a response that is nothing but a response code.
func code(rc tpm2.TPMRC) []byte {
	b := []byte{0x80, 0x01, 0, 0, 0, 10}
	return binary.BigEndian.AppendUint32(b, uint32(rc))
}
