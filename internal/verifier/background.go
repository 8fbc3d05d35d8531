package verifier

import (
	"context"
	"errors"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/webhook"
)

// How often the work is done that no request asks for.
const (
	expiryTime    = time.Second
	expiryAtOnce  = 200
	retentionTime = 10 * time.Minute
	deadLetters   = 30 * 24 * time.Hour
)

// background is the work that goes on until its context ends. All of it may go on
// in several replicas at once: what has to happen once is claimed in the store.
func (v *verifier) background(o Options) []func(context.Context) {
	every := func(d time.Duration, what string, f func(context.Context) error) func(context.Context) {
		return func(ctx context.Context) {
			t := time.NewTicker(d)
			defer t.Stop()
			well := true
			for {
				select {
				case <-ctx.Done():
					return
				case <-t.C:
				}
				err := f(ctx)
				if errors.Is(err, store.ErrUnavailable) {
					v.metrics.DatabaseError()
				}
				// Once when it begins, once when it is over.
				switch {
				case err != nil && well && ctx.Err() == nil:
					o.Log.WithError(err).Warn(what + " has to wait")
				case err == nil && !well:
					o.Log.Info(what + " goes on")
				}
				well = err == nil
			}
		}
	}
	all := []func(context.Context){
		v.sender.Run,
		every(expiryTime, "looking for expired results", v.expire),
		every(retentionTime/10, "retention", func(ctx context.Context) error { return v.retain(ctx, o) }),
	}
	if o.Reload != nil {
		all = append(all, func(ctx context.Context) { v.reloads(ctx, o) })
	}
	if interval, err := daemon.SdWatchdogEnabled(false); err == nil && interval > 0 {
		all = append(all, every(interval/3, "the watchdog", func(context.Context) error {
			_, err := daemon.SdNotify(false, daemon.SdNotifyWatchdog)
			return err
		}))
	}
	return all
}

// expire tells of each result that has expired, once among all replicas: claimed
// and told in one transaction.
func (v *verifier) expire(ctx context.Context) error {
	for {
		var expired []store.Expired
		err := v.store.Do(ctx, func(tx *store.Tx) error {
			var err error
			if expired, err = tx.TakeExpired(ctx, expiryAtOnce); err != nil {
				return err
			}
			for _, e := range expired {
				if err := tellExpired(ctx, tx, e); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, e := range expired {
			v.metrics.Expired(e.Tier)
		}
		if len(expired) < expiryAtOnce {
			return nil
		}
	}
}

func tellExpired(ctx context.Context, tx *store.Tx, e store.Expired) error {
	at := time.Now()
	if err := webhook.Queue(ctx, tx, webhook.Expired(e, at)); err != nil {
		return err
	}
	n, err := tx.Node(ctx, e.Node)
	if err != nil {
		return err
	}
	before, err := tx.PreviousResult(ctx, e.Node)
	if err != nil {
		return err
	}
	now, err := tx.Result(ctx, e.Node)
	if err != nil {
		return err
	}
	for _, event := range webhook.TrustChanges(n, before, now, at) {
		if err := webhook.Queue(ctx, tx, event); err != nil {
			return err
		}
	}
	return nil
}

// retain removes what is too old, in one replica at a time.
func (v *verifier) retain(ctx context.Context, o Options) error {
	mine, err := v.store.TakeTurn(ctx, "retention", retentionTime)
	if err != nil || !mine {
		return err
	}
	r := o.Config.Retention
	removed, err := v.store.Expire(ctx, time.Now(), store.Retention{
		RoundAge: time.Duration(r.Rounds), EvidenceAge: time.Duration(r.Evidence), DeadLetterAge: deadLetters,
		EvidenceBytes: int64(r.EvidenceMiB) << 20,
	})
	if err == nil && removed != (store.Removed{}) {
		o.Log.WithField("rounds", removed.Rounds).WithField("evidence", removed.Evidence).Info("what is over age was removed")
	}
	return err
}

// reloads reads people's tokens, keys of results and the browsers' certificate anew
// when it is told to. What is wrong stays as it is, and so does what comes after it.
func (v *verifier) reloads(ctx context.Context, o Options) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-o.Reload:
		}
		cfg, err := o.Load()
		if err == nil {
			err = v.login.set(cfg)
		}
		if err == nil {
			err = v.results.load()
		}
		if err == nil && v.browsers != nil {
			err = v.browsers.reload()
		}
		if err != nil {
			o.Log.WithError(err).Error("reload: all stays as it was")
			continue
		}
		o.Log.Info("reloaded people's tokens, the keys of results and the browsers' certificate")
	}
}
