package lab

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// HostOptions say how a host differs from the usual one.
type HostOptions struct {
	Name  string // host name; "host" if empty
	Deb   string // package to install once it is up; libvirtd is then restarted
	NoTPM bool   // no software TPM
	Share string // a folder of the machine, seen as /share by the host
	// Setup runs before the first boot; path gives where a file of the host
	// is to be written.
	Setup func(path func(string) string) error
}

// Host is one test host. Its methods fail the test that it is bound to.
type Host struct {
	*machine
	t T
}

// machine is the running host, shared by all Hosts bound to it.
type machine struct {
	opts   HostOptions
	dir    string // of the machine, everything of this host
	lock   *os.File
	shell  int // process id; its mount namespace holds the disk
	leader int // process id of the host's PID 1
	gone   chan struct{}
	// BootTime is how long the last boot took until systemd called it running.
	BootTime time.Duration
}

// Result is what a command gave.
type Result struct {
	Stdout, Stderr string
	Code           int
	Took           time.Duration
}

// NewHost boots a host, which ends with the test.
func NewHost(t T, opts HostOptions) *Host {
	t.Helper()
	if opts.Name == "" {
		opts.Name = "host"
	}
	m := &machine{opts: opts}
	t.Cleanup(m.close)
	h := &Host{m, t}
	if err := m.create(); err != nil {
		t.Fatalf("lab: host %s: %v", opts.Name, err)
	}
	if err := m.boot(); err != nil {
		t.Fatalf("lab: host %s: %v\n%s", opts.Name, err, m.bootLog())
	}
	t.Logf("host %s is up after %.1f s", opts.Name, m.BootTime.Seconds())
	if opts.Deb != "" {
		h.InstallDeb(opts.Deb)
		h.Must("systemctl", "restart", "libvirtd")
	}
	return h
}

// In is the same host for a subtest.
func (h *Host) In(t T) *Host { return &Host{h.machine, t} }

// create makes the host's folder and its empty disk.
func (m *machine) create() error {
	work, err := workDir()
	if err != nil {
		return err
	}
	if m.dir, err = os.MkdirTemp(work, "host-"+m.opts.Name+"-"); err != nil {
		return err
	}
	if m.lock, err = os.Create(filepath.Join(m.dir, "lock")); err != nil {
		return err
	}
	if err := syscall.Flock(int(m.lock.Fd()), syscall.LOCK_EX); err != nil {
		return err
	}
	image := filepath.Join(m.dir, "disk.img")
	f, err := os.Create(image)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(8 << 30); err != nil {
		return err
	}
	mkfs, err := lookPath("mkfs.ext4")
	if err != nil {
		return err
	}
	// Everything lazily: the image stays sparse and quick to search.
	cmd := exec.Command(mkfs, "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", image)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	return nil
}

// bootScript runs in new namespaces of mounts and processes. Arguments: the host's folder, a
// number of cgroup folders, that many folders, systemd-nspawn's command line.
const bootScript = `set -e
cd "$1"; n=$2; shift 2
mount -t proc proc /proc
mount -t tmpfs run /run
while [ $n -gt 0 ]; do echo $$ >"$1/cgroup.procs" || :; shift; n=$((n-1)); done
mkdir -p disk root
mount -o loop,noinit_itable disk.img disk
mkdir -p disk/upper disk/work
echo mounted
read go
mount -t overlay lab -o lowerdir=/,upperdir=disk/upper,workdir=disk/work root
set +e
while :; do
	"$@" </dev/null >console.log 2>&1
	[ $? = 133 ] || exit # systemd-nspawn's word for a reboot
done
`

// boot starts the host and waits until its systemd says that it is running.
func (m *machine) boot() error {
	start := time.Now()
	first := m.leader == 0
	cgroups := makeCgroups(filepath.Base(m.dir))
	args := []string{"-c", bootScript, "lab", m.dir, strconv.Itoa(len(cgroups))}
	args = append(args, cgroups...)
	args = append(args, "systemd-nspawn", "--quiet", "--directory="+filepath.Join(m.dir, "root"), "--boot",
		"--machine="+m.opts.Name, "--register=no", "--keep-unit", "--capability=all", "--system-call-filter=pidfd_getfd", "--private-network",
		"--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=read-only")
	if m.opts.Share != "" {
		args = append(args, "--bind="+m.opts.Share+":/share")
	}
	args = append(args, "systemd.unit=multi-user.target")

	cmd := exec.Command("/bin/sh", args...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:       true,
		Unshareflags: syscall.CLONE_NEWNS, // which Go makes private
		// The death of a namespace's first process, here the shell, takes all
		// others along; that of systemd-nspawn would not.
		Cloneflags: syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	stderr := new(bytes.Buffer)
	cmd.Stderr = stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	// The parent-death signal follows the thread that forked: keep it.
	started := make(chan error)
	m.gone = make(chan struct{})
	go func() {
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Process.Wait()
			close(m.gone)
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	m.shell = cmd.Process.Pid
	if line, _ := bufio.NewReader(stdout).ReadString('\n'); line != "mounted\n" {
		<-m.gone
		return fmt.Errorf("cannot mount: %s", stderr)
	}
	if first {
		if err := m.setup(); err != nil {
			return err
		}
	}
	if _, err := io.WriteString(stdin, "go\n"); err != nil {
		return err
	}
	stdin.Close()
	stdout.Close()
	if err := m.waitRunning(0); err != nil {
		return err
	}
	m.BootTime = time.Since(start)
	return nil
}

// waitRunning waits for a PID 1 other than old and for its "running".
func (m *machine) waitRunning(old int) error {
	deadline := time.Now().Add(90 * time.Second)
	last := ""
	for time.Now().Before(deadline) {
		select {
		case <-m.gone:
			return errors.New("the host died")
		case <-time.After(50 * time.Millisecond):
		}
		if m.leader = childInit(m.shell); m.leader == 0 || m.leader == old {
			continue
		}
		r := m.run(context.Background(), nil, "systemctl", "is-system-running", "--wait")
		if last = strings.TrimSpace(r.Stdout); last == "running" {
			return nil
		}
		if last == "degraded" {
			failed := m.run(context.Background(), nil, "systemctl", "--failed", "--no-legend", "--plain")
			return fmt.Errorf("failed units:\n%s", failed.Stdout)
		}
	}
	return fmt.Errorf("not up after 90 s: %s", last)
}

// childInit finds the host's PID 1: the child of the shell's systemd-nspawn
// that is also PID 1 of a namespace of its own.
func childInit(shell int) int {
	for _, nspawn := range children(shell) {
		for _, child := range children(nspawn) {
			status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", child))
			for line := range strings.Lines(string(status)) {
				pids, ok := strings.CutPrefix(line, "NSpid:")
				if f := strings.Fields(pids); ok && len(f) == 3 && f[2] == "1" {
					return child
				}
			}
		}
	}
	return 0
}

// children gives the processes that a process and its threads have started.
func children(pid int) []int {
	var pids []int
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, task := range tasks {
		b, _ := os.ReadFile(task)
		for _, f := range strings.Fields(string(b)) {
			if child, err := strconv.Atoi(f); err == nil {
				pids = append(pids, child)
			}
		}
	}
	return pids
}

// bootLog is the end of what the host's console said.
func (m *machine) bootLog() string {
	b, _ := os.ReadFile(filepath.Join(m.dir, "console.log"))
	if len(b) > 4096 {
		b = b[len(b)-4096:]
	}
	return string(b)
}

// upper is the host's writable layer, as the machine sees it.
func (m *machine) upper() string {
	return fmt.Sprintf("/proc/%d/root%s/disk/upper", m.shell, m.dir)
}

// kill ends the host at once, as a power switch does.
func (m *machine) kill() {
	if m.shell != 0 {
		syscall.Kill(m.shell, syscall.SIGKILL)
		<-m.gone
		m.shell = 0
	}
}

func (m *machine) close() {
	m.kill()
	if m.dir == "" {
		return
	}
	if os.Getenv("VIRT_TRUST_LAB_KEEP") == "" {
		// The mount namespace, and with it the loop device, ends with the
		// last of the host's processes, a moment after the shell.
		for range 50 {
			removeCgroups(filepath.Base(m.dir))
			if err := os.RemoveAll(m.dir); err == nil && !anyExists(cgroupDirs(filepath.Base(m.dir))) {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	if m.lock != nil {
		m.lock.Close()
	}
}

func anyExists(paths []string) bool {
	for _, p := range paths {
		if _, err := os.Stat(p); err == nil {
			return true
		}
	}
	return false
}

// run runs a command in all of the host's namespaces, as root.
func (m *machine) run(ctx context.Context, stdin io.Reader, args ...string) Result {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	enter := []string{
		"-t", strconv.Itoa(m.leader), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "--",
		"/usr/bin/env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root", "LANG=C.UTF-8", "TERM=dumb",
	}
	cmd := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errOut
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	start := time.Now()
	err := cmd.Run()
	r := Result{Stdout: out.String(), Stderr: errOut.String(), Took: time.Since(start)}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		r.Code, r.Stderr = -1, r.Stderr+"\nlab: killed: took more than 3 minutes"
	case errors.As(err, &exit):
		r.Code = exit.ExitCode()
	case err != nil:
		r.Code, r.Stderr = -1, r.Stderr+err.Error()
	}
	return r
}

// Run runs a command on the host as root, for at most three minutes.
func (h *Host) Run(args ...string) Result {
	h.t.Helper()
	return h.run(context.Background(), nil, args...)
}

// RunInput is Run with something on the command's standard input.
func (h *Host) RunInput(stdin string, args ...string) Result {
	h.t.Helper()
	return h.run(context.Background(), strings.NewReader(stdin), args...)
}

// RunAs is Run as another user of the host.
func (h *Host) RunAs(user string, args ...string) Result {
	h.t.Helper()
	return h.Run(append([]string{"runuser", "-u", user, "--"}, args...)...)
}

// Must is Run for what has to succeed; it gives stdout.
func (h *Host) Must(args ...string) string {
	h.t.Helper()
	r := h.Run(args...)
	if r.Code != 0 {
		h.t.Fatalf("%s: %s: exit %d\n%s%s", h.opts.Name, strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// Shell is Must for a script of sh.
func (h *Host) Shell(script string) string {
	h.t.Helper()
	return h.Must("sh", "-ec", script)
}

// Enter is a command for the machine that runs args on the host with this
// process's terminal.
func (h *Host) Enter(args ...string) *exec.Cmd {
	enter := []string{"-t", strconv.Itoa(h.leader), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "--"}
	cmd := exec.Command("nsenter", append(enter, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd
}

// Path is where the machine finds a file of the running host. It is for plain
// paths: an absolute symbolic link on the way leads astray.
func (h *Host) Path(path string) string {
	return fmt.Sprintf("/proc/%d/root%s", h.leader, path)
}

// WriteFile writes a file of the host.
func (h *Host) WriteFile(path string, data []byte, perm os.FileMode) {
	h.t.Helper()
	if err := os.MkdirAll(filepath.Dir(h.Path(path)), 0o755); err != nil {
		h.t.Fatalf("%v", err)
	}
	if err := os.WriteFile(h.Path(path), data, perm); err != nil {
		h.t.Fatalf("%v", err)
	}
	if err := os.Chmod(h.Path(path), perm); err != nil {
		h.t.Fatalf("%v", err)
	}
}

// ReadFile reads a file of the host.
func (h *Host) ReadFile(path string) []byte {
	h.t.Helper()
	b, err := os.ReadFile(h.Path(path))
	if err != nil {
		h.t.Fatalf("%v", err)
	}
	return b
}

// InstallDeb installs, upgrades or reinstalls virt-trust from a file of the
// machine, and virt-trust-cli of the same build, with this host's TPM in its
// configuration.
func (h *Host) InstallDeb(path string) {
	h.t.Helper()
	const config = "/etc/virt-trust/virt-trustd.toml"
	if _, err := os.Stat(h.Path(config)); errors.Is(err, os.ErrNotExist) {
		h.WriteFile(config, []byte("[tpm]\ndevice = \""+TPMSocket+"\"\n"), 0o644)
	}
	h.dpkg(path, beside(path, "virt-trust-cli"))
}

// InstallVerifier installs the Verifier's package of the same build.
func (h *Host) InstallVerifier(path string) {
	h.t.Helper()
	h.dpkg(beside(path, "virt-trust-cli"), beside(path, "virt-trust-verifier"))
}

// beside is another package of the same build.
func beside(deb, name string) string {
	_, version, _ := strings.Cut(filepath.Base(deb), "_")
	return filepath.Join(filepath.Dir(deb), name+"_"+version)
}

// dpkg installs those of the packages that there are.
func (h *Host) dpkg(paths ...string) {
	h.t.Helper()
	args := []string{"env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--force-confold", "--force-unsafe-io", "-i"}
	for _, path := range paths {
		deb, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // of an older version
		}
		if err != nil {
			h.t.Fatalf("lab: %v", err)
		}
		h.WriteFile("/root/"+filepath.Base(path), deb, 0o644)
		args = append(args, "/root/"+filepath.Base(path))
	}
	h.Must(args...)
	h.Must("sync", "-f", "/") // once, and not for each file: a package that is installed outlives a power cut
}

// Reboot reboots the host in an orderly way.
func (h *Host) Reboot() {
	h.t.Helper()
	start, old := time.Now(), h.leader
	h.Must("systemctl", "reboot")
	if err := h.waitRunning(old); err != nil {
		h.t.Fatalf("lab: reboot of %s: %v\n%s", h.opts.Name, err, h.bootLog())
	}
	h.BootTime = time.Since(start)
}

// PowerCut cuts the host's power and boots it again: what was not yet written
// to its disk is lost. (What was written but not flushed survives, which a
// real disk does not promise.)
func (h *Host) PowerCut() {
	h.t.Helper()
	signalTree(h.leader, syscall.SIGSTOP)
	image := filepath.Join(h.dir, "disk.img")
	if err := h.copyDisk(image + ".cut"); err != nil {
		h.t.Fatalf("lab: %v", err)
	}
	h.kill()
	if err := os.Rename(image+".cut", image); err != nil {
		h.t.Fatalf("lab: %v", err)
	}
	if err := h.boot(); err != nil {
		h.t.Fatalf("lab: %s after a power cut: %v\n%s", h.opts.Name, err, h.bootLog())
	}
}

// signalTree signals a process and then all that descend from it.
func signalTree(pid int, sig syscall.Signal) {
	syscall.Kill(pid, sig)
	for _, child := range children(pid) {
		signalTree(child, sig)
	}
}

// copyDisk copies the disk of a host whose processes are stopped, as it is at
// one instant: the kernel may still be writing what they have left to it, so a
// copy during which anything reached the disk is made anew.
func (m *machine) copyDisk(to string) error {
	for range 100 {
		before, err := m.written()
		if err != nil {
			return err
		}
		if out, err := exec.Command("cp", "--sparse=always", filepath.Join(m.dir, "disk.img"), to).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		if after, err := m.written(); err == nil && after == before && strings.HasPrefix(after, "0 ") {
			return nil
		}
	}
	return errors.New("the disk does not come to rest")
}

// written gives how many requests the host's disk is working on, and how many
// writes, discards and flushes it has done (Documentation/block/stat.rst).
func (m *machine) written() (string, error) {
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", m.shell))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 5 || f[4] != filepath.Join(m.dir, "disk") {
			continue
		}
		b, err := os.ReadFile("/sys/dev/block/" + f[2] + "/stat")
		if err != nil {
			return "", err
		}
		if s := strings.Fields(string(b)); len(s) >= 17 {
			return s[8] + " " + s[4] + " " + s[11] + " " + s[15], nil
		}
	}
	return "", errors.New("the host's disk is not mounted")
}

// SearchDisk looks for a pattern in every block of the host's disk, deleted
// files and the journal of the file system included, and names the places:
// files by their path, other blocks by their offset.
func (h *Host) SearchDisk(pattern []byte) []string {
	h.t.Helper()
	h.Must("sync")
	var found []string
	upper := h.upper()
	filepath.WalkDir(upper, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil
		}
		if at, err := searchFile(path, pattern); err != nil {
			h.t.Fatalf("lab: %v", err)
		} else if len(at) > 0 {
			found = append(found, strings.TrimPrefix(path, upper))
		}
		return nil
	})
	at, err := searchFile(filepath.Join(h.dir, "disk.img"), pattern)
	if err != nil {
		h.t.Fatalf("lab: %v", err)
	}
	for _, offset := range at {
		found = append(found, fmt.Sprintf("disk offset %#x", offset))
	}
	return found
}

// searchFile gives the offsets of a pattern in a file, holes skipped.
func searchFile(path string, pattern []byte) ([]int64, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // removed while we walked
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	buf := make([]byte, 4<<20)
	var found []int64
	for off := int64(0); ; {
		data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return found, nil
		}
		if err != nil {
			return nil, fmt.Errorf("seek %s: %w", path, err)
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return nil, fmt.Errorf("seek %s: %w", path, err)
		}
		for off = data; off < hole; {
			n, err := f.ReadAt(buf[:min(int64(len(buf)), hole-off)], off)
			if n == 0 {
				if errors.Is(err, io.EOF) {
					return found, nil
				}
				return nil, err
			}
			for i := 0; ; {
				j := bytes.Index(buf[i:n], pattern)
				if j < 0 {
					break
				}
				if at := off + int64(i+j); len(found) == 0 || found[len(found)-1] != at {
					found = append(found, at)
				}
				i += j + 1
			}
			if off += int64(n); off < hole {
				off -= int64(len(pattern) - 1) // a match may span two reads
			}
		}
	}
}

// randomHex is n random bytes in hexadecimal.
func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return fmt.Sprintf("%x", b)
}

// randomUUID is a version 4 UUID.
func randomUUID() string {
	b := make([]byte, 16)
	rand.Read(b)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
