package lab

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

// VM says what a guest is to be like. The zero value but for its name is a VM
// without a vTPM and without a disk.
type VM struct {
	Name string
	UUID string // random if empty

	TPM             bool
	TPMVersion      string // "2.0" if empty
	PersistentState bool   // persistent_state='yes'
	Secret          string // UUID of a libvirt secret, for libvirt's own <encryption>
	Bank            string // the vTPM's one active PCR bank, "" for what swtpm_setup activates

	Firmware  string // "seabios" if empty, "ovmf"
	Disk      string // "" for none, "qcow2", "raw", "volume" (qcow2 in the pool "default")
	DiskPath  string // an existing image instead of a new one
	Shared    bool   // the disk lies in /share (HostOptions.Share), for two hosts to reach
	Transient bool   // made by virsh create at each Start
	Do        string // commands for the guest at each boot, "seal:TEXT,unseal"
	Devices   string // more XML for <devices>
}

// Guest is a VM of a host.
type Guest struct {
	VM
	h    *Host
	read int // of the console's log, up to the end of what was last waited for
	conn net.Conn
}

// Mask is how a guest's text lies in its vTPM: what to search a disk for.
func Mask(text string) []byte {
	out := []byte(text)
	for i := range out {
		out[i] ^= 0xa5
	}
	return out
}

// NewVM makes a VM's disk and defines the VM, or keeps its XML for Start if it
// is transient.
func (h *Host) NewVM(vm VM) *Guest {
	h.t.Helper()
	if vm.UUID == "" {
		vm.UUID = randomUUID()
	}
	if vm.Disk != "" && vm.DiskPath == "" {
		vm.DiskPath = h.newDisk(vm)
	}
	g := &Guest{VM: vm, h: h}
	h.WriteFile(g.xmlPath(), []byte(vm.xml()), 0o644)
	if !vm.Transient {
		h.Must("virsh", "define", g.xmlPath())
	}
	return g
}

// Guest is a VM that something else than NewVM has made.
func (h *Host) Guest(vm VM) *Guest { return &Guest{VM: vm, h: h} }

// In is the same guest for a subtest, or on another host.
func (g *Guest) In(h *Host) *Guest {
	there := &Guest{VM: g.VM, h: h}
	there.read = len(there.Console())
	return there
}

func (h *Host) newDisk(vm VM) string {
	h.t.Helper()
	if vm.Disk == "volume" {
		h.Shell("virsh -q pool-info default >/dev/null 2>&1 || { virsh -q pool-define-as default dir --target /var/lib/libvirt/images; virsh -q pool-start default; }")
		h.Must("virsh", "vol-create-as", "default", vm.Name+".qcow2", "64M", "--format", "qcow2")
		return "/var/lib/libvirt/images/" + vm.Name + ".qcow2"
	}
	dir := "/var/lib/libvirt/images/"
	if vm.Shared {
		dir = "/share/"
	}
	path := dir + vm.Name + "." + vm.Disk
	h.Must("qemu-img", "create", "-q", "-f", vm.Disk, path, "64M")
	return path
}

func (g *Guest) xmlPath() string { return labDir + "/" + g.Name + ".xml" }

func (vm VM) consolePath() string { return labDir + "/console/" + vm.Name + ".log" }

func (vm VM) socketPath() string { return "/run/vt-" + vm.Name + ".sock" }

// xml is the VM as virsh define takes it.
func (vm VM) xml() string {
	var x strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&x, format+"\n", args...) }
	p("<domain type='qemu'>")
	p("  <name>%s</name>", escape(vm.Name))
	p("  <uuid>%s</uuid>", vm.UUID)
	p("  <memory unit='MiB'>256</memory>")
	p("  <vcpu>1</vcpu>")
	p("  <os>")
	p("    <type arch='x86_64' machine='q35'>hvm</type>")
	if vm.Firmware == "ovmf" {
		p("    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>")
		p("    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'/>")
	}
	p("    <kernel>%s/vmlinuz</kernel>", labDir)
	p("    <initrd>%s/initrd</initrd>", labDir)
	p("    <cmdline>console=ttyS0 quiet panic=-1 vt.do=%s</cmdline>", escape(vm.Do))
	p("  </os>")
	p("  <features><acpi/><apic/></features>")
	p("  <cpu mode='maximum'/>")
	p("  <on_crash>destroy</on_crash>")
	p("  <devices>")
	if vm.Disk != "" {
		format := vm.Disk
		if vm.Disk == "volume" {
			format = "qcow2"
			p("    <disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>")
			p("      <source pool='default' volume='%s.qcow2'/>", escape(vm.Name))
		} else {
			p("    <disk type='file' device='disk'><driver name='qemu' type='%s'/>", format)
			p("      <source file='%s'/>", escape(vm.DiskPath))
		}
		p("      <target dev='vda' bus='virtio'/></disk>")
	}
	p("    <serial type='unix'><source mode='bind' path='%s'/>", escape(vm.socketPath()))
	p("      <log file='%s' append='on'/><target port='0'/></serial>", escape(vm.consolePath()))
	if vm.TPM {
		version, persistent := vm.TPMVersion, ""
		if version == "" {
			version = "2.0"
		}
		if vm.PersistentState {
			persistent = " persistent_state='yes'"
		}
		model := "tpm-crb"
		if version == "1.2" {
			model = "tpm-tis"
		}
		p("    <tpm model='%s'><backend type='emulator' version='%s'%s>", model, version, persistent)
		if vm.Secret != "" {
			p("      <encryption secret='%s'/>", vm.Secret)
		}
		if vm.Bank != "" {
			p("      <active_pcr_banks><%s/></active_pcr_banks>", vm.Bank)
		}
		p("    </backend></tpm>")
	}
	p("    <memballoon model='none'/>")
	if vm.Devices != "" {
		p("%s", vm.Devices)
	}
	p("  </devices>")
	p("</domain>")
	return x.String()
}

func escape(s string) string {
	var b bytes.Buffer
	xml.EscapeText(&b, []byte(s))
	return b.String()
}

// TryStart is virsh start, or virsh create for a transient VM.
func (g *Guest) TryStart() Result {
	g.h.t.Helper()
	if g.Transient {
		return g.h.Run("virsh", "create", g.xmlPath())
	}
	return g.h.Run("virsh", "start", g.Name)
}

// Start starts the VM and waits until it obeys.
func (g *Guest) Start() {
	g.h.t.Helper()
	g.read = len(g.Console())
	if r := g.TryStart(); r.Code != 0 {
		g.h.t.Fatalf("virsh start %s: exit %d\n%s%s", g.Name, r.Code, r.Stdout, r.Stderr)
	}
	g.Expect("VT: ready")
}

// Destroy is virsh destroy: the power switch.
func (g *Guest) Destroy() {
	g.h.t.Helper()
	g.h.Must("virsh", "destroy", g.Name)
}

// Shutdown presses the power button and waits until the VM is off.
func (g *Guest) Shutdown() {
	g.h.t.Helper()
	g.h.Must("virsh", "shutdown", g.Name)
	g.WaitState("shut off")
}

// TakenUp waits until a libvirtd that was started anew has connected to every
// running VM again. Before that a destroy kills QEMU under libvirt's own
// reconnect and is told "domain is not running": plain libvirt does so too. A
// monitor command has to wait for the reconnect, which holds the VM's job.
func (h *Host) TakenUp() {
	h.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); h.Run("virsh", "list").Code != 0; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.t.Fatalf("%s: libvirtd does not answer", h.opts.Name)
		}
	}
	for _, name := range strings.Fields(h.Must("virsh", "list", "--name")) {
		h.Must("virsh", "qemu-monitor-command", name, `{"execute":"query-status"}`)
	}
}

// Undefine removes the VM, with its vTPM as libvirt has it by default.
func (g *Guest) Undefine(flags ...string) {
	g.h.t.Helper()
	g.h.Must(append([]string{"virsh", "undefine", g.Name, "--nvram"}, flags...)...)
}

// State is what virsh domstate says, "" for a VM that there is not.
func (g *Guest) State() string {
	return strings.TrimSpace(g.h.Run("virsh", "domstate", g.Name).Stdout)
}

// WaitState waits until State is the one given ("" for gone).
func (g *Guest) WaitState(state string) {
	g.h.t.Helper()
	last := ""
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if last = g.State(); last == state {
			return
		}
	}
	g.h.t.Fatalf("%s is %q, not %q, after 30 s", g.Name, last, state)
}

// StateDir is the folder of the vTPM's state.
func (g *Guest) StateDir() string {
	dir := "/tpm2"
	if g.TPMVersion == "1.2" {
		dir = "/tpm1.2"
	}
	return "/var/lib/libvirt/swtpm/" + g.UUID + dir
}

// Console is all that the guest has ever written.
func (g *Guest) Console() string {
	b, _ := os.ReadFile(g.h.Path(g.consolePath()))
	return string(b)
}

// Expect waits up to 60 s for text that the guest writes after what was last
// expected of it, and gives the rest of the line.
func (g *Guest) Expect(text string) string {
	g.h.t.Helper()
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		console := g.Console()
		if len(console) < g.read {
			g.read = 0 // a new log
		}
		_, after, found := strings.Cut(console[g.read:], text)
		if !found {
			continue
		}
		line, _, whole := strings.Cut(after, "\n")
		if !whole {
			continue
		}
		g.read = len(console) - len(after) + len(line) + 1
		return strings.TrimSpace(line)
	}
	g.h.t.Fatalf("%s did not say %q within 60 s; its console since:\n%s", g.Name, text, g.Console()[g.read:])
	return ""
}

// Ask types a command on the guest's console and gives its answer, the line
// after "VT: ".
func (g *Guest) Ask(command string) string {
	g.h.t.Helper()
	g.read = len(g.Console())
	g.Say(command)
	return g.Expect("VT: ")
}

// Say types a command on the guest's console.
func (g *Guest) Say(command string) {
	g.h.t.Helper()
	var err error
	for range 50 {
		if g.conn == nil {
			if g.conn, err = net.Dial("unix", g.h.Path(g.socketPath())); err != nil {
				g.conn = nil
				time.Sleep(50 * time.Millisecond)
				continue
			}
			go io.Copy(io.Discard, g.conn) // the log has it
		}
		if _, err = io.WriteString(g.conn, command+"\n"); err == nil {
			return
		}
		g.conn.Close()
		g.conn = nil
	}
	g.h.t.Fatalf("cannot type on the console of %s: %v", g.Name, err)
}
