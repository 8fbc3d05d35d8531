package config

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
)

// AgentPath is where virt-trust-agent's configuration lies.
const AgentPath = "/etc/virt-trust/agent.toml"

// Agent is agent.toml. The Verifier is not in it: 'virt-trust enroll' says.
type Agent struct {
	Pull AgentPull `toml:"pull"`
}

// AgentPull is the API that gives Evidence to third parties.
type AgentPull struct {
	Listen      string   `toml:"listen"`      // HOST:PORT; "" for none: nothing listens
	Certificate string   `toml:"certificate"` // PEM; "" for the node's own
	Key         string   `toml:"key"`         // PEM, of certificate
	ClientCA    string   `toml:"client_ca"`   // PEM: whose clients may ask, with their certificates
	Tokens      []string `toml:"tokens"`      // SHA-256 of bearer tokens, hexadecimal: who has one may ask
	PerMinute   int      `toml:"per_minute"`  // of all together
}

// MaxPerMinute bounds AgentPull.PerMinute.
const MaxPerMinute = 60

// DefaultAgent gives the compiled-in configuration.
func DefaultAgent() Agent { return Agent{Pull: AgentPull{Tokens: []string{}, PerMinute: 12}} }

// LoadAgent reads the file at path over the defaults.
func LoadAgent(path string) (Agent, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return DefaultAgent(), nil
	}
	if err != nil {
		return Agent{}, err
	}
	c, err := ParseAgent(b)
	if err != nil {
		return Agent{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// ParseAgent reads a configuration over the defaults and checks it.
func ParseAgent(b []byte) (Agent, error) {
	c := DefaultAgent()
	if err := strict(b, &c); err != nil {
		return Agent{}, err
	}
	return c, c.Pull.check()
}

func (p AgentPull) check() error {
	errs := []error{inRange("pull.per_minute", p.PerMinute, 1, MaxPerMinute)}
	for key, v := range map[string]string{"pull.certificate": p.Certificate, "pull.key": p.Key, "pull.client_ca": p.ClientCA} {
		if v != "" {
			errs = append(errs, abs(key, v))
		}
	}
	if (p.Certificate == "") != (p.Key == "") {
		errs = append(errs, errors.New("pull.certificate and pull.key: one without the other"))
	}
	for _, t := range p.Tokens {
		if b, err := hex.DecodeString(t); err != nil || len(b) != 32 {
			errs = append(errs, errors.New("pull.tokens: one is no SHA-256 digest"))
		}
	}
	if p.Listen != "" {
		if _, port, err := net.SplitHostPort(p.Listen); err != nil || port == "" {
			errs = append(errs, fmt.Errorf("pull.listen: %q is not HOST:PORT", p.Listen))
		}
		if p.ClientCA == "" && len(p.Tokens) == 0 {
			errs = append(errs, errors.New("pull.listen: with neither pull.client_ca nor pull.tokens nobody may ask"))
		}
	}
	return errors.Join(errs...)
}
