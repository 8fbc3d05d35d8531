package introspect

import (
	"testing"
	"time"
)

// BenchmarkFirst reads of a swtpm that was not read before, its build known.
func BenchmarkFirst(b *testing.B) {
	c := config(b)
	m := memory(b, c)
	v := start(b, c, b.TempDir())
	equal(b, m, v)
	for b.Loop() {
		m.Close()
		if _, err := m.Read(b.Context(), v.Target); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkKnown reads again.
func BenchmarkKnown(b *testing.B) {
	c := config(b)
	m := memory(b, c)
	v := start(b, c, b.TempDir())
	equal(b, m, v)
	for b.Loop() {
		if _, err := m.Read(b.Context(), v.Target); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkHundred reads 100 vTPMs, as in a round.
func BenchmarkHundred(b *testing.B) {
	c := config(b)
	m := memory(b, c)
	var all []*vtpm
	for range 100 {
		all = append(all, start(b, c, b.TempDir()))
	}
	if err := m.Calibrate(b.Context()); err != nil {
		b.Fatal(err)
	}
	round := func() {
		for _, v := range all {
			if _, err := m.Read(b.Context(), v.Target); err != nil {
				b.Fatal(err)
			}
		}
	}
	begin := time.Now()
	round()
	first := time.Since(begin)
	for b.Loop() {
		round()
	}
	b.ReportMetric(float64(first.Milliseconds()), "first-ms")
}

// BenchmarkCalibrate learns.
func BenchmarkCalibrate(b *testing.B) {
	m := memory(b, config(b))
	for b.Loop() {
		if err := m.Calibrate(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
