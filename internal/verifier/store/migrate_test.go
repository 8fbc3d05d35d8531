package store

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store/storetest"
)

var writeDumps = flag.Bool("write-dumps", false, "write testdata/vN.* of the present version: once for each version, never again")

// fill puts something everywhere.
func fill(b *bench) {
	n := b.addNode(1)
	b.addNode(2)
	b.round(b.testResult(n.ID, 3, appraise.Affirming), nil)
	b.clock.pass(time.Minute)
	b.round(b.testResult(n.ID, 3, appraise.Affirming), nil)
	b.clock.pass(time.Minute)
	b.round(b.testResult(n.ID, 3, appraise.Contraindicated), []byte("evidence"))
	b.do(func(ctx context.Context, tx *Tx) error {
		_, err := tx.AddValues(ctx, []fleet.Value{
			{Kind: fleet.HostPCR, Path: "sha256:0", Digest: "sha256:00", State: fleet.Approved, By: "anna", Source: "operator"},
			{Subject: n.ID, Kind: fleet.HostIMA, Path: "/bin/x", Digest: "sha256:01", State: fleet.Proposed, FourEyes: true, By: "anna", Source: "operator"},
		})
		if err != nil {
			return err
		}
		if _, err := tx.AddHook(ctx, fleet.Hook{URL: "https://a", Secret: []byte("s")}); err != nil {
			return err
		}
		if _, err := tx.Enqueue(ctx, "trust", []byte("body")); err != nil {
			return err
		}
		if err := tx.PutSetting(ctx, fleet.Setting{Name: "policy", Version: 1, Data: []byte("p"), By: "anna"}); err != nil {
			return err
		}
		tx.Audit(fleet.AuditEntry{Actor: "anna", Action: "first", Detail: "{}"})
		tx.Audit(fleet.AuditEntry{Actor: "anna", Action: "second", Detail: "{}"})
		return tx.AddToken(ctx, fleet.JoinToken{Digest: "d", Name: "host3", Expires: b.clock.Now().Add(time.Hour), By: "anna"})
	})
	if err := errors.Join(
		b.PutSession(b.t.Context(), fleet.Session{Digest: "d", Person: "anna", Expires: b.clock.Now().Add(time.Hour)}),
		b.PutChallenge(b.t.Context(), fleet.Challenge{ID: "c", Purpose: "enrolment", Data: []byte("x"), Expires: b.clock.Now().Add(time.Hour)}),
	); err != nil {
		b.t.Fatal(err)
	}
}

// filled checks that it is all there.
func filled(b *bench) {
	t, ctx := b.t, b.t.Context()
	t.Helper()
	b.clock.now = time.Date(2026, 11, 1, 12, 2, 0, 0, time.UTC)
	n := testkit.Must[fleet.Node](t)(b.NodeByEK(ctx, testNode(1).EKDigest))
	if want := testNode(1); n.ID != want.ID || n.Name != want.Name || !bytes.Equal(n.Certifier, want.Certifier) || !n.Enrolled.Equal(want.Enrolled) || !n.Seen.Equal(b.clock.Now()) {
		t.Errorf("%+v", n)
	}
	res := testkit.Must[*appraise.Result](t)(b.Result(ctx, n.ID))
	if res.Host.Tier != appraise.Contraindicated || len(res.VMs) != 3 || !res.Expires.Equal(b.clock.Now().Add(2*time.Minute)) {
		t.Errorf("%+v", res)
	}
	rounds, _, err := b.Rounds(ctx, RoundFilter{Node: n.ID}, Page{})
	if err != nil || len(rounds) != 2 || rounds[1].Count != 2 {
		t.Fatalf("%+v, %v", rounds, err)
	}
	if r := testkit.Must[fleet.Round](t)(b.Round(ctx, rounds[0].ID)); string(r.Evidence) != "evidence" {
		t.Errorf("%+v", r)
	}
	if vms, _, err := b.VMs(ctx, VMFilter{Node: n.ID}, Page{}); err != nil || len(vms) != 3 || vms[0].Tier != appraise.Contraindicated {
		t.Errorf("%+v, %v", vms, err)
	}
	if st := testkit.Must[RoundState](t)(b.RoundState(ctx, n.ID)); string(st.Checkpoint) != "checkpoint" {
		t.Errorf("%+v", st)
	}
	if vs := testkit.Must[[]fleet.Value](t)(b.ValuesFor(ctx, "", n.ID)); len(vs) != 1 {
		t.Errorf("%+v", vs)
	}
	if vs, _, err := b.Values(ctx, ValueFilter{State: fleet.Proposed}, Page{}); err != nil || len(vs) != 1 || !vs[0].FourEyes || vs[0].By != "anna" {
		t.Errorf("%+v, %v", vs, err)
	}
	if v := testkit.Must[fleet.Setting](t)(b.Setting(ctx, "policy")); string(v.Data) != "p" {
		t.Errorf("%+v", v)
	}
	if head := testkit.Must[fleet.AuditHead](t)(b.VerifyAudit(ctx, nil, nil)); head.ID != 2 {
		t.Errorf("%+v", head)
	}
	testkit.Must[fleet.Session](t)(b.Session(ctx, "d"))
	testkit.Must[fleet.Challenge](t)(b.TakeChallenge(ctx, "enrolment", "c"))
	if err := b.Do(ctx, func(tx *Tx) error { return tx.UseToken(ctx, "d", "host3", "n") }); err != nil {
		t.Error(err)
	}
	ds := testkit.Must[[]fleet.Delivery](t)(b.Claim(ctx, 10, time.Minute))
	if len(ds) != 1 || string(ds[0].Body) != "body" {
		t.Errorf("%+v", ds)
	}
	// And it can be worked with: IDs go on.
	if id := b.round(b.testResult(n.ID, 1, appraise.Affirming), nil); id <= rounds[0].ID {
		t.Errorf("round %d", id)
	}
	b.do(func(ctx context.Context, tx *Tx) error {
		_, err := tx.AddValues(ctx, []fleet.Value{{Kind: fleet.HostPCR, Path: "new", Digest: "d", State: fleet.Approved}})
		tx.Audit(fleet.AuditEntry{Actor: "anna", Action: "third"})
		return err
	})
}

func newBench(t *testing.T, dsn string) *bench {
	return &bench{t: t, dsn: dsn, clock: &clock{now: time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)}}
}

// A database of each version that ever was is brought to the present one, and
// keeps its data. The dumps stay in testdata for ever.
func TestOldDumps(t *testing.T) {
	server, err := storetest.New("fsync=off")
	storetest.Need(t, err)
	t.Cleanup(func() {
		if err := server.Remove(); err != nil {
			t.Error(err)
		}
	})
	pgArgs := func(dsn string) string { return dsn }
	if *writeDumps {
		lite, pg := newBench(t, storetest.SQLite(t)), newBench(t, server.NewDatabase(t))
		for _, b := range []*bench{lite, pg} {
			b.Store = b.replica()
			fill(b)
		}
		copied := filepath.Join(t.TempDir(), "copy")
		if err := lite.Backup(t.Context(), copied); err != nil {
			t.Fatal(err)
		}
		data := testkit.Must[[]byte](t)(os.ReadFile(copied))
		dump := testkit.Must[[]byte](t)(server.Run(nil, "pg_dump", "--no-owner", pgArgs(pg.dsn)))
		v := testkit.Must[Stats](t)(lite.Stats(t.Context())).Schema
		writeGzip(t, fmt.Sprintf("testdata/v%d.sqlite.gz", v), data)
		writeGzip(t, fmt.Sprintf("testdata/v%d.postgres.sql.gz", v), dump)
	}
	present, err := fs.Glob(embedded, "migrations/sqlite/*.sql")
	if err != nil {
		t.Fatal(err)
	}
	for v := range len(present) {
		t.Run(fmt.Sprintf("sqlite/v%d", v+1), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "verifier.db")
			if err := os.WriteFile(path, readGzip(t, fmt.Sprintf("testdata/v%d.sqlite.gz", v+1)), 0o600); err != nil {
				t.Fatal(err)
			}
			b := newBench(t, "sqlite:"+path)
			b.Store = b.replica()
			filled(b)
		})
		t.Run(fmt.Sprintf("postgres/v%d", v+1), func(t *testing.T) {
			b := newBench(t, server.NewDatabase(t))
			if out, err := server.Run(readGzip(t, fmt.Sprintf("testdata/v%d.postgres.sql.gz", v+1)), "psql", "-q", "-v", "ON_ERROR_STOP=1", "-d", pgArgs(b.dsn)); err != nil {
				t.Fatalf("%v %s", err, out)
			}
			b.Store = b.replica()
			filled(b)
		})
	}
}

// Names that differ in case alone were two: now each is in lower case, and one of
// those that would be the same has another and a problem.
func TestNamesFold(t *testing.T) {
	rename := "UPDATE nodes SET name = 'ALPHA' WHERE name = 'host1'; UPDATE nodes SET name = 'alpha' WHERE name = 'host2'; UPDATE tokens SET name = 'Host3'"
	check := func(t *testing.T, b *bench) {
		t.Helper()
		if err := b.raw(rename); err != nil {
			t.Fatal(err)
		}
		b.Store = b.replica()
		first, second := testkit.Must[fleet.Node](t)(b.Node(t.Context(), testNode(1).ID)), testkit.Must[fleet.Node](t)(b.Node(t.Context(), testNode(2).ID))
		if first.Name != "alpha-00000000" || !strings.HasPrefix(first.Problem, "name-taken: ") || second.Name != "alpha" || second.Problem != "" {
			t.Errorf("%q %q, %q %q", first.Name, first.Problem, second.Name, second.Problem)
		}
		if !first.Learns || !second.Learns {
			t.Error("nodes that were learned before are not any more")
		}
		if token := testkit.Must[fleet.JoinToken](t)(b.Token(t.Context(), "d")); token.Name != "host3" {
			t.Errorf("%+v", token)
		}
	}
	t.Run("sqlite", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "verifier.db")
		if err := os.WriteFile(path, readGzip(t, "testdata/v2.sqlite.gz"), 0o600); err != nil {
			t.Fatal(err)
		}
		check(t, newBench(t, "sqlite:"+path))
	})
	t.Run("postgres", func(t *testing.T) {
		server, err := storetest.New("fsync=off")
		storetest.Need(t, err)
		t.Cleanup(func() {
			if err := server.Remove(); err != nil {
				t.Error(err)
			}
		})
		b := newBench(t, server.NewDatabase(t))
		if out, err := server.Run(readGzip(t, "testdata/v2.postgres.sql.gz"), "psql", "-q", "-v", "ON_ERROR_STOP=1", "-d", b.dsn); err != nil {
			t.Fatalf("%v %s", err, out)
		}
		check(t, b)
	})
}

func writeGzip(t *testing.T, path string, data []byte) {
	t.Helper()
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Write(data)
	if err := errors.Join(err, w.Close(), os.MkdirAll("testdata", 0o755), os.WriteFile(path, out.Bytes(), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func readGzip(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatalf("%v: each version of the schema needs its dump", err)
	}
	defer f.Close()
	r, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	return testkit.Must[[]byte](t)(io.ReadAll(r))
}

// withNext is what a later program has: one more migration.
func withNext(t *testing.T, sql string) migrationSet {
	t.Helper()
	m := fstest.MapFS{}
	err := fs.WalkDir(embedded, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := fs.ReadFile(embedded, path)
		m[path] = &fstest.MapFile{Data: data}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"sqlite", "postgres"} {
		m["migrations/"+d+"/99999_next.sql"] = &fstest.MapFile{Data: []byte("-- +goose Up\n" + sql)}
	}
	return migrationSet{m}
}

func TestUpgradeAndNewer(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		fill(b)
		o := Options{Now: b.clock.Now}
		// One that fails half way leaves the version before.
		_, err := open(t.Context(), b.dsn, o, withNext(t, "ALTER TABLE nodes ADD COLUMN extra TEXT;\nALTER TABLE nonsense ADD COLUMN extra TEXT;"))
		if err == nil || !strings.Contains(err.Error(), "version 4 to 99999") {
			t.Fatalf("a broken migration: %v", err)
		}
		if err := b.raw("SELECT extra FROM nodes"); err == nil {
			t.Error("half a migration stayed")
		}
		later, err := open(t.Context(), b.dsn, o, withNext(t, "ALTER TABLE nodes ADD COLUMN extra TEXT;"))
		if err != nil {
			t.Fatal(err)
		}
		defer later.Close()
		if err := b.raw("SELECT extra FROM nodes"); err != nil {
			t.Error(err)
		}
		_, err = Open(t.Context(), b.dsn, o)
		wantErr(t, err, ErrNewer)
		if !strings.Contains(err.Error(), "99999") {
			t.Error(err)
		}
		filled(&bench{Store: later, t: t, dsn: b.dsn, clock: b.clock})
	})
}

// Replicas that start together migrate once.
func TestOpenTogether(t *testing.T) {
	for name, dsn := range map[string]string{"sqlite": storetest.SQLite(t), "postgres": storetest.Postgres(t)} {
		t.Run(name, func(t *testing.T) {
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					s, err := Open(t.Context(), dsn, Options{MaxConns: 2})
					if err != nil {
						t.Error(err)
						return
					}
					if err := errors.Join(s.Ping(t.Context()), s.Close()); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	garbage := filepath.Join(t.TempDir(), "garbage")
	if err := os.WriteFile(garbage, bytes.Repeat([]byte("no database "), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	for dsn, want := range map[string]error{
		"mysql://x":                       nil,
		"":                                nil,
		"sqlite:" + garbage:               nil,
		"sqlite:/nonexistent/verifier.db": fs.ErrNotExist,
		"postgres://u:secret@/db?host=" + url.QueryEscape(t.TempDir()): ErrUnavailable,
		"postgres://u:secret@127.0.0.1:1/db?port=nonsense":             nil,
	} {
		s, err := Open(t.Context(), dsn, Options{})
		if err == nil {
			t.Errorf("%q was opened: %v", dsn, s.Close())
			continue
		}
		if want != nil && !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", dsn, err, want)
		}
		if strings.Contains(err.Error(), "secret") {
			t.Errorf("a password in %v", err)
		}
	}
}

func TestBackup(t *testing.T) {
	b := newBench(t, storetest.SQLite(t))
	b.Store = b.replica()
	fill(b)
	path := filepath.Join(t.TempDir(), "it's ? a # copy%20")
	if err := b.Backup(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", fi.Mode(), err)
	}
	wantErr(t, b.Backup(t.Context(), path), fs.ErrExist)
	c := newBench(t, "sqlite:"+path)
	c.Store = c.replica()
	filled(c)
}
