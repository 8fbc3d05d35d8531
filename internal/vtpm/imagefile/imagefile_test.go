package imagefile

import (
	"bytes"
	"errors"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestWriteReadRemove(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", path, "8M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := ReadLabel(path); !errors.Is(err, ErrNoLabel) {
		t.Fatalf("a new image: %v", err)
	}
	for _, payload := range [][]byte{[]byte("one"), []byte("another, a longer one"), []byte("2")} {
		if err := WriteLabel(path, payload); err != nil {
			t.Fatal(err)
		}
		got, err := ReadLabel(path)
		if err != nil || !bytes.Equal(got, payload) {
			t.Fatalf("read %q, %v", got, err)
		}
		if out, err := exec.Command("qemu-img", "check", path).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if err := RemoveLabel(path, func(p []byte) bool { return false }); !errors.Is(err, ErrKept) {
		t.Fatal(err)
	}
	if err := RemoveLabel(path, func(p []byte) bool { return string(p) == "2" }); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadLabel(path); !errors.Is(err, ErrNoLabel) {
		t.Fatal(err)
	}
}
