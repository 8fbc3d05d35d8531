package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"

	"github.com/jackc/pgx/v5/pgconn"
	driverSQLite "modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// What callers branch on.
var (
	ErrUnavailable = errors.New("the database is not reachable or busy; try again")
	ErrNotFound    = errors.New("not found")
	ErrConflict    = errors.New("taken by another") // see ConflictError
	ErrVersion     = errors.New("changed by another meanwhile; read it again")
	ErrNonce       = errors.New("not the node's outstanding nonce")
	ErrInactive    = errors.New("the node is not active")
	ErrToken       = errors.New("the join token is not good") // see TokenError
	ErrLimit       = errors.New("too many; try again later")
	ErrSamePerson  = errors.New("a second, different person has to approve")
	ErrInvalid     = errors.New("out of bounds")
	ErrNewer       = errors.New("the database was written by a newer version of the Verifier; install that version or a later one")
)

// errAgain is of a transaction that lost against another and is to be run anew.
var errAgain = fmt.Errorf("%w: lost against another transaction", ErrUnavailable)

// ConflictError says what of a node is another's already. It is ErrConflict.
type ConflictError struct {
	Field string // "id", "name", "ek", "ak"
	Node  string // ID of the node that has it
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("the %s belongs to node %s", e.Field, e.Node)
}

// Is says that it is ErrConflict.
func (e *ConflictError) Is(target error) bool { return target == ErrConflict }

// TokenError says why a join token is refused. It is ErrToken.
type TokenError struct {
	Reason string // "unknown", "used", "expired", "other-name"
}

func (e *TokenError) Error() string { return "join token: " + e.Reason }

// Is says that it is ErrToken.
func (e *TokenError) Is(target error) bool { return target == ErrToken }

func classifySQLite(err error) error {
	var e *driverSQLite.Error
	if !errors.As(err, &e) {
		return nil
	}
	switch e.Code() & 0xff {
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_INTERRUPT,
		sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL:
		return ErrUnavailable
	case sqlite3.SQLITE_CONSTRAINT:
		switch e.Code() {
		case sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
			return ErrConflict
		case sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
			return ErrNotFound
		case sqlite3.SQLITE_CONSTRAINT_CHECK:
			return ErrInvalid
		}
	}
	return nil
}

// classifyPostgres goes by SQLSTATE (PostgreSQL manual, appendix A).
func classifyPostgres(err error) error {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		switch e.Code {
		case "40001", "40P01":
			return errAgain
		case "23505":
			return ErrConflict
		case "23503":
			return ErrNotFound
		case "23514":
			return ErrInvalid
		case "55P03", "57014", "25006", "25P03": // lock or statement timeout, read only standby, idle in transaction
			return ErrUnavailable
		}
		switch e.Code[:min(2, len(e.Code))] {
		case "08", "53", "57", "58":
			return ErrUnavailable
		}
		return nil
	}
	var connect *pgconn.ConnectError
	if errors.As(err, &connect) || pgconn.SafeToRetry(err) {
		return ErrUnavailable
	}
	return nil
}

// classify puts the sentinel before the database's own words.
func (d *dialect) classify(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrUnavailable), errors.Is(err, ErrConflict), errors.Is(err, ErrNotFound), errors.Is(err, ErrInvalid):
		return err
	}
	if is := d.classifyOwn(err); is != nil {
		return fmt.Errorf("%w: %w", is, err)
	}
	var network net.Error
	var errno syscall.Errno
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, driver.ErrBadConn) ||
		errors.Is(err, sql.ErrConnDone) || err.Error() == "sql: database is closed" || // which has no name
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &network) || errors.As(err, &errno) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}
