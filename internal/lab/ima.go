package lab

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// IMAList is where a host's kernel keeps its measurement list: attestation.ima_list
// of its virt-trustd.toml. The machine's own kernel has no IMA, and would measure
// the machine; so tests play the kernel with Measure.
const IMAList = labDir + "/ima"

// bootLog is where a host whose boot is measured has its event log.
const bootLog = labDir + "/boot.bin"

// AttestationConfig is a virt-trustd.toml of a host whose kernel measures, for
// HostOptions.Setup.
const AttestationConfig = "[tpm]\ndevice = \"" + TPMSocket + "\"\nevent_log = \"" + bootLog + "\"\n[attestation]\nima_list = \"" + IMAList + "\"\n"

// A Measurement is a file that the kernel measures before it is run or mapped.
type Measurement struct {
	Path   string
	Digest [sha256.Size]byte
}

// Executed is the measurement of a file with this content.
func Executed(path string, content []byte) Measurement {
	return Measurement{path, sha256.Sum256(content)}
}

// Entry gives the measurement as the list has it, in binary: template ima-ng
// (security/integrity/ima/ima_fs.c). data is what is hashed, for each bank with
// its own hash, to extend PCR 10.
func (m Measurement) Entry() (line, data []byte) {
	field := func(b []byte) []byte { return append(binary.LittleEndian.AppendUint32(nil, uint32(len(b))), b...) }
	data = slices.Concat(field(append([]byte("sha256:\x00"), m.Digest[:]...)), field([]byte(m.Path+"\x00")))
	digest := sha1.Sum(data)
	return slices.Concat(binary.LittleEndian.AppendUint32(nil, 10), digest[:], field([]byte("ima-ng")), field(data)), data
}

// Measure has the host's kernel measure files, in this order: first the list,
// then PCR 10, as it does.
func (h *Host) Measure(all ...Measurement) {
	h.t.Helper()
	var list bytes.Buffer
	var extend strings.Builder
	for _, m := range all {
		line, data := m.Entry()
		list.Write(line)
		fmt.Fprintf(&extend, "10:sha1=%x,sha256=%x,sha384=%x,sha512=%x\n", sha1.Sum(data), sha256.Sum256(data), sha512.Sum384(data), sha512.Sum512(data))
	}
	h.input(list.String(), "sh", "-c", "cat >>"+IMAList)
	h.input(extend.String(), "xargs", "-n", "50", "tpm2_pcrextend", "-T", "swtpm:path="+TPMSocket)
}

// input is Must with something to read.
func (h *Host) input(stdin string, args ...string) {
	h.t.Helper()
	if r := h.RunInput(stdin, args...); r.Code != 0 {
		h.t.Fatalf("%s: exit %d: %s%s", args[0], r.Code, r.Stdout, r.Stderr)
	}
}
