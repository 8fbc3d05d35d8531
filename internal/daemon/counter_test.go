package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"virt-trust/internal/hosttpm"
	"virt-trust/internal/hosttpm/tpmtest"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
)

// countedIn opens the list below root with a TPM that is really there.
func countedIn(root string, each bool) (*hosttpm.Host, *liststore.Store, error) {
	host, err := hosttpm.Open(hosttpm.Config{Device: filepath.Join(root, "tpm", "sock"), Dir: filepath.Join(root, "keys"), PCRs: []uint{7}, Bank: "sha256"})
	if err != nil {
		return nil, nil, err
	}
	if host.BindKeyName() == nil {
		err = host.Provision(background)
	}
	if err != nil {
		return nil, nil, errors.Join(err, host.Close())
	}
	store, err := liststore.Open(background, filepath.Join(root, "state"), filepath.Join(root, "run"), make([]byte, list.KeySize),
		liststore.Rollback{Counter: host, Each: each, PerYear: 20_000, Now: time.Now})
	if err != nil {
		return nil, nil, errors.Join(err, host.Close())
	}
	return host, store, nil
}

// countOn commits and raises until it is killed, and says what is raised.
func countOn(root string) int {
	_, store, err := countedIn(root, false)
	for err == nil {
		r := &list.Record{UUID: uuidA, Name: "vm", Generation: 1}
		if old := store.Get(uuidA); old != nil {
			r.Generation = old.Generation + 1
		}
		for range 2 {
			if err = store.Commit(liststore.Change{Put: r}); err != nil {
				break
			}
		}
		if err == nil {
			err = store.Raise(background, false)
		}
		fmt.Println(r.Generation)
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// A process that is killed at any moment of commits and raises, against a TPM
// that is really there, leaves a list that opens in the next boot with all that
// was raised; and every list from before that is refused.
func TestKilledWhileCounting(t *testing.T) {
	t.Parallel()
	root := folder(t)
	for _, d := range []string{"tpm", "keys", "state", "run"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	tpmtest.In(t, filepath.Join(root, "tpm"))

	path := liststore.Path(filepath.Join(root, "state"))
	var older [][]byte
	raised := uint64(0)
	for i := range 25 {
		c := exec.Command(testkit.Must[string](t)(os.Executable()), root)
		c.Env = append(os.Environ(), childMode+"=count")
		c.SysProcAttr, c.WaitDelay = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}, time.Second
		var words strings.Builder
		c.Stderr = &words
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		s := bufio.NewScanner(out)
		for n := 0; s.Scan(); n++ {
			raised, _ = strconv.ParseUint(s.Text(), 10, 64)
			if n == 2 {
				time.AfterFunc(time.Duration(rand.IntN(20_000))*time.Microsecond, func() { c.Process.Kill() })
			}
		}
		if c.Wait(); words.Len() > 0 {
			t.Fatalf("kill %d: %s", i, words.String())
		}
		os.Remove(filepath.Join(root, "run", "list-generation"))
		// What lies there is at most one raise behind the counter.
		b := testkit.Must[[]byte](t)(os.ReadFile(path))
		host, store, err := countedIn(root, true)
		if err != nil {
			t.Fatalf("kill %d: %v", i, err)
		}
		if r := store.Get(uuidA); r == nil || r.Generation < raised {
			t.Fatalf("kill %d: %v is not what was raised, %d", i, r, raised)
		}
		if err := store.Raise(context.Background(), true); err != nil {
			t.Fatal(err)
		}
		host.Close()
		older = append(older, b)
	}
	newest := testkit.Must[[]byte](t)(os.ReadFile(path))
	for i, b := range older {
		os.Remove(filepath.Join(root, "run", "list-generation"))
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := countedIn(root, true); !errors.Is(err, liststore.ErrRolledBack) {
			t.Errorf("list %d of %d: %v", i, len(older), err)
		}
	}
	os.WriteFile(path, newest, 0o600)
	host, _, err := countedIn(root, true)
	if err != nil {
		t.Fatal(err)
	}
	host.Close()
	figures(t, "killed while counting: %d times, in %d raises: nothing refused, nothing older taken", len(older), raised)
}
