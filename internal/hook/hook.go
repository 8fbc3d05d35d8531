// Package hook is the body of virt-trust-hook, which libvirt runs, by the link
// /etc/libvirt/hooks/qemu.d/50-virt-trust, for every event of every VM and waits for
// without a limit (https://libvirt.org/hooks.html). What holds here:
//
//   - stdout stays empty: libvirt would take it for a new domain XML;
//   - stderr stays empty, except for the one line of a refusal, which virsh shows;
//   - the exit status is 1 for a refusal at an operation that may be refused,
//     and 0 for everything else (at reconnect libvirt kills the VM otherwise);
//   - a VM without an emulated TPM costs no D-Bus call and needs no virt-trustd;
//   - the hook ends by its own deadline, whatever hangs;
//   - no children: one that kept a pipe open would hang libvirt.
//
// The bus address may come from the environment (DBUS_SYSTEM_BUS_ADDRESS).
// The environment is libvirtd's, as is the PATH by which libvirtd finds swtpm:
// who can set it is root already.
package hook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/bus"
	"virt-trust/internal/domain"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/reason"
)

// Hook is one run. Every field must be set.
type Hook struct {
	Name   string   // by which the program was called
	Args   []string // without that
	Stdin  io.Reader
	Stderr io.Writer
	Config string // path of virt-trustd.toml
	Path   string // $PATH, by which libvirt finds emulator and swtpm
	Log    *logrus.Logger
	// Ask hands the event to virt-trustd, as bus.Client.Call does.
	Ask func(ctx context.Context, method string, args []any) error
	// Limit bounds the run at an operation.
	Limit func(domain.Operation) time.Duration

	seen atomic.Pointer[subject]
}

// subject is what is known of the VM so far.
type subject struct {
	name, uuid string
	vtpm       bool // it has, or may have, an emulated TPM
}

// Limit is how long the hook waits at an operation: as long as a TPM may need
// where keys are made or unwrapped, or that is waited for.
func Limit(op domain.Operation) time.Duration {
	switch op {
	case domain.OpPrepare, domain.OpStart, domain.OpRestore, domain.OpMigrate:
		return 45 * time.Second
	}
	return 10 * time.Second
}

// Ask calls virt-trustd on the system bus.
func Ask(ctx context.Context, method string, args []any) error {
	c, err := bus.Dial(ctx)
	if err != nil {
		return bus.Unreachable(err.Error())
	}
	defer c.Close()
	return c.Call(ctx, method, args)
}

// maxStdin is what is read of stdin, to tell whether an XML that is too long to
// be parsed has a TPM.
const maxStdin = 16 * domain.MaxXML

// Run does it all and gives the exit status.
func (h *Hook) Run() int {
	// dpkg's copies of the link lie beside it during an upgrade, and libvirt runs
	// whatever is there.
	if strings.Contains(filepath.Base(h.Name), ".dpkg-") {
		return 0
	}
	if len(h.Args) > 1 && domain.Operation(h.Args[1]).Ignored() {
		return 0
	}
	call, err := domain.ParseHookArgs(h.Args)
	if err != nil {
		fmt.Fprintf(h.Stderr, "virt-trust-hook: %s\n", reason.OneLine(err.Error()))
		return 1
	}
	// Until the XML has been read the VM may have a TPM.
	h.seen.Store(&subject{name: call.Name, vtpm: true})
	limit := h.Limit(call.Op)
	// What follows may hang in a system call, so it is left behind if need be.
	done := make(chan error, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				done <- fmt.Errorf("internal error: %v\n%s", p, debug.Stack())
			}
		}()
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		done <- h.judge(ctx, call)
	}()
	select {
	case err = <-done:
	case <-time.After(limit + limit/20): // judge's own deadline comes first, and knows more
		err = bus.Unreachable("no answer within " + limit.String())
	}
	return h.conclude(call, err)
}

// judge gives nil to let the operation go on, a *reason.Refusal, or "could not tell".
func (h *Hook) judge(ctx context.Context, call domain.HookCall) error {
	xml, err := io.ReadAll(io.LimitReader(h.Stdin, maxStdin+1))
	if err == nil && len(xml) <= maxStdin && !domain.HasEmulatorTPM(xml) {
		return h.withoutTPM(call)
	}
	if err != nil {
		return fmt.Errorf("reading the domain XML: %w", err)
	}
	facts, err := domain.Parse(xml)
	if err != nil {
		return err
	}
	h.seen.Store(&subject{name: facts.Name, uuid: facts.UUID, vtpm: facts.TPM != nil})
	if facts.TPM == nil {
		return h.withoutTPM(call)
	}
	if !call.Op.Known() {
		h.entry(call).Warnf("libvirt's hook operation %q is not known and goes on unseen", call.Op)
		return nil
	}
	options := map[string]any{"path": h.Path}
	return h.Ask(ctx, "HandleHook", []any{string(call.Op), call.SubOp, call.Extra, string(xml), options})
}

// withoutTPM judges a VM that virt-trust does not guard.
func (h *Hook) withoutTPM(call domain.HookCall) error {
	h.seen.Store(&subject{name: call.Name})
	switch call.Op {
	case domain.OpPrepare, domain.OpRestore, domain.OpMigrate:
	default:
		return nil
	}
	if _, err := os.Stat(h.Config); err != nil {
		return nil
	}
	c, err := config.Load(h.Config)
	if err != nil {
		return err
	}
	if c.Policy.RequireVTPM {
		return reason.Refuse(reason.PolicyForbids, "give it one (virt-xml VM --add-device --tpm emulator)",
			"this host runs only VMs that have an emulated TPM")
	}
	return nil
}

// conclude turns the judgement into exit status, journal and stderr.
func (h *Hook) conclude(call domain.HookCall, err error) int {
	if err == nil {
		return 0
	}
	vm := h.seen.Load()
	refusal := reason.As(err)
	if refusal == nil && !vm.vtpm || !call.Op.MayRefuse() {
		h.entry(call).WithError(err).Warn("the event could not be handled; it goes on")
		return 0
	}
	told := refusal // virt-trustd has logged its own refusals
	switch {
	case errors.Is(err, bus.ErrAccessDenied):
		refusal = reason.Refuse(reason.PolicyForbids, "this program is for libvirtd alone", "%v", err)
	case refusal == nil:
		refusal = reason.Refuse(reason.KeyNotReleased, "see 'journalctl -t virt-trustd -t virt-trust-hook'",
			"it could not be told whether this VM may run: %v", err)
	}
	if told == nil || told.Code == reason.HelperUnreachable || !vm.vtpm {
		h.entry(call).WithFields(logrus.Fields{journal.ID: journal.Refused, journal.Reason: refusal.Code}).
			WithError(err).Warn("refused: " + refusal.Text())
	}
	who := reason.OneLine(fmt.Sprintf("%.100s", vm.name))
	if vm.uuid != "" {
		who += ", " + vm.uuid
	}
	fmt.Fprintf(h.Stderr, "virt-trust: refused: %s (%s)\n", refusal.Error(), who)
	return 1
}

func (h *Hook) entry(call domain.HookCall) *logrus.Entry {
	vm := h.seen.Load()
	return h.Log.WithFields(logrus.Fields{journal.VM: vm.uuid, journal.VMName: vm.name, journal.Operation: call.Op})
}
