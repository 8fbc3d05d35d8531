package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"virt-trust/internal/verifier/login"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
)

// Problem is what went wrong (RFC 9457). Programs go by Code.
type Problem struct {
	Type   string `json:"type"` // urn:virt-trust:problem:CODE
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail,omitempty"`
	Code   string `json:"code"`

	retry time.Duration // when to try again; 0: nothing is said
}

func (p *Problem) Error() string { return p.Code + ": " + p.Detail }

// The codes, each with its status and title. They are stable.
const (
	Unauthenticated = "unauthenticated"
	TokenRefused    = "token-refused"
	Forbidden       = "forbidden"
	CrossOrigin     = "cross-origin"
	NotFound        = "not-found"
	Conflict        = "conflict"
	SamePerson      = "same-person"
	Invalid         = "invalid"
	TooLarge        = "too-large"
	TooMany         = "too-many-requests"
	ReceiverFailed  = "receiver-failed"
	Unavailable     = "unavailable"
	Failed          = "failed"
)

var problems = map[string]struct {
	status int
	title  string
}{
	Unauthenticated: {http.StatusUnauthorized, "Say who you are, with a token"},
	TokenRefused:    {http.StatusUnauthorized, "The token is not valid"},
	Forbidden:       {http.StatusForbidden, "Your role may not do this"},
	CrossOrigin:     {http.StatusForbidden, "Another site asked for this"},
	NotFound:        {http.StatusNotFound, "There is none"},
	Conflict:        {http.StatusConflict, "Not in its present state"},
	SamePerson:      {http.StatusConflict, "A second person has to approve"},
	Invalid:         {http.StatusBadRequest, "The request makes no sense"},
	TooLarge:        {http.StatusRequestEntityTooLarge, "The request is too large"},
	TooMany:         {http.StatusTooManyRequests, "Too many requests"},
	ReceiverFailed:  {http.StatusBadGateway, "The webhook's receiver did not take it"},
	Unavailable:     {http.StatusServiceUnavailable, "The database does not answer"},
	Failed:          {http.StatusInternalServerError, "The Verifier failed"},
}

// retryAfter is said where the database is away.
const retryAfter = 5 * time.Second

// problem makes a Problem with one of the codes.
func problem(code, format string, args ...any) *Problem {
	p := problems[code]
	return &Problem{Type: "urn:virt-trust:problem:" + code, Title: p.title, Status: p.status, Detail: fmt.Sprintf(format, args...), Code: code}
}

// problemOf says what an error is to the one who asked. What only an operator
// has to know is not in it: the second value says that it is to be logged.
func problemOf(err error) (p *Problem, ours bool) {
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &p):
		return p, false
	case errors.Is(err, store.ErrUnavailable), errors.Is(err, login.ErrUnavailable):
		p = problem(Unavailable, "Try again in a moment.")
		p.retry = retryAfter
		return p, true
	case errors.Is(err, operate.ErrUnauthenticated):
		return problem(Unauthenticated, "A bearer token is missing, or a session."), false
	case errors.Is(err, login.ErrRefused):
		return problem(TokenRefused, "%v", login.ErrRefused), false
	case errors.Is(err, operate.ErrForbidden):
		return problem(Forbidden, "%v", err), false
	case errors.Is(err, operate.ErrSamePerson):
		return problem(SamePerson, "%v", err), false
	case errors.Is(err, operate.ErrNotFound), errors.Is(err, store.ErrNotFound):
		return problem(NotFound, "%v", err), false
	case errors.Is(err, operate.ErrConflict):
		return problem(Conflict, "%v", err), false
	case errors.Is(err, operate.ErrInvalid), errors.Is(err, store.ErrInvalid):
		return problem(Invalid, "%v", err), false
	case errors.As(err, &tooLarge):
		return problem(TooLarge, "At most %d bytes.", tooLarge.Limit), false
	}
	return problem(Failed, "It was logged."), true
}

// write answers with the problem.
func (p *Problem) write(w http.ResponseWriter) {
	h := w.Header()
	h.Del("ETag")
	h.Set("Content-Type", "application/problem+json")
	h.Set("Cache-Control", "no-store")
	if p.retry > 0 {
		h.Set("Retry-After", strconv.Itoa(int(p.retry.Seconds()+0.999)))
	}
	if p.Status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", `Bearer realm="virt-trust"`)
	}
	w.WriteHeader(p.Status)
	json.NewEncoder(w).Encode(p) // who asked may be gone
}

// DenyCrossOrigin answers what another site's page made a browser send.
func DenyCrossOrigin(w http.ResponseWriter) {
	problem(CrossOrigin, "A browser sends this from the Verifier's own page alone.").write(w)
}
