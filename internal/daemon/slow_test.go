package daemon

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"virt-trust/internal/domain"
)

// Starts wait for the TPM and for nothing else: while it works on the keys of
// one VM all others have come as far as that, each with one question; and what
// needs no TPM goes on.
func TestStartsWaitForTheTPMAlone(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	const vms = 6
	var all []*domain.Facts
	for i := range vms {
		f := h.vm(fmt.Sprintf("cccccccc-0000-4000-8000-%012d", i), true)
		h.start(f)
		h.stop(f)
		all = append(all, f)
	}
	running, _, _ := h.ran(uuidA)
	key := h.start(running)

	h.tpm.mu.Lock()
	h.tpm.held, h.tpm.unwraps = make(chan struct{}), 0
	h.tpm.mu.Unlock()
	var wg sync.WaitGroup
	for _, f := range all {
		wg.Go(func() {
			if err := h.prepare(f); err != nil {
				t.Error(err)
			}
		})
	}
	asking := func() int {
		h.tpm.mu.Lock()
		defer h.tpm.mu.Unlock()
		return h.tpm.asking
	}
	for end := time.Now().Add(10 * time.Second); asking() < vms; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d of %d have come to the TPM", asking(), vms)
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.write(uuidA, key)
		h.noted(uuidA)
		h.stop(running)
		h.g.listState()
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Error("the life of a VM that runs waits for the TPM")
	}
	close(h.tpm.held)
	wg.Wait()
	if h.tpm.unwraps != vms {
		t.Errorf("%d warm starts took %d decryptions", vms, h.tpm.unwraps)
	}
}
