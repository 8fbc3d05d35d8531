package reason

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestCodes(t *testing.T) {
	if len(All()) != len(explain) {
		t.Fatalf("%d codes, %d explanations", len(All()), len(explain))
	}
	for _, c := range All() {
		if c.Explain() == "" || !c.Known() {
			t.Errorf("%s is not explained", c)
		}
	}
	if Code("made-up").Known() {
		t.Error("a code that is none is known")
	}
}

func TestRefusal(t *testing.T) {
	r := Refuse(VTPMChanged, "put it back", "the state of %q changed", "a\nb")
	if got, want := r.Error(), `vtpm-changed: the state of "a\nb" changed; put it back`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got := Refuse(LabelMissing, "", "").Error(); got != "label-missing: the VM's image has no label" {
		t.Error(got)
	}
	if As(fmt.Errorf("starting: %w", r)) != r || As(errors.New("x")) != nil || As(nil) != nil {
		t.Error("As")
	}
	back, ok := Parse(r.Error())
	if !ok || back.Code != r.Code || back.Error() != r.Error() {
		t.Errorf("%v, %v", back, ok)
	}
	for _, s := range []string{"", "vtpm-changed", "made-up: x", ": x"} {
		if _, ok := Parse(s); ok {
			t.Errorf("%q is taken for a refusal", s)
		}
	}
}

func TestOneLine(t *testing.T) {
	for in, want := range map[string]string{
		"a\nb\x1b[31m\x00c": "a b [31m c", "ü €": "ü €", "a\xffb": "a b", "‮x": " x",
	} {
		if got := OneLine(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	if got := OneLine(strings.Repeat("ü", 5000)); len(got) > 1010 || !strings.HasSuffix(got, "…") {
		t.Errorf("%d bytes", len(got))
	}
}
