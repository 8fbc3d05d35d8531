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
			if !regexp.MustCompile(`\b` + name + `\b`).MatchString(tests.String()) {
				t.Errorf("no test sees %s", name)
			}
		}
	}
	if len(seen) < 50 {
		t.Errorf("%d codes", len(seen))
	}
}
