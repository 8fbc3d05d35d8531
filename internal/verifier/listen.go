package verifier

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/sirupsen/logrus"

	"virt-trust/internal/platform/config"
	"virt-trust/internal/platform/listen"
)

// browsersName is what systemd calls the sockets for browsers
// (FileDescriptorName=).
const browsersName = "browsers"

// listeners gives the sockets for nodes and people, and those for browsers, where
// these are wanted: systemd's where it hands some over, else those of the
// configuration.
func listeners(cfg config.Verifier) (nodes, browsers []net.Listener, err error) {
	handed, err := activation.ListenersWithNames()
	if err != nil {
		return nil, nil, err
	}
	for name, of := range handed {
		for _, l := range of {
			switch {
			case l == nil:
				return nil, nil, errors.New("systemd handed over something that is no stream socket")
			case name == browsersName:
				browsers = append(browsers, l)
			default:
				nodes = append(nodes, l)
			}
		}
	}
	wanted := cfg.Browsers.Certificate != ""
	if len(browsers) > 0 && !wanted {
		return nil, nil, errors.New("systemd hands over sockets for browsers, and browsers.certificate is empty")
	}
	if len(nodes) == 0 {
		if nodes, err = listenAt(cfg.Listen); err != nil {
			return nil, nil, err
		}
	}
	if wanted && len(browsers) == 0 {
		if browsers, err = listenAt(cfg.Browsers.Listen); err != nil {
			return nil, nil, errors.Join(err, closeAll(nodes))
		}
	}
	return nodes, browsers, nil
}

func listenAt(addresses []string) ([]net.Listener, error) {
	all := []net.Listener{}
	for _, a := range addresses {
		l, err := net.Listen("tcp", a)
		if err != nil {
			return nil, errors.Join(err, closeAll(all))
		}
		all = append(all, l)
	}
	return all, nil
}

func closeAll(all []net.Listener) error {
	var errs []error
	for _, l := range all {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// maxHeader bounds a request's header in bytes.
const maxHeader = 32 << 10

// newServer makes the HTTP server. Each of its timeouts ends one kind of slow
// client: header_timeout counts from the connection's start, TLS included;
// body_timeout to the end of the request; writing gets the same again.
//
// It speaks HTTP/1.1 alone: a node has one request at a time, for which HTTP/2
// would keep twice the memory for each of ten thousand idle connections, and one
// connection could open streams faster than they are refused.
func newServer(h http.Handler, t *tls.Config, l config.VerifierLimits, log *logrus.Entry) *http.Server {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	body := time.Duration(l.BodyTimeout)
	return &http.Server{
		Handler: h, TLSConfig: t, Protocols: &protocols, MaxHeaderBytes: maxHeader,
		ReadHeaderTimeout: time.Duration(l.HeaderTimeout), ReadTimeout: body, WriteTimeout: 2 * body, IdleTimeout: time.Duration(l.IdleTimeout),
		ErrorLog: listen.Quiet(log),
	}
}

// Times of a graceful stop: requests may end until patience is over, then their
// contexts do, and a little later their connections.
const (
	patience = 5 * time.Second
	mercy    = 2 * time.Second
)

// way is a server and the sockets that lead to it.
type way struct {
	srv *http.Server
	on  []net.Listener
}

// serveAll serves all ways until ctx ends or one fails: then the others stop too.
func serveAll(ctx context.Context, all []way, connections int) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, len(all))
	for _, w := range all {
		go func() { ended <- serve(ctx, w.srv, w.on, connections) }()
	}
	var err error
	for range all {
		err = errors.Join(err, <-ended)
		cancel()
	}
	return err
}

// serve serves until ctx ends, and then stops gracefully.
func serve(ctx context.Context, srv *http.Server, all []net.Listener, connections int) error {
	requests, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	srv.BaseContext = func(net.Listener) context.Context { return requests }
	slots := make(chan struct{}, connections)
	failed := make(chan error, len(all))
	for _, l := range all {
		go func() { failed <- srv.ServeTLS(listen.Limit(l, slots), "", "") }()
	}
	select {
	case err := <-failed:
		return errors.Join(err, srv.Close())
	case <-ctx.Done():
	}
	impatient := time.AfterFunc(patience, end)
	defer impatient.Stop()
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience+mercy)
	defer cancel()
	if err := srv.Shutdown(stop); err != nil {
		return errors.Join(fmt.Errorf("some requests did not end: %w", err), srv.Close())
	}
	return nil
}
