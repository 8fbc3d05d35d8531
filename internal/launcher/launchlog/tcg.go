package launchlog

import (
	"encoding/binary"
	"fmt"
)

// Numbers of the TCG PC Client Platform Firmware Profile, 1.06, 10.2 and 10.4.
const (
	evNoAction = 0x00000003
	evIPL      = 0x0000000D
)

var algorithms = map[string]uint16{"sha1": 0x0004, "sha256": 0x000B, "sha384": 0x000C, "sha512": 0x000D}

// TCG gives a log file in the TCG's crypto-agile event log format, as
// tpm2_eventlog(1) reads it: a Spec ID event, then each line as an EV_IPL event
// of the log's PCR, with its digest in each bank. What the PCR held before stands
// in the first line alone: the format has no place for it.
func TCG(file []byte) ([]byte, error) {
	l := &Log{}
	var events []byte
	lines, _ := Split(file)
	for _, line := range lines {
		if err := l.Add(line); err != nil {
			return nil, err
		}
		// TCG_PCR_EVENT2 (10.2.2)
		events = binary.LittleEndian.AppendUint32(events, uint32(l.Boot.PCR))
		events = binary.LittleEndian.AppendUint32(events, evIPL)
		digests := Digests(line, l.Values)
		events = binary.LittleEndian.AppendUint32(events, uint32(len(digests)))
		for _, bank := range Banks(digests) {
			events = binary.LittleEndian.AppendUint16(events, algorithms[bank])
			events = append(events, digests[bank]...)
		}
		events = binary.LittleEndian.AppendUint32(events, uint32(len(line)))
		events = append(events, line...)
	}
	if l.Entries == 0 {
		return nil, fmt.Errorf("%w: it is empty", ErrFormat)
	}
	return append(specID(l.Values), events...), nil
}

// specID is TCG_EfiSpecIDEvent (10.4.5.1) in a TCG_PCR_EVENT (10.2.1).
func specID(values map[string][]byte) []byte {
	e := append([]byte(nil), "Spec ID Event03\x00"...)
	e = binary.LittleEndian.AppendUint32(e, 0) // platformClass: client
	e = append(e, 0, 2, 0, 2)                  // version 2.0, errata 0; uintnSize: 64 bits
	e = binary.LittleEndian.AppendUint32(e, uint32(len(values)))
	for _, bank := range Banks(values) {
		e = binary.LittleEndian.AppendUint16(e, algorithms[bank])
		e = binary.LittleEndian.AppendUint16(e, uint16(hashes[bank].Size()))
	}
	e = append(e, 0) // vendorInfoSize

	b := binary.LittleEndian.AppendUint32(nil, 0)
	b = binary.LittleEndian.AppendUint32(b, evNoAction)
	b = append(b, make([]byte, 20)...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(e)))
	return append(b, e...)
}
