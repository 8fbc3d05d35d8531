package appraise

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"
	"unicode/utf16"
)

// PolicyText gives a policy file, or any JSON, for people. What has no look of its
// own, changes that of its neighbours or is a command to a terminal is escaped as
// JSON does it: it is the same document. False where it is no JSON.
func PolicyText(document []byte) (string, bool) {
	var b bytes.Buffer
	if json.Indent(&b, bytes.TrimSpace(document), "", "  ") != nil {
		return "", false
	}
	var out strings.Builder
	for _, r := range b.String() {
		plain := r >= ' ' && r < 0x7f || r == '\n' || unicode.In(r, unicode.L, unicode.N, unicode.P, unicode.S)
		switch r {
		case 0x115f, 0x1160, 0x3164, 0xffa0, 0x2800, unicode.ReplacementChar: // fillers, by their class letters or signs
			plain = false
		}
		if plain {
			out.WriteRune(r)
			continue
		}
		for _, u := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&out, `\u%04x`, u)
		}
	}
	return out.String(), true
}

// PolicyChange is one way in which two policies differ: a key of the policy file,
// with dots, and what it is in each, as text. Of a list it is one entry, which is
// gone (Before) or new (After).
type PolicyChange struct {
	Key    string `json:"key"`
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
}

// PolicyChanges says how two policies differ, by key; what a policy file leaves to
// the defaults is compared too. The order in a list means nothing in a policy.
func PolicyChanges(was, is *Policy) []PolicyChange {
	changes := []PolicyChange{}
	before, after := flatten(was), flatten(is)
	all := maps.Clone(before)
	maps.Copy(all, after)
	for _, key := range slices.Sorted(maps.Keys(all)) {
		b, a := before[key], after[key]
		if !b.list && !a.list {
			// One text, or none where a key is left out.
			if b, a := strings.Join(b.texts, ""), strings.Join(a.texts, ""); b != a {
				changes = append(changes, PolicyChange{key, b, a})
			}
			continue
		}
		for _, t := range b.texts {
			if !slices.Contains(a.texts, t) {
				changes = append(changes, PolicyChange{Key: key, Before: t})
			}
		}
		for _, t := range a.texts {
			if !slices.Contains(b.texts, t) {
				changes = append(changes, PolicyChange{Key: key, After: t})
			}
		}
	}
	return changes
}

type flat struct {
	list  bool
	texts []string
}

// flatten gives a policy file's values by key.
func flatten(p *Policy) map[string]flat {
	out := map[string]flat{}
	var walk func(key string, v any)
	walk = func(key string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, v := range v {
				if key != "" {
					k = key + "." + k
				}
				walk(k, v)
			}
		case []any:
			f := flat{list: true}
			for _, e := range v {
				f.texts = append(f.texts, text(e))
			}
			out[key] = f
		case nil: // a list without entries
			out[key] = flat{list: true}
		default:
			out[key] = flat{texts: []string{text(v)}}
		}
	}
	b, err := json.Marshal(p)
	if err != nil {
		return out // a struct of plain fields: no error
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var v any
	if d.Decode(&v) == nil {
		walk("", v)
	}
	return out
}

func text(v any) string {
	if s, ok := v.(string); ok {
		return s
	}
	b, _ := json.Marshal(v) // a number or a bool
	return string(b)
}
