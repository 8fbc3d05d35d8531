package appraise

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"virt-trust/internal/evidence/report"
)

// full sets all that there is to something, with one element in each list.
func full(v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			return
		}
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				full(v.Field(i))
			}
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		full(v.Index(0))
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		full(v.Elem())
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Uint, reflect.Uint8:
		v.SetUint(7)
	default:
		v.SetInt(7)
	}
}

// each clears one thing after the other, and calls f with its path.
func each(path string, v reflect.Value, f func(path string)) {
	if v.Type() != reflect.TypeFor[PCRs]() && v.Kind() == reflect.Struct && v.Type() != reflect.TypeFor[time.Time]() {
		for i := range v.NumField() {
			each(path+"."+v.Type().Field(i).Name, v.Field(i), f)
		}
		return
	}
	if v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Struct {
		each(path, v.Index(0), f)
	}
	was := reflect.New(v.Type()).Elem()
	was.Set(v)
	v.SetZero()
	f(path)
	v.Set(was)
}

// Nothing of a result but its times and changes can change without its digest.
func TestDigest(t *testing.T) {
	r := &Result{}
	full(reflect.ValueOf(r).Elem())
	value := pcrs{Bank: "sha256", Which: 1 << 7, Values: make([]byte, 32)}
	r.PCRs, r.VMs[0].PCRs = PCRs{packed: value}, NewPCRs(map[string]string{"sha256:1": "00"})
	r.Received, r.Expires = time.Unix(1, 0), time.Unix(2, 0)
	was := r.Digest()
	n := 0
	each("", reflect.ValueOf(r).Elem(), func(path string) {
		n++
		volatile := path == ".Received" || path == ".Expires" || strings.HasPrefix(path, ".Changes")
		if same := r.Digest() == was; same != volatile {
			t.Errorf("%s: the same %v", path, same)
		}
	})
	if n < 50 || r.Digest() != was {
		t.Errorf("%d fields", n)
	}
	for name, other := range map[string]PCRs{
		"a value": {packed: pcrs{"sha256", 1 << 7, append(make([]byte, 31), 1)}}, "which": {packed: pcrs{"sha256", 1 << 8, make([]byte, 32)}},
		"a bank": {packed: pcrs{"sha384", 1 << 7, make([]byte, 32)}}, "texts": NewPCRs(map[string]string{"sha256:7": "00"}),
	} {
		if r.PCRs = other; r.Digest() == was {
			t.Error(name)
		}
	}
}

func TestPCRs(t *testing.T) {
	values := report.Values{0: make([]byte, 32), 7: append(make([]byte, 31), 0xab), 23: make([]byte, 32)}
	p := PCRs{packed: packPCRs("sha256", &values, everyPCR, pcrs{})}
	zeros := strings.Repeat("00", 32)
	want := map[string]string{"sha256:0": zeros, "sha256:7": zeros[:62] + "ab", "sha256:23": zeros}
	if got := p.Texts(); !maps.Equal(got, want) || p.IsZero() {
		t.Errorf("%v", got)
	}
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	var back PCRs
	if err := json.Unmarshal(b, &back); err != nil || !maps.Equal(back.Texts(), want) {
		t.Errorf("%s: %v, %v", b, back, err)
	}
	if b, err := json.Marshal(Result{}); err != nil || strings.Contains(string(b), "pcrs") || !(PCRs{}).IsZero() {
		t.Errorf("%s, %v", b, err)
	}
	// What a spoilt checkpoint has is not there.
	for _, spoilt := range []pcrs{{"sha256", 1 << 7, make([]byte, 31)}, {"md5", 1 << 7, make([]byte, 32)}, {"sha256", 1 << 8, make([]byte, 32)}, {"sha256", 1 << 31, nil}} {
		if spoilt.at(7) != nil || spoilt.at(31) != nil {
			t.Errorf("%+v", spoilt)
		}
	}
	if q := packPCRs("sha256", &values, 1<<7, pcrs{}); q.Which != 1<<7 || !isHex(want["sha256:7"], q.at(7)) || isHex(want["sha256:0"], q.at(7)) || isHex("", q.at(7)) {
		t.Errorf("%+v", q)
	}
	// Those from before serve where they are the same.
	if q := packPCRs("sha256", &values, everyPCR, p.packed); !q.same(&p.packed) || &q.Values[0] != &p.packed.Values[0] {
		t.Errorf("the same again: %+v", q)
	}
	changed := values
	changed[7] = make([]byte, 32)
	fewer := values
	fewer[7] = nil
	for name, before := range map[string]pcrs{
		"a value": packPCRs("sha256", &changed, everyPCR, pcrs{}), "one less": packPCRs("sha256", &fewer, everyPCR, pcrs{}), "others": packPCRs("sha256", &values, 1<<7, pcrs{}),
		"a bank": {"sha384", p.packed.Which, p.packed.Values}, "more bytes": {"sha256", p.packed.Which, append(slices.Clone(p.packed.Values), 0)},
		"fewer bytes": {"sha256", p.packed.Which, p.packed.Values[:95]}, "a PCR that there is not": {"sha256", p.packed.Which | 1<<24, p.packed.Values}, "none": {},
	} {
		if q := packPCRs("sha256", &values, everyPCR, before); !q.same(&p.packed) {
			t.Errorf("%s: %+v", name, q)
		}
	}
}
