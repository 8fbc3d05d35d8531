package lab

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"virt-trust/internal/evidence/eventlog"
	"virt-trust/internal/vtpm/reason"
)

// Where a host that boots has its event log, and what it measures of it.
const (
	bootLogPath  = bootLog
	bootPCRsPath = labDir + "/boot.pcrs"
	bootService  = `[Unit]
Description=Firmware and boot loader of this test host
DefaultDependencies=no
After=hosttpm-mux.service
Before=libvirtd.service virtqemud.service virt-trustd.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'exec xargs tpm2_pcrextend -T swtpm:path=` + TPMSocket + ` <` + bootPCRsPath + `'

[Install]
WantedBy=multi-user.target
`
)

// bootFiles are what the host's boots are made of; "2" are those of an update.
var bootFiles = []string{"kernel", "initrd", "kernel2", "initrd2", "grub.cfg"}

// measured is the digests that a boot with this log extends, as tpm2_pcrextend
// takes them.
func measured(t *testing.T, l *eventlog.Log) string {
	t.Helper()
	one, err := l.Bank("sha256")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, e := range one.Events {
		if e.Type != eventlog.NoAction {
			fmt.Fprintf(&b, "%d:sha256=%x\n", e.PCR, e.Digests[0])
		}
	}
	return b.String()
}

// realBoot is the log of a machine that booted by shim, GRUB and Secure Boot,
// with its kernel and initrd exchanged for these.
func realBoot(t *testing.T, kernel, initrd []byte) *eventlog.Log {
	t.Helper()
	raw, err := os.ReadFile("../evidence/eventlog/testdata/grub.bin")
	if err != nil {
		t.Fatal(err)
	}
	l, err := eventlog.UntrustedParse(raw)
	if err == nil {
		l, err = l.Bank("sha256")
	}
	if err != nil {
		t.Fatal(err)
	}
	image, err := eventlog.Measure(bytes.NewReader(kernel), int64(len(kernel)), "sha256")
	if err != nil {
		t.Fatal(err)
	}
	flat := func(b []byte) [][]byte { d := sha256.Sum256(b); return [][]byte{d[:]} }
	seen := false
	for i, e := range l.Events {
		switch {
		case e.PCR == 9 && strings.HasPrefix(string(e.Data), "/vmlinuz"):
			l.Events[i].Digests, seen = flat(kernel), true
		case e.PCR == 9 && strings.HasPrefix(string(e.Data), "/initrd"):
			l.Events[i].Digests = flat(initrd)
		case seen && e.PCR == 4 && e.Type == eventlog.BootApplication:
			l.Events[i].Digests = [][]byte{image.Image}
		}
	}
	return l
}

// flashed is a log of the same boot with another firmware.
func flashed(l *eventlog.Log, version uint64) *eventlog.Log {
	out := &eventlog.Log{Algorithms: l.Algorithms}
	for _, e := range l.Events {
		if e.Type == eventlog.FirmwareBlob {
			d := sha256.Sum256(binary.BigEndian.AppendUint64(bytes.Clone(e.Digests[0]), version))
			e.Digests = [][]byte{d[:]}
		}
		out.Events = append(out.Events, e)
	}
	return out
}

// TestHostUpdates rehearses updates of kernel and firmware: VMs come back with
// what they have sealed, and no other boot gets at it.
func TestHostUpdates(t *testing.T) {
	t.Parallel()
	Require(t)
	kernelPath, initrdPath, _, err := helpers()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"grub.cfg": []byte("set timeout=0\n")}
	for name, path := range map[string]string{"kernel": kernelPath, "initrd": initrdPath} {
		if files[name], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
		files[name+"2"] = append(bytes.Clone(files[name]), "of an update"...)
	}
	first, second := realBoot(t, files["kernel"], files["initrd"]), realBoot(t, files["kernel2"], files["initrd2"])
	third, fourth := flashed(second, 3), flashed(second, 4)

	host := guarded(t, HostOptions{Name: "updates", Setup: func(path func(string) string) error {
		for name, text := range map[string]string{
			bootLogPath: string(first.Marshal()), bootPCRsPath: measured(t, first),
			"/etc/systemd/system/hostboot.service": bootService,
			"/etc/virt-trust/virt-trustd.toml":     "[tpm]\ndevice = \"" + TPMSocket + "\"\nevent_log = \"" + bootLogPath + "\"\n",
		} {
			if err := os.WriteFile(path(name), []byte(text), 0o644); err != nil {
				return err
			}
		}
		for _, name := range bootFiles {
			if err := os.WriteFile(path("/srv/"+name), files[name], 0o644); err != nil {
				return err
			}
		}
		return os.Symlink("../hostboot.service", path("/etc/systemd/system/multi-user.target.wants/hostboot.service"))
	}})
	// next is what the host will boot into.
	next := func(l *eventlog.Log) {
		host.WriteFile(bootLogPath, l.Marshal(), 0o644)
		host.WriteFile(bootPCRsPath, []byte(measured(t, l)), 0o644)
	}
	// boots is a reboot, as far as TPM and virt-trustd are concerned.
	boots := func(l *eventlog.Log) {
		next(l)
		host.Must("systemctl", "stop", "virt-trustd")
		host.RestartTPM()
		host.Must("systemctl", "restart", "hostboot")
		host.Must("systemctl", "start", "virt-trustd")
	}
	// dryRun gives its text and its verdict.
	dryRun := func() (string, int) {
		r := host.Run("virt-trust", "host", "dry-run")
		return r.Stdout + r.Stderr, r.Code
	}
	g := sealed(t, host.In(t), VM{Name: "guest", TPM: true, Disk: "qcow2"})
	if out, code := dryRun(); code != 0 || !strings.Contains(out, "in an approved state") {
		t.Fatalf("dry run: exit %d, %s", code, out)
	}

	// The kernel is updated: predicted, approved, rebooted.
	update := []string{"virt-trust", "host", "approve", "--predict", "--kernel", "/srv/kernel=/srv/kernel2", "--initrd", "/srv/initrd=/srv/initrd2", "--note", "kernel update"}
	t.Log(host.Must(append(update, "--dry-run")...))
	if states := host.Must("virt-trust", "host", "states"); strings.Contains(states, "kernel update") {
		t.Errorf("a dry run approves:\n%s", states)
	}
	if out := host.Must(update...); !strings.Contains(out, "PCR 9: file /vmlinuz, loaded by GRUB changed") || !strings.Contains(out, "PCR 4: ") {
		t.Errorf("approve --predict says\n%s", out)
	}
	if r := host.Run("virt-trust", "host", "approve", "--predict", "--kernel", "/srv/initrd=/srv/kernel2", "--initrd", "/srv/kernel=/srv/initrd2"); r.Code == 0 {
		t.Errorf("a prediction with the wrong files: %s", r.Stdout)
	}
	next(second)
	host.Reboot()
	starts(t, g)
	if out, code := dryRun(); code != 0 {
		t.Errorf("after the kernel's update: exit %d, %s", code, out)
	}

	// The firmware is updated: one boot goes unchecked.
	t.Log(host.Must("virt-trust", "host", "approve", "--next-boot", "--note", "firmware update"))
	if status := host.Run("virt-trust", "status").Stdout; !strings.Contains(status, "NOT CHECKED") {
		t.Errorf("virt-trust status does not warn:\n%s", status)
	}
	next(third)
	host.Reboot()
	starts(t, g)
	if j := host.Must("journalctl", "-u", "virt-trustd", "-p", "err", "-o", "cat", "MESSAGE_ID=a1a842f0af374620936609df5facc2d5"); !strings.Contains(j, "this boot was not checked") {
		t.Errorf("the journal says %q", j)
	}

	// Firmware that nobody approved: refused, and told by the event.
	boots(fourth)
	refused(t, g, reason.HostNotApproved)
	out, code := dryRun()
	if code != 3 || !strings.Contains(out, "PCR 0: firmware volume changed (digest ") || strings.Contains(out, "PCR 4: ") {
		t.Errorf("dry run: exit %d, %s", code, out)
	}
	t.Log(out)
	// Back, and the first kernel is revoked: also old files do not bring it back.
	boots(third)
	starts(t, g)
	var states []struct{ ID, Note string }
	if err := json.Unmarshal([]byte(host.Must("virt-trust", "host", "states", "--json")), &states); err != nil || len(states) != 3 {
		t.Fatalf("states: %v, %v", states, err)
	}
	old := states[len(states)-1]
	if old.Note != "first provisioning" {
		t.Fatalf("the oldest state is %+v", old)
	}
	host.Shell("cp -a /var/lib/virt-trust/tpm /root/tpm")
	t.Log(host.Must("virt-trust", "host", "revoke", old.ID, "--note", "an old kernel"))
	starts(t, g)
	boots(first)
	refused(t, g, reason.HostNotApproved)
	if out, _ := dryRun(); !strings.Contains(out, "PCR 9: file /vmlinuz, loaded by GRUB changed") {
		t.Errorf("dry run: %s", out)
	}
	host.Shell("systemctl stop virt-trustd; cp -a /root/tpm/policies/. /var/lib/virt-trust/tpm/policies/; systemctl start virt-trustd")
	refused(t, g, reason.HostNotApproved)
	host.Shell("systemctl stop virt-trustd; rm -r /var/lib/virt-trust/tpm; cp -a /root/tpm /var/lib/virt-trust/tpm; systemctl start virt-trustd")
	refused(t, g, reason.HostNotApproved)
	history := host.Must("virt-trust", "host", "history")
	for _, want := range []string{"first provisioning", "kernel update", "next-boot-given", "next-boot-used", "revoked", "an old kernel"} {
		if !strings.Contains(history, want) {
			t.Errorf("the history has no %q", want)
		}
	}
	t.Log(history)
}
