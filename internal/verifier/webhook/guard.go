package webhook

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"syscall"
	"time"
)

// Guard keeps webhooks out of networks that their owner could not reach himself:
// the Verifier's own machine, its neighbours, the cloud's metadata.
type Guard struct {
	Allow     []netip.Prefix // private networks that are meant
	AllowHTTP bool           // also without TLS
}

// ErrForbidden says that a webhook may not lead there.
var ErrForbidden = errors.New("webhooks may not lead there; see webhooks.allow_networks in verifier.toml(5)")

// special are networks that net/netip has no name for: RFC 6890, and IPv6 forms
// that have an IPv4 address in them (RFC 6052, 3056, 4380), behind which a
// private one could hide.
var special = prefixes("0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.0.2.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
	"240.0.0.0/4", "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16", "fec0::/10")

func prefixes(texts ...string) (all []netip.Prefix) {
	for _, t := range texts {
		all = append(all, netip.MustParsePrefix(t))
	}
	return all
}

// Address says whether a connection may lead to an address.
func (g Guard) Address(a netip.Addr) error {
	a = a.Unmap().WithZone("")
	in := func(p netip.Prefix) bool { return p.Contains(a) }
	switch {
	case slices.ContainsFunc(g.Allow, in):
		return nil
	case !a.IsGlobalUnicast() || a.IsPrivate() || slices.ContainsFunc(special, in):
		return fmt.Errorf("%s: %w", a, ErrForbidden)
	}
	return nil
}

// URL checks a webhook's address as far as it can be told without looking its
// name up.
func (g Guard) URL(text string) error {
	u, err := url.Parse(text)
	if err != nil || len(text) > 2000 {
		return errors.New("it is no URL")
	}
	switch {
	case u.Scheme != "https" && (u.Scheme != "http" || !g.AllowHTTP):
		return errors.New("its URL does not begin with https://")
	case u.Hostname() == "":
		return errors.New("its URL has no host")
	case u.User != nil || u.Fragment != "":
		return errors.New("its URL has a user or a fragment")
	}
	if a, err := netip.ParseAddr(u.Hostname()); err == nil {
		return g.Address(a)
	}
	return nil
}

// control runs when the name has been looked up and before the connection is
// made: a name that leads to another address each time gains nothing.
func (g Guard) control(_ context.Context, _, address string, _ syscall.RawConn) error {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	return g.Address(a.Addr())
}

// Timeout is that of one attempt.
const Timeout = 10 * time.Second

// Client makes the connections: no proxy of the environment, no redirects, no
// connection kept.
func (g Guard) Client() *http.Client {
	dialer := &net.Dialer{Timeout: Timeout / 2, ControlContext: g.control}
	return &http.Client{
		Timeout:       Timeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialContext: dialer.DialContext, DisableKeepAlives: true, TLSHandshakeTimeout: Timeout / 2,
			ResponseHeaderTimeout: Timeout, MaxResponseHeaderBytes: 16 << 10, ForceAttemptHTTP2: true,
		},
	}
}
