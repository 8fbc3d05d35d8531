// Package verifier is the body of virt-trust-verifier: it puts together what the
// packages beside it do, serves it over TLS, and does the work that no request
// asks for. Any number of them may share one PostgreSQL: none leads, and all that
// has to happen once is claimed in the database.
package verifier

import (
	"context"
	"net"
	"sync"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"

	"virt-trust/internal/platform/config"
)

// Options are what main knows.
type Options struct {
	Config  config.Verifier
	Version string
	Log     *logrus.Entry
	// Reload, where it is not nil, is told when keys of results, people's tokens and
	// the browsers' certificate are to be read anew; Load reads the configuration then.
	Reload <-chan struct{}
	Load   func() (config.Verifier, error)
	// Listeners and Browsers take the place of the configured ones, and Ready is
	// called once they are served.
	Listeners, Browsers []net.Listener
	Ready               func()
}

// Run serves until ctx ends.
func Run(ctx context.Context, o Options) error {
	v, err := open(ctx, o)
	if err != nil {
		return err
	}
	defer v.store.Close()
	for _, c := range cautions(o.Config) {
		o.Log.Info(c)
	}
	nodes, browsers := o.Listeners, o.Browsers
	if nodes == nil {
		if nodes, browsers, err = listeners(o.Config); err != nil {
			return err
		}
	}
	v.nodesAt = nodes[0].Addr()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel() // before the wait
	for _, f := range v.background(o) {
		work.Go(func() { f(ctx) })
	}
	all := []way{{newServer(v.handler, v.tls, o.Config.Limits, o.Log), nodes}}
	if v.browsers != nil {
		all = append(all, way{newServer(v.people, v.browsers.config(), o.Config.Limits, o.Log), browsers})
	}
	for _, w := range all {
		for _, l := range w.on {
			o.Log.WithField("address", l.Addr().String()).Info("serving")
		}
	}
	notify(o.Log, daemon.SdNotifyReady)
	if o.Ready != nil {
		o.Ready()
	}
	err = serveAll(ctx, all, o.Config.Limits.Connections)
	notify(o.Log, daemon.SdNotifyStopping)
	return err
}

func notify(log *logrus.Entry, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.WithError(err).Warn("systemd was not told")
	}
}
