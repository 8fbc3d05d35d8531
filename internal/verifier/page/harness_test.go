package page

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/page/pagetest"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/store/storetest"
	"virt-trust/internal/verifier/webhook"
)

// harness is a page over a real SQLite store and the real operate.Service.
type harness struct {
	t     testing.TB
	Store *store.Store
	Page  *Page
	Build *pagetest.Builder
	Log   strings.Builder

	mu    sync.Mutex
	now   time.Time
	actor operate.Actor
}

var (
	reader   = operate.Actor{Name: "rita", Role: operate.Reader}
	operator = operate.Actor{Name: "oskar", Role: operate.Operator}
	policyA  = operate.Actor{Name: "alice", Role: operate.Policy}
	policyB  = operate.Actor{Name: "bob", Role: operate.Policy}
	start    = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
)

// unset is the policy that counts where none was set.
var unset = []byte(`{"format":"virt-trust-policy-1","id":"default"}`)

func (h *harness) Now() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.now
}

func (h *harness) pass(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now = h.now.Add(d)
}

func (h *harness) as(a operate.Actor) *harness {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.actor = a
	return h
}

func newHarness(t testing.TB) *harness { return openHarness(t, storetest.SQLite(t)) }

func openHarness(t testing.TB, dsn string) *harness {
	t.Helper()
	h := &harness{t: t, now: start, actor: policyA}
	var err error
	h.Store, err = store.Open(context.Background(), dsn, store.Options{Now: h.Now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Store.Close() })
	h.Build = &pagetest.Builder{Store: h.Store, Now: h.Now}
	service := &operate.Service{
		Store: h.Store, Pin: ca.Pin(sha256.Sum256([]byte("ca"))), FourEyes: true, Learning: true,
		Unset: unset, Guard: webhook.Guard{}, Now: h.Now,
		Deliver: func(context.Context, fleet.Hook, fleet.Delivery) error { return io.ErrUnexpectedEOF },
	}
	l := logrus.New()
	l.SetOutput(&h.Log)
	h.Page, err = New(Config{
		Store: h.Store, Operator: service, OIDC: true, FourEyes: true, HookEvents: webhook.Events(), Now: h.Now, Log: logrus.NewEntry(l),
		Actor: func(*http.Request) (operate.Actor, error) {
			h.mu.Lock()
			defer h.mu.Unlock()
			return h.actor, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// newFleet has the fleet of pagetest: built once, and copied for each test.
func newFleet(t testing.TB) *harness {
	t.Helper()
	built.Do(func() {
		h := newHarness(t)
		if err := h.Build.Fleet(context.Background()); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "copy.db")
		if err := h.Store.Backup(context.Background(), file); err != nil {
			t.Fatal(err)
		}
		var err error
		if fleetDB, err = os.ReadFile(file); err != nil {
			t.Fatal(err)
		}
	})
	file := filepath.Join(t.TempDir(), "v.db")
	if err := os.WriteFile(file, fleetDB, 0o600); err != nil {
		t.Fatal(err)
	}
	return openHarness(t, "sqlite:"+file)
}

var (
	built   sync.Once
	fleetDB []byte
)

// get gives a page's body, which has to be there.
func (h *harness) get(path string) string {
	h.t.Helper()
	w := h.do("GET", path, nil)
	if w.Code != http.StatusOK {
		h.t.Fatalf("GET %s: %d\n%.2000s\n%s", path, w.Code, w.Body, h.Log.String())
	}
	return w.Body.String()
}

func (h *harness) do(method, path string, form url.Values) *httptest.ResponseRecorder {
	var body io.Reader
	if form != nil {
		body = strings.NewReader(form.Encode())
	}
	r := httptest.NewRequest(method, path, body)
	if form != nil {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	w := httptest.NewRecorder()
	h.Page.ServeHTTP(w, r)
	return w
}

// post sends a form, which has to lead to a place with 303.
func (h *harness) post(path string, form url.Values) string {
	h.t.Helper()
	w := h.do("POST", path, form)
	if w.Code != http.StatusSeeOther {
		h.t.Fatalf("POST %s: %d\n%.3000s\n%s", path, w.Code, w.Body, h.Log.String())
	}
	return w.Header().Get("Location")
}

// newest gives the ID of a node's newest round, spelt.
func (h *harness) newest(node string) string {
	h.t.Helper()
	return strconv.FormatInt(h.roundsOf(node)[0].ID, 10)
}

func (h *harness) roundsOf(node string) []fleet.Round {
	h.t.Helper()
	rs, _, err := h.Store.Rounds(context.Background(), store.RoundFilter{Node: node}, store.Page{Limit: 1000})
	if err != nil || len(rs) == 0 {
		h.t.Fatalf("rounds of %s: %v, %d", node, err, len(rs))
	}
	return rs
}

// diffPath is the comparison of a node's oldest and newest rounds.
func (h *harness) diffPath(node string) string {
	rs := h.roundsOf(node)
	return fmt.Sprintf("/nodes/%s/diff?from=%d&to=%d", node, rs[len(rs)-1].ID, rs[0].ID)
}
