package store

import (
	"context"
	"database/sql"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"time"

	"virt-trust/internal/verifier/fleet"
)

// dialect is where the two databases differ.
type dialect struct {
	name        string
	numbered    bool   // $1 for ?
	forUpdate   string // ends a SELECT whose rows are then written
	skipLocked  string // the same, of rows that nobody else is at
	like        string // whether a column, %s, is like a text, whatever its case
	inJSON      string // the strings in a JSON array, as a subquery
	eachJSON    string // the same, as a table with a column value
	size        string // of the database in bytes
	classifyOwn func(error) error
	rebound     sync.Map // query with ? => with $1
}

var sqlite = dialect{
	name:        "sqlite",
	like:        "%s LIKE ?",
	inJSON:      "(SELECT value FROM json_each(?))",
	eachJSON:    "(SELECT value FROM json_each(?))",
	size:        "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()",
	classifyOwn: classifySQLite,
}

var postgres = dialect{
	name: "postgres", numbered: true,
	forUpdate:   " FOR UPDATE",
	skipLocked:  " FOR UPDATE SKIP LOCKED",
	like:        "lower(%s) LIKE lower(?)",
	inJSON:      "(SELECT jsonb_array_elements_text(CAST(? AS jsonb)))",
	eachJSON:    "(SELECT jsonb_array_elements_text(CAST(? AS jsonb)) AS value)",
	size:        "SELECT pg_database_size(current_database())",
	classifyOwn: classifyPostgres,
}

// rebind numbers the placeholders. No query of ours has a ? in it otherwise.
func (d *dialect) rebind(q string) string {
	if !d.numbered {
		return q
	}
	if r, ok := d.rebound.Load(q); ok {
		return r.(string)
	}
	var b strings.Builder
	for i, part := range strings.Split(q, "?") {
		if i > 0 {
			b.WriteByte('$')
			b.WriteString(strconv.Itoa(i))
		}
		b.WriteString(part)
	}
	d.rebound.Store(q, b.String())
	return b.String()
}

type runner interface {
	query(ctx context.Context, q string, args []any) (*sql.Rows, error)
	exec(ctx context.Context, q string, args []any) (sql.Result, error)
}

// reads are the queries; of a Store or inside a Tx.
type reads struct {
	d      *dialect
	run    runner
	now    func() time.Time
	detach bool // the callers' contexts do not interrupt statements
}

func (r reads) context(ctx context.Context) context.Context {
	if r.detach {
		return context.WithoutCancel(ctx)
	}
	return ctx
}

// values makes arguments of what Go has: no text that PostgreSQL refuses, times
// as microseconds, empty bytes as NULL.
func values(args []any) []any {
	for i, a := range args {
		switch v := a.(type) {
		case time.Time:
			args[i] = micros(v)
		case []byte:
			if len(v) == 0 {
				args[i] = nil
			}
		case bool:
			args[i] = int64(0)
			if v {
				args[i] = int64(1)
			}
		case nil:
		default:
			switch rv := reflect.ValueOf(a); rv.Kind() {
			case reflect.String:
				args[i] = fleet.CleanText(rv.String())
			case reflect.Int, reflect.Int8, reflect.Int64:
				args[i] = rv.Int()
			}
		}
	}
	return args
}

func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

// at scans a time.
type at struct{ t *time.Time }

// Scan takes microseconds.
func (a at) Scan(v any) error {
	n, ok := v.(int64)
	if !ok {
		return fmt.Errorf("a time is %T", v)
	}
	*a.t = time.Time{}
	if n != 0 {
		*a.t = time.UnixMicro(n).UTC()
	}
	return nil
}

// asJSON scans JSON into what v points to; NULL leaves it.
type asJSON struct{ v any }

// Scan takes text or bytes.
func (a asJSON) Scan(v any) error {
	switch v := v.(type) {
	case nil:
		return nil
	case []byte:
		return json.Unmarshal(v, a.v)
	case string:
		return json.Unmarshal([]byte(v), a.v)
	}
	return fmt.Errorf("JSON is %T", v)
}

// toJSON is for what can always be marshalled.
func toJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// exec runs a statement and gives how many rows it touched.
func (r reads) exec(ctx context.Context, q string, args ...any) (int64, error) {
	res, err := r.run.exec(r.context(ctx), r.d.rebind(q), values(args))
	if err != nil {
		return 0, r.d.classify(err)
	}
	n, err := res.RowsAffected()
	return n, r.d.classify(err)
}

// one runs a query for one row; ErrNotFound.
func (r reads) one(ctx context.Context, q string, args []any, dest ...any) error {
	found := false
	err := r.each(ctx, q, args, func(scan func(...any) error) error {
		found = true
		return scan(dest...)
	})
	if err == nil && !found {
		return ErrNotFound
	}
	return err
}

// each runs a query and gives its rows to f, one by one.
func (r reads) each(ctx context.Context, q string, args []any, f func(scan func(...any) error) error) error {
	rows, err := r.run.query(r.context(ctx), r.d.rebind(q), values(args))
	if err != nil {
		return r.d.classify(err)
	}
	defer rows.Close()
	for rows.Next() {
		if err := f(rows.Scan); err != nil {
			return r.d.classify(err)
		}
	}
	return r.d.classify(rows.Err())
}

// list runs a query and gives its rows.
func list[T any](ctx context.Context, r reads, q string, args []any, read func(scan func(...any) error, v *T) error) ([]T, error) {
	var all []T
	err := r.each(ctx, q, args, func(scan func(...any) error) error {
		var v T
		if err := read(scan, &v); err != nil {
			return err
		}
		all = append(all, v)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// Page asks for at most Limit (100 where 0, at most 1000) from where the page
// before ended: After is what that gave as next, "" for the first page.
type Page struct {
	Limit int
	After string
}

func (p Page) limit() int {
	if p.Limit <= 0 {
		return 100
	}
	return min(p.Limit, 1000)
}

// after gives the n parts of the cursor, or nil for the first page; ErrInvalid.
func (p Page) after(n int) ([]string, error) {
	if p.After == "" {
		return nil, nil
	}
	var parts []string
	if b, err := base64.RawURLEncoding.DecodeString(p.After); err == nil && json.Unmarshal(b, &parts) == nil && len(parts) == n {
		return parts, nil
	}
	return nil, fmt.Errorf("%w: that is no page", ErrInvalid)
}

// before is after for what is listed by falling ID.
func (p Page) before() (int64, error) {
	parts, err := p.after(1)
	if err != nil || parts == nil {
		return 1<<63 - 1, err
	}
	id, err := strconv.ParseInt(parts[0], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%w: that is no page", ErrInvalid)
	}
	return id, nil
}

func cursor(parts ...string) string { return base64.RawURLEncoding.EncodeToString(toJSON(parts)) }

// paged cuts what was read with one row more than the page has, and gives the
// cursor of the next page.
func paged[T any](all []T, p Page, at func(T) string) ([]T, string) {
	if len(all) <= p.limit() {
		return all, ""
	}
	all = all[:p.limit()]
	return all, at(all[len(all)-1])
}

// conditions gathers the WHERE of a filter.
type conditions struct {
	where []string
	args  []any
}

func (c *conditions) add(cond string, args ...any) {
	c.where, c.args = append(c.where, cond), append(c.args, args...)
}

// contains wants text in a column, whatever its case, or the whole of another.
func (c *conditions) contains(d *dialect, column, whole, text string) {
	escaped := strings.NewReplacer("!", "!!", "%", "!%", "_", "!_").Replace(text)
	c.add("("+fmt.Sprintf(d.like, column)+" ESCAPE '!' OR "+whole+" = ?)", "%"+escaped+"%", text)
}

func (c *conditions) String() string {
	if len(c.where) == 0 {
		return ""
	}
	return " WHERE " + strings.Join(c.where, " AND ")
}

// bounded refuses text that is longer than what is kept of its kind.
func bounded(limit int, texts ...string) error {
	for _, t := range texts {
		if len(t) > limit {
			return fmt.Errorf("%w: text of %d bytes, at most %d", ErrInvalid, len(t), limit)
		}
	}
	return nil
}
