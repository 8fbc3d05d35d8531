package daemon

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/bus"
	"virt-trust/internal/bus/components"
	"virt-trust/internal/evidence/eventlog"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/hosttpm/tpmtest"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/reason"
)

// machine is a TPM that boots: with an event log that leads to its PCRs.
type machine struct {
	*tpmtest.TPM
	t   testing.TB
	dir string
}

func (m *machine) log() string { return filepath.Join(m.dir, "log") }

// boot gives the TPM its power back and measures all that a log has.
func (m *machine) boot(l *eventlog.Log) {
	m.t.Helper()
	m.Reset()
	tpm := m.Open()
	one := testkit.Must[*eventlog.Log](m.t)(l.Bank("sha256"))
	for _, e := range one.Events {
		if e.Type == eventlog.NoAction {
			continue
		}
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(e.PCR), Auth: tpm2.PasswordAuth(nil)},
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: e.Digests[0]}}},
		}.Execute(tpm)
		if err != nil {
			m.t.Fatal(err)
		}
	}
	if err := os.WriteFile(m.log(), l.Marshal(), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// bootLog is a log of real boots, see evidence/eventlog/testdata.
func bootLog(t testing.TB, name string) *eventlog.Log {
	t.Helper()
	return testkit.Must[*eventlog.Log](t)(eventlog.UntrustedParse(testkit.Must[[]byte](t)(os.ReadFile("../evidence/eventlog/testdata/" + name + ".bin"))))
}

// bootedOffice is an office on a machine that has booted.
func bootedOffice(t testing.TB, l *eventlog.Log) (*office, *machine) {
	t.Helper()
	o := openOffice(t)
	dir := testkit.Folder(t)
	m := &machine{TPM: tpmtest.In(t, dir), t: t, dir: dir}
	m.boot(l)
	o.s.g.cfg.TPM.EventLog, o.s.g.cfg.TPM.PCRs = m.log(), []uint{0, 4, 7, 9, 11, 12, 14}
	o.s.history.path, o.s.logs.dir = filepath.Join(o.root, "history"), filepath.Join(o.root, "logs")
	o.starts(m)
	if err := o.s.host.Provision(background); err != nil {
		t.Fatal(err)
	}
	if err := o.s.keepEventLog(background); err != nil {
		t.Fatal(err)
	}
	return o, m
}

// starts gives the office the machine's TPM, as a start of virt-trustd does.
func (o *office) starts(m *machine) {
	m.t.Helper()
	o.s.host.Close()
	o.s.host = testkit.Must[*hosttpm.Host](m.t)(hosttpm.Open(hosttpm.Config{Device: m.Socket, Dir: filepath.Join(o.root, "tpm"), PCRs: o.s.g.cfg.TPM.PCRs, Bank: "sha256", Timeout: 20 * time.Second}))
	m.t.Cleanup(func() { o.s.host.Close() })
	o.s.settleHost(background)
}

func (o *office) ask(t *testing.T, method string, args ...any) (dict, error) {
	t.Helper()
	var d dict
	call := o.call(bus.HostPath, bus.HostInterface+"."+method, args...)
	if call.Err != nil {
		return nil, bus.MapError(call.Err)
	}
	return d, call.Store(&d)
}

func changesIn(t *testing.T, d dict) (all []change) {
	t.Helper()
	if err := d["changes"].Store(&all); err != nil {
		t.Fatal(err)
	}
	return all
}

func (o *office) events(t *testing.T) (names []string) {
	t.Helper()
	var all []dict
	if err := o.call(bus.HostPath, bus.HostInterface+".History", dict{}).Store(&all); err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		names = append(names, e["event"].Value().(string))
	}
	return names
}

// files are what boots of testdata were made of.
func files(t *testing.T) map[string]eventlog.File {
	t.Helper()
	var all struct{ Files map[string]eventlog.File }
	if err := json.Unmarshal(testkit.Must[[]byte](t)(os.ReadFile("../evidence/eventlog/testdata/boots.json")), &all); err != nil {
		t.Fatal(err)
	}
	return all.Files
}

// A new unified kernel image is approved from the files, and the boot with it
// is in an approved state; before, the difference is told by events.
func TestHostPredicted(t *testing.T) {
	t.Parallel()
	o, m := bootedOffice(t, bootLog(t, "uki"))
	d, err := o.ask(t, "DryRun", dict{})
	if err != nil || d["approved"].Value() != true || d["log"].Value() != "" {
		t.Fatal(d, err)
	}
	m.boot(bootLog(t, "uki2"))
	o.starts(m)
	d, err = o.ask(t, "DryRun", dict{})
	if err != nil || d["approved"].Value() != false || !slices.Equal(d["pcrs"].Value().([]uint32), []uint32{4, 9, 11}) {
		t.Fatal(d, err)
	}
	if all := changesIn(t, d); len(all) != 7 || !strings.HasPrefix(all[4].What, "section .linux of the unified kernel image changed") || d["log"].Value() != "" {
		t.Fatal(d, err)
	}
	if _, err := o.ask(t, "Approve", "current", []dict{}, dict{}); reason.As(err) == nil || reason.As(err).Code != reason.HostNotApproved {
		t.Error("a state that is not approved: ", err)
	}

	m.boot(bootLog(t, "uki"))
	o.starts(m)
	f := files(t)
	parts := components.Encode([]eventlog.Component{{Kind: eventlog.Unified, Old: []eventlog.File{f["kernel"], f["uki"]}, New: f["uki2"]}})
	for _, method := range []string{"Predict", "Approve", "Approve"} {
		d, err = o.ask(t, method, "predict", parts, dict{"note": dbus.MakeVariant("a new kernel")})
		if err != nil || len(changesIn(t, d)) != 7 {
			t.Fatal(method, d, err)
		}
	}
	if d["what"].Value() != "approved already; nothing was changed" {
		t.Error(d)
	}
	if _, err := o.ask(t, "Approve", "predict", components.Encode([]eventlog.Component{{Kind: eventlog.Unified, New: f["uki2"]}}), dict{}); reason.As(err) == nil {
		t.Error("a component that the log does not know: ", err)
	}
	m.boot(bootLog(t, "uki2"))
	o.starts(m)
	if d, err = o.ask(t, "DryRun", dict{}); err != nil || d["approved"].Value() != true {
		t.Fatal(d, err)
	}
	if got, want := o.events(t), []string{eventApproved, eventApproved}; !slices.Equal(got, want) {
		t.Errorf("the history is %q, want %q", got, want)
	}
	if d, err = o.ask(t, "Approve", "current", []dict{}, dict{}); err != nil || !strings.HasPrefix(d["what"].Value().(string), "approved already") {
		t.Error(d, err)
	}
	// Revoked from the state before, it is one no longer, and its log is gone.
	id := d["states"].Value().([]string)[0]
	var me *reason.Refusal
	if _, err := o.ask(t, "Revoke", []string{id}, dict{}); !errors.As(err, &me) || me.Code != reason.PolicyForbids {
		t.Error("the state that the host is in: ", err)
	}
	m.boot(bootLog(t, "uki"))
	o.starts(m)
	if d, err = o.ask(t, "Revoke", []string{id[:6]}, dict{}); err != nil || !slices.Equal(d["states"].Value().([]string), []string{id}) {
		t.Fatal(d, err)
	}
	if _, err := o.s.logs.load(id); !errors.Is(err, os.ErrNotExist) {
		t.Error("the log of a revoked state: ", err)
	}
	m.boot(bootLog(t, "uki2"))
	o.starts(m)
	if d, err = o.ask(t, "DryRun", dict{}); err != nil || d["approved"].Value() != false {
		t.Fatal(d, err)
	}
}

// One boot goes unchecked, loudly, and is approved by it; a log that does not
// lead to the PCRs is good for nothing.
func TestHostNextBoot(t *testing.T) {
	t.Parallel()
	o, m := bootedOffice(t, bootLog(t, "sd"))
	for _, cancel := range []bool{false, true, true, false} {
		if d, err := o.ask(t, "NextBoot", dict{"note": dbus.MakeVariant("firmware"), "cancel": dbus.MakeVariant(cancel)}); err != nil {
			t.Fatal(d, err)
		}
	}
	if at := o.s.hostProperties()["NextBoot"].Value().(uint64); at == 0 {
		t.Error("that the next boot is not checked is no property")
	}
	other := bootLog(t, "grub")
	m.boot(other)
	o.starts(m)
	if d, err := o.ask(t, "DryRun", dict{}); err != nil || d["approved"].Value() != true {
		t.Fatal(d, err)
	}
	want := []string{eventApproved, eventNextBoot, eventCancelled, eventNextBoot, eventUsed}
	if got := o.events(t); !slices.Equal(got, want) {
		t.Errorf("the history is %q, want %q", got, want)
	}
	if !strings.Contains(o.logged(), "this boot was not checked") {
		t.Error("nothing says that it was not checked")
	}
	// An event log that was edited.
	other.Events = other.Events[:len(other.Events)-4]
	if err := os.WriteFile(m.log(), other.Marshal(), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := o.ask(t, "Approve", "predict", components.Encode([]eventlog.Component{{Kind: eventlog.Cmdline, Text: "quiet"}}), dict{})
	if r := reason.As(err); r == nil || !strings.Contains(r.What, "does not lead to the values of PCR 9") {
		t.Error("a prediction from an edited log: ", err)
	}
}

// What systemd-pcrlock predicts is approved with what it does not predict as it
// is; and after other PCRs were configured, the state that the host is in.
func TestHostPCRLock(t *testing.T) {
	t.Parallel()
	o, m := bootedOffice(t, bootLog(t, "uki"))
	values := testkit.Must[map[uint][]byte](t)(bootLog(t, "uki2").Replay("sha256"))
	prediction := fmt.Sprintf(`{"pcrBank":"sha256","pcrValues":[{"pcr":4,"values":["%064x","%x"]},{"pcr":9,"values":["%x"]},{"pcr":11,"values":["%x"]}]}`, 1, values[4], values[9], values[11])
	d, err := o.ask(t, "Approve", "pcrlock", []dict{}, dict{"prediction": dbus.MakeVariant(prediction)})
	if err != nil || len(d["states"].Value().([]string)) != 2 || d["what"].Value() != "what systemd-pcrlock predicts for PCR 4, 9, 11" {
		t.Fatal(d, err)
	}
	if _, err := o.ask(t, "Approve", "pcrlock", []dict{}, dict{"prediction": dbus.MakeVariant("{}")}); reason.As(err) == nil {
		t.Error("a prediction of nothing: ", err)
	}
	m.boot(bootLog(t, "uki2"))
	o.starts(m)
	if d, err := o.ask(t, "DryRun", dict{}); err != nil || d["approved"].Value() != true {
		t.Fatal(d, err)
	}

	o.s.g.cfg.TPM.PCRs = []uint{0, 2, 4, 7, 9, 11}
	o.starts(m)
	for _, want := range []string{"the state that the host is in, by PCR 0, 2, 4, 7, 9, 11 in place of 0, 4, 7, 9, 11, 12, 14", "approved already; nothing was changed"} {
		if d, err := o.ask(t, "Approve", "current", []dict{}, dict{}); err != nil || d["what"].Value() != want {
			t.Errorf("%v, %v, want %q", d, err, want)
		}
	}
}

// A history survives what a crash makes of its end, and does not grow for
// ever; a kept event log that is none does no harm.
func TestHostHistory(t *testing.T) {
	t.Parallel()
	h := &history{path: filepath.Join(t.TempDir(), "history")}
	count := func() int {
		t.Helper()
		return len(testkit.Must[[]HostEvent](t)(h.all()))
	}
	if count() != 0 {
		t.Error("events of nothing")
	}
	for range 3 {
		if err := h.add(HostEvent{Event: eventApproved, Note: "n"}); err != nil {
			t.Fatal(err)
		}
	}
	b := testkit.Must[[]byte](t)(os.ReadFile(h.path))
	if err := os.WriteFile(h.path, b[:len(b)-5], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.add(HostEvent{Event: eventRevoked}); err != nil || count() != 3 {
		t.Errorf("after a torn line: %d events, %v", count(), err)
	}
	line := `{"time":1,"event":"approved","note":"` + strings.Repeat("n", maxNote) + `","uid":0}` + "\n"
	if err := os.WriteFile(h.path, []byte(strings.Repeat(line, maxHistory/len(line)+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.add(HostEvent{Event: eventApproved}); err != nil {
		t.Fatal(err)
	}
	all := testkit.Must[[]HostEvent](t)(h.all())
	if st := testkit.Must[os.FileInfo](t)(os.Stat(h.path)); st.Size() > maxHistory/2+maxHistory/8 || len(all) < maxHistory/len(line)/2 {
		t.Errorf("%d bytes, %d events", st.Size(), len(all))
	}

	l := bootLogs{t.TempDir()}
	if err := l.save("id", bootLog(t, "sd")); err != nil {
		t.Fatal(err)
	}
	if got := testkit.Must[*eventlog.Log](t)(l.load("id")); !bytes.Equal(got.Marshal(), bootLog(t, "sd").Marshal()) {
		t.Error("another log comes back")
	}
	var bomb bytes.Buffer
	w := gzip.NewWriter(&bomb)
	w.Write(make([]byte, 2*eventlog.MaxSize))
	w.Close()
	for _, b := range [][]byte{nil, []byte("x"), bomb.Bytes()} {
		if err := os.WriteFile(l.path("id"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := l.load("id"); err == nil {
			t.Errorf("%d bytes are a log", len(b))
		}
	}
}
