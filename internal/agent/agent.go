// Package agent is virt-trust-agent: it brings a host's Evidence to the Verifier,
// round by round, and the node's certificates back.
//
// It is not trusted. What it carries was signed in the TPM over words that it
// cannot choose, so that a compromised agent can keep Evidence back, and no more.
// What it has of its own is the key of its TLS connections, in memory alone, and
// which Verifier the host belongs to.
package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"sync"
	"time"

	sddaemon "github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"

	"virt-trust/internal/bus"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/nodeapi"
)

// Options are what main knows.
type Options struct {
	Config  config.Agent
	Dir     string // /var/lib/virt-trust-agent
	Version string
	Log     *logrus.Entry
}

// States of the agent, as on D-Bus.
const (
	NotEnrolled = "not-enrolled"
	Pending     = "pending" // an operator has not approved the node yet
	Active      = "active"
	Refused     = "refused"     // the Verifier does not take this node: Status.LastError
	Unreachable = "unreachable" // the Verifier, or virt-trustd
)

// Status is what is to be seen of the agent.
type Status struct {
	State              string
	Verifier           string // URL
	Node, Name         string
	CertificateExpires time.Time // zero without one
	LastRound          time.Time // that the Verifier took
	LastTier           string    // of the host, then
	LastError          string    // "" while all is well
}

// Agent is the host's tie to its Verifier.
type Agent struct {
	dir     string
	host    Host
	log     *logrus.Entry
	changed func(Status) // told of each change
	wake    chan struct{}
	pace    pace
	address string // of the pull API, for the Verifier to show; "" without one

	working sync.Mutex // held while the Verifier is spoken to: by the loop, or for an Enroll

	mu     sync.Mutex
	status Status
	cert   *tls.Certificate // the node's, for the pull API

	// Of the loop, under working.
	m       *membership
	client  *client
	renewAt time.Time // monotonic
	next    *nodeapi.Round
	gotNext time.Time
	pending bool
	tries   int
}

// pace is how long the agent waits for what; tests are in a hurry.
type pace struct {
	least, most time.Duration // between tries
	approval    time.Duration // until the Verifier is asked again whether an operator has approved
	refused     time.Duration // and whether a refusal still holds
}

var usualPace = pace{least: time.Second, most: time.Minute, approval: 30 * time.Second, refused: 5 * time.Minute}

// newAgent reads what is kept in dir.
func newAgent(dir string, host Host, log *logrus.Entry, p pace) (*Agent, error) {
	m, err := load(dir)
	if err != nil {
		return nil, fmt.Errorf("%w; 'virt-trust enroll' writes it anew", err)
	}
	a := &Agent{dir: dir, host: host, log: log, wake: make(chan struct{}, 1), pace: p, changed: func(Status) {}}
	a.belong(m)
	return a, nil
}

// belong makes m, nil for none, what the loop works for.
func (a *Agent) belong(m *membership) {
	if a.client != nil {
		a.client.close()
	}
	a.m, a.client, a.next, a.pending, a.tries, a.renewAt = m, nil, nil, false, 0, time.Time{}
	a.set(func(s *Status) {
		*s = Status{State: NotEnrolled}
		if m != nil {
			*s = Status{State: Unreachable, Verifier: m.URL, Node: m.Node, Name: m.Name}
		}
	})
	a.mu.Lock()
	a.cert = nil
	a.mu.Unlock()
}

// Status gives what is to be seen now.
func (a *Agent) Status() Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.status
}

func (a *Agent) set(f func(*Status)) {
	a.mu.Lock()
	before := a.status
	f(&a.status)
	now := a.status
	a.mu.Unlock()
	if now != before {
		a.changed(now)
	}
}

// loop works until ctx ends. alive is called at least every few minutes.
func (a *Agent) loop(ctx context.Context, alive func()) {
	for ctx.Err() == nil {
		wait := a.turn(ctx)
		alive()
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-t.C:
		case <-a.wake:
		}
		t.Stop()
	}
}

// stepTime bounds one step: a request, and what the TPM has to do for it.
const stepTime = 4 * time.Minute

// idle is how often an agent looks around that has nothing to do.
const idle = time.Minute

// turn does the next step and says how long to wait for the one after it.
func (a *Agent) turn(ctx context.Context) time.Duration {
	a.working.Lock()
	defer a.working.Unlock()
	if a.m == nil {
		return idle
	}
	inTime, cancel := context.WithTimeout(ctx, stepTime)
	defer cancel()
	wait, err := a.step(inTime)
	switch {
	case err == nil:
		a.tries = 0
		return max(wait, 0)
	case ctx.Err() != nil: // the agent ends
		return 0
	}
	return a.after(inTime, err)
}

// step does what is next: a certificate, a nonce, Evidence.
func (a *Agent) step(ctx context.Context) (time.Duration, error) {
	switch {
	case a.certificate() == nil || a.pending || !time.Now().Before(a.renewAt):
		return 0, a.renew(ctx)
	case a.next == nil:
		var r nodeapi.Round
		if _, err := a.client.call(ctx, "/v1/nodes/"+a.m.Node+"/rounds", nil, &r); err != nil {
			return 0, err
		}
		first := a.Status().LastRound.IsZero()
		a.take(&r)
		if first {
			return 0, nil // as soon as it can be: there is nothing to see yet
		}
		return a.due(), nil
	}
	if wait := a.due(); wait > 0 && !a.Status().LastRound.IsZero() {
		return wait, nil
	}
	return a.round(ctx)
}

// interval is that of a Verifier, within what makes sense.
func interval(r *nodeapi.Round) time.Duration {
	return time.Duration(min(max(r.Interval, 0.1), 3600) * float64(time.Second))
}

func (a *Agent) take(r *nodeapi.Round) {
	a.next, a.gotNext = r, time.Now()
}

// due is how long it is until the next Evidence. Before the certificate has to be
// renewed there is always time for that.
func (a *Agent) due() time.Duration {
	return min(interval(a.next)-time.Since(a.gotNext), max(time.Until(a.renewAt), 0)+time.Millisecond)
}

// round sends Evidence.
func (a *Agent) round(ctx context.Context) (time.Duration, error) {
	r := a.next
	a.next = nil // a nonce is for one try: if it was not taken, a new one is asked for
	if len(r.Nonce) < 16 || len(r.Nonce) > 64 || len(r.Have) > 16 {
		return 0, errors.New("the Verifier gave a nonce out of bounds")
	}
	evidence, err := a.host.Evidence(ctx, r.Nonce, bus.Have{Boot: r.HaveBoot, Offsets: r.Have})
	if err != nil {
		return 0, fmt.Errorf("virt-trustd gives no evidence: %w", err)
	}
	var o nodeapi.Outcome
	if err := a.client.sendEvidence(ctx, a.m.Node, evidence, &o); err != nil {
		return 0, err
	}
	a.set(func(s *Status) {
		s.State, s.LastRound, s.LastTier, s.LastError = Active, time.Now(), o.Tier.String(), ""
	})
	if o.Next == nil {
		return interval(r), nil
	}
	a.take(o.Next)
	return a.due(), nil
}

// certificate gives the node's, if it has one.
func (a *Agent) certificate() *tls.Certificate {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cert
}

// renew gets a certificate over a new TLS key.
func (a *Agent) renew(ctx context.Context) error {
	c := newClient(a.url(), ca.PinOf(a.m.ca), nil)
	defer c.close()
	key, err := newKey()
	if err != nil {
		return err
	}
	var challenge nodeapi.Challenge
	if _, err := c.call(ctx, "/v1/nodes/"+a.m.Node+"/challenges", nil, &challenge); err != nil {
		return err
	}
	q := nodeapi.CertificateRequest{Nonce: challenge.Nonce, SPKI: key.spki, Certifier: a.wantsCertifier(ctx)}
	if q.Attest, q.Signature, err = a.host.QuoteKey(ctx, q.Nonce, q.SPKI); err != nil {
		return fmt.Errorf("virt-trustd does not vouch for the agent's key: %w", err)
	}
	var m nodeapi.Membership
	if _, err := c.call(ctx, "/v1/nodes/"+a.m.Node+"/certificates", q, &m); err != nil {
		return err
	}
	return a.join(ctx, &m, key)
}

// errPending says that an operator has to approve the node.
var errPending = errors.New("the node waits for an operator of the Verifier to approve it")

// join takes what the Verifier gave: certificates, or word that it waits.
func (a *Agent) join(ctx context.Context, m *nodeapi.Membership, key *tlsKey) error {
	if m.State != fleet.Active {
		a.pending = true
		return errPending
	}
	cert, err := key.certificate(m.CertificateChain, a.m)
	if err != nil {
		return err
	}
	if m.CertifierChain != "" {
		// Without it the EK certificates of vTPMs do not chain to the CA, and the node is
		// one all the same.
		if err := a.host.SetCertifierCertificate(ctx, []byte(m.CertifierChain)); err != nil {
			a.log.WithError(err).Warn("virt-trustd does not take the certificate of its certifier")
		}
	}
	a.m.Certificate = cert.Leaf.Raw
	if err := a.m.save(a.dir); err != nil {
		return fmt.Errorf("keeping the membership: %w", err)
	}
	if a.client != nil {
		a.client.close()
	}
	a.client = newClient(a.url(), ca.PinOf(a.m.ca), cert)
	lifetime := cert.Leaf.NotAfter.Sub(cert.Leaf.NotBefore)
	a.renewAt = time.Now().Add(lifetime/2 - time.Duration(rand.Int64N(int64(lifetime/10)+1)))
	a.pending = false
	a.mu.Lock()
	a.cert = cert
	a.mu.Unlock()
	a.set(func(s *Status) {
		s.State, s.CertificateExpires, s.LastError = Active, cert.Leaf.NotAfter, ""
	})
	a.log.WithField("node", a.m.Node).WithField("serial", ca.Serial(cert.Leaf)).Info("the Verifier gave the node a certificate")
	return nil
}

func (a *Agent) url() *url.URL {
	u, err := parseURL(a.m.URL)
	if err != nil { // it was looked at when the membership was read, or made
		panic(err)
	}
	return u
}

// wantsCertifier reports whether the certifier lacks a certificate by this CA, or
// has one that is half over.
func (a *Agent) wantsCertifier(ctx context.Context) bool {
	i, err := a.host.Identity(ctx)
	if err != nil {
		return false
	}
	c, err := x509.ParseCertificate(i.CertifierCertificate)
	if err != nil || c.CheckSignatureFrom(a.m.ca) != nil {
		return true
	}
	return time.Now().After(c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) / 2))
}

// after says what an error leads to, and how long to wait.
func (a *Agent) after(ctx context.Context, err error) time.Duration {
	a.next = nil
	a.tries++
	if errors.Is(err, errPending) {
		a.tries = 0
		a.set(func(s *Status) { s.State, s.LastError = Pending, err.Error() })
		return jitter(a.pace.approval)
	}
	var answer *answerError
	wait := jitter(a.backoff())
	state := Unreachable
	if errors.As(err, &answer) {
		// Those who were sent away together must not come back together.
		wait = max(wait, answer.after+jitter(answer.after))
		state = Active // the Verifier is there
		switch answer.Code {
		case ca.NodeUnknown:
			if err = a.enrolAgain(ctx); err == nil {
				a.tries = 0
				return 0
			}
			if errors.Is(err, errPending) {
				return a.after(ctx, err)
			}
			state = Refused
		case ca.NodePending:
			a.pending = true
			return a.after(ctx, errPending)
		case ca.NoCertificate, ca.CertificateNo, ca.OtherNode:
			a.renewAt = time.Time{}
		case ca.NodeRevoked, ca.KeyNotQuoted:
			state, wait = Refused, jitter(a.pace.refused)
			a.renewAt = time.Time{}
		}
	} else if a.tries%3 == 0 {
		// It may be our certificate that the Verifier does not like: TLS does not say.
		a.renewAt = time.Time{}
	}
	if entry := a.log.WithError(err).WithField("tries", a.tries); state == Refused && a.Status().State != Refused {
		entry.WithField(journal.ID, journal.NodeRefused).Error("the Verifier refuses this node")
	} else if a.tries%20 == 0 {
		entry.WithField(journal.ID, journal.VerifierAway).Warn("no round with the Verifier for a while")
	} else if a.tries == 1 {
		entry.Info("no round with the Verifier")
	}
	a.set(func(s *Status) {
		if state != Active {
			s.State = state
		}
		s.LastError = err.Error()
	})
	return wait
}

// backoff doubles with each try.
func (a *Agent) backoff() time.Duration {
	return min(a.pace.least<<min(a.tries-1, 16), a.pace.most)
}

// jitter gives between half of d and d.
func jitter(d time.Duration) time.Duration {
	return d/2 + time.Duration(rand.Int64N(int64(d/2)+1))
}

// poke has the loop look at once.
func (a *Agent) poke() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// watchdog tells systemd that the loop goes round. A Verifier or a TPM that hangs
// is no reason to be started anew: each step has an end.
func watchdog(ctx context.Context, alive func() time.Time) {
	t := time.NewTicker(10 * time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if time.Since(alive()) < 3*stepTime {
			_, _ = sddaemon.SdNotify(false, sddaemon.SdNotifyWatchdog)
		}
	}
}
