package admin

import (
	"flag"
	"os"
	"regexp"
	"strings"
	"testing"

	"virt-trust/internal/vtpm/reason"
)

var update = flag.Bool("update", false, "write packaging/man/virt-trust-reasons.7")

func TestReasons(t *testing.T) {
	if len(advice) != len(reason.All()) {
		t.Errorf("%d of %d codes are explained", len(advice), len(reason.All()))
	}
	for _, r := range reasons() {
		stdout, _, code := run(t, "reason", string(r.Code))
		if code != 0 || r.When == "" || r.Mend == "" || !strings.HasPrefix(stdout, string(r.Code)+": ") {
			t.Errorf("%s: exit %d: %s", r.Code, code, stdout)
		}
		for line := range strings.Lines(stdout) {
			if len(line) > 80 && !strings.HasPrefix(line, string(r.Code)) {
				t.Errorf("%s: a long line: %s", r.Code, line)
			}
		}
	}
}

// TestReasonsPage: virt-trust-reasons(7) says what virt-trust reason says.
func TestReasonsPage(t *testing.T) {
	const path = "../../packaging/man/virt-trust-reasons.7"
	page := reasonsPage()
	if *update {
		write(t, path, page)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != page {
		t.Errorf("%s is not up to date: go test ./internal/admin -run ReasonsPage -update", path)
	}
}

var command = regexp.MustCompile(`'((?:virt-trust|systemctl|journalctl|tpm2_)[^']*)'`)

func reasonsPage() string {
	var b strings.Builder
	b.WriteString(`.Dd November 22, 2026
.Dt VIRT-TRUST-REASONS 7
.Os
.Sh NAME
.Nm virt-trust-reasons
.Nd why a VM was refused, and the way back
.Sh DESCRIPTION
Every refusal has one of these codes: in the line that libvirt shows, in the
journal (VIRT_TRUST_REASON), on D-Bus, and in what
.Xr virt-trust 1
prints.
None is ever renamed.
A refusal changes nothing: the VM's disks, its vTPM and the list are as they
were.
Where VM stands, give the VM's name or UUID.
.Bl -tag -width Ds
`)
	for _, r := range reasons() {
		b.WriteString(".It Sy " + string(r.Code) + "\n")
		meaning := strings.ToUpper(r.Meaning[:1]) + r.Meaning[1:] + "."
		if strings.HasPrefix(meaning, "VTPM") || strings.HasPrefix(meaning, "Virt-trustd") {
			meaning = r.Meaning + "."
		}
		for _, paragraph := range []string{meaning, r.When, r.Mend} {
			if paragraph != meaning {
				b.WriteString(".Pp\n")
			}
			text := strings.ReplaceAll(paragraph, `\`, `\e`)
			text = command.ReplaceAllString(text, `\fB$1\fP`)
			text = strings.ReplaceAll(text, "--", `\-\-`)
			// A sentence a line, as mdoc likes it.
			b.WriteString(strings.ReplaceAll(text, ". ", ".\n") + "\n")
		}
	}
	b.WriteString(`.El
.Sh SEE ALSO
.Xr virt-trust 1 ,
.Xr virt-trustd.toml 5 ,
.Xr virt-trustd 8
`)
	return b.String()
}
