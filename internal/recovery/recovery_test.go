package recovery

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"filippo.io/age"
)

func newKey(t testing.TB) *Key {
	t.Helper()
	k, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestWrap(t *testing.T) {
	k, secret := newKey(t), bytes.Repeat([]byte{7}, 64)
	r, err := ParseRecipient(k.Recipient().String())
	if err != nil {
		t.Fatal(err)
	}
	file, err := r.Wrap(secret)
	if err != nil {
		t.Fatal(err)
	}
	if len(file) != 264 { // the room that labels are reckoned with
		t.Errorf("a wrapped pair of keys has %d bytes", len(file))
	}
	if got, err := k.Unwrap(file); err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("%x, %v", got, err)
	}
	if _, err := newKey(t).Unwrap(file); !errors.Is(err, ErrOtherKey) {
		t.Errorf("another key: %v", err)
	}
	for i := range file {
		bad := bytes.Clone(file)
		bad[i] ^= 1
		if got, err := k.Unwrap(bad); err == nil {
			t.Fatalf("byte %d changed: %x", i, got)
		}
	}
}

// A key that the program wrote is one for age, in every form that people make
// of it.
func TestParse(t *testing.T) {
	k := newKey(t)
	if ids, err := age.ParseIdentities(strings.NewReader(k.File("host", "2026-11-24"))); err != nil || len(ids) != 1 {
		t.Fatal(ids, err)
	}
	text := k.Text()
	for _, s := range []string{k.File("host", "now"), text, strings.ToLower(text), "  " + text + "\r\n", groups(text)} {
		got, err := Parse([]byte(s))
		if err != nil || got.Text() != text {
			t.Errorf("%v of %q", err, s)
		}
	}
	for _, s := range []string{"", "# only a comment", text[:len(text)-1], text + text, text + "\n" + newKey(t).Text(), "age1abc", strings.Replace(text, "1", "2", 1)} {
		if _, err := Parse([]byte(s)); err == nil {
			t.Errorf("%q was taken", s)
		} else if strings.Contains(err.Error(), text[16:30]) {
			t.Errorf("the error tells the key: %v", err)
		}
	}
}

func TestShares(t *testing.T) {
	k := newKey(t)
	shares, err := k.Split(5, 3)
	if err != nil || len(shares) != 5 {
		t.Fatal(shares, err)
	}
	for i, s := range shares {
		p, err := ParseShare(s)
		if err != nil || p.Index != i+1 || p.Threshold != 3 {
			t.Errorf("%+v, %v", p, err)
		}
	}
	for _, pick := range [][]int{{0, 1, 2}, {4, 2, 0}, {0, 1, 2, 3, 4}, {1, 1, 3, 4}} {
		var some []string
		for _, i := range pick {
			some = append(some, shares[i])
		}
		got, err := Parse([]byte("# ours\n" + strings.Join(some, "\n") + "\n"))
		if err != nil || got.Text() != k.Text() {
			t.Errorf("%v: %v", pick, err)
		}
	}
	other, err := newKey(t).Split(3, 3)
	if err != nil {
		t.Fatal(err)
	}
	typo := []byte(shares[2])
	if typo[20] = 'q'; shares[2][20] == 'q' {
		typo[20] = 'p'
	}
	for what, c := range map[string][]string{
		"3 shares of set":   shares[:2],
		"of different keys": {shares[0], shares[1], other[2]},
		"checksum is wrong": {shares[0], shares[1], string(typo)},
		"given: not a":      {shares[0], "vtshare1qqqq", shares[1]},
		"no shares":         {},
	} {
		if _, err := Combine(c); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("want %q, have %v", what, err)
		}
	}
	// A share that is well formed and false is found by the set's own name.
	b, err := decodeBech32(shareHRP, compact(shares[0]))
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if _, err := Combine([]string{encodeBech32(shareHRP, b), shares[1], shares[2]}); err == nil || !strings.Contains(err.Error(), "forged") {
		t.Error(err)
	}
}

func TestBech32(t *testing.T) {
	for _, data := range [][]byte{{}, {0}, {1, 2, 3, 4, 5}, bytes.Repeat([]byte{0xff}, 39)} {
		s := encodeBech32("vtshare", data)
		got, err := decodeBech32("vtshare", s)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%q: %x, %v", s, got, err)
		}
		if _, err := decodeBech32("vtshard", s); err == nil {
			t.Error("another kind was taken")
		}
	}
	for _, s := range []string{"", "vtshare1", "VTshare1qqqqqq", "vtshare1bbbbbbb"} {
		if _, err := decodeBech32("vtshare", s); err == nil {
			t.Errorf("%q was taken", s)
		}
	}
	// BIP 173's own.
	if _, err := decodeBech32("a", "A12UEL5L"); err != nil {
		t.Error(err)
	}
}

// Whatever is typed gives a key or an error, and a key is one.
func FuzzParse(f *testing.F) {
	k := newKey(f)
	f.Add([]byte(k.Text()))
	f.Add([]byte(k.File("host", "now")))
	shares, err := k.Split(3, 2)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(strings.Join(shares, "\n")))
	f.Add([]byte("vtshare1qqqqqq"))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := Parse(b)
		if (k == nil) == (err == nil) {
			t.Fatal(k, err)
		}
		if k == nil {
			return
		}
		if again, err := Parse([]byte(k.Text())); err != nil || again.Text() != k.Text() {
			t.Fatal(err)
		}
	})
}

// No wrapped secret makes more of a daemon than an error.
func FuzzUnwrap(f *testing.F) {
	k := newKey(f)
	file, err := k.Recipient().Wrap([]byte("a secret"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(file)
	f.Add([]byte("age-encryption.org/v1\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, err := k.Unwrap(b); err == nil && !bytes.Equal(got, []byte("a secret")) {
			t.Logf("%x", got)
		}
	})
}
