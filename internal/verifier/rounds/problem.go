package rounds

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"strconv"

	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/nodeapi"
	"virt-trust/internal/verifier/store"
)

// statuses are those of codes; others are 403.
var statuses = map[ca.Code]int{
	ca.Malformed: http.StatusBadRequest, ca.TooLarge: http.StatusRequestEntityTooLarge, ca.TooMany: http.StatusTooManyRequests,
	ca.Busy: http.StatusConflict, ca.NonceBad: http.StatusConflict, ca.Failed: http.StatusServiceUnavailable,
	ca.NoCertificate: http.StatusUnauthorized, ca.CertificateNo: http.StatusUnauthorized,
	ca.NodeUnknown: http.StatusGone, ca.Enrolment: http.StatusNotFound, ca.NoList: http.StatusNotFound, ca.EKUnparsable: http.StatusBadRequest, ca.NameBad: http.StatusBadRequest,
	ca.NameTaken: http.StatusConflict, ca.EKKnown: http.StatusConflict, ca.AKSwapped: http.StatusConflict, ca.KeysSwapped: http.StatusConflict,
}

// serve writes what a handler gives, and is the one place that logs.
func (h *Handler) serve(f handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		status, answer, err := h.recovered(f, r)
		if err != nil {
			h.refuse(w, r, err)
			return
		}
		body, err := json.Marshal(answer)
		if err != nil {
			h.refuse(w, r, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(status)
		_, _ = w.Write(body)
	}
}

func (h *Handler) recovered(f handler, r *http.Request) (status int, answer any, err error) {
	defer func() {
		if p := recover(); p != nil {
			h.Log.WithField("stack", string(debug.Stack())).Errorf("panic: %v", p)
			err = errors.New("the Verifier has a bug here: see its journal")
		}
	}()
	return f(r)
}

// refuse answers with a Problem. What is not a Refusal is the Verifier's own
// trouble, about which others learn nothing.
func (h *Handler) refuse(w http.ResponseWriter, r *http.Request, err error) {
	log := h.Log.WithField("remote", r.RemoteAddr).WithField("path", r.URL.Path)
	refusal := ca.AsRefusal(err)
	switch {
	case refusal != nil:
		log.WithField("reason", string(refusal.Code)).Info("refused: " + refusal.What)
	case errors.Is(err, store.ErrUnavailable):
		log.WithError(err).Warn("the database does not answer")
		refusal = &ca.Refusal{Code: ca.Failed, What: "the Verifier's database does not answer; try again"}
	case errors.Is(err, store.ErrLimit):
		refusal = &ca.Refusal{Code: ca.TooMany, What: "too many at once; try again"}
	case r.Context().Err() != nil:
		return // nobody hears it any more
	default:
		log.WithError(err).Error("could not be answered")
		refusal = &ca.Refusal{Code: ca.Failed, What: "the Verifier failed; see its journal"}
	}
	h.Observe.Refused(refusal.Code)
	status, ok := statuses[refusal.Code]
	if !ok {
		status = http.StatusForbidden
	}
	if status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "30")
	}
	w.Header().Set("Content-Type", nodeapi.ProblemType)
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(nodeapi.Problem{
		Type: "about:blank", Title: http.StatusText(status), Status: status, Detail: refusal.What, Code: refusal.Code,
	})
}

func refuse(code ca.Code, format string, args ...any) error {
	return &ca.Refusal{Code: code, What: fmt.Sprintf(format, args...)}
}
