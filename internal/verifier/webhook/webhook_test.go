package webhook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"virt-trust/internal/appraise"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/store/storetest"
)

// The example of Standard Webhooks' own libraries.
func TestSign(t *testing.T) {
	secret := []byte{0x30, 0x75, 0xf1, 0x33, 0x10, 0xae, 0x65, 0x92, 0xed, 0x4a, 0x7e, 0xfb, 0x04, 0x67, 0x2b, 0x2f, 0x96, 0xa5, 0x16, 0xee, 0xd4, 0x8f, 0xb2, 0x0f}
	id, at, body := "msg_p5jXN8AQM9LWM0D4loKWxJek", time.Unix(1614265330, 0), []byte(`{"test": 2432232314}`)
	sig := Sign(secret, id, at, body)
	if !strings.HasPrefix(sig, "v1,") || len(sig) != 3+44 {
		t.Error(sig)
	}
	if err := Verify(secret, id, "1614265330", "v1,AAAA "+sig+" v2,BBBB", body, at.Add(time.Minute)); err != nil {
		t.Error(err)
	}
	for name, err := range map[string]error{
		"id":        Verify(secret, id+"x", "1614265330", sig, body, at),
		"body":      Verify(secret, id, "1614265330", sig, []byte(`{"test": 2432232315}`), at),
		"time":      Verify(secret, id, "1614265331", sig, body, at),
		"secret":    Verify([]byte("x"), id, "1614265330", sig, body, at),
		"old":       Verify(secret, id, "1614265330", sig, body, at.Add(Tolerance+time.Second)),
		"to come":   Verify(secret, id, "1614265330", sig, body, at.Add(-Tolerance-time.Second)),
		"no number": Verify(secret, id, "x", sig, body, at),
		"version":   Verify(secret, id, "1614265330", "v1a"+sig[2:], body, at),
		"none":      Verify(secret, id, "1614265330", "", body, at),
	} {
		if err == nil {
			t.Errorf("%s: it is taken for right", name)
		}
	}
}

func TestGuard(t *testing.T) {
	g := Guard{Allow: []netip.Prefix{netip.MustParsePrefix("10.1.2.0/24")}}
	for _, good := range []string{"8.8.8.8", "2606:4700::1111", "10.1.2.3", "::ffff:10.1.2.3"} {
		if err := g.Address(netip.MustParseAddr(good)); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{
		"127.0.0.1", "127.255.0.1", "::1", "0.0.0.0", "::", "10.1.3.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1",
		"fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "2001::1", "::7f00:1", "198.18.0.1", "192.0.0.1",
	} {
		if err := g.Address(netip.MustParseAddr(bad)); !errors.Is(err, ErrForbidden) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	for url, ok := range map[string]bool{
		"https://hooks.example.org/x?y=z": true, "https://hooks.example.org:8443": true, "https://10.1.2.3/": true, "http://hooks.example.org/": false, "https://": false,
		"https://u:p@hooks.example.org/": false, "https://hooks.example.org/#f": false, "https://127.0.0.1/": false, "https://[::1]/": false, "file:///etc/passwd": false,
		"gopher://x": false, "": false, "https://x/" + strings.Repeat("y", 3000): false, "https://[::ffff:127.0.0.1]/": false,
	} {
		if err := g.URL(url); (err == nil) != ok {
			t.Errorf("%.60s: %v", url, err)
		}
	}
	if err := (Guard{AllowHTTP: true}).URL("http://hooks.example.org/"); err != nil {
		t.Error(err)
	}
}

// A name that leads to this machine, and a redirect that does, lead nowhere.
func TestGuardWhenConnecting(t *testing.T) {
	reached := false
	inner := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached = true }))
	defer inner.Close()
	_, port, _ := strings.Cut(strings.TrimPrefix(inner.URL, "http://"), ":")
	s := &Sender{Client: Guard{AllowHTTP: true}.Client(), Now: time.Now}
	for _, url := range []string{inner.URL, "http://localhost:" + port} {
		err := s.Deliver(t.Context(), fleet.Hook{URL: url}, fleet.Delivery{})
		if !errors.Is(err, ErrForbidden) || reached {
			t.Errorf("%s: %v", url, err)
		}
	}
	local := Guard{AllowHTTP: true, Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}}
	outer := httptest.NewServer(http.RedirectHandler(inner.URL, http.StatusTemporaryRedirect))
	defer outer.Close()
	s.Client = local.Client()
	var f *Failure
	if err := s.Deliver(t.Context(), fleet.Hook{URL: outer.URL}, fleet.Delivery{}); !errors.As(err, &f) || f.Status != 307 || reached {
		t.Errorf("%v", err)
	}
	t.Setenv("HTTP_PROXY", inner.URL)
	t.Setenv("http_proxy", inner.URL)
	if err := s.Deliver(t.Context(), fleet.Hook{URL: "http://hooks.invalid/"}, fleet.Delivery{}); err == nil || reached {
		t.Errorf("through a proxy: %v", err)
	}
}

func TestTrustChanges(t *testing.T) {
	n := fleet.Node{ID: "n", Name: "alpha"}
	result := func(host appraise.Tier, vms ...appraise.VM) *appraise.Result {
		return &appraise.Result{Host: appraise.Appraisal{Tier: host, Reasons: []appraise.Reason{{Code: "b"}, {Code: "a"}, {Code: "b"}}}, VMs: vms}
	}
	vm := func(uuid string, tier appraise.Tier) appraise.VM {
		return appraise.VM{UUID: uuid, Name: "vm-" + uuid, Appraisal: appraise.Appraisal{Tier: tier}}
	}
	for name, c := range map[string]struct {
		before, now *appraise.Result
		want        []string
	}{
		"the first":     {nil, result(appraise.Affirming, vm("1", appraise.Warning)), []string{"1 vm-1 none warning", "host  none affirming"}},
		"the same":      {result(appraise.Affirming, vm("1", appraise.Affirming)), result(appraise.Affirming, vm("1", appraise.Affirming)), nil},
		"the VM":        {result(appraise.Affirming, vm("1", appraise.Affirming)), result(appraise.Affirming, vm("1", appraise.Contraindicated)), []string{"1 vm-1 affirming contraindicated"}},
		"gone":          {result(appraise.Affirming, vm("1", appraise.Affirming)), result(appraise.Affirming), []string{"1 vm-1 affirming none"}},
		"gone, as none": {result(appraise.Affirming, vm("1", appraise.None)), result(appraise.Affirming), nil},
		"all":           {result(appraise.Affirming, vm("1", appraise.Affirming)), result(appraise.None, vm("1", appraise.None)), []string{"1 vm-1 affirming none", "host  affirming none"}},
	} {
		var got []string
		for _, e := range TrustChanges(n, c.before, c.now, time.Now()) {
			d := e.Data.(Changed)
			got = append(got, fmt.Sprintf("%s %s %s %s", d.Subject, d.Name, d.From, d.To))
			if d.Subject == "host" && d.NodeName != "alpha" || d.Subject == "host" && c.now != nil && !slices.Equal(d.Codes, []string{"a", "b"}) {
				t.Errorf("%s: %+v", name, d)
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// receiver is one that does as it is told, and checks signatures.
type receiver struct {
	*httptest.Server
	t      *testing.T
	mu     sync.Mutex
	secret []byte
	answer func(w http.ResponseWriter, r *http.Request)
	got    []string // webhook-id and type
}

func newReceiver(t *testing.T, secret []byte) *receiver {
	r := &receiver{t: t, secret: secret}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		b, _ := io.ReadAll(req.Body)
		h := req.Header
		if err := Verify(secret, h.Get("webhook-id"), h.Get("webhook-timestamp"), h.Get("webhook-signature"), b, time.Now().Add(skewOf(h, t))); err != nil || h.Get("Content-Type") != "application/json" {
			t.Errorf("%v %v", err, h)
		}
		var e Event
		if err := json.Unmarshal(b, &e); err != nil {
			t.Error(err)
		}
		r.mu.Lock()
		r.got = append(r.got, h.Get("webhook-id")+" "+e.Type)
		answer := r.answer
		r.mu.Unlock()
		if answer != nil {
			answer(w, req)
		}
	}))
	t.Cleanup(r.Close)
	return r
}

// skewOf makes up for the test's own clock, which is ahead.
func skewOf(h http.Header, t *testing.T) time.Duration {
	var at int64
	if _, err := fmt.Sscan(h.Get("webhook-timestamp"), &at); err != nil {
		t.Error(err)
	}
	return time.Until(time.Unix(at, 0))
}

func (r *receiver) received() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

func (r *receiver) answers(f func(http.ResponseWriter, *http.Request)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answer = f
}

// desk is a store with a clock, and senders over it.
type desk struct {
	t  *testing.T
	db *store.Store
	testkit.Clock
}

func newDesk(t *testing.T) *desk {
	d := &desk{t: t}
	var err error
	if d.db, err = store.Open(t.Context(), storetest.SQLite(t), store.Options{Now: d.Now}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.db.Close() })
	return d
}

func (d *desk) hook(url string, secret []byte, events ...string) (id int64) {
	d.t.Helper()
	err := d.db.Do(context.Background(), func(tx *store.Tx) (err error) {
		id, err = tx.AddHook(context.Background(), fleet.Hook{URL: url, Secret: secret, Events: events, Created: d.Now()})
		return err
	})
	if err != nil {
		d.t.Fatal(err)
	}
	return id
}

func (d *desk) queue(event string, data any) {
	d.t.Helper()
	if err := d.db.Do(context.Background(), func(tx *store.Tx) error {
		return Queue(context.Background(), tx, Event{event, d.Now(), data})
	}); err != nil {
		d.t.Fatal(err)
	}
}

func (d *desk) sender() *Sender {
	log := logrus.New()
	log.Out = io.Discard
	g := Guard{AllowHTTP: true, Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}}
	return &Sender{Queue: d.db, Client: g.Client(), Now: d.Now, Log: logrus.NewEntry(log)}
}

func (d *desk) waiting() (waiting, dead int) {
	d.t.Helper()
	waiting, dead, err := d.db.Queued(context.Background())
	if err != nil {
		d.t.Fatal(err)
	}
	return waiting, dead
}

// A receiver that fails, hangs, and comes back gets every event once that it took.
func TestDelivery(t *testing.T) {
	d := newDesk(t)
	secret := []byte("0123456789abcdef0123456789abcdef")
	r := newReceiver(t, secret)
	d.hook(r.URL, secret, TrustChanged)
	other := newReceiver(t, []byte("another"))
	d.hook(other.URL, []byte("another"), NodePending)
	s := d.sender()
	var outcomes []bool
	s.Observe = func(err error) { outcomes = append(outcomes, err == nil) }
	d.queue(TrustChanged, map[string]string{"x": "y"})
	d.queue(NodeProblem, nil) // nobody wants it

	r.answers(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) })
	if n, err := s.once(t.Context()); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if waiting, dead := d.waiting(); waiting != 1 || dead != 0 {
		t.Errorf("%d, %d", waiting, dead)
	}
	if n, err := s.once(t.Context()); n != 0 || err != nil {
		t.Errorf("it is tried again at once: %d %v", n, err)
	}
	// It hangs.
	release := make(chan struct{})
	r.answers(func(http.ResponseWriter, *http.Request) { <-release })
	s.Client.Timeout = 200 * time.Millisecond
	d.Pass(2 * time.Hour)
	if n, err := s.once(t.Context()); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	close(release)
	r.answers(nil)
	d.Pass(4 * time.Hour)
	if n, err := s.once(t.Context()); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if waiting, _ := d.waiting(); waiting != 0 {
		t.Errorf("%d wait", waiting)
	}
	got := r.received()
	if len(got) != 3 || got[0] != got[1] || got[1] != got[2] || !strings.HasSuffix(got[0], " "+TrustChanged) {
		t.Errorf("%q: one event, with one id", got)
	}
	if len(other.received()) != 0 {
		t.Errorf("what it did not want: %q", other.received())
	}
	if !slices.Equal(outcomes, []bool{false, false, true}) {
		t.Error(outcomes)
	}
}

// One that never comes back is given up, shown, and can be tried again.
func TestGivenUp(t *testing.T) {
	d := newDesk(t)
	r := newReceiver(t, []byte("s"))
	r.answers(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) })
	d.hook(r.URL, []byte("s"))
	d.queue(NodePending, nil)
	s := d.sender()
	attempts := 0
	for range 200 {
		n, err := s.once(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		attempts += n
		d.Pass(12 * time.Hour)
	}
	if waiting, dead := d.waiting(); attempts != store.MaxAttempts || waiting != 0 || dead != 1 {
		t.Errorf("%d attempts; %d wait, %d were given up", attempts, waiting, dead)
	}
	letters, _, err := d.db.DeadLetters(t.Context(), store.Page{})
	if err != nil || len(letters) != 1 || !strings.Contains(letters[0].LastErr, "503") {
		t.Fatalf("%+v %v", letters, err)
	}
	r.answers(nil)
	if err := d.db.Do(t.Context(), func(tx *store.Tx) error { return tx.Revive(t.Context(), letters[0].ID) }); err != nil {
		t.Fatal(err)
	}
	if n, err := s.once(t.Context()); n != 1 || err != nil {
		t.Error(n, err)
	}
}

// Several replicas deliver from one queue: each event goes out once.
func TestManySenders(t *testing.T) {
	d := newDesk(t)
	secret := []byte("secret")
	r := newReceiver(t, secret)
	d.hook(r.URL, secret)
	const events = 100
	for i := range events {
		d.queue(TrustChanged, i)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { d.sender().Run(ctx) })
	}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if waiting, _ := d.waiting(); waiting == 0 {
			break
		}
	}
	cancel()
	wg.Wait()
	got := r.received()
	slices.Sort(got)
	if len(got) != events || len(slices.Compact(got)) != events {
		t.Errorf("%d deliveries of %d events", len(r.received()), events)
	}
}
