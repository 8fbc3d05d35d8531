package report

import (
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"
)

// A reader for as much of RFC 8610 as evidence.cddl needs: rules that are maps
// with integer keys, arrays of rules, bstr, text, int, uint, bool, ranges, literals,
// and what is controlled by .size and .cbor. What it does not know fails the test.

// cddlField is a member of a map rule.
type cddlField struct {
	optional bool
	kind     string // as it is written, without the comment
}

var (
	cddlRule   = regexp.MustCompile(`(?ms)^([a-z-]+) = \{\n(.*?)^\}`)
	cddlMember = regexp.MustCompile(`^\s*(\? )?(\d+) => (.*?),?\s*(;.*)?$`)
)

func cddlRules(t testing.TB) map[string]map[uint64]cddlField {
	t.Helper()
	rules := map[string]map[uint64]cddlField{}
	rest := cddlRule.ReplaceAllStringFunc(CDDL, func(s string) string {
		m := cddlRule.FindStringSubmatch(s)
		fields := map[uint64]cddlField{}
		for line := range strings.Lines(m[2]) {
			f := cddlMember.FindStringSubmatch(strings.TrimRight(line, "\n"))
			if f == nil {
				t.Fatalf("rule %s: %q", m[1], line)
			}
			n, err := strconv.ParseUint(f[2], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			if _, twice := fields[n]; twice {
				t.Fatalf("rule %s: key %d twice", m[1], n)
			}
			fields[n] = cddlField{f[1] != "", f[3]}
		}
		rules[m[1]] = fields
		return ""
	})
	for line := range strings.Lines(rest) {
		if s := strings.TrimSpace(line); s != "" && !strings.HasPrefix(s, ";") {
			t.Fatalf("the reader does not know %q", s)
		}
	}
	if len(rules) < 10 {
		t.Fatalf("%d rules", len(rules))
	}
	return rules
}

// goTypes are the rules' Go types.
var goTypes = map[string]reflect.Type{
	"evidence": reflect.TypeFor[Evidence](), "quote": reflect.TypeFor[Quote](), "bank": reflect.TypeFor[Bank](), "log": reflect.TypeFor[Log](),
	"report": reflect.TypeFor[Report](), "host": reflect.TypeFor[Host](), "vm": reflect.TypeFor[VM](), "reading": reflect.TypeFor[Reading](),
	"vtpm-quote": reflect.TypeFor[VTPMQuote](), "deleted": reflect.TypeFor[Deleted](),
}

// The grammar has the keys of the Go types, no more and no less, in the same
// types, and optional where the Go type leaves them out.
func TestGrammar(t *testing.T) {
	rules := cddlRules(t)
	if got, want := slices.Sorted(maps.Keys(rules)), slices.Sorted(maps.Keys(goTypes)); !slices.Equal(got, want) {
		t.Fatalf("rules %v, types %v", got, want)
	}
	for name, typ := range goTypes {
		seen := map[uint64]bool{}
		for i := range typ.NumField() {
			f := typ.Field(i)
			tag := strings.Split(f.Tag.Get("cbor"), ",")
			n, err := strconv.ParseUint(tag[0], 10, 64)
			if err != nil || !slices.Contains(tag, "keyasint") {
				t.Fatalf("%s.%s: tag %q", name, f.Name, f.Tag)
			}
			seen[n] = true
			rule, ok := rules[name][n]
			if !ok {
				t.Errorf("%s.%s: the grammar has no key %d", name, f.Name, n)
				continue
			}
			if omit := slices.Contains(tag, "omitempty"); omit != rule.optional {
				t.Errorf("%s.%s: left out where empty: %v; optional in the grammar: %v", name, f.Name, omit, rule.optional)
			}
			if want := goKind(f.Type); want != cddlKind(rule.kind) {
				t.Errorf("%s.%s: %s, in the grammar %q", name, f.Name, want, rule.kind)
			}
		}
		for n := range rules[name] {
			if !seen[n] {
				t.Errorf("%s: the grammar has key %d, the type has not", name, n)
			}
		}
	}
	for _, n := range []int{MaxEvidence, MaxReport, MaxVMs} {
		if !strings.Contains(CDDL, fmt.Sprint(n)) {
			t.Errorf("the grammar does not name the bound %d", n)
		}
	}
}

func goKind(t reflect.Type) string {
	if t == reflect.TypeFor[Values]() {
		return "map"
	}
	switch t.Kind() {
	case reflect.Pointer:
		return goKind(t.Elem())
	case reflect.String:
		return "text"
	case reflect.Bool:
		return "bool"
	case reflect.Uint, reflect.Uint64:
		return "uint"
	case reflect.Int64:
		return "int"
	case reflect.Array:
		return "bytes"
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return "bytes"
		}
		return "[" + goKind(t.Elem()) + "]"
	case reflect.Struct:
		for name, typ := range goTypes {
			if typ == t {
				return name
			}
		}
	}
	return "?" + t.String()
}

func cddlKind(kind string) string {
	switch {
	case strings.HasPrefix(kind, "bstr"):
		return "bytes"
	case strings.HasPrefix(kind, `"`):
		return "text"
	case kind == "true":
		return "bool"
	case regexp.MustCompile(`^\d+(\.\.\d+)?$`).MatchString(kind):
		return "uint"
	case strings.HasPrefix(kind, "{"):
		return "map"
	case strings.HasPrefix(kind, "[* "):
		return "[" + strings.TrimSuffix(strings.TrimPrefix(kind, "[* "), "]") + "]"
	}
	return kind
}

// validate holds CBOR against a rule.
func validate(rules map[string]map[uint64]cddlField, kind string, v any) error {
	bad := func() error { return fmt.Errorf("%q is not %.60v", kind, v) }
	number := func() (uint64, error) {
		n, ok := v.(uint64)
		if !ok {
			return 0, bad()
		}
		return n, nil
	}
	switch {
	case rules[kind] != nil:
		m, ok := v.(map[any]any)
		if !ok {
			return bad()
		}
		for k := range m {
			n, ok := k.(uint64)
			if _, known := rules[kind][n]; !ok || !known {
				return fmt.Errorf("%s: key %v", kind, k)
			}
		}
		for n, f := range rules[kind] {
			member, there := m[n]
			switch {
			case !there && f.optional:
			case !there:
				return fmt.Errorf("%s: key %d is missing", kind, n)
			default:
				if err := validate(rules, f.kind, member); err != nil {
					return fmt.Errorf("%s, key %d: %w", kind, n, err)
				}
			}
		}
		return nil
	case strings.HasPrefix(kind, "[* "):
		all, ok := v.([]any)
		if !ok {
			return bad()
		}
		for _, e := range all {
			if err := validate(rules, strings.TrimSuffix(strings.TrimPrefix(kind, "[* "), "]"), e); err != nil {
				return err
			}
		}
		return nil
	case strings.HasPrefix(kind, "bstr"):
		b, ok := v.([]byte)
		if !ok {
			return bad()
		}
		control := strings.TrimPrefix(kind, "bstr")
		if inner, is := strings.CutPrefix(control, " .cbor "); is {
			var x any
			if err := cbor.Unmarshal(b, &x); err != nil {
				return err
			}
			return validate(rules, inner, x)
		}
		if control == "" {
			return nil
		}
		size := regexp.MustCompile(`^ \.size (?:\((\d+)\.\.(\d+)\)|(\d+))$`).FindStringSubmatch(control)
		if size == nil {
			return fmt.Errorf("the reader does not know %q", kind)
		}
		lo, _ := strconv.Atoi(size[1] + size[3])
		hi, _ := strconv.Atoi(size[2] + size[3])
		if len(b) < lo || len(b) > hi {
			return bad()
		}
		return nil
	case kind == "{ * (0..23) => bstr }":
		m, ok := v.(map[any]any)
		if !ok {
			return bad()
		}
		for k, e := range m {
			n, isNumber := k.(uint64)
			_, isBytes := e.([]byte)
			if !isNumber || n > 23 || !isBytes {
				return bad()
			}
		}
		return nil
	case strings.HasPrefix(kind, `"`):
		for _, one := range strings.Split(kind, " / ") {
			if s, ok := v.(string); ok && one == strconv.Quote(s) {
				return nil
			}
		}
		return bad()
	case kind == "text":
		if _, ok := v.(string); !ok {
			return bad()
		}
		return nil
	case kind == "bool":
		if _, ok := v.(bool); !ok {
			return bad()
		}
		return nil
	case kind == "true":
		if v != true {
			return bad()
		}
		return nil
	case kind == "uint":
		_, err := number()
		return err
	case kind == "int":
		if _, ok := v.(int64); !ok {
			_, err := number()
			return err
		}
		return nil
	}
	if r := regexp.MustCompile(`^(\d+)(?:\.\.(\d+))?$`).FindStringSubmatch(kind); r != nil {
		n, err := number()
		if err != nil {
			return err
		}
		lo, _ := strconv.ParseUint(r[1], 10, 64)
		hi := lo
		if r[2] != "" {
			hi, _ = strconv.ParseUint(r[2], 10, 64)
		}
		if n < lo || n > hi {
			return bad()
		}
		return nil
	}
	return fmt.Errorf("the reader does not know %q", kind)
}

// valid holds Evidence against the grammar.
func valid(t testing.TB, b []byte) error {
	t.Helper()
	var v any
	if err := cbor.Unmarshal(b, &v); err != nil {
		return err
	}
	return validate(cddlRules(t), "evidence", v)
}
