package imagefile

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/label"
	"virt-trust/internal/vtpm/qcow2"
)

func command(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	c := exec.CommandContext(ctx, name, args...)
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.WaitDelay = 5 * time.Second
	return c
}

func run(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	c := command(t, name, args...)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", c, err, out, stderr.Bytes())
	}
	return out
}

// payload is a real label: one host, libvirt's default state path.
func payload(t *testing.T, generation uint64) []byte {
	t.Helper()
	l := label.Label{
		VM:         "6fdb62d8-9d8a-4a52-92c1-fa7a3ec3e5a7",
		Instance:   "/var/lib/libvirt/swtpm/6fdb62d8-9d8a-4a52-92c1-fa7a3ec3e5a7/tpm2",
		Algorithm:  label.AlgorithmAES256,
		Generation: generation,
		Recipients: []label.Recipient{{
			BindKeyName: append([]byte{0, 11}, bytes.Repeat([]byte{7}, 32)...),
			Ciphertext:  bytes.Repeat([]byte{0xc1}, 256),
		}},
	}
	p, err := l.Seal(make([]byte, label.StateKeySize))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// An image of the matrix: how qemu-img makes it, and what comes of it.
type image struct {
	name     string
	create   []string // qemu-img's options
	backing  string   // its name; the file is made
	secret   string   // encrypt.format
	dataFile bool
	refused  string // part of the reason; "" takes a label
}

func matrix() []image {
	images := []image{
		{name: "default"},
		{name: "lazy_refcounts", create: []string{"-o", "lazy_refcounts=on"}},
		{name: "extended_l2", create: []string{"-o", "extended_l2=on,cluster_size=128k"}},
		{name: "zlib", create: []string{"-o", "compression_type=zlib"}},
		{name: "zstd", create: []string{"-o", "compression_type=zstd"}},
		{name: "nocow", create: []string{"-o", "nocow=on"}},
		{name: "data_file", create: []string{"-o", "data_file=DIR/ext.raw"}, dataFile: true},
		{name: "data_file_raw", create: []string{"-o", "data_file=DIR/ext.raw,data_file_raw=on"}, dataFile: true},
		{name: "luks", secret: "luks"},
		{name: "aes", secret: "aes"},
		{name: "backing", backing: "base.qcow2"},
		{name: "backing,long", backing: longName},
		{name: "backing,long,2k", backing: longName, create: []string{"-o", "cluster_size=2k"}, refused: "no room"},
		{name: "backing,long,4k", backing: longName, create: []string{"-o", "cluster_size=4k"}},
		{name: "backing,1k", backing: "base.qcow2", create: []string{"-o", "cluster_size=1k"}, refused: "no room"},
		{name: "v2,backing,long", backing: longName, create: []string{"-o", "compat=0.10"}},
		{name: "v2,aes", secret: "aes", create: []string{"-o", "compat=0.10"}},
		{name: "everything", backing: longName, create: []string{"-o", "lazy_refcounts=on,extended_l2=on,compression_type=zstd,refcount_bits=64"}},
	}
	for _, p := range []string{"metadata", "falloc", "full"} {
		images = append(images, image{name: "preallocation=" + p, create: []string{"-o", "preallocation=" + p}})
	}
	for _, n := range []int{1, 8, 64} {
		images = append(images, image{name: fmt.Sprintf("refcount_bits=%d", n), create: []string{"-o", fmt.Sprintf("refcount_bits=%d", n)}})
	}
	for size := 512; size <= 2<<20; size *= 2 {
		for _, v := range []string{"0.10", "1.1"} {
			if v == "0.10" && size > 4096 && size != 64<<10 && size != 2<<20 {
				continue
			}
			i := image{name: fmt.Sprintf("compat=%s,cluster_size=%d", v, size), create: []string{"-o", fmt.Sprintf("compat=%s,cluster_size=%d", v, size)}}
			if size < 1024 {
				i.refused = "no room"
			}
			images = append(images, i)
		}
	}
	return images
}

// longName is as long as a backing file's name may be: 1023 bytes.
var longName = func() string {
	s := strings.Repeat(strings.Repeat("b", 200)+"/", 5)
	return s + strings.Repeat("b", 1023-len(s))
}()

func (i image) v2() bool { return strings.Contains(strings.Join(i.create, " "), "compat=0.10") }

// args names an image for qemu-img and qemu-io.
func (i image) args(path string) []string {
	if i.secret == "" {
		return []string{"-f", "qcow2", path}
	}
	return []string{"--object", "secret,id=s,data=hunter2", "--image-opts", "driver=qcow2,encrypt.key-secret=s,file.filename=" + path}
}

func (i image) img(t *testing.T, path, verb string, options []string, operands ...string) []byte {
	t.Helper()
	args := append([]string{verb}, options...)
	args = append(args, i.args(path)...)
	return run(t, "qemu-img", append(args, operands...)...)
}

func (i image) io(t *testing.T, path string, commands ...string) {
	t.Helper()
	args := i.args(path)
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out := run(t, "qemu-io", args...)
	if bytes.Contains(out, []byte("failed")) {
		t.Fatalf("qemu-io: %s", out)
	}
}

func (i image) make(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "a.qcow2")
	args := []string{"create", "-q", "-f", "qcow2"}
	for _, c := range i.create {
		args = append(args, strings.ReplaceAll(c, "DIR", dir))
	}
	if i.secret != "" {
		args = append(args, "--object", "secret,id=s,data=hunter2", "-o", "encrypt.format="+i.secret+",encrypt.key-secret=s")
		if i.secret == "luks" {
			args = append(args, "-o", "encrypt.iter-time=10")
		}
	}
	if i.backing != "" {
		// A file's name has 255 bytes at most, so a long one goes through folders.
		base := filepath.Join(dir, i.backing)
		if err := os.MkdirAll(filepath.Dir(base), 0o700); err != nil {
			t.Fatal(err)
		}
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", base, "4M")
		run(t, "qemu-io", "-f", "qcow2", base, "-c", "write -P 5 1M 64k")
		args = append(args, "-b", i.backing, "-F", "qcow2")
	}
	args = append(args, path, "4M")
	// For LUKS qemu-img measures the processor, and gives up where the first of its
	// measurements falls within one tick of the kernel's account.
	for try := 0; ; try++ {
		out, err := command(t, "qemu-img", args...).CombinedOutput()
		if err == nil {
			break
		}
		if try == 20 || !bytes.Contains(out, []byte("accurate CPU usage")) {
			t.Fatalf("qemu-img: %v: %s", err, out)
		}
	}
	i.io(t, path, "write -P 1 0 100k", "write -P 2 2M 70k")
	return path
}

// info is what qemu-img tells of an image, without what may change.
func (i image) info(t *testing.T, path string) map[string]any {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(i.img(t, path, "info", []string{"--output=json"}), &m); err != nil {
		t.Fatal(err)
	}
	delete(m, "actual-size")
	return m
}

func TestMatrix(t *testing.T) {
	testkit.Need(t, "qemu-img", "qemu-io")
	for n, i := range matrix() {
		if testing.Short() && n%5 != 0 {
			continue
		}
		t.Run(i.name, func(t *testing.T) {
			t.Parallel()
			dir := testkit.Folder(t)
			path := i.make(t, dir)
			original := filepath.Join(dir, "original")
			copyFile(t, path, original)
			before := i.info(t, path)

			one, two := payload(t, 1), payload(t, 2)
			err := WriteLabel(path, one)
			if i.refused != "" {
				var u *UnsupportedError
				if !errors.As(err, &u) || !strings.Contains(u.Reason, i.refused) {
					t.Fatalf("refused with %v", err)
				}
				sameFile(t, path, original)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			check := func(after string) {
				t.Helper()
				if got, err := ReadLabel(path); err != nil || !bytes.Equal(got, two) {
					t.Fatalf("the label after %s: %v", after, err)
				}
			}
			if err := WriteLabel(path, two); err != nil {
				t.Fatal(err)
			}
			check("its replacement")
			i.img(t, path, "check", nil)
			if diff := cmp.Diff(before, i.info(t, path)); diff != "" {
				t.Errorf("qemu-img info: %s", diff)
			}
			i.compare(t, path, original)
			i.rewrites(t, dir, path, check)
			i.img(t, path, "check", nil)

			if err := WriteLabel(path, one); err != nil {
				t.Fatal(err)
			}
			if err := RemoveLabel(path, func(p []byte) bool { return bytes.Equal(p, one) }); err != nil {
				t.Fatal(err)
			}
			i.img(t, path, "check", nil)
			if b, err := os.ReadFile(path); err != nil || bytes.Contains(b, one[16:100]) || bytes.Contains(b, bytes.Repeat([]byte{0xc1}, 64)) {
				t.Errorf("something of the label is left: %v", err)
			}
		})
	}
}

func (i image) compare(t *testing.T, a, b string) {
	t.Helper()
	if i.secret == "" {
		run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", a, b)
		return
	}
	args := append([]string{"compare"}, i.args(a)...)
	run(t, "qemu-img", append(args, i.args(b)[3])...)
}

// rewrites has QEMU rewrite the header in every way that it knows.
func (i image) rewrites(t *testing.T, dir, path string, check func(after string)) {
	t.Helper()
	i.img(t, path, "resize", []string{"-q"}, "+1M")
	check("resize")
	i.io(t, path, "write -P 3 3M 1M", "discard 0 64k")
	check("qemu-io")
	if !i.dataFile && i.name != "refcount_bits=1" {
		for _, s := range [][]string{{"-c"}, {"-a"}, {"-d"}} {
			args := append([]string{"snapshot"}, s[0], "s")
			if i.secret == "" {
				args = append(args, path)
			} else {
				args = append(args, i.args(path)...)
			}
			run(t, "qemu-img", args...)
			check("snapshot " + s[0])
		}
	}
	i.img(t, path, "check", []string{"-q", "-r", "all"})
	check("check -r all")
	if !i.v2() {
		i.img(t, path, "bitmap", []string{"--add"}, "b")
		check("bitmap --add")
		i.io(t, path, "write -P 4 1M 64k")
		check("a write with a bitmap")
		i.img(t, path, "bitmap", []string{"--remove"}, "b")
		check("bitmap --remove")
		i.img(t, path, "amend", []string{"-q", "-o", "lazy_refcounts=on"})
		check("amend lazy_refcounts=on")
		i.crash(t, path)
		if h := header(t, path); h.Incompatible&qcow2.Dirty == 0 && i.name != "data_file_raw" {
			t.Error("the image is not dirty, as it was to be")
		}
		if err := WriteLabel(path, payload(t, 2)); err != nil {
			t.Fatal(err)
		}
		i.img(t, path, "check", []string{"-q", "-r", "all"})
		check("check -r all of a dirty image")
		if slices.Contains([]string{"default", "luks", "backing"}, i.name) {
			i.img(t, path, "amend", []string{"-q", "-o", "compat=0.10,lazy_refcounts=off"})
			check("amend compat=0.10")
			if err := WriteLabel(path, payload(t, 3)); err != nil {
				t.Fatal(err)
			}
			if err := WriteLabel(path, payload(t, 2)); err != nil {
				t.Fatal(err)
			}
			i.img(t, path, "amend", []string{"-q", "-o", "compat=1.1"})
			check("amend compat=1.1")
		}
	} else {
		i.img(t, path, "amend", []string{"-q", "-o", "compat=1.1"})
		check("amend compat=1.1")
		if i.secret == "" {
			i.img(t, path, "amend", []string{"-q", "-o", "compat=0.10"})
			check("amend compat=0.10")
		}
	}
	if i.secret == "" {
		if i.backing != "" {
			run(t, "qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "./"+i.backing[:len(i.backing)-2], path)
			check("rebase -u")
			run(t, "qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", i.backing, path)
			check("rebase -u back")
		}
		over := filepath.Join(dir, "over.qcow2")
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", over)
		run(t, "qemu-io", "-f", "qcow2", over, "-c", "write -P 6 0 64k")
		run(t, "qemu-img", "commit", "-q", "-f", "qcow2", over)
		check("commit into it")
		if i.backing != "" {
			run(t, "qemu-img", "commit", "-q", "-f", "qcow2", path)
			check("commit of it")
		}
	}
}

// crash leaves a dirty image behind.
func (i image) crash(t *testing.T, path string) {
	t.Helper()
	c := command(t, "qemu-io", append(i.args(path), "-c", "write -P 4 4M 64k", "-c", "abort")...)
	var exit *exec.ExitError
	if err := c.Run(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGABRT {
		t.Fatalf("%s: %v", c, err)
	}
}

func header(t *testing.T, path string) *qcow2.Header {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h, err := parse(f)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

func sameFile(t *testing.T, a, b string) {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(x, y) {
		t.Error("the image is not byte for byte what it was")
	}
}
