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

// listeners gives systemd's sockets where it hands some over, else those of the
// configuration.
func listeners(addresses []string) ([]net.Listener, error) {
	handed, err := activation.Listeners()
	if err != nil {
		return nil, err
	}
	all := []net.Listener{}
	for _, l := range handed {
		if l == nil {
			return nil, errors.New("systemd handed over something that is no stream socket")
		}
		all = append(all, l)
	}
	if len(all) > 0 {
		return all, nil
	}
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
