// Package ekcert is the body of virt-trust-ekcert, which swtpm_setup runs where
// it would run swtpm_localca: once for the certificate of a new vTPM's RSA EK,
// once for that of the platform, once for that of the ECC EK, as swtpm's user.
// It has virt-trustd make the certificate, and puts it where swtpm_setup finds
// it and writes it into the vTPM.
//
// Where there is no certificate the exit status is 1: swtpm_setup then gives up,
// libvirt removes the vTPM that was begun, and the VM does not start. A vTPM
// gets its certificate at its manufacture or never, and a first start that fails
// has lost nothing and is tried again; a VM without its certificate would be
// noticed when it is late.
package ekcert

import (
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/sirupsen/logrus"

	"virt-trust/internal/bus"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/reason"
)

// Limit is for all of it: a slow TPM signs within a second or two, and may have
// a queue.
const Limit = time.Minute

// Tool is one run.
type Tool struct {
	Args   []string // without the program's name
	Stderr io.Writer
	Log    *logrus.Logger
	// Certify has virt-trustd make a certificate, in DER, of the kind "ek" or
	// "platform" over a SubjectPublicKeyInfo.
	Certify func(ctx context.Context, kind string, key []byte, options map[string]dbus.Variant) ([]byte, error)
}

// Run gives the exit status.
func (t *Tool) Run() int {
	vm, err := t.run()
	if err == nil {
		return 0
	}
	r := reason.As(err)
	if r == nil {
		r = reason.Refuse(reason.TPMFailed, "see 'journalctl -t virt-trustd -t virt-trust-ekcert'", "the vTPM's certificate could not be made: %v", err)
	}
	t.Log.WithFields(logrus.Fields{
		journal.ID: journal.Refused, journal.Reason: r.Code, journal.VM: vm, journal.Operation: "certify",
	}).Warn("no certificate for a new vTPM: " + r.Text())
	// The last line is what swtpm_setup puts into its log (up to a ": ").
	fmt.Fprintf(t.Stderr, "virt-trust: refused: %s\n", r.Error())
	return 1
}

func (t *Tool) run() (vm string, err error) {
	c, err := Parse(t.Args)
	if err != nil {
		return "", err
	}
	spki, err := x509.MarshalPKIXPublicKey(c.Key)
	if err != nil {
		return c.VM, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	defer cancel()
	der, err := t.Certify(ctx, c.Type, spki, map[string]dbus.Variant{
		"uuid": dbus.MakeVariant(c.VM), "manufacturer": dbus.MakeVariant(c.Manufacturer), "version": dbus.MakeVariant(c.Version),
		"family": dbus.MakeVariant(c.Family), "level": dbus.MakeVariant(int32(c.Level)), "revision": dbus.MakeVariant(int32(c.Revision)),
	})
	if err != nil {
		return c.VM, err
	}
	if _, err := x509.ParseCertificate(der); err != nil {
		return c.VM, fmt.Errorf("virt-trustd answered with something else than a certificate: %w", err)
	}
	return c.VM, os.WriteFile(c.File(), der, 0o600)
}

// Certify asks virt-trustd on the system bus.
func Certify(ctx context.Context, kind string, key []byte, options map[string]dbus.Variant) ([]byte, error) {
	c, err := bus.Dial(ctx)
	if err != nil {
		return nil, bus.Unreachable(err.Error())
	}
	defer c.Close()
	var der []byte
	err = c.Call(ctx, "CertifyEK", []any{kind, key, options}, &der)
	return der, err
}
