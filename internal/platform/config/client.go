package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
)

// ClientPath is where virt-trust finds its Verifier, if the user has no file of
// his own, which is client.toml in the folder virt-trust of his configuration.
const ClientPath = "/etc/virt-trust/client.toml"

// Client is client.toml: how virt-trust reaches a Verifier.
type Client struct {
	Verifier  string `toml:"verifier"`   // https://HOST:PORT
	CA        string `toml:"ca"`         // file with certificates in PEM; "" for those of the system
	TokenFile string `toml:"token_file"` // file with the person's token
}

// LoadClient reads the first of the files that is there; without any, nothing is
// configured.
func LoadClient(paths ...string) (Client, error) {
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return Client{}, err
		}
		c, err := ParseClient(b)
		if err != nil {
			return Client{}, fmt.Errorf("%s: %w", path, err)
		}
		return c, nil
	}
	return Client{}, nil
}

// ParseClient reads a configuration and checks it.
func ParseClient(b []byte) (Client, error) {
	var c Client
	if err := strict(b, &c); err != nil {
		return Client{}, err
	}
	return c, c.Check()
}

// Check says what is wrong with it.
func (c Client) Check() error {
	var errs []error
	if c.Verifier != "" {
		if u, err := url.Parse(c.Verifier); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Path != "" && u.Path != "/" || u.RawQuery != "" {
			errs = append(errs, fmt.Errorf("verifier: %q is not of the form https://HOST:PORT", c.Verifier))
		}
	}
	for key, path := range map[string]string{"ca": c.CA, "token_file": c.TokenFile} {
		if path != "" && !filepath.IsAbs(path) {
			errs = append(errs, fmt.Errorf("%s: %q is not an absolute path", key, path))
		}
	}
	return errors.Join(errs...)
}
