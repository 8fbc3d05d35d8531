// Package bustest gives tests a system bus of their own, with a virt-trustd on
// it that says what the test tells it to say.
package bustest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus"
	"virt-trust/internal/testkit"
)

// Open configures a bus on which all may do all.
const Open = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="false"/>
    <allow receive_sender="*"/>
    <allow own="*"/>
    <allow user="*"/>
  </policy>
</busconfig>
`

// System configures a bus with what matters of /usr/share/dbus-1/system.conf, and
// a policy and services in dir.
func System(dir, policy string) string { return fmt.Sprintf(system, dir, policy) }

const system = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
  </policy>
  <include>%[1]s/%[2]s</include>
  <servicedir>%[1]s</servicedir>
</busconfig>`

// Start runs a bus on which all may do all, and makes it the system bus of this
// process and its children.
func Start(t testing.TB) {
	t.Helper()
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", Run(t, testkit.Folder(t), Open))
}

// Run runs a dbus-daemon with its socket and its configuration in dir, which every
// user may enter. The configuration has no <listen>.
func Run(t testing.TB, dir, config string) (address string) {
	t.Helper()
	socket, file := filepath.Join(dir, "bus"), filepath.Join(dir, "bus.conf")
	address = "unix:path=" + socket
	config = strings.Replace(config, "<busconfig>", "<busconfig><listen>"+address+"</listen>", 1)
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(testkit.Need(t, "dbus-daemon"), "--nofork", "--nopidfile", "--nosyslog", "--config-file="+file)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	var words strings.Builder
	cmd.Stdout, cmd.Stderr = &words, &words
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(func() { cmd.Process.Kill(); cmd.Wait() })
	t.Cleanup(stop)
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if conn, err := net.Dial("unix", socket); err == nil {
			conn.Close()
			return address
		}
	}
	stop()
	t.Fatalf("dbus-daemon does not come up: %s", words.String())
	return ""
}

// Manager is the fake virt-trustd. A nil function is a method that is not there.
type Manager struct {
	HandleHook  func(sender dbus.Sender, op, subOp, extra, xml string, options map[string]dbus.Variant) (map[string]dbus.Variant, *dbus.Error)
	RedeemGrant func(sender dbus.Sender, program, statePath string, options map[string]dbus.Variant) (string, []dbus.Variant, *dbus.Error)
}

// Serve puts a Manager on the bus that Start made and gives its connection.
func Serve(t testing.TB, m Manager) *dbus.Conn {
	t.Helper()
	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	methods := map[string]any{}
	if m.HandleHook != nil {
		methods["HandleHook"] = m.HandleHook
	}
	if m.RedeemGrant != nil {
		methods["RedeemGrant"] = m.RedeemGrant
	}
	if err := conn.ExportMethodTable(methods, bus.Path, bus.ManagerInterface); err != nil {
		t.Fatal(err)
	}
	if r, err := conn.RequestName(bus.Name, dbus.NameFlagDoNotQueue); err != nil || r != dbus.RequestNameReplyPrimaryOwner {
		t.Fatalf("name: %v, %v", r, err)
	}
	return conn
}

// Refused is the error of a refusal.
func Refused(text string) *dbus.Error { return dbus.NewError(bus.ErrorRefused, []any{text}) }

// Build compiles a main package of this module, with journald's socket at
// journal if that is not "".
func Build(t testing.TB, pkg, out, journal string) {
	t.Helper()
	args := []string{"build", "-o", out}
	if journal != "" {
		args = append(args, "-ldflags", "-X github.com/coreos/go-systemd/v22/journal.journalSocket="+journal)
	}
	cmd := exec.Command("go", append(args, pkg)...)
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
}
