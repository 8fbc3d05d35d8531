package lab

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
	"time"
)

// attestation writes [attestation] and has virt-trustd read it.
func attestation(h *Host, lines ...string) {
	h.t.Helper()
	h.Shell(`sed -i '/^# lab:attestation/,$d' /etc/virt-trust/virt-trustd.toml`)
	h.Shell("cat >>/etc/virt-trust/virt-trustd.toml <<'EOF'\n# lab:attestation\n[attestation]\n" + strings.Join(lines, "\n") + "\nEOF")
	h.Must("systemctl", "restart", "virt-trustd")
}

// property gives the SHA-256 digest of an array of bytes of a VM's object.
func property(t *testing.T, g *Guest, name string) string {
	t.Helper()
	path := "/org/virttrust1/vm/" + strings.ReplaceAll(g.UUID, "-", "_")
	out := strings.Fields(g.h.Must("busctl", "get-property", "org.virttrust1", path, "org.virttrust1.VM", name)) // ay N 1 2 3
	var b []byte
	for _, n := range out[2:] {
		var v byte
		fmt.Sscan(n, &v)
		b = append(b, v)
	}
	digest := sha256.Sum256(b)
	return hex.EncodeToString(digest[:])
}

// TestEKCertificate: a new VM finds in its vTPM the certificate that the host
// has of it, and that chains to the host's TPM; and its AK.
func TestEKCertificate(t *testing.T) {
	h := guarded(t, HostOptions{Name: "ekcert"})
	attestation(h, "vtpm_ak = true")
	verify := func(h *Host, leaf string) {
		h.t.Helper()
		h.Shell("virt-trust ek --chain >/root/chain.pem && " + leaf + " >/root/leaf && openssl verify -x509_strict -CAfile /root/chain.pem /root/leaf")
	}

	t.Run("in the guest and on the host", func(t *testing.T) {
		h := h.In(t)
		g := h.NewVM(VM{Name: "certified", TPM: true, Disk: "qcow2"})
		g.Start()
		inside := g.Ask("ekcert")
		if outside := "ekcert " + property(t, g, "EKCertificate"); !strings.HasPrefix(inside, outside+" by vTPM certifier ") {
			t.Errorf("in the guest %s\non the host %s", inside, outside)
		}
		verify(h, "virt-trust ek certified --der")
		text := h.Must("openssl", "x509", "-inform", "der", "-in", "/root/leaf", "-noout", "-text")
		for _, want := range []string{"urn:uuid:" + g.UUID, "2.23.133.2.2=virt-trust vTPM", "2.23.133.8.1", "2.25.4682018360689031638891459905816600515.1"} {
			if !strings.Contains(text, want) {
				t.Errorf("the certificate lacks %s:\n%s", want, text)
			}
		}
		if said := h.Must("virt-trust", "ek", "certified"); !strings.Contains(said, "manufactured") || !strings.Contains(said, "yes, by this host's certifier") {
			t.Errorf("virt-trust ek: %s", said)
		} else {
			t.Logf("virt-trust ek:\n%s", said)
		}
		if inside := g.Ask("ak"); inside != "ak "+property(t, g, "AKPublic") {
			t.Errorf("in the guest %s\non the host %s", inside, property(t, g, "AKPublic"))
		}
		verify(h, "virt-trust ek certified --ak --pem")
		seals(t, g)
		g.Destroy()
		starts(t, g)
		g.Start()
		if now := g.Ask("ekcert"); now != inside {
			t.Errorf("at another start: %s", now)
		}
		g.Destroy()
		h.Must("virt-trust", "check", "certified")
	})

	t.Run("a VM that names its PCR banks", func(t *testing.T) {
		h := h.In(t)
		g := h.NewVM(VM{Name: "banks", TPM: true, Disk: "qcow2", Bank: "sha384"})
		g.Start() // for which libvirt runs swtpm_setup twice
		if log := h.Must("cat", "/var/log/swtpm/libvirt/qemu/banks-swtpm.log"); !strings.Contains(log, "activated PCR banks sha384 among") {
			t.Errorf("swtpm_setup's log:\n%s", log)
		}
		if inside := g.Ask("ekcert"); !strings.HasPrefix(inside, "ekcert "+property(t, g, "EKCertificate")+" by vTPM certifier ") {
			t.Errorf("in the guest %s", inside)
		}
		if inside := g.Ask("ak"); inside != "ak "+property(t, g, "AKPublic") {
			t.Errorf("in the guest %s", inside)
		}
		g.Destroy()
		g.Start()
		g.Destroy()
	})

	t.Run("virt-trustd is started anew while a vTPM is made", func(t *testing.T) {
		h := h.In(t)
		h.SlowTPM(150 * time.Millisecond) // so that swtpm_setup waits for its certificates
		defer h.SlowTPM(0)
		for how, args := range map[string]string{"restarted": "restart", "killed": "kill -s KILL"} {
			g := h.NewVM(VM{Name: how, TPM: true, Disk: "qcow2"})
			first := make(chan Result, 1)
			go func() { first <- g.TryStart() }()
			for end := time.Now().Add(30 * time.Second); h.Run("pgrep", "-f", "virt-trust-ekcert.*"+g.UUID).Code != 0; {
				if time.Now().After(end) {
					t.Fatalf("nothing asks for a certificate; virsh start: %+v", <-first)
				}
			}
			h.Shell("systemctl " + args + " virt-trustd")
			r := <-first
			t.Logf("%s: exit %d after %v: %s", how, r.Code, r.Took, r.Stderr)
			if how == "restarted" && r.Code != 0 {
				t.Error("a restart does not wait for the start")
			}
			if how == "killed" && (r.Code == 0 || !strings.Contains(r.Stderr, "swtpm_setup")) {
				t.Error("the start does not say what has failed")
			}
			if r.Code != 0 {
				g.Start()
			} else {
				g.Expect("VT: ready")
			}
			if inside := g.Ask("ekcert"); !strings.HasPrefix(inside, "ekcert "+property(t, g, "EKCertificate")+" by vTPM certifier ") {
				t.Errorf("in the guest %s", inside)
			}
			g.Destroy()
		}
	})

	t.Run("the tool fails", func(t *testing.T) {
		h := h.In(t)
		g := h.NewVM(VM{Name: "unlucky", TPM: true, Disk: "qcow2"})
		h.Shell("mv /usr/libexec/virt-trust/virt-trust-ekcert /root/ekcert && ln -s /bin/false /usr/libexec/virt-trust/virt-trust-ekcert")
		if r := g.TryStart(); r.Code == 0 || !strings.Contains(r.Stderr, "swtpm") {
			t.Errorf("exit %d: %s", r.Code, r.Stderr)
		}
		h.Must("mv", "/root/ekcert", "/usr/libexec/virt-trust/virt-trust-ekcert")
		g.Start() // nothing stands in the way
		if cert := g.Ask("ekcert"); !strings.HasPrefix(cert, "ekcert "+property(t, g, "EKCertificate")+" by vTPM certifier ") {
			t.Errorf("%s", cert)
		}
		g.Destroy()
	})

	t.Run("taken in", func(t *testing.T) {
		h := h.In(t)
		g := h.NewVM(VM{Name: "older", TPM: true, Disk: "qcow2"})
		attestation(h, "ek_certificates = false")
		g.Start()
		seals(t, g)
		inside := g.Ask("ekcert") // by swtpm_localca
		g.Destroy()
		if !strings.HasSuffix(inside, " by swtpm-localca") {
			t.Errorf("the admin's tool was not run: %s", inside)
		}
		if r := h.Run("virt-trust", "ek", "older"); r.Code != 1 || !strings.Contains(r.Stderr, "--issue") {
			t.Errorf("exit %d: %s", r.Code, r.Stderr)
		}
		attestation(h)
		said := h.Must("virt-trust", "ek", "older", "--issue")
		if !strings.Contains(said, "taken-in") {
			t.Errorf("virt-trust ek --issue: %s", said)
		}
		verify(h, "virt-trust ek older --pem")
		g.Start()
		if now := g.Ask("ekcert"); now != inside {
			t.Errorf("what the vTPM holds has changed: %s", now)
		}
		unseals(t, g)
		g.Destroy()
	})
}
