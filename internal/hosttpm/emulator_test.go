package hosttpm

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"virt-trust/internal/hosttpm/link"
	"virt-trust/internal/hosttpm/tpmtest"
	"virt-trust/internal/testkit"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// emulator is a swtpm that plays the host's TPM.
type emulator struct {
	*tpmtest.TPM
	t testing.TB
}

// startEmulator starts one that is new.
func startEmulator(t testing.TB) *emulator {
	t.Helper()
	return &emulator{tpmtest.New(t), t}
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
	testkit.Need(t, "swtpm")
	made.once.Do(func() {
		if made.folder, made.err = os.MkdirTemp("", "hosttpm"); made.err != nil {
			return
		}
		for _, d := range []string{"tpm", "keys", "other"} {
			made.err = errors.Join(made.err, os.Mkdir(filepath.Join(made.folder, d), 0o700))
		}
		e := tpmtest.In(t, filepath.Join(made.folder, "tpm"))
		for _, d := range []string{"keys", "other"} {
			h := provisioned(t, e.Socket, filepath.Join(made.folder, d))
			h.Close()
		}
		e.Stop()
	})
	if made.err != nil {
		t.Fatal(made.err)
	}
	root := testkit.Folder(t)
	if err := os.CopyFS(root, os.DirFS(made.folder)); err != nil {
		t.Fatal(err)
	}
	return &emulator{tpmtest.In(t, filepath.Join(root, "tpm")), t}, filepath.Join(root, "keys"), filepath.Join(root, "other")
}

func (e *emulator) extend(pcr uint) {
	e.t.Helper()
	if err := extend(e.Open(), pcr); err != nil {
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
	p := &proxy{sock: filepath.Join(testkit.Folder(t), "proxy")}
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
			p.serve(c, e.Socket)
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
	tpm, err := link.Dial(context.Background(), sock)
	if err != nil {
		return
	}
	defer tpm.Close()
	ask := func(b []byte) ([]byte, error) { return tpm.Exchange(context.Background(), b, new(atomic.Int32)) } // also what is put off
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
	b := make([]byte, link.HeaderSize)
	if _, err := io.ReadFull(c, b); err != nil {
		return nil, err
	}
	b = append(b, make([]byte, binary.BigEndian.Uint32(b[2:])-link.HeaderSize)...)
	_, err := io.ReadFull(c, b[link.HeaderSize:])
	return b, err
}

// code is a response that is nothing but a response code.
func code(rc tpm2.TPMRC) []byte {
	b := []byte{0x80, 0x01, 0, 0, 0, 10}
	return binary.BigEndian.AppendUint32(b, uint32(rc))
}
