package lab

import (
	"fmt"
	"os/exec"
	"strconv"
)

// Link joins two hosts by a cable of their own, as 10.77.0.1 and 10.77.0.2,
// and lets them find each other by name. Neither reaches anything else.
func Link(a, b *Host) {
	a.t.Helper()
	cmd := exec.Command("ip", "link", "add", "lab0", "netns", strconv.Itoa(a.leader),
		"type", "veth", "peer", "name", "lab0", "netns", strconv.Itoa(b.leader))
	if out, err := cmd.CombinedOutput(); err != nil {
		a.t.Fatalf("lab: link: %v: %s", err, out)
	}
	for i, h := range []*Host{a, b} {
		h.Shell(fmt.Sprintf("ip address add 10.77.0.%d/24 dev lab0; ip link set lab0 up; ip link set lo up", i+1))
		// A host whose own name means the loopback cannot be a migration's destination.
		h.Shell(fmt.Sprintf("printf '127.0.0.1 localhost\\n10.77.0.1 %s\\n10.77.0.2 %s\\n' >/etc/hosts", a.opts.Name, b.opts.Name))
	}
}

// OpenTCP lets the host's libvirtd listen for others, without authentication.
func (h *Host) OpenTCP() {
	h.t.Helper()
	h.Shell("systemctl -q stop libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket; systemctl start libvirtd-tcp.socket libvirtd.service")
}

// Migrate moves a running guest to another host, both hosts with the same
// HostOptions.Share.
func (g *Guest) Migrate(to *Host) Result {
	g.h.t.Helper()
	return g.h.Run("virsh", "migrate", "--live", "--persistent", "--undefinesource", "--unsafe", g.Name, "qemu+tcp://"+to.opts.Name+"/system")
}

// Star joins each host by a cable of its own to a center, which all find by its
// name. They do not reach each other.
func Star(center *Host, hosts ...*Host) {
	center.t.Helper()
	known := "127.0.0.1 localhost\n"
	for i, h := range hosts {
		cable := fmt.Sprintf("star%d", i)
		cmd := exec.Command("ip", "link", "add", cable, "netns", strconv.Itoa(center.leader),
			"type", "veth", "peer", "name", "star", "netns", strconv.Itoa(h.leader))
		if out, err := cmd.CombinedOutput(); err != nil {
			center.t.Fatalf("lab: link: %v: %s", err, out)
		}
		center.Shell(fmt.Sprintf("ip address add 10.78.%d.1/24 dev %s; ip link set %s up; ip link set lo up", i, cable, cable))
		h.Shell(fmt.Sprintf("ip address add 10.78.%d.2/24 dev star; ip link set star up; ip link set lo up", i))
		h.Shell(fmt.Sprintf("printf '127.0.0.1 localhost\\n10.78.%d.1 %s\\n127.0.1.1 %s\\n' >/etc/hosts", i, center.opts.Name, h.opts.Name))
		known += fmt.Sprintf("10.78.%d.2 %s\n", i, h.opts.Name)
	}
	center.WriteFile("/etc/hosts", []byte(known+"127.0.1.1 "+center.opts.Name+"\n"), 0o644)
}
