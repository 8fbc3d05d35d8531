// Package rounds is the Verifier's side towards nodes: enrolment, certificates,
// nonces, and Evidence, which it has appraised and puts into the store.
//
// It keeps nothing that the store does not have, but for caches: any replica
// takes up what another began, and a restart loses no more than the requests that
// are under way. What goes wrong in a round makes its result None; a result never
// outlives its time.
package rounds

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net/http"
	"runtime"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/appraise"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/store"
)

// Policy is what counts now.
type Policy struct {
	Appraisal *appraise.Policy
	Learn     bool // what a first good round shows becomes Reference Values, of nodes that learn
}

// Options are what the Verifier's body knows. Store, CA, Manufacturers, Policy and
// Log have to be there; of the others zero means the value in brackets.
type Options struct {
	Store         *store.Store
	CA            *ca.Authority
	Manufacturers *ca.Manufacturers
	Policy        func(context.Context) (Policy, error) // asked in each round: cheap
	Rules         ca.Rules
	Log           *logrus.Entry

	Interval  time.Duration    // between two rounds of a node [1 min]
	Anonymous int              // requests a minute of one address that nobody vouches for, and of each who is vouched for [120]
	InFlight  int64            // bytes of Evidence that are held at once [256 MiB]
	AtOnce    int              // Evidences that are appraised at once [4 for each processor]
	Now       func() time.Time // [time.Now]
	Random    io.Reader        // [crypto/rand]
	Observe   Observer         // [nobody]
}

// Observer is told what happens, for metrics. Its methods return at once.
type Observer interface {
	// Round is one that was appraised and stored, or failed: err is why.
	Round(tier appraise.Tier, bytes int, took time.Duration, err error)
	// Refused is a request that was refused, with its code.
	Refused(code ca.Code)
	// Enrolled is a node that was let in, or waits.
	Enrolled(state string)
}

type nobody struct{}

func (nobody) Round(appraise.Tier, int, time.Duration, error) {}
func (nobody) Refused(ca.Code)                                {}
func (nobody) Enrolled(string)                                {}

// Handler serves /v1/enrolments, /v1/enrolments/{id}, /v1/nodes/{id}/… and /v1/crl.
type Handler struct {
	Options
	mux       *http.ServeMux
	anonymous *rates // by address, as are doubtful
	doubtful  *rates
	proven    *rates // by what a request has shown
	budget    budget
	places    places
	busy      sync.Map // IDs of nodes whose Evidence is at work
	nodes     nodes    // caches
	shown     shown
	lists     lists
}

// New makes the handler.
func New(o Options) (*Handler, error) {
	if o.Store == nil || o.CA == nil || o.Manufacturers == nil || o.Policy == nil || o.Log == nil {
		return nil, errors.New("rounds: store, CA, manufacturers, policy and log are needed")
	}
	if o.Interval <= 0 {
		o.Interval = time.Minute
	}
	if o.Anonymous <= 0 {
		o.Anonymous = 120
	}
	if o.InFlight <= 0 {
		o.InFlight = 4 * report.MaxEvidence
	}
	if o.AtOnce <= 0 {
		o.AtOnce = 4 * runtime.GOMAXPROCS(0) // some wait for the database
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Random == nil {
		o.Random = rand.Reader
	}
	if o.Observe == nil {
		o.Observe = nobody{}
	}
	h := &Handler{Options: o, mux: http.NewServeMux(), anonymous: newRates(o.Anonymous), doubtful: newRates(doubtRate * o.Anonymous), proven: newRates(o.Anonymous), places: make(places, o.AtOnce)}
	h.budget.left = o.InFlight
	h.mux.HandleFunc("POST /v1/enrolments", h.unknown(h.begin))
	h.mux.HandleFunc("POST /v1/enrolments/{id}", h.unknown(h.finish))
	h.mux.HandleFunc("POST /v1/nodes/{id}/challenges", h.unknown(h.challenge))
	h.mux.HandleFunc("POST /v1/nodes/{id}/certificates", h.unknown(h.certificate))
	h.mux.HandleFunc("POST /v1/nodes/{id}/rounds", h.known(h.round))
	h.mux.HandleFunc("POST /v1/nodes/{id}/evidence", h.known(h.evidence))
	h.mux.HandleFunc("GET "+CRLPath, h.crl)
	return h, nil
}

// Patterns are those that the handler wants to be given.
func Patterns() []string {
	return []string{
		"POST /v1/enrolments", "POST /v1/enrolments/{id}", "POST /v1/nodes/{id}/challenges", "POST /v1/nodes/{id}/certificates",
		"POST /v1/nodes/{id}/rounds", "POST /v1/nodes/{id}/evidence", "GET " + CRLPath,
	}
}

func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) { h.mux.ServeHTTP(w, r) }

// now is the time, without the monotonic reading: it is compared with times out of
// certificates and the store.
func (h *Handler) now() time.Time { return h.Now().Round(0) }

// handler is a request's: what it gives is the answer in JSON, with its status.
type handler func(*http.Request) (status int, answer any, err error)

var tooMany = &ca.Refusal{Code: ca.TooMany, What: "too many requests from this address; try again in a minute"}

// unknown serves requests of those who need no certificate, as often as they, or else
// their address, may.
func (h *Handler) unknown(f handler) http.HandlerFunc {
	return h.serve(func(r *http.Request) (int, any, error) {
		r, err := h.charged(r)
		if err != nil {
			return 0, nil, err
		}
		return f(r)
	})
}

// known serves requests of nodes: the certificate has to be that of the node in
// the address.
func (h *Handler) known(f func(*http.Request, ca.Identity) (int, any, error)) http.HandlerFunc {
	return h.serve(func(r *http.Request) (int, any, error) {
		if r.TLS == nil {
			return 0, nil, &ca.Refusal{Code: ca.NoCertificate, What: "a node's certificate is needed"}
		}
		id, err := h.CA.VerifyNode(r.TLS.VerifiedChains, h.now())
		if err != nil {
			return 0, nil, err
		}
		if id.Node != r.PathValue("id") {
			return 0, nil, &ca.Refusal{Code: ca.OtherNode, What: "the certificate is that of another node", Node: id.Node}
		}
		return f(r, id)
	})
}
