package journal

import (
	"bytes"
	"errors"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
)

var events = []Event{
	Refused, WouldRefuse, VMCreated, VMAdopted, VMReleased, VMDeleted, StateRecovered,
	TPMAway, TPMBack, HostNotApproved, ListDamaged, Provisioned, NotRaised, OlderAccepted, Reverted,
	RecoverySet, RecoveryMissing, Recovered, BackedUp, Restored, Enrolled, NodeRefused, VerifierAway, KeysGranted,
	HostApproved, HostRevoked, NextBootGiven, NextBootUsed,
	LauncherLearned, LauncherChanged, LaunchLogBroken, EKShared, Certified, CertifierSet,
}

// TestCatalog holds packaging/virt-trust.catalog against systemd.catalog(7)
// and the events.
func TestCatalog(t *testing.T) {
	b, err := os.ReadFile("../../../packaging/virt-trust.catalog")
	if err != nil {
		t.Fatal(err)
	}
	explained := map[Event]bool{}
	for i, entry := range strings.Split("\n"+string(b), "\n-- ")[1:] {
		head, text, ok := strings.Cut(entry, "\n\n")
		lines := strings.Split(head, "\n")
		id := Event(lines[0])
		if !ok || len(lines) != 4 || !strings.HasPrefix(lines[1], "Subject: ") || lines[2] != "Defined-By: virt-trust" || !strings.HasPrefix(lines[3], "Documentation: man:") || strings.TrimSpace(text) == "" {
			t.Errorf("entry %d: %q", i, entry)
		}
		if explained[id] {
			t.Errorf("%s stands there twice", id)
		}
		explained[id] = true
		for _, field := range regexp.MustCompile(`@(\w+)@`).FindAllStringSubmatch(entry, -1) {
			switch field[1] {
			case fieldName(VM), fieldName(Operation), fieldName(Reason):
			default:
				t.Errorf("%s names the field %s", id, field[1])
			}
		}
	}
	for _, e := range events {
		if !regexp.MustCompile(`^[0-9a-f]{32}$`).MatchString(string(e)) || !explained[e] {
			t.Errorf("event %s is not in the catalog, or no ID", e)
		}
		delete(explained, e)
	}
	if len(explained) > 0 {
		t.Errorf("nothing logs %v", explained)
	}
}

func TestFieldName(t *testing.T) {
	for key, want := range map[string]string{
		ID: "MESSAGE_ID", VM: "VIRT_TRUST_VM_UUID", Operation: "VIRT_TRUST_OPERATION", Reason: "VIRT_TRUST_REASON",
		logrus.ErrorKey: "VIRT_TRUST_ERROR", "a-b c\nd=é": "VIRT_TRUST_A_B_C_D__", "Tries2": "VIRT_TRUST_TRIES2",
	} {
		if got := fieldName(key); got != want {
			t.Errorf("%q: %q, want %q", key, got, want)
		}
	}
	if got := fieldName(strings.Repeat("x", 100)); len(got) != 64 {
		t.Errorf("a field name of %d bytes", len(got))
	}
}

// TestNew: without a journal behind stderr a daemon's log is text on stderr;
// that of a hook, whose stderr is the user's, is not.
func TestNew(t *testing.T) {
	t.Setenv("JOURNAL_STREAM", "1:1") // another process's, inherited
	l := New("test")
	if l.Out != os.Stderr || len(l.Hooks) > 0 {
		t.Error("New does not log to stderr")
	}
	var b bytes.Buffer
	q := Quiet("test")
	if q.Out == os.Stderr {
		t.Error("Quiet logs to stderr")
	}
	q.Out = &b
	q.WithError(errors.New("e")).Warn("m")
	if b.Len() > 0 {
		t.Errorf("Quiet writes %q", &b)
	}
}
