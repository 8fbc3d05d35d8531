package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"virt-trust/internal/verifier/fleet"
)

// MaxValues is how many Reference Values are added at once at most: those of a long
// IMA list, which the first round of a host that has run for months teaches. With
// SQLite everybody else who writes waits for them, some seconds.
const MaxValues = 200_000

const valueColumns = "id, subject, kind, path, digest, source, detail, state, proposed_by, second, time, four_eyes"

func readValue(scan func(...any) error, v *fleet.Value) error {
	return scan(&v.ID, &v.Subject, &v.Kind, &v.Path, &v.Digest, &v.Source, &v.Detail, &v.State, &v.By, &v.Second, at{&v.Time}, &v.FourEyes)
}

// identity is what makes a Reference Value the same as another.
func identity(v fleet.Value) []byte {
	d := sha256.Sum256(toJSON([]string{v.Subject, string(v.Kind), v.Path, v.Digest}))
	return d[:]
}

// AddValues adds Reference Values in the state that each has, Proposed or
// Approved; one that is there already (subject, kind, path, digest) and not
// rejected is left as it is. One with FourEyes has to be Proposed. It gives how
// many were new.
func (tx *Tx) AddValues(ctx context.Context, vs []fleet.Value) (int, error) {
	n, err := tx.addValues(ctx, vs)
	if err != nil {
		return 0, fmt.Errorf("adding Reference Values: %w", err)
	}
	return n, nil
}

func (tx *Tx) addValues(ctx context.Context, vs []fleet.Value) (int, error) {
	if len(vs) > MaxValues {
		return 0, fmt.Errorf("%w: %d values, at most %d", ErrInvalid, len(vs), MaxValues)
	}
	vs = slices.Clone(vs)
	for i := range vs {
		v := &vs[i]
		switch {
		case v.Kind == "" || v.Digest == "":
			return 0, fmt.Errorf("%w: a value has a kind and a digest", ErrInvalid)
		case v.State != fleet.Proposed && v.State != fleet.Approved:
			return 0, fmt.Errorf("%w: a new value is %q", ErrInvalid, v.State)
		case v.FourEyes && v.State != fleet.Proposed, v.Second != "":
			return 0, ErrSamePerson
		}
		if err := errors.Join(bounded(maxName, v.Subject, string(v.Kind), v.Digest, v.Source), bounded(maxText, v.Path, v.Detail, v.By)); err != nil {
			return 0, err
		}
		if v.Time.IsZero() {
			v.Time = tx.now()
		}
		v.Subject, v.Path = fleet.CleanText(v.Subject), fleet.CleanText(v.Path)
	}
	// In one order whoever adds them, so that two do not wait for each other.
	order := make([]int, len(vs))
	keys := make([]string, len(vs))
	for i, v := range vs {
		order[i], keys[i] = i, string(identity(v))
	}
	slices.SortFunc(order, func(a, b int) int { return strings.Compare(keys[a], keys[b]) })
	added, subjects := 0, []string{}
	const row = "(?, ?, ?, ?, ?, ?, ?, ?, '', ?, ?, ?)"
	for chunk := range slices.Chunk(order, 64) {
		args := make([]any, 0, 11*len(chunk))
		for _, i := range chunk {
			v := vs[i]
			args = append(args, v.Subject, v.Kind, v.Path, v.Digest, v.Source, v.Detail, v.State, v.By, v.Time, v.FourEyes, []byte(keys[i]))
		}
		err := tx.each(ctx, "INSERT INTO reference_values (subject, kind, path, digest, source, detail, state, proposed_by, second, time, four_eyes, identity) VALUES "+
			strings.Repeat(row+", ", len(chunk)-1)+row+" ON CONFLICT (identity) WHERE state <> 'rejected' DO NOTHING RETURNING subject, state", args,
			func(scan func(...any) error) error {
				var subject string
				var state fleet.ValueState
				err := scan(&subject, &state)
				if added++; state == fleet.Approved {
					subjects = append(subjects, subject)
				}
				return err
			})
		if err != nil {
			return 0, err
		}
	}
	return added, tx.changed(ctx, subjects)
}

// changed gives the subjects a new version. The counter's row is held until the
// transaction ends, so that versions come in the order of commits.
func (tx *Tx) changed(ctx context.Context, subjects []string) error {
	if len(subjects) == 0 {
		return nil
	}
	slices.Sort(subjects)
	var version int64
	if err := tx.one(ctx, "UPDATE counters SET value = value + 1 WHERE name = 'values' RETURNING value", nil, &version); err != nil {
		return err
	}
	for _, subject := range slices.Compact(subjects) {
		_, err := tx.exec(ctx, "INSERT INTO value_versions (subject, version) VALUES (?, ?) ON CONFLICT (subject) DO UPDATE SET version = excluded.version", subject, version)
		if err != nil {
			return err
		}
	}
	return nil
}

// SetValueState moves a value from one state to another: ErrVersion where it is
// not in the state from any more, ErrNotFound, ErrSamePerson where FourEyes wants
// another person than who proposed it to approve it, ErrConflict where a rejected
// one was added anew meanwhile. who is that person.
func (tx *Tx) SetValueState(ctx context.Context, id int64, from, to fleet.ValueState, who string) error {
	if err := tx.setValueState(ctx, id, from, to, who); err != nil {
		return fmt.Errorf("Reference Value %d: %w", id, err)
	}
	return nil
}

func (tx *Tx) setValueState(ctx context.Context, id int64, from, to fleet.ValueState, who string) error {
	v, err := tx.Value(ctx, id)
	switch {
	case err != nil:
		return err
	case v.State != from, from == to:
		return ErrVersion
	case v.FourEyes && to == fleet.Approved && (who == "" || fleet.SamePerson(who, v.By)):
		return ErrSamePerson
	}
	if fleet.SamePerson(who, v.By) {
		who = "" // no second person
	}
	n, err := tx.exec(ctx, "UPDATE reference_values SET state = ?, second = ? WHERE id = ? AND state = ?", to, who, id, from)
	if err == nil && n == 0 {
		err = ErrVersion
	}
	if err != nil {
		return err
	}
	return tx.changed(ctx, []string{v.Subject})
}

// Value gives one Reference Value; ErrNotFound.
func (r reads) Value(ctx context.Context, id int64) (fleet.Value, error) {
	all, err := list(ctx, r, "SELECT "+valueColumns+" FROM reference_values WHERE id = ?", []any{id}, readValue)
	if err == nil && len(all) == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return fleet.Value{}, fmt.Errorf("Reference Value %d: %w", id, err)
	}
	return all[0], nil
}

// ValueFilter chooses Reference Values; zero fields choose all.
type ValueFilter struct {
	Subject *string
	Kind    fleet.Kind
	State   fleet.ValueState
	Source  string
	Search  string // part of the path, or the whole digest
}

// Values gives Reference Values, newest first.
func (r reads) Values(ctx context.Context, f ValueFilter, p Page) ([]fleet.Value, string, error) {
	before, err := p.before()
	if err != nil {
		return nil, "", err
	}
	var c conditions
	c.add("id < ?", before)
	if f.Subject != nil {
		c.add("subject = ?", *f.Subject)
	}
	if f.Kind != "" {
		c.add("kind = ?", f.Kind)
	}
	if f.State != "" {
		c.add("state = ?", f.State)
	}
	if f.Source != "" {
		c.add("source = ?", f.Source)
	}
	if f.Search != "" {
		c.contains(r.d, "path", "digest", f.Search)
	}
	all, err := list(ctx, r, "SELECT "+valueColumns+" FROM reference_values"+c.String()+" ORDER BY id DESC LIMIT ?", append(c.args, p.limit()+1), readValue)
	if err != nil {
		return nil, "", fmt.Errorf("Reference Values: %w", err)
	}
	all, next := paged(all, p, func(v fleet.Value) string { return cursor(strconv.FormatInt(v.ID, 10)) })
	return all, next, nil
}

// ValuesFor gives all values of these subjects that are approved, and those that
// are rejected, which are not to be learned: "" for all, a node's ID and its VMs'
// UUIDs, for one appraisal.
func (r reads) ValuesFor(ctx context.Context, subjects ...string) ([]fleet.Value, error) {
	all, err := list(ctx, r, "SELECT "+valueColumns+" FROM reference_values WHERE state <> 'proposed' AND subject IN "+r.d.inJSON+" ORDER BY id",
		[]any{jsonStrings(subjects)}, readValue)
	if err != nil {
		return nil, fmt.Errorf("Reference Values: %w", err)
	}
	return all, nil
}

// ValuesVersion gives a number that rises when what ValuesFor gives of any of these
// subjects changes: while it is the same, that is too. 0 where there never were
// any. Read it before ValuesFor.
func (r reads) ValuesVersion(ctx context.Context, subjects ...string) (int64, error) {
	var version int64
	err := r.one(ctx, "SELECT COALESCE(max(version), 0) FROM value_versions WHERE subject IN "+r.d.inJSON, []any{jsonStrings(subjects)}, &version)
	if err != nil {
		return 0, fmt.Errorf("version of the Reference Values: %w", err)
	}
	return version, nil
}
