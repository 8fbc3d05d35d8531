package appraise

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"virt-trust/internal/evidence/quote"
)

// corpus is what `lab corpus` writes: evidence of a real host, whose VMs have real
// vTPMs, with the TPM's own quotes.
type corpus struct {
	tb   testing.TB
	dir  string
	node Node
}

func openCorpus(tb testing.TB, dir string) *corpus {
	c := &corpus{tb: tb, dir: dir, node: Node{ID: nodeID}}
	o, err := quote.ParsePublic(c.file("ak"))
	if err != nil {
		tb.Fatal(err)
	}
	if c.node.AK, err = o.AK(); err != nil {
		tb.Fatal(err)
	}
	c.node.AKName = o.Name
	return c
}

func (c *corpus) file(name string) []byte {
	c.tb.Helper()
	b, err := os.ReadFile(filepath.Join(c.dir, name))
	if err != nil {
		c.tb.Fatal(err)
	}
	return b
}

// input is round "000" or so, of which the evidence may be incremental.
func (c *corpus) input(round, kind string, before *Checkpoint) Input {
	c.tb.Helper()
	policy := DefaultPolicy()
	policy.Starting = 0 // its VMs were started a moment before
	evidence := c.file(round + kind)
	parsed := Parse(evidence)
	if err := errors.Join(parsed.badEvidence, parsed.badReport); err != nil {
		c.tb.Fatal(err)
	}
	return Input{Node: c.node, Nonce: c.file(round + ".nonce"), Evidence: evidence, Previous: before, Policy: policy, Now: time.UnixMicro(parsed.report.Time)}
}

// learned gives the Reference Values of the corpus, out of its first round, and what
// the Verifier knows of the host after its second, which is of the logs' ends alone.
func (c *corpus) learned() ([]*Values, *Checkpoint) {
	c.tb.Helper()
	in := c.input("000", ".cbor", nil)
	in.Learn = true
	result, next, learned := Round(in)
	if result.Host.Tier != Affirming || len(result.VMs) == 0 {
		c.tb.Fatalf("%v %v", result.Host.Tier, codesOf(result.Host))
	}
	in = c.input("001", ".incremental.cbor", next)
	in.Values = []*Values{NewValues(learned)}
	result, next, _ = Round(in)
	if result.Host.Tier != Affirming {
		c.tb.Fatalf("%v %v", result.Host.Tier, codesOf(result.Host))
	}
	for _, v := range result.VMs {
		if v.Tier != Affirming {
			c.tb.Errorf("%s: %s %+v", v.UUID, v.Tier, v.Reasons)
		}
	}
	return in.Values, next
}

// What a host with version 0.3.0 sent is right for every later version.
func TestCorpus(t *testing.T) {
	c := openCorpus(t, "testdata/corpus")
	values, before := c.learned()
	in := c.input("002", ".incremental.cbor", before)
	in.Values = values
	r, _ := Appraise(in)
	if r.Host.Tier != Affirming || len(r.VMs) != 5 {
		t.Errorf("%v %v, %d VMs", r.Host.Tier, codesOf(r.Host), len(r.VMs))
	}
	for _, v := range r.VMs {
		if v.Tier != Affirming {
			t.Errorf("%s: %s %+v", v.UUID, v.Tier, v.Reasons)
		}
	}
	in.Nonce = c.file("000.nonce")
	if r, _ := Appraise(in); r.Host.Tier != Contraindicated || !slices.Contains(codesOf(r.Host), CodeNonce) {
		t.Errorf("with another nonce: %v %v", r.Host.Tier, codesOf(r.Host))
	}
}

// BenchmarkCorpus is BenchmarkAppraise over $VIRT_TRUST_CORPUS, a folder that `lab
// corpus` wrote.
func BenchmarkCorpus(b *testing.B) {
	dir := os.Getenv("VIRT_TRUST_CORPUS")
	if dir == "" {
		dir = "testdata/corpus"
	}
	c := openCorpus(b, dir)
	values, before := c.learned()
	for _, kind := range []string{".cbor", ".incremental.cbor"} {
		paths, err := filepath.Glob(filepath.Join(dir, "[0-9][0-9][0-9]"+kind))
		if err != nil {
			b.Fatal(err)
		}
		var all []Input
		for _, path := range paths {
			if kind != ".cbor" && filepath.Base(path) < "002" {
				continue // was before
			}
			in := c.input(filepath.Base(path)[:3], kind, before)
			if kind == ".cbor" {
				in.Previous = nil
			}
			in.Values = values
			all = append(all, in)
		}
		b.Run(kind[1:], func(b *testing.B) { ratio(b, all) })
	}
}
