package page

import (
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// luminance of a colour: WCAG 2.2, relative luminance.
func luminance(t *testing.T, hex string) float64 {
	t.Helper()
	n, err := strconv.ParseUint(strings.TrimPrefix(hex, "#"), 16, 32)
	if err != nil || len(hex) != 7 {
		t.Fatalf("colour %q", hex)
	}
	l := 0.0
	for i, weight := range []float64{0.0722, 0.7152, 0.2126} {
		c := float64(n>>(8*i)&0xff) / 255
		if c <= 0.04045 {
			c /= 12.92
		} else {
			c = math.Pow((c+0.055)/1.055, 2.4)
		}
		l += weight * c
	}
	return l
}

func contrast(t *testing.T, a, b string) float64 {
	t.Helper()
	x, y := luminance(t, a), luminance(t, b)
	return (max(x, y) + 0.05) / (min(x, y) + 0.05)
}

// palettes reads the custom properties of both schemes out of the style itself.
func palettes(t *testing.T) (light, dark map[string]string) {
	t.Helper()
	css, err := files.ReadFile("assets/style.css")
	if err != nil {
		t.Fatal(err)
	}
	roots := regexp.MustCompile(`(?s):root \{(.*?)\}`).FindAllSubmatch(css, -1)
	if len(roots) < 2 {
		t.Fatal("the style has not two palettes")
	}
	read := func(b []byte) map[string]string {
		m := map[string]string{}
		for _, p := range regexp.MustCompile(`--([a-z-]+): (#[0-9a-f]{6});`).FindAllSubmatch(b, -1) {
			m[string(p[1])] = string(p[2])
		}
		return m
	}
	return read(roots[0][1]), read(roots[1][1])
}

// TestContrast: text has 4.5 to what it stands on, signs, borders of controls and
// the focus have 3 (WCAG 2.2, 1.4.3 and 1.4.11), in both schemes.
func TestContrast(t *testing.T) {
	light, dark := palettes(t)
	if a, b := slices.Sorted(maps.Keys(light)), slices.Sorted(maps.Keys(dark)); !slices.Equal(a, b) {
		t.Fatalf("the schemes define other colours: %v, %v", a, b)
	}
	type pair struct {
		fore, back string
		least      float64
	}
	var pairs []pair
	for _, back := range []string{"bg", "surface", "sunken"} {
		for _, fore := range []string{"ink", "muted", "link"} {
			pairs = append(pairs, pair{fore, back, 4.5})
		}
		for _, fore := range []string{"good", "warn", "bad", "none", "edge", "focus"} {
			pairs = append(pairs, pair{fore, back, 3})
		}
	}
	for _, tier := range []string{"good", "warn", "bad", "none"} {
		pairs = append(pairs, pair{tier + "-ink", tier + "-bg", 4.5}, pair{tier + "-ink", "surface", 4.5}, pair{tier, tier + "-bg", 3})
	}
	pairs = append(pairs, pair{"button-ink", "button", 4.5}, pair{"ink", "bad-bg", 4.5})
	for name, p := range map[string]map[string]string{"light": light, "dark": dark} {
		for _, c := range pairs {
			if got := contrast(t, p[c.fore], p[c.back]); got < c.least {
				t.Errorf("%s: %s on %s: %.2f, at least %.1f", name, c.fore, c.back, got, c.least)
			}
		}
	}
	if got := contrast(t, "#000000", "#ffffff"); math.Abs(got-21) > 0.001 {
		t.Errorf("black on white: %.3f", got)
	}
}
