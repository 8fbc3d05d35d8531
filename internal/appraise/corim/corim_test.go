package corim

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/veraison/go-cose"

	"virt-trust/internal/appraise"
	ct "virt-trust/internal/appraise/corim/corimtest"
	"virt-trust/internal/launcher/refvalues"
)

var now = time.Date(2026, 11, 26, 4, 0, 0, 0, time.UTC)

func file(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func sum(s string) []byte {
	d := sha256.Sum256([]byte(s))
	return d[:]
}

func digestOf(s string) string { return "sha256:" + hex.EncodeToString(sum(s)) }

// lines gives values in an order: "subject kind path digest".
func lines(m *Manifest) (all []string) {
	for _, t := range m.Tags {
		for _, v := range t.Values {
			all = append(all, fmt.Sprintf("%s %s %s %s", v.Subject, v.Kind, v.Path, v.Digest))
		}
	}
	slices.Sort(all)
	return all
}

func wantLines(t *testing.T, m *Manifest, ignored map[string]int, want ...string) {
	t.Helper()
	slices.Sort(want)
	if got := lines(m); !slices.Equal(got, want) {
		t.Errorf("values\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if !maps.Equal(m.Ignored, ignored) {
		t.Errorf("ignored %v, want %v", m.Ignored, ignored)
	}
}

// TestOthers reads what others make today.
func TestOthers(t *testing.T) {
	const zero = "0000000000000000000000000000000000000000000000000000000000000000"
	m, err := Parse(file(t, "parsec-tpm.cbor"), "group:arm", now)
	if err != nil {
		t.Fatal(err)
	}
	wantLines(t, m, map[string]int{"key triples": 1},
		"group:arm host-pcr sha256:0 sha256:"+zero,
		"group:arm host-pcr sha256:1 sha256:"+zero,
		"group:arm host-pcr sha256:2 sha256:"+zero,
		"group:arm host-pcr sha384:0 sha384:4284b5694ca6c0d2cf4789a0b95ac8025c818de52304364be7cd2981b2d2edc685b322277ec25819962413d8c9b2c1f5",
		"group:arm host-pcr sha384:1 sha384:4284b5694ca6c0d2cf4789a0b95ac8025c818de52304364be7cd2981b2d2edc685b322277ec25819962413d8c9b2c1f5",
		"group:arm host-pcr sha384:2 sha384:2107bbe761fca52d95136a1354db7a4dd57b1b26be0d3da71d9eb23986b34ba615abf6514cf35e5a9ea55a032d068a78")
	if m.ID != "00000000-0000-0000-6768-0000000000001" || len(m.Tags) != 2 || m.Tags[0].ID != "99019224-57aa-44bc-bef8-d36bdd6bd035" {
		t.Errorf("%q %+v", m.ID, m.Tags)
	}
}

// TestLibrary reads what the library for CoRIM made, two years ago.
func TestLibrary(t *testing.T) {
	keys, err := refvalues.ParseKeys(file(t, "library.pem"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		" host-ima /usr/bin/swtpm " + digestOf("swtpm"),
		" host-pcr sha256:0 " + digestOf("PCR 0"),
		" host-pcr sha256:7 " + digestOf("PCR 7"),
		" host-pcr sha384:0 sha384:" + hex.EncodeToString(append(sum("a"), sum("b")[:16]...)),
	}
	ignored := map[string]int{"key triples": 1, "measurements of more or other than digests": 1}
	m, err := Verify(file(t, "library-signed.cbor"), keys, "", now)
	if err != nil {
		t.Fatal(err)
	}
	wantLines(t, m, ignored, want...)
	if g := m.Tags[0]; g.ID != "acme-servers" || g.Version != 4 || !slices.Equal(g.Replaces, []string{"acme-servers-of-2023"}) {
		t.Errorf("%+v", g)
	}
	if m, err = Parse(file(t, "library.cbor"), "", now); err != nil {
		t.Fatal(err)
	}
	ignored["linked tags"] = 1
	wantLines(t, m, ignored, want...)
	if len(m.Tags[0].Replaces) > 0 {
		t.Error("what nobody signed takes something away")
	}
	for _, when := range []time.Time{now.AddDate(-2, 0, 0), now.AddDate(5, 0, 0)} {
		if _, err := Parse(file(t, "library.cbor"), "", when); err == nil {
			t.Errorf("valid at %s", when)
		}
	}
}

var (
	ours = ct.Map{3: ct.Tagged(32, Profile)}
	id16 = []byte{0xaa, 0xbb, 0xcc, 0xdd, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
)

const idText = "aabbccdd-0102-0304-0506-0708090a0b0c"

// TestMapping holds what is read against the manual page.
func TestMapping(t *testing.T) {
	one := func(environment ct.Map, measurements ...any) []byte {
		return ct.CoRIM(ours, ct.CoMID("x", 1, nil, ct.Reference(environment, measurements...)))
	}
	both := func(a, b ct.Map) ct.Map { c := maps.Clone(a); maps.Copy(c, b); return c }
	d := digestOf("x")
	for name, c := range map[string]struct {
		corim   []byte
		want    []string
		ignored map[string]int
	}{
		"host":      {corim: one(ct.Model("host"), ct.Of(7, sum("x")), ct.Of("/usr/bin/a", sum("x"))), want: []string{"S host-pcr sha256:7 " + d, "S host-ima /usr/bin/a " + d}},
		"launchers": {corim: one(ct.Model("launcher"), ct.Of("/usr/bin/a", sum("x"))), want: []string{"S launcher /usr/bin/a " + d}},
		"VM":        {corim: one(ct.Model("vm"), ct.Of(23, sum("x")), ct.Of("/init", sum("x"))), want: []string{"S vm-pcr sha256:23 " + d, "S vm-ima /init " + d}},
		"no profile": {corim: ct.CoRIM(nil, ct.CoMID("x", 0, nil, ct.Reference(ct.Map{0: ct.Map{1: "ACME", 2: "vm"}}, ct.Of(7, sum("x"))))),
			want: []string{"S host-pcr sha256:7 " + d}},
		"a node":                         {corim: one(both(ct.Model("host"), ct.Map{1: ct.Tagged(37, id16)}), ct.Of(7, sum("x"))), want: []string{idText + " host-pcr sha256:7 " + d}},
		"a group":                        {corim: one(both(ct.Model("host"), ct.Map{2: ct.Tagged(560, []byte("edge"))}), ct.Of(7, sum("x"))), want: []string{"group:edge host-pcr sha256:7 " + d}},
		"a file's name":                  {corim: one(ct.Model("launcher"), ct.Map{1: ct.Map{11: "/usr/bin/a", 2: ct.SHA256(sum("x")), 0: ct.Map{0: "1"}}}), want: []string{"S launcher /usr/bin/a " + d}},
		"registers":                      {corim: one(ct.Model("vm"), ct.Map{1: ct.Map{14: map[any]any{4: ct.SHA256(sum("x")), "/init": ct.SHA256(sum("x"))}}}), want: []string{"S vm-pcr sha256:4 " + d, "S vm-ima /init " + d}},
		"COSE's hashes":                  {corim: one(ct.Model("host"), ct.Map{0: 1, 1: ct.Map{2: []any{[]any{-16, sum("x")}}}}, ct.Map{0: 2, 1: ct.Map{2: []any{[]any{"sha-256", sum("x")}}}}), want: []string{"S host-pcr sha256:1 " + d, "S host-pcr sha256:2 " + d}},
		"another hash":                   {corim: one(ct.Model("host"), ct.Map{0: 1, 1: ct.Map{2: []any{[]any{2, sum("x")[:16]}, []any{1, sum("x")}, []any{[]any{1}, []byte{1}}}}}), want: []string{"S host-pcr sha256:1 " + d}, ignored: map[string]int{"digests of other algorithms": 2}},
		"an instance, other than a UUID": {corim: one(both(ct.Model("host"), ct.Map{1: ct.Tagged(550, id16)}), ct.Of(7, sum("x"))), ignored: map[string]int{"measurements of whom no UUID and no group's name tells": 1}},
		"an instance of a group": {corim: one(both(ct.Model("host"), ct.Map{1: ct.Tagged(37, id16), 2: ct.Tagged(560, []byte("edge"))}), ct.Of(7, sum("x")), ct.Of(8, sum("x"))),
			ignored: map[string]int{"measurements of whom no UUID and no group's name tells": 2}},
		"a group, other than a name": {corim: one(both(ct.Model("host"), ct.Map{2: ct.Tagged(37, id16)}), ct.Of(7, sum("x"))), ignored: map[string]int{"measurements of whom no UUID and no group's name tells": 1}},
		"PCRs of launchers":          {corim: one(ct.Model("launcher"), ct.Of(7, sum("x"))), ignored: map[string]int{"digests of what is no PCR and no file here": 1}},
		"PCR 24, other elements": {corim: one(ct.Model("host"), ct.Of(24, sum("x")), ct.Of("boot", sum("x")), ct.Of("/a/../b", sum("x")), ct.Of(ct.Tagged(37, id16), sum("x")), ct.Of(nil, sum("x")), ct.Map{1: ct.Map{2: ct.SHA256(sum("x"))}}),
			ignored: map[string]int{"digests of what is no PCR and no file here": 6}},
		"more than a digest":   {corim: one(ct.Model("host"), ct.Map{0: 7, 1: ct.Map{2: ct.SHA256(sum("x")), 1: 3}}, ct.Map{0: 7, 1: ct.Map{2: ct.SHA256(sum("x")), 99: 3}}, ct.Map{0: 7, 1: ct.Map{4: []byte{1}}}), ignored: map[string]int{"measurements of more or other than digests": 3}},
		"by whom":              {corim: one(ct.Model("host"), ct.Map{0: 7, 1: ct.Map{2: ct.SHA256(sum("x"))}, 2: []any{ct.Tagged(554, "key")}}), ignored: map[string]int{"measurements that other keys have to authorize": 1}},
		"registers of a part":  {corim: one(ct.Model("host"), ct.Map{0: 7, 1: ct.Map{14: ct.Map{7: ct.SHA256(sum("x"))}}}, ct.Map{1: ct.Map{2: ct.SHA256(sum("x")), 14: ct.Map{7: ct.SHA256(sum("x"))}}}), ignored: map[string]int{"integrity registers of a part": 2}},
		"triples":              {corim: ct.CoRIM(ours, ct.CoMID("x", 1, ct.Map{4: ct.Map{0: []any{ct.Reference(ct.Model("host"), ct.Of(7, sum("x")))}, 1: []any{1}, 2: []any{1, 2}, 3: []any{1}, 10: []any{1}, -5: []any{1}}})), want: []string{"S host-pcr sha256:7 " + d}, ignored: map[string]int{"endorsed triples": 1, "key triples": 3, "other triples": 2}},
		"tags, dependent RIMs": {corim: ct.CoRIM(ct.Map{2: []any{ct.Map{0: "https://a"}}}, ct.Tagged(505, []byte{1}), ct.Tagged(507, []byte{1}), ct.Tagged(508, []byte{1}), ct.Tagged(999, 1), 7), ignored: map[string]int{"CoSWID tags": 1, "tags with trust anchors": 2, "unknown tags": 2, "dependent RIMs": 1}},
		"linked tags":          {corim: ct.CoRIM(nil, ct.CoMID("x", 1, ct.Map{3: []any{ct.Map{0: "y", 1: 0}, ct.Map{0: "z", 1: 1}}}, ct.Reference(ct.Map{}, ct.Of(7, sum("x"))))), want: []string{"S host-pcr sha256:7 " + d}, ignored: map[string]int{"linked tags": 2}},
		"valid now":            {corim: ct.CoRIM(ct.Map{4: ct.Map{0: ct.Tagged(1, now.Unix()), 1: ct.Tagged(1, now.Unix())}}, ct.CoMID("x", 1, nil, ct.Reference(ct.Map{}, ct.Of(7, sum("x"))))), want: []string{"S host-pcr sha256:7 " + d}},
	} {
		t.Run(name, func(t *testing.T) {
			m, err := Parse(c.corim, "S", now)
			if err != nil {
				t.Fatal(err)
			}
			wantLines(t, m, c.ignored, c.want...)
		})
	}
}

// TestRefused: what may mean something else, and what is no CoRIM.
func TestRefused(t *testing.T) {
	good := ct.CoMID("x", 1, nil, ct.Reference(ct.Model("host"), ct.Of(7, sum("x"))))
	triple := func(records ...any) []byte { return ct.CoRIM(ours, ct.CoMID("x", 1, nil, records...)) }
	with := func(fields ct.Map) []byte { return ct.CoRIM(fields, good) }
	digests := func(all ...any) []byte {
		return triple(ct.Reference(ct.Model("host"), ct.Map{0: 7, 1: ct.Map{2: all}}))
	}
	epoch := func(d time.Duration) any { return ct.Tagged(1, now.Add(d).Unix()) }
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	for name, c := range map[string]struct {
		corim []byte
		want  string
	}{
		"nothing":                {nil, "0 bytes"},
		"too long":               {make([]byte, MaxSize+1), "bytes"},
		"cut off":                {with(nil)[:80], "EOF"},
		"something follows":      {append(with(nil), 0), "extraneous"},
		"text":                   {[]byte("a text"), ""},
		"a huge map":             {[]byte{0xba, 0xff, 0xff, 0xff, 0xff}, ""},
		"a huge map in bytes":    {ct.CoRIM(nil, ct.Tagged(506, []byte{0xba, 0x7f, 0xff, 0xff, 0xff})), ""},
		"deep":                   {bytes.Repeat([]byte{0x81}, 1000), "nested"},
		"an endless map":         {[]byte{0xbf, 0x00, 0x61, 0x61, 0xff}, "indefinite"},
		"signed":                 {ct.Sign(with(nil), key, nil), "it is signed"},
		"another tag":            {ct.Encode(ct.Tagged(500, ct.Map{0: "x", 1: []any{good}})), "CBOR tag 500"},
		"a field twice":          {[]byte{0xa2, 0x00, 0x61, 0x61, 0x00, 0x61, 0x62}, "duplicate"},
		"no id":                  {ct.Encode(ct.Map{1: []any{good}}), "EOF"},
		"a strange id":           {with(ct.Map{0: "a\nb"}), "no id"},
		"a UUID of 15 bytes":     {with(ct.Map{0: id16[:15]}), "15 bytes"},
		"no tags":                {ct.CoRIM(nil), "0 tags"},
		"a field of the CoRIM":   {with(ct.Map{6: 1}), "unknown field"},
		"a profile":              {with(ct.Map{3: ct.Tagged(32, "https://acme.example/corim")}), "is not known"},
		"an OID as profile":      {with(ct.Map{3: ct.Tagged(111, []byte{0x2a})}), "is not known"},
		"one profile of two":     {with(ct.Map{3: []any{Profile, "https://acme.example/corim"}}), "is not known"},
		"expired":                {with(ct.Map{4: ct.Map{1: epoch(-time.Second)}}), "expired at"},
		"not yet valid":          {with(ct.Map{4: ct.Map{0: epoch(time.Second), 1: epoch(time.Hour)}}), "not valid before"},
		"no end":                 {with(ct.Map{4: ct.Map{0: epoch(0)}}), "expired at"},
		"an end that is none":    {with(ct.Map{4: ct.Map{1: nil}}), "expired at"},
		"one CoMID twice":        {ct.CoRIM(ours, good, good), "a second CoMID"},
		"a CoMID without an id":  {ct.CoRIM(ours, ct.CoMID("x", 1, ct.Map{1: ct.Map{1: 1}})), "EOF"},
		"a field of the CoMID":   {ct.CoRIM(ours, ct.CoMID("x", 1, ct.Map{9: 1})), "unknown field"},
		"a link to nowhere":      {ct.CoRIM(ours, ct.CoMID("x", 1, ct.Map{3: []any{ct.Map{1: 1}}})), "EOF"},
		"a link without a kind":  {ct.CoRIM(ours, ct.CoMID("x", 1, ct.Map{3: []any{ct.Map{0: "y"}}})), "says not how"},
		"many links":             {ct.CoRIM(ours, ct.CoMID("x", 1, ct.Map{3: slices.Repeat([]any{ct.Map{0: "y", 1: 1}}, maxTags+1)})), "linked tags"},
		"another model":          {triple(ct.Reference(ct.Model("hosts"), ct.Of(7, sum("x")))), "none of host"},
		"no class":               {triple(ct.Reference(ct.Map{}, ct.Of(7, sum("x")))), "no class"},
		"an environment's field": {triple(ct.Reference(ct.Map{0: ct.Map{2: "host"}, 3: 1}, ct.Of(7, sum("x")))), "unknown field"},
		"a measurement's field":  {triple(ct.Reference(ct.Model("host"), ct.Map{0: 7, 1: ct.Map{2: ct.SHA256(sum("x"))}, 3: 1})), "unknown field"},
		"half a triple":          {triple([]any{ct.Model("host")}), "array"},
		"a short UUID":           {triple(ct.Reference(ct.Map{0: ct.Map{2: "host"}, 1: ct.Tagged(37, id16[:4])}, ct.Of(7, sum("x")))), "4 bytes"},
		"a group without a name": {triple(ct.Reference(ct.Map{0: ct.Map{2: "host"}, 2: ct.Tagged(560, []byte{})}, ct.Of(7, sum("x")))), "no name of a group"},
		"a group's strange name": {triple(ct.Reference(ct.Map{0: ct.Map{2: "host"}, 2: ct.Tagged(560, []byte("a\xff"))}, ct.Of(7, sum("x")))), "no name of a group"},
		"two digests":            {digests([]any{1, sum("x")}, []any{-16, sum("y")}), "two sha256 digests"},
		"a short digest":         {digests([]any{1, sum("x")[:31]}), "no digest"},
		"a digest of three":      {digests([]any{1, sum("x"), 1}), "array"},
		"no digest":              {digests([]any{1, nil}), "no digest"},
		"a long path":            {triple(ct.Reference(ct.Model("host"), ct.Of("/"+strings.Repeat("a", 5000), sum("x")))), "5001 bytes"},
		"a path with a NUL":      {triple(ct.Reference(ct.Model("host"), ct.Of("/a\x00", sum("x")))), "no path"},
	} {
		m, err := Parse(c.corim, "", now)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v %+v, want %q", name, err, m, c.want)
		}
	}
}

func TestSignatures(t *testing.T) {
	ed := ed25519.NewKeyFromSeed(make([]byte, 32))
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	keys := []any{ed.Public(), ec.Public()}
	epoch := func(d time.Duration) any { return now.Add(d).Unix() }
	payload := ct.CoRIM(ours, ct.CoMID("x", 3, ct.Map{3: []any{ct.Map{0: "old", 1: 1}}}, ct.Reference(ct.Model("host"), ct.Of(7, sum("x")))))
	for _, key := range []crypto.Signer{ed, ec} {
		m, err := Verify(ct.Sign(payload, key, nil), keys, "", now)
		if err != nil {
			t.Fatal(err)
		}
		wantLines(t, m, map[string]int{}, " host-pcr sha256:7 "+digestOf("x"))
		if !reflect.DeepEqual(m.Tags[0].Replaces, []string{"old"}) || m.Tags[0].Version != 3 {
			t.Errorf("%+v", m.Tags)
		}
		others := slices.DeleteFunc(slices.Clone(keys), func(k any) bool { return reflect.DeepEqual(k, key.Public()) })
		for _, keys := range [][]any{nil, others, {foreign.Public()}} {
			if _, err := Verify(ct.Sign(payload, key, nil), keys, "", now); !errors.Is(err, refvalues.ErrSignature) {
				t.Errorf("%T: %v", key, err)
			}
		}
	}
	signed := ct.Sign(payload, ed, nil)
	for i := range signed {
		b := bytes.Clone(signed)
		b[i] ^= 1
		if m, err := Verify(b, keys, "", now); err == nil {
			t.Fatalf("byte %d altered: %+v", i, m)
		}
	}
	meta := func(validity ct.Map) ct.Map {
		return ct.Map{8: ct.Encode(ct.Map{0: ct.Map{0: "a signer"}, 1: validity})}
	}
	for name, c := range map[string]struct {
		header ct.Map
		want   string
	}{
		"in time":             {meta(ct.Map{0: ct.Tagged(1, epoch(-time.Hour)), 1: ct.Tagged(1, epoch(time.Hour))}), ""},
		"expired":             {meta(ct.Map{1: ct.Tagged(1, epoch(-time.Second))}), "expired at"},
		"not yet":             {meta(ct.Map{0: ct.Tagged(1, epoch(time.Second)), 1: ct.Tagged(1, epoch(time.Hour))}), "not valid before"},
		"claims, in time":     {ct.Map{15: map[any]any{1: "a signer", 4: epoch(time.Second), 5: epoch(0), "x": 1}}, ""},
		"claims, no times":    {ct.Map{15: map[any]any{1: "a signer"}}, ""},
		"claims, expired":     {ct.Map{15: map[any]any{4: epoch(-time.Second)}}, "expired at"},
		"claims, a fraction":  {ct.Map{15: map[any]any{4: float64(now.Unix()) - 0.5}}, "expired at"},
		"claims, not yet":     {ct.Map{15: map[any]any{5: epoch(time.Second)}}, "not valid before"},
		"claims, none":        {ct.Map{15: 7}, "cannot unmarshal"},
		"other content":       {ct.Map{3: "text/plain"}, "content type"},
		"content is not said": {ct.Map{3: nil}, "content type"},
		"meta is no CBOR":     {ct.Map{8: []byte{0xff}}, "cbor"},
		"meta with more":      {ct.Map{8: ct.Encode(ct.Map{0: 1, 7: 1})}, "unknown field"},
		"critical, known":     {ct.Map{2: []any{int64(8)}}, ""},
		"critical, not known": {ct.Map{2: []any{int64(260)}, 260: "https://a"}, "critical header 260"},
	} {
		_, err := Verify(ct.Sign(payload, ed, c.header), keys, "", now)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	for name, b := range map[string][]byte{
		"not signed":        payload,
		"nothing is signed": ct.Sign([]byte{}, ed, nil),
		"signed twice":      ct.Sign(signed, ed, nil),
		"detached":          ct.Encode(ct.Tagged(18, []any{[]byte{0xa1, 1, 0x27}, ct.Map{}, nil, make([]byte, 64)})),
		"no algorithm":      ct.Encode(ct.Tagged(18, []any{[]byte{}, ct.Map{1: -8}, payload, make([]byte, 64)})),
		"a replaced neighbour": ct.Sign(ct.CoRIM(nil, ct.CoMID("a", 1, ct.Map{3: []any{ct.Map{0: "b", 1: 1}}}, ct.Reference(ct.Map{}, ct.Of(7, sum("x")))),
			ct.CoMID("b", 1, nil, ct.Reference(ct.Map{}, ct.Of(7, sum("x"))))), ed, nil),
	} {
		if m, err := Verify(b, keys, "", now); err == nil {
			t.Errorf("%s: %+v", name, m)
		}
	}
}

// TestPanic: a reader that fails is an error of the file.
func TestPanic(t *testing.T) {
	if _, err := read([]byte{1}, "", now, func(*reader) error { panic("boom") }); err == nil || !strings.Contains(err.Error(), "boom") {
		t.Error(err)
	}
}

func FuzzCoRIM(f *testing.F) {
	for _, name := range []string{"parsec-tpm.cbor", "library.cbor", "library-signed.cbor"} {
		f.Add(file(f, name))
	}
	f.Add(ct.CoRIM(ours, ct.CoMID("x", 1, ct.Map{3: []any{ct.Map{0: "y", 1: 1}}}, ct.Reference(ct.Model("vm"), ct.Of(7, sum("x")), ct.Map{1: ct.Map{14: map[any]any{4: ct.SHA256(sum("x")), "/init": ct.SHA256(sum("x"))}}}))))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := func(f func(*reader) error) {
			m, err := read(b, "", now, f)
			if err != nil {
				if strings.Contains(err.Error(), "its reader failed") {
					t.Error(err)
				}
				return
			}
			for _, tag := range m.Tags {
				for _, v := range tag.Values {
					if err := appraise.CheckValue(v); err != nil {
						t.Errorf("%+v: %v", v, err)
					}
				}
			}
		}
		if len(b) == 0 {
			return
		}
		r(func(r *reader) error { return r.corim(b) })
		r(func(r *reader) error { // as if it were signed
			var m cose.Sign1Message
			if err := m.UnmarshalCBOR(b); err != nil {
				return err
			}
			if err := r.protected(m.Headers.Protected); err != nil {
				return err
			}
			r.signed = true
			return r.corim(cbor.RawMessage(m.Payload))
		})
	})
}
