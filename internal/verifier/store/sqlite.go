package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	_ "modernc.org/sqlite" // driver "sqlite"
)

// sqliteBusy is how long one process waits for another's transaction.
const sqliteBusy = 5 * time.Second

// maxBatch is how many writes share one commit, and its fsync.
const maxBatch = 128

func sqliteDSN(path string, more ...string) string {
	q := url.Values{"_pragma": append([]string{
		"busy_timeout(" + strconv.FormatInt(sqliteBusy.Milliseconds(), 10) + ")",
		"journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)", "trusted_schema(0)",
	}, more...)}
	return (&url.URL{Scheme: "file", OmitHost: true, Path: path, RawQuery: q.Encode()}).String()
}

func (s *Store) openSQLite(ctx context.Context, path string, o Options, m migrationSet) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	// It holds webhooks' secrets. SQLite gives the files beside it the same mode.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	writer, err := sql.Open("sqlite", sqliteDSN(path, "cache_size(-16000)"))
	if err != nil {
		return err
	}
	writer.SetMaxOpenConns(1)
	if err := migrateSQLite(ctx, writer, path, m); err != nil {
		return errors.Join(err, writer.Close())
	}
	s.db, err = sql.Open("sqlite", sqliteDSN(path, "query_only(1)"))
	if err != nil {
		return errors.Join(err, writer.Close())
	}
	s.db.SetMaxOpenConns(o.MaxConns)
	s.db.SetMaxIdleConns(o.MaxConns)
	readers := &statements{prepare: s.db.PrepareContext}
	s.d, s.run, s.path = &sqlite, readers, path
	w := &sqliteWriter{db: writer, r: s.reads, jobs: make(chan *job), quit: make(chan struct{}), done: make(chan struct{})}
	go w.loop()
	s.write = w.do
	s.close = sync.OnceValue(func() error {
		close(w.quit)
		<-w.done
		readers.close()
		return errors.Join(s.db.Close(), writer.Close())
	})
	return nil
}

// migrateSQLite lets one process at a time migrate. SQLite's own locks cannot do
// that over several transactions; and a lock on the database's file would take
// SQLite's away when its descriptor is closed.
func migrateSQLite(ctx context.Context, db *sql.DB, path string, m migrationSet) (err error) {
	f, err := os.OpenFile(path+".migrate", os.O_RDWR|os.O_CREATE|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return fmt.Errorf("locking %s: %w", f.Name(), err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: another process migrates it: %w", ErrUnavailable, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
	return migrate(ctx, &sqlite, db, m)
}

// sqliteWriter owns the one connection that writes. What callers want meanwhile
// is gathered and committed together.
type sqliteWriter struct {
	db   *sql.DB
	r    reads
	jobs chan *job
	quit chan struct{}
	done chan struct{}

	conn *sql.Conn
	st   *statements
}

type job struct {
	ctx      context.Context
	f        func(*Tx) error
	err      error
	panicked any
	done     chan struct{}
}

var errClosed = fmt.Errorf("%w: it was closed", ErrUnavailable)

func (w *sqliteWriter) do(ctx context.Context, f func(*Tx) error) error {
	j := &job{ctx: ctx, f: f, done: make(chan struct{})}
	select {
	case w.jobs <- j:
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
	case <-w.done:
		return errClosed
	}
	<-j.done // f uses what is the caller's, so the caller waits even if its time is up
	if j.panicked != nil {
		panic(j.panicked)
	}
	return j.err
}

func (w *sqliteWriter) loop() {
	defer close(w.done)
	defer w.drop()
	for {
		var batch []*job
		select {
		case j := <-w.jobs:
			batch = append(batch, j)
		case <-w.quit:
			return
		}
	gather:
		for len(batch) < maxBatch {
			select {
			case j := <-w.jobs:
				batch = append(batch, j)
			default:
				break gather
			}
		}
		if err := w.commit(batch); err != nil && len(batch) > 1 {
			// One of them may be the reason (the disk is full): each for itself.
			for _, j := range batch {
				w.alone(j)
			}
		} else if err != nil {
			batch[0].err = err
		}
		for _, j := range batch {
			close(j.done)
		}
	}
}

func (w *sqliteWriter) alone(j *job) {
	if err := w.commit([]*job{j}); err != nil {
		j.err = err
	}
}

// drop gives up the connection; the next batch gets another.
func (w *sqliteWriter) drop() {
	if w.conn == nil {
		return
	}
	w.st.close()
	_ = w.conn.Close() // nothing is lost that was committed
	w.conn, w.st = nil, nil
}

// commit runs all jobs in one transaction, each in a savepoint of its own, so
// that one that fails undoes only what it did. An error means that none was done.
//
// The statements run without the callers' contexts: SQLite undoes the whole
// transaction when one of its statements is interrupted.
func (w *sqliteWriter) commit(batch []*job) (err error) {
	ctx := context.Background()
	defer func() {
		if err != nil {
			err = sqlite.classify(err)
			if w.conn != nil {
				_, _ = w.st.exec(ctx, "ROLLBACK", nil) // may be done already
			}
			w.drop()
		}
	}()
	if w.conn == nil {
		if w.conn, err = w.db.Conn(ctx); err != nil {
			return err
		}
		w.st = &statements{prepare: w.conn.PrepareContext}
	}
	if _, err := w.st.exec(ctx, "BEGIN IMMEDIATE", nil); err != nil {
		return err
	}
	for _, j := range batch {
		j.err, j.panicked = nil, nil
		if err := j.ctx.Err(); err != nil {
			j.err = fmt.Errorf("%w: %w", ErrUnavailable, err)
			continue
		}
		if _, err := w.st.exec(ctx, "SAVEPOINT job", nil); err != nil {
			return err
		}
		w.attempt(ctx, j)
		if errors.Is(j.err, ErrUnavailable) {
			return j.err // of the database, which may have undone everything by itself
		}
		if j.err != nil || j.panicked != nil {
			if _, err := w.st.exec(ctx, "ROLLBACK TO job", nil); err != nil {
				return err
			}
		}
		if _, err := w.st.exec(ctx, "RELEASE job", nil); err != nil {
			return err
		}
	}
	_, err = w.st.exec(ctx, "COMMIT", nil)
	return err
}

// attempt runs one job. A panic is the caller's, not the writer's.
func (w *sqliteWriter) attempt(ctx context.Context, j *job) {
	defer func() { j.panicked = recover() }()
	tx := &Tx{reads: w.r}
	tx.reads.run, tx.reads.detach = w.st, true
	j.err = tx.run(ctx, j.f)
}

// Backup writes a copy of a SQLite database, as of one moment, to a new file; for
// PostgreSQL there is pg_dump.
func (s *Store) Backup(ctx context.Context, path string) error {
	if s.path == "" {
		return fmt.Errorf("%w: a PostgreSQL database is saved with pg_dump", ErrInvalid)
	}
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("saving the database: %w: %s", os.ErrExist, path)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("saving the database: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("saving the database: %w", err)
	}
	// VACUUM INTO takes an empty file, and syncs it.
	db, err := sql.Open("sqlite", sqliteDSN(s.path))
	if err != nil {
		return fmt.Errorf("saving the database: %w", err)
	}
	_, err = db.ExecContext(ctx, "VACUUM INTO ?", path)
	if err = errors.Join(err, db.Close()); err != nil {
		return fmt.Errorf("saving the database: %w", sqlite.classify(err))
	}
	return nil
}
