package bus

import (
	"context"
	"fmt"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/vtpm/reason"
)

// The names of virt-trust-agent's side (virt-trust-agent(8)).
const (
	AgentName      = "org.virttrust1.Agent"
	AgentPath      = dbus.ObjectPath("/org/virttrust1/agent")
	AgentInterface = "org.virttrust1.Agent"
)

// Agent calls a method of virt-trust-agent, with its interface, and stores its
// results in out. Errors: ErrAccessDenied; others as they are.
func (c *Client) Agent(ctx context.Context, method string, args []any, out ...any) error {
	call := c.conn.Object(AgentName, AgentPath).CallWithContext(ctx, method, 0, args...)
	if call.Err != nil {
		err := MapError(call.Err)
		if r := reason.As(err); r != nil && r.Code == reason.HelperUnreachable {
			return fmt.Errorf("virt-trust-agent cannot be reached, see 'systemctl status virt-trust-agent': %w", call.Err)
		}
		return err
	}
	if len(out) == 0 {
		return nil
	}
	return call.Store(out...)
}
