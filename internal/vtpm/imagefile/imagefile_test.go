package imagefile

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/qcow2"
)

func TestRemove(t *testing.T) {
	testkit.Need(t, "qemu-img", "qemu-io")
	path := image{}.make(t, testkit.Folder(t))
	yes := func([]byte) bool { return true }
	if err := RemoveLabel(path, yes); !errors.Is(err, ErrNoLabel) {
		t.Errorf("no label: %v", err)
	}
	if err := WriteLabel(path, []byte("label")); err != nil {
		t.Fatal(err)
	}
	if err := RemoveLabel(path, func(p []byte) bool { return string(p) != "label" }); !errors.Is(err, ErrKept) {
		t.Errorf("told to keep it: %v", err)
	}
	if p, err := ReadLabel(path); err != nil || string(p) != "label" {
		t.Errorf("kept: %q, %v", p, err)
	}
	if err := RemoveLabel(path, yes); err != nil {
		t.Error(err)
	}
	if _, err := ReadLabel(path); !errors.Is(err, ErrNoLabel) {
		t.Errorf("removed: %v", err)
	}
}

// What HasRoom says is what WriteLabel does.
func TestHasRoom(t *testing.T) {
	for _, size := range []string{"512", "1024", "2048", "65536"} {
		path := filepath.Join(t.TempDir(), "a.qcow2")
		if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size="+size, path, "1M").CombinedOutput(); err != nil {
			testkit.Missing(t, "%v: %s", err, out)
		}
		for _, n := range []int{434, 735, 4096} {
			room, err := HasRoom(path, n)
			if err != nil {
				t.Fatal(err)
			}
			err = WriteLabel(path, make([]byte, n))
			var u *UnsupportedError
			if room != (err == nil) || err != nil && !errors.As(err, &u) {
				t.Errorf("clusters of %s bytes, %d bytes: room %v, %v", size, n, room, err)
			}
		}
	}
	if _, err := HasRoom("/dev/null", 1); err == nil {
		t.Error("a device that is no disk")
	}
}

func TestFileKeepsOwnerAndMode(t *testing.T) {
	testkit.Need(t, "qemu-img", "qemu-io")
	dir := testkit.Folder(t)
	path := image{}.make(t, dir)
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(path, 12345, 23456); err != nil {
			t.Fatal(err)
		}
	}
	stat := func() *syscall.Stat_t {
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Sys().(*syscall.Stat_t)
	}
	before := stat()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if err := WriteLabel(link, []byte("label")); err != nil { // links are followed
		t.Fatal(err)
	}
	after := stat()
	if after.Ino != before.Ino || after.Uid != before.Uid || after.Gid != before.Gid || after.Mode != before.Mode || after.Size != before.Size {
		t.Errorf("%+v\n%+v", before, after)
	}
	if fi, err := os.Lstat(link); err != nil || fi.Mode().Type() != os.ModeSymlink {
		t.Errorf("the link is gone: %v", err)
	}
	if p, err := ReadLabel(path); err != nil || string(p) != "label" {
		t.Errorf("%q, %v", p, err)
	}
}

func TestNotAnImage(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := syscall.Mkfifo(at("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("raw"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("short"), []byte("QFI\xfb\x00\x00\x00\x03"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("empty"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(at("loop"), at("loop")); err != nil {
		t.Fatal(err)
	}
	done := make(chan bool)
	go func() {
		defer close(done)
		for _, path := range []string{at("fifo"), at("raw"), at("short"), at("empty"), "/dev/null", "/dev/zero"} {
			var u *UnsupportedError
			if _, err := ReadLabel(path); !errors.As(err, &u) {
				t.Errorf("read %s: %v", path, err)
			}
			if err := WriteLabel(path, []byte("label")); !errors.As(err, &u) {
				t.Errorf("write %s: %v", path, err)
			}
		}
		for _, path := range []string{at("missing"), at("loop"), dir} {
			if err := WriteLabel(path, []byte("label")); err == nil || errors.As(err, new(*UnsupportedError)) {
				t.Errorf("write %s: %v", path, err)
			}
		}
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("hangs")
	}
}

// holding runs qemu-io on an image until the test is over.
func holding(t *testing.T, args ...string) (stop func()) {
	t.Helper()
	c := command(t, "qemu-io", args...)
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	// Once it answers it has the image open.
	fmt.Fprintln(in, "length")
	line, err := bufio.NewReader(out).ReadString('B')
	if err != nil || !strings.Contains(line, "4 Mi") {
		t.Fatalf("qemu-io: %q, %v", line, err)
	}
	return func() {
		in.Close()
		go io.Copy(io.Discard, out)
		c.Wait()
	}
}

func TestInUse(t *testing.T) {
	testkit.Need(t, "qemu-img", "qemu-io", "qemu-nbd")
	dir := testkit.Folder(t)
	path := image{}.make(t, dir)
	over := filepath.Join(dir, "over.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", over)
	before := filepath.Join(dir, "before")
	copyFile(t, path, before)

	for name, args := range map[string][]string{
		"written": {"-f", "qcow2", path},
		"read":    {"-r", "-f", "qcow2", path},
		"backing": {"-f", "qcow2", over},
	} {
		stop := holding(t, args...)
		if err := WriteLabel(path, []byte("label")); !errors.Is(err, ErrInUse) {
			t.Errorf("%s: write: %v", name, err)
		}
		if err := RemoveLabel(path, func([]byte) bool { return true }); !errors.Is(err, ErrInUse) {
			t.Errorf("%s: remove: %v", name, err)
		}
		if _, err := ReadLabel(path); !errors.Is(err, ErrNoLabel) {
			t.Errorf("%s: read: %v", name, err)
		}
		stop()
	}
	sameFile(t, path, before)

	socket := filepath.Join(dir, "nbd")
	nbd := command(t, "qemu-nbd", "-t", "-f", "qcow2", "-k", socket, path)
	if err := nbd.Start(); err != nil {
		t.Fatal(err)
	}
	greeting := make([]byte, 8) // once it greets it has the image open
	for range 500 {
		if conn, err := net.Dial("unix", socket); err == nil {
			if _, err := io.ReadFull(conn, greeting); err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if string(greeting) != "NBDMAGIC" {
		t.Fatalf("qemu-nbd does not answer: %q", greeting)
	}
	if err := WriteLabel(path, []byte("label")); !errors.Is(err, ErrInUse) {
		t.Errorf("qemu-nbd: %v", err)
	}
	nbd.Process.Kill()
	nbd.Wait()
	if err := WriteLabel(path, []byte("label")); err != nil {
		t.Errorf("free again: %v", err)
	}
}

// While a label is written no QEMU may open the image.
func TestLockKeepsOthersOut(t *testing.T) {
	testkit.Need(t, "qemu-img", "qemu-io")
	path := image{}.make(t, testkit.Folder(t))
	f, err := open(path, os.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := lock(f); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"written": {"qemu-io", "-f", "qcow2", path, "-c", "length"},
		"read":    {"qemu-io", "-r", "-f", "qcow2", path, "-c", "length"},
		"info":    {"qemu-img", "info", path},
		"resize":  {"qemu-img", "resize", "-q", "-f", "qcow2", path, "+1M"},
	} {
		out, err := command(t, args[0], args[1:]...).CombinedOutput()
		if err == nil || !bytes.Contains(out, []byte("lock")) {
			t.Errorf("%s: %v: %s", name, err, out)
		}
	}
	if err := WriteLabel(path, []byte("label")); !errors.Is(err, ErrInUse) {
		t.Errorf("another of us: %v", err)
	}
	run(t, "qemu-img", "info", "-U", path) // only looks, without locks
	unlock(f)
	if err := WriteLabel(path, []byte("label")); err != nil {
		t.Errorf("free again: %v", err)
	}
}

// A child that this process has forked and that has not yet become its program
// holds the image too, and would hold the locks.
func TestLockEndsAtOnce(t *testing.T) {
	testkit.Need(t, "qemu-img", "qemu-io")
	path := image{}.make(t, testkit.Folder(t))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range 2 {
		go func() {
			for ctx.Err() == nil {
				exec.CommandContext(ctx, "true").Run()
			}
		}()
	}
	for i := range 60 {
		if err := WriteLabel(path, payload(t, uint64(i))); err != nil {
			t.Fatal(err)
		}
	}
}

// QEMU itself runs on the image, saves the machine into it, and rewrites the
// header while it does.
func TestQEMURuns(t *testing.T) {
	testkit.Need(t, "qemu-img", "qemu-io", "qemu-system-x86_64")
	for _, compat := range []string{"0.10", "1.1"} {
		t.Run(compat, func(t *testing.T) {
			t.Parallel()
			i := image{create: []string{"-o", "compat=" + compat}}
			path := i.make(t, testkit.Folder(t))
			one := payload(t, 1)
			if err := WriteLabel(path, one); err != nil {
				t.Fatal(err)
			}
			c := command(t, "qemu-system-x86_64", "-nodefaults", "-S", "-display", "none", "-machine", "pc,accel=tcg", "-m", "16", "-net", "none",
				"-monitor", "stdio", "-drive", "if=virtio,format=qcow2,file="+path)
			in, err := c.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			pipe, err := c.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			answers := bufio.NewReader(pipe)
			if banner, err := answers.ReadString(')'); err != nil { // "(qemu)": it has the image open
				t.Fatalf("%q, %v", banner, err)
			}
			if err := WriteLabel(path, payload(t, 2)); !errors.Is(err, ErrInUse) {
				t.Errorf("while QEMU runs: %v", err)
			}
			fmt.Fprint(in, "block_resize virtio0 8M\nsavevm one\nloadvm one\nqemu-io virtio0 \"write -P 9 6M 64k\"\ndelvm one\nsavevm two\nquit\n")
			out, err := io.ReadAll(answers)
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Wait(); err != nil || bytes.Contains(out, []byte("rror")) {
				t.Fatalf("%v: %s", err, out)
			}
			if got, err := ReadLabel(path); err != nil || !bytes.Equal(got, one) {
				t.Errorf("the label after the run: %v", err)
			}
			i.img(t, path, "check", nil)
			if s := run(t, "qemu-img", "snapshot", "-l", path); !bytes.Contains(s, []byte("two")) {
				t.Errorf("QEMU did not do what the test rests on: %s", out)
			}
		})
	}
}

// What qemu-img says of images that a power cut leaves behind. That all of
// them are right is shown in package qcow2; here a sample, by QEMU's own eyes.
func TestPowerCuts(t *testing.T) {
	testkit.Need(t, "qemu-img", "qemu-io")
	for _, i := range []image{
		{name: "no backing"},
		{name: "long backing name", backing: longName},
		{name: "version 2", backing: longName, create: []string{"-o", "compat=0.10,cluster_size=4k"}},
	} {
		t.Run(i.name, func(t *testing.T) {
			t.Parallel()
			dir := testkit.Folder(t)
			path := i.make(t, dir)
			original := filepath.Join(dir, "original")
			copyFile(t, path, original)
			info := string(run(t, "qemu-img", "info", "--output=json", path))
			old := []byte(nil)
			for _, label := range [][]byte{payload(t, 1), bytes.Repeat([]byte("2"), 600)} {
				first, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				h, err := qcow2.Parse(first)
				if err != nil {
					t.Fatal(err)
				}
				plan, err := h.SetLabel(label)
				if err != nil {
					t.Fatal(err)
				}
				now := first
				for _, group := range plan {
					torn := bytes.Clone(now)
					for _, w := range group { // the second half of each write only
						if n := len(w.Data) / 2; len(group) > 1 || len(w.Data) > 512 {
							copy(torn[w.Offset+n:], w.Data[n:])
						}
					}
					now = qcow2.Plan{group}.Apply(now)
					for _, state := range [][]byte{torn, now} {
						if err := os.WriteFile(path, state, 0o600); err != nil {
							t.Fatal(err)
						}
						run(t, "qemu-img", "check", "-q", "-f", "qcow2", path)
						run(t, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", path, original)
						if s := string(run(t, "qemu-img", "info", "--output=json", path)); withoutSize(s) != withoutSize(info) {
							t.Errorf("%s\nwas\n%s", s, info)
						}
						got, err := ReadLabel(path)
						if err != nil && !(old == nil && errors.Is(err, ErrNoLabel)) {
							t.Error(err)
						}
						if !bytes.Equal(got, old) && !bytes.Equal(got, label) {
							t.Error("neither the old label nor the new one")
						}
					}
				}
				old = label
			}
		})
	}
}

func withoutSize(info string) string {
	var out []string
	for line := range strings.Lines(info) {
		if !strings.Contains(line, "actual-size") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "")
}

func TestBlockDevice(t *testing.T) {
	testkit.Need(t, "qemu-img", "qemu-io", "losetup")
	dir := testkit.Folder(t)
	path := image{}.make(t, dir)
	out, err := command(t, "losetup", "--find", "--show", path).Output()
	if err != nil {
		testkit.Missing(t, "no loop devices here: %v", err)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "-d", device).Run() })
	one := payload(t, 1)
	if err := WriteLabel(device, one); err != nil {
		t.Fatal(err)
	}
	run(t, "qemu-img", "check", "-f", "qcow2", device)
	if got, err := ReadLabel(device); err != nil || !bytes.Equal(got, one) {
		t.Error(err)
	}
	stop := holding(t, "-f", "qcow2", device)
	defer stop()
	if err := WriteLabel(device, one); !errors.Is(err, ErrInUse) {
		t.Error(err)
	}
}
