package agent

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/vtpm/liststore"
)

// membership is what the agent keeps of its Verifier. Nothing in it is secret: the
// node is known by its TPM.
type membership struct {
	URL  string `json:"url"`
	CA   []byte `json:"ca"` // DER: the only CA whose word counts
	Node string `json:"node"`
	Name string `json:"name"`
	// Certificate is the node's newest, DER. A Verifier that was restored from an
	// older backup knows the node by it.
	Certificate []byte `json:"certificate,omitempty"`

	ca *x509.Certificate
}

const (
	stateFile = "membership.json"
	maxState  = 64 << 10
)

// load reads the membership in dir; nil where there is none.
func load(dir string) (*membership, error) {
	f, err := os.Open(filepath.Join(dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err != nil {
		return nil, err
	}
	return parseMembership(b)
}

func parseMembership(b []byte) (*membership, error) {
	if len(b) > maxState {
		return nil, fmt.Errorf("%s is longer than %d bytes", stateFile, maxState)
	}
	m := &membership{}
	if err := json.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("%s: %w", stateFile, err)
	}
	var err error
	if m.ca, err = x509.ParseCertificate(m.CA); err != nil {
		return nil, fmt.Errorf("%s: the CA's certificate: %w", stateFile, err)
	}
	if _, err := parseURL(m.URL); err != nil {
		return nil, fmt.Errorf("%s: %w", stateFile, err)
	}
	if !ca.ValidNode(m.Node) || !ca.ValidName(m.Name) {
		return nil, fmt.Errorf("%s: node %.40q with name %.40q", stateFile, m.Node, m.Name)
	}
	return m, nil
}

func (m *membership) save(dir string) error {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return liststore.WriteFile(filepath.Join(dir, stateFile), append(b, '\n'), 0o600)
}

func forget(dir string) error {
	if err := os.Remove(filepath.Join(dir, stateFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return liststore.SyncDir(dir)
}
