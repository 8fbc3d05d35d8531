package bus

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/vtpm/reason"
)

func TestVMPath(t *testing.T) {
	if got := VMPath("3f2c1c1e-0000-4000-8000-000000000001"); got != "/org/virttrust1/vm/3f2c1c1e_0000_4000_8000_000000000001" || !got.IsValid() {
		t.Error(got)
	}
}

func TestMapError(t *testing.T) {
	said := func(name, text string) error { return dbus.Error{Name: name, Body: []any{text}} }
	for _, tt := range []struct {
		err  error
		code reason.Code // of the refusal that it is
		is   error       // or the error
	}{
		{said(ErrorRefused, "vtpm-changed: edited; repair it"), reason.VTPMChanged, nil},
		{dbus.NewError(ErrorRefused, []any{"label-missing: x"}), reason.LabelMissing, nil},
		{fmt.Errorf("calling: %w", said(ErrorRefused, "tpm-busy: x")), reason.TPMBusy, nil},
		{said(ErrorNotFound, "web"), "", ErrNotFound},
		{said(ErrorAccessDenied, "no"), "", ErrAccessDenied},
		{said("org.freedesktop.DBus.Error.ServiceUnknown", "x"), reason.HelperUnreachable, nil},
		{said("org.freedesktop.DBus.Error.Spawn.ServiceNotFound", "x"), reason.HelperUnreachable, nil},
		{said("org.freedesktop.systemd1.UnitMasked", "Unit virt-trustd.service is masked."), reason.HelperUnreachable, nil},
		{said("org.freedesktop.DBus.Error.NoReply", "x"), reason.HelperUnreachable, nil},
		{context.DeadlineExceeded, reason.HelperUnreachable, nil},
		{dbus.ErrClosed, reason.HelperUnreachable, nil},
		{said(ErrorFailed, "disk full"), "", nil},
		{said(ErrorRefused, "not one of our codes: x"), "", nil},
		{said(ErrorFailed, "two\nlines"), "", nil},
		{dbus.Error{Name: ErrorFailed, Body: []any{7}}, "", nil},
		{errors.New("something else"), "", nil},
	} {
		got := MapError(tt.err)
		r := reason.As(got)
		switch {
		case got == nil:
			t.Errorf("%v became no error", tt.err)
		case tt.code != "" && (r == nil || r.Code != tt.code):
			t.Errorf("%v: %v, want %s", tt.err, got, tt.code)
		case tt.code == "" && r != nil:
			t.Errorf("%v became the refusal %v", tt.err, r)
		case tt.is != nil && !errors.Is(got, tt.is):
			t.Errorf("%v: %v, want %v", tt.err, got, tt.is)
		case got.Error() != reason.OneLine(got.Error()):
			t.Errorf("%q is more than a line", got)
		}
	}
}
