package admin

import (
	"database/sql"
	"strings"
	"testing"
)

// The policy's life by virt-trust, with four eyes as the office wants it.
func TestPolicyCommands(t *testing.T) {
	o := openOffice(t)
	file := o.path("policy.json")
	policy := func(more string) {
		write(t, file, "{\n \"format\": \"virt-trust-policy-1\", \"id\": \"ours\""+more+"\n}\n")
	}
	if out := o.want(0, "\n  \"id\": \"default\"", "rita", "policy", "show"); !strings.HasPrefix(out, "{\n") {
		t.Errorf("more than the document: %s", out)
	}
	if _, says, _ := o.run("rita", "policy", "show"); !strings.Contains(says, "no policy was set") {
		t.Error(says)
	}
	policy(`, "ima": {"require": true, "excludes": ["/var/log/*"]}, "max_age": 150`)
	check := o.want(0, "id: default -> ours\nima.excludes: - -> /var/log/*\nima.require: false -> true\n", "rita", "policy", "check", file)
	if strings.Contains(check, "max_age") { // as it is
		t.Error(check)
	}
	if v := decode[policyCheck](t, o.want(0, "", "rita", "policy", "check", file, "--json")); v.Next != 1 || len(v.Changes) != 3 {
		t.Errorf("%+v", v)
	}
	o.want(ExitRefused, "forbidden", "otto", "policy", "set", file)
	o.want(ExitRefused, "not-found", "rita", "policy", "show", "--proposed")
	o.want(0, "ima.require: false -> true\nproposed as version 1: it counts once another person approves it", "paula", "policy", "set", file)
	o.want(0, "ours", "rita", "policy", "show", "--proposed")
	o.want(ExitRefused, "same-person", "paula", "policy", "approve")
	o.want(ExitRefused, "forbidden", "otto", "policy", "approve")
	o.want(0, "ima.require: false -> true\nversion 1 counts from now on", "peter", "policy", "approve")
	o.want(ExitRefused, "not-found", "peter", "policy", "approve")
	o.want(0, "nothing differs from the policy that counts", "paula", "policy", "set", file)
	o.want(ExitRefused, "not-found", "rita", "policy", "show", "--proposed")

	policy(`, "unknown_event": "warning"`)
	o.want(0, "proposed as version 3", "paula", "policy", "set", file) // a proposal and its end are versions
	o.want(0, "the proposal of paula was dropped", "paula", "policy", "reject")
	o.want(0, "proposed as version 5", "paula", "policy", "set", file)
	o.want(0, "version 2 counts", "peter", "policy", "approve")
	o.want(0, "version 2, set by paula, peter", "rita", "policy", "history")
	history := o.want(0, "unknown_event: contraindicated -> warning\n\nversion 1", "rita", "policy", "history")
	if !strings.Contains(history, "ima.excludes: /var/log/* -> -\nima.require: true -> false\n") {
		t.Error(history)
	}
	if out := o.want(0, "version 2", "rita", "policy", "history", "--last", "1"); strings.Contains(out, "version 1") || !strings.Contains(out, "ima.require: true -> false") {
		t.Error(out)
	}
	if v := decode[[]policyVersion](t, o.want(0, "", "rita", "policy", "history", "--json")); len(v) != 2 || v[1].Version != 1 {
		t.Errorf("%+v", v)
	}
	// What is printed is what can be set again.
	write(t, file, o.want(0, "/var/log/*", "rita", "policy", "show", "--version", "1"))
	o.want(0, "ima.require: false -> true\n", "rita", "policy", "check", file)
	o.want(ExitRefused, "not-found", "rita", "policy", "show", "--version", "3")
	o.want(ExitUsage, "or --proposed", "rita", "policy", "show", "--version", "1", "--proposed")

	for _, c := range []struct{ content, says string }{
		{"pcrs = []", "is no JSON"},
		{`{"format": "virt-trust-policy-1", "id": "x", "pcrs": []}`, "invalid: it makes no sense: the policy: no PCRs have to be quoted"},
		{`{"format": "virt-trust-policy-1", "id": "x", "unknown": 1}`, `unknown field "unknown"`},
		{`[]`, "invalid"},
		{`"` + strings.Repeat("x", 1<<20) + `"`, "more than 1048576 bytes"},
	} {
		write(t, file, c.content)
		o.want(ExitFailed, c.says, "paula", "policy", "check", file)
		o.want(ExitFailed, c.says, "paula", "policy", "set", file)
	}
	o.want(ExitFailed, "no such file", "paula", "policy", "set", file+".none")
	o.want(ExitUsage, "at least 1", "paula", "policy", "history", "--last", "0")

	// Escapes of a terminal in a document stay JSON's.
	write(t, file, "{\"format\": \"virt-trust-policy-1\", \"id\": \"\u009b2J\u202e\U000e0001\"}")
	o.want(0, "proposed", "paula", "policy", "set", file)
	if out := o.want(0, `\u009b2J\u202e\udb40\udc01`, "rita", "policy", "show", "--proposed"); strings.ContainsAny(out, "\u009b\u202e") {
		t.Errorf("%q", out)
	}
}

func TestWebhookCommands(t *testing.T) {
	o := openOffice(t)
	secret := o.want(0, "webhook 1: whsec_", "paula", "webhook", "add", "https://hooks.example/a", "--event", "trust.changed")
	o.want(0, "webhook 2", "paula", "webhook", "add", "https://hooks.example/b")
	o.want(ExitFailed, "invalid", "paula", "webhook", "add", "http://hooks.example/")
	o.want(ExitFailed, "none of the events", "paula", "webhook", "add", "https://hooks.example/", "--event", "all")
	o.want(ExitRefused, "forbidden", "otto", "webhook", "list")
	list := o.want(0, "https://hooks.example/a  trust.changed\n", "paula", "webhook", "list")
	if strings.Contains(list, strings.Fields(secret)[2]) {
		t.Errorf("the secret again: %s", list)
	}
	if v := decode[[]fleetHook](t, o.want(0, "", "paula", "webhook", "list", "--json")); len(v) != 2 || v[1].URL != "https://hooks.example/b" {
		t.Errorf("%+v", v)
	}
	o.want(ExitFailed, "receiver-failed", "paula", "webhook", "test", "1") // there is no such host
	o.want(ExitRefused, "not-found", "paula", "webhook", "test", "7")
	o.want(ExitUsage, `"x" is no number of a webhook`, "paula", "webhook", "test", "x")

	db, err := sql.Open("sqlite", "file:"+o.path("db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	bury := func(hook int) {
		t.Helper()
		_, err := db.Exec("INSERT INTO deliveries (hook, event, body, attempts, due, last_err, created, dead) VALUES (?, 'trust.changed', x'7b7d', 20, 0, 'said 503' || char(27), 1, 1)", hook)
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, hook := range []int{1, 1, 2, 2} {
		bury(hook)
	}
	if out := o.want(0, "trust.changed", "paula", "webhook", "dead"); strings.Count(out, "said 503") != 4 || strings.Contains(out, "\x1b") {
		t.Errorf("%q", out)
	}
	if v := decode[[]deadLetter](t, o.want(0, "", "paula", "webhook", "dead", "--last", "3", "--json")); len(v) != 3 || v[0].Attempts != 20 {
		t.Errorf("%+v", v)
	}
	// What the shell offers: none twice, nothing for who may not look.
	o.want(0, "1\thttps://hooks.example/a\n2\thttps://hooks.example/b\n:4", "paula", "__complete", "webhook", "test", "")
	if out := o.want(0, "3\ttrust.changed: said 503", "paula", "__complete", "webhook", "revive", "4", ""); strings.Contains(out, "4\t") || strings.Contains(out, "\x1b") {
		t.Errorf("%q", out)
	}
	if out := o.want(0, ":4", "rita", "__complete", "webhook", "revive", ""); strings.Contains(out, "trust") {
		t.Errorf("%q", out)
	}
	o.want(ExitUsage, "or --all", "paula", "webhook", "revive")
	o.want(ExitUsage, "or --all", "paula", "webhook", "revive", "--all", "1")
	o.want(ExitUsage, "or --all", "paula", "webhook", "revive", "--webhook", "1", "1")
	o.want(ExitUsage, "no number of a delivery", "paula", "webhook", "revive", "0")
	o.want(ExitRefused, "forbidden", "otto", "webhook", "revive", "1")
	o.want(ExitRefused, "not-found", "paula", "webhook", "revive", "1", "99") // all or none
	if out := o.want(0, "", "paula", "webhook", "dead"); strings.Count(out, "said 503") != 4 {
		t.Error(out)
	}
	o.want(0, "1 delivery queued anew", "paula", "webhook", "revive", "1")
	o.want(0, "2 deliveries queued anew", "paula", "webhook", "revive", "--all", "--webhook", "2")
	o.want(0, "1 delivery queued anew", "paula", "webhook", "revive", "--all")
	if out := o.want(0, "LAST ERROR", "paula", "webhook", "dead"); strings.Contains(out, "said 503") {
		t.Error(out)
	}
	o.want(0, "0 deliveries queued anew", "paula", "webhook", "revive", "--all")
	o.want(0, "webhook 2: removed", "paula", "webhook", "remove", "2")
	o.want(ExitRefused, "not-found", "paula", "webhook", "remove", "2")
}
