package list

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var (
	update = flag.Bool("update", false, "write the golden file anew")
	key    = bytes.Repeat([]byte{1}, KeySize)
	nonce  = bytes.Repeat([]byte{2}, NonceSize)
)

func sample() *List { return sampleOf(true) }

func sampleOf(counted bool) *List {
	l := New()
	l.Generation, l.Counter, l.Paid = 42, 17, 1_800_000_000_123
	for i := range 3 {
		r := &Record{
			UUID: fmt.Sprintf("3f2c1c1e-0000-4000-8000-00000000000%d", i), Name: fmt.Sprint("vm", i), Instance: "/var/lib/libvirt/swtpm/x/tpm2",
			State: Stored, KeyOwner: Ours, WrappedKeys: bytes.Repeat([]byte{4}, 256), LabelPath: "/i.qcow2", LabelDigest: Digest{1}, Baseline: Digest{2},
			Generation: 7, Created: 1, Changed: 2, LastVerdict: "allow",
		}
		r.SetBaseline(Digest{3, byte(i)}, 99)
		if counted {
			r.SetTag(Tag{1})
			r.SetTag(Tag{2, byte(i)})
			r.Noted, r.LabelGeneration, r.Reverts, r.Reverted = true, 5, 1, 98
		}
		l.Records[r.UUID] = r
	}
	if counted {
		l.Bind("recovery", []byte("age1..."))
		l.Bind("other", []byte{1, 2})
	}
	return l
}

// asWritten leaves out what is only in memory.
var asWritten = cmpopts.IgnoreUnexported(List{})

// What was encoded before is used again, and never for a record that is new.
func TestNext(t *testing.T) {
	l := sample()
	if _, err := l.Encode(key, nonce); err != nil {
		t.Fatal(err)
	}
	n := l.Next()
	for id, r := range n.Records {
		c := r.Clone()
		c.Name = "renamed"
		n.Records[id] = c
		break
	}
	again, err := n.Encode(key, nonce)
	if err != nil {
		t.Fatal(err)
	}
	fresh, err := (&List{Generation: n.Generation, Counter: n.Counter, Paid: n.Paid, Records: n.Records, Bound: n.Bound}).Encode(key, nonce)
	if err != nil || !bytes.Equal(again, fresh) || n.Generation != l.Generation+1 {
		t.Error("another encoding", err)
	}
}

func TestRoundTrip(t *testing.T) {
	l := sample()
	b, err := l.Encode(key, nonce)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(b, key)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(l, got, asWritten); d != "" {
		t.Fatal(d)
	}
	if bytes.Contains(b, []byte("vm0")) || bytes.Contains(b, []byte("swtpm")) {
		t.Fatal("plain text in the sealed list")
	}
	if h, err := UntrustedHeader(b); err != nil || h.Generation != 42 {
		t.Fatal(h, err)
	}
}

// Lists of every version stay readable for ever.
func TestGolden(t *testing.T) {
	if *update {
		b, _ := sample().Encode(key, nonce)
		if err := os.WriteFile("testdata/list-v2", b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	v1 := sampleOf(false)
	v1.Counter, v1.Paid = 0, 0
	for name, want := range map[string]*List{"testdata/list-v1": v1, "testdata/list-v2": sample()} {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Decode(b, key)
		if err != nil {
			t.Fatal(name, err)
		}
		if d := cmp.Diff(want, got, asWritten); d != "" {
			t.Fatal(name, d)
		}
	}
}

func TestEveryAlterationIsSeen(t *testing.T) {
	b, _ := sample().Encode(key, nonce)
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 1
		if _, err := Decode(bad, key); err == nil {
			t.Fatalf("byte %d", i)
		}
	}
	for n := range b {
		if _, err := Decode(b[:n], key); err == nil {
			t.Fatalf("cut at %d", n)
		}
	}
	if _, err := Decode(b, bytes.Repeat([]byte{9}, KeySize)); !errors.Is(err, ErrKey) {
		t.Fatalf("other key: %v", err)
	}
}

// What is bound to a list is as bounded as all else in it.
func TestBound(t *testing.T) {
	l := sample()
	n := l.Next()
	n.Bind("recovery", nil)
	n.Bind("other", []byte{3})
	if len(n.Bound) != 1 || len(l.Bound) != 2 || l.Bound["other"][0] != 1 {
		t.Fatal("the next list's values are the last one's")
	}
	n.Bind("big", make([]byte, MaxBound))
	if _, err := n.Encode(key, nonce); err == nil {
		t.Fatal("more than can be bound")
	}
}

func TestHistory(t *testing.T) {
	r := &Record{}
	for i := range 40 {
		r.SetBaseline(Digest{byte(i + 1)}, int64(i))
	}
	if len(r.History) != MaxHistory {
		t.Fatal(len(r.History))
	}
	if _, ok := r.Past(r.Baseline); ok {
		t.Fatal("the baseline is not past")
	}
	if p, ok := r.Past(Digest{39}); !ok || p.Time != 39 {
		t.Fatal(p, ok)
	}
	r.SetBaseline(Digest{39}, 100)
	if _, ok := r.Past(Digest{39}); ok {
		t.Fatal("what was accepted again is not past")
	}
}

func TestJournal(t *testing.T) {
	var b []byte
	for i := range 5 {
		e, err := SealEntry(key, bytes.Repeat([]byte{byte(i)}, NonceSize), "u", 3, uint64(i), Past{Digest{byte(i + 1)}, int64(i)})
		if err != nil || len(e) != EntrySize {
			t.Fatal(len(e), err)
		}
		b = append(b, e...)
	}
	read := func(b []byte, uuid string, gen uint64) (int, bool) {
		p, clean, err := OpenJournal(b, key, uuid, gen)
		if err != nil {
			t.Fatal(err)
		}
		for i := range p {
			if p[i] != (Past{Digest{byte(i + 1)}, int64(i)}) {
				t.Fatal(p)
			}
		}
		return len(p), clean
	}
	if n, clean := read(b, "u", 3); n != 5 || !clean {
		t.Fatal(n, clean)
	}
	for cut := range b {
		if n, clean := read(b[:cut], "u", 3); n != cut/EntrySize || clean != (cut%EntrySize == 0) {
			t.Fatal(cut, n, clean)
		}
	}
	if n, _ := read(b, "v", 3); n != 0 {
		t.Fatal("another VM's journal")
	}
	if n, _ := read(b, "u", 4); n != 0 {
		t.Fatal("the journal of another opening")
	}
	if n, clean := read(append(bytes.Clone(b[:EntrySize]), b[2*EntrySize:]...), "u", 3); n != 1 || clean {
		t.Fatal("a journal with a hole")
	}
}

func FuzzDecode(f *testing.F) {
	b, _ := sample().Encode(key, nonce)
	f.Add(b, true)
	if v1, err := os.ReadFile("testdata/list-v1"); err == nil {
		f.Add(v1, true)
	}
	plain, _ := encMode.Marshal(body[*Record]{[]*Record{{UUID: "u"}}, map[string][]byte{"a": {1}}})
	f.Add(plain, false)
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		if !sealed { // what lies under the seal must not hurt either
			aead, _ := subkey(key, "virt-trust/list/v1")
			e, _ := New().Encode(key, nonce)
			b = aead.Seal(bytes.Clone(e[:headerSize]), nonce, b, e[:headerSize])
		}
		l, err := Decode(b, key)
		if err != nil {
			return
		}
		e, err := l.Encode(key, nonce)
		if err != nil {
			t.Fatal(err)
		}
		if l2, err := Decode(e, key); err != nil || cmp.Diff(l, l2, asWritten) != "" {
			t.Fatal("does not come back", err)
		}
	})
}

func BenchmarkEncode1000(b *testing.B) {
	l := New()
	for i := range 1000 {
		r := sample().Records["3f2c1c1e-0000-4000-8000-000000000000"].Clone()
		r.UUID = fmt.Sprint(i)
		for j := range MaxHistory {
			r.Remember(Digest{byte(j)}, 1)
		}
		l.Records[r.UUID] = r
	}
	for b.Loop() {
		e, err := l.Encode(key, nonce)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(len(e)), "bytes")
	}
}
