// Package storetest gives tests a database of their own: a file for SQLite, and
// for PostgreSQL the real server, started as a child on a unix socket. Nothing
// that ships imports it.
package storetest

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"virt-trust/internal/testkit"

	_ "github.com/jackc/pgx/v5/stdlib" // driver "pgx"
)

// SQLite gives the DSN of a new database.
func SQLite(t testing.TB) string { return "sqlite:" + filepath.Join(t.TempDir(), "verifier.db") }

// Server is a PostgreSQL server.
type Server struct {
	dir, bin   string
	credential *syscall.Credential
	more       []string
	child      *exec.Cmd
	exited     chan struct{}
	stderr     bytes.Buffer
}

// errMissing says that there is no PostgreSQL on this machine.
var errMissing = errors.New("no PostgreSQL: apt-get install --no-install-recommends postgresql")

// New makes a server, with settings ("fsync=off") besides its own, and starts it.
// Whoever made it calls Remove.
func New(settings ...string) (*Server, error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, errMissing
	}
	s := &Server{bin: filepath.Dir(found[len(found)-1]), more: settings}
	if s.dir, err = os.MkdirTemp("", "vt-postgres-"); err != nil {
		return nil, err
	}
	if os.Geteuid() == 0 { // the server refuses to be root
		u, err := user.Lookup("postgres")
		if err != nil {
			return nil, errors.Join(err, s.Remove())
		}
		uid, e1 := strconv.Atoi(u.Uid)
		gid, e2 := strconv.Atoi(u.Gid)
		if err := errors.Join(e1, e2, os.Chown(s.dir, uid, gid)); err != nil {
			return nil, errors.Join(err, s.Remove())
		}
		s.credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	init := exec.Command(filepath.Join(s.bin, "initdb"), "--pgdata="+filepath.Join(s.dir, "data"), "--username=postgres", "--auth=trust",
		"--encoding=UTF8", "--locale=C.UTF-8", "--no-sync")
	init.Dir, init.SysProcAttr = s.dir, &syscall.SysProcAttr{Credential: s.credential}
	if out, err := init.CombinedOutput(); err != nil {
		return nil, errors.Join(fmt.Errorf("initdb: %w: %s", err, out), s.Remove())
	}
	if err := s.Start(); err != nil {
		return nil, errors.Join(err, s.Remove())
	}
	return s, nil
}

// DSN is that of a database in the server.
func (s *Server) DSN(database string) string {
	return (&url.URL{Scheme: "postgres", User: url.User("postgres"), Path: "/" + database, RawQuery: url.Values{"host": {s.dir}}.Encode()}).String()
}

// Start starts the server, again after Kill, and waits until it answers.
func (s *Server) Start() error {
	deadline := time.Now().Add(30 * time.Second)
	for {
		if err := s.start(deadline); err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(50 * time.Millisecond) // children of one that was killed are still there
	}
}

func (s *Server) start(deadline time.Time) error {
	args := []string{"-D", filepath.Join(s.dir, "data"), "-k", s.dir, "-c", "listen_addresses=", "-c", "max_connections=60"}
	for _, c := range s.more {
		args = append(args, "-c", c)
	}
	s.stderr.Reset()
	s.child = exec.Command(filepath.Join(s.bin, "postgres"), args...)
	s.child.Dir, s.child.Stderr, s.child.WaitDelay = s.dir, &s.stderr, time.Second
	s.child.SysProcAttr = &syscall.SysProcAttr{Credential: s.credential, Pdeathsig: syscall.SIGKILL}
	s.exited = make(chan struct{})
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // Pdeathsig is of the thread
		err := s.child.Start()
		started <- err
		if err == nil {
			_ = s.child.Wait() // it is killed
		}
		close(s.exited)
	}()
	if err := <-started; err != nil {
		return err
	}
	db, err := sql.Open("pgx", s.DSN("postgres"))
	if err != nil {
		return errors.Join(err, s.Kill())
	}
	defer db.Close()
	for {
		if err := db.PingContext(context.Background()); err == nil {
			return nil
		}
		select {
		case <-s.exited:
			return fmt.Errorf("postgres ended: %s", s.stderr.String())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return errors.Join(errors.New("postgres does not answer"), s.Kill())
		}
	}
}

// Kill ends the server with SIGKILL, as a power cut would.
func (s *Server) Kill() error {
	if s.child == nil || s.child.Process == nil {
		return nil
	}
	err := s.child.Process.Kill()
	<-s.exited
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// Remove ends the server and removes all that it had.
func (s *Server) Remove() error { return errors.Join(s.Kill(), os.RemoveAll(s.dir)) }

// Run runs psql on a database with a script, or pg_dump and the like.
func (s *Server) Run(stdin []byte, program string, args ...string) ([]byte, error) {
	c := exec.Command(filepath.Join(s.bin, program), args...)
	c.Stdin, c.Dir = bytes.NewReader(stdin), s.dir
	out, err := c.Output()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		err = fmt.Errorf("%s: %w: %s", program, err, ee.Stderr)
	}
	return out, err
}

var (
	shared     *Server
	sharedErr  error
	sharedOnce sync.Once
	databases  atomic.Int64
)

// Main is for a TestMain that uses Postgres: it ends the server.
func Main(m *testing.M) int {
	code := m.Run()
	if shared != nil {
		if err := shared.Remove(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return code
}

// Postgres gives the DSN of a new database in a server that all tests share; the
// package needs Main in its TestMain. Without PostgreSQL the test is skipped, and
// fails where CI=true.
func Postgres(t testing.TB) string {
	t.Helper()
	sharedOnce.Do(func() { shared, sharedErr = New("fsync=off", "full_page_writes=off") })
	Need(t, sharedErr)
	return shared.NewDatabase(t)
}

// Need fails or skips the test for the error of New.
func Need(t testing.TB, err error) {
	t.Helper()
	if errors.Is(err, errMissing) {
		testkit.Missing(t, "%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// NewDatabase makes a database and gives its DSN.
func (s *Server) NewDatabase(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("t%d", databases.Add(1))
	db, err := sql.Open("pgx", s.DSN("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), "CREATE DATABASE "+name); err != nil {
		t.Fatal(err)
	}
	return s.DSN(name)
}
