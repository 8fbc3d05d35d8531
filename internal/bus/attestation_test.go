package bus

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/godbus/dbus/v5"
)

func TestHave(t *testing.T) {
	h := Have{Boot: "b", Offsets: map[string]uint64{"ima": 7, "launch-log": 1 << 40}}
	if got := HaveOf(h.options(), "ima", "launch-log", "tcg-event-log"); !reflect.DeepEqual(got, h) {
		t.Errorf("%+v", got)
	}
	if got := HaveOf((Have{}).options(), "ima"); got.Boot != "" || len(got.Offsets) != 0 {
		t.Errorf("of nothing there is %+v", got)
	}
	// Other types, and what was not asked for, are nothing.
	odd := map[string]dbus.Variant{"have_boot": dbus.MakeVariant(1), "have_ima": dbus.MakeVariant("7"), "have_other": dbus.MakeVariant(uint64(7))}
	if got := HaveOf(odd, "ima"); got.Boot != "" || len(got.Offsets) != 0 {
		t.Errorf("of odd options there is %+v", got)
	}
}

// What is sealed comes back as it was, and cannot be changed; nothing else is
// read.
func TestSealed(t *testing.T) {
	for _, b := range [][]byte{nil, []byte("x"), bytes.Repeat([]byte("evidence"), 1<<18)} {
		f, err := Sealed("test", b)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := readSealed(f, int64(len(b))); err != nil || !bytes.Equal(got, b) {
			t.Errorf("%d bytes of %d, %v", len(got), len(b), err)
		}
		if _, err := f.WriteAt([]byte("y"), 0); err == nil {
			t.Error("it can be written")
		}
		if f.Truncate(9) == nil && len(b) != 9 {
			t.Error("it can be cut")
		}
		if _, err := readSealed(f, int64(len(b))-1); err == nil {
			t.Error("more than was wanted is read")
		}
		f.Close()
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := readSealed(f, 10); err == nil {
		t.Error("a file that anybody may change is read")
	}
}
