package page

import (
	"context"
	"encoding/json"
	"errors"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/dom"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"

	"virt-trust/internal/appraise"
	"virt-trust/internal/testkit"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/page/pagetest"
	"virt-trust/internal/verifier/store/storetest"
)

// chromium is one headless Chromium for all tests, with a profile of its own; each
// test has a tab in a context of its own.
var chromium struct {
	sync.Once
	ctx  context.Context
	stop []func()
	err  error
}

func TestMain(m *testing.M) {
	code := storetest.Main(m)
	for _, f := range slices.Backward(chromium.stop) {
		f()
	}
	os.Exit(code)
}

// browser gives a tab.
func browser(t *testing.T) context.Context {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if errors.Is(err, exec.ErrNotFound) {
		testkit.Missing(t, "chromium is missing: apt-get install --no-install-recommends chromium fonts-dejavu-core")
	}
	chromium.Do(func() {
		profile, err := os.MkdirTemp("", "virt-trust-chromium-")
		if err != nil {
			chromium.err = err
			return
		}
		opts := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.UserDataDir(profile),
			chromedp.NoSandbox, chromedp.DisableGPU, chromedp.Flag("disable-quic", true), chromedp.Flag("no-first-run", true),
			chromedp.Flag("disable-background-networking", true), chromedp.Flag("disable-component-update", true), chromedp.Flag("disable-sync", true))
		ctx, end := chromedp.NewExecAllocator(context.Background(), opts...)
		ctx, quit := chromedp.NewContext(ctx)
		chromium.ctx, chromium.stop = ctx, []func(){func() { _ = os.RemoveAll(profile) }, end, quit}
		chromium.err = chromedp.Do(ctx, chromedp.Navigate("about:blank"))
	})
	if chromium.err != nil {
		t.Fatalf("chromium did not start: %v", chromium.err)
	}
	ctx, cancel := chromedp.NewContext(chromium.ctx, chromedp.WithNewBrowserContext())
	t.Cleanup(cancel)
	run(t, ctx, chromedp.Navigate("about:blank"))
	// The tab goes before the server that it follows: that waits for its streams.
	context.AfterFunc(t.Context(), cancel)
	ctx, cancel = context.WithTimeout(ctx, 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func run(t *testing.T, ctx context.Context, steps ...chromedp.Action[chromedp.Void]) {
	t.Helper()
	if err := chromedp.Do(ctx, steps...); err != nil {
		t.Fatal(err)
	}
}

// call sends a command of the DevTools protocol.
func call[P, R any](t *testing.T, ctx context.Context, c cdp.Command[P, R], params P) R {
	t.Helper()
	r, err := chromedp.Call(ctx, c, params)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// eval gives what an expression in the page is.
func eval[T any](t *testing.T, ctx context.Context, expression string) T {
	t.Helper()
	v, err := chromedp.Run(ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		t.Fatalf("%s: %v", expression, err)
	}
	return v
}

func scheme(t *testing.T, ctx context.Context, name string) {
	t.Helper()
	call(t, ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
		{Name: "prefers-color-scheme", Value: name}, {Name: "prefers-reduced-motion", Value: "reduce"}}})
}

func window(t *testing.T, ctx context.Context, width, height int64) {
	t.Helper()
	call(t, ctx, emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{Width: width, Height: height, DeviceScaleFactor: 1, Mobile: width < 500})
}

// shots is where pictures go: a folder that VIRT_TRUST_SHOTS names, to look at.
func shots(t *testing.T) string {
	if d := os.Getenv("VIRT_TRUST_SHOTS"); d != "" {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		return d
	}
	return t.TempDir()
}

// shoot makes the window as high as the page, and a picture of it.
func shoot(t *testing.T, ctx context.Context, file string, width, least int64) {
	t.Helper()
	high := eval[int64](t, ctx, `document.documentElement.scrollHeight`)
	window(t, ctx, width, min(max(high, least), 4000))
	r := call(t, ctx, page.CaptureScreenshot, page.CaptureScreenshotParams{})
	if err := os.WriteFile(file, r.Data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestLooks draws every page in both schemes and on a phone: none may be broader
// than its window.
func TestLooks(t *testing.T) {
	h := newFleet(t)
	ctx, dir, url := browser(t), shots(t), h.site(t)
	pages := map[string]string{
		"fleet": "/", "host-bad": "/nodes/" + pagetest.BadHost, "host-vm": "/nodes/" + pagetest.BadVM, "vm-bad": "/nodes/" + pagetest.BadVM + "/vms/" + pagetest.Vault,
		"vm-good": "/nodes/" + pagetest.Good + "/vms/" + pagetest.GoodVM, "vm-hostbad": "/nodes/" + pagetest.BadHost + "/vms/" + pagetest.ID("vm", 701),
		"rounds": "/nodes/" + pagetest.BadVM + "/rounds", "round": "/nodes/" + pagetest.Odd + "/rounds/" + h.newest(pagetest.Odd),
		"diff": h.diffPath(pagetest.BadVM), "approvals": "/approvals", "values": "/values", "tokens": "/tokens", "webhooks": "/webhooks", "audit": "/audit", "policy": "/policy", "policy-old": "/policy?version=1",
		"vms": "/vms", "login": "/login?failed=token", "missing": "/nodes/x", "pending": "/nodes/" + pagetest.Waiting,
	}
	for _, look := range []struct {
		name, scheme  string
		width, height int64
	}{{"light", "light", 1280, 900}, {"dark", "dark", 1280, 900}, {"phone", "light", 360, 740}} {
		for name, path := range pages {
			picture := os.Getenv("VIRT_TRUST_SHOTS") != "" || name == "fleet" || name == "vm-bad" || name == "diff"
			if look.width > 500 && !picture {
				continue // what fits a phone fits a screen; the pictures are looked at
			}
			window(t, ctx, look.width, look.height)
			scheme(t, ctx, look.scheme)
			run(t, ctx, chromedp.Navigate(url+path))
			if broad := eval[int64](t, ctx, `document.documentElement.scrollWidth`); broad > look.width {
				t.Errorf("%s, %s: %d broad in a window of %d", name, look.name, broad, look.width)
			}
			if !eval[bool](t, ctx, `getComputedStyle(document.body).fontFamily.includes("system-ui") && document.title !== ""`) {
				t.Errorf("%s, %s: no style, or no title", name, look.name)
			}
			if look.name == "light" && (name == "fleet" || name == "vm-bad") {
				// As README shows it: what is seen without scrolling.
				window(t, ctx, 1200, 740)
				r := call(t, ctx, page.CaptureScreenshot, page.CaptureScreenshotParams{})
				if err := os.WriteFile(filepath.Join(dir, "readme-"+name+".png"), r.Data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if picture {
				shoot(t, ctx, filepath.Join(dir, name+"-"+look.name+".png"), look.width, look.height)
			}
		}
	}
}

// site serves the page to a browser, with the login's addresses beside it.
func (h *harness) site(t *testing.T) string {
	t.Helper()
	srv := httptest.NewServer(h.Page)
	t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	return srv.URL
}

// until waits for an expression to be true.
func until(t *testing.T, ctx context.Context, expression string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		// An error may be that the page goes at this moment.
		v, err := chromedp.Run(ctx, chromedp.Evaluate[bool](expression))
		if err == nil && v {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s: %v", expression, err)
		}
	}
}

// TestLiveInBrowser: with JavaScript a page shows a new round by itself, says so to
// those who do not see it, and leaves open what was open, the focus where it was
// and what someone has ticked.
func TestLiveInBrowser(t *testing.T) {
	h := newFleet(t)
	h.Page.live.every = 100 * time.Millisecond
	ctx, url := browser(t), h.site(t)
	vm := "/nodes/" + pagetest.Good + "/vms/" + pagetest.GoodVM
	run(t, ctx, chromedp.Navigate(url+vm))
	until(t, ctx, `document.getElementById("live").hasAttribute("data-on")`)
	if got := eval[string](t, ctx, `document.querySelector("#head .tier").textContent`); got != "affirming" {
		t.Fatal(got)
	}
	eval[bool](t, ctx, `document.querySelector("#links details").open = true`)
	eval[bool](t, ctx, `(document.querySelector('#rounds a[href$="?vm=`+pagetest.GoodVM+`"]').focus(), true)`)
	v := pagetest.VM(pagetest.GoodVM, "db-01")
	v.Tier, v.Reasons = appraise.Contraindicated, []appraise.Reason{{Code: appraise.CodeVMPCR, Tier: appraise.Contraindicated, What: "another kernel", PCR: at(uint(9))}}
	if _, err := h.Build.Round(t.Context(), pagetest.Result(pagetest.Good, "kvm-01", v), h.Now()); err != nil {
		t.Fatal(err)
	}
	until(t, ctx, `document.querySelector("#head .tier").textContent === "contraindicated"`)
	until(t, ctx, `document.querySelector('svg.chain.wide a[href="#link-guest-kernel"]').classList.contains("contraindicated")`)
	until(t, ctx, `document.getElementById("live-say").textContent.includes("Guest kernel")`)
	if !eval[bool](t, ctx, `document.querySelector("#links details").open`) {
		t.Error("what was open is shut")
	}
	if !eval[bool](t, ctx, `document.activeElement.matches('#rounds a[href$="?vm=`+pagetest.GoodVM+`"]')`) {
		t.Errorf("the focus went to %s", eval[string](t, ctx, `document.activeElement.outerHTML.slice(0, 80)`))
	}

	run(t, ctx, chromedp.Navigate(url+"/approvals"))
	until(t, ctx, `document.getElementById("live").hasAttribute("data-on")`)
	eval[bool](t, ctx, `(document.querySelector('#values input[name="id"]').click(), true)`)
	h.as(operator).post("/nodes/"+pagetest.Waiting+"/approve", nil)
	until(t, ctx, `document.querySelector("#nodes").textContent.includes("None.")`)
	if !eval[bool](t, ctx, `document.querySelector('#values input[name="id"]').checked`) {
		t.Error("what was ticked is not any more")
	}
	h.as(policyA)
	eval[bool](t, ctx, `(document.querySelector('input[data-all]').click(), true)`)
	if !eval[bool](t, ctx, `[...document.querySelectorAll('#values input[name="id"]')].every((b) => b.checked)`) {
		t.Error("the box for all does not tick all")
	}
}

// TestWithoutScript: every page is whole without JavaScript, and a node can be let
// in, with the browser's own forms.
func TestWithoutScript(t *testing.T) {
	h := newFleet(t)
	ctx, url := browser(t), h.site(t)
	call(t, ctx, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: true})
	run(t, ctx, chromedp.Navigate(url+"/approvals"))
	if eval[bool](t, ctx, `!document.getElementById("live").hidden`) {
		t.Fatal("scripts run")
	}
	run(t, ctx, chromedp.Click(chromedp.CSS(`form[action$="/`+pagetest.Waiting+`/approve"] button`)))
	until(t, ctx, `location.search === "?done=node-approved"`)
	if h.state(pagetest.Waiting) != fleet.Active {
		t.Error("it was not let in")
	}
	run(t, ctx, chromedp.Navigate(url+"/"), chromedp.SendKeys(chromedp.CSS("#q"), "kvm-04\r"))
	until(t, ctx, `location.search.includes("q=kvm-04") && document.querySelectorAll("#hosts tbody tr").length === 1`)
	run(t, ctx, chromedp.Click(chromedp.CSS(`#hosts a[href="/nodes/`+pagetest.BadVM+`"]`)))
	until(t, ctx, `location.pathname === "/nodes/`+pagetest.BadVM+`"`)
	// A policy is checked, mended, checked again and proposed.
	run(t, ctx, chromedp.Navigate(url+"/policy"), chromedp.SendKeys(chromedp.CSS("#document"), "x"), chromedp.Click(chromedp.CSS(`form[action="/policy/check"] button`)))
	until(t, ctx, `!!document.querySelector('[role="alert"]') && document.querySelector("#document").value.startsWith("x{")`)
	eval[bool](t, ctx, `(document.querySelector("#document").value = document.querySelector("#document").value.slice(1), true)`)
	run(t, ctx, chromedp.Click(chromedp.CSS(`form[action="/policy/check"] button`)))
	until(t, ctx, `document.querySelector("main").textContent.includes("nothing to set")`)
	eval[bool](t, ctx, `(document.querySelector("#document").value = document.querySelector("#document").value.replace('"acme"', '"acm\u00e9 \\u202e"'), true)`)
	run(t, ctx, chromedp.Click(chromedp.CSS(`form[action="/policy/check"] button`)))
	until(t, ctx, `!!document.querySelector('form[action="/policy/set"]')`)
	if dir := os.Getenv("VIRT_TRUST_SHOTS"); dir != "" {
		shoot(t, ctx, filepath.Join(dir, "policy-check.png"), 1280, 900)
	}
	run(t, ctx, chromedp.Click(chromedp.CSS(`form[action="/policy/set"] button`)))
	until(t, ctx, `location.search === "?done=policy-proposed"`)
	if s, err := h.Page.Operator.ProposedPolicy(t.Context(), policyA); err != nil || s.Version != 2 || !strings.Contains(string(s.Data), `"acmé \u202e"`) {
		t.Errorf("%+v, %v", s, err)
	}
	run(t, ctx, chromedp.Navigate(url+"/webhooks"), chromedp.Click(chromedp.CSS(`#letters td button`)))
	until(t, ctx, `location.search === "?done=revived" && document.querySelectorAll("#letters tbody tr").length === 1`)
	// A browser's own form of the round's page, ticked by hand.
	run(t, ctx, chromedp.Navigate(url+"/nodes/"+pagetest.Odd+"/rounds/"+h.newest(pagetest.Odd)), chromedp.Click(chromedp.CSS(`input[name="ref"]`)), chromedp.Click(chromedp.CSS(`form[action$="/approve"] button`)))
	until(t, ctx, `location.search.startsWith("?done=values-")`)
}

// TestKeyboard walks a page with the tabulator alone: the first stop leads past the
// navigation, each is visible, and has a name; "/" leads to the search.
func TestKeyboard(t *testing.T) {
	h := newFleet(t)
	ctx, url := browser(t), h.site(t)
	for _, path := range []string{"/", "/nodes/" + pagetest.BadVM + "/vms/" + pagetest.Vault} {
		window(t, ctx, 1280, 900)
		run(t, ctx, chromedp.Navigate(url+path))
		stops := eval[int](t, ctx, `[...document.querySelectorAll('a[href], button, input:not([type="hidden"]), select, textarea, summary')].filter((e) => e.checkVisibility() && !e.disabled).length`)
		seen := 0
		for i := range stops + 5 {
			run(t, ctx, chromedp.KeyEvent("\t"))
			at := eval[map[string]any](t, ctx, `(() => {
				const e = document.activeElement, s = getComputedStyle(e), r = e.getBoundingClientRect(), box = e.querySelector(".box");
				return {tag: e.tagName.toLowerCase(), text: (e.getAttribute("aria-label") || e.textContent || e.labels?.[0]?.textContent || "").trim(),
					ring: s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2 || !!box && parseFloat(getComputedStyle(box).strokeWidth) >= 4,
					seen: r.width > 0 && r.height > 0 && r.bottom > 0 && r.top < innerHeight, href: e.getAttribute("href")};
			})()`)
			if at["tag"] == "body" {
				break
			}
			seen++
			if i == 0 && at["href"] != "#main" {
				t.Errorf("%s: the first stop is %v", path, at)
			}
			if at["text"] == "" || at["ring"] != true || at["seen"] != true {
				t.Errorf("%s: stop %d: %v", path, i, at)
			}
		}
		if seen != stops {
			t.Errorf("%s: %d stops of %d", path, seen, stops)
		}
	}
	run(t, ctx, chromedp.Navigate(url+"/"))
	// As a keyboard does it: what the key's event prevents is not typed.
	call(t, ctx, input.DispatchKeyEvent, input.DispatchKeyEventParams{Type: "keyDown", Key: "/", Code: "Slash", Text: "/"})
	call(t, ctx, input.DispatchKeyEvent, input.DispatchKeyEventParams{Type: "keyUp", Key: "/", Code: "Slash"})
	if got := eval[string](t, ctx, `document.activeElement.id`); got != "q" {
		t.Errorf(`"/" leads to %q`, got)
	}
	run(t, ctx, chromedp.KeyEvent("a/b"))
	if got := eval[string](t, ctx, `document.activeElement.value`); got != "a/b" {
		t.Errorf(`"a/b" typed in the search is %q`, got)
	}
	run(t, ctx, chromedp.Navigate(url+"/"), chromedp.KeyEvent("\t"), chromedp.KeyEvent("\r"))
	until(t, ctx, `location.hash === "#main" && document.activeElement.id === "main"`)
}

// TestAccessibleNames asks Chromium's accessibility tree: whatever can be operated
// has a name, tables and pictures have one, and the chain reads in its order.
func TestAccessibleNames(t *testing.T) {
	h := newFleet(t)
	ctx, url := browser(t), h.site(t)
	named := map[string]bool{"link": true, "button": true, "textbox": true, "searchbox": true, "combobox": true, "checkbox": true, "spinbutton": true, "table": true, "image": true, "img": true,
		"navigation": true, "heading": true, "columnheader": true, "DisclosureTriangle": true, "MenuListPopup": false}
	seen := map[string]bool{} // one page of each kind, as far as addresses tell
	for _, path := range append(h.paths(), "/login") {
		kind := regexp.MustCompile(`\?.*|[0-9a-f-]{36}|\d+`).ReplaceAllString(path, "")
		if seen[kind] {
			continue
		}
		seen[kind] = true
		run(t, ctx, chromedp.Navigate(url+path))
		tree := call(t, ctx, accessibility.GetFullAXTree, accessibility.GetFullAXTreeParams{})
		roles, links := map[string]int{}, []string{}
		for _, n := range tree.Nodes {
			if n.Ignored || n.Role == nil {
				continue
			}
			role, name := text(n.Role), text(n.Name)
			roles[role]++
			if named[role] && strings.TrimSpace(name) == "" {
				t.Errorf("%s: a %s without a name: %s", path, role, where(t, ctx, n))
			}
			if role == "link" && strings.Contains(name, ": ") {
				links = append(links, name)
			}
		}
		if roles["main"] != 1 || roles["heading"] == 0 || roles["banner"] != 1 {
			t.Errorf("%s: landmarks: %v", path, roles)
		}
		if strings.HasSuffix(path, "/vms/"+pagetest.Vault) {
			var chain []string
			for _, l := range links {
				for _, p := range parts {
					if strings.HasPrefix(l, p.title+": ") {
						chain = append(chain, p.title)
					}
				}
			}
			if len(chain) != numLinks || chain[0] != "Host TPM" || chain[numLinks-1] != "Guest kernel" {
				t.Errorf("the chain reads %q", chain)
			}
		}
	}
}

func text(v *accessibility.Value) string {
	if v == nil {
		return ""
	}
	var s string
	if json.Unmarshal(v.Value, &s) != nil {
		return ""
	}
	return s
}

// where finds the element that a node of the tree is of.
func where(t *testing.T, ctx context.Context, n *accessibility.Node) string {
	t.Helper()
	r := call(t, ctx, dom.DescribeNode, dom.DescribeNodeParams{BackendNodeID: n.BackendDOMNodeID})
	if r.Node == nil {
		return "?"
	}
	return r.Node.NodeName + " " + strings.Join(r.Node.Attributes, " ")
}

// TestHostileInBrowser shows hostile names, paths and addresses to a browser: no
// script runs, no dialog opens, no element comes to be, nothing is fetched that
// they name, and the Content-Security-Policy had nothing to stop.
func TestHostileInBrowser(t *testing.T) {
	h := newHarness(t)
	node, vm := h.hostile()
	h.Page.live.every = 100 * time.Millisecond
	ctx, url := browser(t), h.site(t)
	var mu sync.Mutex
	var bad []string
	err := chromedp.Listen(ctx, func(ev any) {
		mu.Lock()
		defer mu.Unlock()
		switch e := ev.(type) {
		case *page.EventJavascriptDialogOpening:
			bad = append(bad, "a dialog: "+e.Message)
		case *log.EventEntryAdded:
			bad = append(bad, "the console: "+e.Entry.Text)
		case *network.EventRequestWillBeSent:
			if u := e.Request.URL; !strings.HasPrefix(u, url) || strings.HasSuffix(u, "/x") {
				bad = append(bad, "a request: "+u)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	call(t, ctx, log.Enable, cdp.Empty{})
	call(t, ctx, network.Enable, network.EnableParams{})
	run(t, ctx, chromedp.Navigate(url+"/"))
	mu.Lock()
	if len(bad) > 0 {
		t.Error(bad)
	}
	mu.Unlock()
	for _, path := range []string{"/", "/vms", "/nodes/" + node, "/nodes/" + node + "/vms/" + vm, "/nodes/" + node + "/rounds", "/nodes/" + node + "/rounds/" + h.newest(node), h.diffPath(node), "/approvals", "/values", "/policy", "/policy?version=1", "/webhooks", "/audit"} {
		run(t, ctx, chromedp.Navigate(url+path))
		got := eval[map[string]any](t, ctx, `({
			images: [...document.images].filter((i) => !i.matches(".brand img")).length, scripts: document.scripts.length, frames: document.querySelectorAll("iframe, object, embed, base").length,
			handlers: [...document.querySelectorAll("*")].filter((e) => [...e.attributes].some((a) => a.name.startsWith("on") || a.name === "style")).length,
			links: [...document.querySelectorAll("[href], [action], [src]")].filter((e) => !new URL(e.getAttribute("href") || e.getAttribute("action") || e.getAttribute("src") || "/", location).href.startsWith(location.origin + "/")).length,
			hidden: /[\u200b\u202e\x1b]/.test(document.documentElement.outerHTML), title: document.title})`)
		if got["images"] != 0.0 || got["scripts"] != 1.0 || got["frames"] != 0.0 || got["handlers"] != 0.0 || got["links"] != 0.0 || got["hidden"] != false {
			t.Errorf("%s: %v", path, got)
		}
	}
	// The live update takes the same texts over in the browser.
	run(t, ctx, chromedp.Navigate(url+"/nodes/"+node+"/vms/"+vm))
	v := pagetest.VM(vm, payload+" again")
	if _, err := h.Build.Round(t.Context(), pagetest.Result(node, payload, v), h.Now()); err != nil {
		t.Fatal(err)
	}
	until(t, ctx, `document.querySelector("#head .tier").textContent === "affirming"`)
	if n := eval[int](t, ctx, `document.scripts.length + document.querySelectorAll("main img").length`); n != 1 {
		t.Errorf("%d scripts and images after an update", n)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(bad) > 0 {
		t.Error(bad)
	}
}
