package hosttpm

import (
	"testing"
	"time"
)

// BenchmarkUnwrapKeys measures what a VM's start asks of the TPM: on a
// connection that is there, and on one that has to be made first.
func BenchmarkUnwrapKeys(b *testing.B) {
	e, dir, _ := startMade(b)
	h := open(b, e.Socket, dir)
	ct := wrapped(b, h)
	run := func(b *testing.B) {
		if _, err := h.UnwrapKeys(b.Context(), ct); err != nil {
			b.Fatal(err)
		}
	}
	commands := func() (n int) {
		for _, v := range h.Timings() {
			n += v.Count
		}
		return n
	}
	for name, before := range map[string]func(){
		"warm": func() {},
		"cold": func() {
			do(b.Context(), h, func(c *client) (struct{}, error) { c.hangUp(); return struct{}{}, nil })
		},
	} {
		b.Run(name, func(b *testing.B) {
			run(b)
			total, took := 0, time.Duration(0)
			for b.Loop() {
				before()
				n, began := commands(), time.Now()
				run(b)
				took += time.Since(began)
				total += commands() - n
			}
			b.ReportMetric(float64(total)/float64(b.N), "commands/op")
			b.ReportMetric(float64(took.Microseconds())/1000/float64(b.N), "ms/unwrap")
		})
	}
}
