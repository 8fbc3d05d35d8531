package main

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"virt-trust/internal/evidence/report"
	"virt-trust/internal/lab"
)

// corpus writes evidence of a real host with running VMs, for benchmarks of
// verifiers, this one or another: per round the evidence as it is sent whole
// (N.cbor) and when the logs are known already (N.incremental.cbor), its nonce,
// and the quote as TPMS_ATTEST and TPMT_SIGNATURE (N.attest, N.signature); beside
// them the AK (ak, TPMT_PUBLIC) and the newest logs. The host's kernel is played
// by the lab (Host.Measure), its TPM by swtpm; it sends no firmware log.
func corpus(s *session, args []string) {
	flags := flag.NewFlagSet("corpus", flag.ExitOnError)
	vms := flags.Int("vms", 5, "running VMs")
	entries := flags.Int("entries", 1000, "files that the host's kernel has measured")
	rounds := flags.Int("rounds", 20, "rounds")
	flags.Parse(args)
	dir := flags.Arg(0)
	if dir == "" {
		s.Fatalf("corpus needs a folder to write to")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		s.Fatalf("%v", err)
	}
	write := func(name string, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			s.Fatalf("%v", err)
		}
	}

	h := lab.NewHost(s, lab.HostOptions{Name: "corpus", Deb: s.deb(), Setup: func(path func(string) string) error {
		return os.WriteFile(path("/etc/virt-trust/virt-trustd.toml"), []byte(lab.AttestationConfig), 0o644)
	}})
	var files []lab.Measurement
	for i := range *entries {
		name := fmt.Sprintf("/usr/lib/x86_64-linux-gnu/libexample-%d.so", i)
		files = append(files, lab.Executed(name, []byte(name)))
	}
	h.Measure(files...)
	for i := range *vms {
		g := h.NewVM(lab.VM{Name: fmt.Sprint("vm", i), TPM: true, Disk: "qcow2"})
		g.Start()
		g.Ask("ek") // it is up
	}
	var identity struct {
		Data []map[string]struct {
			Data json.RawMessage `json:"data"`
		} `json:"data"`
	}
	out := h.Must("busctl", "--json=short", "call", "org.virttrust1", "/org/virttrust1/host", "org.virttrust1.Attestation", "Identity", "a{sv}", "0")
	if err := json.Unmarshal([]byte(out), &identity); err != nil || len(identity.Data) != 1 {
		s.Fatalf("Identity: %v: %s", err, out)
	}
	var ak []uint16 // bytes, which JSON has as numbers
	if err := json.Unmarshal(identity.Data[0]["ak"].Data, &ak); err != nil || len(ak) == 0 {
		s.Fatalf("Identity has no AK: %v: %s", err, out)
	}
	area := make([]byte, len(ak))
	for i, b := range ak {
		area[i] = byte(b)
	}
	write("ak", area)
	for n := range *rounds {
		nonce := make([]byte, report.NonceSize)
		rand.Read(nonce)
		h.Must("virt-trust", "evidence", "--nonce", hex.EncodeToString(nonce), "-o", "/root/evidence.cbor")
		whole := h.ReadFile("/root/evidence.cbor")
		e, err := report.UntrustedParse(whole)
		if err != nil {
			s.Fatalf("%v", err)
		}
		name := fmt.Sprintf("%03d", n)
		write(name+".cbor", whole)
		write(name+".nonce", nonce)
		write(name+".attest", e.Quote.Attest)
		write(name+".signature", e.Quote.Signature)
		for i := range e.Logs {
			l := &e.Logs[i]
			write(l.Kind, l.Data)
			l.From, l.Data = l.From+uint64(len(l.Data)), nil
		}
		known, err := e.Encode()
		if err != nil {
			s.Fatalf("%v", err)
		}
		write(name+".incremental.cbor", known)
	}
	fmt.Printf("%d rounds of a host with %d VMs and %d measured files are in %s\n", *rounds, *vms, *entries, dir)
}
