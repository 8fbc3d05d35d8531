package qemuargs

import (
	"strings"
	"testing"
)

const uuid = "85252c7c-cc0a-46cd-8c48-607366e42b5e"

// real is what libvirt 9.0 runs for a VM with a vTPM, with the words that a user
// chooses taken from vm.
func real(name, cmdline string) []string {
	return []string{
		"/usr/bin/qemu-system-x86_64", "-name", "guest=" + name + ",debug-threads=on", "-S",
		"-object", `{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-1-vm/master-key.aes"}`,
		"-machine", "pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram", "-accel", "tcg", "-cpu", "qemu64", "-m", "256",
		"-overcommit", "mem-lock=off", "-smp", "1,sockets=1,cores=1,threads=1", "-uuid", uuid, "-display", "none",
		"-no-user-config", "-nodefaults", "-chardev", "socket,id=charmonitor,fd=29,server=on,wait=off",
		"-mon", "chardev=charmonitor,id=monitor,mode=control", "-rtc", "base=utc", "-no-shutdown", "-no-acpi", "-boot", "strict=on",
		"-kernel", "/boot/vmlinuz", "-append", cmdline, "-device", `{"driver":"qemu-xhci","id":"usb","bus":"pci.1","addr":"0x0"}`,
		"-chardev", "socket,id=chrtpm,path=/run/libvirt/qemu/swtpm/1-vm-swtpm.sock", "-tpmdev", "emulator,id=tpm-tpm0,chardev=chrtpm",
		"-device", `{"driver":"tpm-crb","tpmdev":"tpm-tpm0","id":"tpm0"}`, "-audiodev", `{"id":"audio1","driver":"none"}`,
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny", "-msg", "timestamp=on",
	}
}

func without(argv []string, option string) []string {
	var out []string
	for i := 0; i < len(argv); i++ {
		if argv[i] == option {
			i++
			continue
		}
		out = append(out, argv[i])
	}
	return out
}

func TestParse(t *testing.T) {
	other := "00000000-0000-4000-8000-000000000001"
	probe := strings.Fields("/usr/bin/qemu-system-x86_64 -S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg -qmp unix:/var/lib/libvirt/qemu/qmp-A/qmp.monitor,server=on,wait=off -pidfile /p -daemonize")
	for _, c := range []struct {
		what string
		argv []string
		want Call
	}{
		{"libvirt's", real("vm", "console=ttyS0"), Call{true, uuid}},
		{"a VM without a vTPM", without(real("vm", "quiet"), "-tpmdev"), Call{false, uuid}},
		{"a TPM of the host's, passed through", append(without(real("vm", ""), "-tpmdev"), "-tpmdev", "passthrough,id=tpm-tpm0,path=/dev/tpm0"), Call{false, uuid}},
		{"spelt otherwise", append(without(real("vm", ""), "-tpmdev"), "--tpmdev", "id=x,type=emulator,chardev=c"), Call{true, uuid}},
		{"in JSON", append(without(real("vm", ""), "-tpmdev"), "-tpmdev", `{"type":"emulator","id":"x"}`), Call{true, uuid}},
		{"in JSON with escapes", append(without(real("vm", ""), "-tpmdev"), "-tpmdev", `{"type":"\u0065mulator"}`), Call{true, uuid}},
		{"a probe", probe, Call{}},
		{"--version", []string{"qemu", "--version"}, Call{}},
		{"-help", []string{"qemu", "-help"}, Call{}},
		{"a name with options in it", real("-uuid "+other, ""), Call{true, uuid}},
		{"a kernel's command line that is an option", real("vm", "-uuid"), Call{true, uuid}},
		{"a kernel's command line that is a vTPM's option", without(real("vm", "-tpmdev"), "-tpmdev"), Call{false, uuid}},
		{"two UUIDs", append(real("vm", ""), "-uuid", other), Call{true, ""}},
		{"the same one twice", append(real("vm", ""), "-uuid", strings.ToUpper(uuid)), Call{true, uuid}},
		{"no UUID", without(real("vm", ""), "-uuid"), Call{true, ""}},
		{"a word that is no UUID", append(without(real("vm", ""), "-uuid"), "-uuid", "x"), Call{true, ""}},
		{"a UUID with a value missing", append(real("vm", ""), "-uuid"), Call{true, uuid}},
		{"nothing", nil, Call{}},
	} {
		if got := Parse(c.argv); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.what, got, c.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(strings.Join(real("vm", "quiet"), "\n"))
	f.Add("qemu\n-tpmdev\nemulator\n-uuid\n" + uuid)
	f.Add("qemu\n-append\n-uuid\n-uuid\n" + uuid)
	f.Fuzz(func(t *testing.T, words string) {
		argv := strings.Split(words, "\n")
		c := Parse(argv)
		if c.UUID != "" && !strings.Contains(strings.ToLower(words), "-uuid\n"+c.UUID) {
			t.Errorf("%q: the UUID %q is made up", argv, c.UUID)
		}
		// Whatever stands before or after, a vTPM does not get out of sight.
		if !Parse(append(argv, "-tpmdev", "emulator,id=a,chardev=b")).VTPM {
			t.Errorf("%q hides a vTPM", argv)
		}
	})
}
