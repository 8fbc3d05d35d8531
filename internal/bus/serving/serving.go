// Package serving is what the services on the bus have in common: virt-trustd's
// and virt-trust-agent's.
package serving

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/sirupsen/logrus"
)

// What Call gives for a body that was not run, or did not come to its end.
var (
	ErrFull = errors.New("too many calls are under way")
	ErrBug  = errors.New("there is a bug here: see the service's journal")
)

// Call runs a method's body, when one of the slots is free, for no longer than
// limit. A panic, from which godbus does not recover, is the error of that call,
// and logged.
func Call(slots chan struct{}, limit time.Duration, log *logrus.Entry, body func(context.Context) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			log.WithField("stack", string(debug.Stack())).Errorf("panic: %v", p)
			err = ErrBug
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	select {
	case slots <- struct{}{}:
		defer func() { <-slots }()
	case <-ctx.Done():
		return ErrFull
	}
	return body(ctx)
}

// Claim takes a service's name.
func Claim(conn *dbus.Conn, name string) error {
	reply, err := conn.RequestName(name, dbus.NameFlagDoNotQueue)
	if err != nil {
		return fmt.Errorf("taking the name %s: %w", name, err)
	}
	if reply != dbus.RequestNameReplyPrimaryOwner {
		return fmt.Errorf("another process owns %s", name)
	}
	return nil
}

// ReadOnly is Set of org.freedesktop.DBus.Properties.
func ReadOnly(iface, name string, v dbus.Variant) *dbus.Error {
	return dbus.NewError("org.freedesktop.DBus.Error.PropertyReadOnly", []any{"every property is read-only"})
}

// Interface cuts one interface out of a contract, "" where it has none.
func Interface(contract, name string) string {
	var doc struct {
		Interfaces []struct {
			Name  string `xml:"name,attr"`
			Inner string `xml:",innerxml"`
		} `xml:"interface"`
	}
	if err := xml.Unmarshal([]byte(contract), &doc); err != nil {
		return ""
	}
	for _, i := range doc.Interfaces {
		if i.Name == name {
			return "  <interface name=\"" + name + "\">" + i.Inner + "</interface>\n"
		}
	}
	return ""
}

// Introspection is that of an object: its interfaces, those that every object has,
// and its children.
func Introspection(interfaces string, children ...string) string {
	var b strings.Builder
	b.WriteString(doctype + "<node>\n" + interfaces + everywhere)
	for _, c := range children {
		fmt.Fprintf(&b, "  <node name=%q/>\n", c)
	}
	b.WriteString("</node>\n")
	return b.String()
}

const (
	doctype    = "<!DOCTYPE node PUBLIC \"-//freedesktop//DTD D-BUS Object Introspection 1.0//EN\"\n \"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd\">\n"
	everywhere = `  <interface name="org.freedesktop.DBus.Properties">
    <method name="Get"><arg name="interface" type="s" direction="in"/><arg name="name" type="s" direction="in"/><arg name="value" type="v" direction="out"/></method>
    <method name="GetAll"><arg name="interface" type="s" direction="in"/><arg name="properties" type="a{sv}" direction="out"/></method>
    <method name="Set"><arg name="interface" type="s" direction="in"/><arg name="name" type="s" direction="in"/><arg name="value" type="v" direction="in"/></method>
    <signal name="PropertiesChanged"><arg name="interface" type="s"/><arg name="changed" type="a{sv}"/><arg name="invalidated" type="as"/></signal>
  </interface>
  <interface name="org.freedesktop.DBus.Introspectable">
    <method name="Introspect"><arg name="xml" type="s" direction="out"/></method>
  </interface>
`
)
