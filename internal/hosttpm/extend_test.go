package hosttpm

import (
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"maps"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"virt-trust/internal/hosttpm/link"
	"virt-trust/internal/launcher/launchlog"
	"virt-trust/internal/testkit"
)

// TestExtendPCR extends in every bank of a real swtpm with one command, and
// finds what was computed.
func TestExtendPCR(t *testing.T) {
	e := startEmulator(t)
	h := open(t, e.Socket, testkit.Folder(t))
	ctx := context.Background()
	before, err := h.ReadPCR(ctx, 15)
	if err != nil {
		t.Fatal(err)
	}
	if len(before.Values) < 2 || !launchlog.Zero(before.Values) {
		t.Fatalf("PCR 15 of a new TPM: %x", before.Values)
	}
	event := []byte("an event")
	digests := launchlog.Digests(event, before.Values)
	s1, s256, s384 := sha1.Sum(event), sha256.Sum256(event), sha512.Sum384(event)
	for bank, want := range map[string][]byte{"sha1": s1[:], "sha256": s256[:], "sha384": s384[:]} {
		if got, active := digests[bank]; active && !bytes.Equal(got, want) {
			t.Errorf("%s of the event: %x", bank, got)
		}
	}
	after := launchlog.Extended(before.Values, event)
	count := h.Timings()["PCR_Extend"].Count
	if err := h.ExtendPCR(ctx, Extension{PCR: 15, Digests: digests, Before: before.Values, After: after}); err != nil {
		t.Fatal(err)
	}
	if n := h.Timings()["PCR_Extend"].Count - count; n != 1 {
		t.Errorf("%d commands for one extension", n)
	}
	now, err := h.ReadPCR(ctx, 15)
	if err != nil {
		t.Fatal(err)
	}
	if !maps.EqualFunc(now.Values, after, bytes.Equal) {
		t.Errorf("PCR 15 is %x, not %x", now.Values, after)
	}
	if now.ResetCount != before.ResetCount {
		t.Errorf("the reset count went from %d to %d by itself", before.ResetCount, now.ResetCount)
	}
	h.Close()
	e.Stop()
	e.Start()
	again, err := open(t, e.Socket, testkit.Folder(t)).ReadPCR(ctx, 15)
	if err != nil {
		t.Fatal(err)
	}
	if again.ResetCount == before.ResetCount || !launchlog.Zero(again.Values) {
		t.Errorf("after a reset: count %d as before, or PCR 15 %x", again.ResetCount, again.Values)
	}
}

// TestExtendPCROnce breaks the connection after the TPM has extended: the
// second try must see that it is done, and one that finds another value must
// not extend at all.
func TestExtendPCROnce(t *testing.T) {
	e := startEmulator(t)
	ctx := context.Background()
	for name, foreign := range map[string]bool{"done": false, "somebody else": true} {
		t.Run(name, func(t *testing.T) {
			h := open(t, e.Socket, testkit.Folder(t))
			before, err := h.ReadPCR(ctx, 14)
			if err != nil {
				t.Fatal(err)
			}
			event := []byte("event of " + name)
			x := Extension{PCR: 14, Digests: launchlog.Digests(event, before.Values), Before: before.Values, After: launchlog.Extended(before.Values, event)}
			first := true
			_, err = do(ctx, h, func(c *client) (struct{}, error) {
				err := c.extend(x, !first)
				if first {
					first = false
					if foreign {
						_, _ = tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: 14, Auth: tpm2.PasswordAuth(nil)},
							Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}}}.Execute(c)
					}
					return struct{}{}, link.ErrBroken
				}
				return struct{}{}, err
			})
			if (err != nil) != foreign {
				t.Fatalf("the second try: %v", err)
			}
			now, err := h.ReadPCR(ctx, 14)
			if err != nil {
				t.Fatal(err)
			}
			if !foreign && !maps.EqualFunc(now.Values, x.After, bytes.Equal) {
				t.Errorf("extended twice: %x", now.Values)
			}
		})
	}
}
