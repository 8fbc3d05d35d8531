package rounds

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"sync"
	"time"

	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/store"
)

// CRLPath is where the CA's revocation list is.
const CRLPath = "/v1/crl"

// How often it is looked whether somebody was revoked, and how old a list becomes:
// who fetches it has most of its life left.
const (
	crlLook = 30 * time.Second
	crlAge  = ca.CRLLifetime / 4
)

// lists keeps the revocation list that was looked at last.
type lists struct {
	mu     sync.Mutex
	looked time.Time
	newest store.CRL
}

// crl serves the revocation list to everybody: it is no secret, and costs nothing but
// when it changes.
func (h *Handler) crl(w http.ResponseWriter, r *http.Request) {
	c, err := h.lately(r)
	if err != nil {
		h.refuse(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/pkix-crl") // RFC 2585, 4.2
	w.Header().Set("Cache-Control", "public, max-age=60")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	http.ServeContent(w, r, "", c.Made, bytes.NewReader(c.Data))
}

func (h *Handler) lately(r *http.Request) (store.CRL, error) {
	if !h.anonymous.allow(source(r), h.Now()) {
		return store.CRL{}, tooMany
	}
	if !h.CA.Lists() {
		return store.CRL{}, refuse(ca.NoList, "the CA's certificate signs no revocation lists: 'virt-trust-verifier init' makes it anew")
	}
	h.lists.mu.Lock()
	defer h.lists.mu.Unlock()
	if age := h.now().Sub(h.lists.looked); age >= 0 && age < crlLook {
		return h.lists.newest, nil
	}
	c, err := h.list(r.Context())
	if err == nil {
		h.lists.looked, h.lists.newest = h.now(), c
	}
	return c, err
}

// list gives the newest list, and makes it where there is none, or what is in it has
// changed.
func (h *Handler) list(ctx context.Context) (store.CRL, error) {
	for {
		last, err := h.Store.CRL(ctx)
		if err != nil {
			return last, err
		}
		revoked, err := h.Store.RevokedCertificates(ctx)
		if err != nil {
			return last, err
		}
		entries, digest, err := entriesOf(h.CA, revoked)
		if err != nil {
			return last, err
		}
		now := h.now()
		if bytes.Equal(digest, last.Digest) && now.Sub(last.Made).Abs() < crlAge { // replicas' clocks differ
			return last, nil
		}
		// The time: a number rises also where the store is an older one.
		c := store.CRL{Number: max(last.Number+1, now.Unix()), Made: now, Digest: digest}
		if c.Data, err = h.CA.CRL(c.Number, entries, now); err != nil {
			return c, err
		}
		err = h.Store.Do(ctx, func(tx *store.Tx) error { return tx.PutCRL(ctx, last.Number, c) })
		if !errors.Is(err, store.ErrVersion) { // else another replica was quicker
			return c, err
		}
	}
}

func entriesOf(a *ca.Authority, revoked []store.Revoked) (all []x509.RevocationListEntry, digest []byte, err error) {
	d := sha256.New()
	fmt.Fprintf(d, "%x\n", a.Certificate().Raw)
	for _, r := range revoked {
		n, ok := new(big.Int).SetString(r.Serial, 16)
		if !ok || n.Sign() <= 0 {
			return nil, nil, fmt.Errorf("a certificate in the store has no serial number: %q", r.Serial)
		}
		all = append(all, x509.RevocationListEntry{SerialNumber: n, RevocationTime: r.At})
		fmt.Fprintf(d, "%s %d\n", r.Serial, r.At.Unix())
	}
	return all, d.Sum(nil), nil
}
