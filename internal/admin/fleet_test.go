package admin

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/appraise"
	"virt-trust/internal/appraise/corim/corimtest"
	"virt-trust/internal/platform/config"
	verifierbody "virt-trust/internal/verifier"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

// office is a real Verifier, with a database that the test writes into, and
// virt-trust run against it.
type office struct {
	t   *testing.T
	dir string
	url string
	db  *store.Store
}

func openOffice(t *testing.T) *office {
	t.Helper()
	o := &office{t: t, dir: t.TempDir()}
	cfg := config.DefaultVerifier()
	cfg.Names, cfg.Database = []string{"localhost"}, "sqlite:"+o.path("db")
	cfg.CA = config.VerifierCA{Certificate: o.path("ca.pem"), Key: o.path("ca-key.pem")}
	cfg.Results.Keys, cfg.Policy.ManifestKeys, cfg.Enrolment.ManufacturerRoots = o.path("keys.pem"), o.path("none"), o.path("none")
	cfg.Policy.FourEyes = true
	for name, role := range map[string]string{"rita": "reader", "otto": "operator", "paula": "policy", "peter": "policy"} {
		token := "token-of-" + name
		d := sha256.Sum256([]byte(token))
		cfg.Tokens = append(cfg.Tokens, config.VerifierToken{Name: name, Role: role, SHA256: hex.EncodeToString(d[:])})
		write(t, o.path(name), token+"\n")
	}
	if err := verifierbody.Init(cfg, io.Discard); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.Out = io.Discard
	ctx, stop := context.WithCancel(context.Background())
	ended, ready := make(chan error, 1), make(chan struct{})
	go func() {
		ended <- verifierbody.Run(ctx, verifierbody.Options{Config: cfg, Version: "test", Log: logrus.NewEntry(log), Listeners: []net.Listener{l}, Ready: func() { close(ready) }})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-ready:
	case err := <-ended:
		ended <- nil
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	o.url = "https://localhost:" + port
	if o.db, err = store.Open(t.Context(), cfg.Database, store.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.db.Close() })
	return o
}

func (o *office) path(name string) string { return filepath.Join(o.dir, name) }

// run is virt-trust as this person, by a client.toml of his.
func (o *office) run(person string, args ...string) (stdout, stderr string, code int) {
	o.t.Helper()
	file := o.path(person + ".toml")
	write(o.t, file, fmt.Sprintf("verifier = %q\nca = %q\ntoken_file = %q\n", o.url, o.path("ca.pem"), o.path(person)))
	var out, errs bytes.Buffer
	c := &Command{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs, Args: args, Version: "0.1.0", ClientPaths: []string{file}}
	code = c.Run(context.Background())
	return out.String(), errs.String(), code
}

// want runs virt-trust and wants an exit code, and a text in what it says.
func (o *office) want(code int, says, person string, args ...string) string {
	o.t.Helper()
	stdout, stderr, got := o.run(person, args...)
	if got != code || !strings.Contains(stdout+stderr, says) {
		o.t.Errorf("%s: %s: exit %d, want %d and %q:\n%s%s", person, strings.Join(args, " "), got, code, says, stdout, stderr)
	}
	if code != 0 && strings.Count(stderr, "\n") > 1 && code != ExitUsage {
		o.t.Errorf("more than one line of error: %q", stderr)
	}
	return stdout
}

const (
	fleetID   = "11111111-2222-3333-4444-555555555555"
	fleetVMID = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
)

func (o *office) enrol(name string, state fleet.NodeState) {
	o.t.Helper()
	d := sha256.Sum256([]byte(name))
	err := o.db.Do(context.Background(), func(tx *store.Tx) error {
		return tx.PutNode(context.Background(), fleet.Node{
			ID: fleetID, Name: name, State: state, EKDigest: hex.EncodeToString(d[:]), AKName: d[:], AK: d[:], BindName: d[:], Bind: d[:], Certifier: d[:], Enrolled: time.Now(),
		})
	})
	if err != nil {
		o.t.Fatal(err)
	}
}

func (o *office) round(host, vm appraise.Tier, reasons ...appraise.Reason) int64 {
	o.t.Helper()
	ctx, now := context.Background(), time.Now()
	nonce := sha256.Sum256([]byte(now.String()))
	if _, err := o.db.IssueNonce(ctx, fleetID, nonce[:], now.Add(time.Minute)); err != nil {
		o.t.Fatal(err)
	}
	id, err := o.db.CompleteRound(ctx, store.Completion{Node: fleetID, Nonce: nonce[:], Evidence: []byte("evidence"), Result: &appraise.Result{
		Node: fleetID, Received: now, Expires: now.Add(time.Minute), Host: appraise.Appraisal{Tier: host, Reasons: reasons},
		VMs: []appraise.VM{{UUID: fleetVMID, Name: "web\x1b[2J", Running: true, Appraisal: appraise.Appraisal{Tier: vm}}},
	}})
	if err != nil {
		o.t.Fatal(err)
	}
	return id
}

func TestFleet(t *testing.T) {
	o := openOffice(t)
	token := strings.TrimSpace(o.want(0, "vtj1.", "otto", "fleet", "token", "create", "--name", "alpha", "--lifetime", "10m"))
	o.want(ExitRefused, "forbidden", "rita", "fleet", "token", "create")
	o.want(ExitUsage, "lifetime", "otto", "fleet", "token", "create", "--lifetime", "0s")
	list := o.want(0, "alpha", "otto", "fleet", "token", "list")
	if strings.Contains(list, strings.Split(token, ".")[1]) {
		t.Errorf("the secret again: %s", list)
	}
	digest := strings.Fields(strings.Split(list, "\n")[1])[0]
	o.want(0, "taken back", "otto", "fleet", "token", "revoke", digest)
	o.want(ExitRefused, "not-found", "otto", "fleet", "token", "revoke", digest)

	o.enrol("alpha", fleet.Pending)
	o.want(0, "alpha", "rita", "fleet", "pending")
	o.want(ExitNotAppraised, "pending", "rita", "fleet", "show", "alpha")
	o.want(ExitRefused, "forbidden", "rita", "fleet", "approve", "alpha")
	o.want(0, "alpha: let in", "otto", "fleet", "approve", "alpha")
	o.want(ExitRefused, "conflict", "otto", "fleet", "approve", "alpha")
	o.want(ExitFailed, "no node", "otto", "fleet", "approve", "gamma")
	// It was not said of this one that it is learned, and with four eyes none is.
	o.want(ExitRefused, "four_eyes", "otto", "fleet", "learn", "ALPHA")
	o.want(ExitRefused, "not learned", "otto", "fleet", "learn", "alpha", "--off")
	o.want(ExitNotAppraised, "Learning:       off", "rita", "fleet", "show", "alpha")
	if out := o.want(0, "NAME", "rita", "fleet", "pending"); strings.Contains(out, "alpha") {
		t.Error(out)
	}

	first := o.round(appraise.Affirming, appraise.Affirming)
	o.want(0, "affirming", "rita", "fleet", "show", "alpha")
	if out := o.want(0, "affirming", "rita", "fleet", "show", fleetVMID); strings.Contains(out, "\x1b") {
		t.Errorf("a guest's text reaches the terminal: %q", out)
	}
	second := o.round(appraise.Contraindicated, appraise.Warning, appraise.Reason{
		Code: appraise.CodeIMAUnknown, Tier: appraise.Contraindicated, What: "/usr/bin/evil was run", Log: "ima", Path: "/usr/bin/evil", Digest: strings.Repeat("ab", 32),
	}, appraise.Reason{Code: appraise.CodeClockBack, Tier: appraise.Warning, What: "the clock went back"})
	o.want(ExitRefused, "contraindicated: ima-unknown: /usr/bin/evil was run", "rita", "fleet", "show", fleetID)
	o.want(0, "warning", "rita", "fleet", "show", fleetVMID)
	o.want(ExitFailed, "no node or VM", "rita", "fleet", "show", "nothing")
	o.want(0, "1 warning", "rita", "fleet", "list", "--tier", "contraindicated")
	if out := o.want(0, "NAME", "rita", "fleet", "list", "--tier", "affirming"); strings.Contains(out, "alpha") {
		t.Error(out)
	}
	o.want(ExitFailed, "invalid", "rita", "fleet", "list", "--tier", "good")
	o.want(0, "ima-unknown", "rita", "fleet", "rounds", "alpha", "--failed")
	if out := o.want(0, "ROUND", "rita", "fleet", "rounds", "alpha", "--last", "1"); strings.Count(out, "\n") != 2 {
		t.Error(out)
	}
	o.want(0, "tier tier: affirming -> contraindicated", "rita", "fleet", "diff", "alpha")
	o.want(0, "tier tier: contraindicated -> affirming", "rita", "fleet", "diff", "alpha", fmt.Sprint(second), fmt.Sprint(first))
	o.want(ExitUsage, "no number", "rita", "fleet", "diff", "alpha", "x")
	if nodes := decode[[]map[string]any](t, o.want(0, "", "rita", "fleet", "list", "--json")); len(nodes) != 1 || nodes[0]["tier"] != "contraindicated" {
		t.Error(nodes)
	}

	// Approving what a round showed, and the second pair of eyes.
	round := fmt.Sprint(second)
	o.want(ExitUsage, "--reason", "otto", "fleet", "approve", "alpha", "--reason", "host:0")
	o.want(ExitUsage, "host:N", "otto", "fleet", "approve", "alpha", "--round", round, "--reason", "host")
	o.want(0, "1 Reference Value of round "+round+": proposed, 1 of them new", "otto", "fleet", "approve", "alpha", "--round", round, "--reason", "host:0")
	o.want(0, "left: clock-went-back", "otto", "fleet", "approve", "alpha", "--round", round)
	o.want(0, "/usr/bin/evil", "rita", "reference", "list", "--state", "proposed", "--subject", "alpha")
	values := decode[[]map[string]any](t, o.want(0, "", "rita", "reference", "list", "--json"))
	id := fmt.Sprint(values[0]["id"])
	o.want(ExitRefused, "forbidden", "otto", "reference", "approve", id)
	o.want(0, "approved", "paula", "reference", "approve", id)
	o.want(ExitRefused, "conflict", "peter", "reference", "approve", id)

	sums := o.path("SHA256SUMS")
	write(t, sums, strings.Repeat("cd", 32)+"  usr/bin/one\n"+strings.Repeat("ef", 32)+"  usr/bin/two\n")
	o.want(0, "2 Reference Values: proposed, 2 of them new", "paula", "reference", "import", sums, "--subject", "alpha")
	o.want(ExitRefused, "same-person", "paula", "reference", "approve", "--proposed-by", "paula")
	o.want(0, "2 Reference Values: approved", "peter", "reference", "approve", "--proposed-by", "paula")
	o.want(0, "1 Reference Value: rejected", "peter", "reference", "reject", id)
	o.want(ExitUsage, "no Reference Value", "peter", "reference", "reject")
	o.want(ExitUsage, "no number", "peter", "reference", "reject", "x")
	o.want(ExitFailed, "signature", "paula", "reference", "import", sums, "--format", "manifest", "--signature", sums)
	o.want(ExitFailed, "no such file", "paula", "reference", "import", sums+".none")
	// A CoRIM, of which not all can be used.
	rim := o.path("rim.cbor")
	write(t, rim, string(corimtest.CoRIM(nil, corimtest.CoMID("acme", 1, nil, corimtest.Reference(corimtest.Map{}, corimtest.Of(7, make([]byte, 32)))), corimtest.Tagged(505, []byte{1}))))
	o.want(0, "ignored: 1 CoSWID tags", "paula", "reference", "import", rim, "--format", "corim-unsigned", "--subject", "alpha")
	o.want(0, "comid acme", "rita", "reference", "list", "--kind", "host-pcr", "--subject", "alpha")
	o.want(ExitFailed, "not signed", "paula", "reference", "import", rim, "--format", "corim")

	o.want(0, "revoked", "otto", "fleet", "revoke", "alpha", "--why", "sold")
	o.want(ExitNotAppraised, "sold", "rita", "fleet", "show", "alpha")

	// The log of all this is whole, on line and off line.
	out := o.want(0, "the log is whole", "rita", "audit", "verify")
	head := strings.TrimSpace(out[strings.LastIndex(out, " "):])
	export := o.want(0, "token.create", "rita", "audit", "export")
	file := o.path("audit")
	write(t, file, export)
	o.want(0, head, "rita", "audit", "verify", file, "--noted", head)
	write(t, file, strings.Replace(export, "sold", "lost", 1))
	o.want(ExitRefused, "audit log, entry", "rita", "audit", "verify", file)
	write(t, file, export[:strings.LastIndex(strings.TrimSpace(export), "\n")+1])
	o.want(0, "whole", "rita", "audit", "verify", file) // a log that was cut: only who noted its end can tell
	o.want(ExitRefused, "audit log", "rita", "audit", "verify", file, "--noted", head)
	o.want(ExitNotAppraised, "no such file", "rita", "audit", "verify", file+".none")
	o.want(ExitUsage, "ID:HASH", "rita", "audit", "verify", file, "--noted", "x")
}

// Whom virt-trust talks to, and as whom.
func TestVerifierConnection(t *testing.T) {
	o := openOffice(t)
	none := filepath.Join(o.dir, "none.toml")
	run := func(stdin string, args ...string) (string, int) {
		var out, errs bytes.Buffer
		c := &Command{Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &errs, Args: args, ClientPaths: []string{none}}
		code := c.Run(context.Background())
		return out.String() + errs.String(), code
	}
	for _, c := range []struct {
		stdin, args string
		code        int
		says        string
	}{
		{"", "fleet list", ExitUsage, "which Verifier?"},
		{"", "fleet", ExitUsage, "a command is missing"},
		{"", "fleet list --verifier http://localhost", ExitUsage, "https"},
		{"", "fleet list --verifier " + o.url, ExitFailed, "certificate"}, // a CA that nobody knows
		{"", "fleet list --verifier " + strings.Replace(o.url, "localhost", "127.0.0.1", 1) + " --ca " + o.path("ca.pem"), ExitFailed, "certificate"}, // another name
		{"", "fleet list --verifier " + o.url + " --ca " + o.path("ca.pem"), ExitRefused, "unauthenticated"},
		{"", "fleet list --verifier " + o.url + " --ca " + o.path("ca-key.pem"), ExitFailed, "no certificate"},
		{"wrong\n", "fleet list --token-file - --verifier " + o.url + " --ca " + o.path("ca.pem"), ExitRefused, "token-refused"},
		{"token-of-rita\n", "fleet list --token-file - --verifier " + o.url + " --ca " + o.path("ca.pem"), 0, "NAME"},
		{"two tokens\n", "fleet list --token-file - --verifier " + o.url + " --ca " + o.path("ca.pem"), ExitFailed, "more than one"},
		{"", "fleet list --verifier https://localhost:1 --ca " + o.path("ca.pem"), ExitFailed, "refused"},
	} {
		if says, code := run(c.stdin, strings.Fields(c.args)...); code != c.code || !strings.Contains(says, c.says) {
			t.Errorf("%s: exit %d, %s", c.args, code, says)
		}
	}
	write(t, none, "verifyer = \"x\"\n")
	if says, code := run("", "fleet", "list"); code != ExitFailed || !strings.Contains(says, "line 1: unknown key") {
		t.Errorf("exit %d, %s", code, says)
	}
	os.Remove(none)
}
