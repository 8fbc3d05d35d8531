package recovery

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"filippo.io/age"
	"filippo.io/age/agessh"
)

// Backup is one VM's vTPM. It is a tar archive of two files, backup.json and
// the state, which swtpm loads as it is where the key was virt-trust's; and it
// never lies anywhere but inside an age file.
type Backup struct {
	Version int       `json:"version"`
	UUID    string    `json:"uuid"`
	Name    string    `json:"name"`
	Time    time.Time `json:"time"`
	Running bool      `json:"running"` // taken while the VM was paused
	// Encrypted: the state is encrypted with libvirt's secret for this VM.
	Encrypted bool `json:"encrypted_by_libvirt,omitempty"`
	// Baseline is the digest of the state as it lay on its host.
	Baseline string `json:"baseline"`
	// File is the state's file name, tpm2-00.permall or tpm-00.permall.
	File string `json:"file"`

	State []byte `json:"-"`
}

const (
	backupVersion = 1
	backupName    = "backup.json"
	maxTo         = 32

	// MaxBackup bounds a backup in the clear. libtpms' largest state has 146 KB.
	MaxBackup = 1 << 20
	maxMeta   = 16 << 10
	maxState  = MaxBackup - maxMeta - 16<<10
)

// Archive gives the tar archive.
func (b Backup) Archive() ([]byte, error) {
	if len(b.State) > maxState {
		return nil, fmt.Errorf("a vTPM's state of %d bytes, at most %d", len(b.State), maxState)
	}
	b.Version = backupVersion
	meta, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range []struct {
		name string
		data []byte
	}{{backupName, append(meta, '\n')}, {b.File, b.State}} {
		h := &tar.Header{Name: f.name, Mode: 0o600, Size: int64(len(f.data)), ModTime: b.Time, Format: tar.FormatUSTAR}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.data); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), w.Close()
}

// ParseBackup reads what Archive made. The result is unchecked but for its
// shape: whoever had it in hands may have changed it.
func ParseBackup(archive []byte) (*Backup, error) {
	if len(archive) > MaxBackup {
		return nil, fmt.Errorf("a backup of %d bytes, at most %d", len(archive), MaxBackup)
	}
	r := tar.NewReader(bytes.NewReader(archive))
	next := func(name string, max int64) ([]byte, error) {
		h, err := r.Next()
		if err != nil {
			return nil, fmt.Errorf("not a backup: %w", err)
		}
		if name != "" && h.Name != name || h.Typeflag != tar.TypeReg || h.Size > max {
			return nil, fmt.Errorf("not a backup: it holds %.100q", h.Name)
		}
		return io.ReadAll(io.LimitReader(r, max+1))
	}
	meta, err := next(backupName, maxMeta)
	if err != nil {
		return nil, err
	}
	b := &Backup{}
	d := json.NewDecoder(bytes.NewReader(meta))
	d.DisallowUnknownFields()
	if err := d.Decode(b); err != nil {
		return nil, fmt.Errorf("not a backup: %s: %w", backupName, err)
	}
	if b.Version != backupVersion {
		return nil, fmt.Errorf("a backup of version %d, which this version of virt-trust does not know", b.Version)
	}
	if b.File != "tpm2-00.permall" && b.File != "tpm-00.permall" {
		return nil, fmt.Errorf("not a backup: a vTPM's state is not called %.100q", b.File)
	}
	if b.State, err = next(b.File, maxState); err != nil {
		return nil, err
	}
	if _, err := r.Next(); err != io.EOF {
		return nil, errors.New("not a backup: it goes on after its end")
	}
	if len(b.State) == 0 {
		return nil, errors.New("not a backup: its state is empty")
	}
	return b, nil
}

// Seal encrypts a backup to an admin's public keys: age recipients (age1…) or
// SSH keys (ssh-ed25519, ssh-rsa).
func Seal(archive []byte, to []string) ([]byte, error) {
	if len(to) == 0 || len(to) > maxTo {
		return nil, fmt.Errorf("%d recipients, 1 to %d are possible", len(to), maxTo)
	}
	var recipients []age.Recipient
	for _, s := range to {
		r, err := parseAny(strings.TrimSpace(s))
		if err != nil {
			return nil, fmt.Errorf("recipient %.100q: %w", s, err)
		}
		recipients = append(recipients, r...)
	}
	var out bytes.Buffer
	w, err := age.Encrypt(&out, recipients...)
	if err == nil {
		_, err = w.Write(archive)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("encrypting the backup: %w", err)
	}
	return out.Bytes(), nil
}

func parseAny(s string) ([]age.Recipient, error) {
	if strings.HasPrefix(s, "ssh-") {
		r, err := agessh.ParseRecipient(s)
		return []age.Recipient{r}, err
	}
	return age.ParseRecipients(strings.NewReader(s))
}

// Unseal opens a backup with an age identity file, or with an SSH private key
// that has no passphrase.
func Unseal(file io.Reader, identity []byte) ([]byte, error) {
	identities, err := parseIdentities(identity)
	if err != nil {
		return nil, err
	}
	r, err := age.Decrypt(file, identities...)
	var other *age.NoIdentityMatchError
	if errors.As(err, &other) {
		return nil, errors.New("the backup is encrypted to other keys")
	}
	if err != nil {
		return nil, fmt.Errorf("opening the backup: %w", err)
	}
	b, err := io.ReadAll(io.LimitReader(r, MaxBackup+1))
	if err == nil && len(b) > MaxBackup {
		err = fmt.Errorf("it is larger than %d bytes", MaxBackup)
	}
	if err != nil {
		clear(b)
		return nil, fmt.Errorf("opening the backup: %w", err)
	}
	return b, nil
}

func parseIdentities(text []byte) ([]age.Identity, error) {
	if bytes.HasPrefix(bytes.TrimSpace(text), []byte("-----BEGIN")) {
		id, err := agessh.ParseIdentity(text)
		if err != nil {
			return nil, fmt.Errorf("SSH key: %w", err)
		}
		return []age.Identity{id}, nil
	}
	if k, err := Parse(text); err == nil { // shares of a key too
		return []age.Identity{k.id}, nil
	}
	ids, err := age.ParseIdentities(bytes.NewReader(text))
	if err != nil { // whose text may quote the key
		return nil, errors.New("neither an age identity nor an SSH private key")
	}
	return ids, nil
}
