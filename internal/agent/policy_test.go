package agent

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus"
	"virt-trust/internal/bus/bustest"
	"virt-trust/internal/testkit"
)

// The packaged bus policy, with users and a group that every Debian has: daemon is
// virt-trust-agent, games is the group virt-trust.
func TestBusPolicy(t *testing.T) {
	testkit.Need(t, "dbus-daemon", "busctl")
	testkit.Root(t) // several users have to ask
	policy := testkit.Must[[]byte](t)(os.ReadFile("../../dbus/org.virttrust1.Agent.conf"))
	text := strings.NewReplacer(`user="virt-trust-agent"`, `user="daemon"`, `group="virt-trust"`, `group="games"`).Replace(string(policy))
	dir := testkit.Folder(t)
	for name, b := range map[string]string{"agent.conf": text,
		"org.virttrust1.Agent.service": "[D-BUS Service]\nName=org.virttrust1.Agent\nExec=/bin/false\nUser=daemon\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(b), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	address := bustest.Run(t, dir, bustest.System(dir, "agent.conf"))
	conn := testkit.Must[*dbus.Conn](t)(dbus.Connect(address))
	defer conn.Close()
	if r, err := conn.RequestName(bus.AgentName, dbus.NameFlagDoNotQueue); err == nil {
		t.Errorf("root owns the agent's name: %v", r)
	}
	as := func(uid, gid uint32, args ...string) string {
		c := exec.Command("busctl", append([]string{"--address=" + address, "--timeout=2"}, args...)...)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
		out, err := c.CombinedOutput()
		return fmt.Sprintf("%s %v", bytes.TrimSpace(out), err)
	}
	games := testkit.Must[*user.Group](t)(user.LookupGroup("games"))
	gid := testkit.Must[uint64](t)(strconv.ParseUint(games.Gid, 10, 32))
	call := func(iface, member string, args ...string) []string {
		return append([]string{"call", bus.AgentName, string(bus.AgentPath), iface, member}, args...)
	}
	enroll := call(bus.AgentInterface, "Enroll", "sa{sv}", "https://x", "0")
	get := call("org.freedesktop.DBus.Properties", "GetAll", "s", bus.AgentInterface)
	// Who is let through hears that the agent does not start here; the others that
	// they may not.
	for _, c := range []struct {
		who      string
		uid, gid uint32
		args     []string
		may      bool
	}{
		{"nobody", 65534, 65534, get, false}, {"nobody", 65534, 65534, enroll, false},
		{"a member", 65534, uint32(gid), get, true}, {"a member", 65534, uint32(gid), enroll, false},
		{"root", 0, 0, get, true}, {"root", 0, 0, enroll, true},
	} {
		out := as(c.uid, c.gid, c.args...)
		denied := strings.Contains(out, "ccess denied") || strings.Contains(out, "Rejected send message")
		if denied == c.may {
			t.Errorf("%s, %s: %s", c.who, c.args[4], out)
		}
	}
}
