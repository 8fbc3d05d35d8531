package lab

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// cut is what a power cut at some instant would have left of a vTPM.
type cut struct {
	at   time.Time
	live [32]byte // digest of the state that swtpm had written last
	left []byte   // the state on the disk's clone after the file system's own recovery; nil if there is none
	kept []byte   // the state that virt-trustd keeps, which takes the place of one that is unreadable after a crash
}

// version is a state that swtpm wrote: its number, and when it was seen in its
// place.
type version struct {
	n    int
	seen time.Time
}

// flushed is how long virt-trustd may need, on a busy machine, to make a state
// durable.
const flushed = time.Second

// TestPowerCut clones the disk of a host, again and again, while a guest has
// its vTPM written as fast as it can, and looks what the clones hold: with
// virt-trust what swtpm wrote last, or had written when the last flush of the
// disk began, which is the last but one at any pace but this, or, where the cut
// came within that flush and left the file torn, the state that virt-trustd keeps
// and puts back (TestPowerCut of internal/daemon starts the VM then); with plain
// libvirt, printed beside it, also states that are old, half zeros or nothing
// else, as swtpm flushes nothing.
func TestPowerCut(t *testing.T) {
	Require(t)
	n := 10
	if os.Getenv("VIRT_TRUST_SOAK") != "" {
		n = 200
	}
	plain := cuts(t, NewHost(t, HostOptions{Name: "unguarded"}), n)
	t.Logf("plain libvirt: %s", plain)
	kept := cuts(t, guarded(t, HostOptions{Name: "guarded"}), n)
	t.Logf("virt-trust:    %s", kept)
	if kept.torn > kept.back || kept.old > 0 {
		t.Errorf("vTPMs were lost: %s", kept)
	}
}

// judgement counts what clones held.
type judgement struct {
	clones int
	zeros  int // nothing but zeros, nothing at all, or no file
	back   int // torn, but what virt-trustd keeps is put in its place
	torn   int // nothing that swtpm had written, zeros included
	old    int // a newer one had been in its place for longer than a flush takes
	behind int // the most that a state was behind the last one
}

func (j judgement) String() string {
	return fmt.Sprintf("%d clones: %d torn, %d of them all zeros or empty, %d of them put back by what is kept; %d old ones, at most %d behind the last write",
		j.clones, j.torn, j.zeros, j.back, j.old, j.behind)
}

func judge(t *testing.T, versions map[[32]byte]version, all []cut) (j judgement) {
	t.Helper()
	for i, c := range all {
		j.clones++
		live, known := versions[c.live]
		if !known {
			t.Fatalf("clone %d: what swtpm had written is not known", i)
		}
		left, known := versions[sha256.Sum256(c.left)]
		if !known {
			j.torn++
			if len(bytes.Trim(c.left, "\x00")) == 0 {
				j.zeros++
			}
			if left, known = versions[sha256.Sum256(c.kept)]; !known {
				continue
			}
			j.back++
		}
		j.behind = max(j.behind, live.n-left.n)
		for _, v := range versions {
			if v.n > left.n && c.at.Sub(v.seen) > flushed {
				j.old++
				break
			}
		}
	}
	return j
}

// cuts takes n clones while a guest has its vTPM written, and judges them.
func cuts(t *testing.T, h *Host, n int) judgement {
	t.Helper()
	g := h.NewVM(VM{Name: "writer", TPM: true, Disk: "qcow2"})
	g.Start()
	state := h.Path(g.StateDir() + "/tpm2-00.permall")
	versions := map[[32]byte]version{}
	// Nothing but the guest's commands makes swtpm write, and it has written
	// before it answers.
	note := func() {
		b, err := os.ReadFile(state)
		if err != nil {
			t.Fatal(err)
		}
		versions[sha256.Sum256(b)] = version{len(versions), time.Now()}
	}
	note()
	h.Must("sync") // no clone holds anything older
	var all []cut
	var failed error
	var done atomic.Bool
	go func() {
		defer done.Store(true)
		for range n {
			time.Sleep(time.Duration(100+rand.IntN(900)) * time.Millisecond)
			var c cut
			if c, failed = h.clone(state, g.StateDir()+"/tpm2-00.permall", "/var/lib/virt-trust/vtpm/"+g.UUID+"/state"); failed != nil {
				return
			}
			all = append(all, c)
		}
	}()
	for i := 0; !done.Load(); i++ {
		if got, want := g.Ask(fmt.Sprintf("write %d", i)), fmt.Sprintf("wrote %d", i); got != want {
			t.Fatalf("%s, not %s", got, want)
		}
		note()
	}
	if failed != nil {
		t.Fatal(failed)
	}
	g.Destroy()
	t.Logf("%s: %d states written", h.opts.Name, len(versions))
	return judge(t, versions, all)
}

// clone stops the host, copies its disk, lets it go on, and looks into the copy.
func (h *Host) clone(live, path, kept string) (c cut, err error) {
	image := filepath.Join(h.dir, "clone.img")
	defer os.Remove(image)
	signalTree(h.leader, syscall.SIGSTOP)
	b, err := os.ReadFile(live)
	c.at, c.live = time.Now(), sha256.Sum256(b)
	err = errors.Join(err, h.copyDisk(image))
	signalTree(h.leader, syscall.SIGCONT)
	if err != nil {
		return c, err
	}
	mount := filepath.Join(h.dir, "clone")
	if err := os.MkdirAll(mount, 0o755); err != nil {
		return c, err
	}
	// The mount replays the file system's journal, and ends with its namespace.
	const look = `mount -o loop "$1" "$2" && { [ ! -e "$3" ] || cat "$3"; } && { [ ! -e "$4" ] || cat "$4" >&3; }`
	cmd := exec.Command("unshare", "--mount", "sh", "-c", look, "sh", image, mount, mount+"/upper"+path, mount+"/upper"+kept)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	keep, err := os.CreateTemp(h.dir, "kept-")
	if err != nil {
		return c, err
	}
	defer os.Remove(keep.Name())
	defer keep.Close()
	cmd.ExtraFiles = []*os.File{keep}
	if c.left, err = cmd.Output(); err != nil {
		return c, fmt.Errorf("looking into a clone: %w: %s", err, &stderr)
	}
	c.kept, err = os.ReadFile(keep.Name())
	return c, err
}
