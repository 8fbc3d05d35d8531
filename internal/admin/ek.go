package admin

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"

	"virt-trust/internal/bus"
	"virt-trust/internal/vtpm/ekcert"
)

// EK is the answer of virt-trust ek: the certificate of a vTPM's endorsement
// key or, with --ak, of its AK.
type EK struct {
	UUID        string    `json:"uuid"`
	Name        string    `json:"name"`
	KeyDigest   string    `json:"key_digest"` // SHA-256 of the certified key's SubjectPublicKeyInfo
	Origin      string    `json:"origin"`     // manufactured, taken-in
	Serial      string    `json:"serial"`     // hexadecimal
	Issuer      string    `json:"issuer"`
	From        time.Time `json:"from"`
	Verified    bool      `json:"verified"`              // by the chain of this host's certifier
	SharedWith  []string  `json:"shared_with,omitempty"` // UUIDs of VMs with the same EK
	Certificate string    `json:"certificate"`           // PEM
	Chain       string    `json:"chain"`                 // PEM, the certifier's first

	der []byte
}

func (c *Command) ekCommand() *cobra.Command {
	var asPEM, asDER, asText, chain, ak, issue bool
	cmd := &cobra.Command{
		Use:   "ek VM",
		Short: "Show the certificate of a vTPM's endorsement key",
		Long: "Shows the certificate that the host's certifier, a key in its TPM, gave the endorsement key of a VM's vTPM. " +
			"With --chain and no VM, the certificates above those of all vTPMs.",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 && !chain {
				return errors.New("name a VM, or give --chain")
			}
			if len(args) > 1 || len(args) == 0 && (ak || issue || asDER || asText) {
				return errors.New("name one VM")
			}
			if asPEM && asDER || asText && (asPEM || asDER) || ak && issue {
				return errors.New("of --text, --pem and --der, and of --ak and --issue, give one")
			}
			return nil
		},
		ValidArgsFunction: completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return withGuard(cmd.Context(), workTimeout, func(ctx context.Context, g *guard) error {
				above, err := g.certifierChain(ctx)
				if err != nil {
					return err
				}
				if len(args) == 0 {
					if above == "" {
						return errors.New("the host's certifier has no certificate yet")
					}
					return c.print(map[string]string{"chain": above}, func(w io.Writer) { fmt.Fprint(w, above) })
				}
				if issue {
					p, err := g.change(ctx, "IssueEKCertificate", args[0], map[string]dbus.Variant{})
					if err != nil {
						return err
					}
					fmt.Fprintf(c.Stderr, "%s: %s\n", p.text("name"), p.text("what"))
				}
				e, err := g.ek(ctx, args[0], ak, above)
				if err != nil {
					return err
				}
				if asDER {
					_, err := c.Stdout.Write(e.der)
					return err
				}
				return c.print(e, func(w io.Writer) {
					switch {
					case asPEM && chain:
						fmt.Fprint(w, e.Certificate+e.Chain)
					case asPEM:
						fmt.Fprint(w, e.Certificate)
					default:
						e.write(w)
					}
				})
			})
		},
	}
	f := cmd.Flags()
	f.BoolVar(&asText, "text", false, "what the certificate says (default)")
	f.BoolVar(&asPEM, "pem", false, "the certificate in PEM")
	f.BoolVar(&asDER, "der", false, "the certificate in DER")
	f.BoolVar(&chain, "chain", false, "with --pem, or without a VM: the certificates above it too")
	f.BoolVar(&ak, "ak", false, "the certificate of the AK that the vTPM got at its manufacture")
	f.BoolVar(&issue, "issue", false, "make one for a vTPM that has none")
	return cmd
}

// certifierChain gives the chain as it is, since others read it again: what it
// holds is checked to be nothing but certificates.
func (g *guard) certifierChain(ctx context.Context) (string, error) {
	p, err := g.properties(ctx, bus.HostPath, bus.HostInterface)
	if err != nil {
		return "", err
	}
	text, _ := p["CertifierChain"].Value().(string)
	if text == "" {
		return "", nil
	}
	all, err := ekcert.ParseChain([]byte(text))
	if err != nil {
		return "", fmt.Errorf("the certifier's chain: %w", err)
	}
	return string(ekcert.EncodeChain(all)), nil
}

func (g *guard) ek(ctx context.Context, name string, ak bool, chain string) (*EK, error) {
	path, err := g.find(ctx, name)
	if err != nil {
		return nil, err
	}
	p, err := g.properties(ctx, path, vmInterface)
	if err != nil {
		return nil, err
	}
	vm := newVM(p)
	property, none := "EKCertificate", fmt.Errorf("the vTPM of %s has no certificate; 'virt-trust ek %s --issue' has one made", vm.Name, vm.Name)
	if ak {
		property, none = "AKCertificate", fmt.Errorf("the vTPM of %s has no AK: attestation.vtpm_ak of virt-trustd.toml(5) was not on when it was made, or it could not be made then and is at the VM's next start", vm.Name)
	}
	der, _ := p[property].Value().([]byte)
	if len(der) == 0 {
		return nil, none
	}
	said, err := ekcert.UntrustedParse(der)
	if err != nil {
		return nil, fmt.Errorf("the vTPM's certificate: %w", err)
	}
	if said.VM != vm.UUID {
		return nil, fmt.Errorf("the vTPM's certificate is that of the VM %s", said.VM)
	}
	e := &EK{
		UUID: vm.UUID, Name: vm.Name, KeyDigest: said.KeyID, Origin: string(said.Origin), Serial: said.Serial, Issuer: said.Issuer, From: said.From.UTC(),
		SharedWith: vm.EKSharedWith, Certificate: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), Chain: chain, der: der,
	}
	if all, err := ekcert.ParseChain([]byte(chain)); err == nil {
		e.Verified = issuedBy(der, all[0])
	}
	return e, nil
}

func issuedBy(der []byte, certifier *x509.Certificate) bool {
	key, ok := certifier.PublicKey.(*ecdsa.PublicKey)
	return ok && ekcert.IssuedBy(der, key)
}

func (e *EK) write(w io.Writer) {
	verified := "yes, by this host's certifier"
	if !e.Verified {
		verified = "no: it is not by this host's present certifier"
	}
	fields(w,
		"Name", e.Name,
		"UUID", e.UUID,
		"Key digest", e.KeyDigest,
		"Shared with", strings.Join(e.SharedWith, " "),
		"Origin", e.Origin,
		"Issuer", e.Issuer,
		"Serial", e.Serial,
		"From", local(&e.From),
		"Verified", verified,
	)
}
