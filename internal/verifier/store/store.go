// Package store keeps what the Verifier knows: in SQLite, embedded, or in
// PostgreSQL, where several Verifiers share one database. Both do the same, and
// the same tests say so.
//
// Reads are methods of *Store, and of *Tx where they have to agree with what is
// written. Writes are methods of *Tx, inside Store.Do, so that what belongs
// together is written together, its audit entry included; a few that are always
// alone are methods of *Store too.
//
// What was answered with a nil error is on the disk, and survives a power cut:
// SQLite commits what many callers want at one moment with one fsync. A write
// that fails with ErrUnavailable was not done, or, where the connection to
// PostgreSQL broke at the very commit, may have been.
//
// A call ends when its context does, so that whoever calls sets how long a
// database that does not answer is waited for; a write to SQLite that has begun is
// waited for in any case.
//
// ErrUnavailable says that the database could not be reached or is busy, and that
// the same call may be made again later. All other errors are about the data.
// Text is kept as valid UTF-8 without NUL; times in microseconds.
package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"virt-trust/internal/verifier/fleet"
)

// Options are what Open may be told. The zero value is good.
type Options struct {
	Now       func() time.Time // time.Now
	MaxConns  int              // to PostgreSQL, or readers of SQLite; 8
	Challenge ChallengeLimits
}

// ChallengeLimits bound what callers without an identity can make the database
// hold, for each purpose.
type ChallengeLimits struct {
	PerSource int // 16
	Total     int // 10,000
}

// Store is a database. It is good for any number of goroutines.
type Store struct {
	reads
	db        *sql.DB // PostgreSQL; the readers of SQLite
	challenge ChallengeLimits
	write     func(context.Context, func(*Tx) error) error
	close     func() error
	path      string // of SQLite's file
}

// Tx is a transaction that writes; see Store.Do. Where one of its methods fails,
// the function has to return that error: PostgreSQL does nothing more in such a
// transaction.
type Tx struct {
	reads
	audit []fleet.AuditEntry
}

// Open opens the database at dsn, "sqlite:/path" or "postgres://…", makes it or
// brings it to this program's version where needed, and keeps its data. A
// database that is newer than this program is ErrNewer. Several may open one
// database at the same time.
func Open(ctx context.Context, dsn string, o Options) (*Store, error) {
	return open(ctx, dsn, o, migrations)
}

func open(ctx context.Context, dsn string, o Options, m migrationSet) (*Store, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.MaxConns <= 0 {
		o.MaxConns = 8
	}
	if o.Challenge.PerSource <= 0 {
		o.Challenge.PerSource = 16
	}
	if o.Challenge.Total <= 0 {
		o.Challenge.Total = 10_000
	}
	s := &Store{challenge: o.Challenge}
	s.now = o.Now
	var err error
	if path, ok := strings.CutPrefix(dsn, "sqlite:"); ok {
		err = s.openSQLite(ctx, path, o, m)
	} else if strings.HasPrefix(dsn, "postgres://") || strings.HasPrefix(dsn, "postgresql://") {
		err = s.openPostgres(ctx, dsn, o, m)
	} else {
		// The DSN may hold a password.
		err = errors.New(`the database has to be "sqlite:/path" or "postgres://…"`)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the database: %w", err)
	}
	return s, nil
}

// Close ends all work and closes the database.
func (s *Store) Close() error { return s.close() }

// Ping says whether the database answers: nil or ErrUnavailable.
func (s *Store) Ping(ctx context.Context) error {
	var one int
	return s.one(ctx, "SELECT 1", nil, &one)
}

// Do runs f in a transaction that writes, and commits it unless f returns an
// error, which Do returns. f may run more than once (a database that says "try
// again" is asked again, a bounded number of times), so it starts from nothing
// each time; it may run on another goroutine, and may not call methods of Store,
// nor do anything slow.
func (s *Store) Do(ctx context.Context, f func(tx *Tx) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return s.write(ctx, f)
}

// run is f and what a transaction ends with.
func (tx *Tx) run(ctx context.Context, f func(*Tx) error) error {
	if err := f(tx); err != nil {
		return err
	}
	return tx.appendAudit(ctx)
}

// statements keeps prepared statements by their text, of which there is a bounded
// number.
type statements struct {
	prepare func(context.Context, string) (*sql.Stmt, error)
	mu      sync.Mutex
	by      map[string]*sql.Stmt
}

func (c *statements) get(ctx context.Context, q string) (*sql.Stmt, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if st := c.by[q]; st != nil {
		return st, nil
	}
	st, err := c.prepare(ctx, q)
	if err != nil {
		return nil, err
	}
	if c.by == nil {
		c.by = map[string]*sql.Stmt{}
	}
	c.by[q] = st
	return st, nil
}

func (c *statements) query(ctx context.Context, q string, args []any) (*sql.Rows, error) {
	st, err := c.get(ctx, q)
	if err != nil {
		return nil, err
	}
	return st.QueryContext(ctx, args...)
}

func (c *statements) exec(ctx context.Context, q string, args []any) (sql.Result, error) {
	st, err := c.get(ctx, q)
	if err != nil {
		return nil, err
	}
	return st.ExecContext(ctx, args...)
}

func (c *statements) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, st := range c.by {
		_ = st.Close() // the connection is going away
	}
	c.by = nil
}
