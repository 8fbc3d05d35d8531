package admin

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"virt-trust/internal/bus"
	"virt-trust/internal/recovery"
)

// talker is the other end of conversations: it says its lines, and keeps what
// it was told.
type talker struct {
	lines []bus.Line // then done
	key   recovery.Recipient

	mu    sync.Mutex
	heard []byte
	args  string
	said  sync.WaitGroup
}

func (k *talker) answer(args ...any) (dbus.UnixFD, *dbus.Error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, dbus.MakeFailedError(err)
	}
	k.mu.Lock()
	k.args = fmt.Sprint(args...)
	k.mu.Unlock()
	time.AfterFunc(time.Second/2, func() { unix.Close(fds[1]) }) // it has been sent by then
	ours := os.NewFile(uintptr(fds[0]), "ours")
	k.said.Go(func() {
		defer ours.Close()
		var lines []byte
		for _, l := range k.lines {
			b, _ := json.Marshal(l)
			lines = append(append(lines, b...), '\n')
		}
		ours.Write(lines)
		heard, _ := io.ReadAll(io.LimitReader(ours, 1<<20))
		k.mu.Lock()
		k.heard = heard
		k.mu.Unlock()
	})
	return dbus.UnixFD(fds[1]), nil
}

func (k *talker) serve(t *testing.T) *fake {
	return serve(t, func(f *fake) {
		f.methods = map[string]any{
			"SetRecovery": func(recipient string, options map[string]dbus.Variant) (dbus.UnixFD, *dbus.Error) {
				k.key, _ = recovery.ParseRecipient(recipient)
				return k.answer(recipient, options)
			},
			"Recover": func(vm string, options map[string]dbus.Variant) (dbus.UnixFD, *dbus.Error) {
				return k.answer(vm, options)
			},
			"Backup": func(vm string, options map[string]dbus.Variant) (dbus.UnixFD, *dbus.Error) {
				return k.answer(vm, options)
			},
			"Restore": func(options map[string]dbus.Variant) (dbus.UnixFD, *dbus.Error) { return k.answer(options) },
			"GetRecovery": func(map[string]dbus.Variant) (map[string]dbus.Variant, *dbus.Error) {
				test, err := k.key.Wrap([]byte("answer"))
				if err != nil {
					return nil, dbus.MakeFailedError(err)
				}
				return variants(map[string]any{"state": "unconfirmed", "recipient": k.key.String(), "made": uint64(1), "unwrapped": []string{"a\x1b"}, "test": test}), nil
			},
			"ConfirmRecovery": func(answer []byte, _ map[string]dbus.Variant) (map[string]dbus.Variant, *dbus.Error) {
				return variants(map[string]any{"what": fmt.Sprintf("%x", sha256.Sum256(answer))}), nil
			},
		}
	})
}

func done(what string) bus.Line {
	return bus.Line{Done: map[string]string{"uuid": web, "name": "web", "what": what}}
}

func TestRecoveryKey(t *testing.T) {
	k := &talker{lines: []bus.Line{{Say: "web: wrapped\x1b"}, done("wrapped")}}
	k.serve(t)
	dir := t.TempDir()
	key := filepath.Join(dir, "key")

	out, progress, code := run(t, "recovery", "new")
	if code != 0 || progress != "web: wrapped \n" {
		t.Fatalf("exit %d, %q", code, progress)
	}
	_, shown, _ := strings.Cut(out, "    AGE-")
	if got, err := recovery.Parse([]byte("AGE-" + shown)); err != nil || got.Recipient().String() != k.key.String() {
		t.Errorf("what was shown is not what was set: %v", err)
	}
	if out, _, code := run(t, "recovery", "new", "--output", key, "--replace"); code != 0 || strings.Contains(out, "AGE-SECRET") || !strings.Contains(k.args, "true") {
		t.Errorf("exit %d, %s, %s", code, out, k.args)
	}
	if st, err := os.Stat(key); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	if _, errs, code := run(t, "recovery", "new", "-o", key); code != 1 {
		t.Errorf("a file is written over: %s", errs)
	}
	want := fmt.Sprintf("%x\n", sha256.Sum256([]byte("answer")))
	if out, errs, code := run(t, "recovery", "confirm", "-i", key); code != 0 || out != want {
		t.Errorf("exit %d, %s%s", code, out, errs)
	}
	if out, _, _ := run(t, "recovery", "show"); !strings.Contains(out, "not confirmed") || !strings.Contains(out, k.key.String()) || strings.Contains(out, "\x1b") {
		t.Error(out)
	}

	if _, _, code := run(t, "recovery", "new", "--shares", "3", "--threshold", "2", "--output-dir", dir); code != 0 {
		t.Error(code)
	}
	share := func(i int) string { return filepath.Join(dir, fmt.Sprintf("share-%d.txt", i)) }
	if out, errs, code := run(t, "recovery", "confirm", "--share", share(3), "--share", share(1)); code != 0 || out != want {
		t.Errorf("exit %d, %s%s", code, out, errs)
	}
	if _, errs, code := run(t, "recovery", "confirm", "--share", share(3)); code != 1 || !strings.Contains(errs, "2 shares of set") {
		t.Errorf("exit %d, %s", code, errs)
	}
	if _, errs, code := run(t, "recovery", "confirm", "-i", key); code != 3 || !strings.Contains(errs, "this is the key of") {
		t.Errorf("the key before: exit %d, %s", code, errs)
	}

	// Where the key does not come to be used, nothing lies about.
	k.lines = []bus.Line{{Refused: "host-not-approved: no"}}
	if _, _, code := run(t, "recovery", "new", "--output", key+"2"); code != 3 {
		t.Error(code)
	}
	if _, err := os.Stat(key + "2"); err == nil {
		t.Error("a file with a key that opens nothing")
	}
	for _, args := range [][]string{
		{"recovery"}, {"recovery", "new", "--shares", "3"}, {"recovery", "new", "--shares", "3", "--threshold", "1"}, {"recovery", "new", "--output-dir", dir},
		{"recovery", "new", "--recipient", "age1x"}, {"recovery", "new", "--recipient", k.key.String(), "-o", key}, {"recover", "a", "b"},
		{"recovery", "confirm", "-i", key, "--share", key}, {"backup", "web"}, {"restore", key}, {"restore", "-", "-i", "-"},
	} {
		if _, _, code := run(t, args...); code != ExitUsage {
			t.Errorf("%q: exit %d", args, code)
		}
	}
}

func TestRecover(t *testing.T) {
	k := &talker{lines: []bus.Line{{Say: "a step"}, done("all is well")}}
	k.serve(t)
	secret, err := recovery.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(t.TempDir(), "key")
	write(t, key, secret.Text())
	out, progress, code := run(t, "recover", "-i", key)
	k.said.Wait()
	if code != 0 || out != "all is well\n" || progress != "a step\n" || string(k.heard) != secret.Text() {
		t.Errorf("exit %d, %q, %q, heard %d bytes", code, out, progress, len(k.heard))
	}
	for _, l := range []struct {
		line bus.Line
		code int
	}{{bus.Line{Refused: "key-not-released: it is another"}, 3}, {bus.Line{Failed: "no\x1bt"}, 1}, {bus.Line{Say: "the end is missing"}, 1}} {
		k.lines = []bus.Line{l.line}
		if out, errs, code := run(t, "recover", "web", "-i", key); code != l.code || out != "" || strings.Contains(errs, "\x1b") {
			t.Errorf("%+v: exit %d, %q, %q", l, code, out, errs)
		}
	}
	if _, errs, code := run(t, "recover"); code != 1 || !strings.Contains(errs, "AGE-SECRET-KEY-1") {
		t.Errorf("no key: exit %d, %q", code, errs)
	}
}

func TestBackupAndRestore(t *testing.T) {
	id, err := recovery.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	archive, err := recovery.Backup{UUID: web, Name: "web", File: "tpm2-00.permall", State: []byte("state")}.Archive()
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := recovery.Seal(archive, []string{id.Recipient().String()})
	if err != nil {
		t.Fatal(err)
	}
	k := &talker{lines: []bus.Line{{Data: sealed[:100]}, {Data: sealed[100:]}, {Hold: true}, done("given out")}}
	k.serve(t)
	dir := t.TempDir()
	file, key, list := filepath.Join(dir, "b.age"), filepath.Join(dir, "key"), filepath.Join(dir, "to")
	write(t, key, id.Text())
	write(t, list, "# mine\n"+id.Recipient().String()+"\n\n")
	out, errs, code := run(t, "backup", "web", "-R", list, "-r", "age1other", "-o", file, "--pause-for", "echo now >"+dir+"/then")
	if b, err := os.ReadFile(file); code != 0 || err != nil || !bytes.Equal(b, sealed) {
		t.Fatalf("exit %d, %s%s, %v", code, out, errs, err)
	}
	if b, _ := os.ReadFile(dir + "/then"); string(b) != "now\n" {
		t.Errorf("the command: %q", b)
	}
	if !strings.Contains(k.args, id.Recipient().String()) || !strings.Contains(k.args, "age1other") || !strings.Contains(k.args, "true") {
		t.Error(k.args)
	}
	if _, _, code := run(t, "backup", "web", "-R", list, "-o", file+"2", "--pause-for", "false"); code != 1 {
		t.Errorf("a command that fails: exit %d", code)
	}
	if _, err := os.Stat(file + "2"); err == nil {
		t.Error("a backup without its disk")
	}
	k.lines = []bus.Line{done("restored")}
	k.said.Wait()
	if out, errs, code := run(t, "restore", file, "-i", key, "--replace"); code != 0 || !strings.Contains(out, "restored") || !strings.Contains(k.args, "true") {
		t.Errorf("exit %d, %s%s, %s", code, out, errs, k.args)
	}
	k.said.Wait()
	if !bytes.Equal(k.heard, archive) {
		t.Error("what virt-trustd got is not what was saved")
	}
	write(t, key, strings.Replace(id.Text(), "AGE", "EGA", 1))
	if _, errs, code := run(t, "restore", file, "-i", key); code != 1 || strings.Contains(errs, id.Text()[20:40]) {
		t.Errorf("exit %d, %s", code, errs)
	}
}
