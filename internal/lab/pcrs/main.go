// Command pcrs reads the PCRs of a VM's vTPM on a lab host as virt-trustd does,
// and prints each reading as a line of JSON.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"time"

	"virt-trust/internal/evidence/report"
	"virt-trust/internal/introspect"
	"virt-trust/internal/introspect/inject"
)

type line struct {
	Reading *report.Reading `json:",omitempty"`
	Quote   *report.Quote   `json:",omitempty"`
	Took    time.Duration
	Held    time.Duration `json:",omitempty"`
}

func main() {
	n := flag.Int("n", 1, "readings")
	pause := flag.Duration("pause", 0, "between two")
	state := flag.String("state", "", "folder of the vTPM's state")
	program := flag.String("inject", "", "ask the vTPM by this virt-trust-inject")
	ak := flag.Uint64("ak", 0, "have this key quote, too")
	flag.Parse()
	if err := run(*n, *pause, *state, *program, uint32(*ak)); err != nil {
		fmt.Fprintln(os.Stderr, "pcrs:", err)
		os.Exit(1)
	}
}

func run(n int, pause time.Duration, state, program string, ak uint32) error {
	m := introspect.NewMemory(introspect.Config{Swtpm: "/usr/bin/swtpm", Dir: "/run/virt-trust"})
	defer m.Close()
	q := inject.Quoter{Program: program}
	t := introspect.Target{StateDir: state}
	out := json.NewEncoder(os.Stdout)
	for i := range n {
		var l line
		begin := time.Now()
		if program == "" {
			r, err := m.Read(context.Background(), t)
			if err != nil {
				return fmt.Errorf("reading %d: %w", i, err)
			}
			l.Reading = r
		} else {
			r := inject.Request{Target: t}
			if ak != 0 {
				r.AK, r.Qualifying = ak, []byte(fmt.Sprint("round ", i))
			}
			a, err := q.Ask(context.Background(), r)
			if err != nil {
				return fmt.Errorf("asking, time %d: %w", i, err)
			}
			l.Reading, l.Quote, l.Held = a.Reading, a.Quote, a.Held
		}
		l.Took = time.Since(begin)
		if err := out.Encode(l); err != nil {
			return err
		}
		time.Sleep(pause)
	}
	return nil
}
