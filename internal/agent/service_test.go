package agent

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	contract "virt-trust/dbus"
	"virt-trust/internal/bus"
	"virt-trust/internal/bus/bustest"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/ca"
)

// onBus gives the agent of a machine on a bus of its own, and a caller.
func onBus(t *testing.T, a *Agent) *dbus.Conn {
	t.Helper()
	bustest.Start(t)
	conn := testkit.Must[*dbus.Conn](t)(dbus.ConnectSystemBus())
	t.Cleanup(func() { conn.Close() })
	s := &service{conn: conn, agent: a, version: "1", log: quiet(), slots: make(chan struct{}, maxCalls)}
	a.changed = s.changed
	if err := s.export(); err != nil {
		t.Fatal(err)
	}
	caller := testkit.Must[*dbus.Conn](t)(dbus.ConnectSystemBus())
	t.Cleanup(func() { caller.Close() })
	return caller
}

func TestService(t *testing.T) {
	m := newMachine(t, "a")
	v := newVerifier(t)
	a := newTestAgent(t, m, "")
	conn := onBus(t, a)
	object := conn.Object(bus.AgentName, bus.AgentPath)
	signals := make(chan *dbus.Signal, 100)
	conn.Signal(signals)
	if err := conn.AddMatchSignal(dbus.WithMatchObjectPath(bus.AgentPath)); err != nil {
		t.Fatal(err)
	}
	get := func(name string) any {
		t.Helper()
		v, err := object.GetProperty(bus.AgentInterface + "." + name)
		if err != nil {
			t.Fatal(err)
		}
		return v.Value()
	}
	if s := get("State"); s != NotEnrolled {
		t.Errorf("%v", s)
	}
	var result dict
	call := object.Call(bus.AgentInterface+".Enroll", 0, v.url(), dict{"token": dbus.MakeVariant(v.token("", time.Hour)), "name": dbus.MakeVariant("host-on-bus")})
	if err := call.Store(&result); err != nil {
		t.Fatal(err)
	}
	if result["state"].Value() != Active || result["name"].Value() != "host-on-bus" || result["node"].Value() != get("Node") || get("Verifier") != v.url() {
		t.Errorf("%v", result)
	}
	for told := false; !told; {
		select {
		case s := <-signals:
			told = s.Name == "org.freedesktop.DBus.Properties.PropertiesChanged"
		case <-time.After(5 * time.Second):
			t.Fatal("nobody is told of a change")
		}
	}
	// A Verifier's refusal comes through with its code.
	err := object.Call(bus.AgentInterface+".Enroll", 0, v.url(), dict{"token": dbus.MakeVariant(v.token("", time.Hour)), "name": dbus.MakeVariant("other")}).Err
	var e dbus.Error
	if !errors.As(err, &e) || e.Name != bus.ErrorFailed || !strings.Contains(e.Error(), string(ca.EKKnown)) {
		t.Errorf("%v", err)
	}
	if get("Name") != "host-on-bus" {
		t.Error("a refused enrolment changed what the host belongs to")
	}
	if err := object.SetProperty(bus.AgentInterface+".State", dbus.MakeVariant("x")); err == nil {
		t.Error("a property was set")
	}
	if os.Getuid() == 0 {
		c := exec.Command("busctl", "--address="+os.Getenv("DBUS_SYSTEM_BUS_ADDRESS"), "call", bus.AgentName, string(bus.AgentPath), bus.AgentInterface, "Leave", "a{sv}", "0")
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if out, err := c.CombinedOutput(); err == nil || !bytes.Contains(out, []byte("ccess denied")) {
			t.Errorf("somebody else: %s, %v", out, err)
		}
	}
	for _, args := range [][]any{{}, {"x"}, {uint32(7)}, {strings.Repeat("x", 1<<20), dict{}}, {"", dict{"token": dbus.MakeVariant(7)}}} {
		if err := object.Call(bus.AgentInterface+".Enroll", 0, args...).Err; err == nil {
			t.Errorf("%v is taken", len(args))
		}
	}
	if err := object.Call(bus.AgentInterface+".Leave", 0, dict{}).Err; err != nil || get("State") != NotEnrolled {
		t.Error(err)
	}
}

// What the agent says of itself is the contract, and is what it has.
func TestContract(t *testing.T) {
	a := &Agent{dir: testkit.Folder(t), log: quiet(), wake: make(chan struct{}, 1), changed: func(Status) {}}
	conn := onBus(t, a)
	var text string
	if err := conn.Object(bus.AgentName, bus.AgentPath).Call("org.freedesktop.DBus.Introspectable.Introspect", 0).Store(&text); err != nil {
		t.Fatal(err)
	}
	type arg struct {
		Name      string `xml:"name,attr"`
		Type      string `xml:"type,attr"`
		Direction string `xml:"direction,attr"`
	}
	type iface struct {
		Name    string `xml:"name,attr"`
		Methods []struct {
			Name string `xml:"name,attr"`
			Args []arg  `xml:"arg"`
		} `xml:"method"`
		Properties []arg `xml:"property"`
	}
	var live, written struct {
		Interfaces []iface `xml:"interface"`
	}
	if err := errors.Join(xml.Unmarshal([]byte(text), &live), xml.Unmarshal([]byte(contract.AgentXML), &written)); err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(live.Interfaces, func(i iface) bool { return i.Name == bus.AgentInterface })
	if i < 0 || !reflect.DeepEqual(live.Interfaces[i], written.Interfaces[0]) {
		t.Fatalf("%s", text)
	}
	s := &service{agent: a, version: "1"}
	methods := s.methods()
	for _, m := range written.Interfaces[0].Methods {
		f := reflect.TypeOf(methods[m.Name])
		if f == nil {
			t.Errorf("there is no method %s", m.Name)
			continue
		}
		var in, out string
		for i := range f.NumIn() {
			if f.In(i) != reflect.TypeFor[dbus.Sender]() {
				in += dbus.SignatureOfType(f.In(i)).String()
			}
		}
		for i := range f.NumOut() - 1 {
			out += dbus.SignatureOfType(f.Out(i)).String()
		}
		var wantIn, wantOut string
		for _, a := range m.Args {
			if a.Direction == "in" {
				wantIn += a.Type
			} else {
				wantOut += a.Type
			}
		}
		if in != wantIn || out != wantOut {
			t.Errorf("%s: (%s) → (%s), the contract says (%s) → (%s)", m.Name, in, out, wantIn, wantOut)
		}
		delete(methods, m.Name)
	}
	if len(methods) > 0 {
		t.Errorf("not in the contract: %v", slices.Collect(maps.Keys(methods)))
	}
	have := s.properties()
	for _, p := range written.Interfaces[0].Properties {
		if v, ok := have[p.Name]; !ok || v.Signature().String() != p.Type {
			t.Errorf("property %s is %v, of type %s", p.Name, v, p.Type)
		}
		delete(have, p.Name)
	}
	if len(have) > 0 {
		t.Errorf("not in the contract: %v", have)
	}
}

// A panic in a method is an error of that call.
func TestPanic(t *testing.T) {
	s := &service{log: quiet(), slots: make(chan struct{}, 1)}
	s.log.Logger.Out = io.Discard
	for range 3 {
		if derr := s.serve("", "X", false, time.Second, func(context.Context) error { panic("bug") }); derr == nil || derr.Name != bus.ErrorFailed {
			t.Errorf("%v", derr)
		}
	}
}
