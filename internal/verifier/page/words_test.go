package page

import (
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"strings"
	"testing"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/rounds"
	"virt-trust/internal/verifier/store"
)

// codes are the constants of package appraise that name reasons, read from its
// source: a new one without advice fails here.
func codes(t *testing.T) []string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "../../appraise/codes.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	ast.Inspect(f, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok || !strings.HasPrefix(v.Names[0].Name, "Code") {
			return true
		}
		for _, x := range v.Values {
			if lit, ok := x.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				s, err := strconv.Unquote(lit.Value)
				if err != nil {
					t.Fatal(err)
				}
				out = append(out, s)
			}
		}
		return true
	})
	if len(out) < 50 {
		t.Fatalf("only %d codes", len(out))
	}
	return out
}

func TestAdvice(t *testing.T) {
	known := map[string]bool{store.CodeExpired: true, store.CodeInactive: true, rounds.CodeTwice: true, rounds.CodeElsewhere: true, rounds.CodeMoved: true}
	for _, c := range codes(t) {
		known[c] = true
	}
	for c := range known {
		if advice[c] == "" {
			t.Errorf("no advice for %s", c)
		}
	}
	for c := range advice {
		if !known[c] {
			t.Errorf("advice for %s, which is no code", c)
		}
	}
	if adviceFor("from-the-future") == "" {
		t.Error("an unknown code leaves people alone")
	}
}

func TestClaims(t *testing.T) {
	got := claims(appraise.Vector{InstanceIdentity: 97, Executables: 33, Hardware: 2, Configuration: -40, StorageOpaque: 1})
	want := []claim{
		{"Instance identity", "it is not the node that was enrolled", 97, appraise.Contraindicated},
		{"Configuration", "not quite as it should be", -40, appraise.Warning},
		{"Executables", "files ran that nobody knows", 33, appraise.Warning},
		{"Hardware", "genuine, and in a known state", 2, appraise.Affirming},
		{"Storage", "could not be told", 1, appraise.None},
	}
	if len(got) != len(want) {
		t.Fatal(got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("%+v, want %+v", got[i], want[i])
		}
	}
	for v, tier := range map[int8]appraise.Tier{0: appraise.None, -1: appraise.None, 2: appraise.Affirming, 31: appraise.Affirming, 32: appraise.Warning, 95: appraise.Warning, 96: appraise.Contraindicated,
		127: appraise.Contraindicated, -2: appraise.Affirming, -32: appraise.Affirming, -33: appraise.Warning, -96: appraise.Warning, -97: appraise.Contraindicated, -128: appraise.Contraindicated} {
		if got := tierOf(v); got != tier {
			t.Errorf("%d is %s, want %s", v, got, tier)
		}
	}
}
