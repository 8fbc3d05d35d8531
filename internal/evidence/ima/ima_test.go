package ima_test

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"virt-trust/internal/evidence/forge"
	"virt-trust/internal/evidence/ima"
)

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// pcrs are those of the machines on which the lists were made.
func pcrs(t testing.TB) map[string]map[string]string {
	t.Helper()
	var p map[string]map[string]string
	if err := json.Unmarshal(read(t, "pcrs.json"), &p); err != nil {
		t.Fatal(err)
	}
	return p
}

func digits(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil || len(b) == 0 {
		t.Fatalf("%q", s)
	}
	return b
}

// Lists of a real kernel replay to the PCRs that its TPM had, in both banks and
// from any entry on, and say what the kernel says of them in text.
func TestReplay(t *testing.T) {
	for name, values := range pcrs(t) {
		list, text := read(t, name+".bin"), strings.Split(strings.TrimSuffix(string(read(t, name+".txt")), "\n"), "\n")
		for _, bank := range []string{"sha1", "sha256"} {
			want := digits(t, values[bank+":10"])
			var at []ima.Checkpoint
			n := 0
			end, err := ima.Checkpoint{}.Replay(list, bank, ima.PCR, want, func(i uint64, e *ima.Entry) {
				if int(i) != n {
					t.Errorf("entry %d is the %dth", i, n)
				}
				n++
				f := strings.SplitN(text[i], " ", 5)
				digest := hex.EncodeToString(e.Digest)
				if e.Template != "ima" {
					digest = e.Algorithm + ":" + digest
				}
				path := strings.ReplaceAll(string(e.Path), " ", "_")
				if f[1] != hex.EncodeToString(e.SHA1) || f[2] != e.Template || f[3] != digest || strings.TrimSuffix(f[4], " ") != path || !e.Known {
					t.Errorf("%s: entry %d: %+v, the kernel says %q", name, i, e, text[i])
				}
				if e.Violation() != (strings.Count(text[i], strings.Repeat("0", 40)) > 0) {
					t.Errorf("%s: entry %d: violation", name, i)
				}
			})
			if err != nil {
				t.Errorf("%s, %s: %v", name, bank, err)
				continue
			}
			if n != len(text) || end.Entries != uint64(n) || end.Offset != uint64(len(list)) || !bytes.Equal(end.Value, want) {
				t.Errorf("%s, %s: %d of %d entries, %+v", name, bank, n, len(text), end)
			}
			at = append(at, steps(t, list, bank, end.Mode)...)
			for i, c := range at {
				rest, err := c.Replay(list[c.Offset:], bank, ima.PCR, want, nil)
				if err != nil || rest.Offset != end.Offset || rest.Entries != end.Entries {
					t.Errorf("%s, %s: from entry %d: %+v, %v", name, bank, i, rest, err)
				}
			}
		}
	}
}

// steps are the checkpoints after each entry, worked out anew.
func steps(t testing.TB, list []byte, bank string, mode ima.Mode) []ima.Checkpoint {
	t.Helper()
	hash := func(parts ...[]byte) []byte {
		h := forge.Hashes[bank].New()
		for _, p := range parts {
			h.Write(p)
		}
		return h.Sum(nil)
	}
	value := make([]byte, forge.Hashes[bank].Size())
	var all []ima.Checkpoint
	var e ima.Entry
	for at := 0; at < len(list); {
		n, err := e.Next(list[at:])
		if err != nil || n == 0 {
			t.Fatal(n, err)
		}
		at += n
		d := hash(e.Data)
		switch {
		case e.Violation():
			d = bytes.Repeat([]byte{0xff}, len(value))
		case e.Template == "ima":
			d = hash(e.Digest, e.Path, make([]byte, 256-len(e.Path)))
		}
		value = hash(value, d)
		all = append(all, ima.Checkpoint{Offset: uint64(at), Entries: uint64(len(all) + 1), Bank: bank, Mode: mode, Value: value})
	}
	return all
}

// The whole of another round's list, or another's, does not pass.
func TestDoesNotReplay(t *testing.T) {
	want := digits(t, pcrs(t)["ng"]["sha256:10"])
	list := read(t, "ng.bin")
	bounds := []int{0}
	for _, c := range steps(t, list, "sha256", ima.Native) {
		bounds = append(bounds, int(c.Offset))
	}
	entry := func(i int) []byte { return list[bounds[i]:bounds[i+1]] }
	join := func(order ...[]byte) []byte { return bytes.Join(order, nil) }
	flip := func(at int) []byte {
		b := bytes.Clone(list)
		b[at] ^= 1
		return b
	}
	last := len(bounds) - 2
	forged := bytes.Clone(entry(3))
	clear(forged[4:24]) // as if it were a violation
	for name, b := range map[string][]byte{
		"dropped":                 join(list[:bounds[3]], list[bounds[4]:]),
		"reordered":               join(list[:bounds[3]], entry(4), entry(3), list[bounds[5]:]),
		"one twice":               join(list[:bounds[4]], list[bounds[3]:]),
		"the last is missing":     list[:bounds[last]],
		"torn":                    list[:len(list)-1],
		"a path was changed":      flip(bounds[5] - 3),
		"a digest was changed":    flip(bounds[5] - 30),
		"an entry made violation": join(list[:bounds[3]], forged, list[bounds[4]:]),
		"nothing":                 nil,
		"another machine's":       read(t, "sig.bin"),
		"another PCR":             flip(bounds[3]),
	} {
		visited := false
		c, err := ima.Checkpoint{}.Replay(b, "sha256", ima.PCR, want, func(uint64, *ima.Entry) { visited = true })
		if !errors.Is(err, ima.ErrReplay) && !errors.Is(err, ima.ErrFormat) || c.Offset != 0 || c.Value != nil || visited {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
	// The SHA-1 digest that is logged is not what bank sha256 vouches for, and is
	// not what is shown. In bank sha1 it has to be that of the data.
	changed := flip(bounds[5] - 30)
	if _, err := (ima.Checkpoint{}).Replay(changed, "sha1", ima.PCR, digits(t, pcrs(t)["ng"]["sha1:10"]), nil); !errors.Is(err, ima.ErrReplay) {
		t.Errorf("data that does not belong to its digest: %v", err)
	}
}

// What was measured after the quote waits for the next round; what the
// checkpoint covers is not asked for again.
func TestPrefix(t *testing.T) {
	list := read(t, "ng.bin")
	at := steps(t, list, "sha256", ima.Native)
	mid, end := at[10], at[len(at)-1]
	got, err := ima.Checkpoint{}.Replay(append(bytes.Clone(list), 1, 2, 3), "sha256", ima.PCR, mid.Value, nil)
	if err != nil || got.Offset != mid.Offset || got.Entries != 11 || got.Mode != ima.Native {
		t.Fatalf("%+v, %v", got, err)
	}
	same, err := got.Replay(nil, "sha256", ima.PCR, mid.Value, nil)
	if err != nil || same.Offset != got.Offset || same.Mode != got.Mode {
		t.Errorf("nothing new: %+v, %v", same, err)
	}
	var n int
	got, err = got.Replay(list[mid.Offset:], "sha256", ima.PCR, end.Value, func(i uint64, e *ima.Entry) {
		if n == 0 && i != 11 {
			t.Errorf("the first new entry is %d", i)
		}
		n++
	})
	if err != nil || got.Entries != end.Entries || n != len(at)-11 {
		t.Errorf("%+v, %d visited, %v", got, n, err)
	}
	if _, err := got.Replay(nil, "sha1", ima.PCR, make([]byte, 20), nil); !errors.Is(err, ima.ErrReplay) {
		t.Errorf("another bank than before: %v", err)
	}
}

// Before 5.8, kernels filled the SHA-1 digest up in the other banks.
func TestPadded(t *testing.T) {
	tpm := forge.NewTPM("sha256")
	var list []byte
	for i := range 5 {
		e := forge.IMAEntry{Path: fmt.Sprint("/bin/", i), Digest: bytes.Repeat([]byte{byte(i + 1)}, 32), Violation: i == 3}
		list = append(list, e.Marshal(10)...)
		d := sha1.Sum(e.Data())
		if i == 3 {
			d = [20]byte(bytes.Repeat([]byte{0xff}, 20))
		}
		tpm.Extend("sha256", 10, append(d[:], make([]byte, 12)...))
	}
	c, err := ima.Checkpoint{}.Replay(list, "sha256", ima.PCR, tpm.PCRs["sha256"][10], nil)
	if err != nil || c.Mode != ima.Padded || c.Entries != 5 {
		t.Fatalf("%+v, %v", c, err)
	}
	// The way is told once: the next entries go the same.
	e := forge.IMAEntry{Path: "/bin/new", Digest: make([]byte, 32)}
	d := sha256.Sum256(e.Data())
	tpm.Extend("sha256", 10, d[:])
	if _, err := c.Replay(e.Marshal(10), "sha256", ima.PCR, tpm.PCRs["sha256"][10], nil); !errors.Is(err, ima.ErrReplay) {
		t.Errorf("another way in the middle of a list: %v", err)
	}
}

func TestTemplates(t *testing.T) {
	digest := bytes.Repeat([]byte{7}, 32)
	for _, c := range []forge.IMAEntry{
		{Path: "/bin/sh", Digest: digest}, {Template: "ima-sig", Path: "/bin/sh", Digest: digest, Extra: []byte{3, 2, 4}},
		{Template: "ima-buf", Path: ".builtin_trusted_keys", Digest: digest, Extra: []byte("buffer")}, {Template: "ima", Path: "/bin/sh", Digest: digest[:20], Algorithm: "sha1"},
	} {
		var e ima.Entry
		b := c.Marshal(10)
		n, err := e.Next(b)
		if err != nil || n != len(b) || !e.Known || string(e.Path) != c.Path || !bytes.Equal(e.Digest, c.Digest) {
			t.Errorf("%s: %+v, %v", c.Template, e, err)
		}
		if !bytes.Equal(append(bytes.Clone(e.Signature), e.Buffer...), c.Extra) {
			t.Errorf("%s: signature %q, buffer %q", c.Template, e.Signature, e.Buffer)
		}
		for i := range b {
			if n, err := e.Next(b[:i]); n != 0 || err != nil {
				t.Errorf("%s: cut off at %d: %d, %v", c.Template, i, n, err)
			}
		}
	}
	// A template that nobody knows is replayed as it is.
	tpm := forge.NewTPM("sha256")
	data := []byte("whatever it is")
	d := sha256.Sum256(data)
	tpm.Extend("sha256", 10, d[:])
	b := []byte{10, 0, 0, 0}
	s := sha1.Sum(data)
	b = append(append(b, s[:]...), 3, 0, 0, 0, 'n', 'e', 'w', byte(len(data)), 0, 0, 0)
	b = append(b, data...)
	var seen ima.Entry
	if _, err := (ima.Checkpoint{}).Replay(b, "sha256", ima.PCR, tpm.PCRs["sha256"][10], func(_ uint64, e *ima.Entry) { seen = *e }); err != nil || seen.Known || seen.Template != "new" {
		t.Errorf("%+v, %v", seen, err)
	}
	// It has nothing of the entry that was read before it.
	for _, before := range []forge.IMAEntry{{Template: "ima-sig", Path: "/bin/sh", Digest: digest, Extra: []byte{3}}, {Template: "ima-buf", Path: "x", Digest: digest, Extra: []byte{3}}} {
		var e ima.Entry
		if _, err := e.Next(before.Marshal(10)); err != nil {
			t.Fatal(err)
		}
		if _, err := e.Next(b); err != nil || !reflect.DeepEqual(e, seen) {
			t.Errorf("%+v, %v", e, err)
		}
	}
}

func TestBounds(t *testing.T) {
	entry := func(pcr, name, data uint32) []byte {
		b := append([]byte{byte(pcr), 0, 0, byte(pcr >> 24)}, make([]byte, 20)...)
		b = append(b, byte(name), byte(name>>8), byte(name>>16), byte(name>>24))
		b = append(b, bytes.Repeat([]byte("n"), int(min(name, 1000)))...)
		return append(b, byte(data), byte(data>>8), byte(data>>16), byte(data>>24))
	}
	for name, b := range map[string][]byte{
		"PCR 24": entry(24, 3, 10), "no name": entry(10, 0, 10), "a long name": entry(10, 256, 10), "no data": entry(10, 3, 0), "much data": entry(10, 3, ima.MaxTemplate+1),
	} {
		var e ima.Entry
		if n, err := e.Next(b); n != 0 || !errors.Is(err, ima.ErrFormat) {
			t.Errorf("%s: %d, %v", name, n, err)
		}
	}
	c := ima.Checkpoint{Entries: ima.MaxEntries, Bank: "sha256", Value: make([]byte, 32), Mode: ima.Native}
	if _, err := c.Replay(read(t, "ng.bin"), "sha256", ima.PCR, digits(t, pcrs(t)["ng"]["sha256:10"]), nil); !errors.Is(err, ima.ErrFormat) {
		t.Errorf("too many entries: %v", err)
	}
}

func FuzzReplay(f *testing.F) {
	for _, name := range []string{"ng", "sig", "old"} {
		f.Add(read(f, name+".bin"), digits(f, pcrs(f)[name]["sha256:10"]))
	}
	f.Add(forge.IMAEntry{Template: "ima-buf", Path: "x", Digest: make([]byte, 32), Extra: []byte("y")}.Marshal(10), make([]byte, 32))
	f.Fuzz(func(t *testing.T, list, want []byte) {
		end := 0
		var e ima.Entry
		for {
			n, err := e.Next(list[end:])
			if err != nil || n == 0 {
				break
			}
			end += n
		}
		for _, bank := range []string{"sha1", "sha256", "sha384"} {
			if c, err := (ima.Checkpoint{}).Replay(list, bank, ima.PCR, want, func(_ uint64, e *ima.Entry) { e.Violation() }); err == nil && c.Offset > uint64(end) {
				t.Errorf("%s: replayed to %d of %d", bank, c.Offset, end)
			}
		}
	})
}

func BenchmarkReplay(b *testing.B) {
	tpm := forge.NewTPM("sha256")
	var list []byte
	for i := range 1000 {
		list = tpm.Measure(list, forge.IMAEntry{Path: fmt.Sprintf("/usr/lib/x86_64-linux-gnu/libexample-%d.so.1.2.3", i), Digest: bytes.Repeat([]byte{byte(i)}, 32)})
	}
	want := tpm.PCRs["sha256"][10]
	b.Run("replay", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := (ima.Checkpoint{}).Replay(list, "sha256", ima.PCR, want, func(uint64, *ima.Entry) {}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("bare", func(b *testing.B) {
		var data [][]byte
		var e ima.Entry
		for at := 0; at < len(list); {
			n, _ := e.Next(list[at:])
			data, at = append(data, e.Data), at+n
		}
		for b.Loop() {
			var room [64]byte
			for _, d := range data {
				s := sha256.Sum256(d)
				copy(room[32:], s[:])
				v := sha256.Sum256(room[:])
				copy(room[:], v[:])
			}
			if !bytes.Equal(room[:32], want) {
				b.Fatal("another value")
			}
		}
	})
}
