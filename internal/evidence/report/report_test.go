package report

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"
)

var update = flag.Bool("update", false, "write testdata/evidence-1.cbor anew: only before its version was ever released")

// aReport has something in each place.
func aReport() *Report {
	reading := &Reading{Reader: "swtpm-memory", Time: 3, Banks: []Bank{{"sha256", Values{0: make([]byte, 32), 23: bytes.Repeat([]byte{1}, 32)}}, {"sha1", Values{4: make([]byte, 20)}}}}
	return &Report{
		Version: Version, AK: append([]byte{0, 11}, make([]byte, 32)...), BootID: "boot", Time: 1795608000000000,
		Host: Host{"host", "1.0", "enforce", "readable", 7, 8, 15, "replays", "6.1.0"},
		VMs: []VM{
			{UUID: [16]byte{1}, Name: "one", State: "running", Running: true, Generation: 3, LabelGeneration: 2, EK: make([]byte, 32), EKCertificate: []byte{0x30, 0}, Verdict: "refuse", Reason: "vtpm-changed",
				PCRs: reading, Quote: &VTPMQuote{Quote{[]byte("attest"), []byte("signature")}, []byte("ak")}, Problem: "p", Logs: []Log{{Kind: EventLog, Data: []byte("log")}}},
			{UUID: [16]byte{2}, Name: "two", State: "stored"},
		},
		Deleted: []Deleted{{UUID: [16]byte{3}, Time: -4, Why: "undefined"}, {UUID: [16]byte{4}}},
	}
}

func anEvidence(t testing.TB, r *Report) *Evidence {
	t.Helper()
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return &Evidence{
		Version: Version, Nonce: bytes.Repeat([]byte{5}, NonceSize), Report: b, Quote: Quote{[]byte("attest"), []byte("signature")},
		PCRs: []Bank{{"sha256", Values{0: make([]byte, 32), 10: bytes.Repeat([]byte{2}, 32)}}},
		Logs: []Log{{EventLog, 0, []byte("events"), false, ""}, {IMA, 700, []byte("entries"), true, ""}, {LaunchLog, 0, []byte{}, false, "why not"}},
	}
}

func encode(t testing.TB, e *Evidence) []byte {
	t.Helper()
	b, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRoundTrip(t *testing.T) {
	r := aReport()
	e := anEvidence(t, r)
	b := encode(t, e)
	if err := valid(t, b); err != nil {
		t.Errorf("against the grammar: %v", err)
	}
	for range 20 { // maps have no order of their own
		if again := encode(t, anEvidence(t, aReport())); !bytes.Equal(again, b) {
			t.Fatal("the same Evidence has two encodings")
		}
	}
	back, err := UntrustedParse(b)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(back, e) {
		t.Errorf("%+v\nis not\n%+v", back, e)
	}
	report, err := UntrustedParseReport(back.Report)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(report, r) {
		t.Errorf("%+v\nis not\n%+v", report, r)
	}
	// The least that there can be.
	least := &Evidence{Version: Version, Nonce: make([]byte, 16)}
	if least.Report, err = (&Report{Version: Version}).Encode(); err != nil {
		t.Fatal(err)
	}
	b = encode(t, least)
	if err := valid(t, b); err != nil {
		t.Errorf("against the grammar: %v", err)
	}
	if back, err = UntrustedParse(b); err != nil {
		t.Fatal(err)
	}
	if _, err = UntrustedParseReport(back.Report); err != nil {
		t.Fatal(err)
	}
}

// Evidence of the first version is read for ever.
func TestFirstVersion(t *testing.T) {
	const name = "testdata/evidence-1.cbor"
	e := anEvidence(t, aReport())
	if *update {
		if err := os.WriteFile(name, encode(t, e), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	back, err := UntrustedParse(b)
	if err != nil {
		t.Fatal(err)
	}
	report, err := UntrustedParseReport(back.Report)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(back, e) || !reflect.DeepEqual(report, aReport()) {
		t.Errorf("%+v, %+v", back, report)
	}
}

func TestQualifyingData(t *testing.T) {
	// printf 'nonce' and the digest of 'report', by sha256sum.
	if d := QualifyingData([]byte("nonce"), []byte("report")); hex.EncodeToString(d[:]) != "3df57bfd921a1b1414f9bce88ad12fbbef53e1bb9dec4a2f44a9a58211567440" {
		t.Errorf("%x", d)
	}
	if d := VTPMQualifyingData([]byte("nonce"), [16]byte{1}); hex.EncodeToString(d[:]) != "21cad5c664d6d54d0d4efe72d4541a84181a4fcf3c308921000d0f5d02f44ead" {
		t.Errorf("%x", d)
	}
}

// many gives n VMs, ascending.
func many(n int) (all []VM) {
	for i := range n {
		all = append(all, VM{UUID: [16]byte{byte(i >> 16), byte(i >> 8), byte(i)}})
	}
	return all
}

func TestBounds(t *testing.T) {
	long := strings.Repeat("x", MaxName+1)
	logs := func(n int) (all []Log) {
		for range n {
			all = append(all, Log{Kind: IMA})
		}
		return all
	}
	for name, f := range map[string]func(*Evidence){
		"version 0":          func(e *Evidence) { e.Version = 0 },
		"version 2":          func(e *Evidence) { e.Version = 2 },
		"a short nonce":      func(e *Evidence) { e.Nonce = make([]byte, 15) },
		"a long nonce":       func(e *Evidence) { e.Nonce = make([]byte, 65) },
		"a long report":      func(e *Evidence) { e.Report = make([]byte, MaxReport+1) },
		"a long attestation": func(e *Evidence) { e.Quote.Attest = make([]byte, MaxQuote+1) },
		"a long signature":   func(e *Evidence) { e.Quote.Signature = make([]byte, MaxQuote+1) },
		"a bank of MD5":      func(e *Evidence) { e.PCRs[0].Algorithm = "md5" },
		"a bank twice":       func(e *Evidence) { e.PCRs = append(e.PCRs, e.PCRs[0]) },
		"a short PCR":        func(e *Evidence) { e.PCRs[0].Values[0] = make([]byte, 20) },
		"a log twice":        func(e *Evidence) { e.Logs = append(e.Logs, e.Logs[0]) },
		"many logs":          func(e *Evidence) { e.Logs = logs(MaxLogs + 1) },
		"an unknown log":     func(e *Evidence) { e.Logs[0].Kind = "other" },
		"a long problem":     func(e *Evidence) { e.Logs[0].Problem = long },
		"too long":           func(e *Evidence) { e.Logs[0].Data = make([]byte, MaxEvidence) },
	} {
		e := anEvidence(t, aReport())
		f(e)
		if _, err := UntrustedParse(encode(t, e)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, f := range map[string]func(*Report){
		"version 0":              func(r *Report) { r.Version = 0 },
		"a long Name":            func(r *Report) { r.AK = make([]byte, 67) },
		"launch PCR 24":          func(r *Report) { r.Host.LaunchPCR = 24 },
		"many VMs":               func(r *Report) { r.VMs = many(MaxVMs + 1) },
		"many deleted":           func(r *Report) { r.Deleted = make([]Deleted, MaxDeleted+1) },
		"VMs out of order":       func(r *Report) { r.VMs[0], r.VMs[1] = r.VMs[1], r.VMs[0] },
		"a VM twice":             func(r *Report) { r.VMs[1].UUID = r.VMs[0].UUID },
		"a short EK":             func(r *Report) { r.VMs[0].EK = make([]byte, 31) },
		"a long certificate":     func(r *Report) { r.VMs[0].EKCertificate = make([]byte, MaxCert+1) },
		"a VM's bank":            func(r *Report) { r.VMs[0].PCRs.Banks[0].Algorithm = "x" },
		"a VM's quote":           func(r *Report) { r.VMs[0].Quote.Quote.Attest = make([]byte, MaxQuote+1) },
		"a VM's AK":              func(r *Report) { r.VMs[0].Quote.AK = make([]byte, 1025) },
		"a VM's log":             func(r *Report) { r.VMs[0].Logs[0].Kind = "x" },
		"a long boot id":         func(r *Report) { r.BootID = long },
		"a long host name":       func(r *Report) { r.Host.Name = long },
		"a long software":        func(r *Report) { r.Host.Software = long },
		"a long mode":            func(r *Report) { r.Host.Mode = long },
		"a long list state":      func(r *Report) { r.Host.ListState = long },
		"a long launch standing": func(r *Report) { r.Host.LaunchLog = long },
		"a long kernel":          func(r *Report) { r.Host.Kernel = long },
		"a NUL in a name":        func(r *Report) { r.VMs[0].Name = "a\x00b" },
		"a long VM name":         func(r *Report) { r.VMs[0].Name = long },
		"a long state":           func(r *Report) { r.VMs[0].State = long },
		"a long verdict":         func(r *Report) { r.VMs[0].Verdict = long },
		"a long reason":          func(r *Report) { r.VMs[0].Reason = long },
		"a long problem":         func(r *Report) { r.VMs[0].Problem = long },
		"a long reader":          func(r *Report) { r.VMs[0].PCRs.Reader = long },
		"a long why":             func(r *Report) { r.Deleted[0].Why = long },
	} {
		r := aReport()
		f(r)
		b, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := UntrustedParseReport(b); !errors.Is(err, ErrFormat) {
			t.Errorf("report: %s: %v", name, err)
		}
	}
	r := aReport()
	r.VMs = many(MaxVMs)
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := UntrustedParseReport(b); err != nil {
		t.Errorf("as many VMs as there may be: %v", err)
	}
	if _, err := UntrustedParseReport(make([]byte, MaxReport+1)); !errors.Is(err, ErrFormat) {
		t.Error(err)
	}
}

// CBOR that says the same in another way, or more, is refused: nobody can hide
// anything in what was hashed.
func TestForms(t *testing.T) {
	good := map[any]any{1: 1, 2: make([]byte, 32), 3: []byte{0xa0}, 4: map[any]any{1: []byte{}, 2: []byte{}}, 5: []any{}, 6: []any{}}
	put := func(k, v any) []byte {
		m := map[any]any{}
		for a, b := range good {
			m[a] = b
		}
		m[k] = v
		b, err := cbor.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	tooMany := map[int][]byte{}
	for i := range numPCRs + 1 {
		tooMany[i] = []byte{}
	}
	if _, err := UntrustedParse(put(1, 1)); err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"an unknown key":      put(7, 1),
		"a key that is text":  put("1", 1),
		"a tag":               put(2, cbor.Tag{Number: 64, Content: make([]byte, 32)}),
		"text for bytes":      put(2, strings.Repeat("n", 32)),
		"an undefined length": append([]byte{0xbf}, append(put(1, 1)[1:], 0xff)...),
		"something follows":   append(put(1, 1), 0),
		"a key twice":         append(append([]byte{0xa7}, put(1, 1)[1:]...), 0x01, 0x01),
		"nothing":             nil,
		"an array":            {0x80},
		"deep":                bytes.Repeat([]byte{0x81}, 100),
		"a large array":       put(6, make([]int, MaxVMs+1)),
		"null":                put(6, nil),
		"numbers for bytes":   put(2, make([]int, 32)),
		"a PCR twice":         put(5, []any{map[int]any{1: "sha256", 2: cbor.RawMessage("\xa2" + strings.Repeat("\x01\x58\x20"+strings.Repeat("v", 32), 2))}}),
		"PCR 24":              put(5, []any{map[int]any{1: "sha256", 2: map[int][]byte{24: make([]byte, 32)}}}),
		"a PCR without bytes": put(5, []any{map[int]any{1: "sha256", 2: map[int][]byte{0: {}}}}),
		"many PCRs":           put(5, []any{map[int]any{1: "sha256", 2: tooMany}}),
		"a number for a bool": put(6, []any{map[int]any{1: "ima", 4: 1}}),
		"no bool":             put(6, []any{map[int]any{1: "ima", 4: cbor.RawMessage("\xf8\xff")}}),
		"text not in UTF-8":   []byte("\xa1\x06\x81\xa1\x05\x61\xff"),
		"a long string":       []byte("\xa1\x02\x5b\xff\xff\xff\xff\xff\xff\xff\xff"),
		"a long number":       []byte("\xa1\x01\x1c\x00"),
	} {
		if _, err := UntrustedParse(b); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// library reads as this package did before it had a reader of its own.
var library = func() cbor.DecMode {
	d, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		MaxArrayElements: MaxVMs, MaxMapPairs: 64, MaxNestedLevels: 12, ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return d
}()

// UnmarshalCBOR is for the library alone.
func (v *Values) UnmarshalCBOR(b []byte) error {
	var m map[uint][]byte
	err := library.Unmarshal(b, &m)
	*v = ValuesOf(m)
	return err
}

// like holds what the reader gave against what the library gives of the same bytes.
func like[T any](t *testing.T, b []byte, got *T) {
	t.Helper()
	want := new(T)
	if err := library.Unmarshal(b, want); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\nof the library: %+v, %v", got, want, err)
	}
}

// What is read is as the grammar says, and has one encoding that is read again.
func FuzzUntrustedParse(f *testing.F) {
	f.Add(encode(f, anEvidence(f, aReport())))
	f.Add(encode(f, &Evidence{Version: 1, Nonce: make([]byte, 16)}))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := UntrustedParse(b)
		if err != nil {
			return
		}
		like(t, b, e)
		again := encode(t, e)
		back, err := UntrustedParse(again)
		if err != nil || !bytes.Equal(encode(t, back), again) {
			t.Errorf("%v", err)
		}
		if r, err := UntrustedParseReport(e.Report); err == nil {
			if e.Report, err = r.Encode(); err != nil {
				t.Fatal(err)
			}
			if err := valid(t, encode(t, e)); err != nil {
				t.Errorf("against the grammar: %v", err)
			}
		}
	})
}

func FuzzUntrustedParseReport(f *testing.F) {
	b, err := aReport().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := UntrustedParseReport(b)
		if err != nil {
			return
		}
		like(t, b, r)
		b, err = r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := UntrustedParseReport(b); err != nil {
			t.Error(err)
		}
	})
}
