package bus

import (
	"context"

	"github.com/godbus/dbus/v5"
)

// The names of virt-trust-agent's side (virt-trust-agent(8)).
const (
	AgentName      = "org.virttrust1.Agent"
	AgentPath      = dbus.ObjectPath("/org/virttrust1/agent")
	AgentInterface = "org.virttrust1.Agent"
)

// Agent calls a method of virt-trust-agent and stores its results in out. Errors:
// ErrAccessDenied; others as they are.
func (c *Client) Agent(ctx context.Context, method string, args []any, out ...any) error {
	call := c.conn.Object(AgentName, AgentPath).CallWithContext(ctx, method, 0, args...)
	if call.Err != nil {
		return MapError(call.Err)
	}
	if len(out) == 0 {
		return nil
	}
	return call.Store(out...)
}
