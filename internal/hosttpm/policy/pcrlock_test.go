package policy

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func hexOf(b byte) string { return hex.EncodeToString(bytes.Repeat([]byte{b}, 32)) }

// The shapes are those of systemd 255 and newer: pcrlock.json has more keys than
// are read, predict has a list for each bank.
func TestPCRLock(t *testing.T) {
	made := fmt.Sprintf(`{"pcrBank":"sha256","pcrValues":[{"pcr":4,"values":[%q]},{"pcr":7,"values":[%q,%q]}],"nvIndex":25165900,"nvHandle":"AA==","srkHandle":"AA=="}`, hexOf(4), hexOf(7), hexOf(8))
	predicted := fmt.Sprintf(`{"sha1":[{"pcr":7,"values":["00"]}],"sha256":[{"pcr":7,"values":[%q,%q]}]}`, hexOf(7), hexOf(8))
	for _, file := range []string{made, predicted} {
		states, which, err := ParsePCRLock([]byte(file), state())
		if err != nil || len(states) != 2 || !slices.Equal(which, []uint{7}) {
			t.Fatalf("%s gives %d states, PCRs %v, %v", file, len(states), which, err)
		}
		for i, want := range []byte{7, 8} {
			if s := states[i]; !bytes.Equal(s.PCRs[7], bytes.Repeat([]byte{want}, 32)) || !bytes.Equal(s.PCRs[14], state().PCRs[14]) || len(s.PCRs) != 3 {
				t.Errorf("state %d is %v", i, s)
			}
		}
	}
	var many []string
	for i := range maxCombinations + 1 {
		many = append(many, fmt.Sprintf("%q", hexOf(byte(i))))
	}
	for says, file := range map[string]string{
		"bank":            `{"pcrBank":"sha384","pcrValues":[]}`,
		"says nothing":    `{"pcrBank":"sha256","pcrValues":[{"pcr":3,"values":["00"]}]}`,
		"no value":        `{"pcrBank":"sha256","pcrValues":[{"pcr":7,"values":[]}]}`,
		"PCR 7 has":       `{"pcrBank":"sha256","pcrValues":[{"pcr":7,"values":["00"]}]}`,
		"combinations":    `{"pcrBank":"sha256","pcrValues":[{"pcr":7,"values":[` + strings.Join(many, ",") + `]}]}`,
		"prediction: inv": `no JSON`,
	} {
		if _, _, err := ParsePCRLock([]byte(file), state()); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", file, err, says)
		}
	}
}

func FuzzParsePCRLock(f *testing.F) {
	f.Add([]byte(`{"pcrBank":"sha256","pcrValues":[{"pcr":7,"values":["` + hexOf(1) + `"]}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		states, _, err := ParsePCRLock(b, state())
		if err != nil {
			return
		}
		for _, s := range states {
			if _, err := Digest(s, 1, epochName); err != nil || !slices.Equal(s.Indexes(), state().Indexes()) {
				t.Fatal(s, err)
			}
		}
	})
}
