// Package resultkeys keeps the keys that sign Attestation Results: a file of
// ECDSA P-256 keys in PEM, the newest first. The first signs; the others are
// published until what they signed has expired.
package resultkeys

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// kept is how many keys a file has at most: the one that signs, and the one
// before.
const (
	kept    = 2
	maxFile = 64 << 10
)

// Read reads a file, which has to be its owner's alone.
func Read(path string) ([]*ecdsa.PrivateKey, error) {
	fi, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, fmt.Errorf("the keys of results: %w; 'virt-trust-verifier init' makes them", err)
	case !fi.Mode().IsRegular() || fi.Size() > maxFile:
		return nil, fmt.Errorf("the keys of results: %s is no file of keys", path)
	case fi.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("the keys of results: %s is for others too: chmod 600", path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	keys, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("the keys of results: %s: %w", path, err)
	}
	return keys, nil
}

func parse(b []byte) (keys []*ecdsa.PrivateKey, err error) {
	for b = bytes.TrimSpace(b); len(b) > 0; b = bytes.TrimSpace(b) {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil || block.Type != "PRIVATE KEY" {
			return nil, errors.New("not a private key in PEM")
		}
		k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			return nil, err
		}
		private, ok := k.(*ecdsa.PrivateKey)
		if !ok || private.Curve != elliptic.P256() {
			return nil, errors.New("a key is not ECDSA P-256")
		}
		keys = append(keys, private)
	}
	if len(keys) == 0 {
		return nil, errors.New("there is no key in it")
	}
	return keys, nil
}

// Rotate makes a new key the first of the file, which is made if it is not there,
// and drops all but the one before. It is durable and replaces the file at once.
func Rotate(path string) error {
	old, err := Read(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	for i, k := range append([]*ecdsa.PrivateKey{key}, old...) {
		if i == kept {
			break
		}
		der, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			return err
		}
		if err := pem.Encode(&out, &pem.Block{Type: "PRIVATE KEY", Bytes: der}); err != nil {
			return err
		}
	}
	return replace(path, out.Bytes())
}

func replace(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".keys-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone by then, if all went well
	// Made by root for the Verifier's user: it stays whose it was.
	if _, err = f.Write(b); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
