package store

import (
	"context"
	"fmt"
	"time"
)

// Retention says what Expire removes; zero fields remove nothing. The newest
// round of a node stays always, and the audit log is never shortened.
type Retention struct {
	RoundAge      time.Duration
	EvidenceAge   time.Duration
	EvidenceBytes int64 // of all evidence; the oldest of who has most goes first
	DeadLetterAge time.Duration
}

// Removed counts what Expire removed.
type Removed struct {
	Rounds, Evidence, DeadLetters, Sessions, Challenges, Tokens, Certificates, LeftVMs int64
}

// expireStep is how many rows go in one transaction, so that rounds come in
// between.
const expireStep = 500

// Expire removes what is over age at now, in small transactions; and sessions,
// challenges, unused join tokens and certificates that have expired.
func (s *Store) Expire(ctx context.Context, now time.Time, p Retention) (Removed, error) {
	var v Removed
	old := func(age time.Duration) time.Time {
		if age <= 0 {
			return time.Time{} // nothing is older
		}
		return now.Add(-age)
	}
	for _, step := range []struct {
		n     *int64
		table string
		key   string
		where string
		arg   time.Time
	}{
		{&v.Evidence, "evidence", "round", "received < ?", old(p.EvidenceAge)},
		{&v.Rounds, "rounds", "id", "last < ? AND NOT EXISTS (SELECT 1 FROM node_state s WHERE s.node = rounds.node AND s.round = rounds.id)", old(p.RoundAge)},
		{&v.DeadLetters, "deliveries", "id", "dead = 1 AND created < ?", old(p.DeadLetterAge)},
		{&v.Sessions, "sessions", "digest", "expires <= ?", now},
		{&v.Challenges, "challenges", "id", "expires <= ?", now},
		{&v.Tokens, "tokens", "digest", "used = 0 AND expires <= ?", now},
		{&v.Certificates, "certificates", "serial", "expires <= ?", now.Add(-certificateTime)},
		{&v.LeftVMs, "vm_left", "uuid", "gone < ?", old(p.RoundAge)},
	} {
		for !step.arg.IsZero() {
			var n int64
			err := s.Do(ctx, func(tx *Tx) (err error) {
				n, err = tx.exec(ctx, "DELETE FROM "+step.table+" WHERE "+step.key+" IN (SELECT "+step.key+" FROM "+step.table+" WHERE "+step.where+" LIMIT ?)", step.arg, expireStep)
				return err
			})
			if err != nil {
				return v, fmt.Errorf("removing old %s: %w", step.table, err)
			}
			if *step.n += n; n < expireStep {
				break
			}
		}
	}
	if p.EvidenceBytes > 0 {
		n, err := s.shrinkEvidence(ctx, p.EvidenceBytes)
		if v.Evidence += n; err != nil {
			return v, fmt.Errorf("removing evidence that is too much: %w", err)
		}
	}
	return v, nil
}

// shrinkEvidence removes the oldest evidence of whichever node has most, until
// all is at most limit bytes: a node that fails all the time does not drive out
// what there is of others.
func (s *Store) shrinkEvidence(ctx context.Context, limit int64) (removed int64, err error) {
	type share struct {
		node  string
		bytes int64
	}
	for {
		shares, err := list(ctx, s.reads, "SELECT node, sum(size) FROM evidence GROUP BY node ORDER BY 2 DESC, 1", nil,
			func(scan func(...any) error, v *share) error { return scan(&v.node, &v.bytes) })
		if err != nil {
			return removed, err
		}
		var total int64
		for _, v := range shares {
			total += v.bytes
		}
		if total <= limit {
			return removed, nil
		}
		// What the biggest is over the next one, or what is over the limit; at least one.
		over := total - limit
		if len(shares) > 1 {
			over = min(over, shares[0].bytes-shares[1].bytes)
		}
		var n int64
		err = s.Do(ctx, func(tx *Tx) error {
			type row struct{ round, size int64 }
			rows, err := list(ctx, tx.reads, "SELECT round, size FROM evidence WHERE node = ? ORDER BY round LIMIT ?", []any{shares[0].node, expireStep},
				func(scan func(...any) error, v *row) error { return scan(&v.round, &v.size) })
			if err != nil || len(rows) == 0 {
				return err
			}
			last, sum := rows[0].round, int64(0)
			for _, v := range rows {
				last = v.round
				if sum += v.size; sum >= over {
					break
				}
			}
			n, err = tx.exec(ctx, "DELETE FROM evidence WHERE node = ? AND round <= ?", shares[0].node, last)
			return err
		})
		if removed += n; err != nil {
			return removed, err
		}
	}
}

// Stats are the database's own figures.
type Stats struct {
	Backend       string // sqlite, postgres
	Schema        int64  // version
	Bytes         int64  // on disk
	EvidenceBytes int64
	Evidence      int64
	Audit         int64 // entries
}

// Stats gives them.
func (r reads) Stats(ctx context.Context) (Stats, error) {
	v := Stats{Backend: r.d.name}
	err := r.one(ctx, r.d.size, nil, &v.Bytes)
	if err == nil {
		err = r.one(ctx, `SELECT (SELECT max(version_id) FROM schema_version), (SELECT COALESCE(sum(size), 0) FROM evidence), (SELECT count(*) FROM evidence),
 (SELECT id FROM audit_head)`, nil, &v.Schema, &v.EvidenceBytes, &v.Evidence, &v.Audit)
	}
	if err != nil {
		return Stats{}, fmt.Errorf("the database's figures: %w", err)
	}
	return v, nil
}
