package statedir

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/statefile"
)

func manufacture(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tpm2")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	testkit.Need(t, "swtpm")
	c := exec.Command(testkit.Need(t, "swtpm_setup"), "--tpm2", "--tpm-state", dir, "--not-overwrite")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return dir
}

func TestLookAndReplace(t *testing.T) {
	dir := manufacture(t)
	s, err := Look(dir)
	if err != nil || s.Kind != statefile.Plain || len(s.Strange) > 0 {
		t.Fatalf("%v %+v", err, s.Strange)
	}
	key, iv := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)
	enc, err := statefile.Encrypt(s.Data, key, iv)
	if err != nil {
		t.Fatal(err)
	}
	old, err := os.Open(filepath.Join(dir, s.Name))
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	before, _ := old.Stat()
	if err := Replace(dir, enc, true); err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, len(s.Data))
	got := make([]byte, len(s.Data))
	if _, err := old.ReadAt(got, 0); err != nil || !bytes.Equal(got, zeros) {
		t.Fatal("the plain state was not overwritten", err)
	}
	n, err := Look(dir)
	if err != nil || n.Kind != statefile.Encrypted || n.Digest != Digest(s.Name, enc) || len(n.Strange) > 0 {
		t.Fatal(err, n.Kind, n.Strange)
	}
	after, _ := os.Stat(filepath.Join(dir, s.Name))
	if before.Mode() != after.Mode() || before.Sys().(*unixStat).Uid != after.Sys().(*unixStat).Uid {
		t.Fatal("owner or mode changed")
	}
	if err := Remove(dir); err != nil {
		t.Fatal(err)
	}
	if n, err = Look(dir); err != nil || n.Exists() || !n.Digest.IsZero() {
		t.Fatal(err, n)
	}
}

// A file that someone holds by a hard link is theirs: it must not be zeroed.
func TestShredSparesHardLinks(t *testing.T) {
	dir := manufacture(t)
	s, _ := Look(dir)
	kept := filepath.Join(t.TempDir(), "kept")
	if err := os.Link(filepath.Join(dir, s.Name), kept); err != nil {
		t.Fatal(err)
	}
	if err := Replace(dir, []byte("new"), true); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(kept); err != nil || !bytes.Equal(b, s.Data) {
		t.Fatal("the hard link's content is gone", err)
	}
}

func TestHostileFolder(t *testing.T) {
	tmp := t.TempDir()
	secret := filepath.Join(tmp, "secret")
	os.WriteFile(secret, []byte("not theirs"), 0o600)
	dir := filepath.Join(tmp, "tpm2")
	os.Mkdir(dir, 0o700)
	os.Symlink(secret, filepath.Join(dir, "tpm2-00.permall"))
	s, err := Look(dir)
	if err != nil || s.Exists() || len(s.Strange) != 1 {
		t.Fatalf("a link as state: %v %+v", err, s)
	}
	if err := Replace(dir, []byte("x"), true); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(secret); string(b) != "not theirs" {
		t.Fatal("a link was followed")
	}
	os.WriteFile(filepath.Join(dir, "tpm2-00.volatilestate"), nil, 0o600)
	os.WriteFile(filepath.Join(dir, "TMP2-00.permall"), nil, 0o600)
	if s, err := Look(dir); err != nil || len(s.Strange) != 1 || s.Strange[0] != "tpm2-00.volatilestate" {
		t.Fatalf("%v %v", err, s.Strange)
	}
	os.Remove(filepath.Join(dir, "tpm2-00.permall"))
	syscall.Mkfifo(filepath.Join(dir, "tpm2-00.permall"), 0o600)
	if _, err := Look(dir); err == nil || !strings.Contains(err.Error(), "regular") {
		t.Fatalf("a pipe as state: %v", err)
	}
	os.Remove(filepath.Join(dir, "tpm2-00.permall"))
	f, _ := os.Create(filepath.Join(dir, "tpm2-00.permall"))
	f.Truncate(1 << 40)
	f.Close()
	if _, err := Look(dir); err == nil {
		t.Fatal("a state file of a terabyte")
	}
	os.Rename(dir, dir+".real")
	os.Symlink(dir+".real", dir)
	if _, err := Look(dir); err == nil {
		t.Fatal("a link as folder")
	}
	if s, err := Look(filepath.Join(tmp, "none")); err != nil || s.Exists() {
		t.Fatal("no folder:", err)
	}
}

func TestWatchRealSwtpm(t *testing.T) {
	swtpm := testkit.Need(t, "swtpm")
	dir := manufacture(t)
	settled := make(chan string, 100)
	w, err := NewWatcher(func(d string) { settled <- d }, func() {})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Add(dir); err != nil {
		t.Fatal(err)
	}
	if used, err := InUse(dir); used || err != nil {
		t.Fatal("in use while nothing runs", err)
	}
	sock := filepath.Join(t.TempDir(), "s")
	c := exec.Command(swtpm, "socket", "--tpm2", "--server", "type=unixio,path="+sock, "--tpmstate", "dir="+dir, "--flags", "not-need-init,startup-clear")
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.WaitDelay = time.Second
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { c.Process.Kill(); c.Wait() }()
	select {
	case d := <-settled: // swtpm writes its state at start-up
		s, err := Settle(d)
		if err != nil || s.Kind != statefile.Plain {
			t.Fatal(err, s)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("no write seen")
	}
	if used, err := InUse(dir); !used || err != nil {
		t.Fatal("swtpm runs, but the folder is not in use", err)
	}
	if pid, err := Holder(dir); pid != c.Process.Pid || err != nil {
		t.Fatal("the folder is used by ", pid, err)
	}
	w.Remove(dir)
	if err := w.Close(); err != nil && !errors.Is(err, fs.ErrClosed) {
		t.Fatal(err)
	}
}

// A watcher that was closed has no say over another that got its descriptor's
// number.
func TestWatcherClosed(t *testing.T) {
	for range 20 {
		settled := make(chan string, 1)
		old, err := NewWatcher(func(string) {}, func() {})
		if err != nil {
			t.Fatal(err)
		}
		dir, other := filepath.Join(t.TempDir(), "tpm2"), filepath.Join(t.TempDir(), "tpm2")
		os.Mkdir(dir, 0o700)
		os.Mkdir(other, 0o700)
		if err := old.Add(other); err != nil {
			t.Fatal(err)
		}
		old.Close()
		w, err := NewWatcher(func(d string) { settled <- d }, func() {})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Add(dir); err != nil {
			t.Fatal(err)
		}
		old.Remove(other)
		if err := old.Add(other); err == nil {
			t.Error("a closed watcher watches")
		}
		tmp := filepath.Join(dir, "tmp")
		os.WriteFile(tmp, nil, 0o600)
		os.Rename(tmp, filepath.Join(dir, StateFile(dir)))
		select {
		case <-settled:
		case <-time.After(5 * time.Second):
			t.Fatal("a write was not seen")
		}
		w.Close()
	}
}

// What repair makes anew must let swtpm in, also under virt-trustd's umask.
func TestMake(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	root := t.TempDir()
	dir := filepath.Join(root, "uuid", "tpm2")
	if err := Make(dir, os.Getuid(), os.Getgid()); err != nil {
		t.Fatal(err)
	}
	for d, want := range map[string]os.FileMode{filepath.Dir(dir): 0o711, dir: 0o700} {
		if st, err := os.Lstat(d); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, want %o (%v)", d, st.Mode(), want, err)
		}
	}
	if err := Make(dir, os.Getuid(), os.Getgid()); err != nil {
		t.Error("a second time:", err)
	}
	if err := Make(filepath.Join(root, "not", "mounted", "tpm2"), 0, 0); !errors.Is(err, fs.ErrNotExist) {
		t.Error("it makes more than two folders:", err)
	}
}

// A killed writer must not leave a vTPM in the clear behind.
func TestDiscard(t *testing.T) {
	dir := t.TempDir()
	for _, n := range []string{"TMP2-00.permall", tempName, ".lock", "tpm2-00.permall"} {
		os.WriteFile(filepath.Join(dir, n), []byte("plain text"), 0o600)
	}
	f, err := os.Open(filepath.Join(dir, tempName))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	os.Symlink("/etc/passwd", filepath.Join(dir, "TMPlink"))
	s, err := Look(dir)
	if err != nil || len(s.Torn) != 3 || len(s.Strange) != 0 {
		t.Fatalf("%v: torn %q, strange %q", err, s.Torn, s.Strange)
	}
	if err := Discard(s); err != nil {
		t.Fatal(err)
	}
	if s, err = Look(dir); err != nil || len(s.Torn) != 0 || !s.Exists() {
		t.Fatal(err, s)
	}
	b := make([]byte, 10)
	if _, err := f.ReadAt(b, 0); err != nil || !bytes.Equal(b, make([]byte, 10)) {
		t.Errorf("its content is still there: %q, %v", b, err)
	}
}
