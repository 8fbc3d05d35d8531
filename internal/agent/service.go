package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/sirupsen/logrus"

	contract "virt-trust/dbus"
	"virt-trust/internal/bus"
	"virt-trust/internal/bus/serving"
	"virt-trust/internal/vtpm/reason"
)

type dict = map[string]dbus.Variant

// service is the agent on D-Bus.
type service struct {
	conn    *dbus.Conn
	agent   *Agent
	version string
	log     *logrus.Entry
	slots   chan struct{}
}

const (
	maxCalls     = 16
	enrolTime    = 4 * time.Minute // a slow TPM makes three signatures and opens a credential
	propertyTime = 10 * time.Second
)

var errDenied = errors.New("only root may do this")

// serve runs a method's body behind what is common to all.
func (s *service) serve(sender dbus.Sender, method string, rootOnly bool, limit time.Duration, body func(context.Context) error) *dbus.Error {
	log := s.log.WithField("method", method)
	err := serving.Call(s.slots, limit, log, func(ctx context.Context) error {
		if err := s.admit(ctx, string(sender), rootOnly); err != nil {
			return err
		}
		return body(ctx)
	})
	var answer *answerError
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errDenied):
		return dbus.NewError(bus.ErrorAccessDenied, []any{method + ": " + err.Error()})
	case errors.As(err, &answer), errors.Is(err, serving.ErrFull), errors.Is(err, serving.ErrBug):
	default:
		log.WithError(err).Warn("could not be done")
	}
	return dbus.NewError(bus.ErrorFailed, []any{reason.OneLine(err.Error())})
}

func (s *service) admit(ctx context.Context, sender string, rootOnly bool) error {
	if !rootOnly {
		return nil
	}
	var uid uint32
	if err := s.conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.GetConnectionUnixUser", 0, sender).Store(&uid); err != nil {
		return fmt.Errorf("asking who calls: %w", err)
	}
	if uid != 0 {
		return errDenied
	}
	return nil
}

func option(options dict, key string) string {
	v, _ := options[key].Value().(string)
	return v
}

func (s *service) methods() map[string]any {
	return map[string]any{
		"Enroll": func(url string, options dict, sender dbus.Sender) (dict, *dbus.Error) {
			result := dict{}
			return result, s.serve(sender, "Enroll", true, enrolTime, func(ctx context.Context) error {
				st, err := s.agent.Enrol(ctx, url, EnrolOptions{Token: option(options, "token"), Pin: option(options, "pin"), Name: option(options, "name")})
				for k, v := range map[string]string{"state": st.State, "node": st.Node, "name": st.Name} {
					result[k] = dbus.MakeVariant(v)
				}
				return err
			})
		},
		"Leave": func(options dict, sender dbus.Sender) *dbus.Error {
			return s.serve(sender, "Leave", true, enrolTime, s.agent.Leave)
		},
	}
}

func (s *service) properties() dict { return propertiesOf(s.agent.Status(), s.version) }

func propertiesOf(st Status, version string) dict {
	micro := func(t time.Time) dbus.Variant {
		if t.IsZero() {
			return dbus.MakeVariant(uint64(0))
		}
		return dbus.MakeVariant(uint64(t.UnixMicro()))
	}
	return dict{
		"State": dbus.MakeVariant(st.State), "Verifier": dbus.MakeVariant(st.Verifier), "Node": dbus.MakeVariant(st.Node), "Name": dbus.MakeVariant(st.Name),
		"CertificateExpires": micro(st.CertificateExpires), "LastRound": micro(st.LastRound), "LastTier": dbus.MakeVariant(st.LastTier),
		"LastError": dbus.MakeVariant(reason.OneLine(st.LastError)), "Version": dbus.MakeVariant(version),
	}
}

// export puts everything on the bus and takes the name.
func (s *service) export() error {
	properties := map[string]any{
		"Get": func(iface, name string, sender dbus.Sender) (v dbus.Variant, derr *dbus.Error) {
			derr = s.serve(sender, "Get", false, propertyTime, func(context.Context) error {
				var ok bool
				if v, ok = s.properties()[name]; !ok || iface != bus.AgentInterface {
					return errors.New("there is no property " + name)
				}
				return nil
			})
			return v, derr
		},
		"GetAll": func(iface string, sender dbus.Sender) (d dict, derr *dbus.Error) {
			d = dict{}
			derr = s.serve(sender, "GetAll", false, propertyTime, func(context.Context) error {
				if iface == bus.AgentInterface {
					d = s.properties()
				}
				return nil
			})
			return d, derr
		},
		"Set": serving.ReadOnly,
	}
	text := serving.Introspection(serving.Interface(contract.AgentXML, bus.AgentInterface))
	err := errors.Join(
		s.conn.ExportMethodTable(s.methods(), bus.AgentPath, bus.AgentInterface),
		s.conn.ExportMethodTable(properties, bus.AgentPath, "org.freedesktop.DBus.Properties"),
		s.conn.ExportMethodTable(map[string]any{"Introspect": func() (string, *dbus.Error) { return text, nil }}, bus.AgentPath, "org.freedesktop.DBus.Introspectable"),
	)
	if err != nil {
		return err
	}
	return serving.Claim(s.conn, bus.AgentName)
}

// changed tells of a new status.
func (s *service) changed(st Status) {
	p := propertiesOf(st, s.version)
	delete(p, "Version")
	if err := s.conn.Emit(bus.AgentPath, "org.freedesktop.DBus.Properties.PropertiesChanged", bus.AgentInterface, p, []string{}); err != nil {
		s.log.WithError(err).Debug("sending a signal")
	}
}
