package appraise

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	gotestdata "github.com/google/go-eventlog/testdata"

	"virt-trust/internal/evidence/eventlog"
	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/evidence/quote"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/launcher/launchlog"
	"virt-trust/internal/verifier/fleet"
)

var all16 = []uint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}

var all16Selection = quote.Selection{Bank: "sha256", PCRs: all16}

// setLog changes a log of Evidence.
func setLog(kind string, f func(*report.Log)) func(*report.Evidence, *forge.Host) {
	return func(e *report.Evidence, _ *forge.Host) {
		for i := range e.Logs {
			if e.Logs[i].Kind == kind {
				f(&e.Logs[i])
			}
		}
	}
}

// Evidence that cannot be verified says nothing: the checkpoint stays, and all
// VMs that are known are no better than the host.
func TestNotVerified(t *testing.T) {
	other := forge.NewTPM("sha256")
	for name, c := range map[string]struct {
		o      forge.Options
		change func(*Input)
		tier   Tier
		code   string
	}{
		"nothing":             {change: func(in *Input) { in.Evidence = nil }, code: CodeNoEvidence},
		"garbage":             {change: func(in *Input) { in.Evidence = []byte("garbage") }, code: CodeFormat},
		"cut off":             {change: func(in *Input) { in.Evidence = in.Evidence[:len(in.Evidence)-1] }, code: CodeFormat},
		"replayed":            {change: func(in *Input) { in.Nonce = bytes.Repeat([]byte{7}, 32) }, tier: Contraindicated, code: CodeNonce},
		"no nonce was given":  {change: func(in *Input) { in.Nonce = nil }, tier: Contraindicated, code: CodeNonce},
		"delayed":             {change: func(in *Input) { in.Now = in.Expires.Add(time.Second) }, code: CodeNonceLate},
		"another TPM's":       {change: func(in *Input) { in.Node.AK = &other.Key.PublicKey }, tier: Contraindicated, code: CodeSignature},
		"no AK":               {change: func(in *Input) { in.Node.AK = nil }, code: CodeQuote},
		"another AK's Name":   {change: func(in *Input) { in.Node.AKName = other.AKName() }, tier: Contraindicated, code: CodeAKName},
		"no policy":           {change: func(in *Input) { in.Policy = nil }, code: CodeInternal},
		"over no PCRs":        {o: forge.Options{NoPCRs: true}, tier: Contraindicated, code: CodeNoPCRs},
		"over an empty bank":  {o: forge.Options{Selections: []quote.Selection{{Bank: "sha256"}}}, tier: Contraindicated, code: CodeNoPCRs},
		"over too few PCRs":   {o: forge.Options{Selections: []quote.Selection{{Bank: "sha256", PCRs: all16[:10]}}}, tier: Contraindicated, code: CodePCRsMissing},
		"over the wrong bank": {o: forge.Options{Selections: []quote.Selection{{Bank: "sha1", PCRs: all16}}}, tier: Contraindicated, code: CodeBank},
		"forged values": {o: forge.Options{Evidence: func(e *report.Evidence, _ *forge.Host) {
			e.PCRs[0].Values[4] = bytes.Repeat([]byte{1}, 32)
		}}, tier: Contraindicated, code: CodePCRValues},
		"a value is missing": {o: forge.Options{Evidence: func(e *report.Evidence, _ *forge.Host) { e.PCRs[0].Values[4] = nil }}, tier: Contraindicated, code: CodePCRValues},
		"another report": {o: forge.Options{Evidence: func(e *report.Evidence, h *forge.Host) {
			r := h.Report(e.Nonce, forge.Options{})
			r.VMs = r.VMs[:1] // a VM is hidden after the quote
			e.Report, _ = r.Encode()
		}}, tier: Contraindicated, code: CodeQualifying},
		"no report": {o: forge.Options{Evidence: func(e *report.Evidence, h *forge.Host) {
			e.Report = []byte{0xa0}
			q := report.QualifyingData(e.Nonce, e.Report)
			e.Quote = h.TPM.Quote(q[:], quote.Selection{Bank: "sha256", PCRs: all16})
		}}, code: CodeFormat},
		"a certification": {o: forge.Options{Evidence: func(e *report.Evidence, h *forge.Host) { e.Quote = h.TPM.Certify(h.TPM.AKName()) }}, code: CodeQuote},
		"a nonce of one's own": {o: forge.Options{Evidence: func(e *report.Evidence, h *forge.Host) {
			e.Nonce = bytes.Repeat([]byte{9}, 32)
			q := report.QualifyingData(e.Nonce, e.Report)
			e.Quote = h.TPM.Quote(q[:], quote.Selection{Bank: "sha256", PCRs: all16})
		}}, tier: Contraindicated, code: CodeNonce},
	} {
		t.Run(name, func(t *testing.T) {
			b := learned(t)
			b.host.TPM.PCRs["sha1"] = map[uint][]byte{}
			for _, p := range all16 {
				b.host.TPM.PCRs["sha1"][p] = make([]byte, 20)
			}
			state := b.state
			in := b.input(c.o)
			if c.change != nil {
				c.change(&in)
			}
			b.appraise(in)
			b.want(c.tier, c.code)
			b.wantVM("one", c.tier, CodeHost)
			if b.state.Clock != state.Clock || b.state.Received != state.Received {
				t.Error("the checkpoint went on")
			}
			// And the next round is as good as if nothing had been.
			b.host.Tick(time.Minute)
			b.round(forge.Options{})
			b.want(Affirming)
		})
	}
}

// A host's clocks and counters.
func TestClocks(t *testing.T) {
	for name, c := range map[string]struct {
		do     func(*bench)
		change func(*Input)
		tier   Tier
		codes  []string
	}{
		"nothing":             {func(b *bench) {}, nil, Affirming, nil},
		"the clock went back": {func(b *bench) { b.host.TPM.Clock -= 100_000 }, nil, Contraindicated, []string{CodeClockBack}},
		"fewer resets":        {func(b *bench) { b.host.TPM.Resets-- }, nil, Contraindicated, []string{CodeClockBack, CodeLaunchBoot}},
		"fewer restarts": {func(b *bench) {
			b.host.TPM.Restarts = 4
			b.round(forge.Options{})
			b.host.TPM.Restarts = 3
			b.host.Tick(time.Second)
		}, nil, Contraindicated, []string{CodeClockBack}},
		"a resume": {func(b *bench) { b.host.TPM.Restarts++ }, nil, Affirming, nil},
		"reset under the kernel": {func(b *bench) {
			b.host.TPM.Resets++
		}, nil, Contraindicated, []string{CodeResets, CodeLaunchBoot}},
		"another kernel without a reset": {func(b *bench) { b.host.BootID = "other" }, nil, Contraindicated, []string{CodeResets, CodeLaunchBoot}},
		"the host's clock is wrong":      {func(b *bench) {}, func(in *Input) { in.Now = in.Now.Add(-time.Hour) }, Warning, []string{CodeClockSkew}},
		"the clock jumped after a power cut": {func(b *bench) {
			b.host.TPM.Clock -= 100_000
			b.host.TPM.Unsafe = true
			b.host.TPM.Clock -= 30_000
			if err := b.host.Boot(b.host.EventLog); err != nil {
				b.t.Fatal(err)
			}
		}, nil, Affirming, nil},
		"the clock jumped back, safely": {func(b *bench) {
			b.host.TPM.Clock -= 200_000
			if err := b.host.Boot(b.host.EventLog); err != nil {
				b.t.Fatal(err)
			}
		}, nil, Contraindicated, []string{CodeClockBack}},
	} {
		t.Run(name, func(t *testing.T) {
			b := learned(t)
			c.do(b)
			in := b.input(forge.Options{Have: map[string]uint64{}})
			if c.change != nil {
				c.change(&in)
			}
			b.appraise(in)
			b.want(c.tier, c.codes...)
		})
	}
}

// A round is not taken twice: the AK's clock stands still in what was recorded.
func TestReplayedWithItsNonce(t *testing.T) {
	b := learned(t)
	b.round(forge.Options{})
	first := b.in
	b.host.Tick(time.Minute)
	b.round(forge.Options{})
	first.Previous, first.Now = b.state, b.host.Now
	first.Expires = time.Time{}
	b.appraise(first)
	if !slices.Contains(codesOf(b.result.Host), CodeClockBack) || b.result.Host.Tier != Contraindicated {
		t.Errorf("%v %v", b.result.Host.Tier, codesOf(b.result.Host))
	}
}

func TestStanding(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*report.Report)
		tier   Tier
		code   string
	}{
		"sealed":       {func(r *report.Report) { r.Host.ListState = "sealed" }, Contraindicated, CodeListState},
		"damaged":      {func(r *report.Report) { r.Host.ListState = "damaged" }, Contraindicated, CodeListState},
		"rolled back":  {func(r *report.Report) { r.Host.ListState = "rolled-back" }, Contraindicated, CodeListState},
		"unknown":      {func(r *report.Report) { r.Host.ListState = "" }, None, CodeListState},
		"audit":        {func(r *report.Report) { r.Host.Mode = "audit" }, Warning, CodeMode},
		"unknown mode": {func(r *report.Report) { r.Host.Mode = "" }, None, CodeMode},
	} {
		b := learned(t)
		b.round(forge.Options{Report: c.change})
		t.Log(name)
		b.want(c.tier, c.code)
		b.wantVM("one", c.tier, CodeHost)
	}
	b := learned(t)
	b.round(forge.Options{Report: func(r *report.Report) { r.Host.ListState, r.VMs = "sealed", nil }})
	b.want(Contraindicated, CodeListState)
	b.wantVM("one", Contraindicated, CodeHost, CodeListState)
}

// rewrite gives an event log with its events changed.
func rewrite(t testing.TB, raw []byte, f func(l *eventlog.Log)) []byte {
	t.Helper()
	l, err := eventlog.UntrustedParse(raw)
	if err != nil {
		t.Fatal(err)
	}
	f(l)
	return l.Marshal()
}

// Event logs that were tampered with on their way, and boots that were not as
// they should be.
func TestEventLogs(t *testing.T) {
	find := func(l *eventlog.Log, pcr uint32, typ eventlog.EventType) int {
		return slices.IndexFunc(l.Events, func(e eventlog.Event) bool { return e.PCR == pcr && e.Type == typ })
	}
	event := func(l *eventlog.Log, pcr uint32, typ eventlog.EventType, data string) eventlog.Event {
		e := eventlog.Event{PCR: pcr, Type: typ, Data: []byte(data)}
		for _, a := range l.Algorithms {
			h := map[int]string{20: "sha1", 32: "sha256", 48: "sha384"}[a.Size]
			if h == "" { // a bank that the host does not quote
				e.Digests = append(e.Digests, make([]byte, a.Size))
				continue
			}
			w := forge.Hashes[h].New()
			w.Write(e.Data)
			e.Digests = append(e.Digests, w.Sum(nil))
		}
		return e
	}
	onItsWay := map[string]struct {
		change func(l *eventlog.Log)
		code   string
	}{
		"dropped": {func(l *eventlog.Log) {
			i := find(l, 4, eventlog.BootApplication)
			l.Events = slices.Delete(l.Events, i, i+1)
		}, CodeEventLogReplay},
		"reordered": {func(l *eventlog.Log) {
			i := find(l, 7, eventlog.VariableConfig)
			l.Events[i], l.Events[i+1] = l.Events[i+1], l.Events[i]
		}, CodeEventLogReplay},
		"called no action": {func(l *eventlog.Log) { l.Events[find(l, 4, eventlog.BootApplication)].Type = eventlog.NoAction }, CodeEventLogReplay},
		"another PCR":      {func(l *eventlog.Log) { l.Events[find(l, 4, eventlog.BootApplication)].PCR = 5 }, CodeEventLogReplay},
		"added":            {func(l *eventlog.Log) { l.Events = append(l.Events, event(l, 9, eventlog.IPL, "/initrd")) }, CodeEventLogReplay},
	}
	for name, c := range onItsWay {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.round(forge.Options{Evidence: setLog(report.EventLog, func(l *report.Log) { l.Data = rewrite(t, l.Data, c.change) })})
			if b.result.Host.Tier != Contraindicated || !slices.Contains(codesOf(b.result.Host), c.code) {
				t.Errorf("%v %v", b.result.Host.Tier, codesOf(b.result.Host))
			}
			if len(b.values) != 0 || b.state.Learned {
				t.Errorf("%d values were learned of such a host", len(b.values))
			}
			b.host.Tick(time.Minute)
			b.round(forge.Options{})
			b.want(Affirming)
		})
	}

	// An event whose type or words are forged is told by its digest.
	b := learned(t)
	b.round(forge.Options{Have: map[string]uint64{}, Evidence: setLog(report.EventLog, func(l *report.Log) {
		l.Data = rewrite(t, l.Data, func(l *eventlog.Log) { l.Events[find(l, 4, eventlog.BootApplication)].Type = eventlog.Action })
	})})
	b.want(Contraindicated, CodeLogChanged) // it replays, and is another one than before

	boots := map[string]struct {
		change func(l *eventlog.Log)
		tier   Tier
		codes  []string
		what   string
	}{
		"the same":      {func(l *eventlog.Log) {}, Affirming, nil, ""},
		"a boot loader": {func(l *eventlog.Log) { l.Events = append(l.Events, event(l, 4, eventlog.Action, "Boot something")) }, Contraindicated, []string{CodeEventUnknown}, `firmware's action "Boot something"`},
		"words that are a lie": {func(l *eventlog.Log) {
			e := event(l, 4, eventlog.Action, "evil")
			e.Data = []byte("Calling EFI Application from Boot Option")
			l.Events = append(l.Events, e)
		}, Contraindicated, []string{CodeEventUnknown}, "tells a lie"},
		"no separator": {func(l *eventlog.Log) { i := find(l, 2, eventlog.Separator); l.Events = slices.Delete(l.Events, i, i+1) }, Contraindicated, []string{CodeEventMissing}, "PCR 2"},
		"two separators": {func(l *eventlog.Log) {
			l.Events = append(l.Events, event(l, 7, eventlog.Separator, "\x00\x00\x00\x00"))
		}, Contraindicated, []string{CodeEventOrder}, "2 separators"},
		"a separator by another name": {func(l *eventlog.Log) {
			l.Events = append(l.Events, event(l, 7, eventlog.Action, "\x00\x00\x00\x00"))
		}, Contraindicated, []string{CodeEventOrder}, "2 separators"},
		"the firmware failed": {func(l *eventlog.Log) {
			l.Events[find(l, 0, eventlog.Separator)] = event(l, 0, eventlog.Separator, "\x01\x00\x00\x00")
		}, Contraindicated, []string{CodeEventUnknown, CodeFirmwareError}, ""},
		"Secure Boot is told too late": {func(l *eventlog.Log) {
			i, s := find(l, 7, eventlog.VariableConfig), find(l, 7, eventlog.Separator)
			e := l.Events[i]
			l.Events = slices.Insert(l.Events, s+1, e)
			l.Events = slices.Delete(l.Events, i, i+1)
		}, Contraindicated, []string{CodeEventOrder}, "after the firmware"},
		"Secure Boot is not told": {func(l *eventlog.Log) {
			i := find(l, 7, eventlog.VariableConfig)
			l.Events = slices.Delete(l.Events, i, i+1)
		}, Contraindicated, []string{CodeEventMissing}, "Secure Boot"},
		"Secure Boot is told by words that are a lie": {func(l *eventlog.Log) {
			e := &l.Events[find(l, 7, eventlog.VariableConfig)]
			e.Data = append(bytes.Clone(e.Data[:len(e.Data)-1]), e.Data[len(e.Data)-1]^1)
		}, Contraindicated, []string{CodeEventMissing}, "Secure Boot"},
		"an event that informs": {func(l *eventlog.Log) {
			e := event(l, 0, eventlog.NoAction, "anything")
			l.Events = append(l.Events, e)
		}, Affirming, nil, ""},
	}
	for name, c := range boots {
		t.Run("boot: "+name, func(t *testing.T) {
			b := learned(t)
			if err := b.host.Boot(rewrite(t, b.host.EventLog, c.change)); err != nil {
				t.Fatal(err)
			}
			b.round(forge.Options{})
			b.want(c.tier, c.codes...)
			if c.what != "" && !strings.Contains(dump(b.result.Host.Reasons), strings.Trim(fmt.Sprintf("%q", c.what), `"`)) {
				t.Errorf("%q is not in %s", c.what, dump(b.result.Host.Reasons))
			}
			// The finding stays, though the log is not sent again.
			b.host.Tick(time.Minute)
			b.round(forge.Options{})
			b.want(c.tier, c.codes...)
		})
	}
}

// An update that nobody approved, in words; and approved, event by event.
func TestUpdate(t *testing.T) {
	b := learned(t)
	if err := b.host.Boot(bootLog(t, "uki2")); err != nil {
		t.Fatal(err)
	}
	b.round(forge.Options{})
	b.want(Contraindicated, CodeEventUnknown)
	var words []string
	for _, c := range b.result.Changes {
		words = append(words, c.Kind+" "+c.What)
	}
	text := strings.Join(words, "\n")
	for _, want := range []string{"reboot the host was booted anew", "event PCR 11: section .cmdline of the unified kernel image changed", "event PCR 11: section .linux of the unified kernel image", "tier contraindicated, was affirming", `vm-stopped VM "one"`} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in the changes:\n%s", want, text)
		}
	}
	for _, r := range b.result.Host.Reasons {
		if r.Entry == nil || r.PCR == nil || r.Path == "" || !strings.HasPrefix(r.Digest, "sha256:") {
			t.Errorf("%+v", r)
		}
		b.values = append(b.values, fleet.Value{Subject: "group:web", Kind: fleet.HostEvent, Path: r.Path, Digest: r.Digest, State: fleet.Approved})
	}
	b.round(forge.Options{})
	b.want(Contraindicated, CodeEventUnknown) // the node is in no such group
	in := b.input(forge.Options{})
	in.Node.Groups = []string{"group:web"}
	b.appraise(in)
	b.want(Affirming)
}

// What differs from the round before is told, of its subject, and once.
func TestChanges(t *testing.T) {
	b := learned(t)
	h := b.host
	digest := bytes.Repeat([]byte{1}, 32)
	for _, c := range []struct {
		kind, subject string // subject: the VM's name, or "host"
		do            func()
	}{
		{"launcher", "host", func() { h.Launchers([3]string{"firmware", "/usr/share/OVMF/new.fd", "new"}) }},
		{"ima-entry", "host", func() { h.MeasureEntry(forge.IMAEntry{Path: "/tmp/x", Digest: digest}) }},
		{"vm-new", "four", func() { h.AddVM("four") }},
		{"vm-started", "three", func() { h.Start(b.hostVM("three"), bootLog(t, "sd"), b.hostVM("one").Used...) }},
		{"pcr", "two", func() { b.hostVM("two").TPM.Extend("sha256", 23, digest) }},
		{"vm-stopped", "one", func() { h.Stop(b.hostVM("one")) }},
	} {
		h.Tick(time.Hour)
		c.do()
		b.round(forge.Options{})
		subject := c.subject
		if subject != "host" {
			subject = b.hostVM(c.subject).UUIDText()
		}
		n := 0
		for _, x := range b.result.Changes {
			if x.Kind == c.kind && x.Subject == subject {
				n++
			} else if x.Kind != "tier" {
				t.Errorf("%s: %+v", c.kind, x)
			}
		}
		if n != 1 {
			t.Errorf("%s: %+v", c.kind, b.result.Changes)
		}
		b.round(forge.Options{})
		if len(b.result.Changes) > 0 {
			t.Errorf("after %s: %+v", c.kind, b.result.Changes)
		}
	}
}

func TestUpdateInWords(t *testing.T) {
	for name, want := range map[string]string{"sd": "event PCR 12: kernel command line changed from ", "grub": "event PCR 8: kernel command line changed from "} {
		h := forge.NewHost("sha256", bootLog(t, name), epoch)
		b := &bench{t: t, host: h, policy: DefaultPolicy(), learn: true}
		b.round(forge.Options{})
		b.want(Affirming)
		if err := h.Boot(bootLog(t, name+"2")); err != nil {
			t.Fatal(err)
		}
		b.round(forge.Options{})
		b.want(Contraindicated, CodeEventUnknown)
		if !slices.ContainsFunc(b.result.Changes, func(c Change) bool { return strings.HasPrefix(c.Kind+" "+c.What, want) }) {
			t.Errorf("%s: %+v", name, b.result.Changes)
		}
	}
}

func TestNoEventLog(t *testing.T) {
	h := forge.NewHost("sha256", nil, epoch)
	b := &bench{t: t, host: h, policy: DefaultPolicy()}
	b.round(forge.Options{})
	b.want(None, CodeEventLogMissing)
	b.state, b.learn = nil, true
	h.Tick(time.Second)
	b.round(forge.Options{})
	b.want(Affirming)
	if !slices.ContainsFunc(b.values, func(v fleet.Value) bool { return v.Kind == fleet.HostPCR && v.Path == "sha256:7" }) {
		t.Errorf("%+v", b.values)
	}
	h.Tick(time.Second)
	b.round(forge.Options{})
	b.want(Affirming)
	h.TPM.Extend("sha256", 7, make([]byte, 32))
	b.round(forge.Options{})
	b.want(Contraindicated, CodeHostPCR)
	b.drop(fleet.HostPCR, "sha256:4")
	b.round(forge.Options{})
	b.want(Contraindicated, CodeHostPCR, CodeEventLogMissing)

	// A host that had one, and sends none any more.
	b = learned(t)
	b.round(forge.Options{Evidence: setLog(report.EventLog, func(l *report.Log) { *l = report.Log{Kind: l.Kind, Problem: "gone"} })})
	b.want(None, CodeEventLogMissing)
	b.wantVM("one", None, CodeHost)
	b.round(forge.Options{Evidence: func(e *report.Evidence, _ *forge.Host) { e.Logs = nil }})
	b.want(None, CodeEventLogMissing, CodeIMAMissing, CodeLaunchMissing)
	b.wantVM("one", None, CodeHost, CodeLaunchMissing)
	b.host.Tick(time.Second)
	b.round(forge.Options{Have: map[string]uint64{}})
	b.want(Affirming)

	b.round(forge.Options{Have: map[string]uint64{}, Evidence: setLog(report.EventLog, func(l *report.Log) { l.Data = l.Data[:len(l.Data)-1] })})
	b.want(None, CodeEventLogFormat)
}

// TestPCRsAlone: where there are values for all PCRs, events need none.
func TestPCRsAlone(t *testing.T) {
	b := newBench(t)
	b.learn = false
	for _, p := range b.policy.Events {
		b.values = append(b.values, fleet.Value{Kind: fleet.HostPCR, Path: pcrPath("sha256", p), Digest: "sha256:" + hex.EncodeToString(b.host.TPM.PCRs["sha256"][p]), State: fleet.Approved})
	}
	b.round(forge.Options{})
	b.want(None, CodeIMAUnknown, CodeLauncherUnknown)
	b.drop(fleet.HostPCR, "sha256:4")
	b.host.Tick(time.Second)
	b.round(forge.Options{Have: map[string]uint64{}})
	b.want(None, CodeHostNoValues, CodeIMAUnknown, CodeLauncherUnknown)
}

// Logs that begin elsewhere than the receiver asked for, or go on.
func TestIncomplete(t *testing.T) {
	for _, kind := range []string{report.EventLog, report.IMA, report.LaunchLog} {
		b := learned(t)
		b.round(forge.Options{Evidence: setLog(kind, func(l *report.Log) { l.From += 5 })})
		if b.result.Host.Tier != None || !slices.Contains(codesOf(b.result.Host), CodeLogIncomplete) {
			t.Errorf("%s: %v %v", kind, b.result.Host.Tier, codesOf(b.result.Host))
		}
		b.host.Tick(time.Second)
		b.round(forge.Options{})
		b.want(Affirming)
	}
	// A list that does not fit into one round comes in several.
	b := learned(t)
	b.host.Measure("/bin/a", []byte("a"))
	cut := len(b.host.IMA)
	b.host.Measure("/bin/b", []byte("b"))
	b.round(forge.Options{Evidence: func(e *report.Evidence, h *forge.Host) {
		setLog(report.IMA, func(l *report.Log) { l.Data, l.More = h.IMA[l.From:cut], true })(e, h)
	}})
	b.want(None, CodeLogIncomplete, CodeIMAUnknown)
	b.host.Tick(time.Second)
	b.round(forge.Options{})
	b.want(Warning, CodeIMAUnknown)
	if n := len(b.result.Host.Reasons); n != 2 {
		t.Errorf("%d findings", n)
	}
}

func TestIMA(t *testing.T) {
	digest := sha256.Sum256([]byte("file"))
	for name, c := range map[string]struct {
		policy func(*Policy)
		do     func(*bench)
		o      forge.Options
		tier   Tier
		codes  []string
	}{
		"nothing new":               {nil, func(b *bench) {}, forge.Options{}, Affirming, nil},
		"a known file":              {nil, func(b *bench) { b.host.Measure("/usr/lib/x86_64-linux-gnu/libexample-3.so.3.2.3", []byte("library 3")) }, forge.Options{}, Affirming, nil},
		"an unknown file":           {nil, func(b *bench) { b.host.Measure("/tmp/x", []byte("x")) }, forge.Options{}, Warning, []string{CodeIMAUnknown}},
		"an unknown file, strictly": {func(p *Policy) { p.IMA.Unknown = Contraindicated }, func(b *bench) { b.host.Measure("/tmp/x", []byte("x")) }, forge.Options{}, Contraindicated, []string{CodeIMAUnknown}},
		"an unknown file, let be":   {func(p *Policy) { p.IMA.Unknown = Affirming }, func(b *bench) { b.host.Measure("/tmp/x", []byte("x")) }, forge.Options{}, Affirming, nil},
		"a changed file":            {nil, func(b *bench) { b.host.Measure("/usr/lib/x86_64-linux-gnu/libexample-3.so.3.2.3", []byte("x")) }, forge.Options{}, Contraindicated, []string{CodeIMAChanged}},
		"a known file elsewhere":    {nil, func(b *bench) { b.host.Measure("/tmp/copy", []byte("library 3")) }, forge.Options{}, Warning, []string{CodeIMAUnknown}},
		"a file for any path": {nil, func(b *bench) {
			b.values = append(b.values, fleet.Value{Kind: fleet.HostIMA, Digest: "sha256:" + hex.EncodeToString(digest[:]), State: fleet.Approved})
			b.host.MeasureEntry(forge.IMAEntry{Path: "/tmp/x", Digest: digest[:]})
		}, forge.Options{}, Affirming, nil},
		"a folder that is excluded":   {func(p *Policy) { p.IMA.Excludes = []string{"/tmp/*"} }, func(b *bench) { b.host.Measure("/tmp/deep/x", []byte("x")) }, forge.Options{}, Affirming, nil},
		"a file that is excluded":     {func(p *Policy) { p.IMA.Excludes = []string{"/tmp/x"} }, func(b *bench) { b.host.Measure("/tmp/x", []byte("x")) }, forge.Options{}, Affirming, nil},
		"beside one that is excluded": {func(p *Policy) { p.IMA.Excludes = []string{"/tmp/x"} }, func(b *bench) { b.host.Measure("/tmp/xy", []byte("x")) }, forge.Options{}, Warning, []string{CodeIMAUnknown}},
		"out of an excluded folder":   {func(p *Policy) { p.IMA.Excludes = []string{"/tmp/*"} }, func(b *bench) { b.host.Measure("/tmp/../bin/x", []byte("x")) }, forge.Options{}, Warning, []string{CodeIMAUnknown}},
		"a violation":                 {nil, func(b *bench) { b.host.MeasureEntry(forge.IMAEntry{Path: "/x", Digest: digest[:], Violation: true}) }, forge.Options{}, Warning, []string{CodeIMAViolation}},
		"another template":            {nil, func(b *bench) { b.host.MeasureEntry(forge.IMAEntry{Template: "new", Path: "/x", Digest: digest[:]}) }, forge.Options{}, Warning, []string{CodeIMAUnknown}},
		"a digest by MD5":             {nil, func(b *bench) { b.host.MeasureEntry(forge.IMAEntry{Algorithm: "md5", Path: "/x", Digest: digest[:16]}) }, forge.Options{}, Warning, []string{CodeIMAUnknown}},
		"another boot's list":         {nil, func(b *bench) { b.host.IMA[70] ^= 1 }, forge.Options{Have: map[string]uint64{}}, Contraindicated, []string{CodeIMAReplay}},
		"an entry is dropped": {nil, func(b *bench) {
			b.host.Measure("/tmp/evil", []byte("evil"))
			n := len(b.host.IMA)
			b.host.Measure("/usr/lib/x86_64-linux-gnu/libexample-3.so.3.2.3", []byte("library 3"))
			b.host.IMA = append(b.host.IMA[:b.state.IMA.At.Offset], b.host.IMA[n:]...)
		}, forge.Options{}, Contraindicated, []string{CodeIMAReplay}},
		"the last entry is dropped": {nil, func(b *bench) {
			b.host.Measure("/tmp/evil", []byte("evil"))
			b.host.IMA = b.host.IMA[:b.state.IMA.At.Offset]
		}, forge.Options{}, Contraindicated, []string{CodeIMAReplay}},
		"it is no list":   {nil, func(b *bench) { b.host.TPM.Extend("sha256", 10, digest[:]) }, forge.Options{Evidence: setLog(report.IMA, func(l *report.Log) { l.Data = bytes.Repeat([]byte{0xff}, 100) })}, None, []string{CodeIMAFormat}},
		"it is kept back": {nil, func(b *bench) {}, forge.Options{Evidence: setLog(report.IMA, func(l *report.Log) { *l = report.Log{Kind: l.Kind, Problem: "no"} })}, None, []string{CodeIMAMissing}},
		"after the quote": {nil, func(b *bench) {}, forge.Options{Evidence: setLog(report.IMA, func(l *report.Log) {
			l.Data = append(bytes.Clone(l.Data), forge.IMAEntry{Path: "/x", Digest: digest[:]}.Marshal(10)...)
		})}, Affirming, nil},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			if c.policy != nil {
				c.policy(b.policy)
			}
			b.round(forge.Options{})
			b.want(Affirming)
			b.host.Tick(time.Minute)
			c.do(b)
			b.round(c.o)
			b.want(c.tier, c.codes...)
			for _, r := range b.result.Host.Reasons {
				if r.Code == CodeIMAChanged && r.Expected == "" {
					t.Error("what was expected is not told")
				}
			}
		})
	}
	b := newBench(t)
	b.host.TPM.Extend("sha256", 0, make([]byte, 32)) // not the PCRs of the first entry
	b.round(forge.Options{})
	if !slices.Contains(codesOf(b.result.Host), CodeIMAAggregate) {
		t.Errorf("%v", codesOf(b.result.Host))
	}
	b = newBench(t)
	for i := range maxIMAFound + 10 {
		b.host.Measure(fmt.Sprint("/tmp/", i), nil)
	}
	b.learn = false
	b.round(forge.Options{})
	if n := len(b.state.IMA.Found); n != maxIMAFound || b.state.IMA.More == 0 || len(b.result.Host.Reasons) > maxReasons+1 {
		t.Errorf("%d findings kept, %d more, %d told", n, b.state.IMA.More, len(b.result.Host.Reasons))
	}
	if !slices.ContainsFunc(b.result.Host.Reasons, func(r Reason) bool { return r.Code == CodeTooMany || r.Code == CodeIMATooMany }) {
		t.Error("it is not told that there are more")
	}
}

// A path that no database takes is not learned, and shown without what is wrong
// with it.
func TestStrangePaths(t *testing.T) {
	b := newBench(t)
	for i, path := range []string{"/tmp/a\x00b", "/tmp/\xff\xfe", "/tmp/\x1b[2J"} {
		b.host.Measure(path, []byte{byte(i)})
	}
	b.round(forge.Options{})
	b.want(Warning, CodeIMAUnknown)
	if len(b.result.Host.Reasons) != 2 || !b.state.Learned {
		t.Errorf("%s", dump(b.result.Host.Reasons))
	}
	for _, r := range b.result.Host.Reasons {
		if !utf8.ValidString(r.Path) || strings.ContainsRune(r.Path, 0) {
			t.Errorf("%q", r.Path)
		}
	}
}

func TestPolicyChanged(t *testing.T) {
	b := newBench(t)
	b.policy.IMA.Excludes = []string{"/tmp/*"}
	b.host.Measure("/tmp/x", []byte("x"))
	b.round(forge.Options{})
	b.want(Affirming)
	b.policy = DefaultPolicy()
	b.host.Tick(time.Minute)
	b.round(forge.Options{})
	b.want(Warning, CodePolicyChanged)
	b.host.Tick(time.Minute)
	b.round(forge.Options{})
	b.want(Warning, CodeIMAUnknown)
}

// With a policy of another bank the logs are asked for again, and nothing is said
// against the host.
func TestBankChanged(t *testing.T) {
	b := newBench(t)
	b.round(forge.Options{})
	b.want(Affirming)
	other := make([]byte, 48) // as if that bank had been the policy's
	b.state.PCRs = pcrs{Bank: "sha384", Which: 1, Values: other}
	b.state.Events.Bank, b.state.Events.Values = "sha384", b.state.PCRs
	b.state.IMA.At.Bank, b.state.IMA.At.Value = "sha384", other
	b.state.Launch.Values = map[string][]byte{"sha384": other}
	b.host.Tick(time.Minute)
	b.round(forge.Options{})
	b.want(None, CodeLogIncomplete)
	b.host.Tick(time.Minute)
	b.round(forge.Options{})
	b.want(Affirming)
}

func TestRequireIMA(t *testing.T) {
	h := forge.NewHost("sha256", bootLog(t, "sd"), epoch)
	h.TPM.PCRs["sha256"][10], h.IMA = make([]byte, 32), nil
	b := &bench{t: t, host: h, policy: DefaultPolicy(), learn: true}
	none := forge.Options{Evidence: setLog(report.IMA, func(l *report.Log) { l.Problem = "no IMA" })}
	b.round(none)
	b.want(Affirming)
	if b.result.Host.Vector.Executables != claimBoot {
		t.Errorf("%+v", b.result.Host.Vector)
	}
	b.policy = DefaultPolicy()
	b.policy.IMA.Require = true
	h.Tick(time.Minute)
	b.round(none)
	b.want(None, CodeIMAMissing)
	b.round(forge.Options{})
	b.want(None, CodeIMAMissing)
}

func TestLaunchLogs(t *testing.T) {
	lines := func(b []byte) [][]byte { l, _ := launchlog.Split(b); return l }
	join := func(l ...[]byte) []byte { return append(bytes.Join(l, []byte("\n")), '\n') }
	whole := map[string]uint64{}
	for name, c := range map[string]struct {
		o     forge.Options
		do    func(*bench)
		tier  Tier
		codes []string
	}{
		"a start is dropped": {forge.Options{Have: whole, Evidence: setLog(report.LaunchLog, func(l *report.Log) { x := lines(l.Data); l.Data = join(x[0], x[1], x[3]) })}, nil, Contraindicated, []string{CodeLaunchReplay}},
		"reordered":          {forge.Options{Have: whole, Evidence: setLog(report.LaunchLog, func(l *report.Log) { x := lines(l.Data); l.Data = join(x[0], x[1], x[3], x[2]) })}, nil, Contraindicated, []string{CodeLaunchReplay}},
		"the last is kept back": {forge.Options{Have: whole, Evidence: setLog(report.LaunchLog, func(l *report.Log) { x := lines(l.Data); l.Data = join(x[:3]...) })}, nil,
			Contraindicated, []string{CodeLaunchReplay}},
		"garbage": {forge.Options{Have: whole, Evidence: setLog(report.LaunchLog, func(l *report.Log) { l.Data = []byte("garbage\n") })}, nil, None, []string{CodeLaunchFormat}},
		"a start of no VM": {forge.Options{}, func(b *bench) {
			e := b.host.StartEntry(b.hostVM("one"))
			e.Start.VM = "<script>"
			b.host.Log(e)
		}, None, []string{CodeLaunchFormat}},
		"kept back":      {forge.Options{Evidence: setLog(report.LaunchLog, func(l *report.Log) { *l = report.Log{Kind: l.Kind, Problem: "no"} })}, nil, None, []string{CodeLaunchMissing}},
		"something else": {forge.Options{}, func(b *bench) { b.host.TPM.Extend("sha256", 15, make([]byte, 32)) }, Contraindicated, []string{CodeLaunchReplay}},
		"another PCR":    {forge.Options{Report: func(r *report.Report) { r.Host.LaunchPCR = 4 }}, nil, Contraindicated, []string{CodeLaunchPCR}},
		"begun anew": {forge.Options{Have: whole}, func(b *bench) {
			vms := b.host.VMs
			b.host.Launch = nil
			b.host.Log(b.host.FirstEntry())
			b.host.VMs = vms
			for _, v := range vms {
				v.Running, v.State = false, "stored"
			}
		}, Contraindicated, []string{CodeLogChanged, CodeLaunchBefore}},
		"begun anew before anyone saw it": {forge.Options{Have: whole}, func(b *bench) {
			b.state = nil
			b.host.Launch = nil
			b.host.Log(b.host.FirstEntry())
			for _, v := range b.host.VMs {
				v.Running, v.State = false, "stored"
			}
		}, Contraindicated, []string{CodeLaunchBefore}},
		"after the quote":   {forge.Options{Evidence: setLog(report.LaunchLog, func(l *report.Log) { l.Data = append(bytes.Clone(l.Data), "{}\n"...) })}, nil, Affirming, nil},
		"a torn line":       {forge.Options{Evidence: setLog(report.LaunchLog, func(l *report.Log) { l.Data = append(bytes.Clone(l.Data), "{"...) })}, nil, Affirming, nil},
		"a known launcher":  {forge.Options{}, func(b *bench) { b.host.Launchers([3]string{"swtpm", "/usr/bin/swtpm", "swtpm"}) }, Affirming, nil},
		"a changed one":     {forge.Options{}, func(b *bench) { b.host.Launchers([3]string{"swtpm", "/usr/bin/swtpm", "evil"}) }, Warning, []string{CodeLauncherUnknown}},
		"the log of before": {forge.Options{Have: whole}, func(b *bench) { b.host.BootID = "x"; b.state = nil }, Contraindicated, []string{CodeLaunchBoot}},
	} {
		t.Run(name, func(t *testing.T) {
			b := learned(t)
			if c.do != nil {
				c.do(b)
			}
			b.round(c.o)
			b.want(c.tier, c.codes...)
			if c.codes != nil && slices.Contains([]string{CodeLaunchFormat, CodeLaunchMissing}, c.codes[0]) {
				b.wantVM("one", c.tier, CodeHost, CodeLaunchMissing)
			}
		})
	}
	// The first that a host has are learned, also after its first round, and no later
	// ones, at whatever path: also where the first were Reference Values for all.
	for _, shared := range []bool{false, true} {
		h := forge.NewHost("sha256", bootLog(t, "sd"), epoch)
		b := &bench{t: t, host: h, policy: DefaultPolicy(), learn: true}
		b.round(forge.Options{})
		b.want(Affirming)
		h.Tick(time.Minute)
		h.Launchers([3]string{"swtpm", "/usr/bin/swtpm", "swtpm"})
		if shared {
			d := sha256.Sum256([]byte("swtpm"))
			b.values = append(b.values, fleet.Value{Kind: fleet.Launcher, Path: "/usr/bin/swtpm", Digest: "sha256:" + hex.EncodeToString(d[:]), State: fleet.Approved})
		}
		n := len(b.values)
		b.round(forge.Options{})
		b.want(Affirming)
		if got := len(b.values) - n; (got == 0) != shared {
			t.Errorf("%d launchers learned", got)
		}
		h.Tick(time.Minute)
		h.Launchers([3]string{"emulator", "/opt/evil", "evil"})
		for range 2 {
			b.round(forge.Options{})
			b.want(Warning, CodeLauncherUnknown)
			h.Tick(time.Minute)
		}
	}
	b := learned(t)
	b.learn = false
	n := b.host.Launchers([3]string{"firmware", "/usr/share/OVMF/OVMF_CODE.fd", "firmware"})
	b.host.Start(b.hostVM("three"), nil, n...)
	b.host.Tick(time.Hour)
	b.round(forge.Options{})
	b.want(Warning, CodeLauncherUnknown)
	b.wantVM("three", Contraindicated, CodeHost, CodeLauncherUnknown, CodeVMNoValues)
	b.wantVM("one", Warning, CodeHost)
	if v := b.vm("three"); len(v.Launchers) != 1 || v.Launchers[0].Role != "firmware" || v.Started == 0 {
		t.Errorf("%+v", v)
	}

	// What was there before, and in the first round, is a Reference Value as any.
	early := forge.NewHost("sha256", bootLog(t, "sd"), epoch)
	early.TPM.Extend("sha256", 15, make([]byte, 32))
	early.Launchers([3]string{"swtpm", "/usr/bin/swtpm", "swtpm"})
	b = &bench{t: t, host: early, policy: DefaultPolicy(), learn: true}
	for range 2 {
		b.round(forge.Options{})
		b.want(Affirming)
		early.Tick(time.Minute)
	}

	// Of what came later, what the finding names is that value; and it keeps the host
	// from being learned by no means.
	b.values, b.state, b.learn = nil, nil, false
	early.Tick(time.Minute)
	b.round(forge.Options{})
	i := slices.IndexFunc(b.result.Host.Reasons, func(r Reason) bool { return r.Code == CodeLaunchBefore })
	if i < 0 {
		t.Fatal(dump(b.result.Host.Reasons))
	}
	r := b.result.Host.Reasons[i]
	b.values = []fleet.Value{{Subject: nodeID, Kind: fleet.HostPCR, Path: r.Path, Digest: r.Digest, State: fleet.Approved}}
	b.learn = true
	for range 2 {
		early.Tick(time.Minute)
		b.round(forge.Options{})
	}
	b.want(Affirming)

	h := forge.NewHost("sha256", bootLog(t, "sd"), epoch)
	h.Log(launchlog.Entry{Event: launchlog.EventBoot, Boot: &launchlog.Boot{
		ID: h.BootID, ResetCount: h.TPM.Resets, PCR: 15, Before: map[string]string{"sha256": hex.EncodeToString(make([]byte, 32))}, Gap: "it was deleted",
	}})
	b = &bench{t: t, host: h, policy: DefaultPolicy(), learn: true}
	b.round(forge.Options{})
	b.want(Contraindicated, CodeLaunchGap)
}

func TestVMs(t *testing.T) {
	edit := func(name string, f func(*report.VM)) func(*report.Report) {
		return func(r *report.Report) {
			for i := range r.VMs {
				if r.VMs[i].Name == name {
					f(&r.VMs[i])
				}
			}
		}
	}
	for name, c := range map[string]struct {
		o      forge.Options
		do     func(*bench)
		policy func(*Policy)
		tier   Tier
		codes  []string
		host   []string
	}{
		"as before":        {tier: Affirming},
		"its quote":        {o: forge.Options{VMQuotes: true}, tier: Affirming},
		"another kernel":   {do: func(b *bench) { b.hostVM("one").TPM.Extend("sha256", 4, make([]byte, 32)) }, tier: Contraindicated, codes: []string{CodeVMPCR}},
		"a PCR of no care": {do: func(b *bench) { b.hostVM("one").TPM.Extend("sha256", 10, make([]byte, 32)) }, tier: Affirming},
		"just started": {do: func(b *bench) {
			v := b.hostVM("one")
			b.host.Stop(v)
			b.host.Start(v, nil, v.Used...)
			b.host.Tick(10 * time.Second)
		}, tier: Warning, codes: []string{CodeVMStarting}},
		"started, and not booted as before": {do: func(b *bench) {
			v := b.hostVM("one")
			b.host.Stop(v)
			b.host.Start(v, nil, v.Used...)
			b.host.Tick(5 * time.Minute)
		}, tier: Contraindicated, codes: []string{CodeVMPCR}},
		"started again": {do: func(b *bench) {
			v := b.hostVM("one")
			b.host.Stop(v)
			b.host.Start(v, bootLog(t, "sd"), v.Used...)
			b.host.Tick(5 * time.Minute)
		}, tier: Affirming},
		"its PCRs are not read": {o: forge.Options{Report: edit("one", func(v *report.VM) { v.PCRs, v.Problem = nil, "no" })}, tier: None, codes: []string{CodeVMPCRsMissing}},
		"a PCR is missing":      {o: forge.Options{Report: edit("one", func(v *report.VM) { v.PCRs.Banks[0].Values[7] = nil })}, tier: None, codes: []string{CodeVMPCRsMissing}},
		"another bank": {o: forge.Options{Report: edit("one", func(v *report.VM) {
			v.PCRs.Banks = []report.Bank{{Algorithm: "sha1", Values: report.Values{0: make([]byte, 20)}}}
		})}, tier: None, codes: []string{CodeVMPCRsMissing}},
		"an old reading": {o: forge.Options{Report: edit("one", func(v *report.VM) { v.PCRs.Time -= 3600e6 })}, tier: None, codes: []string{CodeVMPCRsMissing}},
		"it never started": {do: func(b *bench) {
			v := b.hostVM("three")
			v.Running, v.State, v.Name = true, "running", "one"
			b.hostVM("one").Name = "x"
		},
			tier: Contraindicated, codes: []string{CodeVMNotStarted}},
		"another start":          {o: forge.Options{Report: edit("one", func(v *report.VM) { v.Generation++ })}, tier: Contraindicated, codes: []string{CodeVMGeneration}},
		"it is stored":           {o: forge.Options{Report: edit("one", func(v *report.VM) { v.State = "stored" })}, tier: Contraindicated, codes: []string{CodeVMState}},
		"it was refused":         {o: forge.Options{Report: edit("one", func(v *report.VM) { v.Verdict, v.Reason = "refuse", "vtpm-changed" })}, tier: Warning, codes: []string{CodeVMVerdict}},
		"another vTPM":           {o: forge.Options{Report: edit("one", func(v *report.VM) { v.EK = bytes.Repeat([]byte{1}, 32) })}, tier: Contraindicated, codes: []string{CodeVMEK}},
		"one vTPM for two":       {do: func(b *bench) { b.hostVM("three").EK = b.hostVM("one").EK }, tier: Contraindicated, codes: []string{CodeVMSharedEK}},
		"no quote":               {policy: func(p *Policy) { p.RequireVMQuote = true }, o: forge.Options{Report: edit("one", func(v *report.VM) { v.Quote = nil })}, tier: None, codes: []string{CodeVMQuote}},
		"a quote by another key": {o: forge.Options{VMQuotes: true, Report: edit("one", func(v *report.VM) { v.Quote.AK = forge.NewTPM().AK() })}, tier: Contraindicated, codes: []string{CodeVMQuote}},
		"a quote of another time": {o: forge.Options{VMQuotes: true, Report: edit("one", func(v *report.VM) {
			tpm := forge.NewTPM("sha256")
			v.Quote.AK, v.Quote.Quote = tpm.AK(), tpm.Quote(make([]byte, 32), quote.Selection{Bank: "sha256", PCRs: all16})
		})}, tier: Contraindicated, codes: []string{CodeVMQuote}},
		"no AK":          {o: forge.Options{VMQuotes: true, Report: edit("one", func(v *report.VM) { v.Quote.AK = []byte("x") })}, tier: None, codes: []string{CodeVMQuote}},
		"other PCRs":     {o: forge.Options{VMQuotes: true, Report: edit("one", func(v *report.VM) { v.PCRs.Banks[0].Values[10] = bytes.Repeat([]byte{1}, 32) })}, tier: Contraindicated, codes: []string{CodeVMReading}},
		"the audit mode": {o: forge.Options{Report: func(r *report.Report) { r.Host.Mode = "audit" }}, tier: Warning, codes: []string{CodeHost}, host: []string{CodeMode}},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			if c.policy != nil {
				b.round(forge.Options{VMQuotes: true})
				c.policy(b.policy)
				b.policy = ParsePolicyT(t, b.policy)
				b.state.Policy = b.policy.compile().revision
			} else {
				b.round(forge.Options{})
			}
			b.host.Tick(time.Minute)
			if c.do != nil {
				c.do(b)
			}
			b.round(c.o)
			b.wantVM("one", c.tier, c.codes...)
			if got := codesOf(b.result.Host); !slices.Equal(got, c.host) {
				t.Errorf("host: %v\n%s", got, dump(b.result.Host.Reasons))
			}
			if c.host == nil && c.policy == nil && name != "it never started" {
				if v := b.vm("two"); v.Tier != Affirming {
					t.Errorf("the other VM is %v: %s", v.Tier, dump(v.Reasons))
				}
			}
		})
	}
}

// ParsePolicyT gives a policy anew, as out of its file.
func ParsePolicyT(t testing.TB, p *Policy) *Policy {
	t.Helper()
	n := DefaultPolicy()
	n.RequireVMQuote = p.RequireVMQuote
	return n
}

// A VM that was started and is not in the report.
func TestHidden(t *testing.T) {
	b := learned(t)
	hide := func(r *report.Report) {
		r.VMs = slices.DeleteFunc(r.VMs, func(v report.VM) bool { return v.Name == "two" })
	}
	for range 2 { // it stays so
		b.round(forge.Options{Report: hide})
		b.want(Contraindicated, CodeVMHidden)
		b.wantVM("two", Contraindicated, CodeHost, CodeVMHidden)
		b.wantVM("one", Contraindicated, CodeHost)
		b.host.Tick(time.Minute)
	}
	b.state = nil // also without having seen it before
	b.round(forge.Options{Report: hide})
	b.want(Contraindicated, CodeVMHidden)
	b.host.Tick(time.Minute)
	b.round(forge.Options{})
	b.want(Affirming)
	// One that never ran in this boot, but was reported in it.
	b.host.Tick(time.Minute)
	b.round(forge.Options{Report: func(r *report.Report) {
		r.VMs = slices.DeleteFunc(r.VMs, func(v report.VM) bool { return v.Name == "three" })
	}})
	b.want(Contraindicated, CodeVMHidden)
	// One that was deleted is not hidden.
	b.host.Tick(time.Minute)
	b.host.Stop(b.hostVM("two"))
	b.host.Delete(b.hostVM("two"))
	b.round(forge.Options{})
	b.want(Affirming)
	if !slices.ContainsFunc(b.result.Changes, func(c Change) bool { return c.Kind == "vm-gone" }) {
		t.Errorf("%v", b.result.Changes)
	}
	// One whose start came after the report was made is in the next.
	b.host.Tick(time.Minute)
	v := b.host.AddVM("four")
	b.host.Start(v, nil, 1, 2)
	b.round(forge.Options{Report: func(r *report.Report) {
		r.VMs = slices.DeleteFunc(r.VMs, func(v report.VM) bool { return v.Name == "four" })
	}})
	b.want(Affirming)
}

// A VM is learned in its first good round, when it has booted; one that moved
// here is not.
func TestLearnVM(t *testing.T) {
	b := learned(t)
	v := b.hostVM("three")
	b.host.Start(v, bootLog(t, "sd2"), 1, 2)
	b.host.Tick(10 * time.Second)
	b.round(forge.Options{})
	b.wantVM("three", Warning, CodeVMStarting)
	b.host.Tick(5 * time.Minute)
	b.round(forge.Options{})
	b.wantVM("three", Affirming)
	b.host.Tick(time.Minute)
	v.TPM.Extend("sha256", 4, make([]byte, 32))
	b.round(forge.Options{})
	b.wantVM("three", Contraindicated, CodeVMPCR)
	r := b.vm("three").Reasons[0]
	if *r.PCR != 4 || r.Path != "sha256:4" || r.Expected == "" || r.Expected == r.Digest {
		t.Errorf("%+v", r)
	}
	b.drop(fleet.VMPCR, "sha256:4") // what is taken back is not learned anew
	b.round(forge.Options{})
	b.wantVM("three", None, CodeVMNoValues)

	// A host that is not right teaches nothing about its VMs.
	b = newBench(t)
	b.round(forge.Options{Report: func(r *report.Report) { r.Host.ListState = "damaged" }})
	if len(b.values) != 0 || b.state.Learned || len(b.state.VMs) == 0 || b.state.VMs[b.vm("one").UUID].Learned {
		t.Errorf("%d values, %+v", len(b.values), b.state.VMs)
	}
	b.host.Tick(time.Minute)
	b.round(forge.Options{})
	b.want(Affirming)
	b.wantVM("one", Affirming)
}

// What has to be so in any boot is so in those of other people's machines.
func TestOrderOfStrangers(t *testing.T) {
	for name, raw := range map[string][]byte{
		"arch": gotestdata.ArchLinuxWorkstationEventLog, "glinux": gotestdata.GlinuxAlexEventLog, "rhel": gotestdata.Rhel8EventLog,
		"ubuntu-sev": gotestdata.Ubuntu1804AmdSevEventLog, "ubuntu-no-dbx": gotestdata.Ubuntu2104NoDbxEventLog,
		"ubuntu": gotestdata.Ubuntu2104NoSecureBootEventLog, "ubuntu-snp": gotestdata.Ubuntu2404AmdSevSnpEventLog, "cos": gotestdata.Cos101AmdSevEventLog,
	} {
		whole, err := eventlog.UntrustedParse(raw)
		if err != nil {
			t.Fatal(err)
		}
		l, err := whole.Bank("sha256")
		if err != nil {
			t.Fatal(err)
		}
		o := newOrder(crypto.SHA256)
		for i := range l.Events {
			if e := &l.Events[i]; e.Type != eventlog.NoAction {
				o.see(e, digestOf(e), crypto.SHA256)
			}
		}
		if f := o.findings(all16[:8]); len(f) > 0 {
			t.Errorf("%s: %s", name, dump(f))
		}
	}
}
