package lab

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// verifierConfig is a Verifier that asks often, so that a test need not wait.
const verifierConfig = `names = ["verifier"]
[rounds]
interval = "2s"
lifetime = "12s"
`

// theVerifier boots a host with nothing but the Verifier's package, brings the
// Verifier up as its documentation says, and lets root there be a person with
// every role. roots are the certificates of a manufacturer of TPMs.
func theVerifier(t *testing.T, roots []byte) *Host {
	t.Helper()
	Require(t)
	deb, err := Deb()
	if err != nil {
		t.Fatal(err)
	}
	v := NewHost(t, HostOptions{Name: "verifier", NoTPM: true})
	v.InstallVerifier(deb)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the Verifier's journal:\n%s", v.Run("journalctl", "-u", "virt-trust-verifier", "--no-pager", "-n", "60", "-o", "short-precise").Stdout)
		}
	})
	person := v.Must("virt-trust-verifier", "person", "alice", "policy")
	token, block := "", ""
	for _, line := range strings.Split(person, "\n") {
		switch {
		case strings.HasPrefix(line, "vta1."):
			token = line
		case line == "[[token]]" || block != "":
			block += line + "\n"
		}
	}
	if token == "" || block == "" {
		t.Fatalf("virt-trust-verifier person: %s", person)
	}
	v.WriteFile("/etc/virt-trust/verifier.toml", []byte(verifierConfig+block), 0o644)
	v.WriteFile("/root/token", []byte(token+"\n"), 0o600)
	v.WriteFile("/etc/virt-trust/tpm-roots/lab.pem", roots, 0o644)
	v.Must("virt-trust-verifier", "init")
	v.Must("systemctl", "enable", "--now", "virt-trust-verifier")
	return v
}

// fleet is the virt-trust command on the Verifier's host.
func (h *Host) fleet(args ...string) Result {
	h.t.Helper()
	last := []string{"--verifier", "https://verifier:8443", "--ca", "/var/lib/virt-trust-verifier/ca.pem", "--token-file", "/root/token"}
	return h.Run(append(append([]string{"virt-trust"}, args...), last...)...)
}

// seen is a node as the Verifier shows it.
type seen struct {
	ID, State, Tier, Problem string
	Result                   struct {
		Host appraised
		VMs  []struct {
			UUID, Name string
			Running    bool
			appraised
		}
	}
}

type appraised struct {
	Tier    string
	Reasons []struct{ Code, Tier, What, Path string }
}

func (a appraised) has(code string) bool {
	for _, r := range a.Reasons {
		if r.Code == code {
			return true
		}
	}
	return false
}

// vm gives the appraisal of a VM by its name.
func (s seen) vm(name string) appraised {
	for _, v := range s.Result.VMs {
		if v.Name == name {
			return v.appraised
		}
	}
	return appraised{}
}

func (h *Host) node(name string) (s seen) {
	h.t.Helper()
	r := h.fleet("fleet", "show", name, "--json")
	if err := json.Unmarshal([]byte(r.Stdout), &s); err != nil {
		h.t.Logf("fleet show %s: exit %d: %s%s", name, r.Code, r.Stdout, r.Stderr)
	}
	return s
}

// seenWithin leaves a new VM the time after which what it has booted is learned.
const seenWithin = 3 * time.Minute

// becomes waits until a node is seen so, and says how long that took.
func (h *Host) becomes(t *testing.T, name, what string, so func(seen) bool) time.Duration {
	t.Helper()
	began, last := time.Now(), seen{}
	for time.Since(began) < seenWithin {
		if last = h.node(name); so(last) {
			return time.Since(began)
		}
		time.Sleep(200 * time.Millisecond)
	}
	b, _ := json.MarshalIndent(last, "", " ")
	t.Fatalf("%s: not seen so in time: %s\n%s", name, what, b)
	return 0
}

// enrolled has a host join the Verifier, with the operator's word where its TPM has no
// certificate of a manufacturer.
func enrolled(t *testing.T, v, h *Host, name string, pending bool) {
	t.Helper()
	var made struct{ Secret string }
	r := v.fleet("fleet", "token", "create", "--name", name, "--json")
	if err := json.Unmarshal([]byte(r.Stdout), &made); err != nil || made.Secret == "" {
		t.Fatalf("token create: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	joined := h.RunInput(made.Secret+"\n", "virt-trust", "enroll", "https://verifier:8443", "--name", name, "--token-file", "-")
	t.Logf("virt-trust enroll: exit %d: %s%s", joined.Code, joined.Stdout, joined.Stderr)
	if s := v.node(name); pending != (s.State == "pending") {
		t.Errorf("%s is %s", name, s.State)
	}
	if pending {
		if r := v.fleet("fleet", "approve", name); r.Code != 0 {
			t.Fatalf("fleet approve: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
	}
}

func affirming(vms ...string) func(seen) bool {
	return func(s seen) bool {
		ok := s.State == "active" && s.Result.Host.Tier == "affirming"
		for _, name := range vms {
			ok = ok && s.vm(name).Tier == "affirming"
		}
		return ok
	}
}

// TestFleet: from the packages' installation to a page on which the right VM is
// red for the right reason within a round; then the host; and the ways back.
func TestFleet(t *testing.T) {
	t.Parallel()
	var roots []byte
	alpha := measuredHost(t, "alpha", func(path func(string) string) (err error) {
		roots, err = manufactured(path(tpmState), t.TempDir())
		return err
	})
	// beta's TPM has no certificate; its VMs' vTPMs quote themselves.
	beta := measuredHost(t, "beta", func(path func(string) string) error {
		return os.WriteFile(path("/etc/virt-trust/virt-trustd.toml"), []byte(AttestationConfig+"vtpm_ak = true\n"), 0o644)
	})
	v := theVerifier(t, roots)
	Star(v, alpha, beta)
	known := []Measurement{Executed("/usr/bin/qemu-system-x86_64", []byte("qemu")), Executed("/usr/bin/swtpm", []byte("swtpm"))}
	alpha.Measure(known...)
	beta.Measure(known...)
	web := alpha.NewVM(VM{Name: "web", TPM: true, Disk: "qcow2"})
	db := alpha.NewVM(VM{Name: "db", TPM: true, Disk: "qcow2"})
	mail := beta.NewVM(VM{Name: "mail", TPM: true, Disk: "qcow2"})
	for _, g := range []*Guest{web, db, mail} {
		g.Start()
		seals(t, g) // it is up: its PCRs are what they stay
	}
	for _, h := range []*Host{alpha, beta} {
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("%s's agent:\n%s", h.opts.Name, h.Run("journalctl", "-u", "virt-trust-agent", "--no-pager", "-n", "30", "-o", "short-precise").Stdout)
			}
		})
		enrolled(t, v, h, h.opts.Name, h == beta)
	}
	v.becomes(t, "alpha", "affirming with both VMs", affirming("web", "db"))
	v.becomes(t, "beta", "affirming with its VM", affirming("mail"))
	if e := beta.Must("virt-trust", "evidence", "--json"); !strings.Contains(e, `"vtpm-command"`) {
		t.Errorf("mail's vTPM does not quote: %s", e)
	}
	token := strings.TrimSpace(string(v.ReadFile("/root/token")))
	page := func(path string) string {
		return v.Must("curl", "-s", "--cacert", "/var/lib/virt-trust-verifier/ca.pem", "-H", "Authorization: Bearer "+token, "https://verifier:8443"+path)
	}

	t.Run("a result is signed, and checked off line", func(t *testing.T) {
		v := v.In(t)
		id := v.node("alpha").ID
		v.Shell("curl -sf --cacert /var/lib/virt-trust-verifier/ca.pem -H 'Authorization: Bearer " + token + "' https://verifier:8443/v1/nodes/" + id + "/result >/root/result.jwt")
		v.Shell("curl -sf --cacert /var/lib/virt-trust-verifier/ca.pem https://verifier:8443/.well-known/jwks.json >/root/jwks.json")
		r := v.Run("virt-trust", "appraise", "--result", "/root/result.jwt", "--jwks", "/root/jwks.json")
		if r.Code != 0 {
			t.Errorf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
		t.Log(r.Stdout)
		v.Shell("tr a-y b-z </root/result.jwt >/root/forged.jwt")
		if r := v.Run("virt-trust", "appraise", "--result", "/root/forged.jwt", "--jwks", "/root/jwks.json"); r.Code == 0 {
			t.Error("a forged result is taken")
		}
	})
	t.Run("a guest that changes is red within a round, and it alone", func(t *testing.T) {
		v := v.In(t)
		web.Ask("extend 9")
		took := v.becomes(t, "alpha", "web is contraindicated", func(s seen) bool { return s.vm("web").Tier == "contraindicated" })
		s := v.node("alpha")
		if !s.vm("web").has("vm-pcr-other") || s.vm("db").Tier != "affirming" || s.Result.Host.Tier != "affirming" {
			t.Errorf("after %v: %+v", took, s.Result)
		}
		if took > 10*time.Second {
			t.Errorf("it took %v", took)
		}
		t.Logf("red after %v\n# virt-trust fleet list\n%s\n# virt-trust fleet show alpha\n%s", took, v.fleet("fleet", "list").Stdout, v.fleet("fleet", "show", "alpha").Stdout)
		if p := page("/"); !strings.Contains(p, "alpha") || !strings.Contains(p, "contraindicated") {
			t.Error("the page does not show it")
		}
		web.Destroy()
		web.Start()
		seals(t, web)
		v.becomes(t, "alpha", "web is well again after a reboot", affirming("web", "db"))
	})
	t.Run("a host that runs what nobody knows is red, and its VMs are no better", func(t *testing.T) {
		v, beta := v.In(t), beta.In(t)
		beta.Measure(Executed("/tmp/.x/miner", []byte("mine")))
		v.becomes(t, "beta", "the host is not affirming, nor its VM", func(s seen) bool {
			return s.Result.Host.Tier != "affirming" && s.Result.Host.Tier != "none" && s.vm("mail").Tier != "affirming"
		})
		found := false
		for _, r := range v.node("beta").Result.Host.Reasons {
			found = found || r.Code == "ima-unknown" && r.Path == "/tmp/.x/miner"
		}
		if !found {
			t.Error("the reason does not name the file")
		}
		if r := v.fleet("fleet", "approve", "beta", "--round", v.newest("beta")); r.Code != 0 {
			t.Fatalf("approve: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
		v.becomes(t, "beta", "approved by the operator", affirming("mail"))
	})
	t.Run("an agent, a virt-trustd and a Verifier that are started anew go on", func(t *testing.T) {
		v, alpha := v.In(t), alpha.In(t)
		alpha.Must("systemctl", "kill", "-s", "KILL", "virt-trust-agent")
		alpha.Must("systemctl", "kill", "-s", "KILL", "virt-trustd")
		v.Must("systemctl", "kill", "-s", "KILL", "virt-trust-verifier")
		time.Sleep(15 * time.Second) // every result from before has expired
		v.becomes(t, "alpha", "affirming again", affirming("web", "db"))
	})
	t.Run("a host that says nothing is none", func(t *testing.T) {
		v, alpha := v.In(t), alpha.In(t)
		alpha.Must("systemctl", "stop", "virt-trust-agent")
		v.becomes(t, "alpha", "none", func(s seen) bool { return s.Tier == "none" })
		alpha.Must("systemctl", "start", "virt-trust-agent")
		v.becomes(t, "alpha", "affirming again", affirming("web", "db"))
	})
	t.Run("a Verifier that was brought back from an older backup", func(t *testing.T) {
		v := v.In(t)
		v.Shell("systemctl stop virt-trust-verifier; rm -f /var/lib/virt-trust-verifier/verifier.db*; systemctl start virt-trust-verifier")
		began := time.Now()
		for _, name := range []string{"alpha", "beta"} {
			for v.node(name).State == "" && time.Since(began) < 2*time.Minute {
				time.Sleep(time.Second)
			}
			if v.node(name).State == "pending" {
				v.fleet("fleet", "approve", name)
				// Nothing of a node that was here before is learned by itself.
				if r := v.fleet("fleet", "learn", name); r.Code != 0 {
					t.Fatalf("fleet learn: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
				}
			}
		}
		v.becomes(t, "alpha", "known again", affirming("web", "db"))
		v.becomes(t, "beta", "known again", affirming("mail"))
	})
	t.Run("a revoked node is out", func(t *testing.T) {
		v := v.In(t)
		if r := v.fleet("fleet", "revoke", "beta", "--why", "sold"); r.Code != 0 {
			t.Fatalf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
		if s := v.node("beta"); s.State != "revoked" || s.Tier == "affirming" {
			t.Errorf("%+v", s)
		}
	})
	t.Run("the audit log", func(t *testing.T) {
		v := v.In(t)
		if r := v.fleet("audit", "verify"); r.Code != 0 {
			t.Errorf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
	})
}

// newest is the number of a node's newest round.
func (h *Host) newest(name string) string {
	h.t.Helper()
	var n struct{ Round int64 }
	r := h.fleet("fleet", "show", name, "--json")
	if err := json.Unmarshal([]byte(r.Stdout), &n); err != nil {
		h.t.Fatalf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	return fmt.Sprint(n.Round)
}

// manufactured writes a TPM's state as its manufacturer would, with an endorsement
// key certificate by a CA of that manufacturer, whose certificates it gives.
func manufactured(state, work string) (roots []byte, err error) {
	conf := filepath.Join(work, "setup.conf")
	local := filepath.Join(work, "localca.conf")
	options := filepath.Join(work, "localca.options")
	for path, text := range map[string]string{
		conf:    "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = " + local + "\ncreate_certs_tool_options = " + options + "\nactive_pcr_banks = sha1,sha256,sha384,sha512\n",
		local:   "statedir = " + work + "\nsigningkey = " + work + "/signkey.pem\nissuercert = " + work + "/issuercert.pem\ncertserial = " + work + "/certserial\n",
		options: "--platform-manufacturer Lab\n--platform-version 1\n--platform-model Host\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	cmd := exec.Command("swtpm_setup", "--tpm2", "--tpmstate", state, "--runas", "root", "--config", conf, "--create-ek-cert", "--lock-nvram", "--overwrite")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("swtpm_setup: %w: %s", err, out)
	}
	for _, name := range []string{"swtpm-localca-rootca-cert.pem", "issuercert.pem"} {
		b, err := os.ReadFile(filepath.Join(work, name))
		if err != nil {
			return nil, err
		}
		roots = append(roots, b...)
	}
	return roots, nil
}
