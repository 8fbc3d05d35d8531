package rounds

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"virt-trust/internal/evidence/quote"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/nodeapi"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/webhook"
)

// Purposes of challenges in the store.
const (
	enrolmentPurpose   = "enrolment"
	certificatePurpose = "certificate"
)

// enrolmentTime is how long a node has to activate the credential: a slow TPM
// takes a minute.
const enrolmentTime = 5 * time.Minute

// pending is what is kept of an enrolment between its two requests.
type pending struct {
	Request nodeapi.EnrolmentRequest `json:"request"` // Token is its digest by now
	Secret  []byte                   `json:"secret"`  // SHA-256
}

func (h *Handler) begin(r *http.Request) (int, any, error) {
	var q nodeapi.EnrolmentRequest
	if err := readJSON(r, &q); err != nil {
		return 0, nil, err
	}
	q.Name = ca.FoldName(q.Name)
	if len(q.Token) > 64 || len(q.Address) > 300 || !ca.ValidName(q.Name) {
		return 0, nil, refuse(ca.NameBad, "%.60q is no name for a node: a host name is", q.Name)
	}
	if q.Token != "" {
		secret, err := ca.ParseSecret(q.Token)
		if err != nil {
			return 0, nil, refuse(ca.TokenWrong, "%v", err)
		}
		q.Token = ca.TokenDigest(secret)
	}
	counted, err := h.goodToken(r.Context(), q.Token)
	if err == nil && (counted != "" || len(q.Certificate) == 0) {
		err = h.pays(r, counted)
	}
	if err != nil {
		return 0, nil, err
	}
	keys, err := keysOf(&q).Verify()
	if err != nil {
		return 0, nil, err
	}
	if counted == "" && len(q.Certificate) > 0 {
		if f := h.CA.Former(q.Certificate, keys); f != nil {
			counted = "node " + f.Node
		}
		if err := h.pays(r, counted); err != nil {
			return 0, nil, err
		}
	}
	if _, err := h.ekTrust(keys, q.EKCertificate); err != nil {
		return 0, nil, err
	}
	secret, id := make([]byte, 32), make([]byte, 16)
	if err := errors.Join(h.random(secret), h.random(id)); err != nil {
		return 0, nil, err
	}
	c := nodeapi.EnrolmentChallenge{ID: hex.EncodeToString(id)}
	if c.IDObject, c.EncryptedSecret, err = quote.MakeCredential(h.Random, keys.EK, keys.AK.Name, secret); err != nil {
		return 0, nil, refuse(ca.EKUnparsable, "the EK: %v", err)
	}
	digest := sha256.Sum256(secret)
	data, err := json.Marshal(pending{q, digest[:]})
	if err != nil {
		return 0, nil, err
	}
	if err := h.Store.PutChallenge(r.Context(), fleet.Challenge{
		ID: c.ID, Purpose: enrolmentPurpose, Source: cmp.Or(counted, source(r)), Data: data, Expires: h.now().Add(enrolmentTime),
	}); err != nil {
		return 0, nil, err
	}
	return http.StatusCreated, c, nil
}

// goodToken says for whom an enrolment is counted that has a join token with which a
// node could be let in; "" where it has none.
func (h *Handler) goodToken(ctx context.Context, digest string) (string, error) {
	if digest == "" {
		return "", nil
	}
	t, err := h.Store.Token(ctx, digest)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return "", nil
	case err == nil && t.Used.IsZero() && t.Expires.After(h.now()):
		return "token " + t.Digest, nil
	}
	return "", err
}

func (h *Handler) random(b []byte) error {
	_, err := io.ReadFull(h.Random, b)
	return err
}

func keysOf(q *nodeapi.EnrolmentRequest) *ca.Keys {
	return &ca.Keys{
		EK: q.EK, AK: q.AK, Bind: q.Bind, Certifier: q.Certifier, BindAttest: q.BindAttest, BindSignature: q.BindSignature,
		CertifierAttest: q.CertifierAttest, CertifierSignature: q.CertifierSignature,
	}
}

// ekTrust gives why an operator has to vouch for the EK; nil where a manufacturer
// does. An error is final.
func (h *Handler) ekTrust(k *ca.Proven, certificate []byte) (*ca.Refusal, error) {
	err := h.Manufacturers.VerifyEK(k.EK.Key, certificate, h.now())
	if doubt := ca.AsRefusal(err); doubt != nil && ca.Doubtful(doubt.Code) {
		return doubt, nil
	}
	return nil, err
}

// source is whom a challenge is counted for.
func source(r *http.Request) string {
	p, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	a := p.Addr().Unmap().WithZone("")
	if a.Is6() {
		return netip.PrefixFrom(a, 64).Masked().String()
	}
	return a.String()
}

func (h *Handler) finish(r *http.Request) (int, any, error) {
	var q nodeapi.EnrolmentAnswer
	if err := readJSON(r, &q); err != nil {
		return 0, nil, err
	}
	ctx := r.Context()
	c, err := h.Store.TakeChallenge(ctx, enrolmentPurpose, r.PathValue("id"))
	if errors.Is(err, store.ErrNotFound) {
		return 0, nil, refuse(ca.Enrolment, "there is no such enrolment, or it is over: begin anew")
	}
	if err != nil {
		return 0, nil, err
	}
	if err := h.pays(r, "challenge "+c.ID); err != nil {
		return 0, nil, err
	}
	var p pending
	if err := json.Unmarshal(c.Data, &p); err != nil {
		return 0, nil, err
	}
	digest := sha256.Sum256(q.Secret)
	if subtle.ConstantTimeCompare(digest[:], p.Secret) != 1 {
		return 0, nil, refuse(ca.Activation, "the secret is wrong: EK and AK of %q are not in one TPM", p.Request.Name)
	}
	keys, err := keysOf(&p.Request).Verify()
	if err != nil {
		return 0, nil, err
	}
	if err := ca.VerifyNodeKey(keys.AKKey, q.Secret, q.SPKI, q.Attest, q.Signature); err != nil {
		return 0, nil, err
	}
	n, err := h.admit(ctx, &p.Request, keys)
	if err != nil {
		return 0, nil, h.show(ctx, err, &p.Request, keys)
	}
	h.Observe.Enrolled(string(n.State))
	return h.membership(ctx, n, q.SPKI, true)
}

// admit decides about a node whose keys were proved, and puts it into the store.
func (h *Handler) admit(ctx context.Context, q *nodeapi.EnrolmentRequest, keys *ca.Proven) (fleet.Node, error) {
	doubt, err := h.ekTrust(keys, q.EKCertificate)
	if err != nil {
		return fleet.Node{}, err
	}
	claim := ca.Claim{Name: q.Name, Keys: keys, Token: q.Token != "", EKTrust: doubt, Former: h.CA.Former(q.Certificate, keys)}
	fresh, err := newID(h.Random)
	if err != nil {
		return fleet.Node{}, err
	}
	var n fleet.Node
	_, err = h.Store.NodeByEK(ctx, keys.EKDigest) // only a node's own EK takes a place among what was shown
	note := err == nil && h.shown.again("return "+keys.EKDigest, h.now())
	err = h.Store.Do(ctx, func(tx *store.Tx) error {
		known, err := knownIn(ctx, tx, claim)
		if err != nil {
			return err
		}
		d, err := ca.Decide(claim, known, h.Rules)
		if err != nil {
			return err
		}
		now := h.now()
		if d.Node != nil {
			n = *d.Node
			if note {
				tx.Audit(fleet.AuditEntry{Time: now, Actor: "node " + n.ID, Action: "node.return", Subject: n.ID, Detail: detail("name", n.Name)})
			}
			return nil
		}
		n = fleet.Node{
			ID: d.ID, Name: q.Name, State: d.State, EKDigest: keys.EKDigest, EKCertificate: q.EKCertificate, EKTrust: "manufacturer",
			AKName: keys.AK.Name, AK: q.AK, BindName: keys.Bind.Name, Bind: q.Bind, Certifier: q.Certifier,
			Enrolled: now, Problem: string(d.Problem), AgentAddress: q.Address, Learns: d.Learns,
		}
		if n.ID == "" {
			n.ID = fresh
		}
		if doubt != nil {
			n.EKTrust = ""
		}
		if d.UseToken {
			t, err := useToken(ctx, tx, q.Token, q.Name, n.ID, d.TokenNames)
			if err != nil {
				return err
			}
			if n.State == fleet.Active {
				n.ApprovedBy = t.By // who gave the token out
			}
		}
		if err := tx.PutNode(ctx, n); err != nil {
			return err
		}
		tx.Audit(fleet.AuditEntry{Time: now, Actor: "node " + n.ID, Action: "node.enrol", Subject: n.ID, Detail: detail(
			"name", n.Name, "state", string(n.State), "ek", n.EKDigest, "ek_trust", n.EKTrust, "ak", hex.EncodeToString(n.AKName),
			"problem", n.Problem, "token", q.Token)})
		if n.State == fleet.Pending {
			return webhook.Queue(ctx, tx, webhook.Pending(n, now))
		}
		return nil
	})
	var conflict *store.ConflictError
	if errors.As(err, &conflict) { // another replica was quicker
		return fleet.Node{}, &ca.Refusal{Code: ca.NameTaken, What: conflict.Error(), Node: conflict.Node}
	}
	return n, err
}

// knownIn gives what the store has that could stand in the claim's way.
func knownIn(ctx context.Context, tx *store.Tx, c ca.Claim) (k ca.Known, err error) {
	find := func(out **fleet.Node, n fleet.Node, err error) error {
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		if err == nil {
			*out = &n
		}
		return err
	}
	n, e := tx.NodeByName(ctx, c.Name)
	err = errors.Join(err, find(&k.ByName, n, e))
	n, e = tx.NodeByEK(ctx, c.Keys.EKDigest)
	err = errors.Join(err, find(&k.ByEK, n, e))
	n, e = tx.NodeByAK(ctx, c.Keys.AK.Name)
	err = errors.Join(err, find(&k.ByAK, n, e))
	if err != nil || k.ByEK != nil || k.ByName != nil || k.ByAK != nil {
		return k, err
	}
	if c.Former != nil {
		n, e = tx.Node(ctx, c.Former.Node)
		if err := find(&k.Revoked, n, e); err != nil || k.Revoked != nil {
			return k, err
		}
	}
	// Who was revoked is looked for last: they are few, and only one who would be let
	// in comes this far.
	for page := (store.Page{Limit: 1000}); ; {
		all, next, err := tx.Nodes(ctx, store.NodeFilter{State: fleet.Revoked}, page)
		if err != nil {
			return k, err
		}
		for _, s := range all {
			if s.EKDigest == c.Keys.EKDigest || bytes.Equal(s.AKName, c.Keys.AK.Name) {
				k.Revoked = &s.Node
				return k, nil
			}
		}
		if next == "" {
			return k, nil
		}
		page.After = next
	}
}

// useToken uses a token up. Where it has to name the node, one for any is refused.
func useToken(ctx context.Context, tx *store.Tx, digest, name, node string, named bool) (fleet.JoinToken, error) {
	t, err := tokenOf(ctx, tx, digest)
	if err != nil {
		return t, err
	}
	if named && t.Name != name {
		return t, refuse(ca.NodeRevoked, "node %q was revoked, and only a join token that names it lets it in again", name)
	}
	var bad *store.TokenError
	if err := tx.UseToken(ctx, digest, name, node); errors.As(err, &bad) {
		switch bad.Reason {
		case "used":
			return t, refuse(ca.TokenUsed, "the join token was used before")
		case "expired":
			return t, refuse(ca.TokenExpired, "the join token has expired")
		case "other-name":
			return t, refuse(ca.TokenOther, "the join token is for a node of another name")
		}
		return t, refuse(ca.TokenWrong, "the Verifier gave out no such join token")
	} else if err != nil {
		return t, err
	}
	return t, nil
}

func tokenOf(ctx context.Context, tx *store.Tx, digest string) (fleet.JoinToken, error) {
	t, err := tx.Token(ctx, digest)
	if errors.Is(err, store.ErrNotFound) {
		return t, refuse(ca.TokenWrong, "the Verifier gave out no such join token")
	}
	return t, err
}

// shown remembers what was written down lately, so that nobody fills the audit log
// with refusals, or with certificates that he asks for all the time.
type shown struct {
	mu sync.Mutex
	at map[string]time.Time
}

const (
	showAgain = 10 * time.Minute
	maxShown  = 10_000
)

func (s *shown) again(key string, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at, ok := s.at[key]; ok && now.Sub(at).Abs() < showAgain {
		return false
	}
	if s.at == nil || len(s.at) >= maxShown {
		for k, at := range s.at {
			if now.Sub(at).Abs() >= showAgain {
				delete(s.at, k)
			}
		}
		if len(s.at) >= maxShown {
			return false
		}
		if s.at == nil {
			s.at = map[string]time.Time{}
		}
	}
	s.at[key] = now
	return true
}

// show makes a refusal known: at the node that it is about, in the audit log, as
// an event. Only of those who had something to show: the EK of a known node, a
// manufacturer's certificate, a token that was once given out. Of anybody else the
// journal knows.
func (h *Handler) show(ctx context.Context, refused error, q *nodeapi.EnrolmentRequest, keys *ca.Proven) error {
	r := ca.AsRefusal(refused)
	if r == nil {
		return refused
	}
	var serious bool
	err := h.Store.Do(ctx, func(tx *store.Tx) (err error) {
		serious, err = h.serious(ctx, tx, r, q, keys)
		return err
	})
	if err == nil && (!serious || !h.shown.again(string(r.Code)+" "+r.Node+" "+keys.EKDigest, h.now())) {
		return refused
	}
	if err == nil {
		err = h.writeDown(ctx, r, q, keys)
	}
	if err != nil {
		h.Log.WithError(err).Warn("a refusal could not be written down")
	}
	return refused
}

func (h *Handler) writeDown(ctx context.Context, r *ca.Refusal, q *nodeapi.EnrolmentRequest, keys *ca.Proven) error {
	return h.Store.Do(ctx, func(tx *store.Tx) error {
		now := h.now()
		tx.Audit(fleet.AuditEntry{Time: now, Actor: "node " + keys.EKDigest, Action: "node.refuse", Subject: r.Node, Detail: detail(
			"code", string(r.Code), "what", r.What, "name", q.Name, "ek", keys.EKDigest, "ak", hex.EncodeToString(keys.AK.Name))})
		if r.Node == "" {
			return nil
		}
		n, err := tx.Node(ctx, r.Node)
		if err != nil {
			return err
		}
		if err := tx.SetProblem(ctx, n.ID, fmt.Sprintf("%s: %s", r.Code, r.What)); err != nil {
			return err
		}
		return webhook.Queue(ctx, tx, webhook.Problem(n, string(r.Code), now))
	})
}

func (h *Handler) serious(ctx context.Context, tx *store.Tx, r *ca.Refusal, q *nodeapi.EnrolmentRequest, keys *ca.Proven) (bool, error) {
	if r.Code == ca.EKKnown || r.Code == ca.AKSwapped || r.Code == ca.KeysSwapped || r.Code == ca.NodeRevoked {
		return true, nil
	}
	if doubt, err := h.ekTrust(keys, q.EKCertificate); err == nil && doubt == nil {
		return true, nil
	}
	if q.Token == "" {
		return false, nil
	}
	_, err := tokenOf(ctx, tx, q.Token)
	if ca.AsRefusal(err) != nil {
		return false, nil
	}
	return err == nil, err
}

// detail is JSON of pairs.
func detail(kv ...string) string {
	m := map[string]string{}
	for i := 0; i+1 < len(kv); i += 2 {
		if kv[i+1] != "" {
			m[kv[i]] = kv[i+1]
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		return "{}"
	}
	return string(b)
}

// newID gives a random UUID (RFC 9562, 5.4).
func newID(random io.Reader) (string, error) {
	var b [16]byte
	if _, err := io.ReadFull(random, b[:]); err != nil {
		return "", err
	}
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:]), nil
}

func chain(certs ...[]byte) string {
	var b bytes.Buffer
	for _, der := range certs {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der}) // a Buffer takes all
	}
	return b.String()
}
