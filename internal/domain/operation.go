package domain

import (
	"fmt"
	"strings"
)

// Operation is a libvirt hook operation (https://libvirt.org/hooks.html).
type Operation string

// The operations of the qemu hook.
const (
	OpPrepare   Operation = "prepare"
	OpStart     Operation = "start"
	OpStarted   Operation = "started"
	OpStopped   Operation = "stopped"
	OpRelease   Operation = "release"
	OpRestore   Operation = "restore"
	OpMigrate   Operation = "migrate"
	OpReconnect Operation = "reconnect"
	OpAttach    Operation = "attach"
)

// Known reports whether op is one of the operations above; libvirt adds some
// from time to time.
func (op Operation) Known() bool {
	switch op {
	case OpPrepare, OpStart, OpStarted, OpStopped, OpRelease, OpRestore, OpMigrate, OpReconnect, OpAttach:
		return true
	}
	return false
}

// Ignored reports whether the hook has nothing to do at op: what happens then is
// known at other operations, and libvirt waits for each.
func (op Operation) Ignored() bool {
	switch op {
	case OpStarted, OpStopped, OpAttach:
		return true
	}
	return false
}

// Vetoable reports whether a hook that fails keeps libvirt from going on. (At
// reconnect libvirt would kill the running VM: that is not a veto.)
func (op Operation) Vetoable() bool { return op.MayRefuse() || op == OpStarted }

// MayRefuse reports whether virt-trust refuses at op: where a veto is heeded
// and the guest has not run yet.
func (op Operation) MayRefuse() bool {
	switch op {
	case OpPrepare, OpStart, OpRestore, OpMigrate:
		return true
	}
	return false
}

// HookCall is how libvirt calls a hook.
type HookCall struct {
	Name         string // of the domain: a user's choice
	Op           Operation
	SubOp, Extra string // "" where libvirt says "-"
}

// ParseHookArgs reads a hook's arguments, without the program's own name.
func ParseHookArgs(argv []string) (HookCall, error) {
	if len(argv) < 4 {
		return HookCall{}, fmt.Errorf("expected NAME OPERATION SUB-OPERATION EXTRA, got %d arguments", len(argv))
	}
	for _, a := range argv[:4] {
		if len(a) > maxName || strings.ContainsRune(a, 0) {
			return HookCall{}, fmt.Errorf("an argument is too long")
		}
	}
	dash := func(s string) string {
		if s == "-" {
			return ""
		}
		return s
	}
	return HookCall{Name: argv[0], Op: Operation(argv[1]), SubOp: dash(argv[2]), Extra: dash(argv[3])}, nil
}
