// Package cakey keeps the CA's key: in a file, or with virt-trust-signer, which
// has it in a TPM.
package cakey

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"virt-trust/internal/verifier/ca"
)

const maxFile = 64 << 10

// Init makes a CA: a new key in keyFile, PKCS #8 in PEM for its owner alone, and
// its certificate in certFile. Neither may be there: a CA that is overwritten
// strands its nodes.
func Init(certFile, keyFile, name string, now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("making the CA's key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("making the CA's key: %w", err)
	}
	cert, err := ca.Root(key, rand.Reader, name, now)
	if err != nil {
		return fmt.Errorf("making the CA's certificate: %w", err)
	}
	if err := WriteNew(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		return err
	}
	return WriteNew(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o644)
}

// WriteNew writes a file that must not be there yet, and makes it durable.
func WriteNew(name string, b []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	if _, err = f.Write(b); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(name)
	}
	return err
}

// Renew makes the CA's certificate anew in its file: see ca.Renew.
func Renew(certFile string, a *ca.Authority, now time.Time) error {
	der, err := ca.Renew(a, now)
	if err != nil {
		return fmt.Errorf("making the CA's certificate anew: %w", err)
	}
	fresh := certFile + ".new"
	if err := errors.Join(os.RemoveAll(fresh), WriteNew(fresh, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)); err != nil {
		return err
	}
	return os.Rename(fresh, certFile)
}

// Open reads the CA's certificate and finds its key at keyPath: in a file that is
// its owner's alone, or behind the socket of virt-trust-signer.
func Open(certFile, keyPath string) (*ca.Authority, error) {
	cert, err := ReadCertificate(certFile)
	if err != nil {
		return nil, fmt.Errorf("the CA's certificate: %w; 'virt-trust-verifier init' makes a CA", err)
	}
	key, err := openKey(cert, keyPath)
	if err != nil {
		return nil, fmt.Errorf("the CA's key: %w", err)
	}
	return ca.New(cert, key, rand.Reader)
}

func openKey(cert *x509.Certificate, path string) (crypto.Signer, error) {
	fi, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, err
	case fi.Mode()&fs.ModeSocket != 0:
		return &Signer{Socket: path, public: cert.PublicKey}, nil
	case !fi.Mode().IsRegular():
		return nil, fmt.Errorf("%s is neither a file nor a socket", path)
	case fi.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("%s is for others too: chmod 600", path)
	}
	block, err := readPEM(path, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	k, err := x509.ParsePKCS8PrivateKey(block)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s: a %T signs nothing", path, k)
	}
	return s, nil
}

// ReadCertificate reads a file with one certificate in PEM.
func ReadCertificate(path string) (*x509.Certificate, error) {
	der, err := readPEM(path, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

func readPEM(path, kind string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err == nil && fi.Size() > maxFile {
		err = fmt.Errorf("%s: %d bytes, at most %d", path, fi.Size(), maxFile)
	}
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != kind {
		return nil, fmt.Errorf("%s: no PEM block %q", path, kind)
	}
	return block.Bytes, nil
}
