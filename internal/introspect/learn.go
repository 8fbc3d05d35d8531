package introspect

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"

	"virt-trust/internal/introspect/layout"
)

// learnLimit is for all runs of swtpm; the first makes the vTPM's seeds.
const learnLimit = 20 * time.Second

// learn runs the installed swtpm four times on one throw-away state. First all
// banks are made active, which is so from the next start on. In each start
// after that, random digests are extended in all PCRs that can be, the values
// are asked for, and another allocation is set for the next start, so that only
// one place holds the one of now; then its memory is taken as a sample. The
// last two starts have every other bank active.
func (m *Memory) learn(ctx context.Context) (build [sha256.Size]byte, l *layout.Layout, err error) {
	ctx, cancel := context.WithTimeout(ctx, learnLimit)
	defer cancel()
	dir, err := os.MkdirTemp(m.cfg.Dir, "calibrate-")
	if err != nil {
		return build, nil, err
	}
	defer os.RemoveAll(dir)
	if os.Geteuid() == 0 {
		if err := os.Chown(dir, m.cfg.UID, m.cfg.GID); err != nil {
			return build, nil, err
		}
	}
	const every = 1<<layout.PCRs - 1
	var banks layout.Selection
	next := func(active func(i int) bool) layout.Selection {
		s := slices.Clone(banks)
		for i := range s {
			s[i].Select = 0
			if active(i) {
				s[i].Select = every
			}
		}
		return s
	}
	err = m.run(ctx, dir, func(tpm transport.TPM, _ *process) (err error) {
		if banks, err = allocation(tpm); err != nil {
			return err
		}
		return allocate(tpm, next(func(int) bool { return true }))
	})
	if err != nil {
		return build, nil, err
	}
	after := []layout.Selection{
		next(func(i int) bool { return i%2 == 0 }),
		next(func(i int) bool { return i%2 == 1 }),
		next(func(int) bool { return true }),
	}
	var samples []layout.Sample
	for i, then := range after {
		err := m.run(ctx, dir, func(tpm transport.TPM, p *process) error {
			s, err := sample(tpm, p, then)
			if err != nil {
				return err
			}
			if i > 0 && p.build != build {
				return errors.New("libtpms was changed meanwhile")
			}
			build, samples = p.build, append(samples, *s)
			return nil
		})
		if err != nil {
			return build, nil, err
		}
	}
	l, err = layout.Learn(samples)
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrUnknownBuild, err)
	}
	return build, l, err
}

// run starts swtpm on the state in dir, with a socket that nobody else has, and
// ends it when do is through.
func (m *Memory) run(ctx context.Context, dir string, do func(transport.TPM, *process) error) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	theirs := os.NewFile(uintptr(fds[1]), "tpm")
	defer theirs.Close()
	ours := os.NewFile(uintptr(fds[0]), "tpm")
	conn, err := net.FileConn(ours)
	if err = errors.Join(err, ours.Close()); err != nil {
		return err
	}
	defer conn.Close()
	const first = 3 // of ExtraFiles
	c := exec.CommandContext(ctx, m.cfg.Swtpm, "socket", "--tpm2", "--tpmstate", "dir="+dir, "--fd", fmt.Sprint(first), "--flags", "not-need-init,startup-clear", "--terminate")
	c.Env, c.Dir, c.WaitDelay = []string{"PATH=/usr/bin:/bin"}, dir, time.Second
	c.ExtraFiles = []*os.File{theirs}
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() == 0 && m.cfg.UID != 0 {
		c.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(m.cfg.UID), Gid: uint32(m.cfg.GID)}
	}
	var words bytes.Buffer
	c.Stderr = &words
	// Pdeathsig follows the thread that starts the child, which Go may end: a child
	// that goes with it is an error like any other here.
	if err := c.Start(); err != nil {
		return err
	}
	theirs.Close()
	if t, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(t)
	}
	err = converse(c.Process.Pid, transport.FromReadWriter(conn), do)
	conn.Close()
	if e := c.Wait(); err != nil {
		return fmt.Errorf("%w (%v, %.200q)", err, e, strings.TrimSpace(words.String()))
	}
	return nil
}

// converse waits for swtpm's first answer, finds libtpms in it, and has do go on.
func converse(pid int, tpm transport.TPM, do func(transport.TPM, *process) error) error {
	if _, err := allocation(tpm); err != nil {
		return err
	}
	p, err := open(pid)
	if err != nil {
		return err
	}
	defer p.close()
	if err := p.locate(); err != nil {
		return err
	}
	return do(tpm, p)
}

// allocation asks for the banks that are active (TPM2_GetCapability,
// TPM_CAP_PCRS).
func allocation(tpm transport.TPM) (layout.Selection, error) {
	r, err := tpm2.GetCapability{Capability: tpm2.TPMCapPCRs, PropertyCount: 1}.Execute(tpm)
	if err != nil {
		return nil, fmt.Errorf("TPM2_GetCapability: %w", err)
	}
	pcrs, err := r.CapabilityData.Data.AssignedPCR()
	if err != nil {
		return nil, err
	}
	var s layout.Selection
	for _, b := range pcrs.PCRSelections {
		if len(b.PCRSelect) != 3 {
			return nil, fmt.Errorf("%w: bank %#x has a selection of %d bytes", layout.ErrShape, b.Hash, len(b.PCRSelect))
		}
		s = append(s, layout.BankSelection{Hash: uint16(b.Hash), Select: uint32(b.PCRSelect[0]) | uint32(b.PCRSelect[1])<<8 | uint32(b.PCRSelect[2])<<16})
	}
	return s, nil
}

// allocate sets which banks are active from the next start on, by
// TPM2_PCR_Allocate (TPM 2.0 Part 3, 22.5), which go-tpm does not have.
func allocate(tpm transport.TPM, s layout.Selection) error {
	be := binary.BigEndian
	b := be.AppendUint16(nil, uint16(tpm2.TPMSTSessions))
	b = be.AppendUint32(b, 0) // the size, below
	b = be.AppendUint32(b, uint32(tpm2.TPMCCPCRAllocate))
	b = be.AppendUint32(b, uint32(tpm2.TPMRHPlatform))
	b = be.AppendUint32(b, 9) // authorizationSize: an empty password
	b = be.AppendUint32(b, uint32(tpm2.TPMRSPW))
	b = append(b, 0, 0, 0, 0, 0)
	b = be.AppendUint32(b, uint32(len(s)))
	for _, e := range s {
		b = be.AppendUint16(b, e.Hash)
		b = append(b, 3, byte(e.Select), byte(e.Select>>8), byte(e.Select>>16))
	}
	be.PutUint32(b[2:], uint32(len(b)))
	r, err := tpm.Send(b)
	if err != nil {
		return err
	}
	const header, success = 10, 10 + 4 // the response's parameterSize, then allocationSuccess
	if len(r) < header {
		return fmt.Errorf("TPM2_PCR_Allocate: an answer of %d bytes", len(r))
	}
	if rc := tpm2.TPMRC(be.Uint32(r[6:])); rc != tpm2.TPMRCSuccess {
		return fmt.Errorf("TPM2_PCR_Allocate: %w", rc)
	}
	if len(r) <= success || r[success] != 1 {
		return errors.New("TPM2_PCR_Allocate did not succeed")
	}
	return nil
}

// sample gives memory in which the PCRs are known.
func sample(tpm transport.TPM, p *process, next layout.Selection) (*layout.Sample, error) {
	active, err := allocation(tpm)
	if err != nil {
		return nil, err
	}
	s := &layout.Sample{Active: active, Values: map[uint16][layout.PCRs][]byte{}}
	for pcr := range layout.PCRs {
		if pcr >= 17 && pcr <= 22 { // of the dynamic root of trust: for localities that this has not
			continue
		}
		if err := extendAll(tpm, pcr, active); err != nil {
			return nil, err
		}
	}
	for _, b := range active {
		if b.Select == 0 || !layout.Known(b.Hash) {
			continue
		}
		v, err := readBank(tpm, b.Hash)
		if err != nil {
			return nil, err
		}
		s.Values[b.Hash] = v
	}
	if err := allocate(tpm, next); err != nil {
		return nil, err
	}
	s.Offset = p.lib.Data.Start - p.lib.Base
	s.Memory, err = p.data()
	return s, err
}

// extendAll extends a random digest in each active bank of a PCR.
func extendAll(tpm transport.TPM, pcr int, active layout.Selection) error {
	var d tpm2.TPMLDigestValues
	for _, b := range active {
		if b.Select != 0 && layout.Known(b.Hash) {
			digest := make([]byte, layout.Size(b.Hash))
			rand.Read(digest)
			d.Digests = append(d.Digests, tpm2.TPMTHA{HashAlg: tpm2.TPMAlgID(b.Hash), Digest: digest})
		}
	}
	_, err := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)}, Digests: d}.Execute(tpm)
	if err != nil {
		return fmt.Errorf("TPM2_PCR_Extend: %w", err)
	}
	return nil
}

// readBank asks for all PCRs of a bank, of which a command gives eight.
func readBank(tpm transport.TPM, alg uint16) (v [layout.PCRs][]byte, err error) {
	for i := range 3 {
		sel := []byte{0, 0, 0}
		sel[i] = 0xff
		r, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgID(alg), PCRSelect: sel}}}}.Execute(tpm)
		if err != nil {
			return v, fmt.Errorf("TPM2_PCR_Read: %w", err)
		}
		if len(r.PCRValues.Digests) != 8 {
			return v, fmt.Errorf("TPM2_PCR_Read gave %d PCRs of 8", len(r.PCRValues.Digests))
		}
		for j, d := range r.PCRValues.Digests {
			if len(d.Buffer) != layout.Size(alg) {
				return v, fmt.Errorf("TPM2_PCR_Read gave %d bytes for bank %#x", len(d.Buffer), alg)
			}
			v[8*i+j] = d.Buffer
		}
	}
	return v, nil
}
