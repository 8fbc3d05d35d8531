package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/domain"
	"virt-trust/internal/recovery"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/imagefile"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statedir"
)

// operations are what a kill -9 may cut short, each on VM A.
var operations = map[string]func(ctx context.Context, g *Guard, f *domain.Facts) error{
	"prepare": func(ctx context.Context, g *Guard, f *domain.Facts) error { return g.Prepare(ctx, f, cgroup, nil) },
	"write": func(ctx context.Context, g *Guard, f *domain.Facts) error {
		store, err := g.List(ctx)
		if err != nil {
			return err
		}
		r := store.Get(f.UUID)
		s := &session{uuid: f.UUID, dir: r.Instance}
		s.writes.Store(true)
		if s.noted, err = g.readJournal(r); err == nil {
			_, err = g.settle(s)
		}
		return err
	},
	"stop": func(ctx context.Context, g *Guard, f *domain.Facts) error {
		store, err := g.List(ctx)
		if err != nil {
			return err
		}
		return g.rest(ctx, store, store.Get(f.UUID), false)
	},
	"adopt": func(ctx context.Context, g *Guard, f *domain.Facts) error {
		_, err := g.Adopt(ctx, off(f), f, false)
		return err
	},
	"release": func(ctx context.Context, g *Guard, f *domain.Facts) error {
		_, err := g.Release(ctx, off(f), f)
		return err
	},
	"repair": func(ctx context.Context, g *Guard, f *domain.Facts) error {
		_, err := g.Repair(ctx, off(f), f)
		return err
	},
	"accept": func(ctx context.Context, g *Guard, f *domain.Facts) error {
		_, err := g.Accept(ctx, off(f), f)
		return err
	},
	"recovery key": func(ctx context.Context, g *Guard, f *domain.Facts) error {
		if _, err := g.List(ctx); err != nil {
			return err
		}
		k, err := keyIn(g.dirs.State)
		if err == nil {
			_, err = g.SetRecovery(ctx, k.Recipient(), quietly)
		}
		return err
	},
	"recover": func(ctx context.Context, g *Guard, f *domain.Facts) error {
		k, err := keyIn(g.dirs.State)
		if err == nil {
			_, err = g.Recover(ctx, k, quietly)
		}
		return err
	},
	"raise": func(ctx context.Context, g *Guard, f *domain.Facts) error {
		store, err := g.List(ctx)
		if err != nil {
			return err
		}
		r := store.Get(f.UUID)
		s := &session{uuid: f.UUID, dir: r.Instance}
		if s.noted, err = g.readJournal(r); err == nil {
			g.sessions[f.UUID] = s
			err = g.raise(ctx, store, true)
		}
		return err
	},
	"accept-list": func(ctx context.Context, g *Guard, f *domain.Facts) error {
		_, err := g.AcceptList(ctx)
		return err
	},
	"delete": func(ctx context.Context, g *Guard, f *domain.Facts) error {
		store, err := g.List(ctx)
		if err != nil {
			return err
		}
		return g.delete(ctx, store, store.Get(f.UUID), "it was undefined")
	},
}

// keyIn is the recovery key that a scene has put beside the house's state.
func keyIn(state string) (*recovery.Key, error) {
	b, err := os.ReadFile(filepath.Join(filepath.Dir(state), "recovery.key"))
	if err != nil {
		return nil, err
	}
	return recovery.Parse(b)
}

// putKey makes a recovery key for keyIn.
func (h *house) putKey() *recovery.Key {
	h.t.Helper()
	k := testkit.Must[*recovery.Key](h.t)(recovery.NewKey())
	if err := os.WriteFile(filepath.Join(h.root, "recovery.key"), []byte(k.Text()), 0o600); err != nil {
		h.t.Fatal(err)
	}
	return k
}

// carryOutInChild does an operation in the house at root, and gives the exit status.
func carryOutInChild(op, root string) int {
	tpm, err := loadFakeTPM(filepath.Join(root, "tpm.json"))
	if err == nil {
		l := logrus.New()
		l.Out = io.Discard
		var g *Guard
		if g, err = NewGuard(configIn(root), dirsIn(root), tpm, logrus.NewEntry(l), func(string) {}); err == nil {
			err = operations[op](context.Background(), g, factsIn(root, uuidA, ""))
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// changing are the system calls that change what lies on the disk. (What is
// lost when power fails, too, is package liststore's and imagefile's to test.)
const changing = "rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,pwrite64,ftruncate"

// cutAt is one such call: the n-th of its name.
type cutAt struct {
	call string
	n    int
}

// inChild carries an operation out in a child under strace.
func (h *house) inChild(op string, options ...string) (stderr string, err error) {
	h.t.Helper()
	var words bytes.Buffer
	c := exec.Command(testkit.Need(h.t, "strace"), append(append([]string{"-f", "-qq"}, options...), testkit.Must[string](h.t)(os.Executable()), h.root)...)
	c.Env = append(os.Environ(), childMode+"="+op)
	c.SysProcAttr, c.WaitDelay = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}, time.Second
	c.Stderr = &words
	err = c.Run()
	return words.String(), err
}

// steps carries an operation out and gives what it did, in order.
func (h *house) steps(op string) (all []cutAt) {
	h.t.Helper()
	trace := filepath.Join(h.t.TempDir(), "trace")
	if words, err := h.inChild(op, "-o", trace, "-e", "signal=none", "-e", "trace="+changing); err != nil {
		h.t.Fatalf("%s: %v: %s", op, err, words)
	}
	main, count := "", map[string]int{}
	for line := range strings.Lines(string(testkit.Must[[]byte](h.t)(os.ReadFile(trace)))) {
		pid, rest, _ := strings.Cut(line, " ")
		call, _, ok := strings.Cut(strings.TrimSpace(rest), "(")
		if main == "" {
			main = pid
		}
		if pid == main && ok {
			count[call]++
			all = append(all, cutAt{call, count[call]})
		}
	}
	return all
}

// cutShort carries an operation out in a child that is killed at a step,
// before the step is done.
func (h *house) cutShort(op string, at cutAt) {
	h.t.Helper()
	words, err := h.inChild(op, "-o", "/dev/null", "-e", "trace="+at.call, "-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", at.call, at.n))
	var exit *exec.ExitError
	if !errors.As(err, &exit) || !exit.Sys().(syscall.WaitStatus).Signaled() {
		h.t.Fatalf("%s, to be killed at %v: %v: %s", op, at, err, words)
	}
}

// scene is a VM before an operation is done on it, and what has to hold when
// the operation was cut short or failed at any step.
type scene struct {
	name, op string
	set      func(*house) *domain.Facts
	check    func(*house, *domain.Facts)
}

var scenes = []scene{
	{"a new VM", "prepare", func(h *house) *domain.Facts { return h.vm(uuidA, false) }, func(h *house, f *domain.Facts) {
		key := h.start(f)
		h.write(uuidA, key)
		h.noted(uuidA)
		h.stop(f)
		h.start(f)
		h.stop(f)
		h.belongs(f)
	}},
	{"adoption", "prepare", func(h *house) *domain.Facts { return h.vm(uuidA, true) }, guarded},
	{"a warm start", "prepare", func(h *house) *domain.Facts { f, _, _ := h.ran(uuidA); return f }, guarded},
	{"a stop", "stop", func(h *house) *domain.Facts {
		f := h.vm(uuidA, true)
		h.write(uuidA, h.start(f))
		h.noted(uuidA)
		return f
	}, guarded},
	{"a write", "write", func(h *house) *domain.Facts {
		f := h.vm(uuidA, true)
		h.write(uuidA, h.start(f))
		h.noted(uuidA)
		key := h.g.sessions[uuidA].keys
		h.g.watch.Close()
		h.write(uuidA, stateKey(key))
		return f
	}, func(h *house, f *domain.Facts) {
		// The power goes while swtpm writes once more.
		testkit.Must[any](h.t)(h.g.List(context.Background()))
		written := h.read(uuidA)
		noted := testkit.Must[[]list.Past](h.t)(h.g.readJournal(h.g.peek().Get(uuidA)))
		h.put(uuidA, make([]byte, len(written)))
		guarded(h, f)
		if noted[len(noted)-1].Digest == statedir.Digest("tpm2-00.permall", written) && !bytes.Equal(h.read(uuidA), written) {
			h.t.Error("what was noted is lost")
		}
	}},
	{"a raise", "raise", func(h *house) *domain.Facts {
		f := h.vm(uuidA, true)
		key := h.start(f)
		for range 3 {
			h.write(uuidA, key)
			h.noted(uuidA)
		}
		return f
	}, func(h *house, f *domain.Facts) {
		h.startsItself(f)
		guarded(h, f)
	}},
	{"an older list", "accept-list", func(h *house) *domain.Facts {
		f, _, _ := h.ran(uuidA)
		older := h.snapshot()
		h.start(f)
		h.stop(f)
		h.raised()
		h.cutPower(func() { older() })
		return f
	}, func(h *house, f *domain.Facts) {
		if _, err := h.listed(); err != nil {
			refuses(h.t, err, reason.ListRolledBack)
			if _, err := h.g.AcceptList(context.Background()); err != nil {
				h.t.Fatal("it cannot be accepted any more:", err)
			}
		}
		guarded(h, f)
	}},
	{"a first label", "prepare", func(h *house) *domain.Facts {
		f := h.vm(uuidA, true)
		os.Rename(h.image(uuidA), h.image(uuidA)+".away")
		h.start(f)
		h.stop(f)
		os.Rename(h.image(uuidA)+".away", h.image(uuidA))
		return f
	}, guarded},
	{"a copied image", "adopt", func(h *house) *domain.Facts {
		f := h.vm(uuidB, true)
		h.start(f)
		h.stop(f)
		h.manufacture(uuidA)
		copyFile(h.t, h.image(uuidB), h.image(uuidA))
		return h.facts(uuidA)
	}, guarded},
	{"repair", "repair", func(h *house) *domain.Facts {
		f, _, versions := h.ran(uuidA)
		h.put(uuidA, versions[0])
		if err := imagefile.RemoveLabel(h.image(uuidA), func([]byte) bool { return true }); err != nil {
			h.t.Fatal(err)
		}
		return f
	}, guarded},
	{"acceptance", "accept", func(h *house) *domain.Facts {
		f, _, versions := h.ran(uuidA)
		h.put(uuidA, versions[0])
		return f
	}, guarded},
	{"a recovery key", "recovery key", func(h *house) *domain.Facts {
		f, _, _ := h.ran(uuidA)
		h.putKey()
		return f
	}, func(h *house, f *domain.Facts) {
		guarded(h, f)
		k := testkit.Must[*recovery.Key](h.t)(keyIn(h.g.dirs.State))
		testkit.Must[string](h.t)(h.g.SetRecovery(background, k.Recipient(), quietly))
		h.otherTPM()
		testkit.Must[string](h.t)(h.g.Recover(background, k, quietly))
		h.tpm = nil // the next case has the first TPM
		h.start(f)
	}},
	{"a recovery", "recover", func(h *house) *domain.Facts {
		f, _, _ := h.ran(uuidA)
		testkit.Must[string](h.t)(h.g.SetRecovery(background, h.putKey().Recipient(), quietly))
		os.Remove(liststore.Path(h.g.dirs.State))
		return f
	}, func(h *house, f *domain.Facts) {
		if err := h.prepare(f); err != nil {
			if reason.As(err) == nil {
				h.t.Fatal(err)
			}
			testkit.Must[string](h.t)(h.g.Recover(background, testkit.Must[*recovery.Key](h.t)(keyIn(h.g.dirs.State)), quietly))
		}
		guarded(h, f)
	}},
	{"release", "release", func(h *house) *domain.Facts { f, _, _ := h.ran(uuidA); return f }, func(h *house, f *domain.Facts) {
		store := testkit.Must[interface{ Get(string) *list.Record }](h.t)(h.listed())
		if r := store.Get(uuidA); r == nil || r.State != list.Released {
			guarded(h, f)
			if _, err := h.g.Release(context.Background(), off(f), f); err != nil {
				h.t.Fatal("it cannot be released any more:", err)
			}
		}
		released(h, f)
	}},
	{"deletion", "delete", func(h *house) *domain.Facts {
		f, _, _ := h.ran(uuidA)
		os.RemoveAll(filepath.Dir(h.dir(uuidA)))
		return f
	}, func(h *house, f *domain.Facts) {
		if err := h.prepare(f); err != nil {
			refuses(h.t, err, reason.VTPMMissing)
			if _, err := h.g.Adopt(context.Background(), off(f), f, true); err != nil {
				h.t.Fatal("there is no way to a new vTPM:", err)
			}
		}
		h.start(f)
	}},
}

// A virt-trustd that is killed at any step leaves a VM that starts guarded with
// all that its vTPM holds, or that is released, or whose refusal names the way
// back that works.
func TestKilledAtEachStep(t *testing.T) {
	makings(t)
	var cases atomic.Int64
	t.Cleanup(func() {
		figures(t, "virt-trustd killed: %d cases, 0 vTPMs lost, 0 wrongly started, 0 refused without a way back", cases.Load())
	})
	for _, tt := range scenes {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h, f, before := tt.before(t)
			steps := h.steps(tt.op)
			if len(steps) < 3 {
				t.Fatalf("only %v", steps)
			}
			for i, at := range steps {
				os.RemoveAll(h.root)
				copyTree(t, before, h.root)
				h.cutShort(tt.op, at)
				h.boot()
				if tt.op == "prepare" || tt.op == "stop" {
					h.startsItself(f)
				}
				tt.check(h, f)
				h.g.Close()
				cases.Add(1)
				if t.Failed() {
					t.Fatalf("killed before step %d, %v", i, at)
				}
			}
			t.Log(len(steps), "steps")
		})
	}
}

// before sets a scene: the house, the VM, and a copy of all that lies there.
func (s scene) before(t *testing.T) (*house, *domain.Facts, string) {
	h := newHouse(t)
	f := s.set(h)
	h.g.Close()
	before := filepath.Join(folder(t), "before")
	copyTree(t, h.root, before)
	return h, f, before
}

func (h *house) listed() (interface{ Get(string) *list.Record }, error) {
	return h.g.List(context.Background())
}

func copyTree(t testing.TB, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

// guarded wants the VM to start with its vTPM as it was, first by itself and
// else by what the refusal names; and label, list and state to belong together.
func guarded(h *house, f *domain.Facts) {
	h.t.Helper()
	err := h.prepare(f)
	for range 2 {
		r := reason.As(err)
		if r == nil {
			break
		}
		switch {
		case strings.Contains(r.Mend, "virt-trust repair"):
			_, err = h.g.Repair(context.Background(), off(f), f)
		case strings.Contains(r.Mend, "virt-trust adopt"):
			_, err = h.g.Adopt(context.Background(), off(f), f, false)
		}
		if err != nil {
			h.t.Fatal("the way back is none:", err)
		}
		err = h.prepare(f)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	key, _ := h.keys(f.UUID)
	h.decrypts(f.UUID, key)
	if err := h.g.Launched(f); err != nil {
		h.t.Fatal(err)
	}
	h.stop(f)
	h.belongs(f)
	h.noPlain(f.UUID)
}

// startsItself wants a VM whose life was cut short, not an admin's work on it,
// to need no help.
func (h *house) startsItself(f *domain.Facts) {
	h.t.Helper()
	if err := h.prepare(f); err != nil {
		h.t.Error("after a crash alone it needs help: ", err)
	}
	h.reboot() // libvirt went no further
}

// noPlain wants nothing of the vTPM to lie in its folder in the clear.
func (h *house) noPlain(uuid string) {
	h.t.Helper()
	plain := plainState(h.t)
	names, _ := os.ReadDir(h.dir(uuid))
	for _, n := range names {
		b, _ := os.ReadFile(filepath.Join(h.dir(uuid), n.Name()))
		if bytes.Contains(b, plain[len(plain)/2:len(plain)/2+64]) {
			h.t.Errorf("%s holds the vTPM in the clear", n.Name())
		}
	}
}

// released wants plain libvirt to start the VM with its vTPM.
func released(h *house, f *domain.Facts) {
	h.t.Helper()
	if !bytes.Equal(h.read(f.UUID), plainState(h.t)) {
		h.t.Error("the plain state is not what it was")
	}
	if _, err := imagefile.ReadLabel(h.image(f.UUID)); !errors.Is(err, imagefile.ErrNoLabel) {
		h.t.Error("the label is still there:", err)
	}
	if key := h.start(f); key != nil {
		h.t.Error("a released VM got keys")
	}
}

// figures tells what a test has tried, if each case of it ended well.
func figures(t *testing.T, format string, args ...any) {
	t.Helper()
	if !t.Failed() {
		t.Logf("figures: "+format, args...)
	}
}
