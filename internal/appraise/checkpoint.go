package appraise

import (
	"errors"
	"fmt"
	"slices"

	"github.com/fxamacker/cbor/v2"

	"virt-trust/internal/evidence/ima"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/launcher/launchlog"
)

// Checkpoint is what is kept of a node from one round to the next: how far its
// logs were replayed, and what in them was not right, so that only what is new has
// to be sent and hashed. It comes out of verified Evidence alone; Evidence that
// could not be verified leaves it as it was. A Checkpoint is not changed: each
// round gives a new one.
type Checkpoint struct {
	Version  uint   `cbor:"1,keyasint"`
	BootID   string `cbor:"2,keyasint"`
	Clock    uint64 `cbor:"3,keyasint"` // of the TPM, milliseconds
	Resets   uint32 `cbor:"4,keyasint"`
	Restarts uint32 `cbor:"5,keyasint"`
	// Values and Policy are the revisions under which Accepted and findings are.
	Values   uint64 `cbor:"6,keyasint"`
	Policy   uint64 `cbor:"7,keyasint"`
	Received int64  `cbor:"8,keyasint"` // seconds since 1970

	Events eventState  `cbor:"9,keyasint"`
	IMA    imaState    `cbor:"10,keyasint"`
	Launch launchState `cbor:"11,keyasint"`

	// Learned: the host's first good round is over.
	Learned bool               `cbor:"12,keyasint"`
	VMs     map[string]vmState `cbor:"13,keyasint"` // by UUID, of all that were ever reported and are not deleted
	Host    Tier               `cbor:"14,keyasint"`
	PCRs    pcrs               `cbor:"15,keyasint"`
	// Hides is what the TPM adds to the number of its resets in what the AK signs,
	// as a launch log told that has the true number.
	Hides *uint32 `cbor:"16,keyasint"`
	// Launchers: the first good round that had any is over.
	Launchers bool `cbor:"17,keyasint"`
}

// eventState is of the firmware's and boot loader's event log, which does not
// grow within a boot.
type eventState struct {
	Size   uint64   `cbor:"1,keyasint"`
	Packed []byte   `cbor:"2,keyasint"` // the log of the one bank: see pack
	Bank   string   `cbor:"3,keyasint"`
	Values pcrs     `cbor:"4,keyasint"` // that it replayed to
	Found  []Reason `cbor:"5,keyasint"`
}

// imaState is of the IMA measurement list.
type imaState struct {
	At    ima.Checkpoint `cbor:"1,keyasint"`
	Found []imaFinding   `cbor:"2,keyasint"` // entries that were not accepted, oldest first
	More  uint64         `cbor:"3,keyasint"` // that there was no room for
	// Accepted are two marks of each entry that Reference Values accepted, 8 bytes
	// each: for its path and for any path. A value that is withdrawn later is missed.
	Accepted []byte `cbor:"4,keyasint"`
}

// imaFinding is an entry that was not accepted when it was read.
type imaFinding struct {
	Entry     int    `cbor:"1,keyasint"`
	Path      string `cbor:"2,keyasint"`
	Digest    []byte `cbor:"3,keyasint"` // algorithm and digest, as in Values
	Violation bool   `cbor:"4,keyasint"`
	Code      string `cbor:"5,keyasint,omitempty"` // of a finding that Reference Values cannot lift
	What      string `cbor:"6,keyasint,omitempty"`
}

// launchState is of the launch log.
type launchState struct {
	Size    uint64             `cbor:"1,keyasint"`
	Boot    *launchlog.Boot    `cbor:"2,keyasint"`
	Entries int                `cbor:"3,keyasint"`
	Files   []launchlog.File   `cbor:"4,keyasint"`
	Values  map[string][]byte  `cbor:"5,keyasint"`
	Starts  map[string]vmStart `cbor:"6,keyasint"` // the newest of each VM, by UUID
}

type vmStart struct {
	Generation uint64 `cbor:"1,keyasint"`
	EK         string `cbor:"2,keyasint"`
	Time       int64  `cbor:"3,keyasint"`
	Launchers  []int  `cbor:"4,keyasint"`
}

// vmState is of one VM.
type vmState struct {
	Name    string  `cbor:"1,keyasint"`
	EK      []byte  `cbor:"2,keyasint"`
	Learned bool    `cbor:"3,keyasint"`
	Running bool    `cbor:"4,keyasint"`
	Tier    Tier    `cbor:"5,keyasint"`
	PCRs    pcrs    `cbor:"6,keyasint"`
	Start   vmStart `cbor:"7,keyasint"`
}

const checkpointVersion = 2

// MaxCheckpoint bounds a checkpoint, in bytes.
const MaxCheckpoint = 64 << 20

var encMode, decMode = modes()

func modes() (cbor.EncMode, cbor.DecMode) {
	e, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		panic(err)
	}
	d, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		MaxArrayElements: 1 << 17, MaxMapPairs: 1 << 17, MaxNestedLevels: 8,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return e, d
}

// Encode gives the checkpoint's bytes, for the store.
func (c *Checkpoint) Encode() ([]byte, error) { return encMode.Marshal(c) }

// ErrCheckpoint says that bytes are no checkpoint, or one of another version.
// The round is then a first one, of which nothing is learned.
var ErrCheckpoint = errors.New("not a checkpoint")

// DecodeCheckpoint reads what Encode gave; of no bytes it gives nil.
func DecodeCheckpoint(b []byte) (*Checkpoint, error) {
	if len(b) == 0 {
		return nil, nil
	}
	c := &Checkpoint{}
	if len(b) > MaxCheckpoint {
		return nil, fmt.Errorf("%w: %d bytes", ErrCheckpoint, len(b))
	}
	if err := decMode.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCheckpoint, err)
	}
	if c.Version != checkpointVersion {
		return nil, fmt.Errorf("%w: version %d", ErrCheckpoint, c.Version)
	}
	return c, nil
}

// Have says which logs of which boot need not be sent again: bytes, by kind of
// log. A nil Checkpoint has nothing.
func (c *Checkpoint) Have() (bootID string, offsets map[string]uint64) {
	if c == nil {
		return "", nil
	}
	return c.BootID, map[string]uint64{
		report.EventLog: c.Events.Size, report.IMA: c.IMA.At.Offset, report.LaunchLog: c.Launch.Size,
	}
}

// clone is a copy whose fields, not what they refer to, may be set.
func (c *Checkpoint) clone() *Checkpoint {
	n := &Checkpoint{Version: checkpointVersion}
	if c != nil {
		*n = *c
	}
	n.IMA.Found = slices.Clone(n.IMA.Found)
	return n
}
