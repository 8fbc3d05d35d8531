package list

import "testing"

// The digests of a state are remembered for long, and of none that is right now.
func TestOlderDigests(t *testing.T) {
	r := &Record{}
	d := func(i int) Digest { return DigestOf([]byte{byte(i)}) }
	const n = MaxOlder + MaxHistory + 3
	for i := range n {
		r.SetBaseline(d(i), int64(i+1))
	}
	for i := range n {
		p, past := r.Past(d(i))
		if want := i >= 2 && i < n-1; past != want {
			t.Errorf("state %d: %v", i, past)
		}
		if known := i >= n-1-MaxHistory; past && known != (p.Time != 0) {
			t.Errorf("state %d: at %d", i, p.Time)
		}
	}
	r.SetBaseline(d(5), 1000)
	if _, past := r.Past(d(5)); past {
		t.Error("the newest is an older one")
	}
	if _, past := r.Past(d(n - 1)); !past {
		t.Error("the one before is none")
	}
}

func TestTags(t *testing.T) {
	r := &Record{}
	tag := func(i int) Tag { return TagOf([]byte{byte(i)}) }
	if r.Had(Tag{}) || r.Had(tag(0)) {
		t.Fatal("an empty record had a state")
	}
	for i := range MaxTags + 3 {
		r.SetTag(tag(i))
		r.SetTag(tag(i)) // again is nothing
		r.SetTag(Tag{})  // nor is what is not known
		if r.Tag != tag(i) || r.Had(tag(i)) {
			t.Fatal(i)
		}
	}
	for i := range MaxTags + 2 {
		if got, want := r.Had(tag(i)), i >= 2; got != want {
			t.Errorf("state %d: %v", i, got)
		}
	}
	// From one that it was taken back to it may come to the same ones again.
	before := r.Clone()
	r.SetTag(tag(10))
	for i, want := range map[int]bool{2: true, 9: true, 10: false, 11: false, MaxTags + 2: false} {
		if r.Had(tag(i)) != want {
			t.Errorf("taken back to 10, and %d is %v", i, !want)
		}
	}
	if !before.Had(tag(10)) || before.Tag != tag(MaxTags+2) {
		t.Error("the copy changed with it")
	}
}
