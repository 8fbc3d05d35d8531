package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

// maxTries is how often a transaction is run that PostgreSQL gives up for the
// sake of another.
const maxTries = 8

// migrateLock is the advisory lock of who migrates: "virttrus".
const migrateLock int64 = 0x7669727474727573

func (s *Store) openPostgres(ctx context.Context, dsn string, o Options, m migrationSet) error {
	c, err := pgx.ParseConfig(dsn)
	if err != nil {
		return err // without the password
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = 5 * time.Second
	}
	for k, v := range map[string]string{
		"application_name": "virt-trust-verifier",
		// Who is cut off in the middle does not hold its locks for hours.
		"idle_in_transaction_session_timeout": "30s", "statement_timeout": "60s", "lock_timeout": "10s",
		"tcp_user_timeout": "15s",
	} {
		if _, ok := c.RuntimeParams[k]; !ok {
			c.RuntimeParams[k] = v
		}
	}
	db := stdlib.OpenDB(*c)
	db.SetMaxOpenConns(o.MaxConns)
	db.SetMaxIdleConns(o.MaxConns)
	db.SetConnMaxLifetime(30 * time.Minute)
	if err := migratePostgres(ctx, db, m); err != nil {
		return errors.Join(err, db.Close())
	}
	// pgx prepares and keeps statements by itself, for each connection.
	s.db, s.d, s.run, s.write, s.close = db, &postgres, pool{db}, s.writePostgres, db.Close
	return nil
}

// migratePostgres lets one of several replicas migrate, while the others wait.
func migratePostgres(ctx context.Context, db *sql.DB, m migrationSet) (err error) {
	conn, err := db.Conn(ctx)
	if err != nil {
		return postgres.classify(err)
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	// It waits as long as ctx lets it, which is longer than a statement may.
	for {
		var got bool
		if err := conn.QueryRowContext(ctx, "SELECT pg_try_advisory_lock($1)", migrateLock).Scan(&got); err != nil {
			return postgres.classify(err)
		}
		if got {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: another replica migrates it: %w", ErrUnavailable, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
	defer func() {
		_, e := conn.ExecContext(context.WithoutCancel(ctx), "SELECT pg_advisory_unlock($1)", migrateLock)
		if e != nil {
			err = errors.Join(err, postgres.classify(e))
		}
	}()
	return migrate(ctx, &postgres, db, m)
}

func (s *Store) writePostgres(ctx context.Context, f func(*Tx) error) error {
	for try := 1; ; try++ {
		err := s.tryPostgres(ctx, f)
		if !errors.Is(err, errAgain) || try == maxTries {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(rand.N(time.Millisecond << try)):
		}
	}
}

func (s *Store) tryPostgres(ctx context.Context, f func(*Tx) error) error {
	t, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return postgres.classify(err)
	}
	defer t.Rollback() // does nothing after a commit
	tx := &Tx{reads: s.reads}
	tx.reads.run = pool{t}
	if err := tx.run(ctx, f); err != nil {
		return err
	}
	return postgres.classify(t.Commit())
}

// pool runs queries on a *sql.DB or *sql.Tx.
type pool struct {
	q interface {
		QueryContext(context.Context, string, ...any) (*sql.Rows, error)
		ExecContext(context.Context, string, ...any) (sql.Result, error)
	}
}

func (p pool) query(ctx context.Context, q string, args []any) (*sql.Rows, error) {
	return p.q.QueryContext(ctx, q, args...)
}

func (p pool) exec(ctx context.Context, q string, args []any) (sql.Result, error) {
	return p.q.ExecContext(ctx, q, args...)
}
