package daemon

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"virt-trust/internal/bus"
	"virt-trust/internal/evidence/eventlog"
	"virt-trust/internal/evidence/ima"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/introspect"
	"virt-trust/internal/introspect/inject"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/ek"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/statedir"
)

// One round of evidence. What is said of the VMs comes first, since the quote
// binds its digest; then the quote; then the logs, each of which leads to the
// quoted PCR at least. No lock that a start needs is held across anything but
// memory, and the TPM does everything else first.

const (
	readers     = 8               // VMs whose PCRs are read at once
	readLimit   = 2 * time.Second // for one VM
	quoteLimit  = 3 * time.Second
	vmsLimit    = 20 * time.Second
	maxIMAPiece = 16 << 20 // bytes of a log in one round: what is more goes with the next
	maxLogPiece = 8 << 20
	// A kernel that measures while it is read does not keep us here.
	imaBuffer = 256 << 10
)

// collect gives the evidence for a nonce.
func (s *Service) collect(ctx context.Context, nonce []byte, have bus.Have) (*report.Evidence, error) {
	r, err := s.report(ctx, nonce)
	if err != nil {
		return nil, err
	}
	e := &report.Evidence{Version: report.Version, Nonce: nonce}
	if e.Report, err = r.Encode(); err != nil {
		return nil, err
	}
	if len(e.Report) > report.MaxReport {
		return nil, fmt.Errorf("a report of %d bytes, at most %d", len(e.Report), report.MaxReport)
	}
	bank := s.g.cfg.TPM.Bank
	q, err := s.host.Quote(ctx, report.QualifyingData(nonce, e.Report), bank, s.g.cfg.Attestation.PCRs)
	if err != nil {
		return nil, err
	}
	e.Quote = report.Quote{Attest: q.Attest, Signature: q.Signature}
	e.PCRs = []report.Bank{{Algorithm: bank, Values: report.ValuesOf(q.State.PCRs)}}
	if have.Boot != s.g.bootID {
		have.Offsets = nil
	}
	e.Logs = []report.Log{
		eventLogPiece(s.g.cfg.TPM.EventLog, have.Offsets[report.EventLog]),
		imaPiece(s.g.cfg.Attestation.IMAList, have.Offsets[report.IMA]),
		s.g.launchLogPiece(ctx, have.Offsets[report.LaunchLog]),
	}
	return e, nil
}

// report says how the host and its VMs are now.
func (s *Service) report(ctx context.Context, nonce []byte) (*report.Report, error) {
	g := s.g
	r := &report.Report{
		Version: report.Version, AK: s.host.AKName(), BootID: g.bootID, Time: g.now().UnixMicro(),
		Host: report.Host{Software: text(s.version), Mode: g.cfg.Mode, LaunchPCR: g.cfg.Launcher.PCR},
	}
	if r.AK == nil {
		return nil, errors.New("this host has no keys yet")
	}
	name, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, err
	}
	r.Host.Name, r.Host.Kernel = text(name), text(unix.ByteSliceToString(u.Release[:]))
	r.Host.ListState, _, r.Host.ListGeneration, _ = g.listState()
	r.Host.LaunchLog, _ = g.launchLogState()
	store := g.peek()
	if store == nil {
		r.Deleted = g.gone.deleted()
		return r, nil
	}
	r.Host.ListGeneration, r.Host.ListCounter = store.Generation(), store.Counter()
	records := store.All()
	r.Deleted = g.gone.deleted() // after the records, as it is written before them: see gone
	if len(records) > report.MaxVMs {
		return nil, fmt.Errorf("%d VMs, at most %d are reported", len(records), report.MaxVMs)
	}
	r.VMs, err = s.reportVMs(ctx, nonce, records)
	return r, err
}

// reportVMs reports some VMs at once. Records come by UUID, ascending.
func (s *Service) reportVMs(ctx context.Context, nonce []byte, records []*list.Record) ([]report.VM, error) {
	ctx, cancel := context.WithTimeout(ctx, vmsLimit)
	defer cancel()
	all := make([]report.VM, len(records))
	errs := make([]error, len(records))
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(readers, len(records)) {
		wg.Go(func() {
			for i := range next {
				all[i], errs[i] = s.reportVM(ctx, nonce, records[i])
			}
		})
	}
	for i := range records {
		next <- i
	}
	close(next)
	wg.Wait()
	return all, errors.Join(errs...)
}

func (s *Service) reportVM(ctx context.Context, nonce []byte, r *list.Record) (v report.VM, err error) {
	if v.UUID, err = binaryUUID(r.UUID); err != nil {
		return v, err
	}
	verdict, code, _ := s.g.lastVerdict(r)
	v.Name, v.State, v.Verdict, v.Reason = text(r.Name), string(s.g.stateOf(r)), text(verdict), text(code)
	v.Generation, v.LabelGeneration = r.Generation, r.LabelGeneration
	if !r.EKDigest.IsZero() {
		v.EK = r.EKDigest[:]
	}
	v.EKCertificate = r.EKCertificate
	pid, err := statedir.Holder(r.Instance)
	if err != nil {
		// It may run: that it cannot be told is told.
		v.Running, v.Problem = true, text("whether it runs cannot be told: "+err.Error())
		return v, nil
	}
	if v.Running = pid != 0; !v.Running {
		return v, nil
	}
	if pid < 0 {
		v.Problem = "its swtpm runs in another pid namespace"
		return v, nil
	}
	target := introspect.Target{Swtpm: pid, QEMU: qemuOf(r.Name), UUID: r.UUID, StateDir: r.Instance}
	if len(r.AKPublic) > 0 && s.g.cfg.Attestation.VTPMAK && s.quoter != nil { // the VM is paused for a moment
		one, cancel := context.WithTimeout(ctx, quoteLimit)
		defer cancel()
		q, reading, err := s.quoter.Quote(one, target, report.VTPMQualifyingData(nonce, v.UUID), uint32(ek.AKHandle))
		if err == nil {
			v.Quote, v.PCRs = &report.VTPMQuote{Quote: *q, AK: r.AKPublic}, reading
			return v, nil
		}
		s.log.WithField(journal.VM, r.UUID).WithError(err).Debug("a vTPM does not quote")
	}
	one, cancel := context.WithTimeout(ctx, readLimit)
	defer cancel()
	v.PCRs, err = s.pcrs.Read(one, target)
	if errors.Is(err, introspect.ErrGone) {
		if used, e := statedir.InUse(r.Instance); e == nil && !used { // it has just stopped
			v.Running = false
			return v, nil
		}
	}
	if err != nil {
		v.PCRs, v.Problem = nil, text(err.Error())
	}
	return v, nil
}

// qemuOf gives the process id of a VM's QEMU as libvirt noted it, 0 where it did
// not. Whoever uses it must see that it is the right process.
func qemuOf(name string) int {
	if name == "" || strings.ContainsRune(name, '/') {
		return 0
	}
	f, err := os.Open(filepath.Join("/run/libvirt/qemu", name+".pid"))
	if err != nil {
		return 0
	}
	defer f.Close()
	b := make([]byte, 32)
	n, _ := io.ReadFull(f, b)
	pid, err := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	if err != nil || pid < 0 {
		return 0
	}
	return pid
}

// binaryUUID reads a UUID in its usual spelling.
func binaryUUID(s string) (id [16]byte, err error) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != len(id) {
		return id, fmt.Errorf("%.50q is no UUID", s)
	}
	return [16]byte(b), nil
}

// text makes a string one that a report may hold: UTF-8, and not too long.
func text(s string) string {
	s = strings.ToValidUTF8(s, string(utf8.RuneError))
	if len(s) > report.MaxName {
		s = strings.ToValidUTF8(s[:report.MaxName], "")
	}
	return s
}

// eventLogPiece is the log of firmware and boot loader. It does not grow: all of
// it goes, or nothing where the receiver has as much.
func eventLogPiece(path string, have uint64) report.Log {
	l := report.Log{Kind: report.EventLog}
	b, err := readUpTo(path, eventlog.MaxSize)
	switch {
	case err != nil:
		l.Problem = text(err.Error())
	case have == uint64(len(b)):
		l.From = have
	default:
		l.Data = b
	}
	return l
}

// readUpTo reads a file of at most max bytes, whatever size it says it has:
// those in securityfs say none.
func readUpTo(path string, max int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, max+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > max {
		return nil, fmt.Errorf("%s has more than %d bytes", path, max)
	}
	return b, nil
}

// imaPiece is what the kernel has measured since the receiver asked last, as
// whole entries.
func imaPiece(path string, have uint64) report.Log {
	l := report.Log{Kind: report.IMA}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		l.Problem = "the kernel keeps no measurement list: boot it with ima_policy=tcb, see virt-trustd.toml(5)"
		return l
	}
	if err != nil {
		l.Problem = text(err.Error())
		return l
	}
	defer f.Close()
	if have > 0 {
		// A list that is not as long is another one.
		if n, err := f.ReadAt(make([]byte, 1), int64(min(have, 1<<62))-1); n != 1 || err != nil && !errors.Is(err, io.EOF) {
			have = 0
		}
	}
	b, more, err := readPiece(f, int64(have), maxIMAPiece)
	whole, ok := wholeEntries(b)
	if err == nil && have > 0 && !ok { // it did not end where an entry does
		have = 0
		b, more, err = readPiece(f, 0, maxIMAPiece)
		whole, ok = wholeEntries(b)
	}
	switch {
	case err != nil:
		l.Problem = text(err.Error())
	case !ok:
		l.Problem = path + " is no measurement list"
	default:
		l.From, l.Data, l.More = have, b[:whole], more
	}
	return l
}

// readPiece reads up to max bytes from an offset on, and whether there are more.
func readPiece(f io.ReaderAt, from, max int64) (b []byte, more bool, err error) {
	var piece bytes.Buffer
	if _, err := io.CopyBuffer(struct{ io.Writer }{&piece}, io.NewSectionReader(f, from, max+1), make([]byte, imaBuffer)); err != nil {
		return nil, false, err
	}
	b = piece.Bytes()
	if int64(len(b)) > max {
		return b[:max], true, nil
	}
	return b, false, nil
}

// wholeEntries gives how many bytes at the front of b are whole entries; ok is
// false where b is no list.
func wholeEntries(b []byte) (n int, ok bool) {
	var e ima.Entry
	for n < len(b) {
		size, err := e.Next(b[n:])
		if err != nil {
			return 0, false
		}
		if size == 0 {
			break
		}
		n += size
	}
	return n, true
}

// launchLogPiece is what the launch log has grown by since.
func (g *Guard) launchLogPiece(ctx context.Context, have uint64) report.Log {
	l := report.Log{Kind: report.LaunchLog}
	f, size, err := g.launchLogNow(ctx)
	if err != nil {
		l.Problem = text(err.Error())
		return l
	}
	if have > 0 {
		last := make([]byte, 1)
		if have > uint64(size) {
			have = 0
		} else if _, err := f.ReadAt(last, int64(have)-1); err != nil || last[0] != '\n' {
			have = 0
		}
	}
	b, more, err := readPiece(f, int64(have), min(size-int64(have), maxLogPiece))
	if err != nil {
		l.Problem = text(err.Error())
		return l
	}
	whole := bytes.LastIndexByte(b, '\n') + 1
	l.From, l.Data, l.More = have, slices.Clip(b[:whole]), more && int64(have)+int64(whole) < size
	return l
}

// launchLogNow gives the launch log and how long it is. Entries are written
// whole under launch.mu; it is read without.
func (g *Guard) launchLogNow(ctx context.Context) (*os.File, int64, error) {
	for try := 0; ; try++ {
		g.launch.mu.Lock()
		f := g.launch.log.file
		if f != nil {
			st, err := f.Stat()
			g.launch.mu.Unlock()
			if err != nil {
				return nil, 0, err
			}
			return f, st.Size(), nil
		}
		g.launch.mu.Unlock()
		if try > 0 {
			return nil, 0, errors.New("the launch log is not open")
		}
		// Since virt-trustd started nothing has asked for it yet.
		if _, _, err := g.checkLaunchLog(ctx); err != nil {
			return nil, 0, err
		}
	}
}

// quoter has a vTPM quote with the AK at a handle, and reads its PCRs.
type quoter interface {
	Quote(ctx context.Context, t introspect.Target, qualifying [32]byte, ak uint32) (*report.Quote, *report.Reading, error)
}

// lookInto readies what reads the PCRs of vTPMs, which needs the program that
// they run.
func (s *Service) lookInto(uid, gid int) {
	swtpm, err := s.g.launch.measurer.Program("swtpm", defaultPath)
	if err != nil {
		s.log.WithError(err).Warn("the PCRs of vTPMs are not read")
		return
	}
	memory := introspect.NewMemory(introspect.Config{Swtpm: swtpm, Dir: s.g.dirs.Run, UID: uid, GID: gid})
	s.pcrs, s.quoter = memory, &inject.Quoter{}
	// A libtpms that is replaced later, under VMs that run, is known by then.
	go func() {
		if err := memory.Calibrate(s.working); err != nil && s.working.Err() == nil {
			s.log.WithError(err).Warn("how the installed libtpms keeps the PCRs of vTPMs cannot be learned")
		}
	}()
	context.AfterFunc(s.working, func() { memory.Close() })
}

// notRead is a Reader where there is none.
type notRead struct{}

func (notRead) Read(context.Context, introspect.Target) (*report.Reading, error) {
	return nil, errors.New("virt-trustd does not read PCRs here")
}
