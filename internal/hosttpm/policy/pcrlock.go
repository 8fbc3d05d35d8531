package policy

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// maxCombinations of a prediction's alternatives are approved: each is a
// signature and a file.
const maxCombinations = 32

// pcrlockJSON is what systemd-pcrlock writes to /var/lib/systemd/pcrlock.json
// (make-policy), and, a list for each bank, to standard output (predict --json).
type pcrlockJSON struct {
	Bank   string         `json:"pcrBank"`
	Values []pcrlockValue `json:"pcrValues"`
	SHA256 []pcrlockValue `json:"sha256"`
	SHA384 []pcrlockValue `json:"sha384"`
}

type pcrlockValue struct {
	PCR    uint     `json:"pcr"`
	Values []string `json:"values"`
}

// ParsePCRLock reads a prediction of systemd-pcrlock, and gives the states that
// it allows: every combination of the values that it has for the PCRs of now.
// PCRs of now that it says nothing of, since it cannot predict them, stay as they
// are; predicted gives those that it does.
func ParsePCRLock(b []byte, now State) (states []State, predicted []uint, err error) {
	if len(b) > maxFile {
		return nil, nil, fmt.Errorf("prediction of %d bytes, at most %d", len(b), maxFile)
	}
	var j pcrlockJSON
	if err := json.Unmarshal(b, &j); err != nil {
		return nil, nil, fmt.Errorf("systemd-pcrlock's prediction: %w", err)
	}
	values := map[string][]pcrlockValue{"sha256": j.SHA256, "sha384": j.SHA384}[now.Bank]
	if j.Bank != "" {
		if j.Bank != now.Bank {
			return nil, nil, fmt.Errorf("systemd-pcrlock's prediction is of bank %q, and %s is used", j.Bank, now.Bank)
		}
		values = j.Values
	}
	states = []State{{Bank: now.Bank, PCRs: map[uint][]byte{}}}
	for _, i := range now.Indexes() {
		alternatives := [][]byte{now.PCRs[i]}
		if n := slices.IndexFunc(values, func(v pcrlockValue) bool { return v.PCR == i }); n >= 0 {
			predicted, alternatives = append(predicted, i), nil
			for _, s := range values[n].Values {
				v, err := hex.DecodeString(s)
				if err != nil {
					return nil, nil, fmt.Errorf("systemd-pcrlock's prediction, PCR %d: %w", i, err)
				}
				alternatives = append(alternatives, v)
			}
			if len(alternatives) == 0 {
				return nil, nil, fmt.Errorf("systemd-pcrlock's prediction has no value for PCR %d", i)
			}
		}
		if len(states)*len(alternatives) > maxCombinations {
			return nil, nil, fmt.Errorf("systemd-pcrlock's prediction has more than %d combinations", maxCombinations)
		}
		var more []State
		for _, s := range states {
			for _, v := range alternatives {
				n := State{Bank: s.Bank, PCRs: map[uint][]byte{i: v}}
				for k, o := range s.PCRs {
					n.PCRs[k] = o
				}
				more = append(more, n)
			}
		}
		states = more
	}
	if len(predicted) == 0 {
		return nil, nil, errors.New("systemd-pcrlock's prediction says nothing of the PCRs that count here")
	}
	for _, s := range states {
		if err := s.Check(); err != nil {
			return nil, nil, fmt.Errorf("systemd-pcrlock's prediction: %w", err)
		}
	}
	return states, predicted, nil
}
