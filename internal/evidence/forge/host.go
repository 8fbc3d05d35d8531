package forge

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"virt-trust/internal/evidence/eventlog"
	"virt-trust/internal/evidence/quote"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/launcher/launchlog"
)

// LaunchPCR is that of the launch log.
const LaunchPCR = 15

// VM is a VM of a Host.
type VM struct {
	report.VM
	TPM  *TPM // the vTPM
	Used []int
}

// Host is a host whose Evidence is right. What its logs say is in its TPM's PCRs.
type Host struct {
	TPM      *TPM
	Bank     string
	BootID   string
	Now      time.Time
	EventLog []byte
	IMA      []byte
	Launch   []byte // the launch log
	VMs      []*VM
	Deleted  []report.Deleted

	files, boots int
}

// NewHost is a host that has just booted with a firmware event log of that bank
// (or none), at a time.
func NewHost(bank string, log []byte, now time.Time) *Host {
	h := &Host{TPM: NewTPM(bank), Bank: bank, Now: now}
	if err := h.boot(log); err != nil {
		panic(err)
	}
	return h
}

// Boot boots it anew, with another event log.
func (h *Host) Boot(log []byte) error {
	h.TPM.Reset()
	h.Now = h.Now.Add(time.Minute)
	for _, v := range h.VMs {
		v.Running, v.State, v.PCRs = false, "stored", nil
	}
	h.IMA, h.Launch, h.files, h.Deleted = nil, nil, 0, nil
	return h.boot(log)
}

func (h *Host) boot(log []byte) error {
	h.boots++
	h.BootID = fmt.Sprintf("00000000-0000-4000-8000-%012d", h.boots)
	h.EventLog = log
	if log != nil {
		l, err := eventlog.UntrustedParse(log)
		if err != nil {
			return err
		}
		at, err := l.Replay(h.Bank)
		if err != nil {
			return err
		}
		for p, v := range at {
			h.TPM.PCRs[h.Bank][p] = v
		}
	}
	w := Hashes[h.Bank].New()
	for p := range uint(10) {
		w.Write(h.TPM.PCRs[h.Bank][p])
	}
	h.IMA = h.TPM.Measure(h.IMA, IMAEntry{Path: "boot_aggregate", Digest: w.Sum(nil), Algorithm: h.Bank})
	return nil
}

// Tick lets time go by, on all clocks.
func (h *Host) Tick(d time.Duration) {
	h.Now = h.Now.Add(d)
	h.TPM.Clock += uint64(d.Milliseconds())
	for _, v := range h.VMs {
		v.TPM.Clock += uint64(d.Milliseconds())
	}
}

// Measure has IMA measure a file.
func (h *Host) Measure(path string, content []byte) {
	d := sha256.Sum256(content)
	h.MeasureEntry(IMAEntry{Path: path, Digest: d[:]})
}

// MeasureEntry has IMA measure an entry.
func (h *Host) MeasureEntry(e IMAEntry) { h.IMA = h.TPM.Measure(h.IMA, e) }

// MeasureMany has IMA measure n files of a distribution.
func (h *Host) MeasureMany(n int) {
	for i := range n {
		h.Measure(fmt.Sprintf("/usr/lib/x86_64-linux-gnu/libexample-%d.so.%d.2.3", i, i%7), fmt.Appendf(nil, "library %d", i))
	}
}

// Log appends to the launch log.
func (h *Host) Log(e launchlog.Entry) {
	e.Time = h.Now.Unix()
	if h.Launch == nil && e.Boot == nil {
		h.Log(h.FirstEntry())
	}
	line, err := launchlog.Encode(e)
	if err != nil {
		panic(err)
	}
	d := Hashes[h.Bank].New()
	d.Write(line)
	h.TPM.Extend(h.Bank, LaunchPCR, d.Sum(nil))
	h.Launch = append(append(h.Launch, line...), '\n')
}

// FirstEntry is the entry with which a launch log begins now.
func (h *Host) FirstEntry() launchlog.Entry {
	return launchlog.Entry{Event: launchlog.EventBoot, Boot: &launchlog.Boot{
		ID: h.BootID, ResetCount: h.TPM.Resets, PCR: LaunchPCR, Before: map[string]string{h.Bank: hex.EncodeToString(h.TPM.PCRs[h.Bank][LaunchPCR])},
	}}
}

// Launchers measures launchers, by role, path and content, and gives their
// numbers.
func (h *Host) Launchers(files ...[3]string) []int {
	var all []launchlog.File
	var numbers []int
	for _, f := range files {
		h.files++
		d := sha256.Sum256([]byte(f[2]))
		all = append(all, launchlog.File{N: h.files, Role: f[0], Path: f[1], SHA256: hex.EncodeToString(d[:]), By: "package"})
		numbers = append(numbers, h.files)
	}
	h.Log(launchlog.Entry{Event: launchlog.EventFiles, Files: all})
	return numbers
}

// AddVM adds a VM that does not run.
func (h *Host) AddVM(name string) *VM {
	id := sha256.Sum256([]byte("VM " + name))
	ek := sha256.Sum256([]byte("EK of " + name))
	v := &VM{TPM: NewTPM("sha256"), VM: report.VM{UUID: [16]byte(id[:16]), Name: name, State: "stored", EK: ek[:], LabelGeneration: 1, Verdict: "allow"}}
	h.VMs = append(h.VMs, v)
	slices.SortFunc(h.VMs, func(a, b *VM) int { return bytes.Compare(a.UUID[:], b.UUID[:]) })
	return v
}

// UUIDText is a VM's UUID as it is written.
func (v *VM) UUIDText() string {
	u := v.UUID
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// Start starts a VM with launchers that were measured, and boots it with an
// event log of its own.
func (h *Host) Start(v *VM, guestLog []byte, launchers ...int) {
	v.Generation++
	v.Running, v.State, v.Used = true, "running", launchers
	v.TPM.Reset()
	h.Log(h.StartEntry(v))
	if guestLog == nil {
		return
	}
	l, err := eventlog.UntrustedParse(guestLog)
	if err != nil {
		panic(err)
	}
	at, err := l.Replay("sha256")
	if err != nil {
		panic(err)
	}
	for p, value := range at {
		v.TPM.PCRs["sha256"][p] = value
	}
}

// StartEntry is the launch log's entry of a VM's start.
func (h *Host) StartEntry(v *VM) launchlog.Entry {
	log, err := launchlog.Parse(h.Launch)
	if err != nil {
		panic(err)
	}
	var digests [][sha256.Size]byte
	for _, n := range v.Used {
		d, err := launchlog.ParseDigest(log.Files[n-1].SHA256)
		if err != nil {
			panic(err)
		}
		digests = append(digests, d)
	}
	set := launchlog.Set(digests)
	return launchlog.Entry{Event: launchlog.EventStart, Start: &launchlog.Start{
		VM: v.UUIDText(), Generation: v.Generation, LabelGeneration: 1, EK: hex.EncodeToString(v.EK), Launchers: v.Used, LaunchersSHA256: hex.EncodeToString(set[:]),
	}}
}

// Stop stops a VM.
func (h *Host) Stop(v *VM) { v.Running, v.State = false, "stored" }

// Delete deletes a VM's record.
func (h *Host) Delete(v *VM) {
	h.VMs = slices.DeleteFunc(h.VMs, func(o *VM) bool { return o == v })
	h.Deleted = append(h.Deleted, report.Deleted{UUID: v.UUID, Time: h.Now.UnixMicro(), Why: "deleted"})
}

// Options change Evidence.
type Options struct {
	// HaveBoot and Have are what the receiver has of the logs.
	HaveBoot string
	Have     map[string]uint64
	VMQuotes bool // each VM that runs is quoted by its vTPM
	// Selections are what is quoted; nil: PCRs 0 to 15 of the host's bank.
	Selections []quote.Selection
	NoPCRs     bool                          // quote over nothing
	Report     func(*report.Report)          // before it is quoted
	Quote      func(*TPM)                    // before the quote
	Evidence   func(*report.Evidence, *Host) // after it
}

// Report is what virt-trustd would say.
func (h *Host) Report(nonce []byte, o Options) *report.Report {
	r := &report.Report{
		Version: report.Version, AK: h.TPM.AKName(), BootID: h.BootID, Time: h.Now.UnixMicro(),
		Host:    report.Host{Name: "host", Software: "1.0", Mode: "enforce", ListState: "readable", ListGeneration: 5, ListCounter: 5, LaunchPCR: LaunchPCR, LaunchLog: "replays", Kernel: "6.1.0"},
		Deleted: h.Deleted,
	}
	for _, v := range h.VMs {
		c := v.VM
		if c.Running {
			c.PCRs = &report.Reading{Reader: "swtpm-memory", Time: h.Now.UnixMicro(), Banks: []report.Bank{{Algorithm: "sha256", Values: report.ValuesOf(v.TPM.PCRs["sha256"])}}}
			if o.VMQuotes {
				q := report.VTPMQualifyingData(nonce, v.UUID)
				c.Quote = &report.VTPMQuote{Quote: v.TPM.Quote(q[:], quote.Selection{Bank: "sha256", PCRs: first16}), AK: v.TPM.AK()}
			}
		}
		r.VMs = append(r.VMs, c)
	}
	return r
}

var first16 = []uint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}

// Evidence makes Evidence for a nonce.
func (h *Host) Evidence(nonce []byte, o Options) []byte {
	r := h.Report(nonce, o)
	if o.Report != nil {
		o.Report(r)
	}
	b, err := r.Encode()
	if err != nil {
		panic(err)
	}
	if o.Quote != nil {
		o.Quote(h.TPM)
	}
	sel := o.Selections
	if sel == nil && !o.NoPCRs {
		sel = []quote.Selection{{Bank: h.Bank, PCRs: first16}}
	}
	q := report.QualifyingData(nonce, b)
	e := &report.Evidence{Version: report.Version, Nonce: nonce, Report: b, Quote: h.TPM.Quote(q[:], sel...), Logs: h.logs(o)}
	for _, s := range sel {
		var values report.Values
		for _, p := range s.PCRs {
			values[p] = h.TPM.PCRs[s.Bank][p]
		}
		e.PCRs = append(e.PCRs, report.Bank{Algorithm: s.Bank, Values: values})
	}
	if o.Evidence != nil {
		o.Evidence(e, h)
	}
	out, err := e.Encode()
	if err != nil {
		panic(err)
	}
	return out
}

func (h *Host) logs(o Options) (logs []report.Log) {
	have := o.Have
	if o.HaveBoot != h.BootID {
		have = nil
	}
	for kind, b := range map[string][]byte{report.EventLog: h.EventLog, report.IMA: h.IMA, report.LaunchLog: h.Launch} {
		l := report.Log{Kind: kind, From: have[kind]}
		if l.From > uint64(len(b)) {
			l.From = 0
		}
		l.Data = b[l.From:]
		if kind == report.EventLog && b == nil {
			l.Problem = "there is no event log"
		}
		logs = append(logs, l)
	}
	slices.SortFunc(logs, func(a, b report.Log) int { return bytes.Compare([]byte(a.Kind), []byte(b.Kind)) })
	return logs
}
