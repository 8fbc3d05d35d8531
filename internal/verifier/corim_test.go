package verifier

import (
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"strings"
	"testing"

	"virt-trust/internal/appraise/corim"
	ct "virt-trust/internal/appraise/corim/corimtest"
	"virt-trust/internal/verifier/store/storetest"
)

// TestCoRIM: where nothing is learned, a host and its VM are right when a signed
// CoRIM says so, and wrong, for the right reason, when the next one says otherwise.
func TestCoRIM(t *testing.T) {
	s := newSetting(t, storetest.SQLite(t))
	s.cfg.Policy.ReferenceValues = "strict"
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.cfg.Policy.ManifestKeys, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	v := s.start()
	h := s.enrol(openStore(t, s.cfg.Database), 1)
	c := s.client()
	sum := func(content string) []byte { d := sha256.Sum256([]byte(content)); return d[:] }
	// The host's PCRs and files, what starts its VMs, and the VM's PCRs; some said
	// otherwise.
	made := func(version int, otherwise map[string][]byte) string {
		of := func(what string, is []byte) []byte {
			if d, ok := otherwise[what]; ok {
				return d
			}
			return is
		}
		host, vm := []any{}, ct.Map{}
		for _, p := range []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14} {
			host = append(host, ct.Of(p, of(fmt.Sprint("host PCR ", p), h.TPM.PCRs["sha256"][uint(p)])))
			vm[p] = ct.SHA256(of(fmt.Sprint("VM PCR ", p), h.VMs[0].TPM.PCRs["sha256"][uint(p)]))
		}
		for i := range 20 {
			host = append(host, ct.Of(fmt.Sprintf("/usr/lib/x86_64-linux-gnu/libexample-%d.so.%d.2.3", i, i%7), sum(fmt.Sprint("library ", i))))
		}
		launchers := []any{ct.Of("/usr/bin/qemu-system-x86_64", of("qemu", sum("qemu"))), ct.Of("/usr/bin/swtpm", sum("swtpm"))}
		b := ct.CoRIM(ct.Map{3: ct.Tagged(32, corim.Profile)}, ct.CoMID("acme", version, nil,
			ct.Reference(ct.Model("host"), host...), ct.Reference(ct.Model("launcher"), launchers...), ct.Reference(ct.Model("vm"), ct.Map{1: ct.Map{14: vm}})))
		body, err := json.Marshal(map[string]any{"format": "corim", "content": ct.Sign(b, key, nil)})
		if err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
	// told gives the tiers of host and VM, and all reasons, as the API tells them.
	told := func() string {
		t.Helper()
		for range 2 { // what an earlier round covered is asked for anew
			if _, err := h.round(v.url("")); err != nil {
				t.Fatal(err)
			}
		}
		_, _, node := ask(c, "GET", v.url("/v1/nodes/"+h.id), readerToken, "")
		_, _, vms := ask(c, "GET", v.url("/v1/vms"), readerToken, "")
		return node + vms
	}
	is := func(when string, got, tier string, want ...string) {
		t.Helper()
		for _, w := range append(want, `"tier":"`+tier+`"`) {
			if !strings.Contains(got, w) {
				t.Errorf("%s: no %s in %s", when, w, got)
			}
		}
	}
	is("before", told(), "none", "host-no-values")
	for i, step := range []struct {
		when      string
		otherwise map[string][]byte
		tier      string
		code      string
	}{
		{"as it is", nil, "affirming", ""},
		{"another PCR", map[string][]byte{"host PCR 7": sum("other")}, "contraindicated", "host-pcr-other"},
		{"as it is, again", nil, "affirming", ""},
		{"another QEMU", map[string][]byte{"qemu": sum("other")}, "contraindicated", "launcher-unknown"},
		{"another PCR of the VM", map[string][]byte{"VM PCR 4": sum("other")}, "contraindicated", "vm-pcr-other"},
	} {
		if code, _, body := ask(c, "POST", v.url("/v1/values/import"), adminToken, made(i+1, step.otherwise)); code != 200 {
			t.Fatalf("%s: %d %s", step.when, code, body)
		}
		got := told()
		is(step.when, got, step.tier, step.code)
		if step.tier == "affirming" && strings.Contains(got, `"tier":"contraindicated"`) || step.code == "vm-pcr-other" && !strings.Contains(got, `"tier":"affirming"`) {
			t.Errorf("%s: %s", step.when, got)
		}
	}
	if code, _, body := ask(c, "POST", v.url("/v1/values/import"), adminToken, made(1, nil)); code != 409 {
		t.Errorf("an older one: %d %s", code, body)
	}
}
