package admin

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/imagefile"
	"virt-trust/internal/vtpm/label"
	"virt-trust/internal/vtpm/reason"
)

// serve starts a bus with a fake virt-trustd on it.
func serve(t *testing.T, change ...func(*fake)) *fake {
	t.Helper()
	f := newFake()
	for _, c := range change {
		c(f)
	}
	f.serve(t, startBus(t))
	return f
}

func TestStatus(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*fake)
		code   int
		says   string
	}{
		"all is well":   {func(*fake) {}, ExitDone, "readable, 2 VMs, generation 12"},
		"not restarted": {func(f *fake) { f.manager["LibvirtState"] = "restart-needed" }, ExitRefused, "systemctl restart libvirtd"},
		"hook missing":  {func(f *fake) { f.manager["LibvirtState"] = "hook-missing" }, ExitRefused, "50-virt-trust"},
		"other PCRs":    {func(f *fake) { f.host["State"], f.host["DifferingPCRs"] = "not-approved", []uint32{4, 7} }, ExitRefused, "PCRs that differ:  4 7"},
		"list damaged":  {func(f *fake) { f.manager["ListState"] = "damaged" }, ExitRefused, "damaged"},
		"no TPM": {func(f *fake) {
			f.host["State"], f.host["Problem"] = "absent", "no such device"
			f.manager["ListState"] = "sealed"
		}, ExitNotAppraised, "no such device"},
		"not libvirt":    {func(f *fake) { f.manager["LibvirtState"] = "unknown" }, ExitDone, "unknown"},
		"types unknown":  {func(f *fake) { f.host["PCRSelection"] = "all" }, ExitDone, "ready"},
		"hostile answer": {func(f *fake) { f.host["Problem"] = "a\x1b]0;b\x07\nc" }, ExitDone, "a ]0;b  c"},
	} {
		t.Run(name, func(t *testing.T) {
			serve(t, tt.change)
			stdout, stderr, code := run(t, "status")
			if code != tt.code || !strings.Contains(stdout, tt.says) || stderr != "" {
				t.Errorf("exit %d, want %d, stderr %q, stdout without %q:\n%s", code, tt.code, stderr, tt.says, stdout)
			}
			js, _, code := run(t, "status", "--json")
			if s := decode[Status](t, js); code != tt.code || s.Version != "0.1.0" || s.Generation != 12 {
				t.Errorf("--json: exit %d, %+v", code, s)
			}
		})
	}
}

func TestUnreachable(t *testing.T) {
	startBus(t) // and nobody on it
	for _, tt := range []struct {
		args []string
		code int
	}{
		{[]string{"status"}, ExitNotAppraised},
		{[]string{"check", "web"}, ExitNotAppraised},
		{[]string{"check", "--all"}, ExitNotAppraised},
		{[]string{"list"}, ExitFailed},
		{[]string{"show", "web"}, ExitFailed},
		{[]string{"log"}, ExitFailed},
		{[]string{"adopt", "web"}, ExitFailed},
		{[]string{"release", "--all"}, ExitFailed},
	} {
		stdout, stderr, code := run(t, tt.args...)
		if code != tt.code || !strings.HasPrefix(stderr, "virt-trust: refused: helper-unreachable: ") || strings.Count(stderr, "\n") != 1 || stdout != "" {
			t.Errorf("%v: exit %d, want %d; %q %q", tt.args, code, tt.code, stdout, stderr)
		}
	}
	if out, _, code := run(t, "__complete", "show", ""); code != 0 || strings.Contains(out, "web") {
		t.Errorf("completion: exit %d: %s", code, out)
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{}, {"fly"}, {"status", "x"}, {"status", "--fly"}, {"show"}, {"show", "a", "b"}, {"label"}, {"label", "show"}, {"log", "-n", "-1"},
		{"adopt"}, {"adopt", "web", "--all"}, {"adopt", "--new", "--all"}, {"release"}, {"check"}, {"repair"}, {"repair", "web", "--list"}, {"repair", ""},
		{"accept", "web"}, {"accept", "--rolled-back"}, {"reason", "no-such"}, {"version", "x"},
	} {
		if stdout, stderr, code := run(t, args...); code != ExitUsage || stdout != "" || !strings.HasPrefix(stderr, "virt-trust: ") {
			t.Errorf("%q: exit %d, stdout %q, stderr %q", args, code, stdout, stderr)
		}
	}
}

func TestList(t *testing.T) {
	serve(t)
	stdout, stderr, code := run(t, "list")
	want := `NAME              UUID                                  STATE    LABEL  KEY         LAST
bad [31m name     22222222-2222-2222-2222-222222222222  running  none   virt-trust  allow
web               11111111-1111-1111-1111-111111111111  stored   right  virt-trust  refuse (vtpm-rolled-back)
`
	if squeeze(stdout) != squeeze(want) || stderr != "" || code != 0 {
		t.Errorf("exit %d, %s, got\n%s", code, stderr, stdout)
	}
	js, _, _ := run(t, "list", "--json")
	l := decode[List](t, js)
	if len(l.VMs) != 2 || l.VMs[1].Name != "web" || l.State != "readable" || l.VMs[1].Created.Unix() != 1700000000 || l.VMs[0].Created != nil {
		t.Errorf("--json: %+v", l)
	}
}

func squeeze(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = strings.Join(strings.Fields(lines[i]), " ")
	}
	return strings.Join(lines, "\n")
}

// TestListSealed: what is known without the list is told, and why.
func TestListSealed(t *testing.T) {
	serve(t, func(f *fake) {
		f.manager["ListState"], f.manager["ListProblem"] = "sealed", "PCR 4 differs from the approved state"
		f.host["State"], f.host["DifferingPCRs"] = "not-approved", []uint32{4}
		f.vms = nil
	})
	stdout, stderr, code := run(t, "list")
	for _, want := range []string{"sealed, generation 12", "PCR 4 differs", "PCRs that differ:  4", web, lone} {
		if !strings.Contains(stdout, want) {
			t.Errorf("%q is not told:\n%s", want, stdout)
		}
	}
	if strings.Contains(stdout, "not-a-uuid") {
		t.Errorf("a folder that is no VM's:\n%s", stdout)
	}
	if code != ExitRefused || stderr != "virt-trust: refused: host-not-approved: PCR 4 differs from the approved state\n" {
		t.Errorf("exit %d, %q", code, stderr)
	}
	js, _, code := run(t, "list", "--json")
	if l := decode[List](t, js); code != ExitRefused || len(l.StateFolders) != 2 || l.VMs == nil {
		t.Errorf("exit %d, %+v", code, l)
	}
	// "All" must not be taken for none.
	if _, stderr, code := run(t, "release", "--all"); code != ExitRefused || !strings.Contains(stderr, "host-not-approved") {
		t.Errorf("release --all: exit %d, %q", code, stderr)
	}
}

func TestShow(t *testing.T) {
	serve(t)
	for _, vm := range []string{"web", web} {
		stdout, _, code := run(t, "show", vm)
		if code != 0 || !strings.Contains(stdout, "right, in /srv/web.qcow2") || !strings.Contains(stdout, "refuse, vtpm-rolled-back: the vTPM") {
			t.Errorf("exit %d:\n%s", code, stdout)
		}
	}
	if stdout, _, _ := run(t, "show", bad); !strings.Contains(stdout, "in the vTPM list alone") {
		t.Errorf("a VM without label:\n%s", stdout)
	}
	js, _, _ := run(t, "show", "--json", "web")
	if vm := decode[VM](t, js); vm.UUID != web || vm.Generation != 3 {
		t.Errorf("%+v", vm)
	}
	if _, stderr, code := run(t, "show", "nobody"); code != ExitFailed || !strings.Contains(stderr, "no such VM") {
		t.Errorf("exit %d, %q", code, stderr)
	}
}

func TestCheck(t *testing.T) {
	serve(t)
	stdout, _, code := run(t, "check", "web")
	if code != ExitRefused || !strings.Contains(stdout, "To mend:  'virt-trust repair web'") {
		t.Errorf("exit %d:\n%s", code, stdout)
	}
	if _, _, code := run(t, "check", bad); code != ExitDone {
		t.Errorf("a VM that would start: exit %d", code)
	}
	if _, stderr, code := run(t, "check", "nobody"); code != ExitNotAppraised || stderr == "" {
		t.Errorf("no such VM: exit %d, %q", code, stderr)
	}
	js, stderr, code := run(t, "check", "--all", "--json")
	v := decode[[]Verdict](t, js) // lone's folder is left over: libvirt does not know it
	if code != ExitRefused || len(v) != 2 || v[1].Reason != "vtpm-rolled-back" || stderr != "" {
		t.Errorf("--all: exit %d, %+v, %q", code, v, stderr)
	}
}

func TestCheckAllCannotTell(t *testing.T) {
	serve(t, func(f *fake) { f.check[web] = map[string]any{"verdict": "maybe"} })
	js, _, code := run(t, "check", "--all", "--json")
	if v := decode[[]Verdict](t, js); code != ExitNotAppraised || v[1].Verdict != "none" {
		t.Errorf("exit %d, %+v", code, v)
	}
}

func TestChanges(t *testing.T) {
	f := serve(t, func(f *fake) {
		f.refuse[bad] = reason.Refuse(reason.PolicyForbids, "shut it down first", "the VM runs")
	})
	for _, tt := range []struct {
		args  []string
		code  int
		calls []string
	}{
		{[]string{"adopt", "web"}, ExitDone, []string{"Adopt web"}},
		{[]string{"adopt", "--new", "web"}, ExitDone, []string{"Adopt web new:true"}},
		{[]string{"release", web}, ExitDone, []string{"Release " + web}},
		{[]string{"repair", "web"}, ExitDone, []string{"Repair web"}},
		{[]string{"repair", "--list"}, ExitDone, []string{"Repair"}},
		{[]string{"accept", "web", "--rolled-back"}, ExitDone, []string{"Accept web rolled-back:true"}},
		{[]string{"release", bad}, ExitRefused, []string{"Release " + bad}},
		{[]string{"release", "nobody"}, ExitFailed, []string{"Release nobody"}},
		// What the list does not know; not-a-uuid is no VM's folder.
		{[]string{"adopt", "--all"}, ExitDone, []string{"Adopt " + lone}},
		{[]string{"release", "--all"}, ExitRefused, []string{"Release " + bad, "Release " + web}},
	} {
		f.called()
		stdout, stderr, code := run(t, tt.args...)
		calls := f.called()
		if code != tt.code || !slices.Equal(calls, tt.calls) {
			t.Errorf("%v: exit %d, want %d; called %q; %s%s", tt.args, code, tt.code, calls, stdout, stderr)
		}
		js, _, code := run(t, append(tt.args, "--json")...)
		if slices.Contains(tt.args, "--all") {
			decode[[]Change](t, js)
		} else if ch := decode[Change](t, js); ch.Done != (tt.code == ExitDone) || (ch.Reason != "") != (tt.code == ExitRefused) {
			t.Errorf("%v: %+v", tt.args, ch)
		}
		if code != tt.code {
			t.Errorf("%v --json: exit %d", tt.args, code)
		}
	}
	if _, stderr, _ := run(t, "release", bad); stderr != "virt-trust: refused: policy-forbids: the VM runs; shut it down first\n" {
		t.Errorf("%q", stderr)
	}
	if _, stderr, _ := run(t, "release", "--all"); !strings.Contains(stderr, "2 of 2: web\n") {
		t.Errorf("no progress: %q", stderr)
	}
}

// TestReleased: a released VM stays in the list; --all is the others.
func TestReleased(t *testing.T) {
	f := serve(t, func(f *fake) { f.vms[0]["State"] = "released" })
	run(t, "release", "--all")
	run(t, "adopt", "--all")
	calls := f.called()
	if want := []string{"Release " + bad, "Adopt " + web, "Adopt " + lone}; !slices.Equal(calls, want) {
		t.Errorf("called %q", calls)
	}
}

func TestLabel(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		testkit.Missing(t, "%v", err)
	}
	image := filepath.Join(t.TempDir(), "web.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", image, "1M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	f := serve(t)
	if _, stderr, code := run(t, "label", "show", image); code != ExitFailed || !strings.Contains(stderr, "no label") {
		t.Errorf("without label: exit %d, %q", code, stderr)
	}
	payload, err := label.Label{
		VM: web, Instance: "/var/lib/libvirt/swtpm/" + web + "/tpm2", Algorithm: label.AlgorithmAES256, Generation: 7,
		Recipients: []label.Recipient{{BindKeyName: []byte{0, 0x0b, 0xaa}, Ciphertext: make([]byte, 256)}},
	}.Seal(make([]byte, label.StateKeySize))
	if err != nil {
		t.Fatal(err)
	}
	if err := imagefile.WriteLabel(image, payload); err != nil {
		t.Fatal(err)
	}
	for verdict, want := range map[string]int{"right": ExitDone, "other": ExitRefused, "unknown": ExitNotAppraised} {
		f.mu.Lock()
		f.label["verdict"] = verdict
		f.mu.Unlock()
		js, _, code := run(t, "label", "show", image, "--json")
		if l := decode[Label](t, js); code != want || l.VM != web || l.Generation != 7 || l.Verdict != verdict || l.ThisHost == nil || !*l.ThisHost {
			t.Errorf("%s: exit %d, %+v", verdict, code, l)
		}
	}
	f.conn.Close()
	stdout, _, code := run(t, "label", "show", image)
	if code != ExitNotAppraised || !strings.Contains(stdout, web) || !strings.Contains(stdout, "helper-unreachable") {
		t.Errorf("without virt-trustd: exit %d\n%s", code, stdout)
	}
	if _, _, code := run(t, "label", "show", "/nonexistent"); code != ExitFailed {
		t.Errorf("no image: exit %d", code)
	}
}

func decision(at uint64, verdict string) map[string]any {
	return map[string]any{
		"time": at, "uuid": web, "name": "web", "operation": "prepare", "verdict": verdict,
		"reason": "vtpm-changed", "what": "it is another",
	}
}

func TestLog(t *testing.T) {
	serve(t, func(f *fake) {
		f.decisions = []map[string]any{decision(1700000000000000, "allow"), decision(1700000001000000, "refuse")}
	})
	js, _, _ := run(t, "log", "--json", "-n", "1")
	if d := decode[[]Decision](t, js); len(d) != 1 || d[0].Verdict != "refuse" || d[0].Time.Unix() != 1700000001 {
		t.Errorf("%+v", d)
	}
	stdout, _, _ := run(t, "log")
	if strings.Count(stdout, "\n") != 2 || !strings.Contains(stdout, "web  prepare  vtpm-changed: it is another") {
		t.Errorf("%s", stdout)
	}
}

// TestLogFollow: a signal brings what is new, once.
func TestLogFollow(t *testing.T) {
	f := serve(t, func(f *fake) { f.decisions = []map[string]any{decision(1, "allow")} })
	out := &lines{make(chan string, 10)}
	c := &Command{Stdout: out, Stderr: os.Stderr, Args: []string{"log", "--follow"}, ConfigPath: "/nonexistent"}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan int)
	go func() { done <- c.Run(ctx) }()
	next := func() string {
		select {
		case l := <-out.c:
			return l
		case <-time.After(4 * time.Second): // sooner than follow looks by itself
			t.Fatal("nothing came")
			return ""
		}
	}
	if l := next(); !strings.Contains(l, "allow") {
		t.Errorf("%q", l)
	}
	f.decide(decision(2, "refuse"))
	if err := f.conn.Emit(bus.Path, bus.ManagerInterface+".Refused", web, "web", "prepare", "vtpm-changed", "what"); err != nil {
		t.Fatal(err)
	}
	if l := next(); !strings.Contains(l, "refuse") {
		t.Errorf("%q", l)
	}
	cancel()
	if code := <-done; code != ExitDone {
		t.Errorf("exit %d", code)
	}
	if len(out.c) > 0 {
		t.Errorf("and again: %q", <-out.c)
	}
}

// lines hands on each write.
type lines struct{ c chan string }

func (l *lines) Write(b []byte) (int, error) {
	l.c <- string(b)
	return len(b), nil
}

func TestComplete(t *testing.T) {
	serve(t)
	out, _, _ := run(t, "__complete", "show", "")
	if !strings.Contains(out, "web\t"+web) {
		t.Errorf("%s", out)
	}
	if out, _, _ := run(t, "__complete", "reason", "vtpm"); !strings.Contains(out, "vtpm-rolled-back") {
		t.Errorf("%s", out)
	}
}

// TestDenied: whom the bus does not let through learns why, in short.
func TestDenied(t *testing.T) {
	var stderr bytes.Buffer
	c := &Command{Stderr: &stderr}
	c.complain(bus.MapError(dbus.NewError(bus.ErrorAccessDenied, []any{"Rejected send message, 2 matched rules; ..."})))
	c.complain(bus.MapError(dbus.NewError(bus.ErrorAccessDenied, []any{"polkit says no"})))
	if want := "virt-trust: access denied: be root or in the group virt-trust\nvirt-trust: access denied: polkit says no\n"; stderr.String() != want {
		t.Errorf("%q", &stderr)
	}
}

// TestListRefusal: the code is the problem's own where it has one.
func TestListRefusal(t *testing.T) {
	for _, tt := range []struct {
		m    Manager
		want reason.Code
	}{
		{Manager{ListState: "sealed", ListProblem: "tpm-failed: there is no TPM"}, reason.TPMFailed},
		{Manager{ListState: "sealed", ListProblem: "PCR 4 differs"}, reason.HostNotApproved},
		{Manager{ListState: "damaged"}, reason.ListDamaged},
		{Manager{ListState: "rolled-back"}, reason.ListRolledBack},
	} {
		if r := reason.As(tt.m.listRefusal()); r == nil || r.Code != tt.want {
			t.Errorf("%+v: %v", tt.m, r)
		}
	}
	if r := (Manager{ListState: "odd"}).listRefusal(); r == nil || reason.As(r) != nil {
		t.Errorf("%v", r)
	}
}
