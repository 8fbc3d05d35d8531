package hook_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/sirupsen/logrus"

	"virt-trust/internal/bus"
	"virt-trust/internal/bus/bustest"
	"virt-trust/internal/domain"
	"virt-trust/internal/hook"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/reason"
)

const (
	uuid = "6f1c2d3e-0000-4a5b-8c6d-000000000003"
	who  = " (emulator-2.0, " + uuid + ")\n"
)

var operations = []string{"prepare", "start", "started", "stopped", "release", "restore", "migrate", "reconnect", "attach", "teleport"}

// ignored are those at which the program ends at once.
func ignored(op string) bool { return op == "started" || op == "stopped" || op == "attach" }

func mayRefuse(op string) bool {
	return op == "prepare" || op == "start" || op == "restore" || op == "migrate"
}

func xml(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile("../domain/testdata/" + name + ".xml")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// fixture is a Hook without a bus; it never reaches one by mistake.
func fixture(op, xml string) (*hook.Hook, *bytes.Buffer) {
	var stderr bytes.Buffer
	log := logrus.New()
	log.Out = io.Discard
	return &hook.Hook{
		Name: "/etc/libvirt/hooks/qemu.d/50-virt-trust", Args: []string{"vm", op, "begin", "-"}, Stdin: strings.NewReader(xml), Stderr: &stderr,
		Config: "/nonexistent", Path: "/x:/y", Log: log, Limit: hook.Limit,
		Ask: func(context.Context, string, []any) error { panic("virt-trustd was asked") },
	}, &stderr
}

func TestWithoutTPM(t *testing.T) {
	for _, name := range []string{"no-tpm", "passthrough", "metadata-tpm"} {
		for _, op := range operations {
			h, stderr := fixture(op, xml(t, name))
			if status := h.Run(); status != 0 || stderr.Len() > 0 {
				t.Errorf("%s, %s: status %d, %q", name, op, status, stderr)
			}
		}
	}
	// What does not parse but surely has no TPM is none of ours.
	h, stderr := fixture("prepare", "<domain")
	if status := h.Run(); status != 0 || stderr.Len() > 0 {
		t.Errorf("status %d, %q", status, stderr)
	}
}

func TestRequireVTPM(t *testing.T) {
	config := filepath.Join(t.TempDir(), "virt-trustd.toml")
	for text, want := range map[string]bool{
		"[policy]\nrequire_vtpm = true\n":  true,
		"[policy]\nrequire_vtpm = false\n": false,
		"":                                 false,
		"[policy]\nrequire_vtpm = maybe\n": false, // a broken file stops nobody
		"nonsense = 1\n":                   false,
	} {
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, op := range operations {
			h, stderr := fixture(op, xml(t, "no-tpm"))
			h.Config = config
			status := h.Run()
			if want && (op == "prepare" || op == "migrate" || op == "restore") {
				if status != 1 || !strings.HasPrefix(stderr.String(), "virt-trust: refused: policy-forbids: ") || !strings.HasSuffix(stderr.String(), " (vm)\n") {
					t.Errorf("%q, %s: status %d, %q", text, op, status, stderr)
				}
			} else if status != 0 || stderr.Len() > 0 {
				t.Errorf("%q, %s: status %d, %q", text, op, status, stderr)
			}
		}
	}
}

func TestAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		answer error
		want   string // the line, without its end
	}{
		"allowed":       {nil, ""},
		"refused":       {reason.Refuse(reason.VTPMChanged, "run 'virt-trust repair VM'", "the state is another"), "vtpm-changed: the state is another; run 'virt-trust repair VM'"},
		"denied":        {fmt.Errorf("%w: you are not libvirtd", bus.ErrAccessDenied), "policy-forbids: access denied: you are not libvirtd; this program is for libvirtd alone"},
		"could not say": {errors.New("disk full\x1b[31m\nand more"), "key-not-released: it could not be told whether this VM may run: disk full [31m and more; see 'journalctl -t virt-trustd -t virt-trust-hook'"},
	} {
		for _, op := range operations {
			h, stderr := fixture(op, xml(t, "emulator-2.0"))
			asked := false
			h.Ask = func(context.Context, string, []any) error { asked = true; return c.answer }
			status, want := h.Run(), ""
			if c.want != "" && mayRefuse(op) {
				want = "virt-trust: refused: " + c.want + who
			}
			if stderr.String() != want || (status == 1) != (want != "") {
				t.Errorf("%s, %s: status %d\n got %q\nwant %q", name, op, status, stderr, want)
			}
			if asked != (op != "teleport" && !ignored(op)) {
				t.Errorf("%s, %s: asked = %t", name, op, asked)
			}
		}
	}
}

func TestNotUnderstood(t *testing.T) {
	big := strings.Repeat(" ", domain.MaxXML)
	for name, c := range map[string]struct {
		xml    string
		status int
	}{
		"cut off":              {xml(t, "emulator-2.0")[:2500] + "<tpm", 1},
		"long":                 {xml(t, "emulator-2.0") + big, 1},
		"long, without TPM":    {xml(t, "no-tpm") + big, 0},
		"beyond what is read":  {xml(t, "no-tpm") + strings.Repeat(big, 17), 1},
		"two emulated TPMs":    {strings.Replace(xml(t, "emulator-2.0"), "</devices>", "<tpm><backend type='emulator'/></tpm></devices>", 1), 1},
		"nothing":              {"", 0},
		"a terminal's escapes": {strings.Replace(xml(t, "emulator-2.0"), "<uuid>", "<uuid>&#x9b;1m", 1), 1},
	} {
		for _, op := range operations {
			h, stderr := fixture(op, c.xml)
			status, want := h.Run(), c.status
			if !mayRefuse(op) {
				want = 0
			}
			if status != want {
				t.Errorf("%s, %s: status %d, want %d", name, op, status, want)
			}
			if s := stderr.String(); want == 1 && (!strings.HasPrefix(s, "virt-trust: refused: key-not-released: ") || strings.Count(s, "\n") != 1 || strings.ContainsRune(s, '\u009b')) ||
				want == 0 && s != "" {
				t.Errorf("%s, %s: %q", name, op, s)
			}
		}
	}
}

func TestPanic(t *testing.T) {
	for _, op := range operations {
		h, stderr := fixture(op, xml(t, "emulator-2.0")) // its Ask panics
		status := h.Run()
		if s := stderr.String(); mayRefuse(op) && (status != 1 || !strings.HasPrefix(s, "virt-trust: refused: key-not-released: ") || strings.Count(s, "\n") != 1) ||
			!mayRefuse(op) && (status != 0 || s != "") {
			t.Errorf("%s: status %d, %q", op, status, s)
		}
	}
}

// never is a stdin that must not be read.
type never struct{}

func (never) Read([]byte) (int, error) { panic("stdin was read") }

// TestAtOnce: what ends without a look at the VM.
func TestAtOnce(t *testing.T) {
	check := func(h *hook.Hook, stderr *bytes.Buffer) {
		t.Helper()
		h.Stdin = never{}
		h.Limit = func(domain.Operation) time.Duration { panic("it went on") }
		if status := h.Run(); status != 0 || stderr.Len() > 0 {
			t.Errorf("%s %v: status %d, %q", h.Name, h.Args, status, stderr)
		}
	}
	for _, op := range operations {
		if ignored(op) {
			check(fixture(op, ""))
		}
		for _, end := range []string{"new", "tmp", "old", "dist", "bak", "remove", "backup"} {
			h, stderr := fixture(op, "")
			h.Name += ".dpkg-" + end
			check(h, stderr)
		}
	}
	h, stderr := fixture("prepare", xml(t, "emulator-2.0"))
	h.Name = "/root/x.dpkg-new/50-virt-trust" // the folder's name does not count
	if status := h.Run(); status != 1 || stderr.Len() == 0 {
		t.Errorf("status %d, %q", status, stderr)
	}
}

func TestUsage(t *testing.T) {
	h, stderr := fixture("prepare", "")
	h.Args = []string{"vm"}
	if status := h.Run(); status != 1 || stderr.Len() == 0 {
		t.Errorf("status %d, %q", status, stderr)
	}
}

// within fails the test when what it runs takes longer.
func within(t *testing.T, limit time.Duration, run func()) {
	t.Helper()
	begin := time.Now()
	run()
	if took := time.Since(begin); took > limit {
		t.Errorf("took %s, more than %s", took, limit)
	}
}

func TestDeadlines(t *testing.T) {
	short := func(domain.Operation) time.Duration { return 300 * time.Millisecond }
	check := func(name string, h *hook.Hook, stderr *bytes.Buffer) {
		t.Helper()
		within(t, time.Second, func() {
			if status := h.Run(); status != 1 || !strings.HasPrefix(stderr.String(), "virt-trust: refused: helper-unreachable: ") {
				t.Errorf("%s: status %d, %q", name, status, stderr)
			}
		})
	}

	bustest.Start(t)
	h, stderr := fixture("prepare", xml(t, "emulator-2.0"))
	h.Ask, h.Limit = hook.Ask, short
	check("nobody owns the name", h, stderr)

	release := make(chan struct{})
	defer close(release)
	bustest.Serve(t, bustest.Manager{HandleHook: func(dbus.Sender, string, string, string, string, map[string]dbus.Variant) (map[string]dbus.Variant, *dbus.Error) {
		<-release
		return nil, nil
	}})
	h, stderr = fixture("prepare", xml(t, "emulator-2.0"))
	h.Ask, h.Limit = hook.Ask, short
	check("virt-trustd hangs", h, stderr)

	socket := filepath.Join(t.TempDir(), "bus")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+socket)
	h, stderr = fixture("prepare", xml(t, "emulator-2.0"))
	h.Ask, h.Limit = hook.Ask, short
	check("the bus hangs", h, stderr)

	l.Close()
	h, stderr = fixture("prepare", xml(t, "emulator-2.0"))
	h.Ask, h.Limit = hook.Ask, short
	check("there is no bus", h, stderr)

	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	h, stderr = fixture("prepare", "")
	h.Stdin, h.Limit = r, short
	check("stdin hangs", h, stderr)
}

// TestDescriptors: a stranger's signal with an array of descriptors, at which
// godbus panics, does not end the hook: at reconnect libvirt would kill the VM.
func TestDescriptors(t *testing.T) {
	testkit.Need(t, "go")
	program := filepath.Join(testkit.Folder(t), "virt-trust-hook")
	bustest.Build(t, "../../hooks/qemu", program, "")
	bustest.Start(t)
	conn := make(chan *dbus.Conn, 1)
	conn <- bustest.Serve(t, bustest.Manager{HandleHook: func(sender dbus.Sender, _, _, _, _ string, _ map[string]dbus.Variant) (map[string]dbus.Variant, *dbus.Error) {
		array := []dbus.UnixFD{0}
		c := <-conn
		c.Send(&dbus.Message{Type: dbus.TypeSignal, Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldPath: dbus.MakeVariant(bus.Path), dbus.FieldInterface: dbus.MakeVariant("a.b"), dbus.FieldMember: dbus.MakeVariant("C"),
			dbus.FieldDestination: dbus.MakeVariant(string(sender)), dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf(array)),
		}, Body: []any{array}}, nil)
		time.Sleep(100 * time.Millisecond)
		return map[string]dbus.Variant{}, nil
	}})
	if status, stderr := run(t, program, "reconnect", xml(t, "emulator-2.0")); status != 0 || stderr != "" {
		t.Errorf("status %d, %.300q", status, stderr)
	}
}

// run runs the real program.
func run(t *testing.T, program, op, xml string) (status int, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "emulator-2.0", op, "begin", "-")
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(xml), &out, &errs
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	if out.Len() > 0 {
		t.Errorf("%s: stdout would become the domain's XML: %q", op, &out)
	}
	return cmd.ProcessState.ExitCode(), errs.String()
}

func TestProgram(t *testing.T) {
	testkit.Need(t, "go")
	dir := testkit.Folder(t)
	journald, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "journal"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer journald.Close()
	program := filepath.Join(dir, "virt-trust-hook")
	bustest.Build(t, "../../hooks/qemu", program, filepath.Join(dir, "journal"))
	entries := func() (all []string) {
		for buf := make([]byte, 1<<16); ; {
			journald.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			n, err := journald.Read(buf)
			if err != nil {
				return all
			}
			all = append(all, string(buf[:n]))
		}
	}

	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
	for _, op := range operations {
		if status, stderr := run(t, program, op, xml(t, "no-tpm")); status != 0 || stderr != "" {
			t.Errorf("no bus, no TPM, %s: status %d, %q", op, status, stderr)
		}
	}
	if e := entries(); len(e) > 0 {
		t.Errorf("a VM without a TPM is logged: %q", e)
	}
	for _, op := range operations {
		status, stderr := run(t, program, op, xml(t, "emulator-2.0"))
		if mayRefuse(op) {
			if status != 1 || !strings.HasPrefix(stderr, "virt-trust: refused: helper-unreachable: ") || !strings.HasSuffix(stderr, who) || strings.Count(stderr, "\n") != 1 {
				t.Errorf("no bus, %s: status %d, %q", op, status, stderr)
			}
		} else if status != 0 || stderr != "" {
			t.Errorf("no bus, %s: status %d, %q", op, status, stderr)
		}
		e := strings.Join(entries(), "\x00")
		if ignored(op) {
			if e != "" {
				t.Errorf("%s: logged %q", op, e)
			}
			continue
		}
		if strings.Count(e, "MESSAGE=") != 1 {
			t.Errorf("no bus, %s: logged %q", op, e)
		}
		for _, field := range []string{"SYSLOG_IDENTIFIER=virt-trust-hook\n", "VIRT_TRUST_VM_UUID=" + uuid + "\n", "VIRT_TRUST_VM_NAME=emulator-2.0\n", "VIRT_TRUST_OPERATION=" + op + "\n"} {
			if !strings.Contains(e, field) {
				t.Errorf("no bus, %s: the log lacks %q: %q", op, field, e)
			}
		}
		for _, field := range []string{"MESSAGE_ID=171bd3d1921c41d1900557a6c3f5ba00\n", "VIRT_TRUST_REASON=helper-unreachable\n"} {
			if strings.Contains(e, field) != mayRefuse(op) {
				t.Errorf("no bus, %s: %q in the log: %q", op, field, e)
			}
		}
	}

	bustest.Start(t)
	type call struct {
		op, subOp, extra, xml string
		path                  any
	}
	calls := make(chan call, 20)
	var answer atomic.Pointer[dbus.Error]
	bustest.Serve(t, bustest.Manager{HandleHook: func(_ dbus.Sender, op, subOp, extra, xml string, options map[string]dbus.Variant) (map[string]dbus.Variant, *dbus.Error) {
		calls <- call{op, subOp, extra, xml, options["path"].Value()}
		return map[string]dbus.Variant{}, answer.Load()
	}})
	if status, stderr := run(t, program, "prepare", xml(t, "emulator-2.0")); status != 0 || stderr != "" {
		t.Errorf("allowed: status %d, %q", status, stderr)
	}
	if got, want := <-calls, (call{"prepare", "begin", "", xml(t, "emulator-2.0"), os.Getenv("PATH")}); got != want {
		t.Errorf("virt-trustd was told %+v", got)
	}
	for _, name := range []string{"50-virt-trust", "50-virt-trust.dpkg-new", "50-virt-trust.dpkg-tmp"} {
		link := filepath.Join(dir, name)
		if err := os.Symlink(program, link); err != nil {
			t.Fatal(err)
		}
		status, stderr := run(t, link, "prepare", xml(t, "emulator-2.0"))
		if asked := len(calls) > 0; status != 0 || stderr != "" || asked != (name == "50-virt-trust") {
			t.Errorf("as %s: status %d, %q, asked = %t", name, status, stderr, asked)
		}
		for len(calls) > 0 {
			<-calls
		}
	}
	entries()
	answer.Store(bustest.Refused("label-other-vm: the label is web1's; give VM its own image"))
	for _, op := range operations[:9] {
		status, stderr := run(t, program, op, xml(t, "emulator-2.0"))
		want := ""
		if mayRefuse(op) {
			want = "virt-trust: refused: label-other-vm: the label is web1's; give VM its own image" + who
		}
		if stderr != want || (status == 1) != (want != "") {
			t.Errorf("refused, %s: status %d, %q", op, status, stderr)
		}
		if e := entries(); mayRefuse(op) && len(e) > 0 {
			t.Errorf("refused, %s: virt-trustd's own entry is doubled: %q", op, e)
		}
	}
}

// BenchmarkWithoutTPM is the process as libvirt starts it, for a VM that has no vTPM.
func BenchmarkWithoutTPM(b *testing.B) {
	program := filepath.Join(b.TempDir(), "virt-trust-hook")
	bustest.Build(b, "../../hooks/qemu", program, "")
	doc := xml(b, "no-tpm")
	for b.Loop() {
		cmd := exec.Command(program, "vm", "prepare", "begin", "-")
		cmd.Stdin = strings.NewReader(doc)
		if err := cmd.Run(); err != nil {
			b.Fatal(err)
		}
	}
}
