package list

import "testing"

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
	// One that comes back is the newest, and not an older one.
	before := r.Clone()
	r.SetTag(tag(10))
	if r.Had(tag(10)) || !r.Had(tag(MaxTags+2)) || len(r.OlderTags) != MaxTags*len(Tag{}) {
		t.Error(r)
	}
	if !before.Had(tag(10)) || before.Tag != tag(MaxTags+2) {
		t.Error("the copy changed with it")
	}
}
