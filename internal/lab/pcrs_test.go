package lab

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"fmt"
	"hash"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/evidence/report"
)

// reading is a line of what internal/lab/pcrs prints.
type reading struct {
	Reading    report.Reading
	Quote      *report.Quote
	Took, Held time.Duration
}

// inSandbox has a host run internal/lab/pcrs as a service that may do what
// virt-trustd's unit allows, and gives what it read.
func inSandbox(h *Host, g *Guest, args ...string) []reading {
	h.t.Helper()
	const unit, out = "vt-pcrs.service", labDir + "/pcrs.out"
	h.Shell("cp /lib/systemd/system/virt-trustd.service /run/systemd/system/" + unit + "; mkdir -p /run/systemd/system/" + unit + ".d; rm -f " + out + " " + out + ".err")
	command := strings.Join(append([]string{labDir + "/pcrs", "-state", g.StateDir()}, args...), " ")
	h.WriteFile("/run/systemd/system/"+unit+".d/pcrs.conf", []byte("[Service]\nType=oneshot\nWatchdogSec=0\nRestart=no\nExecStart=\nExecStart="+command+
		"\nStandardOutput=file:"+out+"\nStandardError=file:"+out+".err\n"), 0o644)
	h.Must("systemctl", "daemon-reload")
	if r := h.Run("systemctl", "start", unit); r.Code != 0 {
		h.t.Fatalf("%s: %s%s", command, r.Stderr, h.ReadFile(out+".err"))
	}
	var all []reading
	for line := range bytes.Lines(h.ReadFile(out)) {
		var r reading
		if err := json.Unmarshal(line, &r); err != nil {
			h.t.Fatalf("%q: %v", line, err)
		}
		all = append(all, r)
	}
	return all
}

// withPCRs puts what inSandbox runs onto a host.
func withPCRs(t *testing.T, h *Host) {
	t.Helper()
	for path, pkg := range map[string]string{"pcrs": "pcrs", "virt-trust-inject": "../../helper/virt-trust-inject"} {
		to := filepath.Join(t.TempDir(), path)
		if err := build(pkg, to); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(to)
		if err != nil {
			t.Fatal(err)
		}
		h.WriteFile(labDir+"/"+path, b, 0o755)
	}
}

var bankHashes = map[string]func() hash.Hash{"sha1": sha1.New, "sha256": sha256.New, "sha384": sha512.New384, "sha512": sha512.New}

// words is a reading as the guest's own "pcrs" says it.
func words(r report.Reading) string {
	var w []string
	for _, b := range r.Banks {
		w = append(w, b.Algorithm)
		for _, v := range b.Values {
			w = append(w, fmt.Sprintf("%x", v))
		}
	}
	return strings.Join(w, " ")
}

// samePCRs reads a VM's PCRs both ways, and holds them against what its guest
// says of itself.
func samePCRs(t *testing.T, g *Guest, banks ...string) report.Reading {
	t.Helper()
	var from report.Reading
	for _, args := range [][]string{{"-inject", labDir + "/virt-trust-inject"}, nil} {
		all := inSandbox(g.h, g, args...)
		if len(all) != 1 {
			t.Fatalf("%d readings", len(all))
		}
		from = all[0].Reading
		want := fmt.Sprintf("pcrs %x", sha256.Sum256([]byte(words(from))))
		own := g.Ask("pcrs")
		for range 4 { // see the guest's pcrs
			if own != want {
				own = g.Ask("pcrs")
			}
		}
		if own != want {
			t.Fatalf("%s, %q: read %s\nof which the digest is %s; the guest's own is %s", g.Name, args, words(from), want, own)
		}
	}
	var names []string
	for _, b := range from.Banks {
		names = append(names, b.Algorithm)
	}
	if !slices.Equal(names, banks) {
		t.Errorf("%s: banks %q, not %q", g.Name, names, banks)
	}
	return from
}

// underLoad reads PCRs while the guest extends PCR 16 without a pause, and
// requires that each reading is a state that the vTPM had, in all banks after
// the same extend.
func underLoad(t *testing.T, g *Guest, from report.Reading, readings int, args ...string) []reading {
	t.Helper()
	if said := g.Ask("load"); said != "loaded" {
		t.Fatal(said)
	}
	all := inSandbox(g.h, g, append([]string{"-n", fmt.Sprint(readings)}, args...)...)
	rested := func() (n int) {
		said := g.Ask("rest")
		if _, err := fmt.Sscanf(said, "rested %d", &n); err != nil {
			t.Fatalf("%q: %v", said, err)
		}
		return n
	}
	extends := rested()
	for range 4 { // see the guest's pcrs
		if n := rested(); n < extends {
			extends = n // a character said twice makes it greater
		}
	}
	state := func(r report.Reading) [sha256.Size]byte { return sha256.Sum256([]byte(words(r))) }
	at := map[[sha256.Size]byte]int{state(from): 0}
	for n := range extends {
		for i := range from.Banks {
			b := &from.Banks[i]
			d, h := bankHashes[b.Algorithm](), bankHashes[b.Algorithm]()
			fmt.Fprintf(d, "extend %d", n)
			h.Write(b.Values[16])
			h.Write(d.Sum(nil))
			b.Values[16] = h.Sum(nil)
		}
		at[state(from)] = n + 1
	}
	if now := state(readOne(t, g)); at[now] != extends {
		t.Errorf("in the end it is after %d extends of %d", at[now], extends)
	}
	last, seen := 0, map[int]bool{}
	for i, r := range all {
		n, ok := at[state(r.Reading)]
		if !ok || n < last {
			t.Fatalf("reading %d of %d is of no state, or an older one than the one before: %v, %d, %d", i, len(all), ok, n, last)
		}
		last, seen[n] = n, true
	}
	if len(all) != readings || len(seen) < readings/10 {
		t.Errorf("%d readings of %d, %d states: there was no load", len(all), readings, len(seen))
	}
	t.Logf("%s, %q: %d readings, %d extends, %d states seen; %s", g.Name, args, len(all), extends, len(seen), timesOf(all))
	return all
}

func timesOf(all []reading) string {
	var took, held []time.Duration
	for _, r := range all[1:] {
		took, held = append(took, r.Took), append(held, r.Held)
	}
	slices.Sort(took)
	slices.Sort(held)
	n := len(took)
	return fmt.Sprintf("the first %v, then %v, at worst %v; VM held for %v, 99%% %v, at worst %v", all[0].Took, took[n/2], took[n-1], held[n/2], held[n*99/100], held[n-1])
}

// TestPCRs reads the PCRs of a guarded VM from its host, within the sandbox of
// virt-trustd: they are what the guest sees, at rest, under load, and after it
// was saved.
func TestPCRs(t *testing.T) {
	t.Parallel()
	host := guarded(t, HostOptions{Name: "pcrs"})
	withPCRs(t, host)
	h := host.In(t)
	g := sealed(t, h, VM{Name: "vault", TPM: true, Disk: "qcow2"})
	g.Start()
	g.Ask("ping 0") // by the connection that all share: QEMU has one at a time
	in := func(t *testing.T) (*Host, *Guest) {
		there := *g
		there.h = host.In(t)
		return there.h, &there
	}

	t.Run("equal", func(t *testing.T) {
		_, g := in(t)
		samePCRs(t, g, "sha256")
	})
	t.Run("under load", func(t *testing.T) {
		_, g := in(t)
		underLoad(t, g, readOne(t, g), 1000, "-pause", "5ms")
		underLoad(t, g, readOne(t, g), 100, "-pause", "5ms", "-inject", labDir+"/virt-trust-inject")
		samePCRs(t, g, "sha256")
		unseals(t, g)
	})
	t.Run("saved and restored", func(t *testing.T) {
		h, g := in(t)
		before := words(samePCRs(t, g, "sha256"))
		h.Must("virsh", "managedsave", g.Name)
		if r := g.TryStart(); r.Code != 0 {
			t.Fatal(r.Stderr)
		}
		if after := words(readOne(t, g)); after != before { // right after
			t.Errorf("before %s\nafter %s", before, after)
		}
		samePCRs(t, g, "sha256")
		underLoad(t, g, readOne(t, g), 400, "-pause", "10ms")
		unseals(t, g)
		g.conn.Close()
	})
	t.Run("stopped by the administrator", func(t *testing.T) {
		h, g := in(t)
		h.Must("virsh", "suspend", g.Name)
		if words(readOne(t, g)) != words(inSandbox(h, g, "-inject", labDir+"/virt-trust-inject")[0].Reading) {
			t.Error("of a VM that is paused")
		}
		if s := g.State(); s != "paused" {
			t.Errorf("it is %s", s)
		}
		h.Must("virsh", "resume", g.Name)
		samePCRs(t, g, "sha256")
	})
}

func readOne(t *testing.T, g *Guest) report.Reading {
	t.Helper()
	return inSandbox(g.h, g)[0].Reading
}

// TestPCRsMigrate reads the PCRs of plain VMs, of one in all banks, and of one
// before and right after it has moved to another host.
func TestPCRsMigrate(t *testing.T) {
	t.Parallel()
	Require(t)
	share := t.TempDir()
	if err := os.Chmod(share, 0o777); err != nil {
		t.Fatal(err)
	}
	a, b := NewHost(t, HostOptions{Name: "pcrs-a", Share: share}), NewHost(t, HostOptions{Name: "pcrs-b", Share: share})
	Link(a, b)
	b.OpenTCP()
	for _, h := range []*Host{a, b} {
		withPCRs(t, h)
		unitOf(t, h)
	}
	all := []string{"sha1", "sha256", "sha384", "sha512"}
	wide := a.NewVM(VM{Name: "wide", Devices: `<tpm model='tpm-crb'><backend type='emulator' version='2.0'><active_pcr_banks><sha1/><sha256/><sha384/><sha512/></active_pcr_banks></backend></tpm>`})
	wide.Start()
	underLoad(t, wide, samePCRs(t, wide, all...), 500, "-pause", "5ms")
	underLoad(t, wide, samePCRs(t, wide, all...), 100, "-pause", "5ms", "-inject", labDir+"/virt-trust-inject")
	wide.Destroy()

	g := a.NewVM(VM{Name: "mover", TPM: true, Disk: "qcow2", Shared: true})
	g.Start()
	from := samePCRs(t, g, "sha256")
	underLoad(t, g, from, 400, "-pause", "5ms")
	before := words(readOne(t, g))
	if r := g.Migrate(b); r.Code != 0 {
		t.Fatalf("migrate: %s", r.Stderr)
	}
	there := g.In(b)
	if after := words(readOne(t, there)); after != before {
		t.Errorf("before %s\nafter %s", before, after)
	}
	underLoad(t, there, samePCRs(t, there, "sha256"), 400, "-pause", "5ms")
}

// unitOf puts virt-trustd's unit, and nothing else of the package, onto a host.
func unitOf(t *testing.T, h *Host) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(ModuleRoot(), "systemd", "virt-trustd.service"))
	if err != nil {
		t.Fatal(err)
	}
	h.WriteFile("/lib/systemd/system/virt-trustd.service", b, 0o644)
}
