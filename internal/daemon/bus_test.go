package daemon

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/sirupsen/logrus"

	contract "virt-trust/dbus"
	"virt-trust/internal/bus"
	"virt-trust/internal/bus/bustest"
	"virt-trust/internal/domain"
	"virt-trust/internal/domain/emulator"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/imagefile"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
)

// office is a house with a virt-trustd on a bus of its own.
type office struct {
	*house
	s        *Service
	conn     *dbus.Conn // of a caller
	address  string
	programs string // folder of programs that are this test binary
}

func openOffice(t testing.TB) *office {
	t.Helper()
	o := &office{house: newHouse(t)}
	o.programs = testkit.Folder(t)
	o.address = bustest.Run(t, o.programs, bustest.Open)

	self := testkit.Must[string](t)(os.Executable())
	for _, p := range []string{"hook", "wrapper", "emulator", "ekcert", "libvirtd", "other"} {
		to := filepath.Join(o.programs, p)
		if os.Link(self, to) != nil {
			copyFile(t, self, to)
			os.Chmod(to, 0o755)
		}
	}
	dir := filepath.Join(o.programs, "bin")
	os.Mkdir(dir, 0o755)
	os.Symlink(filepath.Join(o.programs, "wrapper"), filepath.Join(dir, "swtpm"))

	host := testkit.Must[*hosttpm.Host](t)(hosttpm.Open(hosttpm.Config{Device: filepath.Join(o.root, "no-tpm"), Dir: filepath.Join(o.root, "tpm"), PCRs: []uint{7}, Bank: "sha256"}))
	t.Cleanup(func() { host.Close() })
	l := logrus.New()
	l.Out = o.house
	own := testkit.Must[*dbus.Conn](t)(dbus.Connect(o.address))
	t.Cleanup(func() { own.Close() })
	o.s = newService(own, Options{
		Config: configIn(o.root), Version: "1", Log: logrus.NewEntry(l),
		Programs: Programs{Hook: filepath.Join(o.programs, "hook"), Wrapper: filepath.Join(o.programs, "wrapper"), Emulator: filepath.Join(o.programs, "emulator"), EKCert: filepath.Join(o.programs, "ekcert"), Link: filepath.Join(o.root, "50-virt-trust")},
	}, uint32(os.Getuid()), uint32(os.Getuid()), host)
	o.s.g = o.g
	o.g.changed = o.s.vmChanged
	o.g.cfg.Libvirt.Socket = filepath.Join(o.root, "no-libvirt")
	ctx, cancel := context.WithCancel(background)
	t.Cleanup(cancel)
	go o.s.sendSignals(ctx)
	o.s.openList(ctx)
	if err := o.s.export(); err != nil {
		t.Fatal(err)
	}
	o.conn = testkit.Must[*dbus.Conn](t)(dbus.Connect(o.address))
	t.Cleanup(func() { o.conn.Close() })
	return o
}

func (o *office) call(path dbus.ObjectPath, method string, args ...any) *dbus.Call {
	ctx, cancel := context.WithTimeout(background, 10*time.Second)
	defer cancel()
	return o.conn.Object(bus.Name, path).CallWithContext(ctx, method, 0, args...)
}

// callBus is a caller with an executable of its own: it calls a method of the
// Manager with strings and an empty a{sv}, and prints what comes back.
func callBus(address, method string, args []string) {
	conn, err := dbus.Connect(address)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	in := []any{}
	for _, a := range args {
		in = append(in, a)
	}
	options := dict{}
	if method == "HandleHook" {
		options["path"] = dbus.MakeVariant(filepath.Join(filepath.Dir(os.Args[0]), "bin"))
	}
	if method == "RedeemGrant" && args[0] == emulator.Program {
		b, _ := os.ReadFile(emulator.Real("qemu-system-x86_64"))
		d := sha256.Sum256(b)
		options["uuid"], options["sha256"] = dbus.MakeVariant(args[1]), dbus.MakeVariant(d[:])
	}
	if method == "RedeemGrant" && args[0] == "swtpm" {
		options["socket"] = dbus.MakeVariant(args[1] + ".sock")
	}
	c := conn.Object(bus.Name, bus.Path).Call(bus.ManagerInterface+"."+method, 0, append(in, options)...)
	if c.Err != nil {
		var e dbus.Error
		errors.As(c.Err, &e)
		fmt.Println(e.Name, e.Body)
	} else {
		for i, v := range c.Body {
			if keys, ok := v.([]dbus.Variant); ok {
				for _, k := range keys {
					f := os.NewFile(uintptr(k.Value().(dbus.UnixFD)), "key")
					b, err := io.ReadAll(f)
					fmt.Print(" key of ", len(b), " ", err)
				}
				continue
			}
			fmt.Print(strings.Repeat(" ", min(i, 1)), v)
		}
	}
	os.Exit(0)
}

// startHook is a libvirtd that runs a hook.
func startHook(argv []string) {
	c := exec.Command(argv[0], argv[1:]...)
	c.Env = append(os.Environ(), childMode+"=call")
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, _ := c.CombinedOutput()
	os.Stdout.Write(out)
	os.Exit(0)
}

// as runs a program that is this test binary.
func (o *office) as(uid uint32, mode string, argv ...string) string {
	o.t.Helper()
	argv[0] = filepath.Join(o.programs, argv[0])
	c := exec.Command(argv[0], argv[1:]...)
	c.Env = append(os.Environ(), childMode+"="+mode)
	c.SysProcAttr, c.WaitDelay = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}, time.Second
	if uid != uint32(os.Getuid()) {
		c.SysProcAttr.Credential = &syscall.Credential{Uid: uid, Gid: uid}
	}
	out, err := c.CombinedOutput()
	if err != nil {
		o.t.Fatalf("%v: %s", err, out)
	}
	return strings.TrimSpace(string(out))
}

func (o *office) hook(op string, f *domain.Facts) string {
	o.t.Helper()
	xml := fmt.Sprintf(domainXML, f.Name, f.UUID, o.image(f.UUID), "")
	return o.as(uint32(os.Getuid()), "libvirtd", "libvirtd", filepath.Join(o.programs, "hook"), o.address, "HandleHook", op, "begin", "-", xml)
}

type xmlArg struct {
	Name      string `xml:"name,attr"`
	Type      string `xml:"type,attr"`
	Direction string `xml:"direction,attr"`
}

type xmlNode struct {
	Interfaces []struct {
		Name    string `xml:"name,attr"`
		Methods []struct {
			Name string   `xml:"name,attr"`
			Args []xmlArg `xml:"arg"`
		} `xml:"method"`
		Signals []struct {
			Name string   `xml:"name,attr"`
			Args []xmlArg `xml:"arg"`
		} `xml:"signal"`
		Properties []struct {
			Name   string `xml:"name,attr"`
			Type   string `xml:"type,attr"`
			Access string `xml:"access,attr"`
		} `xml:"property"`
	} `xml:"interface"`
	Nodes []struct {
		Name string `xml:"name,attr"`
	} `xml:"node"`
}

// members lists what an interface offers, one line each.
func members(t *testing.T, doc, iface string) (all []string) {
	t.Helper()
	var n xmlNode
	if err := xml.Unmarshal([]byte(doc), &n); err != nil {
		t.Fatal(err, doc)
	}
	for _, i := range n.Interfaces {
		if i.Name != iface {
			continue
		}
		for _, m := range i.Methods {
			in, out := "", ""
			for _, a := range m.Args {
				if a.Direction == "out" {
					out += a.Type
				} else {
					in += a.Type
				}
			}
			all = append(all, fmt.Sprintf("method %s(%s) %s", m.Name, in, out))
		}
		for _, s := range i.Signals {
			types := ""
			for _, a := range s.Args {
				types += a.Type
			}
			all = append(all, fmt.Sprintf("signal %s(%s)", s.Name, types))
		}
		for _, p := range i.Properties {
			all = append(all, fmt.Sprintf("property %s %s %s", p.Name, p.Type, p.Access))
		}
	}
	slices.Sort(all)
	return all
}

// The contract, the live introspection and the code say the same.
func TestContract(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	f := o.vm(uuidA, true)
	o.start(f)
	for iface, path := range map[string]dbus.ObjectPath{
		bus.ManagerInterface: bus.Path, bus.HostInterface: bus.HostPath, bus.AttestationInterface: bus.HostPath, bus.VMInterface: bus.VMPath(uuidA),
	} {
		var live string
		if err := o.call(path, "org.freedesktop.DBus.Introspectable.Introspect").Store(&live); err != nil {
			t.Fatal(path, err)
		}
		want := members(t, contract.XML, iface)
		if got := members(t, live, iface); len(got) == 0 || !slices.Equal(got, want) {
			t.Errorf("%s: %q\nwant %q", path, got, want)
		}
		var have []string
		reply := o.call(path, "org.freedesktop.DBus.Properties.GetAll", iface)
		if reply.Err != nil {
			t.Fatal(path, reply.Err)
		}
		all := reply.Body[0].(map[string]dbus.Variant) // Store would make other signatures
		for k, v := range all {
			have = append(have, fmt.Sprintf("property %s %s read", k, v.Signature()))
			var one dbus.Variant
			if err := o.call(path, "org.freedesktop.DBus.Properties.Get", iface, k).Store(&one); err != nil || one.Signature() != v.Signature() {
				t.Errorf("%s: %v, %v", k, one, err)
			}
			var e dbus.Error
			if err := o.call(path, "org.freedesktop.DBus.Properties.Set", iface, k, v).Err; !errors.As(err, &e) || e.Name != "org.freedesktop.DBus.Error.PropertyReadOnly" {
				t.Errorf("%s can be set: %v", k, err)
			}
		}
		if iface == bus.AttestationInterface {
			for name, m := range o.s.attestation() {
				have = append(have, fmt.Sprintf("method %s(%s) %s", name, signature(t, m, true), signature(t, m, false)))
			}
		}
		if iface == bus.HostInterface {
			for name, m := range o.s.hostMethods() {
				have = append(have, fmt.Sprintf("method %s(%s) %s", name, signature(t, m, true), signature(t, m, false)))
			}
		}
		if path == bus.Path {
			have = append(have, "signal Refused(sssss)")
			for name, m := range o.s.manager() {
				have = append(have, fmt.Sprintf("method %s(%s) %s", name, signature(t, m, true), signature(t, m, false)))
			}
		}
		slices.Sort(have)
		if !slices.Equal(have, want) {
			t.Errorf("%s has %q\nwant %q", path, have, want)
		}
	}
	var objects map[dbus.ObjectPath]map[string]dict
	if err := o.call(bus.Path, "org.freedesktop.DBus.ObjectManager.GetManagedObjects").Store(&objects); err != nil {
		t.Fatal(err)
	}
	if len(objects) != 2 || objects[bus.VMPath(uuidA)][bus.VMInterface]["Name"].Value() != "vm-a" {
		t.Errorf("%v", objects)
	}
	// What is not there is not there.
	for _, p := range []dbus.ObjectPath{bus.VMPath(uuidB), bus.Path + "/nothing", bus.Path + "/vm/x"} {
		if err := o.call(p, "org.freedesktop.DBus.Properties.GetAll", bus.VMInterface).Err; err == nil {
			t.Error(p, "is there")
		}
	}
	// busctl tree finds the VM.
	var live string
	if err := o.call(bus.Path+"/vm", "org.freedesktop.DBus.Introspectable.Introspect").Store(&live); err != nil || !strings.Contains(live, strings.ReplaceAll(uuidA, "-", "_")) {
		t.Error(err, live)
	}
}

// signature is a handler's, as D-Bus sees it.
func signature(t *testing.T, handler any, in bool) (s string) {
	t.Helper()
	f := reflect.TypeOf(handler)
	n, at := f.NumOut()-1, f.Out // the last is the error
	if in {
		n, at = f.NumIn(), f.In
	}
	for i := range n {
		switch at(i) {
		case reflect.TypeFor[dbus.Sender](), reflect.TypeFor[dbus.Message]():
			continue
		}
		s += dbus.SignatureOfType(at(i)).String()
	}
	return s
}

func TestCallers(t *testing.T) {
	t.Parallel()
	testkit.Root(t) // who can be others
	o := openOffice(t)
	f := o.vm(uuidA, false)
	xml := fmt.Sprintf(domainXML, f.Name, f.UUID, o.image(uuidA), "")
	handle := []string{o.address, "HandleHook", "prepare", "begin", "-", xml}
	redeem := []string{o.address, "RedeemGrant", "swtpm", o.dir(uuidA)}
	with := func(program string, rest []string) []string { return append([]string{program}, rest...) }
	const nobody = 65534

	o.untouched(func() {
		for name, got := range map[string]string{
			"not by libvirt":       o.as(0, "call", with("hook", handle)...),
			"another program":      o.as(0, "libvirtd", with("libvirtd", with(filepath.Join(o.programs, "other"), handle))...),
			"another libvirtd":     o.as(0, "libvirtd", with("other", with(filepath.Join(o.programs, "hook"), handle))...),
			"not the wrapper":      o.as(0, "call", with("other", redeem)...),
			"not the swtpm user":   o.as(nobody, "call", with("wrapper", redeem)...),
			"the hook as a nobody": o.as(nobody, "libvirtd", with("libvirtd", with(filepath.Join(o.programs, "hook"), handle))...),
		} {
			if !strings.HasPrefix(got, bus.ErrorRefused+" [policy-forbids: ") && !strings.HasPrefix(got, bus.ErrorAccessDenied) {
				t.Errorf("%s: %s", name, got)
			}
		}
		// There is no polkit here to ask.
		for _, m := range []string{"Adopt", "Release", "Repair", "Accept"} {
			if got := o.as(nobody, "call", "other", o.address, m, uuidA); !strings.HasPrefix(got, bus.ErrorAccessDenied) {
				t.Errorf("%s by nobody: %s", m, got)
			}
		}
	})

	if got := o.hook("prepare", f); got != "map[]" {
		t.Fatalf("libvirt's hook: %s", got)
	}
	o.mkdir(uuidA)
	if got := o.as(0, "call", with("wrapper", redeem)...); got != "keys key of 64 <nil> key of 64 <nil>" {
		t.Fatalf("the wrapper: %s", got)
	}
	testkit.Must[net.Listener](t)(net.Listen("unix", o.dir(uuidA)+".sock")) // for start
	if got := o.as(0, "call", with("wrapper", redeem)...); !strings.HasPrefix(got, bus.ErrorRefused+" [key-not-released: ") {
		t.Errorf("the wrapper again: %s", got)
	}
	for _, op := range []string{"start", "started", "stopped", "release", "attach", "reconnect", "something-new"} {
		if got := o.hook(op, f); got != "map[]" {
			t.Errorf("%s: %s", op, got)
		}
	}
	if got := o.hook("migrate", f); !strings.HasPrefix(got, bus.ErrorRefused+" [vm-elsewhere: ") {
		t.Errorf("migrate: %s", got)
	}
	// Readers cannot keep VMs from starting.
	for range cap(o.s.others) {
		o.s.others <- struct{}{}
	}
	if got := o.hook("prepare", f); got != "map[]" {
		t.Errorf("a hook behind readers: %s", got)
	}
}

// libvirt would run its own swtpm: the VM is refused, or in audit mode left alone.
func TestWrapperNotOnPath(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	f := o.vm(uuidA, true)
	c := &caller{cgroup: cgroup}
	xml := fmt.Sprintf(domainXML, f.Name, f.UUID, o.image(uuidA), "")
	h := func(path string) error { return o.s.hook(background, c, domain.OpPrepare, xml, path) }
	o.untouched(func() {
		refuses(t, h("/usr/bin:/bin"), reason.PolicyForbids)
		o.g.cfg.Mode = "audit"
		if err := h("/usr/bin:/bin"); err != nil {
			t.Error(err)
		}
	})
	if err := h(filepath.Join(o.programs, "bin")); err != nil {
		t.Error(err)
	}
	o.stop(f)
	if err := h("/usr/bin:/bin"); reason.As(err) == nil {
		t.Error("a guarded VM would get a swtpm without its keys:", err)
	}
}

func TestPanics(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	o.s.conn.ExportMethodTable(map[string]any{
		"Boom": func(sender dbus.Sender) *dbus.Error {
			return o.s.serve(sender, "Boom", reader, time.Second, func(context.Context, *caller) error { panic("boom\nboom") })
		},
	}, "/boom", "org.virttrust1.Boom")
	for range maxCalls + 1 { // it gives its slot back
		var e dbus.Error
		if err := o.call("/boom", "org.virttrust1.Boom.Boom").Err; !errors.As(err, &e) || e.Name != bus.ErrorFailed {
			t.Fatal(err)
		}
	}
	var n []dict
	if err := o.call(bus.Path, bus.ManagerInterface+".Log", uint32(1), dict{}).Store(&n); err != nil {
		t.Error("it does not live on:", err)
	}
	if !strings.Contains(o.logged(), "stack") {
		t.Error("the journal does not say where")
	}
}

func TestSignals(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	if err := o.conn.AddMatchSignal(dbus.WithMatchPathNamespace(bus.Path)); err != nil {
		t.Fatal(err)
	}
	ch := make(chan *dbus.Signal, 100)
	o.conn.Signal(ch)
	await := func(name string, path dbus.ObjectPath, sig string) *dbus.Signal {
		t.Helper()
		late := time.After(5 * time.Second)
		for {
			select {
			case s := <-ch:
				if s.Name != name || s.Path != path {
					continue
				}
				if got := dbus.SignatureOf(s.Body...).String(); got != sig {
					t.Errorf("%s has signature %s", name, got)
				}
				return s
			case <-late:
				t.Fatalf("no %s from %s", name, path)
			}
		}
	}
	const properties, objects = "org.freedesktop.DBus.Properties.PropertiesChanged", "org.freedesktop.DBus.ObjectManager."
	f := o.vm(uuidA, true)
	o.start(f)
	added := await(objects+"InterfacesAdded", bus.Path, "oa{sa{sv}}")
	if added.Body[0] != bus.VMPath(uuidA) {
		t.Error(added.Body)
	}
	await(properties, bus.Path, "sa{sv}as") // VMCount
	for {
		s := await(properties, bus.VMPath(uuidA), "sa{sv}as")
		if s.Body[1].(map[string]dbus.Variant)["State"].Value() == string(list.Running) {
			break
		}
	}
	o.stop(f)
	o.put(uuidA, []byte("garbage"))
	o.s.verdict(f, domain.OpPrepare, o.prepare(f), nil)
	if s := await(bus.ManagerInterface+".Refused", bus.Path, "sssss"); s.Body[0] != uuidA || s.Body[3] != string(reason.VTPMChanged) {
		t.Error(s.Body)
	}
	for {
		s := await(properties, bus.VMPath(uuidA), "sa{sv}as")
		if s.Body[1].(map[string]dbus.Variant)["LastReason"].Value() == string(reason.VTPMChanged) {
			break
		}
	}
	os.RemoveAll(filepath.Dir(o.dir(uuidA)))
	o.s.ended(background, uuidA, "the VM was undefined")
	if s := await(objects+"InterfacesRemoved", bus.Path, "oas"); s.Body[0] != bus.VMPath(uuidA) {
		t.Error(s.Body)
	}
}

func TestMethods(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	f := o.vm(uuidA, true)
	o.start(f)
	o.stop(f)
	const m = bus.ManagerInterface + "."
	var path dbus.ObjectPath
	for _, vm := range []string{uuidA, strings.ToUpper(uuidA), "vm-a"} {
		if err := o.call(bus.Path, m+"GetVM", vm).Store(&path); err != nil || path != bus.VMPath(uuidA) {
			t.Error(vm, path, err)
		}
	}
	var e dbus.Error
	if err := o.call(bus.Path, m+"GetVM", "none\nof\x1bthem").Err; !errors.As(err, &e) || e.Name != bus.ErrorNotFound || strings.ContainsAny(fmt.Sprint(e.Body), "\n\x1b") {
		t.Errorf("%v", err)
	}
	payload := testkit.Must[[]byte](t)(imagefile.ReadLabel(o.image(uuidA)))
	for want, p := range map[string][]byte{"right": payload, "other": append([]byte{1}, payload...)} {
		var got dict
		if err := o.call(bus.Path, m+"CheckLabel", p, dict{}).Store(&got); err != nil || got["verdict"].Value() != want {
			t.Errorf("%v, %v, want %s", got, err, want)
		}
	}
	var log []dict
	if err := o.call(bus.Path, m+"Log", uint32(1<<31), dict{}).Store(&log); err != nil || len(log) == 0 {
		t.Error(log, err)
	}
	// Without libvirt, an error; the wrong option, too.
	for _, v := range []string{"Check", "Adopt", "Release", "Accept", "Repair"} {
		if err := o.call(bus.Path, m+v, uuidA, dict{}).Err; !errors.As(err, &e) || e.Name != bus.ErrorFailed {
			t.Errorf("%s: %v", v, err)
		}
	}
	var done dict
	if err := o.call(bus.Path, m+"Repair", "", dict{}).Store(&done); err != nil || !strings.Contains(fmt.Sprint(done["what"]), "1 VMs") {
		t.Error(done, err)
	}
	// Garbage in every argument must do nothing but fail.
	o.untouched(func() {
		for name := range o.s.manager() {
			for _, args := range [][]any{{}, {"x"}, {uint32(7)}, {strings.Repeat("x", 1<<20), dict{}}, {"", "", "", "", dict{"path": dbus.MakeVariant(7)}}} {
				o.call(bus.Path, m+name, args...)
			}
		}
	})
	if err := o.conn.Object(bus.Name, bus.Path).Call("org.freedesktop.DBus.Peer.Ping", 0).Err; err != nil {
		t.Error("it does not live any more:", err)
	}
}

// A flood of denied wrappers must not drive what happened out of the log.
func TestDeniedFlood(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	o.s.programs.Wrapper = testkit.Must[string](t)(os.Executable())
	o.g.report(uuidA, "vm-a", "prepare", refused, reason.VTPMChanged, "remember this", "")
	for range 200 {
		if err := o.call(bus.Path, bus.ManagerInterface+".RedeemGrant", "swtpm", o.dir(uuidB), dict{}).Err; err == nil {
			t.Fatal("keys for nothing")
		}
	}
	if err := o.call(bus.Path, bus.ManagerInterface+".RedeemGrant", "swtpm", strings.Repeat("/x", 1<<20), dict{}).Err; err == nil {
		t.Fatal("keys for nothing")
	}
	if all := o.g.journal.recent(0); len(all) > 20 || all[0].What != "remember this" {
		t.Errorf("%d entries", len(all))
	}
}

// The watchdog is fed while the TPM hangs, and not while a lock does.
func TestWatchdog(t *testing.T) {
	o := openOffice(t)
	socket := filepath.Join(o.root, "notify")
	l := testkit.Must[*net.UnixConn](t)(net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"}))
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", socket)
	fed := func(within time.Duration) bool {
		l.SetReadDeadline(time.Now().Add(within))
		b := make([]byte, 100)
		n, err := l.Read(b)
		return err == nil && bytes.Contains(b[:n], []byte("WATCHDOG=1"))
	}
	ctx, cancel := context.WithCancel(background)
	defer cancel()
	go o.s.watchdog(ctx, 10*time.Millisecond)
	o.tpm.delay = time.Minute
	slow, stop := context.WithTimeout(ctx, time.Minute)
	defer stop()
	f := o.vm(uuidA, true)
	go o.g.Prepare(slow, f, cgroup, nil)
	for range 20 {
		if !fed(time.Second) {
			t.Fatal("a slow TPM gets virt-trustd killed")
		}
	}
	o.g.mu.Lock()
	for fed(50 * time.Millisecond) { // what was sent before
	}
	if fed(100 * time.Millisecond) {
		t.Error("a lock that does not come back goes unnoticed")
	}
	o.g.mu.Unlock()
	if !fed(time.Second) {
		t.Error("and does not come back")
	}
}

// BenchmarkHook is a hook call with 1,000 records. own-ms/op is its time
// without the decryption, for which the fake TPM stands in.
func BenchmarkHook(b *testing.B) {
	h := newHouse(b)
	f := h.vm(uuidA, true)
	h.start(f)
	h.stop(f)
	store := h.g.peek()
	var changes []liststore.Change
	for i := range 999 {
		r := store.Get(uuidA).Clone()
		r.UUID = fmt.Sprintf("dddddddd-0000-4000-8000-%012d", i)
		r.Instance, r.LabelPath = h.dir(r.UUID), h.image(r.UUID)
		r.Baseline = list.DigestOf([]byte(r.UUID))
		for j := range list.MaxHistory {
			r.Remember(list.DigestOf([]byte(fmt.Sprint(i, j))), 7)
		}
		changes = append(changes, liststore.Change{Put: r})
	}
	if err := store.Commit(changes...); err != nil {
		b.Fatal(err)
	}
	xml := fmt.Sprintf(domainXML, f.Name, f.UUID, h.image(uuidA), "")
	s := &Service{g: h.g, log: h.g.log, signals: make(chan func(), 1024), known: map[string]bool{}}
	s.wasReady.Store(true) // there is no TPM behind it to ask
	s.programs.Wrapper = filepath.Join(h.root, "bin", "swtpm")
	os.Mkdir(filepath.Dir(s.programs.Wrapper), 0o755)
	os.WriteFile(s.programs.Wrapper, nil, 0o755)
	wrapped := h.g.peek().Get(uuidA).WrappedKeys
	var tpm time.Duration
	for b.Loop() {
		began := time.Now()
		if _, err := h.tpm.UnwrapKeys(background, wrapped); err != nil {
			b.Fatal(err)
		}
		tpm += time.Since(began)
		if err := s.hook(background, libvirts(), domain.OpPrepare, xml, filepath.Dir(s.programs.Wrapper)); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		h.stop(f)
		b.StartTimer()
	}
	// The TPM was asked twice: once to know how long it takes.
	b.ReportMetric((b.Elapsed()-2*tpm).Seconds()*1000/float64(b.N), "own-ms/op")
}
