package inject

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"

	"virt-trust/internal/introspect"
	"virt-trust/internal/testkit"
)

// A QEMU that can be told what its guest does is this program, run again: it
// makes the channel as QEMU does, and notices any answer that is not that of
// its own command. The real one is in TestQEMU.

func TestMain(m *testing.M) {
	switch os.Getenv("PLAY") {
	case "qemu":
		if err := playQEMU(os.Getenv("CTRL")); err != nil {
			fmt.Println("FAILED", err)
			os.Exit(1)
		}
		os.Exit(0)
	case "count": // signals
		c := make(chan os.Signal, 1)
		signal.Notify(c, unix.SIGUSR1)
		fmt.Println("ready")
		for range c {
			fmt.Println("got it")
		}
	case "inject":
		if err := Child(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// vm is a swtpm and a QEMU.
type vm struct {
	introspect.Target
	swtpm, qemu *exec.Cmd
	in          io.WriteCloser
	out         *bufio.Reader
}

func startSwtpm(t testing.TB) (v *vm, ctrl string) {
	t.Helper()
	v = &vm{Target: introspect.Target{UUID: "8b1f3b6e-0f9a-4d7f-9d55-222222222222", StateDir: t.TempDir()}}
	ctrl = filepath.Join(t.TempDir(), "ctrl")
	v.swtpm = exec.Command(testkit.Need(t, "swtpm"), "socket", "--tpm2", "--tpmstate", "dir="+v.StateDir, "--ctrl", "type=unixio,path="+ctrl)
	v.swtpm.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := v.swtpm.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.swtpm.Process.Kill(); v.swtpm.Wait() })
	v.Swtpm = v.swtpm.Process.Pid
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if conn, err := net.Dial("unix", ctrl); err == nil {
			conn.Close()
			return v, ctrl
		}
		if time.Now().After(deadline) {
			t.Fatal("swtpm does not start")
		}
	}
}

func startVM(t testing.TB) *vm {
	t.Helper()
	v, ctrl := startSwtpm(t)
	v.qemu = exec.Command("/proc/self/exe")
	v.qemu.Env = append(os.Environ(), "PLAY=qemu", "CTRL="+ctrl)
	v.qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	v.qemu.Stderr = os.Stderr
	var err error
	if v.in, err = v.qemu.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := v.qemu.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	v.out = bufio.NewReader(out)
	if err := v.qemu.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.qemu.Process.Kill(); v.qemu.Wait() })
	v.QEMU = v.qemu.Process.Pid
	v.says(t, "ready")
	return v
}

func (v *vm) tell(t testing.TB, command string) {
	t.Helper()
	if _, err := io.WriteString(v.in, command+"\n"); err != nil {
		t.Fatal(err)
	}
}

func (v *vm) says(t testing.TB, want string) string {
	t.Helper()
	line, err := v.out.ReadString('\n')
	if err != nil || !strings.HasPrefix(line, want) {
		t.Fatalf("the guest says %q (%v), not %q", line, err, want)
	}
	return strings.TrimSpace(strings.TrimPrefix(line, want))
}

const akHandle = 0x8180ff01

// playQEMU is a QEMU and its guest.
func playQEMU(ctrl string) error {
	conn, err := net.Dial("unix", ctrl)
	if err != nil {
		return err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	const setDataFD, initTPM = 16, 2 // swtpm_ioctl(3)
	u := conn.(*net.UnixConn)
	if _, _, err := u.WriteMsgUnix(binary.BigEndian.AppendUint32(nil, setDataFD), unix.UnixRights(fds[1]), nil); err != nil {
		return err
	}
	if err := ok(conn); err != nil {
		return err
	}
	unix.Close(fds[1])
	if _, err := conn.Write([]byte{0, 0, 0, initTPM, 0, 0, 0, 0}); err != nil {
		return err
	}
	if err := ok(conn); err != nil {
		return err
	}
	// Not the file itself: go-tpm would poll it, and take a signal, as Go's runtime
	// sends them, for its end.
	tpm := transport.FromReadWriter(struct{ io.ReadWriter }{os.NewFile(uintptr(fds[0]), "tpm")})
	if _, err := (tpm2.Startup{StartupType: tpm2.TPMSUClear}).Execute(tpm); err != nil {
		return err
	}
	fmt.Println("ready")
	var keys []tpm2.NamedHandle
	pcr := make([]byte, sha256.Size)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		switch lines.Text() {
		case "ak":
			err = makeAK(tpm)
		case "fill": // all slots for transient objects
			for len(keys) < 3 && err == nil {
				var k *tpm2.CreatePrimaryResponse
				if k, err = (tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHNull, InPublic: tpm2.New2B(signer(false)), OutsideInfo: tpm2.TPM2BData{Buffer: []byte{byte(len(keys))}}}).Execute(tpm); err == nil {
					keys = append(keys, tpm2.NamedHandle{Handle: k.ObjectHandle, Name: k.Name})
				}
			}
		case "check": // they are all there, and work
			for _, k := range keys {
				if err == nil {
					err = works(tpm, k)
				}
			}
		case "load":
			n := 0
			for deadline := time.Now().Add(2 * time.Second); err == nil && time.Now().Before(deadline); n++ {
				err = extendAndRead(tpm, pcr, n)
			}
			fmt.Println("extended", n)
		case "pair":
			_, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", lines.Text(), err)
		}
		fmt.Println("done", lines.Text())
	}
	return nil
}

func ok(r io.Reader) error {
	b := make([]byte, 4)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	if !bytes.Equal(b, make([]byte, 4)) {
		return fmt.Errorf("swtpm answers %x", b)
	}
	return nil
}

func signer(restricted bool) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, Restricted: restricted, SignEncrypt: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme:  tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
			CurveID: tpm2.TPMECCNistP256,
		}),
	}
}

func makeAK(tpm transport.TPM) error {
	k, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHPlatform, InPublic: tpm2.New2B(signer(true))}.Execute(tpm)
	if err != nil {
		return err
	}
	_, err = tpm2.EvictControl{Auth: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle: tpm2.NamedHandle{Handle: k.ObjectHandle, Name: k.Name}, PersistentHandle: akHandle}.Execute(tpm)
	if err != nil {
		return err
	}
	_, err = tpm2.FlushContext{FlushHandle: k.ObjectHandle}.Execute(tpm)
	fmt.Printf("ak %x\n", tpm2.Marshal(k.OutPublic))
	return err
}

func works(tpm transport.TPM, k tpm2.NamedHandle) error {
	pub, err := tpm2.ReadPublic{ObjectHandle: k.Handle}.Execute(tpm)
	if err != nil {
		return err
	}
	if !bytes.Equal(pub.Name.Buffer, k.Name.Buffer) {
		return errors.New("another object has its handle")
	}
	d := sha256.Sum256([]byte("message"))
	_, err = tpm2.Sign{KeyHandle: tpm2.AuthHandle{Handle: k.Handle, Name: k.Name, Auth: tpm2.PasswordAuth(nil)}, Digest: tpm2.TPM2BDigest{Buffer: d[:]},
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull}}.Execute(tpm)
	return err
}

// extendAndRead checks that every answer is that of the command.
func extendAndRead(tpm transport.TPM, pcr []byte, n int) error {
	d := sha256.Sum256(fmt.Append(nil, n))
	_, err := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: 16, Auth: tpm2.PasswordAuth(nil)},
		Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: d[:]}}}}.Execute(tpm)
	if err != nil {
		return err
	}
	next := sha256.Sum256(slices.Concat(pcr, d[:]))
	copy(pcr, next[:])
	r, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0, 0, 1}}}}}.Execute(tpm)
	if err != nil {
		return err
	}
	if len(r.PCRValues.Digests) != 1 || !bytes.Equal(r.PCRValues.Digests[0].Buffer, pcr) {
		return fmt.Errorf("extend %d: the answer is of another command", n)
	}
	return nil
}
