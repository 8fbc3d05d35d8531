package eventlog

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
)

// Change is one difference between two logs.
type Change struct {
	PCR  uint
	What string // "kernel command line changed from … to …"
}

// maxCells bounds the work of a comparison: pairs of events of one PCR that are
// held against each other.
const maxCells = 4 << 20

// Diff says how the log now differs from the log was, in the PCRs named:
// nothing for those that both bring to the same value in a bank.
func Diff(was, now *Log, bank string, pcrs []uint) ([]Change, error) {
	a, err := was.Bank(bank)
	if err != nil {
		return nil, err
	}
	b, err := now.Bank(bank)
	if err != nil {
		return nil, err
	}
	var all []Change
	if localityOf(a) != localityOf(b) && slices.Contains(pcrs, 0) {
		all = append(all, Change{0, fmt.Sprintf("locality from which the TPM was started changed from %d to %d", localityOf(a), localityOf(b))})
	}
	for _, p := range pcrs {
		all = append(all, diff(p, a.of(p), b.of(p))...)
	}
	// An image that is measured twice, as a kernel is by shim and GRUB, is told once.
	return slices.Compact(all), nil
}

func localityOf(l *Log) int {
	for _, e := range l.Events {
		if loc, ok := bytes.CutPrefix(e.Data, []byte(localitySignature)); ok && e.Type == NoAction && len(loc) == 1 {
			return int(loc[0])
		}
	}
	return 0
}

// of gives what was measured into a PCR.
func (l *Log) of(pcr uint) []*Event {
	var all []*Event
	for i := range l.Events {
		if e := &l.Events[i]; uint(e.PCR) == pcr && e.measured() {
			all = append(all, e)
		}
	}
	return all
}

func same(a, b *Event) bool {
	return bytes.Equal(a.digest(), b.digest())
}

// digest is the only one of an event of a Bank.
func (e *Event) digest() []byte {
	if len(e.Digests) == 0 {
		return nil
	}
	return e.Digests[0]
}

// diff aligns two sequences of events by what they have in common, and names
// what is between.
func diff(pcr uint, a, b []*Event) []Change {
	var head int
	for head < len(a) && head < len(b) && same(a[head], b[head]) {
		head++
	}
	a, b = a[head:], b[head:]
	for len(a) > 0 && len(b) > 0 && same(a[len(a)-1], b[len(b)-1]) {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	if len(a)*len(b) > maxCells {
		return []Change{{pcr, fmt.Sprintf("%d events differ from %d", len(b), len(a))}}
	}
	// Longest common subsequence, from the end.
	length := make([][]int, len(a)+1)
	for i := range length {
		length[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if same(a[i], b[j]) {
				length[i][j] = length[i+1][j+1] + 1
			} else {
				length[i][j] = max(length[i+1][j], length[i][j+1])
			}
		}
	}
	var all []Change
	var gone, come []*Event
	flush := func() {
		all = append(all, between(pcr, gone, come)...)
		gone, come = nil, nil
	}
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case i < len(a) && j < len(b) && same(a[i], b[j]):
			flush()
			i, j = i+1, j+1
		case j == len(b) || i < len(a) && length[i+1][j] >= length[i][j+1]:
			gone = append(gone, a[i])
			i++
		default:
			come = append(come, b[j])
			j++
		}
	}
	flush()
	return all
}

// between pairs events of one kind, in their order; the rest went or came.
func between(pcr uint, gone, come []*Event) []Change {
	var all []Change
	for _, g := range gone {
		was := g.Describe()
		n := slices.IndexFunc(come, func(c *Event) bool { return c.Describe().kind == was.kind })
		if n < 0 {
			all = append(all, Change{pcr, was.What + value(was) + " is not there any more"})
			continue
		}
		all = append(all, Change{pcr, changed(g, come[n])})
		come = slices.Delete(slices.Clone(come), n, n+1)
	}
	for _, c := range come {
		now := c.Describe()
		all = append(all, Change{pcr, now.What + value(now) + " is new"})
	}
	return all
}

func value(d Description) string {
	if d.Value == "" {
		return ""
	}
	return fmt.Sprintf(" %q", d.Value)
}

func changed(a, b *Event) string {
	was, now := a.Describe(), b.Describe()
	digests := fmt.Sprintf("digest %s, was %s", short(b.digest()), short(a.digest()))
	switch {
	case was.What != now.What:
		return fmt.Sprintf("%s took the place of %s (%s)", now.What, was.What, digests)
	case was.Value != now.Value:
		return fmt.Sprintf("%s changed from %q to %q", now.What, was.Value, now.Value)
	}
	return fmt.Sprintf("%s changed (%s)", now.What, digests)
}

func short(digest []byte) string {
	if len(digest) <= 8 {
		return hex.EncodeToString(digest)
	}
	return hex.EncodeToString(digest[:8]) + "…"
}
