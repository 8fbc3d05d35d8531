package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"virt-trust/internal/platform/poll"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// caller is the process behind a call, as bus and kernel know it.
type caller struct {
	name   string // on the bus
	uid    uint32
	pid    int
	exe    string
	parent int
	cgroup string
	traced bool // by a debugger, which sees what the process gets
}

// identify resolves a caller. What /proc says of a process id may be said of
// another process that got the number since; so the bus is asked again after
// /proc was read, and its process descriptor is used where it gives one.
func identify(ctx context.Context, conn *dbus.Conn, sender string) (*caller, error) {
	c := &caller{name: sender}
	var cred map[string]dbus.Variant
	if err := conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.GetConnectionCredentials", 0, sender).Store(&cred); err != nil {
		return nil, fmt.Errorf("asking the bus who calls: %w", err)
	}
	pidfd := -1
	if v, ok := cred["ProcessFD"]; ok {
		if fd, ok := v.Value().(dbus.UnixFD); ok {
			pidfd = int(fd)
			defer unix.Close(pidfd)
		}
	}
	uid, ok := cred["UnixUserID"].Value().(uint32)
	pid, ok2 := cred["ProcessID"].Value().(uint32)
	if !ok || !ok2 {
		return nil, errors.New("the bus does not say who calls")
	}
	c.uid, c.pid = uid, int(pid)
	if err := c.readProc(); err != nil {
		return nil, err
	}
	if pidfd >= 0 {
		if n, err := poll.Now(unix.PollFd{Fd: int32(pidfd), Events: unix.POLLIN}); err != nil || n != 0 {
			return nil, errors.New("the caller has ended")
		}
		return c, nil
	}
	var again uint32
	if err := conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.GetConnectionUnixProcessID", 0, sender).Store(&again); err != nil || again != pid {
		return nil, errors.New("the caller has ended")
	}
	return c, nil
}

func (c *caller) readProc() (err error) {
	if c.exe, err = exeOf(c.pid); err != nil {
		return err
	}
	dir := filepath.Join("/proc", strconv.Itoa(c.pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return err
	}
	// The second field is the program's name in parentheses, and may hold some.
	f := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(f) < 2 {
		return errors.New("/proc says nothing of the caller")
	}
	if c.parent, err = strconv.Atoi(string(f[1])); err != nil {
		return err
	}
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return err
	}
	c.traced = !bytes.Contains(status, []byte("\nTracerPid:\t0\n"))
	b, err := os.ReadFile(filepath.Join(dir, "cgroup"))
	c.cgroup = string(b)
	return err
}

// exeOf gives a process's executable. One that was replaced by an upgrade
// counts as the one of its name.
func exeOf(pid int) (string, error) {
	exe, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "exe"))
	return strings.TrimSuffix(exe, " (deleted)"), err
}

// byLibvirt reports whether a process was started by a libvirt daemon.
func (c *caller) byLibvirt() bool {
	exe, err := exeOf(c.parent)
	return err == nil && (filepath.Base(exe) == "libvirtd" || filepath.Base(exe) == "virtqemud")
}

// authorized asks polkit whether a caller may do an action. root may, also
// where there is no polkit.
func authorized(ctx context.Context, conn *dbus.Conn, c *caller, action string) (bool, error) {
	if c.uid == 0 {
		return true, nil
	}
	subject := struct {
		Kind    string
		Details map[string]dbus.Variant
	}{"system-bus-name", map[string]dbus.Variant{"name": dbus.MakeVariant(c.name)}}
	var result struct {
		Authorized, Challenge bool
		Details               map[string]string
	}
	const interactive = uint32(1)
	err := conn.Object("org.freedesktop.PolicyKit1", "/org/freedesktop/PolicyKit1/Authority").CallWithContext(ctx,
		"org.freedesktop.PolicyKit1.Authority.CheckAuthorization", 0, subject, action, map[string]string{}, interactive, "").Store(&result)
	return result.Authorized, err
}

// startOf gives when a process was started, to a hundredth of a second:
// starttime of /proc/PID/stat after btime of /proc/stat (proc(5)).
func startOf(pid int) (time.Time, error) {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return time.Time{}, err
	}
	f := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	all, err := os.ReadFile("/proc/stat")
	if err != nil {
		return time.Time{}, err
	}
	const fields, userHZ = 20, 100 // starttime is the 20th after the name; USER_HZ is 100 on Linux
	_, rest, found := bytes.Cut(all, []byte("\nbtime "))
	if len(f) < fields || !found {
		return time.Time{}, errors.New("/proc does not say when processes started")
	}
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	boot, err := strconv.ParseInt(string(line), 10, 64)
	if err != nil {
		return time.Time{}, err
	}
	ticks, err := strconv.ParseInt(string(f[fields-1]), 10, 64)
	if err != nil {
		return time.Time{}, err
	}
	return time.Unix(boot, 0).Add(time.Duration(ticks) * time.Second / userHZ), nil
}
