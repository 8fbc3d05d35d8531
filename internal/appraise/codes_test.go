package appraise

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Every reason code is one word of its own, and some test sees it.
func TestCodes(t *testing.T) {
	f, err := parser.ParseFile(token.NewFileSet(), "codes.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var tests strings.Builder
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		tests.Write(b)
	}
	page, err := os.ReadFile("../../packaging/man/virt-trust-verifier-appraisal.7")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, d := range f.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.CONST {
			continue
		}
		for _, s := range g.Specs {
			v := s.(*ast.ValueSpec)
			name, value := v.Names[0].Name, v.Values[0].(*ast.BasicLit).Value
			if !regexp.MustCompile(`^"[a-z]+(-[a-z]+)*"$`).MatchString(value) || seen[value] {
				t.Errorf("%s: %s is no code, or one that there is already", name, value)
			}
			seen[value] = true
			if !strings.Contains(string(page), "\n.It Cm "+strings.Trim(value, `"`)+"\n") {
				t.Errorf("%s is not in virt-trust-verifier-appraisal(7)", value)
			}
			if !regexp.MustCompile(`\b` + name + `\b`).MatchString(tests.String()) {
				t.Errorf("no test sees %s", name)
			}
		}
	}
	if n := strings.Count(string(page), "\n.It Cm "); n != len(seen)+4 { // and the tiers
		t.Errorf("the manual page has %d codes, and there are %d", n-4, len(seen))
	}
	// The policy in the page is the default.
	_, rest, _ := strings.Cut(string(page), ".Sh POLICY")
	_, rest, _ = strings.Cut(rest, ".Bd -literal\n")
	text, _, _ := strings.Cut(rest, ".Ed")
	p, err := ParsePolicy([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if p.compile().revision != DefaultPolicy().compile().revision {
		t.Errorf("the policy in the page is not the default: %+v", p)
	}
	if len(seen) < 50 {
		t.Errorf("%d codes", len(seen))
	}
}
