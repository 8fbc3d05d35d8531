// Package components spells on D-Bus what will be another one at the host's
// next boot (org.virttrust1.Host, Approve and Predict). It stands beside package
// bus because hooks and wrapper, which import that, have no use for it.
package components

import (
	"github.com/godbus/dbus/v5"

	"virt-trust/internal/evidence/eventlog"
)

// section is eventlog.Section as (say).
type section struct {
	Name   string
	Digest []byte
}

// Encode spells components as Approve takes them.
func Encode(all []eventlog.Component) []map[string]dbus.Variant {
	out := []map[string]dbus.Variant{}
	for _, c := range all {
		old := []map[string]dbus.Variant{}
		for _, f := range c.Old {
			old = append(old, file(f))
		}
		out = append(out, map[string]dbus.Variant{
			"kind": dbus.MakeVariant(c.Kind), "path": dbus.MakeVariant(c.Path), "text": dbus.MakeVariant(c.Text),
			"new": dbus.MakeVariant(file(c.New)), "old": dbus.MakeVariant(old),
		})
	}
	return out
}

func file(f eventlog.File) map[string]dbus.Variant {
	sections := []section{}
	for _, s := range f.Sections {
		sections = append(sections, section(s))
	}
	return map[string]dbus.Variant{
		"name": dbus.MakeVariant(f.Name), "flat": dbus.MakeVariant(f.Flat), "image": dbus.MakeVariant(f.Image),
		"linux": dbus.MakeVariant(f.Linux), "options": dbus.MakeVariant(f.Options), "sections": dbus.MakeVariant(sections),
	}
}

// UntrustedDecode undoes Encode. What is missing or of another type
// reads as empty; digests that are empty stand for none.
func UntrustedDecode(all []map[string]dbus.Variant) []eventlog.Component {
	var out []eventlog.Component
	for _, m := range all {
		c := eventlog.Component{Kind: value[string](m, "kind"), Path: value[string](m, "path"), Text: value[string](m, "text")}
		c.New = untrustedFile(value[map[string]dbus.Variant](m, "new"))
		for _, f := range value[[]map[string]dbus.Variant](m, "old") {
			c.Old = append(c.Old, untrustedFile(f))
		}
		out = append(out, c)
	}
	return out
}

func untrustedFile(m map[string]dbus.Variant) eventlog.File {
	digest := func(key string) []byte {
		if b := value[[]byte](m, key); len(b) > 0 {
			return b
		}
		return nil
	}
	f := eventlog.File{Name: value[string](m, "name"), Flat: digest("flat"), Image: digest("image"), Linux: digest("linux"), Options: digest("options")}
	var sections []section
	if v, ok := m["sections"]; ok && v.Store(&sections) == nil {
		for _, s := range sections {
			f.Sections = append(f.Sections, eventlog.Section(s))
		}
	}
	return f
}

func value[T any](m map[string]dbus.Variant, key string) T {
	v, _ := m[key].Value().(T)
	return v
}
