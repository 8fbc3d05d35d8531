package daemon

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/recovery"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/reason"
)

// A recovery over the bus: the key goes over the conversation, progress comes
// back, and refusals are refusals.
func TestConversation(t *testing.T) {
	o := openOffice(t)
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", o.address)
	testkit.Root(t) // who needs no polkit
	f, _, _ := o.ran(uuidA)
	c := testkit.Must[*bus.Client](t)(bus.DialForDescriptors(background))
	defer c.Close()
	k := testkit.Must[*recovery.Key](t)(recovery.NewKey())
	var said []string
	hear := func(l bus.Line) error { said = append(said, l.Say); return nil }
	set := func(options dict) error {
		_, err := c.Converse(background, "SetRecovery", []any{k.Recipient().String(), options}, nil, hear)
		return err
	}
	if err := set(dict{}); err != nil {
		t.Fatal(err)
	}
	if len(said) != 2 || said[1] != "vm-a: wrapped" {
		t.Errorf("%q", said)
	}
	refuses0(t, set(dict{}), reason.PolicyForbids)
	if err := set(dict{"replace": dbus.MakeVariant(true)}); err != nil {
		t.Fatal(err)
	}

	o.tpm.say(hosttpm.ErrCleared)
	recover := func(text string) error {
		_, err := c.Converse(background, "Recover", []any{"", dict{}}, []byte(text), hear)
		return err
	}
	refuses0(t, recover(testkit.Must[*recovery.Key](t)(recovery.NewKey()).Text()), reason.KeyNotReleased)
	if err := recover("nonsense"); err == nil || reason.As(err) != nil {
		t.Error(err)
	}
	if err := recover(strings.Repeat("#", recovery.MaxText+1)); err == nil {
		t.Error("a key without end")
	}
	if err := recover(k.File("host", "now")); err != nil {
		t.Fatal(err)
	}
	o.start(f)
	o.stop(f)
	if strings.Contains(o.logged(), k.Text()[20:40]) {
		t.Error("the key is in the log")
	}

	// A caller that goes away, or says nothing, does not keep others out.
	var fd dbus.UnixFD
	if err := c.Call(background, "Recover", []any{"", dict{}}, &fd); err != nil {
		t.Fatal(err)
	}
	refuses0(t, recover(k.Text()), reason.PolicyForbids)
	os.NewFile(uintptr(fd), "").Close()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if err := recover(k.Text()); err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// refuses0 is refuses for what came over the bus, where what and how to mend it
// are one text.
func refuses0(t testing.TB, err error, code reason.Code) {
	t.Helper()
	if r := reason.As(err); r == nil || r.Code != code {
		t.Fatalf("%v, want %s", err, code)
	}
}

func TestConversationInput(t *testing.T) {
	ours, theirs, err := newConversation()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		theirs.Write(bytes.Repeat([]byte("k"), 100))
		theirs.Close()
	}()
	b, err := ours.input(recovery.MaxBackup) // the most that is asked for
	if err != nil || len(b.Bytes()) != 100 {
		t.Fatal(err)
	}
	b.Wipe()
}
