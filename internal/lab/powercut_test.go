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
	live [32]byte // digest of the state that swtpm had written last
	left []byte   // the state on the disk's clone after the file system's own recovery; nil if there is none
}

// TestPowerCut clones the disk of a host, again and again, while a guest has
// its vTPM written as fast as it can, and looks what the clones hold: with
// virt-trust the last or the last but one state that swtpm wrote; with plain
// libvirt, printed beside it, also files of zeros, as swtpm flushes nothing.
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
	if kept.lost > 0 || kept.unknown > 0 || kept.lag > 1 {
		t.Errorf("a vTPM was left that is neither the last nor the last but one: %s", kept)
	}
}

// judgement counts what clones held.
type judgement struct {
	clones  int
	lost    int // zeros, nothing, or no file
	unknown int // nothing that swtpm had written
	lag     int // the most that a state was behind the last one written
}

func (j judgement) String() string {
	return fmt.Sprintf("%d clones: %d without a state (zeros, empty or missing), %d with one that swtpm never wrote, else at most %d behind the last write",
		j.clones, j.lost, j.unknown, j.lag)
}

func judge(t *testing.T, versions map[[32]byte]int, all []cut) (j judgement) {
	t.Helper()
	for i, c := range all {
		j.clones++
		live, known := versions[c.live]
		if !known {
			t.Fatalf("clone %d: what swtpm had written is not known", i)
		}
		version, known := versions[sha256.Sum256(c.left)]
		switch {
		case len(bytes.Trim(c.left, "\x00")) == 0:
			j.lost++
		case !known:
			j.unknown++
		default:
			j.lag = max(j.lag, live-version)
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
	var all []cut
	var failed error
	var done atomic.Bool
	go func() {
		defer done.Store(true)
		for range n {
			time.Sleep(time.Duration(100+rand.IntN(900)) * time.Millisecond)
			var c cut
			if c, failed = h.clone(state, g.StateDir()+"/tpm2-00.permall"); failed != nil {
				return
			}
			all = append(all, c)
		}
	}()
	versions := map[[32]byte]int{}
	for i := 0; !done.Load(); i++ {
		if got, want := g.Ask(fmt.Sprintf("write %d", i)), fmt.Sprintf("wrote %d", i); got != want {
			t.Fatalf("%s, not %s", got, want)
		}
		// Nothing else writes: this is what swtpm had in its place before it answered.
		b, err := os.ReadFile(state)
		if err != nil {
			t.Fatal(err)
		}
		versions[sha256.Sum256(b)] = i
	}
	if failed != nil {
		t.Fatal(failed)
	}
	g.Destroy()
	t.Logf("%s: %d states written", h.opts.Name, len(versions))
	return judge(t, versions, all)
}

// clone stops the host, copies its disk, lets it go on, and looks into the copy.
func (h *Host) clone(live, path string) (c cut, err error) {
	image := filepath.Join(h.dir, "clone.img")
	defer os.Remove(image)
	signalTree(h.leader, syscall.SIGSTOP)
	b, err := os.ReadFile(live)
	c.live = sha256.Sum256(b)
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
	const look = `mount -o loop "$1" "$2" && { [ ! -e "$3" ] || cat "$3"; }`
	cmd := exec.Command("unshare", "--mount", "sh", "-c", look, "sh", image, mount, mount+"/upper"+path)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if c.left, err = cmd.Output(); err != nil {
		return c, fmt.Errorf("looking into a clone: %w: %s", err, &stderr)
	}
	return c, nil
}
