package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"virt-trust/internal/lab"
)

// demo is what `make demo` shows. It fails unless all happens as it says.
func demo(s *session) {
	start := time.Now()
	d := &demonstration{s: s}
	d.step("A private test host boots: its own systemd, libvirtd and TPM, nothing of this machine's.")
	d.h = lab.NewHost(quiet{s}, lab.HostOptions{Name: "demo"})
	d.note("up after %.1f s; virt-trust's package is installed, libvirtd restarted", d.h.BootTime.Seconds())
	d.h.InstallDeb(s.deb())
	d.h.Must("systemctl", "restart", "libvirtd")
	d.ok("virt-trust", "status")

	d.step("A VM with a vTPM, started by virsh like any other. Its guest seals a secret in the vTPM.")
	g := d.h.NewVM(lab.VM{Name: "vault", TPM: true, Disk: "qcow2"})
	d.ok("virsh", "start", "vault")
	g.Expect("VT: ready")
	d.guest(g, "seal the first secret", "sealed the first secret")
	d.ok("virt-trust", "list")

	d.step("The VM is shut down. An attacker with access to the disk keeps a copy of its vTPM,")
	d.more("all of it encrypted: the secret is nowhere on the host's disk, not even in deleted blocks.")
	g.Shutdown()
	older := "/root/older-copy"
	d.ok("cp", "-a", g.StateDir(), older)
	if found := d.h.SearchDisk(lab.Mask("the first secret")); len(found) > 0 {
		s.Fatalf("the secret is on the disk in the clear: %q", found)
	}
	d.note("searched every block of the disk: not found")

	d.step("Later the guest changes its secret.")
	d.ok("virsh", "start", "vault")
	g.Expect("VT: ready")
	d.guest(g, "unseal", "unsealed the first secret")
	d.guest(g, "seal the second secret", "sealed the second secret")
	g.Shutdown()

	d.step("The attack: the vTPM is swapped for its older copy, to bring the first secret back.")
	d.ok("rm", "-r", g.StateDir())
	d.ok("cp", "-a", older, g.StateDir())
	d.refused("vtpm-rolled-back", "virsh", "start", "vault")
	d.refused("vtpm-rolled-back", "virt-trust", "check", "vault")

	d.step("The way back: virt-trust has kept the state that the list expects.")
	d.ok("virt-trust", "repair", "vault")
	d.ok("virsh", "start", "vault")
	g.Expect("VT: ready")
	d.guest(g, "unseal", "unsealed the second secret")
	d.ok("virt-trust", "log")

	s.end()
	d.step("Done in %.0f s, the host is gone again.", time.Since(start).Seconds())
}

// demonstration narrates on stdout.
type demonstration struct {
	s *session
	h *lab.Host
	n int
}

func (d *demonstration) step(format string, args ...any) {
	d.n++
	fmt.Printf("\n%s%d. %s%s\n", bold(), d.n, fmt.Sprintf(format, args...), plain())
}

func (d *demonstration) more(text string) {
	fmt.Printf("%s   %s%s\n", bold(), text, plain())
}

func (d *demonstration) note(format string, args ...any) {
	fmt.Printf("   (%s)\n", fmt.Sprintf(format, args...))
}

// show runs a command and prints it with all that it says.
func (d *demonstration) show(args ...string) lab.Result {
	fmt.Printf("   # %s\n", strings.Join(args, " "))
	r := d.h.Run(args...)
	if text := strings.TrimSpace(r.Stdout + r.Stderr); text != "" {
		fmt.Println("   " + strings.ReplaceAll(text, "\n", "\n   "))
	}
	return r
}

func (d *demonstration) ok(args ...string) {
	if r := d.show(args...); r.Code != 0 {
		d.s.Fatalf("%s: exit %d; it should have succeeded\n%s", strings.Join(args, " "), r.Code,
			d.h.Run("journalctl", "-u", "virt-trustd", "-n", "30", "--no-pager").Stdout)
	}
}

func (d *demonstration) refused(reason string, args ...string) {
	r := d.show(args...)
	if r.Code == 0 || !strings.Contains(r.Stdout+r.Stderr, reason) {
		d.s.Fatalf("%s: exit %d; it should have been refused for %s", strings.Join(args, " "), r.Code, reason)
	}
}

func (d *demonstration) guest(g *lab.Guest, command, want string) {
	got := g.Ask(command)
	fmt.Printf("   guest> %s\n   %s\n", command, got)
	if got != want {
		d.s.Fatalf("the guest should have said %q", want)
	}
}

// quiet is a session without a log.
type quiet struct{ *session }

func (quiet) Logf(string, ...any) {}

var terminal = func() bool {
	fi, err := os.Stdout.Stat()
	return err == nil && fi.Mode()&os.ModeCharDevice != 0
}()

func bold() string {
	if terminal {
		return "\x1b[1m"
	}
	return ""
}

func plain() string {
	if terminal {
		return "\x1b[0m"
	}
	return ""
}
