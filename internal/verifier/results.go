package verifier

import (
	"crypto"
	"sync/atomic"

	"virt-trust/internal/appraise/ear"
	"virt-trust/internal/verifier/resultkeys"
)

// results signs Attestation Results with the first key of a file, which a reload
// reads anew: it is an api.Results.
type results struct {
	path, build string
	atomic.Pointer[ear.Issuer]
}

func newResults(path, build string) (*results, error) {
	r := &results{path: path, build: build}
	return r, r.load()
}

func (r *results) load() error {
	keys, err := resultkeys.Read(r.path)
	if err != nil {
		return err
	}
	i := &ear.Issuer{Signer: keys[0], Build: r.build}
	for _, k := range keys[1:] {
		i.Before = append(i.Before, crypto.PublicKey(k.Public()))
	}
	r.Store(i)
	return nil
}
