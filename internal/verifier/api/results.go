package api

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
)

// EARType is the media type of an Attestation Result (RFC 9782, 4).
const EARType = "application/eat+jwt"

// signed keeps the last signed result of each subject: it is signed anew only
// when it, or the key, has changed.
type signed struct {
	mu   sync.Mutex
	by   map[string]signedResult
	most int
}

type signedResult struct{ state, token string }

func newSigned() *signed { return &signed{by: map[string]signedResult{}, most: 50_000} }

// get gives the token of a subject in a state, making it where it has to.
func (s *signed) get(subject, state string, sign func() (string, error)) (string, error) {
	s.mu.Lock()
	have, ok := s.by[subject]
	s.mu.Unlock()
	if ok && have.state == state {
		return have.token, nil
	}
	token, err := sign()
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.by[subject]; !ok && len(s.by) >= s.most {
		clear(s.by) // it fills again with what is asked for
	}
	s.by[subject] = signedResult{state, token}
	return token, nil
}

func (a *API) nodeResult(r *request) (any, error) {
	id := r.PathValue("node")
	res, err := a.Store.Result(r.Context(), id)
	if err != nil {
		return nil, err
	}
	return a.result(r, res, "")
}

// CodeTwoNodes is the reason where two nodes say that a VM runs: one of them has
// a copy of it, and which cannot be told.
const CodeTwoNodes = "vm-runs-twice"

func (a *API) vmResult(r *request) (any, error) {
	uuid := r.PathValue("vm")
	vms, _, err := a.Store.VMs(r.Context(), store.VMFilter{UUID: uuid}, store.Page{Limit: 100})
	if err != nil {
		return nil, err
	}
	if len(vms) == 0 {
		return nil, fmt.Errorf("%w: no node has a VM %.40q", operate.ErrNotFound, uuid)
	}
	vm, several := choose(vms, a.Now())
	res, err := a.Store.Result(r.Context(), vm.Node)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(res.VMs, func(v appraise.VM) bool { return v.UUID == uuid })
	if i < 0 { // a round came between the two reads
		return nil, fmt.Errorf("%w: node %s has no VM %.40q any more", operate.ErrNotFound, vm.Node, uuid)
	}
	if several {
		res.VMs = slices.Clone(res.VMs)
		res.VMs[i].Appraisal = appraise.Appraisal{Reasons: []appraise.Reason{{Code: CodeTwoNodes, What: "two nodes say that it runs there"}}}
	}
	return a.result(r, res, uuid)
}

// choose takes the node where a VM runs, or had it last. The second value says
// that it runs on several. What a node said that is silent since counts only where
// no other has the VM: its host may have died, and the VM been started elsewhere.
func choose(vms []fleet.VM, now time.Time) (fleet.VM, bool) {
	silent := func(v fleet.VM) bool { return !v.Expires.After(now) }
	if fresh := slices.DeleteFunc(slices.Clone(vms), silent); len(fresh) > 0 {
		vms = fresh
	}
	best := slices.MaxFunc(vms, func(x, y fleet.VM) int {
		if x.Running != y.Running {
			if x.Running {
				return 1
			}
			return -1
		}
		return cmp.Or(x.Changed.Compare(y.Changed), cmp.Compare(x.Node, y.Node))
	})
	running := 0
	for _, v := range vms {
		if v.Running {
			running++
		}
	}
	return best, running > 1
}

func (a *API) result(r *request, res *appraise.Result, vm string) (any, error) {
	issuer := a.Results()
	b, err := json.Marshal(res)
	if err != nil {
		return nil, err
	}
	if r.etag(issuer.Key(), vm, string(b)) {
		return answered{}, nil
	}
	token, err := a.signed.get(res.Node+" "+vm, r.w.Header().Get("ETag"), func() (string, error) { return issuer.Sign(res, vm) })
	if err != nil {
		return nil, errors.Join(errors.New("signing a result"), err)
	}
	r.w.Header().Set("Content-Type", EARType)
	r.w.Header().Set("Content-Length", strconv.Itoa(len(token)))
	r.w.WriteHeader(http.StatusOK)
	r.w.Write([]byte(token))
	return answered{}, nil
}

func (a *API) keys(r *request) (any, error) {
	set, err := a.Results().KeySet()
	if err != nil {
		return nil, err
	}
	if r.etag(string(set)) {
		return answered{}, nil
	}
	r.w.Header().Set("Content-Type", "application/jwk-set+json")
	r.w.Header().Set("Cache-Control", "public, max-age=60")
	r.w.Write(set)
	return answered{}, nil
}
