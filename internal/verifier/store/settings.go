package store

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"virt-trust/internal/verifier/fleet"
)

// MaxSetting bounds a document, in bytes.
const MaxSetting = 4 << 20

// Setting gives the newest version of a document; ErrNotFound.
func (r reads) Setting(ctx context.Context, name string) (fleet.Setting, error) {
	v := fleet.Setting{Name: name}
	err := r.one(ctx, "SELECT version, data, set_by, time FROM settings WHERE name = ? ORDER BY version DESC LIMIT 1", []any{name},
		&v.Version, &v.Data, &v.By, at{&v.Time})
	if err != nil {
		return fleet.Setting{}, fmt.Errorf("setting %q: %w", name, err)
	}
	return v, nil
}

// SettingVersion gives one version of a document; ErrNotFound.
func (r reads) SettingVersion(ctx context.Context, name string, version int64) (fleet.Setting, error) {
	v := fleet.Setting{Name: name, Version: version}
	err := r.one(ctx, "SELECT data, set_by, time FROM settings WHERE name = ? AND version = ?", []any{name, version}, &v.Data, &v.By, at{&v.Time})
	if err != nil {
		return fleet.Setting{}, fmt.Errorf("setting %q, version %d: %w", name, version, err)
	}
	return v, nil
}

// SettingVersions gives all versions, newest first.
func (r reads) SettingVersions(ctx context.Context, name string, p Page) ([]fleet.Setting, string, error) {
	before, err := p.before()
	if err != nil {
		return nil, "", err
	}
	all, err := list(ctx, r, "SELECT version, data, set_by, time FROM settings WHERE name = ? AND version < ? ORDER BY version DESC LIMIT ?",
		[]any{name, before, p.limit() + 1}, func(scan func(...any) error, v *fleet.Setting) error {
			v.Name = name
			return scan(&v.Version, &v.Data, &v.By, at{&v.Time})
		})
	if err != nil {
		return nil, "", fmt.Errorf("setting %q: %w", name, err)
	}
	all, next := paged(all, p, func(v fleet.Setting) string { return cursor(strconv.FormatInt(v.Version, 10)) })
	return all, next, nil
}

// PutSetting adds version v.Version of a document, which has to be one more than
// the newest, 1 for the first: ErrVersion.
func (tx *Tx) PutSetting(ctx context.Context, v fleet.Setting) error {
	if v.Name == "" || len(v.Data) > MaxSetting {
		return fmt.Errorf("%w: setting", ErrInvalid)
	}
	if err := bounded(maxText, v.Name, v.By); err != nil {
		return err
	}
	if v.Time.IsZero() {
		v.Time = tx.now()
	}
	var newest int64
	err := tx.one(ctx, "SELECT COALESCE(max(version), 0) FROM settings WHERE name = ?", []any{v.Name}, &newest)
	if err == nil && newest+1 != v.Version {
		err = ErrVersion
	}
	if err == nil {
		var n int64
		n, err = tx.exec(ctx, "INSERT INTO settings (name, version, data, set_by, time) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
			v.Name, v.Version, v.Data, v.By, v.Time)
		if err == nil && n == 0 {
			err = ErrVersion
		}
	}
	if err != nil {
		return fmt.Errorf("setting %q: %w", v.Name, err)
	}
	return nil
}

// TakeTurn says whether the caller is the one who does the work of this name now:
// true for one replica only, and not again before every has passed. A replica
// that dies at it is followed by another then.
func (s *Store) TakeTurn(ctx context.Context, work string, every time.Duration) (bool, error) {
	var mine bool
	err := s.Do(ctx, func(tx *Tx) error {
		now := tx.now()
		// Also where due is further away than it ever should be: a clock was wrong.
		n, err := tx.exec(ctx, `INSERT INTO turns (work, due) VALUES (?, ?)
 ON CONFLICT (work) DO UPDATE SET due = excluded.due WHERE turns.due <= ? OR turns.due > ?`, work, now.Add(every), now, now.Add(2*every))
		mine = n == 1
		return err
	})
	if err != nil {
		return false, fmt.Errorf("whose turn %q is: %w", work, err)
	}
	return mine, nil
}
