package webhook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/verifier/fleet"
)

// Queued is what a *store.Store does for deliveries.
type Queued interface {
	Hooks(context.Context) ([]fleet.Hook, error)
	Claim(ctx context.Context, n int, lease time.Duration) ([]fleet.Delivery, error)
	Done(context.Context, fleet.Delivery) error
	Retry(ctx context.Context, d fleet.Delivery, why string) error
}

// Sender delivers.
type Sender struct {
	Queue  Queued
	Client *http.Client // Guard.Client
	Now    func() time.Time
	Log    *logrus.Entry
	// Observe is told of each attempt, nil for nobody: err is a *Failure.
	Observe func(err error)
}

// Failure says that a receiver did not take a delivery.
type Failure struct {
	Status int   // of HTTP; 0 where there was no answer
	Err    error // why not
}

func (f *Failure) Error() string {
	if f.Err != nil {
		return "the receiver: " + f.Err.Error()
	}
	return fmt.Sprintf("the receiver answered %d", f.Status)
}

func (f *Failure) Unwrap() error { return f.Err }

// Deliver makes one attempt. An error is a *Failure.
func (s *Sender) Deliver(ctx context.Context, h fleet.Hook, d fleet.Delivery) error {
	err := s.post(ctx, h, d)
	if s.Observe != nil {
		s.Observe(err)
	}
	return err
}

func (s *Sender) post(ctx context.Context, h fleet.Hook, d fleet.Delivery) error {
	// One ID for all attempts, and for no other webhook.
	id := fmt.Sprintf("vt_%d_%d", h.ID, d.ID)
	if d.ID == 0 { // none out of the queue
		id = fmt.Sprintf("vt_%d_%s_%d", h.ID, d.Event, s.Now().UnixNano())
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.URL, bytes.NewReader(d.Body))
	if err != nil {
		return &Failure{Err: err}
	}
	now := s.Now()
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "virt-trust-verifier")
	req.Header.Set("webhook-id", id)
	req.Header.Set("webhook-timestamp", strconv.FormatInt(now.Unix(), 10))
	req.Header.Set("webhook-signature", Sign(h.Secret, id, now, d.Body))
	resp, err := s.Client.Do(req)
	if err != nil {
		return &Failure{Err: errors.Unwrap(err)} // without the URL, which may have a secret in it
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // what it says is of no use
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return &Failure{Status: resp.StatusCode}
	}
	return nil
}

const (
	atOnce = 16          // deliveries claimed, and sent, at the same time
	lease  = 2 * Timeout // after which another replica may take one up
	pause  = time.Second // between looks into an empty queue
)

// Run delivers what is queued until ctx ends. Several replicas may do so at once.
func (s *Sender) Run(ctx context.Context) {
	for {
		n, err := s.once(ctx)
		if err != nil && ctx.Err() == nil {
			s.Log.WithError(err).Warn("webhooks have to wait")
		}
		if n == atOnce {
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// once delivers what is due, at most atOnce, and gives how many that were.
func (s *Sender) once(ctx context.Context) (int, error) {
	due, err := s.Queue.Claim(ctx, atOnce, lease)
	if err != nil || len(due) == 0 {
		return 0, err
	}
	hooks, err := s.Queue.Hooks(ctx)
	if err != nil {
		return 0, err
	}
	by := map[int64]fleet.Hook{}
	for _, h := range hooks {
		by[h.ID] = h
	}
	errs := make([]error, len(due))
	var wg sync.WaitGroup
	for i, d := range due {
		h, ok := by[d.Hook]
		if !ok {
			continue // removed meanwhile, with its deliveries
		}
		wg.Go(func() {
			if failure := s.Deliver(ctx, h, d); failure != nil {
				errs[i] = s.Queue.Retry(context.WithoutCancel(ctx), d, failure.Error())
				return
			}
			errs[i] = s.Queue.Done(context.WithoutCancel(ctx), d)
		})
	}
	wg.Wait()
	return len(due), errors.Join(errs...)
}
