package admin

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus"
	"virt-trust/internal/testkit"
)

// asUser makes this test binary a client on the bus: TestMain hands over to it
// in a child that runs as another user.
const asUser = "VIRT_TRUST_TEST_CLIENT"

func TestMain(m *testing.M) {
	if what := os.Getenv(asUser); what != "" {
		client(what)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func client(what string) {
	die := func(err error) {
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	conn, err := dbus.ConnectSystemBus()
	die(err)
	switch verb, arg, _ := strings.Cut(what, " "); verb {
	case "call": // says "allowed" for whatever is not AccessDenied
		i := strings.LastIndexByte(arg, '.')
		args := map[string][]any{
			"Get": {bus.ManagerInterface, "Mode"}, "GetAll": {bus.ManagerInterface},
			"RedeemGrant": {"swtpm", "/x", map[string]dbus.Variant{}},
			"HandleHook":  {"prepare", "begin", "-", "<domain/>", map[string]dbus.Variant{}},
		}[arg[i+1:]]
		call := conn.Object(bus.Name, bus.Path).Call(arg, 0, args...)
		var e dbus.Error
		if errors.As(call.Err, &e) && e.Name == bus.ErrorAccessDenied {
			fmt.Println("denied")
			return
		}
		if arg[i+1:] == "RedeemGrant" {
			var action string
			var fds []dbus.Variant
			die(call.Store(&action, &fds))
			for _, fd := range fds {
				var st syscall.Stat_t
				die(syscall.Fstat(int(fd.Value().(dbus.UnixFD)), &st))
			}
			fmt.Println("allowed", action, len(fds))
			return
		}
		fmt.Println("allowed")
	case "own":
		_, err := conn.RequestName(bus.Name, dbus.NameFlagDoNotQueue)
		if err != nil {
			fmt.Println("denied")
			return
		}
		fmt.Println("allowed")
	case "listen":
		c := make(chan *dbus.Signal, 8)
		conn.Signal(c)
		die(conn.AddMatchSignal(dbus.WithMatchInterface(bus.ManagerInterface)))
		die(conn.AddMatchSignal(dbus.WithMatchInterface("test.Noise")))
		fmt.Println("ready")
		for s := range c {
			if !strings.HasPrefix(s.Name, "org.freedesktop.DBus.") {
				fmt.Println(s.Name)
			}
		}
	case "descriptors": // in a signal and in a call, each an array as godbus cannot read it
		null, err := os.Open("/dev/null")
		die(err)
		array := []dbus.UnixFD{dbus.UnixFD(null.Fd())}
		signal := &dbus.Message{Type: dbus.TypeSignal, Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldPath: dbus.MakeVariant(bus.Path), dbus.FieldInterface: dbus.MakeVariant("a.b"), dbus.FieldMember: dbus.MakeVariant("C"),
			dbus.FieldDestination: dbus.MakeVariant(bus.Name), dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf(array)),
		}, Body: []any{array}}
		die(conn.Send(signal, nil).Err)
		fmt.Println(conn.Object(bus.Name, bus.Path).Call(bus.ManagerInterface+".RedeemGrant", 0, array).Err)
	}
}

// child runs client as a user and groups.
func child(t *testing.T, credential *syscall.Credential, what string) *bufio.Scanner {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), asUser+"="+what)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
	t.Cleanup(func() {
		kill.Stop()
		cmd.Process.Kill()
		cmd.Wait()
	})
	return bufio.NewScanner(out)
}

func line(s *bufio.Scanner) string {
	s.Scan()
	return s.Text()
}

func uid(t *testing.T, name string) *syscall.Credential {
	t.Helper()
	u, err := user.Lookup(name)
	if err != nil {
		testkit.Missing(t, "%v", err)
	}
	id, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	return &syscall.Credential{Uid: uint32(id), Gid: uint32(gid)}
}

// TestPolicy tries every door that the packaged D-Bus policy has, as each kind
// of caller.
func TestPolicy(t *testing.T) {
	if os.Getuid() != 0 {
		testkit.Missing(t, "calling as several users needs root")
	}
	newFake().serve(t, startBus(t))
	group, err := user.LookupGroup(standIn)
	if err != nil {
		testkit.Missing(t, "%v", err)
	}
	gid, _ := strconv.Atoi(group.Gid)
	member := uid(t, "nobody")
	member.Groups = []uint32{uint32(gid)}
	callers := map[string]*syscall.Credential{"root": {}, "member": member, "tss": uid(t, "tss"), "qemu": uid(t, "libvirt-qemu"), "agent": uid(t, standInAgent), "other": uid(t, "nobody")}

	const std = "org.freedesktop.DBus."
	readers := map[string]bool{"root": true, "member": true}
	root := map[string]bool{"root": true}
	attesters := map[string]bool{"root": true, "agent": true}
	for call, allowed := range map[string]map[string]bool{
		std + "Properties.Get":                                readers,
		std + "Properties.GetAll":                             readers,
		std + "Properties.Set":                                root,
		std + "Peer.Ping":                                     readers,
		std + "Introspectable.Introspect":                     readers,
		std + "ObjectManager.GetManagedObjects":               readers,
		bus.ManagerInterface + ".GetVM":                       readers,
		bus.ManagerInterface + ".Check":                       readers,
		bus.ManagerInterface + ".CheckLabel":                  readers,
		bus.ManagerInterface + ".Log":                         readers,
		bus.ManagerInterface + ".Adopt":                       readers,
		bus.ManagerInterface + ".Release":                     readers,
		bus.ManagerInterface + ".Repair":                      readers,
		bus.ManagerInterface + ".Accept":                      readers,
		bus.ManagerInterface + ".Emulators":                   readers,
		bus.ManagerInterface + ".AdoptEmulator":               readers,
		bus.ManagerInterface + ".RestoreEmulator":             readers,
		bus.ManagerInterface + ".HandleHook":                  root,
		bus.ManagerInterface + ".RedeemGrant":                 {"root": true, "tss": true, "qemu": true},
		bus.ManagerInterface + ".CertifyEK":                   {"root": true, "tss": true},
		bus.ManagerInterface + ".IssueEKCertificate":          readers,
		bus.AttestationInterface + ".SetCertifierCertificate": attesters,
		bus.ManagerInterface + ".NotYetInvented":              root,
		bus.AttestationInterface + ".Identity":                attesters,
		bus.AttestationInterface + ".Evidence":                attesters,
		bus.AttestationInterface + ".QuoteKey":                attesters,
		bus.HostInterface + ".States":                         readers,
		bus.VMInterface + ".NotYetInvented":                   root,
	} {
		for name, credential := range callers {
			want := "denied"
			if allowed[name] {
				want = "allowed"
			}
			if strings.HasSuffix(call, ".RedeemGrant") && want == "allowed" {
				want = "allowed keys 2" // with its descriptors
			}
			if got := line(child(t, credential, "call "+call)); got != want {
				t.Errorf("%s calls %s: %q, want %q", name, call, got, want)
			}
		}
	}
	for name, credential := range callers {
		want := map[bool]string{true: "allowed", false: "denied"}[name == "root"]
		if got := line(child(t, credential, "own")); got != want {
			t.Errorf("%s owns %s: %q, want %q", name, bus.Name, got, want)
		}
	}
}

// TestPolicySignals: refusals name VMs, so not everybody hears them.
func TestPolicySignals(t *testing.T) {
	if os.Getuid() != 0 {
		testkit.Missing(t, "listening as several users needs root")
	}
	f := newFake()
	f.serve(t, startBus(t))
	group, err := user.LookupGroup(standIn)
	if err != nil {
		testkit.Missing(t, "%v", err)
	}
	gid, _ := strconv.Atoi(group.Gid)
	member := uid(t, "nobody")
	member.Groups = []uint32{uint32(gid)}
	listeners := map[string]*bufio.Scanner{
		"member": child(t, member, "listen"), "other": child(t, uid(t, "nobody"), "listen"), "root": child(t, &syscall.Credential{}, "listen"),
	}
	for _, s := range listeners {
		if got := line(s); got != "ready" {
			t.Fatal(got)
		}
	}
	if err := f.conn.Emit(bus.Path, bus.ManagerInterface+".Refused", web, "web", "prepare", "vtpm-changed", "what"); err != nil {
		t.Fatal(err)
	}
	// Something from elsewhere, which everybody hears, ends the wait.
	elsewhere, err := dbus.ConnectSystemBus()
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	if err := f.conn.Object(bus.Name, bus.Path).Call("org.freedesktop.DBus.Peer.Ping", 0).Err; err != nil {
		t.Fatal(err)
	}
	if err := elsewhere.Emit("/", "test.Noise.Else"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"member": bus.ManagerInterface + ".Refused", "root": bus.ManagerInterface + ".Refused", "other": "test.Noise.Else",
	} {
		if got := line(listeners[name]); got != want {
			t.Errorf("%s heard %q first, want %q", name, got, want)
		}
	}
}

// On a host without the agent there is no such user: the bus comes up all the
// same, and lets everybody else do what they may.
func TestPolicyWithoutAgent(t *testing.T) {
	if os.Getuid() != 0 {
		testkit.Missing(t, "calling as several users needs root")
	}
	const none = "virt-trust-test-none"
	if _, err := user.Lookup(none); err == nil {
		t.Fatal("there is a user ", none)
	}
	newFake().serve(t, startBusFor(t, none))
	call := "call " + bus.AttestationInterface + ".Identity"
	for name, want := range map[string]string{"daemon": "denied", "root": "allowed", "tss": "denied"} {
		if got := line(child(t, uid(t, name), call)); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if got := line(child(t, uid(t, "tss"), "call "+bus.ManagerInterface+".RedeemGrant")); got != "allowed keys 2" {
		t.Errorf("swtpm's user: %q", got)
	}
}

// TestPolicyDescriptors: nobody gets a descriptor through to virt-trustd. Were
// it otherwise, godbus would end this test with a panic.
func TestPolicyDescriptors(t *testing.T) {
	if os.Getuid() != 0 {
		testkit.Missing(t, "calling as several users needs root")
	}
	f := newFake()
	f.serve(t, startBus(t))
	for name, credential := range map[string]*syscall.Credential{"root": {}, "tss": uid(t, "tss"), "other": uid(t, "nobody")} {
		if got := line(child(t, credential, "descriptors")); !strings.Contains(got, "prevents this sender") && !strings.Contains(got, "Rejected send message") {
			t.Errorf("%s sends descriptors: %q", name, got)
		}
	}
	if _, err := f.conn.RequestName(bus.Name, dbus.NameFlagDoNotQueue); err != nil {
		t.Errorf("the service has gone: %v", err)
	}
}
