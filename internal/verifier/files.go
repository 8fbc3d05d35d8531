package verifier

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"virt-trust/internal/launcher/refvalues"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/verifier/ca"
)

// maxFile bounds each file that an admin puts there.
const maxFile = 1 << 20

func readFile(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxFile {
		return nil, fmt.Errorf("%s: no file of at most %d bytes", path, maxFile)
	}
	return os.ReadFile(path)
}

// manufacturers reads a folder of certificates, in PEM or DER. A folder that is
// not there is an empty one: every EK is for an operator to approve then.
func manufacturers(dir string) (*ca.Manufacturers, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the roots of TPM manufacturers: %w", err)
	}
	var certs []*x509.Certificate
	for _, e := range entries {
		if e.IsDir() || strings.HasPrefix(e.Name(), ".") || strings.HasPrefix(e.Name(), "README") {
			continue
		}
		b, err := readFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("the roots of TPM manufacturers: %w", err)
		}
		found, err := certificates(b)
		if err != nil {
			return nil, fmt.Errorf("the roots of TPM manufacturers: %s: %w", e.Name(), err)
		}
		certs = append(certs, found...)
	}
	return ca.NewManufacturers(certs)
}

func certificates(b []byte) ([]*x509.Certificate, error) {
	if c, err := x509.ParseCertificate(b); err == nil {
		return []*x509.Certificate{c}, nil
	}
	var all []*x509.Certificate
	for rest := b; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, errors.New("no certificate, in PEM or DER")
	}
	return all, nil
}

// manifestKeys reads the policy authority's keys; none where the file is not
// there.
func manifestKeys(path string) ([]any, error) {
	b, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the keys of manifests: %w", err)
	}
	keys, err := refvalues.ParseKeys(b)
	if err != nil {
		return nil, fmt.Errorf("the keys of manifests: %s: %w", path, err)
	}
	return keys, nil
}

// secret reads the OIDC client's secret; "" where none is configured.
func secret(o config.VerifierOIDC) (string, error) {
	if o.Issuer == "" || o.ClientSecretFile == "" {
		return "", nil
	}
	b, err := readFile(o.ClientSecretFile)
	if err != nil {
		return "", fmt.Errorf("the secret of the OIDC client: %w", err)
	}
	return strings.TrimRight(string(b), "\r\n"), nil
}
