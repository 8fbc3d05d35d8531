package daemon

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"time"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus"
	"virt-trust/internal/domain"
	"virt-trust/internal/domain/libvirt"
	"virt-trust/internal/recovery"
	"virt-trust/internal/vtpm/reason"
)

// recoveryMethods are those of org.virttrust1.Manager about the recovery key
// and backups.
func (s *Service) recoveryMethods() map[string]any {
	return map[string]any{
		"GetRecovery": func(options dict, sender dbus.Sender) (dict, *dbus.Error) {
			result := dict{}
			return result, s.serve(sender, "GetRecovery", reader, adminDeadline, func(context.Context, *caller) error {
				maps.Copy(result, s.recoveryProperties())
				return nil
			})
		},
		"SetRecovery": func(recipient string, options dict, sender dbus.Sender) (dbus.UnixFD, *dbus.Error) {
			return s.converse(sender, "SetRecovery", func(ctx context.Context, c *conversation) (map[string]string, error) {
				to, err := recovery.ParseRecipient(recipient)
				if err != nil {
					return nil, err
				}
				if s.g.recoveryState() != "none" && !option[bool](options, "replace") {
					return nil, reason.Refuse(reason.PolicyForbids, "'virt-trust recovery new --replace' makes another, and the one that is stored opens nothing any more",
						"this host has a recovery key")
				}
				what, err := s.g.SetRecovery(ctx, to, c.say)
				return map[string]string{"what": what}, err
			})
		},
		"ConfirmRecovery": func(answer []byte, options dict, sender dbus.Sender) (dict, *dbus.Error) {
			result := dict{}
			return result, s.serve(sender, "ConfirmRecovery", polkitAction, adminDeadline, func(context.Context, *caller) error {
				what, err := s.g.ConfirmRecovery(answer)
				result["what"] = dbus.MakeVariant(what)
				return err
			})
		},
		"Recover": func(vm string, options dict, sender dbus.Sender) (dbus.UnixFD, *dbus.Error) {
			return s.converse(sender, "Recover", func(ctx context.Context, c *conversation) (map[string]string, error) {
				text, err := c.input(recovery.MaxText)
				if err != nil {
					return nil, err
				}
				defer text.Wipe()
				key, err := recovery.Parse(text.Bytes())
				if err != nil {
					return nil, err
				}
				if vm == "" {
					what, err := s.g.Recover(ctx, key, c.say)
					s.noticeHost()
					return map[string]string{"what": what}, err
				}
				return s.aboutVM(ctx, vm, func(d libvirt.Domain, f *domain.Facts) (string, error) {
					return s.g.RecoverVM(ctx, d, f, key)
				})
			})
		},
		"Backup": func(vm string, options dict, sender dbus.Sender) (dbus.UnixFD, *dbus.Error) {
			return s.converse(sender, "Backup", func(ctx context.Context, c *conversation) (map[string]string, error) {
				return s.aboutVM(ctx, vm, func(d libvirt.Domain, f *domain.Facts) (string, error) {
					return s.backup(ctx, c, d, f, option[[]string](options, "recipients"), option[bool](options, "hold"))
				})
			})
		},
		"Restore": func(options dict, sender dbus.Sender) (dbus.UnixFD, *dbus.Error) {
			return s.converse(sender, "Restore", func(ctx context.Context, c *conversation) (map[string]string, error) {
				archive, err := c.input(recovery.MaxBackup)
				if err != nil {
					return nil, err
				}
				defer archive.Wipe()
				b, err := recovery.ParseBackup(archive.Bytes())
				if err != nil {
					return nil, err
				}
				return s.aboutVM(ctx, b.UUID, func(d libvirt.Domain, f *domain.Facts) (string, error) {
					return s.g.Restore(ctx, d, f, b, option[bool](options, "replace"))
				})
			})
		},
	}
}

// aboutVM does something about a VM that libvirt knows.
func (s *Service) aboutVM(ctx context.Context, vm string, do func(libvirt.Domain, *domain.Facts) (string, error)) (map[string]string, error) {
	d, err := s.lookup(ctx, vm)
	if err != nil {
		return nil, err
	}
	f, err := domain.Parse([]byte(d.XML))
	if err != nil {
		return nil, err
	}
	what, err := do(d, f)
	return map[string]string{"uuid": f.UUID, "name": f.Name, "what": what}, err
}

// backup gives a VM's vTPM, of an instant at which the VM is off or paused. With
// hold it stays paused, for its disks, until the caller says that it may go on.
func (s *Service) backup(ctx context.Context, c *conversation, d libvirt.Domain, f *domain.Facts, to []string, hold bool) (what string, err error) {
	what = "the vTPM of the VM, which is off"
	if d.Active {
		resume, err := s.pause(ctx, f.UUID)
		if err != nil {
			return "", err
		}
		defer func() {
			if e := resume(); e != nil {
				err = errors.Join(err, e)
			}
		}()
		what = "the vTPM of the VM at the instant in which it was paused"
	}
	sealed, err := s.g.Backup(ctx, d, f, to)
	if err != nil {
		return "", err
	}
	const piece = 64 << 10
	for b := bytes.NewBuffer(sealed); b.Len() > 0; {
		c.tell(bus.Line{Data: bytes.Clone(b.Next(piece))})
	}
	if hold {
		began := time.Now()
		held, cancel := context.WithTimeout(ctx, pauseLimit)
		defer cancel()
		c.tell(bus.Line{Hold: true})
		c.gone(held)
		if held.Err() != nil {
			return "", errors.New("the VM was kept paused for too long, and goes on: the disk's part may not belong to the vTPM's")
		}
		if d.Active {
			what += ", which took " + time.Since(began).Round(time.Millisecond).String()
		}
	}
	return what, nil
}

// recoveryProperties are the public half of the recovery key, and what hangs on it.
func (s *Service) recoveryProperties() dict {
	f := s.g.recovery.Load()
	missing := []string{}
	for _, r := range s.g.unwrapped() {
		missing = append(missing, r.Name)
	}
	d := strs("state", s.g.recoveryState())
	d["unwrapped"] = dbus.MakeVariant(missing)
	if f != nil {
		d["recipient"], d["test"] = dbus.MakeVariant(f.Recipient), dbus.MakeVariant(f.Test)
		d["made"] = dbus.MakeVariant(uint64(f.Made.UnixMicro()))
		if !f.Confirmed.IsZero() {
			d["confirmed"] = dbus.MakeVariant(uint64(f.Confirmed.UnixMicro()))
		}
	}
	return d
}
