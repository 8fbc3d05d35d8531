package lab

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

// TestSoak starts, uses, stops, kills and cuts for $VIRT_TRUST_SOAK (a
// duration, or anything for an hour); whatever happened, each VM has to start
// again with its secret, and the list's generation never falls.
func TestSoak(t *testing.T) {
	Require(t)
	if os.Getenv("VIRT_TRUST_SOAK") == "" {
		t.Skip("make soak runs this")
	}
	length, err := time.ParseDuration(os.Getenv("VIRT_TRUST_SOAK"))
	if err != nil {
		length = time.Hour
	}
	h := guarded(t, HostOptions{Name: "soak"})
	var guests []*Guest
	for i := range 4 {
		guests = append(guests, sealed(t, h, VM{Name: fmt.Sprintf("soak%d", i), TPM: true, Disk: "qcow2"}))
	}
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	ends := []struct {
		name string
		do   func(g *Guest)
	}{
		{"destroy", func(g *Guest) { g.Destroy() }},
		{"shutdown", func(g *Guest) { g.Shutdown() }},
		{"managedsave", func(g *Guest) { h.Must("virsh", "managedsave", g.Name) }},
		{"kill QEMU", func(g *Guest) {
			h.Shell("kill -9 $(cat /run/libvirt/qemu/" + g.Name + ".pid)")
			g.WaitState("shut off")
		}},
		{"kill virt-trustd", func(g *Guest) { h.Must("systemctl", "kill", "-s", "KILL", "virt-trustd"); g.Destroy() }},
		{"kill libvirtd", func(g *Guest) {
			h.Must("systemctl", "kill", "-s", "KILL", "--kill-who=main", "libvirtd")
			h.TakenUp()
			g.Destroy()
		}},
		{"power cut", func(*Guest) { h.PowerCut() }},
		{"reboot", func(g *Guest) { g.Destroy(); h.Reboot() }},
	}
	rounds := 0
	for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); rounds++ {
		g := guests[random.IntN(len(guests))]
		g.read = len(g.Console())
		if r := g.TryStart(); r.Code != 0 {
			t.Fatalf("round %d: %s: %s", rounds, g.Name, r.Stderr)
		}
		// From a managed save it is up at once and says nothing by itself.
		waitFor(t, g.Name+" obeys", func() bool {
			g.Say("ping")
			time.Sleep(500 * time.Millisecond)
			return len(g.Console()) > g.read
		})
		g.Say("ping last")
		g.Expect("VT: pong last")
		unseals(t, g)
		g.Say(fmt.Sprintf("churn %d", random.IntN(200)))
		time.Sleep(time.Duration(random.IntN(1000)) * time.Millisecond)
		how := ends[random.IntN(len(ends))]
		t.Logf("round %d: %s: %s", rounds, g.Name, how.name)
		how.do(g)
	}
	for _, g := range guests {
		h.Run("virsh", "managedsave-remove", g.Name)
		starts(t, g)
	}
	t.Logf("%d rounds", rounds)
}
