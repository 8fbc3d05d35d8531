package recovery

import (
	"archive/tar"
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

func sample() Backup {
	return Backup{
		UUID: "aaaaaaaa-0000-4000-8000-000000000001", Name: "vm", Time: time.Unix(1795516800, 0).UTC(), Baseline: "00ff",
		File: "tpm2-00.permall", State: bytes.Repeat([]byte("state"), 2000),
	}
}

func TestBackup(t *testing.T) {
	want := sample()
	archive, err := want.Archive()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseBackup(archive)
	want.Version = backupVersion
	if err != nil || !reflect.DeepEqual(*got, want) {
		t.Fatalf("%+v, %v", got, err)
	}
	large := sample()
	large.State = make([]byte, maxState)
	if archive, err := large.Archive(); err != nil || len(archive) > MaxBackup {
		t.Errorf("the largest has %d bytes, %v", len(archive), err)
	}
	large.State = make([]byte, maxState+1)
	if _, err := large.Archive(); err == nil {
		t.Error("too large")
	}
	k := newKey(t)
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sshPublic, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := Seal(archive, []string{k.Recipient().String(), string(ssh.MarshalAuthorizedKey(sshPublic))})
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(sealed, []byte("statestate")) {
		t.Fatal("in the clear")
	}
	shares, err := k.Split(3, 2)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{k.File("host", "now"), string(pem.EncodeToMemory(block)), strings.Join(shares[1:], "\n")} {
		if b, err := Unseal(bytes.NewReader(sealed), []byte(id)); err != nil || !bytes.Equal(b, archive) {
			t.Errorf("%v with %.20s", err, id)
		}
	}
	if _, err := Unseal(bytes.NewReader(sealed), []byte(newKey(t).Text())); err == nil || !strings.Contains(err.Error(), "other keys") {
		t.Error(err)
	}
	for _, to := range [][]string{nil, {"age1x"}, {"ssh-ed25519 x"}, {""}, make([]string, maxTo+1)} {
		if _, err := Seal(archive, to); err == nil {
			t.Errorf("sealed to %q", to)
		}
	}
}

func TestParseBackupRefuses(t *testing.T) {
	files := func(more ...string) []byte {
		var out bytes.Buffer
		w := tar.NewWriter(&out)
		for i := 0; i < len(more); i += 2 {
			w.WriteHeader(&tar.Header{Name: more[i], Size: int64(len(more[i+1]))})
			w.Write([]byte(more[i+1]))
		}
		w.Close()
		return out.Bytes()
	}
	const meta = `{"version":1,"uuid":"","name":"","time":"2026-11-24T00:00:00Z","running":false,"baseline":"","file":"tpm2-00.permall"}`
	for what, b := range map[string][]byte{
		"nothing": nil, "other file first": files("x", meta), "no state": files("backup.json", meta),
		"empty state":   files("backup.json", meta, "tpm2-00.permall", ""),
		"other state":   files("backup.json", meta, "tpm-00.permall", "x"),
		"too much":      files("backup.json", meta, "tpm2-00.permall", "x", "y", "z"),
		"a path":        files("backup.json", strings.Replace(meta, "tpm2-00.permall", "../x", 1), "../x", "x"),
		"unknown field": files("backup.json", strings.Replace(meta, "{", `{"a":1,`, 1), "tpm2-00.permall", "x"),
		"a new version": files("backup.json", strings.Replace(meta, ":1", ":2", 1), "tpm2-00.permall", "x"),
		"too large":     make([]byte, MaxBackup+1),
	} {
		if b, err := ParseBackup(b); err == nil {
			t.Errorf("%s: %+v", what, b)
		}
	}
	if _, err := ParseBackup(files("backup.json", meta, "tpm2-00.permall", "x")); err != nil {
		t.Error(err)
	}
}

func FuzzParseBackup(f *testing.F) {
	archive, err := sample().Archive()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(archive)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := ParseBackup(b)
		if (got == nil) == (err == nil) {
			t.Fatal(got, err)
		}
		if err == nil && (len(got.State) > maxState || strings.Contains(got.File, "/")) {
			t.Fatalf("%+v", got)
		}
	})
}
