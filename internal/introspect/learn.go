package introspect

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
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
// banks are made active, which is so from the next run on. In each run after
// that, random digests are extended in all PCRs that can be, the values are
// asked for, and another allocation is set for the next run, so that only one
// place holds the one of now; then its memory is taken as a sample. So it is
// before TPM2_Startup, and once more after a reset. The last two runs have every
// other bank active.
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
	err = m.run(ctx, dir, func(s *session) (err error) {
		if err := s.startup(); err != nil {
			return err
		}
		if banks, err = allocation(s.tpm); err != nil {
			return err
		}
		return allocate(s.tpm, next(func(int) bool { return true }))
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
		err := m.run(ctx, dir, func(s *session) error {
			three, err := s.samples(then)
			if err != nil {
				return err
			}
			if i > 0 && s.build != build {
				return errors.New("libtpms was changed meanwhile")
			}
			build, samples = s.build, append(samples, three...)
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

// session is a run of swtpm.
type session struct {
	*process
	tpm  transport.TPM
	ctrl net.Conn // swtpm's control channel
}

// pair makes a connected pair of sockets.
func pair() (ours net.Conn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	theirs = os.NewFile(uintptr(fds[1]), "swtpm's")
	f := os.NewFile(uintptr(fds[0]), "ours")
	ours, err = net.FileConn(f)
	if err = errors.Join(err, f.Close()); err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// run runs swtpm on the state in dir, with sockets that nobody else has, until
// do is through.
func (m *Memory) run(ctx context.Context, dir string, do func(*session) error) error {
	data, theirData, err := pair()
	if err != nil {
		return err
	}
	defer data.Close()
	defer theirData.Close()
	ctrl, theirCtrl, err := pair()
	if err != nil {
		return err
	}
	defer ctrl.Close()
	defer theirCtrl.Close()
	const first = 3 // of ExtraFiles
	c := exec.CommandContext(ctx, m.cfg.Swtpm, "socket", "--tpm2", "--tpmstate", "dir="+dir, "--fd", fmt.Sprint(first),
		"--ctrl", fmt.Sprintf("type=unixio,clientfd=%d", first+1), "--flags", "not-need-init", "--terminate")
	c.Env, c.Dir, c.WaitDelay = []string{"PATH=/usr/bin:/bin"}, dir, time.Second
	c.ExtraFiles = []*os.File{theirData, theirCtrl}
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
	theirData.Close()
	theirCtrl.Close()
	if t, ok := ctx.Deadline(); ok {
		_ = errors.Join(data.SetDeadline(t), ctrl.SetDeadline(t))
	}
	err = converse(c.Process.Pid, &session{tpm: transport.FromReadWriter(data), ctrl: ctrl}, do)
	data.Close()
	ctrl.Close()
	if e := c.Wait(); err != nil {
		return fmt.Errorf("%w (%v, %.200q)", err, e, strings.TrimSpace(words.String()))
	}
	return nil
}

// converse waits for swtpm's first answer, which is that it was not started,
// finds libtpms in it, and has do go on.
func converse(pid int, s *session, do func(*session) error) (err error) {
	if _, err := allocation(s.tpm); !errors.Is(err, tpm2.TPMRCInitialize) {
		return fmt.Errorf("before TPM2_Startup: %w", cmp.Or(err, errors.New("it answers")))
	}
	if s.process, err = open(pid); err != nil {
		return err
	}
	defer s.close()
	if err := s.locate(); err != nil {
		return err
	}
	return do(s)
}

func (s *session) startup() error {
	if _, err := (tpm2.Startup{StartupType: tpm2.TPMSUClear}).Execute(s.tpm); err != nil {
		return fmt.Errorf("TPM2_Startup: %w", err)
	}
	return nil
}

// reset is what a reset of the VM is to its vTPM: CMD_INIT (swtpm_ioctls(3)).
func (s *session) reset() error {
	const cmdInit = 2
	if _, err := s.ctrl.Write([]byte{0, 0, 0, cmdInit, 0, 0, 0, 0}); err != nil {
		return err
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(s.ctrl, b); err != nil {
		return err
	}
	if rc := binary.BigEndian.Uint32(b); rc != 0 {
		return fmt.Errorf("CMD_INIT: %#x", rc)
	}
	return nil
}

// samples gives memory before the start, with known PCRs, and after a reset.
func (s *session) samples(next layout.Selection) ([]layout.Sample, error) {
	before, err := s.snapshot()
	if err != nil {
		return nil, err
	}
	if err := s.startup(); err != nil {
		return nil, err
	}
	known, err := s.sample(next)
	if err != nil {
		return nil, err
	}
	if err := s.reset(); err != nil {
		return nil, err
	}
	after, err := s.snapshot()
	return []layout.Sample{before, known, after}, err
}

func (s *session) snapshot() (layout.Sample, error) {
	b, err := s.data()
	return layout.Sample{Offset: s.lib.Data.Start - s.lib.Base, Memory: b}, err
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
func (s *session) sample(next layout.Selection) (layout.Sample, error) {
	none := layout.Sample{}
	active, err := allocation(s.tpm)
	if err != nil {
		return none, err
	}
	values := map[uint16][layout.PCRs][]byte{}
	for pcr := range layout.PCRs {
		if pcr >= 17 && pcr <= 22 { // of the dynamic root of trust: for localities that this has not
			continue
		}
		if err := extendAll(s.tpm, pcr, active); err != nil {
			return none, err
		}
	}
	for _, b := range active {
		if b.Select == 0 || !layout.Known(b.Hash) {
			continue
		}
		if values[b.Hash], err = readBank(s.tpm, b.Hash); err != nil {
			return none, err
		}
	}
	if err := allocate(s.tpm, next); err != nil {
		return none, err
	}
	all, err := s.snapshot()
	all.Started, all.Active, all.Values = true, active, values
	return all, err
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
