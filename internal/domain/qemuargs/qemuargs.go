// Package qemuargs reads from QEMU's command line whether it has a vTPM, and
// whose. It changes nothing in it.
package qemuargs

import (
	"strings"

	"virt-trust/internal/domain"
)

// Call is what a command line says.
type Call struct {
	VTPM bool   // an emulated TPM: swtpm, on a socket
	UUID string // of the VM, as libvirt names it by -uuid; "" if it does not, or names two
}

// Parse reads argv, argv[0] included. A vTPM is seen wherever the words stand
// for one, also where QEMU would take them for another option's value; a UUID is
// believed only where QEMU takes it for one. So words that a user chooses, such
// as a kernel's command line, can at worst ask for a grant that is not there.
func Parse(argv []string) Call {
	var c Call
	for i, w := range argv {
		name, ok := option(w)
		c.VTPM = c.VTPM || ok && name == "tpmdev" && i+1 < len(argv) && emulated(argv[i+1])
	}
	two := false
	for i := 1; i < len(argv); i++ {
		name, ok := option(argv[i])
		if !ok || alone[name] {
			continue
		}
		if i++; i == len(argv) || name != "uuid" {
			continue
		}
		uuid := strings.ToLower(argv[i])
		two = two || c.UUID != "" && c.UUID != uuid || !domain.IsUUID(uuid)
		c.UUID = uuid
	}
	if two {
		c.UUID = ""
	}
	return c
}

// option takes an option's dashes off, one or two, as QEMU's lookup_opt does.
func option(w string) (string, bool) {
	w, ok := strings.CutPrefix(w, "-")
	w, _ = strings.CutPrefix(w, "-")
	return w, ok && w != ""
}

// emulated reads the value of -tpmdev: [type=]emulator,… or, in JSON, one that
// has the word.
func emulated(value string) bool {
	if strings.HasPrefix(value, "{") {
		return strings.Contains(value, "emulator") || strings.Contains(value, `\`)
	}
	for part := range strings.SplitSeq(value, ",") {
		if part == "emulator" || part == "type=emulator" {
			return true
		}
	}
	return false
}

// alone are the options without a value, of QEMU 4 to 10 taken together
// (qemu-options.def, HAS_ARG 0). All others have one. An option that is newer
// than this list makes its follower unread, and so at worst a start refused.
var alone = map[string]bool{
	"h": true, "help": true, "version": true, "S": true, "snapshot": true, "usb": true, "nographic": true,
	"portrait": true, "full-screen": true, "curses": true, "sdl": true, "no-frame": true, "no-quit": true,
	"alt-grab": true, "ctrl-grab": true, "show-cursor": true, "win2k-hack": true, "no-fd-bootchk": true,
	"no-acpi": true, "no-hpet": true, "no-reboot": true, "no-shutdown": true, "daemonize": true,
	"enable-kvm": true, "enable-hax": true, "no-kvm": true, "no-kvm-irqchip": true, "no-kvm-pit": true,
	"no-kvm-pit-reinjection": true, "xen-attach": true, "xen-create": true, "xen-domid-restrict": true,
	"singlestep": true, "one-insn-per-tb": true, "preconfig": true, "mem-prealloc": true, "audio-help": true,
	"nodefaults": true, "no-user-config": true, "nodefconfig": true, "only-migratable": true,
	"enable-sync-profile": true, "enable-fips": true, "semihosting": true, "old-param": true, "localtime": true,
	"rtc-td-hack": true, "tdf": true, "perfmap": true, "jitdump": true, "async-teardown": true,
}
