// Package config reads virt-trustd.toml(5). It is strict: an unknown key, a
// wrong type or a value out of range is an error that names its line. Defaults
// are compiled in; a missing file is the defaults.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
)

// Path is where virt-trustd's configuration lies.
const Path = "/etc/virt-trust/virt-trustd.toml"

// Duration is a time.Duration spelt as in Go ("30s").
type Duration time.Duration

// UnmarshalText reads a duration.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return err
	}
	*d = Duration(v)
	return nil
}

// Config is virt-trustd.toml.
type Config struct {
	// Mode: "enforce" refuses, "audit" only logs what it would have refused.
	Mode     string   `toml:"mode"`
	TPM      TPM      `toml:"tpm"`
	Policy   Policy   `toml:"policy"`
	Rollback Rollback `toml:"rollback"`
	Swtpm    Swtpm    `toml:"swtpm"`
	Libvirt  Libvirt  `toml:"libvirt"`
	Grant    Grant    `toml:"grant"`
	QEMU     QEMU     `toml:"qemu"`
	Emulator Emulator `toml:"emulator"`
	Launcher Launcher `toml:"launcher"`

	Attestation Attestation `toml:"attestation"`
}

// TPM is the host's TPM.
type TPM struct {
	Device  string   `toml:"device"`  // a device node, or a unix socket of swtpm's data channel
	Bank    string   `toml:"bank"`    // PCR bank: sha256, sha384
	PCRs    []uint   `toml:"pcrs"`    // what keys and list are bound to
	Timeout Duration `toml:"timeout"` // for one request, waiting included
	// EventLog is where the firmware's event log lies, for predictions and
	// differences.
	EventLog string `toml:"event_log"`
}

// Policy is what the host asks of its VMs.
type Policy struct {
	RequireVTPM   bool   `toml:"require_vtpm"`   // refuse VMs that have no emulated TPM
	Adopt         bool   `toml:"adopt"`          // take existing plain vTPMs into the list at their next start
	CrashRecovery string `toml:"crash_recovery"` // authenticated, strict
	Restore       string `toml:"restore"`        // allow, refuse: saved images that are not of a VM's last stop
}

// Rollback is how an older vTPM list is told by a counter in the TPM.
type Rollback struct {
	Window  Duration `toml:"window"`   // from a commit to the counter's raise; 0: each commit waits for it
	PerYear int      `toml:"per_year"` // raises, at most: the TPM's memory wears
}

// Swtpm is how libvirt runs swtpm.
type Swtpm struct {
	User      string `toml:"user"`       // swtpm_user of qemu.conf
	StateRoot string `toml:"state_root"` // libvirt's folder of vTPM states
}

// Libvirt is how libvirt is reached for its events.
type Libvirt struct {
	Socket string `toml:"socket"` // "" tries virtqemud's, then libvirtd's
}

// Grant is the launch grant.
type Grant struct {
	Lifetime Duration `toml:"lifetime"` // from prepare to the last redemption
}

// QEMU is how libvirt runs QEMU.
type QEMU struct {
	User string `toml:"user"` // user of qemu.conf
}

// Emulator is virt-trust's own, which stands before QEMU.
type Emulator struct {
	Require bool `toml:"require"` // refuse VMs with a vTPM that name another
}

// Sources of Reference Values for launchers.
const (
	FirstUse = "trust-on-first-use"
	Package  = "package"
	Manifest = "manifest"
)

// Launcher is what may run VMs.
type Launcher struct {
	Policy       []string `toml:"policy"`        // who may approve besides the admin: FirstUse, Package, Manifest
	PCR          uint     `toml:"pcr"`           // of the host's TPM, for the launch log
	ManifestKeys string   `toml:"manifest_keys"` // public keys in PEM
	RequireLog   bool     `toml:"require_log"`   // refuse starts while the launch log does not replay
}

// Attestation is what the host tells a Verifier, and what can be proved about
// VMs.
type Attestation struct {
	PCRs           []uint `toml:"pcrs"`            // what is quoted, of the bank tpm.bank
	IMAList        string `toml:"ima_list"`        // the kernel's measurement list, binary
	EKCertificates bool   `toml:"ek_certificates"` // new vTPMs get theirs from the host's certifier
	VTPMAK         bool   `toml:"vtpm_ak"`         // new vTPMs get an AK for quotes
}

// Default gives the compiled-in configuration.
func Default() Config {
	return Config{
		Mode: "enforce",
		TPM: TPM{
			Device: "/dev/tpmrm0", Bank: "sha256", PCRs: []uint{0, 2, 4, 7, 9, 11, 12, 14}, Timeout: Duration(30 * time.Second),
			EventLog: "/sys/kernel/security/tpm0/binary_bios_measurements",
		},
		Policy:   Policy{Adopt: true, CrashRecovery: "authenticated", Restore: "allow"},
		Rollback: Rollback{Window: Duration(time.Second), PerYear: 20_000},
		Swtpm:    Swtpm{User: "tss", StateRoot: "/var/lib/libvirt/swtpm"},
		Grant:    Grant{Lifetime: Duration(time.Minute)},
		QEMU:     QEMU{User: "libvirt-qemu"},
		Launcher: Launcher{Policy: []string{FirstUse, Package}, PCR: 15, ManifestKeys: "/etc/virt-trust/manifest-keys.pem"},
		Attestation: Attestation{
			PCRs:           []uint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
			IMAList:        "/sys/kernel/security/ima/binary_runtime_measurements",
			EKCertificates: true,
		},
	}
}

// Load reads the file at path over the defaults.
func Load(path string) (Config, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Default(), nil
	}
	if err != nil {
		return Config{}, err
	}
	c, err := Parse(b)
	if err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// Parse reads a configuration over the defaults and checks it.
func Parse(b []byte) (Config, error) {
	c := Default()
	if err := strict(b, &c); err != nil {
		return Config{}, err
	}
	return c, c.check()
}

// strict reads TOML over what is in c, and takes no key that c does not know.
func strict(b []byte, c any) error {
	md, err := toml.Decode(string(b), c)
	if err != nil {
		var pe toml.ParseError
		if errors.As(err, &pe) {
			return fmt.Errorf("line %d: %s", pe.Position.Line, pe.Message)
		}
		return err
	}
	if u := md.Undecoded(); len(u) > 0 {
		return fmt.Errorf("line %d: unknown key %q", lineOf(string(b), u[0]), u[0].String())
	}
	return nil
}

// lineOf finds the line of a key that toml decoded to nothing.
func lineOf(text string, key toml.Key) int {
	last, section := key[len(key)-1], strings.Join(key[:len(key)-1], ".")
	at := ""
	for i, line := range strings.Split(text, "\n") {
		l := strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(l, "["); ok {
			at, _, _ = strings.Cut(strings.TrimPrefix(name, "["), "]") // also of an array of tables
			if at == key.String() {
				return i + 1
			}
			continue
		}
		name, _, ok := strings.Cut(l, "=")
		if ok && at == section && strings.Trim(strings.TrimSpace(name), `"'`) == last {
			return i + 1
		}
	}
	return 1
}

func (c Config) check() error {
	errs := []error{
		oneOf("mode", c.Mode, "enforce", "audit"),
		oneOf("tpm.bank", c.TPM.Bank, "sha256", "sha384"),
		oneOf("policy.crash_recovery", c.Policy.CrashRecovery, "authenticated", "strict"),
		oneOf("policy.restore", c.Policy.Restore, "allow", "refuse"),
		abs("launcher.manifest_keys", c.Launcher.ManifestKeys),
		abs("tpm.device", c.TPM.Device), abs("tpm.event_log", c.TPM.EventLog), abs("swtpm.state_root", c.Swtpm.StateRoot), abs("attestation.ima_list", c.Attestation.IMAList),
	}
	if c.Libvirt.Socket != "" {
		errs = append(errs, abs("libvirt.socket", c.Libvirt.Socket))
	}
	if c.Swtpm.User == "" {
		errs = append(errs, errors.New("swtpm.user: empty"))
	}
	if c.QEMU.User == "" {
		errs = append(errs, errors.New("qemu.user: empty"))
	}
	if len(c.TPM.PCRs) == 0 {
		errs = append(errs, errors.New("tpm.pcrs: empty: nothing would be bound to the host's state"))
	}
	seen := map[uint]bool{}
	for _, p := range c.TPM.PCRs {
		switch {
		case p > 23:
			errs = append(errs, fmt.Errorf("tpm.pcrs: there is no PCR %d", p))
		case p == 10 || p == 15:
			errs = append(errs, fmt.Errorf("tpm.pcrs: PCR %d changes while the host runs", p))
		case p == 16 || p == 23:
			errs = append(errs, fmt.Errorf("tpm.pcrs: PCR %d can be reset by anyone", p))
		case seen[p]:
			errs = append(errs, fmt.Errorf("tpm.pcrs: PCR %d is named twice", p))
		}
		seen[p] = true
	}
	if w := time.Duration(c.Rollback.Window); w < 0 || w > time.Hour {
		errs = append(errs, fmt.Errorf("rollback.window: %s is not between 0s and 1h", w))
	}
	if n := c.Rollback.PerYear; n < 1000 || n > 1_000_000 {
		errs = append(errs, fmt.Errorf("rollback.per_year: %d is not between 1000 and 1000000", n))
	}
	for _, p := range c.Launcher.Policy {
		errs = append(errs, oneOf("launcher.policy", p, FirstUse, Package, Manifest))
	}
	switch p := c.Launcher.PCR; {
	case p > 15:
		errs = append(errs, fmt.Errorf("launcher.pcr: PCR %d is none that lasts until the next boot", p))
	case p == 10:
		errs = append(errs, errors.New("launcher.pcr: PCR 10 is the kernel's own"))
	case seen[p]:
		errs = append(errs, fmt.Errorf("launcher.pcr: PCR %d is in tpm.pcrs, which VM starts must not change", p))
	}
	quoted := map[uint]bool{}
	for _, p := range c.Attestation.PCRs {
		switch {
		case p > 23:
			errs = append(errs, fmt.Errorf("attestation.pcrs: there is no PCR %d", p))
		case quoted[p]:
			errs = append(errs, fmt.Errorf("attestation.pcrs: PCR %d is named twice", p))
		}
		quoted[p] = true
	}
	if len(quoted) == 0 {
		errs = append(errs, errors.New("attestation.pcrs: empty: a quote over no PCR says nothing"))
	} else if !quoted[c.Launcher.PCR] {
		errs = append(errs, fmt.Errorf("attestation.pcrs: PCR %d is not among them, without which nobody believes the launch log", c.Launcher.PCR))
	}
	for key, d := range map[string]Duration{"tpm.timeout": c.TPM.Timeout, "grant.lifetime": c.Grant.Lifetime} {
		if d < Duration(time.Second) || d > Duration(10*time.Minute) {
			errs = append(errs, fmt.Errorf("%s: %s is not between 1s and 10m", key, time.Duration(d)))
		}
	}
	return errors.Join(errs...)
}

func oneOf(key, v string, of ...string) error {
	if !slices.Contains(of, v) {
		return fmt.Errorf("%s: %q is none of %s", key, v, strings.Join(of, ", "))
	}
	return nil
}

func abs(key, v string) error {
	if !filepath.IsAbs(v) || filepath.Clean(v) != v {
		return fmt.Errorf("%s: %q is not an absolute, clean path", key, v)
	}
	return nil
}

func between(key string, d Duration, low, high time.Duration) error {
	if v := time.Duration(d); v < low || v > high {
		return fmt.Errorf("%s: %s is not between %s and %s", key, v, low, high)
	}
	return nil
}
