package lab

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// soak is a host whose VMs live at random.
type soak struct {
	t      *testing.T
	h      *Host
	guests []*Guest
	random *rand.Rand

	generation uint64          // of the vTPM list, at the last look
	asleep     map[string]bool // VMs in whose saved image the guest goes on
	kinds      map[string]int
}

// soakEvent is one thing that happens to a VM in a state of virsh domstate, or
// in any.
type soakEvent struct {
	name  string
	state string
	often int
	do    func(*soak, *Guest)
}

// atOnce is how many VMs run at a time: a guest's boot takes a processor.
const atOnce = 3

var soakEvents = []soakEvent{
	{"start", "shut off", 30, (*soak).start},
	{"older state", "shut off", 2, (*soak).attack},
	{"use", "running", 12, (*soak).use},
	{"destroy", "running", 5, func(_ *soak, g *Guest) { g.Destroy() }},
	{"shutdown", "running", 3, func(s *soak, g *Guest) { s.obeys(g); g.Shutdown() }},
	{"managed save", "running", 4, func(s *soak, g *Guest) {
		s.h.Must("virsh", "managedsave", g.Name)
		s.asleep[g.Name] = true
	}},
	{"suspend, resume", "running", 3, func(s *soak, g *Guest) {
		s.h.Must("virsh", "suspend", g.Name)
		s.h.Must("virsh", "resume", g.Name)
	}},
	{"kill QEMU", "running", 4, func(s *soak, g *Guest) {
		s.h.Shell("kill -9 $(cat /run/libvirt/qemu/" + g.Name + ".pid)")
		g.WaitState("shut off")
	}},
	{"kill swtpm", "running", 4, func(s *soak, g *Guest) {
		s.h.Shell("kill -9 $(fuser " + g.StateDir() + "/.lock 2>/dev/null)")
		s.h.Run("virsh", "destroy", g.Name)
		g.WaitState("shut off")
	}},
	{"kill virt-trustd", "", 4, func(s *soak, _ *Guest) { s.h.Must("systemctl", "kill", "-s", "KILL", "virt-trustd") }},
	{"restart virt-trustd", "", 2, func(s *soak, _ *Guest) { s.h.Must("systemctl", "restart", "virt-trustd") }},
	{"kill libvirtd", "", 4, func(s *soak, _ *Guest) {
		s.h.Must("systemctl", "kill", "-s", "KILL", "--kill-who=main", "libvirtd")
		s.h.TakenUp()
	}},
	{"power cut", "", 1, func(s *soak, _ *Guest) { s.h.PowerCut() }},
	{"reboot", "", 1, func(s *soak, _ *Guest) {
		for _, g := range s.guests {
			s.h.Run("virsh", "destroy", g.Name)
		}
		s.h.Reboot()
	}},
}

func (s *soak) start(g *Guest) {
	running := strings.Fields(s.h.Must("virsh", "list", "--name"))
	if len(running) >= atOnce {
		s.h.Must("virsh", "destroy", running[s.random.IntN(len(running))])
	}
	g.read = len(g.Console())
	if r := g.TryStart(); r.Code != 0 {
		s.t.Fatalf("%s: %s", g.Name, r.Stderr)
	}
}

// obeys waits until the guest does. One from a saved image says nothing by itself.
func (s *soak) obeys(g *Guest) {
	began := len(g.Console())
	if strings.Contains(g.Console()[min(g.read, began):], "VT: ready") || s.asleep[g.Name] {
		began = min(g.read, began)
	}
	for deadline := time.Now().Add(3 * time.Minute); time.Now().Before(deadline); {
		g.Say("ping")
		time.Sleep(500 * time.Millisecond)
		if strings.Contains(g.Console()[began:], "VT: pong") {
			delete(s.asleep, g.Name)
			return
		}
	}
	s.t.Fatalf("%s does not obey; its console:\n%s", g.Name, g.Console()[began:])
}

func (s *soak) use(g *Guest) {
	s.obeys(g)
	nonce := fmt.Sprint("now", s.random.Uint32())
	g.Say("ping " + nonce)
	g.Expect("VT: pong " + nonce)
	unseals(s.t, g)
	if s.random.IntN(2) == 0 {
		g.Say(fmt.Sprintf("churn %d", s.random.IntN(200))) // and whatever comes next comes meanwhile
	}
}

// attack has someone put back the state from before the VM's last run.
func (s *soak) attack(g *Guest) {
	if s.h.Run("virsh", "managedsave-dumpxml", g.Name).Code == 0 {
		return // its image has the vTPM
	}
	state := g.StateDir() + "/tpm2-00.permall"
	s.h.Shell("cp -a " + state + " /root/older")
	s.start(g)
	s.use(g)
	g.Ask("churn 2")
	s.h.Run("virsh", "destroy", g.Name)
	g.WaitState("shut off")
	s.h.Shell("cp -a /root/older " + state)
	if r := g.TryStart(); r.Code == 0 || !strings.Contains(r.Stderr, "vtpm-rolled-back") {
		s.t.Fatalf("%s with an older state: exit %d: %s", g.Name, r.Code, r.Stderr)
	}
	s.h.Must("virt-trust", "repair", g.Name)
}

// invariants hold whenever nothing is under way: the list knows every VM and
// never goes back; a VM that runs has one swtpm on its vTPM, one that is off
// has none, and would start.
func (s *soak) invariants(of *Guest) {
	s.t.Helper()
	var l struct {
		Generation uint64 `json:"list_generation"`
		State      string `json:"list_state"`
		VMs        []any  `json:"vms"`
	}
	waitFor(s.t, "virt-trustd answers", func() bool {
		r := s.h.Run("virt-trust", "list", "--json")
		return r.Code == 0 && json.Unmarshal([]byte(r.Stdout), &l) == nil
	})
	if l.Generation < s.generation || len(l.VMs) != len(s.guests) {
		s.t.Fatalf("the list: %+v; before it had generation %d", l, s.generation)
	}
	s.generation = l.Generation
	for _, g := range s.guests {
		state, swtpms := g.State(), len(strings.Fields(s.h.Run("sh", "-c", "fuser "+g.StateDir()+"/.lock 2>/dev/null").Stdout))
		if (state == "running" || state == "paused") != (swtpms == 1) || swtpms > 1 {
			time.Sleep(2 * time.Second) // it may just be ending
			state, swtpms = g.State(), len(strings.Fields(s.h.Run("sh", "-c", "fuser "+g.StateDir()+"/.lock 2>/dev/null").Stdout))
		}
		if (state == "running" || state == "paused") != (swtpms == 1) || swtpms > 1 {
			s.t.Fatalf("%s is %q with %d swtpms", g.Name, state, swtpms)
		}
		if g == of && state == "shut off" {
			if v := verdict(s.t, g); v.Verdict != "start" {
				s.t.Fatalf("%s would be refused: %s", g.Name, v.Reason)
			}
		}
	}
}

// TestSoak is $VIRT_TRUST_EVENTS random events (2000), or as many as come in
// $VIRT_TRUST_SOAK (a duration), in the lives of six VMs, with the invariants
// checked after each; at the end each VM starts with its secret.
func TestSoak(t *testing.T) {
	Require(t)
	if os.Getenv("VIRT_TRUST_SOAK") == "" && os.Getenv("VIRT_TRUST_EVENTS") == "" {
		t.Skip("make soak runs this")
	}
	events, err := strconv.Atoi(os.Getenv("VIRT_TRUST_EVENTS"))
	if err != nil {
		events = 2000
	}
	end := time.Now().Add(24 * time.Hour)
	if d, err := time.ParseDuration(os.Getenv("VIRT_TRUST_SOAK")); err == nil {
		end = time.Now().Add(d)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	s := &soak{t: t, h: guarded(t, HostOptions{Name: "soak"}), random: rand.New(rand.NewPCG(seed, 0)), asleep: map[string]bool{}, kinds: map[string]int{}}
	for i := range 6 {
		s.guests = append(s.guests, sealed(t, s.h, VM{Name: fmt.Sprintf("soak%d", i), TPM: true, Disk: "qcow2"}))
	}
	done := 0
	for ; done < events && time.Now().Before(end) && !t.Failed(); done++ {
		g := s.guests[s.random.IntN(len(s.guests))]
		e := s.next(g.State())
		t.Logf("%d: %s: %s", done, g.Name, e.name)
		e.do(s, g)
		s.kinds[e.name]++
		s.invariants(g)
	}
	for _, g := range s.guests {
		s.h.Run("virsh", "destroy", g.Name)
		s.h.Run("virsh", "managedsave-remove", g.Name)
		starts(t, g)
	}
	figures(t, "random lives of 6 VMs on a host: %d events, 0 vTPMs lost, 0 wrongly started, 0 refused without a way back; %v", done, s.kinds)
}

// next is an event for a VM in a state.
func (s *soak) next(state string) soakEvent {
	for {
		e := soakEvents[s.random.IntN(len(soakEvents))]
		if (e.state == "" || e.state == state) && s.random.IntN(30) < e.often {
			return e
		}
	}
}

// figures tells what a test has tried, if each case of it ended well.
func figures(t *testing.T, format string, args ...any) {
	t.Helper()
	if !t.Failed() {
		t.Logf("figures: "+format, args...)
	}
}
