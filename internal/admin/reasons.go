package admin

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"virt-trust/internal/vtpm/reason"
)

// Reason is the explanation of a reason code, here and in virt-trust-reasons(7).
type Reason struct {
	Code    reason.Code `json:"code"`
	Meaning string      `json:"meaning"`
	When    string      `json:"when"`
	Mend    string      `json:"mend"`
}

// advice says when a code appears and which way leads back. A sentence in
// 'quotes' is a command.
var advice = map[reason.Code][2]string{
	reason.HostNotApproved: {
		"The TPM did not release the list key or a VM's keys, because PCRs of the host differ from those that they were bound to: other firmware, boot loader, kernel, command line or Secure Boot keys.",
		"'virt-trust host dry-run' says what changed. If nobody meant it, find out who did. Boot the host as it was; an update is approved from there beforehand, with 'virt-trust host approve --predict' or, where the next boot cannot be told, '--next-boot'. Where no approved state can be booted any more: 'virt-trust recover' with the recovery key.",
	},
	reason.ListRolledBack: {
		"The file of the vTPM list is an older one: from a backup, a snapshot of the file system, or an attacker's copy. virt-trustd remembers the newest, and after a boot the counter in the host's TPM tells. A counter that was deleted, or that went back with a TPM which is itself emulated, is told in the same way.",
		"Find out who did it. If the file was replaced while virt-trustd runs: 'virt-trust repair --list' writes the newest back. If you have restored the host's disk: 'virt-trust accept --list-rolled-back' takes the list as it is, with all VMs whose vTPM states are of the same time; for the others there is 'virt-trust accept VM --rolled-back'.",
	},
	reason.ListDamaged: {
		"The file of the vTPM list is gone, or was altered, or was written under another key.",
		"'virt-trust repair --list' writes the list back from virt-trustd's memory or, where that is gone, rebuilds it from the labels of the VMs. That takes each vTPM state for right that lies there and is the VM's own: without the list nobody can tell whether it is the newest. Where the TPM was cleared or replaced as well: 'virt-trust recover' with the recovery key.",
	},
	reason.VTPMUnknown: {
		"A VM that is not in the list has a vTPM state that cannot be taken in by itself: it is encrypted or damaged, or policy.adopt is off.",
		"If the state is this VM's own: 'virt-trust adopt VM'. Otherwise move its folder away, and the VM gets a new, empty vTPM.",
	},
	reason.VTPMChanged: {
		"The vTPM state was edited, truncated or replaced by another one, or its folder holds files that a vTPM at rest does not have, or lies elsewhere than before.",
		"'virt-trust repair VM' puts back the state that virt-trustd kept. A file too many, such as volatilestate, is moved away by hand. If the change was meant: 'virt-trust adopt VM'.",
	},
	reason.VTPMRolledBack: {
		"The vTPM state is this VM's own, but an older one: from a backup, a snapshot of the file system, or an attacker's copy. After a crash with policy.crash_recovery = \"strict\" it is also given for state that was not noted.",
		"'virt-trust repair VM' puts the newest state back. After a wanted restore from a backup: 'virt-trust accept VM --rolled-back'.",
	},
	reason.VTPMMissing: {
		"The list holds a vTPM for this VM, but its folder is empty. swtpm would make a blank one without a word.",
		"'virt-trust repair VM' puts the kept state back. For a new, empty vTPM: 'virt-trust adopt --new VM'; what was sealed in the old one is then lost.",
	},
	reason.LabelMissing: {
		"The VM's image carries no label any more: it was replaced, converted, or put under an overlay, or its disk was detached.",
		"'virt-trust repair VM' writes the label again, if the image is this VM's own. If it was changed on purpose: 'virt-trust adopt VM'.",
	},
	reason.LabelDamaged: {
		"The label in the image was edited, or is not the one that was written last, as in an older copy of the image.",
		"Look at it with 'virt-trust label show IMAGE'. 'virt-trust repair VM' writes it again; after a wanted restore of the image: 'virt-trust adopt VM'.",
	},
	reason.LabelOtherVM: {
		"The image is another VM's, or a copy of it.",
		"Put the VM's own image back. If the VM is a wanted copy: 'virt-trust adopt VM' gives the image a label of its own and the VM a vTPM of its own.",
	},
	reason.LabelOtherHost: {
		"The image comes from another host, whose TPM alone, or whose recovery key, can unwrap the keys in the label.",
		"Start the VM on its own host, or release it there before it is moved. With that host's recovery key, and the VM's vTPM folder: 'virt-trust recover VM'. 'virt-trust adopt --new VM' gives it a new vTPM on this host.",
	},
	reason.KeyNotReleased: {
		"No vTPM keys are handed out: there is no launch grant (swtpm was started by hand, twice or too late, or libvirt does not use the wrapper or hook yet), or the host's TPM was cleared or replaced, and its keys are gone; or a recovery key is not the one of this host.",
		"Start the VM through libvirt. After an installation: 'systemctl restart libvirtd', which running VMs do not notice. After a cleared or replaced TPM: 'virt-trust recover' with the recovery key. Without one nobody can read the list and the vTPMs any more: 'systemctl stop virt-trustd', move /var/lib/virt-trust away, 'systemctl start virt-trustd'; then bring vTPMs back from backups with 'virt-trust restore', or give the VMs new, empty ones with 'virt-trust adopt --new VM'.",
	},
	reason.LauncherNotApproved: {
		"QEMU, one of its modules, firmware, swtpm, a library of it or a program of virt-trust is not an approved file: it was replaced by hand, its digest was revoked, or no source of launcher.policy vouches for it. The line names the file, its SHA-256 digest, and the one that is approved. Also given when the file of the Reference Values is missing, altered or an older one.",
		"Bring back the approved file, as by 'apt install --reinstall PACKAGE'. If the file is right, approve it: 'virt-trust launcher approve FILE', which also lifts a revocation. 'virt-trust launcher list' shows what is approved, and by whom. Where the Reference Values themselves are lost: 'virt-trust launcher reset' begins them anew; see to it first that the host's packages are in order ('dpkg --verify' or 'rpm --verify --all').",
	},
	reason.VMElsewhere: {
		"The VM's vTPM is on its way to another host, or lives there. An incoming migration of a guarded VM is refused with this code as long as hosts cannot hand vTPMs over.",
		"Wait until the handover is settled, or start the VM on the host that has its vTPM. To move a VM today: shut it down, 'virt-trust release VM', move it, and adopt it there.",
	},
	reason.PolicyForbids: {
		"virt-trustd.toml, or a rule that has no switch, does not allow this: a VM without vTPM under policy.require_vtpm, a vTPM whose <encryption> came or went, a change to a VM that runs, a call by a program that is not libvirt's.",
		"Do what the message says, or change virt-trustd.toml(5).",
	},
	reason.HelperUnreachable: {
		"virt-trustd does not run or does not answer. VMs without a vTPM start all the same.",
		"'systemctl status virt-trustd' says why; 'systemctl start virt-trustd', then start the VM again.",
	},
	reason.TPMBusy: {
		"The host's TPM was busy for longer than tpm.timeout.",
		"Try again. If it happens often, see who else uses the TPM, or raise tpm.timeout.",
	},
	reason.TPMLockedOut: {
		"The host's TPM refuses authorisations for a time, because someone tried wrong ones.",
		"Wait (often ten minutes to a day), or let the owner of the lockout authorisation reset it: 'tpm2_dictionarylockout --clear-lockout'.",
	},
	reason.TPMFailed: {
		"The host's TPM is not there, or answers with errors.",
		"'virt-trust status' says more. See that tpm.device exists, that the TPM is on in the firmware, and 'journalctl -k -g tpm'.",
	},
}

func reasons() []Reason {
	var out []Reason
	for _, code := range reason.All() {
		out = append(out, Reason{code, code.Explain(), advice[code][0], advice[code][1]})
	}
	return out
}

func (c *Command) reasonCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "reason [CODE]",
		Short: "Explain a reason code, or list them",
		Args:  cobra.MaximumNArgs(1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			var codes []string
			for _, r := range reasons() {
				codes = append(codes, string(r.Code)+"\t"+r.Meaning)
			}
			return codes, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				all := reasons()
				return c.print(all, func(w io.Writer) {
					for _, r := range all {
						fmt.Fprintf(w, "%-22s  %s\n", r.Code, r.Meaning)
					}
				})
			}
			for _, r := range reasons() {
				if string(r.Code) == args[0] {
					return c.print(r, r.write)
				}
			}
			return &exit{ExitUsage, fmt.Errorf("there is no reason code %q; 'virt-trust reason' lists them", args[0])}
		},
	}
}

func (r Reason) write(w io.Writer) {
	fmt.Fprintf(w, "%s: %s.\n\n%s\n\n%s\n", r.Code, r.Meaning, fill(r.When), fill(r.Mend))
}

// fill breaks a paragraph at 78 columns.
func fill(s string) string {
	var b strings.Builder
	column := 0
	for i, word := range strings.Fields(s) {
		switch {
		case i == 0:
		case column+1+len(word) > 78:
			b.WriteByte('\n')
			column = 0
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += len(word)
	}
	return b.String()
}
