package components

import (
	"bytes"
	"encoding/binary"
	"reflect"
	"testing"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/evidence/eventlog"
)

// What is sent over a bus is what arrives, and its type is the contract's.
func TestRoundTrip(t *testing.T) {
	want := []eventlog.Component{
		{
			Kind: eventlog.Unified,
			New:  eventlog.File{Name: "new.efi", Flat: []byte{1}, Image: []byte{2}, Linux: []byte{3}, Options: []byte{4}, Sections: []eventlog.Section{{Name: ".linux", Digest: []byte{5}}}},
			Old:  []eventlog.File{{Name: "old.efi", Flat: []byte{6}}, {Name: "other"}},
		},
		{Kind: eventlog.Cmdline, Text: "quiet"},
		{Kind: eventlog.Other, Path: "/boot/grub/grub.cfg", New: eventlog.File{Name: "grub.cfg", Flat: []byte{7}}},
	}
	sent := Encode(want)
	if got := dbus.SignatureOf(sent).String(); got != "aa{sv}" {
		t.Fatal(got)
	}
	m := dbus.Message{
		Type: dbus.TypeSignal, Body: []any{sent},
		Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldPath: dbus.MakeVariant(dbus.ObjectPath("/")), dbus.FieldInterface: dbus.MakeVariant("a.b"), dbus.FieldMember: dbus.MakeVariant("C"),
			dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf(sent)),
		},
	}
	var wire bytes.Buffer
	if err := m.EncodeTo(&wire, binary.LittleEndian); err != nil {
		t.Fatal(err)
	}
	came, err := dbus.DecodeMessage(&wire)
	if err != nil {
		t.Fatal(err)
	}
	var received []map[string]dbus.Variant
	if err := dbus.Store(came.Body, &received); err != nil {
		t.Fatal(err)
	}
	if got := UntrustedDecode(received); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\narrives as\n%+v", want, got)
	}
	if got := UntrustedDecode([]map[string]dbus.Variant{{"new": dbus.MakeVariant(1), "old": dbus.MakeVariant("x"), "kind": dbus.MakeVariant([]byte{1})}}); len(got) != 1 || got[0].Kind != "" {
		t.Errorf("of the wrong types: %+v", got)
	}
}
