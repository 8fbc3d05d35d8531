package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus"
	"virt-trust/internal/bus/bustest"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/reason"
)

// standIn is a group that every Debian has; on the private bus it stands for
// virt-trust, which exists only where the package is installed.
const standIn = "games"

// standInAgent likewise stands for the user virt-trust-agent.
const standInAgent = "daemon"

// startBus runs a dbus-daemon with the rules of Debian's system bus and the
// packaged policy, and makes it the system bus of this test.
func startBus(t *testing.T) (address string) {
	t.Helper()
	return startBusFor(t, standInAgent)
}

// startBusFor is startBus with another user in place of virt-trust-agent.
func startBusFor(t *testing.T, agent string) (address string) {
	t.Helper()
	policy, err := os.ReadFile("../../dbus/org.virttrust1.conf")
	if err != nil {
		t.Fatal(err)
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer(`group="virt-trust"`, `group="`+standIn+`"`, `user="root"`, `user="`+me.Username+`"`, `user="virt-trust-agent"`, `user="`+agent+`"`).Replace(string(policy))

	dir := testkit.Folder(t)
	write(t, filepath.Join(dir, "org.virttrust1.conf"), text)
	address = bustest.Run(t, dir, bustest.System(dir, "org.virttrust1.conf"))
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
	return address
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// fake is a virt-trustd that says what it is told to. Its methods are those of
// org.virttrust1.xml.
type fake struct {
	emulators     []map[string]any
	conn          *dbus.Conn
	manager, host map[string]any
	vms           []map[string]any
	check         map[string]map[string]any // by VM
	refuse        map[string]*reason.Refusal
	methods       map[string]any // more of them
	attestation   map[string]any

	mu        sync.Mutex // of what follows: each call has its goroutine
	label     map[string]any
	decisions []map[string]any
	calls     []string // of what changes something: "Method VM option"
}

// called gives the calls since it was asked last.
func (f *fake) called() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.calls
	f.calls = nil
	return c
}

// decide adds a decision.
func (f *fake) decide(d map[string]any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.decisions = append(f.decisions, d)
}

func newFake() *fake {
	return &fake{
		manager: map[string]any{
			"Version": "0.1.0", "Mode": "enforce", "ListState": "readable", "ListProblem": "",
			"ListGeneration": uint64(12), "VMCount": uint32(2), "LibvirtState": "active",
		},
		host: map[string]any{
			"State": "ready", "Problem": "", "Device": "/dev/tpmrm0", "Manufacturer": "IBM", "PCRBank": "sha256",
			"PCRSelection": []uint32{0, 2, 4, 7}, "DifferingPCRs": []uint32{}, "BindKeyName": "000baa",
			"BindKeyPublic": "-----BEGIN PUBLIC KEY-----\n", "AKName": "000bbb", "AKPublic": "",
		},
		vms: []map[string]any{
			{
				"UUID": web, "Name": "web", "State": "stored", "StatePath": "/var/lib/libvirt/swtpm/" + web + "/tpm2",
				"LabelPath": "/srv/web.qcow2", "LabelState": "right", "LabelID": "0011", "KeyOwner": "virt-trust", "Baseline": "ab",
				"Generation": uint64(3), "Created": uint64(1700000000000000), "Changed": uint64(1700000001000000),
				"LastVerdict": "refuse", "LastReason": "vtpm-rolled-back", "LastWhat": "the vTPM state is an older one of this VM",
			},
			{
				"UUID": bad, "Name": "bad\x1b[31m\tname", "State": "running", "StatePath": "/x", "LabelPath": "", "LabelState": "none",
				"LabelID": "", "KeyOwner": "virt-trust", "Baseline": "", "Generation": uint64(1), "Created": uint64(0), "Changed": uint64(0),
				"LastVerdict": "allow", "LastReason": "", "LastWhat": "",
			},
		},
		check: map[string]map[string]any{
			web: {"verdict": "refuse", "reason": "vtpm-rolled-back", "what": "older", "mend": "'virt-trust repair web'", "uuid": web, "name": "web"},
			bad: {"verdict": "start", "reason": "", "what": "", "mend": "", "uuid": bad, "name": "bad"},
		},
		refuse: map[string]*reason.Refusal{},
		label:  map[string]any{"verdict": "right", "what": "the label of VM web"},
	}
}

const (
	web  = "11111111-1111-1111-1111-111111111111"
	bad  = "22222222-2222-2222-2222-222222222222"
	lone = "33333333-3333-3333-3333-333333333333"
)

func variants(m map[string]any) map[string]dbus.Variant {
	v := map[string]dbus.Variant{}
	for k, x := range m {
		v[k] = dbus.MakeVariant(x)
	}
	return v
}

func (f *fake) serve(t *testing.T, address string) {
	t.Helper()
	conn, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	f.conn = conn
	fail := func(name, text string) *dbus.Error { return dbus.NewError(name, []any{text}) }
	change := func(method string) any {
		return func(vm string, options map[string]dbus.Variant) (map[string]dbus.Variant, *dbus.Error) {
			f.mu.Lock()
			f.calls = append(f.calls, strings.TrimSpace(fmt.Sprint(method, " ", vm, " ", strings.Trim(fmt.Sprint(options), "map[]"))))
			f.mu.Unlock()
			if r := f.refuse[vm]; r != nil {
				return nil, fail(bus.ErrorRefused, r.Error())
			}
			if vm != "" && f.find(vm) == nil && vm != lone {
				return nil, fail(bus.ErrorNotFound, vm)
			}
			return variants(map[string]any{"uuid": vm, "name": "web", "what": strings.ToLower(method) + " done"}), nil
		}
	}
	manager := map[string]any{
		"HandleHook": func(_, _, _, _ string, _ map[string]dbus.Variant) (map[string]dbus.Variant, *dbus.Error) {
			return nil, nil
		},
		"RedeemGrant": func(program, _ string, _ map[string]dbus.Variant) (string, []dbus.Variant, *dbus.Error) {
			f, err := os.Open("/dev/null")
			if err != nil {
				return "", nil, dbus.MakeFailedError(err)
			}
			fd := dbus.MakeVariant(dbus.UnixFD(f.Fd()))
			return "keys", []dbus.Variant{fd, fd}, nil
		},
		"GetVM": func(vm string) (dbus.ObjectPath, *dbus.Error) {
			if v := f.find(vm); v != nil {
				return bus.VMPath(v["UUID"].(string)), nil
			}
			return "", fail(bus.ErrorNotFound, vm)
		},
		"Check": func(vm string, _ map[string]dbus.Variant) (map[string]dbus.Variant, *dbus.Error) {
			if v := f.find(vm); v != nil {
				vm = v["UUID"].(string)
			}
			if c := f.check[vm]; c != nil {
				return variants(c), nil
			}
			return nil, fail(bus.ErrorNotFound, vm)
		},
		"Log": func(limit uint32, _ map[string]dbus.Variant) ([]map[string]dbus.Variant, *dbus.Error) {
			out := []map[string]dbus.Variant{}
			f.mu.Lock()
			defer f.mu.Unlock()
			for _, d := range f.decisions[max(0, len(f.decisions)-int(limit)):] {
				out = append(out, variants(d))
			}
			return out, nil
		},
		"Emulators": func(map[string]dbus.Variant) ([]map[string]dbus.Variant, *dbus.Error) {
			out := []map[string]dbus.Variant{}
			for _, e := range f.emulators {
				out = append(out, variants(e))
			}
			return out, nil
		},
		"CheckLabel": func([]byte, map[string]dbus.Variant) (map[string]dbus.Variant, *dbus.Error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			return variants(f.label), nil
		},
	}
	for _, m := range []string{"Adopt", "Release", "Repair", "Accept", "AdoptEmulator", "RestoreEmulator", "IssueEKCertificate"} {
		manager[m] = change(m)
	}
	maps.Copy(manager, f.methods)
	getAll := func(msg dbus.Message, iface string) (map[string]dbus.Variant, *dbus.Error) {
		switch iface {
		case bus.ManagerInterface:
			return variants(f.manager), nil
		case bus.HostInterface:
			return variants(f.host), nil
		}
		path := msg.Headers[dbus.FieldPath].Value().(dbus.ObjectPath)
		for _, vm := range f.vms {
			if bus.VMPath(vm["UUID"].(string)) == path {
				return variants(vm), nil
			}
		}
		return nil, fail("org.freedesktop.DBus.Error.UnknownObject", "")
	}
	nothing := func(dbus.Message) *dbus.Error { return nil }
	for _, err := range []error{
		conn.ExportMethodTable(manager, bus.Path, bus.ManagerInterface),
		conn.ExportMethodTable(f.attestation, bus.HostPath, bus.AttestationInterface),
		conn.ExportSubtreeMethodTable(map[string]any{"GetAll": getAll, "Get": nothing, "Set": nothing}, bus.Path, "org.freedesktop.DBus.Properties"),
		conn.ExportMethodTable(map[string]any{"GetManagedObjects": f.managed}, bus.Path, "org.freedesktop.DBus.ObjectManager"),
		conn.ExportMethodTable(map[string]any{"Introspect": nothing}, bus.Path, "org.freedesktop.DBus.Introspectable"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if r, err := conn.RequestName(bus.Name, dbus.NameFlagDoNotQueue); err != nil || r != dbus.RequestNameReplyPrimaryOwner {
		t.Fatalf("owning %s: %v, %v", bus.Name, r, err)
	}
}

func (f *fake) find(vm string) map[string]any {
	for _, v := range f.vms {
		if v["UUID"] == vm || v["Name"] == vm {
			return v
		}
	}
	return nil
}

func (f *fake) managed() (map[dbus.ObjectPath]map[string]map[string]dbus.Variant, *dbus.Error) {
	out := map[dbus.ObjectPath]map[string]map[string]dbus.Variant{
		bus.HostPath: {bus.HostInterface: variants(f.host)},
	}
	for _, vm := range f.vms {
		out[bus.VMPath(vm["UUID"].(string))] = map[string]map[string]dbus.Variant{bus.VMInterface: variants(vm)}
	}
	return out, nil
}

// run runs virt-trust and gives what it wrote and its exit code.
func run(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	conf := filepath.Join(t.TempDir(), "virt-trustd.toml")
	root := filepath.Join(t.TempDir(), "swtpm")
	for _, uuid := range []string{web, lone, "not-a-uuid"} {
		if err := os.MkdirAll(filepath.Join(root, uuid, "tpm2"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, conf, "[swtpm]\nstate_root = \""+root+"\"\n")
	var out, errs bytes.Buffer
	c := &Command{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs, Args: args, Version: "0.1.0", ConfigPath: conf}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	code = c.Run(ctx)
	return out.String(), errs.String(), code
}

func decode[T any](t *testing.T, s string) T {
	t.Helper()
	var v T
	dec := json.NewDecoder(strings.NewReader(s))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%v in %q", err, s)
	}
	return v
}
