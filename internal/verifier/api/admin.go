package api

import (
	"bufio"
	"errors"
	"fmt"
	"net/http"
	"time"

	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/webhook"
)

// Token is a join token as the API gives it; Secret only in the answer that
// makes it.
type Token struct {
	Digest  string     `json:"digest"`
	Name    string     `json:"name,omitempty"`
	By      string     `json:"by"`
	Created *time.Time `json:"created"`
	Expires *time.Time `json:"expires"`
	Used    *time.Time `json:"used,omitempty"`
	UsedBy  string     `json:"used_by,omitempty"`
	Secret  string     `json:"secret,omitempty"`
}

func newToken(t fleet.JoinToken) Token {
	return Token{Digest: t.Digest, Name: t.Name, By: t.By, Created: at(t.Created), Expires: at(t.Expires), Used: at(t.Used), UsedBy: t.UsedBy}
}

func (a *API) tokens(r *request) (any, error) {
	if err := r.query("limit", "after"); err != nil {
		return nil, err
	}
	p, err := r.page()
	if err != nil {
		return nil, err
	}
	all, next, err := a.Store.Tokens(r.Context(), p)
	return listOf(all, next, err, newToken)
}

// tokenLifetime is that of a join token where none is named.
const tokenLifetime = time.Hour

func (a *API) createToken(r *request) (any, error) {
	b := struct {
		Name    string `json:"name"`
		Seconds int64  `json:"seconds"`
	}{Seconds: int64(tokenLifetime / time.Second)}
	if err := r.body(&b); err != nil {
		return nil, err
	}
	if b.Seconds < 1 || b.Seconds > int64(operate.MaxTokenLifetime/time.Second) {
		return nil, problem(Invalid, "seconds: %d is not between 1 and %d.", b.Seconds, int64(operate.MaxTokenLifetime/time.Second))
	}
	secret, t, err := a.Operate.CreateToken(r.Context(), r.actor, b.Name, time.Duration(b.Seconds)*time.Second)
	if err != nil {
		return nil, err
	}
	v := newToken(t)
	v.Secret = secret
	return created{v}, nil
}

func (a *API) revokeToken(r *request) (any, error) {
	return nil, a.Operate.RevokeToken(r.Context(), r.actor, r.PathValue("digest"))
}

// Webhook is a webhook as the API gives it; Secret only in the answer that makes
// it.
type Webhook struct {
	ID      int64      `json:"id"`
	URL     string     `json:"url"`
	Events  []string   `json:"events"`
	Created *time.Time `json:"created"`
	Secret  string     `json:"secret,omitempty"`
}

func newWebhook(h fleet.Hook) Webhook {
	return Webhook{ID: h.ID, URL: h.URL, Events: orEmpty(h.Events), Created: at(h.Created)}
}

func (a *API) hooks(r *request) (any, error) {
	all, err := a.Operate.Hooks(r.Context(), r.actor)
	return listOf(all, "", err, newWebhook)
}

func (a *API) addHook(r *request) (any, error) {
	var b struct {
		URL    string   `json:"url"`
		Events []string `json:"events"`
	}
	if err := r.body(&b); err != nil {
		return nil, err
	}
	h, err := a.Operate.AddHook(r.Context(), r.actor, b.URL, b.Events)
	if err != nil {
		return nil, err
	}
	v := newWebhook(h)
	v.Secret = webhook.EncodeSecret(h.Secret)
	return created{v}, nil
}

func (a *API) removeHook(r *request) (any, error) {
	id, err := r.number("webhook")
	if err != nil {
		return nil, err
	}
	return nil, a.Operate.RemoveHook(r.Context(), r.actor, id)
}

func (a *API) testHook(r *request) (any, error) {
	id, err := r.number("webhook")
	if err != nil {
		return nil, err
	}
	err = a.Operate.TestHook(r.Context(), r.actor, id)
	var failed *webhook.Failure
	if errors.As(err, &failed) {
		return nil, problem(ReceiverFailed, "%v", failed)
	}
	return nil, err
}

// Delivery is one that was given up, as the API gives it.
type Delivery struct {
	ID       int64      `json:"id"`
	Webhook  int64      `json:"webhook"`
	Event    string     `json:"event"`
	Attempts int        `json:"attempts"`
	Created  *time.Time `json:"created,omitempty"`
	Error    string     `json:"error"`
}

func (a *API) deadLetters(r *request) (any, error) {
	if err := r.query("limit", "after"); err != nil {
		return nil, err
	}
	p, err := r.page()
	if err != nil {
		return nil, err
	}
	all, next, err := a.Operate.DeadLetters(r.Context(), r.actor, p)
	return listOf(all, next, err, func(d fleet.Delivery) Delivery {
		return Delivery{d.ID, d.Hook, d.Event, d.Attempts, at(d.Created), d.LastErr}
	})
}

func (a *API) revive(r *request) (any, error) {
	id, err := r.number("delivery")
	if err != nil {
		return nil, err
	}
	return nil, a.Operate.Revive(r.Context(), r.actor, id)
}

func (a *API) reviveAll(r *request) (any, error) {
	var b ids
	if err := r.body(&b); err != nil {
		return nil, err
	}
	return nil, a.Operate.Revive(r.Context(), r.actor, b.IDs...)
}

func (a *API) audit(r *request) (any, error) {
	if err := r.query("actor", "action", "subject", "limit", "after"); err != nil {
		return nil, err
	}
	p, err := r.page()
	if err != nil {
		return nil, err
	}
	q := r.URL.Query()
	all, next, err := a.Store.AuditLog(r.Context(), store.AuditFilter{Actor: q.Get("actor"), Action: q.Get("action"), Subject: q.Get("subject")}, p)
	return listOf(all, next, err, func(e fleet.AuditEntry) fleet.AuditEntry { return e })
}

func (a *API) auditHead(r *request) (any, error) {
	h, err := a.Store.AuditHead(r.Context())
	if err != nil {
		return nil, err
	}
	return h, nil
}

// exportTime is for the whole of a long log: server timeouts are for answers that
// fit into memory.
const exportTime = 30 * time.Minute

// exportAudit writes the log as JSON lines. An answer that was cut off has no end
// (RFC 9112, 8), which the client takes for an error.
func (a *API) exportAudit(r *request) (any, error) {
	if err := a.Store.Ping(r.Context()); err != nil {
		return nil, errors.Join(store.ErrUnavailable, err)
	}
	c := http.NewResponseController(r.w)
	if err := c.SetWriteDeadline(a.Now().Add(exportTime)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return nil, err
	}
	r.w.Header().Set("Content-Type", "application/jsonl")
	b := bufio.NewWriterSize(r.w, 64<<10)
	_, err := a.Store.ExportAudit(r.Context(), b)
	if err = errors.Join(err, b.Flush()); err != nil {
		a.Log.WithError(fmt.Errorf("exporting the audit log: %w", err)).Warn("an answer was cut off")
		panic(http.ErrAbortHandler)
	}
	return answered{}, nil
}
