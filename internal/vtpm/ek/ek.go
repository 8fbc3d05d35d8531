// Package ek reads the endorsement key of a vTPM. It has the real swtpm load a
// copy of the state, since loading writes, in a folder of its own in memory and
// as swtpm's user, and asks it over a socket that nobody else has. Taking the
// state apart instead would be quicker and would believe the guest, which can
// put anything beside its keys.
package ek

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"

	"virt-trust/internal/platform/secret"
	"virt-trust/internal/vtpm/statefile"
)

// Reader says how swtpm is run.
type Reader struct {
	Swtpm    string // the real one
	Dir      string // for the copies: on a tmpfs
	UID, GID int    // of swtpm's user
}

// limit is for all of it; an RSA key that has to be derived takes a second.
const limit = 5 * time.Second

// handle is where the RSA EK is kept (TCG EK Credential Profile 2.5, 2.2.1.4).
const handle = tpm2.TPMHandle(0x81010001)

// Identity is what a vTPM says of itself.
type Identity struct {
	// EK is the RSA-2048 endorsement key of the TCG's template (EK Credential
	// Profile, B.3.3), as SubjectPublicKeyInfo in DER: of it
	//
	//	openssl x509 -in ek.cert -noout -pubkey | openssl pkey -pubin -outform der
	//
	// says the same for the vTPM's EK certificate.
	EK                    []byte
	Manufacturer, Version string // "id:" and 8 hexadecimal digits
	Family                string // "2.0"
	Level, Revision       int    // of the specification; 164 is 1.64
}

// Identity reads who a vTPM is. state is the content of the state file of this
// name, under stateKey, or plain where stateKey is nil.
func (r Reader) Identity(ctx context.Context, name string, state, stateKey []byte) (id Identity, err error) {
	_, err = r.load(ctx, name, state, stateKey, func(t transport.TPM) error {
		if id.EK, err = ask(t); err != nil {
			return err
		}
		return id.properties(t)
	})
	return id, err
}

// properties reads TPM_PT_FAMILY_INDICATOR and what follows it (Part 2, table
// 23, PT_FIXED).
func (id *Identity) properties(t transport.TPM) error {
	r, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(tpm2.TPMPTFamilyIndicator), PropertyCount: 16}.Execute(t)
	if err != nil {
		return fmt.Errorf("reading the vTPM's properties: %w", err)
	}
	p, err := r.CapabilityData.Data.TPMProperties()
	if err != nil {
		return err
	}
	for _, p := range p.TPMProperty {
		switch p.Property {
		case tpm2.TPMPTFamilyIndicator: // four characters, NUL at the end
			id.Family = strings.TrimRight(string(binary.BigEndian.AppendUint32(nil, p.Value)), "\x00")
		case tpm2.TPMPTLevel:
			id.Level = int(p.Value)
		case tpm2.TPMPTRevision:
			id.Revision = int(p.Value)
		case tpm2.TPMPTManufacturer:
			id.Manufacturer = fmt.Sprintf("id:%08X", p.Value)
		case tpm2.TPMPTFirmwareVersion1:
			id.Version = fmt.Sprintf("id:%08X", p.Value)
		}
	}
	return nil
}

// load has swtpm load a copy of a state, lets use speak to it, and gives what
// the state is when swtpm has ended.
func (r Reader) load(ctx context.Context, name string, state, stateKey []byte, use func(transport.TPM) error) (after []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	dir, err := r.copy(name, state)
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	theirs := os.NewFile(uintptr(fds[1]), "tpm")
	defer theirs.Close()
	ours := os.NewFile(uintptr(fds[0]), "tpm")
	conn, err := net.FileConn(ours)
	if err = errors.Join(err, ours.Close()); err != nil {
		return nil, err
	}
	defer conn.Close()

	const first = 3 // of ExtraFiles
	c := exec.CommandContext(ctx, r.Swtpm, "socket", "--tpm2", "--tpmstate", "dir="+dir, "--fd", fmt.Sprint(first), "--flags", "not-need-init,startup-clear", "--terminate")
	c.Env, c.Dir, c.WaitDelay = []string{"PATH=/usr/bin:/bin"}, dir, time.Second
	c.ExtraFiles = []*os.File{theirs}
	if stateKey != nil {
		key, err := secret.HexMemfd("vtpm-state-key", stateKey)
		if err != nil {
			return nil, err
		}
		defer key.Close()
		c.ExtraFiles = append(c.ExtraFiles, key)
		c.Args = append(c.Args, "--key", fmt.Sprintf("fd=%d,format=hex,mode=aes-256-cbc", first+1))
	}
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() == 0 && r.UID != 0 {
		c.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(r.UID), Gid: uint32(r.GID)}
	}
	var words bytes.Buffer
	c.Stderr = &words
	// Pdeathsig follows the thread that starts the child, which Go may end: a child
	// that goes with it is an error like any other here.
	if err := c.Start(); err != nil {
		return nil, err
	}
	theirs.Close()
	if t, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(t)
	}
	err = guarded(func() error { return use(transport.FromReadWriter(conn)) })
	conn.Close()
	if e := c.Wait(); err != nil {
		return nil, fmt.Errorf("asking swtpm: %w (%v, %.200q)", err, e, strings.TrimSpace(words.String()))
	}
	return readState(filepath.Join(dir, name))
}

// guarded turns a panic into an error: go-tpm takes responses apart by
// reflection.
func guarded(use func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the response cannot be read: %v", p)
		}
	}()
	return use()
}

// readState reads what swtpm's user has left.
func readState(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, statefile.MaxSize+1))
	if err == nil && len(b) > statefile.MaxSize {
		err = errors.New("the state has become larger than any")
	}
	return b, err
}

// copy puts the state into a new folder of swtpm's user.
func (r Reader) copy(name string, state []byte) (string, error) {
	if name == "" || filepath.Base(name) != name {
		return "", fmt.Errorf("%.40q is no name of a state file", name)
	}
	dir, err := os.MkdirTemp(r.Dir, "ek-")
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, name)
	err = os.WriteFile(file, state, 0o600)
	if os.Geteuid() == 0 {
		err = errors.Join(err, os.Chown(file, r.UID, r.GID), os.Chown(dir, r.UID, r.GID))
	}
	if err != nil {
		os.RemoveAll(dir)
		return "", err
	}
	return dir, nil
}

// ask takes the key that is kept, if it is a primary key of this vTPM's
// endorsement hierarchy and of the template; else it has it derived anew.
func ask(t transport.TPM) ([]byte, error) {
	var public *tpm2.TPMTPublic
	if r, err := (tpm2.ReadPublic{ObjectHandle: handle}).Execute(t); err == nil {
		p, err := r.OutPublic.Contents()
		if err != nil {
			return nil, err
		}
		if genuine(p, r.Name.Buffer, r.QualifiedName.Buffer) {
			public = p
		}
	}
	if public == nil {
		r, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(tpm2.RSAEKTemplate)}.Execute(t)
		if err != nil {
			return nil, fmt.Errorf("deriving the endorsement key: %w", err)
		}
		if public, err = r.OutPublic.Contents(); err != nil {
			return nil, err
		}
	}
	parms, err := public.Parameters.RSADetail()
	if err != nil {
		return nil, err
	}
	unique, err := public.Unique.RSA()
	if err != nil {
		return nil, err
	}
	key, err := tpm2.RSAPub(parms, unique)
	if err != nil {
		return nil, err
	}
	return x509.MarshalPKIXPublicKey(key)
}

// genuine reports whether a key has the EK's template, and is a primary key of
// the endorsement hierarchy.
func genuine(p *tpm2.TPMTPublic, name, qualified []byte) bool {
	want := tpm2.RSAEKTemplate
	if p.Type != want.Type || p.NameAlg != want.NameAlg || p.ObjectAttributes != want.ObjectAttributes || !bytes.Equal(p.AuthPolicy.Buffer, want.AuthPolicy.Buffer) {
		return false
	}
	parms, err := p.Parameters.RSADetail()
	return err == nil && parms.KeyBits == 2048 && primary(tpm2.TPMRHEndorsement, name, qualified)
}

// primary reports whether a key is a primary key of a hierarchy: then its
// qualified name is the hash of the hierarchy's handle and its name (Part 1, 16).
func primary(hierarchy tpm2.TPMHandle, name, qualified []byte) bool {
	h := sha256.New()
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(hierarchy)))
	h.Write(name)
	return len(qualified) == 2+sha256.Size && bytes.Equal(qualified[2:], h.Sum(nil))
}
