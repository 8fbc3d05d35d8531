package main

import (
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// worker extends PCR 16 for as long as it is let, so that whoever reads PCRs
// meanwhile never does so at rest, however fast he is.
type worker struct {
	stop atomic.Bool
	done sync.WaitGroup
	n    int // how often it extended, of use when done
	err  error
}

// load begins.
func (w *worker) load() {
	w.stop.Store(false)
	w.n, w.err = 0, nil
	w.done.Go(func() {
		w.err = withTPM(func(tpm transport.TPM) error {
			for !w.stop.Load() {
				if err := extendAll(tpm, fmt.Appendf(nil, "extend %d", w.n)); err != nil {
					return err
				}
				w.n++
			}
			return nil
		})
	})
}

// rest ends, and tells how often it extended; asked again, it tells so again.
func (w *worker) rest() (int, error) {
	w.stop.Store(true)
	w.done.Wait()
	return w.n, w.err
}

// extendAll extends PCR 16, in all banks, by the digests of a text.
func extendAll(tpm transport.TPM, text []byte) error {
	d1, d256, d384, d512 := sha1.Sum(text), sha256.Sum256(text), sha512.Sum384(text), sha512.Sum512(text)
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: 16, Auth: tpm2.PasswordAuth(nil)},
		Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{
			{HashAlg: tpm2.TPMAlgSHA1, Digest: d1[:]}, {HashAlg: tpm2.TPMAlgSHA256, Digest: d256[:]},
			{HashAlg: tpm2.TPMAlgSHA384, Digest: d384[:]}, {HashAlg: tpm2.TPMAlgSHA512, Digest: d512[:]},
		}},
	}.Execute(tpm)
	return err
}

// pcrs gives the SHA-256 digest of all PCRs as the guest's own vTPM has them, in
// the form "sha256 HEX HEX … sha512 HEX …": a busy machine's serial port now and
// then says a character twice, which a short line seldom meets.
func pcrs(tpm transport.TPM) (string, error) {
	names := map[tpm2.TPMIAlgHash]string{tpm2.TPMAlgSHA1: "sha1", tpm2.TPMAlgSHA256: "sha256", tpm2.TPMAlgSHA384: "sha384", tpm2.TPMAlgSHA512: "sha512"}
	r, err := tpm2.GetCapability{Capability: tpm2.TPMCapPCRs, PropertyCount: 1}.Execute(tpm)
	if err != nil {
		return "", err
	}
	active, err := r.CapabilityData.Data.AssignedPCR()
	if err != nil {
		return "", err
	}
	var words []string
	for _, bank := range active.PCRSelections {
		if strings.Trim(string(bank.PCRSelect), "\x00") == "" {
			continue
		}
		words = append(words, names[bank.Hash])
		for i := range 3 {
			sel := []byte{0, 0, 0}
			sel[i] = 0xff
			r, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: bank.Hash, PCRSelect: sel}}}}.Execute(tpm)
			if err != nil {
				return "", err
			}
			for _, d := range r.PCRValues.Digests {
				words = append(words, fmt.Sprintf("%x", d.Buffer))
			}
		}
	}
	return fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Join(words, " ")))), nil
}
