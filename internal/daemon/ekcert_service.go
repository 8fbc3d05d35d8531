package daemon

import (
	"context"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/domain"
	"virt-trust/internal/domain/libvirt"
	"virt-trust/internal/vtpm/ekcert"
)

// ekcertMethods are the methods of the Manager about certificates of vTPMs.
func (s *Service) ekcertMethods() map[string]any {
	return map[string]any{
		"CertifyEK": func(kind string, key []byte, options dict, sender dbus.Sender) (der []byte, derr *dbus.Error) {
			der = []byte{}
			derr = s.serve(sender, "CertifyEK", ekcertOnly, hookDeadline, func(ctx context.Context, c *caller) error {
				tpm := ekcert.TPM{
					Manufacturer: option[string](options, "manufacturer"), Version: option[string](options, "version"),
					Family: option[string](options, "family"), Level: int(option[int32](options, "level")), Revision: int(option[int32](options, "revision")),
				}
				made, err := s.g.CertifyEK(ctx, ekcert.Kind(kind), key, option[string](options, "uuid"), tpm, c)
				if err != nil {
					s.deny(option[string](options, "uuid"), c.exe, "certify", err)
					return err
				}
				der = made
				return nil
			})
			return der, derr
		},
		"IssueEKCertificate": s.verb("IssueEKCertificate", polkitAction, func(ctx context.Context, d libvirt.Domain, f *domain.Facts, _ dict) (string, error) {
			return s.g.IssueEK(ctx, d, f)
		}),
	}
}

// certifierMethods are those about the certifier's certificate.
func (s *Service) certifierMethods() map[string]any {
	return map[string]any{
		"SetCertifierCertificate": func(chain []byte, options dict, sender dbus.Sender) *dbus.Error {
			return s.serve(sender, "SetCertifierCertificate", agentOnly, adminDeadline, func(ctx context.Context, c *caller) error {
				err := s.g.SetCertifierChain(ctx, chain)
				s.deny("", c.exe, "certifier", err)
				return err
			})
		},
	}
}

func nonNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}
