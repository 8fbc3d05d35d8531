package appraise

import (
	"bytes"
	"compress/flate"
	"crypto"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"

	"virt-trust/internal/evidence/eventlog"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/fleet"
)

// logPCRs are those that firmware, boot loader and kernel's stub measure into
// and write down.
var logPCRs = []uint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14}

const (
	lastFirmwarePCR = 7
	pcrSecureBoot   = 7
)

// firmwareLive are the quoted values that the event log has to lead to.
func (r *round) firmwareLive() pcrs {
	var some uint32
	for _, p := range logPCRs {
		if p != r.policy.LaunchPCR {
			some |= 1 << p
		}
	}
	return packPCRs(r.policy.Bank, &r.live, some, r.next.Events.Values)
}

// eventLog replays the event log of firmware and boot loader, and holds its
// events against Reference Values.
func (r *round) eventLog() {
	st := &r.next.Events
	l, ok := r.log(report.EventLog, st.Size)
	switch {
	case !ok:
		*st = eventState{}
		return
	case l == nil || l.Problem != "" || l.From == 0 && len(l.Data) == 0:
		*st = eventState{}
		if !r.hostPCRsKnown() {
			r.hostf(CodeEventLogMissing, None, "there is no event log of firmware and boot loader (%.200s), nor are there Reference Values for the PCRs themselves", missing(l))
		}
		return
	case l.From > 0 && len(l.Data) > 0 || l.More:
		*st = eventState{} // such a log does not grow; the next round brings it whole
		r.hostf(CodeLogIncomplete, None, "the event log has grown after the boot: all of it is needed")
		return
	}
	live := r.firmwareLive()
	if l.From > 0 && st.Values.same(&live) && !r.revised() && !r.learnHost {
		r.host = append(r.host, st.Found...)
		return
	}
	log, packed, ok := r.readEventLog(l)
	if !ok {
		*st = eventState{}
		return
	}
	if r.sameBoot && st.Packed != nil && l.From == 0 && !samePacked(packed, st.Packed) {
		r.hostf(CodeLogChanged, Contraindicated, "the event log is another one than before in the same boot")
	}
	size := st.Size
	if l.From == 0 {
		size = uint64(len(l.Data))
	}
	explained, err := log.Explain(r.policy.Bank, live.byPCR())
	if err != nil {
		r.notExplained(log, live.byPCR(), err)
		*st = eventState{}
		return
	}
	before := len(r.host)
	r.events(explained)
	*st = eventState{Size: size, Packed: packed, Bank: r.policy.Bank, Values: live, Found: slices.Clone(r.host[before:])}
}

// revised: Reference Values or policy are others than in the round before.
func (r *round) revised() bool {
	return r.prev == nil || r.prev.Values != r.next.Values || r.prev.Policy != r.next.Policy
}

// readEventLog gives the log of the policy's bank, out of the Evidence or of the
// checkpoint.
func (r *round) readEventLog(l *report.Log) (log *eventlog.Log, packed []byte, ok bool) {
	raw := l.Data
	if l.From > 0 {
		raw = unpack(r.next.Events.Packed)
	}
	whole, err := eventlog.UntrustedParse(raw)
	if err != nil {
		r.hostf(CodeEventLogFormat, None, "%v", err)
		return nil, nil, false
	}
	if log, err = whole.Bank(r.policy.Bank); err != nil {
		r.hostf(CodeEventLogFormat, None, "%v", err)
		return nil, nil, false
	}
	if l.From > 0 {
		return log, r.next.Events.Packed, true
	}
	return log, pack(log.Marshal()), true
}

// deflaters are kept: one has more than a megabyte.
var deflaters = sync.Pool{New: func() any {
	w, err := flate.NewWriter(nil, flate.BestSpeed)
	if err != nil {
		panic(err)
	}
	return w
}}

// pack deflates a log. One that is short, as those without GRUB in them are,
// becomes one block that is stored as it is (RFC 1951, 3.2.4): deflating would take
// more than all the rest that is done with it, for half a page of the database.
func pack(b []byte) []byte {
	if n := uint16(len(b)); len(b) <= maxStored {
		const final = 1
		out := append(make([]byte, 0, 5+len(b)), final)
		out = binary.LittleEndian.AppendUint16(out, n)
		out = binary.LittleEndian.AppendUint16(out, ^n)
		return append(out, b...)
	}
	return deflate(b)
}

const maxStored = 4 << 10 // bytes; a block has fewer than 1<<16

// samePacked: the same log, which may have been packed in another way.
func samePacked(a, b []byte) bool { return bytes.Equal(a, b) || bytes.Equal(unpack(a), unpack(b)) }

func deflate(b []byte) []byte {
	var out bytes.Buffer
	w := deflaters.Get().(*flate.Writer)
	defer deflaters.Put(w)
	w.Reset(&out)
	if _, err := w.Write(b); err != nil || w.Close() != nil {
		return nil
	}
	return out.Bytes()
}

func unpack(b []byte) []byte {
	out, err := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(b)), eventlog.MaxSize+1))
	if err != nil {
		return nil
	}
	return out
}

// notExplained says which PCRs hold something that the log does not account
// for.
func (r *round) notExplained(log *eventlog.Log, live map[uint][]byte, err error) {
	at, rerr := log.Replay(r.policy.Bank)
	if rerr != nil {
		r.hostf(CodeEventLogReplay, Contraindicated, "%v", rerr)
		return
	}
	for _, p := range slices.Sorted(maps.Keys(live)) {
		if !bytes.Equal(at[p], live[p]) {
			n := p
			r.host = append(r.host, Reason{
				Code: CodeEventLogReplay, Tier: Contraindicated, Log: report.EventLog, PCR: &n, Digest: hex.EncodeToString(live[p]), Expected: hex.EncodeToString(at[p]),
				What: fmt.Sprintf("PCR %d is not what its event log leads to: %v", p, err),
			})
		}
	}
}

// vouched reports whether an event's digest is of its data: only then is it true
// what the data says.
func vouched(e *eventlog.Event, h crypto.Hash) bool {
	for _, data := range [][]byte{e.Data, withoutPrefix(e.Data)} {
		w := h.New()
		w.Write(data)
		if bytes.Equal(w.Sum(nil), digestOf(e)) {
			return true
		}
	}
	return false
}

func digestOf(e *eventlog.Event) []byte {
	if len(e.Digests) != 1 {
		return nil
	}
	return e.Digests[0]
}

// withoutPrefix is what GRUB hashes of the text that it logs.
func withoutPrefix(data []byte) []byte {
	for _, p := range []string{"grub_cmd: ", "kernel_cmdline: "} {
		if rest, ok := bytes.CutPrefix(data, []byte(p)); ok {
			return bytes.TrimRight(rest, "\x00")
		}
	}
	return data
}

// inherent are types whose digest is of something else than their data: an
// image, a volume, a file.
func inherent(e *eventlog.Event) bool {
	switch e.Type {
	case eventlog.BootApplication, eventlog.BootDriver, eventlog.RuntimeDriver, eventlog.FirmwareBlob, eventlog.FirmwareBlob2,
		eventlog.HandoffTables, eventlog.HandoffTables2, eventlog.IPL, eventlog.CRTMContents, eventlog.Microcode, eventlog.EventTag, eventlog.GPT, eventlog.GPT2:
		return true
	}
	return false
}

// eventPath is how a Reference Value names an event.
func eventPath(e *eventlog.Event, d eventlog.Description) string {
	return fmt.Sprintf("%d/%#x/%s", e.PCR, uint32(e.Type), d.What)
}

// hashes are those of the banks in which hosts are quoted.
var hashes = map[string]crypto.Hash{"sha1": crypto.SHA1, "sha256": crypto.SHA256, "sha384": crypto.SHA384}

// events holds each event against Reference Values. What an event is, is told by
// its PCR and digest alone: its type, and mostly its data, are only what the log
// calls it. An event of type EV_NO_ACTION was not measured, and the log would not
// replay if one that was measured were called that.
func (r *round) events(log *eventlog.Log) {
	alg, _ := identify(r.policy.Bank)
	h := hashes[r.policy.Bank]
	order := newOrder(h)
	key := make([]byte, 0, 2+64)
	anyValues := r.values.hasEvents()
	for i := range log.Events {
		e := &log.Events[i]
		if e.Type == eventlog.NoAction {
			continue
		}
		digest := digestOf(e)
		order.see(e, digest, h)
		if !slices.Contains(r.policy.Events, uint(e.PCR)) {
			continue
		}
		key = append(append(key[:0], byte(e.PCR), alg), digest...)
		if r.values.event(key) {
			continue
		}
		d := e.Describe()
		path := eventPath(e, d)
		hexDigest := hex.EncodeToString(digest)
		if r.learnHost {
			r.learn(r.in.Node.ID, fleet.HostEvent, path, r.policy.Bank+":"+hexDigest)
			continue
		}
		if !anyValues {
			continue
		}
		pcr, n := uint(e.PCR), i
		what := d.What
		if d.Value != "" {
			what += fmt.Sprintf(" %q", d.Value)
		}
		switch {
		case vouched(e, h):
		case inherent(e):
			what += " (so its log calls it)"
		default:
			what = "an event whose log tells a lie: its digest is not that of its words"
		}
		r.host = append(r.host, Reason{
			Code: CodeEventUnknown, Tier: r.policy.UnknownEvent, What: fmt.Sprintf("PCR %d: %s is no Reference Value", pcr, what),
			Log: report.EventLog, Entry: &n, PCR: &pcr, Path: path, Digest: r.policy.Bank + ":" + hexDigest, Expected: expected("", r.values.words(path)),
		})
	}
	if !anyValues && !r.hostPCRsKnown() { // PCRs that are right vouch for all events that led to them
		r.hostf(CodeHostNoValues, None, "there are no Reference Values for the events of this host's boot")
	}
	r.host = append(r.host, order.findings(r.policy.Events)...)
}

// expected writes the newest few of what would have been right, each once, with
// the bank that is not in them.
func expected(bank string, all []string) string {
	var some []string
	for i := len(all) - 1; i >= 0 && len(some) < 3; i-- {
		if v := bank + all[i]; !slices.Contains(some, v) {
			some = append(some, v)
		}
	}
	return strings.Join(some, ", ")
}

// order is what has to be so in any boot (PFP, 3.3.4 and 10.4.1), told by digests:
// one separator in each of PCRs 0 to 7, and what tells of Secure Boot before it,
// where the firmware alone measures.
type order struct {
	good, bad [2][]byte
	at        [lastFirmwarePCR + 1]int // separators
	failed    [lastFirmwarePCR + 1]bool
	early     int // SecureBoot before the separator of PCR 7
	late      int // and after
}

func newOrder(h crypto.Hash) *order {
	sum := func(b ...byte) []byte {
		w := h.New()
		w.Write(b)
		return w.Sum(nil)
	}
	return &order{good: [2][]byte{sum(0, 0, 0, 0), sum(0xff, 0xff, 0xff, 0xff)}, bad: [2][]byte{sum(1, 0, 0, 0), sum(0, 0, 0, 1)}}
}

func (o *order) see(e *eventlog.Event, digest []byte, h crypto.Hash) {
	if e.PCR > lastFirmwarePCR {
		return
	}
	switch {
	case bytes.Equal(digest, o.good[0]) || bytes.Equal(digest, o.good[1]):
		o.at[e.PCR]++
	case bytes.Equal(digest, o.bad[0]) || bytes.Equal(digest, o.bad[1]):
		o.at[e.PCR]++
		o.failed[e.PCR] = true
	case e.PCR == pcrSecureBoot && e.Type == eventlog.VariableConfig && e.Variable() == "SecureBoot" && vouched(e, h):
		if o.at[pcrSecureBoot] == 0 {
			o.early++
		} else {
			o.late++
		}
	}
}

func (o *order) findings(pcrs []uint) (all []Reason) {
	add := func(code string, pcr uint, what string) {
		all = append(all, Reason{Code: code, Tier: Contraindicated, Log: report.EventLog, PCR: &pcr, What: what})
	}
	for p := range uint(lastFirmwarePCR + 1) {
		if !slices.Contains(pcrs, p) {
			continue
		}
		switch n := o.at[p]; {
		case n == 0:
			add(CodeEventMissing, p, fmt.Sprintf("PCR %d has no separator: the firmware did not end its measurements", p))
		case n > 1 && p > 0: // some firmware ends PCR 0 twice, after its root of trust
			add(CodeEventOrder, p, fmt.Sprintf("PCR %d has %d separators: something went on after the firmware's end as if it were the firmware", p, n))
		case o.failed[p]:
			add(CodeFirmwareError, p, fmt.Sprintf("the separator of PCR %d says that the firmware failed", p))
		}
	}
	if slices.Contains(pcrs, pcrSecureBoot) && o.at[pcrSecureBoot] > 0 {
		switch {
		case o.late > 0:
			add(CodeEventOrder, pcrSecureBoot, "the variable SecureBoot was measured after the firmware had ended its measurements")
		case o.early == 0:
			add(CodeEventMissing, pcrSecureBoot, "nothing says whether Secure Boot is on")
		}
	}
	return all
}

// hostPCRs holds PCRs against Reference Values for themselves, where there are
// some, or where there is no event log.
func (r *round) hostPCRs() {
	withoutLog := r.next.Events.Packed == nil
	for _, p := range r.policy.Events {
		if r.live[p] == nil || p == r.policy.LaunchPCR {
			continue
		}
		path := pcrPath(r.policy.Bank, p)
		want := r.values.pcr(ofHost, path)
		if r.next.PCRs.is(p, want) {
			continue
		}
		got := r.next.PCRs.hex(p)
		switch {
		case len(want) == 0 && withoutLog && r.learnHost:
			r.learn(r.in.Node.ID, fleet.HostPCR, path, r.policy.Bank+":"+got)
		case len(want) > 0:
			n := p
			r.host = append(r.host, Reason{
				Code: CodeHostPCR, Tier: r.policy.UnknownEvent, PCR: &n, Path: path, Digest: r.policy.Bank + ":" + got, Expected: expected(r.policy.Bank+":", want),
				What: fmt.Sprintf("PCR %d is not what its Reference Values say", p),
			})
		}
	}
}

// hostPCRsKnown reports whether there are, or will be learned, Reference Values
// for each PCR that the event log explains, or would.
func (r *round) hostPCRsKnown() bool {
	if r.learnHost {
		return true
	}
	for _, p := range r.policy.Events {
		if p != r.policy.LaunchPCR && len(r.values.pcr(ofHost, pcrPath(r.policy.Bank, p))) == 0 {
			return false
		}
	}
	return len(r.policy.Events) > 0
}
