package hosttpm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/hosttpm/policy"
	"virt-trust/internal/hosttpm/tss2"
)

const (
	keysDir     = "keys"     // the whole key set: it is there, complete, or not there
	stagingDir  = "keys.new" // a key set that is not complete
	policiesDir = "policies"
	policyExt   = ".json"

	maxFile     = 64 << 10
	maxPolicies = 1024 // dead ones that someone put back included
	setVersion  = 1
)

// store is the folder of the host's keys. A key set is written into a staging
// folder that is renamed when all of it is on the disk: whatever ends the
// process or the machine leaves either the whole set or none.
type store struct {
	dir  string
	done func(path string) error // tests: called after each step that changes the disk
}

// setJSON is the file that says what the TPM itself holds for the set.
type setJSON struct {
	Version    int    `json:"version"`
	SRKHandle  uint32 `json:"srk_handle"`
	EpochIndex uint32 `json:"epoch_index"`
	EpochName  string `json:"epoch_name"`
	Created    string `json:"created"`
}

// load reads the key set and the approved policies. Without a set it gives
// ErrNotProvisioned; anything else wrong is ErrFailed.
func (s store) load() (*keySet, error) {
	keys := filepath.Join(s.dir, keysDir)
	if _, err := os.Stat(keys); errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNotProvisioned
	}
	k, err := readSet(keys)
	if err == nil {
		err = k.complete()
	}
	if err == nil {
		k.policies, err = readPolicies(filepath.Join(s.dir, policiesDir), k)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: its key files in %s are damaged: %w", ErrFailed, s.dir, err)
	}
	return k, nil
}

func readSet(dir string) (*keySet, error) {
	var set setJSON
	b, err := readFile(dir, "set.json")
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&set); err != nil {
		return nil, fmt.Errorf("set.json: %w", err)
	}
	if set.Version != setVersion {
		return nil, fmt.Errorf("set.json: version %d, want %d", set.Version, setVersion)
	}
	k := &keySet{epochIndex: tpm2.TPMHandle(set.EpochIndex)}
	if k.epochName, err = hex.DecodeString(set.EpochName); err != nil {
		return nil, fmt.Errorf("set.json: %w", err)
	}
	if b, err = readFile(dir, "srk.pub"); err != nil {
		return nil, err
	}
	k.srk.handle = tpm2.TPMHandle(set.SRKHandle)
	if k.srk.public, err = tpm2.Unmarshal[tpm2.TPMTPublic](b); err != nil {
		return nil, fmt.Errorf("srk.pub: %w", err)
	}
	name, err := tpm2.ObjectName(k.srk.public)
	if err != nil {
		return nil, fmt.Errorf("srk.pub: %w", err)
	}
	k.srk.name = name.Buffer
	for _, f := range k.objects() {
		if *f.object, err = readObject(dir, f.name, f.kind); err != nil {
			return nil, err
		}
	}
	for _, f := range k.certifications() {
		if *f.bytes, err = readFile(dir, f.name); err != nil {
			return nil, err
		}
	}
	if b, err = readFile(dir, "policy-key.pub"); err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, errors.New("policy-key.pub: no PEM block")
	}
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("policy-key.pub: %w", err)
	}
	ec, ok := pub.(*ecdsa.PublicKey)
	if !ok {
		return nil, errors.New("policy-key.pub: not an elliptic curve key")
	}
	k.policyPublic = ec
	return k, nil
}

type objectFile struct {
	name   string
	kind   []int
	object **object
}

func (k *keySet) objects() []objectFile {
	return []objectFile{
		{"bind.pem", tss2.Loadable, &k.bind},
		{"ak.pem", tss2.Loadable, &k.ak},
		{"certifier.pem", tss2.Loadable, &k.certifier},
		{"policy-key.pem", tss2.Sealed, &k.policyKey},
		{"list-key.pem", tss2.Sealed, &k.listKey},
	}
}

type bytesFile struct {
	name  string
	bytes *[]byte
}

func (k *keySet) certifications() []bytesFile {
	return []bytesFile{
		{"bind.attest", &k.bindCertified.attest},
		{"bind.sig", &k.bindCertified.signature},
		{"certifier.attest", &k.certifierCertified.attest},
		{"certifier.sig", &k.certifierCertified.signature},
	}
}

func readObject(dir, name string, kind []int) (*object, error) {
	b, err := readFile(dir, name)
	if err != nil {
		return nil, err
	}
	f, err := tss2.Parse(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if !f.Type.Equal(kind) {
		return nil, fmt.Errorf("%s: holds type %v, want %v", name, f.Type, kind)
	}
	public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](f.Public)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](f.Private)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	o, err := newObject(*public, *private)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return o, nil
}

// readPolicies reads the approved policies, newest first. One that is damaged
// or that the policy key did not sign is an error: it would never work.
func readPolicies(dir string, k *keySet) ([]*policy.Approved, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var all []*policy.Approved
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), policyExt) {
			continue
		}
		if len(all) == maxPolicies {
			return nil, fmt.Errorf("more than %d approved policies", maxPolicies)
		}
		b, err := readFile(dir, e.Name())
		if err != nil {
			return nil, err
		}
		a, err := policy.ParseApproved(b)
		if err == nil {
			err = a.Verify(k.policyPublic)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e.Name(), err)
		}
		all = append(all, a)
	}
	slices.SortFunc(all, func(a, b *policy.Approved) int { return b.Time.Compare(a.Time) })
	return all, nil
}

func readFile(dir, name string) ([]byte, error) {
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%s: larger than %d bytes", name, maxFile)
	}
	return b, nil
}

// save writes a new key set with its first policy. There must be none yet.
func (s store) save(k *keySet, now time.Time) error {
	staging, policies := filepath.Join(s.dir, stagingDir), filepath.Join(s.dir, policiesDir)
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	if _, err := os.Lstat(filepath.Join(s.dir, keysDir)); !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fmt.Errorf("%s is there already", filepath.Join(s.dir, keysDir)), err)
	}
	// Left by an attempt that did not end: nothing was ever bound to it.
	for _, dir := range []string{staging, policies} {
		if err := s.step(dir, os.RemoveAll(dir)); err != nil {
			return err
		}
		if err := s.step(dir, os.Mkdir(dir, 0o700)); err != nil {
			return err
		}
	}
	for _, a := range k.policies {
		if err := s.addPolicy(a); err != nil {
			return err
		}
	}
	files := map[string][]byte{"srk.pub": tpm2.Marshal(*k.srk.public)}
	for _, f := range k.objects() {
		b, err := (*f.object).file(f.kind, k.srk.handle)
		if err != nil {
			return err
		}
		files[f.name] = b
	}
	for _, f := range k.certifications() {
		files[f.name] = *f.bytes
	}
	der, err := x509.MarshalPKIXPublicKey(k.policyPublic)
	if err != nil {
		return err
	}
	files["policy-key.pub"] = pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	set, err := json.MarshalIndent(setJSON{
		Version: setVersion, SRKHandle: uint32(k.srk.handle), EpochIndex: uint32(k.epochIndex),
		EpochName: hex.EncodeToString(k.epochName), Created: now.UTC().Format(time.RFC3339),
	}, "", "  ")
	if err != nil {
		return err
	}
	files["set.json"] = append(set, '\n')
	for name, b := range files {
		if err := s.write(filepath.Join(staging, name), b); err != nil {
			return err
		}
	}
	if err := syncDir(staging); err != nil {
		return err
	}
	if err := syncDir(s.dir); err != nil {
		return err
	}
	if err := s.step(staging, os.Rename(staging, filepath.Join(s.dir, keysDir))); err != nil {
		return err
	}
	return syncDir(s.dir)
}

// addPolicy writes an approved policy, durably, whole or not at all.
func (s store) addPolicy(a *policy.Approved) error {
	b, err := a.Marshal()
	if err != nil {
		return err
	}
	return s.replace(s.policyPath(a), b)
}

func (s store) policyPath(a *policy.Approved) string {
	return filepath.Join(s.dir, policiesDir, hex.EncodeToString(a.Policy)+policyExt)
}

// replace writes a file durably, whole or not at all.
func (s store) replace(path string, b []byte) error {
	if err := s.write(path+".new", b); err != nil {
		return err
	}
	if err := s.step(path, os.Rename(path+".new", path)); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// remove removes a file durably; one that is not there is no error.
func (s store) remove(path string) error {
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := s.step(path, err); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// write makes a file and brings it to the disk.
func (s store) write(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return s.step(path, errors.Join(err, f.Sync(), f.Close()))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (s store) step(path string, err error) error {
	if err == nil && s.done != nil {
		err = s.done(path)
	}
	return err
}
