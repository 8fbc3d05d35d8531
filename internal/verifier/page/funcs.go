package page

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"html/template"
	"math"
	"net/url"
	"strings"
	"time"

	"virt-trust/internal/appraise"
)

func (p *Page) funcs() template.FuncMap {
	return template.FuncMap{
		"ago":     func(t time.Time) string { return ago(p.Now(), t) },
		"stamp":   stamp,
		"machine": func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
		"cut":     func(n int, s string) string { return cut(s, n) },
		"long":    func(n int, s string) long { return newLong(s, n) },
		"line":    oneLine,
		"hex":     func(b []byte) string { return hex.EncodeToString(b) },
		"digest":  shortDigest,
		"word":    tierWord,
		"tiers":   func() []appraise.Tier { return worstFirst },
		"dict":    dict,
		"entry":   func(n *int) int { return *n + 1 },
		"query":   url.QueryEscape,
		"plural":  plural,
	}
}

// worstFirst is the order in which tiers want attention: what could not be
// appraised comes after what is known to be bad.
var worstFirst = []appraise.Tier{appraise.Contraindicated, appraise.None, appraise.Warning, appraise.Affirming}

// worse orders tiers as worstFirst does.
func worse(a, b appraise.Tier) int {
	rank := func(t appraise.Tier) int {
		for i, w := range worstFirst {
			if w == t {
				return i
			}
		}
		return 1
	}
	return cmp.Compare(rank(a), rank(b))
}

// tierWord names a tier, also one that a template spells as its number.
func tierWord(t any) string {
	switch t := t.(type) {
	case appraise.Tier:
		return t.String()
	case int:
		return appraise.Tier(t).String()
	}
	return appraise.None.String()
}

// long is a text that may be cut: then Full is the whole of it.
type long struct{ Short, Full string }

func newLong(s string, n int) long {
	l := long{Short: cut(s, n)}
	if l.Short != string(reveal([]byte(oneLine(s)))) {
		l.Full = s
	}
	return l
}

// shortDigest is the beginning of a digest, for the eye; the whole is beside it.
func shortDigest(s string) string {
	alg, d, ok := strings.Cut(s, ":")
	if !ok {
		alg, d = "", s
	}
	if len(d) > 16 {
		d = d[:16] + "…"
	}
	if ok {
		return alg + ":" + d
	}
	return d
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format("2006-01-02 15:04:05") + " UTC"
}

// ago says how long before now t is, or how long after.
func ago(now, t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	d := now.Sub(t)
	form := "%s ago"
	if d < 0 {
		d, form = -d, "in %s"
	}
	switch {
	case d < time.Second:
		return "now"
	case d < 2*time.Minute:
		return fmt.Sprintf(form, fmt.Sprintf("%d s", int(d.Seconds())))
	case d < 2*time.Hour:
		return fmt.Sprintf(form, fmt.Sprintf("%d min", int(d.Minutes())))
	case d < 48*time.Hour:
		return fmt.Sprintf(form, fmt.Sprintf("%d h", int(d.Hours())))
	}
	return fmt.Sprintf(form, fmt.Sprintf("%d days", int(math.Round(d.Hours()/24))))
}

// dict makes a map for a template that wants more than one thing.
func dict(pairs ...any) (map[string]any, error) {
	if len(pairs)%2 != 0 {
		return nil, fmt.Errorf("dict of %d", len(pairs))
	}
	m := map[string]any{}
	for i := 0; i < len(pairs); i += 2 {
		k, ok := pairs[i].(string)
		if !ok {
			return nil, fmt.Errorf("dict key %v", pairs[i])
		}
		m[k] = pairs[i+1]
	}
	return m, nil
}
