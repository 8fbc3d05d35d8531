package verifier

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"virt-trust/internal/platform/config"
	"virt-trust/internal/verifier/cakey"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/resultkeys"
)

// Init makes what a Verifier needs and does not have yet: the CA, and the keys of
// results. What is there stays as it is, so that it can be run again at any time.
// It says on w what it did, and what is to be done next.
func Init(cfg config.Verifier, w io.Writer) error {
	if err := becomeOwner(filepath.Dir(cfg.Results.Keys)); err != nil {
		return err
	}
	switch cert, key := missing(cfg.CA.Certificate), missing(cfg.CA.Key); {
	case cert && key:
		if err := cakey.Init(cfg.CA.Certificate, cfg.CA.Key, "virt-trust CA", time.Now()); err != nil {
			return err
		}
		fmt.Fprintf(w, "made a CA: %s, and its key %s\n", cfg.CA.Certificate, cfg.CA.Key)
	case cert:
		return fmt.Errorf("there is a CA key %s and no certificate %s: bring the certificate back from a backup", cfg.CA.Key, cfg.CA.Certificate)
	case key:
		return fmt.Errorf("there is a CA certificate %s and no key %s: bring the key back from a backup, or start virt-trust-signer", cfg.CA.Certificate, cfg.CA.Key)
	}
	authority, err := cakey.Open(cfg.CA.Certificate, cfg.CA.Key)
	if err != nil {
		return err
	}
	if !authority.Lists() {
		if err := cakey.Renew(cfg.CA.Certificate, authority, time.Now()); err != nil {
			return fmt.Errorf("%w (of one whose key is in a TPM, 'virt-trust-signer init NAME' does so)", err)
		}
		fmt.Fprintf(w, "made the certificate of the CA anew, so that it signs revocation lists: %s\n", cfg.CA.Certificate)
	}
	if missing(cfg.Results.Keys) {
		if err := resultkeys.Rotate(cfg.Results.Keys); err != nil {
			return fmt.Errorf("making the keys of results: %w", err)
		}
		fmt.Fprintf(w, "made a key for results: %s\n", cfg.Results.Keys)
	}
	if err := Check(cfg); err != nil {
		return err
	}
	fmt.Fprintf(w, "the CA's pin is %s\n", authority.Pin())
	if len(cfg.Tokens) == 0 && cfg.OIDC.Issuer == "" {
		fmt.Fprintln(w, "\nNobody can log in yet. 'virt-trust-verifier person NAME policy' makes a token, and says\nwhat to add to verifier.toml.")
	}
	fmt.Fprintf(w, "\nNext: systemctl enable --now virt-trust-verifier, keep a backup of\n%s and %s, and let nodes in:\n'virt-trust fleet token create', then 'virt-trust enroll' on each.\n", cfg.CA.Key, cfg.CA.Certificate)
	return nil
}

func missing(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}

// becomeOwner lets root go on as who owns dir, so that what is made there is his.
func becomeOwner(dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || st.Uid == 0 {
		return nil
	}
	return errors.Join(syscall.Setgroups(nil), syscall.Setgid(int(st.Gid)), syscall.Setuid(int(st.Uid)))
}

// Check says whether a Verifier could run with this configuration: whether the
// files that it names are there and right. It asks neither the database nor the
// network.
func Check(cfg config.Verifier) error {
	authority, err := cakey.Open(cfg.CA.Certificate, cfg.CA.Key)
	var errs []error
	if err != nil {
		errs = append(errs, err)
	} else if left := time.Until(authority.Certificate().NotAfter); left <= 0 {
		errs = append(errs, errors.New("the CA's certificate has expired"))
	}
	_, err = resultkeys.Read(cfg.Results.Keys)
	errs = append(errs, err)
	_, err = manufacturers(cfg.Enrolment.ManufacturerRoots)
	errs = append(errs, err)
	_, err = manifestKeys(cfg.Policy.ManifestKeys)
	errs = append(errs, err)
	_, err = names(cfg)
	errs = append(errs, err)
	if cfg.Browsers.Certificate != "" {
		_, err = readPair(cfg.Browsers.Certificate, cfg.Browsers.Key)
		errs = append(errs, err)
	}
	if _, err := secret(cfg.OIDC); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// cautions are what a configuration that is right leads to, and who wrote it may not
// think of.
func cautions(cfg config.Verifier) (all []string) {
	if cfg.Policy.FourEyes && cfg.Policy.ReferenceValues == "learn" {
		all = append(all, `with policy.four_eyes nothing is learned, whatever policy.reference_values says: two people approve what first rounds show, or import it`)
	}
	if cfg.Policy.FourEyes && cfg.Enrolment.Approval == "manufacturer" {
		all = append(all, `with policy.four_eyes each node waits for an operator who did not give out its join token, whatever enrolment.approval says`)
	}
	return all
}

// names are the Verifier's own.
func names(cfg config.Verifier) ([]string, error) {
	if len(cfg.Names) > 0 {
		return cfg.Names, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	return []string{name}, nil
}

// NewPerson makes a static token and says on w what has to be done with it.
func NewPerson(name, role string, w io.Writer) error {
	var r operate.Role
	if err := r.UnmarshalText([]byte(role)); err != nil {
		return err
	}
	if !operate.ValidName(name) {
		return fmt.Errorf("%.80q is no name", name)
	}
	var b [24]byte
	rand.Read(b[:]) // never fails
	token := "vta1." + base64.RawURLEncoding.EncodeToString(b[:])
	d := sha256.Sum256([]byte(token))
	fmt.Fprintf(w, `The token of %[1]s, which is shown this once:

%[2]s

Add to %[3]s, and restart or reload virt-trust-verifier:

[[token]]
name = %[1]q
role = %[4]q
sha256 = %[5]q
`, name, token, config.VerifierPath, r, hex.EncodeToString(d[:]))
	return nil
}

// Rotate makes a new key for results; the one before is published on.
func Rotate(cfg config.Verifier, w io.Writer) error {
	if err := becomeOwner(filepath.Dir(cfg.Results.Keys)); err != nil {
		return err
	}
	if err := resultkeys.Rotate(cfg.Results.Keys); err != nil {
		return err
	}
	fmt.Fprintln(w, "a new key signs results once virt-trust-verifier was reloaded (systemctl reload virt-trust-verifier); copy the file to all replicas first")
	return nil
}
