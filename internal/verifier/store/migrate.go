package store

import (
	"context"
	"database/sql"
	"embed"
	"fmt"
	"io/fs"

	"github.com/pressly/goose/v3"
)

//go:embed migrations
var embedded embed.FS

// migrationSet has the migrations, by dialect: a folder each. They only go up.
type migrationSet struct{ fs.FS }

var migrations = migrationSet{embedded}

// migrate brings the database to the version of the newest migration. The caller
// holds a lock.
func migrate(ctx context.Context, d *dialect, db *sql.DB, m migrationSet) (err error) {
	dir, err := fs.Sub(m, "migrations/"+d.name)
	if err != nil {
		return err
	}
	which := goose.DialectSQLite3
	if d.numbered {
		which = goose.DialectPostgres
	}
	p, err := goose.NewProvider(which, db, dir, goose.WithTableName("schema_version"), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return fmt.Errorf("migrations: %w", err)
	}
	have, want, err := p.GetVersions(ctx)
	if err != nil {
		return fmt.Errorf("reading the database's version: %w", d.classify(err))
	}
	if have > want {
		return fmt.Errorf("%w: it is at version %d, this program knows %d", ErrNewer, have, want)
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("bringing the database from version %d to %d: %w", have, want, d.classify(err))
	}
	return nil
}
