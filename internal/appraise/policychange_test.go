package appraise

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPolicyChanges(t *testing.T) {
	parse := func(s string) *Policy {
		t.Helper()
		p, err := ParsePolicy([]byte(`{"format": "virt-trust-policy-1", "id": "x"` + s + `}`))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	plain := parse("")
	for _, c := range []struct {
		name    string
		was, is *Policy
		want    []PolicyChange
	}{
		{"none", plain, parse(""), []PolicyChange{}},
		{"defaults that are spelt out", plain, parse(`, "max_age": 300, "unknown_event": "contraindicated", "ima": {"require": false}`), []PolicyChange{}},
		{"texts, numbers, truths", plain, parse(`, "max_age": 60.5, "unknown_event": "warning", "require_vm_quote": true, "ima": {"unknown": "affirming"}`), []PolicyChange{
			{"ima.unknown", "warning", "affirming"}, {"max_age", "300", "60.5"}, {"require_vm_quote", "false", "true"}, {"unknown_event", "contraindicated", "warning"},
		}},
		{"lists, whatever their order", parse(`, "vm_pcrs": [4, 9, 7], "ima": {"excludes": ["/a", "/b"]}`), parse(`, "vm_pcrs": [9, 4, 11], "ima": {"excludes": ["/b", "/c/*"]}`), []PolicyChange{
			{"ima.excludes", "/a", ""}, {"ima.excludes", "", "/c/*"}, {"vm_pcrs", "7", ""}, {"vm_pcrs", "", "11"},
		}},
		{"a list that is empty", plain, parse(`, "events": null, "vm_pcrs": [0, 2, 4, 7, 8, 9, 11, 12]`), []PolicyChange{
			{"events", "0", ""}, {"events", "2", ""}, {"events", "4", ""}, {"events", "7", ""}, {"events", "8", ""}, {"events", "9", ""}, {"events", "11", ""}, {"events", "12", ""}, {"events", "14", ""},
			{"vm_pcrs", "14", ""},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if d := cmp.Diff(c.want, PolicyChanges(c.was, c.is)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestPolicyText(t *testing.T) {
	in := "{\"id\":\"é \u202e\u009b\u200b\U000e0001a\u0301\u2800\",\"pcrs\":[]}"
	want := "{\n  \"id\": \"é \\u202e\\u009b\\u200b\\udb40\\udc01a\\u0301\\u2800\",\n  \"pcrs\": []\n}"
	got, ok := PolicyText([]byte(" " + in + "\r\n"))
	if !ok || got != want {
		t.Errorf("%v %q", ok, got)
	}
	var a, b any
	if err := errors.Join(json.Unmarshal([]byte(in), &a), json.Unmarshal([]byte(got), &b)); err != nil || cmp.Diff(a, b) != "" {
		t.Errorf("another document: %v %v %v", a, b, err)
	}
	if _, ok := PolicyText([]byte("{} x")); ok {
		t.Error("no JSON")
	}
}
