package agent

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	sddaemon "github.com/coreos/go-systemd/v22/daemon"
	"github.com/godbus/dbus/v5"
)

// unwanted is how long an agent of a host that belongs to no Verifier stays: it is
// started when somebody speaks to it on D-Bus.
const unwanted = 5 * time.Minute

// Run is virt-trust-agent: it works until ctx ends, or until nobody has wanted it.
func Run(ctx context.Context, o Options) error {
	a, err := newAgent(o.Dir, guard{}, o.Log, usualPace)
	if err != nil {
		return err
	}
	a.address = o.Config.Pull.Listen
	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		return fmt.Errorf("connecting to the system bus: %w", err)
	}
	defer conn.Close()
	s := &service{conn: conn, agent: a, version: o.Version, log: o.Log, slots: make(chan struct{}, maxCalls)}
	a.changed = s.changed
	if err := s.export(); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	failed := make(chan error, 1)
	if o.Config.Pull.Listen != "" {
		go func() { failed <- servePull(ctx, o.Config.Pull, a, o.Log) }()
	}
	_, _ = sddaemon.SdNotify(false, sddaemon.SdNotifyReady)
	defer sddaemon.SdNotify(false, sddaemon.SdNotifyStopping)

	var last atomic.Int64
	began := time.Now()
	alive := func() { last.Store(int64(time.Since(began))) }
	go watchdog(ctx, func() time.Time { return began.Add(time.Duration(last.Load())) })
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.loop(ctx, alive)
	}()
	defer func() { stop(); <-done }()

	idle := time.NewTicker(unwanted)
	defer idle.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-conn.Context().Done():
			return errors.New("the system bus closed the connection")
		case <-idle.C:
			if a.Status().State == NotEnrolled && o.Config.Pull.Listen == "" {
				o.Log.Info("this host belongs to no Verifier: nothing to do")
				return nil
			}
		}
	}
}
