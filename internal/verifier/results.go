package verifier

import (
	"sync/atomic"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/resultkeys"
)

// results signs Attestation Results with the first key of a file, which a reload
// reads anew.
type results struct {
	path, name string // name is the Verifier's own
	keys       atomic.Pointer[resultkeys.Keys]
}

func newResults(path, name string) (*results, error) {
	r := &results{path: path, name: name}
	return r, r.load()
}

func (r *results) load() error {
	k, err := resultkeys.Read(r.path)
	if err != nil {
		return err
	}
	r.keys.Store(&k)
	return nil
}

// Key is the one that signs: of api.Results.
func (r *results) Key() string { return (*r.keys.Load())[0].ID }

// KeySet has all public keys: of api.Results.
func (r *results) KeySet() ([]byte, error) { return r.keys.Load().Set() }

// Sign gives the EAR: of api.Results.
func (r *results) Sign(res *appraise.Result, vm string) (string, error) {
	k := (*r.keys.Load())[0]
	return sign(k.Private, k.ID, r.name, res, vm)
}
