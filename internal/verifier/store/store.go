// Package store keeps what the Verifier knows: in SQLite, embedded, or in
// PostgreSQL, where several Verifiers share one database. Both do the same, and
// the same tests say so.
//
// Reads are methods of *Store, and of *Tx where they have to agree with what is
// written. Writes are methods of *Tx, inside Store.Do, so that what belongs
// together is written together, its audit entry included; a few that are always
// alone are methods of *Store too.
//
// What was answered with a nil error is on the disk, and survives a power cut.
//
// Errors: ErrUnavailable says that the database could not be reached or is busy,
// and that the same call may be made again later. All other errors are about the
// data. Text is stored as valid UTF-8 without NUL; times in microseconds.
package store

import (
	"context"
	"time"
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
}

// reads are the queries; of a Store or inside a Tx.
type reads struct{}

// Tx is a transaction that writes; see Store.Do.
type Tx struct {
	reads
}

// Open opens the database at dsn, "sqlite:/path" or "postgres://…", makes it or
// brings it to this program's version where needed, and keeps its data. A
// database that is newer than this program is ErrNewer. Several may open one
// database at the same time.
func Open(ctx context.Context, dsn string, o Options) (*Store, error) { panic("not yet") }

// Close ends all work and closes the database.
func (s *Store) Close() error { panic("not yet") }

// Ping says whether the database answers: nil or ErrUnavailable.
func (s *Store) Ping(ctx context.Context) error { panic("not yet") }

// Do runs f in a transaction that writes, and commits it unless f returns an
// error, which Do returns. f may run more than once (a database that says "try
// again" is asked again, a bounded number of times), so it starts from nothing
// each time; it may be run on another goroutine, and may not call methods of
// Store, nor do anything slow.
func (s *Store) Do(ctx context.Context, f func(tx *Tx) error) error { panic("not yet") }
