package page

import (
	"context"
	"errors"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"

	"virt-trust/internal/verifier/page/pagetest"
)

// browser starts a headless Chromium with a profile of its own.
func browser(t *testing.T) context.Context {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if errors.Is(err, exec.ErrNotFound) {
		if os.Getenv("CI") == "true" {
			t.Fatal("chromium is missing: apt-get install --no-install-recommends chromium fonts-dejavu-core")
		}
		t.Skip("chromium is missing: apt-get install --no-install-recommends chromium fonts-dejavu-core")
	}
	opts := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.UserDataDir(t.TempDir()),
		chromedp.NoSandbox, chromedp.DisableGPU, chromedp.Flag("disable-quic", true), chromedp.Flag("no-first-run", true),
		chromedp.Flag("disable-background-networking", true), chromedp.Flag("disable-component-update", true), chromedp.Flag("disable-sync", true))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewExecAllocator(ctx, opts...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	run(t, ctx, chromedp.Navigate("about:blank"))
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
	ctx, dir := browser(t), shots(t)
	srv := httptest.NewServer(h.Page)
	t.Cleanup(srv.Close)
	pages := map[string]string{
		"fleet": "/", "host-bad": "/nodes/" + pagetest.BadHost, "host-vm": "/nodes/" + pagetest.BadVM, "vm-bad": "/nodes/" + pagetest.BadVM + "/vms/" + pagetest.Vault,
		"vm-good": "/nodes/" + pagetest.Good + "/vms/" + pagetest.GoodVM, "vm-hostbad": "/nodes/" + pagetest.BadHost + "/vms/" + pagetest.ID("vm", 701),
		"rounds": "/nodes/" + pagetest.BadVM + "/rounds", "round": "/nodes/" + pagetest.Odd + "/rounds/" + h.newest(pagetest.Odd),
		"diff": h.diffPath(pagetest.BadVM), "approvals": "/approvals", "values": "/values", "tokens": "/tokens", "webhooks": "/webhooks", "audit": "/audit",
		"vms": "/vms", "login": "/login?failed=token", "missing": "/nodes/x", "pending": "/nodes/" + pagetest.Waiting,
	}
	for _, look := range []struct {
		name, scheme  string
		width, height int64
	}{{"light", "light", 1280, 900}, {"dark", "dark", 1280, 900}, {"phone", "light", 360, 740}} {
		for name, path := range pages {
			window(t, ctx, look.width, look.height)
			scheme(t, ctx, look.scheme)
			run(t, ctx, chromedp.Navigate(srv.URL+path))
			if broad := eval[int64](t, ctx, `document.documentElement.scrollWidth`); broad > look.width {
				t.Errorf("%s, %s: %d broad in a window of %d", name, look.name, broad, look.width)
			}
			if !eval[bool](t, ctx, `getComputedStyle(document.body).fontFamily.includes("system-ui") && document.title !== ""`) {
				t.Errorf("%s, %s: no style, or no title", name, look.name)
			}
			if os.Getenv("VIRT_TRUST_SHOTS") != "" || name == "fleet" || name == "vm-bad" {
				shoot(t, ctx, filepath.Join(dir, name+"-"+look.name+".png"), look.width, look.height)
			}
		}
	}
}
