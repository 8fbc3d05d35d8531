// Package journal takes log entries to journald, in its native protocol, so
// that an entry's fields are the journal's fields: vm_uuid becomes
// VIRT_TRUST_VM_UUID. What an operator would be woken for has a MESSAGE_ID,
// explained in packaging/virt-trust.catalog (journalctl -x).
package journal

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/sirupsen/logrus"
)

// Names of fields that several programs log.
const (
	VM        = "vm_uuid"
	VMName    = "vm_name"
	Operation = "operation"
	Reason    = "reason" // a reason.Code
	// ID marks an entry as one of the events below.
	ID = "message_id"
)

// Event is a MESSAGE_ID (sd-id128(3)), never changed and never used again.
type Event string

// The events, each with its entry in the catalog.
const (
	Refused         Event = "171bd3d1921c41d1900557a6c3f5ba00" // an operation was refused
	WouldRefuse     Event = "ecbdd6dc31bf446f8161e9436aa3d7a6" // and would have been, were the mode not audit
	VMCreated       Event = "06dc59e349f648b5b9739b8300c7ec56" // a new VM was taken into the list
	VMAdopted       Event = "0c8120fcd7d14492970d3047c13d72c0" // a VM with a vTPM of its own was
	VMReleased      Event = "24d05b410ac0433788b29f2cdb7828ac" // a VM was given back to plain libvirt
	VMDeleted       Event = "156e330f27f042c793a1cf76f6c4deeb" // record and keys of a VM are gone
	StateRecovered  Event = "b0597119a95e49b5ad41b458c84dc16f" // vTPM state after a crash was accepted
	TPMAway         Event = "77851029c0fd435ca4cbe55ad2a9bfac" // the host's TPM does not answer
	TPMBack         Event = "c0526ed056244322bfd5a503ee977ad4" // it does again
	HostNotApproved Event = "f77a3ff4dc2d49b6a2c412df755ee114" // the list key is not released in this state
	ListDamaged     Event = "60ec7388451b42aaae3639875c287b57" // the vTPM list is missing, damaged or old
	Provisioned     Event = "335de8f2f328446b995cf8020814730b" // keys were made in the host's TPM
	NotRaised       Event = "d1bbdd1b3b934c419b9b6901ed760e2a" // the TPM's counter could not be raised
	OlderAccepted   Event = "a0bf4798e6e34bb3ada4694469fc38d9" // an older list, state or label was taken on the admin's word
	Reverted        Event = "61f7a9a21c2e492c881382c41dd78662" // a VM's vTPM went back with a saved image
	RecoverySet     Event = "355f6e7fb2014b448593d6e9e8e404ac" // the host has a new recovery key
	RecoveryMissing Event = "0563ba3de98c4742a5bbba58da6db90e" // the host has no recovery key, or nobody has shown to have it
	Recovered       Event = "7b7732df10184b119d82805baa149606" // list or vTPMs were brought back with the recovery key
	BackedUp        Event = "82c20a438524479b90c675e12e98d725" // a VM's vTPM was given out as a backup
	Restored        Event = "92cb67d9ea494ffab86da7caa71ec666" // a VM's vTPM was replaced by one from a backup
	HostApproved    Event = "23faf314ef08419fa09d394909429f63" // a host state was approved
	HostRevoked     Event = "488f2db3065b41348b244bdb45c5c753" // the approval of one was withdrawn
	NextBootGiven   Event = "6dc89d1a22ad42f9b4204968ced44d59" // the next boot will not be checked, or will be after all
	NextBootUsed    Event = "a1a842f0af374620936609df5facc2d5" // this boot was one without PCR check
	LauncherLearned Event = "a3d1f0c25f6e4c7f9b0d9a1c7e5b42d8" // a program or firmware was approved on first use or by its package
	LauncherChanged Event = "5c2b7d9e84f14d0aa1e36f0b9c47d215" // an admin or a manifest changed what may run
	LaunchLogBroken Event = "e81f4a6b2c9d4f35b7a0d6c3195e72fa" // the launch log does not replay to its PCR
	EKShared        Event = "de7b4c8eccfa46fcb9c5bcf4beccea99" // two VMs have vTPMs with one endorsement key
	Certified       Event = "3c246109a4b54f9d98231ebf28c316fb" // a vTPM's endorsement key got a certificate
	CertifierSet    Event = "40e84153e602419d9fa6c102b851cb3d" // the host's certifier has a new certificate
	Enrolled        Event = "313a5f9110de45efb2f25adc2c378d7f" // the host became a node of a Verifier
	NodeRefused     Event = "67f791c2fc8c4427bfb77633b48f1707" // the host's Verifier refuses it
	VerifierAway    Event = "df166882a5fd449da0e983e0239a268f" // no round with the Verifier for a while
	KeysGranted     Event = "0cd3f62e16c544fbb99610e01504132f" // vTPM keys were handed to swtpm
)

// New makes the logger of a daemon or a command: to the journal when stderr
// already leads there (sd_journal_stream_fd(3)), else as text to stderr.
func New(identifier string) *logrus.Logger {
	l := logrus.New()
	if ok, err := journal.StderrIsJournalStream(); ok && err == nil {
		native(l, identifier)
	}
	return l
}

// Quiet makes the logger of a program whose stderr is somebody's answer, as
// the hook's and the wrapper's are: to the journal if there is one, else nowhere.
func Quiet(identifier string) *logrus.Logger {
	l := logrus.New()
	native(l, identifier)
	return l
}

func native(l *logrus.Logger, identifier string) {
	l.Out = io.Discard
	l.Formatter = nothing{}
	l.AddHook(sender(identifier))
}

// nothing spares the work of formatting what is discarded.
type nothing struct{}

func (nothing) Format(*logrus.Entry) ([]byte, error) { return nil, nil }

// sender is the logrus hook; its value is SYSLOG_IDENTIFIER.
type sender string

func (sender) Levels() []logrus.Level { return logrus.AllLevels }

// Fire drops what journald does not take: logging never fails its program.
func (s sender) Fire(e *logrus.Entry) error {
	vars := map[string]string{"SYSLOG_IDENTIFIER": string(s), "SYSLOG_PID": fmt.Sprint(os.Getpid())}
	for k, v := range e.Data {
		vars[fieldName(k)] = fmt.Sprint(v)
	}
	_ = journal.Send(e.Message, priority(e.Level), vars)
	return nil
}

// fieldName keeps to systemd.journal-fields(7): A-Z, 0-9 and _, 64 bytes.
func fieldName(key string) string {
	if key == ID {
		return "MESSAGE_ID"
	}
	name := "VIRT_TRUST_" + strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, key)
	return name[:min(len(name), 64)]
}

func priority(l logrus.Level) journal.Priority {
	switch l {
	case logrus.PanicLevel, logrus.FatalLevel:
		return journal.PriCrit
	case logrus.ErrorLevel:
		return journal.PriErr
	case logrus.WarnLevel:
		return journal.PriWarning
	case logrus.InfoLevel:
		return journal.PriInfo
	}
	return journal.PriDebug
}
