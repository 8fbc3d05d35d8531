package libvirt

import (
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

	"virt-trust/internal/domain"
	"virt-trust/internal/testkit"
)

const uuid = "6f1c2d3e-0000-4a5b-8c6d-0000000000aa"

// private runs libvirtd where it sees nothing of this machine's own.
const private = `
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/libvirt /run/lock
for d in /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt; do
	o=/run/overlay$d
	mkdir -p $o/upper $o/work
	mount -t overlay overlay -o lowerdir=$d,upperdir=$o/upper,workdir=$o/work $d
done
printf 'cgroup_controllers = [ ]\nsecurity_driver = "none"\nstdio_handler = "file"\n' >> /etc/libvirt/qemu.conf
printf 'auth_unix_rw = "none"\n' >> /etc/libvirt/libvirtd.conf
/usr/sbin/libvirtd --timeout 3 2>/run/libvirtd.log &
daemon=$!
while read -r command; do sh -c "$command" </dev/null >&2 || echo "failed: $command" >&2; echo done; done
kill $daemon
wait
`

// libvirtd is a private libvirtd and a shell beside it.
type libvirtd struct {
	t    *testing.T
	root string // its file system
	in   io.Writer
	out  io.Reader
}

func start(t *testing.T) *libvirtd {
	t.Helper()
	testkit.Root(t)
	testkit.Need(t, "/usr/sbin/libvirtd", "unshare", "virsh")
	cmd := exec.Command("unshare", "-m", "-p", "-f", "-n", "-i", "--mount-proc", "--kill-child", "bash", "-c", private)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	watchdog := time.AfterFunc(3*time.Minute, func() { cmd.Process.Kill() }) // and no test waits for ever
	t.Cleanup(func() { watchdog.Stop(); cmd.Process.Kill(); cmd.Wait() })
	d := &libvirtd{t, fmt.Sprintf("/proc/%d/root", cmd.Process.Pid), in, out}
	for range 300 {
		if conn, err := net.Dial("unix", d.socket()); err == nil {
			conn.Close()
			return d
		}
		time.Sleep(50 * time.Millisecond)
	}
	testkit.Missing(t, "the private libvirtd did not come up")
	return nil
}

func (d *libvirtd) socket() string { return d.root + "/run/libvirt/libvirt-sock" }

// do runs a shell command beside libvirtd.
func (d *libvirtd) do(command string) {
	d.t.Helper()
	fmt.Fprintln(d.in, command)
	if _, err := io.ReadFull(d.out, make([]byte, len("done\n"))); err != nil {
		d.t.Fatal(err)
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestLibvirtd(t *testing.T) {
	d := start(t)
	pidFile := d.root + "/run/libvirtd.pid"
	if !locked(pidFile) {
		t.Error("libvirtd runs and does not hold its pid file")
	}
	c, err := Dial(within(t, 20*time.Second), d.socket())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	events, err := c.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	expect := func(kind Kind, name string) {
		t.Helper()
		select {
		case e := <-events:
			want := Event{kind, uuid, name}
			if kind == Closed {
				want.UUID = ""
			}
			if e != want {
				t.Errorf("event %+v, want %+v", e, want)
			}
		case <-time.After(20 * time.Second):
			t.Errorf("no event %s", kind)
		}
	}

	if list, err := c.List(within(t, 10*time.Second)); err != nil || len(list) > 0 {
		t.Errorf("List: %+v, %v", list, err)
	}
	if _, err := c.Lookup(within(t, 10*time.Second), uuid); !errors.Is(err, ErrNoDomain) {
		t.Errorf("Lookup of a UUID: %v", err)
	}
	if _, err := c.Lookup(within(t, 10*time.Second), "vm"); !errors.Is(err, ErrNoDomain) {
		t.Errorf("Lookup of a name: %v", err)
	}

	xml := filepath.Join(t.TempDir(), "vm.xml")
	if err := os.WriteFile(xml, []byte(`<domain type='qemu'><name>vm</name><uuid>`+uuid+`</uuid><memory unit='MiB'>64</memory>
<os><type arch='x86_64' machine='q35'>hvm</type></os><devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices></domain>`), 0o644); err != nil {
		t.Fatal(err)
	}
	d.do("virsh -q define " + xml)
	expect(Defined, "vm")
	for _, ref := range []string{"vm", uuid, strings.ToUpper(uuid)} {
		got, err := c.Lookup(within(t, 10*time.Second), ref)
		if err != nil || got.UUID != uuid || got.Name != "vm" || got.Active || !got.Persistent || got.ManagedSave {
			t.Errorf("Lookup(%s): %+v, %v", ref, got, err)
		}
		if f, err := domain.Parse([]byte(got.XML)); err != nil || f.UUID != uuid {
			t.Errorf("its XML: %+v, %v", f, err)
		}
	}
	d.do("virsh -q domrename vm other")
	expect(Renamed, "other")
	d.do("virsh -q start other --paused")
	expect(Started, "other")
	expect(Suspended, "other")
	if list, err := c.List(within(t, 10*time.Second)); err != nil || len(list) != 1 || !list[0].Active || list[0].UUID != uuid || !strings.Contains(list[0].XML, "id='1'") {
		t.Errorf("List: %+v, %v", list, err)
	}
	pause := func(want bool) {
		t.Helper()
		if paused, err := c.Pause(within(t, 10*time.Second), uuid); err != nil || paused != want {
			t.Errorf("Pause: %v, %v", paused, err)
		}
	}
	resume := func() {
		t.Helper()
		if err := c.Resume(within(t, 10*time.Second), uuid); err != nil {
			t.Error(err)
		}
	}
	pause(false) // somebody else did
	resume()
	expect(Resumed, "other")
	pause(true)
	expect(Suspended, "other")
	resume()
	expect(Resumed, "other")
	resume() // it runs already
	d.do("virsh -q managedsave other")
	expect(Suspended, "other")
	expect(Saved, "other")
	if got, err := c.Lookup(within(t, 10*time.Second), "other"); err != nil || got.Active || !got.ManagedSave {
		t.Errorf("after managedsave: %+v, %v", got, err)
	}
	d.do("virsh -q undefine other --managed-save")
	expect(Undefined, "other")
	d.do("virsh -q create --paused " + xml)
	expect(Started, "vm")
	expect(Suspended, "vm")
	if got, err := c.Lookup(within(t, 10*time.Second), uuid); err != nil || !got.Active || got.Persistent {
		t.Errorf("a transient domain: %+v, %v", got, err)
	}
	d.do("virsh -q destroy vm")
	expect(Stopped, "vm")

	// libvirtd 9.0 does not end by its timeout while a client is connected.
	time.Sleep(5 * time.Second)
	if _, err := c.List(within(t, 5*time.Second)); err != nil {
		t.Errorf("libvirtd has left a client: %v", err)
	}

	// A call that is not answered ends with its context, and the connection with it.
	d.do("kill -STOP $(cat /run/libvirtd.pid)")
	begin := time.Now()
	_, err = c.List(within(t, 300*time.Millisecond))
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) > 2*time.Second {
		t.Errorf("a hung libvirtd: %v after %s", err, time.Since(begin))
	}
	expect(Closed, "")
	if _, ok := <-events; ok {
		t.Error("an event after Closed")
	}
	if _, err := c.Lookup(within(t, time.Second), "vm"); !errors.Is(err, ErrClosed) {
		t.Errorf("on a closed connection: %v", err)
	}
	begin = time.Now()
	if _, err := Dial(within(t, 300*time.Millisecond), d.socket()); err == nil || time.Since(begin) > 2*time.Second {
		t.Errorf("connecting to a hung libvirtd: %v after %s", err, time.Since(begin))
	}
	d.do("kill -CONT $(cat /run/libvirtd.pid)")

	// Events end with their context, and with libvirtd.
	c, err = Dial(within(t, 20*time.Second), d.socket())
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithCancel(context.Background())
	if events, err = c.Events(short); err != nil {
		t.Fatal(err)
	}
	cancel()
	for range events {
	}
	if c, err = Dial(within(t, 20*time.Second), d.socket()); err != nil {
		t.Fatal(err)
	}
	if events, err = c.Events(context.Background()); err != nil {
		t.Fatal(err)
	}
	d.do("kill -KILL $(cat /run/libvirtd.pid)")
	expect(Closed, "")
	if locked(pidFile) {
		t.Error("a dead libvirtd's pid file counts as held")
	}
}

func TestSocket(t *testing.T) {
	other := filepath.Join(t.TempDir(), "socket")
	if _, running, err := Socket(other); err == nil || running {
		t.Errorf("a socket that is not there: %t, %v", running, err)
	}
	l, err := net.Listen("unix", other)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if s, running, err := Socket(other); s != other || !running || err != nil {
		t.Errorf("%s, %t, %v", s, running, err)
	}
	if locked(filepath.Join(t.TempDir(), "none.pid")) {
		t.Error("no pid file is held")
	}
	stale := filepath.Join(t.TempDir(), "stale.pid")
	if err := os.WriteFile(stale, []byte("1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if locked(stale) {
		t.Error("a stale pid file counts as held")
	}
}

func TestResolveVolume(t *testing.T) {
	run, etc := t.TempDir(), t.TempDir()
	pool := func(folder, name, typ, path string, state bool) {
		t.Helper()
		xml := "<pool type='" + typ + "'>\n  <name>" + name + "</name>\n  <source>\n    <dir path='/not/this'/>\n  </source>\n  <target>\n    <path>" + path + "</path>\n  </target>\n</pool>\n"
		if state {
			xml = "<poolstate>\n" + xml + "</poolstate>\n"
		}
		xml = "<!--\nWARNING: THIS IS AN AUTO-GENERATED FILE. <pool type='dir'/>\n-->\n\n" + xml
		if err := os.WriteFile(filepath.Join(folder, name+".xml"), []byte(xml), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pool(run, "default", "dir", "/var/lib/libvirt/images", true)
	pool(etc, "default", "dir", "/moved/since", false)
	pool(etc, "off", "netfs", "/mnt/nfs/", false)
	pool(etc, "usb", "fs", "/mnt/usb", false)
	pool(etc, "vg", "logical", "/dev/vg", false)
	pool(etc, "ceph", "rbd", "", false)
	pool(etc, "odd", "dir", "relative", false)
	if err := os.WriteFile(filepath.Join(etc, "broken.xml"), []byte("<pool type='dir'><target>"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(etc, "nothing.xml"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ pool, volume, want string }{
		{"default", "a.qcow2", "/var/lib/libvirt/images/a.qcow2"},
		{"off", "b", "/mnt/nfs/b"},
		{"usb", "..c", "/mnt/usb/..c"},
		{"vg", "lv", ""},
		{"ceph", "image", ""},
		{"odd", "a", ""},
		{"broken", "a", ""},
		{"nothing", "a", ""},
		{"none", "a", ""},
		{"../default", "a", ""},
		{"default", "../a", ""},
		{"default", "..", ""},
		{"default", "a/b", ""},
		{"default", "", ""},
		{"", "a", ""},
		{"default", "a\x00b", ""},
		{strings.Repeat("p", 300), "a", ""},
	} {
		got, err := resolveVolume([]string{run, etc}, c.pool, c.volume)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%.30q, %q: %q, %v, want %q", c.pool, c.volume, got, err, c.want)
		}
		if (c.pool == "vg" || c.pool == "ceph") != errors.Is(err, ErrNotAFile) {
			t.Errorf("%q: %v", c.pool, err)
		}
	}
}

func FuzzPoolTarget(f *testing.F) {
	f.Add("<poolstate><pool type='dir'><target><path>/a</path></target></pool></poolstate>")
	f.Add("<pool type='fs'><target><path>b</path></target></pool>")
	f.Add("<!-- <pool> --><pool")
	f.Fuzz(func(t *testing.T, xml string) {
		if p, err := poolTarget(strings.NewReader(xml)); err == nil && !filepath.IsAbs(p) {
			t.Fatalf("%q", p)
		}
	})
}
